//! What an attacker can ask: the API of the enclave over the model in this process, or a service somewhere. Both by the
//! same requests of OpenAI's API, and both read from nothing but the answers.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::Request;
use casemate_container::{DataKey, ModelDigest};
use casemate_enclave::api::{Extraction, PerturbationKey, router};
use casemate_engine::Tokenizer;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::victim::{BATCH, NAME, Victim};

/// Largest answer that is read.
const MAX_ANSWER: usize = 16 << 20;
/// Longest wait for an answer of a service elsewhere.
const PATIENCE: Duration = Duration::from_secs(120);

/// Somewhere to ask.
pub(crate) enum Service {
    /// The enclave's API in this process.
    Inside(Router),
    /// An endpoint of OpenAI's API.
    Elsewhere {
        client: reqwest::Client,
        url: String,
        name: String,
        key: Option<String>,
    },
}

/// One question.
#[derive(Clone, Debug)]
pub(crate) struct Query {
    pub(crate) prompt: Vec<u32>,
    pub(crate) tokens: usize,
    pub(crate) seed: u64,
    /// Alternatives to ask for at each position.
    pub(crate) top: Option<u8>,
}

/// Likely tokens with the log-probabilities that were told.
pub(crate) type Told = Vec<(u32, f32)>;

/// An answer, as far as an attacker can read it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<u32>,
    /// For each token, what was told of the alternatives there; empty where nothing was asked for.
    pub(crate) told: Vec<Told>,
    /// Tokens that were counted, of the prompt and the answer.
    pub(crate) spent: u64,
}

impl Service {
    /// The API over `victim`, under a policy. The key of the noise is as secret as a provider's.
    pub(crate) fn inside(victim: &Victim, policy: Extraction) -> Self {
        let digest = ModelDigest([0; 32]);
        let key = PerturbationKey::derive(&DataKey::generate(), &digest);
        Self::Inside(router(victim.api.clone().with_extraction(policy, key)))
    }

    pub(crate) fn elsewhere(url: &str, name: &str, key: Option<String>) -> Result<Self> {
        let client = reqwest::Client::builder().timeout(PATIENCE).build()?;
        Ok(Self::Elsewhere {
            client,
            url: format!("{}/completions", url.trim_end_matches('/')),
            name: name.to_owned(),
            key,
        })
    }

    /// Asks everything, several at a time; answers in the order of the questions.
    pub(crate) async fn ask_all(
        &self,
        words: &Words<'_>,
        queries: &[Query],
    ) -> Result<Vec<Answer>> {
        stream::iter(queries)
            .map(|query| self.ask(words, query))
            .buffered(BATCH)
            .try_collect()
            .await
    }

    async fn ask(&self, words: &Words<'_>, query: &Query) -> Result<Answer> {
        let name = match self {
            Self::Inside(_) => NAME,
            Self::Elsewhere { name, .. } => name,
        };
        let mut body = json!({
            "model": name,
            "prompt": query.prompt,
            "max_tokens": query.tokens,
            "temperature": 1,
            "seed": query.seed,
        });
        if let Some(top) = query.top {
            body["logprobs"] = json!(top);
        }
        let (status, bytes) = self.post(body.to_string()).await?;
        let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        ensure!(
            status == 200,
            "the service answers {status}: {}",
            value["error"]["message"]
                .as_str()
                .unwrap_or("nothing that can be read")
        );
        words.read(&value, query)
    }

    async fn post(&self, body: String) -> Result<(u16, Vec<u8>)> {
        match self {
            Self::Inside(router) => {
                let request = Request::post("/v1/completions").body(Body::from(body))?;
                let response = router.clone().oneshot(request).await?;
                let status = response.status().as_u16();
                let bytes = to_bytes(response.into_body(), MAX_ANSWER).await?;
                Ok((status, bytes.to_vec()))
            }
            Self::Elsewhere {
                client, url, key, ..
            } => {
                let request = client.post(url).header("content-type", "application/json");
                let request = match key {
                    Some(key) => request.bearer_auth(key),
                    None => request,
                };
                let response = request.body(body).send().await;
                let response = response.with_context(|| format!("cannot ask {url}"))?;
                let status = response.status().as_u16();
                let mut pieces = response.bytes_stream();
                let mut bytes = Vec::new();
                while let Some(piece) = pieces.try_next().await? {
                    bytes.extend_from_slice(&piece);
                    ensure!(bytes.len() <= MAX_ANSWER, "the answer is too large");
                }
                Ok((status, bytes))
            }
        }
    }
}

/// From texts back to tokens, which an attacker knows: tokenizers are rarely secret.
pub(crate) struct Words<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens by their texts. Of two with one text the later: those that stand for a single byte come first.
    ids: HashMap<String, u32>,
}

impl<'a> Words<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, vocab: u32) -> Self {
        let whole = |id| str::from_utf8(tokenizer.token_bytes(id)).ok();
        let ids = (0..vocab).filter_map(|id| Some((whole(id)?.to_owned(), id)));
        let ids = ids.filter(|(text, _)| !text.is_empty()).collect();
        Self { tokenizer, ids }
    }

    fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// Tokens by what is told of them, up to one that is a part of a character; where nothing is told, by the text alone.
    fn read(&self, answer: &Value, query: &Query) -> Result<Answer> {
        let choice = &answer["choices"][0];
        let text = choice["text"].as_str().context("the answer has no text")?;
        let usage = |name: &str| answer["usage"][name].as_u64();
        let spent = usage("prompt_tokens").zip(usage("completion_tokens"));
        let (prompt, completion) = spent.context("the answer does not say its usage")?;
        let mut read = Answer {
            tokens: Vec::new(),
            told: Vec::new(),
            spent: prompt + completion,
        };
        if query.top.is_some() {
            let logprobs = &choice["logprobs"];
            let column = |name: &str| logprobs[name].as_array();
            let columns = column("tokens").zip(column("top_logprobs"));
            let (tokens, tops) = columns.context("the answer has no log-probabilities")?;
            if tokens.len() != tops.len() {
                bail!("the answer has columns of different lengths");
            }
            let ids = tokens.iter().map_while(|token| self.id(token.as_str()?));
            read.tokens = ids.collect();
            read.told = tops.iter().map(|top| self.told(top)).collect();
            read.told.truncate(read.tokens.len());
            return Ok(read);
        }
        // The tokenizer may put a space before a text; an answer goes on inside of one.
        read.tokens = self.tokens_behind(&query.prompt, text)?;
        Ok(read)
    }

    fn told(&self, top: &Value) -> Told {
        let entries = top.as_object().into_iter().flatten();
        entries
            .filter_map(|(text, value)| Some((self.id(text)?, value.as_f64()? as f32)))
            .filter(|(_, value)| *value > -1000.0)
            .collect()
    }

    /// The tokens of a text that follows a prompt: those of both together, where they begin with the prompt's.
    fn tokens_behind(&self, prompt: &[u32], text: &str) -> Result<Vec<u32>> {
        let whole = self.tokenizer.decode(prompt) + text;
        let tokens = self.tokenizer.encode(&whole, true)?;
        match tokens.strip_prefix(prompt) {
            Some(behind) => Ok(behind.to_vec()),
            // At the seam the tokens differ; those of the text alone are nearly the same.
            None => Ok(self.tokenizer.encode(text, false)?),
        }
    }
}
