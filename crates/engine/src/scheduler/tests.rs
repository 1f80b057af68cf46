use super::*;
use crate::adapters::Adapters;
use crate::beam::BeamSearch;
use crate::error::SubmitError;
use crate::linear::{F32Linear, LinearLayer, LinearScratch};
use crate::request::{Event, Request, User};
use crate::sequence::Limits;
use crate::testing::small_config;
use crate::tokenizer::Tokenizer;
use crate::weights::{Embedding, Layer, Weights};
use casemate_container::ModelConfig;
use casemate_kernels::attention::KvType;
use casemate_kernels::gemm::F32Matrix;
use casemate_kernels::team::Team;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, channel};

pub(super) const HIDDEN: usize = 8;
pub(super) const VOCAB: usize = 16;
/// Its embedding is all that makes [`Fragile`] panic.
const POISON: u32 = 13;

/// Passes its input on, and panics for rows whose elements are all alike.
pub(super) struct Fragile;

impl LinearLayer for Fragile {
    fn inputs(&self) -> usize {
        HIDDEN
    }

    fn outputs(&self) -> usize {
        HIDDEN
    }

    fn forward(&self, team: &Team, _: &mut LinearScratch, x: &[f32], y: &mut [f32]) {
        team.for_each_chunk_mut(y, HIDDEN, |i, row| {
            let x = &x[i * HIDDEN..][..HIDDEN];
            assert!(x.iter().any(|&v| (v - x[0]).abs() > 1e-6), "on purpose");
            row.fill(0.0);
        });
    }

    fn bytes(&self) -> u64 {
        0
    }
}

/// Gate and up are both the input itself: equal elements stay equal.
struct Doubled;

impl LinearLayer for Doubled {
    fn inputs(&self) -> usize {
        HIDDEN
    }

    fn outputs(&self) -> usize {
        2 * HIDDEN
    }

    fn forward(&self, _: &Team, _: &mut LinearScratch, x: &[f32], y: &mut [f32]) {
        for (x, y) in x.chunks(HIDDEN).zip(y.chunks_mut(2 * HIDDEN)) {
            y[..HIDDEN].copy_from_slice(x);
            y[HIDDEN..].copy_from_slice(x);
        }
    }

    fn bytes(&self) -> u64 {
        0
    }
}

pub(super) fn config() -> ModelConfig {
    ModelConfig {
        hidden: HIDDEN as u32,
        layers: 1,
        ffn: HIDDEN as u32,
        vocab: VOCAB as u32,
        context: 64,
        ..small_config()
    }
}

/// A model of one layer whose feed-forward is [`Fragile`].
fn fragile_model(batch: usize) -> (Model, KvCache) {
    let team = Team::new(2).unwrap();
    let table = F32Matrix::from_rows(&team, VOCAB, HIDDEN, |token, out| {
        for (column, x) in out.iter_mut().enumerate() {
            let other = ((token * 7 + column * 5) % 19) as f32 / 9.0 - 1.0;
            *x = if token == POISON as usize { 1.0 } else { other };
        }
    });
    let table = Arc::new(table.unwrap());
    let zero =
        Arc::new(F32Matrix::from_rows(&team, HIDDEN, HIDDEN, |_, out| out.fill(0.0)).unwrap());
    let qkv = F32Matrix::from_rows(&team, 16, HIDDEN, |row, out| out[row % HIDDEN] = 0.5);
    let qkv = Arc::new(qkv.unwrap());
    let layer = Layer {
        attention_norm: vec![1.0; HIDDEN],
        qkv: Box::new(F32Linear(qkv)),
        qkv_bias: None,
        // Attention adds nothing, so that a poisoned row stays recognisable.
        attention_output: Box::new(F32Linear(zero)),
        ffn_norm: vec![1.0; HIDDEN],
        gate_up: Box::new(Doubled),
        down: Box::new(Fragile),
    };
    let weights = Weights {
        embedding: Embedding::F32(Arc::clone(&table)),
        layers: vec![layer],
        output_norm: vec![1.0; HIDDEN],
        output: Box::new(F32Linear(table)),
        rope_factors: None,
        memory: None,
    };
    let kv = KvCache::new(&config(), KvType::F32, 64, batch, None, Duration::ZERO).unwrap();
    let model = Model::new(weights, Arc::default(), &config(), 64, 64, batch, team).unwrap();
    (model, kv)
}

pub(super) fn tokenizer() -> Tokenizer {
    let json = r#"{"version":"1.0","added_tokens":[],"decoder":{"type":"Fuse"},
        "model":{"type":"BPE","vocab":{"a":0},"merges":[]}}"#;
    Tokenizer::from_json(json.as_bytes(), VOCAB as u32, None).unwrap()
}

fn request(id: u64, prompt: &[u32]) -> (Box<Sequence>, Receiver<Event<'static>>) {
    request_of(None, id, prompt)
}

fn request_of(
    user: Option<User>,
    id: u64,
    prompt: &[u32],
) -> (Box<Sequence>, Receiver<Event<'static>>) {
    let request = Request {
        prompt: prompt.to_vec(),
        max_tokens: 3,
        user,
        ..Request::default()
    };
    sequence_of(id, request)
}

fn sequence_of(id: u64, request: Request) -> (Box<Sequence>, Receiver<Event<'static>>) {
    let (sender, receiver) = channel();
    let adapters = Adapters::default();
    let limits = Limits {
        adapters: &adapters,
        context: 64,
        vocab: VOCAB as u32,
        end_tokens: &[],
        batch: 4,
        pages: 4,
        page_bytes: 1,
        oblivious: false,
    };
    let sink = Box::new(move |event: Event<'_>| {
        sender.send(event.into_owned()).unwrap();
        ControlFlow::Continue(())
    });
    (
        Box::new(Sequence::new(RequestId(id), request, &limits, &tokenizer(), sink).unwrap()),
        receiver,
    )
}

/// Runs requests in one batch and returns what each heard.
fn run(prompts: &[&[u32]]) -> (Vec<Vec<Event<'static>>>, usize) {
    let (model, kv) = fragile_model(4);
    let mailbox = Arc::new(Mailbox::new(8));
    let mut receivers = Vec::new();
    for (id, prompt) in prompts.iter().enumerate() {
        let (sequence, receiver) = request(id as u64, prompt);
        mailbox.post(Command::Run(sequence)).unwrap();
        receivers.push(receiver);
    }
    let mut scheduler = Scheduler::new(model, kv, Arc::clone(&mailbox), 4, || Duration::ZERO, None);
    assert!(scheduler.collect_mail());
    scheduler.admit();
    assert_eq!(scheduler.running.len(), prompts.len());
    let mut steps = 0;
    while !scheduler.running.is_empty() {
        scheduler.step();
        steps += 1;
        assert!(steps < 100);
    }
    assert_eq!(scheduler.kv.bytes_used(), 0);
    let failed = mailbox.counters.failed.load(Ordering::Relaxed) as usize;
    (
        receivers
            .into_iter()
            .map(|r| r.try_iter().collect())
            .collect(),
        failed,
    )
}

#[test]
fn a_panic_in_the_model_fails_only_the_request_that_causes_it() {
    let (alone, failed) = run(&[&[3, 4, 5]]);
    assert_eq!((alone[0].len(), failed), (4, 0));
    let (heard, failed) = run(&[&[3, 4, 5], &[6, POISON], &[7]]);
    assert_eq!(failed, 1);
    assert_eq!(heard[0], alone[0]);
    let reason = FinishReason::Error(RequestError::Internal);
    let expected = Event::Finished {
        reason,
        prompt_tokens: 2,
        cached_tokens: 0,
        completion_tokens: 0,
    };
    assert_eq!(heard[1], [expected]);
    assert_eq!(heard[2].len(), 4);
}

pub(super) const A: Option<User> = Some(User::new([1; 32]));
pub(super) const B: Option<User> = Some(User::new([2; 32]));

/// A scheduler that has found a request of each of these, and has started none.
fn waiting(users: &[Option<User>], batch: usize) -> (Scheduler, Vec<Receiver<Event<'static>>>) {
    let (model, kv) = fragile_model(batch);
    let mailbox = Arc::new(Mailbox::new(2 * users.len()));
    let mut heard = Vec::new();
    for (id, &user) in users.iter().enumerate() {
        let (sequence, receiver) = request_of(user, id as u64, &[3, 4, 5]);
        mailbox.post(Command::Run(sequence)).unwrap();
        heard.push(receiver);
    }
    let mut scheduler = Scheduler::new(model, kv, mailbox, batch, || Duration::ZERO, None);
    assert!(scheduler.collect_mail());
    (scheduler, heard)
}

fn running(scheduler: &Scheduler) -> [usize; 2] {
    [A, B].map(|user| scheduler.running.iter().filter(|s| s.user == user).count())
}

#[test]
fn places_that_are_free_at_one_time_are_divided_among_users() {
    // The second user's requests came after all of the first's.
    let (mut scheduler, heard) = waiting(&[[A; 8], [B; 8]].concat(), 8);
    scheduler.admit();
    assert_eq!(running(&scheduler), [4, 4]);
    while !scheduler.running.is_empty() {
        scheduler.step();
        scheduler.admit();
    }
    let counters = &scheduler.mailbox.counters;
    assert_eq!(counters.preemptions.load(Ordering::Relaxed), 0);
    for heard in heard {
        assert_eq!(heard.try_iter().count(), 4);
    }
}

#[test]
fn who_was_served_a_little_less_does_not_get_all_free_places() {
    let (mut scheduler, _heard) = waiting(&[[A; 8], [B; 8]].concat(), 8);
    let first = scheduler.queue.next().unwrap();
    scheduler.queue.charge(first, 1);
    scheduler.admit();
    assert_eq!(running(&scheduler), [4, 4]);
    // Prompts are charged once.
    for account in [A, B].map(|user| {
        let mut of_user = scheduler.running.iter().filter(|s| s.user == user);
        of_user.next().unwrap().account.unwrap()
    }) {
        let before = u64::from(account == first);
        assert_eq!(scheduler.queue.served(account), before + 4 * 3);
    }
    scheduler.step();
    let all: u64 = scheduler
        .running
        .iter()
        .map(|s| scheduler.queue.served(s.account.unwrap()))
        .sum();
    assert_eq!(all, 4 * (1 + 2 * 4 * 3));
}

/// What a search's user was served when it ends, which gives way after `gives_way` steps, if that is
/// some, and how many tokens were computed again.
fn served_for_a_search(gives_way: Option<usize>) -> (u64, u64) {
    let (model, kv) = fragile_model(4);
    let mailbox = Arc::new(Mailbox::new(8));
    let request = Request {
        prompt: vec![3, 4, 5],
        max_tokens: 20,
        user: A,
        beams: Some(BeamSearch::new(3)),
        ..Request::default()
    };
    let (sequence, heard) = sequence_of(1, request);
    mailbox.post(Command::Run(sequence)).unwrap();
    let clock = || Duration::ZERO;
    let mut scheduler = Scheduler::new(model, kv, mailbox, 4, clock, None);
    assert!(scheduler.collect_mail());
    let (mut served, mut steps) = (0, 0);
    loop {
        if gives_way == Some(steps) {
            scheduler.preempt(0);
        }
        scheduler.admit();
        let Some(search) = scheduler.running.first() else {
            break;
        };
        served = scheduler.queue.served(search.account.unwrap());
        scheduler.step();
        steps += 1;
    }
    assert_eq!(heard.try_iter().count(), 21);
    let again = &scheduler.mailbox.counters.recomputed_tokens;
    (served, again.load(Ordering::Relaxed))
}

#[test]
fn a_search_that_gave_way_is_charged_for_its_tokens_once() {
    // Before the last step 18 tokens of each beam were fed.
    let (served, again) = served_for_a_search(None);
    assert_eq!((served, again), (3 + 2 * 3 * 18, 0));
    for steps in 1..20 {
        let of_each = steps as u64 - 1;
        let expected = (served, 3 + 3 * of_each);
        assert_eq!(served_for_a_search(Some(steps)), expected, "{steps}");
    }
}

#[test]
fn who_fills_the_line_leaves_room_for_others() {
    let mailbox = Mailbox::new(1024);
    let mut id = 0;
    let mut post = |user, count: usize| {
        let requests: Vec<_> = (0..count)
            .map(|_| {
                id += 1;
                Command::Run(request_of(user, id, &[3]).0)
            })
            .collect();
        mailbox.post_together(requests)
    };
    let mut accepted = 0;
    while post(A, 16).is_ok() {
        accepted += 16;
    }
    assert_eq!(accepted, 512, "half of the line is one user's");
    let refused = SubmitError::Busy { waiting: 512 };
    assert_eq!(post(A, 1), Err(refused));
    assert_eq!(post(B, 16), Ok(()));
    assert_eq!(mailbox.counters.waiting.load(Ordering::Relaxed), 528);
    // Whose requests have begun may send more, and those that come back to wait count.
    for _ in 0..100 {
        mailbox.waits_no_more(A);
    }
    mailbox.waits_again(A);
    assert_eq!(post(A, 1), Ok(()));
    let waiting = 512 - 100 + 1 + 1;
    assert_eq!(
        mailbox.counters.waiting.load(Ordering::Relaxed),
        waiting + 16
    );
    let most = (1024 - 16 - waiting) / 2;
    assert!(post(A, most).is_err(), "more than are left after them");
    // However many users there are, no more wait than may.
    for name in 3..200 {
        let user = Some(User::new([name; 32]));
        while post(user, 1).is_ok() {}
    }
    assert!(mailbox.counters.waiting.load(Ordering::Relaxed) <= 1024);
    // Without users nobody is another one.
    let open = Mailbox::new(3);
    for id in 0..3 {
        open.post(Command::Run(request(id, &[3]).0)).unwrap();
    }
    let refused = open.post(Command::Run(request(3, &[3]).0));
    assert_eq!(refused, Err(SubmitError::Busy { waiting: 3 }));
}
