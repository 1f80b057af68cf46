//! The JSON document of the `tokenizers` library.

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::{Value, json};

use super::{ByteLevel, Kind, Pieces, SpacePrefix, Token};

/// SentencePiece's visible space.
const SPACE: &str = "\u{2581}";

/// A `tokenizer.json`, in the library's order of fields.
#[derive(Serialize)]
pub(super) struct Document<'a> {
    version: &'static str,
    truncation: Option<()>,
    padding: Option<()>,
    added_tokens: Vec<AddedToken<'a>>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Model<'a>,
}

/// A token that is found whole in the text before anything else happens to it.
#[derive(Serialize)]
struct AddedToken<'a> {
    id: usize,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Serialize)]
struct Model<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    dropout: Option<()>,
    unk_token: Option<&'a str>,
    continuing_subword_prefix: Option<()>,
    end_of_word_suffix: Option<()>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Ids<'a>,
    merges: Merges<'a>,
}

/// The vocabulary as an object from text to id, in order of ids.
struct Ids<'a>(&'a [Token]);

impl Serialize for Ids<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (id, token) in self.0.iter().enumerate() {
            map.serialize_entry(&token.text, &id)?;
        }
        map.end()
    }
}

/// Merge rules, best first.
#[derive(Serialize)]
#[serde(untagged)]
enum Merges<'a> {
    Owned(Vec<(String, String)>),
    Borrowed(&'a [(String, String)]),
}

impl<'a> Document<'a> {
    /// A SentencePiece vocabulary with its derived merge rules.
    pub(super) fn from_pieces(pieces: &'a Pieces, merges: Vec<(String, String)>) -> Self {
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
        let restore = json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "});
        let (normalizer, pre_tokenizer) = match pieces.space_prefix {
            SpacePrefix::Never => (replace, Value::Null),
            SpacePrefix::EachStretch => (
                json!({
                    "type": "Sequence",
                    "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]
                }),
                Value::Null,
            ),
            SpacePrefix::TextOnly => (
                Value::Null,
                json!({
                    "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": false
                }),
            ),
        };
        let mut decoders = vec![
            restore,
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if pieces.space_prefix != SpacePrefix::Never {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let unknown = pieces
            .unknown
            .map(|id| pieces.tokens[id as usize].text.as_str());
        Self {
            version: "1.0",
            truncation: None,
            padding: None,
            added_tokens: added(&pieces.tokens),
            normalizer,
            pre_tokenizer,
            post_processor: leading(&pieces.tokens, pieces.bos),
            decoder: json!({"type": "Sequence", "decoders": decoders}),
            model: Model {
                kind: "BPE",
                dropout: None,
                unk_token: unknown,
                continuing_subword_prefix: None,
                end_of_word_suffix: None,
                fuse_unk: true,
                byte_fallback: pieces.tokens.iter().any(|token| token.kind == Kind::Byte),
                ignore_merges: false,
                vocab: Ids(&pieces.tokens),
                merges: Merges::Owned(merges),
            },
        }
    }

    /// A byte-level vocabulary.
    pub(super) fn from_byte_level(level: &'a ByteLevel) -> Self {
        Self {
            version: "1.0",
            truncation: None,
            padding: None,
            added_tokens: added(&level.tokens),
            normalizer: level.split.normalizer(),
            pre_tokenizer: level.split.pre_tokenizer(),
            post_processor: leading(&level.tokens, level.bos),
            decoder: json!({
                "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true
            }),
            model: Model {
                kind: "BPE",
                dropout: None,
                unk_token: None,
                continuing_subword_prefix: None,
                end_of_word_suffix: None,
                fuse_unk: false,
                byte_fallback: false,
                ignore_merges: level.split.ignores_merges(),
                vocab: Ids(&level.tokens),
                merges: Merges::Borrowed(&level.merges),
            },
        }
    }
}

fn added(tokens: &[Token]) -> Vec<AddedToken<'_>> {
    tokens
        .iter()
        .enumerate()
        .filter(|(_, token)| !token.text.is_empty())
        .filter_map(|(id, token)| {
            let special = match token.kind {
                Kind::Unknown | Kind::Control => true,
                Kind::UserDefined => false,
                Kind::Normal | Kind::Unused | Kind::Byte => return None,
            };
            Some(AddedToken {
                id,
                content: &token.text,
                single_word: false,
                lstrip: false,
                rstrip: false,
                normalized: false,
                special,
            })
        })
        .collect()
}

/// The post-processor that puts `bos` in front of every text.
fn leading(tokens: &[Token], bos: Option<u32>) -> Value {
    let Some(id) = bos else {
        return Value::Null;
    };
    let text = &tokens[id as usize].text;
    let special = |kind: u32| json!({"SpecialToken": {"id": text, "type_id": kind}});
    let sequence = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    json!({
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}},
    })
}
