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
    let grant = KeyGrant {
        model_digest: digest,
        model_name: name.into(),
        minimum_version,
        data_key: DataKey::from_bytes(&[0x78; 32]),
        access: Access::Open,
    };
    let grant = grant.sign(&rig.provider).unwrap();
    rig.broker
        .put_resource(&path_of(name), None, NewResource::grant(&grant))
        .unwrap();
}

/// Receives the key of an adapter in a session.
fn receive(rig: &Rig, guest: &Guest, name: &str) -> Result<(), Rejection> {
    let jwe = rig.broker.resource(&guest.session, &path_of(name))?;
    let provider = rig.provider.verifying_key();
    let grant = guest.attested.grant(&jwe.to_json(), &provider).unwrap();
    assert_eq!(grant.data_key().expose(), &[0x78; 32]);
    Ok(())
}

/// A credential for a keyset with these adapters.
fn ask(
    rig: &Rig,
    guest: &Guest,
    adapters: &[ModelDigest],
) -> Result<CredentialResponse, Rejection> {
    ask_as(rig, guest, "smollm2", adapters)
}

fn ask_as(
    rig: &Rig,
    guest: &Guest,
    service: &str,
    adapters: &[ModelDigest],
) -> Result<CredentialResponse, Rejection> {
    let keyset = Keyset {
        adapter_digests: adapters.iter().map(|digest| digest.0).collect(),
        policy_version: rig.broker.policy().unwrap().version(),
        ..rig.keyset()
    };
    let mut request = rig.credential_request(&guest.session, &keyset);
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
        let response = ask(&rig, &guest, &[ADAPTER, OTHER]).unwrap();
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
    let guest = rig.release();
    receive(&rig, &guest, "bills").unwrap();
    assert_eq!(
        claim(ask(&rig, &guest, &[ADAPTER, OTHER])),
        "keyset.adapter"
    );
    // Nor is an adapter's key enough for a model, under whatever name.
    for (service, refused) in [("smollm2", "service"), ("bills", "keyset.model_digest")] {
        let guest = rig.attest(1).unwrap();
        receive(&rig, &guest, "bills").unwrap();
        assert_eq!(claim(ask_as(&rig, &guest, service, &[])), refused);
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
    assert_eq!(claim(ask(&rig, &guest, &[ADAPTER])), "keyset.adapter");
}

#[test]
fn an_adapters_grant_that_was_replaced_vouches_for_nothing() {
    let rig = rig(&[ADAPTER, OTHER]);
    let guest = rig.release();
    receive(&rig, &guest, "bills").unwrap();
    put(&rig, "bills", ADAPTER, 2);
    assert_eq!(claim(ask(&rig, &guest, &[ADAPTER])), "resource");
}
