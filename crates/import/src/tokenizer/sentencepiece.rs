//! SentencePiece's `tokenizer.model`: a protobuf message, of which the few needed fields are read by hand.
//!
//! ```text
//! ModelProto      1 pieces*  2 trainer_spec  3 normalizer_spec
//! SentencePiece   1 piece (string)  2 score (float)  3 type (enum)
//! TrainerSpec     3 model_type  24 treat_whitespace_as_suffix  40 unk_id  41 bos_id  42 eos_id
//! NormalizerSpec  2 precompiled_charsmap  3 add_dummy_prefix  4 remove_extra_whitespaces  5 escape_whitespaces
//! ```

use super::{Kind, MAX_TOKEN, Token};
use crate::error::{Fault, Problem, Unsupported};

/// The most pieces; Llama 2 has 32,000 and Gemma 256,000.
const MAX_PIECES: u64 = 1 << 20;

/// A SentencePiece BPE model.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) tokens: Vec<Token>,
    pub(crate) scores: Vec<f32>,
    pub(crate) unknown: Option<u32>,
    pub(crate) bos: Option<u32>,
    pub(crate) add_dummy_prefix: bool,
}

/// Parses a `tokenizer.model`.
pub(crate) fn parse(bytes: &[u8]) -> Result<Model, Problem> {
    let mut model = Model {
        tokens: Vec::new(),
        scores: Vec::new(),
        unknown: Some(0),
        bos: Some(1),
        add_dummy_prefix: true,
    };
    let mut trainer = Trainer::default();
    let mut normalizer = Normalizer::default();
    let mut message = Message::new(bytes, 0);
    while let Some((field, value)) = message.next()? {
        match (field, value) {
            (1, Field::Bytes(piece, at)) => {
                if model.tokens.len() as u64 == MAX_PIECES {
                    return Err(Fault::TooMany {
                        what: "pieces",
                        count: MAX_PIECES + 1,
                        limit: MAX_PIECES,
                    }
                    .into());
                }
                let (token, score) = read_piece(piece, at)?;
                model.tokens.push(token);
                model.scores.push(score);
            }
            (2, Field::Bytes(spec, at)) => trainer.read(spec, at)?,
            (3, Field::Bytes(spec, at)) => normalizer.read(spec, at)?,
            (1..=3, _) => return Err(fault(message.offset(), "a field of the wrong type")),
            _ => {}
        }
    }
    if model.tokens.is_empty() {
        return Err(fault(0, "no pieces"));
    }
    trainer.check()?;
    normalizer.check()?;
    model.unknown = u32::try_from(trainer.unk_id).ok();
    model.bos = u32::try_from(trainer.bos_id).ok();
    model.add_dummy_prefix = normalizer.add_dummy_prefix;
    Ok(model)
}

fn fault(offset: usize, reason: &'static str) -> Problem {
    Fault::Protobuf {
        offset: offset as u64,
        reason,
    }
    .into()
}

fn setting(key: &str, value: impl ToString) -> Problem {
    Unsupported::Setting {
        key: key.to_owned(),
        value: value.to_string(),
    }
    .into()
}

fn read_piece(bytes: &[u8], at: usize) -> Result<(Token, f32), Problem> {
    let mut text = None;
    let mut score = 0.0;
    let mut kind = Kind::Normal;
    let mut message = Message::new(bytes, at);
    while let Some((field, value)) = message.next()? {
        match (field, value) {
            (1, Field::Bytes(bytes, at)) => {
                if bytes.len() > MAX_TOKEN {
                    return Err(Fault::TooLong {
                        what: "a piece",
                        length: bytes.len() as u64,
                        limit: MAX_TOKEN as u64,
                    }
                    .into());
                }
                let piece = std::str::from_utf8(bytes).map_err(|_| Fault::NotUtf8 {
                    what: "a piece",
                    offset: at as u64,
                })?;
                text = Some(piece.to_owned());
            }
            (2, Field::Fixed32(bits)) => score = f32::from_bits(bits),
            (3, Field::Varint(code)) => {
                kind = match code {
                    1 => Kind::Normal,
                    2 => Kind::Unknown,
                    3 => Kind::Control,
                    4 => Kind::UserDefined,
                    5 => Kind::Unused,
                    6 => Kind::Byte,
                    _ => return Err(fault(at, "an unknown piece type")),
                };
            }
            (1..=3, _) => return Err(fault(at, "a piece's field of the wrong type")),
            _ => {}
        }
    }
    match text {
        Some(text) if !text.is_empty() => Ok((Token { text, kind }, score)),
        _ => Err(fault(at, "a piece without text")),
    }
}

/// The needed part of `TrainerSpec`, with the format's defaults.
struct Trainer {
    model_type: u64,
    whitespace_as_suffix: bool,
    unk_id: i64,
    bos_id: i64,
}

impl Default for Trainer {
    fn default() -> Self {
        Self {
            model_type: 1,
            whitespace_as_suffix: false,
            unk_id: 0,
            bos_id: 1,
        }
    }
}

impl Trainer {
    fn read(&mut self, bytes: &[u8], at: usize) -> Result<(), Problem> {
        let mut message = Message::new(bytes, at);
        while let Some((field, value)) = message.next()? {
            match (field, value) {
                (3, Field::Varint(value)) => self.model_type = value,
                (24, Field::Varint(value)) => self.whitespace_as_suffix = value != 0,
                // Negative ids are sign-extended to 64 bits.
                (40, Field::Varint(value)) => self.unk_id = value as i64,
                (41, Field::Varint(value)) => self.bos_id = value as i64,
                (3 | 24 | 40 | 41, _) => {
                    return Err(fault(at, "a trainer field of the wrong type"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Problem> {
        let name = match self.model_type {
            2 => None,
            1 => Some("SentencePiece unigram"),
            3 => Some("SentencePiece word"),
            4 => Some("SentencePiece char"),
            _ => Some("SentencePiece of unknown type"),
        };
        if let Some(name) = name {
            return Err(Unsupported::TokenizerModel {
                name: name.to_owned(),
            }
            .into());
        }
        if self.whitespace_as_suffix {
            return Err(setting("treat_whitespace_as_suffix", true));
        }
        Ok(())
    }
}

/// The needed part of `NormalizerSpec`, with the format's defaults.
struct Normalizer {
    charsmap: usize,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

impl Default for Normalizer {
    fn default() -> Self {
        Self {
            charsmap: 0,
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        }
    }
}

impl Normalizer {
    fn read(&mut self, bytes: &[u8], at: usize) -> Result<(), Problem> {
        let mut message = Message::new(bytes, at);
        while let Some((field, value)) = message.next()? {
            match (field, value) {
                (2, Field::Bytes(map, _)) => self.charsmap = map.len(),
                (3, Field::Varint(value)) => self.add_dummy_prefix = value != 0,
                (4, Field::Varint(value)) => self.remove_extra_whitespaces = value != 0,
                (5, Field::Varint(value)) => self.escape_whitespaces = value != 0,
                (2..=5, _) => return Err(fault(at, "a normalizer field of the wrong type")),
                _ => {}
            }
        }
        Ok(())
    }

    /// Llama's models normalise nothing; rules that others have would be lost silently.
    fn check(&self) -> Result<(), Problem> {
        if self.charsmap != 0 {
            return Err(setting(
                "precompiled_charsmap",
                format!("{} bytes", self.charsmap),
            ));
        }
        if self.remove_extra_whitespaces {
            return Err(setting("remove_extra_whitespaces", true));
        }
        if !self.escape_whitespaces {
            return Err(setting("escape_whitespaces", false));
        }
        Ok(())
    }
}

/// One field's value, as the wire has it.
enum Field<'a> {
    Varint(u64),
    Fixed32(u32),
    /// The bytes and where they begin in the file.
    Bytes(&'a [u8], usize),
    /// 64 bits, which no needed field has.
    Fixed64,
}

/// The fields of one message, in order.
struct Message<'a> {
    rest: &'a [u8],
    start: usize,
    length: usize,
}

impl<'a> Message<'a> {
    fn new(bytes: &'a [u8], start: usize) -> Self {
        Self {
            rest: bytes,
            start,
            length: bytes.len(),
        }
    }

    fn offset(&self) -> usize {
        self.start + self.length - self.rest.len()
    }

    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, Problem> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Field::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Fixed64
            }
            2 => {
                let length = self.varint()?;
                let at = self.offset();
                Field::Bytes(self.take(length)?, at)
            }
            5 => {
                let bytes = self.take(4)?;
                Field::Fixed32(u32::from_le_bytes(
                    bytes.try_into().expect("four bytes were taken"),
                ))
            }
            _ => return Err(fault(self.offset(), "an unknown wire type")),
        };
        Ok(Some((tag >> 3, value)))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], Problem> {
        match usize::try_from(length) {
            Ok(length) if length <= self.rest.len() => {
                let (head, rest) = self.rest.split_at(length);
                self.rest = rest;
                Ok(head)
            }
            _ => Err(fault(self.offset(), "a length past the end")),
        }
    }

    fn varint(&mut self) -> Result<u64, Problem> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let Some((byte, rest)) = self.rest.split_first() else {
                return Err(fault(self.offset(), "the end of the file inside a number"));
            };
            self.rest = rest;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(fault(self.offset(), "a number of more than 64 bits"))
    }
}
