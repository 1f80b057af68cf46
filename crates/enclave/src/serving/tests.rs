use casemate_attest::{Evidence, ReportData};
use casemate_release::api_key;
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

/// An identity until `ends_at` that shows this keyset, with a key in the keyring, held beyond the credential as in life.
fn identity(keyring: &Keyring, keyset: &[u8], ends_at: u64) -> (Identity, (u8, Arc<Signer>)) {
    let key_id = keyring.generate(ends_at + 1000).unwrap().id;
    let signer = Arc::new(signer_until(ends_at));
    let identity = Identity {
        shown: Arc::new(Shown {
            keyset: keyset.to_vec(),
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
    (identity, (key_id, signer))
}

/// An enclave whose only identity, with a TLS key, is served until `ends_at`, and that no broker answers.
pub(crate) fn until(ends_at: u64) -> Serving {
    let keyring = Keyring::default();
    let (identity, signer) = identity(&keyring, b"keyset", ends_at);
    Serving {
        published: RwLock::new(vec![identity.published()]),
        keyring,
        provisioner: provisioner(),
        served: Served {
            digest: ModelDigest([3; 32]),
            name: "m".into(),
            version: 4,
            adapters: Arc::new([]),
            compute: "f32".into(),
            attested_tls: true,
        },
        access: Arc::new(Access::new(
            &api_key::Access::Open,
            access::monotonic(),
            Arc::new(Metrics::default()),
        )),
        current: RwLock::new(Arc::new(identity)),
        signers: Mutex::new(vec![signer]),
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

#[test]
fn only_so_many_keys_are_held_however_often_they_are_used_up() {
    let serving = until(100);
    for n in 0..600_u32 {
        let (identity, signer) = identity(&serving.keyring, &n.to_be_bytes(), 100);
        serving.publish(identity, signer, 0);
        assert!(serving.keyring.ids().len() <= KEYS);
    }
    let digest = |n: u32| KeysetDigest::of(&n.to_be_bytes());
    let held: Vec<_> = (600 - KEYS as u32..600).map(digest).collect();
    assert_eq!(serving.keysets(0), held);
    assert!(serving.holds(&digest(599), 0) && serving.holds(&held[0], 0));
    // Whoever used an older one is told to verify again.
    assert!(!serving.holds(&digest(599 - KEYS as u32), 0));
    assert!(serving.keysets(100).is_empty());
}
