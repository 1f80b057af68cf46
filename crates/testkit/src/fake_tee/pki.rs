//! The fake TEE's public-key infrastructure: a root, a PCK platform CA, a PCK certificate with Intel's SGX extension, a
//! TCB signing certificate, TCB info, QE identity and revocation lists, all in the formats of Intel's provisioning
//! certification service. Only the keys and the root are kept; everything else is issued anew around the given time.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use casemate_attest::Collateral;
use dcap_qvl::TcbStatus;
use der::asn1::{ObjectIdentifier, OctetStringRef, UintRef};
use der::{Any, Decode, Encode, Tag};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CustomExtension,
    DistinguishedName, DnType, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, RevocationReason, RevokedCertParams, SerialNumber,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use zeroize::Zeroizing;

use super::FakeTeeError;

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;
const YEAR: u64 = 365 * DAY;
/// Larger than any file of the state directory.
const MAX_STATE_FILE: u64 = 64 * 1024;

/// What the PCK certificate says of the platform.
#[derive(Clone, Debug)]
pub struct Platform {
    /// Security version of the processor's microcode and modules.
    pub cpu_svn: [u8; 16],
    /// Security version of the provisioning certification enclave.
    pub pce_svn: u16,
    /// Family, model, stepping, platform and SKU; selects the TCB info.
    pub fmspc: [u8; 6],
}

impl Default for Platform {
    fn default() -> Platform {
        Platform {
            cpu_svn: [3, 3, 2, 2, 4, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0],
            pce_svn: 13,
            // No Intel platform has a family-model-stepping of all ones.
            fmspc: [0xff, 0xca, 0x5e, 0x3a, 0x7e, 0x00],
        }
    }
}

/// A certificate listed as revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revoked {
    /// The platform's own certificate, in the PCK CA's list.
    Pck,
    /// The PCK platform CA, in the root's list.
    PlatformCa,
    /// The signer of TCB info and QE identity, in the root's list.
    TcbSigning,
}

/// What the endorser says about platform, module and quoting enclave.
#[derive(Clone, Debug)]
pub struct Endorsements {
    /// Status of the TCB level that the platform meets.
    pub tcb_status: TcbStatus,
    /// Advisories listed at that level.
    pub advisory_ids: Vec<String>,
    /// Status of the TDX module level that the platform meets.
    pub module_status: TcbStatus,
    /// Status of the quoting enclave.
    pub qe_status: TcbStatus,
    /// Evaluation data number of TCB info and QE identity.
    pub tcb_evaluation_data_number: u32,
    /// Platform that the TCB info is about; the certificate's own when `None`.
    pub fmspc: Option<[u8; 6]>,
    /// Seconds by which issue and expiry of TCB info, QE identity and revocation lists are moved.
    pub shift_seconds: i64,
    /// Certificates in the revocation lists.
    pub revoked: Vec<Revoked>,
}

impl Default for Endorsements {
    fn default() -> Endorsements {
        Endorsements {
            tcb_status: TcbStatus::UpToDate,
            advisory_ids: Vec::new(),
            module_status: TcbStatus::UpToDate,
            qe_status: TcbStatus::UpToDate,
            tcb_evaluation_data_number: 20,
            fmspc: None,
            shift_seconds: 0,
            revoked: Vec::new(),
        }
    }
}

/// One issue of certificates, lists and statements.
#[derive(Clone)]
pub(super) struct Endorsed {
    pub(super) platform: Platform,
    /// PCK certificate, platform CA, root; PEM, as a quote carries them.
    pub(super) pck_chain: String,
    pub(super) collateral: Collateral,
}

/// The keys of one installation and its root certificate.
pub(super) struct Keys {
    root: KeyPair,
    root_der: Vec<u8>,
    platform_ca: KeyPair,
    pck: KeyPair,
    tcb_signing: KeyPair,
    attestation: KeyPair,
    random: SystemRandom,
}

/// Isv product of the TD quoting enclave, as Intel numbers it.
pub(super) const QE_PRODUCT: u16 = 2;
pub(super) const QE_SVN: u16 = 4;
/// Version and SVN of the TDX module, in the first two bytes of `tee_tcb_svn`.
pub(super) const MODULE_SVN: u8 = 6;
pub(super) const MODULE_VERSION: u8 = 1;

impl Keys {
    pub(super) fn generate(now: u64) -> Result<Keys, FakeTeeError> {
        let root = new_key()?;
        let root_der = issue_root(&root, now)?;
        Ok(Keys {
            root,
            root_der,
            platform_ca: new_key()?,
            pck: new_key()?,
            tcb_signing: new_key()?,
            attestation: new_key()?,
            random: SystemRandom::new(),
        })
    }

    pub(super) fn open(state: &Path, now: u64) -> Result<Keys, FakeTeeError> {
        let io = |source| FakeTeeError::Io {
            path: state.to_path_buf(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state)
            .map_err(io)?;
        let root = load_key(state, "root.key.pem")?;
        let root_path = state.join("root.der");
        let root_der = match read_limited(&root_path) {
            Ok(der) => {
                check_root(&root_path, &der, &root, now)?;
                der
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let der = issue_root(&root, now)?;
                write_whole(&root_path, &der, 0o644)?;
                der
            }
            Err(source) => {
                return Err(FakeTeeError::Io {
                    path: root_path,
                    source,
                });
            }
        };
        let keys = Keys {
            root,
            root_der,
            platform_ca: load_key(state, "platform-ca.key.pem")?,
            pck: load_key(state, "pck.key.pem")?,
            tcb_signing: load_key(state, "tcb-signing.key.pem")?,
            attestation: load_key(state, "attestation.key.pem")?,
            random: SystemRandom::new(),
        };
        let spki = format!("{}\n", hex::encode(keys.root_spki_sha256()));
        write_whole(&state.join("root_spki_sha256"), spki.as_bytes(), 0o644)?;
        Ok(keys)
    }

    pub(super) fn root_der(&self) -> &[u8] {
        &self.root_der
    }

    pub(super) fn root_spki_sha256(&self) -> [u8; 32] {
        Sha256::digest(self.root.subject_public_key_info()).into()
    }

    /// Signs with the attestation key: r ‖ s.
    pub(super) fn sign_as_attestation_key(&self, message: &[u8]) -> Result<[u8; 64], FakeTeeError> {
        self.sign(&self.attestation, message)
    }

    /// Signs with the PCK key: r ‖ s.
    pub(super) fn sign_as_pck(&self, message: &[u8]) -> Result<[u8; 64], FakeTeeError> {
        self.sign(&self.pck, message)
    }

    /// The attestation key's public point, x ‖ y.
    pub(super) fn attestation_point(&self) -> Result<[u8; 64], FakeTeeError> {
        let pair = raw_signer(&self.attestation)?;
        // Uncompressed SEC1: 04 ‖ x ‖ y.
        let point = pair
            .public_key()
            .as_ref()
            .get(1..)
            .ok_or(FakeTeeError::Sign)?;
        point.try_into().map_err(|_| FakeTeeError::Sign)
    }

    /// Issues everything that endorses a quote, valid around `now`.
    pub(super) fn endorse(
        &self,
        platform: &Platform,
        endorsements: &Endorsements,
        now: u64,
    ) -> Result<Endorsed, FakeTeeError> {
        let window = (
            date(now.saturating_sub(DAY))?,
            date(now.saturating_add(YEAR))?,
        );
        let shifted = now.saturating_add_signed(endorsements.shift_seconds);
        let issued = date(shifted.saturating_sub(HOUR))?;
        let next_update = date(shifted.saturating_add(30 * DAY))?;

        let root_params = ca_params(ROOT_NAME, &self.root, 1, window);
        let root = Issuer::from_params(&root_params, &self.root);
        let ca_params = ca_params(PLATFORM_CA_NAME, &self.platform_ca, 0, window);
        let ca_pem = ca_params.signed_by(&self.platform_ca, &root)?.pem();
        let ca = Issuer::from_params(&ca_params, &self.platform_ca);

        let mut pck_params = leaf_params(PCK_NAME, &self.pck, window);
        let mut extension = CustomExtension::from_oid_content(
            &[1, 2, 840, 113741, 1, 13, 1],
            sgx_extension(platform, &self.root_spki_sha256()).map_err(|_| FakeTeeError::Sign)?,
        );
        extension.set_criticality(false);
        pck_params.custom_extensions.push(extension);
        let pck_pem = pck_params.signed_by(&self.pck, &ca)?.pem();

        let signing_params = leaf_params(TCB_SIGNING_NAME, &self.tcb_signing, window);
        let signing_pem = signing_params.signed_by(&self.tcb_signing, &root)?.pem();

        let root_pem = pem::encode(&pem::Pem::new("CERTIFICATE", self.root_der.clone()));
        let revoke = |which: Revoked, key: &KeyPair| {
            endorsements
                .revoked
                .contains(&which)
                .then(|| RevokedCertParams {
                    serial_number: serial(key),
                    revocation_time: issued,
                    reason_code: Some(RevocationReason::KeyCompromise),
                    invalidity_date: None,
                })
        };
        let list = |revoked_certs| CertificateRevocationListParams {
            this_update: issued,
            next_update,
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let root_revoked = [
            revoke(Revoked::PlatformCa, &self.platform_ca),
            revoke(Revoked::TcbSigning, &self.tcb_signing),
        ];
        let root_crl = list(root_revoked.into_iter().flatten().collect()).signed_by(&root)?;
        let pck_revoked = revoke(Revoked::Pck, &self.pck);
        let pck_crl = list(pck_revoked.into_iter().collect()).signed_by(&ca)?;

        let dates = (rfc3339(issued)?, rfc3339(next_update)?);
        let tcb_info = tcb_info(platform, endorsements, &dates).to_string();
        let qe_identity = qe_identity(endorsements, &dates).to_string();
        let signing_chain = format!("{signing_pem}{root_pem}");
        let collateral = Collateral {
            pck_crl_issuer_chain: format!("{ca_pem}{root_pem}"),
            root_ca_crl: root_crl.der().to_vec(),
            pck_crl: pck_crl.der().to_vec(),
            tcb_info_issuer_chain: signing_chain.clone(),
            tcb_info_signature: self.sign(&self.tcb_signing, tcb_info.as_bytes())?.to_vec(),
            tcb_info,
            qe_identity_issuer_chain: signing_chain,
            qe_identity_signature: self
                .sign(&self.tcb_signing, qe_identity.as_bytes())?
                .to_vec(),
            qe_identity,
            pck_certificate_chain: None,
        };
        Ok(Endorsed {
            platform: platform.clone(),
            pck_chain: format!("{pck_pem}{ca_pem}{root_pem}"),
            collateral,
        })
    }

    fn sign(&self, key: &KeyPair, message: &[u8]) -> Result<[u8; 64], FakeTeeError> {
        let signature = raw_signer(key)?
            .sign(&self.random, message)
            .map_err(|_| FakeTeeError::Sign)?;
        signature
            .as_ref()
            .try_into()
            .map_err(|_| FakeTeeError::Sign)
    }
}

/// MRSIGNER of the quoting enclave; no Intel enclave has it.
pub(super) fn qe_signer() -> [u8; 32] {
    Sha256::digest(b"casemate development quoting enclave").into()
}

const ROOT_NAME: &str = "Casemate Development Root CA (not a TEE)";
const PLATFORM_CA_NAME: &str = "Casemate Development PCK Platform CA (not a TEE)";
const PCK_NAME: &str = "Casemate Development PCK Certificate (not a TEE)";
const TCB_SIGNING_NAME: &str = "Casemate Development TCB Signing (not a TEE)";

type Window = (OffsetDateTime, OffsetDateTime);

fn issue_root(key: &KeyPair, now: u64) -> Result<Vec<u8>, FakeTeeError> {
    let window = (
        date(now.saturating_sub(DAY))?,
        date(now.saturating_add(30 * YEAR))?,
    );
    Ok(ca_params(ROOT_NAME, key, 1, window)
        .self_signed(key)?
        .der()
        .to_vec())
}

fn ca_params(name: &str, key: &KeyPair, below: u8, window: Window) -> CertificateParams {
    let mut params = leaf_params(name, key, window);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn leaf_params(name: &str, key: &KeyPair, window: Window) -> CertificateParams {
    let mut params = CertificateParams::default();
    (params.not_before, params.not_after) = window;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
        .distinguished_name
        .push(DnType::OrganizationName, "Casemate development");
    params.serial_number = Some(serial(key));
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params
}

/// A serial number per key, so that a list can name a certificate that is issued anew.
fn serial(key: &KeyPair) -> SerialNumber {
    let digest = Sha256::digest(key.subject_public_key_info());
    let mut bytes: Vec<u8> = digest.iter().take(20).copied().collect();
    // Positive and of full length, whatever the digest.
    bytes[0] = (bytes[0] & 0x3f) | 0x40;
    SerialNumber::from(bytes)
}

/// Intel's SGX extension of a PCK certificate issued by the platform CA: a sequence of (identifier, value) pairs.
fn sgx_extension(platform: &Platform, installation: &[u8; 32]) -> der::Result<Vec<u8>> {
    let mut tcb = Vec::new();
    for (component, svn) in (1u32..).zip(platform.cpu_svn) {
        tcb.push(entry(&format!("2.{component}"), integer(&[svn])?)?);
    }
    tcb.push(entry("2.17", integer(&platform.pce_svn.to_be_bytes())?)?);
    tcb.push(entry("2.18", octets(&platform.cpu_svn)?)?);
    let configuration = [
        entry("7.1", boolean(false)?)?,
        entry("7.2", boolean(false)?)?,
        entry("7.3", boolean(false)?)?,
    ];
    let (ppid, instance) = installation.split_at(16);
    sequence(&[
        entry("1", octets(ppid)?)?,
        entry("2", sequence(&tcb)?)?,
        entry("3", octets(&[0, 0])?)?,
        entry("4", octets(&platform.fmspc)?)?,
        // 1 = scalable, the kind of platform that has TDX.
        entry("5", Any::new(Tag::Enumerated, [1])?)?,
        entry("6", octets(instance)?)?,
        entry("7", sequence(&configuration)?)?,
    ])?
    .to_der()
}

fn entry(suffix: &str, value: Any) -> der::Result<Any> {
    let oid = ObjectIdentifier::new(&format!("1.2.840.113741.1.13.1.{suffix}"))
        .map_err(|_| Tag::ObjectIdentifier.value_error())?;
    sequence(&[Any::encode_from(&oid)?, value])
}

fn sequence(parts: &[Any]) -> der::Result<Any> {
    let mut content = Vec::new();
    for part in parts {
        part.encode_to_vec(&mut content)?;
    }
    Any::new(Tag::Sequence, content)
}

fn integer(big_endian: &[u8]) -> der::Result<Any> {
    Any::encode_from(&UintRef::new(big_endian)?)
}

fn octets(bytes: &[u8]) -> der::Result<Any> {
    Any::encode_from(&OctetStringRef::new(bytes)?)
}

fn boolean(value: bool) -> der::Result<Any> {
    Any::encode_from(&value)
}

fn tcb_info(platform: &Platform, endorsements: &Endorsements, dates: &(String, String)) -> Value {
    let components =
        |svns: &[u8]| -> Vec<Value> { svns.iter().map(|svn| json!({ "svn": svn })).collect() };
    let mut tdx_components = [0u8; 16];
    tdx_components[0] = MODULE_SVN;
    tdx_components[2] = 3;
    let zeros = "00".repeat(48);
    json!({
        "id": "TDX",
        "version": 3,
        "issueDate": dates.0,
        "nextUpdate": dates.1,
        "fmspc": hex::encode(endorsements.fmspc.unwrap_or(platform.fmspc)),
        "pceId": "0000",
        "tcbType": 0,
        "tcbEvaluationDataNumber": endorsements.tcb_evaluation_data_number,
        "tdxModule": {
            "mrsigner": zeros, "attributes": "0000000000000000", "attributesMask": "FFFFFFFFFFFFFFFF",
        },
        "tdxModuleIdentities": [{
            "id": format!("TDX_{MODULE_VERSION:02X}"),
            "mrsigner": zeros, "attributes": "0000000000000000", "attributesMask": "FFFFFFFFFFFFFFFF",
            "tcbLevels": [{
                "tcb": { "isvsvn": MODULE_SVN },
                "tcbDate": "2026-01-01T00:00:00Z",
                "tcbStatus": endorsements.module_status,
            }],
        }],
        "tcbLevels": [{
            "tcb": {
                "sgxtcbcomponents": components(&Platform::default().cpu_svn),
                "pcesvn": Platform::default().pce_svn,
                "tdxtcbcomponents": components(&tdx_components),
            },
            "tcbDate": "2026-01-01T00:00:00Z",
            "tcbStatus": endorsements.tcb_status,
            "advisoryIDs": endorsements.advisory_ids,
        }],
    })
}

fn qe_identity(endorsements: &Endorsements, dates: &(String, String)) -> Value {
    json!({
        "id": "TD_QE",
        "version": 2,
        "issueDate": dates.0,
        "nextUpdate": dates.1,
        "tcbEvaluationDataNumber": endorsements.tcb_evaluation_data_number,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11000000000000000000000000000000",
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": hex::encode_upper(qe_signer()),
        "isvprodid": QE_PRODUCT,
        "tcbLevels": [{
            "tcb": { "isvsvn": QE_SVN },
            "tcbDate": "2026-01-01T00:00:00Z",
            "tcbStatus": endorsements.qe_status,
        }],
    })
}

fn new_key() -> Result<KeyPair, FakeTeeError> {
    Ok(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?)
}

fn raw_signer(key: &KeyPair) -> Result<EcdsaKeyPair, FakeTeeError> {
    EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.serialized_der())
        .map_err(|_| FakeTeeError::Sign)
}

fn date(seconds: u64) -> Result<OffsetDateTime, FakeTeeError> {
    let out_of_range = FakeTeeError::Time(seconds);
    let Ok(signed) = i64::try_from(seconds) else {
        return Err(out_of_range);
    };
    OffsetDateTime::from_unix_timestamp(signed).map_err(|_| out_of_range)
}

fn rfc3339(date: OffsetDateTime) -> Result<String, FakeTeeError> {
    let seconds = u64::try_from(date.unix_timestamp()).unwrap_or(0);
    date.format(&Rfc3339)
        .map_err(|_| FakeTeeError::Time(seconds))
}

/// Reads a key, or makes it where there is none.
fn load_key(state: &Path, name: &str) -> Result<KeyPair, FakeTeeError> {
    let path = state.join(name);
    let io = |source| FakeTeeError::Io {
        path: path.clone(),
        source,
    };
    match File::open(&path) {
        Ok(file) => {
            let mode = file.metadata().map_err(io)?.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                return Err(FakeTeeError::Exposed { path, mode });
            }
            let mut text = Zeroizing::new(String::new());
            file.take(MAX_STATE_FILE)
                .read_to_string(&mut text)
                .map_err(io)?;
            KeyPair::from_pkcs8_pem_and_sign_algo(&text, &PKCS_ECDSA_P256_SHA256).map_err(|_| {
                FakeTeeError::Damaged {
                    path,
                    what: "not a P-256 key in PKCS#8 PEM",
                }
            })
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let key = new_key()?;
            write_whole(&path, Zeroizing::new(key.serialize_pem()).as_bytes(), 0o600)?;
            Ok(key)
        }
        Err(source) => Err(FakeTeeError::Io { path, source }),
    }
}

fn check_root(path: &Path, der: &[u8], key: &KeyPair, now: u64) -> Result<(), FakeTeeError> {
    let damaged = |what| FakeTeeError::Damaged {
        path: path.to_path_buf(),
        what,
    };
    let certificate =
        x509_cert::Certificate::from_der(der).map_err(|_| damaged("not a certificate"))?;
    let tbs = &certificate.tbs_certificate;
    let spki = tbs
        .subject_public_key_info
        .to_der()
        .map_err(|_| damaged("no public key"))?;
    if spki != key.subject_public_key_info() {
        return Err(damaged("certifies another key than root.key.pem"));
    }
    let validity = tbs.validity.not_before.to_unix_duration().as_secs()
        ..tbs.validity.not_after.to_unix_duration().as_secs();
    if !validity.contains(&now) {
        return Err(damaged(
            "not valid at this time; check the clock or start a new installation",
        ));
    }
    Ok(())
}

fn read_limited(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MAX_STATE_FILE)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes a file that appears whole or not at all.
fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FakeTeeError> {
    let temporary = path.with_extension("new");
    let write = || {
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|source| FakeTeeError::Io {
        path: path.to_path_buf(),
        source,
    })
}
