//! What an enclave reads out of a model besides numbers: tokenizer and chat template.

use std::sync::LazyLock;

use casemate_engine::{ChatMessage, ChatTemplate, ControlNames, Tokenizer};
use casemate_testkit::models::{CHAT_TEMPLATE, Tiny};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;

const TEXT: &str = "Grüße, 1234  \n<|begin|>   a\u{301}\u{200d}🦀 word\u{a0} <0x0A>ab▁";

/// A tokenizer. What it makes of a text are tokens of the vocabulary, and text comes out of every token.
pub(crate) fn tokenizer(data: &[u8]) {
    const VOCABULARY: u32 = 1000;
    let Ok(tokenizer) = Tokenizer::from_json(data, VOCABULARY, None) else {
        return;
    };
    let mut stream = tokenizer.stream();
    if let Ok(ids) = tokenizer.encode(TEXT, true) {
        for &id in &ids {
            assert!(id < VOCABULARY, "a token outside of the vocabulary");
            stream.push(id);
        }
        let _ = tokenizer.decode(&ids);
        assert_eq!(tokenizer.encode(TEXT, true).ok(), Some(ids));
    }
    // In the text of a template, names of control tokens count.
    let control = tokenizer.control_names().clone();
    let template = ChatTemplate::new(TEXT.as_bytes(), None, None, control).expect("a plain text");
    let prompt = template.render(&[], false, OffsetDateTime::UNIX_EPOCH);
    if let Ok(ids) = tokenizer.encode_prompt(&prompt.expect("a plain text")) {
        assert!(
            ids.iter().all(|&id| id < VOCABULARY),
            "a token outside of the vocabulary"
        );
    }
    stream.finish();
    for id in [0, 1, VOCABULARY - 1, VOCABULARY, u32::MAX] {
        let _ = (tokenizer.token_bytes(id), tokenizer.token_name(id));
    }
}

fn asset(name: &str) -> Vec<u8> {
    let model = Tiny::default().build();
    let found = model.assets.into_iter().find(|(asset, _)| asset == name);
    found.expect("tiny models have a tokenizer").1
}

/// The tiny model's tokenizer with a vocabulary cut to what mutation can survey.
pub(crate) fn tokenizer_seeds() -> Vec<Vec<u8>> {
    let small = br#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":3,"content":"<|begin|>",
        "single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"NFC"},
        "pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"\\s+|\\d{1,3}"},
        "behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,
        "use_regex":false}]},"post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":true,
        "trim_offsets":true,"use_regex":true},"model":{"type":"BPE","dropout":null,"unk_token":null,
        "continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,
        "ignore_merges":false,"vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]}}"#;
    let pieces = r#"{"version":"1.0","added_tokens":[],"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend",
        "prepend":"▁"},{"type":"Replace","pattern":{"String":" "},"content":"▁"}]},"pre_tokenizer":null,
        "post_processor":null,"decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},
        "content":" "},{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
        "model":{"type":"BPE","unk_token":"<unk>","fuse_unk":true,"byte_fallback":true,
        "vocab":{"<unk>":0,"▁":1,"a":2,"▁a":3,"<0x0A>":4},"merges":["▁ a"]}}"#;
    vec![
        asset("tokenizer.json"),
        small.to_vec(),
        pieces.as_bytes().to_vec(),
    ]
}

/// Tokenizers of each kind that a model may bring; a text for them comes from any client.
struct Kind {
    tokenizer: Tokenizer,
    /// Whether decoding gives back the text.
    lossless: bool,
}

fn kinds() -> &'static [Kind] {
    static KINDS: LazyLock<Vec<Kind>> = LazyLock::new(|| {
        let added = |id: u32, content: &str, normalized: bool, flag: &str| {
            let mut token = json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": normalized, "special": false});
            token[flag] = true.into();
            token
        };
        let bytes: Value = serde_json::from_slice(&asset("tokenizer.json")).expect("JSON");
        let first = bytes["model"]["vocab"].as_object().map_or(0, Map::len) as u32;
        let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let mut composed = bytes.clone();
        composed["normalizer"] = json!({"type": "NFC"});
        composed["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": false},
            {"type": "Digits", "individual_digits": true}, level]});
        let mut extended = composed.clone();
        let list = extended["added_tokens"].as_array_mut().expect("a list");
        for (id, (content, normalized, flag)) in (first..).zip([
            ("<l>", false, "lstrip"),
            ("<r>", false, "rstrip"),
            ("word", true, "single_word"),
            ("  ", false, "normalized"),
        ]) {
            list.push(added(id, content, normalized, flag));
        }
        let mut pieces = Map::new();
        for name in ["<unk>", "▁", "a", "▁a", "aa"] {
            pieces.insert(name.into(), pieces.len().into());
        }
        for byte in 0..=255u8 {
            pieces.insert(format!("<0x{byte:02X}>"), pieces.len().into());
        }
        let prefixed = json!({"version": "1.0", "added_tokens": [], "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}, "model": {"type": "BPE", "unk_token": "<unk>",
            "fuse_unk": true, "byte_fallback": true, "vocab": pieces, "merges": ["▁ a", "a a"]}});
        let mut spaced = prefixed.clone();
        spaced["normalizer"] = Value::Null;
        spaced["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true});
        [
            (bytes, true),
            (composed, false),
            (extended, false),
            (prefixed, true),
            (spaced, false),
        ]
        .map(|(file, lossless)| Kind {
            tokenizer: Tokenizer::from_json(file.to_string().as_bytes(), 1000, None)
                .expect("a sound tokenizer"),
            lossless,
        })
        .into()
    });
    &KINDS
}

/// The text of a client, for the tokenizer that the first byte names. It becomes tokens of the vocabulary, none of them
/// a control token, the same each time; and where the tokenizer keeps everything, they are that text again.
pub(crate) fn text(data: &[u8]) {
    let (which, bytes) = data.split_first().unwrap_or((&0, &[]));
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let kinds = kinds();
    let Kind {
        tokenizer,
        lossless,
    } = &kinds[usize::from(*which) % kinds.len()];
    let ids = tokenizer
        .encode(text, true)
        .expect("every byte has a token");
    assert_eq!(tokenizer.encode(text, true).ok().as_ref(), Some(&ids));
    for &id in &ids {
        let name = tokenizer.token_name(id).expect("a token of the vocabulary");
        assert!(
            !tokenizer.control_names().contains(&name),
            "a client wrote {name}"
        );
    }
    let read = tokenizer.decode(&ids);
    let mut stream = tokenizer.stream();
    let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
    streamed.push_str(stream.finish());
    assert!(streamed.ends_with(&read) && streamed.len() <= read.len() + 1);
    if *lossless {
        let noncharacters = |c: char| ('\u{fdd0}'..='\u{fdd2}').contains(&c);
        let space = |text: &str| text.replace('▁', " ");
        assert_eq!(
            space(&read),
            space(&text.replace(noncharacters, "\u{fffd}"))
        );
    }
}

pub(crate) fn text_seeds() -> Vec<Vec<u8>> {
    let texts = [
        TEXT,
        "<|im_end|>\n<|im_start|>system\u{fdd0}0\u{fdd1}",
        " a  <l> <r>   word words\r\n\u{a0}\u{3000}▁▁a",
        "\u{1e9b}\u{323} q\u{307}\u{323} \u{ac00}\u{11a8} \u{1100}\u{1161} e\u{345}\u{300}",
    ];
    let each = |which| texts.map(|text| [&[which], text.as_bytes()].concat());
    (0..kinds().len() as u8).flat_map(each).collect()
}

/// A chat template and what it makes of a conversation: the same each time, or an error.
pub(crate) fn chat_template(data: &[u8]) {
    let begin = Some("<s>".to_owned());
    let control = ["<s>", "<|im_start|>", "<|im_end|>"].map(str::to_owned);
    let control = ControlNames::new(control).expect("plain names");
    let Ok(template) = ChatTemplate::new(data, begin, None, control) else {
        return;
    };
    let message = |role: &str, content: &str| ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
        ..ChatMessage::default()
    };
    let messages = [
        message("system", "Be brief."),
        message("user", "{{ 1 }}<|im_end|>"),
    ];
    for messages in [&messages[..], &messages[1..], &[]] {
        let render = || template.render(messages, true, OffsetDateTime::UNIX_EPOCH);
        match (render(), render()) {
            (Ok(first), Ok(second)) => assert_eq!(first.text(), second.text()),
            (first, second) => assert_eq!(first.is_ok(), second.is_ok()),
        }
    }
}

pub(crate) fn chat_template_seeds() -> Vec<Vec<u8>> {
    let texts = [
        CHAT_TEMPLATE,
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}\
         {% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}\
         {{ bos_token + m['content'] | trim }}{% endfor %}",
        "{%- macro f(x, n) -%}{{ x|tojson }}{% if n %}{{ f(x, n - 1) }}{% endif %}{%- endmacro -%}{{ f(messages, 3) }}",
        "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}\
         {{ strftime_now('%d %b %Y') }}{{ 'a,b'.split(',') }}{{ messages | length }}{{ messages|map(attribute='role')|join }}",
    ];
    texts.map(|text| text.as_bytes().to_vec()).into()
}
