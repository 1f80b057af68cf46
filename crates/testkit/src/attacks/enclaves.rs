//! Attacks on the start of an enclave: another program, other circumstances, another broker. The attacker is the host's
//! administrator, who starts what he likes and redirects what he likes.

use std::fs::{self, OpenOptions};
use std::io::Write;

use super::ground::{NAME, replace};
use super::{Ground, Miss, Refusal};

pub(super) fn other_image(ground: &mut Ground) -> Result<Refusal, Miss> {
    let mut launch = ground.enclave_launch();
    let image = ground.path("casemate-enclave");
    fs::copy(&launch.executable, &image)?;
    OpenOptions::new()
        .append(true)
        .open(&image)?
        .write_all(&[0])?;
    launch.executable = image;
    ground.refused_start(&launch)
}

pub(super) fn other_arguments(ground: &mut Ground) -> Result<Refusal, Miss> {
    let launch = ground.enclave_launch().option("--log", "trace");
    ground.refused_start(&launch)
}

pub(super) fn other_environment(ground: &mut Ground) -> Result<Refusal, Miss> {
    let mut launch = ground.enclave_launch();
    launch
        .environment
        .push(("LD_LIBRARY_PATH".into(), "/nowhere".into()));
    ground.refused_start(&launch)
}

pub(super) fn other_configuration(ground: &mut Ground) -> Result<Refusal, Miss> {
    let config = ground.deployment.work_dir().join("enclave.toml");
    let measured = fs::read_to_string(&config)?;
    fs::write(
        &config,
        replace(&measured, "max_batch = 2", "max_batch = 3")?,
    )?;
    let refusal = ground.refused_start(&ground.enclave_launch());
    fs::write(&config, measured)?;
    refusal
}

/// The stranger's broker accepts the provider's enclave, and releases to it the stranger's key, granted by the
/// stranger.
pub(super) fn impostor_grants(ground: &mut Ground) -> Result<Refusal, Miss> {
    divert(ground, &format!("default/model/{NAME}"))
}

/// The stranger's broker has the provider's grant too, and signs the credential itself.
pub(super) fn impostor_signs(ground: &mut Ground) -> Result<Refusal, Miss> {
    let grant = ground.deployment.work_dir().join("grant");
    let stolen = "default/model/stolen";
    ground.stranger()?.administer(&[
        "resource".as_ref(),
        "put".as_ref(),
        stolen.as_ref(),
        "--grant".as_ref(),
        grant.as_os_str(),
        "--service".as_ref(),
        NAME.as_ref(),
    ])?;
    divert(ground, stolen)
}

/// Starts the provider's enclave so that it asks the stranger's broker for `resource`. The keys it pins stay those of
/// the provider: they are what the attacker does not have.
fn divert(ground: &mut Ground, resource: &str) -> Result<Refusal, Miss> {
    let config = ground.path("enclave.toml");
    let measured = fs::read_to_string(ground.deployment.work_dir().join("enclave.toml"))?;
    let ours = ground.deployment.broker()?.url.clone();
    let theirs = ground.stranger()?.broker()?.url.clone();
    let diverted = replace(&measured, &ours, &theirs)?;
    let diverted = replace(&diverted, &format!("default/model/{NAME}"), resource)?;
    fs::write(&config, diverted)?;

    // The impostor accepts whatever the diverted enclave is measured as.
    let launch = ground
        .deployment
        .launch("casemate-enclave", "casemate-enclave")
        .option("--config", &config);
    let measure = ground
        .deployment
        .launch("casemate-measure", "casemate")
        .arg("measure")
        .option("--exe", &launch.executable)
        .option("--config", &config);
    let entry = measure.run(&ground.path(""), false)?;
    let policy = ground.path("policy.toml");
    let accepting = ground.stranger()?;
    let current = accepting.administer(&["policy".as_ref(), "show".as_ref()])?;
    let version = version_of(&current)?;
    // The policy's own version stands first; the model's minimum version has a line that ends alike.
    let line = |version: u64| format!("version = {version}\n");
    let next = current.replacen(&line(version), &line(version + 1), 1);
    let at = next.find("[[measurement]]").unwrap_or(next.len());
    let (front, back) = next.split_at(at);
    // An entry's name is for people, and occurs once.
    let entry = replace(&entry, "name = \"", &format!("name = \"{} ", version + 1))?;
    fs::write(&policy, format!("{front}{entry}\n{back}"))?;
    accepting.administer(&["policy".as_ref(), "set".as_ref(), policy.as_os_str()])?;
    ground.refused_start(&launch)
}

fn version_of(policy: &str) -> Result<u64, Miss> {
    let line = policy
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("version = "));
    let version = line.and_then(|version| version.trim().parse().ok());
    version.ok_or_else(|| Miss::Broken(format!("no version in {policy}")))
}
