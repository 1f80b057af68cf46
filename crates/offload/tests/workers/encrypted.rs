//! Two workers behind TLS, each pinned by its key: products are right, and whoever stands on the line sees
//! nothing and replaces nobody.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use casemate_offload::tls::{self, NoPin, Pin};
use casemate_offload::{Config, Connect, Event, Fault, Transport, Workers};
use casemate_wire::Timed;
use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::version::{TLS12, TLS13};
use rustls::{ServerConfig, ServerConnection, StreamOwned, SupportedProtocolVersion};

use crate::fake::{Enclave, Fake, Line, config};
use crate::testing::Random;

const WITHIN: Duration = Duration::from_secs(30);

/// A worker's key, and TLS that shows it.
pub(crate) struct Identity {
    config: Arc<ServerConfig>,
    pub(crate) pin: Pin,
}

impl Identity {
    pub(crate) fn new() -> Identity {
        Identity::with_version(&TLS13)
    }

    fn with_version(version: &'static SupportedProtocolVersion) -> Identity {
        let pair = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(Vec::new())
            .unwrap()
            .self_signed(&pair)
            .unwrap();
        let pin = hex::encode(digest(&SHA256, &pair.subject_public_key_info()));
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
        let provider = CryptoProvider {
            kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519],
            ..default_provider()
        };
        let config = ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        Identity {
            config: Arc::new(config),
            pin: pin.parse().unwrap(),
        }
    }

    /// The inner end of a connection whose other end speaks TLS; what is on the line is noted.
    pub(crate) fn shown_on(&self, far: UnixStream, line: Arc<Mutex<Vec<u8>>>) -> Line {
        let connection = ServerConnection::new(Arc::clone(&self.config)).unwrap();
        Line::new(StreamOwned::new(connection, Tap(far, line)))
    }
}

/// Notes what is on the line in both directions.
struct Tap(UnixStream, Arc<Mutex<Vec<u8>>>);

impl Read for Tap {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let read = self.0.read(out)?;
        self.1.lock().unwrap().extend_from_slice(&out[..read]);
        Ok(read)
    }
}

impl Write for Tap {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.0.write(bytes)?;
        self.1.lock().unwrap().extend_from_slice(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

#[test]
fn shares_to_pinned_workers_are_right_and_nobody_on_the_line_reads_one() {
    let mut random = Random::new(1);
    let fakes = [Fake::honest(), Fake::honest()];
    let lines: [Arc<Mutex<Vec<u8>>>; 2] = Default::default();
    let workers = [0, 1].map(|which| {
        let identity = Identity::new();
        let pin = identity.pin;
        fakes[which].encrypted_by(identity, pin, &lines[which])
    });
    let matrix = random.matrix(20, 60);
    let enclave = Enclave::new(config(), 1, Workers::Two(workers), vec![matrix]);
    enclave.wait();
    for rows in [1, 5, 2] {
        assert!(enclave.product(0, &random.row(rows * 60)));
    }
    for (fake, line) in fakes.iter().zip(&lines) {
        // The last share, in clear where TLS ends.
        let seen = fake.seen();
        let share = &seen[seen.len() - 2 * 60 * 4..];
        let line = line.lock().unwrap();
        assert!(line.len() > seen.len());
        for piece in share.chunks(8) {
            assert!(
                !line.windows(8).any(|at| at == piece),
                "a share on the line"
            );
        }
    }
}

#[test]
fn another_key_another_version_and_no_tls_are_refused() {
    let fake = Fake::honest();
    let line = Arc::default();
    let outcome = |connect: Connect| connect().map(|_| ()).map_err(|error| error.kind());
    let connect = |identity: Identity, pin| fake.encrypted_by(identity, pin, &line).into_connect();
    let right = Identity::new();
    let pin = right.pin;
    assert_eq!(outcome(connect(right, pin)), Ok(()));
    let refused = Err(ErrorKind::InvalidData);
    assert_eq!(outcome(connect(Identity::new(), pin)), refused);
    let old = Identity::with_version(&TLS12);
    let its = old.pin;
    assert_eq!(outcome(connect(old, its)), refused);
    // The enclave says so, and goes on trying.
    let other = connect(Identity::new(), pin);
    let nobodys = Config {
        retry: Duration::from_secs(3600),
        ..config()
    };
    let enclave = Enclave::new(
        nobodys,
        1,
        Workers::One(other),
        vec![Random::new(2).matrix(2, 2)],
    );
    while enclave.events().is_empty() {
        thread::sleep(Duration::from_millis(5));
    }
    let (worker, fault) = (0, Fault::OtherPeer);
    assert_eq!(enclave.events(), [Event::Failed { worker, fault }]);
    assert_eq!(fake.loaded(), 0);
    // A worker that speaks the protocol without TLS.
    let plain: Connect = Box::new(move || {
        let (near, mut far) = UnixStream::pair()?;
        far.write_all(&[2; 64])?;
        tls::connect(Timed::unix(near), pin, WITHIN)
    });
    assert_eq!(outcome(plain), refused);
    // Nobody there.
    let silent: Connect = Box::new(move || {
        let (near, _far) = UnixStream::pair()?;
        let connected = tls::connect(Timed::unix(near), pin, Duration::from_millis(50));
        connected.map(|connection| connection as Box<dyn Transport>)
    });
    assert_eq!(outcome(silent), Err(ErrorKind::TimedOut));
}

#[test]
fn pins_are_digests_in_hexadecimal() {
    let text = "00ff".repeat(16);
    assert_eq!(text.parse::<Pin>().unwrap().to_string(), text);
    for wrong in ["", "00", &"00ff".repeat(17), &"00fg".repeat(16)] {
        assert_eq!(wrong.parse::<Pin>(), Err(NoPin));
    }
}
