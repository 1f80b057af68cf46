//! The demonstrations as people start them, over tiny models.

use std::fs;
use std::process::Command;

use casemate_testkit::deployment::Deployment;
use casemate_testkit::gguf;
use casemate_testkit::models::Tiny;

/// A worker computes, sees nothing, cheats and is caught; every claim of it holds. `cargo xtask demo --offload` shows the
/// same with a real model.
#[test]
fn a_worker_helps_sees_noise_and_is_caught_cheating() {
    let programs = Deployment::programs_of_this_build().unwrap();
    for program in ["casemate-demo", "casemate-worker", "casemate-enclave"] {
        let built = programs.join(program).is_file();
        assert!(
            built,
            "{program} is not built; run `cargo build --workspace --bins`"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let [model, page] = ["tiny.gguf", "seen.html"].map(|name| folder.path().join(name));
    gguf::write(&Tiny::default().build(), &model).unwrap();
    let output = Command::new(programs.join("casemate-demo"))
        .args(["--offload", "--name", "tiny"])
        .arg("--model")
        .arg(&model)
        .arg("--html")
        .arg(&page)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{errors}");
    for claim in [
        "the same answer, with the worker and without",
        "the worker computed products of it",
        "every product passed its check",
        "what was sent is flat",
        "the same rows without pads",
        "one number of one product was falsified",
        "the same answer all the same",
        "the enclave noticed",
        "the worker is in quarantine",
    ] {
        let claim = format!("✔ {claim}");
        let holds = said.lines().any(|line| line.contains(&claim));
        assert!(holds, "{claim}: {said}");
    }
    assert!(
        said.contains("not hidden: matrices and their shapes"),
        "{said}"
    );
    let page = fs::read_to_string(&page).unwrap();
    assert_eq!(page.matches("<svg").count(), 2);
    assert!(page.contains("What a worker saw") && page.ends_with("</html>\n"));
}

#[test]
fn a_demonstration_of_nothing_fails() {
    let programs = Deployment::programs_of_this_build().unwrap();
    let output = Command::new(programs.join("casemate-demo"))
        .args(["--offload", "--model", "/nowhere.gguf"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no model at /nowhere.gguf"));
}
