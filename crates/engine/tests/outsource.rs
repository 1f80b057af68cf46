//! Layers that somebody else computes: what is handed over, and that nothing changes.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use casemate_container::{Access, Silent};
use casemate_engine::linear::{LinearLayer, LinearScratch};
use casemate_engine::outsource::{ExactLayer, Outsource, Place, Stack};
use casemate_engine::{Compute, Engine, LoadError, Sampling};
use casemate_kernels::team::Team;
use support::tiny::{Tiny, llama};
use support::{generate, greedy, load, logits, open_with, options};

/// Computes sums by plain loops, and can be made to err.
struct Elsewhere {
    exact: ExactLayer,
    /// Added to the first sum of every row.
    error: i32,
    rows: Arc<AtomicUsize>,
}

impl LinearLayer for Elsewhere {
    fn inputs(&self) -> usize {
        self.exact.inputs()
    }

    fn outputs(&self) -> usize {
        self.exact.outputs()
    }

    fn forward(&self, team: &Team, scratch: &mut LinearScratch, x: &[f32], y: &mut [f32]) {
        let rows = self.exact.quantise(team, scratch, x);
        let mut sums = vec![0; y.len()];
        let (mut row, mut weights) = (vec![0; self.inputs()], vec![0; self.inputs()]);
        for i in 0..rows.rows() {
            rows.row(i, &mut row);
            for j in 0..self.outputs() {
                self.exact.weights().row(j, &mut weights);
                let products = row.iter().zip(&weights);
                sums[i * self.outputs() + j] =
                    products.map(|(&x, &w)| i32::from(x) * i32::from(w)).sum();
            }
            sums[i * self.outputs()] += self.error;
            self.rows.fetch_add(1, Ordering::Relaxed);
        }
        self.exact.finish(team, rows, &sums, y);
    }

    fn bytes(&self) -> u64 {
        self.exact.bytes()
    }
}

/// Takes over what is public.
struct Helper {
    error: i32,
    seen: Mutex<Vec<(Place, Access)>>,
    rows: Arc<AtomicUsize>,
    /// What is left to do in idle times, and who hears of it.
    idle: AtomicUsize,
    told: Mutex<Sender<usize>>,
}

impl Outsource for Helper {
    fn layer(&self, place: Place, access: Access, exact: ExactLayer) -> Box<dyn LinearLayer> {
        self.seen.lock().unwrap().push((place, access));
        match access {
            Access::Private => Box::new(exact),
            Access::Public => Box::new(Elsewhere {
                exact,
                error: self.error,
                rows: Arc::clone(&self.rows),
            }),
        }
    }

    fn idle(&self, team: &Team) -> bool {
        let left = self.idle.load(Ordering::Relaxed);
        if left == 0 {
            return false;
        }
        let mut parts = vec![0; 8];
        team.for_each_chunk_mut(&mut parts, 1, |i, part| part[0] = i);
        assert_eq!(parts, (0..8).collect::<Vec<_>>());
        self.idle.store(left - 1, Ordering::Relaxed);
        self.told.lock().unwrap().send(left - 1).unwrap();
        true
    }
}

fn helper(error: i32, idle: usize) -> (Arc<Helper>, std::sync::mpsc::Receiver<usize>) {
    let (told, hears) = channel();
    let helper = Helper {
        error,
        seen: Mutex::default(),
        rows: Arc::default(),
        idle: AtomicUsize::new(idle),
        told: Mutex::new(told),
    };
    (Arc::new(helper), hears)
}

fn outsourced(model: &Tiny, public: &[&str], helper: &Arc<Helper>) -> Engine {
    let public = public.iter().map(|&pattern| pattern.to_owned()).collect();
    let helper = Arc::clone(helper) as Arc<dyn Outsource>;
    let container = open_with(model, public);
    let options = options(Compute::Int8Row);
    Engine::load_with(container, vec![], &options, Some(helper), &Silent).unwrap()
}

#[test]
fn what_is_computed_elsewhere_changes_no_bit() {
    let model = Tiny::new(llama(), 3);
    let here = load(&model, &options(Compute::Int8Row));
    let (helper, _told) = helper(0, 0);
    let there = outsourced(&model, &["*"], &helper);
    let text = model.prompt(70, 5);
    assert_eq!(logits(&here, &text), logits(&there, &text));
    // Four stacks of each of two blocks, and the head.
    assert_eq!(helper.rows.load(Ordering::Relaxed), 70 * (2 * 4 + 1));
    let mut request = greedy(&text, 30);
    request.sampling = Sampling {
        temperature: 1.0,
        seed: 9,
        ..Sampling::default()
    };
    assert_eq!(generate(&here, request.clone()), generate(&there, request));
}

#[test]
fn a_helper_that_errs_is_not_corrected_here() {
    let model = Tiny::new(llama(), 3);
    let here = load(&model, &options(Compute::Int8Row));
    let (helper, _told) = helper(50, 0);
    let there = outsourced(&model, &["blk.0.attn_output*"], &helper);
    let text = model.prompt(10, 5);
    assert_ne!(logits(&here, &text), logits(&there, &text));
}

#[test]
fn a_stack_is_public_only_if_all_of_it_is() {
    let model = Tiny::new(llama(), 3);
    let (helper, _told) = helper(0, 0);
    let public = [
        "blk.1.attn_q.weight",
        "blk.1.attn_k.weight",
        "blk.0.ffn_gate.weight",
        "blk.0.ffn_up.weight",
        "output.weight",
    ];
    drop(outsourced(&model, &public, &helper));
    let mut public: Vec<String> = Vec::new();
    let seen = helper.seen.lock().unwrap();
    for (place, access) in &*seen {
        if *access == Access::Public {
            public.push(place.to_string());
        }
    }
    assert_eq!(seen.len(), 2 * 4 + 1);
    assert_eq!(public, ["blk.0.ffn_gate_up", "output"]);
    let head = Place {
        layer: None,
        stack: Stack::Head,
    };
    assert_eq!(seen.last().unwrap().0, head);
}

#[test]
fn a_tied_head_is_as_public_as_the_embeddings() {
    let mut config = llama();
    config.tied_embeddings = true;
    let model = Tiny::new(config, 3);
    let here = load(&model, &options(Compute::Int8Row));
    let (helper, _told) = helper(0, 0);
    let there = outsourced(&model, &["token_embd.weight"], &helper);
    let text = model.prompt(10, 5);
    assert_eq!(logits(&here, &text), logits(&there, &text));
    assert_eq!(helper.rows.load(Ordering::Relaxed), 10);
}

#[test]
fn idle_times_are_used_whenever_there_is_something_to_do() {
    let model = Tiny::new(llama(), 3);
    let (helper, told) = helper(0, 5);
    let engine = outsourced(&model, &[], &helper);
    let text = model.prompt(10, 5);
    let wait = Duration::from_secs(60);
    let left: Vec<usize> = (0..5).map(|_| told.recv_timeout(wait).unwrap()).collect();
    assert_eq!(left, [4, 3, 2, 1, 0]);
    // More work, which nobody tells of.
    helper.idle.store(2, Ordering::Relaxed);
    assert_eq!(told.recv_timeout(wait).unwrap(), 1);
    assert_eq!(told.recv_timeout(wait).unwrap(), 0);
    // And it keeps nobody from having tokens.
    assert_eq!(generate(&engine, greedy(&text, 3)).ids.len(), 3);
}

#[test]
fn only_exact_arithmetic_can_be_handed_over() {
    let model = Tiny::new(llama(), 3);
    for compute in [Compute::F32, Compute::Bf16, Compute::Int8] {
        let (helper, _told) = helper(0, 0);
        let container = open_with(&model, vec!["*".into()]);
        let refused =
            Engine::load_with(container, vec![], &options(compute), Some(helper), &Silent);
        match refused.err() {
            Some(LoadError::Outsource { compute: named }) => assert_eq!(named, compute.name()),
            other => panic!("{other:?}"),
        }
    }
}
