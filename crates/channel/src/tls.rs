//! Attested TLS: the pieces of it that need no socket. `docs/channel.md`, section 8, is the specification.
//!
//! A [`ServerKey`] is a TLS key whose digest stands in the keyset. The user's end checks the handshake's signature and
//! nothing about the certificate, which has no issuer; what the handshake proves becomes a [`Handshake`], and
//! [`crate::verify::verify_connection`] accepts a service only if evidence vouches for that very key and connection.
//! Connections are TLS 1.3 with a hybrid post-quantum key exchange; none is ever resumed and none begins with data.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::digest;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group, sign};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, CommonState, ConnectionCommon,
    DigitallySignedStruct, Error, HandshakeKind, PeerIncompatible, ProtocolVersion, ServerConfig,
    ServerConnection, SignatureScheme,
};
use zeroize::{Zeroize as _, Zeroizing};

use crate::keyset::ChannelBinding;

pub use rustls;

/// Label of the exporter (RFC 8446, section 7.5) that binds evidence to a connection; the context is empty.
pub const EXPORTER_LABEL: &[u8] = b"EXPERIMENTAL-casemate-attested-tls-v1";
/// The scheme of a service's URL that asks for attested TLS: `tls://HOST:PORT`.
pub const URL_SCHEME: &str = "tls";
/// Bytes of the exporter.
const EXPORTER_BYTES: usize = 32;

/// Why a connection is none that evidence can be bound to.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No key, or no certificate for it.
    #[error("cannot make a TLS key: {0}")]
    Key(String),
    /// The library refuses its settings.
    #[error("cannot prepare TLS: {0}")]
    Settings(#[source] Error),
    /// The handshake has not ended, or was not that of a new TLS 1.3 connection.
    #[error("not a full TLS 1.3 handshake")]
    NotFull,
    /// The peer showed no certificate that can be read.
    #[error("the service showed no certificate that can be read")]
    NoCertificate,
    /// The connection exports nothing.
    #[error("the connection exports no binding: {0}")]
    Exporter(#[source] Error),
}

/// TLS 1.3 with AES and X25519MLKEM768, and nothing to negotiate besides.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768],
        ..default_provider()
    })
}

/// A key for attested TLS, with a certificate that says nothing.
pub struct ServerKey {
    config: Arc<ServerConfig>,
    digest: [u8; 32],
}

impl ServerKey {
    /// A fresh ECDSA key on P-256.
    ///
    /// # Errors
    /// [`TlsError::Key`] and [`TlsError::Settings`].
    pub fn generate() -> Result<ServerKey, TlsError> {
        let failed = |error: rcgen::Error| TlsError::Key(error.to_string());
        let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let mut certificate = CertificateParams::new(Vec::new()).map_err(failed)?;
        certificate.distinguished_name = DistinguishedName::new();
        let certificate = certificate.self_signed(&pair);
        let private = Zeroizing::new(pair.serialize_der());
        pair.zeroize();
        let certificate = CertificateDer::from(certificate.map_err(failed)?.der().to_vec());
        let digest = key_digest(&certificate)?;
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(&private[..]));
        let key = sign::any_ecdsa_type(&private).map_err(TlsError::Settings)?;
        let certified = CertifiedKey::new(vec![certificate], key);
        Ok(ServerKey {
            config: Arc::new(server_config(certified)?),
            digest,
        })
    }

    /// SHA-256 of the public key's SubjectPublicKeyInfo, as a keyset holds it.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// How a server with this key makes handshakes.
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }
}

fn server_config(certified: CertifiedKey) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::Settings)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    // A resumed connection has no handshake that evidence could be bound to, and data sent before one could be
    // replayed.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(config)
}

/// How a user makes handshakes with any service: whose key it is, evidence says later.
///
/// # Errors
/// [`TlsError::Settings`].
pub fn client_config() -> Result<Arc<ClientConfig>, TlsError> {
    let provider = provider();
    let verifier = SignatureOnly {
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::Settings)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    // Names are no part of what is verified, so none is sent.
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// What the library wants for a name; it is neither sent nor compared.
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from("casemate.invalid").expect("a constant name is a name")
}

/// Checks that the peer has the private key of the certificate it shows, and nothing else.
struct SignatureOnly {
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for SignatureOnly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SignatureOnly")
    }
}

impl ServerCertVerifier for SignatureOnly {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        ParsedCertificate::try_from(end_entity)?;
        if !intermediates.is_empty() {
            return Err(CertificateError::BadEncoding.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

/// What a finished handshake proved to the user: that this connection ends at whoever holds this key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handshake {
    exporter: [u8; EXPORTER_BYTES],
    key_digest: [u8; 32],
}

impl Handshake {
    /// Of a connection that was made with [`client_config`].
    ///
    /// # Errors
    /// [`TlsError`] unless this was a full TLS 1.3 handshake in which the service showed a key.
    pub fn of(connection: &ClientConnection) -> Result<Handshake, TlsError> {
        let exporter = exporter(connection)?;
        let certificate = match connection.peer_certificates() {
            Some([certificate]) => certificate,
            _ => return Err(TlsError::NoCertificate),
        };
        Ok(Handshake {
            exporter,
            key_digest: key_digest(certificate)?,
        })
    }

    /// What evidence shown on this connection is bound to.
    pub fn binding(&self) -> ChannelBinding {
        ChannelBinding::TlsExporter(self.exporter)
    }

    pub(crate) fn key_digest(&self) -> [u8; 32] {
        self.key_digest
    }
}

/// The service's end of the binding.
///
/// # Errors
/// [`TlsError`] unless this was a full TLS 1.3 handshake.
pub fn service_exporter(connection: &ServerConnection) -> Result<[u8; EXPORTER_BYTES], TlsError> {
    exporter(connection)
}

fn exporter<Data>(connection: &ConnectionCommon<Data>) -> Result<[u8; EXPORTER_BYTES], TlsError> {
    require_full(connection)?;
    connection
        .export_keying_material([0; EXPORTER_BYTES], EXPORTER_LABEL, Some(&[]))
        .map_err(TlsError::Exporter)
}

/// The settings see to it already; evidence is bound to nothing that came about otherwise.
fn require_full(connection: &CommonState) -> Result<(), TlsError> {
    let kind = connection.handshake_kind();
    let full = matches!(
        kind,
        Some(HandshakeKind::Full | HandshakeKind::FullWithHelloRetryRequest)
    );
    let version = connection.protocol_version() == Some(ProtocolVersion::TLSv1_3);
    if full && version && !connection.is_handshaking() {
        return Ok(());
    }
    Err(TlsError::NotFull)
}

fn key_digest(certificate: &CertificateDer<'_>) -> Result<[u8; 32], TlsError> {
    let parsed = ParsedCertificate::try_from(certificate).map_err(|_| TlsError::NoCertificate)?;
    let mut out = [0; 32];
    let info = parsed.subject_public_key_info();
    out.copy_from_slice(digest::digest(&digest::SHA256, &info).as_ref());
    Ok(out)
}

#[cfg(test)]
mod tests;
