//! Guesses change no answer: the scheduler with and without them, over the same requests, is compared
//! event by event. Sampled answers are compared like others: each token is drawn from the same logits
//! by the same random number, so their distribution is not tested for, it is the same by construction.

use super::tests::{A, B, Fragile, HIDDEN, VOCAB, config, tokenizer};
use super::*;
use crate::adapters::Adapters;
use crate::linear::{F32Linear, LinearLayer, LinearScratch};
use crate::request::{Event, Request};
use crate::sampler::Sampling;
use crate::sequence::Limits;
use crate::speculation::Speculation;
use crate::weights::{Embedding, Layer, Weights};
use casemate_container::ModelConfig;
use casemate_kernels::attention::KvType;
use casemate_kernels::gemm::F32Matrix;
use casemate_kernels::team::Team;
use proptest::prelude::*;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{Receiver, channel};

const CONTEXT: usize = 256;
/// Pages of one context.
pub(super) const ONE: usize = CONTEXT / 64;

fn large_config() -> ModelConfig {
    ModelConfig {
        context: CONTEXT as u32,
        ..config()
    }
}

/// One layer of random weights; a token depends on all before it.
pub(super) fn model(seed: u64, batch: usize, last: Option<Box<dyn LinearLayer>>) -> Model {
    let team = Team::new(1).unwrap();
    let matrix = |name: u64, rows: usize, columns: usize| {
        let matrix = F32Matrix::from_rows(&team, rows, columns, |row, out| {
            for (column, x) in out.iter_mut().enumerate() {
                let n = [name, row as u64, column as u64]
                    .iter()
                    .fold(seed + 1, |n, &part| {
                        let n = (n ^ part).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                        n ^ (n >> 29)
                    });
                *x = (n >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            }
        });
        Arc::new(matrix.unwrap())
    };
    let linear = |name, rows, columns| -> Box<dyn LinearLayer> {
        Box::new(F32Linear(matrix(name, rows, columns)))
    };
    let table = matrix(1, VOCAB, HIDDEN);
    let weights = Weights {
        embedding: Embedding::F32(table),
        layers: vec![Layer {
            attention_norm: vec![1.0; HIDDEN],
            qkv: linear(2, 2 * HIDDEN, HIDDEN),
            qkv_bias: None,
            attention_output: linear(3, HIDDEN, HIDDEN),
            ffn_norm: vec![1.0; HIDDEN],
            gate_up: linear(4, 2 * HIDDEN, HIDDEN),
            down: last.unwrap_or_else(|| linear(5, HIDDEN, HIDDEN)),
        }],
        output_norm: vec![2.0; HIDDEN],
        output: linear(6, VOCAB, HIDDEN),
        rope_factors: None,
        memory: None,
    };
    Model::new(
        weights,
        Arc::default(),
        &large_config(),
        CONTEXT,
        PROMPT_ROWS + batch,
        batch + GUESSES,
        team,
    )
    .unwrap()
}

/// What is asked, and when its client leaves or cancels.
#[derive(Clone, Default)]
pub(super) struct Asked {
    pub(super) request: Request,
    leaves: Option<usize>,
    cancelled: Option<usize>,
}

impl fmt::Debug for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Asked")
            .field(
                "user",
                &[None, A, B].iter().position(|u| *u == self.request.user),
            )
            .field("prompt", &self.request.prompt)
            .field("max_tokens", &self.request.max_tokens)
            .field("sampling", &self.request.sampling)
            .field("stop_tokens", &self.request.stop_tokens)
            .field("logprobs", &self.request.logprobs)
            .field("leaves", &self.leaves)
            .field("cancelled", &self.cancelled)
            .finish()
    }
}

pub(super) fn greedy(prompt: &[u32], tokens: usize) -> Asked {
    let request = Request {
        prompt: prompt.to_vec(),
        max_tokens: tokens,
        ..Request::default()
    };
    Asked {
        request,
        ..Asked::default()
    }
}

/// A scheduler that found these requests and started none.
pub(super) struct Setting {
    pub(super) scheduler: Scheduler,
    pub(super) heard: Vec<Receiver<Event<'static>>>,
}

pub(super) fn setting(
    model: Model,
    asked: &[Asked],
    batch: usize,
    pages: usize,
    speculation: Speculation,
) -> Setting {
    let config = large_config();
    let page = KvCache::new(&config, KvType::F32, 64, 1, None, Duration::ZERO).unwrap();
    let bytes = Some(pages as u64 * page.page_bytes());
    let age = Duration::from_secs(1);
    let kv = KvCache::new(&config, KvType::F32, CONTEXT, batch, bytes, age).unwrap();
    assert_eq!(kv.pages(), pages.min(batch * ONE));
    let mailbox = Arc::new(Mailbox::new(64));
    let mut heard = Vec::new();
    let adapters = Adapters::default();
    for (id, asked) in asked.iter().enumerate() {
        let limits = Limits {
            context: CONTEXT,
            vocab: VOCAB as u32,
            adapters: &adapters,
            end_tokens: &[],
            batch,
            pages,
            page_bytes: page.page_bytes(),
            oblivious: false,
        };
        let (sender, receiver) = channel();
        let mut left = asked.leaves;
        let sink = Box::new(move |event: Event<'_>| {
            let _ = sender.send(event.into_owned());
            match &mut left {
                Some(0) => return ControlFlow::Break(()),
                Some(left) => *left -= 1,
                None => {}
            }
            ControlFlow::Continue(())
        });
        let (id, request) = (RequestId(id as u64), asked.request.clone());
        let sequence = Sequence::new(id, request, &limits, &tokenizer(), sink).unwrap();
        mailbox.post(Command::Run(Box::new(sequence))).unwrap();
        heard.push(receiver);
    }
    let lookups = speculation.lookups(batch, CONTEXT);
    let clock = || Duration::ZERO;
    let scheduler = Scheduler::new(model, kv, mailbox, batch, clock, None);
    let mut scheduler = scheduler.guessing_by(lookups);
    assert!(scheduler.collect_mail());
    Setting { scheduler, heard }
}

/// What became of requests.
#[derive(Default, Debug)]
struct Outcome {
    /// Without how much was found computed: that depends on when they began.
    events: Vec<Vec<Event<'static>>>,
    steps: u64,
    guessed: u64,
    accepted: u64,
    preemptions: u64,
    cached: u64,
}

impl Setting {
    /// Serves all requests to their ends.
    fn run(mut self, asked: &[Asked]) -> Outcome {
        let mut events: Vec<Vec<_>> = self.heard.iter().map(|_| Vec::new()).collect();
        let mut steps = 0;
        let places = self.scheduler.lookups.len();
        loop {
            self.scheduler.admit();
            if self.scheduler.running.is_empty() {
                break;
            }
            self.scheduler.step();
            steps += 1;
            assert!(steps < 10_000);
            for (id, heard) in self.heard.iter().enumerate() {
                events[id].extend(heard.try_iter());
                if asked[id].cancelled.is_some_and(|n| events[id].len() > n) {
                    self.scheduler.cancel(RequestId(id as u64));
                    events[id].extend(heard.try_iter());
                }
            }
        }
        assert!(self.scheduler.queue.is_empty());
        assert_eq!(self.scheduler.kv.bytes_used(), 0);
        assert_eq!(self.scheduler.lookups.len(), places);
        for events in &mut events {
            if let Some(Event::Finished { cached_tokens, .. }) = events.last_mut() {
                *cached_tokens = 0;
            }
        }
        let counters = &self.scheduler.mailbox.counters;
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        assert_eq!(count(&counters.failed), 0);
        Outcome {
            events,
            steps,
            guessed: count(&counters.guessed_tokens),
            accepted: count(&counters.accepted_tokens),
            preemptions: count(&counters.preemptions),
            cached: count(&counters.cached_tokens),
        }
    }
}

fn run(seed: u64, asked: &[Asked], batch: usize, pages: usize, how: Speculation) -> Outcome {
    setting(model(seed, batch, None), asked, batch, pages, how).run(asked)
}

#[test]
fn each_accepted_token_saves_a_pass() {
    let asked = [greedy(&[3, 4, 5, 3, 4, 5, 3, 4], 200)];
    let plain = run(4, &asked, 2, 2 * ONE, Speculation::None);
    let guessing = run(4, &asked, 2, 2 * ONE, Speculation::PromptLookup);
    assert_eq!(guessing.events, plain.events);
    assert_eq!((plain.steps, plain.guessed, plain.accepted), (200, 0, 0));
    // The greedy answer of a small model soon repeats itself.
    assert!(guessing.accepted > 120, "{}", guessing.accepted);
    assert_eq!(guessing.steps + guessing.accepted, 200);
    assert!(guessing.guessed >= guessing.accepted);
}

#[test]
fn a_batch_of_many_is_not_guessed_at_and_beams_are_not() {
    let many: Vec<_> = (0..6u32).map(|i| greedy(&[3, i, 5], 50)).collect();
    let outcome = run(4, &many, 6, 6 * ONE, Speculation::PromptLookup);
    assert_eq!(outcome.guessed, 0);
    let few = run(4, &many[..5], 6, 6 * ONE, Speculation::PromptLookup);
    assert!(few.guessed > 0);
    let mut search = greedy(&[3, 4, 5], 50);
    search.request.beams = Some(crate::BeamSearch::new(2));
    let outcome = run(4, &[search], 2, 2 * ONE, Speculation::PromptLookup);
    assert_eq!(outcome.guessed, 0);
}

/// Rows of the largest step without prompts, and the most of one sequence in it.
#[test]
fn guesses_fill_up_few_rows_and_are_divided() {
    for count in 1..=6 {
        // Greedy answers to the same prompt repeat themselves at the same time.
        let asked = vec![greedy(&[3, 4, 5], 150); count];
        let of = setting(
            model(4, 6, None),
            &asked,
            6,
            6 * ONE,
            Speculation::PromptLookup,
        );
        let mut scheduler = of.scheduler;
        scheduler.admit();
        let mut largest = (0, 0);
        while !scheduler.running.is_empty() {
            scheduler.plan();
            let rows = scheduler.batch.spans().iter().map(|span| span.rows.len());
            let all = scheduler.running.iter().all(|s| s.generating());
            if all && scheduler.running.len() == count {
                largest = largest.max((rows.clone().sum(), rows.max().unwrap()));
            }
            scheduler.step();
        }
        let each = [6, 3, 2, 2, 2, 1][count - 1];
        assert_eq!(largest, (GENERATING_ROWS, each), "{count}");
    }
}

#[test]
fn guesses_take_no_page_and_rows_of_prompts() {
    let asked = [greedy(&[3, 4, 5], 150), greedy(&[4; 200], 5)];
    let of = setting(
        model(4, 2, None),
        &asked,
        2,
        2 * ONE,
        Speculation::PromptLookup,
    );
    let mut scheduler = of.scheduler;
    // The second one comes later.
    let mut second = scheduler.queue.take_arrival(1);
    scheduler.admit();
    let (mut guesses, mut beside, mut steps) = (0, 0, 0);
    while !scheduler.running.is_empty() {
        if steps == 30 {
            let second = second.take().unwrap();
            scheduler.queue.put(second.account.unwrap(), 1, second);
            scheduler.admit();
        }
        scheduler.plan();
        let spans = scheduler.batch.spans();
        for span in spans.iter().filter(|span| span.wanted == Wanted::All) {
            guesses += span.rows.len() - 1;
            // As without: a page for the next token and none beyond it.
            let pages = scheduler.kv.pages_of(span.slot);
            assert_eq!(pages, (span.first + 1).div_ceil(64));
        }
        if let [generating, prompt] = spans
            && prompt.wanted == Wanted::None
            && generating.rows.len() > 1
        {
            let rows = generating.rows.len() - 1 + prompt.rows.len();
            assert_eq!(rows, PROMPT_ROWS_BESIDE_DECODE);
            beside += 1;
        }
        scheduler.step();
        steps += 1;
    }
    assert!(guesses > 50 && beside > 0, "{guesses} {beside}");
}

#[test]
fn users_are_served_what_they_get_and_not_what_was_guessed() {
    let mut asked = [greedy(&[3, 4, 5], 120)];
    asked[0].request.sampling.temperature = 0.5;
    let of = setting(
        model(4, 2, None),
        &asked,
        2,
        2 * ONE,
        Speculation::PromptLookup,
    );
    let mut scheduler = of.scheduler;
    scheduler.admit();
    let account = scheduler.running[0].account.unwrap();
    while !scheduler.running.is_empty() {
        let (prompt, generated) = scheduler.running[0].lengths();
        // The last token was told and is not fed.
        let fed = generated.saturating_sub(1) as u64;
        let served = prompt as u64 * PROMPT + fed * GENERATED;
        assert_eq!(scheduler.queue.served(account), served);
        scheduler.step();
    }
    let counters = &scheduler.mailbox.counters;
    let guessed = counters.guessed_tokens.load(Ordering::Relaxed);
    assert!(guessed > counters.accepted_tokens.load(Ordering::Relaxed));
}

/// Panics, and counts how often, when it is given a row of an answer's next token and guesses behind it.
struct Alone(Fragile, Arc<AtomicUsize>);

impl LinearLayer for Alone {
    fn inputs(&self) -> usize {
        self.0.inputs()
    }

    fn outputs(&self) -> usize {
        self.0.outputs()
    }

    fn forward(&self, team: &Team, scratch: &mut LinearScratch, x: &[f32], y: &mut [f32]) {
        let rows = x.len() / HIDDEN;
        if (2..=6).contains(&rows) {
            self.1.fetch_add(1, Ordering::Relaxed);
            panic!("on purpose");
        }
        self.0.forward(team, scratch, x, y);
    }

    fn bytes(&self) -> u64 {
        0
    }
}

#[test]
fn a_guess_that_makes_the_model_panic_fails_nobody() {
    let asked = [greedy(&[3, 4, 5, 3, 4, 5, 3, 4], 100)];
    let panics = Arc::new(AtomicUsize::new(0));
    let of = |how| {
        let model = model(4, 2, Some(Box::new(Alone(Fragile, Arc::clone(&panics)))));
        setting(model, &asked, 2, 2 * ONE, how).run(&asked)
    };
    let (plain, guessing) = (of(Speculation::None), of(Speculation::PromptLookup));
    assert_eq!(guessing.events, plain.events);
    assert_eq!((guessing.steps, guessing.accepted), (100, 0));
    assert!(panics.load(Ordering::Relaxed) > 10);
}

fn asked() -> impl Strategy<Value = Asked> {
    let period = prop::sample::select(vec![1usize, 4, 200]);
    let text = (period, 1usize..190, 0usize..2).prop_map(|(period, length, text)| -> Vec<u32> {
        let word = |i: usize| ((i * i / 3 + 3 * i + text) % VOCAB) as u32;
        (0..length).map(|i| word(i % period)).collect()
    });
    let sampling = (
        prop::sample::select(vec![0.0f32, 0.0, 0.2, 0.5, 1.0]),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
        any::<u64>(),
    );
    let sampling = sampling.prop_map(|(temperature, penalised, filtered, seed)| {
        let (repetition_penalty, frequency_penalty) = match penalised {
            true => (1.1, 0.05),
            false => (1.0, 0.0),
        };
        let (top_k, top_p) = if filtered { (5, 0.9) } else { (0, 1.0) };
        Sampling {
            temperature,
            top_k,
            top_p,
            repetition_penalty,
            frequency_penalty,
            bias: if filtered { vec![(4, 0.5)] } else { vec![] },
            seed,
            ..Sampling::default()
        }
    });
    let ends = (
        1usize..140,
        prop::option::weighted(0.2, 0u32..VOCAB as u32),
        prop::option::weighted(0.15, 0usize..60),
        prop::option::weighted(0.15, 0usize..60),
    );
    (
        text,
        sampling,
        ends,
        prop::sample::select(vec![0, 1, 1, 2]),
        prop::option::weighted(0.3, 0usize..4),
    )
        .prop_map(|(prompt, sampling, ends, user, logprobs)| {
            let (max_tokens, end, leaves, cancelled) = ends;
            Asked {
                request: Request {
                    user: [None, A, B][user],
                    prompt,
                    max_tokens,
                    sampling,
                    stop_tokens: end.into_iter().collect(),
                    logprobs,
                    ..Request::default()
                },
                leaves,
                cancelled: cancelled.filter(|_| leaves.is_none()),
            }
        })
}

#[test]
fn every_answer_is_the_one_without_guesses() {
    let config = proptest::test_runner::Config {
        cases: 96,
        failure_persistence: None,
        ..Default::default()
    };
    let all = std::cell::RefCell::new(Outcome::default());
    let strategy = (
        prop::collection::vec(asked(), 1..9),
        1usize..5,
        0usize..6,
        0u64..8,
    );
    proptest::test_runner::TestRunner::new(config)
        .run(&strategy, |(asked, batch, more, seed)| {
            let pages = (ONE + more).min(batch * ONE);
            let plain = run(seed, &asked, batch, pages, Speculation::None);
            let guessing = run(seed, &asked, batch, pages, Speculation::PromptLookup);
            for (i, asked) in asked.iter().enumerate() {
                let (heard, expected) = (&guessing.events[i], &plain.events[i]);
                match asked.cancelled {
                    // Whoever cancels does so between two steps.
                    Some(at) => {
                        let common = heard.len().min(expected.len()).min(at + 1);
                        prop_assert_eq!(&heard[..common], &expected[..common]);
                    }
                    None => prop_assert_eq!(heard, expected),
                }
            }
            let mut all = all.borrow_mut();
            all.guessed += guessing.guessed;
            all.accepted += guessing.accepted;
            all.preemptions += guessing.preemptions;
            all.cached += guessing.cached;
            Ok(())
        })
        .unwrap();
    let all = all.into_inner();
    eprintln!("{all:?}");
    assert!(all.accepted > 100 && all.guessed > all.accepted + 100);
    assert!(all.preemptions > 0 && all.cached > 0);
}
