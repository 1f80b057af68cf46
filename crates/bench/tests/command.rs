//! The program as people run it, on a model that takes seconds.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_casemate-bench"))
        .args(arguments)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs and expects success; returns what was printed.
fn printed(arguments: &[&str]) -> String {
    let output = bench(arguments);
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn a_run_has_every_figure_in_every_form() {
    let folder = tempfile::tempdir().unwrap();
    let [page, kept] = ["report.html", "run.json"].map(|name| folder.path().join(name));
    let html = page.to_str().unwrap();
    let run = printed(&[
        "--synthetic",
        "smoke",
        "--quick",
        "--threads",
        "1",
        "--json",
        "--html",
        html,
    ]);
    std::fs::write(&kept, &run).unwrap();
    let report: Value = serde_json::from_str(&run).unwrap();

    assert_eq!(report["protocol"]["threads"], 1);
    assert!(
        report["program"]["command"]
            .as_str()
            .unwrap()
            .starts_with("casemate bench --synthetic smoke")
    );
    assert!(report["limits"]["read"].as_array().unwrap().len() >= 4);
    let formats = report["formats"].as_array().unwrap();
    let names: Vec<_> = formats
        .iter()
        .map(|f| f["compute"].as_str().unwrap())
        .collect();
    assert!(
        names.contains(&"f32") && names.contains(&"int8-g32"),
        "{names:?}"
    );
    let positive = |value: &Value| value.as_f64().is_some_and(|x| x.is_finite() && x > 0.0);
    for f in formats {
        let usual = match f["compute"].as_str().unwrap() {
            "f32" => "f32",
            "bf16" | "int8-row" => "bf16",
            _ => "f16",
        };
        assert_eq!(f["kv_type"], usual);
        let latency = &f["latency"];
        let (count, dropped) = (
            &latency["next_token"]["count"],
            &latency["next_token"]["dropped"],
        );
        let samples = latency["samples"].as_array().unwrap().len() as u64;
        // At least the tokens asked for, and every one of them accounted for.
        assert!(samples >= 30);
        assert_eq!(count.as_u64().unwrap() + dropped.as_u64().unwrap(), samples);
        for figure in [
            &latency["next_token"]["median"],
            &latency["first_token"]["median"],
            &latency["decode_share"],
            &f["throughput"]["tokens_per_second"],
            &f["contexts"][2]["decode"],
            &f["curve"][2]["roofline"],
            &f["load"]["convert_seconds"],
        ] {
            assert!(positive(figure), "{figure} in {f}");
        }
        let memory = |name: &str| f["memory"][name].as_u64().unwrap();
        assert!(
            memory("peak") > memory("weights") + memory("kv"),
            "{}",
            f["memory"]
        );
        assert!(
            memory("per_pass") < memory("weights"),
            "the embedding is not read as a whole"
        );
        // Where there is no tracer it says so; a number is a number of something.
        let calls = &f["system_calls"];
        assert!(
            calls["measured"]["tokens"]
                .as_u64()
                .is_some_and(|n| n >= 32)
                || calls["not_measured"]["why"].is_string(),
            "{calls}"
        );
    }
    let page_text = std::fs::read_to_string(&page).unwrap();
    assert!(page_text.contains("<svg") && page_text.contains("smoke run"));

    // The kept run gives the same forms again.
    let kept = kept.to_str().unwrap();
    std::fs::remove_file(&page).unwrap();
    printed(&["report", kept, "--html", html]);
    assert_eq!(std::fs::read_to_string(&page).unwrap(), page_text);
    assert!(printed(&["report", kept]).contains("batch curve"));
    let csv = printed(&["report", kept, "--csv"]);
    assert!(
        csv.lines()
            .any(|line| line.contains(",int8-g32,f16,1,next_token,1,64,")),
        "{csv}"
    );
}

#[test]
fn keys_and_values_are_stored_as_asked_and_every_form_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let [page, kept] = ["report.html", "run.json"].map(|name| folder.path().join(name));
    let (html, kept) = (page.to_str().unwrap(), kept.to_str().unwrap());
    let run = printed(&[
        "--synthetic",
        "smoke",
        "--quick",
        "--threads",
        "1",
        "--compute",
        "int8-g32",
        "--kv-type",
        "int8",
        "--json",
        "--html",
        html,
    ]);
    std::fs::write(kept, &run).unwrap();
    let report: Value = serde_json::from_str(&run).unwrap();
    let (model, format) = (&report["model"], &report["formats"][0]);
    assert_eq!(format["compute"], "int8-g32+kv-int8");
    assert_eq!(format["kv_type"], "int8");
    let fact = |name: &str| model[name].as_u64().unwrap();
    // A scale beside each key and value.
    let head = fact("hidden") / fact("heads") + 4;
    let position = 2 * fact("layers") * fact("kv_heads") * head;
    assert_eq!(format["memory"]["kv_per_position"], position);
    let csv = printed(&["report", kept, "--csv"]);
    assert!(
        csv.contains(",int8-g32+kv-int8,int8,1,next_token,"),
        "{csv}"
    );
    assert!(printed(&["report", kept]).contains("int8-g32+kv-int8  int8  "));
    let page = std::fs::read_to_string(&page).unwrap();
    assert!(page.contains(", keys and values in int8<"), "{page}");
}

#[test]
fn beams_are_searched_and_their_answers_counted_once() {
    let run = printed(&[
        "--synthetic",
        "smoke",
        "--quick",
        "--threads",
        "1",
        "--compute",
        "int8-g32",
        "--batch",
        "6",
        "--beam",
        "4",
        "--json",
    ]);
    let report: Value = serde_json::from_str(&run).unwrap();
    let load = &report["protocol"]["throughput"];
    assert_eq!((&load["batch"], &load["beam"]), (&6.into(), &4.into()));
    let throughput = &report["formats"][0]["throughput"];
    let rate = throughput["tokens_per_second"].as_f64().unwrap();
    let seconds: Vec<f64> = serde_json::from_value(throughput["seconds"].clone()).unwrap();
    assert_eq!(
        seconds.len(),
        1,
        "6 x 16 tokens are more than the 30 asked for"
    );
    let tokens = rate * seconds[0];
    assert!((tokens - 96.0).abs() < 1e-6, "{tokens} tokens");
    assert!(throughput["decode"].is_null(), "they come as a whole");
}

#[test]
fn what_is_impossible_is_refused_with_its_numbers_and_code() {
    let smoke = |rest: &[&str]| {
        let arguments: Vec<_> = ["--synthetic", "smoke"]
            .iter()
            .chain(rest)
            .copied()
            .collect();
        bench(&arguments)
    };
    for (output, code, says) in [
        (smoke(&["--threads", "0"]), 2, "--threads 0"),
        (
            smoke(&["--prompt", "4000"]),
            2,
            "4128 together, but the model's context holds 4096",
        ),
        (smoke(&["--contexts", "4090"]), 2, "context holds 4096"),
        (smoke(&["--batch", "100", "--beam", "44"]), 2, "--beam 44"),
        (smoke(&["--kv-type", "f64"]), 2, "f32, f16, bf16, int8"),
        (
            smoke(&["--scratch", "/nowhere", "--quick"]),
            2,
            "/nowhere cannot be used",
        ),
        (
            bench(&[
                "--synthetic",
                "llama2-13b",
                "--batch",
                "1000",
                "--compute",
                "int8-g32",
            ]),
            2,
            "GB are available",
        ),
        (bench(&["/nowhere/model.gguf"]), 40, "/nowhere/model.gguf"),
        (
            bench(&["report", env!("CARGO_MANIFEST_DIR").to_owned().as_str()]),
            40,
            "directory",
        ),
    ] {
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(says), "{said}");
        assert_eq!(
            text(&output.stdout),
            "",
            "nothing that could pass for a figure"
        );
    }
}

#[test]
fn a_file_that_is_no_report_is_malformed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.json");
    let refused = |content: &str, path: &Path| {
        std::fs::write(path, content).unwrap();
        let output = bench(&["report", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(10), "{}", text(&output.stderr));
        text(&output.stderr)
    };
    assert!(refused("{}", &path).contains("no report"));
    assert!(refused("not JSON", &path).contains("no report"));
}

#[test]
fn opening_compares_three_ways_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let arguments = ["open", "--size", "8MiB", "--rounds", "3", "--json", "--dir"];
    let printed = printed(&[&arguments[..], &[place]].concat());
    let result: Value = serde_json::from_str(&printed).unwrap();
    for way in ["sealed", "unsealed", "unsealed_direct"] {
        assert_eq!(result[way]["seconds"].as_array().unwrap().len(), 3);
        assert!(
            result[way]["peak_bytes"].as_u64().unwrap() >= 8 << 20,
            "{way}: {result}"
        );
    }
    assert!(result["ratio"].as_f64().unwrap() > 0.0);
    assert_eq!(std::fs::read_dir(place).unwrap().count(), 0);
}

#[test]
fn a_written_model_is_measured_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    for encoding in ["q8_0", "q4_0", "bf16"] {
        let model = folder.path().join(format!("{encoding}.gguf"));
        let model = model.to_str().unwrap();
        printed(&["write", "smoke", encoding, model]);
        let run = printed(&[model, "--quick", "--compute", "f32", "--json"]);
        let report: Value = serde_json::from_str(&run).unwrap();
        assert_eq!(report["model"]["vocab"], 4096, "{encoding}");
        assert!(
            report["formats"][0]["latency"]["next_token"]["median"]
                .as_f64()
                .unwrap()
                > 0.0
        );
    }
}
