//! The other door for prompts: TLS that ends inside the enclave. A user who verified evidence over the connection's own
//! exporter speaks the API on that connection, as on the inside of the encrypted gateway.

use std::future::Future;
use std::io;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{Request, Response};
use axum::routing::get;
use casemate_channel::keyset::ChannelBinding;
use casemate_channel::tls::service_exporter;
use casemate_channel::verify::ATTESTATION_PATH;
use casemate_listen::Establish;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::server::{self, Shared};
use crate::serving::Shown;

/// Makes handshakes under the TLS key of the keyset in force, and none once its credential has ended.
pub struct AttestedTls {
    shared: Arc<Shared>,
}

/// What the requests on one connection share.
struct Connection {
    shared: Arc<Shared>,
    /// The keyset whose TLS key made the handshake, which stays this connection's keyset when others follow.
    shown: Arc<Shown>,
    binding: ChannelBinding,
}

impl AttestedTls {
    /// For the enclave behind `shared`.
    pub fn new(shared: Arc<Shared>) -> AttestedTls {
        AttestedTls { shared }
    }

    async fn handshake(&self, stream: TcpStream) -> io::Result<(TlsStream<TcpStream>, Router)> {
        let starting = || io::Error::from(io::ErrorKind::NotConnected);
        let ready = self.shared.ready.get().ok_or_else(starting)?;
        let now = (self.shared.clock)();
        let (shown, config) = ready.serving.tls(now).ok_or_else(starting)?;
        let stream = TlsAcceptor::from(config).accept(stream).await?;
        let exporter = service_exporter(stream.get_ref().1).map_err(io::Error::other)?;
        let connection = Connection {
            shared: Arc::clone(&self.shared),
            shown,
            binding: ChannelBinding::TlsExporter(exporter),
        };
        let router = Router::new()
            .route(ATTESTATION_PATH, get(attestation))
            .fallback(api)
            .with_state(Arc::new(connection));
        Ok((stream, router))
    }
}

impl Establish<TcpStream> for AttestedTls {
    type Io = TlsStream<TcpStream>;

    fn establish(
        &self,
        stream: TcpStream,
    ) -> impl Future<Output = io::Result<(Self::Io, Router)>> + Send {
        self.handshake(stream)
    }
}

async fn attestation(
    State(connection): State<Arc<Connection>>,
    RawQuery(query): RawQuery,
) -> Response<Body> {
    let (shown, binding) = (&connection.shown, &connection.binding);
    server::attest(&connection.shared, query.as_deref(), Some((shown, binding))).await
}

async fn api(State(connection): State<Arc<Connection>>, request: Request<Body>) -> Response<Body> {
    let Some(ready) = connection.shared.ready.get() else {
        return server::starting();
    };
    let gateway = ready.gateway.clone();
    gateway.handle_direct(request, &connection.shown).await
}
