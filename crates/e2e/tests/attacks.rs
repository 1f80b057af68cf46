//! Every attack on the list meets the refusal that the list demands. `cargo xtask demo --attacks` shows the same.

use casemate_testkit::attacks::{ATTACKS, Ground};
use casemate_testkit::deployment::Deployment;

#[test]
fn every_attack_is_refused_for_its_reason() {
    let programs = Deployment::programs_of_this_build().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut ground = Ground::prepare(&programs, directory.path()).unwrap();
    let mut failures = Vec::new();
    for attack in ATTACKS {
        if let Err(failure) = attack.mount(&mut ground).outcome {
            failures.push(format!("{}: {failure}", attack.name));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    // The deployment that was attacked still serves.
    ground.deployment().verify().unwrap();
}

#[test]
fn every_attack_has_a_name_of_its_own() {
    let mut names: Vec<_> = ATTACKS.iter().map(|attack| attack.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), ATTACKS.len());
}
