//! The fake TEE's evidence before the appraisal of real quotes: honest evidence passes as development evidence only,
//! and each hostile sample is refused by the check made for it.

use casemate_attest::measure::Measurement;
use casemate_attest::{Appraised, Class, Policy, ReportData, UnixTime, appraise};
use casemate_testkit::fake_tee::FakeTee;
use casemate_testkit::hostile;
use casemate_testkit::policies::PolicyFile;

const NOW: u64 = 1_795_219_200; // 2026-11-21
const DATA: ReportData = ReportData::new([7; 64]);
const MEASUREMENT: Measurement = Measurement {
    mr_td: [1; 48],
    mr_config_id: [2; 48],
    rtmr: [[0; 48], [3; 48], [4; 48], [0; 48]],
};

fn policy(file: &PolicyFile) -> Policy {
    Policy::from_toml(&file.to_toml()).unwrap()
}

#[test]
fn honest_evidence_is_development_evidence_and_never_genuine() {
    let tee = FakeTee::ephemeral(NOW).unwrap();
    let file = PolicyFile::new(tee.root_spki_sha256(), MEASUREMENT);
    // Long after the installation was made: endorsements are fresh whenever a quote is.
    for now in [NOW, NOW + 3_000_000, NOW + 90_000_000] {
        let evidence = tee.quote(&MEASUREMENT, &DATA, now).unwrap();
        let appraisal = appraise(&evidence, &DATA, &policy(&file), UnixTime::from_secs(now));
        let appraised = appraisal
            .outcome
            .unwrap_or_else(|denial| panic!("{denial}"));
        assert!(matches!(appraised, Appraised::Development(_)));
        assert_eq!(appraised.claims().measurement_name, "casemate-enclave");
        assert_eq!(appraised.claims().tcb_evaluation_data_number, 20);
    }
}

#[test]
fn a_policy_that_does_not_name_the_root_refuses_honest_evidence() {
    let tee = FakeTee::ephemeral(NOW).unwrap();
    let evidence = tee.quote(&MEASUREMENT, &DATA, NOW).unwrap();
    let mut file = PolicyFile::new(tee.root_spki_sha256(), MEASUREMENT);
    for root in [None, Some([1; 32])] {
        file.development_root = root;
        let outcome = appraise(&evidence, &DATA, &policy(&file), UnixTime::from_secs(NOW)).outcome;
        let denial = outcome.map(|_| ()).unwrap_err();
        assert_eq!(
            (denial.class, denial.claim),
            (Class::NotGenuine, "root_of_trust")
        );
    }
}

#[test]
fn each_hostile_sample_is_refused_by_the_check_made_for_it() {
    let tee = FakeTee::ephemeral(NOW).unwrap();
    let policy = policy(&PolicyFile::new(tee.root_spki_sha256(), MEASUREMENT));
    let now = UnixTime::from_secs(NOW);
    let samples = hostile::samples(&tee, &MEASUREMENT, &DATA, NOW).unwrap();
    assert!(samples.len() > 50, "only {} samples", samples.len());
    let mut wrong = Vec::new();
    for sample in samples {
        match appraise(&sample.evidence, &DATA, &policy, now).outcome {
            Ok(_) => wrong.push(format!("{}: accepted", sample.name)),
            Err(denial) if (denial.class, denial.claim) != (sample.class, sample.claim) => wrong
                .push(format!(
                    "{}: expected {} by {}, got {denial}",
                    sample.name, sample.class, sample.claim
                )),
            Err(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
