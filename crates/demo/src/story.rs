//! The story: preparation at the provider, then the nine steps from "request an instance" to "the user verifies".

use std::path::Path;

use anyhow::{Context, Result, bail};
use casemate_testkit::deployment::{Deployment, EnclaveSettings, ProxyFacts, SealFacts, http_get};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use crate::Arguments;
use crate::narrator::{Waiting, fact, proved, scene, seconds, short, step, warning};
use crate::question::{self, Answer};

/// Runs the whole deployment and asks the question.
pub(crate) fn tell(arguments: &Arguments, model: &Path) -> Result<()> {
    if !model.exists() {
        bail!("there is no model at {}", model.display());
    }
    let directory = tempfile::Builder::new().prefix("casemate-").tempdir()?;
    let mut deployment = Deployment::new(&Deployment::programs_of_this_build()?, directory.path())?;

    let sealed = prepare(&mut deployment, model, &arguments.name)?;
    let proxy = nine_steps(&mut deployment, &sealed)?;

    scene("The question");
    fact("system", question::SYSTEM);
    fact("user", &arguments.question);
    println!();
    print!("      ");
    let runtime = tokio::runtime::Runtime::new()?;
    let answer = runtime.block_on(question::ask(&proxy.url, &sealed.name, &arguments.question))?;
    timings(&deployment, &sealed, &proxy, &answer)?;
    if arguments.keep {
        keep(&runtime, &deployment, &proxy, &sealed.name)?;
    }
    Ok(())
}

fn prepare(deployment: &mut Deployment, model: &Path, name: &str) -> Result<SealFacts> {
    scene("At the provider");
    deployment.start_fake_tee()?;
    warning("this machine has no TEE that we use: a fake one signs quotes in the real TDX format");
    warning(
        "under a root of its own. Everything below is checked as it would be, and protects nothing.",
    );
    let keys = deployment.keygen()?;
    fact("provider's key", &short(&keys.provider));
    deployment.show_progress(true);
    let sealed = deployment.seal(model, name, 1)?;
    deployment.show_progress(false);
    proved("the model is sealed: encrypted, signed, nothing of it in clear on disk");
    fact(
        "model",
        &format!("{} version {}", sealed.name, sealed.version),
    );
    fact("model digest", &short(&sealed.digest));
    fact(
        "sealed file",
        &format!("{:.1} MB", sealed.bytes as f64 / 1e6),
    );
    let broker = deployment.start_broker()?;
    fact(
        "broker, issuer key",
        &format!("{}, {}", broker.url, short(&broker.issuer)),
    );
    Ok(sealed)
}

fn nine_steps(deployment: &mut Deployment, sealed: &SealFacts) -> Result<ProxyFacts> {
    step(1, "An instance is requested for a known image");
    deployment.configure_enclave(&EnclaveSettings::default())?;
    let measurement = deployment.measure_enclave()?;
    proved("the expected measurement was computed from files, before anything was started");
    for name in ["mr_td", "rtmr1", "rtmr2", "mr_config_id"] {
        if let Some(value) = find(&measurement.fields, name) {
            fact(name, &short(value));
        }
    }
    deployment.write_policies()?;
    deployment.admit_model()?;
    proved(
        "the broker's policy names that measurement and this model; the key is granted to nothing else",
    );

    let waiting =
        Waiting::new("the enclave starts, attests, opens the model, recomputes every digest");
    let enclave = deployment.start_enclave()?;
    drop(waiting);
    let log = deployment.administer(&["log".as_ref(), "show".as_ref(), "--json".as_ref()])?;
    let log = Log::parse(&log)?;
    let (attested, released, credential) = (
        log.allowed("attest")?,
        log.allowed("release")?,
        log.allowed("credential")?,
    );

    step(2, "Its address is received");
    fact("enclave", &enclave.url);

    step(3, "It is asked for a report that carries a public key");
    proved("a quote over the broker's single-use nonce and a key made inside the enclave");
    fact("evidence (SHA-256)", &short(text(attested, "evidence")));

    step(4, "A verifier checks that it is a genuine TEE");
    proved("quote signature, certificate chain, revocation lists and TCB level hold");
    warning("the root is the fake TEE's, which the policy names: VerifiedDevelopment, not a TEE");

    step(
        5,
        "Firmware and software are compared with values computed before launch",
    );
    proved(&format!(
        "executable, arguments, environment and configuration are those of {:?} in the policy",
        text(attested, "measurement")
    ));

    step(6, "The key is released");
    proved("policy checked again at release; decision in the hash-chained log before the key left");
    proved("the enclave checked the provider's signature on the grant");
    fact("log entry", &released["position"].to_string());
    fact("for model", &short(text(released, "model")));
    if text(released, "model") != sealed.digest {
        bail!("the key was released for another model than was sealed");
    }
    let head = deployment.administer(&["log".as_ref(), "verify".as_ref()])?;
    proved(&format!(
        "the log's chain verifies: {}",
        head.lines().next().unwrap_or("").trim()
    ));

    step(7, "The service is exposed");
    proved("every tensor's digest was recomputed from the bytes that compute");
    proved("a fresh keyset, bound by a second quote, has a credential of the broker");
    fact("service", text(credential, "subject"));
    fact("credential in log", &credential["position"].to_string());

    step(8, "The user opens a direct encrypted channel");
    let proxy = deployment.start_proxy()?;
    proved("chunked OHTTP to the key in the attested keyset; requests and answers are padded");
    fact("proxy", &proxy.url);

    step(
        9,
        "The user verifies the attestation, over a nonce of their own",
    );
    let transcript = deployment.verify()?;
    let (passed, skipped) = show_checks(&transcript)?;
    proved(&format!(
        "{passed} checks passed, {skipped} skipped and said so, none failed"
    ));
    Ok(proxy)
}

/// Prints the user's transcript, one line a check.
fn show_checks(transcript: &Value) -> Result<(usize, usize)> {
    let checks = find_array(transcript, "checks").context("the verdict lists its checks")?;
    let (mut passed, mut skipped) = (0, 0);
    for check in checks {
        match check["status"].as_str() {
            Some("passed") => {
                passed += 1;
                fact(text(check, "name"), &shorten(text(check, "found")));
            }
            Some("skipped") => {
                skipped += 1;
                fact(text(check, "name"), "skipped");
            }
            _ => bail!("the user's verification failed: {check}"),
        }
    }
    if passed == 0 {
        bail!("the user's verification checked nothing");
    }
    Ok((passed, skipped))
}

fn timings(
    deployment: &Deployment,
    sealed: &SealFacts,
    proxy: &ProxyFacts,
    answer: &Answer,
) -> Result<()> {
    let metrics = http_get(&deployment.enclave()?.url, "/metrics")?.body;
    let gauge = |name: &str| {
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok())
            .map(std::time::Duration::from_secs_f64)
    };
    scene("Timings");
    fact("seal", &seconds(sealed.took));
    for (name, metric) in [
        ("key release", "casemate_key_release_seconds"),
        ("open, check, pack", "casemate_model_load_seconds"),
    ] {
        fact(
            name,
            &seconds(gauge(metric).with_context(|| format!("no metric {metric}"))?),
        );
    }
    fact("proxy verified in", &seconds(proxy.took));
    fact("first token", &seconds(answer.first_token));
    let rate = answer
        .rate()
        .map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1} tokens/s"));
    fact("then", &format!("{rate} ({} tokens)", answer.tokens));
    Ok(())
}

fn keep(
    runtime: &tokio::runtime::Runtime,
    deployment: &Deployment,
    proxy: &ProxyFacts,
    model: &str,
) -> Result<()> {
    scene("It keeps running");
    println!(
        "  curl -s {}/v1/chat/completions -H 'Content-Type: application/json' \\",
        proxy.url
    );
    println!(
        "    -d '{{\"model\": \"{model}\", \"temperature\": 0, \"messages\": [{{\"role\": \"user\", \"content\": \"Hello!\"}}]}}'\n"
    );
    println!("  from openai import OpenAI");
    println!(
        "  print(OpenAI(base_url=\"{}/v1\", api_key=\"-\").chat.completions.create(model=\"{model}\", \
         temperature=0, messages=[{{\"role\": \"user\", \"content\": \"Hello!\"}}]).choices[0].message.content)\n",
        proxy.url
    );
    println!("  without --model it is a small model, which never learnt to call tools\n");
    println!("  files and logs: {}", deployment.work_dir().display());
    println!("  Ctrl-C ends it and removes them");
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => interrupted,
            _ = terminate.recv() => Ok(()),
        }
    })?;
    Ok(())
}

/// The broker's decisions.
struct Log(Vec<Value>);

impl Log {
    fn parse(lines: &str) -> Result<Self> {
        let entries = lines
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>();
        Ok(Self(
            entries.context("the broker's log is one JSON object a line")?,
        ))
    }

    /// The latest decision of a kind, which must have allowed it.
    fn allowed(&self, action: &str) -> Result<&Value> {
        let entry = self.0.iter().rev().find(|entry| entry["action"] == action);
        let entry = entry.with_context(|| format!("the broker's log has no {action}"))?;
        // On a real TEE it would be "genuine".
        if entry["verdict"] != "development" {
            bail!("the broker's log says: {entry}");
        }
        Ok(entry)
    }
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or("-")
}

fn shorten(found: &str) -> String {
    let line = found.lines().next().unwrap_or("");
    if line.len() >= 64 && line.bytes().all(|b| b.is_ascii_hexdigit()) {
        return short(line);
    }
    match line.char_indices().nth(70) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

/// The first text under `name`, however deep.
fn find<'a>(value: &'a Value, name: &str) -> Option<&'a str> {
    match value {
        Value::Object(object) => object
            .get(name)
            .and_then(Value::as_str)
            .or_else(|| object.values().find_map(|inner| find(inner, name))),
        Value::Array(list) => list.iter().find_map(|inner| find(inner, name)),
        _ => None,
    }
}

fn find_array<'a>(value: &'a Value, name: &str) -> Option<&'a Vec<Value>> {
    match value {
        Value::Object(object) => object
            .get(name)
            .and_then(Value::as_array)
            .or_else(|| object.values().find_map(|inner| find_array(inner, name))),
        _ => None,
    }
}
