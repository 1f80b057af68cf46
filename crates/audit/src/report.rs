//! What an audit found, as it is kept in JSON; the forms for people are made of nothing else.

use casemate_report::table::{Section, section, text};
use serde::{Deserialize, Serialize};

use crate::metrics::median;
use crate::probe::Found;
use crate::victim::Victim;

/// Version of this form.
pub(crate) const FORM: u32 = 2;

/// A whole audit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) form: u32,
    pub(crate) program: Program,
    pub(crate) victim: VictimFacts,
    pub(crate) protocol: Protocol,
    pub(crate) points: Vec<Point>,
    pub(crate) probe: Probe,
}

/// What was run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Program {
    pub(crate) version: String,
    /// The command that repeats it.
    pub(crate) command: String,
    /// When it began, RFC 3339 in UTC.
    pub(crate) started: String,
    pub(crate) torch: String,
}

/// The model under attack.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VictimFacts {
    pub(crate) name: String,
    pub(crate) layers: u32,
    pub(crate) hidden: u32,
    pub(crate) vocab: u32,
    /// On the held-out texts.
    pub(crate) perplexity: f64,
}

impl VictimFacts {
    pub(crate) fn new(victim: &Victim, perplexity: f64) -> Self {
        let config = victim.config();
        Self {
            name: victim.name().to_owned(),
            layers: config.layers,
            hidden: config.hidden,
            vocab: config.vocab,
            perplexity,
        }
    }
}

/// How it was asked and compared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Protocol {
    /// The service that was asked, if not the API in this process.
    pub(crate) asked: Option<String>,
    pub(crate) prompt_tokens: usize,
    pub(crate) answer_tokens: usize,
    pub(crate) held_out: usize,
    pub(crate) held_out_tokens: usize,
    pub(crate) continued_from: usize,
    pub(crate) continued_by: usize,
    pub(crate) steps: usize,
    pub(crate) batch: usize,
    pub(crate) seeds: u64,
    /// Questions of which a worker's transcripts were recorded.
    pub(crate) recorded: usize,
    /// Ends of the names of matrices that a gray-box attacker has.
    pub(crate) offloaded: Vec<String>,
}

/// How near one attacker's students came with so many queries.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Point {
    pub(crate) attacker: String,
    /// What it got.
    pub(crate) told: String,
    pub(crate) queries: usize,
    /// Tokens of prompts and answers, as the service counted them.
    pub(crate) tokens: u64,
    pub(crate) students: u64,
    /// Medians over the students.
    pub(crate) scores: Scores,
}

/// Nearness; shares from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Scores {
    /// Positions of held-out texts at which both find the same token likeliest.
    pub(crate) forced_agreement: f64,
    /// Positions of the student's own continuations at which the victim finds the student's token likeliest.
    pub(crate) free_agreement: f64,
    /// Places at which both continuations have the same token.
    pub(crate) token_match: f64,
    /// Of the student's continuations, with the victim's as references.
    pub(crate) bleu: f64,
    /// KL(victim ‖ student) in nats, per position of held-out texts.
    pub(crate) kl: f64,
    /// The student's, on held-out texts.
    pub(crate) perplexity: f64,
}

impl Scores {
    pub(crate) fn median(all: &[Scores]) -> Self {
        let of = |figure: fn(&Scores) -> f64| median(&all.iter().map(figure).collect::<Vec<_>>());
        Self {
            forced_agreement: of(|s| s.forced_agreement),
            free_agreement: of(|s| s.free_agreement),
            token_match: of(|s| s.token_match),
            bleu: of(|s| s.bleu),
            kl: of(|s| s.kl),
            perplexity: of(|s| s.perplexity),
        }
    }
}

/// What a classifier read off the rows of one stack.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Probe {
    pub(crate) stack: String,
    /// Whether the rows are those that a worker was sent; otherwise they were masked by the audit.
    pub(crate) recorded: bool,
    /// Tokens that it told apart.
    pub(crate) classes: usize,
    /// With a fresh pad for each element, as a worker sees them.
    pub(crate) masked: Found,
    /// Without.
    pub(crate) plain: Found,
}

/// What the figures do not say, and no defence changes.
pub(crate) const LIMITS: [&str; 5] = [
    "Nothing here stops distillation: answers are what users pay for, and who has enough of them trains a copy that answers \
     alike. Shield-all is that case, and its curve rises with the number of queries whatever else is done.",
    "Budgets per API key bound the queries of one key. They move a thief along the curve; several keys add up, and a \
     restart of the enclave begins a new day.",
    "Policies for log-probabilities decide how much each query tells besides its answer. At best they bring the curve of soft \
     labels down to that of answers alone.",
    "Pads hide what a worker computes on, so its transcripts add nothing to what is public. They do not hide the matrices \
     that it computes with, which is why only tensors that the manifest calls public may be sent.",
    "Figures are of this model, these texts and students of this size and training. A thief with more of each comes nearer; \
     compare the curves with each other, and not with a wish.",
];

fn share(value: f64) -> String {
    format!("{:.1} %", value * 100.0)
}

impl Report {
    /// The whole report.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report has a text")
    }

    /// Every figure.
    pub(crate) fn sections(&self) -> Vec<Section> {
        let point = |p: &Point| {
            let s = &p.scores;
            vec![
                p.attacker.clone(),
                p.told.clone(),
                p.queries.to_string(),
                p.tokens.to_string(),
                share(s.forced_agreement),
                share(s.free_agreement),
                share(s.token_match),
                format!("{:.3}", s.bleu),
                format!("{:.3}", s.kl.max(0.0)),
                format!("{:.2}", s.perplexity),
            ]
        };
        let Probe { masked, plain, .. } = &self.probe;
        let found = |name: &str, found: &Found| {
            vec![
                name.to_owned(),
                found.rows.to_string(),
                share(found.right),
                share(found.by_chance),
            ]
        };
        vec![
            section(
                "copies beside the model",
                &[
                    "attacker",
                    "knows",
                    "queries",
                    "tokens",
                    "top-1 forced",
                    "top-1 free",
                    "token match",
                    "BLEU",
                    "KL nats",
                    "perplexity",
                ],
                self.points.iter().map(point),
            ),
            section(
                &format!(
                    "reading one of {} tokens off a row of {}, {}",
                    self.probe.classes,
                    self.probe.stack,
                    match self.probe.recorded {
                        true => "recorded before a worker",
                        false => "masked by this program",
                    }
                ),
                &["rows", "tried on", "right", "by chance"],
                [
                    found("masked, as a worker sees them", masked),
                    found("without pads", plain),
                ]
                .into_iter(),
            ),
        ]
    }

    /// Model and protocol, in words.
    pub(crate) fn head(&self) -> String {
        let (v, p) = (&self.victim, &self.protocol);
        let asked = match &p.asked {
            Some(url) => format!("asked at {url}"),
            None => "asked through the enclave's API in this process".to_owned(),
        };
        format!(
            "{}: {} layers of {}, {} tokens, perplexity {:.2} on {} held-out texts of {}; {asked}, {} tokens in, up to {} out, \
             temperature 1. Students of the same shape, {} steps of {} examples; medians of {}. Continuations: {} tokens \
             behind {}. Transcripts of {} questions were recorded.",
            v.name,
            v.layers,
            v.hidden,
            v.vocab,
            v.perplexity,
            p.held_out,
            p.held_out_tokens,
            p.prompt_tokens,
            p.answer_tokens,
            p.steps,
            p.batch,
            p.seeds,
            p.continued_by,
            p.continued_from,
            p.recorded,
        )
    }

    /// For a terminal.
    pub(crate) fn table(&self) -> String {
        let mut out = self.head() + "\n";
        for section in self.sections() {
            text(&mut out, &section);
        }
        out.push('\n');
        for limit in LIMITS {
            out.push_str(&format!("note: {limit}\n"));
        }
        out + "repeat: " + &self.program.command
    }
}

#[cfg(test)]
pub(crate) mod sample {
    use super::*;

    fn scores(forced_agreement: f64) -> Scores {
        Scores {
            forced_agreement,
            free_agreement: 0.4,
            token_match: 0.2,
            bleu: 0.05,
            kl: 1.0 - forced_agreement,
            perplexity: 5.0,
        }
    }

    /// A report made by hand.
    pub(crate) fn report() -> Report {
        let point = |attacker: &str, told: &str, queries: usize, agreement| Point {
            attacker: attacker.into(),
            told: told.into(),
            queries,
            tokens: queries as u64 * 100,
            students: 1,
            scores: scores(agreement),
        };
        let found = |right| Found {
            rows: 1000,
            right,
            by_chance: 0.125,
        };
        Report {
            form: FORM,
            program: Program {
                version: "0.1.0".into(),
                command: "casemate audit extraction --queries 64,256".into(),
                started: "2026-11-21T23:00:00Z".into(),
                torch: "2.8.0".into(),
            },
            victim: VictimFacts {
                name: "stories <260K>".into(),
                layers: 5,
                hidden: 64,
                vocab: 512,
                perplexity: 3.25,
            },
            protocol: Protocol {
                asked: None,
                prompt_tokens: 12,
                answer_tokens: 96,
                held_out: 32,
                held_out_tokens: 96,
                continued_from: 16,
                continued_by: 48,
                steps: 600,
                batch: 16,
                seeds: 1,
                recorded: 64,
                offloaded: vec!["attn_q.weight".into()],
            },
            points: vec![
                point("untrained", "nothing", 0, 0.01),
                point("shield-all", "answers", 64, 0.25),
                point("shield-all", "answers", 256, 0.375),
                point("soft labels", "top=3", 64, 0.3),
                point("soft labels", "top=3", 256, 0.5),
                point("gray-box", "answers, matrices", 64, 0.45),
                point("gray-box", "answers, matrices", 256, 0.6),
                point("no-shield", "every weight", 0, 1.0),
            ],
            probe: Probe {
                stack: "blk.0.attn_qkv".into(),
                recorded: true,
                classes: 16,
                masked: found(0.12),
                plain: found(1.0),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_figure_and_says_what_nothing_stops() {
        let table = sample::report().table();
        for expected in [
            "shield-all",
            "37.5 %",
            "25600",
            "masked, as a worker sees them",
            "12.0 %",
            "perplexity 3.25 on 32",
            "Nothing here stops distillation",
            "repeat: casemate audit extraction --queries 64,256",
        ] {
            assert!(table.contains(expected), "{expected}: {table}");
        }
    }

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let text = sample::report().to_json();
        let read: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(read.to_json(), text);
    }

    #[test]
    fn scores_of_several_students_are_medians_of_each_figure() {
        let [low, middle, high] = [0.1, 0.2, 0.9].map(|x| Scores {
            forced_agreement: x,
            kl: 1.0 - x,
            ..sample::report().points[0].scores
        });
        let of_three = Scores::median(&[high, low, middle]);
        assert_eq!((of_three.forced_agreement, of_three.kl), (0.2, 0.8));
    }
}
