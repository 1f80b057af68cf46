//! Policy files for tests and demonstrations: the fake TEE's root, what was measured, and nothing more lenient than
//! production except the root.

use std::fmt::Write;

use casemate_attest::Report;
use casemate_attest::measure::Measurement;

/// What a policy file should say.
#[derive(Clone, Debug)]
pub struct PolicyFile {
    /// Version of the policy.
    pub version: u64,
    /// The fake TEE's root, see [`crate::fake_tee::FakeTee::root_spki_sha256`].
    pub development_root: Option<[u8; 32]>,
    /// Accepted measurements by name.
    pub measurements: Vec<(String, Measurement)>,
    /// Accepted models, as digests in hexadecimal, and their lowest version.
    pub models: Option<(Vec<String>, u64)>,
    /// Accepted adapters, as digests in hexadecimal; only beside models.
    pub adapters: Vec<String>,
    /// Accepted issuer of credentials, in hexadecimal, and service name.
    pub service: Option<(String, String)>,
    /// How old evidence of the service may become, in seconds.
    pub maximum_evidence_age: u64,
}

impl PolicyFile {
    /// Accepts one measurement under the given root.
    pub fn new(development_root: [u8; 32], measurement: Measurement) -> PolicyFile {
        PolicyFile {
            version: 1,
            development_root: Some(development_root),
            measurements: vec![("casemate-enclave".into(), measurement)],
            models: None,
            adapters: Vec::new(),
            service: None,
            maximum_evidence_age: 300,
        }
    }

    /// The same for users of a service: the model with this digest in hexadecimal, from this version on, served as `name`
    /// for the issuer with this key in hexadecimal.
    pub fn for_users(self, (digest, version): (&str, u64), issuer: &str, name: &str) -> PolicyFile {
        PolicyFile {
            models: Some((vec![digest.into()], version)),
            service: Some((issuer.into(), name.into())),
            ..self
        }
    }

    /// The file's text.
    ///
    /// # Panics
    /// When a measurement has a name that a policy may not have.
    pub fn to_toml(&self) -> String {
        let mut out = format!("version = {}\ntee = [\"tdx\"]\n", self.version);
        let mut line = |text: String| writeln!(out, "{text}").expect("a string takes all text");
        if let Some(root) = &self.development_root {
            line(format!(
                "dangerous_development_root = \"{}\"",
                hex::encode(root)
            ));
        }
        line("\n[tcb]\nminimum_evaluation_data_number = 17".into());
        for (name, measurement) in &self.measurements {
            let entry = measurement.to_policy_entry(name).expect("a plain name");
            line(format!("\n{}", entry.trim_end()));
        }
        if let Some((digests, minimum_version)) = &self.models {
            line(format!(
                "\n[model]\ndigests = {digests:?}\nminimum_version = {minimum_version}"
            ));
            if !self.adapters.is_empty() {
                line(format!("adapters = {:?}", self.adapters));
            }
        }
        if let Some((issuer, name)) = &self.service {
            line(format!(
                "\n[service]\nissuer = \"{issuer}\"\nname = \"{name}\""
            ));
            let age = self.maximum_evidence_age;
            line(format!("maximum_evidence_age_seconds = {age}"));
        }
        out
    }
}

/// The `[[measurement]]` entry of a policy that expects exactly what a quote reports, every field that can be named given;
/// one field a line, after the header and the name.
pub fn entry_for(report: &Report) -> String {
    let fields: Vec<(&str, &[u8])> = match report {
        Report::Td(report) => {
            let [rtmr0, rtmr1, rtmr2, rtmr3] = &report.rtmr;
            vec![
                ("mr_td", &report.mr_td),
                ("mr_config_id", &report.mr_config_id),
                ("rtmr0", rtmr0),
                ("rtmr1", rtmr1),
                ("rtmr2", rtmr2),
                ("rtmr3", rtmr3),
                ("mr_seam", &report.mr_seam),
                ("mr_owner", &report.mr_owner),
                ("mr_owner_config", &report.mr_owner_config),
                ("td_attributes", &report.td_attributes),
                ("xfam", &report.xfam),
            ]
        }
        Report::Sgx(report) => vec![
            ("mr_enclave", &report.mr_enclave),
            ("config_id", &report.config_id),
            ("attributes", &report.attributes),
        ],
    };
    let line = |(field, value)| format!("{field} = \"{}\"\n", hex::encode::<&[u8]>(value));
    let lines: String = fields.into_iter().map(line).collect();
    format!("[[measurement]]\nname = \"capture\"\n{lines}")
}
