//! The commands in the documents. What the README tells a newcomer to type is typed here; every other command is at least
//! understood by its program.
//!
//! **The rule.** A `sh` block of the README is run, all of them in one shell, in their order, with the programs of this
//! build and a tiny model. A block in which `cargo` stands is not run, for those commands build or take minutes, and one of
//! them runs this test. Blocks of other documents need a deployment or a model that is not here. What is not run is given
//! to its program with `--help` behind it: a command, an option or a value that the program does not know is refused then
//! all the same, though what is missing is not noticed. For `cargo`, packages and targets must exist. Commands in the text,
//! `like this`, are treated likewise. Each one that is only understood is listed in the output of the test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use casemate_e2e::Stage;
use casemate_testkit::deployment::Deployment;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

/// Programs whose arguments are checked.
const OURS: [&str; 8] = [
    "casemate",
    "casemate-broker",
    "casemate-enclave",
    "casemate-fake-tee",
    "casemate-audit",
    "casemate-bench",
    "casemate-worker",
    "xtask",
];
/// Programs in documents that are not ours: neither run nor checked where a block is not run.
const FOREIGN: [&str; 7] = [
    "python3",
    "venv/bin/pip",
    "venv/bin/python",
    "rustup",
    "sleep",
    "curl",
    "benches/peers/peers.py",
];
/// Stands where a document has a key.
const KEY: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// Far more than any of it takes.
const PATIENCE: Duration = Duration::from_secs(600);

fn workspace() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.ancestors().nth(2).unwrap().to_owned()
}

/// A document's commands.
#[derive(Debug, Default, PartialEq)]
struct Commands {
    /// Blocks of `sh`.
    blocks: Vec<String>,
    /// What stands between backticks in the text.
    spans: Vec<String>,
}

fn commands(text: &str) -> Commands {
    let mut found = Commands::default();
    let (mut fence, mut prose) = (None, String::new());
    for line in text.lines() {
        match (&mut fence, line.trim().strip_prefix("```")) {
            (None, Some(language)) => fence = Some((language == "sh", String::new())),
            (Some((is_sh, block)), Some(_)) => {
                if *is_sh {
                    found.blocks.push(std::mem::take(block));
                }
                fence = None;
            }
            (Some((_, block)), None) => {
                block.push_str(line);
                block.push('\n');
            }
            // A span may go on in the next line, but not in the next paragraph or cell.
            (None, None) if line.trim().is_empty() || line.starts_with('|') => {
                prose.push_str("``\n");
                prose.push_str(line);
            }
            (None, None) => {
                prose.push_str(line.trim());
                prose.push(' ');
            }
        }
    }
    for paragraph in prose.split("``\n") {
        let spans = paragraph.split('`').skip(1).step_by(2);
        found.spans.extend(spans.map(str::to_owned));
    }
    found
}

/// Whether what stands between backticks is a command with arguments.
fn is_command(span: &str) -> bool {
    let program = span.split_once(' ').map(|(program, _)| program);
    program.is_some_and(|program| OURS.contains(&program) || program == "cargo")
}

/// A command line in the text as somebody would type it, with everything in it that stands in brackets; nothing of one that
/// leaves something out.
fn typed(span: &str) -> Option<String> {
    let whole = !span.contains(['…', '<', '{', '|', '(']);
    let line = span.replace(['[', ']'], "");
    let words = line.split(' ').map(|word| match word {
        "HEX" => KEY,
        "N" => "1",
        word => word,
    });
    whole.then(|| words.collect::<Vec<_>>().join(" "))
}

/// Every document of the repository, by its path in it.
fn documents() -> BTreeMap<String, String> {
    let root = workspace();
    let mut found = BTreeMap::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let looked_into =
                !name.starts_with('.') && !["target", "corpus", "shared"].contains(&&*name);
            if path.is_dir() && looked_into {
                folders.push(path);
            } else if name.ends_with(".md") {
                let short = path.strip_prefix(&root).unwrap().display().to_string();
                found.insert(short, fs::read_to_string(&path).unwrap());
            }
        }
    }
    assert!(found.len() > 15, "{:?}", found.keys());
    found
}

/// Whether a block of the README is run.
fn is_run(block: &str) -> bool {
    !block.lines().any(|line| line.starts_with("cargo "))
}

/// A shell and all that it starts; nothing of it outlives this.
struct Shell(Child);

impl Shell {
    fn run(command: &mut Command) -> (bool, String) {
        let log = tempfile::NamedTempFile::new().unwrap();
        // Both append to one file, so that lines stay in order.
        let appending = || fs::File::options().append(true).open(log.path()).unwrap();
        command.stdin(Stdio::null()).process_group(0);
        command.stdout(appending()).stderr(appending());
        let mut shell = Shell(command.spawn().unwrap());
        let start = Instant::now();
        let status = loop {
            match shell.0.try_wait().unwrap() {
                Some(status) => break Some(status),
                None if start.elapsed() > PATIENCE => break None,
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        drop(shell);
        let said = fs::read_to_string(log.path()).unwrap();
        (status.is_some_and(|status| status.success()), said)
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
        let _ = self.0.wait();
    }
}

#[test]
fn the_readme_works_as_written() {
    if Command::new("curl").arg("--version").output().is_err() {
        println!("skipped: the commands of the README: curl is not installed");
        return;
    }
    let stage = Stage::new().unwrap();
    let programs = Deployment::programs_of_this_build().unwrap();
    fs::rename(stage.tiny_model(), stage.path("model.gguf")).unwrap();
    let readme = commands(&fs::read_to_string(workspace().join("README.md")).unwrap());
    let run: Vec<&str> = readme
        .blocks
        .iter()
        .map(String::as_str)
        .filter(|b| is_run(b))
        .collect();
    assert!(run.len() >= 2, "the README has lost its blocks");
    // The ports of the README may be taken here; on an address of our own they are free.
    let id = std::process::id();
    let address = format!(
        "127.{}.{}.{}",
        64 + (id >> 16) % 64,
        (id >> 8) % 256,
        id % 254 + 1
    );
    let typed = run.concat().replace("127.0.0.1:", &format!("{address}:"));
    assert!(typed.matches(&address).count() >= 6, "{typed}");
    // A reader sees that a command failed, and stops.
    let script = format!(
        "set -Eeuo pipefail\ntrap 'echo \"FAILED: $BASH_COMMAND\"' ERR\n{typed}\nwait\necho nothing is left: $(jobs -pr)\n"
    );
    fs::write(stage.path("typed.sh"), script).unwrap();
    let path = std::env::var("PATH").unwrap();
    let (done, said) = Shell::run(
        Command::new("bash")
            .arg("typed.sh")
            .current_dir(stage.path(""))
            .env("PATH", format!("{}:{path}", programs.display())),
    );
    let log = |name: &str| fs::read_to_string(stage.path(name)).unwrap_or_default();
    let logs = ["tee.log", "broker.log", "enclave.log", "proxy.log"]
        .map(log)
        .join("\n");
    assert!(done, "{said}\n{logs}");
    assert!(said.ends_with("nothing is left:\n"), "{said}");

    for part in [
        "TRUSTED: NOT A TEE",
        "it made exactly this answer",
        "NOT proven",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let json = |name: &str| -> Value { serde_json::from_str(&log(name)).unwrap() };
    let answer = json("answer.json");
    assert!(
        answer["choices"][0]["message"]["content"].is_string(),
        "{answer}"
    );
    let saved = json(&format!("receipts/{}.json", answer["id"].as_str().unwrap()));
    assert_eq!(json("again.json")["receipt"], saved["receipt"]);
}

/// Runs shell lines in which every program only looks at its arguments; returns what was understood, and what was not.
struct Dry {
    folder: tempfile::TempDir,
    programs: PathBuf,
}

impl Dry {
    fn new() -> Dry {
        let dry = Dry {
            folder: tempfile::tempdir().unwrap(),
            programs: Deployment::programs_of_this_build().unwrap(),
        };
        for program in OURS {
            let real = dry.programs.join(program);
            assert!(
                real.is_file(),
                "{program} is not built; run `cargo build --workspace --bins`"
            );
            let body = format!("understand '{}' '{program}' \"$@\"\n", real.display());
            dry.stub(program, &body);
        }
        let xtask = dry.programs.join("xtask");
        let cargo = format!(
            "if [ \"$1\" = xtask ]; then shift; understand '{}' 'cargo xtask' \"$@\"; else echo \"$*\" >> \"$DRY/log/cargo\"; fi\n",
            xtask.display()
        );
        dry.stub("cargo", &cargo);
        for program in FOREIGN {
            dry.stub(program, "");
        }
        dry
    }

    fn stub(&self, program: &str, body: &str) {
        let path = self.folder.path().join(program);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // What it prints stands for whatever the next command takes from it.
        let script = format!(
            "#!/bin/bash\nunderstand() {{\n  local real=$1 name=$2; shift 2\n  \
             if said=$(\"$real\" \"$@\" --help 2>&1); then echo \"$name $*\" >> \"$DRY/log/understood\"; echo {KEY}\n  \
             else echo \"$name $*: ${{said%%$'\\n'*}}\" >> \"$DRY/log/refused\"; fi\n}}\n{body}"
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// `understood`, `refused`, `cargo`, line by line.
    fn lines(&self, of: &str) -> Vec<String> {
        let text = fs::read_to_string(self.folder.path().join("log").join(of)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// What was refused, or cannot be run at all.
    fn understands(&self, script: &str) -> Vec<String> {
        let logs = self.folder.path().join("log");
        let _ = fs::remove_dir_all(&logs);
        fs::create_dir(&logs).unwrap();
        let (_, said) = Shell::run(
            Command::new("/bin/bash")
                .args(["-c", script])
                .current_dir(self.folder.path())
                .env_clear()
                .env("DRY", self.folder.path())
                .env("PATH", self.folder.path())
                .env("provider", KEY)
                .env("issuer", KEY),
        );
        let fatal = [
            "command not found",
            "syntax error",
            "No such file or directory",
        ];
        let unknown = said
            .lines()
            .filter(|line| fatal.iter().any(|text| line.contains(text)));
        let mut refused = self.lines("refused");
        refused.extend(unknown.map(str::to_owned));
        refused
    }
}

#[test]
fn every_command_in_the_documents_is_understood() {
    let dry = Dry::new();
    let targets = Targets::of_this_workspace();
    let (mut wrong, mut only_understood) = (Vec::new(), BTreeSet::new());
    for (document, text) in documents() {
        let found = commands(&text);
        let not_run = |block: &&String| document != "README.md" || !is_run(block);
        let blocks = found.blocks.iter().filter(not_run).cloned();
        let in_text = found.spans.iter().filter(|span| is_command(span));
        let (spans, parts): (Vec<_>, Vec<_>) = in_text.partition(|span| typed(span).is_some());
        for part in parts {
            println!("only a part, not looked at: {document}: {part}");
        }
        let spans = spans.into_iter().filter_map(|span| typed(span));
        for script in blocks.chain(spans) {
            let refused = dry.understands(&script);
            wrong.extend(
                refused
                    .into_iter()
                    .map(|line| format!("{document}: {line}")),
            );
            for line in dry.lines("cargo") {
                wrong.extend(
                    targets
                        .missing(&line)
                        .map(|name| format!("{document}: cargo {line}: no {name}")),
                );
                only_understood.insert(format!("{document}: cargo {line}"));
            }
            let understood = dry.lines("understood");
            only_understood.extend(
                understood
                    .into_iter()
                    .map(|line| format!("{document}: {line}")),
            );
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for line in &only_understood {
        println!("only understood, not run: {line}");
    }
    assert!(only_understood.len() > 40, "{only_understood:?}");
}

/// Packages and targets of the workspace, by kind.
struct Targets(BTreeSet<(String, String)>);

impl Targets {
    fn of_this_workspace() -> Targets {
        let output = Command::new(env!("CARGO"))
            .args([
                "metadata",
                "--no-deps",
                "--offline",
                "--format-version",
                "1",
            ])
            .current_dir(workspace())
            .output()
            .unwrap();
        let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let mut all = BTreeSet::new();
        for package in metadata["packages"].as_array().unwrap() {
            all.insert(("-p".to_owned(), text(&package["name"])));
            for target in package["targets"].as_array().unwrap() {
                all.insert((
                    format!("--{}", text(&target["kind"][0])),
                    text(&target["name"]),
                ));
            }
        }
        Targets(all)
    }

    /// The first package or target in a command of cargo that does not exist.
    fn missing(&self, line: &str) -> Option<String> {
        let words: Vec<&str> = line
            .split_whitespace()
            .take_while(|word| *word != "--")
            .collect();
        let named = words
            .windows(2)
            .map(|pair| (pair[0].replace("--package", "-p"), pair[1].to_owned()));
        let kinds = ["-p", "--bin", "--example", "--test"];
        let mut checked = named.filter(|(option, _)| kinds.contains(&option.as_str()));
        let missing = checked.find(|named| !self.0.contains(named));
        missing.map(|(option, name)| format!("{option} {name}"))
    }
}

#[test]
fn commands_are_found_in_blocks_and_text() {
    let text = "Say `casemate check` or `cargo run -p casemate-e2e\n--bin soak`.\n\n| a | `casemate explain FILE` |\n\n\
                ```text\nnot `this`\n```\n```sh\none\n```\nA stray ` here\n\nand `casemate verify [--json]`.\n";
    let found = commands(text);
    assert_eq!(found.blocks, ["one\n"]);
    let spans = found.spans.iter().filter(|span| is_command(span));
    let lines: Vec<_> = spans.filter_map(|span| typed(span)).collect();
    let expected = [
        "casemate check",
        "cargo run -p casemate-e2e --bin soak",
        "casemate explain FILE",
        "casemate verify --json",
    ];
    assert_eq!(lines, expected);
    assert!(!is_command("casemate-keyset: x") && is_command("casemate grant … --open"));
    assert_eq!(typed("casemate grant … --open"), None);
}

#[test]
fn a_command_that_drifted_is_noticed() {
    let dry = Dry::new();
    for (script, says) in [
        ("casemate proxy --enclaves http://x", "--enclaves"),
        ("x=$(casemate keygem)", "keygem"),
        ("casemate bench MODEL --kv-type f64 | cat", "f64"),
        (
            "a() { casemate-broker admin \"$@\"; }\na polizy set x",
            "polizy",
        ),
        ("for i in 1; do cargo xtask demos; done", "demos"),
        ("nosuchprogram", "nosuchprogram"),
        ("no/such/program", "no/such/program"),
    ] {
        let refused = dry.understands(script);
        assert!(
            refused.iter().any(|line| line.contains(says)),
            "{script}: {refused:?}"
        );
    }
    assert_eq!(
        dry.understands("casemate verify --service x --policy y &&\n  casemate keygen"),
        [""; 0]
    );
    assert_eq!(dry.lines("understood").len(), 2);
    let targets = Targets::of_this_workspace();
    assert_eq!(
        targets.missing("run --release -p casemate-e2e --bin soak -- --test x"),
        None
    );
    assert_eq!(
        targets.missing("test -p casemate-e3e"),
        Some("-p casemate-e3e".into())
    );
    assert_eq!(
        targets.missing("test -p casemate-e2e --test none"),
        Some("--test none".into())
    );
}
