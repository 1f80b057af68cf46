//! System calls of the engine's threads while they decode, counted by `strace`, which attaches to those threads for that
//! long, and to no others: each stop of a thread wakes the tracer, which takes the processor from somebody. Where there is no tracer, or it may not attach, the result says so: never zero.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use casemate_engine::Engine;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::drive::{self, Load, Watch};

/// Tokens before the tracer attaches, and those that may pass while it does.
const BEFORE: usize = 8;
/// How long the tracer may take to attach or to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// System calls of the engine's threads, or why they are not known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SystemCalls {
    Measured {
        /// Tokens that came meanwhile.
        tokens: usize,
        /// All calls of the engine's threads between attaching and detaching.
        calls: u64,
        per_token: f64,
        /// Calls by name.
        names: BTreeMap<String, u64>,
    },
    NotMeasured {
        why: String,
    },
}

/// What is put on the engine for it. The tracer attaches while tokens go on coming, a small model's fast, so there must be
/// far more of them than are counted; the rest is cancelled.
pub(crate) fn load(prompt: usize, tokens: usize) -> Load {
    Load::single(prompt, BEFORE + tokens + 1792)
}

/// Counts over `tokens` decoded tokens of one request.
pub(crate) fn measure(engine: &Engine, prompt: usize, tokens: usize) -> SystemCalls {
    match count(engine, prompt, tokens) {
        Ok(counted) => counted,
        Err(error) => SystemCalls::NotMeasured {
            why: format!("{error:#}"),
        },
    }
}

fn count(engine: &Engine, prompt: usize, tokens: usize) -> Result<SystemCalls> {
    let threads = engine_threads()?;
    ensure!(!threads.is_empty(), "the engine's threads were not found");
    let mut load = load(prompt, tokens);
    load.tokens = load.tokens.min(engine.context() - prompt);
    let watch = Arc::new(Watch::default());
    let generated = || watch.generated.load(Ordering::Relaxed);
    let log = tempfile::NamedTempFile::new()?;
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| drive::run(engine, load, 0x5ca1, Some(&watch)));
        let reached = |count: usize, look: Duration| {
            while generated() < count && !answer.is_finished() {
                std::thread::sleep(look);
            }
        };
        reached(BEFORE, Duration::from_millis(1));
        let traced = Tracer::attach(log.path(), &threads).and_then(|tracer| {
            let first = generated();
            // Seldom: looking, too, takes the processor from somebody.
            reached(first + tokens, Duration::from_millis(50));
            let traced = generated() - first;
            tracer.detach()?;
            ensure!(
                traced >= tokens,
                "the answer was over after {traced} of {tokens} tokens to be traced"
            );
            Ok(traced)
        });
        // Whatever became of it, there is nothing more to learn from the answer.
        watch.enough.store(true, Ordering::Relaxed);
        drop(answer.join());
        let tokens = traced?;
        let text = fs::read_to_string(log.path())?;
        let names = calls_by_name(&text, &threads);
        let calls = names.values().sum();
        Ok(SystemCalls::Measured {
            tokens,
            calls,
            per_token: calls as f64 / tokens as f64,
            names,
        })
    })
}

/// Ids of the engine's threads: `casemate-engine`, and `casemate-N` for the members of its team.
fn engine_threads() -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/task")? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if is_engines(name.trim()) {
            found.extend(entry.file_name().to_string_lossy().parse::<u32>());
        }
    }
    Ok(found)
}

fn is_engines(name: &str) -> bool {
    let rest = name.strip_prefix("casemate-").unwrap_or_default();
    rest == "engine" || (!rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
}

/// Calls in a log of `strace -f -o`, each line `ID name(…`, of these threads. Signals, exits and the second half of calls
/// that were interrupted in the log are no calls.
fn calls_by_name(log: &str, threads: &[u32]) -> BTreeMap<String, u64> {
    let mut names = BTreeMap::new();
    for line in log.lines() {
        let Some((id, call)) = line.split_once(char::is_whitespace) else {
            continue;
        };
        let ours = id.parse().is_ok_and(|id| threads.contains(&id));
        let name = call
            .trim_start()
            .split_once('(')
            .map_or("", |(name, _)| name);
        let is_name =
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        // A call that was under way when the tracer came was not made while it watched.
        if ours && is_name && name != "restart_syscall" {
            *names.entry(name.to_owned()).or_insert(0) += 1;
        }
    }
    names
}

/// A running `strace` of some threads.
struct Tracer(Child);

impl Tracer {
    fn attach(log: &std::path::Path, threads: &[u32]) -> Result<Tracer> {
        let ids: Vec<String> = threads.iter().map(u32::to_string).collect();
        let mut child = Command::new("strace")
            .arg("-o")
            .arg(log)
            .args(["-p", &ids.join(",")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => anyhow::anyhow!("strace is not installed"),
                _ => anyhow::Error::new(error).context("strace cannot be started"),
            })?;
        let stderr = child.stderr.take().context("strace's messages are piped")?;
        let mut tracer = Tracer(child);
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let deadline = Instant::now() + PATIENCE;
        let mut said = String::new();
        let mut attached = 0;
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(" attached") => {
                    attached += 1;
                    if attached == threads.len() {
                        return Ok(tracer);
                    }
                }
                Ok(line) => said = line,
                Err(mpsc::RecvTimeoutError::Timeout) => bail!("strace did not attach in time"),
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let _ = tracer.0.wait();
                    bail!("strace did not attach: {said}");
                }
            }
        }
    }

    fn detach(mut self) -> Result<()> {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.context("strace has a process number")?, Signal::INT)?;
        let deadline = Instant::now() + PATIENCE;
        while self.0.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "strace did not detach in time");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_name_and_thread() {
        let log = "\
12 futex(0x7f, FUTEX_WAKE_PRIVATE, 1) = 1
12   sched_yield() = 0
13 futex(0x7f, FUTEX_WAIT_PRIVATE, 2, NULL <unfinished ...>
14 write(1, \"futex(\", 6) = 6
12 restart_syscall(<... resuming interrupted read ...> <unfinished ...>
13 <... futex resumed>) = 0
12 --- SIGURG {si_signo=SIGURG} ---
13 +++ exited with 0 +++
";
        let counted = calls_by_name(log, &[12, 13]);
        let expected = [("futex".to_owned(), 2), ("sched_yield".to_owned(), 1)];
        assert_eq!(counted, BTreeMap::from(expected));
        assert_eq!(calls_by_name(log, &[14]).values().sum::<u64>(), 1);
    }

    #[test]
    fn the_engines_threads_are_known_by_name() {
        for (name, ours) in [
            ("casemate-engine", true),
            ("casemate-1", true),
            ("casemate-bench", false),
            ("casemate-", false),
            ("tokio-runtime-w", false),
        ] {
            assert_eq!(is_engines(name), ours, "{name}");
        }
    }
}
