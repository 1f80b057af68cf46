//! The enclave's configuration file. Its bytes are measured (MRCONFIGID), so whoever appraises the enclave has
//! appraised every value here, above all the two public keys.

use std::fmt;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use axum::http::uri::Authority;
use casemate_attest::TomlFault;
use casemate_container::ModelDigest;
use casemate_container::signing::VerifyingKey;
use casemate_engine::{Compute, KvType, Speculation};
use casemate_release::api_key;
use casemate_release::rcar::ResourcePath;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use thiserror::Error;

use crate::api::Extraction;

mod offload;

pub use offload::{Offload, Share, Spill, Workers};

/// Largest configuration file that is read, in bytes.
const MAX_BYTES: u64 = 64 << 10;

/// Why a configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration: {0}")]
    Io(#[from] std::io::Error),
    /// The file is larger than any configuration.
    #[error("the configuration is larger than {MAX_BYTES} bytes")]
    TooLarge,
    /// Not TOML of the documented shape; the message names line and field, and quotes no line.
    #[error("the configuration is not valid: {0}")]
    Malformed(String),
}

/// A parsed configuration together with the exact bytes it was parsed from.
pub struct MeasuredConfig {
    /// The values.
    pub config: Config,
    /// The bytes whose SHA-384 the evidence must carry as MRCONFIGID.
    pub bytes: Vec<u8>,
}

/// Everything that is configured; unknown keys are refused.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What users see.
    pub service: Service,
    /// The sealed model and how to run it.
    pub model: Model,
    /// Adapters to the model, which requests name as theirs.
    #[serde(default, rename = "adapter", deserialize_with = "adapters")]
    pub adapters: Vec<Adapter>,
    /// Who releases the key.
    pub broker: Broker,
    /// Where evidence comes from.
    pub tee: Tee,
    /// What answers tell of the model; absent, nothing.
    #[serde(default)]
    pub extraction: Extraction,
    /// Which products a worker computes; absent, none.
    pub offload: Option<Offload>,
}

/// Most adapters: a session with the broker brings 16 keys, one of them the model's.
const MAX_ADAPTERS: usize = 15;

/// `[[adapter]]`
#[derive(Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// What requests call it: 1 to 128 visible ASCII characters.
    pub name: String,
    /// The sealed container.
    pub path: PathBuf,
    /// Resource that holds its key grant, `repository/type/tag`.
    #[serde(deserialize_with = "resource")]
    pub resource: ResourcePath,
    /// Digest of the adapter, as `casemate seal` prints it: what the name stands for is measured, and nobody can put
    /// another adapter of the same provider behind it.
    #[serde(deserialize_with = "digest")]
    pub digest: ModelDigest,
}

fn resource<'de, D: Deserializer<'de>>(d: D) -> Result<ResourcePath, D::Error> {
    String::deserialize(d)?.parse().map_err(D::Error::custom)
}

fn digest<'de, D: Deserializer<'de>>(d: D) -> Result<ModelDigest, D::Error> {
    let text = String::deserialize(d)?;
    text.parse().map_err(|_| {
        D::Error::custom(
            "the digest of an adapter is 64 hex digits, as `casemate seal` prints them",
        )
    })
}

fn adapters<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Adapter>, D::Error> {
    let adapters = Vec::<Adapter>::deserialize(d)?;
    if adapters.len() > MAX_ADAPTERS {
        let text = format!("at most {MAX_ADAPTERS} adapters");
        return Err(D::Error::custom(text));
    }
    for (i, adapter) in adapters.iter().enumerate() {
        let name = &adapter.name;
        let visible = name.bytes().all(|byte| byte.is_ascii_graphic());
        if !visible || name.is_empty() || name.len() > 128 {
            let rule = "an adapter's name has 1 to 128 visible ASCII characters";
            return Err(D::Error::custom(rule));
        }
        let twice = |other: &Adapter| other.name == *name || other.resource == adapter.resource;
        if adapters[..i].iter().any(twice) {
            let text = format!("the name or the resource of the adapter {name:?} is there twice");
            return Err(D::Error::custom(text));
        }
    }
    Ok(adapters)
}

/// `[service]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Name that the credential must carry and that users ask for as `model`.
    pub name: String,
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Address to listen on for attested TLS; absent where none is offered. Port 0 takes a free one.
    pub attested_tls: Option<SocketAddr>,
    /// The other replicas of this service; this one may be among them.
    #[serde(default, deserialize_with = "peers")]
    pub peers: Vec<Peer>,
}

/// Most other replicas.
const MAX_PEERS: usize = 16;

/// The base address of another replica: `http://HOST:PORT`. What is sent there is encrypted to that replica, so the way
/// to it needs no encryption of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer(String);

impl Peer {
    /// The URL of `path` there.
    pub fn join(&self, path: &str) -> String {
        format!("{}{path}", self.0)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Peer, String> {
        let refused = || format!("{text:?} is not the address of a replica, `http://HOST:PORT`");
        let authority = text.strip_prefix("http://").ok_or_else(refused)?;
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let authority: Authority = authority.parse().map_err(|_| refused())?;
        let has_user = authority.as_str().contains('@');
        if authority.port_u16().is_none() || authority.host().is_empty() || has_user {
            return Err(refused());
        }
        Ok(Peer(format!("http://{authority}")))
    }
}

fn peers<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Peer>, D::Error> {
    let texts = Vec::<String>::deserialize(d)?;
    if texts.len() > MAX_PEERS {
        return Err(D::Error::custom(format!("at most {MAX_PEERS} peers")));
    }
    let parsed: Result<Vec<Peer>, _> = texts.iter().map(|text| text.parse()).collect();
    parsed.map_err(D::Error::custom)
}

/// `[model]`
#[derive(Deserialize, Clone)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The sealed container.
    pub path: PathBuf,
    /// Arithmetic of the linear layers: `"int8"` (default), `"int8-row"`, `"q4-g32"`, `"bf16"` or `"f32"`.
    #[serde(default = "default_compute")]
    pub compute: ComputeName,
    /// How keys and values are stored: `"f32"`, `"f16"`, `"bf16"` or `"int8"`; absent: f32 beside
    /// the arithmetic of f32, bf16 beside those of bf16 and int8-row, otherwise f16.
    pub kv_type: Option<KvTypeName>,
    /// Compute threads; absent or 0 takes one per core.
    #[serde(default)]
    pub threads: usize,
    /// Longest prompt plus answer, in tokens; bounded by the model's own context.
    #[serde(default = "default_context")]
    pub max_context: usize,
    /// Answers generated at the same time; more wait.
    #[serde(default = "default_batch")]
    pub max_batch: usize,
    /// How long what was computed for a user stays after its last use, for that user's next requests; 0: not at all.
    #[serde(default = "default_reuse")]
    pub reuse_seconds: u32,
    /// How several tokens of an answer can be computed at once: `"none"` (default) or `"prompt-lookup"`. The times of
    /// tokens, which the host sees, then tell how far an answer repeats itself and its prompt.
    #[serde(default)]
    pub speculation: SpeculationName,
    /// Whether embeddings are looked up and tokens chosen and turned into text by touching everything, so that who sees
    /// which memory is touched does not learn tokens from that. Not together with `"prompt-lookup"`.
    #[serde(default)]
    pub oblivious: bool,
}

/// Names of [`Compute`] in the file.
#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
pub enum ComputeName {
    /// Single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// 8-bit integers with a scale per 32 values.
    Int8,
    /// 8-bit integers with a scale per row, rotated.
    #[serde(rename = "int8-row")]
    Int8Row,
    /// 4-bit integers as they are sealed, in groups of 32.
    #[serde(rename = "q4-g32")]
    Q4G32,
}

impl From<ComputeName> for Compute {
    fn from(name: ComputeName) -> Self {
        match name {
            ComputeName::F32 => Compute::F32,
            ComputeName::Bf16 => Compute::Bf16,
            ComputeName::Int8 => Compute::Int8,
            ComputeName::Int8Row => Compute::Int8Row,
            ComputeName::Q4G32 => Compute::Q4G32,
        }
    }
}

/// Names of [`KvType`] in the file.
#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
pub enum KvTypeName {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit integers with a scale per position and head.
    Int8,
}

impl From<KvTypeName> for KvType {
    fn from(name: KvTypeName) -> Self {
        match name {
            KvTypeName::F32 => KvType::F32,
            KvTypeName::F16 => KvType::F16,
            KvTypeName::Bf16 => KvType::Bf16,
            KvTypeName::Int8 => KvType::Int8,
        }
    }
}

/// Names of [`Speculation`] in the file.
#[derive(Deserialize, Clone, Copy, Default)]
#[serde(rename_all = "kebab-case")]
pub enum SpeculationName {
    /// Every token is computed by itself.
    #[default]
    None,
    /// What followed the last tokens where they stood before is computed along.
    PromptLookup,
}

impl From<SpeculationName> for Speculation {
    fn from(name: SpeculationName) -> Self {
        match name {
            SpeculationName::None => Speculation::None,
            SpeculationName::PromptLookup => Speculation::PromptLookup,
        }
    }
}

fn default_compute() -> ComputeName {
    ComputeName::Int8
}

fn default_reuse() -> u32 {
    600
}

fn default_context() -> usize {
    2048
}

fn default_batch() -> usize {
    8
}

/// `[broker]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Broker {
    /// Base address of the key broker. Whoever answers there proves itself by the two keys below.
    pub url: String,
    /// Ed25519 key that signs deployment credentials.
    #[serde(with = "key")]
    pub issuer: VerifyingKey,
    /// Ed25519 key of the model's provider: signs the model and the key grant.
    #[serde(with = "key")]
    pub provider: VerifyingKey,
    /// Resource that holds the key grant, `repository/type/tag`.
    #[serde(deserialize_with = "resource")]
    pub resource: ResourcePath,
}

mod key {
    use super::VerifyingKey;
    use serde::{Deserialize, Deserializer, de::Error};

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<VerifyingKey, D::Error> {
        let text = String::deserialize(d)?;
        text.parse()
            .map_err(|_| D::Error::custom("an Ed25519 public key is 64 hex digits"))
    }
}

/// `[tee]`
#[derive(Deserialize)]
#[serde(tag = "backend", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Tee {
    /// The kernel's interface inside a TDX guest.
    ConfigfsTsm {
        /// Collateral for the evidence, as the provisioning service gives it.
        collateral: PathBuf,
    },
    /// A quoting service on a Unix socket; in development, the fake TEE.
    QuotingService {
        /// The socket.
        socket: PathBuf,
    },
}

impl MeasuredConfig {
    /// Reads the file once; the bytes that are parsed are the bytes that are compared with the evidence.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path)?;
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
        Self::parse(bytes)
    }

    /// Parses configuration bytes.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, ConfigError> {
        if bytes.len() as u64 > MAX_BYTES {
            return Err(ConfigError::TooLarge);
        }
        let text = std::str::from_utf8(&bytes)
            .map_err(|_| ConfigError::Malformed("it is not UTF-8".into()))?;
        let config: Config = toml::from_str(text).map_err(|error| {
            ConfigError::Malformed(match api_key::is_in(text) {
                true => "this is an API key, or holds one".into(),
                false => TomlFault::new(text, &error).to_string(),
            })
        })?;
        if config.offload.is_some() && !matches!(config.model.compute, ComputeName::Int8Row) {
            return Err(ConfigError::Malformed(
                "[offload] needs compute = \"int8-row\" in [model]: only its products are exact, \
                 whoever computes them"
                    .into(),
            ));
        }
        let guesses = !matches!(config.model.speculation, SpeculationName::None);
        if config.model.oblivious && guesses {
            return Err(ConfigError::Malformed(
                "oblivious = true in [model] does not go with speculation: which tokens are looked up, and how many are guessed, \
                 is what it is there to hide"
                    .into(),
            ));
        }
        let Config {
            service,
            adapters,
            broker,
            ..
        } = &config;
        let same = |a: &&Adapter| a.name == service.name || a.resource == broker.resource;
        if let Some(adapter) = adapters.iter().find(same) {
            return Err(ConfigError::Malformed(format!(
                "the adapter {:?} has the service's name or the model's resource",
                adapter.name
            )));
        }
        Ok(Self { config, bytes })
    }
}

#[cfg(test)]
mod tests {
    use casemate_offload::plan::Preset;
    use casemate_wire::Address;

    use super::*;

    const KEY: &str = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";

    const DIGEST: &str = "abababababababababababababababababababababababababababababababab";

    fn text() -> String {
        format!(
            "[service]\nname = \"m\"\nlisten = \"127.0.0.1:0\"\n[model]\npath = \"m.casemate\"\n[broker]\nurl = \
             \"http://127.0.0.1:1\"\nissuer = \"{KEY}\"\nprovider = \"{KEY}\"\nresource = \"default/model/m\"\n[tee]\n\
             backend = \"quoting-service\"\nsocket = \"/run/s\"\n"
        )
    }

    fn refused(text: String) -> String {
        match MeasuredConfig::parse(text.into_bytes()) {
            Err(ConfigError::Malformed(message)) => message,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("accepted"),
        }
    }

    #[test]
    fn reads_a_complete_file_with_defaults() {
        let measured = MeasuredConfig::parse(text().into_bytes()).unwrap();
        assert_eq!(measured.config.service.name, "m");
        assert!(matches!(measured.config.model.compute, ComputeName::Int8));
        assert_eq!(measured.config.broker.issuer.to_string(), KEY);
        assert_eq!(measured.bytes, text().into_bytes());
    }

    #[test]
    fn offload_names_a_plan_and_a_worker_and_needs_exact_products() {
        let parsed = |compute: &str, offload: &str| {
            let path = "path = \"m.casemate\"\n";
            let model = format!("{path}compute = \"{compute}\"\n");
            MeasuredConfig::parse((text().replace(path, &model) + offload).into_bytes())
        };
        let section = "[offload]\nplan = \"full-linear\"\nworker = \"tcp:10.0.0.9:8600\"\n";
        let offload = parsed("int8-row", section).map(|found| found.config.offload);
        let offload = offload.unwrap_or_else(|e| panic!("{e}")).unwrap();
        assert_eq!(offload.plan, Preset::FullLinear);
        let at = |address: &Address| address.to_string() == "tcp:10.0.0.9:8600";
        assert!(matches!(&offload.workers, Workers::One { address, .. } if at(address)));

        for (compute, section, why) in [
            ("int8", section.to_owned(), "needs compute = \"int8-row\""),
            (
                "int8-row",
                section.replace("full-linear", "none"),
                "leave [offload] out",
            ),
            (
                "int8-row",
                section.replace("full-linear", "all"),
                "a preset is",
            ),
            (
                "int8-row",
                section.replace("tcp:", "http://"),
                "tcp:IP:PORT",
            ),
            (
                "int8-row",
                format!("{section}token = \"x\"\n"),
                "unknown field",
            ),
        ] {
            match parsed(compute, &section) {
                Err(ConfigError::Malformed(text)) => assert!(text.contains(why), "{text}"),
                Err(other) => panic!("{other}"),
                Ok(_) => panic!("accepted: {section}"),
            }
        }
    }

    #[test]
    fn the_extraction_policy_is_nothing_unless_written() {
        let parse = |text: String| match MeasuredConfig::parse(text.into_bytes()) {
            Ok(measured) => measured.config.extraction,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(parse(text()), Extraction::default());
        let some = "[extraction]\nlogprobs = { top = 3, rounding = 0.1 }\n";
        assert_ne!(parse(text() + some), Extraction::default());
        let message = refused(text() + "[extraction]\nlogprob = \"none\"\n");
        assert!(message.contains("logprob"), "{message}");
    }

    #[test]
    fn refuses_unknown_keys_by_name() {
        let message = refused(text().replace("[model]", "[model]\ndebug = true"));
        assert!(message.contains("debug"), "{message}");
    }

    #[test]
    fn every_arithmetic_of_the_engine_can_be_chosen_by_name() {
        for &compute in Compute::ALL {
            let name = match compute.name() {
                "int8-g32" => "int8",
                name => name,
            };
            let with = text().replace("[model]", &format!("[model]\ncompute = \"{name}\""));
            let measured =
                MeasuredConfig::parse(with.into_bytes()).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(Compute::from(measured.config.model.compute), compute);
        }
        let message = refused(text().replace("[model]", "[model]\ncompute = \"bf8\""));
        assert!(message.contains("bf16"), "{message}");
    }

    #[test]
    fn adapters_have_names_and_resources_of_their_own() {
        let adapter = |name: &str, resource: &str| {
            format!(
                "[[adapter]]\nname = {name:?}\npath = \"a.casemate\"\nresource = {resource:?}\ndigest = \"{DIGEST}\"\n"
            )
        };
        let with = |adapters: String| MeasuredConfig::parse((text() + &adapters).into_bytes());
        let two = adapter("a", "default/model/a") + &adapter("b", "default/model/b");
        let parsed = with(two).ok().unwrap().config.adapters;
        assert_eq!((parsed.len(), parsed[1].name.as_str()), (2, "b"));
        assert_eq!(parsed[1].digest.to_string(), DIGEST);
        let without = adapter("a", "x/y/z").replace(&format!("digest = \"{DIGEST}\"\n"), "");
        let short = adapter("a", "x/y/z").replace(DIGEST, "abcd");
        for (adapters, said) in [
            (adapter("m", "default/model/a"), "service's name"),
            (adapter("a", "default/model/m"), "model's resource"),
            (adapter("a", "x/y/z") + &adapter("a", "x/y/w"), "twice"),
            (adapter("a", "x/y/z") + &adapter("b", "x/y/z"), "twice"),
            (adapter("", "x/y/z"), "visible ASCII"),
            (adapter("a b", "x/y/z"), "visible ASCII"),
            (adapter("a", "x/y/z") + "rank = 4\n", "rank"),
            (without, "missing field `digest`"),
            (short, "64 hex digits"),
            (adapter("a", "x/y"), "resource path"),
        ] {
            let message = refused(text() + &adapters);
            assert!(message.contains(said), "{message}");
        }
        let many = (0..16).map(|i| adapter(&format!("a{i}"), &format!("x/y/{i}")));
        assert!(refused(text() + &many.collect::<String>()).contains("at most 15 adapters"));
    }

    #[test]
    fn nothing_is_guessed_unless_it_is_written() {
        let parse = |text: String| match MeasuredConfig::parse(text.into_bytes()) {
            Ok(measured) => Speculation::from(measured.config.model.speculation),
            Err(error) => panic!("{error}"),
        };
        assert_eq!(parse(text()), Speculation::None);
        let with =
            |name: &str| text().replace("[model]", &format!("[model]\nspeculation = \"{name}\""));
        for speculation in Speculation::ALL {
            assert_eq!(parse(with(speculation.name())), speculation);
        }
        let message = refused(with("draft"));
        assert!(message.contains("prompt-lookup"), "{message}");
    }

    #[test]
    fn hiding_what_is_touched_is_asked_for_and_goes_with_no_guesses() {
        let with = |lines: &str| text().replace("[model]", &format!("[model]\n{lines}"));
        let oblivious = |text: String| match MeasuredConfig::parse(text.into_bytes()) {
            Ok(measured) => measured.config.model.oblivious,
            Err(error) => panic!("{error}"),
        };
        assert!(!oblivious(text()));
        assert!(oblivious(with("oblivious = true\nspeculation = \"none\"")));
        let message = refused(with("oblivious = true\nspeculation = \"prompt-lookup\""));
        assert!(message.contains("oblivious = true"), "{message}");
        assert!(refused(with("oblivious = \"yes\"")).contains("boolean"));
    }

    #[test]
    fn refuses_a_key_that_is_no_key() {
        let message = refused(text().replace(KEY, "d75a"));
        assert!(message.contains("64 hex digits"), "{message}");
    }

    #[test]
    fn refuses_an_unknown_backend() {
        let message = refused(text().replace("quoting-service", "none"));
        assert!(message.contains("none"), "{message}");
    }

    #[test]
    fn peers_are_base_addresses_and_nothing_else() {
        let with = |peers: &str| {
            let line = format!("listen = \"127.0.0.1:0\"\npeers = [{peers}]");
            text().replace("listen = \"127.0.0.1:0\"", &line)
        };
        let parsed = MeasuredConfig::parse(
            with("\"http://10.0.0.2:8090\", \"http://[::1]:80/\", \"http://b:1\"").into_bytes(),
        );
        let peers: Vec<_> = parsed
            .unwrap()
            .config
            .service
            .peers
            .iter()
            .map(|p| p.join("/x"))
            .collect();
        assert_eq!(
            peers,
            [
                "http://10.0.0.2:8090/x",
                "http://[::1]:80/x",
                "http://b:1/x"
            ]
        );
        for bad in [
            "https://a:1",
            "http://a",
            "http://a:1/v1",
            "http://a:1?x",
            "http://a:1#x",
            "http://u@a:1",
            "http://:1",
            "http://a:99999",
            "a:1",
            "",
        ] {
            let message = refused(with(&format!("{bad:?}")));
            assert!(message.contains("http://HOST:PORT"), "{bad}: {message}");
        }
        let many = vec!["\"http://a:1\""; MAX_PEERS + 1].join(",");
        assert!(refused(with(&many)).contains("at most 16 peers"));
    }

    #[test]
    fn refuses_oversize_files() {
        let text = format!("{}#{}", text(), "x".repeat(MAX_BYTES as usize));
        assert!(matches!(
            MeasuredConfig::parse(text.into_bytes()),
            Err(ConfigError::TooLarge)
        ));
    }
}
