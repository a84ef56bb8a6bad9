//! A shared library asked for its ONNX Runtime version.
//!
//! In: the path or the bare name of a library. Out: what its `GetVersionString` answers. This
//! is done before the library is handed to `ort`, which aborts on an API that it does not know and
//! says little about why.
//!
//! The only module of the runtime with `unsafe` code; the argument stands beside it.

use std::ffi::{CStr, OsStr};

/// Why a library did not answer.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The dynamic loader refused it.
    Open(libloading::Error),
    /// It loaded, and is not ONNX Runtime.
    NotOnnxRuntime,
}

/// Loads the library and returns the version that it reports, such as `1.32.0`.
///
/// The library stays loaded for the life of the process: opening it again (as `ort` does) then costs
/// nothing, and nothing that it registered with the system can dangle.
#[allow(unsafe_code)]
pub(crate) fn version_of(path: &OsStr) -> Result<String, Failure> {
    // SAFETY: loading a library runs its initializers. They are those of a library which the
    // user named, installed, or had fetched with a pinned digest in order to have it run here; `ort`
    // runs the same ones. A library that is no ONNX Runtime is as trusted as its path, no more.
    let library = unsafe { libloading::Library::new(path) }.map_err(Failure::Open)?;
    // Never unloaded, so every pointer below stays valid.
    let library: &'static libloading::Library = Box::leak(Box::new(library));
    // SAFETY: `OrtGetApiBase` has this signature in every release since 1.0 (onnxruntime_c_api.h:
    // `ORT_EXPORT const OrtApiBase* ORT_API_CALL OrtGetApiBase(void)`), and the name is its own.
    let get = unsafe {
        library.get::<unsafe extern "system" fn() -> *const ort::sys::OrtApiBase>(b"OrtGetApiBase")
    }
    .map_err(|_| Failure::NotOnnxRuntime)?;
    // SAFETY: takes no argument; returns null or a pointer to a static of the library, whose two
    // function pointers are ABI-stable. Null is checked by `as_ref`.
    let base = unsafe { get().as_ref() }.ok_or(Failure::NotOnnxRuntime)?;
    // SAFETY: takes no argument; returns a NUL-terminated static string, or null, which is checked.
    let version = unsafe {
        let text = (base.GetVersionString)();
        if text.is_null() {
            return Err(Failure::NotOnnxRuntime);
        }
        CStr::from_ptr(text)
    };
    version
        .to_str()
        .map(str::to_owned)
        .map_err(|_| Failure::NotOnnxRuntime)
}
