//! What an enclave reads out of a model besides numbers: tokenizer and chat template.

use casemate_engine::{ChatMessage, ChatTemplate, ControlNames, Tokenizer};
use casemate_testkit::models::{CHAT_TEMPLATE, Tiny};
use time::OffsetDateTime;

const TEXT: &str = "Grüße, 1234  \n<|begin|>a\u{301}\u{200d}🦀";

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
