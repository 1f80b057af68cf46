//! `casemate measure`: the value that a process will have in evidence, computed beforehand from files.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use casemate_attest::measure::{FileDigest, Measurement, Process, Register};
use serde_json::json;

use crate::exit::{self, Class, Failure, InJson};

/// Larger configuration files are not measured by anyone.
const MAX_CONFIG: u64 = 1024 * 1024;

/// Compute what an enclave will measure to, and print it as a policy's `[[measurement]]` entry.
///
/// The value covers the executable file, every argument, every environment variable and the configuration file: start the
/// enclave with exactly these and with nothing else in its environment (env -i). It is the development measurement, which
/// casemate-fake-tee takes of a process; a policy that uses it must also name the fake TEE's root.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The enclave's executable.
    #[arg(long, value_name = "PATH")]
    exe: PathBuf,
    /// The configuration file, by the path that the enclave will be given.
    #[arg(long, value_name = "PATH")]
    config: PathBuf,
    /// An argument of the enclave, in order; repeat it for each [default: --config PATH].
    #[arg(long = "arg", value_name = "ARG", allow_hyphen_values = true)]
    arguments: Vec<OsString>,
    /// An environment variable of the enclave; repeat it for each [default: none].
    #[arg(long = "env", value_name = "NAME=VALUE")]
    environment: Vec<OsString>,
    /// The measurement's name in the policy.
    #[arg(long, default_value = "casemate-enclave")]
    name: String,
    /// What will measure the enclave.
    #[arg(long, value_enum, default_value_t = Platform::Development)]
    platform: Platform,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Platform {
    /// casemate-fake-tee, on a machine without a TEE.
    Development,
    /// An Intel TDX virtual machine; its image cannot be measured by this version.
    Tdx,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    measure(args).in_json(args.json)
}

fn measure(args: &Args) -> Result<(), Failure> {
    if args.platform == Platform::Tdx {
        let error = anyhow!(
            "this version cannot compute the measurement of a TD image (firmware, kernel, command line); take mr_td and \
             the RTMRs from whoever builds the image, and see docs/policy.md"
        );
        return Err(Failure::new(Class::Usage, "not-implemented", error));
    }
    let arguments = arguments(args)?;
    let environment = environment(args)?;
    let measurement = Measurement::of_process(&Process {
        executable: digest_of(&args.exe, u64::MAX)?,
        arguments: &as_strs(&arguments),
        environment: &as_strs(&environment),
        config: Some(digest_of(&args.config, MAX_CONFIG)?),
    });
    let entry = measurement
        .to_policy_entry(&args.name)
        .map_err(|error| Failure::new(Class::Usage, "name", error))?;
    if args.json {
        return exit::print_json(&json!({
            "name": args.name,
            "development": true,
            "mr_td": hex::encode(measurement.mr_td),
            "mr_config_id": hex::encode(measurement.mr_config_id),
            "rtmr0": hex::encode(measurement.rtmr[0]),
            "rtmr1": hex::encode(measurement.rtmr[1]),
            "rtmr2": hex::encode(measurement.rtmr[2]),
            "rtmr3": hex::encode(measurement.rtmr[3]),
        }));
    }
    exit::print(&format!(
        "# Development measurement: means something only under a dangerous_development_root.\n{}",
        entry.trim_end()
    ))
}

/// The arguments as the enclave will see them. They must name the measured configuration, or the enclave would run under
/// another one than the measurement says.
fn arguments(args: &Args) -> Result<Vec<CString>, Failure> {
    let config = args.config.as_os_str();
    if args.arguments.is_empty() {
        return c_strings(&["--config".into(), config.to_owned()]);
    }
    let mut named: Vec<&OsStr> = Vec::new();
    let mut rest = args.arguments.iter();
    while let Some(argument) = rest.next() {
        if argument == "--config" {
            named.extend(rest.next().map(OsString::as_os_str));
        } else if let Some(path) = argument.as_bytes().strip_prefix(b"--config=") {
            named.push(OsStr::from_bytes(path));
        }
    }
    if named != [config] {
        let error = anyhow!(
            "the arguments must name the configuration once: --arg --config --arg {}",
            config.display()
        );
        return Err(Failure::new(Class::Usage, "arguments", error));
    }
    c_strings(&args.arguments)
}

fn environment(args: &Args) -> Result<Vec<CString>, Failure> {
    for variable in &args.environment {
        let bytes = variable.as_bytes();
        if bytes.first() == Some(&b'=') || !bytes.contains(&b'=') {
            let error = anyhow!("{:?} is not NAME=VALUE", variable.display());
            return Err(Failure::new(Class::Usage, "environment", error));
        }
    }
    c_strings(&args.environment)
}

fn c_strings(strings: &[OsString]) -> Result<Vec<CString>, Failure> {
    let convert = |string: &OsString| CString::new(string.clone().into_vec());
    let converted: Result<_, _> = strings.iter().map(convert).collect();
    converted.map_err(|error| Failure::new(Class::Usage, "arguments", error))
}

fn as_strs(strings: &[CString]) -> Vec<&CStr> {
    strings.iter().map(CString::as_c_str).collect()
}

fn digest_of(path: &Path, limit: u64) -> Result<Register, Failure> {
    let shown = || path.display().to_string();
    let mut file = File::open(path).with_context(shown).map_err(Failure::io)?;
    let mut digest = FileDigest::default();
    let mut buffer = vec![0; 1 << 20];
    let mut total: u64 = 0;
    loop {
        let len = file
            .read(&mut buffer)
            .with_context(shown)
            .map_err(Failure::io)?;
        if len == 0 {
            return Ok(digest.finish());
        }
        total = total.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        if total > limit {
            let error = anyhow!("{}: larger than {limit} bytes", path.display());
            return Err(Failure::new(Class::Malformed, "too-large", error));
        }
        digest.update(&buffer[..len]);
    }
}
