//! Puts a load on an engine and notes when each token came. Nothing here computes figures, and nothing in a request's sink
//! makes a system call before the request is over, so that what is counted is the engine's.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Instant;

use anyhow::{Result, ensure};
use casemate_engine::{BeamSearch, Engine, Event, FinishReason, MAXIMUM_BEAMS, Request, Sink};
use serde::{Deserialize, Serialize};

use crate::exit::Usage;

/// Requests that begin together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) batch: usize,
    /// Alternatives that each request pursues.
    pub(crate) beam: usize,
    /// Tokens of each prompt.
    pub(crate) prompt: usize,
    /// Tokens to generate for each.
    pub(crate) tokens: usize,
}

impl Load {
    /// One request with one beam.
    pub(crate) fn single(prompt: usize, tokens: usize) -> Load {
        Load {
            batch: 1,
            beam: 1,
            prompt,
            tokens,
        }
    }

    /// Sequences that are computed together: every beam of every request.
    pub(crate) fn sequences(&self) -> usize {
        self.batch * self.beam
    }

    /// Positions that keys and values are kept for. The beams of a request share its prompt.
    pub(crate) fn positions(&self) -> usize {
        self.batch * (self.prompt + self.beam * self.tokens)
    }
}

/// Refuses searches that no engine makes.
pub(crate) fn check_beam(beam: usize) -> Result<(), Usage> {
    match beam {
        1..=MAXIMUM_BEAMS => Ok(()),
        beam => Err(Usage(format!(
            "--beam {beam}: it must be from 1 to {MAXIMUM_BEAMS}"
        ))),
    }
}

/// One answer's times.
pub(crate) struct Answer {
    pub(crate) submitted: Instant,
    /// When each token came.
    pub(crate) tokens: Vec<Instant>,
}

impl Answer {
    /// Seconds from submission to the first token.
    pub(crate) fn first_token(&self) -> f64 {
        (self.tokens[0] - self.submitted).as_secs_f64()
    }

    /// Seconds from each token to the next.
    pub(crate) fn gaps(&self) -> impl Iterator<Item = f64> {
        self.tokens
            .windows(2)
            .map(|pair| (pair[1] - pair[0]).as_secs_f64())
    }
}

/// Looks on while answers are generated.
#[derive(Default)]
pub(crate) struct Watch {
    /// Tokens so far.
    pub(crate) generated: AtomicUsize,
    /// Set to end all answers at their next token; then there are none.
    pub(crate) enough: AtomicBool,
}

/// Puts `load` on the engine and waits for its answers. Prompts with different `seed`s have no beginning in common, so that
/// nothing computed for one can serve another.
pub(crate) fn run(
    engine: &Engine,
    load: Load,
    seed: u64,
    watch: Option<&Arc<Watch>>,
) -> Result<Vec<Answer>> {
    let (sender, receiver) = channel();
    let vocab = engine.config().vocab;
    let prompts: Vec<_> = (0..load.batch)
        .map(|place| request(vocab, load, seed, place))
        .collect();
    let submitted = Instant::now();
    let together = prompts.into_iter().map(|request| {
        let sender = sender.clone();
        let watch = watch.map(Arc::clone);
        let mut times = Vec::with_capacity(load.tokens);
        let sink = move |event: Event<'_>| {
            match event {
                Event::Token { .. } => {
                    times.push(Instant::now());
                    if let Some(watch) = &watch {
                        watch.generated.fetch_add(1, Ordering::Relaxed);
                        if watch.enough.load(Ordering::Relaxed) {
                            return ControlFlow::Break(());
                        }
                    }
                }
                Event::Finished { reason, .. } => {
                    let tokens = std::mem::take(&mut times);
                    // Nobody listens any more only after an error elsewhere.
                    let _ = sender.send((reason, Answer { submitted, tokens }));
                }
            }
            ControlFlow::Continue(())
        };
        (request, Box::new(sink) as Sink)
    });
    // One by one, a thread that loses its core between two of them would have some answered before others begin.
    engine.submit_together(together.collect())?;
    drop(sender);
    let mut answers = Vec::with_capacity(load.batch);
    for (reason, answer) in receiver {
        ensure!(
            reason == FinishReason::Length && answer.tokens.len() == load.tokens,
            "a request ended with {reason:?} after {} of {} tokens",
            answer.tokens.len(),
            load.tokens
        );
        answers.push(answer);
    }
    ensure!(
        answers.len() == load.batch,
        "{} of {} requests were answered",
        answers.len(),
        load.batch
    );
    Ok(answers)
}

/// What one request asks of a model with so many tokens.
fn request(vocab: u32, load: Load, seed: u64, place: usize) -> Request {
    let vocab = u64::from(vocab);
    let mut state = (seed << 20) ^ place as u64;
    let prompt = (0..load.prompt).map(|_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab) as u32
    });
    Request {
        prompt: prompt.collect(),
        max_tokens: load.tokens,
        ignore_end: true,
        beams: (load.beam > 1).then(|| BeamSearch::new(load.beam)),
        ..Request::default()
    }
}

/// Tokens per second of all answers while every one of them was being generated: after the last first token, until the
/// first of them ends. Nothing where there is no such time.
pub(crate) fn rate_together(answers: &[Answer]) -> Option<f64> {
    let from = answers.iter().filter_map(|a| a.tokens.first()).max()?;
    let to = answers.iter().filter_map(|a| a.tokens.last()).min()?;
    let between = |at: &&Instant| *at > from && *at <= to;
    let tokens: usize = answers
        .iter()
        .map(|a| a.tokens.iter().filter(between).count())
        .sum();
    let seconds = to.checked_duration_since(*from)?.as_secs_f64();
    (tokens >= answers.len() && seconds > 0.0).then(|| tokens as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn answer(start: Instant, first: u64, gap: u64, tokens: u64) -> Answer {
        let at = |i| start + Duration::from_millis(first + i * gap);
        Answer {
            submitted: start,
            tokens: (0..tokens).map(at).collect(),
        }
    }

    #[test]
    fn the_common_rate_counts_only_the_time_in_which_all_generate() {
        let start = Instant::now();
        // Tokens at 100, 110, …, 190 and at 155, 165, …, 245 ms: together from 155 to 190 ms, 4 tokens of the first, 3 of the second.
        let answers = [answer(start, 100, 10, 10), answer(start, 155, 10, 10)];
        let rate = rate_together(&answers).unwrap();
        assert!((rate - 7.0 / 0.035).abs() < 1e-6, "{rate}");
        // One ends before the other begins.
        let apart = [answer(start, 0, 1, 10), answer(start, 100, 1, 10)];
        assert_eq!(rate_together(&apart), None);
        assert_eq!(rate_together(&[]), None);
    }

    #[test]
    fn gaps_and_first_token_are_in_seconds() {
        let answer = answer(Instant::now(), 250, 20, 4);
        assert_eq!(answer.first_token(), 0.25);
        let gaps: Vec<f64> = answer.gaps().collect();
        assert_eq!(gaps.len(), 3);
        assert!(gaps.iter().all(|gap| (gap - 0.02).abs() < 1e-9));
    }

    #[test]
    fn impossible_beams_are_refused_with_the_numbers() {
        assert!(check_beam(1).is_ok() && check_beam(4).is_ok());
        for beam in [0, 33] {
            let refused = check_beam(beam).unwrap_err().to_string();
            assert_eq!(refused, format!("--beam {beam}: it must be from 1 to 32"));
        }
    }

    #[test]
    fn a_request_searches_with_the_beams_of_its_load() {
        let load = Load::single(5, 7);
        assert!(request(100, load, 1, 0).beams.is_none());
        let searching = request(100, Load { beam: 4, ..load }, 1, 0);
        assert_eq!(searching.beams, Some(BeamSearch::new(4)));
        assert_eq!((searching.prompt.len(), searching.max_tokens), (5, 7));
        assert!(searching.ignore_end);
    }

    #[test]
    fn beams_share_their_prompt() {
        let load = Load {
            batch: 6,
            beam: 4,
            ..Load::single(1024, 128)
        };
        assert_eq!((load.sequences(), load.positions()), (24, 6 * (1024 + 512)));
    }
}
