//! A service that asks for API keys is not opened by a grant that was made without thinking of them.

use casemate_broker::broker::{Rejection, ResourceSummary};
use casemate_broker::log::{Access, Action, Decision, Verdict};
use casemate_broker::state::database;
use casemate_broker::store::{NewResource, StoreError};
use casemate_release::rcar::ResourcePath;
use casemate_release::rollback::sha256;

use crate::support::{MODEL, Rig, grant, keyed_grant, path};

fn put_at(
    rig: &Rig,
    path: &ResourcePath,
    envelope: &[u8],
    open: bool,
) -> Result<ResourceSummary, Rejection> {
    let resource = NewResource::Grant {
        envelope,
        rollback: None,
        open,
    };
    rig.broker.put_resource(path, None, resource)
}

fn put(rig: &Rig, envelope: &[u8], open: bool) -> Result<Option<usize>, Rejection> {
    put_at(rig, &path(), envelope, open).map(|summary| summary.api_keys)
}

#[track_caller]
fn refused(rig: &Rig) {
    let open = grant(&rig.provider, 5);
    let before = rig.broker.head().unwrap().size;
    let error = put(rig, &open, false).unwrap_err();
    assert!(
        matches!(&error, Rejection::Store(StoreError::OpensAccess(at)) if *at == path()),
        "{error}"
    );
    for part in ["default/model/smollm2", "--api-keys", "--open"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    let decision = last(rig);
    assert_eq!(rig.broker.head().unwrap().size, before + 1);
    assert_eq!(
        (decision.action, decision.verdict, decision.access),
        (Action::PutResource, Verdict::Denied, Some(Access::Open))
    );
    assert_eq!(decision.subject.as_deref(), Some(path().as_str()));
    assert_eq!(decision.model.unwrap().bytes(), *MODEL.as_bytes());
    assert_eq!(decision.content.unwrap().bytes(), sha256(&open));
    assert_eq!(decision.denial.unwrap().claim, "grant.access");
}

fn last(rig: &Rig) -> Decision {
    let size = rig.broker.head().unwrap().size;
    let mut entries = rig.broker.entries(size - 1, 1).unwrap();
    entries.remove(0).decision
}

#[test]
fn an_open_grant_replaces_a_keyed_one_only_on_purpose() {
    let rig = Rig::new();
    assert_eq!(
        put(&rig, &keyed_grant(&rig.provider, 5), false).unwrap(),
        Some(1)
    );
    let allowed = (Verdict::Administered, Some(Access::ApiKeys));
    assert_eq!((last(&rig).verdict, last(&rig).access), allowed);
    refused(&rig);
    assert_eq!(rig.broker.resources().unwrap()[0].api_keys, Some(1));
    // Nor after it was deleted, replaced by something else, or the broker started again.
    rig.broker.delete_resource(&path()).unwrap();
    refused(&rig);
    let opaque = NewResource::Opaque(b"something else");
    rig.broker.put_resource(&path(), None, opaque).unwrap();
    refused(&rig);
    let rig = rig.restart();
    refused(&rig);
    // Other paths are their own matter.
    let other = "default/model/other".parse().unwrap();
    put_at(&rig, &other, &grant(&rig.provider, 5), false).unwrap();

    assert_eq!(put(&rig, &grant(&rig.provider, 5), true).unwrap(), None);
    let decision = last(&rig);
    let opened = (Verdict::Administered, Some(Access::Open));
    assert_eq!((decision.verdict, decision.access), opened);
    // Said once, it is open from then on; and closing it needs no word.
    put(&rig, &grant(&rig.provider, 6), false).unwrap();
    put(&rig, &keyed_grant(&rig.provider, 7), false).unwrap();
    let outcome = put(&rig, &grant(&rig.provider, 7), false);
    assert!(matches!(
        outcome,
        Err(Rejection::Store(StoreError::OpensAccess(_)))
    ));
    rig.broker.verify_log(&[]).unwrap();
}

#[test]
fn who_says_open_of_a_keyed_grant_is_told() {
    let rig = Rig::new();
    let before = rig.broker.head().unwrap();
    let outcome = put(&rig, &keyed_grant(&rig.provider, 5), true);
    assert!(matches!(
        outcome,
        Err(Rejection::Store(StoreError::GrantNotOpen))
    ));
    assert_eq!(rig.broker.head().unwrap(), before, "nothing was stored");
}

#[test]
fn a_database_of_the_second_version_learns_who_is_let_in() {
    let rig = Rig::new();
    put(&rig, &keyed_grant(&rig.provider, 5), false).unwrap();
    rusqlite::Connection::open(database(&rig.state()))
        .unwrap()
        .execute_batch("DROP TABLE keyed_path; PRAGMA user_version = 2;")
        .unwrap();
    let rig = rig.restart();
    refused(&rig);
}
