//! The third story: products of public matrices go to a worker that nobody trusts. Answers stay the same without it, with
//! it, and while it cheats; and what it was sent is shown beside what it would have been sent without pads.
//!
//! Every claim is checked, and the story ends with failure if one does not hold. Between enclave and worker stands
//! [`Tap`]: it sees what a worker sees, and falsifies a product when told to.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{available_parallelism, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use casemate_testkit::deployment::{
    Deployment, EnclaveSettings, ProxyFacts, Role, SealFacts, http_get,
};
use casemate_testkit::tap::Tap;
use tokio::runtime::Runtime;

use crate::Arguments;
use crate::narrator::{Waiting, fact, failed, proved, scene, seconds, short, warning};
use crate::question::{self, Answer};
use crate::view::{self, View};

/// Masks for so many tokens: question and answer, and some.
const TOKENS: u64 = 200;
/// How long masks may take; unoptimised programs on busy machines need most of it.
const PATIENCE: Duration = Duration::from_secs(300);
/// A process that used less than this share of a processor for a second has nothing to do.
const RESTING: f64 = 0.2;

/// What was claimed, and whether it holds.
#[derive(Default)]
pub(crate) struct Claims {
    broken: usize,
}

impl Claims {
    /// Shows a claim and remembers one that does not hold.
    pub(crate) fn claim(&mut self, holds: bool, what: &str) {
        match holds {
            true => proved(what),
            false => {
                failed(what);
                self.broken += 1;
            }
        }
    }

    /// Whether all hold.
    #[cfg(test)]
    pub(crate) fn holds(&self) -> bool {
        self.broken == 0
    }

    fn conclude(&self) -> Result<()> {
        match self.broken {
            0 => Ok(()),
            1 => bail!("one claim does not hold"),
            n => bail!("{n} claims do not hold"),
        }
    }
}

/// Tells the story.
pub(crate) fn tell(arguments: &Arguments, model: &Path, html: Option<&Path>) -> Result<()> {
    if !model.exists() {
        bail!("there is no model at {}", model.display());
    }
    let directory = tempfile::Builder::new().prefix("casemate-").tempdir()?;
    let programs = Deployment::programs_of_this_build()?;
    let mut stage = Stage {
        deployment: Deployment::new(&programs, directory.path())?,
        runtime: Runtime::new()?,
        question: &arguments.question,
        claims: Claims::default(),
    };
    let sealed = stage.prepare(model, &arguments.name)?;

    scene("Nobody helps");
    let proxy = stage.serve(None)?;
    let alone = stage.ask(&proxy, &sealed)?;

    scene("A worker that nobody trusts");
    let tap = stage.bring_worker(&sealed)?;
    let proxy = stage.serve(Some("full-linear"))?;
    stage.wait_for_masks()?;
    tap.take();
    let helped = stage.ask(&proxy, &sealed)?;
    let seen = tap.take();
    stage.compare(
        &alone,
        &helped,
        "the same answer, with the worker and without",
    );
    let outside = stage.metric("offload_rows_total")?;
    stage.claims.claim(
        outside > 0.0 && !seen.messages.is_empty(),
        "the worker computed products of it",
    );
    let misconduct = stage.metric("offload_misconduct_total")?;
    stage.claims.claim(
        misconduct == 0.0,
        "every product passed its check with two secret vectors",
    );

    scene("What the worker saw");
    let view = View::new(&stage.deployment, &sealed, seen, stage.question, &helped)?;
    view.show(&mut stage.claims);
    if let Some(path) = html {
        fs::write(path, view.html(&sealed.name))
            .with_context(|| format!("cannot write {}", path.display()))?;
        fact("as a page", &path.display().to_string());
    }
    view::limits().iter().for_each(|limit| warning(limit));

    scene("The worker cheats");
    stage.wait_for_masks()?;
    tap.falsify_next_product();
    let cheated = stage.ask(&proxy, &sealed)?;
    stage.claims.claim(
        tap.falsified() == 1,
        "one number of one product was falsified, by 1",
    );
    stage.compare(&alone, &cheated, "the same answer all the same");
    stage.quarantine(misconduct)?;
    stage.claims.conclude()
}

struct Stage<'a> {
    deployment: Deployment,
    runtime: Runtime,
    question: &'a str,
    claims: Claims,
}

impl Stage<'_> {
    /// Everything before an enclave can be configured.
    fn prepare(&mut self, model: &Path, name: &str) -> Result<SealFacts> {
        scene("At the provider");
        let deployment = &mut self.deployment;
        deployment.start_fake_tee()?;
        warning(
            "a fake TEE signs the evidence: everything is checked as it would be, and nothing protected",
        );
        deployment.start_broker()?;
        deployment.keygen()?;
        deployment.publish_tensors(&["*"]);
        deployment.show_progress(true);
        let sealed = deployment.seal(model, name, 1)?;
        deployment.show_progress(false);
        proved(
            "the model is sealed, and its signed manifest marks the matrices public: this one is",
        );
        fact("model", &sealed.name);
        fact("model digest", &short(&sealed.digest));
        Ok(sealed)
    }

    /// An enclave by a new configuration, measured, admitted and attested as any, and a proxy that verified it. One
    /// that ran before ends.
    fn serve(&mut self, offload: Option<&'static str>) -> Result<ProxyFacts> {
        let deployment = &mut self.deployment;
        deployment.stop(Role::Proxy);
        deployment.stop(Role::Enclave);
        let settings = EnclaveSettings {
            compute: "int8-row",
            offload,
            ..EnclaveSettings::default()
        };
        deployment.configure_enclave(&settings)?;
        deployment.measure_enclave()?;
        deployment.write_policies()?;
        deployment.admit_model()?;
        let waiting =
            Waiting::new("the enclave starts, attests, opens the model, recomputes every digest");
        let enclave = deployment.start_enclave()?;
        let proxy = deployment.start_proxy()?;
        drop(waiting);
        deployment.verify()?;
        proved("an enclave with this configuration is measured, attested and verified by its user");
        fact("ready in", &seconds(enclave.took));
        fact("plan", offload.unwrap_or("none: every product inside"));
        Ok(proxy)
    }

    fn bring_worker(&mut self, sealed: &SealFacts) -> Result<Tap> {
        let deployment = &mut self.deployment;
        let threads = available_parallelism().map_or(1, usize::from);
        let memory = sealed.bytes * 8 + (1 << 30);
        let worker = deployment.start_worker_with(&memory.to_string(), threads)?;
        let path = deployment.work_dir().join("tap.sock");
        let tap = Tap::start(&path, worker.parse()?)?;
        let pool_bytes = pool_bytes(deployment, sealed)?;
        deployment.reach_worker_at(&tap.address().to_string(), pool_bytes);
        fact(
            "casemate-worker",
            "a process of its own, without keys, masks or engine",
        );
        fact(
            "between it and the enclave",
            "a tap that sees what a worker sees, and can cheat in its name",
        );
        Ok(tap)
    }

    fn ask(&self, proxy: &ProxyFacts, sealed: &SealFacts) -> Result<Answer> {
        fact("user", self.question);
        println!();
        print!("      ");
        let asked = question::ask(&proxy.url, &sealed.name, self.question);
        let answer = self.runtime.block_on(asked)?;
        println!();
        let rate = answer
            .rate()
            .map_or(String::new(), |r| format!(", then {r:.1} tokens/s"));
        fact(
            "first token",
            &format!(
                "{}{rate} ({} tokens)",
                seconds(answer.first_token),
                answer.tokens
            ),
        );
        Ok(answer)
    }

    fn compare(&mut self, expected: &Answer, found: &Answer, what: &str) {
        let same = expected.text == found.text && expected.tokens == found.tokens;
        self.claims.claim(same, what);
    }

    fn metric(&self, name: &str) -> Result<f64> {
        let text = http_get(&self.deployment.enclave()?.url, "/metrics")?.body;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("casemate_{name} ")));
        let value = line.with_context(|| format!("the enclave has no metric {name}"))?;
        Ok(value.parse()?)
    }

    /// Waits until the worker holds the matrices, and until the enclave has nothing to do but wait, for then it has
    /// made all masks that it has room for. (How many there are it tells nobody.)
    fn wait_for_masks(&mut self) -> Result<()> {
        let waiting = Waiting::new(
            "the worker takes the matrices; while nobody asks, the enclave makes masks",
        );
        let started = Instant::now();
        let end = started + PATIENCE;
        let enclave = self.deployment.program(Role::Enclave);
        let enclave = enclave.context("the enclave runs")?.pid();
        loop {
            let before = processor_seconds(enclave)?;
            sleep(Duration::from_secs(1));
            let used = processor_seconds(enclave)? - before;
            if self.metric("offload_masks_ready")? >= 1.0 && used < RESTING && self.admitted()? {
                break;
            }
            if Instant::now() >= end {
                bail!("no worker or no masks in {} s", PATIENCE.as_secs());
            }
        }
        drop(waiting);
        fact("masks made in idle time in", &seconds(started.elapsed()));
        Ok(())
    }

    /// The enclave's log.
    fn log(&mut self) -> Result<String> {
        let enclave = self.deployment.program(Role::Enclave);
        let log = enclave.context("the enclave runs")?.log().to_owned();
        Ok(fs::read_to_string(log)?)
    }

    fn admitted(&mut self) -> Result<bool> {
        Ok(self.log()?.contains("the worker holds all matrices"))
    }

    /// That what the worker did was noticed, and what became of it.
    fn quarantine(&mut self, before: f64) -> Result<()> {
        let misconduct = self.metric("offload_misconduct_total")?;
        self.claims.claim(
            misconduct == before + 1.0,
            "the enclave noticed, and computed that product and those after it itself",
        );
        fact(
            "offload_misconduct_total",
            &format!("{before} → {misconduct}"),
        );
        let log = self.log()?;
        let event = log
            .lines()
            .rev()
            .find(|line| line.contains("in quarantine"));
        self.claims
            .claim(event.is_some(), "the worker is in quarantine");
        if let Some(event) = event {
            let said = event.split_once("WARN").map_or(event, |(_, said)| said);
            let said: String = said.chars().filter(|c| !c.is_control()).collect();
            warning(&format!("the enclave's log: {}", said.trim()));
        }
        Ok(())
    }
}

/// Room for masks of [`TOKENS`] tokens: 4 bytes for each output of each matrix.
fn pool_bytes(deployment: &Deployment, sealed: &SealFacts) -> Result<u64> {
    let model = view::unlock(deployment, sealed)?;
    let tensors = model.manifest().tensors().iter();
    let matrices = tensors.filter(|tensor| tensor.shape.len() == 2);
    Ok(matrices.map(|tensor| 4 * TOKENS * tensor.shape[0]).sum())
}

/// Processor time that a process has used.
fn processor_seconds(pid: u32) -> Result<f64> {
    let path = PathBuf::from(format!("/proc/{pid}/stat"));
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    // Behind the name, which may hold anything, the 12th and 13th field: in hundredths of a second.
    let fields = text.rsplit(')').next().unwrap_or_default();
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: Vec<f64> = ticks.map(str::parse).collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<f64>() / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_claim_that_does_not_hold_is_a_failure() {
        let mut claims = Claims::default();
        claims.claim(true, "one and one is two");
        assert!(claims.conclude().is_ok());
        claims.claim(false, "one and one is three");
        assert!(claims.conclude().is_err());
        claims.claim(true, "nothing repairs it");
        assert!(claims.conclude().is_err());
    }

    #[test]
    fn the_time_of_a_process_is_that_of_its_work() {
        let own = std::process::id();
        let before = processor_seconds(own).unwrap();
        let mut x = 1u64;
        let started = Instant::now();
        while processor_seconds(own).unwrap() < before + 0.05 {
            assert!(
                started.elapsed() < Duration::from_secs(60),
                "no time is counted"
            );
            (0..1_000_000).for_each(|i| x = std::hint::black_box(x.wrapping_mul(i | 1)));
        }
        assert!(processor_seconds(u32::MAX).is_err());
    }
}
