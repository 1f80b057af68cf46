//! The header of one safetensors file.
//!
//! ```text
//! header length u64 LE | header: JSON object, name → {dtype, shape, data_offsets} | data
//! ```
//! The format allows neither gaps nor overlaps, and no duplicate names; all of it is enforced. The header is parsed
//! here and not by the `safetensors` library, because that wants the whole file in memory and keeps the last of two
//! equal names; tests write their files with the library.

use std::fmt;
use std::io::Read;

use casemate_container::DType;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::directory::json_fault;
use crate::error::{Fault, Problem, Unsupported};

/// The longest header. Real ones have some hundred kilobytes.
const MAX_HEADER: u64 = 16 << 20;
/// The most tensors in one file.
const MAX_TENSORS: usize = 65_536;
/// The longest tensor name.
const MAX_NAME: usize = 256;

/// One tensor as the file states it, checked against the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct StoredTensor {
    pub(super) name: String,
    stored_type: String,
    /// Outermost first.
    pub(super) shape: Vec<u64>,
    /// In bytes.
    pub(super) size: u64,
    /// From the beginning of the file.
    pub(super) offset: u64,
}

impl StoredTensor {
    /// The type, if it is supported and fits shape and size.
    pub(super) fn dtype(&self) -> Result<DType, Problem> {
        let dtype = match self.stored_type.as_str() {
            "F32" => DType::F32,
            "F16" => DType::F16,
            "BF16" => DType::BF16,
            other => {
                return Err(Unsupported::TensorType {
                    tensor: self.name.clone(),
                    name: other.to_owned(),
                }
                .into());
            }
        };
        let count = self.shape.len() as u64;
        if !(1..=4).contains(&count) {
            return Err(Fault::DimensionCount {
                tensor: self.name.clone(),
                count,
            }
            .into());
        }
        match dtype.bytes_for(&self.shape) {
            None | Some(0) => Err(Fault::Dimensions {
                tensor: self.name.clone(),
                dimensions: self.shape.clone(),
            }
            .into()),
            Some(expected) if expected != self.size => Err(Fault::WrongSize {
                tensor: self.name.clone(),
                found: self.size,
                expected,
            }
            .into()),
            Some(_) => Ok(dtype),
        }
    }
}

/// Reads and checks the header of a file of `length` bytes. Tensors come in the order of their data.
pub(super) fn read_header(mut file: impl Read, length: u64) -> Result<Vec<StoredTensor>, Problem> {
    const WHAT: &str = "the safetensors header";
    let truncated = |offset: u64, wanted: u64| Fault::Truncated {
        what: WHAT,
        offset,
        wanted,
        available: length.saturating_sub(offset),
    };
    if length < 8 {
        return Err(truncated(0, 8).into());
    }
    let mut size = [0; 8];
    file.read_exact(&mut size)?;
    let size = u64::from_le_bytes(size);
    if size > MAX_HEADER {
        return Err(Fault::TooLong {
            what: WHAT,
            length: size,
            limit: MAX_HEADER,
        }
        .into());
    }
    if size > length - 8 {
        return Err(truncated(8, size).into());
    }
    let mut json = vec![0; size as usize];
    file.read_exact(&mut json)?;
    let header: Header = serde_json::from_slice(&json).map_err(|e| json_fault(WHAT, &e))?;
    header.check(8 + size, length - 8 - size)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The entries in order, duplicates and all.
struct Header {
    entries: Vec<(String, Entry)>,
    count: usize,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header {
                    entries: Vec::new(),
                    count: 0,
                };
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    header.count += 1;
                    if header.count > MAX_TENSORS {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        header.entries.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl Header {
    /// Checks names and places; `start` is where the data begin, `available` how long they are.
    fn check(self, start: u64, available: u64) -> Result<Vec<StoredTensor>, Problem> {
        if self.count > MAX_TENSORS {
            return Err(Fault::TooMany {
                what: "tensors",
                count: self.count as u64,
                limit: MAX_TENSORS as u64,
            }
            .into());
        }
        let mut entries = self.entries;
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        if let Some(pair) = entries.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(Fault::DuplicateTensor {
                tensor: pair[0].0.clone(),
            }
            .into());
        }
        entries.sort_by_key(|(_, entry)| entry.data_offsets);
        let mut covered = 0;
        let mut previous = String::new();
        let mut tensors = Vec::with_capacity(entries.len());
        for (name, entry) in entries {
            if name.len() > MAX_NAME {
                return Err(Fault::TooLong {
                    what: "a tensor name",
                    length: name.len() as u64,
                    limit: MAX_NAME as u64,
                }
                .into());
            }
            let (begin, end) = entry.data_offsets;
            let Some(size) = end.checked_sub(begin).filter(|_| end <= available) else {
                return Err(Fault::OutOfBounds {
                    tensor: name,
                    offset: begin,
                    size: end.saturating_sub(begin),
                    available,
                }
                .into());
            };
            if begin < covered {
                return Err(Fault::Overlap {
                    first: previous,
                    second: name,
                }
                .into());
            }
            check_no_hole(covered, begin)?;
            covered = end;
            previous.clone_from(&name);
            tensors.push(StoredTensor {
                name,
                stored_type: entry.dtype,
                shape: entry.shape,
                size,
                // No overflow: within the file.
                offset: start + begin,
            });
        }
        check_no_hole(covered, available)?;
        Ok(tensors)
    }
}

fn check_no_hole(covered: u64, next: u64) -> Result<(), Problem> {
    if covered == next {
        return Ok(());
    }
    Err(Fault::Hole {
        offset: covered,
        size: next - covered,
    }
    .into())
}
