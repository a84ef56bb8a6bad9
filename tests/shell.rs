//! What an installation brings to a shell: completions, manual pages, and the ONNX Runtime of the environment that
//! the program lies in.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

fn kvw(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_kvw"))
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The verbs as the help lists them.
fn verbs() -> Vec<String> {
    let help = kvw(&["--help"]);
    let commands = help.split_once("Commands:").unwrap().1;
    let verbs: Vec<String> = commands
        .lines()
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|verb| *verb != "help")
        .map(str::to_owned)
        .collect();
    assert!(verbs.iter().any(|verb| verb == "unlearn"), "{verbs:?}");
    verbs
}

#[test]
fn completions_know_every_verb_and_flag_in_every_shell() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = kvw(&["completions", shell]);
        for verb in verbs() {
            assert!(script.contains(&verb), "{shell}: {verb}");
        }
        assert!(script.contains("retain-coefficients"), "{shell}");
    }
}

#[test]
fn bash_completes_a_verb_from_its_first_letters() {
    if Command::new("bash")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        return;
    }
    let script = format!(
        "{}\nCOMP_WORDS=(kvw unl); COMP_CWORD=1; _kvw kvw unl kvw; echo \"${{COMPREPLY[@]}}\"",
        kvw(&["completions", "bash"])
    );
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "unlearn");
}

#[test]
fn every_verb_has_a_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("share/man1");
    kvw(&["man", pages.to_str().unwrap()]);
    for verb in verbs() {
        let page = fs::read_to_string(pages.join(format!("kvw-{verb}.1"))).unwrap();
        assert!(
            page.contains(".SH SYNOPSIS") && page.contains(&format!("kvw {verb}")),
            "{page}"
        );
    }
    let page = fs::read_to_string(pages.join("kvw.1")).unwrap();
    assert!(page.contains("Knowledge Vector"), "{page}");
}

/// pip puts a wheel's program beside the interpreter, and nobody needs to activate an environment to run it.
#[cfg(unix)]
#[test]
fn the_interpreter_beside_the_program_is_asked_first() {
    use std::os::unix::fs::PermissionsExt as _;

    let environment = tempfile::tempdir().unwrap();
    let bin = environment.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let program = bin.join("kvw");
    fs::copy(env!("CARGO_BIN_EXE_kvw"), &program).unwrap();
    let python = bin.join("python");
    let answer = format!(
        r#"{{"executable":"{}","prefix":"{}","version":"3.99.0","onnxruntime":[],"nvidia":[]}}"#,
        python.display(),
        environment.path().display()
    );
    fs::write(&python, format!("#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")).unwrap();
    fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(&program)
        .args(["doctor", "--offline", "--format", "json"])
        .env("KVW_CACHE_DIR", environment.path().join("cache"))
        .env_remove("VIRTUAL_ENV")
        .output()
        .unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let first = &report["pythons"][0];
    assert_eq!(first["version"], "3.99.0", "{report:#}");
    assert_eq!(Path::new(first["executable"].as_str().unwrap()), python);
}
