//! What requests share and what they give up: beginnings of texts, within one user; turns; memory.
//! None of it changes a token or a bit.

mod support;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use casemate_container::ModelConfig;
use casemate_engine::{
    Compute, Engine, EngineOptions, Event, FinishReason, Grammar, KvType, Request, Sampling, Sink,
    User,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::tiny::{Tiny, llama};
use support::{Answer, generate, greedy, load, options, start};

const A: Option<User> = Some(User::new([1; 32]));
const B: Option<User> = Some(User::new([2; 32]));
/// Bytes of a page of the tiny model in f32.
const PAGE: u64 = 2 * 2 * 64 * (16 + 16) * 4;

fn model() -> Tiny {
    Tiny::new(llama(), 21)
}

fn of(user: Option<User>, request: Request) -> Request {
    Request { user, ..request }
}

fn wait_until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "it never happened");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn idle(engine: &Engine) {
    wait_until(|| engine.stats().running + engine.stats().waiting == 0);
}

/// Every event of a request, log-probabilities in all their bits.
fn events(engine: &Engine, request: Request) -> Vec<Event<'static>> {
    let (sender, receiver) = channel();
    let sink = move |event: Event<'_>| {
        sender.send(event.into_owned()).unwrap();
        ControlFlow::Continue(())
    };
    engine.submit(request, Box::new(sink)).unwrap();
    receiver.iter().collect()
}

fn cached(events: &[Event<'_>]) -> usize {
    match events.last() {
        Some(Event::Finished { cached_tokens, .. }) => *cached_tokens,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_prompt_that_another_user_sent_is_computed_as_if_nobody_had() {
    let model = model();
    let engine = load(&model, &options(Compute::F32));
    let prompt = model.prompt(300, 4);
    let ask = |user| {
        let before = engine.stats();
        let answer = generate(&engine, of(user, greedy(&prompt, 5)));
        idle(&engine);
        let after = engine.stats();
        let computed = after.prompt_tokens - before.prompt_tokens;
        assert_eq!(
            after.cached_tokens - before.cached_tokens,
            answer.cached as u64
        );
        (computed, answer.cached, answer.ids)
    };
    let (computed, cached, ids) = ask(A);
    assert_eq!((computed, cached), (300, 0));
    // The same user: four whole pages are there.
    assert_eq!(ask(A), (300 - 256, 256, ids.clone()));
    // Another user, and nobody, twice: everything is computed.
    for user in [B, None, None] {
        assert_eq!(ask(user), (300, 0, ids.clone()), "{:?}", user.is_some());
    }
    // What A's request left is still there.
    assert_eq!(ask(A), (300 - 256, 256, ids));
}

#[test]
fn requests_without_a_user_leave_nothing_and_find_nothing() {
    let model = model();
    let engine = load(&model, &options(Compute::F32));
    let prompt = model.prompt(300, 4);
    generate(&engine, greedy(&prompt, 70));
    idle(&engine);
    let stats = engine.stats();
    assert_eq!((stats.kv_bytes_used, stats.kv_bytes_kept), (0, 0));
    assert_eq!(generate(&engine, of(A, greedy(&prompt, 5))).cached, 0);
    wait_until(|| engine.stats().kv_bytes_kept == 4 * PAGE);
    assert_eq!(generate(&engine, greedy(&prompt, 5)).cached, 0);
}

#[test]
fn reuse_changes_no_bit() {
    let model = model();
    let kinds = [
        (Compute::F32, None),
        (Compute::Int8, None),
        (Compute::Int8, Some(KvType::Int8)),
        (Compute::Int8Row, Some(KvType::Bf16)),
    ];
    for (compute, kv_type) in kinds {
        let with = |reuse| EngineOptions {
            kv_type,
            reuse,
            ..options(compute)
        };
        let plain = load(&model, &with(Duration::ZERO));
        let reusing = load(&model, &with(Duration::from_secs(3600)));
        let mut found = Vec::new();
        // A conversation: each prompt is the one before, its answer, and something more.
        let mut prompt = model.prompt(90, 7);
        for turn in 0..5 {
            let request = Request {
                logprobs: Some(20),
                ignore_end: true,
                sampling: Sampling {
                    temperature: 0.9,
                    seed: turn,
                    ..Sampling::default()
                },
                ..of(A, greedy(&prompt, 30))
            };
            let expected = events(&plain, request.clone());
            let mut answer = events(&reusing, request);
            found.push(cached(&answer));
            let (last, tokens) = answer.split_last_mut().unwrap();
            let (expected_last, expected_tokens) = expected.split_last().unwrap();
            assert_eq!(
                tokens,
                expected_tokens,
                "turn {turn} in {}",
                plain.compute_name()
            );
            if let Event::Finished { cached_tokens, .. } = last {
                *cached_tokens = 0;
            }
            assert_eq!(last, expected_last);
            prompt.extend(tokens.iter().map(|event| match event {
                Event::Token { id, .. } => *id,
                Event::Finished { .. } => unreachable!("the last one was taken"),
            }));
            prompt.extend(model.prompt(25, turn + 50));
        }
        // Answers are reused as well: the last prompt follows 284 computed positions, 255 of them prompts.
        assert_eq!(found, [0, 64, 128, 192, 256]);
    }
}

/// Prompts with common beginnings of all lengths, read in other company each time: what is kept of
/// them was computed in other pieces.
#[test]
fn it_does_not_matter_in_which_pieces_a_page_was_computed() {
    let model = model();
    for kv_type in [KvType::F32, KvType::Int8] {
        let engine = load(
            &model,
            &EngineOptions {
                kv_type: Some(kv_type),
                ..options(Compute::Int8)
            },
        );
        let long = model.prompt(400, 3);
        let request = |user, length: usize| Request {
            logprobs: Some(20),
            ignore_end: true,
            ..of(user, greedy(&long[..length], 3))
        };
        for (name, company) in [0usize, 1, 3].into_iter().enumerate() {
            let user = Some(User::new([10 + name as u8; 32]));
            // Others that generate make the pieces of a prompt smaller.
            let others: Vec<_> = (0..company)
                .map(|i| start(&engine, greedy(&model.prompt(20, i as u64), 60)))
                .collect();
            assert_eq!(cached(&events(&engine, request(user, 333))), 0);
            others.into_iter().for_each(|other| drop(other.wait()));
            for length in [70, 129, 200, 257, 320, 330, 399] {
                let expected = events(&engine, request(None, length));
                let answer = events(&engine, request(user, length));
                assert_eq!(cached(&answer), (length - 1).min(333) / 64 * 64);
                assert_eq!(answer[..3], expected[..3], "{length} beside {company}");
            }
        }
    }
}

#[test]
fn answers_to_one_prompt_asked_for_together_read_it_once() {
    let model = model();
    // 400 tokens are 7 pages, of which 6 are full before the last token.
    let engine = load(
        &model,
        &EngineOptions {
            kv_bytes: Some(16 * PAGE),
            reuse: Duration::ZERO,
            ..options(Compute::F32)
        },
    );
    let prompt = model.prompt(400, 4);
    let request = |user, seed| Request {
        sampling: Sampling {
            temperature: 0.9,
            seed,
            ..Sampling::default()
        },
        ignore_end: true,
        ..of(user, greedy(&prompt, 30))
    };
    let alone: Vec<_> = (0..4).map(|i| events(&engine, request(None, i))).collect();
    for user in [None, A] {
        idle(&engine);
        let before = engine.stats();
        let (sender, receiver) = channel();
        let together = (0..4).map(|i| {
            let sender = sender.clone();
            let sink = move |event: Event<'_>| {
                sender.send((i as usize, event.into_owned())).unwrap();
                ControlFlow::Continue(())
            };
            (request(user, i), Box::new(sink) as Sink)
        });
        engine.submit_together(together.collect()).unwrap();
        drop(sender);
        let mut heard = vec![Vec::new(); 4];
        for (i, event) in receiver {
            // Alone they would not fit beside each other.
            let ends = matches!(event, Event::Finished { .. });
            assert!(!ends || heard.iter().all(|events| !events.is_empty()));
            heard[i].push(event);
        }
        assert_eq!(heard, alone);
        idle(&engine);
        let after = engine.stats();
        let computed = after.prompt_tokens - before.prompt_tokens;
        assert_eq!(computed, 400 + 3 * (400 - 384));
        assert_eq!((after.cached_tokens, after.preemptions), (0, 0));
    }
}

/// Seconds of the engine of [`what_nobody_uses_is_gone_when_its_time_is_over`].
static NOW: AtomicU64 = AtomicU64::new(0);

#[test]
fn what_nobody_uses_is_gone_when_its_time_is_over() {
    let model = model();
    let engine = load(
        &model,
        &EngineOptions {
            reuse: Duration::from_millis(200),
            clock: || Duration::from_millis(NOW.load(Ordering::Relaxed)),
            ..options(Compute::F32)
        },
    );
    let prompt = model.prompt(200, 4);
    generate(&engine, of(A, greedy(&prompt, 2)));
    wait_until(|| engine.stats().kv_bytes_kept == 3 * PAGE);
    NOW.store(199, Ordering::Relaxed);
    assert_eq!(generate(&engine, of(A, greedy(&prompt, 2))).cached, 192);
    // Used again at 199.
    NOW.store(398, Ordering::Relaxed);
    assert_eq!(generate(&engine, of(A, greedy(&prompt, 2))).cached, 192);
    wait_until(|| engine.stats().kv_bytes_kept == 3 * PAGE);
    NOW.store(598, Ordering::Relaxed);
    // Nothing wakes the engine; it wakes up by itself.
    wait_until(|| engine.stats().kv_bytes_kept == 0);
    assert_eq!(generate(&engine, of(A, greedy(&prompt, 2))).cached, 0);
}

/// Seconds of the engine of [`what_nobody_uses_goes_while_others_are_served`].
static LATER: AtomicU64 = AtomicU64::new(0);

#[test]
fn what_nobody_uses_goes_while_others_are_served() {
    let model = Tiny::new(
        ModelConfig {
            context: 100_000,
            ..llama()
        },
        21,
    );
    let engine = load(
        &model,
        &EngineOptions {
            reuse: Duration::from_secs(10),
            clock: || Duration::from_secs(LATER.load(Ordering::Relaxed)),
            kv_bytes: Some(2000 * PAGE),
            ..options(Compute::F32)
        },
    );
    // Nobody's answer, which goes on all the time: the engine never sleeps.
    let (sender, receiver) = channel();
    let sink = move |event: Event<'_>| {
        sender.send(event.into_owned()).unwrap();
        ControlFlow::Continue(())
    };
    let request = Request {
        ignore_end: true,
        ..greedy(&[1, 9], 90_000)
    };
    let id = engine.submit(request, Box::new(sink)).unwrap();
    receiver.recv().unwrap();
    generate(&engine, of(A, greedy(&model.prompt(200, 4), 2)));
    wait_until(|| engine.stats().kv_bytes_kept == 3 * PAGE);
    LATER.store(9, Ordering::Relaxed);
    receiver.try_iter().for_each(drop);
    receiver.iter().take(10).for_each(drop);
    assert_eq!(engine.stats().kv_bytes_kept, 3 * PAGE);
    LATER.store(10, Ordering::Relaxed);
    wait_until(|| engine.stats().kv_bytes_kept == 0);
    assert_eq!(engine.stats().running, 1);
    engine.cancel(id);
    let last = receiver.iter().last();
    assert!(
        matches!(
            last,
            Some(Event::Finished {
                reason: FinishReason::Cancelled,
                ..
            })
        ),
        "{last:?}"
    );
}

/// The order in which requests end, by name.
fn order_of_ends(engine: &Engine, requests: Vec<(&'static str, Request)>) -> Vec<&'static str> {
    let (release, held) = channel::<()>();
    let hold = move |_: Event<'_>| {
        let _ = held.recv();
        ControlFlow::Break(())
    };
    engine.submit(greedy(&[1], 1), Box::new(hold)).unwrap();
    let (sender, receiver) = channel();
    for (name, request) in requests {
        let sender = sender.clone();
        let sink = move |event: Event<'_>| {
            if let Event::Finished { reason, .. } = event {
                assert_eq!(reason, FinishReason::Length);
                sender.send(name).unwrap();
            }
            ControlFlow::Continue(())
        };
        engine.submit(request, Box::new(sink)).unwrap();
    }
    drop((release, sender));
    receiver.iter().collect()
}

#[test]
fn a_hundred_requests_of_one_user_do_not_starve_one_of_another() {
    let model = model();
    let engine = load(&model, &options(Compute::F32));
    let request = |user, seed| Request {
        ignore_end: true,
        ..of(user, greedy(&model.prompt(10, seed), 20))
    };
    let mut requests: Vec<_> = (0..100).map(|i| ("many", request(A, i + 1))).collect();
    requests.push(("one", request(B, 500)));
    let order = order_of_ends(&engine, requests);
    assert_eq!(order.len(), 101);
    let place = order.iter().position(|name| *name == "one").unwrap();
    // Four run together: it is among the first that do.
    assert!(place < 4, "{place}");
}

#[test]
fn prompts_of_one_user_share_what_another_has_for_one() {
    let model = Tiny::new(
        ModelConfig {
            context: 4096,
            ..llama()
        },
        21,
    );
    let engine = load(&model, &options(Compute::F32));
    let request = |user, seed| Request {
        ignore_end: true,
        ..of(user, greedy(&model.prompt(2000, seed), 2))
    };
    let mut requests: Vec<_> = (0..3).map(|i| ("many", request(A, i + 1))).collect();
    requests.push(("one", request(B, 9)));
    assert_eq!(order_of_ends(&engine, requests)[0], "one");
}

#[test]
fn a_long_prompt_adds_a_bounded_number_of_rows_to_a_step() {
    let model = Tiny::new(
        ModelConfig {
            context: 4096,
            ..llama()
        },
        21,
    );
    let engine = Arc::new(load(&model, &options(Compute::F32)));
    let (sender, receiver) = channel();
    let seen = Arc::clone(&engine);
    // Between two tokens lies one step.
    let sink = move |event: Event<'_>| {
        if let Event::Token { .. } = event {
            sender.send(seen.stats().prompt_tokens).unwrap();
        }
        ControlFlow::Continue(())
    };
    let generating = Request {
        ignore_end: true,
        ..greedy(&[1, 9], 400)
    };
    engine.submit(generating, Box::new(sink)).unwrap();
    receiver.iter().take(20).for_each(drop);
    let long: Vec<_> = (0..2)
        .map(|seed| start(&engine, greedy(&model.prompt(3000, seed + 1), 2)))
        .collect();
    let read: Vec<u64> = receiver.iter().collect();
    let steps = read.windows(2).map(|pair| pair[1] - pair[0]);
    assert_eq!(steps.clone().max(), Some(64));
    assert!(steps.filter(|&rows| rows == 64).count() >= 6000 / 64 - 2);
    long.into_iter().for_each(|answer| drop(answer.wait()));
    idle(&engine);
}

#[test]
fn a_user_with_several_answers_running_gives_a_place_to_one_with_none() {
    let model = Tiny::new(
        ModelConfig {
            context: 4096,
            ..llama()
        },
        21,
    );
    let engine = load(
        &model,
        &EngineOptions {
            max_batch: 3,
            ..options(Compute::F32)
        },
    );
    let request = |user, seed, tokens| Request {
        ignore_end: true,
        ..of(user, greedy(&model.prompt(10, seed), tokens))
    };
    let long: Vec<_> = (1..4).map(|seed| request(A, seed, 1500)).collect();
    let expected: Vec<Answer> = long.iter().map(|r| generate(&engine, r.clone())).collect();
    idle(&engine);
    assert_eq!(engine.stats().preemptions, 0);
    let pending: Vec<_> = long.into_iter().map(|r| start(&engine, r)).collect();
    wait_until(|| engine.stats().running == 3);
    let completed = |engine: &Engine| engine.stats().completion_tokens;
    let short = generate(&engine, request(B, 9, 5));
    assert_eq!(short.ids.len(), 5);
    assert!(completed(&engine) < 3 * 1500 * 2 - 1000, "nobody had ended");
    for (answer, mut expected) in pending
        .into_iter()
        .map(support::Pending::wait)
        .zip(expected)
    {
        // Alone it may have found its beginning already.
        expected.cached = answer.cached;
        assert_eq!(answer, expected);
    }
    idle(&engine);
    assert_eq!(engine.stats().preemptions, 1);
}

#[test]
fn answers_that_outgrow_the_memory_go_on_later_as_if_nothing_had_been() {
    let model = model();
    // One context and a page: three answers of 450 tokens are 24 pages.
    let small = EngineOptions {
        kv_bytes: Some(9 * PAGE),
        ..options(Compute::F32)
    };
    let engine = load(&model, &small);
    let roomy = load(&model, &options(Compute::F32));
    let kinds = |user: [Option<User>; 3]| -> Vec<Request> {
        let warm = Sampling {
            temperature: 1.2,
            top_p: 0.95,
            repetition_penalty: 1.1,
            frequency_penalty: 0.2,
            seed: 5,
            ..Sampling::default()
        };
        vec![
            Request {
                ignore_end: true,
                logprobs: Some(3),
                ..of(user[0], greedy(&model.prompt(40, 1), 450))
            },
            Request {
                ignore_end: true,
                sampling: warm.clone(),
                stop: vec!["\u{1}never".into()],
                ..of(user[1], greedy(&model.prompt(50, 2), 450))
            },
            Request {
                // An array in an array and so on: its grammar has a state to keep.
                grammar: Some(Grammar::json_object()),
                sampling: warm,
                ..of(user[2], greedy(&model.prompt(60, 3), 440))
            },
        ]
    };
    for users in [[None; 3], [A; 3], [A, B, None]] {
        let requests = kinds(users);
        let expected: Vec<_> = requests.iter().map(|r| events(&roomy, r.clone())).collect();
        let before = engine.stats();
        let (sender, receiver) = channel();
        for (name, request) in requests.into_iter().enumerate() {
            let sender = sender.clone();
            let sink = move |event: Event<'_>| {
                sender.send((name, event.into_owned())).unwrap();
                ControlFlow::Continue(())
            };
            engine.submit(request, Box::new(sink)).unwrap();
        }
        drop(sender);
        let mut heard = vec![Vec::new(); 3];
        receiver
            .iter()
            .for_each(|(name, event)| heard[name].push(event));
        for (heard, expected) in heard.iter().zip(&expected) {
            let (last, tokens) = heard.split_last().unwrap();
            assert_eq!(tokens, &expected[..expected.len() - 1]);
            assert!(
                matches!((last, expected.last().unwrap()),
                    (Event::Finished { reason: a, completion_tokens: b, .. },
                     Event::Finished { reason: c, completion_tokens: d, .. }) if (a, b) == (c, d)),
                "{last:?}"
            );
        }
        idle(&engine);
        let after = engine.stats();
        assert!(
            after.preemptions > before.preemptions,
            "the memory was too small"
        );
        assert!(after.recomputed_tokens > before.recomputed_tokens);
        assert_eq!((after.failed, after.kv_bytes_used), (0, 0));
    }
}

#[test]
fn who_was_served_most_gives_way_first() {
    let model = model();
    let engine = load(
        &model,
        &EngineOptions {
            kv_bytes: Some(9 * PAGE),
            ..options(Compute::F32)
        },
    );
    let request = |user, seed| Request {
        ignore_end: true,
        ..of(user, greedy(&model.prompt(10, seed), 450))
    };
    // A is served twice as much, and both of its answers came first.
    let requests = vec![
        ("many", request(A, 1)),
        ("many", request(A, 2)),
        ("one", request(B, 3)),
    ];
    assert_eq!(order_of_ends(&engine, requests)[0], "one");
    idle(&engine);
    assert!(engine.stats().preemptions > 0, "there was memory for all");
}

/// One arrival of the property below.
#[derive(Clone, Debug)]
struct Arrival {
    user: usize,
    prompt: usize,
    text: u64,
    tokens: usize,
    warm: bool,
    /// Its client leaves after so many tokens.
    leaves: Option<usize>,
    /// The caller waits for this many tokens of all before it sends the next.
    pause: usize,
}

fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let one = (
        0usize..4,
        1usize..220,
        0u64..3,
        1usize..450,
        any::<bool>(),
        prop::option::weighted(0.3, 0usize..200),
        0usize..20,
    );
    let arrival = one.prop_map(
        |(user, prompt, text, tokens, warm, leaves, pause)| Arrival {
            user,
            prompt,
            text,
            tokens,
            warm,
            leaves,
            pause,
        },
    );
    prop::collection::vec(arrival, 2..14)
}

#[test]
fn every_answer_is_the_one_that_its_request_gets_alone() {
    let model = model();
    let tight = |pages, batch| {
        load(
            &model,
            &EngineOptions {
                kv_bytes: Some(pages * PAGE),
                max_batch: batch,
                ..options(Compute::F32)
            },
        )
    };
    let engines = [tight(8, 4), tight(9, 8), tight(12, 8), tight(20, 3)];
    let alone = load(&model, &options(Compute::F32));
    let (mut preemptions, mut cached) = (0, 0);
    let mut run = |arrivals: Vec<Arrival>, which: usize| {
        let engine = &engines[which];
        let before = engine.stats();
        let (sender, receiver) = channel();
        let requests: Vec<Request> = arrivals
            .iter()
            .map(|a| Request {
                ignore_end: true,
                sampling: Sampling {
                    temperature: if a.warm { 1.0 } else { 0.0 },
                    seed: a.tokens as u64,
                    ..Sampling::default()
                },
                ..of(
                    [A, B, Some(User::new([3; 32])), None][a.user],
                    greedy(&model.prompt(a.prompt, 77 + a.text), a.tokens),
                )
            })
            .collect();
        for (arrival, request) in arrivals.iter().zip(&requests) {
            let (answers, mut answer) = (sender.clone(), Answer::default());
            let (told, hears) = channel();
            let leaves = arrival.leaves;
            let sink = move |event: Event<'_>| {
                match event {
                    Event::Token { id, text, .. } => {
                        answer.ids.push(id);
                        answer.pieces.push(text.into_owned());
                        let _ = told.send(());
                        if leaves.is_some_and(|n| answer.ids.len() > n) {
                            let _ = answers.send(answer.clone());
                            return ControlFlow::Break(());
                        }
                    }
                    Event::Finished {
                        reason,
                        prompt_tokens,
                        completion_tokens,
                        cached_tokens,
                    } => {
                        answer.cached = cached_tokens;
                        answer.finished = Some((reason, prompt_tokens, completion_tokens));
                        let _ = answers.send(answer.clone());
                    }
                }
                ControlFlow::Continue(())
            };
            engine.submit(request.clone(), Box::new(sink)).unwrap();
            // Some come while others are at it.
            hears.iter().take(arrival.pause).for_each(drop);
        }
        drop(sender);
        let mut answers: Vec<Answer> = receiver.iter().collect();
        prop_assert_eq!(answers.len(), requests.len());
        for (arrival, request) in arrivals.iter().zip(&requests) {
            let mut expected = generate(&alone, of(None, request.clone()));
            if let Some(leaves) = arrival.leaves.filter(|&n| n < expected.ids.len()) {
                expected.ids.truncate(leaves + 1);
                expected.pieces.truncate(leaves + 1);
                expected.finished = None;
            }
            // Whichever it was of those that are alike.
            let found = answers.iter().position(|answer| {
                (&answer.ids, &answer.pieces, answer.finished)
                    == (&expected.ids, &expected.pieces, expected.finished)
            });
            prop_assert!(found.is_some(), "{:?} has no answer of its own", arrival);
            let answer = answers.swap_remove(found.unwrap());
            prop_assert!(request.user.is_some() || answer.cached == 0);
        }
        idle(engine);
        let after = engine.stats();
        prop_assert_eq!((after.failed, after.kv_bytes_used), (0, 0));
        preemptions += after.preemptions - before.preemptions;
        cached += after.cached_tokens - before.cached_tokens;
        Ok(())
    };
    let config = Config {
        cases: 24,
        failure_persistence: None,
        max_shrink_iters: 40,
        ..Config::default()
    };
    let strategy = (arrivals(), 0usize..4);
    let outcome = std::cell::RefCell::new(&mut run);
    TestRunner::new(config)
        .run(&strategy, |(arrivals, which)| {
            (outcome.borrow_mut())(arrivals, which)
        })
        .unwrap();
    eprintln!("{preemptions} preemptions, {cached} tokens reused");
    assert!(
        preemptions > 0 && cached > 0,
        "nothing of interest happened"
    );
}
