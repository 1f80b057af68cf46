//! Attested TLS, the user's end: connections that go straight to the enclave. Each is verified over its own exporter
//! before anything is sent on it, and is used until that verification runs out; then there is another one. What is
//! accepted is decided in `casemate_channel`.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use casemate_channel::tls::{self, Handshake, rustls};
use futures::Stream;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::{Sleep, timeout};
use tokio_rustls::TlsConnector;

use crate::service::Holding;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest silence of a service that is answering.
const READ_TIMEOUT: Duration = Duration::from_secs(600);
/// Verified connections that are kept for the next request.
const IDLE: usize = 8;
/// For how long they are: half of what an enclave waits, so that no request meets the end of its connection.
const KEPT: Duration = Duration::from_secs(30);

/// How to reach an enclave, and the verified connections to it that nobody uses at the moment.
pub(crate) struct Direct {
    /// `HOST:PORT`.
    authority: String,
    host: HeaderValue,
    connector: TlsConnector,
    /// With the moment since which they wait.
    idle: Mutex<Vec<(Instant, Verified)>>,
}

/// A connection of which nothing is known but what its handshake proved.
pub(crate) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    pub(crate) handshake: Handshake,
}

/// A connection on which requests may be sent for as long as its verification holds.
pub(crate) struct Verified {
    sender: SendRequest<Full<Bytes>>,
    holding: Holding,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// Nobody answers, or the connection broke.
    #[error("{0}")]
    Unreachable(String),
    /// Whoever answers does not speak attested TLS, or does not have the key that it shows.
    #[error("{0}")]
    Handshake(String),
}

/// Why a request has no answer.
#[derive(Debug)]
pub(crate) enum SendError {
    /// Nothing of it was sent; it may go on another connection.
    NotSent(Box<Request<Bytes>>),
    /// It may have been served.
    Failed(String),
}

impl Direct {
    /// Prepares to connect to `authority`, `HOST:PORT`.
    pub(crate) fn new(authority: &str) -> Result<Direct, String> {
        let config = tls::client_config().map_err(|error| error.to_string())?;
        Ok(Direct {
            host: HeaderValue::from_str(authority).map_err(|error| error.to_string())?,
            authority: authority.to_owned(),
            connector: config.into(),
            idle: Mutex::default(),
        })
    }

    /// Makes a new connection.
    pub(crate) async fn connect(&self) -> Result<Connection, ConnectError> {
        let connecting = async {
            let stream = TcpStream::connect(&self.authority).await?;
            stream.set_nodelay(true)?;
            self.connector.connect(tls::server_name(), stream).await
        };
        let stream = timeout(CONNECT_TIMEOUT, connecting)
            .await
            .map_err(|_| ConnectError::Unreachable("no connection in time".to_owned()))?
            .map_err(|error| match error.get_ref() {
                Some(inner) if inner.is::<rustls::Error>() => {
                    ConnectError::Handshake(inner.to_string())
                }
                _ => ConnectError::Unreachable(error.to_string()),
            })?;
        let handshake = Handshake::of(stream.get_ref().1)
            .map_err(|error| ConnectError::Handshake(error.to_string()))?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| ConnectError::Unreachable(error.to_string()))?;
        // Ends with the sender and the last answer's body.
        tokio::spawn(connection);
        Ok(Connection { sender, handshake })
    }

    /// A verified connection that nobody uses.
    pub(crate) fn take(&self, now: casemate_attest::UnixTime) -> Option<Verified> {
        let mut idle = self.idle();
        idle.retain(|(since, connection)| {
            since.elapsed() < KEPT
                && !connection.holding.remaining(now).is_zero()
                && !connection.sender.is_closed()
        });
        idle.pop().map(|(_, connection)| connection)
    }

    /// Keeps a verified connection for the next request.
    pub(crate) fn keep(&self, connection: Verified) {
        let mut idle = self.idle();
        if idle.len() == IDLE {
            idle.remove(0);
        }
        idle.push((Instant::now(), connection));
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<(Instant, Verified)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request on a verified connection; the connection comes back with the end of the answer's body.
    pub(crate) async fn send(
        self: &Arc<Self>,
        mut connection: Verified,
        request: Request<Bytes>,
    ) -> Result<Response<DirectBody>, SendError> {
        let mut sent = request.clone().map(Full::new);
        sent.headers_mut().insert(header::HOST, self.host.clone());
        if connection.sender.ready().await.is_err() {
            return Err(SendError::NotSent(Box::new(request)));
        }
        let answer = timeout(READ_TIMEOUT, connection.sender.try_send_request(sent))
            .await
            .map_err(|_| SendError::Failed("the service is silent".to_owned()))?;
        match answer {
            Ok(answer) => Ok(answer.map(|body| DirectBody {
                body,
                connection: Some(connection),
                direct: Arc::clone(self),
                silence: Box::pin(tokio::time::sleep(READ_TIMEOUT)),
            })),
            Err(error) if error.message().is_some() => Err(SendError::NotSent(Box::new(request))),
            Err(error) => Err(SendError::Failed(error.into_error().to_string())),
        }
    }
}

impl Connection {
    /// Asks for `path`, as long as the answer has at most `limit` bytes, and one more to tell that it had.
    pub(crate) async fn get(&mut self, path: &str, limit: usize) -> Result<Vec<u8>, String> {
        let failed = |error: hyper::Error| error.to_string();
        let mut request = Request::new(Full::default());
        *request.uri_mut() = path.parse().map_err(|_| "not a path".to_owned())?;
        let host = HeaderValue::from_static("enclave");
        request.headers_mut().insert(header::HOST, host);
        let answer = self.sender.send_request(request).await.map_err(failed)?;
        if answer.status() != StatusCode::OK {
            return Err(format!("the service answered {}", answer.status()));
        }
        let body = Limited::new(answer.into_body(), limit).collect().await;
        let body = body.map_err(|error| error.to_string())?;
        Ok(body.to_bytes().to_vec())
    }

    /// What it is after evidence vouched for it, and until when.
    pub(crate) fn verified(self, holding: Holding) -> Verified {
        Verified {
            sender: self.sender,
            holding,
        }
    }
}

/// The body of an answer, which keeps its connection until it ends.
pub(crate) struct DirectBody {
    body: Incoming,
    connection: Option<Verified>,
    direct: Arc<Direct>,
    silence: Pin<Box<Sleep>>,
}

impl Stream for DirectBody {
    type Item = Result<Bytes, String>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            return match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => {
                    let deadline = tokio::time::Instant::now() + READ_TIMEOUT;
                    self.silence.as_mut().reset(deadline);
                    match frame.into_data() {
                        Ok(data) => Poll::Ready(Some(Ok(data))),
                        Err(_) => continue,
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    self.connection = None;
                    Poll::Ready(Some(Err(error.to_string())))
                }
                Poll::Ready(None) => {
                    if let Some(connection) = self.connection.take() {
                        self.direct.keep(connection);
                    }
                    Poll::Ready(None)
                }
                Poll::Pending => match self.silence.as_mut().poll(context) {
                    Poll::Ready(()) => {
                        self.connection = None;
                        Poll::Ready(Some(Err("the service is silent".to_owned())))
                    }
                    Poll::Pending => Poll::Pending,
                },
            };
        }
    }
}
