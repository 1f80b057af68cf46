//! One audit: asks as attackers do, has students trained on what they got, and compares those with the model.

use std::fs;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use casemate_audit::transcript::{centred, from_bytes, to_bytes};
use casemate_enclave::api::Extraction;
use serde_json::json;

use crate::metrics::{self, Forced};
use crate::options::{Args, Policy};
use crate::probe::probe;
use crate::recorded::{Features, FirstRows, Recorded, Worker, record};
use crate::report::{FORM, Point, Probe, Program, Protocol, Report, Scores, VictimFacts};
use crate::service::{Answer, Query, Service, Words};
use crate::texts::Texts;
use crate::trainer::{self, Job, Student, Trainer, Weights};
use crate::victim::{Architecture, Placed, Victim, transcript};

/// Tokens of a held-out text, of which the first are the prompt of a continuation.
const HELD_OUT_TOKENS: usize = 96;
const CONTINUED_FROM: usize = 16;
const CONTINUED_BY: usize = 48;
/// How fast a student learns that begins with nothing, and one that begins with some of the model's weights.
const RATE: f64 = 4e-3;
const RATE_BEHIND_WEIGHTS: f64 = 2e-3;
/// Most frequent tokens that the probe tells apart, and tokens that it looks through for them.
const PROBED: usize = 16;
const PROBED_AMONG: usize = 12_000;
/// Rows that the probe is given.
const PROBED_ROWS: usize = 2_000;

/// Matrices that a worker computes with, by the ends of their names.
pub(crate) const OFFLOADED: [&str; 7] = [
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_output.weight",
    "ffn_gate.weight",
    "ffn_up.weight",
    "ffn_down.weight",
];

/// Somebody who copies the model.
struct Attacker {
    name: &'static str,
    /// What is told, in words.
    told: String,
    /// Index of the answers it has, or none.
    answers: Option<usize>,
    takes: Takes,
    /// What a worker saw, if it has that.
    transcript: Option<Features>,
}

/// What of the model's weights an attacker has.
#[derive(Clone, Copy, PartialEq)]
enum Takes {
    Nothing,
    Offloaded,
    Everything,
}

impl Takes {
    fn of(self, tensors: &[Placed]) -> Vec<&str> {
        let offloaded = |name: &str| OFFLOADED.iter().any(|end| name.ends_with(end));
        let names = tensors.iter().map(|tensor| tensor.name.as_str());
        match self {
            Self::Nothing => Vec::new(),
            Self::Offloaded => names.filter(|name| offloaded(name)).collect(),
            Self::Everything => names.collect(),
        }
    }
}

/// What the victim says of the held-out texts.
struct Reference {
    held_out: Vec<Vec<u32>>,
    log_probabilities: Vec<Vec<Vec<f32>>>,
    prompts: Vec<Vec<u32>>,
    continuations: Vec<Vec<u32>>,
}

impl Reference {
    fn new(victim: &Victim, held_out: Vec<Vec<u32>>) -> Result<Self> {
        let all = |text: &Vec<u32>| victim.log_probabilities(&text[..text.len() - 1]);
        let log_probabilities = held_out.iter().map(all).collect::<Result<_>>()?;
        let prompts: Vec<Vec<u32>> = held_out
            .iter()
            .map(|text| text[..CONTINUED_FROM].to_vec())
            .collect();
        let continued = |prompt: &Vec<u32>| victim.continuation(prompt, CONTINUED_BY);
        let continuations = prompts.iter().map(continued).collect::<Result<_>>()?;
        Ok(Self {
            held_out,
            log_probabilities,
            prompts,
            continuations,
        })
    }

    fn scores(&self, victim: &Victim, student: &Student) -> Result<Scores> {
        let mut forced = Forced::default();
        let texts = self.held_out.iter().zip(&self.log_probabilities);
        for ((text, ours), theirs) in texts.zip(&student.log_probabilities) {
            for ((ours, theirs), next) in ours.iter().zip(theirs).zip(&text[1..]) {
                forced.add(ours, theirs, *next);
            }
        }
        let (mut agreed, mut positions) = (0usize, 0usize);
        for (prompt, said) in self.prompts.iter().zip(&student.continuations) {
            let whole = [prompt.as_slice(), said].concat();
            let rows = victim.log_probabilities(&whole)?;
            for (row, token) in rows[prompt.len() - 1..].iter().zip(said) {
                positions += 1;
                agreed += usize::from(metrics::top(row) == *token as usize);
            }
        }
        let ours = self.continuations.iter().map(Vec::as_slice);
        let theirs = student.continuations.iter().map(Vec::as_slice);
        let pairs: Vec<_> = theirs.zip(ours).collect();
        let text = |tokens: &[u32]| victim.tokenizer().decode(tokens);
        let texts: Vec<_> = pairs.iter().map(|(a, b)| (text(a), text(b))).collect();
        let texts: Vec<_> = texts
            .iter()
            .map(|(a, b)| (a.as_str(), b.as_str()))
            .collect();
        Ok(Scores {
            forced_agreement: forced.agreement(),
            free_agreement: agreed as f64 / positions.max(1) as f64,
            token_match: metrics::token_match(&pairs),
            bleu: metrics::bleu(&texts),
            kl: forced.kl(),
            perplexity: forced.perplexity(),
        })
    }

    /// The victim's own, beside which a student's stands.
    fn perplexity(&self) -> f64 {
        let mut forced = Forced::default();
        for (text, rows) in self.held_out.iter().zip(&self.log_probabilities) {
            for (row, next) in rows.iter().zip(&text[1..]) {
                forced.add(row, row, *next);
            }
        }
        forced.perplexity()
    }
}

/// Runs the whole audit.
pub(crate) fn run(args: &Args, command: String) -> Result<Report> {
    let started = time::OffsetDateTime::now_utc();
    let budgets = args.budgets()?;
    let policies = args.policies()?;
    let folder = tempfile::tempdir()?;
    let context = HELD_OUT_TOKENS.max(args.prompt_tokens + args.answer_tokens + 1);
    let victim = Victim::open(&args.model(), context, args.threads)?;
    let texts = Texts::read(
        &args.prompts(),
        victim.tokenizer(),
        args.held_out,
        HELD_OUT_TOKENS,
        args.prompt_tokens,
    )?;
    let most = budgets.last().copied().unwrap_or(0);
    let questions = texts.questions(most, args.prompt_tokens)?;
    // Nobody wants to learn after an hour that there is no PyTorch.
    let python = trainer::python(args.python.as_deref(), args.venv.as_deref())?;
    let mut trainer = Trainer::start(&python, folder.path(), args.threads)?;

    let reference = Reference::new(&victim, texts.held_out.clone())?;
    let (mut attackers, answers) = ask(args, &victim, policies, &questions)?;
    let recorded = match args.recorded {
        0 => None,
        count => Some(recorded(
            args,
            &victim,
            &questions,
            &answers[0],
            count,
            folder.path(),
        )?),
    };
    let probe = match &recorded {
        Some(recorded) => probed_recorded(recorded)?,
        None => probed(&victim, &texts, args.transcript.as_deref())?,
    };
    if let Some(recorded) = &recorded {
        // Before the last, who has everything.
        let at = attackers.len() - 1;
        attackers.splice(at..at, with_transcripts(recorded, folder.path())?);
    }
    let weights = folder.path().join("weights");
    let tensors = victim.write_weights(&weights)?;
    let school = School {
        args,
        folder: folder.path(),
        victim: &victim,
        architecture: victim.architecture(),
        weights: Weights {
            file: &weights,
            tensors: &tensors,
        },
        reference: &reference,
        questions: &questions,
    };
    let mut points = Vec::new();
    for attacker in &attackers {
        let budgets = match attacker.answers {
            None => &[0][..],
            Some(_) => &budgets,
        };
        for &queries in budgets {
            let got = attacker
                .answers
                .map_or(&[][..], |index| &answers[index][..queries]);
            points.push(school.teach(&mut trainer, attacker, got)?);
        }
    }
    Ok(Report {
        form: FORM,
        program: Program {
            version: env!("CARGO_PKG_VERSION").into(),
            command,
            started: started.format(&time::format_description::well_known::Rfc3339)?,
            torch: trainer.torch.clone(),
        },
        victim: VictimFacts::new(&victim, reference.perplexity()),
        protocol: Protocol {
            asked: args.endpoint.clone(),
            prompt_tokens: args.prompt_tokens,
            answer_tokens: args.answer_tokens,
            held_out: args.held_out,
            held_out_tokens: HELD_OUT_TOKENS,
            continued_from: CONTINUED_FROM,
            continued_by: CONTINUED_BY,
            steps: args.steps,
            batch: args.batch,
            seeds: args.seeds,
            recorded: recorded.as_ref().map_or(0, |recorded| recorded.texts.len()),
            offloaded: OFFLOADED.map(str::to_owned).to_vec(),
        },
        points,
        probe,
    })
}

/// Who attacks, and all answers that each kind of asking gets.
fn ask(
    args: &Args,
    victim: &Victim,
    policies: Vec<Policy>,
    questions: &[Vec<u32>],
) -> Result<(Vec<Attacker>, Vec<Vec<Answer>>)> {
    let mut services = Vec::new();
    match (&args.endpoint, &args.served_name) {
        (Some(url), Some(name)) => {
            let key = args.api_key_file.as_deref().map(read_key).transpose()?;
            let service = |key| Service::elsewhere(url, name, key);
            services.push(("answers".to_owned(), service(key.clone())?, None));
            if let Some(top) = args.top {
                let told = format!("log-probabilities as served, top {top}");
                services.push((told, service(key)?, Some(top)));
            }
        }
        _ => {
            let nothing = Service::inside(victim, Extraction::default());
            services.push(("answers".to_owned(), nothing, None));
            for policy in policies {
                let service = Service::inside(victim, policy.extraction);
                let told = format!("log-probabilities, {}", policy.text);
                services.push((told, service, Some(policy.top)));
            }
        }
    }
    let attacker = |name, told: &str, answers, takes| Attacker {
        name,
        told: told.to_owned(),
        answers,
        takes,
        transcript: None,
    };
    let mut attackers = vec![
        attacker("untrained", "nothing", None, Takes::Nothing),
        attacker("shield-all", "answers", Some(0), Takes::Nothing),
    ];
    for (index, (told, ..)) in services.iter().enumerate().skip(1) {
        attackers.push(attacker("soft labels", told, Some(index), Takes::Nothing));
    }
    attackers.extend([
        attacker(
            "gray-box",
            "answers, and the matrices of a worker",
            Some(0),
            Takes::Offloaded,
        ),
        attacker("no-shield", "every weight", None, Takes::Everything),
    ]);
    let words = Words::new(victim.tokenizer(), victim.config().vocab);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut answers = Vec::new();
    for (told, service, top) in &services {
        eprintln!("asking {} questions: {told}", questions.len());
        let query = |(seed, prompt): (u64, &Vec<u32>)| Query {
            prompt: prompt.clone(),
            tokens: args.answer_tokens,
            seed,
            top: *top,
        };
        let queries: Vec<_> = (0..).zip(questions).map(query).collect();
        answers.push(runtime.block_on(service.ask_all(&words, &queries))?);
    }
    Ok((attackers, answers))
}

/// Has the first questions and their answers computed by a worker, as whoever runs it and asks would see it.
fn recorded(
    args: &Args,
    victim: &Victim,
    questions: &[Vec<u32>],
    answers: &[Answer],
    count: usize,
    folder: &Path,
) -> Result<Recorded> {
    let whole = |(prompt, answer): (&Vec<u32>, &Answer)| {
        let mut text = [prompt.as_slice(), &answer.tokens].concat();
        text.truncate(victim.context());
        text
    };
    let texts: Vec<_> = questions
        .iter()
        .zip(answers)
        .map(whole)
        .take(count)
        .collect();
    eprintln!("recording what a worker is sent for {} texts", texts.len());
    let worker = Worker::find(args.worker.as_ref(), folder)?;
    let own = folder.join("transcript");
    let file = args.transcript.as_deref().unwrap_or(&own);
    record(victim, texts, args.threads, &worker, (file, folder))
}

/// Those who have answers, the matrices of a worker, and what it was sent.
fn with_transcripts(recorded: &Recorded, folder: &Path) -> Result<[Attacker; 2]> {
    let attacker = |name, told: &str, transcript| Attacker {
        name,
        told: told.to_owned(),
        answers: Some(0),
        takes: Takes::Offloaded,
        transcript: Some(transcript),
    };
    Ok([
        attacker(
            "transcripts",
            "answers, matrices of a worker, and what it was sent",
            recorded.masked_features(folder.join("masked"))?,
        ),
        attacker(
            "unmasked",
            "the same, sent without pads",
            recorded.plain_features(folder.join("plain"))?,
        ),
    ])
}

fn read_key(path: &Path) -> Result<String> {
    let key = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(key.trim().to_owned())
}

/// Everything that students have in common.
struct School<'a> {
    args: &'a Args,
    folder: &'a Path,
    victim: &'a Victim,
    architecture: Architecture,
    weights: Weights<'a>,
    reference: &'a Reference,
    questions: &'a [Vec<u32>],
}

impl School<'_> {
    /// Students of one attacker on what it got; the medians of their scores.
    fn teach(&self, trainer: &mut Trainer, attacker: &Attacker, got: &[Answer]) -> Result<Point> {
        let examples = self.write_examples(got)?;
        let rows = self.folder.join("log-probabilities");
        let take = attacker.takes.of(self.weights.tensors);
        // With nothing to learn from, or nothing to learn, one student is like another.
        let seeds = if got.is_empty() { 1 } else { self.args.seeds };
        let mut all = Vec::new();
        for seed in 0..seeds {
            let name = format!(
                "{}, {}, {} queries",
                attacker.name,
                attacker.told,
                got.len()
            );
            let job = Job {
                job: "student",
                name: &name,
                architecture: &self.architecture,
                weights: self.weights,
                take: &take,
                examples: &examples,
                steps: if got.is_empty() { 0 } else { self.args.steps },
                batch: self.args.batch,
                rate: match attacker.takes {
                    Takes::Nothing => RATE,
                    _ => RATE_BEHIND_WEIGHTS,
                },
                seed,
                held_out: &self.reference.held_out,
                log_probabilities: &rows,
                prompts: &self.reference.prompts,
                tokens: CONTINUED_BY,
                transcript: attacker.transcript.as_ref(),
            };
            eprintln!("student: {name}");
            let mut last = Instant::now();
            let student = trainer.train(&job, self.victim.vocab(), |step, loss| {
                if last.elapsed() > Duration::from_secs(15) {
                    last = Instant::now();
                    eprintln!("  step {step} of {}: loss {loss:.3}", self.args.steps);
                }
            })?;
            all.push(self.reference.scores(self.victim, &student)?);
        }
        Ok(Point {
            attacker: attacker.name.into(),
            told: attacker.told.clone(),
            queries: got.len(),
            tokens: got.iter().map(|answer| answer.spent).sum(),
            students: seeds,
            scores: Scores::median(&all),
        })
    }

    fn write_examples(&self, got: &[Answer]) -> Result<PathBuf> {
        let path = self.folder.join("examples");
        let mut file = BufWriter::new(fs::File::create(&path)?);
        for (prompt, answer) in self.questions.iter().zip(got) {
            let example = json!({
                "prompt": prompt,
                "answer": answer.tokens,
                "told": answer.told,
            });
            writeln!(file, "{example}")?;
        }
        file.flush()?;
        Ok(path)
    }
}

/// What can be read off the rows that a worker sees, and off the same without pads.
fn probed(victim: &Victim, texts: &Texts, keep: Option<&Path>) -> Result<Probe> {
    let tokens = texts.tokens(PROBED_AMONG);
    let frequent = most_frequent(&tokens, PROBED);
    let chosen = |token: &u32| frequent.iter().position(|known| known == token);
    let seen: Vec<(u32, usize)> = tokens
        .iter()
        .filter_map(|token| Some((*token, chosen(token)?)))
        .take(PROBED_ROWS)
        .collect();
    let (tokens, labels): (Vec<u32>, Vec<usize>) = seen.into_iter().unzip();
    let rows = victim.first_inputs(&tokens)?;
    let mut word = || {
        let mut bytes = [0; 4];
        aws_lc_rs::rand::fill(&mut bytes).expect("the operating system gives randomness");
        u32::from_le_bytes(bytes)
    };
    let bytes = to_bytes(&[transcript(&rows, &mut word)?]);
    if let Some(path) = keep {
        fs::write(path, &bytes).with_context(|| path.display().to_string())?;
    }
    let stacks = from_bytes(&bytes)?;
    let stack = stacks.first().context("the transcript has a stack")?;
    let masked: Vec<Vec<f32>> = stack
        .rows()
        .map(|row| {
            row.iter()
                .map(|&element| centred(stack.field, element))
                .collect()
        })
        .collect();
    let plain: Vec<Vec<f32>> = rows
        .iter()
        .map(|row| row.iter().map(|&x| f32::from(x)).collect())
        .collect();
    Ok(Probe {
        stack: stack.name.clone(),
        recorded: false,
        classes: frequent.len(),
        masked: probe(&masked, &labels, frequent.len()),
        plain: probe(&plain, &labels, frequent.len()),
    })
}

/// What can be read off the recorded rows of the first stack.
fn probed_recorded(recorded: &Recorded) -> Result<Probe> {
    let FirstRows {
        stack,
        masked,
        plain,
        tokens,
    } = recorded.first_rows()?;
    let frequent = most_frequent(&tokens, PROBED);
    let label = |token: &u32| frequent.iter().position(|known| known == token);
    let chosen: Vec<(usize, usize)> = tokens
        .iter()
        .enumerate()
        .filter_map(|(row, token)| Some((row, label(token)?)))
        .take(PROBED_ROWS)
        .collect();
    let labels: Vec<usize> = chosen.iter().map(|(_, label)| *label).collect();
    let of = |rows: &[Vec<f32>]| -> Vec<Vec<f32>> {
        chosen.iter().map(|(row, _)| rows[*row].clone()).collect()
    };
    Ok(Probe {
        stack: stack.to_owned(),
        recorded: true,
        classes: frequent.len(),
        masked: probe(&of(&masked), &labels, frequent.len()),
        plain: probe(&of(&plain), &labels, frequent.len()),
    })
}

fn most_frequent(tokens: &[u32], count: usize) -> Vec<u32> {
    let mut times = std::collections::BTreeMap::<u32, usize>::new();
    for token in tokens {
        *times.entry(*token).or_default() += 1;
    }
    let mut order: Vec<_> = times.into_iter().collect();
    order.sort_by_key(|&(token, times)| (std::cmp::Reverse(times), token));
    order
        .into_iter()
        .take(count)
        .map(|(token, _)| token)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_frequent_come_first() {
        assert_eq!(most_frequent(&[3, 1, 3, 2, 1, 3, 9], 3), [3, 1, 2]);
    }

    #[test]
    fn a_worker_computes_with_the_matrices_of_layers_only() {
        for (name, offloaded) in [
            ("blk.0.attn_q.weight", true),
            ("blk.11.ffn_down.weight", true),
            ("blk.0.attn_norm.weight", false),
            ("token_embd.weight", false),
            ("output.weight", false),
        ] {
            assert_eq!(
                OFFLOADED.iter().any(|end| name.ends_with(end)),
                offloaded,
                "{name}"
            );
        }
    }
}
