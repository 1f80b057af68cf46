//! Where attacks take place: a deployment that serves, a second installation that is the attacker's, and the steps that
//! several attacks share.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::{By, Miss, Refusal, Verdict};
use crate::deployment::{
    Deployment, DeploymentError, EnclaveSettings, Launch, ProxyFacts, SealFacts, http_get,
};
use crate::gguf;
use crate::models::Tiny;

/// Name under which the model is served.
pub(super) const NAME: &str = "tiny";
/// How long an enclave may take to refuse; it is no result of an attack that somebody lost patience.
const PATIENCE: Duration = Duration::from_secs(120);

/// A serving deployment, and room for its attackers.
pub struct Ground {
    pub(super) deployment: Deployment,
    /// The model's former version, sealed under the same keys.
    pub(super) older: SealFacts,
    /// The model that is served.
    pub(super) sealed: SealFacts,
    model: PathBuf,
    stranger: Option<Deployment>,
    directory: PathBuf,
}

impl Ground {
    /// Brings up a deployment of the programs in `programs` over a tiny model, in `work`.
    pub fn prepare(programs: &Path, work: &Path) -> Result<Ground, DeploymentError> {
        let mut deployment = Deployment::new(programs, work)?;
        // Several chunks, so that there is something to swap.
        let tiny = Tiny {
            hidden: 128,
            ffn: 512,
            layers: 3,
            ..Tiny::default()
        };
        let model = deployment.work_dir().join("model.gguf");
        gguf::write(&tiny.build(), &model).map_err(|source| DeploymentError::Io {
            path: model.clone(),
            source,
        })?;
        deployment.start_fake_tee()?;
        deployment.start_broker()?;
        deployment.keygen()?;
        let older = deployment.seal(&model, NAME, 1)?;
        let sealed = deployment.seal(&model, NAME, 2)?;
        deployment.configure_enclave(&settings())?;
        deployment.measure_enclave()?;
        deployment.write_policies()?;
        deployment.admit_model()?;
        deployment.start_enclave()?;
        let directory = deployment.work_dir().to_path_buf();
        Ok(Ground {
            deployment,
            older,
            sealed,
            model,
            stranger: None,
            directory,
        })
    }

    /// The deployment that is attacked.
    pub fn deployment(&self) -> &Deployment {
        &self.deployment
    }

    /// Gives an attack a directory of its own.
    pub(super) fn begin(&mut self, name: &str) -> io::Result<()> {
        self.directory = self.deployment.work_dir().join("attacks").join(name);
        fs::create_dir_all(&self.directory)
    }

    /// A path in the attack's directory.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The address of the enclave.
    pub(super) fn enclave(&self) -> Result<String, Miss> {
        Ok(self.deployment.enclave()?.url.clone())
    }

    /// The URL at which the enclave ends TLS itself.
    pub(super) fn attested_tls(&self) -> Result<String, Miss> {
        let url = self.deployment.enclave()?.attested_tls.clone();
        url.ok_or_else(|| Miss::Broken("no attested TLS".into()))
    }

    /// A launch of the enclave as it was measured, to be altered.
    pub(super) fn enclave_launch(&self) -> Launch {
        let config = self.deployment.work_dir().join("enclave.toml");
        self.deployment
            .launch("casemate-enclave", "casemate-enclave")
            .option("--config", config)
    }

    /// Starts an enclave that must not come to serve.
    pub(super) fn refused_start(&self, launch: &Launch) -> Result<Refusal, Miss> {
        let ended = |error| match error {
            DeploymentError::Ended { status, log, .. } => Ok((status, log)),
            other => Err(Miss::from(other)),
        };
        let (status, log) = match launch.serve(&self.directory, PATIENCE) {
            Err(error) => ended(error)?,
            Ok(mut enclave) => {
                let url = format!("http://{}", enclave.address());
                let ready = || http_get(&url, "/readyz").is_ok_and(|reply| reply.status == 200);
                match enclave.wait_until("refusal", PATIENCE, ready) {
                    Ok(()) => return Err(Miss::Accepted("the enclave serves".into())),
                    Err(error) => ended(error)?,
                }
            }
        };
        let code = status.code().filter(|code| *code != 101);
        let code = code.ok_or_else(|| Miss::Broken(format!("a crash, {status}: {log}")))?;
        let line = log.lines().find_map(|line| line.strip_prefix("denial: "));
        let denial: Value = serde_json::from_str(
            line.ok_or_else(|| Miss::Broken(format!("no denial in the log: {log}")))?,
        )?;
        let by = if denial["by"] == "broker" {
            By::Broker
        } else {
            By::Enclave
        };
        Refusal::read(by, &denial, Verdict::Exit(code), log)
    }

    /// The user's policy with some text replaced, which must be in it.
    pub(super) fn user_policy(&self, from: &str, to: &str) -> Result<PathBuf, Miss> {
        let text = fs::read_to_string(self.deployment.work_dir().join("user-policy.toml"))?;
        let changed = replace(&text, from, to)?;
        let path = self.path("policy.toml");
        fs::write(&path, changed)?;
        Ok(path)
    }

    /// Runs `casemate verify`, which must refuse the service.
    pub(super) fn refused_verify(&self, service: &str, policy: &Path) -> Result<Refusal, Miss> {
        let launch = self
            .deployment
            .launch("casemate-verify", "casemate")
            .arg("verify")
            .arg("--json")
            .option("--service", service)
            .option("--policy", policy);
        let output = Command::new(&launch.executable)
            .args(&launch.arguments)
            .env_clear()
            .output()?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = String::from_utf8_lossy(&output.stderr);
        let code = output.status.code().filter(|code| *code != 101);
        let code = code.ok_or_else(|| Miss::Broken(format!("a crash: {said}")))?;
        if code == 0 {
            return Err(Miss::Accepted("verify trusts the service".into()));
        }
        let verdict: Value = serde_json::from_str(&printed)
            .map_err(|error| Miss::Broken(format!("{error}: {printed}{said}")))?;
        Refusal::read(By::Verify, &verdict["denial"], Verdict::Exit(code), printed)
    }

    /// The user's policy as it is.
    pub(super) fn policy(&self) -> PathBuf {
        self.deployment.work_dir().join("user-policy.toml")
    }

    /// A proxy of the user to what it believes to be the service.
    pub(super) fn proxy_to(&mut self, url: &str) -> Result<ProxyFacts, Miss> {
        Ok(self.deployment.start_proxy_to(url)?)
    }

    /// The attacker's own installation on the same kind of machine: the same programs, the same model, a genuine
    /// enclave, but its own broker and keys.
    pub(super) fn stranger(&mut self) -> Result<&mut Deployment, Miss> {
        if self.stranger.is_none() {
            let work = self.deployment.work_dir().join("stranger");
            let mut stranger = self.deployment.beside(&work)?;
            stranger.start_broker()?;
            stranger.keygen()?;
            stranger.seal(&self.model, NAME, 2)?;
            stranger.configure_enclave(&settings())?;
            stranger.measure_enclave()?;
            stranger.write_policies()?;
            stranger.admit_model()?;
            self.stranger = Some(stranger);
        }
        let absent = || Miss::Broken("no second installation".into());
        self.stranger.as_mut().ok_or_else(absent)
    }
}

fn settings() -> EnclaveSettings {
    EnclaveSettings {
        threads: 1,
        max_context: 512,
        max_batch: 2,
        attested_tls: true,
        ..EnclaveSettings::default()
    }
}

/// Replaces text that must be there: an attack that changes nothing proves nothing.
pub(super) fn replace(text: &str, from: &str, to: &str) -> Result<String, Miss> {
    if !text.contains(from) {
        return Err(Miss::Broken(format!("{from:?} is not in {text}")));
    }
    Ok(text.replace(from, to))
}
