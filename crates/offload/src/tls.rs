//! Encrypted connections to one key that is known beforehand: what a share needs on its way through the
//! enclave's own host, which carries the other share, too.
//!
//! TLS 1.3 with X25519MLKEM768. The peer must show a certificate for the pinned public key and sign the
//! handshake with it; names, issuers and dates are not looked at, since whoever pinned the key knows whose
//! it is. Nothing is resumed and nothing is sent before the handshake has ended.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use casemate_wire::Timed;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, Error,
    PeerIncompatible, SignatureScheme, StreamOwned,
};

use crate::link::{Connect, Transport};

/// SHA-256 of a public key (its SubjectPublicKeyInfo), as 64 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pin([u8; 32]);

/// It is no digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a pinned key is the SHA-256 of its SubjectPublicKeyInfo, 64 hexadecimal digits")]
pub struct NoPin;

impl FromStr for Pin {
    type Err = NoPin;

    fn from_str(text: &str) -> Result<Pin, NoPin> {
        let mut pin = [0; 32];
        hex::decode_to_slice(text, &mut pin).map_err(|_| NoPin)?;
        Ok(Pin(pin))
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// How an encrypted connection to one pinned key is made, each time one is needed. There is no other
/// way to make one than by that handshake.
pub struct Encrypted(Connect);

impl Encrypted {
    /// Over connections that `socket` makes, each with a handshake that may take so long.
    pub fn new(
        socket: impl Fn() -> io::Result<Timed> + Send + Sync + 'static,
        pin: Pin,
        within: Duration,
    ) -> Encrypted {
        Encrypted(Box::new(move || connect(socket()?, pin, within)))
    }

    /// In clear, so that a test can read what passes.
    #[cfg(all(test, feature = "engine"))]
    pub(crate) fn not_at_all(connect: Connect) -> Encrypted {
        Encrypted(connect)
    }

    /// For one worker, which would do without.
    #[must_use]
    pub fn into_connect(self) -> Connect {
        self.0
    }
}

/// Makes a handshake over a new connection, within a time.
///
/// # Errors
/// The connection's, and `InvalidData` for a peer that has not the pinned key or speaks another TLS.
pub fn connect(mut socket: Timed, pin: Pin, within: Duration) -> io::Result<Box<dyn Transport>> {
    let invalid = |error: Error| io::Error::new(io::ErrorKind::InvalidData, error);
    let name = ServerName::try_from("casemate.invalid").expect("a constant name is a name");
    let config = Arc::new(config(pin).map_err(invalid)?);
    let mut connection = ClientConnection::new(config, name).map_err(invalid)?;
    socket.within(Some(within));
    while connection.is_handshaking() {
        connection.complete_io(&mut socket)?;
    }
    Ok(Box::new(StreamOwned::new(connection, socket)))
}

impl Transport for StreamOwned<ClientConnection, Timed> {
    fn within(&mut self, limit: Duration) {
        self.sock.within(Some(limit));
    }
}

fn config(pin: Pin) -> Result<ClientConfig, Error> {
    let provider = CryptoProvider {
        kx_groups: vec![kx_group::X25519MLKEM768],
        ..default_provider()
    };
    let verifier = Pinned {
        pin,
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    // Names are no part of what is verified, so none is sent.
    config.enable_sni = false;
    Ok(config)
}

/// Checks that the peer has one key.
struct Pinned {
    pin: Pin,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pinned")
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let key = ParsedCertificate::try_from(end_entity)?.subject_public_key_info();
        if digest(&SHA256, &key).as_ref() != self.pin.0 {
            return Err(CertificateError::ApplicationVerificationFailure.into());
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
        self.algorithms.supported_schemes()
    }
}
