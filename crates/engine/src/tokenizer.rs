//! Text to token ids and back. Encoding is the `tokenizers` library's; decoding uses a table of
//! each token's bytes made once at load, so that a stream of tokens costs no search and never cuts
//! a character. Ordinary text never becomes a control token; how a chat template's text does is
//! [`crate::control`]'s. It holds no chat format: see [`crate::chat`].

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use serde_json::Value;

use crate::constrain::Trie;
use crate::control::{ControlNames, Prompt, plain};

/// The model's tokenizer. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    /// Knows control tokens by their internal names only.
    encoder: tokenizers::Tokenizer,
    control: ControlNames,
    /// Prepended by `encode` with `add_special`, unless the tokenizer's own rules did so.
    bos: Option<u32>,
    pieces: Pieces,
    /// Made for the first answer that is constrained.
    trie: OnceLock<Arc<Trie>>,
}

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is not a `tokenizer.json` that the library understands.
    #[error("tokenizer.json is malformed: {0}")]
    Malformed(String),
    /// Its decoder has a step whose effect on single tokens is not known here.
    #[error("tokenizer.json decodes by the unsupported step {0:?}")]
    UnsupportedDecoder(String),
    /// It has a token id that the model has no embedding for.
    #[error("the tokenizer has token id {id}, but the model's vocabulary has {vocab} entries")]
    IdOutsideVocabulary {
        /// The largest such id.
        id: u32,
        /// The model's vocabulary.
        vocab: u32,
    },
    /// A control token could not be told from ordinary text.
    #[error(
        "tokenizer.json has a control token whose name is a single character, or too many of them"
    )]
    ControlName,
    /// The text could not be encoded.
    #[error("the text cannot be encoded")]
    Encode,
}

impl Tokenizer {
    /// Parses a `tokenizer.json` for a model with `vocab` embedding rows. `bos` is put before each
    /// text that asks for special tokens; `None` leaves that to the file's own rules.
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
        let malformed = |e: &dyn std::fmt::Display| TokenizerError::Malformed(e.to_string());
        let mut parsed: Value = serde_json::from_slice(json).map_err(|e| malformed(&e))?;
        let decoder = DecoderRules::from_json(&parsed["decoder"])?;
        let control = ControlNames::new(control_names(&parsed, control))
            .ok_or(TokenizerError::ControlName)?;
        hide_control_tokens(&mut parsed, &control);
        let json = serde_json::to_vec(&parsed).map_err(|e| malformed(&e))?;
        drop(parsed);
        let mut encoder = tokenizers::Tokenizer::from_bytes(&json).map_err(|e| malformed(&e))?;
        // Some published files carry the limits of a training run; a prompt must never be cut or
        // padded silently.
        encoder.with_truncation(None).map_err(|e| malformed(&e))?;
        encoder.with_padding(None);
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
            .encode_fast(text, add_special)
            .map_err(|_| TokenizerError::Encode)?;
        let ids = encoding.get_ids();
        match self.0.bos {
            Some(bos) if add_special && ids.first() != Some(&bos) => {
                let mut with_bos = Vec::with_capacity(ids.len() + 1);
                with_bos.push(bos);
                with_bos.extend_from_slice(ids);
                Ok(with_bos)
            }
            _ => Ok(ids.to_vec()),
        }
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

    /// A decoder for one answer that continues a prompt.
    #[must_use]
    pub fn stream(&self) -> StreamDecoder {
        StreamDecoder {
            tokenizer: self.clone(),
            pending: Vec::with_capacity(64),
        }
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
        self.pending
            .extend_from_slice(self.tokenizer.0.pieces.of(id));
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(e) => {
                    let valid = e.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..valid]));
                    let Some(wrong) = e.error_len() else {
                        self.pending.drain(..valid);
                        return text;
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

/// Gives every control token its internal name, so that nothing else stands for it: ids stay, and
/// merges that would spell one are left out.
fn hide_control_tokens(file: &mut Value, control: &ControlNames) {
    for token in file["added_tokens"].as_array_mut().into_iter().flatten() {
        if let Some(internal) = token["content"]
            .as_str()
            .and_then(|name| control.internal(name))
        {
            token["content"] = internal.into();
            // The internal name is put in after clients had their say: it is never normalized text.
            token["normalized"] = false.into();
        }
    }
    let model = &mut file["model"];
    if let Some(internal) = model["unk_token"]
        .as_str()
        .and_then(|name| control.internal(name))
    {
        model["unk_token"] = internal.into();
    }
    match &mut model["vocab"] {
        Value::Object(vocab) => {
            *vocab = std::mem::take(vocab)
                .into_iter()
                .map(|(name, id)| match control.internal(&name) {
                    Some(internal) => (internal.to_owned(), id),
                    None => (name, id),
                })
                .collect();
        }
        Value::Array(pieces) => {
            for piece in pieces {
                if let Some(internal) = piece[0].as_str().and_then(|name| control.internal(name)) {
                    piece[0] = internal.into();
                }
            }
        }
        _ => {}
    }
    if let Some(merges) = model["merges"].as_array_mut() {
        merges.retain(|merge| {
            let parts = match merge {
                Value::String(pair) => pair.split_once(' '),
                pair => pair[0].as_str().zip(pair[1].as_str()),
            };
            parts.is_none_or(|(left, right)| {
                [left, right, &format!("{left}{right}")]
                    .iter()
                    .all(|name| control.internal(name).is_none())
            })
        });
    }
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
        rules: &DecoderRules,
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
            leading_spaces: rules.leading_spaces,
        };
        for id in 0..vocab {
            if let Some(name) = encoder.id_to_token(id)
                && control.name(&name).is_none()
            {
                rules.append(&name, &mut pieces.bytes);
            }
            let end = u32::try_from(pieces.bytes.len())
                .map_err(|_| TokenizerError::Malformed("vocabulary of more than 4 GiB".into()))?;
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

/// What a tokenizer's decoder does to one token, as far as Llama-family tokenizers need it.
#[derive(Default)]
struct DecoderRules {
    byte_level: bool,
    byte_fallback: bool,
    replacements: Vec<(String, String)>,
    leading_spaces: usize,
}

impl DecoderRules {
    fn from_json(decoder: &Value) -> Result<Self, TokenizerError> {
        let mut rules = Self::default();
        match decoder["type"].as_str() {
            Some("Sequence") => {
                let steps = decoder["decoders"]
                    .as_array()
                    .map_or(&[][..], Vec::as_slice);
                for step in steps {
                    rules.add(step)?;
                }
            }
            _ => rules.add(decoder)?,
        }
        Ok(rules)
    }

    fn add(&mut self, step: &Value) -> Result<(), TokenizerError> {
        let unsupported = || {
            TokenizerError::UnsupportedDecoder(step["type"].as_str().unwrap_or("none").to_owned())
        };
        match step["type"].as_str() {
            Some("ByteLevel") => self.byte_level = true,
            Some("ByteFallback") => self.byte_fallback = true,
            Some("Fuse") => {}
            Some("Replace") => {
                let (Some(from), Some(to)) =
                    (step["pattern"]["String"].as_str(), step["content"].as_str())
                else {
                    return Err(unsupported());
                };
                self.replacements.push((from.to_owned(), to.to_owned()));
            }
            Some("Strip") => {
                if step["content"] != " " || step["stop"] != 0 {
                    return Err(unsupported());
                }
                let spaces = step["start"]
                    .as_u64()
                    .filter(|&n| n <= 8)
                    .ok_or_else(unsupported)?;
                self.leading_spaces = spaces as usize;
            }
            Some("Metaspace") => {
                let from = step["replacement"].as_str().ok_or_else(unsupported)?;
                self.replacements.push((from.to_owned(), " ".to_owned()));
                let never = step["prepend_scheme"] == "never" || step["add_prefix_space"] == false;
                self.leading_spaces = usize::from(!never);
            }
            _ => return Err(unsupported()),
        }
        Ok(())
    }

    fn append(&self, name: &str, out: &mut Vec<u8>) {
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

    #[test]
    fn refuses_foreign_decoders_and_vocabularies() {
        let json = r#"{"version":"1.0","added_tokens":[],"decoder":{"type":"WordPiece","prefix":"@","cleanup":true},
            "model":{"type":"BPE","vocab":{"a":0,"b":7},"merges":[]}}"#;
        assert!(matches!(
            Tokenizer::from_json(json.as_bytes(), 8, None),
            Err(TokenizerError::UnsupportedDecoder(step)) if step == "WordPiece"
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
            Err(TokenizerError::Malformed(_))
        ));
        assert!(matches!(
            Tokenizer::from_json(b"[1]", 8, None),
            Err(TokenizerError::UnsupportedDecoder(_))
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
}
