//! Attested TLS: evidence is good for one key, one connection and one nonce.

use std::sync::Arc;

use casemate_attest::measure::Measurement;
use casemate_attest::{Class, Denial, Policy, UnixTime};
use casemate_channel::keyset::{ChannelBinding, Keyset, KeysetDigest, Purpose, Role, report_data};
use casemate_channel::ohttp::Keyring;
use casemate_channel::tls::rustls::{ClientConnection, ServerConnection};
use casemate_channel::tls::{Handshake, ServerKey, client_config, server_name, service_exporter};
use casemate_channel::verify::{
    AttestationResponse, Challenge, VerifiedService, verify_connection, verify_service,
};
use casemate_container::signing::SigningKey;
use casemate_testkit::fake_tee::FakeTee;
use casemate_testkit::policies::PolicyFile;
use casemate_testkit::statements;

const NOW: u64 = 1_795_000_000;
const NONCE: [u8; 32] = [9; 32];
const MEASUREMENT: Measurement = Measurement {
    mr_td: [1; 48],
    mr_config_id: [2; 48],
    rtmr: [[3; 48]; 4],
};

struct Enclave {
    tee: FakeTee,
    issuer: SigningKey,
    ohttp_config: Vec<u8>,
}

/// A connection to the holder of `key`: what its user knows of it, and the exporter as the other end has it.
fn connect(key: &ServerKey) -> (Handshake, ChannelBinding) {
    let mut client = ClientConnection::new(client_config().unwrap(), server_name()).unwrap();
    let mut server = ServerConnection::new(key.config()).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets().unwrap();
        }
        let mut bytes = Vec::new();
        server.write_tls(&mut bytes).unwrap();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets().unwrap();
        }
    }
    let exporter = service_exporter(&server).unwrap();
    (
        Handshake::of(&client).unwrap(),
        ChannelBinding::TlsExporter(exporter),
    )
}

impl Enclave {
    fn new() -> Enclave {
        Enclave {
            tee: FakeTee::ephemeral(NOW).unwrap(),
            issuer: SigningKey::from_seed(&[1; 32]),
            ohttp_config: Keyring::default().generate(NOW + 3600).unwrap().encoded,
        }
    }

    fn policy(&self) -> Policy {
        let file = PolicyFile {
            version: 3,
            ..PolicyFile::new(self.tee.root_spki_sha256(), MEASUREMENT)
        };
        let issuer = self.issuer.verifying_key().to_string();
        let file = file.for_users((&hex::encode(statements::MODEL), 7), &issuer, "demo");
        Policy::from_toml(&file.to_toml()).unwrap()
    }

    /// Genuine evidence over a keyset with the TLS key of this digest, the nonce and the binding.
    fn attest(
        &self,
        tls_key_digest: Option<[u8; 32]>,
        nonce: &[u8; 32],
        binding: &ChannelBinding,
    ) -> AttestationResponse {
        let keyset = Keyset {
            tls_key_digest,
            ..statements::keyset(self.ohttp_config.clone(), NOW)
        };
        let keyset = keyset.encode().unwrap();
        let digest = KeysetDigest::of(&keyset);
        let credential = statements::credential(&digest, NOW);
        let data = report_data(Purpose::Serving, Role::Service, &digest, nonce, binding);
        AttestationResponse {
            evidence: self.tee.quote(&MEASUREMENT, &data, NOW).unwrap(),
            keyset,
            credential: credential.issue(&self.issuer).unwrap(),
        }
    }

    fn judge(
        &self,
        response: &AttestationResponse,
        handshake: &Handshake,
    ) -> Result<VerifiedService, Denial> {
        let now = UnixTime::from_secs(NOW);
        let challenge = Challenge::from_parts(NONCE, now);
        let (transcript, outcome) =
            verify_connection(response, &challenge, handshake, &self.policy(), now);
        match &outcome {
            Ok(_) => {
                assert!(transcript.is_clean());
                assert_eq!(transcript.checks()[0].name, "tls.key");
            }
            Err(denial) => assert_eq!(transcript.failed().next().unwrap().name, denial.claim),
        }
        outcome
    }

    #[track_caller]
    fn denied(&self, response: &AttestationResponse, handshake: &Handshake, claim: &str) {
        let denial = self.judge(response, handshake).unwrap_err();
        assert_eq!((denial.class, denial.claim), (Class::NotGenuine, claim));
    }
}

#[test]
fn evidence_over_this_key_connection_and_nonce_is_accepted() {
    let (enclave, key) = (Enclave::new(), ServerKey::generate().unwrap());
    let (handshake, binding) = connect(&key);
    let response = enclave.attest(Some(key.digest()), &NONCE, &binding);
    let service = enclave.judge(&response, &handshake).unwrap();
    assert_eq!(service.keyset().tls_key_digest, Some(key.digest()));
}

/// The man in the middle ends TLS with a key of his own and relays genuine evidence, even over the right exporter.
#[test]
fn a_connection_that_ends_at_another_key_is_refused() {
    let (enclave, key) = (Enclave::new(), ServerKey::generate().unwrap());
    let (to_the_enclave, binding) = connect(&key);
    let (to_the_middle, bound_to_the_middle) = connect(&ServerKey::generate().unwrap());
    let relayed = enclave.attest(Some(key.digest()), &NONCE, &binding);
    enclave.denied(&relayed, &to_the_middle, "tls.key");
    let relayed = enclave.attest(Some(key.digest()), &NONCE, &bound_to_the_middle);
    enclave.denied(&relayed, &to_the_middle, "tls.key");
    let none = enclave.attest(None, &NONCE, &binding);
    enclave.denied(&none, &to_the_enclave, "tls.key");
}

/// Even with the enclave's own TLS key: evidence is about another connection.
#[test]
fn evidence_over_another_connection_with_the_same_key_is_refused() {
    let (enclave, key) = (Enclave::new(), ServerKey::generate().unwrap());
    let key = Arc::new(key);
    let ((handshake, _), (_, of_another)) = (connect(&key), connect(&key));
    let relayed = enclave.attest(Some(key.digest()), &NONCE, &of_another);
    enclave.denied(&relayed, &handshake, "report_data");
}

#[test]
fn evidence_for_encryption_is_refused_on_a_connection_and_the_other_way_round() {
    let (enclave, key) = (Enclave::new(), ServerKey::generate().unwrap());
    let (handshake, binding) = connect(&key);
    let unbound = enclave.attest(Some(key.digest()), &NONCE, &ChannelBinding::Key);
    enclave.denied(&unbound, &handshake, "report_data");

    let now = UnixTime::from_secs(NOW);
    let challenge = Challenge::from_parts(NONCE, now);
    let judge = |response: &AttestationResponse| {
        verify_service(response, &challenge, &enclave.policy(), now).1
    };
    assert!(judge(&unbound).is_ok());
    let bound = enclave.attest(Some(key.digest()), &NONCE, &binding);
    let denial = judge(&bound).unwrap_err();
    assert_eq!(
        (denial.class, denial.claim),
        (Class::NotGenuine, "report_data")
    );
}

#[test]
fn evidence_over_anothers_nonce_is_refused_on_a_connection() {
    let (enclave, key) = (Enclave::new(), ServerKey::generate().unwrap());
    let (handshake, binding) = connect(&key);
    let anothers = enclave.attest(Some(key.digest()), &[10; 32], &binding);
    enclave.denied(&anothers, &handshake, "report_data");
}
