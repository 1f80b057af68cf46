//! Calls of functions in an answer. Text is free until a call begins; from there the call's own
//! grammar binds until it ends, and text is free again. Where a call begins depends on how the model
//! writes calls: with a mark that nothing else needs, or as an object that begins by naming a
//! function that is offered. The name comes first, so that it decides what the arguments may be.

use std::sync::Arc;

use serde_json::Value;

use super::automaton::{self, Automaton, blank, narrow};
use super::schema::{ALLOCATION, MAX_NAME, Rules, SchemaError, quoted, wrong};
use super::trie::{Machine, Trie};
use crate::chat::CallFormat;

/// What a tagged call stands between.
pub(super) const OPEN: &[u8] = b"<tool_call>";
const CLOSE: &[u8] = b"</tool_call>";
/// Most kinds of values in the arguments of all functions together.
const MAX_NODES: usize = 4096;
/// Most bytes of a grammar with all its functions.
pub(super) const MAX_BYTES: usize = 1 << 20;

/// A function that may be called.
#[derive(Clone, Copy)]
pub struct Offered<'a> {
    /// Its name.
    pub name: &'a str,
    /// A JSON Schema of its arguments; any object without one.
    pub arguments: Option<&'a Value>,
}

/// Why calls of a function cannot be constrained.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct OfferError {
    /// Which function.
    pub index: usize,
    /// What is wrong with its schema.
    pub reason: SchemaError,
}

/// What a well-formed call is. Cheap to clone.
#[derive(Clone)]
pub struct CallGrammar(Arc<Inner>);

struct Inner {
    format: CallFormat,
    /// Sorted by their names.
    functions: Vec<Function>,
}

struct Function {
    name: String,
    /// The name as JSON writes it, without its quotes.
    quoted: Box<[u8]>,
    arguments: Rules,
}

/// Itself, the counts of who holds it, two allocations.
const OWN_BYTES: usize = size_of::<Inner>() + 2 * size_of::<usize>() + 2 * ALLOCATION;

impl Function {
    fn bytes(&self) -> usize {
        let names = self.name.capacity() + self.quoted.len() + 2 * ALLOCATION;
        size_of::<Self>() + names + self.arguments.bytes()
    }
}

/// Whether the mark that ends a call is in a text. One step a byte.
fn holds_close(text: &[u8]) -> bool {
    let mut there = 0;
    text.iter().any(|&byte| {
        there = progress(CLOSE, there, byte);
        usize::from(there) == CLOSE.len()
    })
}

impl CallGrammar {
    /// Calls of these functions as a model with this format writes them.
    ///
    /// # Errors
    /// [`OfferError`]: a schema that cannot be enforced.
    pub fn new(format: CallFormat, offered: &[Offered<'_>]) -> Result<Self, OfferError> {
        let mut functions: Vec<Function> = Vec::with_capacity(offered.len().min(MAX_NODES));
        let (mut nodes, mut bytes) = (0, OWN_BYTES);
        let any = Rules::json_object();
        for (index, function) in offered.iter().enumerate() {
            let refused = |reason| OfferError { index, reason };
            if function.name.len() > MAX_NAME {
                let reason = format!("the function's name has more than {MAX_NAME} bytes");
                return Err(refused(wrong("name", reason)));
            }
            let arguments = match function.arguments {
                None => any.clone(),
                Some(schema) => Rules::from_schema(schema).map_err(refused)?,
            };
            nodes += arguments.nodes();
            if nodes > MAX_NODES {
                let reason = format!("more than {MAX_NODES} schemas in all functions together");
                return Err(refused(wrong("schema", reason)));
            }
            if format == CallFormat::Tagged && holds_close(arguments.all_texts()) {
                let reason = "has a key or a value with '</tool_call>', which ends a call";
                return Err(refused(wrong("schema", reason)));
            }
            let function = Function {
                name: function.name.to_owned(),
                quoted: quoted(function.name),
                arguments,
            };
            bytes += function.bytes();
            if bytes > MAX_BYTES {
                let reason = format!(
                    "more than {MAX_BYTES} bytes of names, listed values and schemas in all functions together"
                );
                return Err(refused(wrong("schema", reason)));
            }
            functions.push(function);
        }
        functions.shrink_to_fit();
        functions.sort_by(|a, b| a.quoted.cmp(&b.quoted));
        Ok(Self(Arc::new(Inner { format, functions })))
    }

    /// The function and the arguments of a call, without the marks around it; `None` if this is not
    /// one, or an argument is not what the function's schema says.
    #[must_use]
    pub fn read<'a>(&'a self, text: &'a str) -> Option<(&'a str, &'a str)> {
        let text = text.trim_matches([' ', '\n', '\r', '\t']);
        let mut calls = Calls::new(self.clone(), true);
        let (mut from, mut to) = (None, None);
        for (at, &byte) in text.as_bytes().iter().enumerate() {
            calls.step(byte)?;
            match calls.at {
                At::Value { .. } => from = from.or(Some(at + 1)),
                At::Fixed {
                    part: Part::End,
                    function,
                    ..
                } => {
                    to = to.or(Some((at + 1, function)));
                }
                _ => {}
            }
        }
        let (from, (to, function)) = (from?, to?);
        let name = &self.0.functions[usize::from(function)].name;
        calls
            .is_complete()
            .then(|| (name.as_str(), text[from..to].trim_start()))
    }

    /// The memory that it takes, with what allocations add; functions that share the grammar of their arguments
    /// count it each.
    pub(super) fn bytes(&self) -> usize {
        let unused = self.0.functions.capacity() - self.0.functions.len();
        let functions: usize = self.0.functions.iter().map(Function::bytes).sum();
        OWN_BYTES + unused * size_of::<Function>() + functions
    }

    fn quoted(&self, function: u16) -> &[u8] {
        &self.0.functions[usize::from(function)].quoted
    }
}

/// Takes an answer byte by byte.
pub(super) struct Calls {
    grammar: CallGrammar,
    /// The answer is one call, without marks.
    whole: bool,
    at: At,
    /// Takes the arguments, or took them last.
    value: Option<Box<Automaton>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// In free text; so many bytes of the mark that begins a call are there.
    Text { mark: u8 },
    /// Where an object may follow that is a call. `first`: none was there yet.
    Between { first: bool },
    /// In free text in which no call can begin any more.
    Never,
    /// In or before a part that is always the same.
    Fixed {
        part: Part,
        at: u8,
        blanks: u8,
        function: u16,
    },
    /// In the name: those of the functions from `low` to `high` begin so.
    Name { low: u16, high: u16, at: u16 },
    /// In the arguments; so many bytes of the mark that ends a call are there.
    Value { function: u16, mark: u8 },
    /// Behind the whole.
    End,
}

/// What is always the same, in the order in which it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Begin,
    /// `"type": "function"` before the name, as some models write it.
    Type,
    TypeColon,
    TypeValue,
    TypeComma,
    KeyBehindType,
    Key,
    KeyColon,
    Quote,
    Comma,
    Arguments,
    ArgumentsColon,
    End,
    Close,
}

impl Part {
    fn text(self, format: CallFormat) -> &'static [u8] {
        match self {
            Part::Begin => b"{",
            Part::Type => b"\"type\"",
            Part::TypeValue => b"\"function\"",
            Part::TypeColon | Part::KeyColon | Part::ArgumentsColon => b":",
            Part::TypeComma | Part::Comma => b",",
            Part::Key | Part::KeyBehindType => b"\"name\"",
            Part::Quote => b"\"",
            Part::Arguments => match format {
                CallFormat::Tagged => b"\"arguments\"",
                CallFormat::Bare => b"\"parameters\"",
            },
            Part::End => b"}",
            Part::Close => CLOSE,
        }
    }
}

/// What a step changed.
pub(super) struct Undo {
    at: At,
    value: Change,
}

enum Change {
    None,
    Step(automaton::Undo),
    /// In place of this one.
    Began(Option<Box<Automaton>>),
}

/// A state to compare with.
#[derive(PartialEq, Eq)]
pub(super) struct Snapshot {
    at: At,
    value: Option<automaton::Snapshot>,
}

impl Calls {
    /// Free text with calls in it or, if `whole`, one call.
    pub(super) fn new(grammar: CallGrammar, whole: bool) -> Self {
        let at = match (whole, grammar.0.format) {
            (true, _) => before(Part::Begin, 0),
            (false, CallFormat::Tagged) => At::Text { mark: 0 },
            (false, CallFormat::Bare) => At::Between { first: true },
        };
        Self {
            grammar,
            whole,
            at,
            value: None,
        }
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let value = match self.at {
            At::Value { .. } => self.value.as_ref().map(|value| value.snapshot()),
            _ => None,
        };
        Snapshot { at: self.at, value }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.at == At::End
    }

    /// Whether an answer may end here and any byte may follow.
    pub(super) fn is_free(&self) -> bool {
        match self.at {
            At::Text { .. } | At::Between { .. } | At::Never => true,
            // Until the name of a function is there, an object is any object.
            At::Fixed { part, .. } => part < Part::Comma && self.objects_are_free(),
            At::Name { .. } => self.objects_are_free(),
            At::Value { .. } | At::End => false,
        }
    }

    fn objects_are_free(&self) -> bool {
        !self.whole && self.grammar.0.format == CallFormat::Bare
    }

    /// Whether it takes any rest of a token of this vocabulary.
    pub(super) fn is_idle(&self, trie: &Trie) -> bool {
        match self.at {
            At::Text { mark: 0 } => !trie.runs_on(),
            At::Never => true,
            _ => false,
        }
    }

    /// Behind a part.
    fn behind(&mut self, part: Part, function: u16) -> (At, Change) {
        let next = match part {
            Part::Begin => Part::Key,
            Part::Type => Part::TypeColon,
            Part::TypeColon => Part::TypeValue,
            Part::TypeValue => Part::TypeComma,
            Part::TypeComma => Part::KeyBehindType,
            Part::Key | Part::KeyBehindType => Part::KeyColon,
            Part::KeyColon => Part::Quote,
            Part::Quote => {
                let high = self.grammar.0.functions.len() as u16;
                let (low, at) = (0, 0);
                return (At::Name { low, high, at }, Change::None);
            }
            Part::Comma => Part::Arguments,
            Part::Arguments => Part::ArgumentsColon,
            Part::ArgumentsColon => {
                let rules = &self.grammar.0.functions[usize::from(function)].arguments;
                let began = Box::new(Automaton::new(rules.clone()));
                let before = self.value.replace(began);
                let mark = 0;
                return (At::Value { function, mark }, Change::Began(before));
            }
            Part::End => {
                let at = match self.grammar.0.format {
                    _ if self.whole => At::End,
                    CallFormat::Tagged => before(Part::Close, function),
                    CallFormat::Bare => At::Between { first: false },
                };
                return (at, Change::None);
            }
            Part::Close => return (At::Text { mark: 0 }, Change::None),
        };
        (before(next, function), Change::None)
    }

    /// A byte with which this is no call.
    fn astray(&self) -> Option<(At, Change)> {
        self.objects_are_free().then_some((At::Never, Change::None))
    }

    fn fixed(
        &mut self,
        part: Part,
        at: u8,
        blanks: u8,
        function: u16,
        byte: u8,
    ) -> Option<(At, Change)> {
        let in_part = |part, at, blanks| At::Fixed {
            part,
            at,
            blanks,
            function,
        };
        if let (0, Some(blanks)) = (at, blank(byte, blanks)) {
            return match blanks {
                Some(blanks) => Some((in_part(part, 0, blanks), Change::None)),
                None if part < Part::Comma => self.astray(),
                None => None,
            };
        }
        let text = part.text(self.grammar.0.format);
        if text[usize::from(at)] == byte {
            return Some(if usize::from(at) + 1 == text.len() {
                self.behind(part, function)
            } else {
                (in_part(part, at + 1, 0), Change::None)
            });
        }
        // The first key may be another.
        let bare = self.grammar.0.format == CallFormat::Bare;
        if (part, at, byte) == (Part::Key, 1, b't') && bare {
            return Some((in_part(Part::Type, 2, 0), Change::None));
        }
        if part < Part::Comma {
            self.astray()
        } else {
            None
        }
    }

    fn name(&self, low: u16, high: u16, at: u16, byte: u8) -> Option<(At, Change)> {
        let quoted = |n| self.grammar.quoted(n);
        let (from, to) = narrow(low, high, at, byte, quoted);
        if from < to {
            let (low, high, at) = (from, to, at + 1);
            return Some((At::Name { low, high, at }, Change::None));
        }
        // The shortest of those that begin so comes first.
        if byte == b'"' && low < high && quoted(low).len() == usize::from(at) {
            return Some((before(Part::Comma, low), Change::None));
        }
        self.astray()
    }
}

fn before(part: Part, function: u16) -> At {
    let (at, blanks) = (0, 0);
    At::Fixed {
        part,
        at,
        blanks,
        function,
    }
}

/// How much of a mark is there after one more byte. Its first byte stands nowhere else in it.
fn progress(mark: &[u8], there: u8, byte: u8) -> u8 {
    if mark[usize::from(there)] == byte {
        there + 1
    } else {
        u8::from(mark[0] == byte)
    }
}

impl Machine for Calls {
    type Undo = Undo;

    fn step(&mut self, byte: u8) -> Option<Undo> {
        let before_it = self.at;
        let (at, value) = match before_it {
            At::Text { mark } => match progress(OPEN, mark, byte) {
                mark if usize::from(mark) == OPEN.len() => (before(Part::Begin, 0), Change::None),
                mark => (At::Text { mark }, Change::None),
            },
            At::Between { first } => match byte {
                b' ' | b'\n' | b'\r' | b'\t' => (before_it, Change::None),
                b';' if !first => (before_it, Change::None),
                b'{' => (before(Part::Key, 0), Change::None),
                _ => (At::Never, Change::None),
            },
            At::Never => (At::Never, Change::None),
            At::Fixed {
                part,
                at,
                blanks,
                function,
            } => self.fixed(part, at, blanks, function, byte)?,
            At::Name { low, high, at } => self.name(low, high, at, byte)?,
            At::Value { function, mark } => {
                let mark = match self.grammar.0.format {
                    CallFormat::Tagged if !self.whole => progress(CLOSE, mark, byte),
                    _ => 0,
                };
                // A call ends with the first mark behind it, wherever that stands.
                if usize::from(mark) == CLOSE.len() {
                    return None;
                }
                let value = self.value.as_mut()?;
                let undo = value.step(byte)?;
                let at = match value.is_complete() {
                    true => before(Part::End, function),
                    false => At::Value { function, mark },
                };
                (at, Change::Step(undo))
            }
            At::End => return None,
        };
        self.at = at;
        Some(Undo {
            at: before_it,
            value,
        })
    }

    fn undo(&mut self, undo: Undo) {
        self.at = undo.at;
        match undo.value {
            Change::None => {}
            Change::Step(undo) => {
                if let Some(value) = &mut self.value {
                    value.undo(undo);
                }
            }
            Change::Began(before) => self.value = before,
        }
    }
}
