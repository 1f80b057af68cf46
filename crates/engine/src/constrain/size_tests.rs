//! What grammars take, and that no schema makes one larger than it may be.

use serde_json::{Map, Value, json};

use super::schema::{self, MAX_NAME};
use super::*;
use crate::chat::CallFormat;

fn object(properties: Map<String, Value>) -> Value {
    json!({"type": "object", "additionalProperties": false, "properties": properties})
}

/// An object of so many properties, in objects of 64.
fn spread(count: usize, property: impl Fn(usize) -> (String, Value)) -> Map<String, Value> {
    let group = |from: usize| {
        let inner = (from..count.min(from + 64)).map(&property).collect();
        (format!("g{from}"), object(inner))
    };
    (0..count).step_by(64).map(group).collect()
}

/// A schema of some size.
type Family = fn(usize) -> Value;

/// Schemas that grow in one way each.
fn families() -> [(&'static str, Family); 5] {
    [
        ("long names", |n| {
            let long = |n| (format!("{n:0MAX_NAME$}"), json!({"type": "null"}));
            object(spread(n, long))
        }),
        ("a long value", |n| {
            let long = |_| ("v".to_owned(), json!({"const": "v".repeat(n.min(60_000))}));
            let rest = |m| (format!("r{m}"), json!({"const": "r".repeat(n / 60)}));
            object((0..1).map(long).chain((0..59).map(rest)).collect())
        }),
        ("short values", |n| {
            let list = |m| {
                (
                    format!("e{m}"),
                    json!({"enum": (0..n / 60).collect::<Vec<_>>()}),
                )
            };
            object((0..60).map(list).collect())
        }),
        ("the same object", |n| {
            let keys = (0..8).map(|n| (format!("{n:0MAX_NAME$}"), json!({"const": n})));
            let mut schema = object(spread(n, |n| (n.to_string(), json!({"$ref": "#/$defs/o"}))));
            schema["$defs"] = json!({"o": object(keys.collect())});
            schema
        }),
        ("the same values", |n| {
            let mut schema = object(spread(n, |n| (n.to_string(), json!({"$ref": "#/$defs/e"}))));
            schema["$defs"] = json!({"e": {"enum": (0..200).collect::<Vec<_>>()}});
            schema
        }),
    ]
}

/// The largest of a family that is accepted, and why the next is not.
fn largest(family: Family) -> (Grammar, String) {
    let (mut fits, mut refused) = (0, 64);
    while Grammar::from_schema(&family(refused)).is_ok() {
        (fits, refused) = (refused, 2 * refused);
    }
    while refused - fits > 1 {
        let middle = (fits + refused) / 2;
        match Grammar::from_schema(&family(middle)) {
            Ok(_) => fits = middle,
            Err(_) => refused = middle,
        }
    }
    let grammar = Grammar::from_schema(&family(fits)).unwrap();
    let error = Grammar::from_schema(&family(refused)).err().unwrap();
    (grammar, error.reason)
}

#[test]
fn the_largest_grammars_of_schemas_take_what_they_may() {
    let too_many_bytes = "more than 262144 bytes of names, listed values and schemas in it, each schema at every \
                          place that refers to it";
    for (name, family) in families() {
        let (grammar, reason) = largest(family);
        let bytes = grammar.bytes();
        assert!(bytes <= schema::MAX_BYTES, "{name}: {bytes}");
        // As all of them are limited by something, something says so.
        match name {
            "the same object" => assert_eq!(reason, "more than 1024 schemas in it", "{name}"),
            _ => {
                assert_eq!(reason, too_many_bytes, "{name}");
                assert!(bytes > schema::MAX_BYTES * 3 / 4, "{name}: {bytes}");
            }
        }
    }
}

/// Objects inside of alternatives inside of alternatives, each place of which refers to the same name.
fn nested(name: &str) -> Value {
    let mut inner = json!({"$ref": "#/$defs/o"});
    for _ in 0..24 {
        inner = json!({"anyOf": [inner]});
    }
    let null = json!({"type": "null"});
    let o = object([(name.to_owned(), null)].into_iter().collect());
    let places = (10..47).map(|n| (format!("p{n}"), json!({"$ref": "#/$defs/w"})));
    let mut schema = object(places.collect());
    schema["$defs"] = json!({"o": o, "w": inner});
    schema
}

#[test]
fn a_long_name_referred_to_from_everywhere_is_refused() {
    let error = Grammar::from_schema(&nested(&"k".repeat(63_500)))
        .err()
        .unwrap();
    let place = format!("schema.properties.p10{}", ".anyOf[0]".repeat(24));
    let expected = format!("{}: has a name of more than 256 bytes", &place[..200]);
    assert_eq!(error.to_string(), expected);
    let error = Grammar::from_schema(&nested(&"k".repeat(MAX_NAME + 1)))
        .err()
        .unwrap();
    assert_eq!(error.to_string(), expected);
    // The longest that is accepted is there once.
    let bytes = |length| {
        Grammar::from_schema(&nested(&"k".repeat(length)))
            .unwrap()
            .bytes()
    };
    assert_eq!(bytes(MAX_NAME) - bytes(1), MAX_NAME - 1);
    assert!(bytes(MAX_NAME) < 16 << 10, "{}", bytes(MAX_NAME));
    let mut schema = nested("k");
    schema["$defs"]["d".repeat(MAX_NAME + 1)] = json!({});
    let error = Grammar::from_schema(&schema).err().unwrap();
    assert_eq!(
        error.to_string(),
        "schema: has a name of more than 256 bytes"
    );
}

#[test]
fn a_value_longer_than_places_in_it_are_counted_is_refused() {
    let of = |length: usize| {
        let value = json!({"const": "v".repeat(length - 2)});
        Grammar::from_schema(&object([("a".to_owned(), value)].into_iter().collect()))
    };
    assert!(of(65_535).is_ok());
    let error = of(65_536).err().unwrap().to_string();
    assert_eq!(
        error,
        "schema.properties.a: lists a value of more than 65535 bytes"
    );
}

#[test]
fn the_largest_grammars_of_calls_take_what_they_may() {
    for (name, family) in families() {
        // The largest schemas that are a little below their bound, so that the last bytes can be filled.
        let size = match name {
            "the same object" => 40,
            "the same values" => 30,
            "long names" => 200,
            _ => 20_000,
        };
        let schema = family(size);
        let names: Vec<String> = (0..1024).map(|n| format!("f{n}")).collect();
        let offered: Vec<_> = names
            .iter()
            .map(|name| Offered {
                name,
                arguments: Some(&schema),
            })
            .collect();
        let error = CallGrammar::new(CallFormat::Tagged, &offered)
            .err()
            .unwrap();
        let reason = match name {
            "the same object" => "schema: more than 4096 schemas in all functions together",
            _ => {
                "schema: more than 1048576 bytes of names, listed values and schemas in all functions together"
            }
        };
        assert_eq!(error.to_string(), reason, "{name}");
        let accepted = CallGrammar::new(CallFormat::Tagged, &offered[..error.index]).unwrap();
        let bytes = Grammar::call(accepted).bytes();
        assert!(bytes <= Grammar::MAX_BYTES, "{name}: {bytes}");
        let one = Grammar::from_schema(&schema).unwrap().bytes();
        assert!(bytes > error.index * one, "{name}: {bytes} for {one} each");
    }
    let long = "f".repeat(MAX_NAME + 1);
    let offered = [Offered {
        name: &long,
        arguments: None,
    }];
    let error = CallGrammar::new(CallFormat::Tagged, &offered)
        .err()
        .unwrap();
    assert_eq!(
        error.to_string(),
        "name: the function's name has more than 256 bytes"
    );
}
