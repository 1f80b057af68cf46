//! Calls in free text, chosen by a model that wants to do harm.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::chat::CallFormat;

const BLANKS: [char; 4] = [' ', '\n', '\r', '\t'];

/// Arguments of every kind, so that there is much to violate.
fn weather() -> Value {
    json!({
        "type": "object", "additionalProperties": false, "required": ["city", "days", "unit"],
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}]},
            "notes": {"type": "object", "additionalProperties": {"type": "string"}},
        },
        "$defs": {"Unit": {"type": "string", "enum": ["C", "F"]}},
    })
}

fn grammar(format: CallFormat) -> CallGrammar {
    let weather = weather();
    let empty = json!({"type": "object", "additionalProperties": false});
    let offered = [
        ("rain", Some(&weather)),
        ("rainy", None),
        ("sun", Some(&empty)),
    ];
    let offered = offered.map(|(name, arguments)| Offered { name, arguments });
    CallGrammar::new(format, &offered).unwrap()
}

/// Whether arguments are what the function's schema says, judged by hand.
fn is_valid(name: &str, arguments: &str) -> bool {
    let Ok(Value::Object(arguments)) = serde_json::from_str(arguments) else {
        return false;
    };
    let known = |key: &String, value: &Value| match key.as_str() {
        "city" => value.is_string(),
        // Twenty digits may be more than 64 bits.
        "days" => value.is_i64() || value.is_u64() || value.is_f64(),
        "unit" => [json!("C"), json!("F"), Value::Null].contains(value),
        "notes" => value
            .as_object()
            .is_some_and(|notes| notes.values().all(Value::is_string)),
        _ => false,
    };
    match name {
        "rain" => {
            let required = ["city", "days", "unit"];
            required.iter().all(|key| arguments.contains_key(*key))
                && arguments.iter().all(|(key, value)| known(key, value))
        }
        "sun" => arguments.is_empty(),
        name => name == "rainy",
    }
}

/// Pieces of calls and near misses beside all single bytes, so that tokens run over every border.
fn vocabulary() -> Vec<Vec<u8>> {
    let pieces = [
        "<tool_call>",
        "<tool",
        "_call>",
        "_call>{",
        ">\n",
        ">x",
        "</tool_call>",
        "</tool_call",
        "</tool_call><tool_call>{",
        "{\"name\": \"",
        "{\"",
        "\"name\"",
        "\": \"",
        "name",
        "rain",
        "rainy",
        "rain\"",
        "rain\", \"",
        "\", \"arguments\": {",
        "\", \"parameters\": {",
        "arguments",
        "parameters",
        "type",
        "\"type\": \"function\", ",
        "\"city\": \"",
        "city",
        "days",
        "\"days\": ",
        "unit",
        "notes",
        "null",
        "\"C\"",
        "\"D\"",
        "\"}}",
        "}}",
        "}}\n</tool_call>",
        "}};",
        "};{",
        " ;",
        "{}",
        "{},",
        "\": {\"",
        "sun",
        "sunny",
        "\\u003c",
        "\\\"",
        ", ",
        ": ",
        "12",
        "-3",
        "1.5",
        "true",
        "<tool_call>{\"name\": \"sun\", \"arguments\": {\"x\": 1}}</tool_call>",
        "{\"name\": \"sun\", \"parameters\": {\"x\": 1}}",
    ];
    let bytes = (0..=255u8).map(|byte| vec![byte]);
    // Two tokens without bytes: a control token and an end token.
    bytes
        .chain(pieces.iter().map(|piece| piece.as_bytes().to_vec()))
        .chain([vec![], vec![]])
        .collect()
}

/// What a model wrote, and whether it ended by itself.
struct Written {
    text: Vec<u8>,
    ended: bool,
    /// How many tokens were refused to it.
    refused: usize,
}

/// A model before an answer.
fn begin(grammar: Grammar) -> (Constraint, Vec<Vec<u8>>) {
    let tokens = vocabulary();
    let trie = Arc::new(Trie::new(tokens.len() as u32, |id| &tokens[id as usize]));
    (Constraint::new(grammar, trie), tokens)
}

/// Lets a model write behind `head`. `wishes` are the tokens it would like.
fn write(grammar: Grammar, head: &str, wishes: &[prop::sample::Index]) -> Written {
    let (mut constraint, tokens) = begin(grammar);
    let mut text = head.as_bytes().to_vec();
    constraint.accept(&text).unwrap();
    let mut refused = 0;
    let end = tokens.len() - 1;
    // A model that knows the form goes further than chance: it prefers what belongs to calls.
    let own = 256..tokens.len();
    for wish in wishes {
        let id = match wish.index(8) {
            0 => wish.index(256),
            _ => own.start + wish.index(own.len()),
        };
        let mask = constraint.mask().unwrap().map(<[u64]>::to_vec);
        let may = |id: usize| {
            mask.as_ref()
                .is_none_or(|m| m[id / 64] >> (id % 64) & 1 == 1)
        };
        // Where it is refused it takes the next that it may, from among the pieces if there is one.
        let mut all = (id..tokens.len()).chain(own.clone()).chain(0..tokens.len());
        let chosen = all.find(|&id| may(id)).unwrap();
        refused += usize::from(chosen != id);
        if chosen == end {
            assert!(constraint.may_end(), "an end inside of a call");
            return Written {
                text,
                ended: true,
                refused,
            };
        }
        text.extend_from_slice(&tokens[chosen]);
        if constraint.accept(&tokens[chosen]).unwrap() {
            return Written {
                text,
                ended: true,
                refused,
            };
        }
    }
    Written {
        text,
        ended: false,
        refused,
    }
}

/// The calls of a text, read without the grammar: what stands between marks.
fn between_marks(text: &str) -> Vec<&str> {
    let mut rest = text;
    let mut found = Vec::new();
    while let Some((_, behind)) = rest.split_once("<tool_call>") {
        let Some((inside, behind)) = behind.split_once("</tool_call>") else {
            break;
        };
        found.push(inside);
        rest = behind;
    }
    found
}

fn name_and_arguments<'a>(call: &'a Value, key: &str) -> Option<(&'a str, String)> {
    Some((call.get("name")?.as_str()?, call.get(key)?.to_string()))
}

/// Whether an object begins as a call does, judged without the grammar.
fn names_an_offered_function(object: &str) -> bool {
    let mut rest = object;
    let mut take = |piece: &str| {
        rest = rest.trim_start_matches(BLANKS);
        let behind = rest.strip_prefix(piece);
        rest = behind.unwrap_or(rest);
        behind.is_some()
    };
    take("{")
        && (!take("\"type\"") || [":", "\"function\"", ","].into_iter().all(&mut take))
        && ["\"name\"", ":"].into_iter().all(&mut take)
        && ["\"rain\"", "\"rainy\"", "\"sun\""]
            .into_iter()
            .any(&mut take)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Every pair of marks has a valid call between it, whatever the model tries.
    #[test]
    fn whatever_a_model_writes_between_marks_is_a_valid_call(wishes in prop::collection::vec(any::<prop::sample::Index>(), 0..160)) {
        let grammar = grammar(CallFormat::Tagged);
        let written = write(Grammar::text_with_calls(grammar.clone()), "", &wishes);
        let text = String::from_utf8_lossy(&written.text);
        for inside in between_marks(&text) {
            let (name, arguments) = grammar.read(inside).ok_or_else(|| TestCaseError::fail(inside.to_owned()))?;
            prop_assert!(is_valid(name, arguments), "{inside}");
            let call: Value = serde_json::from_str(inside.trim()).unwrap();
            let (read, same) = name_and_arguments(&call, "arguments").unwrap();
            prop_assert_eq!(read, name);
            prop_assert_eq!(same, serde_json::from_str::<Value>(arguments).unwrap().to_string());
        }
    }

    /// An answer that begins as a call of a function that is offered goes on as a valid one.
    #[test]
    fn whatever_a_model_begins_as_a_bare_call_is_a_valid_one(
        head in prop::sample::select(vec!["", "{\"name\": \"rain\"", "{\"name\": \"sun\", ", " {\"type\":\"function\",\"name\": \"rainy\","]),
        wishes in prop::collection::vec(any::<prop::sample::Index>(), 0..160),
    ) {
        let grammar = grammar(CallFormat::Bare);
        let written = write(Grammar::text_with_calls(grammar.clone()), head, &wishes);
        let text = String::from_utf8_lossy(&written.text);
        let mut rest = text.trim_start_matches(BLANKS);
        while rest.starts_with('{') {
            let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            let Some(Ok(object)) = stream.next() else { break };
            let (raw, behind) = rest.split_at(stream.byte_offset());
            prop_assert_eq!(names_an_offered_function(raw), grammar.read(raw).is_some(), "{}", raw);
            let Some((name, arguments)) = grammar.read(raw) else {
                // Whatever follows, the answer is text.
                break;
            };
            prop_assert!(is_valid(name, arguments), "{raw}");
            let (read, same) = name_and_arguments(&object, "parameters").unwrap();
            prop_assert_eq!(read, name);
            prop_assert_eq!(same, serde_json::from_str::<Value>(arguments).unwrap().to_string());
            rest = behind.trim_start_matches([' ', '\n', '\r', '\t', ';']);
        }
    }

    /// A forced call is one.
    #[test]
    fn a_forced_call_is_valid(format in prop::sample::select(vec![CallFormat::Tagged, CallFormat::Bare]), wishes in prop::collection::vec(any::<prop::sample::Index>(), 0..120)) {
        let grammar = grammar(format);
        let written = write(Grammar::call(grammar.clone()), "", &wishes);
        if written.ended {
            let text = String::from_utf8(written.text).unwrap();
            let (name, arguments) = grammar.read(&text).unwrap();
            prop_assert!(is_valid(name, arguments), "{text}");
        }
    }
}

/// The properties above are about something: models of chance do write calls, and are refused much.
#[test]
fn models_of_chance_write_calls() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let wishes = prop::collection::vec(any::<prop::sample::Index>(), 200);
    for (format, head) in [
        (CallFormat::Tagged, ""),
        (CallFormat::Bare, "{\"name\": \"rain"),
    ] {
        let (mut calls, mut refused) = (0, 0);
        for _ in 0..400 {
            let wishes = wishes.new_tree(&mut runner).unwrap().current();
            let grammar = grammar(format);
            let written = write(Grammar::text_with_calls(grammar.clone()), head, &wishes);
            let text = String::from_utf8_lossy(&written.text);
            calls += match format {
                CallFormat::Tagged => between_marks(&text).len(),
                CallFormat::Bare => {
                    let stream = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
                    stream.map_while(Result::ok).count()
                }
            };
            refused += written.refused;
        }
        assert!(
            calls > 20 && refused > 1000,
            "{format:?}: {calls} calls, {refused} refused"
        );
    }
}

fn refusals(grammar: &CallGrammar, text: &str) -> (bool, Vec<String>) {
    let (mut constraint, tokens) = begin(Grammar::text_with_calls(grammar.clone()));
    constraint.accept(text.as_bytes()).unwrap();
    let free = constraint.may_end();
    let refused = match constraint.mask().unwrap() {
        None => Vec::new(),
        Some(mask) => (0..tokens.len())
            .filter(|id| mask[id / 64] >> (id % 64) & 1 == 0)
            .map(|id| String::from_utf8_lossy(&tokens[id]).into_owned())
            .collect(),
    };
    (free, refused)
}

#[test]
fn text_is_free_until_a_call_begins_and_behind_it() {
    let tagged = grammar(CallFormat::Tagged);
    let call = "<tool_call>{\"name\": \"sun\", \"arguments\": {}}</tool_call>";
    // The last is a token of the vocabulary that goes on where the call in it begins.
    let always = ["<tool_call>{\"name\": \"sun\", \"arguments\": {\"x\": 1}}</tool_call>"];
    for text in ["", "a <tool", "<tool_call", "{\"name\": \"rain\"", call] {
        let (free, refused) = refusals(&tagged, text);
        let beyond: &[&str] = if text.ends_with("call") { &[">x"] } else { &[] };
        assert!(free, "{text}");
        assert_eq!(refused, [beyond, &always].concat(), "{text}");
    }
    let (free, refused) = refusals(&tagged, &format!("{call}\n<tool_call>"));
    assert!(!free && refused.len() > 200);

    let bare = grammar(CallFormat::Bare);
    for text in [
        "",
        " \n",
        "text {\"name\": \"sun\", ",
        "{\"name\": \"su",
        "{\"name\": \"snow\", ",
        "{\"x\": ",
    ] {
        let (free, refused) = refusals(&bare, text);
        let begins = text.trim().is_empty();
        let beyond: &[&str] = if begins {
            &["{\"name\": \"sun\", \"parameters\": {\"x\": 1}}"]
        } else {
            &[]
        };
        assert!(free, "{text}");
        assert_eq!(refused, beyond, "{text}");
    }
    let (free, refused) = refusals(&bare, "{\"name\": \"rain");
    assert!(free && refused.iter().all(|token| token.starts_with('"')));
    let refuses = |token: &str| refused.iter().any(|refused| refused == token);
    assert!(refuses("\", \"arguments\": {") && !refuses("\", \"parameters\": {"));
    let (free, refused) = refusals(&bare, "{\"name\": \"sun\"");
    assert!(!free && refused.len() > 200);
    let (free, _) = refusals(&bare, "{\"name\": \"sun\", \"parameters\": {}}");
    assert!(free);
}

/// A vocabulary without tokens that run over the border costs nothing before a call.
#[test]
fn nothing_is_computed_before_a_call_begins() {
    let tokens: Vec<&[u8]> = vec![b"a", b"<", b"<tool_call>", b">\n", b"{", b"\""];
    let trie = Arc::new(Trie::new(tokens.len() as u32, |id| tokens[id as usize]));
    let text = Grammar::text_with_calls(grammar(CallFormat::Tagged));
    let mut constraint = Constraint::new(text, trie);
    for _ in 0..3 {
        assert_eq!(constraint.mask(), Ok(None));
        assert!(constraint.masks.is_empty());
        constraint.accept(b"a").unwrap();
    }
    constraint.accept(b"<").unwrap();
    assert_eq!(constraint.mask(), Ok(None));
    assert_eq!(constraint.masks.len(), 1, "a call may begin");
    constraint.accept(b"tool_call>").unwrap();
    assert_eq!(constraint.mask(), Ok(Some(&[1 << 4][..])));
}

#[test]
fn calls_are_read_as_they_must_be_written() {
    let bare = grammar(CallFormat::Bare);
    let tagged = grammar(CallFormat::Tagged);
    let good =
        r#" { "name" : "rain" , "arguments" : { "city": "</tool_call", "unit":null,"days":1 } } "#;
    assert_eq!(
        tagged.read(good),
        Some(("rain", r#"{ "city": "</tool_call", "unit":null,"days":1 }"#))
    );
    assert_eq!(
        bare.read(r#"{"type":"function","name":"rainy","parameters":{"x":[]}}"#),
        Some(("rainy", r#"{"x":[]}"#))
    );
    for bad in [
        r#"{"name":"rain","arguments":{"city":"x","unit":"C"}}"#,
        r#"{"name":"rain","arguments":{"city":"x","unit":"K","days":1}}"#,
        r#"{"name":"sun","arguments":{"x":1}}"#,
        r#"{"name":"snow","arguments":{}}"#,
        r#"{"arguments":{},"name":"sun"}"#,
        r#"{"name":"sun","arguments":{},"x":1}"#,
        r#"{"name":"sun","parameters":{}}"#,
        r#"{"type":"function","name":"sun","arguments":{}}"#,
        r#"{"n\u0061me":"sun","arguments":{}}"#,
        r#"{"name":"sun","arguments":{}"#,
        r#"{"name":"sun","arguments":{}}{"#,
        "",
    ] {
        assert_eq!(tagged.read(bad), None, "{bad}");
    }
    assert_eq!(
        bare.read(r#"{"type":"function","type":"function","name":"sun","parameters":{}}"#),
        None
    );
}

#[test]
fn what_cannot_be_enforced_is_refused_with_its_function() {
    let fine = json!({"type": "object"});
    let offer = |format, bad: &Value| {
        let offered = [("a", &fine), ("b", bad)].map(|(name, schema)| Offered {
            name,
            arguments: Some(schema),
        });
        CallGrammar::new(format, &offered).err()
    };
    let ends = json!({"type": "object", "additionalProperties": false, "properties": {"</tool_call>": {"type": "null"}}});
    let error = offer(CallFormat::Tagged, &ends).unwrap();
    assert!(
        error.index == 1 && error.to_string().contains("ends a call"),
        "{error}"
    );
    assert_eq!(offer(CallFormat::Bare, &ends), None);
    let error = offer(CallFormat::Bare, &json!({"type": "string"})).unwrap();
    assert!(
        error.index == 1 && error.to_string().contains("root"),
        "{error}"
    );
    let wide: Value = (0..60)
        .map(|n| (n.to_string(), json!({"type": "null"})))
        .collect();
    let wide = json!({"type": "object", "additionalProperties": false, "properties": wide});
    let many: Vec<Offered<'_>> = (0..128)
        .map(|_| Offered {
            name: "f",
            arguments: Some(&wide),
        })
        .collect();
    assert_eq!(
        CallGrammar::new(CallFormat::Bare, &many)
            .err()
            .map(|error| error.index),
        Some(67)
    );
}
