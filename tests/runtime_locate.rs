//! ONNX Runtime is found in the documented order, refused when it does not serve, and fetched once.
//!
//! Fake libraries and interpreters are made with `cc` and `sh`; one test fetches the pinned wheel with
//! the machine's own `pip`.

// clippy.toml allows these in `#[test]` functions, which does not reach the helpers beside them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use kvw::runtime::device::{self, Device};
use kvw::runtime::diagnose::{Status, diagnose};
use kvw::runtime::fetch::{self, Package};
use kvw::runtime::locate::{self, Error, Options, Source, locate};
use ort::session::Session;

/// Nothing to be found anywhere, and nothing fetched.
fn nowhere(folder: &Path) -> Options {
    Options {
        library: None,
        variable: None,
        beside: None,
        cache: folder.join("cache"),
        pythons: Vec::new(),
        system: false,
        offline: true,
        need_cuda: false,
    }
}

fn silent(_: &str) {}

/// Compiles a shared library. `None`, with a printed reason, where there is no `cc`.
fn compile(folder: &Path, name: &str, source: &str) -> Option<PathBuf> {
    fs::create_dir_all(folder).unwrap();
    let (code, library) = (folder.join("fake.c"), folder.join(name));
    fs::write(&code, source).unwrap();
    let mut cc = Command::new("cc");
    match cc
        .args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(&code)
        .status()
    {
        Ok(status) => {
            assert!(status.success());
            Some(library)
        }
        Err(e) => {
            println!("skipped: no C compiler ({e})");
            None
        }
    }
}

/// A library that says it is ONNX Runtime of this version.
fn fake(folder: &Path, version: &str) -> Option<PathBuf> {
    let source = format!(
        "static const void *api(unsigned v) {{ (void)v; return 0; }}
         static const char *version(void) {{ return \"{version}\"; }}
         static const struct {{ const void *(*a)(unsigned); const char *(*v)(void); }} base = {{ api, version }};
         const void *OrtGetApiBase(void) {{ return &base; }}"
    );
    compile(folder, &format!("libonnxruntime.so.{version}"), &source)
}

/// An executable shell script in place of a Python interpreter.
fn script(folder: &Path, name: &str, body: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_named_library_that_is_missing_or_no_library_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let named = |path: &Path| {
        let options = Options {
            library: Some(path.to_owned()),
            ..nowhere(dir.path())
        };
        locate(&options, &silent).unwrap_err()
    };
    let missing = dir.path().join("libonnxruntime.so.9");
    assert!(matches!(
        named(&missing),
        Error::Missing {
            named_by: Source::Option,
            ..
        }
    ));
    assert!(matches!(named(dir.path()), Error::NotAFile { .. }));
    let text = dir.path().join("libonnxruntime.so");
    fs::write(&text, "not a library").unwrap();
    let error = named(&text);
    assert!(matches!(error, Error::NotLoadable { .. }), "{error:?}");
    assert!(error.to_string().contains("libonnxruntime.so"), "{error}");
    assert!(error.hint().unwrap().contains("--ort-lib"));

    let options = Options {
        variable: Some(missing),
        ..nowhere(dir.path())
    };
    let error = locate(&options, &silent).unwrap_err();
    assert!(error.to_string().contains("ORT_DYLIB_PATH"), "{error}");
}

#[test]
fn a_library_that_is_too_old_is_refused_with_both_versions_and_its_path() {
    let dir = tempfile::tempdir().unwrap();
    for old in ["1.18.0", "1.9.9", "0.30.0", "what"] {
        let Some(library) = fake(&dir.path().join(old), old) else {
            return;
        };
        let options = Options {
            library: Some(library.clone()),
            ..nowhere(dir.path())
        };
        let error = locate(&options, &silent).unwrap_err();
        assert!(
            matches!(&error, Error::TooOld { found, .. } if found == old),
            "{error:?}"
        );
        let text = error.to_string();
        assert!(text.contains(old) && text.contains("1.19.0"), "{text}");
        assert!(text.contains(dir.path().to_str().unwrap()), "{text}");
        assert!(error.hint().is_some());
    }
}

#[test]
fn a_shared_library_that_is_not_onnx_runtime_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (name, source) in [
        ("other.so", "int answer(void) { return 42; }"),
        ("null.so", "const void *OrtGetApiBase(void) { return 0; }"),
    ] {
        let Some(library) = compile(dir.path(), name, source) else {
            return;
        };
        let options = Options {
            library: Some(library),
            ..nowhere(dir.path())
        };
        let error = locate(&options, &silent).unwrap_err();
        assert!(matches!(error, Error::NotOnnxRuntime { .. }), "{error:?}");
    }
}

#[test]
fn places_are_tried_in_the_documented_order_and_those_passed_over_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("old");
    let package = dir.path().join("site-packages/onnxruntime");
    let (Some(_), Some(by_option), Some(by_variable), Some(in_package)) = (
        fake(&old, "1.18.1"),
        fake(&dir.path().join("a"), "1.20.0"),
        fake(&dir.path().join("b"), "1.21.0"),
        fake(&package.join("capi"), "1.22.0"),
    ) else {
        return;
    };
    let answer = serde_json::json!({
        "executable": "/env/bin/python", "prefix": "/env", "version": "3.12.0", "onnxruntime": [package], "nvidia": [],
    });
    let python = script(dir.path(), "python", &format!("echo '{answer}'"));
    let broken = script(dir.path(), "broken", "echo nonsense; exit 3");
    let mut options = Options {
        library: Some(by_option.clone()),
        variable: Some(by_variable.clone()),
        beside: Some(old),
        pythons: vec![broken, python],
        ..nowhere(dir.path())
    };

    let found = locate(&options, &silent).unwrap();
    assert_eq!(
        (found.path, found.source),
        (by_option.canonicalize().unwrap(), Source::Option)
    );
    assert_eq!(found.version.to_string(), "1.20.0");

    options.library = None;
    let found = locate(&options, &silent).unwrap();
    assert_eq!(
        (found.path, found.source),
        (by_variable.canonicalize().unwrap(), Source::Variable)
    );

    options.variable = None;
    let found = locate(&options, &silent).unwrap();
    assert_eq!(found.path, in_package);
    assert_eq!(found.source, Source::Python("/env/bin/python".into()));
    let passed = found.passed_over.join("\n");
    assert!(
        passed.contains("beside the executable") && passed.contains("1.18.1"),
        "{passed}"
    );
    assert!(passed.contains("the cache: nothing there"), "{passed}");

    options.need_cuda = true;
    let error = locate(&options, &silent).unwrap_err();
    assert!(
        error.to_string().contains("no CUDA provider beside it"),
        "{error}"
    );
}

#[test]
fn offline_with_nothing_found_lists_the_places_and_the_ways_out() {
    let dir = tempfile::tempdir().unwrap();
    let error = locate(&nowhere(dir.path()), &silent).unwrap_err();
    assert!(matches!(error, Error::Offline { .. }));
    let text = error.to_string();
    for place in [
        "--ort-lib",
        "ORT_DYLIB_PATH",
        "beside the executable",
        "the cache",
        "Python",
    ] {
        assert!(text.contains(place), "{place}: {text}");
    }
    let hint = error.hint().unwrap();
    assert!(
        hint.contains("pip install onnxruntime") && hint.contains("--offline"),
        "{hint}"
    );
}

/// A `pip` that answers, and then does `download` in the folder after `--dest`.
fn fake_pip(folder: &Path, download: &str) -> PathBuf {
    let body = format!(
        "[ \"$1\" = -m ] || exit 1\n\
         [ \"$3\" = --version ] && exit 0\n\
         while [ $# -gt 0 ]; do [ \"$1\" = --dest ] && dest=$2; shift; done\n\
         {download}"
    );
    script(folder, "python3", &body)
}

fn leftovers(cache: &Path) -> Vec<PathBuf> {
    let mut folders = vec![cache.to_owned()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().contains("partial") {
                found.push(entry.path());
            } else if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            }
        }
    }
    found
}

#[test]
fn a_pip_that_fails_is_quoted_and_a_wheel_that_is_not_the_pinned_one_is_thrown_away() {
    if fetch::pin(Package::Cpu).is_err() {
        println!("skipped: no wheel is pinned for this machine");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");

    let python = fake_pip(
        dir.path(),
        "echo 'ERROR: no route to the index' >&2; exit 1",
    );
    let error = fetch::install(Package::Cpu, &cache, &[python], &silent).unwrap_err();
    assert!(matches!(error, fetch::Error::Pip { .. }), "{error:?}");
    assert!(
        error.to_string().contains("no route to the index"),
        "{error}"
    );

    let python = fake_pip(dir.path(), "echo evil > $dest/onnxruntime.whl");
    let error = fetch::install(Package::Cpu, &cache, &[python], &silent).unwrap_err();
    assert!(matches!(error, fetch::Error::Digest { .. }), "{error:?}");

    let python = fake_pip(dir.path(), "echo a > $dest/a.whl; echo b > $dest/b.whl");
    let error = fetch::install(Package::Cpu, &cache, &[python], &silent).unwrap_err();
    assert!(
        matches!(error, fetch::Error::NotOneWheel { found: 2, .. }),
        "{error:?}"
    );

    assert_eq!(fetch::cached(Package::Cpu, &cache), None);
    assert_eq!(leftovers(&cache), Vec::<PathBuf>::new());
}

/// A `PATH` with nothing on it.
const NOWHERE: &str = "/nonexistent";

/// Runs one test of this file again, in a process of its own.
fn again(test: &str, variables: &[(&str, &Path)]) -> std::process::Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--include-ignored"])
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

#[test]
#[ignore = "run by the test below, with an empty PATH"]
fn child_without_path() {
    if std::env::var_os("PATH").is_none_or(|path| path != NOWHERE) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        offline: false,
        pythons: locate::pythons(),
        ..nowhere(dir.path())
    };
    let error = locate(&options, &silent).unwrap_err();
    assert!(
        matches!(
            &error,
            Error::NotFetched {
                source: fetch::Error::NoPip { .. },
                ..
            }
        ),
        "{error:?}"
    );
    assert!(error.hint().unwrap().contains("ensurepip"), "{error:?}");
}

#[test]
fn without_python_and_pip_the_error_says_which_were_sought() {
    if fetch::pin(Package::Cpu).is_err() {
        println!("skipped: no wheel is pinned for this machine");
        return;
    }
    let nothing = Path::new(NOWHERE);
    let child = again(
        "child_without_path",
        &[
            ("PATH", nothing),
            ("VIRTUAL_ENV", nothing),
            ("CONDA_PREFIX", nothing),
        ],
    );
    assert!(
        child.status.success(),
        "{}",
        String::from_utf8_lossy(&child.stdout)
    );
}

#[test]
fn the_pinned_wheel_is_fetched_once_by_two_at_a_time_and_then_runs() {
    let pythons = locate::pythons();
    if let Err(e) = fetch::find_pip(&pythons) {
        println!("skipped: {e}");
        return;
    }
    if let Err(e) = fetch::pin(Package::Cpu) {
        println!("skipped: {e}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        offline: false,
        pythons: pythons.clone(),
        ..nowhere(dir.path())
    };
    let said = std::sync::Mutex::new(Vec::new());
    let say = |line: &str| said.lock().unwrap().push(line.to_owned());
    let both = std::thread::scope(|scope| {
        let install = || fetch::install(Package::Cpu, &options.cache, &pythons, &say).unwrap();
        let other = scope.spawn(install);
        [install(), other.join().unwrap()]
    });
    assert_eq!(both[0], both[1]);
    assert_eq!(leftovers(&options.cache), Vec::<PathBuf>::new());
    let said = said.into_inner().unwrap();
    assert!(
        said.iter()
            .all(|line| line.starts_with("fetching onnxruntime ")),
        "{said:?}"
    );

    // Now it is in the cache: found there without a network, and said nothing about.
    let options = Options {
        offline: true,
        pythons: Vec::new(),
        ..options
    };
    let found = locate(&options, &|line| panic!("said {line}")).unwrap();
    assert_eq!((&found.path, &found.source), (&both[0], &Source::Cache));
    assert_eq!(
        found.version.to_string(),
        fetch::pin(Package::Cpu).unwrap().version
    );

    // It loads, once for the process, and a second library is refused.
    let environment = locate::load(&found).unwrap();
    assert!(locate::load(&found).is_ok());
    let other = locate::Located {
        path: "/another".into(),
        ..found.clone()
    };
    assert!(matches!(
        locate::load(&other),
        Err(Error::OtherLoaded { .. })
    ));

    // This build has no CUDA: asked strictly it fails, asked softly it says so.
    let builder = || Session::builder(&environment).unwrap();
    let error = Device::Cuda(0).apply(builder(), &found).err().unwrap();
    assert!(
        matches!(error, device::Error::NotCompiledIn { .. }),
        "{error:?}"
    );
    let (_, placement) = Device::Auto.apply(builder(), &found).unwrap();
    assert_eq!(placement.device, "cpu");
    assert!(placement.note.unwrap().contains("without CUDA"));

    // The diagnosis agrees, and survives being written down.
    let report = diagnose(&options, dir.path(), &silent);
    assert!(report.passed(), "{report:#?}");
    assert_eq!(report.providers, ["CPUExecutionProvider"]);
    let cuda = report
        .checks
        .iter()
        .find(|check| check.name == "cuda")
        .unwrap();
    assert_eq!(cuda.status, Status::Warn);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["schema_version"], 1);
    assert_eq!(json["library"]["version"], found.version.to_string());
}

#[test]
fn a_diagnosis_without_a_library_fails_that_check_and_still_reports_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let report = diagnose(&nowhere(dir.path()), dir.path(), &silent);
    assert!(!report.passed());
    let failed: Vec<&str> = report
        .checks
        .iter()
        .filter(|check| check.status == Status::Fail)
        .map(|check| check.name)
        .collect();
    assert_eq!(failed, ["onnxruntime"]);
    for name in ["machine", "python", "pip", "cache", "disk", "reflink"] {
        assert!(
            report.checks.iter().any(|check| check.name == name),
            "{name}"
        );
    }
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        0,
        "the probe left something"
    );
}
