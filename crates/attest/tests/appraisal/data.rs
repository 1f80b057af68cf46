//! Evidence captured on real machines, from the data folder; policies that fit it.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use casemate_attest::{
    Appraisal, Class, Collateral, Denial, Evidence, Policy, Quote, ReportData, TeeKind, UnixTime,
    appraise,
};
use casemate_testkit::policies::entry_for;

/// The folder with the captures.
pub struct Data {
    root: PathBuf,
}

impl Data {
    /// The folder, or nothing where this machine has none; then the test says that it is skipped.
    pub fn open() -> Option<Data> {
        let root = match std::env::var_os("CASEMATE_DATA") {
            Some(root) => PathBuf::from(root),
            None => PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared")),
        };
        let root = root.join("evidence");
        if root.is_dir() {
            return Some(Data { root });
        }
        eprintln!("skipped: no captured evidence at {}", root.display());
        None
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A file's bytes. The folder is there, so a missing file is a failure.
    pub fn bytes(&self, path: &str) -> Vec<u8> {
        let path = self.root.join(path);
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub fn text(&self, path: &str) -> String {
        String::from_utf8(self.bytes(path)).expect("the file is text")
    }

    /// A file of hexadecimal digits.
    pub fn hex(&self, path: &str) -> Vec<u8> {
        hex::decode(self.text(path).trim().trim_start_matches("0x")).expect("the file is hex")
    }

    /// Collateral in the verifier's own JSON form.
    pub fn collateral_json(&self, path: &str) -> Collateral {
        serde_json::from_slice(&self.bytes(path)).expect("the file is collateral")
    }

    /// Collateral as YAML with hexadecimal byte strings.
    pub fn collateral_yaml(&self, path: &str) -> Collateral {
        let text = self.text(path);
        let hex = |key| hex::decode(yaml_field(&text, key)).expect("the field is hex");
        Collateral {
            pck_crl_issuer_chain: yaml_field(&text, "pck_crl_issuer_chain"),
            root_ca_crl: hex("root_ca_crl"),
            pck_crl: hex("pck_crl"),
            tcb_info_issuer_chain: yaml_field(&text, "tcb_info_issuer_chain"),
            tcb_info: yaml_field(&text, "tcb_info"),
            tcb_info_signature: hex("tcb_info_signature"),
            qe_identity_issuer_chain: yaml_field(&text, "qe_identity_issuer_chain"),
            qe_identity: yaml_field(&text, "qe_identity"),
            qe_identity_signature: hex("qe_identity_signature"),
            pck_certificate_chain: None,
        }
    }

    /// Collateral put together from the answers of Intel's service. The signing chain is the same for both
    /// statements.
    pub fn collateral_of(&self, parts: &Parts) -> Collateral {
        let (tcb_info, tcb_info_signature) = signed(&self.text(parts.tcb_info), "tcbInfo");
        let (qe_identity, qe_identity_signature) =
            signed(&self.text(parts.qe_identity), "enclaveIdentity");
        let chain: String = parts
            .signing_chain
            .iter()
            .map(|path| self.text(path))
            .collect();
        Collateral {
            pck_crl_issuer_chain: chain.clone(),
            root_ca_crl: self.bytes(parts.root_crl),
            pck_crl: self.bytes(parts.pck_crl),
            tcb_info_issuer_chain: chain.clone(),
            tcb_info,
            tcb_info_signature,
            qe_identity_issuer_chain: chain,
            qe_identity,
            qe_identity_signature,
            pck_certificate_chain: None,
        }
    }

    /// A quote in a JSON field.
    pub fn json_field(&self, path: &str, field: &str) -> String {
        let value: serde_json::Value =
            serde_json::from_slice(&self.bytes(path)).expect("the file is JSON");
        value[field]
            .as_str()
            .expect("the field is a string")
            .to_owned()
    }
}

/// Files that make up one collateral.
pub struct Parts {
    pub tcb_info: &'static str,
    pub qe_identity: &'static str,
    pub root_crl: &'static str,
    pub pck_crl: &'static str,
    pub signing_chain: &'static [&'static str],
}

/// Splits an answer of Intel's service, `{"<key>":<statement>,"signature":"<hex>"}`, keeping the statement's bytes.
fn signed(text: &str, key: &str) -> (String, Vec<u8>) {
    let head = format!("\"{key}\":");
    let start = text.find(&head).expect("the statement is there") + head.len();
    let end = text
        .rfind(",\"signature\":\"")
        .expect("the signature is there");
    let signature = &text[end + 14..end + 14 + 128];
    (
        text[start..end].to_owned(),
        hex::decode(signature).expect("the signature is hex"),
    )
}

/// A top-level scalar of the captures' YAML: block style (`|`, `|-`, `>-`) or double-quoted.
pub fn yaml_field(text: &str, key: &str) -> String {
    let mut lines = text.lines();
    let head = format!("{key}: ");
    let style = lines
        .by_ref()
        .find_map(|line| line.strip_prefix(&head))
        .unwrap_or_else(|| panic!("no field {key}"));
    if style.starts_with('"') {
        return serde_json::from_str(style).expect("double-quoted scalars here are JSON strings");
    }
    assert!(["|", "|-", ">-"].contains(&style), "{key}: {style}");
    let block: Vec<&str> = lines.map_while(|line| line.strip_prefix("  ")).collect();
    block.join("\n")
}

pub fn base64url(text: &str) -> Vec<u8> {
    let padded = format!("{text}{}", "=".repeat((4 - text.len() % 4) % 4));
    URL_SAFE
        .decode(padded)
        .expect("the field is URL-safe base64")
}

/// Evidence of the kind that the quote is of.
pub fn evidence(quote: Vec<u8>, collateral: Option<Collateral>) -> Evidence {
    let tee = Quote::parse(&quote).map_or(TeeKind::Tdx, |quote| quote.tee());
    Evidence {
        tee,
        quote,
        collateral,
    }
}

pub fn time(text: &str) -> UnixTime {
    text.parse().expect("the test's time is RFC 3339")
}

/// A policy whose one measurement is the quote's own, with every field given.
pub fn policy_for(evidence: &Evidence, more: &str) -> Policy {
    let quote = evidence.unverified_quote().expect("the capture parses");
    let entry = entry_for(quote.report());
    let tee = evidence.tee.name();
    // Keys of the top level come first in TOML; `more` may hold tables only.
    let text = format!(
        "version = 1\ntee = [\"{tee}\"]\n[tcb]\nminimum_evaluation_data_number = 13\n{more}\n{entry}"
    );
    Policy::from_toml(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// Appraises a capture over its own report data, under a policy made for it.
pub fn judge(evidence: &Evidence, more: &str, now: &str) -> Appraisal {
    let quote = evidence.unverified_quote().expect("the capture parses");
    let expected: ReportData = *quote.report().report_data();
    appraise(evidence, &expected, &policy_for(evidence, more), time(now))
}

/// The denial, after checking its class and claim and that the transcript agrees.
#[track_caller]
pub fn denied(appraisal: Appraisal, class: Class, claim: &str) -> Denial {
    let denial = match appraisal.outcome {
        Err(denial) => denial,
        Ok(accepted) => panic!("accepted as {accepted}; expected {class} by {claim}"),
    };
    assert_eq!((denial.class, denial.claim), (class, claim), "{denial}");
    let failed = appraisal
        .transcript
        .failed()
        .next()
        .expect("the transcript has a failure");
    assert_eq!((failed.name, &failed.found), (denial.claim, &denial.found));
    assert!(!denial.found.is_empty() && !denial.expected.is_empty() && !denial.remedy.is_empty());
    denial
}
