//! Paged attention against a plain f64 softmax, and its independence of pages, batches and
//! machines.

mod support;

use casemate_kernels::attention::{Attention, KvPool, KvShape, KvType, MAX_HEAD_DIM, PAGE, Span};
use casemate_kernels::team::Team;
use proptest::prelude::*;
use support::{Random, assert_same_bits, describe, teams};

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
                &span,
                &t.keys[start * kv..end * kv],
                &t.values[start * kv..end * kv],
            );
            let queries = &t.queries[start * q..end * q];
            self.attention()
                .run(team, &pool, &span, queries, &mut out[start * q..end * q]);
            start = *end;
        }
        out
    }
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
        // Half precision: 11 bits of each key and value.
        let out = case.run(team, &tokens, KvType::F16, &pages, &[case.tokens]);
        assert_close(&out, &expected, 4e-3, &format!("{case:?} f16"));
    }
}

#[test]
fn half_precision_has_the_same_bits_on_every_machine() {
    let case = Case {
        heads: 4,
        kv_heads: 2,
        dim: 24,
        tokens: 90,
        window: None,
    };
    let tokens = case.tokens(&mut Random(22));
    let mut first: Option<Vec<f32>> = None;
    for team in teams() {
        let out = case.run(&team, &tokens, KvType::F16, &pages_for(90), &[50, 90]);
        assert_same_bits(
            &out,
            first.get_or_insert_with(|| out.clone()),
            &describe(&team),
        );
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
            &[Span {
                rows: 0..64,
                position: 0,
                pages: &[page],
            }],
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
            &span,
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
    pool.write(&team, 1, &spans, &keys, &values);
    let mut out = vec![f32::NAN; 3 * 64];
    base.attention()
        .run(&team, &pool, &spans, &queries, &mut out);
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
    pool.write(&team, 1, &span, &[1.0; 12], &[3.0; 12]);
    let mut out = [-1.0; 24];
    case.attention()
        .run(&team, &pool, &span, &[1.0; 24], &mut out);
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
        case.attention().run(
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
        &[Span {
            rows: 0..2,
            position: 0,
            pages: &[1],
        }],
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
    case.attention().run(
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
    case.attention().run(
        &team,
        &pool,
        &[span.clone(), span],
        &[1.0; 8],
        &mut [0.0; 8],
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

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
