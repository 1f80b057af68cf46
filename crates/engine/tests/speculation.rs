//! Speculation changes no answer: whatever a request asks for, every event of it is the one that it
//! gets without, in the same order. For sampled answers, too, tokens are compared and not their
//! statistics: a token is drawn from the same logits by the same random number.

mod support;

use std::ops::ControlFlow;
use std::sync::mpsc::channel;

use casemate_engine::{
    Compute, Engine, EngineOptions, Event, FinishReason, Grammar, KvType, Request, Sampling,
    Speculation, User,
};
use support::tiny::{Tiny, llama};
use support::{generate, greedy, load, options};

const A: Option<User> = Some(User::new([1; 32]));
/// Bytes of a page of the tiny model in f32.
const PAGE: u64 = 2 * 2 * 64 * (16 + 16) * 4;

/// An engine without guesses, and one with them.
fn both(model: &Tiny, options: &EngineOptions) -> [Engine; 2] {
    Speculation::ALL.map(|speculation| {
        let options = EngineOptions {
            speculation,
            ..options.clone()
        };
        load(model, &options)
    })
}

/// Every event of requests that run together, log-probabilities in all their bits; how much of a
/// prompt was there already depends on when they began, and is left out.
fn events(engine: &Engine, requests: &[Request]) -> Vec<Vec<Event<'static>>> {
    let heard: Vec<_> = requests
        .iter()
        .map(|request| {
            let (sender, receiver) = channel();
            let sink = move |event: Event<'_>| {
                sender.send(event.into_owned()).unwrap();
                ControlFlow::Continue(())
            };
            engine.submit(request.clone(), Box::new(sink)).unwrap();
            receiver
        })
        .collect();
    let without_cached = |event| match event {
        Event::Finished {
            reason,
            prompt_tokens,
            completion_tokens,
            ..
        } => Event::Finished {
            reason,
            prompt_tokens,
            cached_tokens: 0,
            completion_tokens,
        },
        token => token,
    };
    let events = |heard: std::sync::mpsc::Receiver<_>| heard.iter().map(without_cached).collect();
    heard.into_iter().map(events).collect()
}

/// A text that says the same again and again, or does not.
fn prompt(model: &Tiny, length: usize, period: usize, seed: u64) -> Vec<u32> {
    let once = model.prompt(period, seed);
    once.into_iter().cycle().take(length).collect()
}

/// One of every way to choose tokens and to end.
fn requests(model: &Tiny) -> Vec<Request> {
    let warm = |temperature: f32, seed| Sampling {
        temperature,
        seed,
        ..Sampling::default()
    };
    let samplings = [
        Sampling::default(),
        warm(0.2, 1),
        warm(0.7, 2),
        Sampling {
            top_k: 20,
            top_p: 0.9,
            min_p: 0.01,
            ..warm(0.5, 3)
        },
        Sampling {
            repetition_penalty: 1.05,
            presence_penalty: 0.1,
            frequency_penalty: 0.02,
            ..warm(0.3, 4)
        },
        Sampling {
            bias: vec![(70, 2.0), (80, -1.0)],
            ..Sampling::default()
        },
    ];
    let mut requests = Vec::new();
    for (i, sampling) in samplings.into_iter().enumerate() {
        for (length, period) in [(3, 3), (90, 7), (130, 200)] {
            requests.push(Request {
                sampling: sampling.clone(),
                ignore_end: true,
                logprobs: (i % 2 == 0).then_some(i),
                stop: match i % 3 {
                    0 => vec!["\u{1}never".into(), "aaaaaaaaaaaaaa".into()],
                    _ => vec![],
                },
                ..greedy(
                    &prompt(model, length, period, i as u64 + 1),
                    90 + 40 * (i % 4),
                )
            });
        }
    }
    requests
}

#[test]
fn every_event_is_the_one_without_guesses() {
    let model = Tiny::printable(llama(), 21);
    let requests = requests(&model);
    let kinds = [
        (Compute::F32, None),
        (Compute::Bf16, None),
        (Compute::Int8, None),
        (Compute::Int8, Some(KvType::Int8)),
        (Compute::Int8Row, Some(KvType::Bf16)),
    ];
    for (compute, kv_type) in kinds {
        let [plain, guessing] = both(
            &model,
            &EngineOptions {
                kv_type,
                ..options(compute)
            },
        );
        let name = plain.compute_name();
        let expected = events(&plain, &requests);
        // Alone, in twos and all together, of which four run at a time.
        for together in [1, 2, requests.len()] {
            let answers: Vec<_> = requests
                .chunks(together)
                .flat_map(|requests| events(&guessing, requests))
                .collect();
            for (i, (answer, expected)) in answers.iter().zip(&expected).enumerate() {
                assert_eq!(
                    answer, expected,
                    "request {i} in {name}, {together} together"
                );
            }
        }
        let (plain, guessing) = (plain.stats(), guessing.stats());
        assert_eq!((plain.guessed_tokens, plain.accepted_tokens), (0, 0));
        eprintln!(
            "{name}: {} of {} guesses for {} tokens were right",
            guessing.accepted_tokens, guessing.guessed_tokens, guessing.completion_tokens
        );
        assert!(guessing.accepted_tokens > 500);
        assert!(guessing.guessed_tokens > guessing.accepted_tokens);
        assert_eq!(guessing.completion_tokens, 3 * plain.completion_tokens);
    }
}

#[test]
fn an_answer_may_end_at_every_token() {
    let model = Tiny::printable(llama(), 21);
    let [plain, guessing] = both(&model, &options(Compute::F32));
    // One whose answer soon repeats itself.
    let repeats = |seed: &u64| {
        let before = guessing.stats().accepted_tokens;
        generate(&guessing, greedy(&prompt(&model, 40, 5, *seed), 150));
        guessing.stats().accepted_tokens > before + 70
    };
    let seed = (1..200).find(repeats).expect("some answer repeats itself");
    let start = prompt(&model, 40, 5, seed);
    let whole = generate(&plain, greedy(&start, 150));
    assert_eq!(generate(&guessing, greedy(&start, 150)), whole);
    let text = whole.text();
    assert_eq!(text.len(), 150, "one byte a token");
    for at in 60..120 {
        let cut = generate(&guessing, greedy(&start, at));
        assert_eq!(
            (&cut.ids[..], cut.text().as_str()),
            (&whole.ids[..at], &text[..at])
        );
        assert_eq!(cut.finished, Some((FinishReason::Length, 40, at)));
        // A stop string that may be complete in the middle of what was guessed.
        let stops = Request {
            stop: vec![text[at..at + 3].into()],
            ..greedy(&start, 150)
        };
        assert_eq!(generate(&guessing, stops.clone()), generate(&plain, stops));
        // A client that leaves hears nothing more.
        let (sender, receiver) = channel();
        let mut left = at;
        let sink = move |event: Event<'_>| {
            sender.send(event.into_owned()).unwrap();
            left -= 1;
            match left {
                0 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        };
        guessing
            .submit(greedy(&start, 150), Box::new(sink))
            .unwrap();
        assert_eq!(receiver.iter().count(), at);
    }
    // End tokens, of which the first comes in the middle of something.
    for end in whole.ids[60..70].iter().copied() {
        let ends = Request {
            stop_tokens: vec![end],
            ..greedy(&start, 150)
        };
        assert_eq!(generate(&guessing, ends.clone()), generate(&plain, ends));
    }
    // The end of the context.
    let long = greedy(&prompt(&model, 450, 5, seed), 1000);
    let answer = generate(&guessing, long.clone());
    assert_eq!(answer.finished, Some((FinishReason::Length, 450, 62)));
    assert_eq!(answer, generate(&plain, long));
}

#[test]
fn constrained_answers_are_the_same() {
    let model = Tiny::new(llama(), 21);
    let [plain, guessing] = both(&model, &options(Compute::F32));
    let items = serde_json::json!({"type": "object", "properties": {"list": {"type": "array", "minItems": 8,
        "items": {"type": "object", "properties": {"name": {"enum": ["first", "second"]}, "known": {"type": "boolean"}},
            "required": ["name", "known"], "additionalProperties": false}}},
        "required": ["list"], "additionalProperties": false});
    let requests: Vec<Request> = (0..6)
        .map(|seed| Request {
            grammar: Some(match seed % 2 {
                0 => Grammar::json_object(),
                _ => Grammar::from_schema(&items).unwrap(),
            }),
            sampling: Sampling {
                temperature: [0.0, 0.8][seed / 3],
                seed: seed as u64,
                ..Sampling::default()
            },
            ..greedy(&model.prompt(20, seed as u64 + 1), 300)
        })
        .collect();
    for together in [1, 3] {
        for requests in requests.chunks(together) {
            assert_eq!(events(&guessing, requests), events(&plain, requests));
        }
    }
    assert!(guessing.stats().accepted_tokens > 100);
}

#[test]
fn pages_of_guessed_at_answers_hold_what_was_accepted() {
    let model = Tiny::printable(llama(), 21);
    let [plain, guessing] = both(&model, &options(Compute::Int8));
    let mut cached = Vec::new();
    // A conversation: each prompt is the one before, its answer, and something more.
    let mut text = prompt(&model, 60, 9, 7);
    for turn in 0..4 {
        let request = Request {
            logprobs: Some(20),
            ignore_end: true,
            sampling: Sampling {
                temperature: 0.3,
                seed: turn,
                ..Sampling::default()
            },
            ..greedy(&text, 80)
        };
        let expected = events(&plain, std::slice::from_ref(&request));
        let request = Request { user: A, ..request };
        let before = guessing.stats().cached_tokens;
        assert_eq!(events(&guessing, &[request]), expected, "turn {turn}");
        cached.push(guessing.stats().cached_tokens - before);
        text.extend(expected[0].iter().filter_map(|event| match event {
            Event::Token { id, .. } => Some(*id),
            Event::Finished { .. } => None,
        }));
        text.extend(model.prompt(10, turn + 50));
    }
    // All positions but that of an answer's last token were computed.
    assert_eq!(cached, [0, 128, 192, 256]);
    assert!(guessing.stats().guessed_tokens > guessing.stats().accepted_tokens);
}

#[test]
fn answers_that_give_their_memory_back_are_the_same() {
    let model = Tiny::printable(llama(), 21);
    // One context and a page: three answers of 400 tokens are 21 pages.
    let [plain, guessing] = both(
        &model,
        &EngineOptions {
            kv_bytes: Some(9 * PAGE),
            ..options(Compute::F32)
        },
    );
    for users in [[None; 3], [A, A, None]] {
        let requests: Vec<Request> = (0..3)
            .map(|i| Request {
                ignore_end: true,
                logprobs: Some(i),
                user: users[i],
                sampling: Sampling {
                    temperature: 0.2 * i as f32,
                    repetition_penalty: 1.0 + 0.02 * i as f32,
                    seed: 5,
                    ..Sampling::default()
                },
                ..greedy(&prompt(&model, 30, 6, i as u64 + 1), 400)
            })
            .collect();
        let alone: Vec<_> = requests
            .iter()
            .map(|request| events(&plain, std::slice::from_ref(request)).remove(0))
            .collect();
        let before = guessing.stats();
        assert_eq!(events(&guessing, &requests), alone);
        let after = guessing.stats();
        assert!(after.preemptions > before.preemptions);
        assert!(after.recomputed_tokens > before.recomputed_tokens);
        assert!(after.accepted_tokens > before.accepted_tokens + 100);
    }
}
