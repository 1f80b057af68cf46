//! Every byte of every signed, encrypted or chained object changed: nothing panics, and nothing that was changed counts
//! as what it was. What "counts as" means is in each target; for all but the following it is that nothing changed is
//! accepted at all.
//!
//! | object | changes that are accepted, and why they are harmless |
//! |---|---|
//! | quote, PEM chains | white space, the zero byte behind a quote, text around certificates: the claims are the same |
//! | JWE | none of these change the payload |
//! | attestation response | inside the collateral as above; keyset and credential are the same |

use casemate_attest::Policy;
use casemate_attest::measure::Measurement;
use casemate_fuzzing::walks;
use casemate_testkit::policies::PolicyFile;

/// Changes `step`th bytes of what belongs to `target`, each with every mask.
fn walk(target: &str, step: usize, masks: &[u8]) {
    let found: Vec<_> = walks()
        .into_iter()
        .filter(|walk| walk.target == target)
        .collect();
    assert!(!found.is_empty());
    for walk in found {
        eprintln!("{target}: {} of {} bytes", walk.what, walk.len);
        for at in (0..walk.len).step_by(step) {
            masks.iter().for_each(|&mask| walk.flip(at, mask));
        }
    }
}

const BITS: [u8; 8] = [1, 2, 4, 8, 16, 32, 64, 128];

#[test]
fn no_corrupted_container_opens() {
    walk("container_damage", 1, &BITS);
}

#[test]
fn no_corrupted_grant_is_accepted() {
    walk("grant", 1, &BITS);
}

#[test]
fn no_corrupted_credential_is_accepted() {
    walk("credential", 1, &BITS);
}

#[test]
fn no_corrupted_rollback_is_accepted() {
    walk("rollback", 1, &BITS);
}

#[test]
fn no_corrupted_jwe_yields_another_payload() {
    walk("jwe", 1, &BITS);
}

#[test]
fn no_corrupted_log_entry_continues_its_chain() {
    walk("broker_log", 1, &BITS);
}

#[test]
fn no_corrupted_request_is_received() {
    walk("ohttp_request", 1, &[0x01]);
}

#[test]
fn no_corrupted_answer_is_believed() {
    walk("ohttp_answer", 1, &[0x01]);
}

/// Verification costs milliseconds here, so it is every third byte; `appraisal` and `service_damage` in `fuzz/` go on.
#[test]
fn no_corrupted_evidence_changes_a_claim() {
    walk("appraisal", 3, &[0x04]);
}

#[test]
fn no_corrupted_service_is_another_service() {
    walk("service_damage", 7, &[0x01]);
}

/// What a policy says, apart from the digest of its bytes.
fn meaning(policy: &Policy) -> String {
    format!(
        "{:?}",
        (
            (
                policy.version(),
                policy.tee(),
                policy.dangerous_development_root()
            ),
            (
                policy.minimum_tcb_evaluation_data_number(),
                policy.tcb_allowances()
            ),
            (policy.service_tds(), policy.measurements()),
            (policy.model().ok(), policy.service().ok()),
        )
    )
}

/// Two changes leave what a policy says as it was: one inside of a comment, and the case of a letter in hexadecimal.
/// Neither leaves its digest as it was.
#[test]
fn a_corrupted_policy_is_refused_or_says_something_else() {
    let measurement = Measurement {
        mr_td: [0xab; 48],
        mr_config_id: [0x12; 48],
        rtmr: [[0; 48]; 4],
    };
    let file = PolicyFile::new([0xcd; 32], measurement);
    let file = file.for_users((&"0e".repeat(32), 7), &"f1".repeat(32), "demo");
    let text = format!("# comment\n{}", file.to_toml());
    let honest = Policy::from_toml(&text).unwrap();
    let comment = 1.."# comment".len();
    let mut harmless = 0;
    for at in 0..text.len() {
        for mask in BITS {
            let mut bytes = text.clone().into_bytes();
            let before = bytes[at];
            bytes[at] ^= mask;
            let after = bytes[at];
            let Some(policy) = String::from_utf8(bytes)
                .ok()
                .and_then(|t| Policy::from_toml(&t).ok())
            else {
                continue;
            };
            assert_ne!(policy.digest(), honest.digest(), "byte {at} ^ {mask:#x}");
            if meaning(&policy) == meaning(&honest) {
                let case = before.is_ascii_hexdigit() && after.eq_ignore_ascii_case(&before);
                assert!(
                    case || comment.contains(&at),
                    "byte {at} ^ {mask:#x} of {text}"
                );
                harmless += 1;
            }
        }
    }
    assert!(harmless > 0);
}
