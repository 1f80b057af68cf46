//! What a constraint costs at each token of an answer, for one tokenizer.
//!
//! ```sh
//! cargo run --release -p casemate-engine --example masks -- tokenizer.json VOCABULARY
//! ```
//! Runs JSON answers through the engine's own constraint, masks only, without a model: once with
//! masks kept, as requests do, and once computing each anew.

use std::time::{Duration, Instant};

use anyhow::Context;
use casemate_engine::{Grammar, MaskMeter, Tokenizer};

/// Text that a model might write under JSON mode.
const ANSWER: &str = r#"{"title": "A quiet evening", "mood": "calm", "tags": ["rain", "tea", "books"],
  "guests": [{"name": "Ada", "age": 36}, {"name": "Grace", "age": 85}], "score": -1.5e3, "open": true, "note": null}"#;

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
        let mut times: Vec<Duration> = meter.times(&Grammar::json_object(), &tokens, keep);
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
    Ok(())
}
