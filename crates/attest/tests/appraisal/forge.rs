//! A forger of quotes in Intel's formats under a root of its own: good samples in which one thing at a time can be
//! made wrong. Written apart from the fake TEE of `testkit`, so that the two check each other's reading of the
//! formats.

use std::sync::OnceLock;

use aws_lc_rs::digest;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use casemate_attest::{Collateral, Evidence, Policy, ReportData, TeeKind, UnixTime};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CustomExtension, DnType,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    PublicKeyData as _, RevokedCertParams, SerialNumber,
};
use time::OffsetDateTime;

/// 2026-06-01T00:00:00Z
pub const NOW: UnixTime = UnixTime::from_secs(1_780_272_000);
pub const REPORT_DATA: ReportData = ReportData::new([9; 64]);

const DAY: i64 = 86_400;
const FMSPC: [u8; 6] = [0x50, 0x80, 0x6f, 0, 0, 1];
const QE_SIGNER: [u8; 32] = [0x8c; 32];
const VENDOR: [u8; 16] = [
    0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07,
];

/// Keys and certificates, made once: they differ only in what the samples sign with them.
struct Authority {
    root: Certified,
    platform_ca: Certified,
    pck: Certified,
    tcb_signer: Certified,
    attestation_key: KeyPair,
    /// Another root with the same name, and a platform under it.
    foreign_root: Certified,
    foreign_pck_chain: String,
    /// A platform certificate issued by somebody without a root in the chain.
    orphan_pck_chain: String,
    /// A platform certificate that ended before `NOW`.
    expired_pck: Certified,
}

struct Certified {
    params: CertificateParams,
    key: KeyPair,
    pem: String,
    serial: u64,
}

/// What to put into a quote and its collateral. Every field starts out good.
#[derive(Clone)]
pub struct Sample {
    pub tee: TeeKind,
    pub version: u16,
    /// Body type of version 5.
    pub body_type: u16,
    pub report: Vec<u8>,
    pub qe_report: Vec<u8>,
    pub key_type: u16,
    pub vendor: [u8; 16],
    pub certification_type: u16,
    pub padding: Vec<u8>,
    pub tcb_status: &'static str,
    pub tcb_id: &'static str,
    pub qe_id: &'static str,
    pub fmspc: [u8; 6],
    pub advisories: Vec<&'static str>,
    pub evaluation: u32,
    /// Lowest processor SVN that the TCB info has a level for; the platform's is 5.
    pub level_svn: u8,
    pub qe_level_svn: u16,
    /// Days from `NOW` between which each part is valid: TCB info, QE identity, root CRL, PCK CRL.
    pub windows: [(i64, i64); 4],
    pub revoked_pck: bool,
    pub revoked_platform_ca: bool,
    pub pck: Pck,
    pub root_crl_by_foreign_key: bool,
    pub pck_crl_by_foreign_key: bool,
    pub tcb_signed_by_foreign_key: bool,
    pub chain_in_collateral: bool,
    /// What happens to the bytes after they are signed.
    pub after: fn(&mut Evidence),
    pub bind_attestation_key: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pck {
    Good,
    Foreign,
    Orphan,
    Expired,
}

fn at(days: i64) -> OffsetDateTime {
    let now = i64::try_from(NOW.as_secs()).unwrap();
    OffsetDateTime::from_unix_timestamp(now + days * DAY).unwrap()
}

fn rfc3339(days: i64) -> String {
    let now = i64::try_from(NOW.as_secs()).unwrap();
    UnixTime::from_secs(u64::try_from(now + days * DAY).unwrap()).to_string()
}

fn params(name: &str, serial: u64, days: (i64, i64), ca: bool) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params
        .distinguished_name
        .push(DnType::OrganizationName, "forger");
    params.not_before = at(days.0);
    params.not_after = at(days.1);
    params.serial_number = Some(SerialNumber::from(serial));
    if ca {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    } else {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    }
    params
}

impl Certified {
    fn root(name: &str) -> Certified {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let params = params(name, 1, (-1000, 1000), true);
        let pem = params.self_signed(&key).unwrap().pem();
        Certified {
            params,
            key,
            pem,
            serial: 1,
        }
    }

    fn issue(&self, params: CertificateParams, serial: u64) -> Certified {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let issuer = Issuer::from_params(&self.params, &self.key);
        let pem = params.signed_by(&key, &issuer).unwrap().pem();
        Certified {
            params,
            key,
            pem,
            serial,
        }
    }

    fn crl(&self, key: &KeyPair, days: (i64, i64), revoked: Option<u64>) -> Vec<u8> {
        let revoked_certs = revoked
            .map(|serial| RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: at(-2),
                reason_code: None,
                invalidity_date: None,
            })
            .into_iter()
            .collect();
        let list = CertificateRevocationListParams {
            this_update: at(days.0),
            next_update: at(days.1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let issuer = Issuer::from_params(&self.params, key);
        list.signed_by(&issuer).unwrap().der().to_vec()
    }
}

fn authority() -> &'static Authority {
    static AUTHORITY: OnceLock<Authority> = OnceLock::new();
    AUTHORITY.get_or_init(|| {
        let pck_params = |days| {
            let mut params = params("platform", 4, days, false);
            let oid = [1, 2, 840, 113_741, 1, 13, 1];
            let extension = CustomExtension::from_oid_content(&oid, sgx_extension());
            params.custom_extensions.push(extension);
            params
        };
        let good = (-100, 100);
        let root = Certified::root("root");
        let platform_ca = root.issue(params("platform CA", 2, good, true), 2);
        let tcb_signer = root.issue(params("TCB signer", 3, good, false), 3);
        let pck = platform_ca.issue(pck_params(good), 4);
        let expired_pck = platform_ca.issue(pck_params((-100, -1)), 4);
        let foreign_root = Certified::root("root");
        let foreign_ca = foreign_root.issue(params("platform CA", 2, good, true), 2);
        let foreign_pck = foreign_ca.issue(pck_params(good), 4);
        let orphan_pck_chain = format!("{}{}", foreign_pck.pem, foreign_ca.pem);
        let foreign_pck_chain = format!("{orphan_pck_chain}{}", foreign_root.pem);
        Authority {
            root,
            platform_ca,
            pck,
            tcb_signer,
            attestation_key: KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap(),
            foreign_root,
            foreign_pck_chain,
            orphan_pck_chain,
            expired_pck,
        }
    })
}

/// SHA-256 of the forger's root key, in hexadecimal.
pub fn root_hash() -> String {
    let spki = authority().root.key.subject_public_key_info();
    hex::encode(digest::digest(&digest::SHA256, &spki))
}

fn sign(key: &KeyPair, message: &[u8]) -> Vec<u8> {
    let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
    let key = EcdsaKeyPair::from_pkcs8(algorithm, key.serialized_der()).unwrap();
    key.sign(&SystemRandom::new(), message)
        .unwrap()
        .as_ref()
        .to_vec()
}

fn tlv(tag: u8, value: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    match u8::try_from(value.len()) {
        Ok(len) if len < 0x80 => out.push(len),
        _ => {
            out.push(0x82);
            out.extend(u16::try_from(value.len()).unwrap().to_be_bytes());
        }
    }
    out.extend(value);
    out
}

/// The entry `SEQUENCE { 1.2.840.113741.1.13.1.<tail>, value }` of Intel's extension.
fn entry(tail: &[u8], value: &[u8]) -> Vec<u8> {
    let mut oid = vec![0x2a, 0x86, 0x48, 0x86, 0xf8, 0x4d, 0x01, 0x0d, 0x01];
    oid.extend(tail);
    tlv(0x30, &[tlv(0x06, &oid), value.to_vec()].concat())
}

/// PPID, TCB (16 component SVNs of 5, PCE SVN 11), PCE id, FMSPC and type of the forged platform.
fn sgx_extension() -> Vec<u8> {
    let mut tcb: Vec<u8> = (1..=16)
        .flat_map(|i| entry(&[2, i], &tlv(0x02, &[5])))
        .collect();
    tcb.extend(entry(&[2, 17], &tlv(0x02, &[11])));
    tcb.extend(entry(&[2, 18], &tlv(0x04, &[5; 16])));
    tlv(
        0x30,
        &[
            entry(&[1], &tlv(0x04, &[7; 16])),
            entry(&[2], &tlv(0x30, &tcb)),
            entry(&[3], &tlv(0x04, &[0; 2])),
            entry(&[4], &tlv(0x04, &FMSPC)),
            entry(&[5], &tlv(0x0a, &[0])),
        ]
        .concat(),
    )
}

/// A TD 1.0 report: SEPT_VE_DISABLE, usual extended features, each register filled with its own number.
fn td_report() -> Vec<u8> {
    let mut report = Vec::new();
    report.extend([3, 0]); // module SVN 3, version 0: no module identity is looked up
    report.extend([3; 14]);
    report.extend([1; 48]); // mr_seam
    report.extend([0; 48]); // mr_signer_seam
    report.extend([0; 8]); // seam_attributes
    report.extend([0, 0, 0, 0x10, 0, 0, 0, 0]); // td_attributes
    report.extend([0xe7, 0x02, 0x06, 0, 0, 0, 0, 0]); // xfam
    for register in [2, 3, 4, 5, 10, 11, 12, 13] {
        report.extend([register; 48]); // mr_td, mr_config_id, mr_owner, mr_owner_config, rtmr0..3
    }
    report.extend(REPORT_DATA.as_bytes());
    assert_eq!(report.len(), 584);
    report
}

fn enclave_report(
    mr_enclave: u8,
    mr_signer: [u8; 32],
    svn: u16,
    report_data: &[u8; 64],
) -> Vec<u8> {
    let mut report = vec![0; 384];
    report[48] = 0x05; // INIT, MODE64BIT
    report[56] = 0x07;
    report[64..96].fill(mr_enclave);
    report[128..160].copy_from_slice(&mr_signer);
    report[256..258].copy_from_slice(&1u16.to_le_bytes());
    report[258..260].copy_from_slice(&svn.to_le_bytes());
    report[320..].copy_from_slice(report_data);
    report
}

impl Sample {
    /// A good quote of version 4 from a TD.
    pub fn td() -> Sample {
        Sample {
            tee: TeeKind::Tdx,
            version: 4,
            body_type: 2,
            report: td_report(),
            qe_report: enclave_report(0x77, QE_SIGNER, 8, &[0; 64]),
            key_type: 2,
            vendor: VENDOR,
            certification_type: 5,
            padding: Vec::new(),
            tcb_status: "UpToDate",
            tcb_id: "TDX",
            qe_id: "TD_QE",
            fmspc: FMSPC,
            advisories: Vec::new(),
            evaluation: 18,
            level_svn: 5,
            qe_level_svn: 8,
            windows: [(-10, 20); 4],
            revoked_pck: false,
            revoked_platform_ca: false,
            pck: Pck::Good,
            root_crl_by_foreign_key: false,
            pck_crl_by_foreign_key: false,
            tcb_signed_by_foreign_key: false,
            chain_in_collateral: false,
            after: |_| {},
            bind_attestation_key: true,
        }
    }

    /// A good quote of version 5 from a TD with a TDX 1.5 report, extended or not.
    pub fn td_15(extended: bool) -> Sample {
        let mut sample = Sample::td();
        sample.version = 5;
        sample.body_type = if extended { 4 } else { 3 };
        let svn = sample.report[..16].to_vec();
        sample.report.extend(svn); // tee_tcb_svn2
        sample.report.extend([0; 48]); // mr_service_td
        if extended {
            sample.report.extend([0; 237]);
            assert_eq!(sample.report.len(), 885);
        }
        sample
    }

    /// A good quote of version 3 from an enclave.
    pub fn sgx() -> Sample {
        let mut sample = Sample::td();
        sample.tee = TeeKind::Sgx;
        sample.version = 3;
        sample.report = enclave_report(0x21, [0x22; 32], 7, REPORT_DATA.as_bytes());
        sample.tcb_id = "SGX";
        sample.qe_id = "QE";
        sample
    }

    /// Changes and builds at once.
    pub fn with(mut self, change: impl FnOnce(&mut Sample)) -> Sample {
        change(&mut self);
        self
    }

    pub fn build(&self) -> Evidence {
        let quote = [self.quote(), self.padding.clone()].concat();
        let mut evidence = Evidence {
            tee: self.tee,
            quote,
            collateral: Some(self.collateral()),
        };
        (self.after)(&mut evidence);
        evidence
    }

    fn pck_chain(&self) -> String {
        let authority = authority();
        let leaf = match self.pck {
            Pck::Good => &authority.pck.pem,
            Pck::Expired => &authority.expired_pck.pem,
            Pck::Foreign => return authority.foreign_pck_chain.clone(),
            Pck::Orphan => return authority.orphan_pck_chain.clone(),
        };
        format!("{leaf}{}{}", authority.platform_ca.pem, authority.root.pem)
    }

    fn quote(&self) -> Vec<u8> {
        let authority = authority();
        let attestation_key = &authority.attestation_key.public_key_raw()[1..];
        let auth_data = [0x5a; 32];
        let mut qe_report = self.qe_report.clone();
        if self.bind_attestation_key {
            let bound = [attestation_key, &auth_data].concat();
            qe_report[320..352].copy_from_slice(digest::digest(&digest::SHA256, &bound).as_ref());
        }
        let pck_key = match self.pck {
            Pck::Expired => &authority.expired_pck.key,
            _ => &authority.pck.key,
        };
        let mut certification = [qe_report.clone(), sign(pck_key, &qe_report)].concat();
        certification.extend(32u16.to_le_bytes());
        certification.extend(auth_data);
        certification.extend(self.certification_type.to_le_bytes());
        let chain = match self.certification_type {
            5 => [self.pck_chain().as_bytes(), &[0]].concat(),
            _ => vec![0x33; 404],
        };
        certification.extend(u32::try_from(chain.len()).unwrap().to_le_bytes());
        certification.extend(chain);

        let mut signed = self.version.to_le_bytes().to_vec();
        signed.extend(self.key_type.to_le_bytes());
        let tee: u32 = if self.tee == TeeKind::Tdx { 0x81 } else { 0 };
        signed.extend(tee.to_le_bytes());
        signed.extend([0; 4]);
        signed.extend(self.vendor);
        signed.extend([0x44; 20]);
        if self.version == 5 {
            signed.extend(self.body_type.to_le_bytes());
            signed.extend(u32::try_from(self.report.len()).unwrap().to_le_bytes());
        }
        signed.extend(&self.report);

        let mut authentication = sign(&authority.attestation_key, &signed);
        authentication.extend(attestation_key);
        if self.version == 3 {
            authentication.extend(certification);
        } else {
            authentication.extend(6u16.to_le_bytes());
            authentication.extend(u32::try_from(certification.len()).unwrap().to_le_bytes());
            authentication.extend(certification);
        }
        signed.extend(u32::try_from(authentication.len()).unwrap().to_le_bytes());
        signed.extend(authentication);
        signed
    }

    fn collateral(&self) -> Collateral {
        let authority = authority();
        let [tcb, qe, root_crl, pck_crl] = self.windows;
        let advisories = match self.advisories.is_empty() {
            true => String::new(),
            false => format!(r#","advisoryIDs":["{}"]"#, self.advisories.join(r#"",""#)),
        };
        let components = |svn: u8| vec![format!(r#"{{"svn":{svn}}}"#); 16].join(",");
        let tdx = match self.tcb_id {
            "TDX" => format!(
                r#","tdxtcbcomponents":[{}]"#,
                "{\"svn\":0},".repeat(15) + "{\"svn\":0}"
            ),
            _ => String::new(),
        };
        let module = format!(
            r#""tdxModule":{{"mrsigner":"{}","attributes":"{}","attributesMask":"{}"}},"#,
            "00".repeat(48),
            "00".repeat(8),
            "FF".repeat(8)
        );
        let tcb_info = format!(
            r#"{{"id":"{}","version":3,"issueDate":"{}","nextUpdate":"{}","fmspc":"{}","pceId":"0000","tcbType":0,"tcbEvaluationDataNumber":{},{module}"tcbLevels":[{{"tcb":{{"sgxtcbcomponents":[{}],"pcesvn":11{tdx}}},"tcbDate":"2025-01-01T00:00:00Z","tcbStatus":"{}"{advisories}}}]}}"#,
            self.tcb_id,
            rfc3339(tcb.0),
            rfc3339(tcb.1),
            hex::encode_upper(self.fmspc),
            self.evaluation,
            components(self.level_svn),
            self.tcb_status,
        );
        let qe_identity = format!(
            r#"{{"id":"{}","version":2,"issueDate":"{}","nextUpdate":"{}","tcbEvaluationDataNumber":{},"miscselect":"00000000","miscselectMask":"FFFFFFFF","attributes":"05000000000000000000000000000000","attributesMask":"FBFFFFFFFFFFFFFF0000000000000000","mrsigner":"{}","isvprodid":1,"tcbLevels":[{{"tcb":{{"isvsvn":{}}},"tcbDate":"2025-01-01T00:00:00Z","tcbStatus":"UpToDate"}}]}}"#,
            self.qe_id,
            rfc3339(qe.0),
            rfc3339(qe.1),
            self.evaluation,
            hex::encode_upper(QE_SIGNER),
            self.qe_level_svn,
        );
        let signer = match self.tcb_signed_by_foreign_key {
            true => &authority.foreign_root.key,
            false => &authority.tcb_signer.key,
        };
        let foreign = &authority.foreign_root.key;
        let root_crl_key = if self.root_crl_by_foreign_key {
            foreign
        } else {
            &authority.root.key
        };
        let pck_crl_key = if self.pck_crl_by_foreign_key {
            foreign
        } else {
            &authority.platform_ca.key
        };
        let revoked_ca = self
            .revoked_platform_ca
            .then_some(authority.platform_ca.serial);
        let revoked_pck = self.revoked_pck.then_some(authority.pck.serial);
        let signing_chain = format!("{}{}", authority.tcb_signer.pem, authority.root.pem);
        Collateral {
            pck_crl_issuer_chain: format!("{}{}", authority.platform_ca.pem, authority.root.pem),
            root_ca_crl: authority.root.crl(root_crl_key, root_crl, revoked_ca),
            pck_crl: authority.platform_ca.crl(pck_crl_key, pck_crl, revoked_pck),
            tcb_info_issuer_chain: signing_chain.clone(),
            tcb_info_signature: sign(signer, tcb_info.as_bytes()),
            tcb_info,
            qe_identity_issuer_chain: signing_chain,
            qe_identity_signature: sign(&authority.tcb_signer.key, qe_identity.as_bytes()),
            qe_identity,
            pck_certificate_chain: self.chain_in_collateral.then(|| self.pck_chain()),
        }
    }
}

/// The measurement that the good sample of a kind has.
pub fn entry_of(tee: TeeKind) -> String {
    match tee {
        TeeKind::Tdx => {
            let mut entry = "[[measurement]]\nname = \"sample\"\n".to_owned();
            for (key, byte) in [
                ("mr_td", 2u8),
                ("mr_config_id", 3),
                ("rtmr0", 10),
                ("rtmr1", 11),
                ("rtmr2", 12),
                ("rtmr3", 13),
            ] {
                entry.push_str(&format!("{key} = \"{}\"\n", hex::encode([byte; 48])));
            }
            entry
        }
        TeeKind::Sgx => {
            format!(
                "[[measurement]]\nname = \"sample\"\nmr_enclave = \"{}\"\n",
                "21".repeat(32)
            )
        }
    }
}

/// A policy that names the forger's root and the good sample of a kind.
pub fn policy(tee: TeeKind, more: &str) -> Policy {
    policy_with(tee, &root_hash(), more, &entry_of(tee))
}

pub fn policy_with(tee: TeeKind, root: &str, more: &str, entry: &str) -> Policy {
    let text = format!(
        "version = 1\ntee = [\"{}\"]\ndangerous_development_root = \"{root}\"\n[tcb]\nminimum_evaluation_data_number = 18\n{more}\n{entry}",
        tee.name()
    );
    Policy::from_toml(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}
