//! A grammar takes the memory that it says. A program of its own, so that nobody else uses its memory.

use casemate_engine::Grammar;
use serde_json::{Value, json};

/// Resident memory of this program, in bytes.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = pages.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Definitions of long names, keys and values, each of which is used in many places.
fn schema() -> Value {
    let object = |properties: Value| json!({"type": "object", "additionalProperties": false, "properties": properties});
    let keys: Value = (0..8)
        .map(|n| (format!("{n:0256}"), json!({"$ref": "#/$defs/values"})))
        .collect();
    let places: Value = (0..30)
        .map(|n| {
            (
                format!("place {n}"),
                json!({"anyOf": [{"$ref": "#/$defs/keys"}, {"type": "null"}]}),
            )
        })
        .collect();
    let mut schema = object(places);
    schema["$defs"] =
        json!({"keys": object(keys), "values": {"enum": (0..60).collect::<Vec<_>>()}});
    schema
}

#[test]
fn a_grammar_takes_the_memory_that_it_says() {
    let schema = schema();
    let compile = |_| Grammar::from_schema(&schema).unwrap();
    // What compiling takes and gives back is there before counting.
    let _first: Vec<Grammar> = (0..8).map(compile).collect();
    let before = resident();
    let grammars: Vec<Grammar> = (0..400).map(compile).collect();
    let grown = resident().saturating_sub(before);
    let told: usize = grammars.iter().map(Grammar::bytes).sum();
    assert!(told > 400 * (100 << 10), "{told}");
    assert!(
        grown < told + told / 4 && grown > told / 2,
        "{grown} bytes are in use of grammars that say they take {told}"
    );
}
