//! Log-probabilities, constraints and biases of whole requests.

mod support;

use std::ops::ControlFlow;
use std::sync::mpsc::channel;

use casemate_container::ModelSource;
use casemate_engine::{
    Compute, Engine, Event, FinishReason, Grammar, MAXIMUM_TOP, Request, Sampling, SubmitError,
    TokenLogprobs,
};
use support::tiny::{Tiny, llama};
use support::{generate, greedy, load, options, reference};

fn events(engine: &Engine, request: Request) -> Vec<Event<'static>> {
    let (sender, receiver) = channel();
    let sink = move |event: Event<'_>| {
        sender.send(event.into_owned()).unwrap();
        ControlFlow::Continue(())
    };
    engine.submit(request, Box::new(sink)).unwrap();
    receiver.iter().collect()
}

fn told(events: &[Event<'_>]) -> Vec<(u32, TokenLogprobs)> {
    let of = |event: &Event<'_>| match event {
        Event::Token { id, logprobs, .. } => Some((*id, logprobs.clone()?.into_owned())),
        Event::Finished { .. } => None,
    };
    events.iter().filter_map(of).collect()
}

fn model() -> Tiny {
    Tiny::new(llama(), 21)
}

#[test]
fn logprobs_agree_with_the_reference() {
    let model = model();
    let engine = load(&model, &options(Compute::F32));
    let prompt = model.prompt(20, 3);
    // Penalties, temperature and truncation change the choice, never what is told.
    let sampling = Sampling {
        temperature: 1.4,
        top_k: 7,
        presence_penalty: 2.0,
        repetition_penalty: 1.5,
        seed: 4,
        ..Sampling::default()
    };
    let request = Request {
        logprobs: Some(5),
        sampling,
        ignore_end: true,
        ..greedy(&prompt, 12)
    };
    let told = told(&events(&engine, request));
    assert_eq!(told.len(), 12);
    let mut tokens = prompt.clone();
    tokens.extend(told.iter().map(|(id, _)| id));
    let rows = reference::logits(&model, &tokens);
    for (n, (id, found)) in told.iter().enumerate() {
        let row = &rows[prompt.len() - 1 + n];
        let maximum = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = row.iter().map(|x| (x - maximum).exp()).sum::<f64>().ln() + maximum;
        let expected = |id: u32| row[id as usize] - total;
        let near = |id: u32, value: f32| {
            let difference = f64::from(value) - expected(id);
            assert!(difference.abs() < 1e-3, "token {id} at {n}: {difference}");
        };
        near(*id, found.chosen);
        found.top.iter().for_each(|&(id, value)| near(id, value));
        let mut sorted: Vec<u32> = (0..row.len() as u32).collect();
        sorted.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]));
        let ids: Vec<u32> = found.top.iter().map(|t| t.0).collect();
        assert_eq!(ids, sorted[..5], "at {n}");
    }
}

#[test]
fn logprobs_change_no_token_and_are_absent_unless_asked_for() {
    let model = model();
    let engine = load(&model, &options(Compute::Int8));
    let request = greedy(&model.prompt(9, 1), 20);
    let plain = events(&engine, request.clone());
    assert!(told(&plain).is_empty());
    let with = events(
        &engine,
        Request {
            logprobs: Some(0),
            ..request.clone()
        },
    );
    let strip = |events: Vec<Event<'static>>| -> Vec<Event<'static>> {
        let without = |event| match event {
            Event::Token { id, text, .. } => Event::Token {
                id,
                text,
                logprobs: None,
            },
            finished => finished,
        };
        events.into_iter().map(without).collect()
    };
    assert_eq!(strip(with), plain);
    let too_many = Request {
        logprobs: Some(MAXIMUM_TOP + 1),
        ..request
    };
    let refused = engine.submit(too_many, Box::new(|_| ControlFlow::Continue(())));
    assert_eq!(
        refused,
        Err(SubmitError::Logprobs {
            asked: MAXIMUM_TOP + 1,
            most: MAXIMUM_TOP
        })
    );
}

#[test]
fn json_answers_are_complete_where_they_stop() {
    let model = model();
    let engine = load(&model, &options(Compute::F32));
    let mut stopped = 0;
    for seed in 0..40 {
        let request = Request {
            grammar: Some(Grammar::json_object()),
            sampling: Sampling {
                temperature: 1.0,
                seed,
                ..Sampling::default()
            },
            ..greedy(&model.prompt(7, 2), 80)
        };
        let answer = generate(&engine, request);
        let parsed = serde_json::from_str::<serde_json::Value>(&answer.text());
        match answer.reason() {
            FinishReason::Stop => {
                assert!(parsed.unwrap().is_object(), "{}", answer.text());
                stopped += 1;
            }
            FinishReason::Length => assert!(parsed.is_err()),
            other => panic!("{other:?}"),
        }
    }
    assert!(stopped > 3, "{stopped}");
}

#[test]
fn a_constraint_concerns_its_own_request_only() {
    let model = model();
    let engine = load(&model, &options(Compute::F32));
    let free = greedy(&model.prompt(30, 5), 25);
    let bound = Request {
        grammar: Some(Grammar::json_object()),
        ..free.clone()
    };
    let [alone, json] = [free.clone(), bound.clone()].map(|request| generate(&engine, request));
    assert_ne!(alone.text(), json.text());
    let together = [free, bound].map(|request| support::start(&engine, request));
    assert_eq!(together.map(support::Pending::wait), [alone, json]);
}

#[test]
fn stop_strings_and_unknown_biases_are_refused() {
    let model = model();
    let engine = load(&model, &options(Compute::F32));
    let submit = |request| engine.submit(request, Box::new(|_| ControlFlow::Continue(())));
    let request = Request {
        grammar: Some(Grammar::json_object()),
        stop: vec!["x".into()],
        ..greedy(&[5], 4)
    };
    assert_eq!(submit(request), Err(SubmitError::StopWithGrammar));
    let sampling = Sampling {
        bias: vec![(model.config().vocab, 1.0)],
        ..Sampling::default()
    };
    let request = Request {
        sampling,
        ..greedy(&[5], 4)
    };
    assert!(matches!(
        submit(request),
        Err(SubmitError::UnknownToken { .. })
    ));
}
