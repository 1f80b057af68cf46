//! A tokenizer keeps nothing of what it has encoded. A program of its own, so that nobody else uses its memory.

use casemate_engine::Tokenizer;
use casemate_testkit::models::Tiny;

/// Resident memory of this program, in bytes.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = pages.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// A long word that is like no other.
fn word(mut number: u32) -> String {
    let mut word = "x".repeat(240);
    for _ in 0..6 {
        word.push(char::from(b'a' + (number % 26) as u8));
        number /= 26;
    }
    word
}

#[test]
fn words_of_one_user_are_not_kept_for_the_next() {
    let model = Tiny::default().build();
    let (_, json) = &model.assets[0];
    let tokenizer = Tokenizer::from_json(json, model.config.vocab, model.config.bos).unwrap();
    let encode = |numbers: std::ops::Range<u32>| {
        for number in numbers {
            let ids = tokenizer.encode(&word(number), false).unwrap();
            assert!(ids.len() > 100, "{}", ids.len());
        }
    };
    encode(0..200);
    let before = resident();
    encode(200..6200);
    let grown = resident().saturating_sub(before);
    // Kept, they would be some 8 KiB each.
    assert!(grown < 8 << 20, "{grown} bytes are kept of 6000 words");
}
