//! bf16 and int8 as they are defined, written a second time in plain loops.

use std::ops::Range;

use casemate_kernels::attention::{KvType, MAX_HEAD_DIM, SEGMENT};
use casemate_kernels::cpu::Isa;
use casemate_kernels::rotate::Rotation;
use casemate_kernels::team::Team;
use half::bf16;

use crate::support::{Random, assert_same_bits};
use crate::{Case, Tokens, pages_for};

/// What the page says of products other than with f32 or f16, in plain loops. `score(token, head,
/// position)` is before it is scaled, `gather(weights, positions, key/value head)` what a segment comes
/// to.
fn definition(
    case: &Case,
    score: impl Fn(usize, usize, usize) -> f32,
    gather: impl Fn(&[f32], Range<usize>, usize) -> Vec<f32>,
) -> Vec<f32> {
    let scale = 1.0 / (case.dim as f32).sqrt();
    let mut out = vec![];
    for token in 0..case.tokens {
        let first = case.window.map_or(0, |w| (token + 1).saturating_sub(w));
        for h in 0..case.heads {
            let (mut largest, mut sum) = (f32::NEG_INFINITY, 0f32);
            let mut total = vec![0f32; case.dim];
            for segment in first / SEGMENT..=token / SEGMENT {
                let seen = first.max(segment * SEGMENT)..(token + 1).min((segment + 1) * SEGMENT);
                let scores: Vec<f32> = seen.clone().map(|p| score(token, h, p) * scale).collect();
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = scores.iter().map(|s| exp(s - most)).collect();
                let mut lanes = [0f32; 16];
                for (p, w) in seen.clone().zip(&weights) {
                    lanes[p % 16] += w;
                }
                for half in [8, 4, 2, 1] {
                    for i in 0..half {
                        lanes[i] += lanes[i + half];
                    }
                }
                let now = largest.max(most);
                let (keep, add) = (exp(largest - now), exp(most - now));
                sum = lanes[0].mul_add(add, sum * keep);
                let gathered = gather(&weights, seen, h / (case.heads / case.kv_heads));
                for (total, x) in total.iter_mut().zip(gathered) {
                    *total = x.mul_add(add, *total * keep);
                }
                largest = now;
            }
            out.extend(total.iter().map(|x| x * (1.0 / sum)));
        }
    }
    out
}

fn int8_definition(case: &Case, t: &Tokens) -> Vec<f32> {
    let quantise = |x: &[f32]| -> (f32, Vec<i32>) {
        let largest = x.iter().fold(0f32, |a, b| a.max(b.abs()));
        if largest < 1e-30 {
            return (0.0, vec![0; x.len()]);
        }
        let scale = largest / 127.0;
        let inverse = 1.0 / scale;
        let quant = |x: &f32| (x * inverse).round_ties_even() as i32;
        (scale, x.iter().map(quant).collect())
    };
    let row = |x: &[f32], heads: usize, token: usize, head: usize| {
        x[(token * heads + head) * case.dim..][..case.dim].to_vec()
    };
    let rotation = Rotation::new(case.dim);
    let rotated = |x: &[f32], heads: usize, token: usize, head: usize| {
        let mut x = row(x, heads, token, head);
        rotation.apply(Isa::SCALAR, &mut x);
        quantise(&x)
    };
    let score = |token: usize, h: usize, p: usize| {
        let kv = h / (case.heads / case.kv_heads);
        let (query_scale, query) = rotated(&t.queries, case.heads, token, h);
        let (key_scale, key) = rotated(&t.keys, case.kv_heads, p, kv);
        let dot: i32 = key.iter().zip(&query).map(|(k, q)| k * q).sum();
        dot as f32 * key_scale * query_scale
    };
    let gather = |weights: &[f32], seen: Range<usize>, kv: usize| {
        let value = |p| quantise(&row(&t.values, case.kv_heads, p, kv));
        let values: Vec<_> = seen.map(value).collect();
        let scaled: Vec<f32> = weights.iter().zip(&values).map(|(w, v)| w * v.0).collect();
        let top = scaled.iter().copied().fold(0f32, f32::max);
        let quant = |w: &f32| (w * (32767.0 / top)).round_ties_even() as i32;
        let quants: Vec<i32> = scaled.iter().map(quant).collect();
        let sum = |d: usize| -> f32 {
            let dot: i32 = quants.iter().zip(&values).map(|(q, v)| q * v.1[d]).sum();
            dot as f32 * (top / 32767.0)
        };
        (0..case.dim).map(sum).collect()
    };
    definition(case, score, gather)
}

fn bf16_definition(case: &Case, t: &Tokens) -> Vec<f32> {
    let round = |x: f32| {
        let x = bf16::from_f32(x).to_f32();
        if x.abs() < 2f32.powi(-56) { 0.0 } else { x }
    };
    let element = |x: &[f32], heads: usize, token: usize, head: usize, d: usize| {
        round(x[(token * heads + head) * case.dim + d])
    };
    // Numbers of a pair are `2k` and `2k + 1`, the second comes first.
    let order = |i: &usize| (i / 2, 1 - i % 2);
    let score = |token: usize, h: usize, p: usize| {
        let kv = h / (case.heads / case.kv_heads);
        let mut elements: Vec<usize> = (0..case.dim).collect();
        elements.sort_by_key(order);
        elements.iter().fold(0f32, |sum, &d| {
            let key = element(&t.keys, case.kv_heads, p, kv, d);
            key.mul_add(element(&t.queries, case.heads, token, h, d), sum)
        })
    };
    let gather = |weights: &[f32], seen: Range<usize>, kv: usize| {
        let mut positions: Vec<usize> = seen.clone().collect();
        positions.sort_by_key(order);
        let sum = |d: usize| {
            positions.iter().fold(0f32, |sum, &p| {
                let value = element(&t.values, case.kv_heads, p, kv, d);
                value.mul_add(round(weights[p - seen.start]), sum)
            })
        };
        (0..case.dim).map(sum).collect()
    };
    definition(case, score, gather)
}

/// The kernels' own e^x: `softmax` of two numbers gives it away.
fn exp(x: f32) -> f32 {
    if x == f32::NEG_INFINITY {
        return 0.0;
    }
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2[1], n.mul_add(-LN2[0], x));
    let mut p = 1.987_569_1e-4f32;
    for c in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        5e-1,
    ] {
        p = p.mul_add(r, c);
    }
    let p = p.mul_add(r * r, r + 1.0);
    if x < -87.3 {
        0.0
    } else {
        p * 2f32.powi(n as i32)
    }
}

#[test]
fn int8_and_bf16_are_what_they_are_defined_as() {
    let mut random = Random(26);
    for (heads, kv_heads, dim, tokens, window) in [
        (8, 2, 64, SEGMENT + 40, None),
        (3, 1, 30, 2 * SEGMENT + 1, Some(SEGMENT + 9)),
        (1, 1, 1, 70, None),
        (2, 1, MAX_HEAD_DIM, 66, None),
    ] {
        let case = Case {
            heads,
            kv_heads,
            dim,
            tokens,
            window,
        };
        let mut t = case.tokens(&mut random);
        // Weights below 2^-56, and numbers that are subnormal or nearly so.
        t.queries[..dim].fill(90.0);
        t.values[0] = 1e-39;
        t.keys[dim / 2] = 2f32.powi(-57);
        let run = |kv_type| {
            let team = Team::new(2).unwrap();
            case.run(&team, &t, kv_type, &pages_for(tokens), &[tokens])
        };
        let what = format!("{case:?}");
        assert_same_bits(&run(KvType::Int8), &int8_definition(&case, &t), &what);
        assert_same_bits(&run(KvType::Bf16), &bf16_definition(&case, &t), &what);
    }
}
