//! The worker's end of TLS, for enclaves that pinned its key: what a share needs on its way.
//!
//! TLS 1.3 with X25519MLKEM768. The key is made at the first start and kept in a file; its certificate
//! is made at each start and says nothing, since an enclave looks at the key alone. Clients are not asked
//! who they are.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use casemate_wire::Timed;
use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use rustls::{ServerConfig, ServerConnection};

/// Bytes that are taken from the socket at once.
const PIECE: usize = 16 << 10;

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file can be neither read nor made.
    #[error("cannot read or make the key {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// There is something else in it.
    #[error("{0} is no private key in PEM: remove it, and another one is made")]
    NoKey(PathBuf),
    /// The system's randomness, or a key that TLS does not take.
    #[error("cannot use the key for TLS: {0}")]
    Unusable(String),
}

/// The key by which enclaves know this worker.
pub struct Identity {
    config: Arc<ServerConfig>,
    fingerprint: String,
}

impl Identity {
    /// The key in a file, which is made if it is not there, readable by its owner alone.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn at(path: &Path) -> Result<Identity, IdentityError> {
        let failed = |source| IdentityError::Io {
            path: path.into(),
            source,
        };
        let pair = match fs::read_to_string(path) {
            Ok(pem) => KeyPair::from_pem(&pem).map_err(|_| IdentityError::NoKey(path.into()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let pair = KeyPair::generate().map_err(unusable)?;
                let mut options = OpenOptions::new();
                let options = options.write(true).create_new(true).mode(0o600);
                let mut file = options.open(path).map_err(failed)?;
                let pem = pair.serialize_pem();
                file.write_all(pem.as_bytes()).map_err(failed)?;
                file.sync_all().map_err(failed)?;
                pair
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(IdentityError::NoKey(path.into()));
            }
            Err(error) => return Err(failed(error)),
        };
        Identity::of(&pair)
    }

    fn of(pair: &KeyPair) -> Result<Identity, IdentityError> {
        let certificate = CertificateParams::new(Vec::new())
            .and_then(|parameters| parameters.self_signed(pair))
            .map_err(unusable)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
        let provider = CryptoProvider {
            kx_groups: vec![kx_group::X25519MLKEM768],
            ..default_provider()
        };
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .map_err(unusable)?;
        // Nothing is resumed.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Identity {
            config: Arc::new(config),
            fingerprint: hex::encode(digest(&SHA256, &pair.subject_public_key_info())),
        })
    }

    /// What enclaves pin: the SHA-256 of the public key (its SubjectPublicKeyInfo), as 64 hexadecimal
    /// digits.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

fn unusable(error: impl std::fmt::Display) -> IdentityError {
    IdentityError::Unusable(error.to_string())
}

/// A connection through TLS of which one thread may read while another writes: nobody waits for the
/// socket while they hold what both need.
pub struct Session {
    shared: Arc<Shared>,
    socket: Timed,
}

struct Shared {
    state: Mutex<State>,
    /// Records on their way to the socket. Who holds it writes next, so that they stay in order.
    records: Mutex<Vec<u8>>,
}

struct State {
    tls: ServerConnection,
    /// What came from the socket, and how much of it was taken.
    came: Vec<u8>,
    taken: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    /// Makes the handshake with a client, within the socket's time.
    ///
    /// # Errors
    /// The socket's, and `InvalidData` for one that speaks another TLS, or none.
    pub fn accept(mut socket: Timed, identity: &Identity) -> io::Result<Session> {
        let tls = ServerConnection::new(Arc::clone(&identity.config));
        let mut tls = tls.map_err(io::Error::other)?;
        while tls.is_handshaking() {
            tls.complete_io(&mut socket)?;
        }
        let state = Mutex::new(State {
            tls,
            came: Vec::with_capacity(PIECE),
            taken: 0,
        });
        let records = Mutex::default();
        Ok(Session {
            shared: Arc::new(Shared { state, records }),
            socket,
        })
    }

    /// As [`Timed::within`].
    pub fn within(&mut self, limit: Option<Duration>) {
        self.socket.within(limit);
    }

    /// As [`Timed::another`].
    ///
    /// # Errors
    /// The system's.
    pub fn another(&self) -> io::Result<Session> {
        Ok(Session {
            shared: Arc::clone(&self.shared),
            socket: self.socket.another()?,
        })
    }

    /// As [`Timed::shutdown`]. Who is still listening is told, within the time that is left.
    pub fn shutdown(&mut self, how: Shutdown) {
        if how == Shutdown::Write {
            // It may be gone already.
            let _ = self.send(|tls| {
                tls.send_close_notify();
                Ok(0)
            });
        }
        self.socket.shutdown(how);
    }

    /// Sends the records that `with` brings about.
    fn send(
        &mut self,
        with: impl FnOnce(&mut ServerConnection) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut records = lock(&self.shared.records);
        let count = {
            let tls = &mut lock(&self.shared.state).tls;
            let count = with(tls)?;
            while tls.wants_write() {
                tls.write_tls(&mut *records)?;
            }
            count
        };
        let sent = self.socket.write_all(&records);
        records.clear();
        sent.map(|()| count)
    }
}

impl Read for Session {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let mut piece = [0; PIECE];
        loop {
            {
                let state = &mut *lock(&self.shared.state);
                match state.tls.reader().read(out) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    read => return read,
                }
                if let Some(mut rest) = state
                    .came
                    .get(state.taken..)
                    .filter(|rest| !rest.is_empty())
                {
                    state.taken += state.tls.read_tls(&mut rest)?;
                    let processed = state.tls.process_new_packets();
                    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
                    processed.map_err(invalid)?;
                    continue;
                }
            }
            let read = self.socket.read(&mut piece)?;
            if read == 0 {
                // The protocol inside knows whether something is missing.
                return Ok(0);
            }
            let state = &mut *lock(&self.shared.state);
            state.came.clear();
            state.came.extend_from_slice(&piece[..read]);
            state.taken = 0;
        }
    }
}

impl Write for Session {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(|tls| tls.writer().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_is_its_owners() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.pem");
        let first = Identity::at(&path).unwrap();
        assert_eq!(first.fingerprint().len(), 64);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let again = Identity::at(&path).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        let other = Identity::at(&directory.path().join("other.pem")).unwrap();
        assert_ne!(first.fingerprint(), other.fingerprint());
    }

    #[test]
    fn what_is_no_key_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.pem");
        for bytes in [&b""[..], b"a key", b"\xff\xfe"] {
            fs::write(&path, bytes).unwrap();
            assert!(matches!(Identity::at(&path), Err(IdentityError::NoKey(_))));
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
        let nowhere = Identity::at(&directory.path().join("no/where"));
        assert!(matches!(nowhere, Err(IdentityError::Io { .. })));
    }
}
