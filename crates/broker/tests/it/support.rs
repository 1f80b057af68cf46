//! A broker in one process: a fake TEE, a provider with a grant, a guest, and a clock that tests set.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use casemate_attest::measure::Measurement;
use casemate_attest::{Evidence, ReportData, TeeKind, UnixTime};
use casemate_broker::broker::{Broker, Rejection, Settings};
use casemate_broker::clock::Clock;
use casemate_broker::log::{Head, hash};
use casemate_broker::state::State;
use casemate_broker::store::NewResource;
use casemate_channel::keyset::{ChannelBinding, Keyset, KeysetDigest, Purpose, Role, report_data};
use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, ModelDigest};
use casemate_release::api_key::{Access, ApiKey, ApiKeys, Limits};
use casemate_release::client::{Attested, Challenged, Exchange};
use casemate_release::grant::KeyGrant;
use casemate_release::issuance::CredentialRequest;
use casemate_release::random::SystemRandom;
use casemate_release::rcar::{ResourcePath, SESSION_COOKIE};
use casemate_release::received::{self, Received};
use casemate_release::rollback::sha256;
use casemate_testkit::fake_tee::FakeTee;
use casemate_testkit::policies::PolicyFile;
use tempfile::TempDir;

/// 2026-11-21T00:00:00Z.
pub(crate) const NOW: u64 = 1_795_219_200;
pub(crate) const MODEL: ModelDigest = ModelDigest([0xd1; 32]);
pub(crate) const DATA_KEY: [u8; 32] = *b"the data key, 32 bytes in clear.";

/// The time as a test sets it.
pub(crate) struct TestClock(AtomicU64);

impl TestClock {
    pub(crate) fn advance(&self, seconds: u64) {
        self.0.fetch_add(seconds, Ordering::SeqCst);
    }

    pub(crate) fn seconds(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

impl Clock for TestClock {
    fn now(&self) -> UnixTime {
        UnixTime::from_secs(self.seconds())
    }
}

/// Everything around one broker.
pub(crate) struct Rig {
    pub(crate) directory: TempDir,
    pub(crate) clock: Arc<TestClock>,
    pub(crate) tee: Arc<FakeTee>,
    pub(crate) provider: Arc<SigningKey>,
    pub(crate) broker: Arc<Broker>,
    settings: Settings,
}

/// A guest's session after its evidence was accepted.
pub(crate) struct Guest {
    pub(crate) session: String,
    pub(crate) attested: Attested,
}

pub(crate) fn measurement(seed: u8) -> Measurement {
    Measurement {
        mr_td: [seed; 48],
        mr_config_id: [0xc0; 48],
        rtmr: [[0; 48]; 4],
    }
}

pub(crate) fn path() -> ResourcePath {
    "default/model/smollm2".parse().unwrap()
}

pub(crate) fn settings() -> Settings {
    Settings::default()
}

impl Rig {
    /// A broker with a policy (version 1, measurement 1, [`MODEL`]) and a grant at [`path`].
    pub(crate) fn new() -> Self {
        Self::with(settings())
    }

    pub(crate) fn with(settings: Settings) -> Self {
        let rig = Self::empty(settings);
        rig.set_policy(1, 1, &[MODEL]).unwrap();
        rig.put_grant(3);
        rig
    }

    /// A broker as `init` leaves it.
    pub(crate) fn empty(settings: Settings) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let clock = Arc::new(TestClock(AtomicU64::new(NOW)));
        let provider = Arc::new(SigningKey::generate());
        let state = State::init(
            &directory.path().join("state"),
            Some(provider.verifying_key()),
            Arc::new(SystemRandom),
            clock.now(),
        );
        let broker = Broker::new(
            state.unwrap(),
            clock.clone(),
            Arc::new(SystemRandom),
            settings,
        );
        Self {
            directory,
            tee: Arc::new(FakeTee::ephemeral(NOW).unwrap()),
            provider,
            broker: Arc::new(broker.unwrap()),
            clock,
            settings,
        }
    }

    pub(crate) fn state(&self) -> std::path::PathBuf {
        self.directory.path().join("state")
    }

    /// Ends the broker and opens its state again.
    pub(crate) fn restart(self) -> Self {
        let (clock, settings) = (self.clock.clone(), self.settings);
        self.restart_with(|state| open(state, &clock, settings))
    }

    /// Ends the broker and has another one made of its state.
    pub(crate) fn restart_with(self, make: impl FnOnce(&Path) -> Broker) -> Self {
        let state = self.state();
        let Self {
            directory,
            clock,
            tee,
            provider,
            broker,
            settings,
        } = self;
        drop(Arc::into_inner(broker).expect("nobody else holds the broker"));
        Self {
            directory,
            clock,
            tee,
            provider,
            broker: Arc::new(make(&state)),
            settings,
        }
    }

    pub(crate) fn policy(&self, version: u64, measured: u8, models: &[ModelDigest]) -> String {
        policy(&self.tee, version, &measurement(measured), models)
    }

    pub(crate) fn set_policy(
        &self,
        version: u64,
        measured: u8,
        models: &[ModelDigest],
    ) -> Result<(), Rejection> {
        self.broker
            .set_policy(&self.policy(version, measured, models), None)
            .map(|_| ())
    }

    pub(crate) fn put_grant(&self, minimum_version: u64) {
        let envelope = grant(&self.provider, minimum_version);
        self.broker
            .put_resource(&path(), None, NewResource::grant(&envelope))
            .unwrap();
    }

    pub(crate) fn quote(&self, measured: u8, report_data: &ReportData) -> Evidence {
        self.tee
            .quote(&measurement(measured), report_data, self.clock.seconds())
            .unwrap()
    }

    /// Opens a session and takes its challenge.
    pub(crate) fn challenged(&self) -> (String, Challenged) {
        let exchange = Exchange::new(TeeKind::Tdx, &SystemRandom).unwrap();
        let (session, challenge) = self.broker.auth(&exchange.request()).unwrap();
        let cookie = format!("{SESSION_COOKIE}={session}; Path=/");
        let challenge = serde_json::to_vec(&challenge).unwrap();
        (
            session,
            exchange.challenge(&challenge, [cookie.as_str()]).unwrap(),
        )
    }

    /// Goes through the exchange up to the token.
    pub(crate) fn attest(&self, measured: u8) -> Result<Guest, Rejection> {
        let (session, challenged) = self.challenged();
        let evidence = self.quote(measured, &challenged.report_data());
        let response = self
            .broker
            .attest(&session, &challenged.attestation(&evidence).unwrap())?;
        let attested = challenged
            .attested(&serde_json::to_vec(&response).unwrap())
            .unwrap();
        Ok(Guest { session, attested })
    }

    /// Goes through the exchange up to the model's key.
    pub(crate) fn release(&self) -> Guest {
        let guest = self.attest(1).unwrap();
        let jwe = self.broker.resource(&guest.session, &path()).unwrap();
        let grant = guest
            .attested
            .grant(&jwe.to_json(), &self.provider.verifying_key())
            .unwrap();
        assert_eq!(grant.data_key().expose(), &DATA_KEY);
        guest
    }

    pub(crate) fn keyset(&self) -> Keyset {
        Keyset {
            ohttp_config: vec![1; 41],
            receipt_key: [2; 32],
            tls_key_digest: None,
            model_name: "smollm2".into(),
            model_digest: MODEL.0,
            model_version: 3,
            adapter_digests: vec![],
            compute: "int8-g32".into(),
            policy_version: 1,
            not_before: self.clock.seconds(),
            expires_at: self.clock.seconds() + 3600,
        }
    }

    /// A request for a credential as an honest guest makes it: fresh nonce, evidence over it.
    pub(crate) fn credential_request(&self, session: &str, keyset: &Keyset) -> CredentialRequest {
        self.credential_request_after(session, vec![self.received()], keyset)
    }

    /// As [`Rig::credential_request`], by a guest that received this.
    pub(crate) fn credential_request_after(
        &self,
        session: &str,
        received: Vec<Received>,
        keyset: &Keyset,
    ) -> CredentialRequest {
        let nonce = self.broker.challenge(session).unwrap().nonce();
        self.request(&nonce, received, keyset, Purpose::Credential)
    }

    /// The model's grant as it was put at first.
    pub(crate) fn received(&self) -> Received {
        Received {
            path: path(),
            sha256: sha256(&grant(&self.provider, 3)),
        }
    }

    pub(crate) fn credential_request_over(
        &self,
        nonce: &[u8; 32],
        keyset: &Keyset,
        purpose: fn([u8; 32]) -> Purpose,
    ) -> CredentialRequest {
        self.request(nonce, vec![self.received()], keyset, purpose)
    }

    fn request(
        &self,
        nonce: &[u8; 32],
        received: Vec<Received>,
        keyset: &Keyset,
        purpose: fn([u8; 32]) -> Purpose,
    ) -> CredentialRequest {
        let purpose = purpose(received::digest(&received));
        let encoded = keyset.encode().unwrap();
        let digest = KeysetDigest::of(&encoded);
        let bound = report_data(purpose, Role::Service, &digest, nonce, &ChannelBinding::Key);
        CredentialRequest {
            nonce: *nonce,
            service: "smollm2".into(),
            received,
            keyset: encoded,
            evidence: self.quote(1, &bound),
        }
    }
}

pub(crate) fn open(state: &Path, clock: &Arc<TestClock>, settings: Settings) -> Broker {
    let random = Arc::new(SystemRandom);
    let state = State::open(state, random.clone()).unwrap();
    Broker::new(state, clock.clone(), random, settings).unwrap()
}

pub(crate) fn policy(
    tee: &FakeTee,
    version: u64,
    measurement: &Measurement,
    models: &[ModelDigest],
) -> String {
    let file = PolicyFile {
        version,
        models: Some((models.iter().map(ModelDigest::to_string).collect(), 1)),
        ..PolicyFile::new(tee.root_spki_sha256(), *measurement)
    };
    file.to_toml()
}

pub(crate) fn grant(provider: &SigningKey, minimum_version: u64) -> Vec<u8> {
    grant_to(Access::Open, provider, minimum_version)
}

/// A grant that lists one API key.
pub(crate) fn keyed_grant(provider: &SigningKey, minimum_version: u64) -> Vec<u8> {
    let key = ApiKey {
        name: "alice".into(),
        hash: [9; 32],
        limits: Limits::default(),
    };
    let keys = ApiKeys::new(vec![key]).unwrap();
    grant_to(Access::Keyed(keys), provider, minimum_version)
}

fn grant_to(access: Access, provider: &SigningKey, minimum_version: u64) -> Vec<u8> {
    let grant = KeyGrant {
        model_digest: MODEL,
        model_name: "smollm2".into(),
        minimum_version,
        data_key: DataKey::from_bytes(&DATA_KEY),
        access,
    };
    grant.sign(provider).unwrap().to_vec()
}

/// Cuts a log down to `size` entries and signs the new end, as who holds the issuer's key could.
pub(crate) fn cut_log(connection: &rusqlite::Connection, size: u64, issuer: &SigningKey) {
    let row = i64::try_from(size).unwrap();
    connection
        .execute("DELETE FROM log WHERE position >= ?1", [row])
        .unwrap();
    let last: Vec<u8> = connection
        .query_row(
            "SELECT entry FROM log WHERE position = ?1",
            [row - 1],
            |row| row.get(0),
        )
        .unwrap();
    let head = Head {
        size,
        hash: hash(&last),
    };
    connection
        .execute(
            "UPDATE log_head SET size = ?1, hash = ?2, signature = ?3",
            rusqlite::params![row, head.hash.bytes(), head.sign(issuer)],
        )
        .unwrap();
}
