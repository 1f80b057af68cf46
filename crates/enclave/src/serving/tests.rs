use casemate_attest::{Evidence, ReportData};
use casemate_release::api_key::ApiKeys;
use casemate_tee::{QuoteProvider, TeeError};

use super::*;
use crate::access;
use crate::config::MeasuredConfig;
use crate::metrics::Metrics;
use crate::receipts::signer_until;

/// Nobody asks for evidence here.
struct NoTee;

impl QuoteProvider for NoTee {
    fn name(&self) -> &'static str {
        "none"
    }

    fn quote(&self, _: &ReportData) -> Result<Evidence, TeeError> {
        panic!("no evidence was to be made")
    }
}

fn provisioner() -> Provisioner {
    let key = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
    let text = format!(
        "[service]\nname = \"m\"\nlisten = \"127.0.0.1:0\"\n[model]\npath = \"m\"\n[broker]\nurl = \
         \"http://127.0.0.1:1\"\nissuer = \"{key}\"\nprovider = \"{key}\"\nresource = \"default/model/m\"\n[tee]\n\
         backend = \"quoting-service\"\nsocket = \"/run/s\"\n"
    );
    let Ok(measured) = MeasuredConfig::parse(text.into_bytes()) else {
        panic!("a configuration");
    };
    Provisioner::new(&measured.config, [0; 48], Arc::new(NoTee)).unwrap()
}

/// An enclave whose only identity, with a TLS key, is served until `ends_at`, and that no broker answers.
pub(crate) fn until(ends_at: u64) -> Serving {
    let keyring = Keyring::default();
    // Held beyond the credential, as in life.
    let key_id = keyring.generate(ends_at + 1000).unwrap().id;
    let signer = Arc::new(signer_until(ends_at));
    let identity = Identity {
        shown: Arc::new(Shown {
            keyset: b"keyset".to_vec(),
            credential: b"credential".to_vec(),
            key_id,
            ends_at,
            signer: Arc::clone(&signer),
        }),
        tls: Mutex::new(Some(ServerKey::generate().unwrap())),
        since: 0,
        keyset_expires: ends_at,
        credential_expires: ends_at,
    };
    let keys = ApiKeys::new(Vec::new()).unwrap();
    Serving {
        published: RwLock::new(vec![identity.published()]),
        keyring,
        provisioner: provisioner(),
        served: Served {
            digest: ModelDigest([3; 32]),
            name: "m".into(),
            version: 4,
            compute: "f32",
            attested_tls: true,
        },
        access: Arc::new(Access::new(
            &keys,
            access::monotonic(),
            Arc::new(Metrics::default()),
        )),
        current: RwLock::new(Arc::new(identity)),
        signers: Mutex::new(vec![(key_id, signer)]),
        quotes: Quotes::default(),
    }
}

/// As when ids have come round.
pub(crate) fn add_signer_of_the_same_key_id(serving: &Serving) {
    let mut signers = serving.signers();
    let id = signers[0].0;
    signers.push((id, Arc::new(signer_until(1000))));
}

#[test]
fn an_identity_that_has_ended_makes_no_handshakes_and_its_keys_are_gone() {
    let serving = until(100);
    assert!(serving.tls(99).is_some());
    assert!(serving.tls(100).is_none());
    assert!(!serving.is_used_up(99));
    assert!(serving.tls(99).is_some());
    assert_eq!(serving.keyring.ids().len(), 1);
    serving.is_used_up(100);
    assert!(serving.keyring.ids().is_empty());
    // And stays so, whatever the host does to the clock.
    assert!(serving.tls(99).is_none());
}
