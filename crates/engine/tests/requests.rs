//! Requests side by side: nobody's tokens depend on anybody else, and every way to end is told
//! apart.

mod support;

use std::ops::ControlFlow;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use casemate_container::{DType, ModelConfig};
use casemate_engine::{
    Compute, Engine, EngineOptions, Event, FinishReason, Request, RequestError, Sampling, Sink,
    SubmitError,
};
use support::tiny::{Tiny, llama};
use support::{Answer, generate, greedy, load, options, start};

/// A model that only ever generates printable ASCII.
fn printable() -> Tiny {
    Tiny::printable(llama(), 21)
}

/// One that this arithmetic is for.
fn printable_for(compute: Compute) -> Tiny {
    if compute != Compute::Q4G32 {
        return printable();
    }
    let config = ModelConfig {
        hidden: 64,
        ffn: 96,
        ..llama()
    };
    Tiny::printable(config, 21).encoded(&[DType::Q4_0, DType::Q8_0, DType::Q4_1])
}

fn engine(compute: Compute) -> Engine {
    load(&printable(), &options(compute))
}

/// Requests of all kinds and lengths.
fn mixed(model: &Tiny) -> Vec<Request> {
    (0..12)
        .map(|i: usize| {
            let sampling = match i % 3 {
                0 => Sampling::default(),
                1 => Sampling {
                    temperature: 0.9,
                    top_p: 0.9,
                    seed: i as u64,
                    ..Sampling::default()
                },
                _ => Sampling {
                    temperature: 1.3,
                    top_k: 40,
                    min_p: 0.01,
                    repetition_penalty: 1.2,
                    presence_penalty: 0.3,
                    frequency_penalty: 0.1,
                    seed: i as u64,
                    ..Sampling::default()
                },
            };
            let prompt = model.prompt([1, 70, 300, 17, 64, 129][i % 6], i as u64 + 1);
            Request {
                prompt,
                max_tokens: [40, 1, 25, 90][i % 4],
                sampling,
                ignore_end: true,
                ..Request::default()
            }
        })
        .collect()
}

fn alone(engine: &Engine, requests: &[Request]) -> Vec<Answer> {
    requests
        .iter()
        .map(|request| generate(engine, request.clone()))
        .collect()
}

fn together(engine: &Engine, requests: &[Request]) -> Vec<Answer> {
    let pending: Vec<_> = requests
        .iter()
        .map(|request| start(engine, request.clone()))
        .collect();
    pending.into_iter().map(support::Pending::wait).collect()
}

#[test]
fn ragged_concurrent_requests_equal_single_runs() {
    for compute in Compute::ALL.iter().copied() {
        let model = printable_for(compute);
        let requests = mixed(&model);
        let engine = load(&model, &options(compute));
        let expected = alone(&engine, &requests);
        assert!(
            expected
                .iter()
                .zip(&requests)
                .all(|(a, r)| a.ids.len() == r.max_tokens)
        );
        assert_eq!(together(&engine, &requests), expected);
        assert_eq!(together(&engine, &requests), expected);
        wait_until(|| engine.stats().running == 0);
        let stats = engine.stats();
        assert_eq!((stats.waiting, stats.failed, stats.requests), (0, 0, 36));
        assert_eq!(stats.completion_tokens, 3 * 3 * (40 + 1 + 25 + 90));
        assert_eq!(stats.prompt_tokens, 3 * 2 * (1 + 70 + 300 + 17 + 64 + 129));
    }
}

#[test]
fn threads_and_batch_sizes_change_no_token() {
    for compute in Compute::ALL.iter().copied() {
        let model = printable_for(compute);
        let requests = mixed(&model);
        let expected = alone(
            &load(
                &model,
                &EngineOptions {
                    threads: 1,
                    ..options(compute)
                },
            ),
            &requests,
        );
        for (threads, max_batch) in [(1, 12), (2, 3), (3, 12), (4, 5)] {
            let engine = load(
                &model,
                &EngineOptions {
                    threads,
                    max_batch,
                    ..options(compute)
                },
            );
            assert_eq!(
                together(&engine, &requests),
                expected,
                "{threads} threads, batch of {max_batch}"
            );
        }
    }
}

#[test]
fn prompts_in_chunks_give_the_logits_of_whole_prompts() {
    // 300 tokens take several chunks here; the answer must be that of feeding them one by one.
    let model = printable();
    let engine = load(&model, &options(Compute::F32));
    let prompt = model.prompt(300, 9);
    let expected = generate(&engine, greedy(&prompt, 20));
    let mut tokens = prompt;
    for &id in &expected.ids {
        let last = support::logits(&engine, &tokens).pop().unwrap();
        assert_eq!(casemate_engine::sampler::arg_max(&last), id);
        tokens.push(id);
    }
}

#[test]
fn seeds_decide_and_repeat() {
    let model = printable();
    let engine = load(&model, &options(Compute::Int8));
    let run = |seed| {
        let sampling = Sampling {
            temperature: 1.5,
            seed,
            ..Sampling::default()
        };
        generate(
            &engine,
            Request {
                sampling,
                ..greedy(&model.prompt(10, 3), 30)
            },
        )
        .ids
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn a_sink_that_breaks_is_dropped_and_its_memory_freed() {
    let engine = engine(Compute::F32);
    let (sender, receiver) = channel();
    let mut left = 3;
    let sink = move |event: Event<'_>| {
        sender.send(event.into_owned()).unwrap();
        left -= 1;
        if left == 0 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    engine
        .submit(greedy(&[1, 50], 400), Box::new(sink))
        .unwrap();
    let other = generate(&engine, greedy(&[1, 60], 60));
    // The channel closes only when the sink is dropped.
    let events: Vec<Event> = receiver.iter().collect();
    assert_eq!(events.len(), 3);
    assert!(events.iter().all(|e| matches!(e, Event::Token { .. })));
    assert_eq!(other.ids.len(), 60);
    wait_until(|| engine.stats().kv_bytes_used == 0);
}

/// Keeps the engine busy with a request of its own until the result is dropped, so that requests
/// submitted meanwhile are certain to wait together.
fn hold(engine: &Engine) -> std::sync::mpsc::Sender<()> {
    let (release, held) = channel();
    let sink = move |_: Event<'_>| {
        let _ = held.recv();
        ControlFlow::Break(())
    };
    engine.submit(greedy(&[1], 1), Box::new(sink)).unwrap();
    release
}

fn wait_until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "it never happened");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn cancelling_ends_running_and_waiting_requests() {
    let model = Tiny::new(
        ModelConfig {
            context: 100_000,
            ..llama()
        },
        3,
    );
    let engine = load(
        &model,
        &EngineOptions {
            max_batch: 1,
            ..options(Compute::F32)
        },
    );
    let submit = || {
        let (sender, receiver) = channel();
        let request = Request {
            ignore_end: true,
            ..greedy(&[1, 9], 90_000)
        };
        let id = engine.submit(
            request,
            Box::new(move |event| {
                let _ = sender.send(event.into_owned());
                ControlFlow::Continue(())
            }),
        );
        (id.unwrap(), receiver)
    };
    let (running, running_events) = submit();
    let (waiting, waiting_events) = submit();
    assert!(matches!(
        running_events.recv().unwrap(),
        Event::Token { .. }
    ));
    engine.cancel(waiting);
    let events: Vec<Event> = waiting_events.iter().collect();
    assert_eq!(
        events,
        [Event::Finished {
            reason: FinishReason::Cancelled,
            prompt_tokens: 2,
            cached_tokens: 0,
            completion_tokens: 0
        }]
    );
    engine.cancel(running);
    let last = running_events.iter().last();
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
    wait_until(|| engine.stats().running == 0);
    // A request that is over can be cancelled without effect.
    engine.cancel(running);
    assert_eq!(generate(&engine, greedy(&[1], 2)).ids.len(), 2);
}

#[test]
fn dropping_the_engine_tells_everybody() {
    let model = Tiny::new(
        ModelConfig {
            context: 100_000,
            ..llama()
        },
        3,
    );
    let engine = load(
        &model,
        &EngineOptions {
            max_batch: 1,
            ..options(Compute::F32)
        },
    );
    let request = Request {
        ignore_end: true,
        ..greedy(&[1, 9], 90_000)
    };
    let pending = [start(&engine, request.clone()), start(&engine, request)];
    drop(engine);
    for answer in pending.map(support::Pending::wait) {
        assert_eq!(answer.reason(), FinishReason::Cancelled);
    }
}

#[test]
fn a_panicking_sink_harms_nobody_else() {
    let engine = engine(Compute::F32);
    let expected = generate(&engine, greedy(&[1, 60], 60));
    let other = start(&engine, greedy(&[1, 60], 60));
    engine
        .submit(greedy(&[1, 50], 400), Box::new(|_| panic!("on purpose")))
        .unwrap();
    assert_eq!(other.wait(), expected);
    wait_until(|| engine.stats().failed == 1 && engine.stats().kv_bytes_used == 0);
    assert_eq!(generate(&engine, greedy(&[1, 60], 60)), expected);
}

#[test]
fn values_that_are_not_finite_fail_their_own_request_only() {
    // Only token 7 has anything in the last dimension, which the first layer's values multiply by
    // more than the number format holds. (Not in int8 by rows: rotation mixes that dimension into all.)
    for (compute, huge) in [(Compute::F32, 1e38), (Compute::Int8, 1e6)] {
        let mut model = printable();
        let mut change = |name: &str, change: &dyn Fn(usize, &mut [f32])| {
            let at = model.index(name);
            let (shape, mut values) = (model.tensors[at].shape.clone(), model.values[at].clone());
            values
                .chunks_mut(48)
                .enumerate()
                .for_each(|(i, row)| change(i, row));
            model.remove(name);
            model.push(name, &shape, values);
        };
        change("token_embd.weight", &|token, row| {
            if token == 7 {
                row.fill(0.0);
            }
            row[47] = if token == 7 { 1.0 } else { 0.0 };
        });
        change("blk.0.attn_v.weight", &|_, row| row[47] = huge);
        let engine = load(&model, &options(compute));
        let expected = generate(&engine, greedy(&[1, 60], 60));
        let sound = start(&engine, greedy(&[1, 60], 60));
        let broken = generate(&engine, greedy(&[1, 7, 60], 60));
        assert_eq!(
            broken.finished,
            Some((FinishReason::Error(RequestError::NonFinite), 3, 0)),
            "{compute:?}"
        );
        assert_eq!(sound.wait(), expected);
        assert_eq!(engine.stats().failed, 1);
    }
}

#[test]
fn prompts_longer_than_the_context_are_refused_with_numbers() {
    let model = printable();
    let engine = load(
        &model,
        &EngineOptions {
            max_context: 100,
            ..options(Compute::F32)
        },
    );
    assert_eq!(engine.context(), 100);
    let submit = |request| {
        engine.submit(
            request,
            Box::new(|_| unreachable!("refused requests hear nothing")),
        )
    };
    assert_eq!(
        submit(greedy(&model.prompt(100, 1), 1)),
        Err(SubmitError::PromptTooLong {
            prompt: 100,
            context: 100
        })
    );
    assert_eq!(submit(greedy(&[], 1)), Err(SubmitError::EmptyPrompt));
    assert_eq!(
        submit(greedy(&[300], 1)),
        Err(SubmitError::UnknownToken {
            id: 300,
            vocab: 300
        })
    );
    assert_eq!(submit(greedy(&[3], 0)), Err(SubmitError::NothingToGenerate));
    let stops = |stop: Vec<String>| {
        submit(Request {
            stop,
            ..greedy(&[3], 1)
        })
    };
    let refused = Err(SubmitError::Stops {
        count: 16,
        bytes: 1024,
    });
    assert_eq!(stops(vec![String::new()]), refused);
    assert_eq!(stops(vec!["x".repeat(1025)]), refused);
    assert_eq!(stops(vec!["x".into(); 17]), refused);
    let sampling = Sampling {
        top_p: 2.0,
        ..Sampling::default()
    };
    assert!(
        matches!(submit(Request { sampling, ..greedy(&[3], 1) }), Err(SubmitError::Sampling(e)) if e.parameter == "top_p")
    );
}

#[test]
fn answers_end_with_the_context() {
    let model = printable();
    let engine = load(
        &model,
        &EngineOptions {
            max_context: 100,
            ..options(Compute::F32)
        },
    );
    let answer = generate(&engine, greedy(&model.prompt(99, 1), 1000));
    assert_eq!(answer.finished, Some((FinishReason::Length, 99, 1)));
    let answer = generate(&engine, greedy(&model.prompt(30, 1), 1000));
    assert_eq!(answer.finished, Some((FinishReason::Length, 30, 70)));
    // The same tokens as with room to spare.
    let roomy = load(&model, &options(Compute::F32));
    assert_eq!(
        generate(&roomy, greedy(&model.prompt(30, 1), 70)).ids,
        answer.ids
    );
}

#[test]
fn stop_strings_end_the_text_before_them() {
    let engine = engine(Compute::F32);
    let whole = generate(&engine, greedy(&[1, 50], 80));
    let text = whole.text();
    assert_eq!(text.len(), 80, "one byte a token");
    for (from, to) in [(10, 11), (20, 24), (70, 80)] {
        let stop = &text[from..to];
        let at = text.find(stop).unwrap();
        let request = Request {
            stop: vec!["\u{1}never".into(), stop.into()],
            ..greedy(&[1, 50], 80)
        };
        let answer = generate(&engine, request);
        assert_eq!(answer.text(), text[..at], "stopping at {stop:?}");
        assert_eq!(answer.ids, whole.ids[..at + stop.len()]);
        assert_eq!(
            answer.finished,
            Some((FinishReason::Stop, 2, at + stop.len()))
        );
    }
    // What only began like a stop string is shown in the end.
    let stop = format!("{}\u{1}", &text[75..]);
    let answer = generate(
        &engine,
        Request {
            stop: vec![stop],
            ..greedy(&[1, 50], 80)
        },
    );
    assert_eq!(answer.text(), text);
    assert_eq!(answer.reason(), FinishReason::Length);
    assert!(
        answer.pieces[79].ends_with(&text[75..]),
        "the text was held back until then"
    );
}

#[test]
fn end_tokens_end_the_answer_and_are_not_shown() {
    let mut model = printable();
    let whole = generate(&load(&model, &options(Compute::F32)), greedy(&[1, 50], 60));
    let end = whole.ids[30];
    let at = whole.ids.iter().position(|&id| id == end).unwrap();
    let expected = (whole.ids[..=at].to_vec(), whole.text()[..at].to_owned());
    let check = |answer: Answer| {
        assert_eq!((answer.ids.clone(), answer.text()), expected);
        assert_eq!(answer.finished, Some((FinishReason::Stop, 2, at + 1)));
    };
    let engine = load(&model, &options(Compute::F32));
    check(generate(
        &engine,
        Request {
            stop_tokens: vec![299, end],
            ..greedy(&[1, 50], 60)
        },
    ));
    drop(engine);
    model.config.eos = vec![2, end];
    let engine = load(&model, &options(Compute::F32));
    check(generate(&engine, greedy(&[1, 50], 60)));
    let all = generate(
        &engine,
        Request {
            ignore_end: true,
            ..greedy(&[1, 50], 60)
        },
    );
    assert_eq!(all.ids, whole.ids);
}

#[test]
fn too_many_waiting_requests_are_refused() {
    let model = Tiny::new(
        ModelConfig {
            context: 100_000,
            ..llama()
        },
        3,
    );
    let engine = load(
        &model,
        &EngineOptions {
            max_batch: 1,
            max_waiting: 2,
            ..options(Compute::F32)
        },
    );
    let request = Request {
        ignore_end: true,
        ..greedy(&[1, 9], 90_000)
    };
    let _running = start(&engine, request.clone());
    wait_until(|| engine.stats().running == 1);
    let _waiting = [
        start(&engine, request.clone()),
        start(&engine, request.clone()),
    ];
    let refused = engine.submit(request, Box::new(|_| ControlFlow::Continue(())));
    assert_eq!(refused, Err(SubmitError::Busy { waiting: 2 }));
    assert_eq!(engine.stats().waiting, 2);
}

#[test]
fn requests_submitted_together_begin_together_or_not_at_all() {
    let model = printable();
    let engine = load(
        &model,
        &EngineOptions {
            max_batch: 3,
            max_waiting: 3,
            ..options(Compute::F32)
        },
    );
    let (sender, receiver) = channel();
    let requests = |count: u32| -> Vec<(Request, Sink)> {
        let request = |name: u32| {
            let sender = sender.clone();
            let sink = move |event: Event<'_>| {
                if let Event::Token { .. } = event {
                    sender.send(name).unwrap();
                }
                ControlFlow::Continue(())
            };
            let request = Request {
                ignore_end: true,
                ..greedy(&[1, 50 + name], 4)
            };
            (request, Box::new(sink) as Sink)
        };
        (0..count).map(request).collect()
    };
    let refused = engine.submit_together(requests(4));
    assert_eq!(refused, Err(SubmitError::Busy { waiting: 0 }));
    assert_eq!((engine.stats().requests, engine.stats().waiting), (0, 0));
    // One that cannot be served keeps the others from being served.
    let mut wrong = requests(2);
    wrong[1].0.prompt.clear();
    assert_eq!(engine.submit_together(wrong), Err(SubmitError::EmptyPrompt));

    for _ in 0..20 {
        let ids = engine.submit_together(requests(3)).unwrap();
        assert_eq!(ids.len(), 3);
        let steps: Vec<u32> = receiver.iter().take(12).collect();
        for step in steps.chunks(3) {
            let mut step = step.to_vec();
            step.sort_unstable();
            assert_eq!(step, [0, 1, 2], "{steps:?}");
        }
    }
    assert_eq!(engine.stats().requests, 60);
}

#[test]
fn requests_wait_for_memory_in_order() {
    let model = printable();
    let page = 2 * 2 * 64 * (16 + 16) * 4;
    // 512 positions are 8 pages: room for one long prompt and one short one.
    let options = EngineOptions {
        kv_bytes: Some(9 * page + 5),
        ..options(Compute::F32)
    };
    let engine = load(&model, &options);
    assert_eq!(engine.stats().kv_bytes, 9 * page);
    let held = hold(&engine);
    let (sender, receiver) = channel();
    let lengths = [500, 500, 40];
    for (name, length) in lengths.into_iter().enumerate() {
        let sender = sender.clone();
        engine
            .submit(
                greedy(&model.prompt(length, 50 + name as u64), 5),
                Box::new(move |event| {
                    let _ = sender.send((name, event.into_owned()));
                    ControlFlow::Continue(())
                }),
            )
            .unwrap();
    }
    drop(held);
    drop(sender);
    let order: Vec<usize> = receiver
        .iter()
        .filter_map(|(name, event)| {
            matches!(
                event,
                Event::Finished {
                    reason: FinishReason::Length,
                    ..
                }
            )
            .then_some(name)
        })
        .collect();
    // The short one came last and does not overtake the second, though it would fit beside the
    // first.
    assert_eq!(order, [0, 2, 1]);
    assert_eq!(engine.stats().preemptions, 0);
}

#[test]
fn a_long_prompt_does_not_hold_up_short_ones() {
    let model = Tiny::new(
        ModelConfig {
            context: 8192,
            ..llama()
        },
        3,
    );
    let engine = load(&model, &options(Compute::F32));
    let held = hold(&engine);
    let (sender, receiver) = channel();
    for (name, prompt) in [
        ("long", model.prompt(6000, 1)),
        ("short", model.prompt(100, 2)),
    ] {
        let sender = sender.clone();
        engine
            .submit(
                Request {
                    ignore_end: true,
                    ..greedy(&prompt, 10)
                },
                Box::new(move |event| {
                    let _ = sender.send((name, event.into_owned()));
                    ControlFlow::Continue(())
                }),
            )
            .unwrap();
    }
    drop(held);
    drop(sender);
    let tokens: Vec<&str> = receiver
        .iter()
        .filter_map(|(name, event)| matches!(event, Event::Token { .. }).then_some(name))
        .collect();
    assert_eq!(tokens, [["short"; 10], ["long"; 10]].concat());
}
