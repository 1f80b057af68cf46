//! Asks through the proxy as any OpenAI client would, and prints the answer as it streams.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use console::style;
use futures::StreamExt;
use serde_json::{Value, json};

/// What the model is told before the question. Without it, SmolLM2's two likeliest beginnings of an answer lie 0.09
/// apart in the logits, less than 8 bits can tell.
pub(crate) const SYSTEM: &str = "Answer in one sentence.";

/// Longest answer, in tokens.
pub(crate) const MAX_TOKENS: usize = 64;

/// What came back, and how fast.
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) tokens: u64,
    pub(crate) first_token: Duration,
    pub(crate) total: Duration,
}

impl Answer {
    /// Tokens per second after the first one.
    pub(crate) fn rate(&self) -> Option<f64> {
        let seconds = (self.total - self.first_token).as_secs_f64();
        (self.tokens > 1 && seconds > 0.0).then(|| (self.tokens - 1) as f64 / seconds)
    }
}

/// Asks `question` at the OpenAI-compatible service at `url`.
pub(crate) async fn ask(url: &str, model: &str, question: &str) -> Result<Answer> {
    let body = json!({
        "model": model,
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question},
        ],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    let client = reqwest::Client::builder().no_proxy().build()?;
    let started = Instant::now();
    let response = client
        .post(format!("{url}/v1/chat/completions"))
        .json(&body)
        .send()
        .await?;
    let status = response.status();
    if !status.is_success() {
        bail!("the service answered {status}: {}", response.text().await?);
    }
    let mut answer = Answer {
        text: String::new(),
        tokens: 0,
        first_token: Duration::ZERO,
        total: Duration::ZERO,
    };
    let mut pieces = response.bytes_stream();
    let mut pending = Vec::new();
    let mut done = false;
    while let Some(piece) = pieces.next().await {
        pending.extend_from_slice(&piece?);
        while let Some(end) = pending.windows(2).position(|w| w == b"\n\n") {
            let event: Vec<u8> = pending.drain(..end + 2).collect();
            let event = std::str::from_utf8(&event)?.trim();
            let data = event.strip_prefix("data: ").context("an event has data")?;
            if data == "[DONE]" {
                done = true;
                continue;
            }
            let object: Value = serde_json::from_str(data)?;
            if let Some(error) = object.get("error") {
                bail!("the service failed in the middle: {error}");
            }
            if let Some(usage) = object.get("usage").filter(|usage| !usage.is_null()) {
                answer.tokens = usage["completion_tokens"].as_u64().unwrap_or(0);
            }
            let text = object["choices"][0]["delta"]["content"]
                .as_str()
                .unwrap_or("");
            if !text.is_empty() {
                if answer.text.is_empty() {
                    answer.first_token = started.elapsed();
                }
                answer.text.push_str(text);
                answer.total = started.elapsed();
                print!("{}", style(text).green());
                std::io::stdout().flush()?;
            }
        }
    }
    println!();
    if !done {
        bail!("the answer was cut short");
    }
    if answer.text.is_empty() {
        bail!("the answer is empty");
    }
    Ok(answer)
}
