//! GGUF files, versions 2 and 3: parsed by hand under limits, tensors read on demand.
//!
//! ```text
//! "GGUF"  version u32  tensor count u64  key count u64     little-endian throughout
//! keys:    string, value type u32, value                   metadata.rs
//! tensors: string, n u32, n × dimension u64, type u32, offset u64      table.rs
//! padding to the alignment (32, or general.alignment)
//! data: each tensor at its offset from here
//! ```
//!
//! This module opens the file and puts the parts together. What a key *means* is in `config.rs` (architecture) and
//! `vocabulary.rs` (tokenizer). Not here: the decoding of quantised blocks, which is the engine's.

mod config;
mod metadata;
mod reader;
mod table;
mod vocabulary;

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use casemate_container::SourceTensor;

use self::metadata::Metadata;
use self::reader::Reader;
use self::table::TableEntry;
use crate::architecture;
use crate::error::{Fault, ImportError, Problem, Unsupported};
use crate::source::{Imported, Place};
use crate::tokenizer;

/// The tensor types that are read, for messages.
pub(crate) const SUPPORTED_TYPES: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K and Q6_K";
/// The largest alignment accepted; 32 is usual.
pub(crate) const MAX_ALIGNMENT: u64 = 1 << 20;
const DEFAULT_ALIGNMENT: u64 = 32;

/// Opens the GGUF file at `path` and checks everything but the values of its tensors.
pub(crate) fn open(path: &Path) -> Result<Imported, ImportError> {
    let file = File::open(path).map_err(|e| ImportError::io(path, e))?;
    let length = file.metadata().map_err(|e| ImportError::io(path, e))?.len();
    import(path, file, length).map_err(|problem| problem.at(path))
}

fn import(path: &Path, file: File, length: u64) -> Result<Imported, Problem> {
    let header = Header::read(BufReader::with_capacity(1 << 16, &file), length)?;
    let architecture::Named { config, tensors } = header.architecture()?;

    let vocabulary = vocabulary::read(&header.metadata)?;
    let tokenizer_json = vocabulary.to_json()?;
    let config = tokenizer::check(&tokenizer_json, config)?;
    architecture::check(&config, &tensors)?;

    let mut assets = vec![(crate::TOKENIZER_JSON.to_owned(), tokenizer_json)];
    if let Some(template) = header.metadata.str("tokenizer.chat_template")? {
        assets.push((
            crate::CHAT_TEMPLATE.to_owned(),
            template.as_bytes().to_vec(),
        ));
    }
    Ok(Imported {
        name: crate::source::model_name(header.metadata.str("general.name")?, path),
        config,
        places: header
            .entries
            .iter()
            .map(|entry| Place {
                file: 0,
                // No overflow: checked against the file's length.
                offset: header.data_start + entry.offset,
            })
            .collect(),
        tensors,
        files: vec![(path.to_owned(), file)],
        assets,
    })
}

/// Everything in front of the data.
#[derive(Debug)]
struct Header {
    metadata: Metadata,
    entries: Vec<TableEntry>,
    data_start: u64,
}

impl Header {
    fn read(input: impl std::io::Read, length: u64) -> Result<Self, Problem> {
        let mut reader = Reader::new(input, length);
        let magic = reader.bytes::<4>("the magic number")?;
        if &magic != b"GGUF" {
            return Err(Fault::NotGguf { magic }.into());
        }
        match reader.u32("the version")? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err(Unsupported::BigEndian.into());
            }
            version => return Err(Unsupported::GgufVersion { version }.into()),
        }
        let tensor_count = reader.u64("the tensor count")?;
        let key_count = reader.u64("the key count")?;
        let metadata = Metadata::read(&mut reader, key_count)?;
        let entries = table::read(&mut reader, tensor_count)?;

        let alignment = metadata
            .u64("general.alignment")?
            .unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            return Err(Fault::Alignment { alignment }.into());
        }
        // No overflow: the header is at most MAX_HEADER long. A file without tensors may end unpadded.
        let data_start = reader.offset().next_multiple_of(alignment);
        table::check_places(&entries, alignment, length.saturating_sub(data_start))?;
        Ok(Self {
            metadata,
            entries,
            data_start,
        })
    }

    fn architecture(&self) -> Result<architecture::Named, Problem> {
        let parts = self.metadata.u64("split.count")?.unwrap_or(1);
        if parts > 1 {
            return Err(Unsupported::SplitGguf { parts }.into());
        }
        let tensors: Vec<SourceTensor> = self
            .entries
            .iter()
            .map(|entry| SourceTensor {
                name: entry.name.clone(),
                dtype: entry.dtype,
                shape: entry.shape.clone(),
                size: entry.size,
            })
            .collect();
        let config = config::read(&self.metadata, &tensors)?;
        Ok(architecture::Named { config, tensors })
    }
}

/// The `tokenizer.json` of a file that need not have tensors.
#[cfg(test)]
pub(crate) fn tokenizer_json(path: &Path) -> Result<Vec<u8>, ImportError> {
    let file = File::open(path).map_err(|e| ImportError::io(path, e))?;
    let length = file.metadata().map_err(|e| ImportError::io(path, e))?.len();
    let convert = || {
        let header = Header::read(BufReader::new(&file), length)?;
        vocabulary::read(&header.metadata)?.to_json()
    };
    convert().map_err(|problem: Problem| problem.at(path))
}

#[cfg(test)]
mod tests;
