//! The tensor table of a GGUF file: names, shapes, types and places, each checked against the file.

use std::collections::HashSet;
use std::io::Read;

use casemate_container::DType;

use super::reader::Reader;
use crate::error::{Fault, Problem, Unsupported};

/// The most tensors a file may have. Llama 3.1 405B has 1,138.
const MAX_TENSORS: u64 = 65_536;
/// The longest tensor name. The format says 64 bytes.
const MAX_NAME: u64 = 64;
/// The most dimensions that the format allows.
const MAX_DIMENSIONS: u64 = 4;

/// One tensor as the file states it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TableEntry {
    pub(super) name: String,
    pub(super) dtype: DType,
    /// Outermost first: GGUF's dimensions reversed.
    pub(super) shape: Vec<u64>,
    /// From the beginning of the data section.
    pub(super) offset: u64,
    /// In bytes.
    pub(super) size: u64,
}

/// Reads `count` entries. Places are checked by [`check_places`], once the data section is known.
pub(super) fn read<R: Read>(
    reader: &mut Reader<R>,
    count: u64,
) -> Result<Vec<TableEntry>, Problem> {
    if count > MAX_TENSORS {
        return Err(Fault::TooMany {
            what: "tensors",
            count,
            limit: MAX_TENSORS,
        }
        .into());
    }
    let mut entries = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..count {
        let entry = read_entry(reader)?;
        if !names.insert(entry.name.clone()) {
            return Err(Fault::DuplicateTensor { tensor: entry.name }.into());
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn read_entry<R: Read>(reader: &mut Reader<R>) -> Result<TableEntry, Problem> {
    const ENTRY: &str = "the tensor table";
    let name = reader.string("a tensor name", MAX_NAME)?;
    let dimension_count = u64::from(reader.u32(ENTRY)?);
    if dimension_count == 0 || dimension_count > MAX_DIMENSIONS {
        return Err(Fault::DimensionCount {
            tensor: name,
            count: dimension_count,
        }
        .into());
    }
    let mut dimensions = Vec::with_capacity(dimension_count as usize);
    for _ in 0..dimension_count {
        dimensions.push(reader.u64(ENTRY)?);
    }
    let code = reader.u32(ENTRY)?;
    let offset = reader.u64(ENTRY)?;
    let Some(dtype) = dtype(code) else {
        return Err(Unsupported::TensorType {
            tensor: name,
            name: type_name(code),
        }
        .into());
    };
    let columns = dimensions[0];
    let mut shape = dimensions;
    shape.reverse();
    let elements = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
    if elements.is_none_or(|n| n == 0) {
        shape.reverse();
        return Err(Fault::Dimensions {
            tensor: name,
            dimensions: shape,
        }
        .into());
    }
    let block = dtype.block_len();
    if columns % block != 0 {
        return Err(Fault::PartialBlock {
            tensor: name,
            columns,
            block,
        }
        .into());
    }
    let Some(size) = dtype.bytes_for(&shape) else {
        shape.reverse();
        return Err(Fault::Dimensions {
            tensor: name,
            dimensions: shape,
        }
        .into());
    };
    Ok(TableEntry {
        name,
        dtype,
        shape,
        offset,
        size,
    })
}

/// Refuses tensors off the alignment, past the end of the data section or on top of each other.
pub(super) fn check_places(
    entries: &[TableEntry],
    alignment: u64,
    available: u64,
) -> Result<(), Problem> {
    for entry in entries {
        if entry.offset % alignment != 0 {
            return Err(Fault::Misaligned {
                tensor: entry.name.clone(),
                offset: entry.offset,
                alignment,
            }
            .into());
        }
        if entry
            .offset
            .checked_add(entry.size)
            .is_none_or(|end| end > available)
        {
            return Err(Fault::OutOfBounds {
                tensor: entry.name.clone(),
                offset: entry.offset,
                size: entry.size,
                available,
            }
            .into());
        }
    }
    let mut by_offset: Vec<&TableEntry> = entries.iter().collect();
    by_offset.sort_by_key(|entry| entry.offset);
    for pair in by_offset.windows(2) {
        // No overflow: the bounds were checked above.
        if pair[0].offset + pair[0].size > pair[1].offset {
            return Err(Fault::Overlap {
                first: pair[0].name.clone(),
                second: pair[1].name.clone(),
            }
            .into());
        }
    }
    Ok(())
}

fn dtype(code: u32) -> Option<DType> {
    Some(match code {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Q4_0,
        3 => DType::Q4_1,
        8 => DType::Q8_0,
        12 => DType::Q4_K,
        14 => DType::Q6_K,
        30 => DType::BF16,
        _ => return None,
    })
}

/// The name of a type in ggml, for the refusal.
fn type_name(code: u32) -> String {
    match code {
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        13 => "Q5_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("number {code}"),
    }
    .to_owned()
}
