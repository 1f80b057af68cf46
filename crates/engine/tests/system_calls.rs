//! Decoding makes no system call in the engine's threads: counted by `strace`, which starts this
//! program a second time.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::channel;

use casemate_engine::{Compute, EngineOptions, Event, Request, Speculation};
use casemate_kernels::team::PATIENCE;
use support::tiny::{Tiny, llama};
use support::{load, options};

/// Tells the second run how many `pause` instructions the team may wait.
const PATIENCE_OF_WATCHED: &str = "CASEMATE_TEST_PATIENCE";
/// Tells it whether tokens are guessed.
const SPECULATION_OF_WATCHED: &str = "CASEMATE_TEST_SPECULATION";
/// Looking for this file marks the ends of what is counted.
const MARK: &str = "/casemate-no-such-file";
/// Tokens before counting begins, and while it lasts.
const FIRST: usize = 50;
const COUNTED: usize = 200;

/// Decodes, and marks in the list of system calls where counting begins and ends.
fn decode(patience: u32, speculation: Speculation) {
    let model = Tiny::new(llama(), 32);
    let engine = load(
        &model,
        &EngineOptions {
            threads: 2,
            patience,
            speculation,
            ..options(Compute::Int8)
        },
    );
    let (sender, receiver) = channel::<()>();
    let mut tokens = 0;
    let sink = move |event: Event<'_>| {
        let _ = &sender;
        if let Event::Token { .. } = event {
            tokens += 1;
            if tokens == FIRST || tokens == FIRST + COUNTED {
                assert!(fs::metadata(MARK).is_err());
            }
        }
        ControlFlow::Continue(())
    };
    let request = Request {
        prompt: model.prompt(100, 1),
        max_tokens: FIRST + COUNTED + 10,
        ignore_end: true,
        ..Request::default()
    };
    engine.submit(request, Box::new(sink)).unwrap();
    // Closed when the sink is dropped.
    assert!(receiver.recv().is_err());
    let accepted = engine.stats().accepted_tokens;
    assert_eq!(accepted > 0, speculation == Speculation::PromptLookup);
}

/// How often the engine's threads made each system call while tokens were counted.
fn calls(log: &str) -> BTreeMap<String, usize> {
    // `TID name(arguments) = result`; the second half of an interrupted call says `<... name resumed>`.
    let lines: Vec<(&str, &str)> = log
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(thread, call)| (thread, call.trim_start()))
        .collect();
    let threads: BTreeSet<&str> = lines
        .iter()
        .filter(|(_, call)| call.starts_with("prctl(PR_SET_NAME, \"casemate-"))
        .map(|(thread, _)| *thread)
        .collect();
    assert_eq!(threads.len(), 2, "the engine's thread and one of the team");
    let marks: Vec<usize> = (0..lines.len())
        .filter(|&i| lines[i].1.contains(MARK))
        .collect();
    let [begin, end] = marks[..] else {
        panic!("{} marks", marks.len());
    };
    assert!(threads.contains(lines[begin].0));
    let mut calls = BTreeMap::new();
    for (thread, call) in &lines[begin + 1..end] {
        if threads.contains(thread)
            && !call.starts_with("<...")
            && let Some((name, _)) = call.split_once('(')
        {
            *calls.entry(name.to_owned()).or_default() += 1;
        }
    }
    calls
}

/// Runs this test again under `strace`.
fn watched(test: &str, patience: u32, speculation: Speculation) -> BTreeMap<String, usize> {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("calls");
    let run = Command::new("strace")
        .args(["-f", "-qq", "-o"])
        .arg(&log)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .env(PATIENCE_OF_WATCHED, patience.to_string())
        .env(SPECULATION_OF_WATCHED, speculation.name())
        .output()
        .unwrap();
    assert!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    calls(&fs::read_to_string(log).unwrap())
}

#[test]
fn decoding_makes_hardly_any_system_call() {
    const NAME: &str = "decoding_makes_hardly_any_system_call";
    if let Ok(patience) = std::env::var(PATIENCE_OF_WATCHED) {
        let name = std::env::var(SPECULATION_OF_WATCHED).unwrap();
        let speculation = Speculation::ALL.into_iter().find(|s| s.name() == name);
        return decode(patience.parse().unwrap(), speculation.unwrap());
    }
    if !Path::new("/usr/bin/strace").exists() {
        eprintln!("skipped: this system has no strace");
        return;
    }
    // On a busy machine members of a team lose patience with each other, so here they have no end of it.
    for speculation in Speculation::ALL {
        let calls = watched(NAME, u32::MAX, speculation);
        let all: usize = calls.values().sum();
        let how = speculation.name();
        eprintln!("{all} system calls in {COUNTED} tokens, speculation {how}: {calls:?}");
        assert!(all * 10 < COUNTED, "{calls:?}");
    }
    // With the usual patience they may sleep and wake each other, and nothing else.
    let usual = watched(NAME, PATIENCE, Speculation::None);
    eprintln!("with the usual patience: {usual:?}");
    let others = usual.keys().find(|name| *name != "futex");
    assert!(others.is_none(), "{usual:?}");
}

#[test]
fn calls_are_counted_between_the_marks_and_for_the_engines_threads_only() {
    let log = "\
10 prctl(PR_SET_NAME, \"system_calls\") = 0
11 prctl(PR_SET_NAME, \"casemate-1\") = 0
12 prctl(PR_SET_NAME, \"casemate-engine\"...) = 0
12 mmap(NULL, 4096) = 0x7f0000000000
12 statx(AT_FDCWD, \"/casemate-no-such-file\", 0) = -1 ENOENT
11 futex(0x1, FUTEX_WAIT_PRIVATE, 0, NULL <unfinished ...>
10 write(1, \"x\", 1) = 1
12 futex(0x1, FUTEX_WAKE_PRIVATE, 1) = 1
11 <... futex resumed>) = 0
12 madvise(0x7f0000000000, 4096, MADV_DONTNEED) = 0
12 statx(AT_FDCWD, \"/casemate-no-such-file\", 0) = -1 ENOENT
12 munmap(0x7f0000000000, 4096) = 0
";
    let expected = [("futex".to_owned(), 2), ("madvise".to_owned(), 1)];
    assert_eq!(calls(log), BTreeMap::from(expected));
}
