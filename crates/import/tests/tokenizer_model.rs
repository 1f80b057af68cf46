//! Directories with a `tokenizer.model`, through the public door: SentencePiece and tiktoken, settings and faults.

mod support;

use casemate_import::{Fault, ImportError, Unsupported};
use serde_json::json;
use tokenizers::Tokenizer;

use support::directory::Model;
use support::gguf::Gguf;
use support::sentencepiece::{self, bytes, number, piece};
use support::{asset, open, refusal};

/// A directory whose only tokenizer is this `tokenizer.model`.
fn directory(model: impl Into<Vec<u8>>) -> Model {
    let mut directory = Model::tiny();
    directory.files.clear();
    directory.file("tokenizer.model", model);
    directory
}

fn ids(directory: &Model, text: &str) -> Vec<u32> {
    let (_guard, path) = directory.write();
    let model = open(&path);
    let tokenizer =
        Tokenizer::from_bytes(asset(model.as_ref(), "tokenizer.json").unwrap()).unwrap();
    tokenizer
        .encode_fast(text, true)
        .unwrap()
        .get_ids()
        .to_vec()
}

fn refused(directory: &Model) -> ImportError {
    let (_guard, path) = directory.write();
    refusal(&path)
}

fn fault(directory: &Model) -> Fault {
    match refused(directory) {
        ImportError::Malformed { fault, .. } => fault,
        other => panic!("not malformed but {other:?}"),
    }
}

fn unsupported(directory: &Model) -> Unsupported {
    match refused(directory) {
        ImportError::Unsupported { need, .. } => need,
        other => panic!("not unsupported but {other:?}"),
    }
}

fn spoilt(spoil: impl FnOnce(&mut sentencepiece::Model)) -> Model {
    let mut model = sentencepiece::Model::tiny();
    spoil(&mut model);
    directory(model.write())
}

#[test]
fn sentencepiece_and_gguf_make_the_same_tokenizer() {
    let (_gguf, path) = Gguf::tiny().write();
    let gguf = open(&path);
    let (_directory, path) = spoilt(|_| {}).write();
    let directory = open(&path);
    assert_eq!(
        asset(gguf.as_ref(), "tokenizer.json").unwrap(),
        asset(directory.as_ref(), "tokenizer.json").unwrap()
    );
    assert_eq!(gguf.config().bos, directory.config().bos);
    assert!(directory.config().add_bos);
}

#[test]
fn settings_decide_about_prefix_and_first_token() {
    // _a 259, ab 260, _ 261, a 262, b 263, <user> 264.
    let with = |settings: serde_json::Value| {
        let mut directory = spoilt(|_| {});
        directory.file("tokenizer_config.json", settings.to_string());
        ids(&directory, "ab<user>ab")
    };
    assert_eq!(with(json!({})), [1, 259, 263, 264, 259, 263]);
    assert_eq!(with(json!({"legacy": true})), [1, 259, 263, 264, 259, 263]);
    // Since transformers' correction only the text's beginning gets the space.
    assert_eq!(with(json!({"legacy": false})), [1, 259, 263, 264, 260]);
    assert_eq!(with(json!({"add_prefix_space": false})), [1, 260, 264, 260]);
    assert_eq!(
        with(json!({"add_bos_token": false})),
        [259, 263, 264, 259, 263]
    );
    let no_prefix = spoilt(|model| model.normalizer = [number(3, 0), number(4, 0)].concat());
    assert_eq!(ids(&no_prefix, "ab<user>ab"), [1, 260, 264, 260]);
}

#[test]
fn added_tokens_are_found_whole() {
    let grown = |files: &[(&str, serde_json::Value)]| {
        let mut directory = spoilt(|_| {});
        directory.config["vocab_size"] = json!(267);
        directory.tensors[0].2 = vec![267, 32];
        for (name, contents) in files {
            directory.file(name, contents.to_string());
        }
        directory
    };
    let decoder = json!({"added_tokens_decoder": {
        "1": {"content": "<s>", "special": true},
        "265": {"content": "<|x|>", "special": true},
        "266": {"content": "<y>", "special": false},
    }});
    let directory = grown(&[("tokenizer_config.json", decoder)]);
    assert_eq!(ids(&directory, "<|x|>ab<y>"), [1, 265, 259, 263, 266]);
    let directory = grown(&[("added_tokens.json", json!({"<|x|>": 265, "<y>": 266}))]);
    assert_eq!(ids(&directory, "<|x|>ab<y>"), [1, 265, 259, 263, 266]);

    let gap = grown(&[("added_tokens.json", json!({"<y>": 266}))]);
    assert_eq!(
        fault(&gap),
        Fault::TokenId {
            what: "an added token",
            id: 266,
            vocabulary: 267
        }
    );
    let other = json!({"added_tokens_decoder": {"260": {"content": "ba"}}});
    assert_eq!(
        fault(&grown(&[("tokenizer_config.json", other)])),
        Fault::Contradiction {
            first: "added token 260 is \"ba\"".into(),
            second: "tokenizer.model has \"ab\" there".into()
        }
    );
    let stripped = json!({"added_tokens_decoder": {"265": {"content": "<x>", "lstrip": true}}});
    assert_eq!(
        unsupported(&grown(&[("tokenizer_config.json", stripped)])),
        Unsupported::Setting {
            key: "lstrip of added token 265".into(),
            value: "true".into()
        }
    );
    let eos = grown(&[("tokenizer_config.json", json!({"add_eos_token": true}))]);
    assert_eq!(
        unsupported(&eos),
        Unsupported::Setting {
            key: "add_eos_token".into(),
            value: "true".into()
        }
    );
}

#[test]
fn user_defined_pieces_are_found_with_their_spaces() {
    let directory = spoilt(|model| {
        model.pieces[264] = piece("\u{2581}\u{2581}b".as_bytes(), -264.0, 4);
    });
    assert_eq!(ids(&directory, "a  b"), [1, 259, 264]);
}

#[test]
fn refuses_other_sentencepiece_models_by_name() {
    let kind = |model_type| unsupported(&spoilt(|model| model.trainer = number(3, model_type)));
    for (model_type, name) in [(1, "unigram"), (3, "word"), (4, "char")] {
        let name = format!("SentencePiece {name}");
        assert_eq!(kind(model_type), Unsupported::TokenizerModel { name });
    }
    // The format's default.
    let silent = unsupported(&spoilt(|model| model.trainer.clear()));
    assert_eq!(
        silent,
        Unsupported::TokenizerModel {
            name: "SentencePiece unigram".into()
        }
    );
}

#[test]
fn refuses_normalisation_that_would_be_lost() {
    for (field, key, value) in [
        (bytes(2, b"rules"), "precompiled_charsmap", "5 bytes"),
        (number(4, 1), "remove_extra_whitespaces", "true"),
        (number(5, 0), "escape_whitespaces", "false"),
    ] {
        let need = unsupported(&spoilt(|model| model.normalizer.extend(field)));
        assert_eq!(
            need,
            Unsupported::Setting {
                key: key.into(),
                value: value.into()
            }
        );
    }
}

#[test]
fn rejects_broken_protobuf() {
    let reason = |contents: Vec<u8>| match fault(&directory(contents)) {
        Fault::Protobuf { reason, .. } => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(reason(vec![]), "no pieces");
    assert_eq!(reason(vec![0x0a]), "the end of the file inside a number");
    assert_eq!(reason(vec![0x0a, 0x05, 0x00]), "a length past the end");
    assert_eq!(
        reason([&[0x0a][..], &[0xff; 9], &[0x01]].concat()),
        "a length past the end"
    );
    assert_eq!(
        reason([&[0x0a][..], &[0xff; 10]].concat()),
        "a number of more than 64 bits"
    );
    assert_eq!(
        reason([&[0x0a][..], &[0xff; 9], &[0x02]].concat()),
        "a number of more than 64 bits"
    );
    assert_eq!(reason(vec![0x0b]), "an unknown wire type");
    assert_eq!(reason(number(1, 7)), "a field of the wrong type");
    assert_eq!(
        reason(bytes(1, &number(1, 7))),
        "a piece's field of the wrong type"
    );
    assert_eq!(reason(bytes(1, &[])), "a piece without text");
    assert_eq!(reason(piece(b"", 0.0, 1)), "a piece without text");
    assert_eq!(reason(piece(b"a", 0.0, 9)), "an unknown piece type");
    assert_eq!(
        reason([piece(b"a", 0.0, 1), bytes(2, &bytes(3, b""))].concat()),
        "a trainer field of the wrong type"
    );
    assert_eq!(
        reason([piece(b"a", 0.0, 1), bytes(3, &bytes(3, b""))].concat()),
        "a normalizer field of the wrong type"
    );

    let not_text = fault(&directory(piece(&[0xff], 0.0, 1)));
    assert_eq!(
        not_text,
        Fault::NotUtf8 {
            what: "a piece",
            offset: 4
        }
    );
    let long = fault(&directory(piece(&[b'a'; 1025], 0.0, 1)));
    assert_eq!(
        long,
        Fault::TooLong {
            what: "a piece",
            length: 1025,
            limit: 1024
        }
    );
}

#[test]
fn every_truncation_of_a_sentencepiece_model_is_refused() {
    let whole = sentencepiece::Model::tiny().write();
    for cut in (0..200).chain((200..whole.len()).step_by(61)) {
        // Cuts between fields leave a valid message, without the flags that say what kind it is.
        match refused(&directory(&whole[..cut])) {
            ImportError::Malformed {
                fault: Fault::Protobuf { .. },
                ..
            } => {}
            ImportError::Unsupported {
                need: Unsupported::TokenizerModel { .. },
                ..
            } => {}
            other => panic!("cut at {cut}: {other:?}"),
        }
    }
}

/// A tiktoken vocabulary of all bytes and what follows.
fn tiktoken(more: &[(&str, u64)]) -> String {
    use base64::Engine;
    let encode = |token: &[u8]| base64::engine::general_purpose::STANDARD.encode(token);
    let mut lines: String = (0..=255u8)
        .map(|byte| format!("{} {byte}\n", encode(&[byte])))
        .collect();
    for (token, rank) in more {
        lines += &format!("{} {rank}\n", encode(token.as_bytes()));
    }
    lines
}

#[test]
fn refuses_tiktoken_vocabularies_without_published_specials() {
    assert_eq!(
        unsupported(&directory(tiktoken(&[("ab", 256)]))),
        Unsupported::TokenizerModel {
            name: "tiktoken with 257 tokens".into()
        }
    );
}

#[test]
fn rejects_broken_tiktoken_lines() {
    let fault = |contents: String| fault(&directory(contents));
    let rejected = |line, reason| Fault::Tiktoken { line, reason };
    assert_eq!(
        fault(tiktoken(&[("ab", 257)])),
        rejected(257, "a rank out of order")
    );
    assert_eq!(fault(tiktoken(&[]) + "YWI=\n"), rejected(257, "no space"));
    assert_eq!(
        fault(tiktoken(&[]) + "??? 256\n"),
        rejected(257, "no base64")
    );
    assert_eq!(
        fault(tiktoken(&[]) + " 256\n"),
        rejected(257, "an empty token")
    );
    assert_eq!(
        fault(tiktoken(&[]) + "YWI= +256\n"),
        rejected(257, "no rank")
    );
    assert_eq!(fault(tiktoken(&[]) + "YWI= \n"), rejected(257, "no rank"));
    assert_eq!(fault(tiktoken(&[]) + "\n"), rejected(257, "no space"));
    let long = format!("{} 256\n", "YWJj".repeat(300));
    assert_eq!(
        fault(tiktoken(&[]) + &long),
        rejected(257, "too long a token")
    );
    let few: String = tiktoken(&[])
        .lines()
        .take(200)
        .map(|line| format!("{line}\n"))
        .collect();
    assert_eq!(fault(few), rejected(200, "not every byte a token"));
}
