//! Quotes, evidence, appraisal and policies.

use std::sync::LazyLock;

use casemate_attest::measure::Measurement;
use casemate_attest::{
    Appraised, Collateral, Evidence, Policy, Quote, ReportData, UnixTime, appraise,
};
use casemate_testkit::fake_tee::FakeTee;
use casemate_testkit::policies::PolicyFile;
use casemate_testkit::{data, hostile};

use crate::{Walk, damage};

pub(crate) const NOW: u64 = 1_795_000_000;
pub(crate) const REPORT_DATA: ReportData = ReportData::new([0x5a; 64]);

/// A fake TEE of this process, honest evidence of it, and a policy that accepts both.
pub(crate) struct Honest {
    pub(crate) tee: FakeTee,
    pub(crate) measurement: Measurement,
    pub(crate) evidence: Evidence,
    pub(crate) policy_text: String,
    policy: Policy,
    accepted: Appraised,
}

pub(crate) fn honest() -> &'static Honest {
    static HONEST: LazyLock<Honest> = LazyLock::new(|| {
        let tee = FakeTee::ephemeral(NOW).expect("a fake TEE");
        let measurement = Measurement {
            mr_td: [1; 48],
            mr_config_id: [2; 48],
            rtmr: [[3; 48]; 4],
        };
        let evidence = tee.quote(&measurement, &REPORT_DATA, NOW).expect("a quote");
        let file = PolicyFile::new(tee.root_spki_sha256(), measurement);
        let file = file.for_users((&"05".repeat(32), 7), &"0a".repeat(32), "demo");
        let policy_text = file.to_toml();
        let policy = Policy::from_toml(&policy_text).expect("a policy");
        let now = UnixTime::from_secs(NOW);
        let appraisal = appraise(&evidence, &REPORT_DATA, &policy, now);
        let accepted = appraisal.outcome.expect("honest evidence");
        Honest {
            tee,
            measurement,
            evidence,
            policy_text,
            policy,
            accepted,
        }
    });
    &HONEST
}

/// A quote's structure. Padding changes nothing; no quote is the beginning of another.
pub(crate) fn quote(bytes: &[u8]) {
    let Ok(quote) = Quote::parse(bytes) else {
        return;
    };
    let len = quote.len();
    assert!(len <= bytes.len());
    assert!(
        bytes[len..].iter().all(|&b| b == 0),
        "bytes behind a quote were accepted"
    );
    assert_eq!(Quote::parse(&bytes[..len]).as_ref(), Ok(&quote));
    assert!(
        Quote::parse(&bytes[..len - 1]).is_err(),
        "a part of a quote was accepted"
    );
    assert_eq!(
        quote.report().td().is_some(),
        quote.report().sgx().is_none()
    );
}

/// The fake TEE's quotes, and where the test data is at hand, real ones.
pub(crate) fn quote_seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![honest().evidence.quote.clone()];
    let names = [
        "evidence/intel/phala/tdx_v4_quote.bin",
        "evidence/intel/phala/sgx_v3_quote.bin",
    ];
    let files = names.into_iter().filter_map(data::file);
    seeds.extend(files.filter_map(|path| std::fs::read(path).ok()));
    seeds
}

/// Evidence as a document. It reads back as written, and is never accepted: nobody signed it for this policy.
pub(crate) fn evidence(bytes: &[u8]) {
    if let Ok(collateral) = serde_json::from_slice::<Collateral>(bytes) {
        let again = serde_json::to_vec(&collateral).expect("collateral has a JSON form");
        assert_eq!(
            serde_json::from_slice::<Collateral>(&again).ok(),
            Some(collateral)
        );
    }
    let Ok(evidence) = Evidence::from_json(bytes) else {
        return;
    };
    let again = Evidence::from_json(evidence.to_json().as_bytes());
    assert_eq!(again.expect("what was written"), evidence);
    if evidence == honest().evidence {
        return;
    }
    let now = UnixTime::from_secs(NOW);
    let appraisal = appraise(&evidence, &REPORT_DATA, &honest().policy, now);
    assert!(appraisal.outcome.is_err(), "accepted without a signature");
    appraisal.transcript.to_table(false);
}

pub(crate) fn evidence_seeds() -> Vec<Vec<u8>> {
    let honest = honest();
    let samples = hostile::samples(&honest.tee, &honest.measurement, &REPORT_DATA, NOW);
    let samples = samples.expect("hostile samples").into_iter();
    let mut seeds: Vec<_> = samples
        .filter(|sample| sample.evidence.quote.len() < 16 << 10)
        .step_by(6)
        .map(|sample| sample.evidence.to_json().into_bytes())
        .collect();
    seeds.push(honest.evidence.to_json().into_bytes());
    let collateral = serde_json::to_vec(&honest.evidence.collateral);
    seeds.push(collateral.expect("collateral has a JSON form"));
    seeds
}

/// Damage to one part of honest evidence. Whatever is accepted says what the honest evidence said.
pub(crate) fn appraisal(data: &[u8]) {
    let (part, edits) = data.split_first().unwrap_or((&0, &[]));
    let honest = honest();
    let mut evidence = honest.evidence.clone();
    let collateral = evidence
        .collateral
        .as_mut()
        .expect("honest evidence has collateral");
    let in_text = |text: &mut String| {
        let mut bytes = std::mem::take(text).into_bytes();
        damage::apply(edits, &mut bytes);
        *text = String::from_utf8_lossy(&bytes).into_owned();
    };
    match part % 9 {
        0 => in_text(&mut collateral.pck_crl_issuer_chain),
        1 => damage::apply(edits, &mut collateral.root_ca_crl),
        2 => damage::apply(edits, &mut collateral.pck_crl),
        3 => in_text(&mut collateral.tcb_info_issuer_chain),
        4 => in_text(&mut collateral.tcb_info),
        5 => damage::apply(edits, &mut collateral.tcb_info_signature),
        6 => in_text(&mut collateral.qe_identity_issuer_chain),
        7 => in_text(&mut collateral.qe_identity),
        _ => damage::apply(edits, &mut evidence.quote),
    }
    let now = UnixTime::from_secs(NOW);
    let appraisal = appraise(&evidence, &REPORT_DATA, &honest.policy, now);
    if let Ok(accepted) = appraisal.outcome {
        assert!(accepted.is_development());
        assert_eq!(
            accepted.claims(),
            honest.accepted.claims(),
            "damage changed a claim"
        );
    }
}

pub(crate) fn walks() -> Vec<Walk> {
    let evidence = &honest().evidence;
    let collateral = evidence
        .collateral
        .as_ref()
        .expect("honest evidence has collateral");
    let walk = |what, prefix, len| Walk {
        target: "appraisal",
        what,
        prefix,
        len,
    };
    vec![
        walk(
            "the PCK CRL's chain",
            &[0],
            collateral.pck_crl_issuer_chain.len(),
        ),
        walk("the root CA's CRL", &[1], collateral.root_ca_crl.len()),
        walk("the PCK CRL", &[2], collateral.pck_crl.len()),
        walk(
            "the TCB info's chain",
            &[3],
            collateral.tcb_info_issuer_chain.len(),
        ),
        walk("TCB info", &[4], collateral.tcb_info.len()),
        walk(
            "the TCB info's signature",
            &[5],
            collateral.tcb_info_signature.len(),
        ),
        walk(
            "the QE identity's chain",
            &[6],
            collateral.qe_identity_issuer_chain.len(),
        ),
        walk("QE identity", &[7], collateral.qe_identity.len()),
        walk("a quote", &[8], evidence.quote.len()),
    ]
}

pub(crate) fn appraisal_seeds() -> Vec<Vec<u8>> {
    damage::seeds_of_parts(9)
}

/// A policy file. What is accepted is accepted again, with the same digest; every refusal has words.
pub(crate) fn policy(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    match Policy::from_toml(text) {
        Ok(policy) => {
            let again = Policy::from_toml(text).expect("the same text");
            assert_eq!(policy.digest(), again.digest());
            assert!(policy.version() > 0 && !policy.tee().is_empty());
            let longer = Policy::from_toml(&format!("{text}\n# a comment\n"));
            let longer = longer.expect("a comment is no error");
            assert_ne!(
                longer.digest(),
                policy.digest(),
                "the digest is that of the bytes"
            );
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

pub(crate) fn policy_seeds() -> Vec<Vec<u8>> {
    let sgx = "version = 1\ntee = [\"sgx\"]\n[tcb]\nminimum_evaluation_data_number = 17\n\
        [[tcb.allow]]\nstatus = \"OutOfDate\"\nuntil = \"2027-01-01T00:00:00Z\"\nadvisories = [\"INTEL-SA-00001\"]\n\
        [[measurement]]\nname = \"m\"\nmr_enclave = \"";
    let tdx = "version = 1\ntee = [\"tdx\"]\n[tdx]\nservice_td = []\n[tcb]\nminimum_evaluation_data_number = 17\n\
        accept = [\"UpToDate\"]\n[[measurement]]\nname = \"m\"\ndangerous_any_mr_config_id = true\n\
        dangerous_any_rtmr = [0, 1, 2, 3]\ntd_attributes = \"0000001000000000\"\nmr_td = \"";
    vec![
        honest().policy_text.clone().into_bytes(),
        format!("{sgx}{}\"\n", "11".repeat(32)).into_bytes(),
        format!("{tdx}{}\"\n", "22".repeat(48)).into_bytes(),
    ]
}
