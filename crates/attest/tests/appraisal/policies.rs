//! The policy file: a complete one reads as written, and each mistake is named with its line.

use casemate_attest::{
    Class, Measurement, Policy, PolicyFault, Reference, SgxIdentity, TcbStatus, TeeKind, measure,
};
use sha2::{Digest as _, Sha256};

/// Every key there is.
pub const COMPLETE: &str = r#"version = 3
tee = ["tdx", "sgx"]
dangerous_development_root = "1111111111111111111111111111111111111111111111111111111111111111"
[tcb]
accept = ["UpToDate"]
minimum_evaluation_data_number = 17
[[tcb.allow]]
status = "SWHardeningNeeded"
until = "2027-01-01T00:00:00Z"
advisories = ["INTEL-SA-00837"]
[tdx]
service_td = ["222222222222222222222222222222222222222222222222222222222222222222222222222222222222222222222222"]
[[measurement]]
name = "enclave, in a TD"
mr_td = "333333333333333333333333333333333333333333333333333333333333333333333333333333333333333333333333"
mr_config_id = "444444444444444444444444444444444444444444444444444444444444444444444444444444444444444444444444"
rtmr0 = "555555555555555555555555555555555555555555555555555555555555555555555555555555555555555555555555"
rtmr1 = "666666666666666666666666666666666666666666666666666666666666666666666666666666666666666666666666"
dangerous_any_rtmr = [2, 3]
mr_seam = "777777777777777777777777777777777777777777777777777777777777777777777777777777777777777777777777"
mr_owner = "888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888"
mr_owner_config = "999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999"
td_attributes = "0000001000000000"
xfam = "e702060000000000"
[[measurement]]
name = "enclave, in SGX"
mr_signer = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
isv_prod_id = 1
minimum_isv_svn = 2
attributes = "05000000000000000700000000000000"
[model]
digests = ["bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"]
minimum_version = 4
[service]
issuer = "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
name = "smollm2"
maximum_evidence_age_seconds = 300
"#;

#[test]
fn a_complete_policy_reads_as_written() {
    let policy = Policy::from_toml(COMPLETE).unwrap();
    assert_eq!(policy.version(), 3);
    assert_eq!(policy.tee(), [TeeKind::Tdx, TeeKind::Sgx]);
    assert_eq!(policy.dangerous_development_root(), Some(&[0x11; 32]));
    assert_eq!(policy.minimum_tcb_evaluation_data_number(), 17);
    let [allowance] = policy.tcb_allowances() else {
        panic!()
    };
    assert_eq!(allowance.status, TcbStatus::SWHardeningNeeded);
    assert_eq!(allowance.until.to_string(), "2027-01-01T00:00:00Z");
    assert_eq!(policy.service_tds(), [[0x22; 48]]);
    let [Measurement::Td(td), Measurement::Sgx(sgx)] = policy.measurements() else {
        panic!()
    };
    assert_eq!(td.mr_td, [0x33; 48]);
    assert_eq!(td.mr_config_id, Reference::Exactly([0x44; 48]));
    assert_eq!(
        td.rtmr,
        [
            Reference::Exactly([0x55; 48]),
            Reference::Exactly([0x66; 48]),
            Reference::Any,
            Reference::Any
        ]
    );
    assert_eq!(
        sgx.identity,
        SgxIdentity::Signer {
            mr_signer: [0xaa; 32],
            isv_prod_id: 1,
            minimum_isv_svn: 2
        }
    );
    assert_eq!(sgx.config_id, [0; 64]);
    let model = policy.model().unwrap();
    assert!(model.allows(&[0xbb; 32], 4) && model.allows(&[0xbb; 32], 5));
    assert!(!model.allows(&[0xbb; 32], 3) && !model.allows(&[0xbc; 32], 4));
    let service = policy.service().unwrap();
    assert_eq!((service.issuer, &service.name[..]), ([0xcc; 32], "smollm2"));
    assert_eq!(service.maximum_evidence_age_seconds, 300);
    let digest: [u8; 32] = Sha256::digest(COMPLETE).into();
    assert_eq!(policy.digest(), &digest);
}

#[test]
fn absent_sections_deny() {
    let end = COMPLETE.find("[model]").unwrap();
    let policy = Policy::from_toml(&COMPLETE[..end]).unwrap();
    for (denial, claim) in [
        (policy.model().unwrap_err(), "policy.model"),
        (policy.service().unwrap_err(), "policy.service"),
    ] {
        assert_eq!((denial.class, denial.claim), (Class::Refused, claim));
    }
    let start = COMPLETE.find("[[tcb.allow]]").unwrap();
    let end = COMPLETE.find("[[measurement]]").unwrap();
    let text = format!("{}{}", &COMPLETE[..start], &COMPLETE[end..]);
    let policy = Policy::from_toml(&text).unwrap();
    assert!(policy.tcb_allowances().is_empty() && policy.service_tds().is_empty());
}

/// What is replaced by what, the line the error must name, and how its text begins.
#[test]
fn each_mistake_is_named_with_its_line() {
    let x = |digit: &str, bytes: usize| digit.repeat(2 * bytes);
    for (from, to, line, text) in [
        (
            "version = 3".into(),
            "version = 0".to_owned(),
            Some(1),
            "version is \"0\"",
        ),
        (
            "version = 3".into(),
            "version = -1".to_owned(),
            Some(1),
            "invalid value",
        ),
        (
            "version = 3".into(),
            "version = 3\nunknown = 1".to_owned(),
            Some(2),
            "unknown field",
        ),
        (
            "version = 3\n".into(),
            String::new(),
            Some(1),
            "missing field `version`",
        ),
        (
            "\"tdx\", \"sgx\"".into(),
            "\"tdx\", \"tdx\"".to_owned(),
            Some(2),
            "tee \"tdx\" occurs twice",
        ),
        (
            "\"tdx\", \"sgx\"".into(),
            "\"snp\"".to_owned(),
            Some(2),
            "tee is \"snp\"",
        ),
        (
            "\"tdx\", \"sgx\"".into(),
            String::new(),
            Some(2),
            "tee has 0 entries",
        ),
        (
            "\"tdx\", \"sgx\"".into(),
            "\"tdx\"".to_owned(),
            Some(26),
            "measurement.name is",
        ),
        (
            x("1", 32),
            x("1", 31),
            Some(3),
            "dangerous_development_root is",
        ),
        (
            x("1", 32),
            "a0af031289f5d5d4132f9186068a7fc13628633ba235777472e29b6b6c67a49e".to_owned(),
            Some(3),
            "dangerous_development_root is",
        ),
        (
            "accept = [\"UpToDate\"]".into(),
            "accept = [\"OutOfDate\"]".to_owned(),
            Some(5),
            "tcb.accept is",
        ),
        (
            "minimum_evaluation_data_number = 17\n".into(),
            String::new(),
            Some(4),
            "missing field",
        ),
        (
            "\"SWHardeningNeeded\"".into(),
            "\"Revoked\"".to_owned(),
            Some(8),
            "tcb.allow.status is",
        ),
        (
            "\"SWHardeningNeeded\"".into(),
            "\"UpToDate\"".to_owned(),
            Some(8),
            "tcb.allow.status is",
        ),
        (
            "until = \"2027-01-01T00:00:00Z\"\n".into(),
            String::new(),
            Some(7),
            "missing field `until`",
        ),
        (
            "2027-01-01T00:00:00Z".into(),
            "2027".to_owned(),
            Some(9),
            "tcb.allow.until is",
        ),
        (
            "INTEL-SA-00837".into(),
            String::new(),
            Some(10),
            "tcb.allow.advisories is",
        ),
        (x("2", 48), "zz".repeat(48), Some(12), "tdx.service_td is"),
        (
            "enclave, in a TD".into(),
            String::new(),
            Some(14),
            "measurement.name is",
        ),
        (
            "in SGX".into(),
            "in a TD".to_owned(),
            Some(26),
            "measurement.name \"enclave, in a TD\" occurs",
        ),
        (x("3", 48), x("3", 32), Some(15), "measurement.mr_td is"),
        (
            format!("mr_config_id = \"{}\"\n", x("4", 48)),
            String::new(),
            Some(13),
            "measurement.mr_config_id is missing",
        ),
        (
            "rtmr0".into(),
            "dangerous_any_mr_config_id = true\nrtmr0".to_owned(),
            Some(16),
            "measurement.mr_config_id and dangerous",
        ),
        (
            "[2, 3]".into(),
            "[2]".to_owned(),
            Some(13),
            "measurement.rtmr3 is missing",
        ),
        (
            "[2, 3]".into(),
            "[1, 2, 3]".to_owned(),
            Some(18),
            "measurement.rtmr1 and dangerous",
        ),
        (
            "[2, 3]".into(),
            "[2, 3, 3]".to_owned(),
            Some(19),
            "dangerous_any_rtmr \"3\" occurs twice",
        ),
        (
            "[2, 3]".into(),
            "[2, 3, 4]".to_owned(),
            Some(19),
            "dangerous_any_rtmr is \"4\"",
        ),
        (
            "xfam = ".into(),
            "attributes = \"05000000000000000700000000000000\"\nxfam = ".to_owned(),
            Some(13),
            "mr_td and attributes contradict",
        ),
        (
            "isv_prod_id = 1\n".into(),
            String::new(),
            Some(25),
            "measurement.isv_prod_id is missing",
        ),
        (
            "isv_prod_id = 1\n".into(),
            "isv_prod_id = 1\nrtmr0 = \"\"\n".to_owned(),
            Some(25),
            "mr_enclave or mr_signer and rtmr0",
        ),
        (
            format!("mr_signer = \"{}\"\n", x("a", 32)),
            String::new(),
            Some(25),
            "measurement.mr_td is missing",
        ),
        (x("b", 32), x("b", 33), Some(32), "model.digests is"),
        (
            "minimum_version = 4\n".into(),
            String::new(),
            Some(31),
            "missing field `minimum_version`",
        ),
        (
            "\"smollm2\"".into(),
            "\"\\u001b[2J\"".to_owned(),
            Some(36),
            "service.name is",
        ),
        (
            "seconds = 300".into(),
            "seconds = 0".to_owned(),
            Some(37),
            "service.maximum_evidence_age_seconds is",
        ),
        (
            "seconds = 300".into(),
            "seconds = 86401".to_owned(),
            Some(37),
            "service.maximum_evidence_age_seconds is",
        ),
        ("[service]".into(), "[service".to_owned(), Some(34), ""),
        (
            "[service]".into(),
            "[[measurement]]".to_owned(),
            Some(35),
            "unknown field `issuer`",
        ),
    ] {
        let text_in = COMPLETE.replacen(&from, &to, 1);
        assert_ne!(text_in, COMPLETE, "{from} is not there");
        let error = Policy::from_toml(&text_in).expect_err(&to);
        let shown = error.fault.to_string();
        assert!(shown.starts_with(text), "{from} -> {to}: {error}");
        assert_eq!(error.line, line, "{from} -> {to}: {error}");
    }
}

#[test]
fn a_policy_needs_a_measurement_for_each_kind() {
    let start = COMPLETE.find("[[measurement]]").unwrap();
    let end = COMPLETE.find("[model]").unwrap();
    let none = format!("{}{}", &COMPLETE[..start], &COMPLETE[end..]);
    let sgx = COMPLETE.rfind("[[measurement]]").unwrap();
    let only_td = format!("{}{}", &COMPLETE[..sgx], &COMPLETE[end..]);
    for text in [none, only_td] {
        let error = Policy::from_toml(&text).unwrap_err();
        assert!(
            matches!(
                error.fault,
                PolicyFault::Missing {
                    key: "measurement",
                    ..
                }
            ),
            "{error}"
        );
    }
    let huge = format!("{COMPLETE}# {}", " ".repeat(casemate_attest::MAX_POLICY));
    let error = Policy::from_toml(&huge).unwrap_err();
    assert!(
        matches!(error.fault, PolicyFault::TooLarge { .. }),
        "{error}"
    );
}

#[test]
fn a_measured_process_makes_an_entry_that_a_policy_takes() {
    let measurement = measure::Measurement::of_process(&measure::Process {
        executable: measure::FileDigest::of(b"program"),
        arguments: &[c"--config", c"a.toml"],
        environment: &[c"LANG=C"],
        config: Some(measure::FileDigest::of(b"[service]")),
    });
    let entry = measurement.to_policy_entry("casemate-enclave").unwrap();
    let text =
        format!("version = 1\ntee = [\"tdx\"]\n[tcb]\nminimum_evaluation_data_number = 1\n{entry}");
    let policy = Policy::from_toml(&text).unwrap();
    let [Measurement::Td(td)] = policy.measurements() else {
        panic!()
    };
    assert_eq!(td.mr_td, measurement.mr_td);
    assert_eq!(
        td.mr_config_id,
        Reference::Exactly(measurement.mr_config_id)
    );
    assert_eq!(td.rtmr, measurement.rtmr.map(Reference::Exactly));
    for name in ["", "a\"b", "a\nb", &"a".repeat(129)] {
        assert!(measurement.to_policy_entry(name).is_err(), "{name:?}");
    }
}
