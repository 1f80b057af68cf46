//! Finds the refusals in what programs printed, logged and answered. What it reads is for people to understand and comes
//! from anywhere; nothing is decided by it.

use std::collections::HashSet;

use serde_json::Value;

use super::TELLS_MORE;

/// One refusal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Finding {
    /// Who refused.
    pub(super) by: &'static str,
    /// The claim that failed.
    pub(super) claim: String,
    /// Whose fault it is.
    pub(super) class: Option<String>,
    /// What was found.
    pub(super) found: String,
    /// What would have been accepted; may be empty.
    pub(super) expected: String,
    /// What the program that refused advises; may be empty.
    pub(super) remedy: String,
    /// Where it happened.
    pub(super) context: Option<String>,
}

/// The refusals in a transcript, none if nothing was refused; `None` if this is no transcript.
pub(super) fn findings(bytes: &[u8]) -> Option<Vec<Finding>> {
    let text = std::str::from_utf8(bytes).ok()?;
    if let Ok(value) = serde_json::from_str::<Value>(text) {
        return of_value(&value);
    }
    // One object a line, or a log with a denial in it.
    let mut all = Vec::new();
    let mut recognised = false;
    for line in text.lines() {
        let json = line.strip_prefix("denial: ").unwrap_or(line);
        let found = serde_json::from_str(json)
            .ok()
            .and_then(|value| of_value(&value));
        recognised |= found.is_some();
        all.extend(found.into_iter().flatten());
    }
    recognised.then_some(all)
}

fn of_value(value: &Value) -> Option<Vec<Finding>> {
    let object = value.as_object()?;
    let has = |name: &str| object.contains_key(name);
    if has("explanations") {
        return None;
    }
    if has("position") && has("action") {
        return Some(of_log(value));
    }
    if has("transcript") || has("checks") {
        return Some(of_transcript(value));
    }
    if has("claim") && has("found") {
        return Some(of_denial(value, "the enclave"));
    }
    if has("verified") && has("model_digest") {
        return Some(Vec::new());
    }
    if has("entries") {
        let entries = value["entries"].as_array()?;
        return Some(entries.iter().flat_map(of_log).collect());
    }
    if value["error"].is_object() {
        return Some(vec![of_error(&value["error"])]);
    }
    if has("type") && (has("detail") || has("title")) {
        return Some(of_problem(value));
    }
    None
}

fn text(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or("").to_owned()
}

fn some(value: &Value, name: &str) -> Option<String> {
    value[name].as_str().map(str::to_owned)
}

fn of_denial(denial: &Value, by: &'static str) -> Vec<Finding> {
    if !denial.is_object() {
        return Vec::new();
    }
    vec![Finding {
        by: match denial["by"].as_str() {
            Some("broker") => "the broker",
            _ => by,
        },
        claim: text(denial, "claim"),
        class: some(denial, "class"),
        found: text(denial, "found"),
        expected: text(denial, "expected"),
        remedy: text(denial, "remedy"),
        context: None,
    }]
}

/// `verify --json` and whatever else has a denial and a list of checks. The denial is the first check that failed; the
/// others are told, too.
fn of_transcript(value: &Value) -> Vec<Finding> {
    let by = "your own verification";
    let mut all = of_denial(&value["denial"], by);
    let transcript = match value["transcript"].is_object() {
        true => &value["transcript"],
        false => value,
    };
    let mut told: HashSet<String> = all.iter().map(|finding| finding.claim.clone()).collect();
    for check in transcript["checks"].as_array().into_iter().flatten() {
        let claim = text(check, "name");
        if check["status"] == "failed" && told.insert(claim.clone()) {
            all.push(Finding {
                by,
                claim,
                class: None,
                found: text(check, "found"),
                expected: text(check, "expected"),
                remedy: text(check, "remedy"),
                context: None,
            });
        }
    }
    let subject = some(value, "subject");
    for finding in &mut all {
        finding.context = subject.clone();
    }
    all
}

/// An entry of the broker's log.
fn of_log(entry: &Value) -> Vec<Finding> {
    let mut all = of_denial(&entry["denial"], "the broker");
    for finding in &mut all {
        let mut context = format!("log entry {}, {}", entry["position"], text(entry, "action"));
        if let Some(subject) = entry["subject"].as_str() {
            context.push_str(&format!(" of {subject}"));
        }
        finding.context = Some(context);
    }
    all
}

/// An error of a command, of the proxy, or of the service's API.
fn of_error(error: &Value) -> Finding {
    let by = match (error["class"].is_string(), error["type"].as_str()) {
        (true, _) => "casemate",
        (false, Some("proxy_error")) => "the proxy",
        (false, _) => "the proxy or the service",
    };
    let class = some(error, "class").or_else(|| some(error, "type"));
    Finding {
        by,
        claim: some(error, "code")
            .or_else(|| class.clone())
            .unwrap_or_default(),
        class,
        found: match text(error, "message") {
            message if message.ends_with(TELLS_MORE) => message.replace(TELLS_MORE, ""),
            message => message,
        },
        context: some(error, "param").map(|param| format!("parameter {param}")),
        ..Finding::default()
    }
}

/// An answer of the broker, or an enclave's refusal outside of the channel.
fn of_problem(problem: &Value) -> Vec<Finding> {
    let denied = of_denial(&problem["denial"], "the broker");
    if !denied.is_empty() {
        return denied;
    }
    let title = text(problem, "title");
    let claim = match title.as_str() {
        "the request was sent before" => "request.replayed".to_owned(),
        "the request cannot be opened" => "request.sealed".to_owned(),
        "the key is not held" => "key_refused".to_owned(),
        "the request is too large" => "request_too_large".to_owned(),
        _ => text(problem, "type"),
    };
    let by = if title.is_empty() {
        "the broker"
    } else {
        "the enclave"
    };
    vec![Finding {
        by,
        claim,
        found: if title.is_empty() {
            text(problem, "detail")
        } else {
            title
        },
        ..Finding::default()
    }]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(input: &str) -> Option<Vec<String>> {
        let findings = findings(input.as_bytes())?;
        Some(findings.into_iter().map(|finding| finding.claim).collect())
    }

    const DENIAL: &str =
        r#"{"class":"refused","claim":"debug","found":"on","expected":"off","remedy":"stop"}"#;

    #[test]
    fn tells_the_denial_first_and_the_other_failures_once() {
        let input = format!(
            r#"{{"verdict":"refused","subject":"http://x","denial":{DENIAL},"transcript":{{"checks":[
                {{"name":"tee","status":"passed","found":"tdx"}},
                {{"name":"debug","status":"failed","found":"on"}},
                {{"name":"xfam","status":"failed","found":"ff"}}]}}}}"#
        );
        assert_eq!(claims(&input).unwrap(), ["debug", "xfam"]);
        let all = findings(input.as_bytes()).unwrap();
        assert_eq!(all[0].context.as_deref(), Some("http://x"));
        let trusted = r#"{"verdict":"trusted","denial":null,"transcript":{"checks":[]}}"#;
        assert_eq!(claims(trusted).unwrap(), [""; 0]);
    }

    #[test]
    fn reads_logs_line_by_line() {
        let log = format!(
            "{{\"position\":0,\"action\":\"begin\",\"verdict\":\"administered\"}}\n\
             {{\"position\":1,\"action\":\"attest\",\"verdict\":\"denied\",\"denial\":{DENIAL}}}\n"
        );
        assert_eq!(claims(&log).unwrap(), ["debug"]);
        let all = findings(log.as_bytes()).unwrap();
        assert_eq!(all[0].context.as_deref(), Some("log entry 1, attest"));
        let start = format!("INFO starting\nerror: x\ndenial: {DENIAL}\nmore\n");
        assert_eq!(claims(&start).unwrap(), ["debug"]);
    }

    #[test]
    fn reads_errors_of_commands_proxy_broker_and_enclave() {
        for (input, by, claim) in [
            (
                r#"{"error":{"class":"not-authentic","code":"chunk","message":"m"}}"#,
                "casemate",
                "chunk",
            ),
            (
                r#"{"error":{"message":"m","type":"proxy_error","param":null,"code":"key_refused"}}"#,
                "the proxy",
                "key_refused",
            ),
            (
                r#"{"type":"no_policy","detail":"none"}"#,
                "the broker",
                "no_policy",
            ),
            (
                r#"{"type":"about:blank","title":"the request was sent before","status":409}"#,
                "the enclave",
                "request.replayed",
            ),
        ] {
            let all = findings(input.as_bytes()).unwrap();
            assert_eq!((all[0].by, all[0].claim.as_str()), (by, claim), "{input}");
        }
    }

    #[test]
    fn what_is_being_explained_does_not_ask_to_be_explained() {
        let message = format!("the service is unreachable: http://x{TELLS_MORE}");
        let answer = serde_json::json!({"error": {"message": message, "type": "proxy_error"}});
        let all = findings(answer.to_string().as_bytes()).unwrap();
        assert_eq!(all[0].found, "the service is unreachable: http://x");
    }

    #[test]
    fn other_things_are_no_transcripts() {
        for input in [
            "",
            "version = 1\n",
            "{}",
            "[1]",
            "null",
            "{\"tee\":\"tdx\"}",
            "hello\nworld",
        ] {
            assert_eq!(claims(input), None, "{input}");
        }
        assert_eq!(findings(b"\x89CSMT"), None);
    }
}
