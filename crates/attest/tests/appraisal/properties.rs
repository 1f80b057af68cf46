//! Properties: corrupted quotes, random bytes, random policies.

use casemate_attest::{Class, Evidence, Policy, Quote, ReportData, TeeKind, UnixTime, appraise};
use proptest::prelude::*;

use crate::data::{Data, denied, evidence, judge, policy_for, time};
use crate::forge::{self, Sample};

/// White space between the lines of a PEM chain carries no meaning, nor does what ends it: one kind may stand for
/// another, and the zero byte at the end of the quote for either.
fn means_the_same(quote: &[u8], position: usize, after: u8) -> bool {
    let before = quote[position];
    let ends = position + 1 == quote.len() && before == 0;
    (before.is_ascii_whitespace() || ends) && after.is_ascii_whitespace()
}

fn assert_every_corruption_is_refused(
    evidence: &Evidence,
    policy: &Policy,
    now: UnixTime,
    positions: impl Iterator<Item = usize>,
    mask: u8,
) {
    let expected: ReportData = *evidence.unverified_quote().unwrap().report().report_data();
    let good = appraise(evidence, &expected, policy, now);
    assert!(good.outcome.is_ok(), "{:?}", good.outcome);
    for position in positions {
        let mut corrupted = evidence.clone();
        corrupted.quote[position] ^= mask;
        if means_the_same(&evidence.quote, position, corrupted.quote[position]) {
            continue;
        }
        let outcome = appraise(&corrupted, &expected, policy, now).outcome;
        assert!(outcome.is_err(), "byte {position} ^ {mask:#x} is accepted");
    }
}

#[test]
fn every_corrupted_byte_of_a_forged_quote_is_refused() {
    let evidence = Sample::td().build();
    let policy = forge::policy(TeeKind::Tdx, "");
    let len = evidence.quote.len();
    assert_every_corruption_is_refused(&evidence, &policy, forge::NOW, 0..len, 0xff);
    for (offset, mask) in [(0, 0x01), (1, 0x80), (2, 0x20)] {
        let positions = (offset..len).step_by(5);
        assert_every_corruption_is_refused(&evidence, &policy, forge::NOW, positions, mask);
    }
}

#[test]
fn every_corrupted_byte_of_real_quotes_is_refused() {
    let Some(data) = Data::open() else { return };
    let now = time("2025-06-19T12:00:00Z");
    let tdx = evidence(
        data.bytes("intel/phala/tdx_v4_quote.bin"),
        Some(data.collateral_json("intel/phala/tdx_v4_quote_collateral.json")),
    );
    let len = tdx.quote.len();
    let policy = policy_for(&tdx, "");
    assert_every_corruption_is_refused(&tdx, &policy, now, 0..len, 0x01);
    let sgx = evidence(
        data.bytes("intel/phala/sgx_v3_quote.bin"),
        Some(data.collateral_json("intel/phala/sgx_v3_quote_collateral.json")),
    );
    let more = "[[tcb.allow]]\nstatus = \"ConfigurationAndSWHardeningNeeded\"\nuntil = \"2026-01-01T00:00:00Z\"\n";
    let policy = policy_for(&sgx, more);
    let len = sgx.quote.len();
    assert_every_corruption_is_refused(&sgx, &policy, now, (0..len).step_by(4), 0x10);
}

#[test]
fn every_truncation_is_malformed() {
    let whole = Sample::td().build();
    let policy = forge::policy(TeeKind::Tdx, "");
    for len in 0..whole.quote.len() {
        let mut cut = whole.clone();
        cut.quote.truncate(len);
        let appraisal = appraise(&cut, &forge::REPORT_DATA, &policy, forge::NOW);
        denied(appraisal, Class::Malformed, "quote.structure");
    }
}

#[test]
fn every_corrupted_part_of_collateral_is_refused_at_sampled_bytes() {
    let good = Sample::td().build();
    let policy = forge::policy(TeeKind::Tdx, "");
    for part in 0..6 {
        for step in 0..80 {
            let mut evidence = good.clone();
            let collateral = evidence.collateral.as_mut().unwrap();
            let flip = |bytes: &mut [u8]| {
                let position = step * 7919 % bytes.len();
                bytes[position] ^= 0x04;
            };
            let flip_text = |text: &mut String| {
                let mut bytes = std::mem::take(text).into_bytes();
                flip(&mut bytes);
                *text = String::from_utf8(bytes).unwrap();
            };
            match part {
                0 => flip(&mut collateral.root_ca_crl),
                1 => flip(&mut collateral.pck_crl),
                2 => flip(&mut collateral.tcb_info_signature),
                3 => flip(&mut collateral.qe_identity_signature),
                4 => flip_text(&mut collateral.tcb_info),
                _ => flip_text(&mut collateral.qe_identity),
            }
            let outcome = appraise(&evidence, &forge::REPORT_DATA, &policy, forge::NOW).outcome;
            assert!(outcome.is_err(), "part {part}, step {step}");
        }
    }
}

#[test]
fn a_nonce_of_another_session_is_refused_at_every_byte() {
    let Some(data) = Data::open() else { return };
    let evidence = evidence(
        data.bytes("intel/phala/tdx_v4_quote.bin"),
        Some(data.collateral_json("intel/phala/tdx_v4_quote_collateral.json")),
    );
    assert!(judge(&evidence, "", "2025-06-19T12:00:00Z").outcome.is_ok());
    let policy = policy_for(&evidence, "");
    let own = *evidence
        .unverified_quote()
        .unwrap()
        .report()
        .report_data()
        .as_bytes();
    for byte in 0..64 {
        let mut other = own;
        other[byte] = other[byte].wrapping_add(1);
        let now = time("2025-06-19T12:00:00Z");
        let appraisal = appraise(&evidence, &other.into(), &policy, now);
        denied(appraisal, Class::NotGenuine, "report_data");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_are_no_quote_and_no_evidence(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(Quote::parse(&bytes).is_err());
        prop_assert!(Evidence::from_json(&bytes).is_err());
    }

    #[test]
    fn random_bytes_behind_a_good_header_are_no_quote(
        version in 3u16..=5,
        bytes in proptest::collection::vec(any::<u8>(), 0..6000),
    ) {
        let tee: u32 = if version == 3 { 0 } else { 0x81 };
        let mut quote = version.to_le_bytes().to_vec();
        quote.extend(2u16.to_le_bytes());
        quote.extend(tee.to_le_bytes());
        quote.extend(bytes);
        prop_assert!(Quote::parse(&quote).is_err());
    }

    #[test]
    fn several_corrupted_bytes_never_panic_and_are_refused(
        changes in proptest::collection::vec((0usize..5000, 1u8..=255), 1..6),
    ) {
        let mut evidence = Sample::td().build();
        let before = evidence.quote.clone();
        for (position, mask) in changes {
            let position = position % evidence.quote.len();
            evidence.quote[position] ^= mask;
        }
        let same = (0..before.len()).all(|position| {
            let after = evidence.quote[position];
            before[position] == after || means_the_same(&before, position, after)
        });
        let policy = forge::policy(TeeKind::Tdx, "");
        let outcome = appraise(&evidence, &forge::REPORT_DATA, &policy, forge::NOW).outcome;
        prop_assert!(outcome.is_err() || same);
    }

    #[test]
    fn random_text_is_no_policy(text in "\\PC{0,200}") {
        prop_assert!(Policy::from_toml(&text).is_err());
    }

    /// Whatever happens to one line of a good policy, reading it does not panic, and an error names a line that exists.
    #[test]
    fn a_damaged_policy_is_refused_with_a_line_that_exists(
        line in 0usize..40,
        damage in prop_oneof![
            Just(String::new()),
            Just("unknown = 1".to_owned()),
            Just("[unknown]".to_owned()),
            Just("version = \"one\"".to_owned()),
            "[a-z\\[\\]=\" 0-9]{0,30}",
        ],
    ) {
        let text = crate::policies::COMPLETE;
        let count = text.lines().count();
        let damaged: Vec<&str> = text
            .lines()
            .enumerate()
            .map(|(index, original)| if index == line % count { &damage[..] } else { original })
            .collect();
        if let Err(error) = Policy::from_toml(&damaged.join("\n")) {
            prop_assert!(error.line.is_none_or(|line| (1..=count).contains(&line)), "{error}");
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
