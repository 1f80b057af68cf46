//! A report as one page of HTML: no script, nothing loaded from elsewhere, light or dark as its reader has it, fit for print.

use std::fmt::Write as _;

use casemate_report::STYLE;
use casemate_report::plot::{self, Lines, Series, escaped};
use casemate_report::table::figures;

use crate::report::table::{self, ms, rate};
use crate::report::{FormatResult, Report, roofline};
use crate::syscalls::SystemCalls;

/// The whole page.
pub(crate) fn html(report: &Report) -> String {
    let mut page = String::new();
    let title = format!("{} on {}", report.model.name, report.machine.processor);
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>{}</title>\
         <style>{STYLE}</style></head><body><main>",
        escaped(&title)
    );
    header(&mut page, report);
    if let Some(lead) = lead(report) {
        tiles(&mut page, report, lead);
    }
    shares(&mut page, report);
    page.push_str("<section class=\"plots\">");
    batch_curve(&mut page, report);
    decode_over_context(&mut page, report);
    prefill_over_prompt(&mut page, report);
    page.push_str("</section>");
    latencies(&mut page, report);
    protection(&mut page, report);
    page.push_str("<section><h2>Every figure</h2>");
    for section in table::sections(report) {
        figures(&mut page, &section);
    }
    page.push_str("</section>");
    footer(&mut page, report);
    page.push_str("</main></body></html>\n");
    page
}

/// The format that a single user would choose: the one with the shortest time to the next token.
fn lead(report: &Report) -> Option<&FormatResult> {
    let by_latency = |f: &&FormatResult| f.latency.next_token.median;
    report
        .formats
        .iter()
        .min_by(|a, b| by_latency(a).total_cmp(&by_latency(b)))
}

/// The colour of a format is the same in every report.
fn colour(compute: &str) -> String {
    // Behind a `+` stands how keys and values are stored.
    match compute.split('+').next().unwrap_or(compute) {
        "int8-row" => "--c1",
        "int8-g32" => "--c2",
        "bf16" => "--c3",
        "q4-g32" => "--c4",
        _ => "--c5",
    }
    .to_owned()
}

fn header(page: &mut String, report: &Report) {
    let (model, machine) = (&report.model, &report.machine);
    let cache = machine.cache.map_or(String::new(), |bytes| {
        format!(", {} MiB last-level cache", bytes >> 20)
    });
    let _ = write!(
        page,
        "<header><p class=\"kicker\">casemate bench</p><h1>{}</h1><p class=\"sub\">{:.2} billion weights in {} layers of {}, {} heads over {}. {} \
         threads on <b>{}</b> ({}, {:.0} GiB{cache}).</p>",
        escaped(&model.name),
        model.parameters as f64 / 1e9,
        model.layers,
        model.hidden,
        model.heads,
        model.kv_heads,
        report.protocol.threads,
        escaped(&machine.processor),
        escaped(&machine.instructions),
        machine.memory as f64 / f64::from(1 << 30),
    );
    let notes = table::notes(report);
    if !notes.is_empty() {
        page.push_str("<ul class=\"notes\">");
        for note in notes {
            let _ = write!(page, "<li>{}</li>", escaped(&note));
        }
        page.push_str("</ul>");
    }
    page.push_str("</header>");
}

fn tiles(page: &mut String, report: &Report, lead: &FormatResult) {
    let load = report.protocol.throughput;
    let (next, first) = (
        lead.latency.next_token.median,
        lead.latency.first_token.median,
    );
    let _ = write!(
        page,
        "<section><p class=\"lead\">In {}, keys and values in {}</p><div class=\"tiles\">",
        escaped(&lead.compute),
        escaped(&lead.kv_type)
    );
    let allowed = table::percent(lead.latency.decode_share);
    let detail = format!(
        "{} tokens/s, {allowed} of what memory allows",
        rate(1e3 / next)
    );
    tile(page, "Next token", &ms(next), "ms", &detail);
    let (first_value, first_unit) = match first < 1e3 {
        true => (ms(first), "ms"),
        false => (format!("{:.2}", first / 1e3), "s"),
    };
    let detail = format!(
        "after {} tokens, read at {} a second",
        load.prompt,
        rate(lead.latency.prefill)
    );
    tile(page, "First token", &first_value, first_unit, &detail);
    let decode = lead.throughput.decode;
    let unit = if decode.is_some() { "tokens/s" } else { "" };
    let detail = format!(
        "decoding together; {} with their prompts",
        rate(lead.throughput.tokens_per_second)
    );
    tile(
        page,
        &format!("{} users", load.batch),
        &decode.map_or_else(table::unmeasured, rate),
        unit,
        &detail,
    );
    let m = &lead.memory;
    let besides = (m.peak as i64 - (m.weights + m.kv) as i64) / 1_000_000;
    let detail = format!("{besides:+} MB besides weights, keys and values");
    tile(
        page,
        "Peak memory",
        &format!("{:.2}", m.peak as f64 / 1e9),
        "GB",
        &detail,
    );
    match &lead.system_calls {
        SystemCalls::Measured {
            per_token, tokens, ..
        } => {
            let detail = format!("of the engine's threads, over {tokens} tokens");
            tile(
                page,
                "System calls",
                &plot::number(*per_token),
                "a token",
                &detail,
            );
        }
        SystemCalls::NotMeasured { why } => {
            tile(page, "System calls", &table::unmeasured(), "", why)
        }
    }
    page.push_str("</div></section>");
}

fn tile(page: &mut String, name: &str, value: &str, unit: &str, detail: &str) {
    let _ = write!(
        page,
        "<div class=\"tile\"><h3>{}</h3><p class=\"figure\">{}<small> {unit}</small></p><p>{}</p></div>",
        escaped(name),
        escaped(value),
        escaped(detail)
    );
}

fn shares(page: &mut String, report: &Report) {
    page.push_str("<section><h2>How close to the machine</h2><p class=\"sub\">The full width of a bar is what this machine can do, measured in this run.</p><div class=\"meters\">");
    for f in &report.formats {
        let _ = write!(
            page,
            "<div class=\"meter-group\"><h3 style=\"color:var({})\">{}</h3>",
            colour(&f.compute),
            escaped(&f.compute)
        );
        let best_batch = f.curve.last();
        let rows = [
            (
                "decode, one request",
                "of reading memory",
                Some(f.latency.decode_share),
            ),
            (
                "prefill",
                "of the best product",
                f.latency.prefill_shares.of_product,
            ),
            (
                "prefill",
                "of the registers",
                f.latency.prefill_shares.of_registers,
            ),
            (
                "decode, largest batch",
                "of reading memory",
                best_batch.map(|p| p.decode_share),
            ),
        ];
        for (what, of, share) in rows {
            let text = table::share(share);
            let width = share.unwrap_or(0.0).clamp(0.0, 1.0) * 100.0;
            let _ = write!(
                page,
                "<div class=\"meter\"><span>{what} <i>{of}</i></span><b>{text}</b><div class=\"track\"><div style=\"width:{width:.1}%;background:var({})\"></div></div></div>",
                colour(&f.compute)
            );
        }
        page.push_str("</div>");
    }
    page.push_str("</div></section>");
}

fn figure(page: &mut String, title: &str, text: &str, svg: &str) {
    let _ = write!(
        page,
        "<figure><figcaption><h2>{title}</h2><p>{text}</p></figcaption>{svg}</figure>"
    );
}

fn batch_curve(page: &mut String, report: &Report) {
    let mut series = Vec::new();
    for f in &report.formats {
        let line = |name: String, dashed, points| Series {
            name,
            colour: colour(&f.compute),
            points,
            dashed,
        };
        let limit = f
            .curve
            .iter()
            .map(|p| (p.batch as f64, p.roofline))
            .collect();
        series.push(line(String::new(), true, limit));
        let measured = f.curve.iter().map(|p| (p.batch as f64, p.decode)).collect();
        series.push(line(f.compute.clone(), false, measured));
    }
    let svg = plot::lines(&Lines {
        summary: "Tokens per second over the size of the batch",
        x_name: "requests at once",
        y_name: "tokens/s of all requests",
        series,
        doubling: false,
    });
    figure(
        page,
        "More users at once",
        "Dashed: if nothing but reading weights, keys and values took time.",
        &svg,
    );
}

fn decode_over_context(page: &mut String, report: &Report) {
    let mut series = Vec::new();
    let half = report.protocol.curve_tokens as f64 / 2.0;
    for f in &report.formats {
        let line = |name: String, dashed, points| Series {
            name,
            colour: colour(&f.compute),
            points,
            dashed,
        };
        let limit = f.contexts.iter().map(|p| {
            let context = p.context as f64;
            (context, roofline(&f.memory, 1, context + half, p.read))
        });
        series.push(line(String::new(), true, limit.collect()));
        let measured = f
            .contexts
            .iter()
            .map(|p| (p.context as f64, p.decode))
            .collect();
        series.push(line(f.compute.clone(), false, measured));
    }
    let svg = plot::lines(&Lines {
        summary: "Tokens per second of one request over the length of its context",
        x_name: "tokens before",
        y_name: "tokens/s of one request",
        series,
        doubling: true,
    });
    figure(
        page,
        "Long contexts",
        "One request, decoding. Dashed: what memory allows.",
        &svg,
    );
}

fn prefill_over_prompt(page: &mut String, report: &Report) {
    let series = report.formats.iter().map(|f| Series {
        name: f.compute.clone(),
        colour: colour(&f.compute),
        points: f
            .contexts
            .iter()
            .map(|p| (p.context as f64, p.prefill))
            .collect(),
        dashed: false,
    });
    let svg = plot::lines(&Lines {
        summary: "Tokens of a prompt read per second over its length",
        x_name: "tokens of the prompt",
        y_name: "tokens/s",
        series: series.collect(),
        doubling: true,
    });
    figure(
        page,
        "Reading prompts",
        "Tokens of the prompt a second until the first token of the answer.",
        &svg,
    );
}

fn latencies(page: &mut String, report: &Report) {
    page.push_str("<section class=\"plots\">");
    for f in &report.formats {
        let next = &f.latency.next_token;
        let svg = plot::distribution(
            &f.latency.samples,
            next.median,
            "ms",
            &colour(&f.compute),
            &format!(
                "Distribution of the time to the next token in {}",
                f.compute
            ),
        );
        let text = format!(
            "{} tokens; 95 % interval of the median {} to {} ms; 95 % come within {} ms. {} outliers (|Z| &gt; 3) do not count.",
            next.count,
            ms(next.median_low),
            ms(next.median_high),
            ms(next.p95),
            next.dropped
        );
        figure(
            page,
            &format!("Next token, {}", escaped(&f.compute)),
            &text,
            &svg,
        );
    }
    page.push_str("</section>");
}

fn protection(page: &mut String, report: &Report) {
    let Some(p) = &report.protected else { return };
    let svg = plot::ratios(
        &p.ratios,
        (p.ratio.low, p.ratio.mean, p.ratio.high),
        &colour(&p.compute),
        "Ratios of the time with protection to the time without",
    );
    let text = format!(
        "{} requests of {} tokens in and {} out, through a sealed model, attestation, encrypted channel and receipts, and without, in \
         turns: {:.3} times the wall clock (95 % interval {:.3} to {:.3}), {:+.1} ms on the first token. Protection by itself took \
         {:.2} ms of CPU time, {:.3} % of the request's.",
        p.ratio.pairs,
        p.prompt_tokens,
        p.tokens,
        p.ratio.mean,
        p.ratio.low,
        p.ratio.high,
        p.first_token_added.median,
        p.cpu_protection,
        p.cpu_share * 100.0
    );
    page.push_str("<section class=\"plots\">");
    figure(page, "What protection costs", &text, &svg);
    page.push_str("</section>");
}

fn footer(page: &mut String, report: &Report) {
    let (program, machine) = (&report.program, &report.machine);
    let _ = write!(
        page,
        "<footer><p>casemate {} ({}, {} build), {}. {}; {}; transparent huge pages: {}; processor features: {}.</p><p>To repeat it:</p><pre>{}</pre></footer>",
        escaped(&program.version),
        escaped(&program.commit),
        escaped(&program.profile),
        escaped(&program.started),
        escaped(&machine.system),
        escaped(&report.model.origin),
        escaped(machine.huge_pages.as_deref().unwrap_or("unknown")),
        escaped(&machine.features.join(", ")),
        escaped(&program.command)
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn the_page_is_whole_and_loads_nothing() {
        let page = html(&sample::report());
        for expected in [
            "tinyllama-1.1b",
            "38.10",
            "In int8-g32, keys and values in f16",
            "<td>int8-g32</td><td>f16</td>",
            "118",
            "Every figure",
            "What protection costs",
            "f32 not measured",
            "casemate bench --synthetic",
        ] {
            assert!(page.contains(expected), "{expected}");
        }
        for tag in [
            "main", "section", "figure", "table", "svg", "div", "p", "header", "footer", "ul", "li",
        ] {
            let opened = page.matches(&format!("<{tag}>")).count()
                + page.matches(&format!("<{tag} ")).count();
            assert_eq!(
                opened,
                page.matches(&format!("</{tag}>")).count(),
                "<{tag}>"
            );
        }
        for foreign in ["<script", "http://", "https://", "@import", "url("] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        assert!(page.matches("<svg").count() >= 4);
    }

    #[test]
    fn a_first_token_has_a_unit_in_which_it_is_not_nothing() {
        let tile = |milliseconds: f64| {
            let mut report = sample::report();
            report.formats[0].latency.first_token.median = milliseconds;
            let page = html(&report);
            let (_, rest) = page.split_once("First token</h3>").unwrap();
            rest.split_once("</small>").unwrap().0.to_owned()
        };
        assert_eq!(tile(7.5), "<p class=\"figure\">7.50<small> ms");
        assert_eq!(tile(2750.0), "<p class=\"figure\">2.75<small> s");
    }

    #[test]
    fn what_comes_from_outside_is_escaped() {
        let mut report = sample::report();
        report.model.name = "<script>alert(1)</script>".into();
        report.formats[0].compute = "a\"b".into();
        let page = html(&report);
        assert!(!page.contains("<script>") && page.contains("&lt;script&gt;"));
        assert!(page.contains("Processor &lt;9000&gt; &amp; more"));
        assert!(!page.contains("a\"b"));
    }

    #[test]
    fn a_limit_that_is_unknown_is_no_bar_of_zero() {
        let mut report = sample::report();
        report.formats[0].latency.prefill_shares.of_product = None;
        assert!(html(&report).contains("<b>not measured</b>"));
    }
}
