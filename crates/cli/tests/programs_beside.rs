//! `casemate bench` and `casemate audit` are other programs, which lie beside this one or are missed by name.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

fn run(program: &std::path::Path, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

#[test]
fn everything_is_passed_on_to_the_program_beside() {
    for command in ["bench", "audit"] {
        is_passed_on(command);
    }
}

fn is_passed_on(command: &str) {
    let folder = tempfile::tempdir().unwrap();
    let casemate = folder.path().join("casemate");
    fs::copy(env!("CARGO_BIN_EXE_casemate"), &casemate).unwrap();

    let output = run(&casemate, &[command, "--quick"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(40), "{said}");
    let name = format!("casemate-{command}");
    let missed = folder.path().canonicalize().unwrap().join(&name);
    assert!(said.contains(missed.to_str().unwrap()), "{said}");
    assert!(
        said.contains(&format!("cargo build --release -p {name}")),
        "the remedy: {said}"
    );

    fs::write(&missed, "#!/bin/sh\necho \"[$*]\"\nexit 7\n").unwrap();
    fs::set_permissions(&missed, fs::Permissions::from_mode(0o755)).unwrap();
    for arguments in [
        "",
        "--help",
        "kernels -h",
        "model.gguf --json --unknown=1 -- -x",
    ] {
        let words: Vec<&str> = [command]
            .into_iter()
            .chain(arguments.split_whitespace())
            .collect();
        let output = run(&casemate, &words);
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            format!("[{arguments}]\n")
        );
        assert_eq!(output.status.code(), Some(7), "the other program's code");
    }
}
