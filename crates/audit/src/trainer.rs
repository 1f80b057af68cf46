//! The process that trains students: a script of ours, run by a Python that has PyTorch. Jobs go in and events come out as
//! lines of JSON; bulk lies in files.
//!
//! ```text
//! → {"job": "student", "name", "architecture", "weights": {"file", "tensors": [{"name", "shape", "offset"}]},
//!    "take": [names], "examples": file, "steps", "batch", "rate", "seed", "held_out": [[ids]], "log_probabilities": file,
//!    "prompts": [[ids]], "continue": tokens,
//!    "transcript": null or {"file", "lengths": [tokens], "stacks": [{"name", "columns", "offset", "rotation"}]}}
//! ← {"event": "ready", "torch"} once, then for each job {"event": "step", "step", "loss"}…, and at its end
//!    {"event": "done", "continuations": [[ids]]} or {"event": "error", "message"}
//! ```
//! The script takes `take` of the model's tensors (f32, little-endian) as it finds them and draws the others, trains on the examples, and writes its
//! log-probabilities behind each token of the held-out texts but the last: f32, little-endian, text by text. An example is
//! `{"prompt": [ids], "answer": [ids], "told": [[[id, log-probability]]]}`, `told` empty where nothing was. A transcript has the rows of the
//! first examples, all tokens of prompt and answer one after the other, for each stack of matrices at its offset: f32 of length 1, as the rotation (a matrix
//! at its own offset, which rows are multiplied with from the right) leaves them.

use std::fs;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::recorded::Features;
use crate::victim::{Architecture, Placed};

const SCRIPT: &str = include_str!("../../../tools/extraction/student.py");
const REQUIREMENTS: &str = include_str!("../../../tools/extraction/requirements.txt");
/// Longest line that the process may write.
const MAX_LINE: u64 = 16 << 20;

/// One student to train and try.
#[derive(Serialize)]
pub(crate) struct Job<'a> {
    pub(crate) job: &'static str,
    pub(crate) name: &'a str,
    pub(crate) architecture: &'a Architecture,
    pub(crate) weights: Weights<'a>,
    pub(crate) take: &'a [&'a str],
    pub(crate) examples: &'a Path,
    pub(crate) steps: usize,
    pub(crate) batch: usize,
    pub(crate) rate: f64,
    pub(crate) seed: u64,
    pub(crate) held_out: &'a [Vec<u32>],
    pub(crate) log_probabilities: &'a Path,
    pub(crate) prompts: &'a [Vec<u32>],
    #[serde(rename = "continue")]
    pub(crate) tokens: usize,
    /// What a worker saw of the first examples, if that is known.
    pub(crate) transcript: Option<&'a Features>,
}

/// The model's tensors, all of them; which a student may know stands in its job.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Weights<'a> {
    pub(crate) file: &'a Path,
    pub(crate) tensors: &'a [Placed],
}

#[derive(Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Event {
    Ready { torch: String },
    Step { step: usize, loss: f64 },
    Done { continuations: Vec<Vec<u32>> },
    Error { message: String },
}

/// What a student says.
pub(crate) struct Student {
    /// For each held-out text, behind each of its tokens but the last.
    pub(crate) log_probabilities: Vec<Vec<Vec<f32>>>,
    pub(crate) continuations: Vec<Vec<u32>>,
}

/// The running script.
pub(crate) struct Trainer {
    child: Child,
    jobs: Option<ChildStdin>,
    events: BufReader<ChildStdout>,
    /// Its version of PyTorch.
    pub(crate) torch: String,
}

impl Trainer {
    /// Starts the script, which is written into `folder`.
    pub(crate) fn start(python: &Path, folder: &Path, threads: usize) -> Result<Self> {
        let script = folder.join("student.py");
        fs::write(&script, SCRIPT)?;
        let mut child = Command::new(python)
            .arg(&script)
            .arg(threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", python.display()))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (jobs, events) = pipes.context("the process has no pipes")?;
        let mut trainer = Self {
            child,
            jobs: Some(jobs),
            events: BufReader::new(events),
            torch: String::new(),
        };
        match trainer.event()? {
            Event::Ready { torch } => trainer.torch = torch,
            Event::Error { message } => bail!(
                "{message}; --python names one that has the packages, or leave it out for a virtual environment"
            ),
            _ => bail!("the students' process does not say that it is ready"),
        }
        Ok(trainer)
    }

    /// Trains one student; `shown` hears of its progress.
    pub(crate) fn train(
        &mut self,
        job: &Job<'_>,
        vocab: usize,
        mut shown: impl FnMut(usize, f64),
    ) -> Result<Student> {
        let jobs = self.jobs.as_mut().context("the process has ended")?;
        let line = serde_json::to_string(job)?;
        writeln!(jobs, "{line}")
            .and_then(|()| jobs.flush())
            .context("the students' process has ended")?;
        let continuations = loop {
            match self.event()? {
                Event::Step { step, loss } => shown(step, loss),
                Event::Done { continuations } => break continuations,
                Event::Error { message } => bail!("{}: {message}", job.name),
                Event::Ready { .. } => bail!("the students' process began anew"),
            }
        };
        let within = |tokens: &Vec<u32>| {
            tokens.len() == job.tokens && tokens.iter().all(|&id| (id as usize) < vocab)
        };
        ensure!(
            continuations.len() == job.prompts.len() && continuations.iter().all(within),
            "{}: the continuations are not those that were asked for",
            job.name
        );
        Ok(Student {
            log_probabilities: read_rows(job.log_probabilities, job.held_out, vocab)?,
            continuations,
        })
    }

    fn event(&mut self) -> Result<Event> {
        let mut line = String::new();
        let mut limited = (&mut self.events).take(MAX_LINE);
        limited.read_line(&mut line)?;
        if line.is_empty() {
            let status = self.child.wait()?;
            bail!("the students' process ended early ({status}); what it said is above");
        }
        serde_json::from_str(&line).context("the students' process says something unknown")
    }
}

impl Drop for Trainer {
    fn drop(&mut self) {
        // The end of its input ends it; one that does not listen is ended.
        drop(self.jobs.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Log-probabilities as the script wrote them.
fn read_rows(path: &Path, texts: &[Vec<u32>], vocab: usize) -> Result<Vec<Vec<Vec<f32>>>> {
    let positions: usize = texts.iter().map(|text| text.len().saturating_sub(1)).sum();
    let expected = (positions * vocab * 4) as u64;
    let found = fs::metadata(path)?.len();
    ensure!(
        found == expected,
        "the log-probabilities have {found} bytes, not {expected}"
    );
    let bytes = fs::read(path)?;
    let (words, _) = bytes.as_chunks::<4>();
    let values: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
    ensure!(
        values
            .iter()
            .all(|value| value.is_finite() && *value <= 1e-3),
        "the students' process wrote what is no log-probability"
    );
    let mut rows = values.chunks_exact(vocab).map(<[f32]>::to_vec);
    let of = |text: &Vec<u32>| rows.by_ref().take(text.len().saturating_sub(1)).collect();
    Ok(texts.iter().map(of).collect())
}

/// The Python to use: one that is named, or that of a virtual environment, which is made where it is not there.
pub(crate) fn python(named: Option<&Path>, environment: Option<&Path>) -> Result<PathBuf> {
    if let Some(named) = named {
        return Ok(named.to_owned());
    }
    let environment = match environment {
        Some(environment) => environment.to_owned(),
        None => cache()?.join("casemate/extraction"),
    };
    let python = environment.join("bin/python");
    let complete = environment.join("complete");
    if fs::read_to_string(&complete).is_ok_and(|made| made == REQUIREMENTS) {
        return Ok(python);
    }
    eprintln!(
        "making a Python environment in {} with PyTorch from PyPI, once: about 4 GB, since its wheels bring CUDA libraries \
         that are not used here; --python names a Python that has torch and numpy instead",
        environment.display()
    );
    run(Command::new("python3")
        .args(["-m", "venv"])
        .arg(&environment))?;
    let packages = REQUIREMENTS.lines().filter(|line| !line.starts_with('#'));
    run(Command::new(&python)
        .args(["-m", "pip", "install", "--quiet"])
        .args(packages))?;
    fs::write(complete, REQUIREMENTS)?;
    Ok(python)
}

fn cache() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    set("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(set("HOME")?).join(".cache")))
        .context("there is no HOME; --venv says where the Python environment may lie")
}

/// What it prints is for people, and belongs beside our own messages.
fn run(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}");
    let status = command.stdout(Stdio::null()).status();
    let status = status.with_context(|| format!("cannot run {shown}"))?;
    ensure!(status.success(), "{shown} failed ({status})");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_those_of_the_texts_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        let write = |values: &[f32]| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            fs::write(&path, bytes).unwrap();
        };
        let texts = [vec![1, 0, 1], vec![0, 1], vec![0]];
        write(&[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]);
        let rows = read_rows(&path, &texts, 2).unwrap();
        assert_eq!(rows[0], [[-1.0, -2.0], [-3.0, -4.0]]);
        assert_eq!(rows[1], [[-5.0, -6.0]]);
        assert!(rows[2].is_empty());
        for wrong in [&[-1.0; 5][..], &[-1.0; 7], &[f32::NAN; 6], &[0.5; 6]] {
            write(wrong);
            assert!(read_rows(&path, &texts, 2).is_err(), "{wrong:?}");
        }
    }
}
