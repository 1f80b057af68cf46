//! End-to-end tests over the real programs; the tests are in `tests/`, this library holds what they share.
//!
//! `cargo xtask test` builds the programs before it runs them. By hand: `cargo build --workspace --bins` first.

#![forbid(unsafe_code)]

pub mod canary;
pub mod namespaces;
pub mod search;
pub mod soak;
pub mod watch;

use std::path::{Path, PathBuf};

use casemate_testkit::deployment::{Deployment, DeploymentError, EnclaveSettings};
use casemate_testkit::gguf;
use casemate_testkit::models::Tiny;
use tempfile::TempDir;

/// Name under which the tiny model is served.
pub const TINY: &str = "tiny";

/// A deployment in a directory that lives as long as it does.
pub struct Stage {
    /// The programs.
    pub deployment: Deployment,
    // After the deployment, which writes into it until it ends.
    directory: TempDir,
}

impl Stage {
    /// An empty deployment.
    ///
    /// # Panics
    /// When the programs were not built: a test over them must not pass over that.
    pub fn new() -> Result<Stage, DeploymentError> {
        let programs = Deployment::programs_of_this_build()?;
        for program in [
            "casemate",
            "casemate-broker",
            "casemate-enclave",
            "casemate-fake-tee",
        ] {
            assert!(
                programs.join(program).is_file(),
                "{program} is not built; run `cargo build --workspace --bins` or `cargo xtask test`"
            );
        }
        let directory =
            TempDir::with_prefix("casemate-").map_err(|source| DeploymentError::Io {
                path: std::env::temp_dir(),
                source,
            })?;
        Ok(Stage {
            deployment: Deployment::new(&programs, directory.path())?,
            directory,
        })
    }

    /// Everything up to the moment before the enclave starts, over a tiny model.
    pub fn until_enclave() -> Result<Stage, DeploymentError> {
        Stage::until_enclave_with(EnclaveSettings::default(), |_| ())
    }

    /// As [`Stage::until_enclave`], with other settings, and what `prepare` does first.
    pub fn until_enclave_with(
        settings: EnclaveSettings,
        prepare: impl FnOnce(&mut Deployment),
    ) -> Result<Stage, DeploymentError> {
        let mut stage = Stage::new()?;
        let model = stage.tiny_model();
        let deployment = &mut stage.deployment;
        prepare(deployment);
        deployment.start_fake_tee()?;
        deployment.start_broker()?;
        deployment.keygen()?;
        deployment.seal(&model, TINY, 1)?;
        deployment.configure_enclave(&EnclaveSettings {
            threads: 1,
            ..settings
        })?;
        deployment.measure_enclave()?;
        deployment.write_policies()?;
        deployment.admit_model()?;
        Ok(stage)
    }

    /// Everything up to the moment before the first of `count` replicas starts, over a tiny model.
    pub fn until_replicas(count: usize) -> Result<Stage, DeploymentError> {
        let mut stage = Stage::new()?;
        let model = stage.tiny_model();
        let deployment = &mut stage.deployment;
        deployment.start_fake_tee()?;
        deployment.start_broker()?;
        deployment.keygen()?;
        deployment.seal(&model, TINY, 1)?;
        let settings = EnclaveSettings {
            threads: 1,
            ..EnclaveSettings::default()
        };
        deployment.configure_replicas(&settings, count)?;
        deployment.write_policies()?;
        deployment.admit_model()?;
        Ok(stage)
    }

    /// A whole deployment over a tiny model, and the proxy's address.
    pub fn complete() -> Result<(Stage, String), DeploymentError> {
        let mut stage = Stage::until_enclave()?;
        stage.deployment.start_enclave()?;
        let proxy = stage.deployment.start_proxy()?;
        Ok((stage, proxy.url))
    }

    /// Writes the tiny model as a GGUF file.
    ///
    /// # Panics
    /// When the temporary directory cannot be written.
    pub fn tiny_model(&self) -> PathBuf {
        let path = self.path("tiny.gguf");
        gguf::write(&Tiny::default().build(), &path).expect("the temporary directory is writable");
        path
    }

    /// A path inside the deployment's directory.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.path().join(name)
    }
}
