//! The program as people run it, with a tiny model, and students that are made up by a script in place of the one that
//! needs PyTorch: it keeps the jobs it gets, and answers as a model that finds every token equally likely.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use casemate_audit::transcript;
use casemate_testkit::gguf;
use casemate_testkit::models::Tiny;
use casemate_worker::backend::cpu::Cpu;
use casemate_worker::connection::Limits;
use casemate_worker::listener::{Listener, Places, serve};
use serde_json::Value;
use tempfile::TempDir;

/// What stands for Python: it is given the script, and runs this instead.
const UNIFORM: &str = r#"#!/usr/bin/env python3
import hashlib, json, math, os, struct, sys
folder = os.path.dirname(os.path.abspath(__file__))
assert sys.argv[1].endswith("student.py") and "AdamW" in open(sys.argv[1]).read()
print(json.dumps({"event": "ready", "torch": "none"}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job["transcript"]:
        job["transcript"]["bytes"] = hashlib.sha256(open(job["transcript"].pop("file"), "rb").read()).hexdigest()
    job["examples"] = [json.loads(example) for example in open(job["examples"])]
    assert os.path.getsize(job["weights"]["file"]) == 4 * sum(math.prod(t["shape"]) for t in job["weights"]["tensors"])
    with open(os.path.join(folder, "jobs"), "a") as jobs:
        jobs.write(json.dumps(job) + "\n")
    vocab = job["architecture"]["vocab"]
    with open(job["log_probabilities"], "wb") as file:
        for text in job["held_out"]:
            row = struct.pack("<f", -math.log(vocab)) * vocab
            file.write(row * (len(text) - 1))
    print(json.dumps({"event": "step", "step": 1, "loss": 1.5}), flush=True)
    continuations = [[7] * job["continue"] for _ in job["prompts"]]
    print(json.dumps({"event": "done", "continuations": continuations}), flush=True)
"#;

struct Place {
    folder: TempDir,
}

impl Place {
    fn new(trainer: &str) -> Self {
        let place = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        gguf::write(&Tiny::default().build(), &place.at("tiny.gguf")).unwrap();
        let passage = |number: usize| {
            let words = (0..60).map(|word| format!("{} and the {word}", number * 31 + word * 7));
            words.collect::<Vec<_>>().join(" ")
        };
        let passages: Vec<_> = (0..12).map(passage).collect();
        fs::write(place.at("texts"), passages.join("\n\n")).unwrap();
        fs::write(place.at("python"), trainer).unwrap();
        fs::set_permissions(place.at("python"), fs::Permissions::from_mode(0o755)).unwrap();
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, more: &[&str]) -> Output {
        self.run_program(Path::new(env!("CARGO_BIN_EXE_casemate-audit")), more)
    }

    fn run_program(&self, program: &Path, more: &[&str]) -> Output {
        let path = |name| self.at(name).into_os_string();
        Command::new(program)
            .args(["extraction"])
            .args(without(more, "--held-out", ["--held-out", "3"]))
            .args(without(more, "--queries", ["--queries", "6,2"]))
            .args(without(more, "--recorded", ["--recorded", "0"]))
            .args([
                "--prompt-tokens",
                "5",
                "--answer-tokens",
                "9",
                "--steps",
                "4",
            ])
            .arg("--model")
            .arg(path("tiny.gguf"))
            .arg("--prompts")
            .arg(path("texts"))
            .arg("--python")
            .arg(path("python"))
            .args(more)
            .output()
            .unwrap()
    }
}

/// Those arguments, unless the option is among the others.
fn without<'a>(more: &[&str], option: &str, default: [&'a str; 2]) -> Vec<&'a str> {
    match more.contains(&option) {
        true => Vec::new(),
        false => default.to_vec(),
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn jobs(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn names(job: &Value) -> Vec<&str> {
    let take = job["take"].as_array().unwrap();
    take.iter().map(|name| name.as_str().unwrap()).collect()
}

#[test]
fn every_attacker_gets_what_it_may_have_and_is_compared() {
    let place = Place::new(UNIFORM);
    let [html, transcript] = ["report.html", "seen"].map(|name| place.at(name));
    let output = place.run(&[
        "--json",
        "--html",
        html.to_str().unwrap(),
        "--transcript",
        transcript.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{}", said(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();

    let points = report["points"].as_array().unwrap();
    let asked = |attacker: &str| -> Vec<u64> {
        let of = points.iter().filter(|p| p["attacker"] == attacker);
        of.map(|p| p["queries"].as_u64().unwrap()).collect()
    };
    assert_eq!(asked("untrained"), [0]);
    assert_eq!(asked("shield-all"), [2, 6]);
    assert_eq!(asked("soft labels"), [2, 6, 2, 6, 2, 6]);
    assert_eq!(asked("gray-box"), [2, 6]);
    assert_eq!(asked("no-shield"), [0]);
    for point in points {
        let perplexity = point["scores"]["perplexity"].as_f64().unwrap();
        assert!((perplexity - 288.0).abs() < 0.1, "{point}");
        assert!(point["scores"]["kl"].as_f64().unwrap() > 0.0);
        let (queries, tokens) = (point["queries"].as_u64(), point["tokens"].as_u64());
        // A prompt of five and at least one token of an answer, at most nine.
        let [queries, tokens] = [queries, tokens].map(Option::unwrap);
        assert!((6 * queries..=15 * queries).contains(&tokens), "{point}");
    }

    // What a worker sees tells nothing; the same without pads tells everything.
    let share = |rows: &str, figure: &str| report["probe"][rows][figure].as_f64().unwrap();
    assert!(share("plain", "right") > 0.99);
    assert!(share("masked", "right") < share("masked", "by_chance") + 0.1);
    assert!(fs::read(&transcript).unwrap().starts_with(b"CMTR"));

    let jobs = jobs(&place.at("jobs"));
    assert_eq!(jobs.len(), points.len());
    for (job, point) in jobs.iter().zip(points) {
        let examples = job["examples"].as_array().unwrap();
        assert_eq!(examples.len() as u64, point["queries"]);
        let told = |example: &Value| example["told"].as_array().unwrap().len();
        let attacker = point["attacker"].as_str().unwrap();
        for example in examples {
            let answer = example["answer"].as_array().unwrap();
            // Texts of a random model have pieces of characters, which as text are other tokens.
            assert!(told(example) == 0 || (told(example) == answer.len() && answer.len() <= 9));
            assert_eq!(
                told(example) > 0,
                attacker == "soft labels" && !answer.is_empty()
            );
            for told in example["told"].as_array().unwrap() {
                assert!(told.as_array().unwrap().len() <= 5);
            }
        }
        let everything = job["weights"]["tensors"].as_array().unwrap().len();
        let takes = names(job);
        let steps = job["steps"].as_u64().unwrap();
        match attacker {
            "untrained" => assert_eq!((takes.len(), steps), (0, 0)),
            "no-shield" => assert_eq!((takes.len(), steps), (everything, 0)),
            "gray-box" => {
                assert_eq!(steps, 4);
                assert!(takes.contains(&"blk.0.ffn_down.weight"));
                let matrix = |name: &&str| name.contains(".attn_") || name.contains(".ffn_");
                assert!(takes.iter().all(matrix), "{takes:?}");
                assert!(!takes.iter().any(|name| name.ends_with("norm.weight")));
            }
            _ => assert_eq!((takes.len(), steps), (0, 4)),
        }
    }
    let page = fs::read_to_string(&html).unwrap();
    assert!(page.contains("Nothing here stops distillation") && page.matches("<svg").count() == 4);
}

/// Multiplies in this process, for as long as it lives, and returns where.
fn worker(folder: &Path) -> String {
    let address = format!("unix:{}", folder.join("worker.sock").display());
    let listener = Listener::bind(&address.parse().unwrap()).unwrap();
    let places = Arc::new(Places {
        device: Arc::new(Cpu::new(1).unwrap()),
        count: 2,
        memory: 64 << 20,
        limits: Limits::default(),
        identity: None,
    });
    std::thread::spawn::<_, ()>(move || serve(&listener, &places));
    address
}

#[test]
fn students_are_given_what_a_worker_was_sent() {
    let place = Place::new(UNIFORM);
    let kept = place.at("seen");
    let output = place.run(&[
        "--json",
        "--recorded",
        "4",
        "--worker",
        &worker(place.folder.path()),
        "--transcript",
        kept.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{}", said(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["protocol"]["recorded"], 4);
    let probe = &report["probe"];
    assert_eq!(
        (&probe["recorded"], &probe["stack"]),
        (&true.into(), &"blk.0.attn_qkv".into())
    );
    let share = |rows: &str, figure: &str| probe[rows][figure].as_f64().unwrap();
    assert!(
        share("plain", "right") > share("plain", "by_chance") + 0.3,
        "{probe}"
    );
    assert!(
        share("masked", "right") < share("masked", "by_chance") + 0.3,
        "{probe}"
    );

    // The record is that of the texts: a row for each token at each of two blocks' four stacks.
    let stacks = transcript::from_bytes(&fs::read(&kept).unwrap()).unwrap();
    let names: Vec<_> = stacks.iter().map(|stack| stack.name.as_str()).collect();
    let of_block = ["attn_qkv", "attn_output", "ffn_gate_up", "ffn_down"];
    let blocks = ["blk.0.", "blk.1."];
    let expected = blocks
        .iter()
        .flat_map(|b| of_block.map(|stack| format!("{b}{stack}")));
    assert_eq!(names, expected.collect::<Vec<_>>());

    let jobs = jobs(&place.at("jobs"));
    let with = |attacker: &str| -> Vec<&Value> {
        let of = jobs
            .iter()
            .filter(|job| job["name"].as_str().unwrap().starts_with(attacker));
        of.map(|job| &job["transcript"]).collect()
    };
    for attacker in [
        "untrained",
        "shield-all",
        "soft labels",
        "gray-box",
        "no-shield",
    ] {
        let given = with(attacker);
        assert!(
            !given.is_empty() && given.iter().all(|t| t.is_null()),
            "{attacker}"
        );
    }
    let rows: Vec<Vec<u8>> = ["transcripts", "unmasked"]
        .iter()
        .map(|attacker| {
            let given = with(attacker);
            assert_eq!(given.len(), 2, "{attacker}: one for each number of queries");
            let lengths = given[0]["lengths"].as_array().unwrap();
            let tokens: u64 = lengths.iter().map(|length| length.as_u64().unwrap()).sum();
            assert_eq!(lengths.len(), 4);
            assert_eq!(stacks[0].rows().count() as u64, tokens);
            assert_eq!(given[0]["stacks"].as_array().unwrap().len(), 8);
            given[0]["bytes"].as_str().unwrap().as_bytes().to_vec()
        })
        .collect();
    assert_ne!(rows[0], rows[1], "with pads and without");
}

#[test]
fn without_a_worker_nothing_is_recorded_and_it_says_what_to_do() {
    let place = Place::new(UNIFORM);
    let nowhere = format!("unix:{}", place.at("nobody").display());
    let output = place.run(&["--recorded", "1", "--worker", &nowhere]);
    assert_eq!(output.status.code(), Some(40), "{}", said(&output));
    assert!(
        said(&output).contains("no worker answers at"),
        "{}",
        said(&output)
    );
    let lone = place.at("casemate-audit");
    fs::copy(env!("CARGO_BIN_EXE_casemate-audit"), &lone).unwrap();
    let output = place.run_program(&lone, &["--recorded", "1"]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("--recorded 0"), "{}", said(&output));
}

#[test]
fn perturbed_answers_say_the_same_with_other_figures() {
    let place = Place::new(UNIFORM);
    let policies = [
        "top=3,rounding=0.001",
        "top=3,rounding=0.001,perturbation=0.5",
    ];
    let output = place.run(&[
        "--policy",
        policies[0],
        "--policy",
        policies[1],
        "--queries",
        "6",
    ]);
    assert!(output.status.success(), "{}", said(&output));
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        table.contains("note: Nothing here stops distillation"),
        "{table}"
    );
    let jobs = jobs(&place.at("jobs"));
    let soft: Vec<&Value> = jobs
        .iter()
        .filter(|job| job["name"].as_str().unwrap().contains("soft"))
        .map(|job| &job["examples"])
        .collect();
    assert_eq!(soft.len(), 2);
    let [plain, noisy] = [0, 1].map(|index: usize| soft[index].as_array().unwrap());
    let mut compared = 0;
    for (plain, noisy) in plain.iter().zip(noisy) {
        assert_eq!(plain["answer"], noisy["answer"]);
        let mut told = plain["told"].as_array().unwrap().iter();
        if told.any(|position| *position != Value::Array(Vec::new())) {
            assert_ne!(plain["told"], noisy["told"]);
            compared += 1;
        }
    }
    assert!(compared > 0);
}

#[test]
fn students_that_cannot_be_trained_are_an_error_with_its_reason() {
    let refuses =
        "#!/bin/sh\necho '{\"event\": \"error\", \"message\": \"no module named torch\"}'\n";
    let output = Place::new(refuses).run(&[]);
    assert_eq!(output.status.code(), Some(40), "{}", said(&output));
    assert!(said(&output).contains("no module named torch; --python names"));
    let babbles = "#!/bin/sh\necho hello\n";
    let output = Place::new(babbles).run(&[]);
    assert!(
        said(&output).contains("something unknown"),
        "{}",
        said(&output)
    );
    let dies = "#!/bin/sh\nexit 3\n";
    let output = Place::new(dies).run(&[]);
    assert!(said(&output).contains("ended early"), "{}", said(&output));
    // Rows that are too short are no student.
    let short = UNIFORM.replace("(len(text) - 1)", "(len(text) - 2)");
    let output = Place::new(&short).run(&[]);
    assert!(
        said(&output).contains("log-probabilities have"),
        "{}",
        said(&output)
    );
}

#[test]
fn what_does_not_go_together_is_wrong_usage() {
    let place = Place::new(UNIFORM);
    for (arguments, told) in [
        (&["--queries", "0"][..], "--queries must be at least 1"),
        (&["--queries", "100000"], "and 100000 are to be asked"),
        (&["--policy", "top=9,rounding=0.1"], "0 to 5"),
        (&["--held-out", "100"], "too few passages"),
    ] {
        let output = place.run(arguments);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{arguments:?}: {}",
            said(&output)
        );
        assert!(said(&output).contains(told), "{}", said(&output));
    }
}
