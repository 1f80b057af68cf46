//! A report as one line per figure, for spreadsheets and scripts.

use std::fmt::Write as _;

use crate::report::Report;
use crate::statistics::Summary;
use crate::syscalls::SystemCalls;

/// The columns.
const HEADER: &str =
    "model,format,kv_type,threads,measure,batch,context,value,unit,low,high,count,dropped";

/// The whole report; figures that were not measured have no line.
pub(crate) fn csv(report: &Report) -> String {
    let mut out = format!("{HEADER}\n");
    let load = report.protocol.throughput;
    for f in &report.formats {
        let mut line = Lines {
            out: &mut out,
            start: format!(
                "{},{},{},{}",
                quoted(&report.model.name),
                f.compute,
                f.kv_type,
                report.protocol.threads
            ),
        };
        line.summary("next_token", load.prompt, "ms", &f.latency.next_token);
        line.summary("first_token", load.prompt, "ms", &f.latency.first_token);
        line.value("prefill", 1, load.prompt, f.latency.prefill, "tokens/s");
        line.share(
            "prefill_of_product",
            load.prompt,
            f.latency.prefill_shares.of_product,
        );
        line.share(
            "prefill_of_registers",
            load.prompt,
            f.latency.prefill_shares.of_registers,
        );
        line.value(
            "throughput",
            load.batch,
            load.prompt,
            f.throughput.tokens_per_second,
            "tokens/s",
        );
        if let Some(decode) = f.throughput.decode {
            line.value(
                "throughput_decode",
                load.batch,
                load.prompt,
                decode,
                "tokens/s",
            );
        }
        for p in &f.contexts {
            line.summary("next_token_at", p.context, "ms", &p.next_token);
            line.value("decode_at", 1, p.context, p.decode, "tokens/s");
            line.share("decode_of_read", p.context, Some(p.decode_share));
            line.value("prefill_at", 1, p.context, p.prefill, "tokens/s");
            line.share("prefill_of_product", p.context, p.prefill_shares.of_product);
        }
        for p in &f.curve {
            line.value(
                "decode_batch",
                p.batch,
                report.protocol.curve_prompt,
                p.decode,
                "tokens/s",
            );
            line.value(
                "decode_batch_roofline",
                p.batch,
                report.protocol.curve_prompt,
                p.roofline,
                "tokens/s",
            );
        }
        line.value("open", 0, 0, f.load.open_seconds, "s");
        line.value("convert", 0, 0, f.load.convert_seconds, "s");
        for (name, bytes) in [
            ("weights", f.memory.weights),
            ("kv", f.memory.kv),
            ("peak", f.memory.peak),
            ("bytes_per_pass", f.memory.per_pass),
        ] {
            line.value(name, 0, 0, bytes as f64, "bytes");
        }
        if let SystemCalls::Measured { per_token, .. } = f.system_calls {
            line.value(
                "system_calls",
                1,
                report.protocol.curve_prompt,
                per_token,
                "per token",
            );
        }
    }
    if let Some(p) = &report.protected {
        let mut line = Lines {
            out: &mut out,
            start: format!(
                "{},{},{},{}",
                quoted(&report.model.name),
                p.compute,
                p.kv_type,
                report.protocol.threads
            ),
        };
        let _ = writeln!(
            line.out,
            "{},protected_over_plain,1,{},{},ratio,{},{},{},0",
            line.start, p.prompt_tokens, p.ratio.mean, p.ratio.low, p.ratio.high, p.ratio.pairs
        );
        line.summary(
            "first_token_added",
            p.prompt_tokens,
            "ms",
            &p.first_token_added,
        );
        line.value("protection_cpu", 1, p.prompt_tokens, p.cpu_protection, "ms");
        line.value("enclave_cpu", 1, p.prompt_tokens, p.cpu_enclave, "ms");
    }
    let mut line = Lines {
        out: &mut out,
        start: format!(
            "{},,,{}",
            quoted(&report.model.name),
            report.protocol.threads
        ),
    };
    for limit in &report.limits.compute {
        let name = limit.arithmetic.name();
        for (kind, rate) in [("registers", limit.registers), ("product", limit.product)] {
            if let Some(rate) = rate {
                line.value(&format!("limit_{name}_{kind}"), 0, 0, rate, "Gop/s");
            }
        }
    }
    if !report.limits.read.is_empty() {
        line.value("limit_read", 0, 0, report.limits.read_median(), "GB/s");
    }
    out
}

struct Lines<'a> {
    out: &'a mut String,
    start: String,
}

impl Lines<'_> {
    fn value(&mut self, measure: &str, batch: usize, context: usize, value: f64, unit: &str) {
        let _ = writeln!(
            self.out,
            "{},{measure},{},{},{value},{unit},,,,",
            self.start,
            some(batch),
            some(context)
        );
    }

    fn share(&mut self, measure: &str, context: usize, share: Option<f64>) {
        if let Some(share) = share {
            self.value(measure, 1, context, share, "share");
        }
    }

    fn summary(&mut self, measure: &str, context: usize, unit: &str, s: &Summary) {
        let _ = writeln!(
            self.out,
            "{},{measure},1,{context},{},{unit},{},{},{},{}",
            self.start, s.median, s.median_low, s.median_high, s.count, s.dropped
        );
    }
}

fn some(number: usize) -> String {
    match number {
        0 => String::new(),
        n => n.to_string(),
    }
}

/// A field that may hold commas or quotes.
fn quoted(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn every_line_has_every_column() {
        let mut report = sample::report();
        report.model.name = "a \"b\"".into();
        let text = csv(&report);
        let columns = HEADER.split(',').count();
        for line in text.lines() {
            assert_eq!(line.split(',').count(), columns, "{line}");
        }
        assert!(
            text.contains(
                "\"a \"\"b\"\"\",int8-g32,f16,2,next_token,1,1024,38.1,ms,37.9,38.4,1010,6"
            ),
            "{text}"
        );
        assert!(
            text.contains("protected_over_plain,1,1021,1.012,ratio,1.004,1.021,20,0"),
            "{text}"
        );
        assert!(text.contains("decode_batch,6,128,118.3,tokens/s"), "{text}");
        assert!(!text.contains("bf16"), "what was not measured has no line");
    }

    #[test]
    fn names_with_commas_are_quoted() {
        assert_eq!(quoted("a,b"), "\"a,b\"");
        assert_eq!(quoted("plain"), "plain");
    }
}
