//! Lays out and signs version 4 TDX quotes. Layout (little-endian):
//!
//! ```text
//! header 48 | TD report body 584 | length 4 | signature 64 | attestation key 64
//!   | type 6, length | QE report 384 | its signature 64 | length 2, authentication data 32
//!                    | type 5, length | PCK certificate chain, PEM
//! ```

use casemate_attest::measure::Measurement;
use casemate_attest::{Evidence, ReportData, TeeKind};
use sha2::{Digest, Sha256, Sha384};

use super::FakeTeeError;
use super::pki::{self, Endorsed, Endorsements, Keys, Platform};

/// The fields of a TD report body that a quote signs.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the field names of Intel's TD report")]
pub struct Body {
    pub tee_tcb_svn: [u8; 16],
    pub mr_seam: [u8; 48],
    pub mr_signer_seam: [u8; 48],
    pub seam_attributes: [u8; 8],
    pub td_attributes: [u8; 8],
    pub xfam: [u8; 8],
    pub mr_td: [u8; 48],
    pub mr_config_id: [u8; 48],
    pub mr_owner: [u8; 48],
    pub mr_owner_config: [u8; 48],
    pub rtmr: [[u8; 48]; 4],
    pub report_data: [u8; 64],
}

impl Body {
    /// The body that an honest fake TEE signs for a measured process.
    pub fn new(measurement: &Measurement, report_data: &ReportData) -> Body {
        let mut tee_tcb_svn = [0; 16];
        tee_tcb_svn[..3].copy_from_slice(&[pki::MODULE_SVN, pki::MODULE_VERSION, 3]);
        Body {
            tee_tcb_svn,
            mr_seam: Sha384::digest(b"casemate development: no TDX module").into(),
            mr_signer_seam: [0; 48],
            seam_attributes: [0; 8],
            // Bit 28, SEPT_VE_DISABLE: verifiers demand it.
            td_attributes: [0, 0, 0, 0x10, 0, 0, 0, 0],
            xfam: [0xe7, 0x02, 0x06, 0, 0, 0, 0, 0],
            mr_td: measurement.mr_td,
            mr_config_id: measurement.mr_config_id,
            mr_owner: [0; 48],
            mr_owner_config: [0; 48],
            rtmr: measurement.rtmr,
            report_data: *report_data.as_bytes(),
        }
    }
}

/// A quote to be made, honest unless changed.
#[derive(Clone, Debug)]
pub struct Sample {
    /// What the quote claims.
    pub body: Body,
    /// What the PCK certificate claims.
    pub platform: Platform,
    /// What the collateral claims.
    pub endorsements: Endorsements,
    /// Where a signature is spoiled.
    pub forgery: Option<Forgery>,
}

/// A break in the chain of signatures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgery {
    /// A bit of the body is flipped after signing.
    Body,
    /// The quote's own signature is spoiled.
    QuoteSignature,
    /// Another attestation key than the one the quoting enclave certified, with a signature that fits it.
    AttestationKey,
    /// The signature over the quoting enclave's report is spoiled.
    QeReportSignature,
    /// A byte of the TCB info is changed after signing.
    TcbInfo,
    /// A byte of the QE identity is changed after signing.
    QeIdentity,
}

impl Sample {
    /// The honest sample for a measured process.
    pub fn new(measurement: &Measurement, report_data: &ReportData) -> Sample {
        Sample {
            body: Body::new(measurement, report_data),
            platform: Platform::default(),
            endorsements: Endorsements::default(),
            forgery: None,
        }
    }
}

/// Intel's vendor identifier; verifiers know no other.
const QE_VENDOR: [u8; 16] = dcap_qvl::INTEL_QE_VENDOR_ID;
const HEADER_AND_BODY: usize = 48 + 584;
/// Offset of `mr_td` in the quote.
const MR_TD_AT: usize = 48 + 136;

pub(super) fn sign(
    keys: &Keys,
    endorsed: &Endorsed,
    sample: &Sample,
) -> Result<Evidence, FakeTeeError> {
    let mut quote = Vec::with_capacity(8 * 1024);
    quote.extend_from_slice(&4u16.to_le_bytes());
    quote.extend_from_slice(&2u16.to_le_bytes()); // ECDSA-256 with P-256
    quote.extend_from_slice(&0x81u32.to_le_bytes()); // TDX
    quote.extend_from_slice(&[0; 4]); // SVNs of QE and PCE: reserved in version 4
    quote.extend_from_slice(&QE_VENDOR);
    quote.extend_from_slice(&[0; 20]);
    write_body(&mut quote, &sample.body);
    debug_assert_eq!(quote.len(), HEADER_AND_BODY);

    let stranger;
    let signer = if sample.forgery == Some(Forgery::AttestationKey) {
        stranger = Keys::generate(0)?;
        &stranger
    } else {
        keys
    };
    let mut signature = signer.sign_as_attestation_key(&quote)?;
    let presented_key = signer.attestation_point()?;

    let authentication_data = [0x5au8; 32];
    let mut certified = Sha256::new();
    certified.update(keys.attestation_point()?);
    certified.update(authentication_data);
    let qe_report = qe_report(&endorsed.platform, &certified.finalize().into());
    let mut qe_signature = keys.sign_as_pck(&qe_report)?;

    let mut collateral = endorsed.collateral.clone();
    match sample.forgery {
        Some(Forgery::Body) => quote[MR_TD_AT] ^= 1,
        Some(Forgery::QuoteSignature) => signature[40] ^= 1,
        Some(Forgery::QeReportSignature) => qe_signature[40] ^= 1,
        // The statements stay well-formed and say something better than what was signed.
        Some(Forgery::TcbInfo) => bump_number(&mut collateral.tcb_info),
        Some(Forgery::QeIdentity) => bump_number(&mut collateral.qe_identity),
        Some(Forgery::AttestationKey) | None => {}
    }

    let mut certification = Vec::with_capacity(6 * 1024);
    certification.extend_from_slice(&qe_report);
    certification.extend_from_slice(&qe_signature);
    certification.extend_from_slice(&32u16.to_le_bytes());
    certification.extend_from_slice(&authentication_data);
    certification.extend_from_slice(&5u16.to_le_bytes());
    write_sized(&mut certification, endorsed.pck_chain.as_bytes());

    let mut authentication = Vec::with_capacity(7 * 1024);
    authentication.extend_from_slice(&signature);
    authentication.extend_from_slice(&presented_key);
    authentication.extend_from_slice(&6u16.to_le_bytes());
    write_sized(&mut authentication, &certification);
    write_sized(&mut quote, &authentication);
    Ok(Evidence {
        tee: TeeKind::Tdx,
        quote,
        collateral: Some(collateral),
    })
}

fn write_sized(out: &mut Vec<u8>, bytes: &[u8]) {
    let length = u32::try_from(bytes.len()).expect("a quote is a few kilobytes");
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes);
}

fn write_body(out: &mut Vec<u8>, body: &Body) {
    out.extend_from_slice(&body.tee_tcb_svn);
    out.extend_from_slice(&body.mr_seam);
    out.extend_from_slice(&body.mr_signer_seam);
    out.extend_from_slice(&body.seam_attributes);
    out.extend_from_slice(&body.td_attributes);
    out.extend_from_slice(&body.xfam);
    out.extend_from_slice(&body.mr_td);
    out.extend_from_slice(&body.mr_config_id);
    out.extend_from_slice(&body.mr_owner);
    out.extend_from_slice(&body.mr_owner_config);
    out.extend_from_slice(body.rtmr.as_flattened());
    out.extend_from_slice(&body.report_data);
}

fn qe_report(platform: &Platform, certified: &[u8; 32]) -> [u8; 384] {
    let mut report = [0; 384];
    report[..16].copy_from_slice(&platform.cpu_svn);
    report[48] = 0x11; // initialised, provisioning key
    report[56] = 0xe7; // XFRM
    report[64..96].copy_from_slice(&Sha256::digest(b"casemate development: no enclave"));
    report[128..160].copy_from_slice(&pki::qe_signer());
    report[256..258].copy_from_slice(&pki::QE_PRODUCT.to_le_bytes());
    report[258..260].copy_from_slice(&pki::QE_SVN.to_le_bytes());
    report[320..352].copy_from_slice(certified);
    report
}

fn bump_number(statement: &mut String) {
    let name = "\"tcbEvaluationDataNumber\":";
    *statement = statement.replacen(name, &format!("{name}1"), 1);
}
