//! A report for the terminal.

use std::fmt::Write as _;

use casemate_report::table::{Section, section, text};

use crate::protected::Protected;
use crate::report::{FormatResult, Report};
use crate::syscalls::SystemCalls;

/// The whole report as text.
pub(crate) fn table(report: &Report) -> String {
    let mut out = String::new();
    for line in head(report) {
        let _ = writeln!(out, "{line}");
    }
    for section in sections(report) {
        text(&mut out, &section);
    }
    out.push('\n');
    for note in notes(report) {
        let _ = writeln!(out, "note: {note}");
    }
    let _ = writeln!(out, "repeat: {}", report.program.command);
    out
}

/// Every figure of the report.
pub(crate) fn sections(report: &Report) -> Vec<Section> {
    let load = report.protocol.throughput;
    let mut sections = vec![
        limits(report),
        section(
            &format!(
                "next token: {} tokens in, {} out, one request",
                load.prompt, load.tokens
            ),
            &[
                "format",
                "KV",
                "median ms",
                "95 % interval",
                "p95",
                "p99",
                "tokens",
                "dropped",
                "tokens/s",
                "of read",
            ],
            report.formats.iter().map(next_token),
        ),
        section(
            &format!("first token and prefill: {} tokens in", load.prompt),
            &[
                "format",
                "first token ms",
                "p95",
                "runs",
                "tokens/s",
                "of best product",
                "of registers",
            ],
            report.formats.iter().map(first_token),
        ),
        section(
            &format!(
                "throughput: {} tokens in, {} out, batch {}, beam {}",
                load.prompt, load.tokens, load.batch, load.beam
            ),
            &["format", "tokens/s", "while decoding", "of read", "runs"],
            report.formats.iter().map(throughput),
        ),
        over(
            "decode of one request after a prompt: tokens/s, share of read bandwidth",
            &report.formats,
            |f| {
                f.contexts
                    .iter()
                    .map(|p| (p.context, p.decode, Some(p.decode_share)))
                    .collect()
            },
        ),
        over(
            "prefill of one prompt: tokens/s, share of the best product",
            &report.formats,
            |f| {
                f.contexts
                    .iter()
                    .map(|p| (p.context, p.prefill, p.prefill_shares.of_product))
                    .collect()
            },
        ),
        over(
            &format!(
                "batch curve after prompts of {}: tokens/s of all, share of read bandwidth",
                report.protocol.curve_prompt
            ),
            &report.formats,
            |f| {
                f.curve
                    .iter()
                    .map(|p| (p.batch, p.decode, Some(p.decode_share)))
                    .collect()
            },
        ),
        section(
            "load and memory",
            &[
                "format",
                "KV",
                "open s",
                "convert s",
                "weights MiB",
                "KV MiB",
                "peak MiB",
                "besides",
                "in huge pages",
                "calls/token",
            ],
            report.formats.iter().map(memory),
        ),
    ];
    sections.extend(report.protected.as_ref().map(protection));
    sections
}

fn protection(p: &Protected) -> Section {
    let row = |name: &str, value: String, detail: String| vec![name.to_owned(), value, detail];
    let rows = [
        row(
            "wall clock, protected / plain",
            format!("{:.4}", p.ratio.mean),
            format!(
                "95 % interval {:.4} - {:.4}, {} pairs",
                p.ratio.low, p.ratio.high, p.ratio.pairs
            ),
        ),
        row(
            "first token, added",
            format!("{:+.2} ms", p.first_token_added.median),
            format!(
                "95 % interval {:+.2} - {:+.2} ms",
                p.first_token_added.median_low, p.first_token_added.median_high
            ),
        ),
        row(
            "protection's CPU time by itself",
            format!("{:.3} ms", p.cpu_protection),
            format!(
                "{:.3} % of the enclave's {:.0} ms",
                p.cpu_share * 100.0,
                p.cpu_enclave
            ),
        ),
        row(
            "CPU time of the plain service",
            format!("{:.0} ms", p.cpu_plain),
            format!("and {:.1} ms of the proxy, on the user's side", p.cpu_proxy),
        ),
        row(
            "wall clock, protected",
            format!("{} ms", ms(p.protected.median)),
            format!("plain {} ms", ms(p.plain.median)),
        ),
        row(
            "proxy, start to first byte",
            format!("{} ms", ms(p.first_verified_byte.median)),
            format!("{} starts", p.first_verified_byte.count),
        ),
        row(
            "enclave, start to ready",
            format!("{} ms", ms(p.enclave_start)),
            "attested, key released, opened, converted".into(),
        ),
    ];
    section(
        &format!(
            "what protection costs: {} tokens in, {} out as {} events, {}, KV {}",
            p.prompt_tokens, p.tokens, p.events, p.compute, p.kv_type
        ),
        &["", "median", ""],
        rows.into_iter(),
    )
}

fn next_token(f: &FormatResult) -> Vec<String> {
    let t = &f.latency.next_token;
    vec![
        f.compute.clone(),
        f.kv_type.clone(),
        ms(t.median),
        format!("{} - {}", ms(t.median_low), ms(t.median_high)),
        ms(t.p95),
        ms(t.p99),
        t.count.to_string(),
        t.dropped.to_string(),
        rate(1e3 / t.median),
        percent(f.latency.decode_share),
    ]
}

fn first_token(f: &FormatResult) -> Vec<String> {
    let first = &f.latency.first_token;
    vec![
        f.compute.clone(),
        ms(first.median),
        ms(first.p95),
        first.count.to_string(),
        rate(f.latency.prefill),
        share(f.latency.prefill_shares.of_product),
        share(f.latency.prefill_shares.of_registers),
    ]
}

fn throughput(f: &FormatResult) -> Vec<String> {
    let t = &f.throughput;
    vec![
        f.compute.clone(),
        rate(t.tokens_per_second),
        t.decode.map_or_else(unmeasured, rate),
        share(t.decode_share),
        t.runs.to_string(),
    ]
}

fn memory(f: &FormatResult) -> Vec<String> {
    let m = &f.memory;
    vec![
        f.compute.clone(),
        f.kv_type.clone(),
        format!("{:.2}", f.load.open_seconds),
        format!("{:.2}", f.load.convert_seconds),
        mib(m.weights),
        mib(m.kv),
        mib(m.peak),
        format!("{:+}", (m.peak as i64 - (m.weights + m.kv) as i64) >> 20),
        m.huge
            .map_or_else(unmeasured, |bytes| format!("{} MiB", mib(bytes))),
        match &f.system_calls {
            SystemCalls::Measured { per_token, .. } => format!("{per_token:.3}"),
            SystemCalls::NotMeasured { .. } => unmeasured(),
        },
    ]
}

/// What was measured on what, with what.
pub(crate) fn head(report: &Report) -> [String; 3] {
    let (machine, model, program) = (&report.machine, &report.model, &report.program);
    [
        format!(
            "{}: {:.2} billion weights, {} layers of {} ({})",
            model.name,
            model.parameters as f64 / 1e9,
            model.layers,
            model.hidden,
            model.origin
        ),
        format!(
            "{}, {} cores, {}, {} threads, {:.1} GiB, {}",
            machine.processor,
            machine.cores,
            machine.instructions,
            report.protocol.threads,
            machine.memory as f64 / f64::from(1 << 30),
            machine.system
        ),
        format!(
            "casemate {} ({}, {}), {}",
            program.version, program.commit, program.profile, program.started
        ),
    ]
}

fn limits(report: &Report) -> Section {
    let limits = &report.limits;
    let mut rows: Vec<Vec<String>> = limits
        .compute
        .iter()
        .map(|limit| {
            let gops = |rate: Option<f64>| {
                rate.map_or_else(|| "no kernel".into(), |rate| format!("{rate:.0} Gop/s"))
            };
            vec![
                limit.arithmetic.name().into(),
                gops(limit.registers),
                gops(limit.product),
            ]
        })
        .collect();
    if !limits.read.is_empty() {
        let (least, most) = limits
            .read
            .iter()
            .fold((f64::MAX, 0f64), |(a, b), &x| (a.min(x), b.max(x)));
        rows.push(vec![
            "read".into(),
            format!("{:.1} GB/s", limits.read_median()),
            format!("{least:.1} - {most:.1}, {} times", limits.read.len()),
        ]);
    }
    section(
        "limits of this machine, measured in this run",
        &["", "from registers", "best product"],
        rows.into_iter(),
    )
}

/// A line per format, a column per point.
fn over(
    title: &str,
    formats: &[FormatResult],
    points: impl Fn(&FormatResult) -> Vec<(usize, f64, Option<f64>)>,
) -> Section {
    let columns: Vec<String> = formats
        .first()
        .map(|first| {
            points(first)
                .iter()
                .map(|(at, ..)| at.to_string())
                .collect()
        })
        .unwrap_or_default();
    let header: Vec<&str> = std::iter::once("format")
        .chain(columns.iter().map(String::as_str))
        .collect();
    section(
        title,
        &header,
        formats.iter().map(|f| {
            let cells = points(f).into_iter().map(|(_, value, of)| match of {
                Some(of) => format!("{} {:>5}", rate(value), percent(of)),
                None => rate(value),
            });
            std::iter::once(f.compute.clone()).chain(cells).collect()
        }),
    )
}

/// What a reader must know before believing a figure.
pub(crate) fn notes(report: &Report) -> Vec<String> {
    let mut notes = Vec::new();
    if report.protocol.quick {
        notes.push("a smoke run (--quick): these figures mean little".to_owned());
    }
    if report.program.profile != "release" {
        notes.push("not a release build: these figures mean nothing".to_owned());
    }
    if let Some(load) = report.machine.load.filter(|&load| load > 0.5) {
        notes.push(format!(
            "other work was running: load average {load:.1} before this run"
        ));
    }
    if report.protocol.threads > report.machine.cores {
        notes.push(format!(
            "{} threads on {} cores wait for each other",
            report.protocol.threads, report.machine.cores
        ));
    }
    for skipped in &report.skipped {
        notes.push(format!("{} not measured: {}", skipped.compute, skipped.why));
    }
    for format in &report.formats {
        for context in &format.beyond {
            notes.push(format!(
                "{} at {context}: beyond the model's context",
                format.compute
            ));
        }
        if let SystemCalls::NotMeasured { why } = &format.system_calls {
            notes.push(format!(
                "{}: system calls not measured: {why}",
                format.compute
            ));
        }
    }
    notes
}

/// Milliseconds with the digits that mean something.
pub(crate) fn ms(value: f64) -> String {
    match value {
        v if v < 1.0 => format!("{v:.3}"),
        v if v < 100.0 => format!("{v:.2}"),
        v if v < 1000.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// A rate with three digits.
pub(crate) fn rate(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 1000.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// A share in percent.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// A share that may not be known.
pub(crate) fn share(share: Option<f64>) -> String {
    share.map_or_else(unmeasured, percent)
}

/// Stands where there is no figure.
pub(crate) fn unmeasured() -> String {
    "not measured".into()
}

fn mib(bytes: u64) -> String {
    (bytes >> 20).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn every_figure_stands_in_the_table() {
        let text = table(&sample::report());
        for expected in [
            "int8-g32",
            "38.10",
            "37.90 - 38.40",
            "26.2",
            "86 %",
            "2750",
            "371.5",
            "41 %",
            "912 Gop/s",
            "no kernel",
            "34.0 GB/s",
            "118.3",
            "0.015",
            "1024 tokens in, 128 out",
            "1.0120",
            "1.0040 - 1.0210, 20 pairs",
            "+3.40 ms",
            "0.004 % of the enclave's",
            "int8-g32  f16  ",
            "131 events, int8-g32, KV f16",
            "f32 not measured: about 27.2 GB",
            "int8-g32 at 8000: beyond the model's context",
            "repeat: casemate bench --synthetic tinyllama-1.1b",
        ] {
            assert!(text.contains(expected), "{expected} is missing in\n{text}");
        }
        assert!(!text.lines().any(|line| line.ends_with(' ')));
    }

    #[test]
    fn what_was_not_measured_is_never_a_number() {
        let mut report = sample::report();
        report.formats[0].system_calls = SystemCalls::NotMeasured {
            why: "strace is not installed".into(),
        };
        report.formats[0].throughput.decode = None;
        report.formats[0].throughput.decode_share = None;
        let text = table(&report);
        assert!(
            text.contains("system calls not measured: strace is not installed"),
            "{text}"
        );
        let line = text
            .lines()
            .skip_while(|line| !line.starts_with("throughput"))
            .nth(2)
            .unwrap();
        assert_eq!(line.matches("not measured").count(), 2, "{line}");
    }

    #[test]
    fn columns_are_aligned() {
        let mut out = String::new();
        let rows = [
            vec!["a".into(), "1".into()],
            vec!["long".into(), "12345".into()],
        ];
        text(&mut out, &section("title", &["x", "n"], rows.into_iter()));
        assert_eq!(
            out,
            "\ntitle\n  x         n\n  a         1\n  long  12345\n"
        );
    }
}
