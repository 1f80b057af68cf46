//! Hostile samples with one fault each, and the exact denial; next to each group a twin without the fault.

use casemate_attest::{
    Appraisal, Appraised, Class, Evidence, Policy, RootOfTrust, Status, TcbStatus, TeeKind,
    appraise,
};

use crate::data::denied;
use crate::forge::{NOW, Pck, REPORT_DATA, Sample, entry_of, policy, policy_with, root_hash};

fn judge(sample: &Sample, more: &str) -> Appraisal {
    appraise(
        &sample.build(),
        &REPORT_DATA,
        &policy(sample.tee, more),
        NOW,
    )
}

#[track_caller]
fn accepted(appraisal: Appraisal) -> Appraised {
    let table = appraisal.transcript.to_table(false);
    appraisal
        .outcome
        .unwrap_or_else(|denial| panic!("{denial}\n{table}"))
}

/// Name, sample, class and claim.
type Case = (&'static str, Sample, Class, &'static str);

fn check(cases: Vec<Case>) {
    for (name, sample, class, claim) in cases {
        let appraisal = judge(&sample, "");
        match &appraisal.outcome {
            Err(denial) => {
                assert_eq!(
                    (denial.class, denial.claim),
                    (class, claim),
                    "{name}: {denial}"
                );
            }
            Ok(accepted) => panic!("{name}: {accepted}"),
        }
        denied(appraisal, class, claim);
    }
}

#[test]
fn good_samples_are_development_and_say_so() {
    for sample in [
        Sample::td(),
        Sample::td_15(false),
        Sample::td_15(true),
        Sample::sgx(),
        Sample::td().with(|s| s.padding = vec![0; 3000]),
        Sample::td().with(|s| {
            s.certification_type = 3;
            s.chain_in_collateral = true;
        }),
    ] {
        let evidence = sample.build();
        let policy = policy(sample.tee, "");
        let appraisal = appraise(&evidence, &REPORT_DATA, &policy, NOW);
        assert!(!appraisal.transcript.root_of_trust().is_tee());
        assert!(appraisal.transcript.to_table(false).contains("not a TEE"));
        let json = serde_json::to_string(&appraisal.transcript).unwrap();
        assert!(json.contains("not a TEE"), "{json}");
        let accepted = accepted(appraisal);
        assert!(accepted.is_development());
        assert!(accepted.to_string().starts_with("NOT A TEE"), "{accepted}");
        let claims = accepted.claims();
        assert!(matches!(claims.root_of_trust, RootOfTrust::Development(_)));
        assert_eq!(claims.tee, sample.tee);
        assert_eq!(claims.tcb_status, TcbStatus::UpToDate);
        assert_eq!(claims.report.report_data(), &REPORT_DATA);
        assert_eq!(accepted.evidence_digest(), &evidence.digest());
    }
}

#[test]
fn a_development_root_counts_only_where_the_policy_names_it() {
    let evidence = Sample::td().build();
    let entry = entry_of(TeeKind::Tdx);
    let without = Policy::from_toml(&format!(
        "version = 1\ntee = [\"tdx\"]\n[tcb]\nminimum_evaluation_data_number = 18\n{entry}"
    ))
    .unwrap();
    let another = policy_with(TeeKind::Tdx, &"ab".repeat(32), "", &entry);
    for policy in [without, another] {
        let appraisal = appraise(&evidence, &REPORT_DATA, &policy, NOW);
        assert_eq!(
            appraisal.transcript.root_of_trust(),
            RootOfTrust::Undetermined
        );
        denied(appraisal, Class::NotGenuine, "root_of_trust");
    }
    // A chain without its root gives no hint, and Intel's root stays the only one.
    let mut bare = evidence.clone();
    let collateral = bare.collateral.as_mut().unwrap();
    for chain in [
        &mut collateral.tcb_info_issuer_chain,
        &mut collateral.qe_identity_issuer_chain,
        &mut collateral.pck_crl_issuer_chain,
    ] {
        let root = chain.rfind("-----BEGIN").unwrap();
        chain.truncate(root);
    }
    let appraisal = appraise(&bare, &REPORT_DATA, &policy(TeeKind::Tdx, ""), NOW);
    denied(appraisal, Class::NotGenuine, "root_of_trust");
}

#[test]
fn refuses_what_the_report_says_about_the_td() {
    let attribute = |bit: usize| Sample::td().with(|s| s.report[120 + bit / 8] |= 1 << (bit % 8));
    let refused = Class::Refused;
    check(vec![
        ("debug", attribute(0), refused, "debug"),
        ("profiling 4", attribute(4), refused, "debug"),
        ("profiling 6", attribute(6), refused, "debug"),
        (
            "reserved 8",
            attribute(8),
            refused,
            "td_attributes.reserved",
        ),
        (
            "reserved 40",
            attribute(40),
            refused,
            "td_attributes.reserved",
        ),
        (
            "migratable",
            attribute(29),
            refused,
            "td_attributes.migratable",
        ),
        ("SERVTD_EXT", attribute(17), refused, "service_td"),
        (
            "no SEPT_VE_DISABLE",
            Sample::td().with(|s| s.report[123] = 0),
            refused,
            "td_attributes.sept_ve_disable",
        ),
        (
            "xfam without SSE",
            Sample::td().with(|s| s.report[128] = 0xe5),
            refused,
            "xfam",
        ),
        (
            "unknown xfam",
            Sample::td().with(|s| s.report[135] = 0x80),
            refused,
            "xfam",
        ),
        (
            "service TD",
            Sample::td_15(false).with(|s| s.report[600] = 1),
            refused,
            "service_td",
        ),
        (
            "service TD bound now",
            Sample::td_15(true).with(|s| s.report[829] = 1),
            refused,
            "service_td",
        ),
        (
            "debug enclave",
            Sample::sgx().with(|s| s.report[48] |= 2),
            refused,
            "debug",
        ),
    ]);
    // Harmless bits: PKS, PERFMON.
    for bit in [30, 63] {
        accepted(judge(&attribute(bit), ""));
    }
}

#[test]
fn a_listed_service_td_is_accepted_in_both_places() {
    let service_td = [0x5e; 48];
    let listed = format!("[tdx]\nservice_td = [\"{}\"]\n", hex::encode(service_td));
    let mut sample = Sample::td_15(true);
    sample.report[600..648].copy_from_slice(&service_td);
    sample.report[829..877].copy_from_slice(&service_td);
    accepted(judge(&sample, &listed));
    let servtd_ext = sample.clone().with(|s| s.report[122] |= 1 << 1);
    accepted(judge(&servtd_ext, &listed));
    denied(judge(&sample, ""), Class::Refused, "service_td");
    denied(judge(&servtd_ext, ""), Class::Refused, "service_td");
    // SERVTD_EXT without a listed service TD at creation.
    let unlisted = servtd_ext.with(|s| s.report[600..648].fill(0));
    denied(judge(&unlisted, &listed), Class::Refused, "service_td");
}

#[test]
fn several_refusals_are_all_shown_and_the_first_is_the_denial() {
    let sample = Sample::td().with(|s| {
        s.report[120] = 1;
        s.report[135] = 0x80;
        s.tcb_status = "OutOfDate";
        s.report[136] ^= 1;
    });
    let appraisal = judge(&sample, "");
    let failed: Vec<&str> = appraisal
        .transcript
        .failed()
        .map(|check| check.name)
        .collect();
    assert_eq!(failed, ["debug", "xfam", "tcb.status", "measurement.mr_td"]);
    denied(appraisal, Class::Refused, "debug");
}

#[test]
fn what_was_not_reached_is_skipped_not_passed() {
    let sample = Sample::td().with(|s| s.revoked_pck = true);
    let appraisal = judge(&sample, "");
    let status = |name: &str| {
        let mut checks = appraisal.transcript.checks().iter();
        checks
            .find(|check| check.name == name)
            .map(|check| check.status)
    };
    assert_eq!(status("collateral.validity"), Some(Status::Passed));
    assert_eq!(status("certificates"), Some(Status::Failed));
    for name in [
        "quote.signature",
        "report_data",
        "debug",
        "xfam",
        "tcb.status",
        "measurement",
    ] {
        assert_eq!(status(name), Some(Status::Skipped), "{name}");
    }
}

#[test]
fn only_up_to_date_platforms_are_accepted_without_an_allowance() {
    for status in [
        "SWHardeningNeeded",
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDate",
        "OutOfDateConfigurationNeeded",
    ] {
        let sample = Sample::td().with(|s| {
            s.tcb_status = status;
            s.advisories = vec!["INTEL-SA-00837", "INTEL-SA-00960"];
        });
        let denial = denied(judge(&sample, ""), Class::Refused, "tcb.status");
        assert_eq!(
            denial.found,
            format!("{status} (INTEL-SA-00837, INTEL-SA-00960)")
        );
        let allow = |until: &str, advisories: &str| {
            format!("[[tcb.allow]]\nstatus = \"{status}\"\nuntil = \"{until}\"\n{advisories}\n")
        };
        let later = "2026-06-01T00:00:01Z";
        accepted(judge(&sample, &allow(later, "")));
        let both = "advisories = [\"INTEL-SA-00837\", \"INTEL-SA-00960\", \"INTEL-SA-01036\"]";
        accepted(judge(&sample, &allow(later, both)));
        // The allowance ends at this very second; it covers one advisory of two; it covers none.
        for (until, advisories) in [
            ("2026-06-01T00:00:00Z", ""),
            (later, "advisories = [\"INTEL-SA-00837\"]"),
            (later, "advisories = []"),
        ] {
            let more = allow(until, advisories);
            denied(judge(&sample, &more), Class::Refused, "tcb.status");
        }
    }
}

#[test]
fn refuses_collateral_of_an_old_evaluation() {
    let sample = Sample::td().with(|s| s.evaluation = 17);
    let denial = denied(
        judge(&sample, ""),
        Class::Refused,
        "tcb.evaluation_data_number",
    );
    assert_eq!(
        (&denial.found[..], &denial.expected[..]),
        ("17", "at least 18")
    );
}

#[test]
fn what_intel_does_not_vouch_for_is_not_genuine() {
    let td = Sample::td;
    let not_genuine = Class::NotGenuine;
    check(vec![
        (
            "revoked platform",
            td().with(|s| s.revoked_pck = true),
            not_genuine,
            "certificates",
        ),
        (
            "revoked platform CA",
            td().with(|s| s.revoked_platform_ca = true),
            not_genuine,
            "certificates",
        ),
        (
            "root CRL by another key",
            td().with(|s| s.root_crl_by_foreign_key = true),
            not_genuine,
            "certificates",
        ),
        (
            "PCK CRL by another key",
            td().with(|s| s.pck_crl_by_foreign_key = true),
            not_genuine,
            "certificates",
        ),
        (
            "platform under another root",
            td().with(|s| s.pck = Pck::Foreign),
            not_genuine,
            "root_of_trust",
        ),
        (
            "platform under another root that it does not show",
            td().with(|s| s.pck = Pck::Orphan),
            not_genuine,
            "certificates",
        ),
        (
            "expired platform certificate",
            td().with(|s| s.pck = Pck::Expired),
            not_genuine,
            "collateral.validity",
        ),
        (
            "TCB info by another key",
            td().with(|s| s.tcb_signed_by_foreign_key = true),
            not_genuine,
            "collateral.signatures",
        ),
        (
            "TCB info altered",
            td().with(|s| {
                s.after = |evidence| {
                    let collateral = evidence.collateral.as_mut().unwrap();
                    collateral.tcb_info = collateral.tcb_info.replace(
                        "\"tcbEvaluationDataNumber\":18",
                        "\"tcbEvaluationDataNumber\":19",
                    );
                };
            }),
            not_genuine,
            "collateral.signatures",
        ),
        (
            "QE identity altered",
            td().with(|s| {
                s.after = |evidence| {
                    let collateral = evidence.collateral.as_mut().unwrap();
                    collateral.qe_identity = collateral
                        .qe_identity
                        .replace("\"isvsvn\":8", "\"isvsvn\":0");
                };
            }),
            not_genuine,
            "collateral.signatures",
        ),
        (
            "report altered",
            td().with(|s| s.after = |evidence| evidence.quote[48 + 136] ^= 1),
            not_genuine,
            "quote.signature",
        ),
        (
            "header altered",
            td().with(|s| s.after = |evidence| evidence.quote[40] ^= 1),
            not_genuine,
            "quote.signature",
        ),
        (
            "QE report altered",
            td().with(|s| s.after = |evidence| evidence.quote[48 + 584 + 4 + 128 + 6 + 64] ^= 1),
            not_genuine,
            "quoting_enclave",
        ),
        (
            "attestation key not endorsed",
            td().with(|s| s.bind_attestation_key = false),
            not_genuine,
            "quoting_enclave",
        ),
        (
            "quoting enclave of another signer",
            td().with(|s| s.qe_report[128] ^= 1),
            not_genuine,
            "quoting_enclave",
        ),
        (
            "debug quoting enclave",
            td().with(|s| s.qe_report[48] |= 2),
            not_genuine,
            "quoting_enclave",
        ),
        (
            "old quoting enclave",
            td().with(|s| s.qe_level_svn = 9),
            not_genuine,
            "quoting_enclave",
        ),
        (
            "another QE vendor",
            td().with(|s| s.vendor[0] ^= 1),
            not_genuine,
            "quoting_enclave",
        ),
        (
            "platform below every level",
            td().with(|s| s.level_svn = 6),
            not_genuine,
            "tcb.level",
        ),
        (
            "revoked level",
            td().with(|s| s.tcb_status = "Revoked"),
            not_genuine,
            "tcb.level",
        ),
        (
            "TCB info of another family",
            td().with(|s| s.fmspc[0] ^= 1),
            not_genuine,
            "tcb.level",
        ),
        (
            "TDX module of another signer",
            td().with(|s| s.report[64] = 1),
            not_genuine,
            "tcb.level",
        ),
        (
            "TCB info of the other kind",
            td().with(|s| s.tcb_id = "SGX"),
            not_genuine,
            "collateral.structure",
        ),
        (
            "QE identity of the other kind",
            td().with(|s| s.qe_id = "QE"),
            not_genuine,
            "collateral.structure",
        ),
        (
            "encrypted platform identity",
            td().with(|s| s.certification_type = 3),
            not_genuine,
            "platform.certificate",
        ),
        (
            "no collateral",
            td().with(|s| s.after = |evidence| evidence.collateral = None),
            not_genuine,
            "collateral.present",
        ),
        (
            "no root CRL",
            td().with(|s| {
                s.after = |evidence| evidence.collateral.as_mut().unwrap().root_ca_crl.clear();
            }),
            not_genuine,
            "collateral.present",
        ),
        (
            "no PCK CRL",
            td().with(|s| {
                s.after = |evidence| evidence.collateral.as_mut().unwrap().pck_crl.clear();
            }),
            not_genuine,
            "collateral.present",
        ),
    ]);
}

#[test]
fn every_part_of_the_collateral_must_be_valid_now() {
    let parts = [
        "the TCB info",
        "the QE identity",
        "the root CA's CRL",
        "the PCK CRL",
    ];
    for (part, what) in parts.into_iter().enumerate() {
        for (window, remedy) in [((-30, -1), "fetch fresh"), ((1, 30), "check the clock")] {
            let sample = Sample::td().with(|s| s.windows[part] = window);
            let denial = denied(judge(&sample, ""), Class::NotGenuine, "collateral.validity");
            assert!(denial.found.starts_with(what), "{denial}");
            assert!(denial.remedy.starts_with(remedy), "{denial}");
        }
        // Valid from this second on, and until the next one.
        let begins = Sample::td().with(|s| s.windows[part] = (0, 30));
        accepted(judge(&begins, ""));
        let ends = Sample::td().with(|s| s.windows[part] = (-30, 0));
        denied(judge(&ends, ""), Class::NotGenuine, "collateral.validity");
    }
}

#[test]
fn what_cannot_be_read_is_malformed() {
    let malformed = Class::Malformed;
    let td = Sample::td;
    let structure = "quote.structure";
    check(vec![
        (
            "version 2",
            td().with(|s| s.version = 2),
            malformed,
            structure,
        ),
        (
            "version 6",
            td().with(|s| s.version = 6),
            malformed,
            structure,
        ),
        (
            "TDX in version 3",
            td().with(|s| s.version = 3),
            malformed,
            structure,
        ),
        (
            "P-384 key",
            td().with(|s| s.key_type = 3),
            malformed,
            structure,
        ),
        (
            "SGX body in version 5",
            Sample::td_15(false).with(|s| s.body_type = 1),
            malformed,
            structure,
        ),
        (
            "unknown body type",
            Sample::td_15(false).with(|s| s.body_type = 5),
            malformed,
            structure,
        ),
        (
            "body of another size",
            Sample::td_15(false).with(|s| s.report.push(0)),
            malformed,
            structure,
        ),
        (
            "trailing data",
            td().with(|s| s.padding = vec![0, 0, 1]),
            malformed,
            structure,
        ),
        (
            "certification of an unknown type",
            td().with(|s| s.certification_type = 9),
            malformed,
            structure,
        ),
        (
            "wrong kind in the evidence",
            td().with(|s| s.after = |evidence| evidence.tee = TeeKind::Sgx),
            malformed,
            structure,
        ),
        (
            "no quote",
            td().with(|s| s.after = |evidence| evidence.quote.clear()),
            malformed,
            structure,
        ),
        (
            "huge quote",
            td().with(|s| s.padding = vec![0; 32 * 1024]),
            malformed,
            "evidence.size",
        ),
        (
            "huge collateral",
            td().with(|s| {
                s.after = |evidence| {
                    let collateral = evidence.collateral.as_mut().unwrap();
                    collateral.tcb_info.push_str(&" ".repeat(256 * 1024));
                };
            }),
            malformed,
            "evidence.size",
        ),
        (
            "TCB info that is no JSON",
            td().with(|s| {
                s.after = |evidence| {
                    evidence
                        .collateral
                        .as_mut()
                        .unwrap()
                        .tcb_info
                        .insert(0, '[')
                };
            }),
            malformed,
            "collateral.structure",
        ),
        (
            "CRL that is no DER",
            td().with(|s| {
                s.after = |evidence| evidence.collateral.as_mut().unwrap().pck_crl[0] = 0;
            }),
            malformed,
            "collateral.structure",
        ),
        (
            "six certificates",
            td().with(|s| {
                s.after = |evidence| {
                    let collateral = evidence.collateral.as_mut().unwrap();
                    let chain = &mut collateral.tcb_info_issuer_chain;
                    *chain = chain.repeat(3);
                };
            }),
            malformed,
            "collateral.structure",
        ),
        (
            "text between the platform's certificates",
            td().with(|s| {
                s.after = |evidence| {
                    // The last line of the first certificate's armour: one dash becomes another character.
                    let marker = b"-----END";
                    let mut windows = evidence.quote.windows(marker.len());
                    let position = windows.position(|window| window == marker).unwrap();
                    evidence.quote[position - 1] = b'!';
                };
            }),
            malformed,
            "collateral.structure",
        ),
    ]);
}

#[test]
fn report_data_of_another_session_is_not_genuine() {
    let evidence = Sample::td().build();
    let policy = policy(TeeKind::Tdx, "");
    for byte in 0..64 {
        let mut other = *REPORT_DATA.as_bytes();
        other[byte] ^= 1;
        let appraisal = appraise(&evidence, &other.into(), &policy, NOW);
        denied(appraisal, Class::NotGenuine, "report_data");
    }
}

#[test]
fn a_kind_of_tee_that_the_policy_does_not_list_is_refused() {
    let evidence = Sample::sgx().build();
    let appraisal = appraise(&evidence, &REPORT_DATA, &policy(TeeKind::Tdx, ""), NOW);
    let denial = denied(appraisal, Class::Refused, "tee");
    assert_eq!((&denial.found[..], &denial.expected[..]), ("sgx", "tdx"));
}

fn with_entries(tee: TeeKind, entries: &str) -> Policy {
    policy_with(tee, &root_hash(), "", entries)
}

#[test]
fn one_entry_must_match_as_a_whole() {
    let evidence = Sample::td().build();
    let good = entry_of(TeeKind::Tdx);
    // Each has half of what is right.
    let first = good
        .replace("\"sample\"", "\"first\"")
        .replace(&"0b".repeat(48), &"ff".repeat(48))
        .replace(&"0c".repeat(48), &"ff".repeat(48));
    let second = good
        .replace("\"sample\"", "\"second\"")
        .replace(&"02".repeat(48), &"ff".repeat(48));
    let mixed = with_entries(TeeKind::Tdx, &format!("{first}{second}"));
    let appraisal = appraise(&evidence, &REPORT_DATA, &mixed, NOW);
    let denial = denied(appraisal, Class::Refused, "measurement.mr_td");
    // The nearest entry is the one that explains.
    assert_eq!(
        denial.expected,
        format!("{} (measurement \"second\")", "ff".repeat(48))
    );

    let policy = with_entries(TeeKind::Tdx, &format!("{first}{second}{good}"));
    let found = accepted(appraise(&evidence, &REPORT_DATA, &policy, NOW));
    assert_eq!(found.claims().measurement_name, "sample");
}

#[test]
fn each_register_counts_and_what_may_be_anything_is_shown_as_skipped() {
    let good = entry_of(TeeKind::Tdx);
    for (offset, key) in [
        (136, "mr_td"),
        (184, "mr_config_id"),
        (328, "rtmr0"),
        (376, "rtmr1"),
        (424, "rtmr2"),
        (472, "rtmr3"),
    ] {
        let sample = Sample::td().with(|s| s.report[offset + 47] ^= 1);
        let claim = format!("measurement.{key}");
        let denial = denied(judge(&sample, ""), Class::Refused, &claim);
        assert_ne!(denial.found, denial.expected);

        let line = good.lines().find(|line| line.starts_with(key)).unwrap();
        let any = match key {
            "mr_td" => continue,
            "mr_config_id" => "dangerous_any_mr_config_id = true".to_owned(),
            _ => format!("dangerous_any_rtmr = [{}]", &key[4..]),
        };
        let policy = with_entries(TeeKind::Tdx, &good.replace(line, &any));
        let appraisal = appraise(&sample.build(), &REPORT_DATA, &policy, NOW);
        let mut checks = appraisal.transcript.checks().iter();
        let check = checks.find(|check| check.name == claim).unwrap();
        assert_eq!(check.status, Status::Skipped);
        assert!(check.remedy.contains("dangerous_any"), "{check:?}");
        accepted(appraisal);
    }
}

#[test]
fn an_enclave_is_known_by_its_contents_or_by_its_signer_and_version() {
    let evidence = Sample::sgx().build();
    let judge = |entry: &str| {
        let entry = format!("[[measurement]]\nname = \"signer\"\n{entry}");
        appraise(
            &evidence,
            &REPORT_DATA,
            &with_entries(TeeKind::Sgx, &entry),
            NOW,
        )
    };
    let signer = format!("mr_signer = \"{}\"\n", "22".repeat(32));
    accepted(judge(&format!(
        "{signer}isv_prod_id = 1\nminimum_isv_svn = 7\n"
    )));
    for (rest, claim) in [
        (
            "isv_prod_id = 2\nminimum_isv_svn = 7\n",
            "measurement.isv_prod_id",
        ),
        (
            "isv_prod_id = 1\nminimum_isv_svn = 8\n",
            "measurement.isv_svn",
        ),
    ] {
        denied(judge(&format!("{signer}{rest}")), Class::Refused, claim);
    }
    let other = format!("mr_enclave = \"{}\"\n", "23".repeat(32));
    denied(judge(&other), Class::Refused, "measurement.mr_enclave");
    // A configuration that the policy does not name must be absent.
    let configured = Sample::sgx().with(|s| s.report[192] = 1).build();
    let policy = policy(TeeKind::Sgx, "");
    let appraisal = appraise(&configured, &REPORT_DATA, &policy, NOW);
    denied(appraisal, Class::Refused, "measurement.config_id");
}

#[test]
fn evidence_survives_its_json_form() {
    let evidence = Sample::td().build();
    let json = evidence.to_json();
    let again = Evidence::from_json(json.as_bytes()).unwrap();
    assert_eq!(again, evidence);
    accepted(appraise(
        &again,
        &REPORT_DATA,
        &policy(TeeKind::Tdx, ""),
        NOW,
    ));
}

#[test]
fn a_denial_stays_short_whatever_was_found() {
    let sample = Sample::td().with(|s| {
        s.after = |evidence| {
            let collateral = evidence.collateral.as_mut().unwrap();
            let long = format!("\"id\":\"{}\"", "ä".repeat(50_000));
            collateral.tcb_info = collateral.tcb_info.replace("\"id\":\"TDX\"", &long);
        };
    });
    let denial = denied(
        judge(&sample, ""),
        Class::NotGenuine,
        "collateral.structure",
    );
    assert_eq!(denial.found.chars().count(), 1001);
}
