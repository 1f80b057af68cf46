//! Finds calls of functions in what a model writes, piece by piece. Text that turns out to be no
//! call is given back unchanged; a call counts only if its function was offered.

use casemate_engine::CallFormat;
use serde_json::{Map, Value, json};

use super::tools::Reading;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
/// Most calls of one answer.
const MAX_CALLS: usize = 128;

/// A call of a function.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    pub(super) id: String,
    pub(super) name: String,
    /// A JSON object, as text.
    pub(super) arguments: String,
}

impl Call {
    /// A name that no other call has.
    pub(super) fn new_id() -> String {
        let mut id = [0; 12];
        aws_lc_rs::rand::fill(&mut id).expect("the operating system gives randomness");
        format!("call_{}", hex::encode(id))
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        })
    }
}

/// Reads one answer.
pub(super) struct CallReader {
    reading: Reading,
    /// What may still become a call.
    held: String,
    found: usize,
    /// Text has been given back that was more than white space.
    text_began: bool,
    new_id: fn() -> String,
}

/// What is certain after a piece of an answer.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Read {
    pub(super) text: String,
    pub(super) calls: Vec<Call>,
}

impl CallReader {
    pub(super) fn new(reading: Reading, new_id: fn() -> String) -> Self {
        Self {
            reading,
            held: String::new(),
            found: 0,
            text_began: false,
            new_id,
        }
    }

    /// Whether any call was found.
    pub(super) fn found(&self) -> bool {
        self.found > 0
    }

    /// Takes the next piece.
    pub(super) fn push(&mut self, piece: &str) -> Read {
        self.held.push_str(piece);
        let mut read = Read::default();
        if self.reading.forced {
            return read;
        }
        match self.reading.format {
            CallFormat::Tagged => self.read_tagged(&mut read),
            CallFormat::Bare => {
                // Only an answer that begins as an object can be a call.
                if self.text_began
                    || !matches!(self.held.trim_start().chars().next(), None | Some('{'))
                {
                    self.give_back_all(&mut read);
                }
            }
        }
        read
    }

    /// No more comes; `whole` says that the model ended by itself.
    pub(super) fn finish(&mut self, whole: bool) -> Read {
        let mut read = Read::default();
        let bare = self.reading.forced || self.reading.format == CallFormat::Bare;
        if whole && bare && !self.text_began {
            let held = std::mem::take(&mut self.held);
            let calls: Option<Vec<Call>> = objects(&held).and_then(|objects| {
                objects
                    .into_iter()
                    .map(|object| self.call(object))
                    .collect()
            });
            match calls {
                Some(calls) if !calls.is_empty() && calls.len() <= MAX_CALLS => {
                    let most = if self.reading.single { 1 } else { calls.len() };
                    read.calls.extend(calls.into_iter().take(most));
                    self.found += read.calls.len();
                    return read;
                }
                _ => self.held = held,
            }
        }
        self.give_back_all(&mut read);
        read
    }

    fn give_back_all(&mut self, read: &mut Read) {
        let length = self.held.len();
        self.give_back(length, read);
    }

    /// Gives back the beginning of what is held. White space behind calls is no text.
    fn give_back(&mut self, length: usize, read: &mut Read) {
        let rest = self.held.split_off(length);
        let text = std::mem::replace(&mut self.held, rest);
        let blank = text.trim().is_empty();
        if self.found == 0 || !blank {
            read.text.push_str(&text);
        }
        self.text_began |= !blank;
    }

    fn read_tagged(&mut self, read: &mut Read) {
        while let Some(open) = self.held.find(OPEN) {
            let inside = open + OPEN.len();
            let Some(length) = self.held[inside..].find(CLOSE) else {
                // A call under way: what stands before it is text, without white space between.
                let text = self.held[..open].trim_end().len();
                if text > 0 {
                    self.give_back(text, read);
                }
                return;
            };
            let end = inside + length + CLOSE.len();
            match self.call(&self.held[inside..inside + length]) {
                Some(call) if self.found < MAX_CALLS => {
                    let text = self.held[..open].trim_end().len();
                    if text > 0 {
                        read.text.push_str(&self.held[..text]);
                        self.text_began = true;
                    }
                    self.held.drain(..end);
                    if !(self.reading.single && self.found > 0) {
                        read.calls.push(call);
                        self.found += 1;
                    }
                }
                _ => self.give_back(end, read),
            }
        }
        // Keep what may be the beginning of a tag, and white space that may stand before one.
        let tag = (1..OPEN.len())
            .rev()
            .find(|&n| self.held.ends_with(&OPEN[..n]))
            .unwrap_or(0);
        let certain = self.held[..self.held.len() - tag].trim_end().len();
        if certain > 0 {
            self.give_back(certain, read);
        }
    }

    /// `{"name": …, "arguments" or "parameters": {…}}` of a function that was offered. Where a grammar bound the model,
    /// only what follows it: the rest is text.
    fn call(&self, object: &str) -> Option<Call> {
        let (name, arguments) = match &self.reading.grammar {
            Some(grammar) => {
                let (name, arguments) = grammar.read(object)?;
                (name.to_owned(), arguments.to_owned())
            }
            None => self.free_call(object)?,
        };
        Some(Call {
            id: (self.new_id)(),
            name,
            arguments,
        })
    }

    /// The name and the arguments in any object that has them.
    fn free_call(&self, object: &str) -> Option<(String, String)> {
        let mut object: Map<String, Value> = serde_json::from_str(object.trim()).ok()?;
        let key = match self.reading.format {
            CallFormat::Tagged => "arguments",
            CallFormat::Bare => "parameters",
        };
        let name = object.get("name")?.as_str()?.to_owned();
        let arguments = object.shift_remove(key)?;
        let offered = self.reading.names.contains(&name) && arguments.is_object();
        offered.then(|| (name, arguments.to_string()))
    }
}

/// One or more objects, separated by white space or semicolons, and nothing else.
fn objects(text: &str) -> Option<Vec<&str>> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter();
        let _: Map<String, Value> = stream.next()?.ok()?;
        let (object, behind) = rest.split_at(stream.byte_offset());
        found.push(object);
        rest = behind.trim_start().trim_start_matches(';').trim_start();
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use casemate_engine::{CallGrammar, Offered};

    use super::*;

    fn reader(format: CallFormat, single: bool, forced: bool) -> CallReader {
        let reading = Reading {
            format,
            names: ["rain".into(), "sun".into()].into(),
            single,
            forced,
            grammar: None,
        };
        CallReader::new(reading, || "id".into())
    }

    /// As [`reader`], where arguments must be `{"wet": true}` or `{"wet": false}`.
    fn strict(format: CallFormat) -> CallReader {
        let schema = json!({
            "type": "object", "additionalProperties": false, "required": ["wet"],
            "properties": {"wet": {"type": "boolean"}},
        });
        let offered = ["rain", "sun"].map(|name| Offered {
            name,
            arguments: Some(&schema),
        });
        let mut reader = reader(format, false, false);
        reader.reading.grammar = Some(CallGrammar::new(format, &offered).unwrap());
        reader
    }

    #[test]
    fn only_what_a_grammar_allows_is_a_call() {
        let good = r#"{"name": "rain", "arguments": { "wet":true}}"#;
        let text = format!("so\n<tool_call>{good}</tool_call>");
        let found = read(strict(CallFormat::Tagged), &text, 3, true);
        // As the model wrote it.
        assert_eq!(found, ("so".into(), calls(&[("rain", r#"{ "wet":true}"#)])));
        let (bare, bad) = (
            good.replace("arguments", "parameters"),
            r#"{"name": "rain", "parameters": {"wet": 1}}"#,
        );
        let both = format!("{bare} ; {bare}");
        assert_eq!(read(strict(CallFormat::Bare), &both, 5, true).1.len(), 2);
        for text in [
            bad.to_owned(),
            format!("{bare};{bad}"),
            format!("{bad};{bare}"),
        ] {
            let found = read(strict(CallFormat::Bare), &text, 5, true);
            assert_eq!(found, (text, vec![]));
        }
        let bad = format!(
            "<tool_call>{}</tool_call>",
            bad.replace("parameters", "arguments")
        );
        let found = read(strict(CallFormat::Tagged), &bad, 4, true);
        assert_eq!(found, (bad, vec![]));
    }

    /// Everything read from a text cut into pieces of `size` characters.
    fn read(
        mut reader: CallReader,
        text: &str,
        size: usize,
        whole: bool,
    ) -> (String, Vec<(String, String)>) {
        let mut all = Read::default();
        let mut add = |read: Read| {
            all.text.push_str(&read.text);
            all.calls.extend(read.calls);
        };
        let characters: Vec<char> = text.chars().collect();
        for piece in characters.chunks(size) {
            add(reader.push(&piece.iter().collect::<String>()));
        }
        add(reader.finish(whole));
        assert_eq!(reader.found(), !all.calls.is_empty());
        let calls = all
            .calls
            .into_iter()
            .map(|call| (call.name, call.arguments));
        (all.text, calls.collect())
    }

    fn every_cut(format: CallFormat, text: &str, whole: bool) -> (String, Vec<(String, String)>) {
        let one = read(reader(format, false, false), text, 1, whole);
        for size in 2..=text.chars().count().max(2) {
            assert_eq!(
                read(reader(format, false, false), text, size, whole),
                one,
                "{text:?} in pieces of {size}"
            );
        }
        one
    }

    fn calls(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
            .collect()
    }

    #[test]
    fn tagged_calls_are_found_in_any_pieces() {
        let text = "Let me see.\n<tool_call>\n{\"name\": \"rain\", \"arguments\": {\"b\": [1], \"a\": \"é\"}}\n</tool_call>\n\
                    <tool_call>{\"name\": \"sun\", \"arguments\": {}}</tool_call>";
        let found = every_cut(CallFormat::Tagged, text, true);
        let both = calls(&[("rain", r#"{"b":[1],"a":"é"}"#), ("sun", "{}")]);
        assert_eq!(found, ("Let me see.".into(), both.clone()));
        let (_, one) = read(reader(CallFormat::Tagged, true, false), text, 3, true);
        assert_eq!(one, both[..1]);
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for text in [
            "plain <text> with </tool_call> and <tool",
            "<tool_call>{\"name\": \"snow\", \"arguments\": {}}</tool_call>",
            "<tool_call>{\"name\": \"rain\", \"arguments\": []}</tool_call>",
            "<tool_call>{\"name\": \"rain\"}</tool_call> and more",
            "<tool_call>not JSON</tool_call>",
            "  <tool_call>{\"name\": \"rain\", \"arguments\": {}}",
            " lead",
            " \n",
        ] {
            assert_eq!(
                every_cut(CallFormat::Tagged, text, true),
                (text.to_owned(), vec![])
            );
        }
        for text in [
            "{\"name\": \"rain\", \"parameters\": {}} is what I would call",
            "{\"name\": \"snow\", \"parameters\": {}}",
            "{\"name\": \"rain\", \"arguments\": {}}",
            "{",
            "",
            " { not JSON",
            "I say {\"name\": \"rain\", \"parameters\": {}}",
        ] {
            assert_eq!(
                every_cut(CallFormat::Bare, text, true),
                (text.to_owned(), vec![])
            );
        }
    }

    #[test]
    fn bare_calls_are_the_whole_answer() {
        let text = "\n{\"name\": \"rain\", \"parameters\": {\"at\": \"Bonn\"}}; {\"name\": \"sun\", \"parameters\": {}}\n";
        let found = every_cut(CallFormat::Bare, text, true);
        let both = calls(&[("rain", r#"{"at":"Bonn"}"#), ("sun", "{}")]);
        assert_eq!(found, (String::new(), both));
        // Cut short it is no call, even if it looks like one.
        assert_eq!(
            every_cut(CallFormat::Bare, text, false),
            (text.to_owned(), vec![])
        );
    }

    #[test]
    fn a_forced_answer_is_its_call() {
        let text = "{\"arguments\": {\"x\": 1}, \"name\": \"sun\"}";
        let forced = || reader(CallFormat::Tagged, false, true);
        assert_eq!(
            read(forced(), text, 4, true),
            (String::new(), calls(&[("sun", r#"{"x":1}"#)]))
        );
        assert_eq!(
            read(forced(), &text[..9], 4, false),
            (text[..9].to_owned(), vec![])
        );
    }

    #[test]
    fn text_is_not_held_longer_than_needed() {
        let mut reader = reader(CallFormat::Tagged, false, false);
        assert_eq!(reader.push("so <to").text, "so");
        assert_eq!(reader.push("ad>").text, " <toad>");
        let mut bare = self::reader(CallFormat::Bare, false, false);
        assert_eq!(bare.push("So").text, "So");
        assert_eq!(bare.push(" {").text, " {");
    }
}
