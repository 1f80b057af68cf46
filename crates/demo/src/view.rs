//! What a worker was sent, beside what it would have been sent without pads: for a terminal and as a page.

use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::sync::{Arc, mpsc};

use anyhow::{Context, Result, ensure};
use casemate_audit::watched::{Rows, Watch};
use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, SealedFile, Silent, Unlocked};
use casemate_engine::outsource::Outsource;
use casemate_engine::{ChatMessage, Compute, Engine, EngineOptions, Event, Request};
use casemate_field::Field;
use casemate_report::STYLE;
use casemate_report::plot::{self, Bars, escaped};
use casemate_report::table::{figures, section};
use casemate_testkit::deployment::{Deployment, SealFacts};
use casemate_testkit::tap::{Seen, row_counts};
use casemate_testkit::uniform::{Bits, chi_square, histogram, log2_bins};
use time::OffsetDateTime;

use crate::narrator::{fact, plot as terminal};
use crate::offload::Claims;
use crate::question::{Answer, MAX_TOKENS, SYSTEM};

/// Bars of a histogram.
const BINS: usize = 32;
/// Rows of characters of a histogram.
const TALL: usize = 8;
/// Standard deviations beyond which chance is no explanation: one run in some hundred million.
const CHANCE: f64 = 6.0;
/// Below this many elements a distribution says little.
const ENOUGH: usize = 10_000;

/// What the demonstration does not show.
pub(crate) fn limits() -> [&'static str; 3] {
    [
        "shown: each number by itself is spread evenly. That numbers do not depend on each other, and that no pad is used \
         twice, is tested with 10^7 of them and proven from the cipher (docs/offload.md), not by this picture",
        "not hidden: matrices and their shapes, how many rows came when, and how long everything took. So it counts the \
         tokens of the question and of the answer, as above",
        "trusted: the enclave. Here it runs beside the fake TEE, on a machine that could read all of it",
    ]
}

/// A distribution.
struct Side {
    counts: Vec<u64>,
    elements: usize,
    /// Distances from uniform, by high and by low bits, in standard deviations.
    distances: [f64; 2],
}

impl Side {
    fn new(field: Field, counts: Vec<u64>, elements: impl Iterator<Item = u32> + Clone) -> Side {
        let count = elements.clone().count();
        let distance = |bits| chi_square(field, bits, log2_bins(count), elements.clone());
        Side {
            counts,
            elements: count,
            distances: [distance(Bits::High), distance(Bits::Low)],
        }
    }

    /// The farther of both.
    fn distance(&self) -> f64 {
        self.distances.iter().fold(0.0, |far, d| d.abs().max(far))
    }
}

/// Both sides, and what can be counted besides.
pub(crate) struct View {
    field: Field,
    sent: Side,
    plain: Side,
    matrices: usize,
    messages: usize,
    rows_of_first: String,
    answer_is_that_of_plain: bool,
}

/// Opens the sealed model as its provider can.
pub(crate) fn unlock(deployment: &Deployment, sealed: &SealFacts) -> Result<Unlocked> {
    let keys = deployment.keys()?;
    let data_key = DataKey::read_file(&keys.data_key)?;
    let provider = SigningKey::read_file(&keys.signing_key)?.verifying_key();
    Ok(SealedFile::open(&sealed.path)?.unlock(&data_key, &provider)?)
}

impl View {
    /// Of what was seen of one question and its answer. The rows before they were masked are computed here again, by the
    /// provider, who has the model: they never leave the enclave.
    pub(crate) fn new(
        deployment: &Deployment,
        sealed: &SealFacts,
        seen: Seen,
        question: &str,
        answer: &Answer,
    ) -> Result<View> {
        let opened = seen
            .connections
            .last()
            .context("nobody connected to the worker")?;
        let (plain, text) = plain(unlock(deployment, sealed)?, question)?;
        Ok(View::of(
            opened.field,
            opened.matrices.len(),
            &seen,
            &plain,
            text == answer.text,
        ))
    }

    fn of(field: Field, matrices: usize, seen: &Seen, plain: &[Rows], same: bool) -> View {
        let quants = || plain.iter().flat_map(|rows| rows.quants.iter().copied());
        let mut counts = vec![0; BINS];
        for x in quants() {
            counts[(usize::from((i16::from(x) + 128) as u8)) * BINS / 256] += 1;
        }
        let as_elements = quants().map(|x| field.from_integer(x.into()));
        let sent = histogram(field, BINS, seen.elements());
        let elements: Vec<u32> = seen.elements().collect();
        View {
            field,
            sent: Side::new(field, sent, elements.iter().copied()),
            plain: Side::new(
                field,
                counts,
                as_elements.collect::<Vec<_>>().iter().copied(),
            ),
            matrices,
            messages: seen.messages.len(),
            rows_of_first: row_counts(seen, 0),
            answer_is_that_of_plain: same,
        }
    }

    /// Shows it, and claims what can be claimed.
    pub(crate) fn show(&self, claims: &mut Claims) {
        let field = self.field;
        fact("matrices, all public", &self.matrices.to_string());
        fact("messages", &self.messages.to_string());
        fact("rows with the first matrix", &self.rows_of_first);
        let titles = [
            format!("sent, 0 to {}", field.modulus() - 1),
            "the same before pads, -127 to 127".to_owned(),
        ];
        let sides = [&self.sent.counts, &self.plain.counts];
        terminal(&titles, &sides.map(|counts| blocks(counts, TALL)));
        let [high, low] = self.sent.distances;
        fact("numbers sent", &self.sent.elements.to_string());
        fact(
            "chi-square, high and low bits",
            &format!("{high:+.1} and {low:+.1} standard deviations from uniform"),
        );
        let [high, low] = self.plain.distances;
        fact(
            "without pads",
            &format!(
                "{high:+.0} and {low:+.0}, of {} numbers",
                self.plain.elements
            ),
        );
        claims.claim(
            self.sent.elements >= ENOUGH,
            "there is enough of it to tell",
        );
        claims.claim(
            self.sent.distance() < CHANCE,
            "what was sent is flat: no farther from uniform than chance takes it",
        );
        claims.claim(
            self.answer_is_that_of_plain && self.plain.distance() > 100.0 * CHANCE,
            "the same rows without pads, computed again for this answer, are nothing like it",
        );
    }

    /// The same as a page that loads nothing.
    pub(crate) fn html(&self, model: &str) -> String {
        let mut page = String::new();
        let _ = write!(
            page,
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>What a worker saw</title>\
             <style>{STYLE}</style></head><body><main><header><p class=\"kicker\">cargo xtask demo --offload</p>\
             <h1>What a worker saw</h1><p class=\"sub\">Of one question to {} and its answer: {} numbers for {} public \
             matrices in {} messages. Rows with the first matrix: {}.</p><ul class=\"notes\">",
            escaped(model),
            self.sent.elements,
            self.matrices,
            self.messages,
            escaped(&self.rows_of_first)
        );
        for limit in limits() {
            let _ = write!(page, "<li>{}</li>", escaped(limit));
        }
        page.push_str("</ul></header><section class=\"plots\">");
        let last = (self.field.modulus() - 1).to_string();
        let mut figure = |title: &str, what: &str, side: &Side, ends: [&str; 2], colour| {
            let svg = plot::bars(&Bars {
                summary: what,
                x_name: "number",
                counts: &side.counts,
                ends,
                colour,
            });
            let _ = write!(
                page,
                "<figure><figcaption><h2>{title}</h2><p>{what}</p></figcaption>{svg}</figure>"
            );
        };
        figure(
            "Sent",
            "How many of the numbers that the worker was sent lie in each part of the field.",
            &self.sent,
            ["0", &last],
            "--c1",
        );
        figure(
            "Before pads",
            "The same rows as the enclave had them: activations in 8 bits. They never leave it; these were computed again \
             from the model.",
            &self.plain,
            ["-127", "127"],
            "--c2",
        );
        page.push_str("</section><section>");
        let row = |name: &str, side: &Side| {
            let [high, low] = side.distances.map(|d| format!("{d:+.1}"));
            vec![name.to_owned(), side.elements.to_string(), high, low]
        };
        let rows = [row("sent", &self.sent), row("before pads", &self.plain)];
        let header = ["numbers", "how many", "by high bits", "by low bits"];
        let title = "distance from uniform by chi-square, in standard deviations";
        figures(&mut page, &section(title, &header, rows.into_iter()));
        page.push_str("</section></main></body></html>\n");
        page
    }
}

/// The inputs of all products for a question and its greedy answer, and the answer.
fn plain(model: Unlocked, question: &str) -> Result<(Vec<Rows>, String)> {
    let watch = Watch::default();
    let options = EngineOptions {
        compute: Compute::Int8Row,
        max_context: 2048,
        ..EngineOptions::default()
    };
    let model = model.load(options.threads, &Silent)?;
    let outsource: Arc<dyn Outsource> = Arc::new(watch.clone());
    let engine = Engine::load_with(model, Vec::new(), &options, Some(outsource), &Silent)?;
    let chat = engine.chat().context("the model has no chat template")?;
    let turn = |role: &str, content: &str| ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
        ..ChatMessage::default()
    };
    let messages = [turn("system", SYSTEM), turn("user", question)];
    let prompt = chat.render(&messages, true, OffsetDateTime::now_utc())?;
    let request = Request {
        prompt: engine.tokenizer().encode_prompt(&prompt)?,
        max_tokens: MAX_TOKENS,
        ..Request::default()
    };
    let (sender, pieces) = mpsc::channel();
    let sink = move |event: Event<'_>| {
        if let Event::Token { text, .. } = event {
            let _ = sender.send(text.into_owned());
        }
        ControlFlow::Continue(())
    };
    engine.submit(request, Box::new(sink))?;
    let text: String = pieces.iter().collect();
    ensure!(!text.is_empty(), "the model says nothing");
    Ok((watch.take(), text))
}

/// Bars of so many rows of characters, the highest first; the tallest bar fills them.
fn blocks(counts: &[u64], tall: usize) -> Vec<String> {
    const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let full = 8 * tall as u64;
    let row = |above: usize| {
        let part = |count: &u64| {
            let filled = (count * full).div_ceil(most) as usize;
            EIGHTHS[filled.saturating_sub(8 * above).min(8)]
        };
        counts.iter().map(part).collect()
    };
    (0..tall).rev().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_testkit::tap::{Message, Opened};

    fn view(element: impl Fn(u64) -> u64) -> View {
        let field = Field::P29;
        let mut state = 5u64;
        let mut noise = || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB) >> 20
        };
        let seen = Seen {
            connections: vec![Opened {
                field,
                matrices: Vec::new(),
            }],
            messages: vec![Message {
                connection: 0,
                matrix: 0,
                rows: 40,
                elements: (0..40_000)
                    .map(|_| field.reduce(element(noise())))
                    .collect(),
            }],
        };
        let plain = [Rows {
            stack: "blk.0.attn_qkv".into(),
            columns: 1000,
            quants: (0..40_000).map(|i| (i % 21) as i8 - 10).collect(),
        }];
        View::of(field, 4, &seen, &plain, true)
    }

    fn holds(view: &View) -> bool {
        let mut claims = Claims::default();
        view.show(&mut claims);
        claims.holds()
    }

    #[test]
    fn noise_is_flat_and_anything_else_is_a_claim_that_does_not_hold() {
        assert!(holds(&view(|noise| noise)));
        // One number in eight is not masked, or half as large as it should be.
        assert!(!holds(&view(|noise| if noise % 8 == 0 {
            noise % 256
        } else {
            noise
        })));
        assert!(!holds(&view(|noise| if noise % 8 == 0 {
            noise & 0xFFF_FFFF
        } else {
            noise
        })));
        let mut other = view(|noise| noise);
        other.answer_is_that_of_plain = false;
        assert!(!holds(&other));
    }

    #[test]
    fn bars_are_as_tall_as_their_counts() {
        assert_eq!(blocks(&[0, 1, 8, 16], 2), ["   █", " ▁██"]);
        assert_eq!(blocks(&[0, 0], 1), ["  "]);
    }

    #[test]
    fn the_page_is_whole_and_loads_nothing() {
        let page = view(|noise| noise).html("a <model>");
        assert!(page.contains("a &lt;model&gt;") && page.contains("not hidden: matrices"));
        assert_eq!(page.matches("<svg").count(), 2);
        for tag in [
            "main", "section", "figure", "table", "svg", "p", "ul", "li", "h2",
        ] {
            let opened = page.matches(&format!("<{tag}>")).count()
                + page.matches(&format!("<{tag} ")).count();
            assert_eq!(
                opened,
                page.matches(&format!("</{tag}>")).count(),
                "<{tag}>"
            );
        }
        for foreign in ["<script", "http://", "https://", "@import", "url(", "NaN"] {
            assert!(!page.contains(foreign), "{foreign}");
        }
    }
}
