//! Every file of the collection goes through every parser of this room without a panic.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use casemate_attest::{
    Collateral, Evidence, Policy, Quote, QuoteFault, ReportData, TeeKind, appraise,
};

use crate::data::{Data, evidence, policy_for, time};

const ROOT_CRL_2025: &str = "solana__automata-dcap-framework__tests__data__intel_root_ca_crl.der";

fn files(folder: &Path, into: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            files(&path, into);
        } else {
            into.push(path);
        }
    }
}

/// The file itself and every long run of hexadecimal or base64 in it.
fn contents(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut all = vec![bytes.to_vec()];
    let of_text = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/-_".contains(byte);
    for run in bytes
        .split(|byte| !of_text(byte))
        .filter(|run| run.len() >= 800)
    {
        all.extend(hex::decode(run).ok());
        // Runs whose last group is incomplete still hold a quote.
        let whole = &run[..run.len() - run.len() % 4];
        all.extend(STANDARD_NO_PAD.decode(whole).ok());
        all.extend(URL_SAFE_NO_PAD.decode(whole).ok());
    }
    all
}

#[test]
fn every_file_parses_or_is_refused_without_panic() {
    let Some(data) = Data::open() else { return };
    let mut paths = Vec::new();
    for folder in ["intel", "azure", "ratls"] {
        files(&data.root().join(folder), &mut paths);
    }
    assert!(paths.len() > 100, "only {} files", paths.len());

    let good = data.collateral_json("intel/phala/tdx_v4_quote_collateral.json");
    let now = time("2025-06-19T12:00:00Z");
    let mut quotes = Vec::new();
    let mut refused = Vec::new();
    for path in &paths {
        let name = path
            .strip_prefix(data.root())
            .unwrap()
            .display()
            .to_string();
        for bytes in contents(&fs::read(path).unwrap()) {
            let _ = Evidence::from_json(&bytes);
            let _ = serde_json::from_slice::<Collateral>(&bytes);
            if let Ok(text) = std::str::from_utf8(&bytes) {
                let _ = Policy::from_toml(text);
            }
            match Quote::parse(&bytes) {
                Ok(quote) => {
                    quotes.push(name.clone());
                    let evidence = evidence(bytes.clone(), Some(good.clone()));
                    let policy = policy_for(&evidence, "");
                    let appraisal = appraise(&evidence, quote.report().report_data(), &policy, now);
                    let own = name == "intel/phala/tdx_v4_quote.bin";
                    assert_eq!(appraisal.outcome.is_ok(), own, "{name}");
                }
                Err(error) if error.fault == QuoteFault::TrailingData => refused.push(name.clone()),
                Err(_) => {}
            }
        }
    }
    quotes.dedup();
    assert_eq!(refused, ["intel/go-tdx-guest/tdx_prod_quote_SPR_E4.dat"]);
    for expected in [
        "azure/attestation-rs/az_tdx-live-evidence.json",
        "azure/trustee/az-tdx-vtpm/evidence-v1.json",
        "azure/trustee/az-tdx-vtpm/td-quote.bin",
        "intel/attestation-rs/tdx_quote_live.dat",
        "intel/dstack/quote-report.json",
        "intel/flashbots/azure-tdx-with-ak-intermediates-1780922561.yaml",
        "intel/mobilecoin/hw_quote.dat",
        "intel/oasis/quote_v4_tdx_ecdsa_p256.bin",
        "intel/trustee/tdx_quote_5.dat",
        "ratls/gramine-cert.legacy-quote.bin",
    ] {
        assert!(
            quotes.iter().any(|name| name == expected),
            "{expected} has no quote"
        );
    }
    assert_eq!(quotes.len(), 33, "{quotes:#?}");
}

/// Each file in the place of each part of good collateral.
#[test]
fn every_file_as_any_part_of_collateral_is_refused_without_panic() {
    let Some(data) = Data::open() else { return };
    let mut paths = Vec::new();
    files(&data.root().join("intel"), &mut paths);
    let good = data.collateral_json("intel/phala/tdx_v4_quote_collateral.json");
    let quote = data.bytes("intel/phala/tdx_v4_quote.bin");
    let whole = evidence(quote.clone(), Some(good.clone()));
    let policy = policy_for(&whole, "");
    let expected: ReportData = *whole.unverified_quote().unwrap().report().report_data();
    let now = time("2025-06-19T12:00:00Z");
    for path in paths {
        let bytes = fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        for part in 0..9 {
            let mut collateral = good.clone();
            match part {
                0 => collateral.pck_crl_issuer_chain = text.clone(),
                1 => collateral.root_ca_crl = bytes.clone(),
                2 => collateral.pck_crl = bytes.clone(),
                3 => collateral.tcb_info_issuer_chain = text.clone(),
                4 => collateral.tcb_info = text.clone(),
                5 => collateral.tcb_info_signature = bytes.clone(),
                6 => collateral.qe_identity_issuer_chain = text.clone(),
                7 => collateral.qe_identity = text.clone(),
                _ => collateral.pck_certificate_chain = Some(text.clone()),
            }
            let evidence = Evidence {
                tee: TeeKind::Tdx,
                quote: quote.clone(),
                collateral: Some(collateral),
            };
            let outcome = appraise(&evidence, &expected, &policy, now).outcome;
            // A PEM chain of Intel's signer from another capture may be the right one.
            let chain = matches!(part, 0 | 3 | 6) && text.contains("BEGIN CERTIFICATE");
            // Intel's root has one revocation list at a time; this one was in force then too.
            let in_force = part == 1 && path.ends_with(ROOT_CRL_2025);
            assert!(
                outcome.is_err() || chain || in_force,
                "{} as part {part}",
                path.display()
            );
        }
    }
}
