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

const DATA: ReportData = ReportData::new([7; 64]);

fn verify(root: Vec<u8>, evidence: &Evidence) -> Result<dcap_qvl::verify::VerifiedReport, String> {
    let collateral = serde_json::to_value(evidence.collateral.as_ref().unwrap()).unwrap();
    let collateral: dcap_qvl::QuoteCollateralV3 = serde_json::from_value(collateral).unwrap();
    QuoteVerifier::new(root)
        .verify(&evidence.quote, &collateral, NOW)
        .map_err(|error| format!("{error:#}"))
}

#[test]
fn the_verifier_of_real_quotes_accepts_a_quote_under_its_own_root_only() {
    let tee = FakeTee::ephemeral(NOW).unwrap();
    let evidence = tee.quote(&measurement(), &DATA, NOW).unwrap();
    let report = verify(tee.root_der().to_vec(), &evidence).unwrap();
    assert_eq!(report.status, "UpToDate");
    let td = report.report.as_td10().unwrap();
    assert_eq!((td.mr_td, td.mr_config_id), ([1; 48], [2; 48]));
    assert_eq!(
        (td.rt_mr0, td.rt_mr1, td.rt_mr2, td.rt_mr3),
        ([3; 48], [4; 48], [5; 48], [6; 48])
    );
    assert_eq!(td.report_data, [7; 64]);

    let stranger = FakeTee::ephemeral(NOW).unwrap();
    assert!(verify(stranger.root_der().to_vec(), &evidence).is_err());
    let collateral = serde_json::to_value(evidence.collateral.as_ref().unwrap()).unwrap();
    let collateral: dcap_qvl::QuoteCollateralV3 = serde_json::from_value(collateral).unwrap();
    let intel = QuoteVerifier::new_prod().verify(&evidence.quote, &collateral, NOW);
    assert!(intel.is_err(), "no quote of ours is one of Intel's");
}
