use serde_json::{Value, json};

use super::*;

/// A byte-level tokenizer that puts `<s>` in front.
fn sound() -> Value {
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [added(3, "<s>"), added(4, "  ")],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\s+(?!\S)|\p{N}{1,3}"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    })
}

fn added(id: u32, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true})
}

fn parse(file: &Value) -> Result<TokenizerFile, TokenizerFileError> {
    TokenizerFile::parse(file.to_string().as_bytes())
}

/// What is said of the sound file with `value` in the place of `pointer`.
fn refusal(pointer: &str, value: Value) -> String {
    let mut file = sound();
    *file.pointer_mut(pointer).expect(pointer) = value;
    let error = match parse(&file).map(TokenizerFile::load) {
        Err(error) | Ok(Err(error)) => error,
        Ok(Ok(_)) => panic!("{pointer} was accepted"),
    };
    error.to_string()
}

fn accepts(pointer: &str, value: Value) {
    let mut file = sound();
    *file.pointer_mut(pointer).expect(pointer) = value;
    let loaded = parse(&file).and_then(TokenizerFile::load).expect(pointer);
    loaded.encode_fast("ab  12", true).expect(pointer);
}

#[test]
fn loads_without_what_the_library_is_not_needed_for() {
    let file = parse(&sound()).unwrap();
    assert_eq!(file.leading_token(), Some(3));
    let loaded = file.load().unwrap();
    let ids = |text: &str| loaded.encode_fast(text, true).unwrap().get_ids().to_vec();
    // Neither the leading token nor the limit of two.
    assert_eq!(ids("ab  ab<s>"), [2, 4, 2, 3]);
    assert!(loaded.get_decoder().is_none());
}

#[test]
fn a_template_names_only_tokens_that_are_there() {
    let name = "/post_processor/single/0/SpecialToken/id";
    let said = refusal(name, "'llegin|>".into());
    assert!(
        said.contains("'llegin|>") && said.contains("special_tokens"),
        "{said}"
    );
}

#[test]
fn a_post_processor_puts_at_most_one_token_in_front() {
    let leading = |value: Value| {
        let mut file = sound();
        file["post_processor"] = value;
        parse(&file).map(|file| file.leading_token())
    };
    let template = sound()["post_processor"].clone();
    let level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false});
    let both = json!({"type": "Sequence", "processors": [level, template]});
    assert_eq!(leading(both), Ok(Some(3)));
    assert_eq!(leading(level), Ok(None));
    assert_eq!(leading(Value::Null), Ok(None));
    let twice = json!({"type": "Sequence", "processors": [template, template]});
    let mut behind = template.clone();
    behind["single"].as_array_mut().unwrap().reverse();
    let mut two = template.clone();
    two["special_tokens"]["<s>"]["ids"] = json!([3, 3]);
    let mut pair = template.clone();
    pair["single"][1]["Sequence"]["id"] = "B".into();
    let roberta = json!({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]});
    for other in [twice, behind, two, pair, roberta] {
        let error = leading(other.clone()).expect_err(&other.to_string());
        assert!(
            matches!(error, TokenizerFileError::Unsupported { part, .. } if part.starts_with("post_processor"))
        );
    }
}

/// Steps that are somebody else's, and values by which the library would panic or a text would grow without bounds.
#[test]
fn refuses_by_name_what_no_llama_tokenizer_has() {
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let level = sound()["pre_tokenizer"]["pretokenizers"][1].clone();
    for (pointer, value, named) in [
        (
            "/normalizer",
            json!({"type": "Precompiled", "precompiled_charsmap": "!"}),
            "Precompiled",
        ),
        (
            "/normalizer",
            json!({"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}),
            "Sequence",
        ),
        ("/normalizer", replace("", "x"), "normalizer.pattern"),
        ("/normalizer", replace("a", "aa"), "normalizer.pattern"),
        (
            "/normalizer",
            json!({"type": "Prepend", "prepend": "x".repeat(17)}),
            "normalizer.prepend",
        ),
        (
            "/normalizer",
            json!({"type": "Sequence", "normalizers": vec![json!({"type": "NFC"}); 17]}),
            "17 steps",
        ),
        ("/normalizer", json!({"type": "Sequence"}), "normalizers"),
        (
            "/pre_tokenizer",
            json!({"type": "UnicodeScripts"}),
            "UnicodeScripts",
        ),
        (
            "/pre_tokenizer",
            json!({"type": "Sequence", "pretokenizers": [level, level]}),
            "ByteLevel",
        ),
        (
            "/pre_tokenizer/pretokenizers/0/pattern",
            json!({"Regex": r"(?=ab\K)"}),
            r"\\K",
        ),
        (
            "/pre_tokenizer/pretokenizers/0/pattern",
            json!({"Regex": r"(a*)*\1"}),
            r"\\1",
        ),
        (
            "/pre_tokenizer/pretokenizers/0/pattern",
            json!({"Regex": "(?<=a)b"}),
            "(?<=",
        ),
        (
            "/pre_tokenizer/pretokenizers/0/pattern",
            json!({"Regex": "a".repeat(20_000)}),
            "aaa",
        ),
        (
            "/pre_tokenizer/pretokenizers/0/pattern",
            json!({"Regex": "("}),
            "malformed",
        ),
        ("/decoder", replace("", "x"), "decoder.pattern"),
        (
            "/decoder",
            json!({"type": "Metaspace", "replacement": ""}),
            "decoder.replacement",
        ),
        (
            "/decoder",
            json!({"type": "WordPiece", "prefix": "@", "cleanup": true}),
            "WordPiece",
        ),
        (
            "/decoder",
            json!({"type": "Strip", "content": "x", "start": 1, "stop": 0}),
            "Strip",
        ),
        ("/decoder", Value::Null, "decoder"),
        ("/model/type", json!("Unigram"), "Unigram"),
        ("/model/dropout", json!(0.1), "model.dropout"),
        ("/model/continuing_subword_prefix", json!("##"), "##"),
        ("/model/end_of_word_suffix", json!("</w>"), "</w>"),
        ("/model/unk_token", json!("<unk>"), "<unk>"),
        ("/model/vocab", json!([["a", 0.0]]), "model.vocab"),
        ("/model/vocab/b", json!(0), "the same id 0"),
        ("/model/vocab/b", json!(-1), "no number"),
        ("/model/merges", json!(["a c"]), "malformed"),
        ("/added_tokens/0/id", json!(1), "the same id 1"),
        ("/added_tokens/0/id", json!(9), "cannot have the id 9"),
        ("/added_tokens/1/lstrip", json!(true), "added_tokens"),
        ("/added_tokens/1/rstrip", json!(true), "added_tokens"),
    ] {
        let said = refusal(pointer, value);
        assert!(said.contains(named), "{pointer}: {said}");
    }
    let mut file = sound();
    file["added_tokens"][0]["normalized"] = true.into();
    file["added_tokens"][0]["rstrip"] = true.into();
    assert!(parse(&file).is_err());
    assert!(TokenizerFile::parse(b"[]").is_err() && TokenizerFile::parse(b"{").is_err());
}

#[test]
fn accepts_what_published_tokenizers_have() {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let prepend = json!({"type": "Prepend", "prepend": "▁"});
    accepts(
        "/normalizer",
        json!({"type": "Sequence", "normalizers": [prepend, replace]}),
    );
    accepts(
        "/normalizer",
        json!({"type": "Sequence", "normalizers": []}),
    );
    accepts(
        "/pre_tokenizer",
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false}),
    );
    accepts(
        "/pre_tokenizer",
        json!({"type": "Digits", "individual_digits": true}),
    );
    accepts("/added_tokens/0/rstrip", json!(true));
    for regex in [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"##,
        "[一-龥぀-ゟ゠-ヿ]+",
    ] {
        accepts(
            "/pre_tokenizer/pretokenizers/0/pattern",
            json!({ "Regex": regex }),
        );
    }
}

#[test]
fn a_renamed_token_has_no_other_spelling() {
    let mut file = sound();
    file["model"]["unk_token"] = "ab".into();
    file["added_tokens"][0]["normalized"] = true.into();
    let mut file = parse(&file).unwrap();
    file.rename(|name| match name {
        "<s>" => Some("\u{fdd0}0\u{fdd1}"),
        "ab" => Some("\u{fdd0}1\u{fdd1}"),
        _ => None,
    });
    assert_eq!(file.json()["model"]["merges"], json!([]));
    assert_eq!(file.json()["model"]["unk_token"], "\u{fdd0}1\u{fdd1}");
    let loaded = file.load().unwrap();
    let ids = |text: &str| loaded.encode_fast(text, true).unwrap().get_ids().to_vec();
    assert_eq!(ids("ab\u{fdd0}0\u{fdd1}a"), [0, 1, 3, 0]);
    assert_eq!(loaded.token_to_id("\u{fdd0}1\u{fdd1}"), Some(2));
    assert_eq!(loaded.token_to_id("<s>"), None);
}
