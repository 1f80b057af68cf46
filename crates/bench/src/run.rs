//! The protocol: which loads are put on an engine in which order, and what of the times becomes which figure.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use casemate_container::ModelSource;
use casemate_engine::{Engine, EngineOptions};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::drive::{self, Answer, Load};
use crate::exit::Usage;
use crate::limits::{Arithmetic, Limits};
use crate::load::{self, Needed};
use crate::machine::Machine;
use crate::memory::Peak;
use crate::options::{self, Args, Checked};
use crate::protected::{self, Pairs};
use crate::report::{
    BatchPoint, ComputeShares, ContextPoint, FORM, FormatResult, Latency, Memory, ModelFacts,
    Program, Protocol, Report, Skipped, Throughput, roofline,
};
use crate::statistics::{self, Summary};
use crate::syscalls;

/// Measures everything that `args` ask for.
pub(crate) fn run(args: &Args) -> Result<Report> {
    let Checked {
        origin,
        compute,
        named,
        kv_type,
        protocol,
        pairs,
    } = args.check()?;
    let started = OffsetDateTime::now_utc();
    let machine = Machine::describe();
    let mut facts = None;
    let mut skipped = Vec::new();
    let mut fitting = Vec::new();
    for compute in compute {
        let source = origin.source(compute)?;
        facts.get_or_insert_with(|| facts_of(&*source, &origin.to_string()));
        check_context(&protocol, source.config().context as usize)?;
        let options = options::engine(compute, kv_type);
        let needed = Needed::new(
            &*source,
            &options,
            positions(&protocol, source.config().context as usize),
            args.scratch.is_none(),
        )?;
        match load::check_encodings(&*source, compute).and_then(|()| load::check_memory(&needed)) {
            Ok(()) => fitting.push(options),
            Err(error) if named => return Err(error.into()),
            Err(error) => skipped.push(Skipped {
                compute: compute.name().into(),
                why: error.0,
            }),
        }
    }
    let model = facts.context("there is at least one format")?;
    note("limits of this machine");
    let mut limits = Limits::measure(protocol.threads)?;
    let mut formats = Vec::new();
    for options in &fitting {
        let source = origin.source(options.compute)?;
        let mut run = Run::load(source, options.clone(), &protocol, args, &mut limits)?;
        formats.push(run.measure()?);
    }
    ensure!(
        !formats.is_empty(),
        Usage(format!(
            "no format fits: {}",
            skipped
                .iter()
                .map(|s| s.why.as_str())
                .collect::<Vec<_>>()
                .join("; ")
        ))
    );
    let protected = match (pairs, fitting.first()) {
        (Some(pairs), Some(options)) => {
            let load = protocol.throughput;
            let pairs = Pairs {
                compute: options.compute,
                kv_type: options.kv_type(),
                threads: protocol.threads,
                prompt: load.prompt,
                tokens: load.tokens,
                pairs,
            };
            Some(protected::run(&origin, args.scratch.as_deref(), pairs)?)
        }
        _ => None,
    };
    Ok(Report {
        form: FORM,
        program: program(started),
        machine,
        protocol,
        model,
        limits,
        formats,
        skipped,
        protected,
    })
}

fn program(started: OffsetDateTime) -> Program {
    let arguments = std::env::args().skip(1);
    let command = ["casemate".to_owned(), "bench".to_owned()]
        .into_iter()
        .chain(arguments);
    Program {
        version: env!("CARGO_PKG_VERSION").into(),
        commit: env!("CASEMATE_COMMIT").into(),
        profile: if cfg!(debug_assertions) {
            "debug"
        } else {
            "release"
        }
        .into(),
        command: command.collect::<Vec<_>>().join(" "),
        started: started.format(&Rfc3339).unwrap_or_default(),
    }
}

fn facts_of(source: &dyn ModelSource, origin: &str) -> ModelFacts {
    let c = source.config();
    ModelFacts {
        name: source.name().into(),
        origin: origin.into(),
        parameters: load::parameters(source),
        hidden: c.hidden,
        layers: c.layers,
        heads: c.heads,
        kv_heads: c.kv_heads,
        ffn: c.ffn,
        vocab: c.vocab,
        context: c.context,
        operations_per_token: load::linear_operations(c).0,
    }
}

/// Refuses prompts that the model has no room for. Contexts beyond it are left out by name instead, because their list has
/// a default.
fn check_context(protocol: &Protocol, context: usize) -> Result<(), Usage> {
    let Load { prompt, tokens, .. } = protocol.throughput;
    if prompt + tokens > context {
        return Err(Usage(format!(
            "--prompt {prompt} and --tokens {tokens} are {} together, but the model's context holds {context}",
            prompt + tokens
        )));
    }
    if protocol
        .contexts
        .iter()
        .all(|c| c + protocol.curve_tokens > context)
    {
        return Err(Usage(format!(
            "--contexts: each needs room for {} tokens more, and the model's context holds {context}",
            protocol.curve_tokens
        )));
    }
    Ok(())
}

/// Every load of the protocol that the context has room for.
fn loads(protocol: &Protocol, context: usize) -> Vec<Load> {
    let mut loads = vec![protocol.throughput];
    let contexts = protocol.contexts.iter();
    loads.extend(contexts.map(|&prompt| Load::single(prompt, protocol.curve_tokens)));
    loads.extend(protocol.batches.iter().map(|&batch| Load {
        batch,
        ..Load::single(protocol.curve_prompt, protocol.curve_tokens)
    }));
    loads.push(Load::single(
        protocol.curve_prompt,
        protocol.traced_tokens * 4,
    ));
    loads.retain(|load| load.prompt + load.tokens <= context);
    loads
}

/// Positions that the largest of them needs.
fn positions(protocol: &Protocol, context: usize) -> u64 {
    let most = loads(protocol, context).iter().map(Load::positions).max();
    most.unwrap_or(0) as u64
}

/// One format being measured.
struct Run<'a> {
    engine: Engine,
    kv_type: &'static str,
    loaded: load::Loaded,
    peak: Peak,
    protocol: &'a Protocol,
    limits: &'a mut Limits,
    memory: Memory,
    operations: (u64, u64),
    /// So that no two prompts of a run begin alike.
    seed: u64,
}

impl<'a> Run<'a> {
    fn load(
        source: Box<dyn ModelSource>,
        options: EngineOptions,
        protocol: &'a Protocol,
        args: &Args,
        limits: &'a mut Limits,
    ) -> Result<Run<'a>> {
        let (format, kv_type) = (options.compute.name(), options.kv_type());
        note(&format!("{format}: loading"));
        let config = source.config().clone();
        let context = config.context as usize;
        let loads = loads(protocol, context);
        let longest = loads.iter().map(|l| l.prompt + l.tokens).max().unwrap_or(2);
        // Whole pages for each sequence, and a page more; the engine takes no more than its batch can use.
        let position = load::kv_position_bytes(&config, kv_type)?;
        let rounding = protocol
            .batches
            .iter()
            .copied()
            .max()
            .unwrap_or(1)
            .max(protocol.throughput.sequences()) as u64
            * 128;
        let kv_bytes = position * (positions(protocol, context).max(longest as u64) + rounding);
        let max_batch = loads.iter().map(Load::sequences).max().unwrap_or(1);
        let options = EngineOptions {
            threads: protocol.threads,
            max_context: longest,
            max_batch,
            max_waiting: max_batch,
            kv_bytes: Some(kv_bytes),
            ..options
        };
        let (engine, loaded, peak) = load::load(source, args.scratch.as_deref(), &options)?;
        let memory = Memory {
            weights: engine.weight_bytes(),
            kv: engine.stats().kv_bytes,
            peak: 0,
            huge: engine.weight_memory().map(|granted| granted.huge),
            per_pass: engine.bytes_per_pass(),
            kv_per_position: engine.kv_bytes_per_position(),
        };
        Ok(Run {
            kv_type: kv_type.name(),
            operations: load::linear_operations(engine.config()),
            engine,
            loaded,
            peak,
            protocol,
            limits,
            memory,
            seed: 0,
        })
    }

    fn measure(&mut self) -> Result<FormatResult> {
        // Once, so that everything has been touched.
        self.answers(Load::single(self.protocol.curve_prompt, 4))?;
        let latency = self.latency()?;
        let throughput = self.throughput()?;
        let (contexts, beyond) = self.contexts()?;
        let curve = self.curve()?;
        self.note("system calls");
        let (prompt, tokens) = (self.protocol.curve_prompt, self.protocol.traced_tokens);
        let engine = &self.engine;
        let system_calls = self
            .peak
            .without(|| Ok(syscalls::measure(engine, prompt, tokens)))?;
        let memory = Memory {
            peak: self.peak.bytes()?,
            ..self.memory.clone()
        };
        Ok(FormatResult {
            compute: self.engine.compute_name().into(),
            kv_type: self.kv_type.into(),
            load: self.loaded.clone(),
            memory,
            latency,
            throughput,
            contexts,
            beyond,
            curve,
            system_calls,
        })
    }

    fn note(&self, what: &str) {
        note(&format!("{}: {what}", self.engine.compute_name()));
    }

    fn answers(&mut self, load: Load) -> Result<Vec<Answer>> {
        self.seed += 1;
        drive::run(&self.engine, load, self.seed, None)
    }

    fn read_now(&mut self) -> Result<f64> {
        let (limits, threads) = (&mut *self.limits, self.protocol.threads);
        self.peak.without(|| limits.read_now(threads))
    }

    fn latency(&mut self) -> Result<Latency> {
        let Load { prompt, tokens, .. } = self.protocol.throughput;
        let runs = self.protocol.latency_tokens.div_ceil(tokens - 1);
        let (mut samples, mut first) = (Vec::new(), Vec::new());
        let before = self.read_now()?;
        for run in 1..=runs {
            self.note(&format!("latency, {run} of {runs}"));
            let answers = self.answers(Load::single(prompt, tokens))?;
            first.push(answers[0].first_token() * 1e3);
            samples.extend(answers[0].gaps().map(|gap| gap * 1e3));
        }
        let read = f64::midpoint(before, self.read_now()?);
        let summary = |samples: &[f64]| Summary::of(samples).context("there are samples");
        let (next_token, first_token) = (summary(&samples)?, summary(&first)?);
        let context = prompt as f64 + tokens as f64 / 2.0;
        Ok(Latency {
            prefill: prompt as f64 * 1e3 / first_token.median,
            prefill_shares: self.prefill_shares(prompt, first_token.median / 1e3),
            decode_share: 1e3 / next_token.median / roofline(&self.memory, 1, context, read),
            next_token,
            samples: samples.iter().map(|ms| (ms * 1e4).round() / 1e4).collect(),
            first_token,
        })
    }

    fn throughput(&mut self) -> Result<Throughput> {
        let load = self.protocol.throughput;
        let tokens = load.batch * load.tokens;
        let runs = self.protocol.latency_tokens.div_ceil(tokens);
        let (mut seconds, mut rates) = (Vec::new(), Vec::new());
        let before = self.read_now()?;
        for run in 1..=runs {
            self.note(&format!(
                "throughput of {} requests, {run} of {runs}",
                load.batch
            ));
            let started = Instant::now();
            let answers = self.answers(load)?;
            seconds.push(started.elapsed().as_secs_f64());
            if load.beam == 1 {
                // Answers that were searched for come as a whole.
                rates.extend(drive::rate_together(&answers));
            }
        }
        let read = f64::midpoint(before, self.read_now()?);
        let context = load.prompt as f64 + load.tokens as f64 / 2.0;
        let decode = (!rates.is_empty()).then(|| statistics::median(&rates));
        Ok(Throughput {
            runs,
            tokens_per_second: tokens as f64 / statistics::median(&seconds),
            decode,
            decode_share: decode
                .map(|rate| rate / roofline(&self.memory, load.batch, context, read)),
            seconds,
        })
    }

    fn contexts(&mut self) -> Result<(Vec<ContextPoint>, Vec<usize>)> {
        let tokens = self.protocol.curve_tokens;
        let context = self.engine.config().context as usize;
        let (within, beyond) = self
            .protocol
            .contexts
            .iter()
            .copied()
            .partition(|c| c + tokens <= context);
        let within: Vec<usize> = within;
        let mut rounds: Vec<ContextRounds> = within.iter().map(|_| Default::default()).collect();
        let mut before = self.read_now()?;
        for round in 1..=self.rounds() {
            for (&prompt, of) in within.iter().zip(&mut rounds) {
                self.note(&format!("decode at {prompt}, round {round}"));
                let answers = self.answers(Load::single(prompt, tokens))?;
                let after = self.read_now()?;
                let read = f64::midpoint(before, after);
                before = after;
                let gaps: Vec<f64> = answers[0].gaps().map(|gap| gap * 1e3).collect();
                let decode = 1e3 / Summary::of(&gaps).context("there are tokens")?.median;
                let middle = prompt as f64 + tokens as f64 / 2.0;
                of.shares
                    .push(decode / roofline(&self.memory, 1, middle, read));
                of.gaps.extend(gaps);
                of.first.push(answers[0].first_token());
                of.read.push(read);
            }
        }
        let mut points = Vec::new();
        for (prompt, of) in within.into_iter().zip(rounds) {
            let next_token = Summary::of(&of.gaps).context("there are tokens")?;
            let first = statistics::median(&of.first);
            points.push(ContextPoint {
                context: prompt,
                decode: 1e3 / next_token.median,
                decode_share: statistics::median(&of.shares),
                next_token,
                prefill: prompt as f64 / first,
                prefill_shares: self.prefill_shares(prompt, first),
                read: statistics::median(&of.read),
            });
        }
        Ok((points, beyond))
    }

    /// How often contexts, and batches, are gone through: others on the machine change its limits within seconds, so each
    /// must have met the same of them.
    fn rounds(&self) -> usize {
        if self.protocol.quick { 1 } else { 3 }
    }

    fn curve(&mut self) -> Result<Vec<BatchPoint>> {
        let (prompt, tokens) = (self.protocol.curve_prompt, self.protocol.curve_tokens);
        let batches = self.protocol.batches.clone();
        let context = prompt as f64 + tokens as f64 / 2.0;
        let mut rounds: Vec<BatchRounds> = batches.iter().map(|_| Default::default()).collect();
        let mut before = self.read_now()?;
        for round in 1..=self.rounds() {
            for (&batch, of) in batches.iter().zip(&mut rounds) {
                self.note(&format!("a batch of {batch}, round {round}"));
                let load = Load {
                    batch,
                    ..Load::single(prompt, tokens)
                };
                let answers = self.answers(load)?;
                let after = self.read_now()?;
                let read = f64::midpoint(before, after);
                before = after;
                let decode = drive::rate_together(&answers).with_context(|| {
                    format!("{batch} requests of {tokens} tokens never generated at the same time")
                })?;
                let roofline = roofline(&self.memory, batch, context, read);
                of.shares.push(decode / roofline);
                of.decode.push(decode);
                of.roofline.push(roofline);
                of.read.push(read);
            }
        }
        let points = batches
            .into_iter()
            .zip(rounds)
            .map(|(batch, of)| BatchPoint {
                batch,
                decode: statistics::median(&of.decode),
                decode_share: statistics::median(&of.shares),
                roofline: statistics::median(&of.roofline),
                read: statistics::median(&of.read),
            });
        Ok(points.collect())
    }

    /// Of a prompt that took `seconds` to its first token.
    fn prefill_shares(&self, prompt: usize, seconds: f64) -> ComputeShares {
        let (each, last) = self.operations;
        let rate = (each as f64 * prompt as f64 + last as f64) / seconds / 1e9;
        let limit = self.limits.of(Arithmetic::of(self.engine.compute_name()));
        ComputeShares {
            of_registers: limit.and_then(|limit| Some(rate / limit.registers?)),
            of_product: limit.and_then(|limit| Some(rate / limit.product?)),
        }
    }
}

/// What the rounds measured of one context.
#[derive(Default)]
struct ContextRounds {
    gaps: Vec<f64>,
    first: Vec<f64>,
    shares: Vec<f64>,
    read: Vec<f64>,
}

/// What the rounds measured of one batch.
#[derive(Default)]
struct BatchRounds {
    decode: Vec<f64>,
    shares: Vec<f64>,
    roofline: Vec<f64>,
    read: Vec<f64>,
}

/// Says on standard error what is being done.
pub(crate) fn note(what: &str) {
    eprintln!("· {what}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn protocol() -> Protocol {
        Protocol {
            threads: 1,
            throughput: Load {
                batch: 6,
                beam: 1,
                prompt: 1024,
                tokens: 128,
            },
            latency_tokens: 1000,
            contexts: vec![128, 2048],
            batches: vec![1, 8],
            curve_prompt: 128,
            curve_tokens: 64,
            traced_tokens: 200,
            quick: false,
        }
    }

    #[test]
    fn prompts_beyond_the_context_are_refused_with_the_numbers() {
        let refused = check_context(&protocol(), 1100).unwrap_err().0;
        assert!(
            refused.contains("1152") && refused.contains("1100"),
            "{refused}"
        );
        assert!(check_context(&protocol(), 1152).is_ok());
        let long = Protocol {
            contexts: vec![4000],
            ..protocol()
        };
        assert!(check_context(&long, 2048).unwrap_err().0.contains("2048"));
    }

    #[test]
    fn memory_is_for_the_largest_load_that_fits() {
        // 6 x 1152 beats 8 x 192 and 1 x 2112.
        assert_eq!(positions(&protocol(), 4096), 6 * 1152);
        let mut beams = protocol();
        beams.throughput.beam = 4;
        assert_eq!(positions(&beams, 4096), 6 * (1024 + 4 * 128));
        let single = Protocol {
            throughput: Load::single(1024, 128),
            ..protocol()
        };
        assert_eq!(positions(&single, 4096), 2112);
        assert_eq!(positions(&single, 2048), 8 * 192);
    }
}
