//! Adapters of a deployment: sealed for its model, configured, accepted by its policies and granted like it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::{Deployment, DeploymentError, quoted, resource, text};

/// A sealed adapter.
#[derive(Clone, Debug)]
pub struct AdapterFacts {
    /// The sealed file.
    pub path: PathBuf,
    /// Its digest, hexadecimal.
    pub digest: String,
    /// What requests call it.
    pub name: String,
    /// File of its own data key.
    pub data_key: PathBuf,
    /// Whether only keys of the deployment's list may use it.
    pub keyed: bool,
}

impl Deployment {
    /// Makes a data key of its own for the PEFT directory `adapter` and seals it for the sealed model. Comes after
    /// [`Deployment::seal`] and before [`Deployment::configure_enclave`]. With `keyed` its grant lists the API keys.
    pub fn seal_adapter(
        &mut self,
        adapter: &Path,
        name: &str,
        keyed: bool,
    ) -> Result<AdapterFacts, DeploymentError> {
        let (keys, sealed) = (self.keys()?, self.sealed()?);
        let program = "casemate keygen";
        let own = self.work.join(format!("keys-{name}/"));
        let launch = self.launch("casemate-keygen-adapter", "casemate");
        let made = self.run_json(launch.arg("keygen").option("--out", &own))?;
        let data_key = PathBuf::from(text(&made, program, "data_key")?);
        let path = self.work.join(format!("{name}.casemate"));
        let launch = self
            .launch("casemate-seal-adapter", "casemate")
            .arg("seal")
            .option("--adapter", adapter)
            .option("--base", &sealed.path)
            .option("--base-key", &keys.data_key)
            .option("--name", name)
            .option("--version", "1")
            .option("--data-key", &data_key)
            .option("--signing-key", &keys.signing_key)
            .option("--out", &path);
        let made = self.run_json(launch)?;
        let facts = AdapterFacts {
            digest: text(&made, "casemate seal", "model_digest")?,
            name: name.to_owned(),
            data_key,
            keyed,
            path,
        };
        self.adapters.push(facts.clone());
        Ok(facts)
    }

    /// The adapters, in the order in which they were sealed.
    pub fn adapters(&self) -> &[AdapterFacts] {
        &self.adapters
    }

    /// For the enclave's configuration.
    pub(super) fn configured_adapters(&self) -> String {
        let mut lines = String::new();
        for adapter in &self.adapters {
            let _ = write!(
                lines,
                "\n[[adapter]]\nname = {}\npath = {}\nresource = {}\ndigest = {}\n",
                quoted(&adapter.name),
                quoted(&adapter.path.display().to_string()),
                quoted(&resource(&adapter.name)),
                quoted(&adapter.digest),
            );
        }
        lines
    }

    /// For policies, behind `[model]`.
    pub(super) fn accepted_adapters(&self) -> String {
        match self.adapters.as_slice() {
            [] => String::new(),
            adapters => {
                let digests: Vec<_> = adapters.iter().map(|a| quoted(&a.digest)).collect();
                format!("adapters = [{}]\n", digests.join(", "))
            }
        }
    }

    /// Stores the grants of all adapters.
    pub(super) fn admit_adapters(&self) -> Result<(), DeploymentError> {
        let signing_key = &self.keys()?.signing_key;
        for adapter in &self.adapters {
            let grant = self.work.join(format!("{}.grant", adapter.name));
            let launch = self
                .launch("casemate-grant-adapter", "casemate")
                .arg("grant")
                .option("--data-key", &adapter.data_key)
                .option("--signing-key", signing_key)
                .option("--model", &adapter.path)
                .option("--out", &grant);
            let launch = match adapter.keyed {
                true => launch.option("--api-keys", self.api_keys()),
                false => launch.arg("--open"),
            };
            self.run(launch.arg("--force"))?;
            self.administer(&[
                "resource".as_ref(),
                "put".as_ref(),
                resource(&adapter.name).as_ref(),
                "--grant".as_ref(),
                grant.as_os_str(),
            ])?;
        }
        Ok(())
    }
}
