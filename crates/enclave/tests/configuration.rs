//! The program with a configuration that it cannot use.

use std::process::Command;

/// How it ends, and what it says.
fn started_with(name: &str, content: &str) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(name), content).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_casemate-enclave"))
        .current_dir(folder.path())
        .args(["--config", name])
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[test]
fn a_secret_in_the_place_of_the_configuration_is_not_shown() {
    let digits = "0123456789abcdef".repeat(4);
    let (code, said) = started_with("me.key", &format!("cm-{digits}\n"));
    assert_eq!(code, Some(10), "{said}");
    assert!(!said.contains(&digits), "{said}");
    let told = "me.key: the configuration is not valid: this is an API key";
    assert!(said.contains(told), "{said}");
    let (_, said) = started_with("e.toml", &format!("[broker]\nkey = \"cm-{digits}\"\n"));
    assert!(!said.contains(&digits), "{said}");

    let (code, said) = started_with("other.key", "CANARY-CANARY\n");
    assert_eq!(code, Some(10), "{said}");
    assert!(!said.contains("CANARY"), "{said}");
    let told = "other.key: the configuration is not valid: line 1, column 14: ";
    assert!(said.contains(told), "{said}");
}
