//! Keys and credentials of services with adapters: each adapter is allowed by the policy, and its key was released in the
//! session that asks for the credential.

use casemate_broker::broker::Rejection;
use casemate_broker::store::NewResource;
use casemate_channel::keyset::Keyset;
use casemate_container::{DataKey, ModelDigest};
use casemate_release::api_key::Access;
use casemate_release::credential::VerifiedCredential;
use casemate_release::grant::KeyGrant;
use casemate_release::issuance::CredentialResponse;
use casemate_release::rcar::ResourcePath;
use casemate_release::received::Received;
use casemate_release::rollback::sha256;
use casemate_testkit::policies::PolicyFile;

use crate::support::{Guest, MODEL, Rig, measurement};

const ADAPTER: ModelDigest = ModelDigest([0x77; 32]);
const OTHER: ModelDigest = ModelDigest([0x79; 32]);

fn path_of(name: &str) -> ResourcePath {
    format!("default/model/{name}").parse().unwrap()
}

/// A broker that has the grants of two adapters, and whose policy lists these.
fn rig(listed: &[ModelDigest]) -> Rig {
    let rig = Rig::new();
    put(&rig, "bills", ADAPTER, 1);
    put(&rig, "letters", OTHER, 1);
    let file = PolicyFile {
        version: 2,
        models: Some((vec![MODEL.to_string()], 1)),
        adapters: listed.iter().map(ModelDigest::to_string).collect(),
        ..PolicyFile::new(rig.tee.root_spki_sha256(), measurement(1))
    };
    rig.broker.set_policy(&file.to_toml(), None).unwrap();
    rig
}

fn put(rig: &Rig, name: &str, digest: ModelDigest, minimum_version: u64) {
    let grant = grant_of(rig, name, digest, minimum_version);
    rig.broker
        .put_resource(&path_of(name), None, NewResource::grant(&grant))
        .unwrap();
}

fn grant_of(rig: &Rig, name: &str, digest: ModelDigest, minimum_version: u64) -> Vec<u8> {
    let grant = KeyGrant {
        model_digest: digest,
        model_name: name.into(),
        minimum_version,
        data_key: DataKey::from_bytes(&[0x78; 32]),
        access: Access::Open,
    };
    grant.sign(&rig.provider).unwrap().to_vec()
}

/// What a guest says it received: the grants as they were put at first.
fn received(rig: &Rig, names: &[&str]) -> Vec<Received> {
    let of = |name: &&str| match *name {
        "smollm2" => rig.received(),
        name => Received {
            path: path_of(name),
            sha256: sha256(&grant_of(rig, name, digest_of(name), 1)),
        },
    };
    names.iter().map(of).collect()
}

fn digest_of(name: &str) -> ModelDigest {
    match name {
        "bills" => ADAPTER,
        "letters" => OTHER,
        other => panic!("{other}"),
    }
}

/// Receives the key of an adapter in a session.
fn receive(rig: &Rig, guest: &Guest, name: &str) -> Result<(), Rejection> {
    let jwe = rig.broker.resource(&guest.session, &path_of(name))?;
    let provider = rig.provider.verifying_key();
    let grant = guest.attested.grant(&jwe.to_json(), &provider).unwrap();
    assert_eq!(grant.data_key().expose(), &[0x78; 32]);
    Ok(())
}

/// A credential for a keyset with these adapters, by a guest that received the model and them.
fn ask(rig: &Rig, guest: &Guest, adapters: &[&str]) -> Result<CredentialResponse, Rejection> {
    let names = [&["smollm2"], adapters].concat();
    let adapters: Vec<_> = adapters.iter().map(|name| digest_of(name)).collect();
    ask_as(rig, guest, "smollm2", &names, &adapters)
}

fn ask_as(
    rig: &Rig,
    guest: &Guest,
    service: &str,
    names: &[&str],
    adapters: &[ModelDigest],
) -> Result<CredentialResponse, Rejection> {
    let keyset = Keyset {
        adapter_digests: adapters.iter().map(|digest| digest.0).collect(),
        policy_version: rig.broker.policy().unwrap().version(),
        ..rig.keyset()
    };
    let received = received(rig, names);
    let mut request = rig.credential_request_after(&guest.session, received, &keyset);
    request.service = service.into();
    rig.broker
        .credential(&guest.session, &request.to_json().unwrap())
}

fn claim<T>(outcome: Result<T, Rejection>) -> &'static str {
    match outcome {
        Err(Rejection::NotAllowed(denial)) => denial.claim,
        Err(other) => panic!("rejected, but not denied: {other}"),
        Ok(_) => panic!("allowed"),
    }
}

#[test]
fn a_credential_names_the_adapters_whose_keys_were_released() {
    let rig = rig(&[ADAPTER, OTHER]);
    // The model's key first, and last: each resource counts.
    for model_last in [false, true] {
        let guest = rig.attest(1).unwrap();
        let model = || rig.broker.resource(&guest.session, &path_of("smollm2"));
        if !model_last {
            model().unwrap();
        }
        receive(&rig, &guest, "bills").unwrap();
        receive(&rig, &guest, "letters").unwrap();
        if model_last {
            model().unwrap();
        }
        let response = ask(&rig, &guest, &["bills", "letters"]).unwrap();
        let json = serde_json::to_vec(&response).unwrap();
        let envelope = CredentialResponse::parse(&json).unwrap();
        let now = rig.clock.seconds();
        let issuer = rig.broker.issuer();
        let verified = VerifiedCredential::verify(&envelope, &issuer, now).unwrap();
        let claims = verified.claims();
        assert_eq!(claims.model_digest, MODEL);
        assert_eq!(claims.adapter_digests, [ADAPTER.0, OTHER.0]);
        assert_eq!(claims.service, "smollm2");
    }
}

#[test]
fn a_keyset_names_no_adapter_whose_key_was_not_released() {
    let rig = rig(&[ADAPTER, OTHER]);
    for named in [&["smollm2", "bills"][..], &["smollm2"]] {
        let guest = rig.release();
        receive(&rig, &guest, "bills").unwrap();
        let outcome = ask_as(&rig, &guest, "smollm2", named, &[ADAPTER, OTHER]);
        assert_eq!(claim(outcome), "keyset.adapter");
    }
    let guest = rig.release();
    receive(&rig, &guest, "bills").unwrap();
    assert_eq!(claim(ask(&rig, &guest, &["bills", "letters"])), "received");
    // Nor is an adapter's key enough for a model, under whatever name.
    for (service, refused) in [("smollm2", "service"), ("bills", "keyset.model_digest")] {
        let guest = rig.attest(1).unwrap();
        receive(&rig, &guest, "bills").unwrap();
        let outcome = ask_as(&rig, &guest, service, &["bills"], &[]);
        assert_eq!(claim(outcome), refused);
    }
}

#[test]
fn adapters_that_the_policy_does_not_list_get_no_key_and_no_credential() {
    let rig = rig(&[OTHER]);
    let guest = rig.release();
    assert_eq!(claim(receive(&rig, &guest, "bills")), "model.digest");
    // One that is listed as a model only, which its key opens as well.
    let file = PolicyFile {
        version: 3,
        models: Some((vec![MODEL.to_string(), ADAPTER.to_string()], 1)),
        adapters: vec![OTHER.to_string()],
        ..PolicyFile::new(rig.tee.root_spki_sha256(), measurement(1))
    };
    rig.broker.set_policy(&file.to_toml(), None).unwrap();
    let guest = rig.release();
    receive(&rig, &guest, "bills").unwrap();
    assert_eq!(claim(ask(&rig, &guest, &["bills"])), "keyset.adapter");
}

#[test]
fn an_adapters_grant_that_was_replaced_vouches_for_nothing() {
    let rig = rig(&[ADAPTER, OTHER]);
    let guest = rig.release();
    receive(&rig, &guest, "bills").unwrap();
    put(&rig, "bills", ADAPTER, 2);
    assert_eq!(claim(ask(&rig, &guest, &["bills"])), "resource");
}

/// One adapter is granted twice, at two paths, to different API keys. Whoever passes requests on asks for the other one.
#[test]
fn what_was_received_under_another_name_earns_no_credential() {
    let rig = rig(&[ADAPTER, OTHER]);
    let other = grant_of(&rig, "for-all", ADAPTER, 1);
    let path = path_of("for-all");
    rig.broker
        .put_resource(&path, None, NewResource::grant(&other))
        .unwrap();
    let keyset = Keyset {
        adapter_digests: vec![ADAPTER.0],
        policy_version: 2,
        ..rig.keyset()
    };
    let honest = received(&rig, &["smollm2", "bills"]);
    // The guest holds the grant of `for-all` as that of `bills`; both were released, or the other one alone.
    for names in [&["for-all"][..], &["bills", "for-all"]] {
        let guest = rig.release();
        for name in names {
            receive(&rig, &guest, name).unwrap();
        }
        let mut holds = honest.clone();
        holds[1].sha256 = sha256(&other);
        let request = rig.credential_request_after(&guest.session, holds, &keyset);
        let body = request.to_json().unwrap();
        assert_eq!(
            claim(rig.broker.credential(&guest.session, &body)),
            "received"
        );
    }
    // Nor does it help to correct what the guest says: its evidence says so, too.
    let guest = rig.release();
    receive(&rig, &guest, "bills").unwrap();
    let mut holds = honest.clone();
    holds[1].sha256 = sha256(&other);
    let mut request = rig.credential_request_after(&guest.session, holds, &keyset);
    request.received = honest;
    let body = request.to_json().unwrap();
    assert_eq!(
        claim(rig.broker.credential(&guest.session, &body)),
        "report_data"
    );
}
