//! What a file looks like that is not what a command expected, and which command takes it. It goes by the beginning and
//! by names of fields, decides nothing, and never repeats contents.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use casemate_attest::UnixTime;
use casemate_release::grant;
use serde_json::Value;

/// So much of a file is read to tell what it is; all of what is JSON and not a model.
const LOOKED_AT: u64 = 1 << 20;
const SOME_TEXT: &str = "this is text without a refusal that casemate knows";

/// The beginning of a file for [`describe`]; nothing of what cannot be read, which whoever opens it will say.
pub(crate) fn beginning(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    if path.is_file()
        && let Ok(file) = File::open(path)
    {
        let _ = file.take(LOOKED_AT).read_to_end(&mut bytes);
    }
    bytes
}

/// One sentence about a file that was taken for something else, if there is anything to say; `expected` is what it was
/// taken for, as [`describe`] says it.
pub(crate) fn instead_of(expected: &str, bytes: &[u8]) -> Option<&'static str> {
    let described = describe(bytes);
    let rest = described.strip_prefix("this is ").unwrap_or(described);
    (described != SOME_TEXT && !rest.starts_with(expected)).then_some(described)
}

/// One sentence about a directory that was given where a file is read.
pub(crate) fn describe_directory(path: &Path) -> &'static str {
    let has = |name: &str| path.join(name).exists();
    if has("config.json") {
        return "this is a directory with a model; `casemate seal` takes it";
    }
    if has("data-key.pem") || has("signing-key.pem") {
        return "this is a directory of keys, as `casemate keygen` makes it; give one of its files";
    }
    if has("admin.sock") {
        return "this is a broker's state; `casemate-broker serve --state` takes it";
    }
    "this is a directory; give one file"
}

/// One sentence about the file.
pub(crate) fn describe(bytes: &[u8]) -> &'static str {
    let starts = |magic: &[u8]| bytes.starts_with(magic);
    if bytes.is_empty() {
        return "the file is empty";
    }
    if starts(b"\x89CSMT") {
        return "this is a sealed model; `casemate check` and `casemate inspect` read it";
    }
    if starts(b"GGUF") {
        return "this is a GGUF model that is not sealed; `casemate seal` takes it";
    }
    if starts(b"PK\x03\x04") {
        return "this is a zip archive, in which PyTorch keeps models; convert it to safetensors or GGUF first";
    }
    // safetensors: the length of a JSON header, then the header.
    if bytes.get(8) == Some(&b'{') && bytes[..8].ends_with(&[0, 0]) {
        return "this is a safetensors file; `casemate seal` takes the directory that it lies in";
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => describe_text(text),
        Err(error) if error.valid_up_to() + 4 > bytes.len() => {
            "this is text that ends in the middle"
        }
        Err(_) if grant::inspect(bytes).is_ok() => {
            "this is a key grant, which is secret; `casemate-broker admin resource put --grant` takes it"
        }
        Err(_) => "this is a binary file of a kind that casemate does not know",
    }
}

fn describe_text(text: &str) -> &'static str {
    // First, as evidence has certificates in it.
    if let Ok(value) = serde_json::from_str::<Value>(text) {
        return describe_json(&value);
    }
    if text.trim_start().starts_with('{')
        && text
            .lines()
            .nth(1)
            .is_none_or(|line| !line.starts_with('{'))
    {
        return "this begins as JSON does, but is not whole, or something else is in it";
    }
    if text.contains("-----BEGIN CASEMATE DATA KEY") {
        return "this is a data key, which is secret; `casemate seal`, `check` and `grant` take it as --data-key";
    }
    if text.contains("-----BEGIN PRIVATE KEY") {
        return "this is a private key, which is secret; `casemate seal` and `grant` take it as --signing-key";
    }
    if text.contains("-----BEGIN PUBLIC KEY") {
        return "this is a public key; `casemate check` takes it as --provider";
    }
    if text.contains("-----BEGIN CERTIFICATE") {
        return "these are certificates; `casemate verify` takes certificate authorities as --ca";
    }
    let has = |field: &str| {
        text.lines()
            .any(|line| line.trim_start().starts_with(field))
    };
    if has("[[measurement]]") || has("tee = ") {
        return "this is a policy; `casemate verify --policy` takes it, and `casemate-broker admin policy set`";
    }
    if has("[[key]]") {
        return "this is a list of API keys; `casemate grant --api-keys` takes it";
    }
    if has("[broker]") && has("[model]") {
        return "this is an enclave's configuration; `casemate measure --config` takes it, and `casemate-enclave`";
    }
    if text.contains("passed  ") || text.contains("FAILED  ") {
        return "this is a transcript for people; run the command again with --json and give that";
    }
    if text.lines().any(is_log_line) {
        return "these are lines of the broker's log for people; run `casemate-broker admin log show --json` and give that";
    }
    if text.lines().any(|line| line.starts_with("error: ")) {
        return "this is a program's log without a denial; its line that begins with \"error: \" says already what is known";
    }
    if text.contains("casemate: ") {
        return "this is a message for people, which says already what is known; with --json, commands say more";
    }
    SOME_TEXT
}

/// Position and time, as `casemate-broker admin log show` begins a line.
fn is_log_line(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let position = words.next().and_then(|word| word.parse::<u64>().ok());
    let time = words.next().and_then(|word| word.parse::<UnixTime>().ok());
    position.is_some() && time.is_some() && words.count() >= 2
}

fn describe_json(value: &Value) -> &'static str {
    let has = |name: &str| value.get(name).is_some();
    if has("explanations") {
        return "this is what `casemate explain --json` printed";
    }
    if has("quote") && has("tee") {
        return "this is evidence; `casemate verify --evidence` judges it";
    }
    if has("keyset") && has("credential") && has("evidence") {
        return "this is a service's attestation; `casemate verify --service` fetches and judges it";
    }
    if has("receipt") || has("receipts") {
        return "this is a receipt; `casemate receipt verify` judges it";
    }
    if has("choices") {
        return "this is an answer of a model, in which nothing was refused";
    }
    if has("header") && has("manifest") {
        return "this is what `casemate inspect --json` printed, which judges nothing; `casemate check` does";
    }
    "this is JSON of a kind that casemate does not know"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_command_that_takes_a_file() {
        for (bytes, command) in [
            (&b"\x89CSMT\r\x1a\n"[..], "casemate check"),
            (b"GGUF\x03\0\0\0", "casemate seal"),
            (b"\x10\0\0\0\0\0\0\0{\"a\":1}", "directory"),
            (b"-----BEGIN CASEMATE DATA KEY-----", "--data-key"),
            (b"version = 1\ntee = [\"tdx\"]\n", "--policy"),
            (b"[model]\n[broker]\n", "casemate measure"),
            (b"{\"tee\":\"tdx\",\"quote\":\"\"}", "--evidence"),
            (b"{\"receipt\":1}", "receipt verify"),
            (b"{\"receipt\":", "not whole"),
            (b"FAILED   debug   on", "--json"),
            (
                b"     3  2026-11-21T17:06:11Z  attest          development  policy=1\n",
                "admin log show --json",
            ),
            (b"casemate: no such file\n", "with --json"),
            (b"", "empty"),
            (b"\xff\xfe\0\0\0\0\0\0\0", "binary"),
        ] {
            let described = describe(bytes);
            assert!(described.contains(command), "{command}: {described}");
        }
        // An enclave has no --json.
        let log =
            b"2026-11-21T17:12:22Z  INFO evidence source\nerror: cannot listen on 127.0.0.1:80\n";
        let described = describe(log);
        assert!(described.contains("says already"), "{described}");
        assert!(!described.contains("--json"), "{described}");
    }

    #[test]
    fn says_what_was_given_instead_only_where_that_helps() {
        let policy = b"version = 1\ntee = [\"tdx\"]\n";
        assert_eq!(instead_of("a policy", policy), None);
        assert!(instead_of("a receipt", policy).is_some());
        assert_eq!(instead_of("a policy", b"hello"), None);
    }
}
