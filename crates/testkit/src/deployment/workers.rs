//! Untrusted workers beside a deployment.

use std::ffi::OsString;
use std::net::IpAddr;

use super::{Deployment, DeploymentError, Launch, Program, Role, START, quoted, read};

/// Where a worker of two runs.
#[derive(Clone, Debug)]
pub struct WorkerPlace {
    /// Its address there.
    pub address: IpAddr,
    /// What runs it there: a program and its first arguments; empty for this place.
    pub through: Vec<String>,
}

/// A running worker that is known by its key.
struct PinnedWorker {
    address: String,
    key: String,
}

impl Deployment {
    /// Marks tensors public in models that are sealed from now on; `*` stands for any characters.
    pub fn publish_tensors(&mut self, patterns: &[&str]) {
        self.public = patterns.iter().map(|&pattern| pattern.into()).collect();
    }

    /// Starts `casemate-worker`, always at the same address, and returns that.
    pub fn start_worker(&mut self) -> Result<String, DeploymentError> {
        self.start_worker_with("1GiB", 1)
    }

    /// As [`Deployment::start_worker`], with so much memory and so many threads.
    pub fn start_worker_with(
        &mut self,
        memory: &str,
        threads: usize,
    ) -> Result<String, DeploymentError> {
        let socket = self.work_dir().join("worker.sock");
        let launch = self
            .launch("casemate-worker", "casemate-worker")
            .option("--listen", format!("unix:{}", socket.display()))
            .option("--memory", memory)
            .option("--threads", threads.to_string());
        let program = launch.serve(&self.logs(), START)?;
        let address = program.address().to_owned();
        self.running.push((Role::Worker, program));
        self.reach_worker_at(&address, 8 << 20);
        Ok(address)
    }

    /// Lets enclaves that are configured from now on believe their worker to be at `address`, for who stands in between, with so
    /// much memory for masks.
    pub fn reach_worker_at(&mut self, address: &str, pool_bytes: u64) {
        let lines = format!("worker = \"{address}\"\npool_bytes = {pool_bytes}\n");
        self.workers = Some(lines);
    }

    /// Starts two workers in these places, each with a key of its own, which get a share each.
    pub fn start_two_workers(&mut self, places: &[WorkerPlace; 2]) -> Result<(), DeploymentError> {
        let mut shares = Vec::new();
        for (place, name) in places
            .iter()
            .zip(["casemate-worker-1", "casemate-worker-2"])
        {
            let (worker, program) = self.start_pinned_worker(place, name)?;
            shares.push(format!(
                "{{ worker = \"{}\", key = \"{}\" }}",
                worker.address, worker.key
            ));
            self.running.push((Role::Worker, program));
        }
        self.workers = Some(format!("shares = [{}]\n", shares.join(", ")));
        Ok(())
    }

    /// Has the enclave expect another key of the first of two workers.
    pub fn expect_another_key(&mut self) {
        let workers = self.workers.take().unwrap_or_default();
        let key = workers.find("key = \"").map(|at| at + "key = \"".len());
        self.workers = key.map(|at| {
            let other = "0".repeat(64);
            format!("{}{other}{}", &workers[..at], &workers[at + 64..])
        });
    }

    /// Gives masks so many bytes of memory, and of a file.
    pub fn spill_masks(&mut self, memory: u64, file: u64) {
        let directory = quoted(&self.work_dir().display().to_string());
        let workers = self.workers.take().unwrap_or_default();
        let lines = workers
            .lines()
            .filter(|line| !line.starts_with("pool_bytes"));
        let lines: String = lines.map(|line| format!("{line}\n")).collect();
        self.workers = Some(format!(
            "{lines}pool_bytes = {memory}\nspill = {{ directory = {directory}, bytes = {file} }}\n"
        ));
    }

    fn start_pinned_worker(
        &self,
        place: &WorkerPlace,
        name: &'static str,
    ) -> Result<(PinnedWorker, Program), DeploymentError> {
        let mut launch = self
            .launch(name, "casemate-worker")
            .option("--listen", format!("tcp:{}:0", place.address))
            .option("--identity", self.work_dir().join(format!("{name}.pem")))
            .option("--memory", "512MiB")
            .option("--threads", "1");
        if let [first, rest @ ..] = &place.through[..] {
            let program = std::mem::replace(&mut launch.executable, first.into());
            let arguments = std::mem::take(&mut launch.arguments);
            let through = rest.iter().map(OsString::from).chain([program.into()]);
            launch.arguments = through.chain(arguments).collect();
        }
        let program = launch.serve(&self.logs(), START)?;
        let log = read(program.log())?;
        let key = log.lines().find_map(|line| line.strip_prefix("key "));
        let key = key.ok_or_else(|| DeploymentError::Unexpected {
            program: name,
            what: "a key",
            printed: log.clone(),
        })?;
        let worker = PinnedWorker {
            address: program.address().to_owned(),
            key: key.to_owned(),
        };
        Ok((worker, program))
    }

    /// The lines of `[offload]` for a plan. How long workers take depends on whatever else this machine does,
    /// so none is set aside for it.
    pub(super) fn offload(&self, plan: &str) -> Result<String, DeploymentError> {
        let workers = self.workers.as_deref();
        let workers = workers.ok_or(DeploymentError::TooEarly("start_worker"))?;
        Ok(format!(
            "\n[offload]\nplan = \"{plan}\"\nwaiting_ms = 3600000\n{workers}"
        ))
    }

    /// Options of `casemate seal` for what is public.
    pub(super) fn with_public(&self, launch: Launch) -> Launch {
        let public = self.public.iter();
        public.fold(launch, |launch, pattern| launch.option("--public", pattern))
    }
}
