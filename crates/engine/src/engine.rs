//! The engine as its callers see it: load a verified model, submit requests, read counters. The
//! work is done by the scheduler's thread.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use casemate_container::{Adapter, ModelConfig, ModelDigest, Progress};
use casemate_kernels::attention::KvType;
use casemate_kernels::cpu::Isa;
use casemate_kernels::mem::Granted;
use casemate_kernels::panels;
use casemate_kernels::team::{PATIENCE, Team};

use crate::adapters::Adapters;
use crate::chat::ChatTemplate;
use crate::error::{LoadError, SubmitError};
use crate::kv::KvCache;
use crate::model::Model;
use crate::outsource::Outsource;
use crate::request::{Request, RequestId, Sink};
use crate::scheduler::{Command, Evaluation, GUESSES, Mailbox, PROMPT_ROWS, Scheduler};
use crate::sequence::{Limits, Sequence};
use crate::speculation::Speculation;
use crate::tokenizer::Tokenizer;
use crate::weights::{self, Compute};

/// How to run a model.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// The arithmetic of the linear layers.
    pub compute: Compute,
    /// Threads of the team, the scheduler's own among them.
    pub threads: usize,
    /// Longest context served, in tokens; the model's own limit where that is smaller.
    pub max_context: usize,
    /// Most sequences computed together: requests, and of those that search each beam.
    pub max_batch: usize,
    /// Most requests that wait for a place. A [`User`](crate::User) may have as many waiting as more could after them:
    /// half of this alone, a third of it beside another. Those without a user may be all of them.
    pub max_waiting: usize,
    /// Memory for keys and values, in bytes. `None`: enough for `max_batch` full contexts, but at
    /// most 1 GiB or one full context, whichever is more.
    pub kv_bytes: Option<u64>,
    /// How keys and values are stored. `None`: f32 beside the arithmetic of f32, bf16 beside those of bf16
    /// and of int8 by rows, otherwise f16.
    pub kv_type: Option<KvType>,
    /// How long keys and values of a user's prompts and answers stay after their last use, for that
    /// user's next requests; they go sooner where memory is needed. Zero: nothing is reused.
    pub reuse: Duration,
    /// Time since any fixed moment, to tell when that is over.
    pub clock: fn() -> Duration,
    /// How many `pause` instructions the team's threads wait for each other before they sleep: the
    /// longer, the fewer system calls, the more processor time.
    pub patience: u32,
    /// How several tokens of an answer can come from one pass.
    pub speculation: Speculation,
    /// Look up embeddings, choose tokens and turn them into text by touching everything, so that who sees which memory is touched
    /// does not learn tokens from that. The tokens are the same. Not together with [`Speculation::PromptLookup`].
    pub oblivious: bool,
}

impl EngineOptions {
    /// How an engine with these options stores keys and values.
    #[must_use]
    pub fn kv_type(&self) -> KvType {
        self.kv_type.unwrap_or_else(|| usual_kv_type(self.compute))
    }
}

fn usual_kv_type(compute: Compute) -> KvType {
    match compute {
        Compute::F32 => KvType::F32,
        Compute::Bf16 | Compute::Int8Row => KvType::Bf16,
        Compute::Int8 | Compute::Q4G32 => KvType::F16,
    }
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            compute: Compute::Int8,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            max_context: 4096,
            max_batch: 8,
            max_waiting: 256,
            kv_bytes: None,
            kv_type: None,
            reuse: Duration::from_secs(600),
            clock: monotonic,
            patience: PATIENCE,
            speculation: Speculation::None,
            oblivious: false,
        }
    }
}

/// Time since it was first asked for.
fn monotonic() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

/// A loaded model that answers requests. Dropping it cancels what is unfinished and waits for its
/// threads.
pub struct Engine {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
    next_id: AtomicU64,
    tokenizer: Tokenizer,
    chat: Option<ChatTemplate>,
    config: ModelConfig,
    digest: ModelDigest,
    adapters: Arc<Adapters>,
    end_tokens: Vec<u32>,
    compute: String,
    context: usize,
    batch: usize,
    kv_pages: usize,
    kv_page_bytes: u64,
    kv_memory: Option<Granted>,
    kv_bytes_per_position: u64,
    weight_bytes: u64,
    weight_memory: Option<Granted>,
    bytes_per_pass: u64,
    /// Bytes that are read for each step, and for each token, so that no tokens show.
    oblivious: Option<(u64, u64)>,
}

/// Counters since the engine was loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Requests being computed.
    pub running: usize,
    /// Requests accepted but not started, or that gave way and wait to go on.
    pub waiting: usize,
    /// Requests started.
    pub requests: u64,
    /// Requests that ended in an error.
    pub failed: u64,
    /// Prompt tokens computed, each once for its request.
    pub prompt_tokens: u64,
    /// Prompt tokens that were not, because they had been for an earlier request of the same user.
    pub cached_tokens: u64,
    /// Tokens computed again for requests that had given their pages back.
    pub recomputed_tokens: u64,
    /// Times that a running request gave its pages back, to go on later.
    pub preemptions: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Tokens that were guessed and computed along.
    pub guessed_tokens: u64,
    /// Those of them that were right: so many tokens came without a pass of their own.
    pub accepted_tokens: u64,
    /// Prompt tokens of the requests that have ended, each request's rounded up to a power of two: for whom the exact
    /// length of somebody's prompt is none of their business.
    pub coarse_prompt_tokens: u64,
    /// Generated tokens of the requests that have ended, rounded likewise.
    pub coarse_completion_tokens: u64,
    /// Bytes of KV cache that running requests use.
    pub kv_bytes_used: u64,
    /// Bytes of KV cache that nobody uses and that users' next requests may reuse.
    pub kv_bytes_kept: u64,
    /// Bytes of KV cache in all.
    pub kv_bytes: u64,
}

impl Engine {
    /// Converts a model's weights for this machine and starts the threads. The model is consumed:
    /// each tensor's source memory is released as soon as it is converted.
    ///
    /// # Errors
    /// [`LoadError`]: the model contradicts itself, the options do not fit it, or the machine
    /// refused memory or threads.
    pub fn load(
        model: casemate_container::Model,
        options: &EngineOptions,
        progress: &dyn Progress,
    ) -> Result<Self, LoadError> {
        Self::load_with(model, Vec::new(), options, None, progress)
    }

    /// As [`Engine::load`], with adapters to the model, which requests name by their digests
    /// ([`Request::adapter`]), and with layers that somebody else may compute. Adapters are applied
    /// here, whoever computes the layers.
    ///
    /// # Errors
    /// As [`Engine::load`]; [`LoadError::OtherBase`], [`LoadError::Adapter`] and
    /// [`LoadError::AdapterTwice`] for adapters that are not for this model;
    /// [`LoadError::Outsource`] for layers that somebody else would compute in any arithmetic but
    /// [`Compute::Int8Row`].
    pub fn load_with(
        model: casemate_container::Model,
        adapters: Vec<Adapter>,
        options: &EngineOptions,
        outsource: Option<Arc<dyn Outsource>>,
        progress: &dyn Progress,
    ) -> Result<Self, LoadError> {
        if outsource.is_some() && options.compute != Compute::Int8Row {
            return Err(LoadError::Outsource {
                compute: options.compute.name(),
            });
        }
        let config = model.config().clone();
        let digest = model.digest();
        let context = check_options(options, &config)?;
        weights::check_config(&config)?;
        let adapters = Arc::new(Adapters::load(adapters, &config, digest)?);

        let json = model
            .asset("tokenizer.json")
            .ok_or(LoadError::MissingAsset {
                name: "tokenizer.json",
            })?;
        let control: Vec<u32> = config.bos.iter().chain(&config.eos).copied().collect();
        let bos = config.bos.filter(|_| config.add_bos);
        let tokenizer = Tokenizer::for_model(json, config.vocab, bos, &control)?;
        let name = |id: Option<u32>| id.and_then(|id| tokenizer.token_name(id));
        let chat = model
            .asset("chat_template.jinja")
            .map(|source| {
                let eos = name(config.eos.first().copied());
                let control = tokenizer.control_names().clone();
                ChatTemplate::new(source, name(config.bos), eos, control)
            })
            .transpose()?;

        let mut kv = KvCache::new(
            &config,
            options.kv_type(),
            context,
            options.max_batch,
            options.kv_bytes,
            options.reuse,
        )?;
        let kv_memory = kv.memory();
        let (kv_pages, kv_page_bytes) = (kv.pages(), kv.page_bytes());
        let kv_bytes_per_position = kv.bytes_per_position();
        let team = Team::new(options.threads)?;
        team.set_patience(options.patience);
        let weights = weights::load(
            model,
            &config,
            options.compute,
            &team,
            progress,
            outsource.as_deref(),
        )?;
        let (weight_bytes, bytes_per_pass) = (weights.bytes(), weights.bytes_per_pass());
        let weight_memory = weights.memory;
        let pieces = match options.oblivious {
            true => Some(tokenizer.finder()?),
            false => None,
        };
        let oblivious = pieces
            .as_ref()
            .map(|pieces| (weights.embedding_bytes(), pieces.bytes() as u64));
        let lookups = options.speculation.lookups(options.max_batch, context);
        let guesses = if lookups.is_empty() { 0 } else { GUESSES };
        let model = Model::new(
            weights,
            Arc::clone(&adapters),
            &config,
            context,
            PROMPT_ROWS + options.max_batch,
            options.max_batch + guesses,
            team,
        )?;
        let model = match options.oblivious {
            true => model.oblivious()?,
            false => model,
        };

        let mailbox = Arc::new(Mailbox::new(options.max_waiting));
        let (batch, clock) = (options.max_batch, options.clock);
        let scheduler = Scheduler::new(model, kv, Arc::clone(&mailbox), batch, clock, outsource)
            .guessing_by(lookups)
            .finding_pieces_by(pieces);
        let thread = std::thread::Builder::new()
            .name("casemate-engine".into())
            .spawn(move || scheduler.serve())?;
        Ok(Self {
            mailbox,
            thread: Some(thread),
            next_id: AtomicU64::new(1),
            tokenizer,
            chat,
            end_tokens: config.eos.clone(),
            config,
            digest,
            adapters,
            compute: compute_name(options),
            context,
            batch,
            kv_pages,
            kv_page_bytes,
            kv_memory,
            kv_bytes_per_position,
            weight_bytes,
            weight_memory,
            bytes_per_pass,
            oblivious,
        })
    }

    /// The model's tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The model's chat template, if it has one.
    #[must_use]
    pub fn chat(&self) -> Option<&ChatTemplate> {
        self.chat.as_ref()
    }

    /// The model's architecture.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Identity of the model, from its verified container.
    #[must_use]
    pub fn digest(&self) -> ModelDigest {
        self.digest
    }

    /// Identities of the adapters that requests may name.
    #[must_use]
    pub fn adapters(&self) -> Vec<ModelDigest> {
        self.adapters.digests()
    }

    /// Bytes of all adapters.
    #[must_use]
    pub fn adapter_bytes(&self) -> u64 {
        self.adapters.bytes()
    }

    /// Tokens that prompt and answer may have together.
    #[must_use]
    pub fn context(&self) -> usize {
        self.context
    }

    /// Name of the arithmetic for keysets and receipts: that of the linear layers, `f32`, `bf16`,
    /// `int8-g32`, `int8-row` or `q4-g32`, and behind it how keys and values are stored where that is not the usual,
    /// such as `int8-g32+kv-int8`.
    #[must_use]
    pub fn compute_name(&self) -> &str {
        &self.compute
    }

    /// Bytes of converted weights, embedding table included.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// What the kernel made of the memory that the packed matrices lie in. `None` where it does not
    /// say (no `/proc`).
    #[must_use]
    pub fn weight_memory(&self) -> Option<Granted> {
        self.weight_memory
    }

    /// As [`Self::weight_memory`] for the KV cache, of which only a first page exists at this time:
    /// the others come as they are used.
    #[must_use]
    pub fn kv_memory(&self) -> Option<Granted> {
        self.kv_memory
    }

    /// Bytes of weights that a forward pass reads, however many requests it computes: memory
    /// bandwidth divided by this is the limit of tokens per second and request.
    #[must_use]
    pub fn bytes_per_pass(&self) -> u64 {
        self.bytes_per_pass
    }

    /// Where tokens are hidden from who sees which memory is touched ([`EngineOptions::oblivious`]): bytes of the embedding table,
    /// which are read for every 32 rows of a step or part of it, and bytes of the tokens' texts, which are read for each generated
    /// token.
    #[must_use]
    pub fn oblivious_bytes(&self) -> Option<(u64, u64)> {
        self.oblivious
    }

    /// Bytes of keys and values that a request's next token reads for each position before it.
    #[must_use]
    pub fn kv_bytes_per_position(&self) -> u64 {
        self.kv_bytes_per_position
    }

    /// Starts a request as soon as there is room. `sink` is called on the engine's thread for every
    /// event and must not block; a slow sink slows every request down.
    ///
    /// # Errors
    /// [`SubmitError`]: nothing was started and the sink will not be called.
    pub fn submit(&self, request: Request, sink: Sink) -> Result<RequestId, SubmitError> {
        let sequence = self.sequence(request, sink)?;
        let id = sequence.id;
        self.mailbox.post(Command::Run(sequence))?;
        Ok(id)
    }

    /// As [`Self::submit`] for several requests, none of which starts before all of them wait: as far as there is room,
    /// the same step begins them. Those with the same prompt, user and adapter read it once, also without a user, as far as they
    /// run at the same time.
    ///
    /// # Errors
    /// [`SubmitError`], of any of them: none was started and no sink will be called.
    pub fn submit_together(
        &self,
        requests: Vec<(Request, Sink)>,
    ) -> Result<Vec<RequestId>, SubmitError> {
        let mut together: Vec<Box<Sequence>> = Vec::new();
        for (request, sink) in requests {
            let mut sequence = self.sequence(request, sink)?;
            let same = together.iter_mut().find(|s| s.can_share(&sequence));
            if let Some(first) = same {
                first.read_with(first.id);
                sequence.read_with(first.id);
            }
            together.push(sequence);
        }
        let ids = together.iter().map(|sequence| sequence.id).collect();
        let commands: Vec<_> = together.into_iter().map(Command::Run).collect();
        self.mailbox.post_together(commands)?;
        Ok(ids)
    }

    fn sequence(&self, request: Request, sink: Sink) -> Result<Box<Sequence>, SubmitError> {
        let id = RequestId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let limits = Limits {
            context: self.context,
            vocab: self.config.vocab,
            end_tokens: &self.end_tokens,
            adapters: &self.adapters,
            batch: self.batch,
            pages: self.kv_pages,
            page_bytes: self.kv_page_bytes,
            oblivious: self.oblivious.is_some(),
        };
        let sequence = Sequence::new(id, request, &limits, &self.tokenizer, sink)?;
        Ok(Box::new(sequence))
    }

    /// Ends a request at the next step, also one that waits or still reads its prompt. Its sink
    /// hears `Cancelled`, unless it was over already.
    pub fn cancel(&self, id: RequestId) {
        // Refused only by a stopping engine, which cancels everything anyway.
        let _ = self.mailbox.post(Command::Cancel(id));
    }

    /// Computes the logits after each position of `tokens` and calls `row(position, logits)` in
    /// order. For measurements: it waits for running requests and delays those that come later.
    ///
    /// # Errors
    /// [`SubmitError`], for an empty text, one longer than the context, or an unknown token;
    /// [`SubmitError::Stopped`] also if the computation failed.
    pub fn evaluate(
        &self,
        tokens: &[u32],
        row: impl FnMut(usize, &[f32]),
    ) -> Result<(), SubmitError> {
        self.evaluate_with(None, tokens, row)
    }

    /// As [`Self::evaluate`], under an adapter.
    ///
    /// # Errors
    /// As [`Self::evaluate`], and [`SubmitError::UnknownAdapter`].
    pub fn evaluate_with(
        &self,
        adapter: Option<ModelDigest>,
        tokens: &[u32],
        mut row: impl FnMut(usize, &[f32]),
    ) -> Result<(), SubmitError> {
        let adapter = adapter.map(|digest| self.adapters.find(digest));
        let adapter = adapter.transpose()?;
        if tokens.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if tokens.len() > self.context {
            return Err(SubmitError::PromptTooLong {
                prompt: tokens.len(),
                context: self.context,
            });
        }
        if let Some(&id) = tokens.iter().find(|&&id| id >= self.config.vocab) {
            return Err(SubmitError::UnknownToken {
                id,
                vocab: self.config.vocab,
            });
        }
        let (sender, rows) = sync_channel(8);
        self.mailbox.post(Command::Evaluate(Evaluation {
            tokens: tokens.to_vec(),
            adapter,
            rows: sender,
        }))?;
        let mut position = 0;
        while let Ok(logits) = rows.recv() {
            row(position, &logits);
            position += 1;
        }
        if position == tokens.len() {
            Ok(())
        } else {
            Err(SubmitError::Stopped)
        }
    }

    /// Counters at this moment.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let c = &self.mailbox.counters;
        Stats {
            running: c.running.load(Ordering::Relaxed),
            waiting: c.waiting.load(Ordering::Relaxed),
            requests: c.requests.load(Ordering::Relaxed),
            failed: c.failed.load(Ordering::Relaxed),
            prompt_tokens: c.prompt_tokens.load(Ordering::Relaxed),
            completion_tokens: c.completion_tokens.load(Ordering::Relaxed),
            guessed_tokens: c.guessed_tokens.load(Ordering::Relaxed),
            accepted_tokens: c.accepted_tokens.load(Ordering::Relaxed),
            cached_tokens: c.cached_tokens.load(Ordering::Relaxed),
            recomputed_tokens: c.recomputed_tokens.load(Ordering::Relaxed),
            preemptions: c.preemptions.load(Ordering::Relaxed),
            coarse_prompt_tokens: c.coarse_prompt_tokens.load(Ordering::Relaxed),
            coarse_completion_tokens: c.coarse_completion_tokens.load(Ordering::Relaxed),
            kv_bytes_used: c.kv_bytes_used.load(Ordering::Relaxed),
            kv_bytes_kept: c.kv_bytes_kept.load(Ordering::Relaxed),
            kv_bytes: self.kv_pages as u64 * self.kv_page_bytes,
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.mailbox.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the scheduler itself has been printed; there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

fn compute_name(options: &EngineOptions) -> String {
    let (compute, kv_type) = (options.compute, options.kv_type());
    let name = match compute {
        // In which order sums are taken is a part of what was computed.
        Compute::Bf16 => panels::bf16_name(Isa::detect()),
        other => other.name(),
    };
    if kv_type == usual_kv_type(compute) {
        name.to_owned()
    } else {
        format!("{name}+kv-{}", kv_type.name())
    }
}

/// The context to serve.
fn check_options(options: &EngineOptions, config: &ModelConfig) -> Result<usize, LoadError> {
    if options.oblivious && options.speculation != Speculation::None {
        return Err(LoadError::Guesses);
    }
    let within = |option, value: usize, low: usize, high: usize, rule| {
        if (low..=high).contains(&value) {
            Ok(value)
        } else {
            Err(LoadError::Option {
                option,
                value: value as u64,
                rule,
            })
        }
    };
    within(
        "threads",
        options.threads,
        1,
        casemate_kernels::team::MAX_THREADS,
        "it must be from 1 to 1024",
    )?;
    within(
        "max_batch",
        options.max_batch,
        1,
        1024,
        "it must be from 1 to 1024",
    )?;
    within(
        "max_waiting",
        options.max_waiting,
        1,
        1 << 20,
        "it must be from 1 to 1048576",
    )?;
    within(
        "max_context",
        options.max_context.min(config.context as usize),
        2,
        usize::MAX,
        "it must be at least 2",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compute_name_tells_how_keys_and_values_are_stored_unless_it_is_the_usual() {
        let name = |compute, kv_type| {
            compute_name(&EngineOptions {
                compute,
                kv_type,
                ..EngineOptions::default()
            })
        };
        assert_eq!(name(Compute::Int8, None), "int8-g32");
        assert_eq!(name(Compute::Int8, Some(KvType::F16)), "int8-g32");
        assert_eq!(name(Compute::Int8, Some(KvType::Int8)), "int8-g32+kv-int8");
        assert_eq!(name(Compute::F32, None), "f32");
        assert_eq!(name(Compute::Bf16, None), "bf16");
        assert_eq!(name(Compute::F32, Some(KvType::Bf16)), "f32+kv-bf16");
    }

    #[test]
    fn engines_can_be_shared_between_threads() {
        fn shared<T: Send + Sync + 'static>() {}
        shared::<Engine>();
    }
}
