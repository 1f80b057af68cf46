//! Published tokenizers: decoding by the table of bytes gives back every text of the test vectors,
//! whole and streamed, just as the library's own decoder does. (That the ids are the right ones is
//! `casemate-import`'s test.)

use std::fs;

use casemate_engine::Tokenizer;
use casemate_testkit::data;

fn texts() -> Option<Vec<String>> {
    let mut texts = Vec::new();
    for file in [
        "ggml-vocab-llama-spm.gguf.inp",
        "ggml-vocab-llama-bpe.gguf.inp",
    ] {
        let all = fs::read_to_string(data::file(format!("tokenizers/{file}"))?).unwrap();
        texts.extend(all.split("\n__ggml_vocab_test__\n").map(str::to_owned));
    }
    assert!(texts.len() > 80);
    Some(texts)
}

fn gives_back_every_text(file: &str, vocab: u32) {
    let (Some(texts), Some(file)) = (texts(), data::file(file)) else {
        return;
    };
    let json = fs::read(&file).unwrap();
    let tokenizer = Tokenizer::from_json(&json, vocab, None).unwrap();
    let library = tokenizers::Tokenizer::from_bytes(&json).unwrap();
    for text in texts {
        let ids = tokenizer.encode(&text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids), text);
        assert_eq!(library.decode(&ids, true).unwrap(), text);
        let mut stream = tokenizer.stream();
        let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
        streamed.push_str(stream.finish());
        // Only a whole text loses the space that encoding put in front.
        assert!(streamed == text || streamed == format!(" {text}"));
    }
}

#[test]
fn llama2() {
    gives_back_every_text("tokenizers/llama2-tokenizer.json", 32000);
}

#[test]
fn smollm2() {
    gives_back_every_text("models/smollm2-135m-instruct/tokenizer.json", 49152);
}

#[test]
fn special_tokens_are_found_and_not_shown() {
    let Some(file) = data::file("models/smollm2-135m-instruct/tokenizer.json") else {
        return;
    };
    let tokenizer = Tokenizer::from_json(&fs::read(file).unwrap(), 49152, None).unwrap();
    let ids = tokenizer
        .encode("<|im_start|>user\nHi<|im_end|>\n", false)
        .unwrap();
    assert_eq!((ids[0], tokenizer.token_id("<|im_start|>")), (1, Some(1)));
    assert!(ids.contains(&2));
    assert_eq!(tokenizer.token_name(2).as_deref(), Some("<|im_end|>"));
    assert_eq!(tokenizer.decode(&ids), "user\nHi\n");
}
