//! From names of tokens to bytes, as a tokenizer's decoder does it, but token by token. A name becomes at most a small
//! multiple of its length, because no replacement has more characters than what it replaces.

use serde_json::Value;

use crate::steps::{replacement, steps};
use crate::{TokenizerFileError, unsupported};

const PART: &str = "decoder";

/// What a tokenizer's decoder does to one token.
#[derive(Clone, Default)]
pub struct Decoder {
    byte_level: bool,
    byte_fallback: bool,
    replacements: Vec<(String, String)>,
    leading_spaces: usize,
}

impl Decoder {
    pub(crate) fn parse(value: &Value) -> Result<Self, TokenizerFileError> {
        let mut decoder = Self::default();
        let steps = steps(PART, value, "decoders")?;
        if steps.is_empty() {
            return Err(unsupported(PART, value));
        }
        for step in steps {
            decoder.add(step)?;
        }
        Ok(decoder)
    }

    fn add(&mut self, step: &Value) -> Result<(), TokenizerFileError> {
        match step["type"].as_str() {
            Some("ByteLevel") => self.byte_level = true,
            Some("ByteFallback") => self.byte_fallback = true,
            Some("Fuse") => {}
            Some("Replace") => {
                let (from, to) = replacement("decoder.pattern", step)?;
                self.replacements.push((from.to_owned(), to.to_owned()));
            }
            Some("Strip") => {
                let spaces = step["start"].as_u64().filter(|&n| n <= 8);
                let in_front = step["content"] == " " && step["stop"] == 0;
                let Some(spaces) = spaces.filter(|_| in_front) else {
                    return Err(unsupported(PART, step));
                };
                self.leading_spaces = spaces as usize;
            }
            Some("Metaspace") => {
                let from = step["replacement"].as_str();
                let Some(from) = from.filter(|text| text.chars().count() == 1) else {
                    return Err(unsupported("decoder.replacement", &step["replacement"]));
                };
                self.replacements.push((from.to_owned(), " ".to_owned()));
                let never = step["prepend_scheme"] == "never" || step["add_prefix_space"] == false;
                self.leading_spaces = usize::from(!never);
            }
            _ => return Err(unsupported(PART, step)),
        }
        Ok(())
    }

    /// How many spaces a whole text loses at its beginning, since encoding put them there.
    #[must_use]
    pub fn leading_spaces(&self) -> usize {
        self.leading_spaces
    }

    /// Puts the bytes of the token called `name` behind `out`.
    pub fn append(&self, name: &str, out: &mut Vec<u8>) {
        if self.byte_fallback
            && let Some(byte) = fallback_byte(name)
        {
            out.push(byte);
            return;
        }
        if self.byte_level {
            let start = out.len();
            for c in name.chars() {
                match byte_of_level_char(c) {
                    Some(byte) => out.push(byte),
                    None => {
                        // An added token in plain text.
                        out.truncate(start);
                        out.extend_from_slice(name.as_bytes());
                        return;
                    }
                }
            }
            return;
        }
        let mut text = name.to_owned();
        for (from, to) in &self.replacements {
            text = text.replace(from, to);
        }
        out.extend_from_slice(text.as_bytes());
    }
}

/// `<0x0A>` → 10.
fn fallback_byte(name: &str) -> Option<u8> {
    let hex = name.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
}

/// The inverse of GPT-2's byte alphabet: printable Latin-1 stands for itself, the other 68 bytes,
/// in order, for U+0100 on.
fn byte_of_level_char(c: char) -> Option<u8> {
    let plain = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = u32::from(c);
    if plain(code) {
        return u8::try_from(code).ok();
    }
    let nth = code.checked_sub(0x100)?;
    (0u32..256)
        .filter(|&b| !plain(b))
        .nth(nth as usize)
        .and_then(|b| u8::try_from(b).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_byte_alphabet() {
        for (c, byte) in [
            ('!', b'!'),
            ('Ġ', b' '),
            ('Ċ', b'\n'),
            ('ÿ', 0xff),
            ('Ń', 0xad),
            ('Ā', 0),
        ] {
            assert_eq!(byte_of_level_char(c), Some(byte), "{c}");
        }
        assert_eq!(byte_of_level_char('ń'), None);
        assert_eq!(byte_of_level_char(' '), None);
        let all: std::collections::BTreeSet<u8> = (0u32..0x200)
            .filter_map(char::from_u32)
            .filter_map(byte_of_level_char)
            .collect();
        assert_eq!(all.len(), 256);
    }
}
