//! What `casemate bench` can be asked for, and the checks that need no model.

use std::path::PathBuf;

use casemate_engine::{Compute, EngineOptions, KvType};
use casemate_kernels::team::MAX_THREADS;
use clap::builder::{PossibleValuesParser, TypedValueParser as _};

use crate::drive::{self, Load};
use crate::exit::Usage;
use crate::load::Origin;
use crate::machine;
use crate::protected::LEAST_PAIRS;
use crate::report::Protocol;
use crate::synthetic::Shape;

/// What the program does, in one line.
pub(crate) const ABOUT: &str = "Measure a model on this machine, beside the machine's limits";
/// The same at length.
pub(crate) const LONG_ABOUT: &str = "Measure a model on this machine, beside the machine's limits.\n\n\
    The paper's protocol (\"Fortify Your Foundations\"): 1024 tokens in, 128 out, throughput of a batch of 6, next-token \
    latency of a single request over at least 1000 tokens, outliers (|Z| > 3) dropped and counted. Then time to the \
    first token, prefill and decode over the context, the batch curve, load time, memory, system calls per token. \
    Every figure stands beside what this machine could do at most, measured in the same run.";

/// Options of a measurement.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A GGUF file or a Hugging Face directory.
    #[arg(conflicts_with = "synthetic", required_unless_present = "synthetic")]
    model: Option<PathBuf>,
    /// Random weights of a published shape instead of a model; the same each time.
    #[arg(long, value_name = "SHAPE")]
    synthetic: Option<Shape>,
    /// Arithmetic of the linear layers, by name; several separated by commas [default: every one that fits].
    #[arg(long, value_delimiter = ',', value_name = "FORMAT")]
    compute: Vec<String>,
    /// How keys and values are stored [default: f32 beside f32, bf16 beside bf16 and int8-row, otherwise f16].
    #[arg(long, value_name = "TYPE", value_parser = kv_types())]
    kv_type: Option<KvType>,
    /// Compute threads [default: as many as the machine runs at once].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Tokens of a prompt for latency and throughput.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    prompt: usize,
    /// Tokens to generate after it.
    #[arg(long, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Requests at once for throughput.
    #[arg(long, value_name = "N", default_value_t = 6)]
    batch: usize,
    /// Beams of each of them, at most 32. The paper has 4; with more than 1 the answer comes as a whole.
    #[arg(long, value_name = "N", default_value_t = 1)]
    beam: usize,
    /// Least number of tokens behind the latency.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    latency_tokens: usize,
    /// Prompts after which decoding is measured, in tokens.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N",
        default_value = "128,512,1024,2048"
    )]
    contexts: Vec<usize>,
    /// Sizes of batches for the batch curve.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N",
        default_value = "1,2,3,4,5,6,7,8"
    )]
    batches: Vec<usize>,
    /// A smoke run: prompts of 64, 16 tokens, contexts to 128, batches to 3. The report says that its figures mean little.
    #[arg(long, conflicts_with_all = ["prompt", "tokens", "latency_tokens", "contexts", "batches"])]
    quick: bool,
    /// Where the sealed copy of the model lies while it is opened [default: memory].
    #[arg(long, value_name = "DIR")]
    pub(crate) scratch: Option<PathBuf>,
    /// Also put the same load on a whole deployment (sealed model, attestation, encrypted channel, receipts; a fake TEE) and
    /// on the bare API in turns, in the first format, and compare.
    #[arg(long)]
    protected: bool,
    /// Pairs of requests for that, at least 20.
    #[arg(long, value_name = "N", default_value_t = LEAST_PAIRS, requires = "protected")]
    pairs: usize,
    /// Print the report as JSON.
    #[arg(long, conflicts_with = "csv")]
    pub(crate) json: bool,
    /// Print every figure as one line of CSV.
    #[arg(long)]
    pub(crate) csv: bool,
    /// Also write a report with plots.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}

/// Options that go together.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) origin: Origin,
    pub(crate) compute: Vec<Compute>,
    /// Whether the formats were named: then one that does not fit is an error, not left out.
    pub(crate) named: bool,
    /// How keys and values are stored, if that was asked for.
    pub(crate) kv_type: Option<KvType>,
    pub(crate) protocol: Protocol,
    /// Pairs of requests to compare protection with none.
    pub(crate) pairs: Option<usize>,
}

impl Args {
    /// Refuses what no model and no machine can do.
    pub(crate) fn check(&self) -> Result<Checked, Usage> {
        let cores = machine::cores();
        let threads = self.threads.unwrap_or(cores);
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(Usage(format!(
                "--threads {threads}: it must be from 1 to {MAX_THREADS}; this machine runs {cores} at once"
            )));
        }
        drive::check_beam(self.beam)?;
        let mut protocol = Protocol {
            threads,
            throughput: Load {
                batch: self.batch,
                beam: self.beam,
                prompt: self.prompt,
                tokens: self.tokens,
            },
            latency_tokens: self.latency_tokens,
            contexts: self.contexts.clone(),
            batches: self.batches.clone(),
            curve_prompt: 128,
            curve_tokens: 64,
            traced_tokens: 200,
            quick: self.quick,
        };
        if self.quick {
            protocol = Protocol {
                throughput: Load {
                    prompt: 64,
                    tokens: 16,
                    ..protocol.throughput
                },
                latency_tokens: 30,
                contexts: vec![32, 64, 128],
                batches: vec![1, 2, 3],
                curve_prompt: 16,
                curve_tokens: 16,
                traced_tokens: 32,
                ..protocol
            };
        }
        protocol.check()?;
        if self.pairs < LEAST_PAIRS {
            let pairs = self.pairs;
            return Err(Usage(format!(
                "--pairs {pairs}: an interval needs at least {LEAST_PAIRS}"
            )));
        }
        let compute = self
            .compute
            .iter()
            .map(|name| compute(name))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Checked {
            origin: match (&self.model, self.synthetic) {
                (_, Some(shape)) => Origin::Synthetic(shape),
                (Some(path), None) => Origin::File(path.clone()),
                (None, None) => {
                    return Err(Usage("give a model, or --synthetic and a shape".into()));
                }
            },
            named: !compute.is_empty(),
            compute: match compute.is_empty() {
                true => Compute::ALL.to_vec(),
                false => compute,
            },
            kv_type: self.kv_type,
            protocol,
            pairs: self.protected.then_some(self.pairs),
        })
    }
}

impl Protocol {
    fn check(&self) -> Result<(), Usage> {
        let load = self.throughput;
        for (option, value, least) in [
            ("--prompt", load.prompt, 1),
            ("--tokens", load.tokens, 2),
            ("--batch", load.batch, 1),
            ("--latency-tokens", self.latency_tokens, 1),
            (
                "--contexts",
                self.contexts.iter().copied().min().unwrap_or(0),
                1,
            ),
            (
                "--batches",
                self.batches.iter().copied().min().unwrap_or(0),
                1,
            ),
        ] {
            if value < least {
                return Err(Usage(format!(
                    "{option} {value}: it must be at least {least}"
                )));
            }
        }
        let most = self
            .batches
            .iter()
            .copied()
            .max()
            .unwrap_or(1)
            .max(load.batch);
        if most > MOST_SEQUENCES {
            return Err(Usage(format!(
                "a batch of {most}: the engine computes at most {MOST_SEQUENCES} together"
            )));
        }
        let sequences = load.sequences();
        if sequences > MOST_SEQUENCES {
            return Err(Usage(format!(
                "--batch {} with --beam {} are {sequences} sequences: the engine computes at most {MOST_SEQUENCES} together",
                load.batch, load.beam
            )));
        }
        Ok(())
    }
}

/// Most sequences that an engine computes together.
const MOST_SEQUENCES: usize = 1024;

/// The arithmetic of this name.
pub(crate) fn compute(name: &str) -> Result<Compute, Usage> {
    let found = Compute::ALL
        .iter()
        .copied()
        .find(|compute| compute.name() == name);
    found.ok_or_else(|| {
        let names: Vec<_> = Compute::ALL.iter().map(|compute| compute.name()).collect();
        Usage(format!(
            "--compute {name}: this engine has {}",
            names.join(", ")
        ))
    })
}

/// The ways to store keys and values, by name.
pub(crate) fn kv_types() -> impl clap::builder::TypedValueParser<Value = KvType> {
    PossibleValuesParser::new(KvType::ALL.map(KvType::name)).try_map(|name| {
        let found = KvType::ALL.into_iter().find(|kv| kv.name() == name);
        found.ok_or("there is no such type")
    })
}

/// Options of an engine as far as a format decides them.
pub(crate) fn engine(compute: Compute, kv_type: Option<KvType>) -> EngineOptions {
    EngineOptions {
        compute,
        kv_type,
        ..EngineOptions::default()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn check(line: &str) -> Result<Checked, String> {
        let words = ["bench"].into_iter().chain(line.split_whitespace());
        let parsed = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        parsed.args.check().map_err(|usage| usage.0)
    }

    #[test]
    fn defaults_are_the_papers() {
        let checked = check("--synthetic llama2-7b").unwrap();
        let p = checked.protocol;
        assert_eq!(
            (p.throughput.prompt, p.throughput.tokens, p.throughput.batch),
            (1024, 128, 6)
        );
        assert_eq!(
            (p.latency_tokens, p.contexts.last(), p.batches.len()),
            (1000, Some(&2048), 8)
        );
        assert_eq!(checked.compute, Compute::ALL);
        assert!(!checked.named && !p.quick);
    }

    #[test]
    fn impossible_options_are_refused_with_the_numbers() {
        for (line, says) in [
            ("--threads 0", "--threads 0: it must be from 1 to 1024"),
            ("--threads 5000", "--threads 5000"),
            ("--beam 33", "--beam 33: it must be from 1 to 32"),
            ("--beam 0", "--beam 0"),
            ("--batch 300 --beam 4", "1200 sequences"),
            ("--batch 0", "--batch 0"),
            ("--batch 2000", "a batch of 2000"),
            ("--batches 1,0", "--batches 0"),
            ("--contexts 0", "--contexts 0"),
            (
                "--protected --pairs 19",
                "--pairs 19: an interval needs at least 20",
            ),
            ("--tokens 1", "--tokens 1: it must be at least 2"),
            (
                "--compute int9",
                "--compute int9: this engine has f32, bf16, int8-g32",
            ),
        ] {
            let refused = check(&format!("--synthetic smoke {line}")).unwrap_err();
            assert!(refused.contains(says), "{line}: {refused}");
        }
        assert!(check("").is_err(), "neither model nor shape");
        assert!(check("model.gguf --synthetic smoke").is_err(), "both");
        assert!(check("--synthetic smoke --quick --prompt 5").is_err());
    }

    #[test]
    fn formats_are_named_as_in_receipts() {
        let checked = check("model.gguf --compute f32,int8-g32").unwrap();
        assert!(checked.named);
        assert_eq!(checked.compute.len(), 2);
    }

    #[test]
    fn every_way_to_store_keys_and_values_can_be_named() {
        assert_eq!(check("model.gguf").unwrap().kv_type, None);
        for kv in KvType::ALL {
            let checked = check(&format!("model.gguf --kv-type {}", kv.name())).unwrap();
            assert_eq!(checked.kv_type, Some(kv));
        }
        let refused = check("model.gguf --kv-type f64").unwrap_err();
        assert!(refused.contains("f32, f16, bf16, int8"), "{refused}");
    }
}
