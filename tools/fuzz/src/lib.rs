//! The targets of `tests/fuzz`, for libFuzzer.
//!
//! In: a target's name, then one input after the other. Out: an abort where the target panics. A panic that kvw
//! itself contains is none: libFuzzer's own hook would end the process at it, so another takes its place.

#[path = "../../../tests/fuzz/targets.rs"]
mod targets;

use std::cell::{OnceCell, RefCell};
use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;

thread_local! {
    static TARGET: OnceCell<targets::Target> = const { OnceCell::new() };
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// A program that tries the target of this name.
#[macro_export]
macro_rules! target {
    ($name:literal) => {
        libfuzzer_sys::fuzz_target!(init: $crate::begin($name), |data: &[u8]| $crate::read(data));
    };
}

/// Makes the target ready, in a folder of this process. Where `KVW_FUZZ_SEEDS` names a folder, the target's good
/// inputs are written there, and its words to `KVW_FUZZ_WORDS`, as libFuzzer's dictionary: both before libFuzzer
/// reads them.
pub fn begin(name: &str) {
    let folder = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
    let target = targets::open(name, &folder);
    if let Some(seeds) = std::env::var_os("KVW_FUZZ_SEEDS") {
        for (number, seed) in target.seeds.iter().enumerate() {
            fs::write(Path::new(&seeds).join(format!("seed-{number}")), seed).unwrap();
        }
    }
    if let Some(words) = std::env::var_os("KVW_FUZZ_WORDS") {
        let mut dictionary = String::new();
        for word in target.words {
            let bytes: String = word.bytes().map(|byte| format!("\\x{byte:02x}")).collect();
            dictionary += &format!("\"{bytes}\"\n");
        }
        fs::write(words, dictionary).unwrap();
    }
    TARGET.with(|cell| assert!(cell.set(target).is_ok(), "begun twice"));
    panic::set_hook(Box::new(|panic| {
        LAST_PANIC.with_borrow_mut(|last| *last = panic.to_string());
    }));
}

/// Reads one input.
pub fn read(data: &[u8]) {
    TARGET.with(|target| {
        let target = target.get().unwrap();
        fs::write(&target.input, data).unwrap();
        let read = AssertUnwindSafe(|| (target.read)(&target.input, data));
        if panic::catch_unwind(read).is_err() {
            LAST_PANIC.with_borrow(|panic| eprintln!("{panic}"));
            std::process::abort();
        }
    });
}
