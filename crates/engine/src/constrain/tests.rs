//! The automaton against `serde_json`, and masks against the automaton.

use super::automaton::{MAX_BLANKS, MAX_DEPTH, MAX_DIGITS};
use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

/// What the automaton says of a text.
#[derive(Debug, PartialEq)]
enum Verdict {
    Complete,
    /// More must follow.
    Open,
    /// The byte at this place is refused.
    Refused(usize),
}

fn run(grammar: &Rules, text: &[u8]) -> Verdict {
    let mut automaton = Automaton::new(grammar.clone());
    for (at, &byte) in text.iter().enumerate() {
        if automaton.step(byte).is_none() {
            return Verdict::Refused(at);
        }
    }
    if automaton.is_complete() {
        Verdict::Complete
    } else {
        Verdict::Open
    }
}

/// Ends an open text as shortly as a search finds: the proof that it can be ended.
fn complete(grammar: &Rules, text: &[u8]) -> Vec<u8> {
    let mut automaton = Automaton::new(grammar.clone());
    for &byte in text {
        automaton.step(byte).expect("the text is accepted");
    }
    let mut text = text.to_vec();
    // Closing comes before opening, so this ends; the second half of a pair and the rest of words
    // are found byte by byte.
    let order = b"\"}]0\x80\x90\xa0\\udDcC18:{[etfnrasl,-.";
    let all: Vec<u8> = order.iter().copied().chain(b'a'..=b'z').collect();
    while !automaton.is_complete() {
        let next = all.iter().find(|&&byte| automaton.step(byte).is_some());
        text.push(*next.expect("every accepted text can be ended"));
        assert!(text.len() < 100_000);
    }
    text
}

fn values() -> impl Strategy<Value = Value> {
    let number = prop_oneof![
        any::<i64>().prop_map(|n| json!(n)),
        (-1.0e9..1.0e9).prop_map(|x: f64| json!(x)),
        (1.0e-60..1.0e-40).prop_map(|x: f64| json!(x)),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        number,
        ".{0,8}".prop_map(Value::from),
        "\\PC{0,4}[\"\\\\/\n\t\u{0}\u{1f600}]{0,3}".prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((".{0,5}", inner), 0..4)
                .prop_map(|list| Value::Object(list.into_iter().collect())),
        ]
    })
}

fn objects() -> impl Strategy<Value = Value> {
    prop::collection::vec((".{0,5}", values()), 0..4)
        .prop_map(|list| Value::Object(list.into_iter().collect()))
}

fn has_long_number(text: &[u8]) -> bool {
    text.split(|b| !b.is_ascii_digit() && *b != b'.' && *b != b'-')
        .any(|run| run.len() > usize::from(MAX_DIGITS))
}

/// Whether `serde_json` would read a text that begins so.
fn can_be_ended(text: &[u8]) -> bool {
    let utf8 = match std::str::from_utf8(text) {
        Ok(_) => true,
        Err(error) => error.error_len().is_none(),
    };
    utf8 && match serde_json::from_slice::<Value>(text) {
        Ok(_) => false,
        Err(error) => error.is_eof(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_object_is_accepted_byte_by_byte(value in objects(), pretty in any::<bool>(), pad in "[ \n\t]{0,3}") {
        let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }.unwrap();
        prop_assume!(!has_long_number(text.as_bytes()));
        let text = format!("{pad}{text}");
        let grammar = Rules::json_object();
        prop_assert_eq!(run(&grammar, text.as_bytes()), Verdict::Complete);
        for cut in pad.len()..text.len() {
            prop_assert_eq!(run(&grammar, &text.as_bytes()[..cut]), Verdict::Open);
        }
        let longer = format!("{text} ");
        prop_assert_eq!(run(&grammar, longer.as_bytes()), Verdict::Refused(text.len()));
    }

    #[test]
    fn changed_texts_are_judged_as_serde_json_judges_them(
        value in objects(), at in any::<prop::sample::Index>(), change in 0u8..3,
        byte in prop::sample::select(b"{}[]\",:\\u0123456789abcdefDBd.+-eE tfn\n\x00\x1f\x7f\x80\xc3\xed\xff".to_vec()),
    ) {
        let mut text = serde_json::to_vec(&value).unwrap();
        prop_assume!(!has_long_number(&text));
        let at = at.index(text.len());
        match change {
            0 => text[at] = byte,
            1 => text.insert(at, byte),
            _ => { text.remove(at); }
        }
        prop_assume!(text.first() == Some(&b'{') && !has_long_number(&text));
        let grammar = Rules::json_object();
        match run(&grammar, &text) {
            Verdict::Complete => prop_assert!(serde_json::from_slice::<Value>(&text).is_ok()),
            Verdict::Open => {
                prop_assert!(can_be_ended(&text));
                let ended = complete(&grammar, &text);
                prop_assert!(serde_json::from_slice::<Value>(&ended).unwrap().is_object());
            }
            Verdict::Refused(at) => {
                let head = &text[..=at];
                let ended = serde_json::from_slice::<Value>(&text[..at]).is_ok();
                // Three deliberate differences: half a pair and a long exponent are refused before
                // serde_json notices.
                let escape = text[..at].iter().rev().take(12).any(|&b| b == b'\\');
                let exponent = text[..at].iter().rev().take(4).any(|&b| b == b'e' || b == b'E');
                prop_assert!(ended || escape || exponent || !can_be_ended(head), "{:?}", String::from_utf8_lossy(head));
            }
        }
    }

    #[test]
    fn a_step_taken_back_leaves_no_trace(value in objects(), bytes in prop::collection::vec(any::<u8>(), 1..6), cut in any::<prop::sample::Index>()) {
        let text = serde_json::to_vec(&value).unwrap();
        let mut automaton = Automaton::new(Rules::json_object());
        for &byte in &text[..cut.index(text.len())] {
            prop_assume!(automaton.step(byte).is_some());
        }
        let before = automaton.snapshot();
        let undos: Vec<_> = bytes.iter().chain(b"\"}],{[:1").map_while(|&byte| automaton.step(byte)).collect();
        undos.into_iter().rev().for_each(|undo| automaton.undo(undo));
        prop_assert!(automaton.snapshot() == before);
    }

    #[test]
    fn a_mask_allows_exactly_the_tokens_that_the_automaton_takes(
        value in objects(), cut in any::<prop::sample::Index>(),
        tokens in prop::collection::vec(prop::collection::vec(prop::sample::select(b"{}[]\",: ae1\\u\xc3\xa9".to_vec()), 0..4), 1..60),
    ) {
        let grammar = Rules::json_object();
        let trie = Arc::new(Trie::new(tokens.len() as u32, |id| &tokens[id as usize]));
        let mut constraint = Constraint::new(Grammar::json_object(), trie);
        let text = serde_json::to_vec(&value).unwrap();
        let head = &text[..cut.index(text.len())];
        prop_assume!(constraint.accept(head).is_ok());
        let mask = constraint.mask().map(|mask| mask.unwrap().to_vec()).unwrap_or_else(|Stuck| vec![0; tokens.len().div_ceil(64)]);
        for (id, token) in tokens.iter().enumerate() {
            let taken = !token.is_empty() && !matches!(run(&grammar, &[head, token].concat()), Verdict::Refused(_));
            prop_assert_eq!(mask[id / 64] >> (id % 64) & 1 == 1, taken, "{:?}", String::from_utf8_lossy(token));
        }
    }
}

#[test]
fn escapes_are_characters_and_bytes_are_utf8() {
    let grammar = Rules::json_object();
    for (inside, good) in [
        (&br"\ud83d\ude00"[..], true),
        (br"\uD83D\uDE00\u00e9\b\/", true),
        (br"\ude00", false),
        (br"\ud83dx", false),
        (br"\ud83d\u0041", false),
        (br"\x", false),
        (b"\x1f", false),
        (b"\x7f", true),
        (b"\xc3\xa9\xf0\x9f\x98\x80\xef\xbf\xbf", true),
        (b"\xc0\x80", false),
        (b"\xe0\x80\x80", false),
        (b"\xed\xa0\x80", false),
        (b"\xf4\x90\x80\x80", false),
        (b"\xf5\x80\x80\x80", false),
        (b"\xc3\"", false),
    ] {
        let text = [b"{\"a\":\"", inside, b"\"}"].concat();
        let verdict = run(&grammar, &text) == Verdict::Complete;
        assert_eq!(verdict, good, "{:?}", String::from_utf8_lossy(inside));
        assert_eq!(serde_json::from_slice::<Value>(&text).is_ok(), good);
    }
}

#[test]
fn nothing_is_endless() {
    let grammar = Rules::json_object();
    let deep = |n: usize| format!("{{\"a\":{}", "[".repeat(n)).into_bytes();
    assert_eq!(run(&grammar, &deep(MAX_DEPTH - 1)), Verdict::Open);
    let refused = Verdict::Refused(deep(MAX_DEPTH).len() - 1);
    assert_eq!(run(&grammar, &deep(MAX_DEPTH)), refused);
    let blank = |n: u8| format!("{{{}", " ".repeat(n.into())).into_bytes();
    assert_eq!(run(&grammar, &blank(MAX_BLANKS)), Verdict::Open);
    assert!(matches!(
        run(&grammar, &blank(MAX_BLANKS + 1)),
        Verdict::Refused(_)
    ));
    let number = |n: u8| format!("{{\"a\":{}}}", "1".repeat(n.into())).into_bytes();
    assert_eq!(run(&grammar, &number(MAX_DIGITS)), Verdict::Complete);
    assert!(matches!(
        run(&grammar, &number(MAX_DIGITS + 1)),
        Verdict::Refused(_)
    ));
    // The largest that can be written is one that serde_json reads.
    let largest = format!("{{\"a\":{}e99}}", "9".repeat(MAX_DIGITS.into()));
    assert_eq!(run(&grammar, largest.as_bytes()), Verdict::Complete);
    assert!(serde_json::from_str::<Value>(&largest).is_ok());
    assert!(matches!(
        run(&grammar, b"{\"a\":1e100}"),
        Verdict::Refused(_)
    ));
}

#[test]
fn a_vocabulary_that_cannot_go_on_is_stuck() {
    let trie = Arc::new(Trie::new(2, |id| [&b"{"[..], b"x"][id as usize]));
    let mut constraint = Constraint::new(Grammar::json_object(), trie);
    assert_eq!(constraint.mask(), Ok(Some(&[1][..])));
    assert_eq!(constraint.accept(b"{"), Ok(false));
    assert_eq!(constraint.mask(), Err(Stuck));
}

#[test]
fn masks_are_kept_within_bounds() {
    let bytes: Vec<u8> = (0..=255).collect();
    let trie = Arc::new(Trie::new(256, |id| &bytes[id as usize..][..1]));
    let mut constraint = Constraint::new(Grammar::json_object(), trie);
    for &byte in b"{\"a\":[1,2,{\"b\":[[true,\"x\"]]}],\"c\":null}" {
        constraint.mask().unwrap();
        assert!(constraint.masks.len() <= KEPT_MASKS);
        constraint.accept(&[byte]).unwrap();
    }
    assert_eq!(constraint.mask(), Err(Stuck));
}

fn schema(schema: &Value) -> Rules {
    Rules::from_schema(schema).unwrap()
}

#[test]
fn schemas_are_enforced() {
    let grammar = schema(&json!({
        "type": "object", "additionalProperties": false, "required": ["kind", "size"], "title": "t",
        "properties": {
            "kind": {"enum": ["cat", "cattle", "dog"]},
            "kin": {"type": "boolean", "description": "shares a beginning"},
            "size": {"type": "integer"},
            "weight": {"type": ["number", "null"]},
            "level": {"enum": [1, 12, -3]},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
            "inner": {"type": "object", "additionalProperties": false, "properties": {"a\"b": {"const": {"x": 1}}}},
            "either": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "null"}}]},
            "map": {"type": "object", "additionalProperties": {"type": "integer"}},
            "empty": {"type": "object", "additionalProperties": false},
            "perhaps": {"anyOf": [{"$ref": "#/$defs/a~1b"}, {"type": "null"}, {"enum": [7, 70]}, {"type": "array"}]},
        },
        "$defs": {"a/b": {"enum": ["one", "once"]}},
    }));
    for good in [
        r#"{"kind":"cat","size":1}"#,
        r#"{ "size" : -12 , "kind" : "cattle" }"#,
        r#"{"size":0,"kind":"dog","weight":1.5e3,"level":12,"kin":true}"#,
        r#"{"size":0,"kind":"dog","weight":null,"level":1}"#,
        r#"{"size":0,"kind":"dog","tags":["a","b"],"inner":{"a\"b":{"x":1}},"either":[null,null]}"#,
        r#"{"size":0,"kind":"dog","inner":{},"either":"s","map":{"a":1,"b":2},"empty":{}}"#,
        r#"{"size":0,"kind":"dog","perhaps":"once"}"#,
        r#"{"size":0,"kind":"dog","perhaps":null}"#,
        r#"{"size":0,"kind":"dog","perhaps":70}"#,
        r#"{"size":0,"kind":"dog","perhaps":[7]}"#,
    ] {
        assert_eq!(run(&grammar, good.as_bytes()), Verdict::Complete, "{good}");
    }
    for bad in [
        r#"{}"#,
        r#"{"kind":"cat"}"#,
        r#"{"kind":"co"#,
        r#"{"size":1."#,
        r#"{"size":1e"#,
        r#"{"size":1,"s"#,
        r#"{"o"#,
        r#"{"kins"#,
        r#"{"level":2"#,
        r#"{"level":123"#,
        r#"{"tags":[]"#,
        r#"{"tags":["a","b","#,
        r#"{"tags":[1"#,
        r#"{"weight":""#,
        r#"{"weight":t"#,
        r#"{"inner":{"a""#,
        r#"{"either":1"#,
        r#"{"either":[""#,
        r#"{"map":{"a":""#,
        r#"{"empty":{""#,
        r#"{"perhaps":"ona"#,
        r#"{"perhaps":700"#,
        r#"{"perhaps":f"#,
        r#"["#,
    ] {
        let verdict = run(&grammar, bad.as_bytes());
        assert_eq!(verdict, Verdict::Refused(bad.len() - 1), "{bad}");
    }
    // Every beginning can be ended.
    let text = br#"{"level":1,"kind":"cat"#;
    let ended: Value = serde_json::from_slice(&complete(&grammar, text)).unwrap();
    assert!(ended["size"].is_i64());
}

#[test]
fn schemas_that_cannot_be_enforced_are_refused_by_keyword() {
    let object = |properties: Value| json!({"type": "object", "additionalProperties": false, "properties": properties});
    for (bad, told) in [
        (json!({"type": "string"}), "root"),
        (json!({"type": ["object", "null"]}), "root"),
        (json!(true), "must be an object"),
        (json!({}), "'type'"),
        (json!({"type": "objekt"}), "does not know"),
        (json!({"$ref": "#/x"}), "'$ref'"),
        (json!({"$ref": "#/$defs/x", "type": "object"}), "'type'"),
        (json!({"$ref": "#/$defs/x", "$defs": []}), "'$defs'"),
        (
            json!({"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}),
            "a part of",
        ),
        (
            object(json!({"a": {"type": "object", "$defs": {}}})),
            "'$defs'",
        ),
        (
            json!({"type": "object", "properties": {}}),
            "additionalProperties",
        ),
        (json!({"type": "object", "required": ["a"]}), "'required'"),
        (
            object(json!({"a": {"type": "string", "pattern": "x"}})),
            "'pattern'",
        ),
        (
            object(json!({"a": {"type": "number", "minimum": 1}})),
            "'minimum'",
        ),
        (object(json!({"a": {"enum": []}})), "'enum'"),
        (
            object(json!({"a": {"enum": [1], "type": "string"}})),
            "'type'",
        ),
        (
            object(json!({"a": {"anyOf": [{"type": "number"}, {"type": "integer"}]}})),
            "differ",
        ),
        (
            object(json!({"a": {"anyOf": [{"enum": ["x"]}, {"type": "string"}]}})),
            "differ",
        ),
        (
            object(json!({"a": {"anyOf": [{"type": "boolean"}, {"enum": [false]}]}})),
            "differ",
        ),
        (
            json!({"type": "object", "additionalProperties": false, "properties": {"a": {"type": "null"}}, "required": ["a", "a"]}),
            "longer",
        ),
        (
            object(json!({"a": {"type": "array", "minItems": 3, "maxItems": 2}})),
            "minItems",
        ),
        (
            object(json!({"a": {"type": "array", "uniqueItems": true}})),
            "'uniqueItems'",
        ),
        (
            json!({"type": "object", "additionalProperties": false, "properties": {}, "required": ["z"]}),
            "'required'",
        ),
        (
            object(
                (0..65)
                    .map(|n| (n.to_string(), json!({"type": "null"})))
                    .collect(),
            ),
            "64",
        ),
    ] {
        let error = Rules::from_schema(&bad)
            .err()
            .unwrap_or_else(|| panic!("{bad}"));
        assert!(error.to_string().contains(told), "{error} for {bad}");
    }
    let mut deep = json!({"type": "null"});
    for _ in 0..MAX_DEPTH {
        deep = json!({"type": "array", "items": deep});
    }
    let error = Rules::from_schema(&object(json!({"a": deep})))
        .err()
        .unwrap();
    assert!(error.to_string().contains("deeper"), "{error}");
    let many = json!({"a": {"enum": (0..1025).collect::<Vec<_>>()}});
    assert!(Rules::from_schema(&object(many)).is_err());
    let wide: Value = (0..60)
        .map(|n| {
            (
                n.to_string(),
                object(
                    (0..60)
                        .map(|m| (m.to_string(), json!({"type": "null"})))
                        .collect(),
                ),
            )
        })
        .collect();
    assert!(Rules::from_schema(&object(wide)).is_err());
}
