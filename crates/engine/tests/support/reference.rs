//! The architecture written a second time, as plainly as possible: f64, one whole text, no cache,
//! no batching. Deliberately shares nothing with the engine.

use casemate_container::{RopeLayout, RopeScaling};

use super::tiny::Tiny;

type Rows = Vec<Vec<f64>>;

/// Logits after each position of `tokens`.
pub fn logits(model: &Tiny, tokens: &[u32]) -> Rows {
    let c = &model.config;
    let (hidden, dim) = (c.hidden as usize, c.head_dim as usize);
    let (heads, kv_heads) = (c.heads as usize, c.kv_heads as usize);
    let table = model.tensor("token_embd.weight");
    let mut stream: Rows = tokens
        .iter()
        .map(|&t| {
            table[t as usize * hidden..][..hidden]
                .iter()
                .map(|&x| f64::from(x))
                .collect()
        })
        .collect();
    for layer in 0..c.layers {
        let weight = |name: &str| model.tensor(&format!("blk.{layer}.{name}.weight"));
        let project = |name: &str, rows: &Rows| -> Rows {
            let mut out: Rows = rows.iter().map(|row| multiply(weight(name), row)).collect();
            if c.qkv_bias && ["attn_q", "attn_k", "attn_v"].contains(&name) {
                let bias = model.tensor(&format!("blk.{layer}.{name}.bias"));
                for row in &mut out {
                    row.iter_mut()
                        .zip(bias)
                        .for_each(|(x, &b)| *x += f64::from(b));
                }
            }
            out
        };
        let normed: Rows = stream
            .iter()
            .map(|row| norm(row, weight("attn_norm"), c.norm_eps))
            .collect();
        let mut q = project("attn_q", &normed);
        let mut k = project("attn_k", &normed);
        let v = project("attn_v", &normed);
        for position in 0..tokens.len() {
            q[position]
                .chunks_mut(dim)
                .for_each(|head| rotate(model, head, position));
            k[position]
                .chunks_mut(dim)
                .for_each(|head| rotate(model, head, position));
        }
        let mut attended: Rows = vec![vec![0.0; heads * dim]; tokens.len()];
        for (position, out) in attended.iter_mut().enumerate() {
            for head in 0..heads {
                let of_kv = head * kv_heads / heads * dim;
                let seen = |p: usize| {
                    p <= position && c.sliding_window.is_none_or(|w| position - p < w as usize)
                };
                let positions: Vec<usize> = (0..tokens.len()).filter(|&p| seen(p)).collect();
                let scores: Vec<f64> = positions
                    .iter()
                    .map(|&p| {
                        let dot: f64 = (0..dim)
                            .map(|d| q[position][head * dim + d] * k[p][of_kv + d])
                            .sum();
                        (dot / (dim as f64).sqrt()).exp()
                    })
                    .collect();
                let total: f64 = scores.iter().sum();
                for (score, &p) in scores.iter().zip(&positions) {
                    for d in 0..dim {
                        out[head * dim + d] += score / total * v[p][of_kv + d];
                    }
                }
            }
        }
        for (row, out) in stream.iter_mut().zip(project("attn_output", &attended)) {
            row.iter_mut().zip(out).for_each(|(x, y)| *x += y);
        }
        let normed: Rows = stream
            .iter()
            .map(|row| norm(row, weight("ffn_norm"), c.norm_eps))
            .collect();
        let gate = project("ffn_gate", &normed);
        let up = project("ffn_up", &normed);
        let inner: Rows = gate
            .iter()
            .zip(&up)
            .map(|(gate, up)| {
                gate.iter()
                    .zip(up)
                    .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                    .collect()
            })
            .collect();
        for (row, out) in stream.iter_mut().zip(project("ffn_down", &inner)) {
            row.iter_mut().zip(out).for_each(|(x, y)| *x += y);
        }
    }
    let head = model.tensor(if c.tied_embeddings {
        "token_embd.weight"
    } else {
        "output.weight"
    });
    stream
        .iter()
        .map(|row| {
            multiply(
                head,
                &norm(row, model.tensor("output_norm.weight"), c.norm_eps),
            )
        })
        .collect()
}

fn multiply(weights: &[f32], x: &[f64]) -> Vec<f64> {
    weights
        .chunks(x.len())
        .map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum())
        .collect()
}

fn norm(x: &[f64], weight: &[f32], eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter()
        .zip(weight)
        .map(|(x, &w)| x / (mean + f64::from(eps)).sqrt() * f64::from(w))
        .collect()
}

fn rotate(model: &Tiny, head: &mut [f64], position: usize) {
    let c = &model.config;
    let half = head.len() / 2;
    for i in 0..half {
        let mut wavelength =
            std::f64::consts::TAU * f64::from(c.rope_theta).powf(i as f64 / half as f64);
        match c.rope_scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => wavelength *= f64::from(factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            } => {
                let context = f64::from(original_context);
                let (low, high) = (f64::from(low_freq_factor), f64::from(high_freq_factor));
                if wavelength > context / low {
                    wavelength *= f64::from(factor);
                } else if wavelength > context / high {
                    let smooth = (context / wavelength - low) / (high - low);
                    wavelength = 1.0
                        / ((1.0 - smooth) / (wavelength * f64::from(factor)) + smooth / wavelength);
                }
            }
        }
        if model.tensors.iter().any(|t| t.name == "rope_freqs.weight") {
            wavelength *= f64::from(model.tensor("rope_freqs.weight")[i]);
        }
        let angle = std::f64::consts::TAU / wavelength * position as f64;
        let (a, b) = match c.rope_layout {
            RopeLayout::Interleaved => (2 * i, 2 * i + 1),
            RopeLayout::Half => (i, i + half),
        };
        (head[a], head[b]) = (
            head[a] * angle.cos() - head[b] * angle.sin(),
            head[a] * angle.sin() + head[b] * angle.cos(),
        );
    }
}
