//! JSON in which no object, at any depth, states a member twice. RFC 8259 leaves the meaning of a repeated member open:
//! one parser takes the first, another the last, and a message that is checked by one and used by the other can then
//! say two things. Types with named fields refuse repetition by themselves; free-form values do not.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// A value as [`Value`], without repeated members in it.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
#[serde(transparent)]
pub struct UniqueValue(pub Value);

impl<'de> Deserialize<'de> for UniqueValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue).map(UniqueValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value without repeated members")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value);
        number
            .map(Value::Number)
            .ok_or_else(|| E::custom("a number that is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(UniqueValue(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            // The name is a stranger's text; the parser's position says where it stands.
            if object.contains_key(&name) {
                return Err(A::Error::custom("a member is stated twice"));
            }
            let UniqueValue(value) = members.next_value()?;
            object.insert(name, value);
        }
        Ok(object.into())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Result<Value, String> {
        let read = serde_json::from_str::<UniqueValue>(text);
        read.map(|UniqueValue(value)| value)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn reads_what_serde_json_reads() {
        let value = json!({"a": [null, true, -1, 2, 0.5, "x", {"b": {}, "c": []}], "": {"a": 1}});
        assert_eq!(read(&value.to_string()), Ok(value));
    }

    #[test]
    fn refuses_repeated_members_at_every_depth() {
        for text in [
            r#"{"a": 1, "a": 1}"#,
            r#"{"a": 1, "\u0061": 2}"#,
            r#"[[{"b": {"a": 1, "c": 2, "a": null}}]]"#,
        ] {
            let error = read(text).unwrap_err();
            assert!(
                error.starts_with("a member is stated twice at line 1"),
                "{error}"
            );
        }
    }

    #[test]
    fn nesting_ends_before_the_stack_does() {
        let error = read(&"[".repeat(1 << 20)).unwrap_err();
        assert!(error.starts_with("recursion limit exceeded"), "{error}");
        let error = read(&r#"{"a":"#.repeat(1 << 18)).unwrap_err();
        assert!(error.starts_with("recursion limit exceeded"), "{error}");
    }
}
