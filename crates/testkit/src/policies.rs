//! Policy files for tests and demonstrations: the fake TEE's root, what was measured, and nothing more lenient than
//! production except the root.

use std::fmt::Write;

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
    /// Accepted issuer of credentials, in hexadecimal, and service name.
    pub service: Option<(String, String)>,
}

impl PolicyFile {
    /// Accepts one measurement under the given root.
    pub fn new(development_root: [u8; 32], measurement: Measurement) -> PolicyFile {
        PolicyFile {
            version: 1,
            development_root: Some(development_root),
            measurements: vec![("casemate-enclave".into(), measurement)],
            models: None,
            service: None,
        }
    }

    /// The file's text.
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
            line(format!("\n[[measurement]]\nname = \"{name}\""));
            line(format!("mr_td = \"{}\"", hex::encode(measurement.mr_td)));
            line(format!(
                "mr_config_id = \"{}\"",
                hex::encode(measurement.mr_config_id)
            ));
            for (register, value) in measurement.rtmr.iter().enumerate() {
                line(format!("rtmr{register} = \"{}\"", hex::encode(value)));
            }
        }
        if let Some((digests, minimum_version)) = &self.models {
            line(format!(
                "\n[model]\ndigests = {digests:?}\nminimum_version = {minimum_version}"
            ));
        }
        if let Some((issuer, name)) = &self.service {
            line(format!(
                "\n[service]\nissuer = \"{issuer}\"\nname = \"{name}\""
            ));
            line("maximum_evidence_age_seconds = 300".into());
        }
        out
    }
}
