//! Strangers who ask without end: what is denied must not fill the disk, what is allowed is always logged.

use std::time::Duration;

use casemate_broker::denials::{BURST, REFILL_SECONDS, keep_counted};
use casemate_broker::log::{Action, Decision, Verdict};

use crate::support::{Rig, path};

fn entries(rig: &Rig, action: Action) -> Vec<Decision> {
    let entries = rig.broker.entries(0, 10_000).unwrap();
    let decisions = entries.into_iter().map(|entry| entry.decision);
    decisions
        .filter(|decision| decision.action == action)
        .collect()
}

fn denied(rig: &Rig) -> u64 {
    entries(rig, Action::Attest)
        .iter()
        .filter(|decision| decision.verdict == Verdict::Denied)
        .count() as u64
}

fn suppressed(rig: &Rig) -> Vec<u64> {
    let entries = entries(rig, Action::Suppressed);
    entries.iter().map(|entry| entry.count.unwrap()).collect()
}

#[test]
fn denials_without_end_take_a_bounded_number_of_entries() {
    let rig = Rig::new();
    for _ in 0..BURST + 40 {
        rig.attest(9).err().unwrap();
    }
    assert_eq!(denied(&rig), BURST);
    assert_eq!(suppressed(&rig), [40], "counted before the log is shown");
    let text = rig.broker.metrics().render((0, 0), 0);
    assert!(text.contains("casemate_broker_denials_suppressed_total 40"));

    // What is allowed meanwhile is logged in full, and the count of the denied ones with it.
    rig.attest(9).err().unwrap();
    rig.attest(9).err().unwrap();
    let guest = rig.release();
    assert_eq!(suppressed(&rig), [40, 2]);
    let releases = entries(&rig, Action::Release);
    assert_eq!(releases.len(), 1);
    // An attested guest's denial does not drown among those of strangers.
    let unknown = "default/model/unknown".parse().unwrap();
    rig.broker.resource(&guest.session, &unknown).err().unwrap();
    let last = entries(&rig, Action::Release).pop().unwrap();
    assert_eq!(last.verdict, Verdict::Denied);

    rig.clock.advance(REFILL_SECONDS);
    rig.attest(9).err().unwrap();
    rig.attest(9).err().unwrap();
    assert_eq!(denied(&rig), BURST + 1);
    rig.broker
        .resource(&rig.attest(1).unwrap().session, &path())
        .unwrap();
    assert_eq!(suppressed(&rig).iter().sum::<u64>(), 43);
    rig.broker.verify_log(&[]).unwrap();
}

#[tokio::test]
async fn what_was_left_out_is_counted_before_long() {
    let rig = Rig::new();
    for _ in 0..BURST + 3 {
        rig.attest(9).err().unwrap();
    }
    // The head says what is on disk; to show the log would count them.
    let before = rig.broker.head().unwrap().size;
    let counting = tokio::spawn(keep_counted(rig.broker.clone(), Duration::from_millis(2)));
    let counted = async {
        while rig.broker.head().unwrap().size == before {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let counted = tokio::time::timeout(Duration::from_secs(60), counted).await;
    counted.expect("nothing was counted");
    counting.abort();
    assert_eq!(rig.broker.head().unwrap().size, before + 1);
    assert_eq!(suppressed(&rig), [3]);
}

#[test]
fn what_was_left_out_is_counted_at_the_end() {
    let rig = Rig::new();
    for _ in 0..BURST + 3 {
        rig.attest(9).err().unwrap();
    }
    let before = rig.broker.head().unwrap();
    rig.broker.log_what_was_left_out().unwrap();
    assert_eq!(rig.broker.head().unwrap().size, before.size + 1);
    rig.broker.log_what_was_left_out().unwrap();
    assert_eq!(rig.broker.head().unwrap().size, before.size + 1, "once");
    let rig = rig.restart();
    assert_eq!(suppressed(&rig), [3]);
}
