//! The decision: evidence, expected report data, policy and time in; an [`Appraised`] or a [`Denial`] out, with the
//! transcript of every check. Reading and signature checks are other modules'; this one orders them and applies the
//! policy.
//!
//! A denial's class says how far the evidence got. *Malformed*: it could not be read. *Not genuine*: nothing shows
//! that a TEE which Intel vouches for made it over the expected report data; so a revoked platform, or one whose
//! security versions are below every level Intel lists, is not genuine. *Refused*: it is genuine, and the policy or
//! a rule that no policy relaxes (no debugging, SEPT_VE_DISABLE, no migration) refuses what it says.

use std::fmt;

use serde::Serialize;

use crate::collateral::{Collateral, Statements};
use crate::denial::Denial;
use crate::evidence::{Evidence, TeeKind};
use crate::genuine::{self, INTEL_ROOTS, Platform, Vouched};
use crate::policy::{Policy, TcbAllowance};
use crate::quote::{Quote, Report, SgxReport, TdReport};
use crate::reference::Field;
use crate::report_data::ReportData;
use crate::tcb_status::TcbStatus;
use crate::td_attributes::{TdAttributes, impossible_xfam};
use crate::text::hex_bytes;
use crate::transcript::{Status, Transcript};
use crate::unix_time::UnixTime;

/// What [`appraise`] found: how it went and what came of it.
#[derive(Clone, Debug)]
pub struct Appraisal {
    /// Every check in order.
    pub transcript: Transcript,
    /// The proof, or the first reason against it.
    pub outcome: Result<Appraised, Denial>,
}

/// Proof that evidence was appraised and accepted. Only [`appraise`] makes one.
#[derive(Clone, Debug)]
pub enum Appraised {
    /// A genuine TEE.
    Genuine(Verified),
    /// Evidence under the development root that the policy names: **not a TEE**.
    Development(VerifiedDevelopment),
}

/// Proof that evidence comes from a genuine TEE and that the policy accepts it.
#[derive(Clone, Debug)]
pub struct Verified(Accepted);

/// Proof that evidence under a development root was accepted. What made it is not a TEE.
#[derive(Clone, Debug)]
pub struct VerifiedDevelopment(Accepted);

#[derive(Clone, Debug)]
struct Accepted {
    claims: Claims,
    evidence_digest: [u8; 32],
}

/// What accepted evidence says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Claims {
    /// The kind of TEE.
    pub tee: TeeKind,
    /// Where the chain of signatures ends.
    pub root_of_trust: RootOfTrust,
    /// Intel's verdict on the platform.
    pub tcb_status: TcbStatus,
    /// Advisories that apply to the platform.
    pub advisory_ids: Vec<String>,
    /// The number of Intel's TCB evaluation behind that verdict.
    pub tcb_evaluation_data_number: u32,
    /// The platform's family and configuration.
    #[serde(with = "hex_bytes")]
    pub fmspc: [u8; 6],
    /// When the first part of the collateral ceases to be valid.
    pub collateral_valid_until: UnixTime,
    /// The name of the policy's `[[measurement]]` that matched.
    pub measurement_name: String,
    /// What the TEE says about itself.
    pub report: Report,
}

/// Where the chain of signatures over evidence ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RootOfTrust {
    /// Not known: the evidence did not get that far.
    #[default]
    Undetermined,
    /// Intel's SGX Root CA.
    Intel,
    /// A development root, by the SHA-256 of its public key. **Not a TEE.**
    Development([u8; 32]),
}

/// Every check in its order and, where it is one kind's alone, that kind: so that checks which were not reached can be
/// shown as skipped.
const CHECKS: [(&str, Option<TeeKind>); 22] = [
    ("evidence.size", None),
    ("quote.structure", None),
    ("collateral.present", None),
    ("collateral.structure", None),
    ("root_of_trust", None),
    ("collateral.validity", None),
    (genuine::CHECKS[0].0, None),
    (genuine::CHECKS[1].0, None),
    (genuine::CHECKS[2].0, None),
    (genuine::CHECKS[3].0, None),
    (genuine::CHECKS[4].0, None),
    ("report_data", None),
    ("tee", None),
    ("debug", None),
    ("td_attributes.reserved", Some(TeeKind::Tdx)),
    ("td_attributes.sept_ve_disable", Some(TeeKind::Tdx)),
    ("td_attributes.migratable", Some(TeeKind::Tdx)),
    ("xfam", Some(TeeKind::Tdx)),
    ("service_td", Some(TeeKind::Tdx)),
    ("tcb.status", None),
    ("tcb.evaluation_data_number", None),
    ("measurement", None),
];

/// Decides whether `evidence` comes from a genuine TEE that signed `expected` and that `policy` accepts at `now`.
///
/// Pure: the same arguments give the same answer, always.
pub fn appraise(
    evidence: &Evidence,
    expected: &ReportData,
    policy: &Policy,
    now: UnixTime,
) -> Appraisal {
    let mut transcript = Transcript::new();
    let outcome = decide(evidence, expected, policy, now, &mut transcript);
    if let Err(denial) = &outcome {
        for (name, only) in CHECKS {
            let mut made = transcript.checks().iter();
            // A measurement's checks are one per field.
            let made =
                made.any(|check| check.name.split('.').next() == Some(name) || check.name == name);
            if !made && only.is_none_or(|kind| kind == evidence.tee) {
                transcript.skip(name, "", format!("not reached: {} failed", denial.claim));
            }
        }
    }
    Appraisal {
        transcript,
        outcome,
    }
}

fn decide(
    evidence: &Evidence,
    expected: &ReportData,
    policy: &Policy,
    now: UnixTime,
    transcript: &mut Transcript,
) -> Result<Appraised, Denial> {
    // Each of these ends the appraisal: what follows would speak about bytes that mean nothing.
    let quote = read_quote(evidence).map_err(|denial| record(transcript, denial))?;
    transcript.pass("evidence.size", "within the limits", "within the limits");
    let shape = format!("version {}, {}", quote.version(), quote.tee());
    transcript.pass("quote.structure", shape, "a quote of version 3, 4 or 5");

    let (collateral, statements) =
        read_collateral(evidence, &quote).map_err(|denial| record(transcript, denial))?;
    transcript.pass("collateral.present", "with both CRLs", "with both CRLs");
    transcript.pass("collateral.structure", "version 3", "version 3");

    let root = choose_root(&statements, policy, transcript)
        .map_err(|denial| record(transcript, denial))?;
    statements
        .check_validity(now)
        .map_err(|denial| record(transcript, denial))?;
    let until = statements.valid_until();
    transcript.pass(
        "collateral.validity",
        format!("until {until}"),
        format!("valid at {now}"),
    );

    let quote_bytes = &evidence.quote[..quote.len()];
    let vouched = genuine::verify(quote_bytes, collateral, now, root, transcript)?;

    let report = quote.into_report();
    check_report_data(&report, expected).map_err(|denial| record(transcript, denial))?;
    transcript.pass(
        "report_data",
        expected.to_string(),
        "what this verifier asked for",
    );

    // From here on the evidence is genuine. All checks are made, so that one run shows everything the policy
    // refuses; the first refusal is the denial.
    let mut judge = Judge {
        transcript,
        first: None,
    };
    judge.tee(report_kind(&report), policy);
    match &report {
        Report::Td(report) => judge.td(report, policy),
        Report::Sgx(report) => judge.sgx(report),
    }
    let platform = match vouched {
        Vouched::Platform(platform) => Some(platform),
        Vouched::ForbiddenAttributes => None,
    };
    judge.tcb(platform.as_ref(), policy, now);
    let measurement_name = judge.measurement(&report, policy);

    let first = judge.first;
    match (first, platform, measurement_name) {
        (None, Some(platform), Some(measurement_name)) => {
            let root_of_trust = transcript.root_of_trust();
            let accepted = Accepted {
                claims: Claims {
                    tee: report_kind(&report),
                    root_of_trust,
                    tcb_status: platform.tcb_status,
                    advisory_ids: platform.advisory_ids,
                    tcb_evaluation_data_number: platform.tcb_evaluation_data_number,
                    fmspc: platform.fmspc,
                    collateral_valid_until: until,
                    measurement_name,
                    report,
                },
                evidence_digest: evidence.digest(),
            };
            match root_of_trust {
                RootOfTrust::Intel => Ok(Appraised::Genuine(Verified(accepted))),
                RootOfTrust::Development(_) => {
                    Ok(Appraised::Development(VerifiedDevelopment(accepted)))
                }
                RootOfTrust::Undetermined => Err(unexplained()),
            }
        }
        (Some(denial), _, _) => Err(denial),
        // dcap-qvl refused an attribute that no check of ours refuses: the two disagree, so nobody is trusted.
        (None, _, _) => Err(record(transcript, unexplained())),
    }
}

fn unexplained() -> Denial {
    Denial::not_genuine(
        "verification",
        "a refusal by the quote verifier that no check explains",
        "a quote that every check accepts",
        "report this as a defect of Casemate, with the quote",
    )
}

fn record(transcript: &mut Transcript, denial: Denial) -> Denial {
    transcript.fail(&denial);
    denial
}

fn report_kind(report: &Report) -> TeeKind {
    match report {
        Report::Td(_) => TeeKind::Tdx,
        Report::Sgx(_) => TeeKind::Sgx,
    }
}

fn read_quote(evidence: &Evidence) -> Result<Quote, Denial> {
    evidence.check_limits()?;
    let quote = Quote::parse(&evidence.quote)?;
    if quote.tee() != evidence.tee {
        return Err(Denial::malformed(
            "quote.structure",
            format!("a quote of {}", quote.tee()),
            format!("a quote of {}, as the evidence says", evidence.tee),
            "ask whoever produced this evidence to name the right kind of TEE",
        ));
    }
    Ok(quote)
}

fn read_collateral<'a>(
    evidence: &'a Evidence,
    quote: &Quote,
) -> Result<(&'a Collateral, Statements), Denial> {
    let absent = |found: String| {
        Denial::not_genuine(
            "collateral.present",
            found,
            "TCB info, QE identity and both revocation lists",
            "fetch the collateral for this quote from Intel's provisioning service",
        )
    };
    let collateral = evidence
        .collateral
        .as_ref()
        .ok_or_else(|| absent("no collateral".to_owned()))?;
    if let Some(what) = collateral.missing_crl() {
        return Err(absent(format!("collateral without {what}")));
    }
    let statements = collateral.read(quote.tee(), quote.pck_chain())?;
    Ok((collateral, statements))
}

/// Intel's root, unless the TCB info's chain carries the development root that the policy names.
fn choose_root<'a>(
    statements: &'a Statements,
    policy: &Policy,
    transcript: &mut Transcript,
) -> Result<Option<&'a [u8]>, Denial> {
    let development = policy
        .dangerous_development_root()
        .and_then(|hash| Some((*hash, statements.find_root(hash)?)));
    let (root, certificates, der) = match development {
        Some((hash, root)) => {
            let certificates = vec![root.sha256()];
            (
                RootOfTrust::Development(hash),
                certificates,
                Some(&root.der[..]),
            )
        }
        None => (RootOfTrust::Intel, INTEL_ROOTS.to_vec(), None),
    };
    if let Some((what, foreign)) = statements.foreign_root(&certificates) {
        return Err(Denial::not_genuine(
            "root_of_trust",
            format!("{what} ends at the certificate {}", hex::encode(foreign)),
            format!("{root}, certificate {}", hex::encode(certificates[0])),
            "do not trust this machine; only for development, name the root in dangerous_development_root",
        ));
    }
    transcript.set_root_of_trust(root);
    transcript.pass("root_of_trust", root.to_string(), root.to_string());
    Ok(der)
}

fn check_report_data(report: &Report, expected: &ReportData) -> Result<(), Denial> {
    if report.report_data() != expected {
        return Err(Denial::not_genuine(
            "report_data",
            report.report_data().to_string(),
            expected.to_string(),
            "ask for fresh evidence over this nonce and key; if it stays so, somebody replays or relays evidence",
        ));
    }
    Ok(())
}

/// Applies the policy to a genuine report.
struct Judge<'a> {
    transcript: &'a mut Transcript,
    first: Option<Denial>,
}

impl Judge<'_> {
    fn deny(&mut self, denial: Denial) {
        self.transcript.fail(&denial);
        self.first.get_or_insert(denial);
    }

    /// Passes or fails a check by whether it holds.
    fn check(
        &mut self,
        claim: &'static str,
        holds: bool,
        found: String,
        expected: impl Into<String>,
        remedy: &str,
    ) {
        if holds {
            self.transcript.pass(claim, found, expected);
        } else {
            self.deny(Denial::refused(claim, found, expected, remedy));
        }
    }

    fn tee(&mut self, kind: TeeKind, policy: &Policy) {
        let accepted: Vec<&str> = policy.tee().iter().map(|kind| kind.name()).collect();
        self.check(
            "tee",
            policy.tee().contains(&kind),
            kind.name().to_owned(),
            accepted.join(" or "),
            "use a machine of a kind that the policy lists, or list this one",
        );
    }

    fn td(&mut self, report: &TdReport, policy: &Policy) {
        let attributes = TdAttributes::new(report.td_attributes);
        let shown = || format!("td_attributes {}", hex::encode(report.td_attributes));
        self.check(
            "debug",
            !attributes.under_debug(),
            shown(),
            "no bit of the TUD group (0 to 7) set",
            "start the TD without debugging and profiling; the host can read this one",
        );
        self.check(
            "td_attributes.reserved",
            attributes.reserved() == 0,
            shown(),
            "no reserved bit set",
            "start the TD with attributes that this verifier knows",
        );
        self.check(
            "td_attributes.sept_ve_disable",
            attributes.sept_ve_disable(),
            shown(),
            "SEPT_VE_DISABLE (bit 28) set",
            "start the TD with SEPT_VE_DISABLE, so that the host cannot inject faults into it",
        );
        self.check(
            "td_attributes.migratable",
            !attributes.migratable(),
            shown(),
            "MIGRATABLE (bit 29) not set",
            "start the TD as not migratable",
        );
        self.check(
            "xfam",
            impossible_xfam(report.xfam) == 0,
            hex::encode(report.xfam),
            "x87 and SSE, and nothing that this verifier does not know",
            "start the TD with extended features that this verifier knows",
        );
        let listed = |hash: &[u8; 48]| policy.service_tds().contains(hash);
        let bound = [report.mr_service_td, report.current_service_td];
        let holds = if attributes.servtd_ext() {
            // With SERVTD_EXT the first hash is of the TDs bound at creation, the second of those bound now.
            listed(&bound[0]) && (bound[1] == [0; 48] || listed(&bound[1]))
        } else {
            bound.iter().all(|hash| *hash == [0; 48] || listed(hash))
        };
        self.check(
            "service_td",
            holds,
            if bound == [[0; 48]; 2] {
                format!("none, SERVTD_EXT {}", attributes.servtd_ext())
            } else {
                format!("{} (now {})", hex::encode(bound[0]), hex::encode(bound[1]))
            },
            "none, or one that tdx.service_td lists",
            "start the TD without service TDs, or list the measurement of those you trust",
        );
    }

    fn sgx(&mut self, report: &SgxReport) {
        self.check(
            "debug",
            report.attributes[0] & SGX_DEBUG == 0,
            format!("attributes {}", hex::encode(report.attributes)),
            "DEBUG (bit 1) not set",
            "start the enclave without debugging; the host can read this one",
        );
    }

    fn tcb(&mut self, platform: Option<&Platform>, policy: &Policy, now: UnixTime) {
        let Some(platform) = platform else {
            let why = "the attributes are refused whatever the platform's state";
            self.transcript.skip("tcb.status", "", why);
            self.transcript.skip("tcb.evaluation_data_number", "", why);
            return;
        };
        let found = if platform.advisory_ids.is_empty() {
            platform.tcb_status.to_string()
        } else {
            format!(
                "{} ({})",
                platform.tcb_status,
                platform.advisory_ids.join(", ")
            )
        };
        match tcb_verdict(platform, policy.tcb_allowances(), now) {
            Ok(expected) => self.transcript.pass("tcb.status", found, expected),
            Err(expected) => self.deny(Denial::refused(
                "tcb.status",
                found,
                expected,
                "update the platform's firmware and microcode, or accept its state until a date by [[tcb.allow]]",
            )),
        }
        let number = platform.tcb_evaluation_data_number;
        let minimum = policy.minimum_tcb_evaluation_data_number();
        self.check(
            "tcb.evaluation_data_number",
            number >= minimum,
            number.to_string(),
            format!("at least {minimum}"),
            "fetch collateral of Intel's newest TCB evaluation",
        );
    }

    /// Finds the entry that matches as a whole; otherwise denies by the nearest one.
    fn measurement(&mut self, report: &Report, policy: &Policy) -> Option<String> {
        let failures =
            |fields: &[Field]| fields.iter().filter(|f| f.status == Status::Failed).count();
        let nearest = policy
            .measurements()
            .iter()
            .filter_map(|entry| Some((entry, entry.compare(report)?)))
            .min_by_key(|(_, fields)| failures(fields));
        let Some((entry, fields)) = nearest else {
            self.deny(Denial::refused(
                "measurement",
                format!("a report of {}", report_kind(report)),
                "a report of a kind that a [[measurement]] is about",
                "add a [[measurement]] for this kind of TEE",
            ));
            return None;
        };
        let matches = failures(&fields) == 0;
        for Field {
            claim,
            status,
            found,
            expected,
        } in fields
        {
            match status {
                Status::Passed => self.transcript.pass(claim, found, expected),
                Status::Skipped => self.transcript.skip(claim, found, expected),
                Status::Failed => self.deny(Denial::refused(
                    claim,
                    found,
                    format!("{expected} (measurement {:?})", entry.name()),
                    "check what was started; if it is what you want, add the [[measurement]] that `casemate measure` gives",
                )),
            }
        }
        if !matches {
            return None;
        }
        self.transcript
            .pass("measurement", entry.name(), "one entry matches as a whole");
        Some(entry.name().to_owned())
    }
}

/// DEBUG in an enclave's attributes.
const SGX_DEBUG: u8 = 1 << 1;

/// What makes the platform's state acceptable, or what would.
fn tcb_verdict(
    platform: &Platform,
    allowances: &[TcbAllowance],
    now: UnixTime,
) -> Result<String, String> {
    if platform.tcb_status == TcbStatus::UpToDate {
        return Ok("UpToDate".to_owned());
    }
    let mut expected = vec!["UpToDate".to_owned()];
    for allowance in allowances {
        let TcbAllowance {
            status,
            until,
            advisories,
        } = allowance;
        let only = match advisories {
            None => String::new(),
            Some(list) => {
                let names: Vec<&str> = list.iter().map(String::as_str).collect();
                format!(" with no advisories but [{}]", names.join(", "))
            }
        };
        let text = format!("{status} until {until}{only}");
        let covered = advisories.as_ref().is_none_or(|list| {
            platform
                .advisory_ids
                .iter()
                .all(|advisory| list.contains(advisory))
        });
        if *status == platform.tcb_status && now < *until && covered {
            return Ok(text);
        }
        expected.push(text);
    }
    Err(expected.join(" or "))
}

impl Appraised {
    /// What the evidence says.
    pub fn claims(&self) -> &Claims {
        &self.accepted().claims
    }

    /// What identifies the evidence: [`Evidence::digest`].
    pub fn evidence_digest(&self) -> &[u8; 32] {
        &self.accepted().evidence_digest
    }

    /// Whether this is evidence under a development root, that is, **not from a TEE**.
    pub fn is_development(&self) -> bool {
        matches!(self, Appraised::Development(_))
    }

    fn accepted(&self) -> &Accepted {
        match self {
            Appraised::Genuine(Verified(accepted)) => accepted,
            Appraised::Development(VerifiedDevelopment(accepted)) => accepted,
        }
    }
}

impl Verified {
    /// What the evidence says.
    pub fn claims(&self) -> &Claims {
        &self.0.claims
    }

    /// What identifies the evidence: [`Evidence::digest`].
    pub fn evidence_digest(&self) -> &[u8; 32] {
        &self.0.evidence_digest
    }
}

impl VerifiedDevelopment {
    /// What the evidence says.
    pub fn claims(&self) -> &Claims {
        &self.0.claims
    }

    /// What identifies the evidence: [`Evidence::digest`].
    pub fn evidence_digest(&self) -> &[u8; 32] {
        &self.0.evidence_digest
    }
}

impl fmt::Display for Appraised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let claims = self.claims();
        match self {
            Appraised::Genuine(_) => write!(f, "a genuine {}", claims.tee)?,
            Appraised::Development(_) => {
                write!(
                    f,
                    "NOT A TEE: development evidence in the form of {}",
                    claims.tee
                )?;
            }
        }
        write!(
            f,
            ", measurement {:?}, {}",
            claims.measurement_name, claims.tcb_status
        )
    }
}

impl Claims {
    /// The TD report, for TDX.
    pub fn td(&self) -> Option<&TdReport> {
        self.report.td()
    }

    /// The enclave report, for SGX.
    pub fn sgx(&self) -> Option<&SgxReport> {
        self.report.sgx()
    }
}

impl RootOfTrust {
    /// Whether evidence under this root can be from a TEE.
    pub fn is_tee(self) -> bool {
        self == RootOfTrust::Intel
    }
}

impl fmt::Display for RootOfTrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RootOfTrust::Undetermined => f.write_str("undetermined"),
            RootOfTrust::Intel => f.write_str("Intel SGX Root CA"),
            RootOfTrust::Development(hash) => {
                write!(f, "development root {}: not a TEE", hex::encode(hash))
            }
        }
    }
}

impl Serialize for RootOfTrust {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
