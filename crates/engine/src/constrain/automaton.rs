//! The automaton: takes a JSON text byte by byte, and only what its grammar allows. It is stricter
//! than JSON where endless or unparsable answers would be possible: depth, white space in a row and
//! digits are bounded, and every escape is a character.

use super::schema::{Node, Rules};
use super::trie::Machine;

/// Most objects and arrays inside each other.
pub(super) const MAX_DEPTH: usize = 32;
/// Most white space between two parts.
pub(super) const MAX_BLANKS: u8 = 64;
/// Most digits of a number, before its exponent and behind the point together.
pub(super) const MAX_DIGITS: u8 = 20;
/// Most digits of an exponent.
const MAX_EXPONENT_DIGITS: u8 = 2;

pub(super) struct Automaton {
    rules: Rules,
    at: At,
    stack: Vec<Frame>,
}

/// Where in a text it is, inside of the innermost object or array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Before a value of a kind.
    Value { node: u16, blanks: u8 },
    /// Behind `[`.
    FirstItem { blanks: u8 },
    /// Behind `{`.
    FirstKey { blanks: u8 },
    /// Behind the comma of an object.
    Key { blanks: u8 },
    /// In a declared key: those from `low` to `high` begin so.
    Declared { low: u16, high: u16, at: u16 },
    /// Behind a key.
    Colon { node: u16, blanks: u8 },
    /// In a string or, with a node for its value, a free key.
    Text { key: Option<u16>, part: Part },
    /// In one of the listed values of a node.
    Literal {
        node: u16,
        low: u16,
        high: u16,
        at: u16,
    },
    /// In a number.
    Number {
        part: Digits,
        count: u8,
        integer: bool,
    },
    /// In `true`, `false` or `null`.
    Word { rest: &'static [u8] },
    /// Behind a value.
    After { blanks: u8 },
    /// Behind the whole.
    End,
}

/// Where in a string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Plain,
    /// So many bytes of a character are missing.
    Rest(u8),
    /// The next byte must lie between these, then so many follow.
    Within(u8, u8, u8),
    /// Behind a backslash.
    Escape,
    /// Behind `\u`.
    Hex,
    /// Behind `\ud`.
    HexD,
    /// So many hexadecimal digits are missing.
    Digits(u8),
    /// As `Digits`, and the second half of a pair follows.
    High(u8),
    /// Before the second half of a pair, byte by byte.
    LowBackslash,
    LowU,
    LowD,
    LowKind,
}

/// Where in a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Digits {
    Minus,
    Zero,
    Whole,
    Point,
    Fraction,
    Exponent,
    Sign,
    Power,
}

/// An object or array that is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Frame {
    node: u16,
    object: bool,
    /// Of an object: a bit for each declared key that is there. Of an array: its commas.
    seen: u64,
}

/// What a step changed.
pub(super) struct Undo {
    at: At,
    stack: Change,
}

enum Change {
    None,
    Pushed,
    Popped(Frame),
    Top(Frame),
}

/// A state to compare with.
#[derive(PartialEq, Eq)]
pub(super) struct Snapshot {
    at: At,
    stack: Vec<Frame>,
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\n' | b'\r' | b'\t')
}

impl Automaton {
    pub(super) fn new(rules: Rules) -> Self {
        let node = rules.root();
        Self {
            rules,
            at: At::Value { node, blanks: 0 },
            stack: Vec::with_capacity(MAX_DEPTH),
        }
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot {
            at: self.at,
            stack: self.stack.clone(),
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.at == At::End
    }

    /// The rules of the innermost object or array.
    fn top(&self) -> Option<&Node> {
        Some(self.rules.node(self.stack.last()?.node))
    }

    fn push(&mut self, node: u16, object: bool) -> Option<Change> {
        if self.stack.len() == MAX_DEPTH {
            return None;
        }
        let seen = 0;
        self.stack.push(Frame { node, object, seen });
        Some(Change::Pushed)
    }

    /// Ends the innermost object or array.
    fn pop(&mut self) -> (At, Change) {
        let change = self.stack.pop().map_or(Change::None, Change::Popped);
        let at = if self.stack.is_empty() {
            At::End
        } else {
            At::After { blanks: 0 }
        };
        (at, change)
    }

    /// The first byte of a value.
    fn begin(&mut self, node: u16, byte: u8) -> Option<(At, Change)> {
        let rules = self.rules.node(node);
        let high = rules.literals.len() as u16;
        if let Some(literal) = self.literal(node, 0, high, 0, byte) {
            return Some((literal, Change::None));
        }
        let kinds = rules.kinds;
        let number = |part| {
            let (integer, count) = (!kinds.number, u8::from(part != Digits::Minus));
            let at = At::Number {
                part,
                count,
                integer,
            };
            (kinds.number || kinds.integer).then_some((at, Change::None))
        };
        let word = |allowed: bool, rest| allowed.then_some((At::Word { rest }, Change::None));
        match byte {
            b'"' => {
                let (key, part) = (None, Part::Plain);
                let text = At::Text { key, part };
                kinds.string.then_some((text, Change::None))
            }
            b'{' if rules.object.is_some() => {
                Some((At::FirstKey { blanks: 0 }, self.push(node, true)?))
            }
            b'[' if rules.array.is_some() => {
                Some((At::FirstItem { blanks: 0 }, self.push(node, false)?))
            }
            b'-' => number(Digits::Minus),
            b'0' => number(Digits::Zero),
            b'1'..=b'9' => number(Digits::Whole),
            b't' => word(kinds.boolean, b"rue"),
            b'f' => word(kinds.boolean, b"alse"),
            b'n' => word(kinds.null, b"ull"),
            _ => None,
        }
    }

    /// Behind a value that is not the whole.
    fn after(&mut self, blanks: u8, byte: u8) -> Option<(At, Change)> {
        if let Some(blanks) = blank(byte, blanks) {
            return Some((At::After { blanks: blanks? }, Change::None));
        }
        let frame = *self.stack.last()?;
        if frame.object {
            let object = self.top()?.object.as_ref()?;
            return match byte {
                b',' if object.open.is_some() || frame.seen != object.all() => {
                    Some((At::Key { blanks: 0 }, Change::None))
                }
                b'}' => self.close_object(),
                _ => None,
            };
        }
        let array = self.top()?.array.as_ref()?;
        match byte {
            b',' if frame.seen + 1 < array.max => {
                let node = array.items;
                self.stack.last_mut()?.seen += 1;
                Some((At::Value { node, blanks: 0 }, Change::Top(frame)))
            }
            b']' if frame.seen + 1 >= array.min => Some(self.pop()),
            _ => None,
        }
    }

    fn close_object(&mut self) -> Option<(At, Change)> {
        let seen = self.stack.last()?.seen;
        let missing = self.top()?.object.as_ref()?.required & !seen;
        (missing == 0).then(|| self.pop())
    }

    fn begin_key(&self, byte: u8) -> Option<At> {
        let object = self.top()?.object.as_ref()?;
        if byte != b'"' {
            return None;
        }
        if let Some(node) = object.open {
            let (key, part) = (Some(node), Part::Plain);
            return Some(At::Text { key, part });
        }
        let seen = self.stack.last()?.seen;
        let declared = At::Declared {
            low: 0,
            high: object.keys.len() as u16,
            at: 0,
        };
        (seen != object.all()).then_some(declared)
    }

    fn declared_key(&mut self, low: u16, high: u16, at: u16, byte: u8) -> Option<(At, Change)> {
        let frame = *self.stack.last()?;
        let object = self.top()?.object.as_ref()?;
        let keys = &object.keys;
        let (from, to) = narrow(low, high, at, byte, |n| {
            self.rules.text(keys[usize::from(n)].text)
        });
        if from < to {
            let unseen = (from..to).any(|n| frame.seen & (1 << n) == 0);
            let declared = At::Declared {
                low: from,
                high: to,
                at: at + 1,
            };
            return unseen.then_some((declared, Change::None));
        }
        // The shortest of those that begin so comes first.
        let key = keys.get(usize::from(low))?;
        let bit = 1 << low;
        if byte != b'"'
            || self.rules.text(key.text).len() != usize::from(at)
            || frame.seen & bit != 0
        {
            return None;
        }
        let node = key.node;
        self.stack.last_mut()?.seen |= bit;
        Some((At::Colon { node, blanks: 0 }, Change::Top(frame)))
    }

    fn literal(&self, node: u16, low: u16, high: u16, at: u16, byte: u8) -> Option<At> {
        let listed = |n| self.listed(node, n);
        let (low, high) = narrow(low, high, at, byte, listed);
        let at = at + 1;
        match high - low {
            0 => None,
            1 if listed(low).len() == usize::from(at) => Some(At::After { blanks: 0 }),
            _ => Some(At::Literal {
                node,
                low,
                high,
                at,
            }),
        }
    }

    fn literal_ends(&self, node: u16, low: u16, at: u16) -> bool {
        self.listed(node, low).len() == usize::from(at)
    }

    /// A listed value of a node.
    fn listed(&self, node: u16, n: u16) -> &[u8] {
        self.rules
            .text(self.rules.node(node).literals[usize::from(n)])
    }

    fn text(&self, key: Option<u16>, part: Part, byte: u8) -> Option<At> {
        let hex = byte.is_ascii_hexdigit();
        let lower = byte.to_ascii_lowercase();
        let fewer = |n: u8, next: fn(u8) -> Part, last| match n {
            1 => last,
            _ => next(n - 1),
        };
        let part = match part {
            Part::Plain => match byte {
                b'"' => {
                    return Some(match key {
                        Some(node) => At::Colon { node, blanks: 0 },
                        None => At::After { blanks: 0 },
                    });
                }
                b'\\' => Part::Escape,
                0x20..=0x7f => Part::Plain,
                0xc2..=0xdf => Part::Rest(1),
                0xe0 => Part::Within(0xa0, 0xbf, 1),
                0xed => Part::Within(0x80, 0x9f, 1),
                0xe1..=0xef => Part::Rest(2),
                0xf0 => Part::Within(0x90, 0xbf, 2),
                0xf1..=0xf3 => Part::Rest(3),
                0xf4 => Part::Within(0x80, 0x8f, 2),
                _ => return None,
            },
            Part::Rest(n) if (0x80..=0xbf).contains(&byte) => fewer(n, Part::Rest, Part::Plain),
            Part::Within(low, high, n) if (low..=high).contains(&byte) => Part::Rest(n),
            Part::Escape => match byte {
                b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Part::Plain,
                b'u' => Part::Hex,
                _ => return None,
            },
            Part::Hex if lower == b'd' => Part::HexD,
            Part::Hex if hex => Part::Digits(3),
            Part::HexD if byte.is_ascii_digit() && byte < b'8' => Part::Digits(2),
            Part::HexD if matches!(lower, b'8' | b'9' | b'a' | b'b') => Part::High(2),
            Part::Digits(n) if hex => fewer(n, Part::Digits, Part::Plain),
            Part::High(n) if hex => fewer(n, Part::High, Part::LowBackslash),
            Part::LowBackslash if byte == b'\\' => Part::LowU,
            Part::LowU if byte == b'u' => Part::LowD,
            Part::LowD if lower == b'd' => Part::LowKind,
            Part::LowKind if (b'c'..=b'f').contains(&lower) => Part::Digits(2),
            _ => return None,
        };
        Some(At::Text { key, part })
    }
}

impl Machine for Automaton {
    type Undo = Undo;

    fn undo(&mut self, undo: Undo) {
        self.at = undo.at;
        match undo.stack {
            Change::None => {}
            Change::Pushed => {
                self.stack.pop();
            }
            Change::Popped(frame) => self.stack.push(frame),
            Change::Top(frame) => {
                if let Some(top) = self.stack.last_mut() {
                    *top = frame;
                }
            }
        }
    }

    fn step(&mut self, byte: u8) -> Option<Undo> {
        let before = self.at;
        let (at, stack) = match before {
            At::Text { key, part } => (self.text(key, part, byte)?, Change::None),
            At::Value { node, blanks } => match blank(byte, blanks) {
                Some(blanks) => (
                    At::Value {
                        node,
                        blanks: blanks?,
                    },
                    Change::None,
                ),
                None => self.begin(node, byte)?,
            },
            At::FirstItem { blanks } => match blank(byte, blanks) {
                Some(blanks) => (At::FirstItem { blanks: blanks? }, Change::None),
                None => {
                    let array = *self.top()?.array.as_ref()?;
                    if byte == b']' {
                        (array.min == 0).then(|| self.pop())?
                    } else {
                        (array.max > 0).then(|| self.begin(array.items, byte))??
                    }
                }
            },
            At::FirstKey { blanks } => match blank(byte, blanks) {
                Some(blanks) => (At::FirstKey { blanks: blanks? }, Change::None),
                None if byte == b'}' => self.close_object()?,
                None => (self.begin_key(byte)?, Change::None),
            },
            At::Key { blanks } => match blank(byte, blanks) {
                Some(blanks) => (At::Key { blanks: blanks? }, Change::None),
                None => (self.begin_key(byte)?, Change::None),
            },
            At::Declared { low, high, at } => self.declared_key(low, high, at, byte)?,
            At::Colon { node, blanks } => match blank(byte, blanks) {
                Some(blanks) => (
                    At::Colon {
                        node,
                        blanks: blanks?,
                    },
                    Change::None,
                ),
                None => {
                    let value = At::Value { node, blanks: 0 };
                    ((byte == b':').then_some(value)?, Change::None)
                }
            },
            At::Literal {
                node,
                low,
                high,
                at,
            } => match self.literal(node, low, high, at, byte) {
                Some(at) => (at, Change::None),
                // A listed number that is the beginning of another.
                None if self.literal_ends(node, low, at) => self.after(0, byte)?,
                None => return None,
            },
            At::Number {
                part,
                count,
                integer,
            } => match number(part, count, integer, byte) {
                Some((part, count)) => (
                    At::Number {
                        part,
                        count,
                        integer,
                    },
                    Change::None,
                ),
                None if may_end(part) => self.after(0, byte)?,
                None => return None,
            },
            At::Word { rest } => match rest {
                [next] if *next == byte => (At::After { blanks: 0 }, Change::None),
                [next, rest @ ..] if *next == byte => (At::Word { rest }, Change::None),
                _ => return None,
            },
            At::After { blanks } => self.after(blanks, byte)?,
            At::End => return None,
        };
        self.at = at;
        Some(Undo { at: before, stack })
    }
}

/// `None`: no white space. `Some(None)`: too much of it.
pub(super) fn blank(byte: u8, blanks: u8) -> Option<Option<u8>> {
    is_blank(byte).then_some((blanks < MAX_BLANKS).then_some(blanks + 1))
}

/// Of the sorted texts from `low` to `high`, which share `at` bytes, those that go on with `byte`.
pub(super) fn narrow<'a>(
    low: u16,
    high: u16,
    at: u16,
    byte: u8,
    text: impl Fn(u16) -> &'a [u8],
) -> (u16, u16) {
    let next = |n: u16| text(n).get(usize::from(at)).copied();
    let first = (low..high).find(|&n| next(n) == Some(byte)).unwrap_or(high);
    let behind = (first..high)
        .find(|&n| next(n) != Some(byte))
        .unwrap_or(high);
    (first, behind)
}

fn number(part: Digits, count: u8, integer: bool, byte: u8) -> Option<(Digits, u8)> {
    let more = count < MAX_DIGITS;
    Some(match (part, byte) {
        (Digits::Minus, b'0') => (Digits::Zero, 1),
        (Digits::Minus, b'1'..=b'9') => (Digits::Whole, 1),
        (Digits::Whole, b'0'..=b'9') if more => (Digits::Whole, count + 1),
        (Digits::Zero | Digits::Whole, b'.') if !integer && more => (Digits::Point, count),
        (Digits::Point, b'0'..=b'9') => (Digits::Fraction, count + 1),
        (Digits::Fraction, b'0'..=b'9') if more => (Digits::Fraction, count + 1),
        (Digits::Zero | Digits::Whole | Digits::Fraction, b'e' | b'E') if !integer => {
            (Digits::Exponent, 0)
        }
        (Digits::Exponent, b'+' | b'-') => (Digits::Sign, 0),
        (Digits::Exponent | Digits::Sign, b'0'..=b'9') => (Digits::Power, 1),
        (Digits::Power, b'0'..=b'9') if count < MAX_EXPONENT_DIGITS => (Digits::Power, count + 1),
        _ => return None,
    })
}

fn may_end(part: Digits) -> bool {
    matches!(
        part,
        Digits::Zero | Digits::Whole | Digits::Fraction | Digits::Power
    )
}
