//! Captures from real machines verify, or are refused, exactly as their collection says, at the time it says.

use casemate_attest::{
    Appraisal, Appraised, Claims, Class, Collateral, Status, TcbStatus, appraise,
};
use casemate_testkit::policies::entry_for;

use crate::data::{Data, Parts, base64url, denied, evidence, judge, policy_for, time, yaml_field};

const PHALA_TDX: &str = "intel/phala/tdx_v4_quote_collateral.json";
const PHALA_SGX: &str = "intel/phala/sgx_v3_quote_collateral.json";
const GCP: &str = "intel/flashbots/dcap-quote-collateral-00.yaml";
const AZURE: &str = "intel/flashbots/azure-collateral.yaml";
const COS_113: &str = "intel/go-tdx-guest/ccel/cos-113-tdx-quote.dat";
const SIGNING_CHAIN: &str = "intel/attestation-rs/tcb_signing_chain.pem";
const ROOT_CRL_2025: &str =
    "intel/automata/solana__automata-dcap-framework__tests__data__intel_root_ca_crl.der";

/// Platforms of family 50806f, spring 2026.
const FAMILY_50806F: Parts = Parts {
    tcb_info: "intel/attestation-rs/tcb_info_50806f000000.json",
    qe_identity: "intel/attestation-rs/td_qe_identity.json",
    root_crl: "intel/attestation-rs/root_ca_crl.der",
    pck_crl: "intel/attestation-rs/pck_crl_platform.der",
    signing_chain: &[SIGNING_CHAIN],
};

/// SGX platforms of family 00606a, summer 2025.
const FAMILY_00606A_SGX: Parts = Parts {
    tcb_info: "intel/automata/evm__forge-test__assets__0825__sgx_tcbinfov3_00606a000000.json",
    qe_identity: "intel/automata/evm__forge-test__assets__0825__sgx_qeidentity_v4.json",
    root_crl: ROOT_CRL_2025,
    pck_crl: "intel/automata/evm__forge-test__assets__0825__platform_crl.der",
    signing_chain: &[SIGNING_CHAIN],
};

#[track_caller]
fn accepted(appraisal: Appraisal) -> Claims {
    let table = appraisal.transcript.to_table(false);
    match appraisal.outcome {
        Ok(Appraised::Genuine(verified)) => {
            assert!(appraisal.transcript.is_clean());
            verified.claims().clone()
        }
        Ok(Appraised::Development(_)) => panic!("a capture is no development evidence"),
        Err(denial) => panic!("{denial}\n{table}"),
    }
}

fn allow(status: &str) -> String {
    format!("[[tcb.allow]]\nstatus = \"{status}\"\nuntil = \"2027-01-01T00:00:00Z\"\n")
}

#[test]
fn phala_tdx_verifies_up_to_date_within_its_window() {
    let Some(data) = Data::open() else { return };
    let quote = data.bytes("intel/phala/tdx_v4_quote.bin");
    let evidence = evidence(quote, Some(data.collateral_json(PHALA_TDX)));
    let claims = accepted(judge(&evidence, "", "2025-06-19T12:00:00Z"));
    assert_eq!(claims.tcb_status, TcbStatus::UpToDate);
    assert_eq!(claims.advisory_ids, [""; 0]);
    assert_eq!(claims.tcb_evaluation_data_number, 17);
    assert_eq!(claims.measurement_name, "capture");
    assert_eq!(claims.collateral_valid_until, time("2025-07-19T10:00:35Z"));

    for outside in [
        "2025-06-19T10:00:00Z",
        "2025-07-19T12:00:00Z",
        "2026-11-21T00:00:00Z",
    ] {
        denied(
            judge(&evidence, "", outside),
            Class::NotGenuine,
            "collateral.validity",
        );
    }
}

#[test]
fn phala_sgx_needs_an_allowance_for_its_state() {
    let Some(data) = Data::open() else { return };
    let quote = data.bytes("intel/phala/sgx_v3_quote.bin");
    let evidence = evidence(quote, Some(data.collateral_json(PHALA_SGX)));
    let now = "2025-06-19T12:00:00Z";
    let denial = denied(judge(&evidence, "", now), Class::Refused, "tcb.status");
    assert!(
        denial
            .found
            .starts_with("ConfigurationAndSWHardeningNeeded"),
        "{denial}"
    );
    assert_eq!(denial.expected, "UpToDate");

    let status = "ConfigurationAndSWHardeningNeeded";
    let claims = accepted(judge(&evidence, &allow(status), now));
    assert_eq!(
        claims.tcb_status,
        TcbStatus::ConfigurationAndSWHardeningNeeded
    );
    assert!(!claims.advisory_ids.is_empty());

    let other = allow("SWHardeningNeeded");
    denied(judge(&evidence, &other, now), Class::Refused, "tcb.status");
    let ended = allow(status).replace("2027-01-01T00:00:00Z", now);
    denied(judge(&evidence, &ended, now), Class::Refused, "tcb.status");

    let list = claims.advisory_ids.join("\", \"");
    let all = format!("{}advisories = [\"{list}\"]\n", allow(status));
    accepted(judge(&evidence, &all, now));
    let few = format!("{}advisories = [\"INTEL-SA-00001\"]\n", allow(status));
    let denial = denied(judge(&evidence, &few, now), Class::Refused, "tcb.status");
    assert!(denial.expected.contains("INTEL-SA-00001"), "{denial}");
}

#[test]
fn phala_outdated_has_no_matching_tcb_level() {
    let Some(data) = Data::open() else { return };
    let collateral = data.collateral_json("intel/phala/tdx_v4_quote_outdated_collateral.json");
    let quote = data.bytes("intel/phala/tdx_v4_quote_outdated.bin");
    let evidence = evidence(quote, Some(collateral));
    for now in ["2026-02-18T12:00:00Z", "2026-03-20T10:00:00Z"] {
        let denial = denied(judge(&evidence, "", now), Class::NotGenuine, "tcb.level");
        assert!(denial.found.contains("No matching TCB level"), "{denial}");
    }
    for outside in ["2026-02-18T09:00:00Z", "2026-03-20T12:00:00Z"] {
        denied(
            judge(&evidence, "", outside),
            Class::NotGenuine,
            "collateral.validity",
        );
    }
}

#[test]
fn flashbots_gcp_verifies_with_its_padding_within_its_window() {
    let Some(data) = Data::open() else { return };
    let quote = data.bytes("intel/flashbots/dcap-tdx-1766059550570652607");
    let evidence = evidence(quote, Some(data.collateral_yaml(GCP)));
    let parsed = evidence.unverified_quote().unwrap();
    assert_eq!(evidence.quote.len() - parsed.len(), 3065);
    let verified_at = casemate_attest::UnixTime::from_secs(1_769_509_141).to_string();
    let claims = accepted(judge(&evidence, "", &verified_at));
    assert_eq!(claims.tcb_status, TcbStatus::UpToDate);
    for outside in ["2026-01-27T08:00:00Z", "2026-02-26T10:00:00Z"] {
        denied(
            judge(&evidence, "", outside),
            Class::NotGenuine,
            "collateral.validity",
        );
    }

    // The padding is not part of what is identified; anything else in its place is refused.
    let mut bare = evidence.clone();
    bare.quote.truncate(parsed.len());
    accepted(judge(&bare, "", &verified_at));
    assert_eq!(bare.digest(), evidence.digest());
    let mut smuggled = evidence.clone();
    *smuggled.quote.last_mut().unwrap() = 1;
    let policy = policy_for(&evidence, "");
    let appraisal = appraise(
        &smuggled,
        parsed.report().report_data(),
        &policy,
        time(&verified_at),
    );
    denied(appraisal, Class::Malformed, "quote.structure");
}

#[test]
fn flashbots_azure_verifies_up_to_date() {
    let Some(data) = Data::open() else { return };
    let text = data.text("intel/flashbots/azure-tdx-with-ak-intermediates-1780922561.yaml");
    let quote = base64url(&yaml_field(&text, "tdx_quote_base64"));
    let collateral = data
        .collateral_yaml("intel/flashbots/azure-collateral-with-ak-intermediates-1780922561.yaml");
    let evidence = evidence(quote, Some(collateral));
    let claims = accepted(judge(&evidence, "", "2026-06-08T12:42:41Z"));
    assert_eq!(claims.tcb_status, TcbStatus::UpToDate);
    assert_eq!(claims.tcb_evaluation_data_number, 19);
}

#[test]
fn go_tdx_guest_version_5_verifies_up_to_date() {
    let Some(data) = Data::open() else { return };
    let quote = data.bytes("intel/go-tdx-guest/quote_v5_sample.dat");
    let evidence = evidence(quote, Some(data.collateral_yaml(AZURE)));
    assert_eq!(evidence.unverified_quote().unwrap().version(), 5);
    let claims = accepted(judge(&evidence, "", "2026-02-18T12:00:00Z"));
    assert_eq!(claims.tcb_status, TcbStatus::UpToDate);
}

#[test]
fn go_tdx_guest_cos_113_is_out_of_date_with_seven_advisories() {
    let Some(data) = Data::open() else { return };
    let evidence = evidence(data.bytes(COS_113), Some(data.collateral_yaml(GCP)));
    let now = "2026-02-18T12:00:00Z";
    denied(judge(&evidence, "", now), Class::Refused, "tcb.status");
    let claims = accepted(judge(&evidence, &allow("OutOfDate"), now));
    assert_eq!(claims.tcb_status, TcbStatus::OutOfDate);
    assert_eq!(claims.advisory_ids.len(), 7, "{:?}", claims.advisory_ids);
    // The collateral of that platform ends in February.
    let late = judge(&evidence, &allow("OutOfDate"), "2026-06-30T12:00:00Z");
    denied(late, Class::NotGenuine, "collateral.validity");
}

#[test]
fn go_tdx_guest_cos_113_signs_its_nonce_and_no_other() {
    let Some(data) = Data::open() else { return };
    let evidence = evidence(data.bytes(COS_113), Some(data.collateral_yaml(GCP)));
    let policy = policy_for(&evidence, &allow("OutOfDate"));
    let nonce: [u8; 64] = data
        .bytes("intel/go-tdx-guest/ccel/nonce.dat")
        .try_into()
        .unwrap();
    let now = time("2026-02-18T12:00:00Z");
    accepted(appraise(&evidence, &nonce.into(), &policy, now));
    for byte in 0..64 {
        let mut other = nonce;
        other[byte] ^= 0x80;
        let appraisal = appraise(&evidence, &other.into(), &policy, now);
        let denial = denied(appraisal, Class::NotGenuine, "report_data");
        assert_eq!(denial.found, hex::encode(nonce));
        assert_eq!(denial.expected, hex::encode(other));
    }
}

#[test]
fn go_tdx_guest_production_quote_is_refused_for_what_follows_it_and_for_its_age() {
    let Some(data) = Data::open() else { return };
    let quote = data.bytes("intel/go-tdx-guest/tdx_prod_quote_SPR_E4.dat");
    // "extra bytes(only for testing purpose)"
    let error = casemate_attest::Quote::parse(&quote).unwrap_err();
    assert_eq!(error.fault, casemate_attest::QuoteFault::TrailingData);
    let end = error.offset;
    let collateral = data.collateral_of(&Parts {
        tcb_info: "intel/go-tdx-guest/sample_tcbInfo_response",
        qe_identity: "intel/go-tdx-guest/sample_qeIdentity_response",
        root_crl: "intel/go-tdx-guest/rootcrl.der",
        pck_crl: "intel/go-tdx-guest/pckcrl",
        signing_chain: &[
            "intel/mobilecoin/tcb_signer.pem",
            "intel/go-tdx-guest/intel_root.pem",
        ],
    });
    let evidence = evidence(quote[..end].to_vec(), Some(collateral));
    for (now, class, claim) in [
        (
            "2023-06-18T08:00:00Z",
            Class::NotGenuine,
            "collateral.validity",
        ),
        (
            // Its processor is below the lowest level of that time.
            "2023-06-20T00:00:00Z",
            Class::NotGenuine,
            "tcb.level",
        ),
        (
            "2023-07-08T08:00:00Z",
            Class::NotGenuine,
            "collateral.validity",
        ),
    ] {
        denied(judge(&evidence, "", now), class, claim);
    }
}

#[test]
fn azure_td_without_sept_ve_disable_is_refused() {
    let Some(data) = Data::open() else { return };
    let quote = data.bytes("azure/trustee/az-tdx-vtpm/td-quote.bin");
    let evidence = evidence(quote, Some(data.collateral_yaml(GCP)));
    let appraisal = judge(&evidence, "", "2026-02-18T12:00:00Z");
    let skipped = |name| {
        let mut checks = appraisal.transcript.checks().iter();
        checks.any(|check| check.name == name && check.status == Status::Skipped)
    };
    assert!(skipped("tcb.status") && skipped("tcb.evaluation_data_number"));
    denied(appraisal, Class::Refused, "td_attributes.sept_ve_disable");
}

#[test]
fn trustee_debug_td_is_refused() {
    let Some(data) = Data::open() else { return };
    let quote = data.bytes("intel/trustee/tdx_quote_4.dat");
    let evidence = evidence(quote, Some(data.collateral_of(&FAMILY_50806F)));
    let any_state = allow("OutOfDate") + &allow("SWHardeningNeeded");
    let denial = denied(
        judge(&evidence, &any_state, "2026-03-20T00:00:00Z"),
        Class::Refused,
        "debug",
    );
    assert_eq!(denial.found, "td_attributes 0100001000000000");
}

#[test]
fn trustee_td_with_a_service_td_is_of_a_platform_below_every_level() {
    let Some(data) = Data::open() else { return };
    let quote = data.bytes("intel/trustee/tdx_quote_5.dat");
    let evidence = evidence(quote, Some(data.collateral_yaml(AZURE)));
    let quote = evidence.unverified_quote().unwrap();
    assert_ne!(quote.report().td().unwrap().mr_service_td, [0; 48]);
    let appraisal = judge(&evidence, &allow("OutOfDate"), "2026-02-18T12:00:00Z");
    denied(appraisal, Class::NotGenuine, "tcb.level");
}

#[test]
fn trustee_td_without_revocation_lists_is_not_genuine() {
    let Some(data) = Data::open() else { return };
    let quote = data.bytes("intel/trustee/tdx_quote_6.dat");
    let complete = data.collateral_of(&Parts {
        tcb_info: "intel/trustee/tcbInfo.json",
        qe_identity: "intel/trustee/enclaveIdentity.json",
        root_crl: ROOT_CRL_2025,
        pck_crl: "intel/automata/evm__forge-test__assets__1025__pck_crl.der",
        signing_chain: &[SIGNING_CHAIN],
    });
    let now = "2025-11-01T00:00:00Z";
    for part in 0..2 {
        let mut collateral = complete.clone();
        match part {
            0 => collateral.root_ca_crl.clear(),
            _ => collateral.pck_crl.clear(),
        }
        let evidence = evidence(quote.clone(), Some(collateral));
        denied(
            judge(&evidence, "", now),
            Class::NotGenuine,
            "collateral.present",
        );
    }
    // With lists of the same month from another capture, it is genuine.
    let claims = accepted(judge(
        &evidence(quote, Some(complete)),
        &allow("OutOfDate"),
        now,
    ));
    assert_eq!(claims.tcb_status, TcbStatus::OutOfDate);
}

/// Their chains are out of order (platform, root, CA), so they do not end at Intel's root.
#[test]
fn fortanix_quotes_do_not_end_at_intels_root() {
    let Some(data) = Data::open() else { return };
    for name in [
        "quote_pck_cert_chain.bin",
        "quote_pck_cert_chain_corrupted.bin",
    ] {
        let quote = data.bytes(&format!("intel/fortanix/{name}"));
        let evidence = evidence(quote, Some(data.collateral_json(PHALA_SGX)));
        let appraisal = judge(&evidence, "", "2025-06-19T12:00:00Z");
        let denial = denied(appraisal, Class::NotGenuine, "root_of_trust");
        assert!(denial.found.starts_with("the platform's chain"), "{denial}");
    }
}

#[test]
fn quotes_with_an_encrypted_platform_identity_need_its_certificate() {
    let Some(data) = Data::open() else { return };
    for path in [
        "intel/fortanix/quote_raw_tcb.bin",
        "intel/oasis/quote_v3_ecdsa_p256_eppid.bin",
    ] {
        let evidence = evidence(data.bytes(path), Some(data.collateral_json(PHALA_SGX)));
        let appraisal = judge(&evidence, "", "2025-06-19T12:00:00Z");
        denied(appraisal, Class::NotGenuine, "platform.certificate");
    }
}

#[test]
fn collateral_of_another_platform_vouches_for_nobody() {
    let Some(data) = Data::open() else { return };
    let cases: [(&str, Collateral, &str); 3] = [
        (
            "intel/fortanix/pcs_quote.bin",
            data.collateral_json(PHALA_SGX),
            "2025-06-19T12:00:00Z",
        ),
        (
            "ratls/intel-sgxsdk-cert.evidence-quote.bin",
            data.collateral_json(PHALA_SGX),
            "2025-06-19T12:00:00Z",
        ),
        (
            "intel/oasis/quote_v4_tdx_ecdsa_p256_trailing.bin",
            data.collateral_yaml(GCP),
            "2026-02-18T12:00:00Z",
        ),
    ];
    for (path, collateral, now) in cases {
        let evidence = evidence(data.bytes(path), Some(collateral));
        let denial = denied(judge(&evidence, "", now), Class::NotGenuine, "tcb.level");
        assert!(denial.found.contains("Fmspc mismatch"), "{path}: {denial}");
    }
}

#[test]
fn debug_enclaves_of_the_ra_tls_collection_are_refused() {
    let Some(data) = Data::open() else { return };
    let collateral = data.collateral_of(&FAMILY_00606A_SGX);
    for name in [
        "gramine-cert.evidence-quote.bin",
        "rats-tls-cert.evidence-quote.bin",
    ] {
        let quote = data.bytes(&format!("ratls/{name}"));
        let evidence = evidence(quote, Some(collateral.clone()));
        let appraisal = judge(&evidence, "", "2025-08-20T00:00:00Z");
        denied(appraisal, Class::Refused, "debug");
    }
    let quote =
        data.bytes("intel/automata/solana__automata-dcap-framework__tests__data__quote_sgx.bin");
    let evidence = evidence(quote, Some(data.collateral_json(PHALA_SGX)));
    denied(
        judge(&evidence, "", "2025-06-19T12:00:00Z"),
        Class::Refused,
        "debug",
    );
}

#[test]
fn automata_sgx_verifies_with_collateral_of_its_family() {
    let Some(data) = Data::open() else { return };
    let quote = data.hex("intel/automata/rust-crates__samples__quotev3.hex");
    let evidence = evidence(quote, Some(data.collateral_of(&FAMILY_00606A_SGX)));
    let now = "2025-08-20T00:00:00Z";
    let denial = denied(judge(&evidence, "", now), Class::Refused, "tcb.status");
    let status = denial.found.split(' ').next().unwrap().to_owned();
    let claims = accepted(judge(&evidence, &allow(&status), now));
    assert_eq!(claims.fmspc, [0x00, 0x60, 0x6a, 0, 0, 0]);
}

#[test]
fn automata_tdx_verifies_with_collateral_of_its_family() {
    let Some(data) = Data::open() else { return };
    let folder = "intel/automata/solana__automata-dcap-framework__tests__data__";
    let quote = data.bytes(&format!("{folder}quote_tdx.bin"));
    let collateral = data.collateral_of(&Parts {
        tcb_info: "intel/automata/solana__automata-dcap-framework__tests__data__tcb_info_v3_with_tdx_module.json",
        qe_identity: "intel/automata/solana__automata-dcap-framework__tests__data__qe_identity.json",
        root_crl: ROOT_CRL_2025,
        pck_crl: "intel/automata/solana__automata-dcap-framework__tests__data__pck_platform_crl.der",
        signing_chain: &[SIGNING_CHAIN],
    });
    let evidence = evidence(quote, Some(collateral));
    let claims = accepted(judge(
        &evidence,
        &allow("OutOfDate"),
        "2025-07-10T00:00:00Z",
    ));
    assert_eq!(claims.tcb_evaluation_data_number, 17);
}

#[test]
fn mobilecoin_collateral_was_never_valid_at_one_time() {
    let Some(data) = Data::open() else { return };
    // The revocation list ended in May 2023, the TCB info began in July.
    let collateral = data.collateral_of(&Parts {
        tcb_info: "intel/mobilecoin/fmspc_00906ED50000_2023_07_12.json",
        qe_identity: "intel/mobilecoin/qe_identity.json",
        root_crl: "intel/mobilecoin/root_crl.der",
        pck_crl: "intel/mobilecoin/processor_crl.der",
        signing_chain: &[
            "intel/mobilecoin/tcb_signer.pem",
            "intel/mobilecoin/root_ca.pem",
        ],
    });
    let evidence = evidence(
        data.bytes("intel/mobilecoin/hw_quote.dat"),
        Some(collateral),
    );
    for now in [
        "2023-05-10T00:00:00Z",
        "2023-06-15T00:00:00Z",
        "2023-07-20T00:00:00Z",
    ] {
        denied(
            judge(&evidence, "", now),
            Class::NotGenuine,
            "collateral.validity",
        );
    }
}

#[test]
fn dstack_quote_signs_its_report_data_and_needs_collateral() {
    let Some(data) = Data::open() else { return };
    let path = "intel/dstack/quote-report.json";
    let quote = hex::decode(data.json_field(path, "quote")).unwrap();
    let evidence = evidence(quote, None);
    let report_data = data.json_field(path, "report_data");
    let quote = evidence.unverified_quote().unwrap();
    assert_eq!(quote.report().report_data().to_string(), report_data);
    denied(
        judge(&evidence, "", "2026-02-18T12:00:00Z"),
        Class::NotGenuine,
        "collateral.present",
    );
}

#[test]
fn every_field_of_a_measurement_is_compared() {
    let Some(data) = Data::open() else { return };
    let quote = data.bytes("intel/phala/tdx_v4_quote.bin");
    let tdx = evidence(quote, Some(data.collateral_json(PHALA_TDX)));
    let quote = data.bytes("intel/phala/sgx_v3_quote.bin");
    let sgx = evidence(quote, Some(data.collateral_json(PHALA_SGX)));
    let more = allow("ConfigurationAndSWHardeningNeeded");
    for evidence in [tdx, sgx] {
        let quote = evidence.unverified_quote().unwrap();
        let entry = entry_for(quote.report());
        let tee = evidence.tee.name();
        let fields = entry.lines().skip(2);
        for line in fields {
            let (field, _) = line.split_once(" = ").unwrap();
            // One digit of one field.
            let digit = line.len() - 2;
            let other = if &line[digit..=digit] == "0" {
                "1"
            } else {
                "0"
            };
            let wrong = format!("{}{other}\"", &line[..digit]);
            let text = format!(
                "version = 1\ntee = [\"{tee}\"]\n[tcb]\nminimum_evaluation_data_number = 17\n{more}{}",
                entry.replace(line, &wrong)
            );
            let policy = casemate_attest::Policy::from_toml(&text).unwrap();
            let now = time("2025-06-19T12:00:00Z");
            let appraisal = appraise(&evidence, quote.report().report_data(), &policy, now);
            denied(appraisal, Class::Refused, &format!("measurement.{field}"));
        }
    }
}
