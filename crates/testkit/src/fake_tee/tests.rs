use dcap_qvl::verify::QuoteVerifier;

use super::*;

const NOW: u64 = 1_795_219_200; // 2026-11-21

fn measurement() -> Measurement {
    Measurement {
        mr_td: [1; 48],
        mr_config_id: [2; 48],
        rtmr: [[3; 48], [4; 48], [5; 48], [6; 48]],
    }
}

fn verify(
    tee: &FakeTee,
    quoted: &Quoted,
    now: u64,
) -> Result<dcap_qvl::verify::VerifiedReport, String> {
    QuoteVerifier::new(tee.root_der().to_vec())
        .verify(&quoted.quote, &quoted.collateral, now)
        .map_err(|error| format!("{error:#}"))
}

#[test]
fn the_verifier_of_real_quotes_accepts_a_quote_under_its_own_root_only() {
    let tee = FakeTee::ephemeral(NOW).unwrap();
    let quoted = tee.quote(&measurement(), &[7; 64], NOW).unwrap();
    let report = verify(&tee, &quoted, NOW).unwrap();
    assert_eq!(report.status, "UpToDate");
    let td = report.report.as_td10().unwrap();
    assert_eq!((td.mr_td, td.mr_config_id), ([1; 48], [2; 48]));
    assert_eq!(
        (td.rt_mr0, td.rt_mr1, td.rt_mr2, td.rt_mr3),
        ([3; 48], [4; 48], [5; 48], [6; 48])
    );
    assert_eq!(td.report_data, [7; 64]);

    let stranger = FakeTee::ephemeral(NOW).unwrap();
    assert!(verify(&stranger, &quoted, NOW).is_err());
    assert!(
        QuoteVerifier::new_prod()
            .verify(&quoted.quote, &quoted.collateral, NOW)
            .is_err()
    );
}
