//! One log entry on one line, for people. For programs there is `--json`.

use casemate_attest::UnixTime;
use serde_json::Value;

/// Digits that tell one digest from another, to the eye.
const SHORT: usize = 12;

/// Position, time, action, verdict, then whatever the entry says, by name.
pub(crate) fn line(entry: &Value) -> String {
    let time = UnixTime::from_secs(entry["time"].as_u64().unwrap_or_default());
    let mut line = format!(
        "{:>6}  {time}  {:<15} {:<12}",
        entry["position"].as_u64().unwrap_or_default(),
        clean(&entry["action"]),
        clean(&entry["verdict"]),
    );
    let mut add = |text: String| {
        line.push(' ');
        line.push_str(&text);
    };
    if let Some(count) = entry["count"].as_u64() {
        add(format!("{count} requests"));
    }
    if entry["subject"].is_string() {
        add(clean(&entry["subject"]));
    }
    if let Some(version) = entry["policy_version"].as_u64() {
        add(format!("policy={version}"));
    }
    if entry["measurement"].is_string() {
        add(format!("measurement={:?}", clean(&entry["measurement"])));
    }
    for name in ["model", "content", "session", "evidence"] {
        if entry[name].is_string() {
            let digest: String = clean(&entry[name]).chars().take(SHORT).collect();
            add(format!("{name}={digest}"));
        }
    }
    if entry["access"].is_string() {
        add(format!("access={}", clean(&entry["access"])));
    }
    if let Some(end) = entry["expires_at"].as_u64() {
        add(format!("until={}", UnixTime::from_secs(end)));
    }
    let denial = &entry["denial"];
    if denial.is_object() {
        add(format!(
            "{} is {}, expected {}",
            clean(&denial["claim"]),
            clean(&denial["found"]),
            clean(&denial["expected"]),
        ));
    }
    line.trim_end().to_owned()
}

/// Text without what could move a cursor, break the line or turn the writing around: strangers wrote some of it.
fn clean(value: &Value) -> String {
    let text = value.as_str().unwrap_or("-");
    text.chars()
        .map(|c| match c {
            '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '?',
            c if c.is_control() => '?',
            c => c,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_entry_is_one_readable_line() {
        let entry = json!({
            "position": 12, "previous": "00", "time": 1_780_000_000, "action": "release", "verdict": "development",
            "policy_version": 7, "session": "61".repeat(32), "subject": "default/model/smollm2",
            "measurement": "casemate-enclave 0.1.0", "model": "22".repeat(32),
        });
        assert_eq!(
            line(&entry),
            "    12  2026-05-28T20:26:40Z  release         development  default/model/smollm2 policy=7 \
             measurement=\"casemate-enclave 0.1.0\" model=222222222222 session=616161616161"
        );
        let entry = json!({
            "position": 13, "previous": "00", "time": 1_780_000_001, "action": "attest", "verdict": "denied",
            "denial": { "class": "refused", "claim": "mr_td", "found": "a\u{1b}[2Jb\nc\u{202e}d",
                        "expected": "e", "remedy": "f" },
        });
        assert_eq!(
            line(&entry),
            "    13  2026-05-28T20:26:41Z  attest          denied       mr_td is a?[2Jb?c?d, expected e"
        );
        let entry = json!({ "position": 14, "time": 0, "action": "suppressed", "verdict": "denied", "count": 31 });
        assert!(line(&entry).ends_with("denied       31 requests"));
    }
}
