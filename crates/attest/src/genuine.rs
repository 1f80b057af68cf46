//! Whether Intel vouches for a quote: signatures, certificate chains, revocation, quoting enclave and TCB level, by
//! way of dcap-qvl. What the policy makes of a genuine quote is decided elsewhere.
//!
//! dcap-qvl reports failures as text. The text never decides *whether* evidence is refused, only *how* the refusal
//! is filed: a text this room does not know becomes a denial all the same. The tests pin the texts.

use dcap_qvl::verify::QuoteVerifier;
use dcap_qvl::{QuotePolicy, TcbStatus as QvlStatus};

use crate::collateral::Collateral;
use crate::denial::Denial;
use crate::tcb_status::TcbStatus;
use crate::transcript::Transcript;
use crate::unix_time::UnixTime;

/// SHA-256 of the public key (SubjectPublicKeyInfo) of the Intel SGX Root CA.
pub(crate) const INTEL_ROOT_SPKI_SHA256: [u8; 32] = [
    0xa0, 0xaf, 0x03, 0x12, 0x89, 0xf5, 0xd5, 0xd4, 0x13, 0x2f, 0x91, 0x86, 0x06, 0x8a, 0x7f, 0xc1,
    0x36, 0x28, 0x63, 0x3b, 0xa2, 0x35, 0x77, 0x74, 0x72, 0xe2, 0x9b, 0x6b, 0x6c, 0x67, 0xa4, 0x9e,
];

/// SHA-256 of the certificates that Intel issued for its SGX Root CA: the current one, which ends in 2049, and the
/// first, which ends in 2033 and is still in quotes. Both are of the key above.
pub(crate) const INTEL_ROOTS: [[u8; 32]; 2] = [
    [
        0x44, 0xa0, 0x19, 0x6b, 0x2b, 0x99, 0xf8, 0x89, 0xb8, 0xe1, 0x49, 0xe9, 0x5b, 0x80, 0x7a,
        0x35, 0x0e, 0x74, 0x24, 0x96, 0x43, 0x99, 0xe8, 0x85, 0xa7, 0xcb, 0xb8, 0xcc, 0xfa, 0xb6,
        0x74, 0xd3,
    ],
    [
        0xfc, 0x64, 0xf8, 0x07, 0x6d, 0x79, 0xa4, 0xfe, 0xe9, 0xd1, 0xd4, 0x73, 0xd7, 0x4c, 0x89,
        0xeb, 0x8d, 0x8f, 0xd5, 0x5c, 0x5a, 0xba, 0xfe, 0xab, 0xeb, 0xa7, 0x36, 0x6d, 0x20, 0x42,
        0x94, 0x04,
    ],
];

/// What Intel says about the platform that made a quote.
pub(crate) struct Platform {
    pub(crate) tcb_status: TcbStatus,
    pub(crate) advisory_ids: Vec<String>,
    pub(crate) tcb_evaluation_data_number: u32,
    pub(crate) fmspc: [u8; 6],
}

/// The verifier's answer about a quote whose signatures all hold.
pub(crate) enum Vouched {
    /// Intel's collateral has a statement about the platform.
    Platform(Platform),
    /// The signatures hold, but attributes of the TD are set that no verifier may accept, so that dcap-qvl gives no
    /// claims. The attribute checks find the same and deny.
    ForbiddenAttributes,
}

const CERTIFICATES: &str = "certificates";
const COLLATERAL: &str = "collateral.signatures";
const QUOTING_ENCLAVE: &str = "quoting_enclave";
const QUOTE_SIGNATURE: &str = "quote.signature";
const TCB_LEVEL: &str = "tcb.level";

/// The checks that dcap-qvl makes, in its order, with what passing means.
pub(crate) const CHECKS: [(&str, &str); 5] = [
    (
        CERTIFICATES,
        "chains of platform, TCB and QE statements end at the root, none revoked",
    ),
    (COLLATERAL, "TCB info and QE identity are signed"),
    (
        QUOTING_ENCLAVE,
        "Intel's, certified by the platform, and endorses the attestation key",
    ),
    (
        QUOTE_SIGNATURE,
        "made by the attestation key over header and report",
    ),
    (
        TCB_LEVEL,
        "the platform's security versions have a level in the TCB info",
    ),
];

/// Beginnings of dcap-qvl's error texts and the check they belong to.
const FAULTS: [(&str, &str); 25] = [
    ("Unknown QE vendor ID", QUOTING_ENCLAVE),
    ("Failed to parse root CA CRL", CERTIFICATES),
    ("Failed to parse PCK CRL", CERTIFICATES),
    ("Failed to verify certificate chain", CERTIFICATES),
    ("TCB Info signer must", CERTIFICATES),
    ("QE Identity signer must", CERTIFICATES),
    ("CertRevoked", CERTIFICATES),
    ("Signature is invalid for tcb_info", COLLATERAL),
    ("Signature is invalid for qe_identity", COLLATERAL),
    ("Signature is invalid for qe_report", QUOTING_ENCLAVE),
    ("Invalid QE auth data length", QUOTING_ENCLAVE),
    ("QE report hash mismatch", QUOTING_ENCLAVE),
    ("QE report validation failed", QUOTING_ENCLAVE),
    ("QE MRSIGNER", QUOTING_ENCLAVE),
    ("QE ISVPRODID", QUOTING_ENCLAVE),
    ("QE MISCSELECT", QUOTING_ENCLAVE),
    ("QE ATTRIBUTES", QUOTING_ENCLAVE),
    ("QE ISVSVN", QUOTING_ENCLAVE),
    ("Unsupported QE Identity", QUOTING_ENCLAVE),
    ("ISV enclave report signature is invalid", QUOTE_SIGNATURE),
    ("Fmspc mismatch", TCB_LEVEL),
    ("No matching TCB level", TCB_LEVEL),
    ("Failed to evaluate the current TDX TCB", TCB_LEVEL),
    ("TDX module", TCB_LEVEL),
    ("TCB status is invalid: Revoked", TCB_LEVEL),
];

/// dcap-qvl checks TD attributes after everything else, so these texts mean that all signatures hold.
const FORBIDDEN_ATTRIBUTES: [&str; 4] = [
    "Reserved bits in TD attributes are set",
    "TD migration is enabled",
    "SERVTD_EXT is enabled",
    "SEPT_VE_DISABLE is not enabled",
];

/// Verifies `quote` (without padding) up to `root`, the DER of a development root, or else up to Intel's, and enters
/// the checks into the transcript.
pub(crate) fn verify(
    quote: &[u8],
    collateral: &Collateral,
    now: UnixTime,
    development_root: Option<&[u8]>,
    transcript: &mut Transcript,
) -> Result<Vouched, Denial> {
    let verifier = match development_root {
        Some(der) => QuoteVerifier::new(der.to_vec()),
        None => QuoteVerifier::new_prod(),
    };
    // Debugging and service TDs are refused by checks of our own, which can say more than a text.
    let verifier = verifier.allow_debug(true).allow_service_td(true);
    let everything = QuotePolicy::claims_only(now.as_secs());
    let result =
        verifier.verify_with_policy(quote, collateral.to_qvl(), now.as_secs(), &everything);
    let text = match result {
        Ok(claims) => {
            pass_before(None, transcript);
            return Ok(Vouched::Platform(Platform {
                tcb_status: claims.tcb.status.into(),
                advisory_ids: claims.tcb.advisory_ids,
                tcb_evaluation_data_number: claims.tcb.eval_data_number,
                fmspc: claims.platform.pck.fmspc,
            }));
        }
        Err(error) => format!("{error:#}"),
    };
    if FORBIDDEN_ATTRIBUTES.contains(&text.as_str()) {
        pass_before(None, transcript);
        return Ok(Vouched::ForbiddenAttributes);
    }
    let claim = FAULTS
        .iter()
        .find_map(|(start, claim)| text.starts_with(start).then_some(*claim))
        .unwrap_or("verification");
    // The chain of the platform is checked after the collateral's signatures, so a failure up to there leaves the
    // certificates unproven.
    if ![CERTIFICATES, COLLATERAL, "verification"].contains(&claim) {
        pass_before(Some(claim), transcript);
    }
    let expected = CHECKS
        .iter()
        .find_map(|(name, meaning)| (*name == claim).then_some(*meaning))
        .unwrap_or("a quote that Intel's chain of signatures vouches for");
    let denial = Denial::not_genuine(claim, text, expected, remedy(claim));
    transcript.fail(&denial);
    Err(denial)
}

fn pass_before(failed: Option<&str>, transcript: &mut Transcript) {
    for (name, meaning) in CHECKS {
        if Some(name) == failed {
            return;
        }
        transcript.pass(name, meaning, meaning);
    }
}

fn remedy(claim: &str) -> &'static str {
    match claim {
        CERTIFICATES => {
            "do not trust this machine; if it should be genuine, fetch the collateral again"
        }
        COLLATERAL => "fetch the collateral again from Intel's provisioning service",
        TCB_LEVEL => {
            "fetch collateral for this platform; if it stays so, its firmware is older than anything Intel vouches for"
        }
        _ => "do not trust this machine: the quote was altered or was not made by a TEE",
    }
}

impl From<QvlStatus> for TcbStatus {
    fn from(status: QvlStatus) -> TcbStatus {
        match status {
            QvlStatus::UpToDate => TcbStatus::UpToDate,
            QvlStatus::SWHardeningNeeded => TcbStatus::SWHardeningNeeded,
            QvlStatus::ConfigurationNeeded => TcbStatus::ConfigurationNeeded,
            QvlStatus::ConfigurationAndSWHardeningNeeded => {
                TcbStatus::ConfigurationAndSWHardeningNeeded
            }
            QvlStatus::OutOfDate => TcbStatus::OutOfDate,
            QvlStatus::OutOfDateConfigurationNeeded => TcbStatus::OutOfDateConfigurationNeeded,
            QvlStatus::TDRelaunchAdvised => TcbStatus::TDRelaunchAdvised,
            QvlStatus::TDRelaunchAdvisedConfigurationNeeded => {
                TcbStatus::TDRelaunchAdvisedConfigurationNeeded
            }
            QvlStatus::Revoked => TcbStatus::Revoked,
        }
    }
}
