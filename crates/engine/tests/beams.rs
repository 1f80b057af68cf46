//! Beam search against a plain second implementation that computes every beam's logits anew.

mod support;

use std::ops::ControlFlow;

use casemate_container::ModelConfig;
use casemate_engine::{
    BeamSearch, Compute, Engine, EngineOptions, FinishReason, Grammar, MAXIMUM_BEAMS, Request,
    Sampling, SubmitError, User,
};
use support::tiny::{Tiny, llama};
use support::{Answer, generate, greedy, load, logits, options, start};

/// Bytes of a page of the tiny model in f32.
const PAGE: u64 = 2 * 2 * 64 * (16 + 16) * 4;

fn model() -> Tiny {
    Tiny::new(llama(), 21)
}

fn roomy(batch: usize, pages: u64) -> EngineOptions {
    EngineOptions {
        max_batch: batch,
        kv_bytes: Some(pages * PAGE),
        ..options(Compute::F32)
    }
}

fn beams(request: Request, search: BeamSearch) -> Request {
    Request {
        beams: Some(search),
        ..request
    }
}

/// Logarithms of the softmax after the last of `tokens`.
fn log_softmax(engine: &Engine, tokens: &[u32]) -> Vec<f64> {
    let row = logits(engine, tokens).pop().unwrap();
    let maximum = f64::from(row.iter().copied().fold(f32::MIN, f32::max));
    let sum: f64 = row.iter().map(|&x| (f64::from(x) - maximum).exp()).sum();
    row.iter()
        .map(|&x| f64::from(x) - (maximum + sum.ln()))
        .collect()
}

/// `generate` of `transformers` as its documentation and its `BeamSearchScorer` tell it: every
/// continuation of every beam is listed and sorted.
fn plain(
    engine: &Engine,
    prompt: &[u32],
    most: usize,
    ends: &[u32],
    search: BeamSearch,
) -> (Vec<u32>, f64) {
    let width = search.width;
    let mut live: Vec<(Vec<u32>, f64)> = vec![(vec![], 0.0)];
    let mut found: Vec<(Vec<u32>, f64)> = vec![];
    for length in 1..=most {
        let score = |sum: f64| sum / (length as f64).powf(f64::from(search.length_penalty));
        let mut all = vec![];
        for (tokens, sum) in &live {
            let text = [prompt, tokens].concat();
            for (id, log) in log_softmax(engine, &text).into_iter().enumerate() {
                all.push(([&tokens[..], &[id as u32]].concat(), sum + log));
            }
        }
        // Stable: the order of beams and ids decides among equals.
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        let add = |found: &mut Vec<(Vec<u32>, f64)>, tokens: &[u32], sum: f64| {
            found.push((tokens.to_vec(), score(sum)));
            found.sort_by(|a, b| b.1.total_cmp(&a.1));
            found.truncate(width);
        };
        live.clear();
        for (rank, (tokens, sum)) in all.iter().enumerate() {
            let ended = ends.contains(tokens.last().unwrap());
            if ended && rank < width {
                add(&mut found, tokens, *sum);
            } else if !ended && live.len() < width {
                live.push((tokens.clone(), *sum));
            }
        }
        let full = found.len() == width;
        if full && (search.early_stopping || found[width - 1].1 >= score(all[0].1)) {
            break;
        }
        if length == most {
            for (tokens, sum) in live.clone() {
                add(&mut found, &tokens, sum);
            }
        }
    }
    found.swap_remove(0)
}

/// End tokens that the model likes, so that answers of many lengths compete.
fn likely(engine: &Engine, prompt: &[u32], count: usize) -> Vec<u32> {
    let log = log_softmax(engine, prompt);
    let mut ids: Vec<u32> = (0..log.len() as u32).collect();
    ids.sort_by(|&a, &b| log[b as usize].total_cmp(&log[a as usize]));
    ids[5..5 + count].to_vec()
}

#[test]
fn it_finds_what_a_plain_search_finds() {
    let model = model();
    let engine = load(&model, &roomy(8, 40));
    let (mut stopped, mut unlike_greedy) = (0, 0);
    for (seed, prompt) in [1usize, 5, 62, 63, 64, 65, 100, 130]
        .into_iter()
        .enumerate()
    {
        let prompt = model.prompt(prompt, seed as u64 + 1);
        for (width, length_penalty, early_stopping, ends) in [
            (1, 1.0, false, 1),
            (2, 0.0, false, 1),
            (3, 1.0, true, 3),
            (4, 1.0, false, 2),
            (4, 2.0, false, 4),
            (4, -1.0, false, 3),
            (8, 0.5, true, 2),
        ] {
            let search = BeamSearch {
                width,
                length_penalty,
                early_stopping,
            };
            let mut ends = likely(&engine, &prompt, ends);
            let request = Request {
                stop_tokens: ends.clone(),
                ..beams(greedy(&prompt, 8), search)
            };
            ends.push(2);
            let (expected, _) = plain(&engine, &prompt, 8, &ends, search);
            let answer = generate(&engine, request);
            assert_eq!(
                answer.ids,
                expected,
                "{search:?} after {} tokens",
                prompt.len()
            );
            let ended = ends.contains(answer.ids.last().unwrap());
            let reason = if ended {
                FinishReason::Stop
            } else {
                FinishReason::Length
            };
            let finished = Some((reason, prompt.len(), expected.len()));
            assert_eq!(answer.finished, finished);
            stopped += usize::from(ended);
            let greedy = Request {
                stop_tokens: ends,
                ..greedy(&prompt, 8)
            };
            unlike_greedy += usize::from(generate(&engine, greedy).ids != answer.ids);
        }
    }
    eprintln!(
        "{stopped} of 56 ended by an end token, {unlike_greedy} differ from the greedy answer"
    );
    assert!(stopped > 5 && stopped < 56 && unlike_greedy > 10);
}

#[test]
fn one_beam_is_the_greedy_answer() {
    let model = model();
    let engine = load(&model, &roomy(4, 40));
    let request = Request {
        ignore_end: true,
        ..greedy(&model.prompt(70, 3), 80)
    };
    let expected = generate(&engine, request.clone());
    assert_eq!(
        generate(&engine, beams(request, BeamSearch::new(1))),
        expected
    );
}

/// The paper's setting: six requests of four beams, over several pages, beside each other and alone.
#[test]
fn six_requests_of_four_beams_get_the_answers_that_they_get_alone() {
    let model = model();
    let engine = load(&model, &roomy(24, 120));
    let requests: Vec<Request> = (0..6)
        .map(|i| {
            let request = Request {
                ignore_end: i % 2 == 0,
                ..greedy(&model.prompt(60 + 30 * i, i as u64 + 9), 150)
            };
            beams(request, BeamSearch::new(4))
        })
        .collect();
    let alone: Vec<Answer> = requests
        .iter()
        .map(|r| generate(&engine, r.clone()))
        .collect();
    let pending: Vec<_> = requests.iter().map(|r| start(&engine, r.clone())).collect();
    // And one that does not search.
    let other = greedy(&model.prompt(40, 90), 60);
    let beside = start(&engine, other.clone());
    let together: Vec<Answer> = pending.into_iter().map(support::Pending::wait).collect();
    assert_eq!(together, alone);
    assert_eq!(beside.wait(), generate(&engine, other));
    for (answer, i) in alone.iter().zip(0..) {
        assert!(
            i % 2 == 1 || answer.ids.len() == 150,
            "{}",
            answer.ids.len()
        );
    }
    assert_eq!(engine.stats().preemptions, 0);
}

#[test]
fn searches_that_give_their_pages_back_go_on_as_if_nothing_had_been() {
    let model = model();
    let users = [None, Some(User::new([1; 32])), Some(User::new([2; 32]))];
    let requests: Vec<Request> = (0..3)
        .map(|i| {
            let request = Request {
                ignore_end: true,
                user: users[i],
                ..greedy(&model.prompt(70 + 30 * i, i as u64 + 9), 400)
            };
            beams(request, BeamSearch::new(3))
        })
        .collect();
    let engine = load(&model, &roomy(24, 120));
    let expected: Vec<Answer> = requests
        .iter()
        .map(|r| generate(&engine, r.clone()))
        .collect();
    // One search needs at most 2 + 3 * 6 pages; at the beginning all of them fit.
    let tight = load(&model, &roomy(24, 22));
    let pending: Vec<_> = requests.iter().map(|r| start(&tight, r.clone())).collect();
    let together: Vec<Answer> = pending.into_iter().map(support::Pending::wait).collect();
    assert_eq!(together, expected);
    let stats = tight.stats();
    assert!(stats.preemptions > 0, "there was memory for all");
    assert!(stats.recomputed_tokens > 0);
}

#[test]
fn beams_share_the_pages_of_their_prompt() {
    let model = model();
    // 400 tokens are 6 whole pages, which four beams share; with 80 more each needs 2 of its own.
    let engine = load(&model, &roomy(4, 6 + 4 * 2));
    let request = Request {
        ignore_end: true,
        ..greedy(&model.prompt(400, 2), 80)
    };
    let answer = generate(&engine, beams(request, BeamSearch::new(4)));
    assert_eq!(answer.finished, Some((FinishReason::Length, 400, 80)));
    let stats = engine.stats();
    assert_eq!((stats.preemptions, stats.prompt_tokens), (0, 400));
}

#[test]
fn a_search_finds_the_beginning_of_its_user() {
    let model = model();
    let engine = load(&model, &roomy(4, 40));
    let request = Request {
        ignore_end: true,
        user: Some(User::new([1; 32])),
        ..beams(greedy(&model.prompt(200, 2), 10), BeamSearch::new(4))
    };
    let first = generate(&engine, request.clone());
    let second = generate(&engine, request);
    assert_eq!((first.cached, second.cached), (0, 192));
    assert_eq!(first.ids, second.ids);
}

#[test]
fn searches_are_cancelled_at_their_next_step() {
    let model = Tiny::new(
        ModelConfig {
            context: 50_000,
            ..llama()
        },
        3,
    );
    let engine = load(&model, &roomy(4, 4000));
    let request = Request {
        ignore_end: true,
        ..beams(greedy(&[1, 9], 40_000), BeamSearch::new(4))
    };
    let (sender, receiver) = std::sync::mpsc::channel();
    let sink = move |event: casemate_engine::Event<'_>| {
        sender.send(event.into_owned()).unwrap();
        ControlFlow::Continue(())
    };
    let id = engine.submit(request, Box::new(sink)).unwrap();
    while engine.stats().kv_bytes_used < 4 * PAGE {
        std::thread::yield_now();
    }
    engine.cancel(id);
    let events: Vec<_> = receiver.iter().collect();
    assert!(
        matches!(
            events[..],
            [casemate_engine::Event::Finished {
                reason: FinishReason::Cancelled,
                completion_tokens: 0,
                ..
            }]
        ),
        "{events:?}"
    );
}

#[test]
fn impossible_searches_are_refused_with_the_numbers() {
    let model = model();
    let engine = load(&model, &roomy(64, 8));
    let submit = |request| engine.submit(request, Box::new(|_| unreachable!("it is refused")));
    let asked = |width| beams(greedy(&[5], 4), BeamSearch::new(width));
    for width in [0, MAXIMUM_BEAMS + 1] {
        let most = MAXIMUM_BEAMS;
        let refused = SubmitError::Beams { asked: width, most };
        assert_eq!(submit(asked(width)), Err(refused));
    }
    let small = load(&model, &roomy(2, 8));
    assert_eq!(
        small.submit(asked(3), Box::new(|_| unreachable!("it is refused"))),
        Err(SubmitError::Beams { asked: 3, most: 2 })
    );
    // 300 tokens are 4 pages to share; 200 more make 4 for each beam.
    let long = beams(greedy(&model.prompt(300, 1), 200), BeamSearch::new(4));
    let refused = submit(long).unwrap_err();
    assert_eq!(
        refused,
        SubmitError::KvMemory {
            beams: 4,
            needed: (4 + 4 * 4) * PAGE,
            given: 8 * PAGE
        }
    );
    assert!(
        refused.to_string().contains(&format!("{}", 20 * PAGE)),
        "{refused}"
    );
    let ends = Request {
        stop_tokens: (0..40).collect(),
        ..asked(8)
    };
    assert_eq!(
        submit(ends),
        Err(SubmitError::BeamsOfVocabulary {
            least: 8 * 41,
            vocab: 300
        })
    );
    for length_penalty in [f32::NAN, 11.0, f32::INFINITY] {
        let search = BeamSearch {
            length_penalty,
            ..BeamSearch::new(2)
        };
        let refused = submit(beams(greedy(&[5], 4), search));
        assert!(
            matches!(refused, Err(SubmitError::LengthPenalty(_))),
            "{refused:?}"
        );
    }
    let warm = Sampling {
        temperature: 1.0,
        ..Sampling::default()
    };
    let biased = Sampling {
        bias: vec![(5, 1.0)],
        ..Sampling::default()
    };
    for request in [
        Request {
            sampling: warm,
            ..asked(2)
        },
        Request {
            sampling: biased,
            ..asked(2)
        },
        Request {
            stop: vec!["x".into()],
            ..asked(2)
        },
        Request {
            logprobs: Some(1),
            ..asked(2)
        },
        Request {
            grammar: Some(Grammar::json_object()),
            ..asked(2)
        },
    ] {
        assert_eq!(submit(request), Err(SubmitError::BeamsWithOthers));
    }
}
