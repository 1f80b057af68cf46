//! A whole deployment on loopback, made of the real programs: fake TEE, broker, enclave, proxy. Tests use it to have
//! something to talk to, the demonstration to narrate; so it goes step by step, and each step returns what it learned.
//!
//! ```text
//! start_fake_tee ─► start_broker ─► keygen ─► seal ─► configure_enclave ─► measure_enclave ─► write_policies
//!   ─► admit_model ─► start_enclave ─► start_proxy ─► verify
//! ```
//! The broker comes before the enclave's configuration, because that names the broker's address and key, and the
//! configuration comes before the policies, because they name its measurement. A step that lacks an earlier one
//! says which. Programs end when the deployment is dropped; what they wrote stays in `work_dir/logs`.

mod adapters;
mod http;
mod program;
mod recorder;
mod replicas;
mod workers;

pub use adapters::AdapterFacts;
pub use http::{HttpReply, http_get};
pub use program::{Launch, Program};
pub use recorder::{Recorder, Recording, TlsEnds};
pub use replicas::{CertificateFacts, GatewayFacts, ReplicaFacts, free_addresses};
pub use workers::WorkerPlace;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long a server may take to say where it listens.
const START: Duration = Duration::from_secs(60);
/// How long an enclave may take to open its model; tests of unoptimised programs on busy machines need most of it.
const READY: Duration = Duration::from_secs(600);

/// Why a deployment did not come up.
#[derive(Debug, thiserror::Error)]
pub enum DeploymentError {
    /// A file or program could not be used.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program ended with failure, or a server ended at all.
    #[error("{program} ended with {status}; the end of its log:\n{log}")]
    Ended {
        /// Which.
        program: &'static str,
        /// How.
        status: ExitStatus,
        /// The end of what it wrote.
        log: String,
    },
    /// A server closed its output without saying where it listens.
    #[error("{program} does not say where it listens")]
    Silent {
        /// Which.
        program: &'static str,
    },
    /// A program did not get there in time.
    #[error("{program}: no {what} in time; the end of its log:\n{log}")]
    TimedOut {
        /// Which.
        program: &'static str,
        /// What was waited for.
        what: &'static str,
        /// The end of what it wrote.
        log: String,
    },
    /// A program printed something else than agreed.
    #[error("{program} printed no {what}: {printed}")]
    Unexpected {
        /// Which.
        program: &'static str,
        /// What was looked for.
        what: &'static str,
        /// What it printed.
        printed: String,
    },
    /// A step was called before another that it needs.
    #[error("this step comes after {0}")]
    TooEarly(&'static str),
}

/// A deployment in a directory of its own.
pub struct Deployment {
    programs: PathBuf,
    work: PathBuf,
    shown: bool,
    trace: bool,
    credential_seconds: Option<u64>,
    fake_tee: Option<FakeTeeFacts>,
    broker: Option<BrokerFacts>,
    keys: Option<KeyFacts>,
    sealed: Option<SealFacts>,
    adapters: Vec<AdapterFacts>,
    /// Patterns of tensors that are sealed as public.
    public: Vec<String>,
    /// What the enclave's configuration says of its workers.
    workers: Option<String>,
    config: Option<PathBuf>,
    measurement: Option<MeasurementFacts>,
    policies: Option<PolicyFacts>,
    /// A broker takes another policy only under a higher number.
    policy_version: u64,
    enclave: Option<EnclaveFacts>,
    replicas: Vec<ReplicaFacts>,
    /// In the order in which they were started; ended in the opposite one.
    running: Vec<(Role, Program)>,
}

/// The programs that stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `casemate-fake-tee`.
    FakeTee,
    /// `casemate-broker serve`.
    Broker,
    /// `casemate-enclave`.
    Enclave,
    /// `casemate-enclave`, one of several.
    Replica(usize),
    /// nginx.
    Gateway,
    /// `casemate proxy`.
    Proxy,
    /// `casemate-worker`.
    Worker,
}

/// A running fake TEE.
#[derive(Clone, Debug)]
pub struct FakeTeeFacts {
    /// Its socket.
    pub socket: PathBuf,
    /// SHA-256 of its root's public key, hexadecimal.
    pub root_spki: String,
}

/// A running broker.
#[derive(Clone, Debug)]
pub struct BrokerFacts {
    /// Its base address.
    pub url: String,
    /// The issuer's public key, hexadecimal.
    pub issuer: String,
    /// Its administration socket.
    pub admin_socket: PathBuf,
}

/// The provider's keys.
#[derive(Clone, Debug)]
pub struct KeyFacts {
    /// The provider's public key, hexadecimal.
    pub provider: String,
    /// File of the signing key.
    pub signing_key: PathBuf,
    /// File of the data key.
    pub data_key: PathBuf,
}

/// A sealed model.
#[derive(Clone, Debug)]
pub struct SealFacts {
    /// The sealed file.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// The model digest, hexadecimal.
    pub digest: String,
    /// The model's name and that of the service.
    pub name: String,
    /// The model's version.
    pub version: u64,
    /// How long sealing took, without starting the program.
    pub took: Duration,
}

/// What the enclave will be measured as.
#[derive(Clone, Debug)]
pub struct MeasurementFacts {
    /// The `[[measurement]]` entry for policies.
    pub toml: String,
    /// Its fields.
    pub fields: Value,
}

/// The policies of both sides.
#[derive(Clone, Debug)]
pub struct PolicyFacts {
    /// For the broker: what may receive the key.
    pub broker: PathBuf,
    /// For the user: also whose service, under which name.
    pub user: PathBuf,
}

/// A serving enclave.
#[derive(Clone, Debug)]
pub struct EnclaveFacts {
    /// Its base address.
    pub url: String,
    /// Where it serves attested TLS, `tls://HOST:PORT`, if it does.
    pub attested_tls: Option<String>,
    /// From start to ready: attesting, key release, opening, packing, credential.
    pub took: Duration,
}

/// A running proxy.
#[derive(Clone, Debug)]
pub struct ProxyFacts {
    /// Its base address, for OpenAI clients with `/v1` behind.
    pub url: String,
    /// From start to listening: verification included.
    pub took: Duration,
}

/// How the enclave runs the model.
#[derive(Clone, Debug)]
pub struct EnclaveSettings {
    /// `"int8"` or `"f32"`.
    pub compute: &'static str,
    /// How keys and values are stored; `None` leaves it to the enclave.
    pub kv_type: Option<&'static str>,
    /// Compute threads; 0 is one per core.
    pub threads: usize,
    /// Longest prompt plus answer, in tokens.
    pub max_context: usize,
    /// Answers at the same time.
    pub max_batch: usize,
    /// Lines of the section `[extraction]`; empty leaves it out.
    pub extraction: &'static str,
    /// Whether attested TLS is served too, on a free port.
    pub attested_tls: bool,
    /// By which plan the worker computes products, if it does.
    pub offload: Option<&'static str>,
}

impl Default for EnclaveSettings {
    fn default() -> EnclaveSettings {
        EnclaveSettings {
            compute: "int8",
            kv_type: None,
            threads: 0,
            max_context: 2048,
            max_batch: 8,
            extraction: "",
            attested_tls: false,
            offload: None,
        }
    }
}

impl Deployment {
    /// Prepares a deployment of the programs in `programs`, keeping everything under `work`, which is made.
    pub fn new(programs: &Path, work: &Path) -> Result<Deployment, DeploymentError> {
        let logs = work.join("logs");
        fs::create_dir_all(&logs).map_err(|source| DeploymentError::Io { path: logs, source })?;
        // Absolute, because the enclave's arguments are measured and must mean the same everywhere.
        let absolute = |path: &Path| {
            fs::canonicalize(path).map_err(|source| DeploymentError::Io {
                path: path.to_path_buf(),
                source,
            })
        };
        Ok(Deployment {
            programs: absolute(programs)?,
            work: absolute(work)?,
            shown: false,
            trace: false,
            credential_seconds: None,
            fake_tee: None,
            broker: None,
            keys: None,
            sealed: None,
            adapters: Vec::new(),
            public: Vec::new(),
            workers: None,
            config: None,
            measurement: None,
            policies: None,
            policy_version: 0,
            enclave: None,
            replicas: Vec::new(),
            running: Vec::new(),
        })
    }

    /// Another installation on the same machine, in `work`: the same programs and the same TEE, which stays this
    /// one's to run; nothing else is there yet.
    pub fn beside(&self, work: &Path) -> Result<Deployment, DeploymentError> {
        let mut other = Deployment::new(&self.programs, work)?;
        other.fake_tee = Some(self.fake_tee()?.clone());
        Ok(other)
    }

    /// Where cargo put the programs beside the running test or example.
    pub fn programs_of_this_build() -> Result<PathBuf, DeploymentError> {
        let own = std::env::current_exe().map_err(|source| DeploymentError::Io {
            path: PathBuf::new(),
            source,
        })?;
        // target/<profile>/deps/<test>, or target/<profile>/<program>.
        let directory = own.parent().unwrap_or(&own);
        let is_deps = directory
            .file_name()
            .is_some_and(|name| name == "deps" || name == "examples");
        Ok(if is_deps {
            directory.parent().unwrap_or(directory)
        } else {
            directory
        }
        .to_path_buf())
    }

    /// Lets commands show their progress on our standard error.
    pub fn show_progress(&mut self, shown: bool) {
        self.shown = shown;
    }

    /// Lets programs that start from now on log all they can. The enclave's level is an argument, so it is measured.
    pub fn log_everything(&mut self) {
        self.trace = true;
    }

    /// Lets a broker that starts from now on issue credentials for so many seconds.
    pub fn credentials_for(&mut self, seconds: u64) {
        self.credential_seconds = Some(seconds);
    }

    /// Everything in order, for who wants the result only: proxy and enclave running over the model in `model`.
    pub fn start_all(
        &mut self,
        model: &Path,
        name: &str,
        settings: &EnclaveSettings,
    ) -> Result<ProxyFacts, DeploymentError> {
        self.start_fake_tee()?;
        self.start_broker()?;
        self.keygen()?;
        self.seal(model, name, 1)?;
        self.configure_enclave(settings)?;
        self.measure_enclave()?;
        self.write_policies()?;
        self.admit_model()?;
        self.start_enclave()?;
        self.start_proxy()
    }

    /// Starts the fake TEE.
    pub fn start_fake_tee(&mut self) -> Result<FakeTeeFacts, DeploymentError> {
        let state = self.work.join("fake-tee");
        let launch = self
            .launch("casemate-fake-tee", "casemate-fake-tee")
            .option("--state", &state)
            .option("--socket", self.work.join("fake-tee.sock"));
        let program = launch.serve(&self.logs(), START)?;
        let facts = FakeTeeFacts {
            socket: PathBuf::from(program.address()),
            root_spki: read(&state.join("root_spki_sha256"))?.trim().to_owned(),
        };
        self.running.push((Role::FakeTee, program));
        Ok(self.fake_tee.insert(facts).clone())
    }

    /// Makes a broker's state and starts it on a free port.
    pub fn start_broker(&mut self) -> Result<BrokerFacts, DeploymentError> {
        let state = self.work.join("broker");
        let admin_socket = self.work.join("broker-admin.sock");
        let init = self
            .launch("casemate-broker-init", "casemate-broker")
            .arg("init");
        let printed = self.run(init.option("--state", &state))?;
        let issuer = printed.trim().to_owned();
        if hex::decode(&issuer).map(|key| key.len()) != Ok(32) {
            let (program, what) = ("casemate-broker init", "public key");
            return Err(DeploymentError::Unexpected {
                program,
                what,
                printed,
            });
        }
        let address = self.serve_broker("127.0.0.1:0")?;
        let facts = BrokerFacts {
            url: format!("http://{address}"),
            issuer,
            admin_socket,
        };
        Ok(self.broker.insert(facts).clone())
    }

    /// Starts a broker that was stopped again: the same state at the same address.
    pub fn start_broker_again(&mut self) -> Result<(), DeploymentError> {
        let url = self.broker()?.url.clone();
        self.serve_broker(url.trim_start_matches("http://"))?;
        Ok(())
    }

    fn serve_broker(&mut self, listen: &str) -> Result<String, DeploymentError> {
        let mut launch = self
            .talkative("casemate-broker", "casemate-broker", "RUST_LOG")
            .arg("serve")
            .option("--state", self.work.join("broker"))
            .option("--listen", listen)
            .option("--admin-socket", self.work.join("broker-admin.sock"));
        if let Some(seconds) = self.credential_seconds {
            launch = launch.option("--credential-lifetime", seconds.to_string());
        }
        let program = launch.serve(&self.logs(), START)?;
        let address = program.address().to_owned();
        self.running.push((Role::Broker, program));
        Ok(address)
    }

    /// Makes the provider's keys.
    pub fn keygen(&mut self) -> Result<KeyFacts, DeploymentError> {
        let directory = self.work.join("keys/");
        let launch = self.launch("casemate-keygen", "casemate").arg("keygen");
        let made = self.run_json(launch.option("--out", &directory))?;
        let facts = KeyFacts {
            provider: text(&made, "casemate keygen", "provider")?,
            signing_key: text(&made, "casemate keygen", "signing_key")?.into(),
            data_key: text(&made, "casemate keygen", "data_key")?.into(),
        };
        Ok(self.keys.insert(facts).clone())
    }

    /// Seals a GGUF file or a Hugging Face directory.
    pub fn seal(
        &mut self,
        model: &Path,
        name: &str,
        version: u64,
    ) -> Result<SealFacts, DeploymentError> {
        let keys = self.keys()?;
        let path = self.work.join(format!("{name}-{version}.casemate"));
        let launch = self
            .launch("casemate-seal", "casemate")
            .arg("seal")
            .arg(model)
            .option("--name", name)
            .option("--version", version.to_string())
            .option("--data-key", &keys.data_key)
            .option("--signing-key", &keys.signing_key)
            .option("--out", &path);
        let sealed = self.run_json(self.with_public(launch))?;
        let program = "casemate seal";
        let seconds = sealed["seconds"]
            .as_f64()
            .and_then(|s| Duration::try_from_secs_f64(s).ok());
        let facts = SealFacts {
            digest: text(&sealed, program, "model_digest")?,
            bytes: sealed["bytes"]
                .as_u64()
                .ok_or_else(|| unexpected(program, "bytes", &sealed))?,
            took: seconds.ok_or_else(|| unexpected(program, "seconds", &sealed))?,
            name: name.to_owned(),
            version,
            path,
        };
        Ok(self.sealed.insert(facts).clone())
    }

    /// Writes the enclave's configuration.
    pub fn configure_enclave(
        &mut self,
        settings: &EnclaveSettings,
    ) -> Result<PathBuf, DeploymentError> {
        let (tee, broker, keys, sealed) = (
            self.fake_tee()?,
            self.broker()?,
            self.keys()?,
            self.sealed()?,
        );
        let text = format!(
            "[service]\nname = {name}\nlisten = \"127.0.0.1:0\"\n{attested_tls}\n\
             [model]\npath = {model}\ncompute = \"{compute}\"\n{kv_type}threads = {threads}\n\
             max_context = {max_context}\nmax_batch = {max_batch}\n\n\
             [broker]\nurl = \"{url}\"\nissuer = \"{issuer}\"\nprovider = \"{provider}\"\n\
             resource = {resource}\n\n\
             [tee]\nbackend = \"quoting-service\"\nsocket = {socket}\n{extraction}{offload}{adapters}",
            adapters = self.configured_adapters(),
            extraction = match settings.extraction {
                "" => String::new(),
                lines => format!("\n[extraction]\n{lines}\n"),
            },
            offload = match settings.offload {
                Some(plan) => self.offload(plan)?,
                None => String::new(),
            },
            attested_tls = match settings.attested_tls {
                true => "attested_tls = \"127.0.0.1:0\"\n",
                false => "",
            },
            name = quoted(&sealed.name),
            model = quoted(&sealed.path.display().to_string()),
            compute = settings.compute,
            kv_type = match settings.kv_type {
                Some(name) => format!("kv_type = \"{name}\"\n"),
                None => String::new(),
            },
            threads = settings.threads,
            max_context = settings.max_context,
            max_batch = settings.max_batch,
            url = broker.url,
            issuer = broker.issuer,
            provider = keys.provider,
            resource = quoted(&resource(&sealed.name)),
            socket = quoted(&tee.socket.display().to_string()),
        );
        let path = self.work.join("enclave.toml");
        write(&path, &text)?;
        Ok(self.config.insert(path).clone())
    }

    /// Computes, before it is started, what the enclave will be measured as.
    pub fn measure_enclave(&mut self) -> Result<MeasurementFacts, DeploymentError> {
        let enclave = self.enclave_launch()?;
        let config = self.config()?;
        let measure = || {
            let launch = self
                .launch("casemate-measure", "casemate")
                .arg("measure")
                .option("--exe", &enclave.executable)
                .option("--config", config);
            let arguments = enclave.arguments.iter();
            arguments.fold(launch, |launch, argument| launch.option("--arg", argument))
        };
        let toml = self.run(measure())?;
        let fields = self.run_json(measure())?;
        Ok(self
            .measurement
            .insert(MeasurementFacts { toml, fields })
            .clone())
    }

    /// Writes the broker's and the user's policy.
    pub fn write_policies(&mut self) -> Result<PolicyFacts, DeploymentError> {
        self.policy_version += 1;
        let (tee, broker, sealed) = (self.fake_tee()?, self.broker()?, self.sealed()?);
        let measurement = self.measurement()?;
        let common = format!(
            "version = {policy_version}\ntee = [\"tdx\"]\n\
             # The fake TEE of this machine. Remove this line, and only real TEEs are accepted.\n\
             dangerous_development_root = \"{root}\"\n\n\
             [tcb]\nminimum_evaluation_data_number = 17\n\n\
             {measurement}\n\n\
             [model]\ndigests = [\"{digest}\"]\nminimum_version = {version}\n{adapters}",
            policy_version = self.policy_version,
            adapters = self.accepted_adapters(),
            root = tee.root_spki,
            measurement = measurement.toml.trim_end(),
            digest = sealed.digest,
            version = sealed.version,
        );
        let service = format!(
            "\n[service]\nissuer = \"{}\"\nname = {}\nmaximum_evidence_age_seconds = 300\n",
            broker.issuer,
            quoted(&sealed.name)
        );
        let facts = PolicyFacts {
            broker: self.work.join("broker-policy.toml"),
            user: self.work.join("user-policy.toml"),
        };
        write(&facts.broker, &common)?;
        write(&facts.user, &format!("{common}{service}"))?;
        Ok(self.policies.insert(facts).clone())
    }

    /// Makes an API key, which the grant then lists; `limits` are options of `casemate apikey new`.
    pub fn api_key(&mut self, name: &str, limits: &[&str]) -> Result<String, DeploymentError> {
        let launch = self
            .launch("casemate-apikey", "casemate")
            .arg("apikey")
            .arg("new")
            .arg(name)
            .option("--file", self.api_keys());
        let launch = limits
            .iter()
            .fold(launch, |launch, limit| launch.arg(limit));
        text(&self.run_json(launch)?, "casemate apikey", "key")
    }

    fn api_keys(&self) -> PathBuf {
        self.work.join("api-keys.toml")
    }

    /// Puts the broker's policy into force and stores the grant of the model's key. Returns the grant's file.
    pub fn admit_model(&mut self) -> Result<PathBuf, DeploymentError> {
        let (keys, sealed) = (self.keys()?, self.sealed()?);
        let grant = self.work.join("grant");
        let launch = self
            .launch("casemate-grant", "casemate")
            .arg("grant")
            .option("--data-key", &keys.data_key)
            .option("--signing-key", &keys.signing_key)
            .option("--model", &sealed.path)
            .option("--out", &grant);
        let launch = match self.api_keys().is_file() {
            true => launch.option("--api-keys", self.api_keys()),
            false => launch.arg("--open"),
        };
        self.run(launch.arg("--force"))?;
        let policies = self
            .policies
            .as_ref()
            .ok_or(DeploymentError::TooEarly("write_policies"))?;
        self.administer(&[
            "policy".as_ref(),
            "set".as_ref(),
            policies.broker.as_os_str(),
        ])?;
        self.administer(&[
            "resource".as_ref(),
            "put".as_ref(),
            resource(&sealed.name).as_ref(),
            "--grant".as_ref(),
            grant.as_os_str(),
            "--service".as_ref(),
            sealed.name.as_ref(),
        ])?;
        self.admit_adapters()?;
        Ok(grant)
    }

    /// Runs `casemate-broker admin` with these arguments and returns what it printed.
    pub fn administer(&self, arguments: &[&std::ffi::OsStr]) -> Result<String, DeploymentError> {
        let mut launch = self
            .launch("casemate-broker-admin", "casemate-broker")
            .arg("admin")
            .option("--socket", &self.broker()?.admin_socket);
        launch
            .arguments
            .extend(arguments.iter().map(|argument| argument.to_os_string()));
        self.run(launch)
    }

    /// Starts the enclave and waits until it serves.
    pub fn start_enclave(&mut self) -> Result<EnclaveFacts, DeploymentError> {
        self.start_enclave_watching(|_| ())
    }

    /// Starts the enclave and calls `watch` with the time passed, several times a second, until it serves.
    pub fn start_enclave_watching(
        &mut self,
        mut watch: impl FnMut(Duration),
    ) -> Result<EnclaveFacts, DeploymentError> {
        let started = Instant::now();
        let mut program = self.enclave_launch()?.serve(&self.logs(), START)?;
        let url = format!("http://{}", program.address());
        program.wait_until("readiness", READY, || {
            watch(started.elapsed());
            http_get(&url, "/readyz").is_ok_and(|reply| reply.status == 200)
        })?;
        let attested_tls = program
            .attested_tls()
            .map(|address| format!("tls://{address}"));
        self.running.push((Role::Enclave, program));
        Ok(self
            .enclave
            .insert(EnclaveFacts {
                url,
                attested_tls,
                took: started.elapsed(),
            })
            .clone())
    }

    /// Starts the user's proxy on a free port.
    pub fn start_proxy(&mut self) -> Result<ProxyFacts, DeploymentError> {
        let enclave = self.enclave()?.url.clone();
        self.start_proxy_to(&enclave)
    }

    /// Starts a proxy that believes the enclave to be at `enclave`, for who stands in between.
    pub fn start_proxy_to(&mut self, enclave: &str) -> Result<ProxyFacts, DeploymentError> {
        self.start_proxy_through(enclave, None)
    }

    /// As [`Deployment::start_proxy_to`], with the certificate authorities in the PEM file `ca`.
    pub fn start_proxy_through(
        &mut self,
        enclave: &str,
        ca: Option<&Path>,
    ) -> Result<ProxyFacts, DeploymentError> {
        let started = Instant::now();
        let mut launch = self
            .talkative("casemate-proxy", "casemate", "CASEMATE_LOG")
            .arg("proxy")
            .option("--policy", self.user_policy()?)
            .option("--enclave", enclave)
            .option("--listen", "127.0.0.1:0");
        if let Some(ca) = ca {
            launch = launch.option("--ca", ca);
        }
        let program = launch.serve(&self.logs(), START)?;
        let url = format!("http://{}", program.address());
        self.running.push((Role::Proxy, program));
        Ok(ProxyFacts {
            url,
            took: started.elapsed(),
        })
    }

    /// Runs `casemate verify` against the enclave under the user's policy and returns its transcript.
    pub fn verify(&self) -> Result<Value, DeploymentError> {
        let launch = self
            .launch("casemate-verify", "casemate")
            .arg("verify")
            .option("--policy", self.user_policy()?)
            .option("--service", &self.enclave()?.url);
        self.run_json(launch)
    }

    /// A running program, the latest of its kind.
    pub fn program(&mut self, role: Role) -> Option<&mut Program> {
        let found = self
            .running
            .iter_mut()
            .rev()
            .find(|(other, _)| *other == role);
        found.map(|(_, program)| program)
    }

    /// Ends the latest program of its kind.
    pub fn stop(&mut self, role: Role) {
        if let Some(at) = self.running.iter().rposition(|(other, _)| *other == role) {
            self.running.remove(at);
        }
    }

    /// How long the enclave took from its start until it was ready.
    pub fn enclave_started_in(&self) -> Result<Duration, DeploymentError> {
        Ok(self.enclave()?.took)
    }

    /// The directory of the deployment.
    pub fn work_dir(&self) -> &Path {
        &self.work
    }

    /// A launch of one of our programs, with an empty environment, under a name for its log.
    pub fn launch(&self, name: &'static str, program: &str) -> Launch {
        Launch::new(name, self.programs.join(program))
    }

    fn enclave_launch(&self) -> Result<Launch, DeploymentError> {
        let launch = self
            .launch("casemate-enclave", "casemate-enclave")
            .option("--config", self.config()?);
        Ok(match self.trace {
            true => launch.option("--log", "trace"),
            false => launch,
        })
    }

    /// A launch whose log level `variable` sets.
    fn talkative(&self, name: &'static str, program: &str, variable: &str) -> Launch {
        let mut launch = self.launch(name, program);
        if self.trace {
            launch.environment.push((variable.into(), "trace".into()));
        }
        launch
    }

    fn run(&self, launch: Launch) -> Result<String, DeploymentError> {
        launch.run(&self.logs(), self.shown)
    }

    fn run_json(&self, launch: Launch) -> Result<Value, DeploymentError> {
        let name = launch.name;
        parse(name, &self.run(launch.arg("--json"))?)
    }

    fn logs(&self) -> PathBuf {
        self.work.join("logs")
    }

    /// The fake TEE, once started.
    pub fn fake_tee(&self) -> Result<&FakeTeeFacts, DeploymentError> {
        self.fake_tee
            .as_ref()
            .ok_or(DeploymentError::TooEarly("start_fake_tee"))
    }

    /// The broker, once started.
    pub fn broker(&self) -> Result<&BrokerFacts, DeploymentError> {
        self.broker
            .as_ref()
            .ok_or(DeploymentError::TooEarly("start_broker"))
    }

    /// The provider's keys, once made.
    pub fn keys(&self) -> Result<&KeyFacts, DeploymentError> {
        self.keys
            .as_ref()
            .ok_or(DeploymentError::TooEarly("keygen"))
    }

    /// The model, once sealed.
    pub fn sealed(&self) -> Result<&SealFacts, DeploymentError> {
        self.sealed
            .as_ref()
            .ok_or(DeploymentError::TooEarly("seal"))
    }

    /// The enclave, once it serves.
    pub fn enclave(&self) -> Result<&EnclaveFacts, DeploymentError> {
        self.enclave
            .as_ref()
            .ok_or(DeploymentError::TooEarly("start_enclave"))
    }

    /// What the enclave will be measured as, once computed.
    pub fn measurement(&self) -> Result<&MeasurementFacts, DeploymentError> {
        self.measurement
            .as_ref()
            .ok_or(DeploymentError::TooEarly("measure_enclave"))
    }

    fn config(&self) -> Result<&Path, DeploymentError> {
        self.config
            .as_deref()
            .ok_or(DeploymentError::TooEarly("configure_enclave"))
    }

    fn user_policy(&self) -> Result<&Path, DeploymentError> {
        let policies = self
            .policies
            .as_ref()
            .ok_or(DeploymentError::TooEarly("write_policies"))?;
        Ok(&policies.user)
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        while self.running.pop().is_some() {}
    }
}

fn resource(name: &str) -> String {
    format!("default/model/{name}")
}

/// A TOML basic string.
fn quoted(text: &str) -> String {
    // JSON's escapes are among TOML's.
    Value::from(text).to_string()
}

fn text(
    value: &Value,
    program: &'static str,
    field: &'static str,
) -> Result<String, DeploymentError> {
    let text = value[field].as_str().map(str::to_owned);
    text.ok_or_else(|| unexpected(program, field, value))
}

fn unexpected(program: &'static str, what: &'static str, printed: &Value) -> DeploymentError {
    DeploymentError::Unexpected {
        program,
        what,
        printed: printed.to_string(),
    }
}

fn parse(program: &'static str, printed: &str) -> Result<Value, DeploymentError> {
    serde_json::from_str(printed).map_err(|_| DeploymentError::Unexpected {
        program,
        what: "JSON",
        printed: printed.to_owned(),
    })
}

fn read(path: &Path) -> Result<String, DeploymentError> {
    fs::read_to_string(path).map_err(|source| DeploymentError::Io {
        path: path.to_path_buf(),
        source,
    })
}

fn write(path: &Path, text: &str) -> Result<(), DeploymentError> {
    fs::write(path, text).map_err(|source| DeploymentError::Io {
        path: path.to_path_buf(),
        source,
    })
}
