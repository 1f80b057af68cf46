//! Untrusted workers beside a deployment.

use super::{Deployment, DeploymentError, Launch, Role, START};

impl Deployment {
    /// Marks tensors public in models that are sealed from now on; `*` stands for any characters.
    pub fn publish_tensors(&mut self, patterns: &[&str]) {
        self.public = patterns.iter().map(|&pattern| pattern.into()).collect();
    }

    /// Starts `casemate-worker`, always at the same address, and returns that.
    pub fn start_worker(&mut self) -> Result<String, DeploymentError> {
        let socket = self.work_dir().join("worker.sock");
        let launch = self
            .launch("casemate-worker", "casemate-worker")
            .option("--listen", format!("unix:{}", socket.display()))
            .option("--memory", "512MiB")
            .option("--threads", "1");
        let program = launch.serve(&self.logs(), START)?;
        let address = program.address().to_owned();
        self.running.push((Role::Worker, program));
        Ok(self.worker.insert(address).clone())
    }

    /// The lines of `[offload]` for a plan.
    pub(super) fn offload(&self, plan: &str) -> Result<String, DeploymentError> {
        let worker = self.worker.as_deref();
        let worker = worker.ok_or(DeploymentError::TooEarly("start_worker"))?;
        Ok(format!(
            "\n[offload]\nplan = \"{plan}\"\nworker = \"{worker}\"\npool_bytes = 8388608\n"
        ))
    }

    /// Options of `casemate seal` for what is public.
    pub(super) fn with_public(&self, launch: Launch) -> Launch {
        let public = self.public.iter();
        public.fold(launch, |launch, pattern| launch.option("--public", pattern))
    }
}
