//! Evidence that must be refused, each sample wrong in one way, with the class and the check that must refuse it.
//! Whoever accepts evidence can be run against all of them.

use casemate_attest::measure::Measurement;
use casemate_attest::{Class, Evidence, MAX_QUOTE, ReportData, TeeKind};
use dcap_qvl::TcbStatus;

use crate::fake_tee::{FakeTee, FakeTeeError, Forgery, Revoked, Sample};

/// One bad piece of evidence.
pub struct Hostile {
    /// What is wrong, in words.
    pub name: &'static str,
    /// The evidence.
    pub evidence: Evidence,
    /// Whose fault the denial must name.
    pub class: Class,
    /// The check that must fail.
    pub claim: &'static str,
}

/// Every sample, made by `tee` for a policy that accepts `tee`'s root, `measurement` and `report_data` at `now`.
pub fn samples(
    tee: &FakeTee,
    measurement: &Measurement,
    report_data: &ReportData,
    now: u64,
) -> Result<Vec<Hostile>, FakeTeeError> {
    let honest = Sample::new(measurement, report_data);
    let mut all = malformed(tee.quote_with(&honest, now)?);
    all.extend(strangers(tee, &honest, now)?);
    for (name, class, claim, spoil) in spoiled() {
        let mut sample = honest.clone();
        spoil(&mut sample);
        all.push(Hostile {
            name,
            evidence: tee.quote_with(&sample, now)?,
            class,
            claim,
        });
    }
    Ok(all)
}

/// Damage to the document itself.
fn malformed(honest: Evidence) -> Vec<Hostile> {
    let damage = |name, claim, change: &dyn Fn(&mut Evidence)| {
        let mut evidence = honest.clone();
        change(&mut evidence);
        Hostile {
            name,
            evidence,
            class: Class::Malformed,
            claim,
        }
    };
    let mut all = vec![
        damage("an empty quote", "quote.structure", &|e| e.quote.clear()),
        damage("a quote cut short", "quote.structure", &|e| {
            e.quote.pop();
        }),
        damage("a quote of an unknown version", "quote.structure", &|e| {
            e.quote[0] = 6
        }),
        damage(
            "a quote for an unknown kind of TEE",
            "quote.structure",
            &|e| e.quote[4] = 0x82,
        ),
        damage(
            "an attestation key of an unknown kind",
            "quote.structure",
            &|e| e.quote[2] = 3,
        ),
        damage(
            "a length that reaches beyond the quote",
            "quote.structure",
            &|e| {
                e.quote[48 + 584 + 2] = 0x7f;
            },
        ),
        damage("a TDX quote labelled SGX", "quote.structure", &|e| {
            e.tee = TeeKind::Sgx
        }),
        damage("a quote beyond the size limit", "evidence.size", &|e| {
            e.quote.resize(MAX_QUOTE + 1, 0);
        }),
        damage("TCB info that is no JSON", "collateral.structure", &|e| {
            collateral(e).tcb_info.truncate(40);
        }),
        damage(
            "a certificate chain that is no PEM",
            "collateral.structure",
            &|e| {
                collateral(e).tcb_info_issuer_chain = "-----BEGIN CERTIFICATE-----\n?".into();
            },
        ),
    ];
    let mut stripped = honest.clone();
    stripped.collateral = None;
    let mut unlisted = honest.clone();
    collateral(&mut unlisted).pck_crl.clear();
    all.extend(
        [
            (stripped, "no collateral"),
            (unlisted, "no revocation list"),
        ]
        .map(|(evidence, name)| Hostile {
            name,
            evidence,
            class: Class::NotGenuine,
            claim: "collateral.present",
        }),
    );
    all
}

/// Evidence in which another installation has a part.
fn strangers(tee: &FakeTee, honest: &Sample, now: u64) -> Result<Vec<Hostile>, FakeTeeError> {
    let stranger = FakeTee::ephemeral(now)?;
    let ours = tee.quote_with(honest, now)?;
    let theirs = stranger.quote_with(honest, now)?;
    let mixed = |change: &dyn Fn(&mut Evidence, &mut Evidence)| {
        let (mut ours, mut theirs) = (ours.clone(), theirs.clone());
        change(&mut ours, &mut theirs);
        ours
    };
    let sample = |name, evidence, claim| Hostile {
        name,
        evidence,
        class: Class::NotGenuine,
        claim,
    };
    Ok(vec![
        sample(
            "a quote under another root",
            theirs.clone(),
            "root_of_trust",
        ),
        sample(
            "a quote under another root with our collateral",
            mixed(&|ours, theirs| ours.quote = theirs.quote.clone()),
            "root_of_trust",
        ),
        sample(
            "our quote with collateral under another root",
            mixed(&|ours, theirs| ours.collateral = theirs.collateral.clone()),
            "root_of_trust",
        ),
        sample(
            "TCB info of another root behind our certificates",
            mixed(&|ours, theirs| {
                collateral(ours).tcb_info = collateral(theirs).tcb_info.clone();
                collateral(ours).tcb_info_signature = collateral(theirs).tcb_info_signature.clone();
            }),
            "collateral.signatures",
        ),
        sample(
            "a revocation list of another root",
            mixed(&|ours, theirs| {
                collateral(ours).root_ca_crl = collateral(theirs).root_ca_crl.clone();
            }),
            "certificates",
        ),
        sample(
            "a PCK revocation list of another root",
            mixed(&|ours, theirs| collateral(ours).pck_crl = collateral(theirs).pck_crl.clone()),
            "certificates",
        ),
    ])
}

type Spoil = fn(&mut Sample);

/// The honest sample with one thing changed before or after signing.
fn spoiled() -> Vec<(&'static str, Class, &'static str, Spoil)> {
    use Class::{NotGenuine, Refused};
    const DAY: i64 = 24 * 3600;
    vec![
        (
            "a measurement changed after signing",
            NotGenuine,
            "quote.signature",
            |s| {
                s.forgery = Some(Forgery::Body);
            },
        ),
        (
            "a spoiled quote signature",
            NotGenuine,
            "quote.signature",
            |s| {
                s.forgery = Some(Forgery::QuoteSignature);
            },
        ),
        (
            "an attestation key that nobody certified",
            NotGenuine,
            "quoting_enclave",
            |s| {
                s.forgery = Some(Forgery::AttestationKey);
            },
        ),
        (
            "a spoiled quoting enclave signature",
            NotGenuine,
            "quoting_enclave",
            |s| {
                s.forgery = Some(Forgery::QeReportSignature);
            },
        ),
        (
            "TCB info changed after signing",
            NotGenuine,
            "collateral.signatures",
            |s| {
                s.forgery = Some(Forgery::TcbInfo);
            },
        ),
        (
            "QE identity changed after signing",
            NotGenuine,
            "collateral.signatures",
            |s| {
                s.forgery = Some(Forgery::QeIdentity);
            },
        ),
        (
            "expired collateral",
            NotGenuine,
            "collateral.validity",
            |s| {
                s.endorsements.shift_seconds = -31 * DAY;
            },
        ),
        (
            "collateral from the future",
            NotGenuine,
            "collateral.validity",
            |s| {
                s.endorsements.shift_seconds = DAY;
            },
        ),
        ("a revoked platform", NotGenuine, "certificates", |s| {
            s.endorsements.revoked.push(Revoked::Pck);
        }),
        ("a revoked platform CA", NotGenuine, "certificates", |s| {
            s.endorsements.revoked.push(Revoked::PlatformCa);
        }),
        (
            "a revoked signer of TCB info",
            NotGenuine,
            "certificates",
            |s| {
                s.endorsements.revoked.push(Revoked::TcbSigning);
            },
        ),
        (
            "TCB info of another platform",
            NotGenuine,
            "tcb.level",
            |s| {
                s.endorsements.fmspc = Some([1; 6]);
            },
        ),
        (
            "a platform below every TCB level",
            NotGenuine,
            "tcb.level",
            |s| {
                s.platform.cpu_svn[0] = 0;
            },
        ),
        (
            "a provisioning enclave below every TCB level",
            NotGenuine,
            "tcb.level",
            |s| {
                s.platform.pce_svn = 1;
            },
        ),
        (
            "a TDX module that TCB info does not know",
            NotGenuine,
            "tcb.level",
            |s| {
                s.body.tee_tcb_svn[1] = 9;
            },
        ),
        (
            "a TDX module of another signer",
            NotGenuine,
            "tcb.level",
            |s| {
                s.body.mr_signer_seam = [1; 48];
            },
        ),
        ("a revoked TCB", NotGenuine, "tcb.level", |s| {
            s.endorsements.tcb_status = TcbStatus::Revoked;
        }),
        ("a revoked TDX module", NotGenuine, "tcb.level", |s| {
            s.endorsements.module_status = TcbStatus::Revoked;
        }),
        ("a revoked quoting enclave", NotGenuine, "tcb.level", |s| {
            s.endorsements.qe_status = TcbStatus::Revoked;
        }),
        ("other report data", NotGenuine, "report_data", |s| {
            s.body.report_data[63] ^= 1
        }),
        ("a TD under debug", Refused, "debug", |s| {
            s.body.td_attributes[0] |= 1
        }),
        ("a TD under profiling", Refused, "debug", |s| {
            s.body.td_attributes[0] |= 1 << 4
        }),
        (
            "a TD with a reserved attribute",
            Refused,
            "td_attributes.reserved",
            |s| {
                s.body.td_attributes[4] |= 1;
            },
        ),
        (
            "a TD without SEPT_VE_DISABLE",
            Refused,
            "td_attributes.sept_ve_disable",
            |s| {
                s.body.td_attributes[3] &= !0x10;
            },
        ),
        (
            "a migratable TD",
            Refused,
            "td_attributes.migratable",
            |s| {
                s.body.td_attributes[3] |= 0x20;
            },
        ),
        ("a TD with service TDs", Refused, "service_td", |s| {
            s.body.td_attributes[2] |= 2
        }),
        (
            "a TD with an unknown extended feature",
            Refused,
            "xfam",
            |s| s.body.xfam[7] |= 0x80,
        ),
        ("an out-of-date platform", Refused, "tcb.status", |s| {
            s.endorsements.tcb_status = TcbStatus::OutOfDate;
        }),
        (
            "a platform that needs software hardening",
            Refused,
            "tcb.status",
            |s| {
                s.endorsements.tcb_status = TcbStatus::SWHardeningNeeded;
                s.endorsements.advisory_ids.push("INTEL-SA-00000".into());
            },
        ),
        (
            "a platform that needs configuration",
            Refused,
            "tcb.status",
            |s| {
                s.endorsements.tcb_status = TcbStatus::ConfigurationNeeded;
            },
        ),
        ("an out-of-date TDX module", Refused, "tcb.status", |s| {
            s.endorsements.module_status = TcbStatus::OutOfDate;
        }),
        (
            "an out-of-date quoting enclave",
            Refused,
            "tcb.status",
            |s| {
                s.endorsements.qe_status = TcbStatus::OutOfDate;
            },
        ),
        (
            "an old TCB evaluation",
            Refused,
            "tcb.evaluation_data_number",
            |s| {
                s.endorsements.tcb_evaluation_data_number = 16;
            },
        ),
        ("another executable", Refused, "measurement.mr_td", |s| {
            s.body.mr_td[0] ^= 1
        }),
        (
            "another configuration",
            Refused,
            "measurement.mr_config_id",
            |s| {
                s.body.mr_config_id[0] ^= 1;
            },
        ),
        ("another RTMR 0", Refused, "measurement.rtmr0", |s| {
            s.body.rtmr[0][0] ^= 1
        }),
        ("other arguments", Refused, "measurement.rtmr1", |s| {
            s.body.rtmr[1][0] ^= 1
        }),
        ("another environment", Refused, "measurement.rtmr2", |s| {
            s.body.rtmr[2][0] ^= 1
        }),
        ("another RTMR 3", Refused, "measurement.rtmr3", |s| {
            s.body.rtmr[3][0] ^= 1
        }),
    ]
}

fn collateral(evidence: &mut Evidence) -> &mut casemate_attest::Collateral {
    evidence
        .collateral
        .as_mut()
        .expect("samples begin with collateral")
}
