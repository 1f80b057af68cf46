//! Who this enclave is to its users: the keyset in force, its credential, and evidence over them on demand.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use casemate_channel::keyset::{ChannelBinding, Keyset, KeysetDigest, Purpose, Role, report_data};
use casemate_channel::ohttp::Keyring;
use casemate_channel::tls::ServerKey;
use casemate_channel::tls::rustls::ServerConfig;
use casemate_channel::verify::AttestationResponse;
use casemate_container::ModelDigest;
use casemate_container::signing::SigningKey;
use thiserror::Error;

use crate::access::Access;
use crate::adapters::Offered;
use crate::provision::{ProvisionError, Provisioner, Session};
use crate::quotes::{Quotes, TooManyWait};
use crate::receipts::{KeysetFacts, Signer};
use crate::renewal::{Life, Renewable};

/// Validity of a keyset. It is replaced before half of it has passed, so requests under its predecessor still succeed.
const KEYSET_SECONDS: u64 = 3600;
/// How long after its credential's end a keyset still serves requests: clocks of users and enclaves differ that much.
const GRACE_SECONDS: u64 = 60;
/// HPKE keys that are held at the same time, at the most: each remembers every request that it opened. Renewals in time
/// make no more than three whose credentials still hold; a key that is used up before its time has a successor sooner.
const KEYS: usize = 16;

/// Facts about the loaded model that the keyset states.
pub struct Served {
    /// Digest of the canonical manifest, recomputed from the bytes in use.
    pub digest: ModelDigest,
    /// Name in the manifest.
    pub name: String,
    /// Version in the manifest.
    pub version: u64,
    /// The adapters beside it, in the order of the configuration.
    pub adapters: Arc<[Arc<Offered>]>,
    /// Arithmetic of the linear layers, such as `int8-g32`.
    pub compute: String,
    /// Whether users may connect by attested TLS, so that keysets need a key for it.
    pub attested_tls: bool,
}

/// Why the identity could not be made or renewed.
#[derive(Debug, Error)]
pub enum ServingError {
    /// The broker or the TEE did not provide.
    #[error(transparent)]
    Provision(#[from] ProvisionError),
    /// Too many users ask for evidence.
    #[error(transparent)]
    TooManyWait(#[from] TooManyWait),
    /// A key could not be made or a keyset not be encoded.
    #[error("cannot make a keyset: {0}")]
    Keyset(String),
    /// The broker released another model's or adapter's key than the one loaded.
    #[error("the broker released a key for another model or adapter, or for a newer version only")]
    ModelChanged,
}

/// A keyset and the credential for it, as users are shown them.
pub struct Shown {
    keyset: Vec<u8>,
    credential: Vec<u8>,
    /// Of the HPKE key in the keyset.
    key_id: u8,
    /// When requests under the keyset stop being served: at its end, or a minute after the credential's.
    ends_at: u64,
    /// Of its receipt key.
    signer: Arc<Signer>,
}

impl Shown {
    /// Signs receipts for requests on connections that show this keyset.
    #[must_use]
    pub fn signer(&self) -> Arc<Signer> {
        Arc::clone(&self.signer)
    }

    /// Whether requests under it are still served at `now`.
    #[must_use]
    pub fn holds(&self, now: u64) -> bool {
        now < self.ends_at
    }
}

/// A published keyset with the credential for it.
struct Identity {
    shown: Arc<Shown>,
    /// Erased with the keyset's successor, though connections made with it live on, and when it is used up.
    tls: Mutex<Option<ServerKey>>,
    since: u64,
    keyset_expires: u64,
    credential_expires: u64,
}

/// A keyset whose key may still be held.
struct Published {
    digest: KeysetDigest,
    key_id: u8,
    ends_at: u64,
}

impl Identity {
    fn published(&self) -> Published {
        Published {
            digest: KeysetDigest::of(&self.shown.keyset),
            key_id: self.shown.key_id,
            ends_at: self.keyset_expires,
        }
    }

    fn tls_key(&self) -> MutexGuard<'_, Option<ServerKey>> {
        self.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The enclave's identity, renewed in the background.
pub struct Serving {
    /// Private halves of the published HPKE keys.
    pub keyring: Keyring,
    provisioner: Provisioner,
    served: Served,
    access: Arc<Access>,
    current: RwLock<Arc<Identity>>,
    /// In the order of publication.
    published: RwLock<Vec<Published>>,
    /// By the id of the HPKE key in the same keyset: a receipt is signed under the keyset that opened its request.
    signers: Mutex<Vec<(u8, Arc<Signer>)>>,
    quotes: Quotes,
}

impl Serving {
    /// Makes the first keyset and obtains its credential in `session`.
    pub async fn start(
        provisioner: Provisioner,
        session: &Session,
        served: Served,
        access: Arc<Access>,
        now: u64,
    ) -> Result<Self, ServingError> {
        let keyring = Keyring::default();
        let (identity, signer) =
            new_identity(&keyring, &provisioner, session, &served, now).await?;
        let published = RwLock::new(vec![identity.published()]);
        Ok(Self {
            published,
            keyring,
            provisioner,
            served,
            access,
            current: RwLock::new(Arc::new(identity)),
            signers: Mutex::new(vec![signer]),
            quotes: Quotes::default(),
        })
    }

    /// Evidence over the current keyset and the verifier's nonce.
    pub async fn attest(&self, nonce: [u8; 32]) -> Result<AttestationResponse, ServingError> {
        let shown = Arc::clone(&self.identity().shown);
        self.attest_connection(nonce, &shown, &ChannelBinding::Key)
            .await
    }

    /// What a new TLS connection shows at `now`, and how its handshake is made; nothing where no attested TLS is offered,
    /// or no longer, because the identity is used up.
    pub fn tls(&self, now: u64) -> Option<(Arc<Shown>, Arc<ServerConfig>)> {
        let identity = self.identity();
        if !identity.shown.holds(now) {
            return None;
        }
        let config = identity.tls_key().as_ref()?.config();
        Some((Arc::clone(&identity.shown), config))
    }

    /// Evidence over what a connection shows, bound to that connection, and over the verifier's nonce.
    pub async fn attest_connection(
        &self,
        nonce: [u8; 32],
        shown: &Shown,
        binding: &ChannelBinding,
    ) -> Result<AttestationResponse, ServingError> {
        let permit = self.quotes.turn().await?;
        let digest = KeysetDigest::of(&shown.keyset);
        let data = report_data(Purpose::Serving, Role::Service, &digest, &nonce, binding);
        let evidence = self.provisioner.evidence(data, Some(permit)).await?;
        Ok(AttestationResponse {
            evidence,
            keyset: shown.keyset.clone(),
            credential: shown.credential.clone(),
        })
    }

    /// The keysets under which requests can be opened at `now`, oldest first.
    pub fn keysets(&self, now: u64) -> Vec<KeysetDigest> {
        let published = self
            .published
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let held = published.iter().filter(|keyset| now < keyset.ends_at);
        held.map(|keyset| keyset.digest).collect()
    }

    /// Whether requests under `keyset` can be opened at `now`.
    pub fn holds(&self, keyset: &KeysetDigest, now: u64) -> bool {
        let published = self
            .published
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        published
            .iter()
            .any(|known| known.digest == *keyset && now < known.ends_at)
    }

    /// Whether keyset and credential hold at `now`.
    pub fn is_valid(&self, now: u64) -> bool {
        let identity = self.identity();
        now < identity.keyset_expires && now < identity.credential_expires
    }

    /// Whether requests are served at `now`: what users are shown has not ended.
    pub fn serves(&self, now: u64) -> bool {
        self.identity().shown.holds(now)
    }

    /// Renews keyset and credential. Attests anew for it, so the broker's current policy decides, and a withdrawn
    /// permission ends the service when the last credential expires. Grants are received anew. Whom they let in no more is
    /// let in no more from then on; whom they let in anew, only once the broker has confirmed with its credential that they
    /// are what it released under these names.
    async fn renew_all(&self, now: u64) -> Result<(), ServingError> {
        let session = self.provisioner.obtain_key().await?;
        session
            .grant
            .check_model(&self.served.digest, self.served.version)
            .map_err(|_| ServingError::ModelChanged)?;
        let adapters = &self.served.adapters;
        for (adapter, grant) in adapters.iter().zip(&session.adapters) {
            grant
                .check_model(&adapter.digest, adapter.version)
                .map_err(|_| ServingError::ModelChanged)?;
        }
        // Even if the credential cannot be had.
        self.access.withdraw(session.grant.access());
        for (adapter, grant) in adapters.iter().zip(&session.adapters) {
            adapter.withdraw(grant.access());
        }
        // A fresh credential needs a keyset that outlives it, so both are renewed together.
        let (renewed, signer) = new_identity(
            &self.keyring,
            &self.provisioner,
            &session,
            &self.served,
            now,
        )
        .await?;
        self.access.replace(session.grant.access());
        for (adapter, grant) in adapters.iter().zip(&session.adapters) {
            adapter.replace_users(grant.access());
        }
        self.publish(renewed, signer, now);
        Ok(())
    }

    /// Puts a new identity in the place of the current one, and gives up the oldest keys if there are too many.
    fn publish(&self, identity: Identity, signer: (u8, Arc<Signer>), now: u64) {
        // First, so that there is none of whose requests the signer is unknown.
        self.signers().push(signer);
        let mut ids = self.keyring.ids();
        let held = ids.split_off(ids.len().saturating_sub(KEYS));
        for id in ids {
            self.keyring.erase(id);
        }
        {
            // Before anybody can learn of the new keyset.
            let mut published = self
                .published
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            published.retain(|known| now < known.ends_at && held.contains(&known.key_id));
            published.push(identity.published());
        }
        *self
            .current
            .write()
            .unwrap_or_else(|poison| poison.into_inner()) = Arc::new(identity);
    }

    /// Signs receipts for requests that were opened with this HPKE key.
    pub fn signer(&self, key_id: u8) -> Option<Arc<Signer>> {
        let signers = self.signers();
        let found = signers.iter().rev().find(|(id, _)| *id == key_id);
        found.map(|(_, signer)| Arc::clone(signer))
    }

    fn signers(&self) -> MutexGuard<'_, Vec<(u8, Arc<Signer>)>> {
        self.signers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn identity(&self) -> Arc<Identity> {
        Arc::clone(
            &self
                .current
                .read()
                .unwrap_or_else(|poison| poison.into_inner()),
        )
    }
}

impl Renewable for Serving {
    type Error = ServingError;

    fn life(&self) -> Life {
        let identity = self.identity();
        Life {
            from: identity.since,
            // A keyset is replaced after half of its validity at the latest.
            until: identity.credential_expires.min(identity.keyset_expires),
        }
    }

    fn is_used_up(&self, now: u64) -> bool {
        self.keyring.erase_expired(now);
        let identity = self.identity();
        if !identity.shown.holds(now) {
            // For good, whatever the host does to the clock.
            *identity.tls_key() = None;
            self.keyring.erase(identity.shown.key_id);
        }
        self.signers()
            .retain(|(_, signer)| !signer.erase_expired(now));
        self.keyring.wants_rotation()
    }

    async fn renew(&self, now: u64) -> Result<(), ServingError> {
        self.renew_all(now).await
    }
}

async fn new_identity(
    keyring: &Keyring,
    provisioner: &Provisioner,
    session: &Session,
    served: &Served,
    now: u64,
) -> Result<(Identity, (u8, Arc<Signer>)), ServingError> {
    let expires_at = now + KEYSET_SECONDS;
    let config = keyring
        .generate(expires_at)
        .map_err(|error| ServingError::Keyset(error.to_string()))?;
    let receipt_key = SigningKey::generate();
    let tls = match served.attested_tls {
        true => Some(ServerKey::generate().map_err(|e| ServingError::Keyset(e.to_string()))?),
        false => None,
    };
    let mut adapter_digests: Vec<_> = served.adapters.iter().map(|a| a.digest.0).collect();
    adapter_digests.sort_unstable();
    let keyset = Keyset {
        ohttp_config: config.encoded,
        receipt_key: *receipt_key.verifying_key().as_bytes(),
        tls_key_digest: tls.as_ref().map(ServerKey::digest),
        model_name: served.name.clone(),
        model_digest: served.digest.0,
        model_version: served.version,
        adapter_digests,
        compute: served.compute.clone(),
        policy_version: session.policy_version,
        not_before: now,
        expires_at,
    };
    let encoded = keyset
        .encode()
        .map_err(|error| ServingError::Keyset(error.to_string()))?;
    let (credential, verified) = match provisioner
        .obtain_credential(session, encoded.clone(), now)
        .await
    {
        Ok(obtained) => obtained,
        Err(error) => {
            // Nobody will ever learn of this key.
            keyring.erase(config.id);
            return Err(error.into());
        }
    };
    let facts = KeysetFacts {
        keyset_digest: KeysetDigest::of(&encoded),
        evidence_digest: verified.claims().evidence_digest,
        model_digest: keyset.model_digest,
        model_version: keyset.model_version,
        adapter_digests: keyset.adapter_digests,
        compute: keyset.compute,
        expires_at,
    };
    let signer = Arc::new(Signer::new(facts, receipt_key));
    let credential_expires = verified.claims().expires_at;
    let identity = Identity {
        shown: Arc::new(Shown {
            keyset: encoded,
            credential,
            key_id: config.id,
            ends_at: expires_at.min(credential_expires.saturating_add(GRACE_SECONDS)),
            signer: Arc::clone(&signer),
        }),
        tls: Mutex::new(tls),
        keyset_expires: expires_at,
        since: now,
        credential_expires,
    };
    Ok((identity, (config.id, signer)))
}

#[cfg(test)]
pub(crate) mod tests;
