//! Paged attention against a plain f64 softmax, and its independence of pages, batches and
//! machines.

mod definition;
#[path = "../support/mod.rs"]
mod support;

use casemate_kernels::attention::{
    Attention, AttentionScratch, KvPool, KvShape, KvType, MAX_HEAD_DIM, PAGE, SEGMENT, Span, Spans,
};
use casemate_kernels::team::Team;
use proptest::prelude::*;
use support::{Random, assert_same_bits, describe, emulated, teams};

/// One sequence's projected tokens.
struct Tokens {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    tokens: usize,
    window: Option<usize>,
}

impl Case {
    fn tokens(&self, random: &mut Random) -> Tokens {
        Tokens {
            queries: random
                .vector(self.tokens * self.heads * self.dim)
                .iter()
                .map(|q| q * 4.0)
                .collect(),
            keys: random.vector(self.tokens * self.kv_heads * self.dim),
            values: random.vector(self.tokens * self.kv_heads * self.dim),
        }
    }

    fn shape(&self, kv_type: KvType) -> KvShape {
        KvShape {
            layers: 2,
            kv_heads: self.kv_heads,
            head_dim: self.dim,
            kv_type,
        }
    }

    fn attention(&self) -> Attention {
        Attention {
            layer: 1,
            heads: self.heads,
            scale: 1.0 / (self.dim as f32).sqrt(),
            window: self.window,
        }
    }

    fn reference(&self, t: &Tokens) -> Vec<f64> {
        let (dim, group) = (self.dim, self.heads / self.kv_heads);
        let row = |x: &[f32], heads: usize, token: usize, head: usize| -> Vec<f64> {
            x[(token * heads + head) * dim..][..dim]
                .iter()
                .map(|x| f64::from(*x))
                .collect()
        };
        let mut out = vec![];
        for token in 0..self.tokens {
            let first = self.window.map_or(0, |w| (token + 1).saturating_sub(w));
            for head in 0..self.heads {
                let q = row(&t.queries, self.heads, token, head);
                let scores: Vec<f64> = (first..=token)
                    .map(|p| {
                        let k = row(&t.keys, self.kv_heads, p, head / group);
                        q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt()
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                let mut sum = vec![0.0; dim];
                for (p, w) in (first..=token).zip(&weights) {
                    let v = row(&t.values, self.kv_heads, p, head / group);
                    sum.iter_mut()
                        .zip(&v)
                        .for_each(|(s, v)| *s += w / total * v);
                }
                out.extend(sum);
            }
        }
        out
    }

    fn attend(
        &self,
        team: &Team,
        pool: &KvPool,
        spans: &[Span<'_>],
        queries: &[f32],
        out: &mut [f32],
    ) {
        let context = spans.iter().map(|s| s.position + s.rows.len()).max();
        let mut scratch =
            AttentionScratch::new(spans.len(), self.heads, self.dim, context.unwrap_or(0)).unwrap();
        self.attention()
            .run(team, pool, &mut scratch, &spans_of(spans), queries, out);
    }

    /// Runs the sequence in pieces that end where `ends` says.
    fn run(
        &self,
        team: &Team,
        t: &Tokens,
        kv_type: KvType,
        pages: &[u32],
        ends: &[usize],
    ) -> Vec<f32> {
        let mut pool = KvPool::new(self.shape(kv_type), pages.len() + 3).unwrap();
        let (q, kv) = (self.heads * self.dim, self.kv_heads * self.dim);
        let mut out = vec![f32::NAN; self.tokens * q];
        let mut start = 0;
        for end in ends {
            let span = [Span {
                rows: 0..end - start,
                position: start,
                pages,
            }];
            pool.write(
                team,
                1,
                &spans_of(&span),
                &t.keys[start * kv..end * kv],
                &t.values[start * kv..end * kv],
            );
            let queries = &t.queries[start * q..end * q];
            self.attend(team, &pool, &span, queries, &mut out[start * q..end * q]);
            start = *end;
        }
        out
    }
}

fn spans_of(spans: &[Span<'_>]) -> Spans {
    spans.iter().cloned().collect()
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f64], bound: f64, what: &str) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            (f64::from(*f) - e).abs() <= bound,
            "{what}: element {i} is {f} instead of {e}"
        );
    }
}

fn pages_for(tokens: usize) -> Vec<u32> {
    // Not in order, so that a page number taken for a position shows.
    (0..tokens.div_ceil(PAGE) as u32)
        .rev()
        .map(|p| p + 2)
        .collect()
}

#[test]
fn agrees_with_softmax_in_f64_and_with_itself_on_every_machine() {
    let mut random = Random(21);
    let teams = teams();
    for case in [
        Case {
            heads: 8,
            kv_heads: 4,
            dim: 8,
            tokens: 1,
            window: None,
        },
        Case {
            heads: 6,
            kv_heads: 6,
            dim: 48,
            tokens: 65,
            window: None,
        },
        Case {
            heads: 9,
            kv_heads: 3,
            dim: 64,
            tokens: 130,
            window: None,
        },
        Case {
            heads: 4,
            kv_heads: 1,
            dim: 80,
            tokens: 70,
            window: Some(10),
        },
        Case {
            heads: 2,
            kv_heads: 2,
            dim: 128,
            tokens: 64,
            window: Some(64),
        },
        Case {
            heads: 5,
            kv_heads: 1,
            dim: MAX_HEAD_DIM,
            tokens: 20,
            window: Some(1),
        },
        Case {
            heads: 7,
            kv_heads: 7,
            dim: 1,
            tokens: 200,
            window: Some(100),
        },
        Case {
            heads: 4,
            kv_heads: 2,
            dim: 12,
            tokens: 2 * SEGMENT + 40,
            window: None,
        },
        Case {
            heads: 2,
            kv_heads: 1,
            dim: 20,
            tokens: 2 * SEGMENT + 3,
            window: Some(SEGMENT + 7),
        },
    ] {
        let tokens = case.tokens(&mut random);
        let expected = case.reference(&tokens);
        let pages = pages_for(case.tokens);
        let mut first: Option<Vec<f32>> = None;
        for team in &teams {
            let what = format!("{case:?} {}", describe(team));
            let out = case.run(team, &tokens, KvType::F32, &pages, &[case.tokens]);
            assert_close(&out, &expected, 2e-6, &what);
            assert_same_bits(&out, first.get_or_insert_with(|| out.clone()), &what);
        }
        let first = first.unwrap();
        let one_by_one: Vec<usize> = (1..=case.tokens).collect();
        let team = &teams[teams.len() - 3];
        let out = case.run(team, &tokens, KvType::F32, &pages, &one_by_one);
        assert_same_bits(&out, &first, &format!("{case:?} token by token"));
        // 11, 8 and at least 7 bits of each key and value; scores of up to 4 * dim / 3 / sqrt(dim)
        // carry the error of keys.
        for (kv_type, bound) in [
            (KvType::F16, 4e-3),
            (KvType::Bf16, 3e-2),
            (KvType::Int8, 5e-2),
        ] {
            let out = case.run(team, &tokens, kv_type, &pages, &[case.tokens]);
            assert_close(&out, &expected, bound, &format!("{case:?} {kv_type:?}"));
        }
    }
}

/// Contexts that end around every edge of a block and of a segment, heads whose width is no
/// multiple of anything, groups that do not divide what is worked on together.
#[test]
fn every_type_has_the_same_bits_on_every_machine_in_whatever_pieces() {
    let mut teams = teams();
    teams.retain(|team| [1, 3].contains(&team.members()));
    let mut random = Random(22);
    let shapes = [
        (5, 1, 130, Some(70)),
        (6, 2, 24, Some(300)),
        (8, 1, 64, None),
        (3, 3, 80, None),
    ];
    for (heads, kv_heads, dim, window) in shapes.into_iter().take(if emulated() { 1 } else { 4 }) {
        let case = Case {
            heads,
            kv_heads,
            dim,
            tokens: 2 * SEGMENT + 3,
            window,
        };
        let tokens = case.tokens(&mut random);
        let pages = pages_for(case.tokens);
        // A prompt, then decoding, and a few tokens at once, across both kinds of edges.
        let mut ends = vec![PAGE - 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE];
        ends.extend(SEGMENT - 2..SEGMENT + 3);
        ends.extend([SEGMENT + 5, 2 * SEGMENT - 1]);
        ends.extend(2 * SEGMENT..=case.tokens);
        for kv_type in KvType::ALL {
            let mut first: Option<Vec<f32>> = None;
            for team in &teams {
                for ends in [&ends[..], &[case.tokens]] {
                    let out = case.run(team, &tokens, kv_type, &pages, ends);
                    assert_same_bits(
                        &out,
                        first.get_or_insert_with(|| out.clone()),
                        &format!("{case:?} {kv_type:?} {} {}", describe(team), ends.len()),
                    );
                }
            }
        }
    }
}

#[test]
fn a_context_is_shared_out_or_not_with_the_same_bits() {
    let case = Case {
        heads: 8,
        kv_heads: 2,
        dim: 32,
        tokens: 3 * SEGMENT + 70,
        window: None,
    };
    let t = case.tokens(&mut Random(25));
    let pages = pages_for(case.tokens);
    let team = Team::new(2).unwrap();
    for kv_type in KvType::ALL {
        let mut pool = KvPool::new(case.shape(kv_type), pages.len() + 3).unwrap();
        let whole = [Span {
            rows: 0..case.tokens,
            position: 0,
            pages: &pages,
        }];
        pool.write(&team, 1, &spans_of(&whole), &t.keys, &t.values);
        let last = spans_of(&[Span {
            rows: 0..2,
            position: case.tokens - 2,
            pages: &pages,
        }]);
        let queries = &t.queries[(case.tokens - 2) * 8 * 32..];
        let run = |rows: usize| {
            let mut scratch = AttentionScratch::new(rows, 8, 32, case.tokens).unwrap();
            let mut out = vec![f32::NAN; queries.len()];
            case.attention()
                .run(&team, &pool, &mut scratch, &last, queries, &mut out);
            out
        };
        assert_same_bits(&run(2), &run(0), &format!("{kv_type:?}"));
    }
}

#[test]
fn int8_survives_extremes_and_shows_what_is_not_a_number() {
    let team = Team::new(1).unwrap();
    let case = Case {
        heads: 1,
        kv_heads: 1,
        dim: 20,
        tokens: 4,
        window: None,
    };
    // All weights equal, values at their largest: the sums of integers are as large as they get.
    let tokens = 2 * SEGMENT;
    let long = Case { tokens, ..case };
    let t = Tokens {
        queries: vec![0.0; tokens * 20],
        keys: vec![1.0; tokens * 20],
        values: vec![-3.0; tokens * 20],
    };
    let out = long.run(&team, &t, KvType::Int8, &pages_for(tokens), &[tokens]);
    assert_close(&out, &vec![-3.0; tokens * 20], 1e-5, "equal weights");

    let mut t = case.tokens(&mut Random(27));
    t.values[..20].fill(0.0);
    t.keys[..20].fill(0.0);
    let pages = pages_for(4);
    let clean = case.run(&team, &t, KvType::Int8, &pages, &[4]);
    assert_eq!(clean[..20], [0.0; 20]);
    assert!(clean.iter().all(|x| x.is_finite()));
    for bad in [f32::NAN, f32::INFINITY] {
        for what in 0..3 {
            let mut t = Tokens {
                queries: t.queries.clone(),
                keys: t.keys.clone(),
                values: t.values.clone(),
            };
            [&mut t.queries, &mut t.keys, &mut t.values][what][2 * 20 + 7] = bad;
            let out = case.run(&team, &t, KvType::Int8, &pages, &[4]);
            // Tokens before it do not see it, those behind do, save that a query is its own.
            assert_same_bits(&out[..40], &clean[..40], "before");
            assert!(out[40..60].iter().all(|x| x.is_nan()), "{what}: {out:?}");
            assert_eq!(out[60..].iter().all(|x| x.is_nan()), what > 0);
        }
    }
}

#[test]
fn a_number_that_is_none_does_not_reach_tokens_before_it() {
    let team = Team::new(1).unwrap();
    let case = Case {
        heads: 3,
        kv_heads: 1,
        dim: 8,
        tokens: 6,
        window: None,
    };
    let mut t = case.tokens(&mut Random(28));
    let pages = pages_for(6);
    // The first and the second position of a pair.
    for (kv_type, bad) in KvType::ALL.iter().flat_map(|t| [(*t, 4), (*t, 5)]) {
        let clean = case.run(&team, &t, kv_type, &pages, &[6]);
        let (key, value) = (t.keys[bad * 8], t.values[bad * 8]);
        (t.keys[bad * 8], t.values[bad * 8]) = (f32::NAN, f32::NAN);
        let out = case.run(&team, &t, kv_type, &pages, &[6]);
        assert_same_bits(&out[..bad * 24], &clean[..bad * 24], "before");
        assert!(out[bad * 24..].iter().any(|x| x.is_nan()));
        (t.keys[bad * 8], t.values[bad * 8]) = (key, value);
    }
}

#[test]
fn a_number_that_is_none_is_forgotten_outside_the_window() {
    let team = Team::new(1).unwrap();
    let case = Case {
        heads: 3,
        kv_heads: 1,
        dim: 8,
        tokens: 7,
        window: Some(3),
    };
    let mut t = case.tokens(&mut Random(29));
    let pages = pages_for(7);
    for (kv_type, bad) in KvType::ALL.iter().flat_map(|t| [(*t, 0), (*t, 1)]) {
        let clean = case.run(&team, &t, kv_type, &pages, &[7]);
        let (key, value) = (t.keys[bad * 8], t.values[bad * 8]);
        (t.keys[bad * 8], t.values[bad * 8]) = (f32::NAN, f32::NAN);
        let out = case.run(&team, &t, kv_type, &pages, &[7]);
        let after = (bad + 3) * 24;
        assert_same_bits(&out[after..], &clean[after..], "after");
        assert!(out[bad * 24..after].iter().any(|x| x.is_nan()));
        (t.keys[bad * 8], t.values[bad * 8]) = (key, value);
    }
}

#[test]
fn sequences_in_a_batch_do_not_see_each_other() {
    let mut random = Random(23);
    let team = Team::new(3).unwrap();
    let base = Case {
        heads: 4,
        kv_heads: 2,
        dim: 16,
        tokens: 0,
        window: None,
    };
    let cases = [
        Case { tokens: 70, ..base },
        Case { tokens: 3, ..base },
        Case {
            tokens: 129,
            ..base
        },
    ];
    let page_lists: [&[u32]; 3] = [&[5, 0], &[3], &[1, 4, 2]];
    let all: Vec<Tokens> = cases.iter().map(|c| c.tokens(&mut random)).collect();
    let mut pool = KvPool::new(base.shape(KvType::F32), 6).unwrap();
    // Other people's numbers are everywhere first, and they are poisonous.
    let poison = vec![f32::NAN; 64 * 32];
    for page in 0..6 {
        pool.write(
            &team,
            1,
            &spans_of(&[Span {
                rows: 0..64,
                position: 0,
                pages: &[page],
            }]),
            &poison,
            &poison,
        );
    }
    // Prefill all but the last token of each, then decode the last ones together.
    let (mut queries, mut keys, mut values, mut spans) = (vec![], vec![], vec![], vec![]);
    for ((case, t), pages) in cases.iter().zip(&all).zip(page_lists) {
        let done = case.tokens - 1;
        let span = [Span {
            rows: 0..done,
            position: 0,
            pages,
        }];
        pool.write(
            &team,
            1,
            &spans_of(&span),
            &t.keys[..done * 32],
            &t.values[..done * 32],
        );
        spans.push(Span {
            rows: spans.len()..spans.len() + 1,
            position: done,
            pages,
        });
        queries.extend(&t.queries[done * 64..]);
        keys.extend(&t.keys[done * 32..]);
        values.extend(&t.values[done * 32..]);
    }
    pool.write(&team, 1, &spans_of(&spans), &keys, &values);
    let mut out = vec![f32::NAN; 3 * 64];
    base.attend(&team, &pool, &spans, &queries, &mut out);
    for (i, (case, t)) in cases.iter().zip(&all).enumerate() {
        let alone = case.run(
            &team,
            t,
            KvType::F32,
            &pages_for(case.tokens),
            &[case.tokens],
        );
        assert_same_bits(
            &out[i * 64..][..64],
            &alone[(case.tokens - 1) * 64..],
            &format!("sequence {i}"),
        );
    }
}

#[test]
fn rows_outside_every_span_are_left_alone() {
    let team = Team::new(2).unwrap();
    let case = Case {
        heads: 2,
        kv_heads: 1,
        dim: 4,
        tokens: 1,
        window: None,
    };
    let mut pool = KvPool::new(case.shape(KvType::F32), 1).unwrap();
    let span = [Span {
        rows: 1..2,
        position: 0,
        pages: &[0],
    }];
    pool.write(&team, 1, &spans_of(&span), &[1.0; 12], &[3.0; 12]);
    let mut out = [-1.0; 24];
    case.attend(&team, &pool, &span, &[1.0; 24], &mut out);
    assert_eq!(out[..8], [-1.0; 8]);
    assert_eq!(out[8..16], [3.0; 8]);
    assert_eq!(out[16..], [-1.0; 8]);
}

#[test]
fn copied_pages_serve_the_copy_and_erased_pages_are_zero() {
    let team = Team::new(1).unwrap();
    let case = Case {
        heads: 1,
        kv_heads: 1,
        dim: 16,
        tokens: 2,
        window: None,
    };
    let t = case.tokens(&mut Random(24));
    let mut pool = KvPool::new(case.shape(KvType::F32), 3).unwrap();
    let run = |pool: &KvPool, page: u32| {
        let mut out = vec![0.0; 32];
        case.attend(
            &team,
            pool,
            &[Span {
                rows: 0..2,
                position: 0,
                pages: &[page],
            }],
            &t.queries,
            &mut out,
        );
        out
    };
    pool.write(
        &team,
        1,
        &spans_of(&[Span {
            rows: 0..2,
            position: 0,
            pages: &[1],
        }]),
        &t.keys,
        &t.values,
    );
    let original = run(&pool, 1);
    pool.copy_page(1, 2);
    pool.erase_page(1);
    assert_same_bits(&run(&pool, 2), &original, "copy");
    assert_eq!(run(&pool, 1), vec![0.0; 32]);
}

#[test]
fn impossible_shapes_have_no_pages() {
    let good = KvShape {
        layers: 2,
        kv_heads: 3,
        head_dim: 24,
        kv_type: KvType::F32,
    };
    assert_eq!(good.page_bytes(), Some(2 * 3 * 64 * (24 + 32) * 4));
    assert_eq!(
        KvShape {
            kv_type: KvType::F16,
            ..good
        }
        .page_bytes(),
        Some(2 * 3 * 64 * (24 + 32) * 2)
    );
    let int8 = KvShape {
        head_dim: 23,
        kv_type: KvType::Int8,
        ..good
    };
    assert_eq!(int8.page_bytes(), Some(2 * 3 * 64 * (24 + 32 + 8)));
    for bad in [
        KvShape { layers: 0, ..good },
        KvShape {
            kv_heads: 0,
            ..good
        },
        KvShape {
            head_dim: 0,
            ..good
        },
        KvShape {
            head_dim: MAX_HEAD_DIM + 1,
            ..good
        },
        KvShape {
            layers: usize::MAX / 2,
            ..good
        },
    ] {
        assert_eq!(bad.page_bytes(), None, "{bad:?}");
        assert!(KvPool::new(bad, 1).is_err());
    }
    assert!(KvPool::new(good, usize::MAX / 2).is_err());
}

fn run_with(pages: &[u32], rows: std::ops::Range<usize>, position: usize) {
    let team = Team::new(1).unwrap();
    let case = Case {
        heads: 1,
        kv_heads: 1,
        dim: 4,
        tokens: 1,
        window: None,
    };
    let pool = KvPool::new(case.shape(KvType::F32), 2).unwrap();
    case.attend(
        &team,
        &pool,
        &[Span {
            rows,
            position,
            pages,
        }],
        &[1.0; 8],
        &mut [0.0; 8],
    );
}

#[test]
#[should_panic(expected = "a page beyond 2")]
fn a_page_that_is_not_there_panics() {
    run_with(&[2], 0..1, 0);
}

#[test]
#[should_panic(expected = "pages where 2 are needed")]
fn too_few_pages_panic() {
    run_with(&[1], 0..2, 63);
}

#[test]
#[should_panic(expected = "rows")]
fn rows_that_are_not_there_panic() {
    run_with(&[1], 1..3, 0);
}

#[test]
#[should_panic(expected = "share none")]
fn spans_that_share_a_row_panic() {
    let team = Team::new(2).unwrap();
    let case = Case {
        heads: 1,
        kv_heads: 1,
        dim: 4,
        tokens: 1,
        window: None,
    };
    let pool = KvPool::new(case.shape(KvType::F32), 2).unwrap();
    let span = Span {
        rows: 0..1,
        position: 0,
        pages: &[0],
    };
    case.attend(
        &team,
        &pool,
        &[span.clone(), span],
        &[1.0; 8],
        &mut [0.0; 8],
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Ragged batches of sequences of any length, beyond 2048 positions too: every member of the
    /// batch has the bits that it has alone, whatever the number of threads.
    #[test]
    fn batches_have_the_bits_of_their_members_alone(
        kv_heads in 1usize..3, group in 1usize..5, dim in 1usize..40,
        lengths in prop::collection::vec((1usize..2300, 1usize..20), 1..5),
        window in proptest::option::of(1usize..600), threads in 1usize..9, kind in 0usize..4,
        seed: u64
    ) {
        let kv_type = KvType::ALL[kind];
        let base = Case { heads: kv_heads * group, kv_heads, dim, tokens: 0, window };
        let (q, kv) = (base.heads * dim, kv_heads * dim);
        let mut random = Random(seed);
        let team = Team::new(threads).unwrap();
        let pages = |length: usize, from: usize| -> Vec<u32> {
            (0..length.div_ceil(PAGE)).map(|p| (p * 4 + from) as u32).collect()
        };
        let lists: Vec<_> = lengths.iter().enumerate().map(|(i, l)| pages(l.0, i)).collect();
        let mut pool = KvPool::new(base.shape(kv_type), 4 * 36).unwrap();
        let (mut queries, mut all_spans, mut alone) = (vec![], vec![], vec![]);
        for ((length, last), pages) in lengths.iter().zip(&lists) {
            let case = Case { tokens: *length, ..base };
            let t = case.tokens(&mut random);
            let whole = [Span { rows: 0..*length, position: 0, pages }];
            pool.write(&team, 1, &spans_of(&whole), &t.keys, &t.values);
            let last = *last.min(length);
            let rows = queries.len() / q..queries.len() / q + last;
            all_spans.push(Span { rows, position: length - last, pages });
            queries.extend(&t.queries[(length - last) * q..]);
            prop_assert_eq!(t.keys.len(), length * kv);
            // One thread, so nothing is shared out.
            let own = Span { rows: 0..last, position: length - last, pages };
            let mut out = vec![f32::NAN; last * q];
            let one = Team::new(1).unwrap();
            case.attend(&one, &pool, &[own], &t.queries[(length - last) * q..], &mut out);
            alone.extend(out);
        }
        let mut out = vec![f32::NAN; queries.len()];
        base.attend(&team, &pool, &all_spans, &queries, &mut out);
        assert_same_bits(&out, &alone, "batch");
    }

    #[test]
    fn any_shape_agrees_with_softmax_in_f64(
        kv_heads in 1usize..4, group in 1usize..6, dim in 1usize..70, tokens in 1usize..150,
        window in proptest::option::of(1usize..200), cut in 0usize..150, threads in 1usize..4, seed: u64
    ) {
        let case = Case { heads: kv_heads * group, kv_heads, dim, tokens, window };
        let t = case.tokens(&mut Random(seed));
        let ends = if cut > 0 && cut < tokens { vec![cut, tokens] } else { vec![tokens] };
        let team = Team::new(threads).unwrap();
        let out = case.run(&team, &t, KvType::F32, &pages_for(tokens), &ends);
        assert_close(&out, &case.reference(&t), 2e-6, "property");
    }
}
