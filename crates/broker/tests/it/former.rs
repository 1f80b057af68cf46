//! Databases that hold key grants of the former form, which did not say who may use the model.

use std::path::Path;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use casemate_broker::broker::Rejection;
use casemate_broker::log::{Action, Verdict};
use casemate_broker::state::database;
use casemate_broker::store::{NewResource, StoreError};
use casemate_container::signing::SigningKey;
use casemate_release::grant::DOMAIN;
use casemate_release::rcar::ResourcePath;
use minicbor::Encoder;
use rusqlite::{Connection, params};

use crate::support::{DATA_KEY, MODEL, Rig, grant, keyed_grant, path};

/// Databases of these versions held such grants. What each did not have.
pub(crate) const VERSIONS: [(i64, &str); 2] = [
    (
        1,
        "CREATE TABLE old (version INTEGER PRIMARY KEY, toml TEXT NOT NULL, set_at INTEGER NOT NULL) STRICT;
         INSERT INTO old SELECT version, toml, set_at FROM policy;
         DROP TABLE policy; DROP TABLE model_floor; DROP TABLE used_rollback; DROP TABLE keyed_path;
         ALTER TABLE old RENAME TO policy;
         PRAGMA user_version = 1;",
    ),
    (2, "DROP TABLE keyed_path; PRAGMA user_version = 2;"),
];

/// A grant as `casemate grant` made it then: without a list, or with one of one key.
pub(crate) fn former_grant(provider: &SigningKey, minimum_version: u64, listed: bool) -> Vec<u8> {
    let mut body = Encoder::new(Vec::new());
    body.map(if listed { 6 } else { 5 }).unwrap();
    body.u32(0).unwrap().u32(1).unwrap();
    body.u32(1).unwrap().bytes(MODEL.as_bytes()).unwrap();
    body.u32(2).unwrap().str("smollm2").unwrap();
    body.u32(3).unwrap().u64(minimum_version).unwrap();
    body.u32(4).unwrap().bytes(&DATA_KEY).unwrap();
    if listed {
        body.u32(5).unwrap().array(1).unwrap().map(2).unwrap();
        body.u32(0).unwrap().str("alice").unwrap();
        body.u32(1).unwrap().bytes(&[9; 32]).unwrap();
    }
    let body = body.into_writer();
    let signature = provider.sign(DOMAIN, &body).0;
    let mut envelope = Encoder::new(Vec::new());
    envelope.map(3).unwrap();
    envelope.u32(0).unwrap().bytes(&body).unwrap();
    let signer = provider.verifying_key();
    envelope.u32(1).unwrap().bytes(signer.as_bytes()).unwrap();
    envelope.u32(2).unwrap().bytes(&signature).unwrap();
    envelope.into_writer()
}

/// Writes a key grant of any form into a database, under its storage key.
pub(crate) fn plant(state: &Path, path: &ResourcePath, envelope: &[u8]) {
    let mut record = Encoder::new(Vec::new());
    record.map(3).unwrap();
    record.u32(0).unwrap().bytes(envelope).unwrap();
    record.u32(1).unwrap().bool(true).unwrap();
    record.u32(2).unwrap().str(path.tag()).unwrap();
    let mut record = record.into_writer();
    let key = std::fs::read(state.join("storage.key")).unwrap();
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).unwrap());
    let nonce = [7; NONCE_LEN];
    let aad = format!("casemate broker resource v1\0{path}");
    key.seal_in_place_append_tag(
        Nonce::assume_unique_for_key(nonce),
        Aad::from(aad),
        &mut record,
    )
    .unwrap();
    Connection::open(database(state))
        .unwrap()
        .execute(
            "INSERT INTO resource (path, sealed) VALUES (?1, ?2)",
            params![path.as_str(), [&nonce[..], &record].concat()],
        )
        .unwrap();
}

fn at(tag: &str) -> ResourcePath {
    format!("default/model/{tag}").parse().unwrap()
}

fn put(rig: &Rig, tag: &str, envelope: &[u8]) -> Result<(), StoreError> {
    let put = rig
        .broker
        .put_resource(&at(tag), None, NewResource::grant(envelope));
    match put {
        Ok(_) => Ok(()),
        Err(Rejection::Store(error)) => Err(error),
        Err(error) => panic!("{error}"),
    }
}

/// A broker of today over a database that had today's grant at [`path`], a secret that is no grant, and two grants of the
/// former form.
fn opened(version: i64, without: &str) -> Rig {
    let rig = Rig::new();
    rig.set_policy(4, 1, &[MODEL]).unwrap();
    let opaque = NewResource::Opaque(b"a secret");
    rig.broker
        .put_resource(&at("opaque"), None, opaque)
        .unwrap();
    for (tag, listed) in [("open", false), ("keyed", true)] {
        plant(
            &rig.state(),
            &at(tag),
            &former_grant(&rig.provider, 5, listed),
        );
    }
    let connection = Connection::open(database(&rig.state())).unwrap();
    connection.execute_batch(without).unwrap();
    drop(connection);
    let head = rig.broker.head().unwrap();
    let rig = rig.restart();
    assert_eq!(rig.broker.head().unwrap(), head, "{version}");
    rig
}

#[test]
fn a_database_with_grants_of_the_former_form_opens_and_keeps_the_rest() {
    for (version, without) in VERSIONS {
        let rig = opened(version, without);
        assert_eq!(rig.broker.policy().unwrap().version(), 4);
        rig.broker.verify_log(&[]).unwrap();
        rig.release();
        let listed = rig.broker.resources().unwrap();
        let paths: Vec<_> = listed.iter().map(|resource| &*resource.path).collect();
        let expected = ["keyed", "opaque", "open", "smollm2"].map(|tag| at(tag).to_string());
        assert_eq!(paths, expected);
        for resource in &listed {
            let former = resource.path.ends_with("keyed") || resource.path.ends_with("open");
            assert_eq!(resource.remedy.is_some(), former, "{resource:?}");
            if former {
                assert_eq!(resource.access, None);
                assert_eq!(resource.minimum_version, Some(5));
                let remedy = resource.remedy.as_ref().unwrap();
                for part in [&*resource.path, "casemate grant --api-keys", "--open"] {
                    assert!(remedy.contains(part), "{remedy}");
                }
            }
        }
        // As often as it is opened.
        let rig = rig.restart();
        assert_eq!(rig.broker.resources().unwrap().len(), 4);
    }
}

#[test]
fn a_grant_of_the_former_form_is_not_released_and_its_denial_tells_what_to_do() {
    for (version, without) in VERSIONS {
        let rig = opened(version, without);
        let guest = rig.attest(1).unwrap();
        let Err(Rejection::NotAllowed(denial)) = rig.broker.resource(&guest.session, &at("keyed"))
        else {
            panic!("released");
        };
        assert_eq!(denial.claim, "grant.former");
        assert!(
            denial.found.contains("default/model/keyed"),
            "{}",
            denial.found
        );
        assert!(denial.remedy.contains("resource put default/model/keyed"));
        let size = rig.broker.head().unwrap().size;
        let decision = rig.broker.entries(size - 1, 1).unwrap().remove(0).decision;
        assert_eq!(
            (decision.action, decision.verdict),
            (Action::Release, Verdict::Denied)
        );
        assert_eq!(decision.denial.unwrap().claim, "grant.former");
        assert!(matches!(
            rig.broker.resource(&guest.session, &path()),
            Err(Rejection::Session(_))
        ));
    }
}

#[test]
fn what_grants_of_the_former_form_said_holds_for_those_in_their_place() {
    for (version, without) in VERSIONS {
        let rig = opened(version, without);
        for (tag, outcome) in [
            ("open", put(&rig, "open", &grant(&rig.provider, 4))),
            ("keyed", put(&rig, "keyed", &keyed_grant(&rig.provider, 4))),
        ] {
            let below = matches!(outcome, Err(StoreError::ModelGoesBack { floor: 5, .. }));
            assert!(below, "{version}: {tag}");
        }
        let outcome = put(&rig, "keyed", &grant(&rig.provider, 5));
        assert!(
            matches!(outcome, Err(StoreError::OpensAccess(_))),
            "{version}"
        );
        put(&rig, "keyed", &keyed_grant(&rig.provider, 5)).unwrap();
        put(&rig, "open", &grant(&rig.provider, 5)).unwrap();
        let listed = rig.broker.resources().unwrap();
        assert!(listed.iter().all(|resource| resource.remedy.is_none()));
        let guest = rig.attest(1).unwrap();
        rig.broker.resource(&guest.session, &at("keyed")).unwrap();
    }
}

#[test]
fn a_grant_of_the_former_form_is_not_stored_as_anything() {
    let rig = Rig::new();
    let former = former_grant(&rig.provider, 5, true);
    for resource in [NewResource::grant(&former), NewResource::Opaque(&former)] {
        let refused = rig
            .broker
            .put_resource(&path(), None, resource)
            .unwrap_err();
        let told = refused.to_string();
        assert!(matches!(refused, Rejection::Store(StoreError::Grant(_))));
        assert!(told.contains("make it anew with `casemate grant"), "{told}");
    }
}
