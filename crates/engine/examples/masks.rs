//! What a constraint costs at each token of an answer, for one tokenizer.
//!
//! ```sh
//! cargo run --release -p casemate-engine --example masks -- tokenizer.json VOCABULARY
//! ```
//! Runs JSON answers through the engine's own constraint, masks only, without a model: once with
//! masks kept, as requests do, and once computing each anew. Then free text in which a function is
//! called at the end.

use std::time::{Duration, Instant};

use anyhow::Context;
use casemate_engine::{CallFormat, CallGrammar, Grammar, MaskMeter, Offered, Tokenizer};

/// Text that a model might write under JSON mode.
const ANSWER: &str = r#"{"title": "A quiet evening", "mood": "calm", "tags": ["rain", "tea", "books"],
  "guests": [{"name": "Ada", "age": 36}, {"name": "Grace", "age": 85}], "score": -1.5e3, "open": true, "note": null}"#;

/// Text with signs with which a call could begin, and one.
const TEXT: &str = "In HTML, bold text is <b>bold</b>, and a < b is written a &lt; b. Let me look at the weather.\n";
const CALL: &str =
    "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Bonn\"}}\n</tool_call>";

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().context("a tokenizer.json")?;
    let vocabulary: u32 = arguments
        .next()
        .context("the size of the vocabulary")?
        .parse()?;
    let tokenizer = Tokenizer::from_json(&std::fs::read(path)?, vocabulary, None)?;
    let started = Instant::now();
    let mut meter = MaskMeter::new(&tokenizer, vocabulary);
    println!(
        "the trie of {vocabulary} tokens: {:?}, once",
        started.elapsed()
    );
    let tokens = tokenizer.encode(ANSWER, false)?;
    for (name, keep) in [("masks kept", true), ("each anew", false)] {
        show(name, meter.times(&Grammar::json_object(), &tokens, keep));
    }
    let schema = serde_json::json!({
        "type": "object", "additionalProperties": false, "required": ["city"],
        "properties": {"city": {"type": "string"}},
    });
    let weather = Offered {
        name: "weather",
        arguments: Some(&schema),
    };
    let grammar = Grammar::text_with_calls(CallGrammar::new(CallFormat::Tagged, &[weather])?);
    let text = tokenizer.encode(TEXT, false)?;
    let both = [text.as_slice(), &tokenizer.encode(CALL, false)?].concat();
    let mut times = meter.times(&grammar, &both, true);
    anyhow::ensure!(times.len() == both.len(), "the call was refused");
    let call = times.split_off(text.len());
    show("before a call", times);
    show("in a call", call);
    Ok(())
}

fn show(name: &str, mut times: Vec<Duration>) {
    let total: Duration = times.iter().sum();
    times.sort();
    println!(
        "{name}: {} tokens, mean {:?}, median {:?}, most {:?}",
        times.len(),
        total / times.len() as u32,
        times[times.len() / 2],
        times[times.len() - 1],
    );
}
