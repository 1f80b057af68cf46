//! Somebody in the middle: passes bytes between those who connect and one server, writes down all of them, holds answers
//! back when told to, and asks for something else than was asked for. Ends TLS on both sides if it is given the gateway's key, to write down what is inside.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::CertificateFacts;

/// What passed on one connection.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    /// From who connected.
    pub to_server: Vec<u8>,
    /// From the server.
    pub to_client: Vec<u8>,
}

/// How a recorder looks inside TLS: as the server towards clients, and as a client towards the server.
#[derive(Clone)]
pub struct TlsEnds {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    server: Option<ServerName<'static>>,
}

impl TlsEnds {
    /// With settings of one's own, asking for the server by this name.
    pub fn of(
        server: Arc<ServerConfig>,
        client: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> TlsEnds {
        TlsEnds {
            acceptor: server.into(),
            connector: client.into(),
            server: Some(name),
        }
    }

    /// With a gateway's own certificate and key.
    pub fn new(stolen: &CertificateFacts) -> io::Result<TlsEnds> {
        let certificates = read_certificates(&stolen.certificate)?;
        let key =
            PrivateKeyDer::from_pem_slice(&fs::read(&stolen.key)?).map_err(io::Error::other)?;
        let mut roots = RootCertStore::empty();
        for authority in read_certificates(&stolen.authority)? {
            roots.add(authority).map_err(io::Error::other)?;
        }
        let server = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .map_err(io::Error::other)?;
        let client = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(TlsEnds {
            acceptor: Arc::new(server).into(),
            connector: Arc::new(client).into(),
            server: None,
        })
    }
}

fn read_certificates(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let pem = fs::read(path)?;
    let certificates = CertificateDer::pem_slice_iter(&pem);
    certificates
        .map(|item| item.map_err(io::Error::other))
        .collect()
}

/// A recorder in front of one server; ends when it is dropped.
pub struct Recorder {
    address: SocketAddr,
    shared: Arc<Shared>,
    // Its tasks end with it.
    runtime: Option<Runtime>,
}

struct Shared {
    recordings: Mutex<Vec<Recording>>,
    /// How many bytes of each connection's answers may pass.
    passing: watch::Sender<usize>,
    /// What stands for each other in requests.
    exchanged: Mutex<Option<[Vec<u8>; 2]>>,
}

impl Recorder {
    /// Starts on a free port of 127.0.0.1 in front of `server`, which need not listen yet.
    pub fn start(server: SocketAddr, tls: Option<TlsEnds>) -> io::Result<Recorder> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            recordings: Mutex::default(),
            passing: watch::Sender::new(usize::MAX),
            exchanged: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (shared, tls) = (Arc::clone(&accepting), tls.clone());
                // A connection that fails is over; what passed until then is written down.
                tokio::spawn(async move { shared.connect(stream, server, tls).await });
            }
        });
        Ok(Recorder {
            address,
            shared,
            runtime: Some(runtime),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What passed so far, by connection.
    pub fn recordings(&self) -> Vec<Recording> {
        self.shared.recordings().clone()
    }

    /// From now on no more than `bytes` of each connection's answers pass; the rest waits here.
    pub fn hold_answers_after(&self, bytes: usize) {
        self.shared.passing.send_replace(bytes);
    }

    /// From now on requests pass with the one text in place of the other, both ways round. Each must be within one piece
    /// as it is sent, as the head of a short request is.
    pub fn exchange(&self, one: &str, other: &str) {
        let texts = [one, other].map(|text| text.as_bytes().to_vec());
        *self.shared.exchanged() = Some(texts);
    }

    /// Lets everything pass.
    pub fn release_answers(&self) {
        self.hold_answers_after(usize::MAX);
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Shared {
    fn recordings(&self) -> MutexGuard<'_, Vec<Recording>> {
        self.recordings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn exchanged(&self) -> MutexGuard<'_, Option<[Vec<u8>; 2]>> {
        self.exchanged
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A piece of a request as it goes on.
    fn altered(&self, piece: &[u8]) -> Vec<u8> {
        let exchanged = self.exchanged();
        let Some([one, other]) = &*exchanged else {
            return piece.to_vec();
        };
        let mut altered = Vec::with_capacity(piece.len());
        let mut rest = piece;
        while let Some((&first, behind)) = rest.split_first() {
            let found = [(one, other), (other, one)]
                .into_iter()
                .find(|(asked, _)| rest.starts_with(asked));
            match found {
                Some((asked, instead)) => {
                    altered.extend_from_slice(instead);
                    rest = &rest[asked.len()..];
                }
                None => {
                    altered.push(first);
                    rest = behind;
                }
            }
        }
        altered
    }

    async fn connect(
        self: Arc<Self>,
        client: TcpStream,
        server: SocketAddr,
        tls: Option<TlsEnds>,
    ) -> io::Result<()> {
        let server = TcpStream::connect(server).await?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        match tls {
            None => self.pass(client, server).await,
            Some(tls) => {
                let by_address = ServerName::from(server.peer_addr()?.ip());
                let name = tls.server.unwrap_or(by_address);
                let client = tls.acceptor.accept(client).await?;
                let server = tls.connector.connect(name, server).await?;
                self.pass(client, server).await
            }
        }
        Ok(())
    }

    async fn pass<C, S>(&self, client: C, server: S)
    where
        C: AsyncRead + AsyncWrite,
        S: AsyncRead + AsyncWrite,
    {
        let index = {
            let mut recordings = self.recordings();
            recordings.push(Recording::default());
            recordings.len() - 1
        };
        let (mut from_client, mut to_client) = split(client);
        let (mut from_server, mut to_server) = split(server);
        let requests = async {
            let mut buffer = vec![0; 16 << 10];
            loop {
                let count = from_client.read(&mut buffer).await?;
                if count == 0 {
                    return to_server.shutdown().await;
                }
                if let Some(recording) = self.recordings().get_mut(index) {
                    recording.to_server.extend_from_slice(&buffer[..count]);
                }
                to_server.write_all(&self.altered(&buffer[..count])).await?;
            }
        };
        let answers = async {
            let mut passing = self.passing.subscribe();
            let mut passed = 0;
            let mut buffer = vec![0; 16 << 10];
            loop {
                let count = from_server.read(&mut buffer).await?;
                if count == 0 {
                    return to_client.shutdown().await;
                }
                if let Some(recording) = self.recordings().get_mut(index) {
                    recording.to_client.extend_from_slice(&buffer[..count]);
                }
                let mut rest = &buffer[..count];
                while !rest.is_empty() {
                    let open = passing.wait_for(|limit| *limit > passed).await;
                    let open = *open.map_err(io::Error::other)? - passed;
                    let (now, later) = rest.split_at(rest.len().min(open));
                    to_client.write_all(now).await?;
                    to_client.flush().await?;
                    passed += now.len();
                    rest = later;
                }
            }
        };
        // Either side may close its half; an error of one ends both.
        let _ = tokio::try_join!(requests, answers);
    }
}
