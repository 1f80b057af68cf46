//! The key–value section of a GGUF file: read with limits, kept typed, asked for by key.
//!
//! Integers of every width become `u64` or `i64` and floats `f64` (exactly), because writers disagree on widths;
//! signs, kinds and ranges are checked when a value is asked for.

use std::collections::HashMap;
use std::io::Read;

use super::reader::Reader;
use crate::error::{Fault, Missing, Problem};

/// The most keys a file may have. Real ones have a few dozen.
const MAX_KEYS: u64 = 4096;
/// The longest key that the format allows.
const MAX_KEY: u64 = 65_535;
/// The most elements of all arrays together. Llama 3 has 0.8 million, for 128,256 tokens.
const MAX_ELEMENTS: u64 = 4 << 20;

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// An array: all elements of one kind.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Array {
    Unsigned(Vec<u64>),
    Signed(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Strings(Vec<String>),
}

/// All metadata of one file.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    values: HashMap<String, Value>,
}

/// The value types of the format, by code.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::String,
            9 => Self::Array,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    /// The fewest bytes that one value takes.
    fn least_bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::String | Self::Array | Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }
}

const VALUE: &str = "a metadata value";

impl Metadata {
    /// Reads `count` pairs.
    pub(super) fn read<R: Read>(reader: &mut Reader<R>, count: u64) -> Result<Self, Problem> {
        if count > MAX_KEYS {
            return Err(Fault::TooMany {
                what: "metadata keys",
                count,
                limit: MAX_KEYS,
            }
            .into());
        }
        let mut values = HashMap::new();
        let mut elements_left = MAX_ELEMENTS;
        for _ in 0..count {
            let key = reader.string("a metadata key", MAX_KEY)?;
            let value = read_value(reader, &key, &mut elements_left)?;
            if values.insert(key.clone(), value).is_some() {
                return Err(Fault::DuplicateKey { key }.into());
            }
        }
        Ok(Self { values })
    }

    fn wrong_type(key: &str, expected: &'static str) -> Problem {
        Fault::WrongType {
            key: key.to_owned(),
            expected,
        }
        .into()
    }

    fn out_of_range(key: &str, value: impl ToString) -> Problem {
        Fault::OutOfRange {
            key: key.to_owned(),
            value: value.to_string(),
        }
        .into()
    }

    /// A non-negative integer of any width.
    pub(super) fn u64(&self, key: &str) -> Result<Option<u64>, Problem> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(value)) => Ok(Some(*value)),
            Some(Value::Signed(value)) => u64::try_from(*value)
                .map(Some)
                .map_err(|_| Self::out_of_range(key, value)),
            Some(_) => Err(Self::wrong_type(key, "an integer")),
        }
    }

    /// A non-negative integer that fits 32 bits.
    pub(super) fn u32(&self, key: &str) -> Result<Option<u32>, Problem> {
        self.u64(key)?
            .map(|value| u32::try_from(value).map_err(|_| Self::out_of_range(key, value)))
            .transpose()
    }

    pub(super) fn f32(&self, key: &str) -> Result<Option<f32>, Problem> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value as f32)),
            Some(_) => Err(Self::wrong_type(key, "a floating-point number")),
        }
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, Problem> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(Self::wrong_type(key, "a Boolean")),
        }
    }

    pub(super) fn str(&self, key: &str) -> Result<Option<&str>, Problem> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(_) => Err(Self::wrong_type(key, "a string")),
        }
    }

    pub(super) fn strings(&self, key: &str) -> Result<Option<&[String]>, Problem> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::Strings(values))) => Ok(Some(values)),
            Some(_) => Err(Self::wrong_type(key, "an array of strings")),
        }
    }

    pub(super) fn floats(&self, key: &str) -> Result<Option<&[f64]>, Problem> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::Floats(values))) => Ok(Some(values)),
            Some(_) => Err(Self::wrong_type(key, "an array of floating-point numbers")),
        }
    }

    pub(super) fn integers(&self, key: &str) -> Result<Option<Vec<i64>>, Problem> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::Signed(values))) => Ok(Some(values.clone())),
            Some(Value::Array(Array::Unsigned(values))) => values
                .iter()
                .map(|value| i64::try_from(*value).map_err(|_| Self::out_of_range(key, value)))
                .collect::<Result<_, _>>()
                .map(Some),
            Some(_) => Err(Self::wrong_type(key, "an array of integers")),
        }
    }

    /// `value`, or the complaint that `key` is missing.
    pub(super) fn require<T>(key: &str, value: Option<T>) -> Result<T, Problem> {
        value.ok_or_else(|| {
            Missing::Key {
                key: key.to_owned(),
            }
            .into()
        })
    }
}

fn read_kind<R: Read>(reader: &mut Reader<R>, key: &str) -> Result<Kind, Problem> {
    let code = reader.u32("a metadata value's type")?;
    Kind::from_code(code).ok_or_else(|| {
        Fault::UnknownValueType {
            key: key.to_owned(),
            code,
        }
        .into()
    })
}

fn read_bool<R: Read>(reader: &mut Reader<R>, key: &str) -> Result<bool, Problem> {
    match reader.bytes::<1>(VALUE)? {
        [0] => Ok(false),
        [1] => Ok(true),
        [value] => Err(Fault::InvalidBool {
            key: key.to_owned(),
            value,
        }
        .into()),
    }
}

fn read_unsigned<R: Read>(reader: &mut Reader<R>, kind: Kind) -> Result<u64, Problem> {
    Ok(match kind {
        Kind::U8 => u64::from(u8::from_le_bytes(reader.bytes(VALUE)?)),
        Kind::U16 => u64::from(u16::from_le_bytes(reader.bytes(VALUE)?)),
        Kind::U32 => u64::from(reader.u32(VALUE)?),
        _ => reader.u64(VALUE)?,
    })
}

fn read_signed<R: Read>(reader: &mut Reader<R>, kind: Kind) -> Result<i64, Problem> {
    Ok(match kind {
        Kind::I8 => i64::from(i8::from_le_bytes(reader.bytes(VALUE)?)),
        Kind::I16 => i64::from(i16::from_le_bytes(reader.bytes(VALUE)?)),
        Kind::I32 => i64::from(i32::from_le_bytes(reader.bytes(VALUE)?)),
        _ => i64::from_le_bytes(reader.bytes(VALUE)?),
    })
}

fn read_float<R: Read>(reader: &mut Reader<R>, kind: Kind) -> Result<f64, Problem> {
    Ok(match kind {
        Kind::F32 => f64::from(f32::from_le_bytes(reader.bytes(VALUE)?)),
        _ => f64::from_le_bytes(reader.bytes(VALUE)?),
    })
}

fn read_value<R: Read>(
    reader: &mut Reader<R>,
    key: &str,
    elements_left: &mut u64,
) -> Result<Value, Problem> {
    let kind = read_kind(reader, key)?;
    Ok(match kind {
        Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => {
            Value::Unsigned(read_unsigned(reader, kind)?)
        }
        Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 => Value::Signed(read_signed(reader, kind)?),
        Kind::F32 | Kind::F64 => Value::Float(read_float(reader, kind)?),
        Kind::Bool => Value::Bool(read_bool(reader, key)?),
        Kind::String => Value::String(reader.string("a metadata string", u64::MAX)?),
        Kind::Array => Value::Array(read_array(reader, key, elements_left)?),
    })
}

fn read_array<R: Read>(
    reader: &mut Reader<R>,
    key: &str,
    elements_left: &mut u64,
) -> Result<Array, Problem> {
    let kind = read_kind(reader, key)?;
    if kind == Kind::Array {
        return Err(Fault::NestedArray {
            key: key.to_owned(),
        }
        .into());
    }
    let count = reader.u64("a metadata array's length")?;
    if count > *elements_left {
        return Err(Fault::TooMany {
            what: "array elements",
            count,
            limit: MAX_ELEMENTS,
        }
        .into());
    }
    *elements_left -= count;
    // No overflow: the count is at most MAX_ELEMENTS.
    reader.expect("a metadata array", count * kind.least_bytes())?;

    fn collect<R, T>(
        reader: &mut Reader<R>,
        count: u64,
        mut read: impl FnMut(&mut Reader<R>) -> Result<T, Problem>,
    ) -> Result<Vec<T>, Problem> {
        let mut values = Vec::with_capacity(count as usize);
        for _ in 0..count {
            values.push(read(reader)?);
        }
        Ok(values)
    }
    Ok(match kind {
        Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => {
            Array::Unsigned(collect(reader, count, |r| read_unsigned(r, kind))?)
        }
        Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 => {
            Array::Signed(collect(reader, count, |r| read_signed(r, kind))?)
        }
        Kind::F32 | Kind::F64 => Array::Floats(collect(reader, count, |r| read_float(r, kind))?),
        Kind::Bool => Array::Bools(collect(reader, count, |r| read_bool(r, key))?),
        Kind::String | Kind::Array => Array::Strings(collect(reader, count, |r| {
            r.string("a metadata string", u64::MAX)
        })?),
    })
}
