//! What `casemate audit extraction` can be asked for.

use std::path::{Path, PathBuf};

use casemate_enclave::api::{Extraction, Logprobs};
use casemate_wire::Address;

use crate::exit::Usage;

/// What the command does, at length.
pub(crate) const LONG_ABOUT: &str = "Measure how well a model can be copied by who asks it, and by who computes for it.\n\n\
    Students with the model's own architecture are trained on what each kind of attacker gets, for several numbers of \
    queries: answers alone (shield-all: nothing of the model is outside), answers with log-probabilities as an extraction \
    policy shows them, answers and all matrices that a worker would compute with (gray-box), besides those what a real worker was \
    sent, recorded (transcripts), the same as it would be without pads (unmasked), and, as the other end, the \
    whole model (no-shield). Then they are compared with the model on texts that nobody trained on. Besides, a classifier \
    tries to read tokens off what the worker was sent, with and without pads.\n\n\
    No policy and no shield prevents a copy by answers, as they are what users pay for. The figures say how many answers \
    it takes here, and how much each thing that is told besides saves a thief. docs/extraction.md says what they mean.";

/// Options of `extraction`.
#[derive(clap::Args)]
#[command(about = "Measure how well a model can be copied", long_about = LONG_ABOUT)]
pub(crate) struct Args {
    /// The model, which is needed to compare with: a GGUF file, a Hugging Face directory, or a checkpoint of llama2.c with
    /// tok512.bin beside it [default: models/stories260K of the data folder, CASEMATE_DATA].
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Texts like those that the model is asked about, passages between empty lines [default: data/tinystories of the data
    /// folder].
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Ask this service instead of the enclave's API in this process: the base URL that OpenAI clients take. It must serve
    /// the same model.
    #[arg(long, value_name = "URL", requires = "served_name")]
    pub(crate) endpoint: Option<String>,
    /// What that service calls the model.
    #[arg(long, value_name = "NAME", requires = "endpoint")]
    pub(crate) served_name: Option<String>,
    /// Where the API key for it is.
    #[arg(long, value_name = "FILE", requires = "endpoint")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Alternatives to ask that service for; absent: answers alone.
    #[arg(long, value_name = "N", requires = "endpoint")]
    pub(crate) top: Option<u8>,
    /// A policy to attack, as the enclave's configuration has it; may be repeated [default: top=5,rounding=0.001
    /// and top=3,rounding=0.1 and top=3,rounding=0.1,perturbation=0.5].
    #[arg(
        long,
        value_name = "top=N,rounding=NATS[,perturbation=NATS]",
        conflicts_with = "endpoint"
    )]
    policy: Vec<String>,
    /// How many questions the attackers may ask.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N",
        default_value = "64,256,1024"
    )]
    queries: Vec<usize>,
    /// Tokens of each question.
    #[arg(long, value_name = "N", default_value_t = 12)]
    pub(crate) prompt_tokens: usize,
    /// Tokens of each answer, at most.
    #[arg(long, value_name = "N", default_value_t = 96)]
    pub(crate) answer_tokens: usize,
    /// Texts on which students are compared with the model.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) held_out: usize,
    /// Steps of training for each student.
    #[arg(long, value_name = "N", default_value_t = 600)]
    pub(crate) steps: usize,
    /// Examples in each step.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) batch: usize,
    /// Students for each point, begun differently; figures are their medians.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seeds: u64,
    /// Threads.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) threads: usize,
    /// A Python that has torch and numpy [default: that of a virtual environment, made once].
    #[arg(long, value_name = "FILE", conflicts_with = "venv")]
    pub(crate) python: Option<PathBuf>,
    /// Where that environment lies [default: casemate/extraction in the user's cache].
    #[arg(long, value_name = "DIR")]
    pub(crate) venv: Option<PathBuf>,
    /// Questions of which a worker's transcripts are recorded; 0: of none, and rows are masked here to probe them.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) recorded: usize,
    /// Where casemate-worker listens, tcp:IP:PORT or unix:PATH [default: one that is started from beside this program].
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) worker: Option<Address>,
    /// Keep what the worker saw, masked.
    #[arg(long, value_name = "FILE")]
    pub(crate) transcript: Option<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Also write a report with plots.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}

/// Policies that are attacked unless others are named: as much as can be configured, a careful one, and the same perturbed.
const POLICIES: [&str; 3] = [
    "top=5,rounding=0.001",
    "top=3,rounding=0.1",
    "top=3,rounding=0.1,perturbation=0.5",
];

/// One extraction policy.
pub(crate) struct Policy {
    pub(crate) text: String,
    pub(crate) extraction: Extraction,
    /// Alternatives that it shows.
    pub(crate) top: u8,
}

impl Policy {
    fn parse(text: &str) -> Result<Self, Usage> {
        let wrong = |why: &str| Usage(format!("--policy {text}: {why}"));
        let extraction: Extraction = toml::from_str(&format!("logprobs = {{ {text} }}"))
            .map_err(|error| wrong(error.message()))?;
        match extraction.logprobs {
            Logprobs::Rounded { top, .. } if top > 0 => Ok(Self {
                text: text.to_owned(),
                extraction,
                top,
            }),
            _ => Err(wrong(
                "a policy that shows no alternatives is attacked in any case",
            )),
        }
    }
}

impl Args {
    pub(crate) fn model(&self) -> PathBuf {
        let default = || data().join("models/stories260K/stories260K.bin");
        self.model.clone().unwrap_or_else(default)
    }

    pub(crate) fn prompts(&self) -> PathBuf {
        let default = || data().join("data/tinystories/tinystories_val_sample.txt");
        self.prompts.clone().unwrap_or_else(default)
    }

    pub(crate) fn policies(&self) -> Result<Vec<Policy>, Usage> {
        match self.policy.is_empty() {
            true => POLICIES.iter().map(|text| Policy::parse(text)).collect(),
            false => self.policy.iter().map(|text| Policy::parse(text)).collect(),
        }
    }

    /// Numbers of questions, each once, rising.
    pub(crate) fn budgets(&self) -> Result<Vec<usize>, Usage> {
        let mut budgets = self.queries.clone();
        budgets.sort_unstable();
        budgets.dedup();
        let positive = [
            ("--queries", budgets.first().copied().unwrap_or(0)),
            ("--prompt-tokens", self.prompt_tokens),
            ("--answer-tokens", self.answer_tokens),
            ("--held-out", self.held_out),
            ("--batch", self.batch),
            ("--seeds", self.seeds as usize),
            ("--threads", self.threads),
        ];
        match positive.iter().find(|(_, value)| *value == 0) {
            None => Ok(budgets),
            Some((name, _)) => Err(Usage(format!("{name} must be at least 1"))),
        }
    }
}

/// Where models and texts are that are not part of the project, as tests find them.
fn data() -> PathBuf {
    let set = std::env::var_os("CASEMATE_DATA");
    set.map_or_else(|| Path::new("../shared").to_owned(), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_those_of_the_enclave() {
        for text in POLICIES {
            assert!(Policy::parse(text).is_ok(), "{text}");
        }
        let policy = Policy::parse("top=3,rounding=0.1,perturbation=0.5").unwrap();
        let expected = Logprobs::Rounded {
            top: 3,
            rounding: 0.1,
            perturbation: Some(0.5),
        };
        assert_eq!((policy.extraction.logprobs, policy.top), (expected, 3));
        for (text, told) in [
            ("top=6,rounding=0.1", "0 to 5"),
            ("top=0,rounding=0.1", "in any case"),
            ("top=1", "such as"),
            (
                "top=1,rounding=0.1 }\nlogit_bias = true\nx = { a=1",
                "--policy",
            ),
        ] {
            let refused = Policy::parse(text).err().unwrap().to_string();
            assert!(refused.contains(told), "{refused}");
        }
    }
}
