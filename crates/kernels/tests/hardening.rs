//! What a hardened process is like, seen from a child that hardens itself: the harness must stay as it is.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use casemate_kernels::hardening::{Swap, at_start, before_secrets};

const ROLE: &str = "CASEMATE_HARDENING_TEST_ROLE";
const SECRET: &str = "canary-9f27";

/// Runs this test program again as `role`, in a directory of its own, with core files allowed as far as they are.
fn child(test: &str, role: &str, directory: &std::path::Path) -> Output {
    let program = std::env::current_exe().unwrap();
    Command::new("sh")
        .args(["-c", "ulimit -S -c \"$(ulimit -H -c)\"; exec \"$@\"", "sh"])
        .arg(program)
        .args(["--exact", test, "--nocapture"])
        .env(ROLE, role)
        .current_dir(directory)
        .output()
        .unwrap()
}

fn directory(name: &str) -> std::path::PathBuf {
    let path = std::env::temp_dir().join(format!("casemate-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

#[test]
fn a_hardened_process_has_no_cores_and_cannot_be_dumped() {
    if std::env::var_os(ROLE).is_some() {
        at_start();
        let granted = before_secrets();
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
        let core = limits
            .lines()
            .find(|line| line.starts_with("Max core file size"));
        let fields: Vec<_> = core.unwrap().split_whitespace().skip(4).take(2).collect();
        assert!(fields == ["1", "1"] || fields == ["0", "0"], "{fields:?}");
        assert_eq!(dumpable(), 0, "{granted}");
        assert!(granted.no_core_files && granted.not_dumpable);
        let locked = locked_kib();
        match granted.swap {
            Swap::Nothing => assert!(locked > 0),
            Swap::BeyondLimit(_) | Swap::Refused => assert_eq!(locked, 0),
        }
        // What comes later is locked, too, once it is touched.
        let later = vec![1u8; 8 << 20];
        let grown = locked_kib() - locked;
        assert_eq!(
            grown >= 8 << 10,
            granted.swap == Swap::Nothing,
            "{grown} KiB"
        );
        drop(later);
        println!("hardened: {granted}");
        return;
    }
    let directory = directory("hardening");
    let test = "a_hardened_process_has_no_cores_and_cannot_be_dumped";
    let output = child(test, "states", &directory);
    let shown = String::from_utf8_lossy(&output.stdout);
    std::fs::remove_dir_all(&directory).unwrap();
    assert!(
        output.status.success(),
        "{shown}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        shown.contains("hardened: no core files: granted; no dumps or tracing: granted"),
        "{shown}"
    );
}

#[test]
fn a_hardened_process_that_aborts_leaves_no_core() {
    if std::env::var_os(ROLE).is_some() {
        at_start();
        before_secrets();
        std::process::abort();
    }
    let directory = directory("abort");
    let output = child(
        "a_hardened_process_that_aborts_leaves_no_core",
        "aborts",
        &directory,
    );
    let left = std::fs::read_dir(&directory).unwrap().count();
    std::fs::remove_dir_all(&directory).unwrap();
    assert_eq!(output.status.signal(), Some(6));
    assert!(!output.status.core_dumped());
    assert_eq!(left, 0, "a file was left behind");
}

#[test]
fn a_panic_says_where_but_not_what() {
    if std::env::var_os(ROLE).is_some() {
        at_start();
        // As slicing in the middle of a character does, whose message quotes the text.
        let text = format!("{SECRET} é");
        let at = text.len() - 1;
        let _ = std::thread::spawn(move || text[..at].len()).join();
        std::process::exit(3);
    }
    let directory = directory("panic");
    let output = child("a_panic_says_where_but_not_what", "panics", &directory);
    std::fs::remove_dir_all(&directory).unwrap();
    let written = [output.stdout, output.stderr].concat();
    let written = String::from_utf8_lossy(&written);
    assert_eq!(output.status.code(), Some(3), "{written}");
    assert!(written.contains("tests/hardening.rs"), "{written}");
    assert!(written.contains("the message is withheld"), "{written}");
    assert!(!written.contains(SECRET), "{written}");
}

fn dumpable() -> i32 {
    // SAFETY: this option takes and touches no memory.
    unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) }
}

fn locked_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmLck:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
