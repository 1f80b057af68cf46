//! An administrator with several hands and several guests, all at once, until nobody answers any more.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use casemate_attest::TeeKind;
use casemate_broker::admin::{AdminClient, AdminError};
use casemate_broker::sessions::session_digest;
use casemate_broker::store::NewResource;
use casemate_channel::keyset::{ChannelBinding, Keyset, KeysetDigest, Purpose, Role, report_data};
use casemate_container::signing::SigningKey;
use casemate_release::client::Exchange;
use casemate_release::credential::past_claims;
use casemate_release::issuance::{
    CHALLENGE_PATH, CREDENTIAL_PATH, CredentialRequest, CredentialResponse, IssuanceChallenge,
};
use casemate_release::random::SystemRandom;
use casemate_release::rcar::{ATTEST_PATH, AUTH_PATH, RESOURCE_PATH, ResourcePath};
use casemate_release::received::{self, Received};
use casemate_release::rollback::sha256;
use casemate_testkit::fake_tee::FakeTee;
use reqwest::header::{COOKIE, SET_COOKIE};

use super::ledger::{Fact, Ledger};
use crate::support::{MODEL, grant, measurement, path, policy};

const GUESTS: usize = 3;
const HANDS: usize = 2;
const PATHS_OF_A_HAND: u64 = 3;

pub(super) struct Load {
    pub(super) provider: SigningKey,
    pub(super) ledger: Mutex<Ledger>,
    tee: FakeTee,
}

/// Nobody answers any more: the broker was killed, or the load is to end.
struct Gone;

impl From<reqwest::Error> for Gone {
    fn from(_: reqwest::Error) -> Self {
        Gone
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap().as_secs()
}

impl Load {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            provider: SigningKey::generate(),
            ledger: Mutex::new(Ledger::new()),
            tee: FakeTee::ephemeral(now()).unwrap(),
        })
    }

    /// Runs all tasks until `end`, which blocks, has returned and all have noticed.
    pub(super) async fn run_until(
        self: &Arc<Self>,
        address: &str,
        socket: &Path,
        end: impl FnOnce(),
    ) {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = tokio::task::JoinSet::new();
        let admin = || AdminClient::new(socket.to_owned());
        let ready = self.clone().prepare(admin()).await;
        if ready.is_ok() {
            tasks.spawn(self.clone().policies(admin(), stop.clone()));
            for hand in 0..HANDS {
                tasks.spawn(self.clone().resources(hand, admin(), stop.clone()));
            }
            for _ in 0..GUESTS {
                let url = format!("http://{address}");
                tasks.spawn(self.clone().guests(url, stop.clone()));
            }
        }
        // Blocks this thread only: the tasks run on the runtime's own.
        end();
        stop.store(true, Ordering::SeqCst);
        while let Some(task) = tasks.join_next().await {
            task.expect("a task of the load does not panic");
        }
    }

    fn ledger(&self) -> std::sync::MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap()
    }

    /// The first time: a policy, and the grant that guests ask for.
    async fn prepare(self: Arc<Self>, admin: AdminClient) -> Result<(), Gone> {
        if self.ledger().policy_version() > 0 {
            return Ok(());
        }
        self.set_policy(&admin, 1).await?;
        let envelope = grant(&self.provider, 3);
        self.put(&admin, &path(), NewResource::grant(&envelope))
            .await
    }

    async fn policies(self: Arc<Self>, admin: AdminClient, stop: Arc<AtomicBool>) {
        let mut version = self.ledger().policy_version();
        while !stop.load(Ordering::SeqCst) {
            version += 1;
            if self.set_policy(&admin, version).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    }

    /// Puts grants and other bytes at paths of its own, and deletes them; the model's version goes up all the time.
    async fn resources(self: Arc<Self>, hand: usize, admin: AdminClient, stop: Arc<AtomicBool>) {
        let mut version = self.ledger().policy_version() * 1000;
        while !stop.load(Ordering::SeqCst) {
            version += 1;
            let tag = version % PATHS_OF_A_HAND;
            let at: ResourcePath = format!("load/hand{hand}/{tag}").parse().unwrap();
            let envelope = grant(&self.provider, version);
            let opaque = format!("opaque {version}").into_bytes();
            let done = match version % 4 {
                0 => self.delete(&admin, &at).await,
                1 => self.put(&admin, &at, NewResource::Opaque(&opaque)).await,
                _ => self.put(&admin, &at, NewResource::grant(&envelope)).await,
            };
            if done.is_err() {
                return;
            }
        }
    }

    async fn guests(self: Arc<Self>, url: String, stop: Arc<AtomicBool>) {
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        while !stop.load(Ordering::SeqCst) {
            if self.guest(&http, &url).await.is_err() {
                return;
            }
        }
    }

    async fn set_policy(&self, admin: &AdminClient, version: u64) -> Result<(), Gone> {
        let text = policy(&self.tee, version, &measurement(1), &[MODEL]);
        let content = sha256(text.as_bytes());
        self.ledger().asked(None, Some(content));
        answered(admin.set_policy(text, None).await)?;
        let fact = Fact::Policy { version, content };
        self.ledger().acknowledged(fact);
        Ok(())
    }

    async fn put(
        &self,
        admin: &AdminClient,
        path: &ResourcePath,
        resource: NewResource<'_>,
    ) -> Result<(), Gone> {
        let content = sha256(resource.bytes());
        self.ledger().asked(Some(path.as_str()), Some(content));
        answered(admin.put_resource(path, None, resource).await)?;
        let path = path.to_string();
        self.ledger().acknowledged(Fact::Put { path, content });
        Ok(())
    }

    async fn delete(&self, admin: &AdminClient, path: &ResourcePath) -> Result<(), Gone> {
        self.ledger().asked(Some(path.as_str()), None);
        match admin.delete_resource(path).await {
            // Never stored, or deleted before: there is nothing to be logged.
            Err(AdminError::Refused { kind, .. }) if kind == "resource_not_found" => Ok(()),
            outcome => {
                answered(outcome)?;
                let path = path.to_string();
                self.ledger().acknowledged(Fact::Delete { path });
                Ok(())
            }
        }
    }

    /// One guest: attestation, key, credential. A policy that changes on the way makes the broker refuse, rightly.
    async fn guest(&self, http: &reqwest::Client, url: &str) -> Result<(), Gone> {
        let exchange = Exchange::new(TeeKind::Tdx, &SystemRandom).unwrap();
        let auth = http.post(format!("{url}{AUTH_PATH}"));
        let response = auth.body(exchange.request()).send().await?;
        if !accepted(&response) {
            return Ok(());
        }
        let set_cookie = response.headers()[SET_COOKIE].to_str().unwrap().to_owned();
        let body = response.bytes().await?;
        let challenged = exchange.challenge(&body, [set_cookie.as_str()]).unwrap();
        let cookie = challenged.cookie();
        let (_, id) = cookie.split_once('=').unwrap();
        let session = session_digest(id);
        let post = |path: &str, body: Vec<u8>| {
            let request = http.post(format!("{url}{path}")).header(COOKIE, &cookie);
            request.body(body).send()
        };

        let evidence = self.quote(&challenged.report_data());
        let body = challenged.attestation(&evidence).unwrap();
        let response = post(ATTEST_PATH, body).await?;
        if !accepted(&response) {
            return Ok(());
        }
        let attested = challenged.attested(&response.bytes().await?).unwrap();
        self.ledger().acknowledged(Fact::Attest { session });

        let resource = http.get(format!("{url}{RESOURCE_PATH}/{}", path()));
        let response = resource.header(COOKIE, &cookie).send().await?;
        if !accepted(&response) {
            return Ok(());
        }
        let jwe = response.bytes().await?;
        let provider = self.provider.verifying_key();
        let grant = attested.grant(&jwe, &provider).unwrap();
        let received = vec![Received {
            path: path(),
            sha256: *grant.envelope_sha256(),
        }];
        let path = path().to_string();
        self.ledger().acknowledged(Fact::Release { session, path });

        let response = post(CHALLENGE_PATH, vec![]).await?;
        if !accepted(&response) {
            return Ok(());
        }
        let nonce = IssuanceChallenge::parse(&response.bytes().await?)
            .unwrap()
            .nonce();
        let keyset = keyset(attested.policy_version().unwrap());
        let digest = KeysetDigest::of(&keyset);
        let purpose = Purpose::Credential(received::digest(&received));
        let bound = report_data(
            purpose,
            Role::Service,
            &digest,
            &nonce,
            &ChannelBinding::Key,
        );
        let request = CredentialRequest {
            nonce,
            service: "smollm2".into(),
            received,
            keyset,
            evidence: self.quote(&bound),
        };
        let response = post(CREDENTIAL_PATH, request.to_json().unwrap()).await?;
        if !accepted(&response) {
            return Ok(());
        }
        let envelope = CredentialResponse::parse(&response.bytes().await?).unwrap();
        self.credential(envelope, session, digest.0);
        Ok(())
    }

    fn credential(&self, envelope: Vec<u8>, session: [u8; 32], keyset: [u8; 32]) {
        let issuer = casemate_release::credential::claimed_issuer(&envelope).unwrap();
        let issuer = casemate_container::signing::VerifyingKey::from_bytes(issuer);
        let claims = past_claims(&envelope, &issuer).unwrap();
        let anchor = casemate_broker::log::Anchor {
            size: claims.log_size,
            hash: claims.log_head.into(),
        };
        let mut ledger = self.ledger();
        ledger.acknowledged(Fact::Credential { session, keyset });
        ledger.anchored(anchor, envelope);
    }

    fn quote(&self, bound: &casemate_attest::ReportData) -> casemate_attest::Evidence {
        self.tee.quote(&measurement(1), bound, now()).unwrap()
    }
}

fn keyset(policy_version: u64) -> Vec<u8> {
    let mut receipt_key = [0; 32];
    casemate_release::random::Random::fill(&SystemRandom, &mut receipt_key).unwrap();
    let keyset = Keyset {
        ohttp_config: vec![1; 41],
        receipt_key,
        tls_key_digest: None,
        model_name: "smollm2".into(),
        model_digest: MODEL.0,
        model_version: 3,
        adapter_digests: vec![],
        compute: "int8-g32".into(),
        policy_version,
        not_before: now(),
        expires_at: now() + 3600,
    };
    keyset.encode().unwrap()
}

/// Whether the broker did it. It may refuse what a change of policy overtook; it may not fail.
fn accepted(response: &reqwest::Response) -> bool {
    let status = response.status();
    assert!(!status.is_server_error(), "{status}");
    assert!(
        status.is_success() || status == 403 || status == 401,
        "{status} for {}",
        response.url()
    );
    status.is_success()
}

fn answered<T>(outcome: Result<T, AdminError>) -> Result<(), Gone> {
    match outcome {
        Ok(_) => Ok(()),
        Err(AdminError::Refused { kind, detail }) => panic!("refused: {kind}: {detail}"),
        Err(AdminError::Connect { .. } | AdminError::Protocol(_)) => Err(Gone),
    }
}
