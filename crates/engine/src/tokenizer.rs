//! Text to token ids and back. Encoding is the `tokenizers` library's; decoding uses a table of
//! each token's bytes made once at load, so that a stream of tokens costs no search and never cuts
//! a character. Ordinary text never becomes a control token; how a chat template's text does is
//! [`crate::control`]'s. It holds no chat format: see [`crate::chat`].

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, OnceLock};

use casemate_kernels::cpu::Isa;
use casemate_kernels::oblivious::Found;
use casemate_tokenizer::{Decoder, TokenizerFile, TokenizerFileError};
use serde_json::Value;

use crate::constrain::Trie;
use crate::control::{ControlNameError, ControlNames, Prompt, plain};

/// The model's tokenizer. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    /// Knows control tokens by their internal names only.
    encoder: tokenizers::Tokenizer,
    control: ControlNames,
    /// Prepended by `encode` with `add_special`.
    bos: Option<u32>,
    pieces: Pieces,
    /// Made for the first answer that is constrained.
    trie: OnceLock<Arc<Trie>>,
}

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is not a `tokenizer.json` of a Llama-family model.
    #[error(transparent)]
    File(#[from] TokenizerFileError),
    /// Its tokens have more bytes than can be counted.
    #[error("the tokens of tokenizer.json have more than 4 GiB")]
    TooLarge,
    /// It has a token id that the model has no embedding for.
    #[error("the tokenizer has token id {id}, but the model's vocabulary has {vocab} entries")]
    IdOutsideVocabulary {
        /// The largest such id.
        id: u32,
        /// The model's vocabulary.
        vocab: u32,
    },
    /// A control token could not be told from ordinary text.
    #[error("tokenizer.json: {0}")]
    ControlName(#[from] ControlNameError),
    /// The text could not be encoded.
    #[error("the text cannot be encoded")]
    Encode,
}

impl Tokenizer {
    /// Parses a `tokenizer.json` for a model with `vocab` embedding rows. `bos` is put before each
    /// text that asks for special tokens, whatever the file's own rules are.
    ///
    /// # Errors
    /// [`TokenizerError`]: the file is malformed, unsupported, or does not belong to this model.
    pub fn from_json(json: &[u8], vocab: u32, bos: Option<u32>) -> Result<Self, TokenizerError> {
        Self::for_model(json, vocab, bos, &[])
    }

    /// As [`Self::from_json`]; the tokens in `control` are control tokens even if the file does not
    /// say so.
    ///
    /// # Errors
    /// As [`Self::from_json`].
    pub fn for_model(
        json: &[u8],
        vocab: u32,
        bos: Option<u32>,
        control: &[u32],
    ) -> Result<Self, TokenizerError> {
        let mut file = TokenizerFile::parse(json)?;
        let decoder = file.decoder().clone();
        let control = ControlNames::new(control_names(file.json(), control))?;
        file.rename(|name| control.internal(name));
        let mut encoder = file.load()?;
        // The library remembers words, and how it took them apart, for as long as it lives: of every user's prompt, and so
        // that the next one could tell by the time whether somebody wrote a word before.
        let mut forgetful = encoder.get_model().clone();
        forgetful.resize_cache(0);
        encoder.with_model(forgetful);
        let pieces = Pieces::new(&encoder, &decoder, &control, vocab)?;
        if let Some(bos) = bos.filter(|&b| b >= vocab) {
            return Err(TokenizerError::IdOutsideVocabulary { id: bos, vocab });
        }
        Ok(Self(Arc::new(Inner {
            encoder,
            control,
            bos,
            pieces,
            trie: OnceLock::new(),
        })))
    }

    /// The token ids of ordinary text. It never becomes a control token, whatever it spells.
    /// `add_special` puts the beginning-of-sequence token first where the model wants one.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`]: the tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        self.encode_translated(&plain(text), add_special)
    }

    /// The token ids of a rendered conversation: names of control tokens that the template wrote
    /// become those tokens, names in the text of clients do not. Nothing is added.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_prompt(&self, prompt: &Prompt) -> Result<Vec<u32>, TokenizerError> {
        self.encode_translated(&self.0.control.translate(prompt), false)
    }

    fn encode_translated(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self
            .0
            .encoder
            .encode_fast(text, false)
            .map_err(|_| TokenizerError::Encode)?;
        let bos = self.0.bos.filter(|_| add_special);
        Ok(bos.iter().chain(encoding.get_ids()).copied().collect())
    }

    /// The names that text cannot use.
    #[must_use]
    pub fn control_names(&self) -> &ControlNames {
        &self.0.control
    }

    /// The text of `ids`, special tokens left out. Bytes that are not UTF-8 become U+FFFD; unknown
    /// ids have no text.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        ids.iter()
            .for_each(|&id| bytes.extend_from_slice(self.0.pieces.of(id)));
        let mut text = String::from_utf8_lossy(&bytes).into_owned();
        let spaces = text
            .bytes()
            .take(self.0.pieces.leading_spaces)
            .take_while(|&b| b == b' ')
            .count();
        text.drain(..spaces);
        text
    }

    /// The bytes that a token adds to a text; empty for special tokens and unknown ids.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.0.pieces.of(id)
    }

    /// The token's name in the vocabulary, such as `<|im_end|>`.
    #[must_use]
    pub fn token_name(&self, id: u32) -> Option<String> {
        let name = self.0.encoder.id_to_token(id)?;
        let known = self.0.control.name(&name).map(str::to_owned);
        Some(known.unwrap_or(name))
    }

    /// The id of the token with this name.
    #[must_use]
    pub fn token_id(&self, name: &str) -> Option<u32> {
        let internal = self.0.control.internal(name);
        self.0.encoder.token_to_id(internal.unwrap_or(name))
    }

    /// The bytes of all tokens, for constraints.
    pub(crate) fn trie(&self, vocab: u32) -> Arc<Trie> {
        let make = || Arc::new(Trie::new(vocab, |id| self.token_bytes(id)));
        Arc::clone(self.0.trie.get_or_init(make))
    }

    /// What finds the bytes of tokens without telling of which: in a table of pieces of one length, which it makes.
    pub(crate) fn finder(&self) -> io::Result<PieceFinder> {
        let pieces = &self.0.pieces;
        let vocab = pieces.ends.len() as u32;
        let longest = (0..vocab).map(|id| pieces.of(id).len()).max();
        let row = LENGTH + longest.unwrap_or(0);
        let mut table = Vec::with_capacity(row * vocab as usize);
        for id in 0..vocab {
            let piece = pieces.of(id);
            table.extend_from_slice(&(piece.len() as u32).to_le_bytes());
            table.extend_from_slice(piece);
            table.resize(row * (id as usize + 1), 0);
        }
        Ok(PieceFinder {
            row,
            table,
            found: Found::of_bytes(row)?,
        })
    }

    /// A decoder for one answer that continues a prompt.
    #[must_use]
    pub fn stream(&self) -> StreamDecoder {
        StreamDecoder {
            tokenizer: self.clone(),
            pending: Vec::with_capacity(64),
        }
    }
}

/// Bytes of a piece's length.
const LENGTH: usize = 4;

/// All tokens' bytes, of which it reads every one for each that it finds.
pub(crate) struct PieceFinder {
    /// Bytes of a row: a length, the piece, zeros.
    row: usize,
    table: Vec<u8>,
    found: Found,
}

impl PieceFinder {
    /// The bytes of a token; how many they are shows.
    pub(crate) fn find(&mut self, isa: Isa, id: u32) -> &[u8] {
        let row = self.found.row_of_bytes(isa, &self.table, self.row, id);
        let (length, piece) = row.split_at(LENGTH);
        let length = length
            .iter()
            .rev()
            .fold(0, |n, byte| n << 8 | usize::from(*byte));
        &piece[..length]
    }

    /// Bytes that are read for a token.
    pub(crate) fn bytes(&self) -> usize {
        self.table.len()
    }
}

/// Turns one answer's tokens into text as they come; each piece is whole characters.
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    /// At most three bytes between calls: the beginning of one character.
    pending: Vec<u8>,
}

impl StreamDecoder {
    /// Takes the next token and returns the text that is now certain, possibly none.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        self.push_onto(id, &mut text);
        text
    }

    /// As [`StreamDecoder::push`], appended to `text`.
    pub(crate) fn push_onto(&mut self, id: u32, text: &mut String) {
        self.pending
            .extend_from_slice(self.tokenizer.0.pieces.of(id));
        self.take_characters(text);
    }

    /// As [`StreamDecoder::push_onto`], given the token's bytes.
    pub(crate) fn push_bytes_onto(&mut self, bytes: &[u8], text: &mut String) {
        self.pending.extend_from_slice(bytes);
        self.take_characters(text);
    }

    fn take_characters(&mut self, text: &mut String) {
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return;
                }
                Err(e) => {
                    let valid = e.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..valid]));
                    let Some(wrong) = e.error_len() else {
                        self.pending.drain(..valid);
                        return;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..valid + wrong);
                }
            }
        }
    }

    /// The end of the text: a character that was begun and never finished becomes U+FFFD.
    pub fn finish(&mut self) -> &'static str {
        let begun = !self.pending.is_empty();
        self.pending.clear();
        if begun { "\u{fffd}" } else { "" }
    }
}

/// The names of the tokens that the file calls special and of those in `ids`.
fn control_names(file: &Value, ids: &[u32]) -> BTreeSet<String> {
    let added = file["added_tokens"].as_array().into_iter().flatten();
    let mut names: BTreeSet<String> = added
        .filter(|token| {
            let id = token["id"].as_u64();
            token["special"] == true || ids.iter().any(|&control| id == Some(control.into()))
        })
        .filter_map(|token| token["content"].as_str().map(str::to_owned))
        .filter(|name| !name.is_empty())
        .collect();
    if let Some(vocab) = file["model"]["vocab"].as_object() {
        let listed = |id: &Value| ids.iter().any(|&control| *id == control);
        names.extend(
            vocab
                .iter()
                .filter(|(_, id)| listed(id))
                .map(|(name, _)| name.clone()),
        );
    }
    names
}

/// Each token's bytes, end to end.
struct Pieces {
    bytes: Vec<u8>,
    /// Token `i` is `bytes[ends[i - 1]..ends[i]]`.
    ends: Vec<u32>,
    /// Spaces that a whole text loses at its beginning, since encoding put them there.
    leading_spaces: usize,
}

impl Pieces {
    fn new(
        encoder: &tokenizers::Tokenizer,
        decoder: &Decoder,
        control: &ControlNames,
        vocab: u32,
    ) -> Result<Self, TokenizerError> {
        if let Some(&id) = encoder
            .get_vocab(true)
            .values()
            .filter(|&&id| id >= vocab)
            .max()
        {
            return Err(TokenizerError::IdOutsideVocabulary { id, vocab });
        }
        let mut pieces = Self {
            bytes: Vec::new(),
            ends: Vec::new(),
            leading_spaces: decoder.leading_spaces(),
        };
        for id in 0..vocab {
            if let Some(name) = encoder.id_to_token(id)
                && control.name(&name).is_none()
            {
                decoder.append(&name, &mut pieces.bytes);
            }
            let end = u32::try_from(pieces.bytes.len()).map_err(|_| TokenizerError::TooLarge)?;
            pieces.ends.push(end);
        }
        Ok(pieces)
    }

    fn of(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A tokenizer without merges: the bytes below 4 stand for characters that need several tokens.
    fn bytes_tokenizer(decoder: &str) -> Tokenizer {
        let mut vocab = serde_json::Map::new();
        vocab.insert("<unk>".into(), 0.into());
        vocab.insert("</s>".into(), 1.into());
        for byte in 0..256u32 {
            vocab.insert(format!("<0x{byte:02X}>"), (byte + 2).into());
        }
        vocab.insert("▁".into(), 258.into());
        vocab.insert("▁a".into(), 259.into());
        let json = serde_json::json!({
            "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [{"id": 1, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null, "post_processor": null,
            "decoder": serde_json::from_str::<Value>(decoder).unwrap(),
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": []},
        });
        Tokenizer::from_json(json.to_string().as_bytes(), 300, Some(1)).unwrap()
    }

    const SPM: &str = r#"{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},
        {"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]}"#;

    #[test]
    fn encodes_bytes_with_bos_and_never_truncates() {
        let tokenizer = bytes_tokenizer(SPM);
        assert_eq!(
            tokenizer.encode("hé!", true).unwrap(),
            [1, 258, 106, 0xc3 + 2, 0xa9 + 2, 35]
        );
        assert_eq!(tokenizer.encode("h", false).unwrap(), [258, 106]);
        // The end token's name becomes the token where a template wrote it, and nowhere else.
        assert_eq!(
            tokenizer.encode("h</s>", false).unwrap(),
            [258, 106, 62, 49, 117, 64]
        );
        let prompt = Prompt::new("h</s>".into());
        assert_eq!(tokenizer.encode_prompt(&prompt).unwrap(), [258, 106, 1]);
        assert_eq!(tokenizer.token_id("</s>"), Some(1));
        assert_eq!(tokenizer.token_name(1).as_deref(), Some("</s>"));
    }

    #[test]
    fn decodes_whole_texts_and_streams() {
        let tokenizer = bytes_tokenizer(SPM);
        assert_eq!(
            tokenizer.decode(&[258, 106, 0xc3 + 2, 0xa9 + 2, 1, 259]),
            "hé a"
        );
        let mut stream = tokenizer.stream();
        // A continuation keeps its first space.
        assert_eq!(stream.push(259), " a");
        assert_eq!(stream.push(0xc3 + 2), "");
        assert_eq!(stream.push(0xa9 + 2), "é");
        assert_eq!(stream.push(1), "");
        assert_eq!(stream.push(9999), "");
        assert_eq!(stream.push(0xe2 + 2), "");
        assert_eq!(stream.push(106), "\u{fffd}h");
        assert_eq!(stream.push(0xf0 + 2), "");
        assert_eq!(stream.finish(), "\u{fffd}");
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn refuses_foreign_decoders_and_vocabularies() {
        let json = r#"{"version":"1.0","added_tokens":[],"decoder":{"type":"WordPiece","prefix":"@","cleanup":true},
            "model":{"type":"BPE","vocab":{"a":0,"b":7},"merges":[]}}"#;
        assert!(matches!(
            Tokenizer::from_json(json.as_bytes(), 8, None),
            Err(TokenizerError::File(TokenizerFileError::Unsupported {
                part: "decoder",
                ..
            }))
        ));
        let json = json.replace(
            r#"{"type":"WordPiece","prefix":"@","cleanup":true}"#,
            r#"{"type":"Fuse"}"#,
        );
        assert!(matches!(
            Tokenizer::from_json(json.as_bytes(), 7, None),
            Err(TokenizerError::IdOutsideVocabulary { id: 7, vocab: 7 })
        ));
        assert!(Tokenizer::from_json(json.as_bytes(), 8, None).is_ok());
        assert!(matches!(
            Tokenizer::from_json(json.as_bytes(), 8, Some(8)),
            Err(TokenizerError::IdOutsideVocabulary { id: 8, .. })
        ));
        assert!(matches!(
            Tokenizer::from_json(b"{", 8, None),
            Err(TokenizerError::File(TokenizerFileError::Malformed(_)))
        ));
    }

    proptest! {
        #[test]
        fn streaming_equals_decoding_the_whole(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let tokenizer = bytes_tokenizer(r#"{"type":"ByteFallback"}"#);
            let ids: Vec<u32> = bytes.iter().map(|&b| u32::from(b) + 2).collect();
            let mut stream = tokenizer.stream();
            let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
            text.push_str(stream.finish());
            prop_assert_eq!(&text, &String::from_utf8_lossy(&bytes));
            prop_assert_eq!(tokenizer.decode(&ids), text);
        }
    }

    #[test]
    fn pieces_are_found_without_an_index() {
        let tokenizer = bytes_tokenizer(r#"{"type":"ByteFallback"}"#);
        let mut finder = tokenizer.finder().unwrap();
        for isa in Isa::available() {
            for id in [0, 1, 2, 100, 257, 258, 259, 260, 299, 300, u32::MAX] {
                assert_eq!(finder.find(isa, id), tokenizer.token_bytes(id), "{id}");
            }
        }
        assert_eq!(finder.bytes() % 300, 0);
    }
}
