//! What reports of measurements are made of, for people: tables for a terminal, and pages of HTML with plots that load
//! nothing from elsewhere. Knows nothing of what was measured.

#![forbid(unsafe_code)]

pub mod plot;
pub mod table;

/// How a page looks: light or dark as its reader has it, fit for print. Colours of lines are `--c1` to `--c5`.
pub const STYLE: &str = include_str!("style.css");

/// Quantile `q` (0 to 1) of sorted samples, linear between neighbours; 0 of nothing.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let at = q.clamp(0.0, 1.0) * last as f64;
    let below = at.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (at - below as f64)
}
