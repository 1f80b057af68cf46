//! Handshakes in memory: with an honest peer, and with peers that want something else.

use std::io::{Read as _, Write as _};

use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::server::ServerSessionMemoryCache;

use super::*;

/// Carries bytes both ways until nothing more is said; the first error ends it.
fn talk(client: &mut ClientConnection, server: &mut ServerConnection) -> Result<(), (Error, End)> {
    let mut bytes = Vec::new();
    for _ in 0..20 {
        bytes.clear();
        client.write_tls(&mut bytes).unwrap();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets().map_err(|e| (e, End::Server))?;
        }
        bytes.clear();
        server.write_tls(&mut bytes).unwrap();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets().map_err(|e| (e, End::Client))?;
        }
    }
    Ok(())
}

#[derive(Debug, PartialEq)]
enum End {
    Client,
    Server,
}

fn ends(
    client: &Arc<ClientConfig>,
    server: &Arc<ServerConfig>,
) -> (ClientConnection, ServerConnection) {
    (
        ClientConnection::new(client.clone(), server_name()).unwrap(),
        ServerConnection::new(server.clone()).unwrap(),
    )
}

/// A user of the library's own making, who verifies nothing.
fn foreign_client(versions: &[&'static rustls::SupportedProtocolVersion]) -> ClientConfig {
    let algorithms = default_provider().signature_verification_algorithms;
    // It begins with the key share that our servers want, so that nothing but its wishes differs.
    let provider = CryptoProvider {
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519],
        ..default_provider()
    };
    ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(SignatureOnly { algorithms }))
        .with_no_client_auth()
}

/// A server of the library's own making, with another self-signed certificate; with `shown`, it shows that instead.
fn foreign_server(
    versions: &[&'static rustls::SupportedProtocolVersion],
    shown: Option<CertificateDer<'static>>,
) -> ServerConfig {
    let pair = KeyPair::generate().unwrap();
    let own = CertificateParams::new(vec!["casemate.invalid".into()]).unwrap();
    let own = own.self_signed(&pair).unwrap().der().clone();
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
    let key = sign::any_supported_type(&private).unwrap();
    let certified = CertifiedKey::new(vec![shown.unwrap_or(own)], key);
    ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
}

#[test]
fn both_ends_of_a_connection_export_the_same_and_no_other_does() {
    let key = ServerKey::generate().unwrap();
    let config = client_config().unwrap();
    let meet = || {
        let (mut client, mut server) = ends(&config, &key.config());
        assert!(matches!(Handshake::of(&client), Err(TlsError::NotFull)));
        assert!(matches!(service_exporter(&server), Err(TlsError::NotFull)));
        talk(&mut client, &mut server).unwrap();
        let handshake = Handshake::of(&client).unwrap();
        assert_eq!(
            handshake.binding(),
            ChannelBinding::TlsExporter(service_exporter(&server).unwrap())
        );
        assert_eq!(handshake.key_digest(), key.digest());
        let group = client.negotiated_key_exchange_group().unwrap().name();
        assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
        handshake
    };
    let (first, second) = (meet(), meet());
    assert_ne!(first.binding(), second.binding());
    assert_ne!(ServerKey::generate().unwrap().digest(), key.digest());
}

#[test]
fn a_certificate_without_its_private_key_is_refused() {
    let key = ServerKey::generate().unwrap();
    let (mut client, mut server) = ends(&client_config().unwrap(), &key.config());
    talk(&mut client, &mut server).unwrap();
    let stolen = client.peer_certificates().unwrap()[0].clone().into_owned();
    let impostor = Arc::new(foreign_server(&[&TLS13], Some(stolen)));
    let (mut client, mut server) = ends(&client_config().unwrap(), &impostor);
    let (error, end) = talk(&mut client, &mut server).unwrap_err();
    assert_eq!(error, CertificateError::BadSignature.into());
    assert_eq!(end, End::Client);
    assert!(Handshake::of(&client).is_err());
}

#[test]
fn tls_1_2_is_refused_by_both_ends() {
    let only_old = [&rustls::version::TLS12];
    let key = ServerKey::generate().unwrap();
    let (mut client, mut server) = ends(&Arc::new(foreign_client(&only_old)), &key.config());
    let (error, end) = talk(&mut client, &mut server).unwrap_err();
    let expected = PeerIncompatible::Tls12NotOfferedOrEnabled;
    assert_eq!((error, end), (expected.into(), End::Server));

    let old = Arc::new(foreign_server(&only_old, None));
    let (mut client, mut server) = ends(&client_config().unwrap(), &old);
    let (_, end) = talk(&mut client, &mut server).unwrap_err();
    assert_eq!(
        end,
        End::Server,
        "the old server finds no version of its own"
    );
    assert!(Handshake::of(&client).is_err());
}

#[test]
fn a_key_exchange_without_a_post_quantum_half_is_refused() {
    let key = ServerKey::generate().unwrap();
    let provider = CryptoProvider {
        kx_groups: vec![kx_group::X25519],
        ..default_provider()
    };
    let algorithms = provider.signature_verification_algorithms;
    let classical = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(SignatureOnly { algorithms }))
        .with_no_client_auth();
    let (mut client, mut server) = ends(&Arc::new(classical), &key.config());
    let (error, end) = talk(&mut client, &mut server).unwrap_err();
    let expected = PeerIncompatible::NoKxGroupsInCommon;
    assert_eq!((error, end), (expected.into(), End::Server));
}

/// A session and the right to early data, obtained at a server that gives both, offered to ours.
#[test]
fn sessions_are_not_resumed_and_early_data_is_not_read() {
    let mut generous = foreign_server(&[&TLS13], None);
    generous.session_storage = ServerSessionMemoryCache::new(8);
    generous.max_early_data_size = 1 << 14;
    let generous = Arc::new(generous);
    let mut eager = foreign_client(&[&TLS13]);
    eager.enable_early_data = true;
    let eager = Arc::new(eager);

    let (mut client, mut server) = ends(&eager, &generous);
    talk(&mut client, &mut server).unwrap();
    assert!(client.tls13_tickets_received() > 0);

    // Where both are given, they work: so they are really offered to the other server below.
    let (mut client, mut server) = ends(&eager, &generous);
    client.early_data().unwrap().write_all(b"early").unwrap();
    talk(&mut client, &mut server).unwrap();
    assert_eq!(client.handshake_kind(), Some(HandshakeKind::Resumed));
    assert!(client.is_early_data_accepted());
    let mut read = Vec::new();
    let _ = server.early_data().unwrap().read_to_end(&mut read);
    assert_eq!(read, b"early");

    let key = ServerKey::generate().unwrap();
    let (mut client, mut server) = ends(&eager, &key.config());
    client.early_data().unwrap().write_all(b"early").unwrap();
    talk(&mut client, &mut server).unwrap();
    assert!(!client.is_early_data_accepted());
    assert!(server.early_data().is_none());
    assert_eq!(server.handshake_kind(), Some(HandshakeKind::Full));
    let mut read = Vec::new();
    let _ = server.reader().read_to_end(&mut read);
    assert!(read.is_empty(), "early data came out as a request");
    assert_eq!(client.tls13_tickets_received(), 0);
}

#[test]
fn a_user_takes_no_tickets_and_offers_no_session() {
    let mut generous = foreign_server(&[&TLS13], None);
    generous.session_storage = ServerSessionMemoryCache::new(8);
    generous.max_early_data_size = 1 << 14;
    let generous = Arc::new(generous);
    let config = client_config().unwrap();
    for _ in 0..2 {
        let (mut client, mut server) = ends(&config, &generous);
        assert!(client.early_data().is_none());
        talk(&mut client, &mut server).unwrap();
        assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(server.handshake_kind(), Some(HandshakeKind::Full));
        Handshake::of(&client).unwrap();
    }
}

#[test]
fn nothing_is_exported_from_a_resumed_connection() {
    let mut generous = foreign_server(&[&TLS13], None);
    generous.session_storage = ServerSessionMemoryCache::new(8);
    let generous = Arc::new(generous);
    let resuming = Arc::new(foreign_client(&[&TLS13]));
    let (mut client, mut server) = ends(&resuming, &generous);
    talk(&mut client, &mut server).unwrap();
    let (mut client, mut server) = ends(&resuming, &generous);
    talk(&mut client, &mut server).unwrap();
    assert_eq!(client.handshake_kind(), Some(HandshakeKind::Resumed));
    assert!(matches!(Handshake::of(&client), Err(TlsError::NotFull)));
    assert!(matches!(service_exporter(&server), Err(TlsError::NotFull)));
}

#[test]
fn a_chain_of_certificates_is_refused() {
    let key = ServerKey::generate().unwrap();
    let (mut client, mut server) = ends(&client_config().unwrap(), &key.config());
    talk(&mut client, &mut server).unwrap();
    let certificate = &client.peer_certificates().unwrap()[0];
    let verifier = SignatureOnly {
        algorithms: default_provider().signature_verification_algorithms,
    };
    let judge = |end: &CertificateDer<'_>, more: &[CertificateDer<'_>]| {
        verifier.verify_server_cert(end, more, &server_name(), &[], UnixTime::now())
    };
    assert!(judge(certificate, &[]).is_ok());
    assert!(judge(certificate, std::slice::from_ref(certificate)).is_err());
    assert!(judge(&CertificateDer::from(vec![0x30, 0]), &[]).is_err());
}
