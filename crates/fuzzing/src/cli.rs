//! What `casemate explain` reads: whatever somebody was sent and does not understand.

use casemate_cli::explain::Findings;

/// A transcript, a log, an answer. What is printed cannot move a terminal's cursor or turn a line around, and an
/// explanation is not explained again.
pub(crate) fn explain(data: &[u8]) {
    let findings = match Findings::read(data) {
        Ok(findings) => findings,
        Err(looks_like) => {
            assert!(!looks_like.is_empty());
            return;
        }
    };
    let text = findings.to_text(false);
    assert!(!text.is_empty());
    let moves = |c: char| {
        c.is_control() && c != '\n'
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    assert!(!text.contains(moves), "{text:?}");
    let json = findings.to_json();
    let count = json["explanations"].as_array().map_or(0, Vec::len);
    assert_eq!(count == 0, findings.is_empty());
    let again = serde_json::to_vec(&json).expect("JSON is written");
    assert!(
        Findings::read(&again).is_err(),
        "an explanation was explained"
    );
}

/// What each program prints, logs or answers when it refuses.
pub(crate) fn explain_seeds() -> Vec<Vec<u8>> {
    let denial = r#"{"class":"refused","by":"broker","claim":"debug","found":"on","expected":"off","remedy":"stop"}"#;
    let transcript = r#""transcript":{"checks":[{"name":"tee","status":"passed","found":"tdx"},
        {"name":"xfam","status":"failed","found":"ff","expected":"e7","remedy":"start it again"}]}"#;
    [
        format!(r#"{{"verdict":"refused","subject":"http://x","denial":{denial},{transcript}}}"#),
        format!("{{\"position\":0,\"action\":\"begin\"}}\n{{\"position\":1,\"action\":\"attest\",\"subject\":\"a\",\"denial\":{denial}}}\n"),
        format!(r#"{{"entries":[{{"position":1,"action":"attest","denial":{denial}}}]}}"#),
        format!("INFO starting\nerror: x\ndenial: {denial}\nmore\n"),
        r#"{"error":{"class":"not-authentic","code":"chunk","message":"m"}}"#.into(),
        r#"{"error":{"message":"m","type":"proxy_error","param":"n","code":"key_refused"}}"#.into(),
        format!(r#"{{"type":"about:blank","title":"the request was sent before","status":409,"detail":"d","denial":{denial}}}"#),
        r#"{"verified":true,"model_digest":"00","checks":[]}"#.into(),
        "version = 1\ntee = [\"tdx\"]\n[[measurement]]\n".into(),
        "-----BEGIN PUBLIC KEY-----\n".into(),
    ]
    .map(String::into_bytes)
    .into()
}
