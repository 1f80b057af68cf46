//! The story models of llama2.c continue "Once upon a time" exactly as recorded, in f32.

mod support;

use std::path::Path;

use casemate_engine::{Compute, Engine, FinishReason};
use casemate_testkit::{data, gguf, llama2c};
use support::golden_tokens::{
    STORIES_15M_ANSWER, STORIES_15M_PROMPT, STORIES_260K_ANSWER, STORIES_260K_PROMPT,
};
use support::{generate, greedy, load, options};

/// The checkpoint as a GGUF file, imported: the way a provider's own model takes.
fn engine(checkpoint: &Path, vocabulary: &Path) -> Engine {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("stories.gguf");
    gguf::write(&llama2c::read(checkpoint, vocabulary), &file).unwrap();
    load(
        &*casemate_import::open(&file).unwrap(),
        &options(Compute::F32),
    )
}

#[test]
fn stories_260k_continues_as_recorded() {
    let Some(checkpoint) = data::file("models/stories260K/stories260K.bin") else {
        return;
    };
    let engine = engine(&checkpoint, &checkpoint.with_file_name("tok512.bin"));
    let prompt = engine.tokenizer().encode("Once upon a time", true).unwrap();
    assert_eq!(prompt, STORIES_260K_PROMPT);
    let answer = generate(&engine, greedy(&prompt, 200));
    assert_eq!(answer.ids, STORIES_260K_ANSWER);
    assert_eq!(answer.finished, Some((FinishReason::Length, 5, 200)));
    let story = ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball.";
    assert!(answer.text().starts_with(story), "{}", answer.text());
    assert_eq!(answer.text(), engine.tokenizer().decode(&answer.ids));
}

#[test]
fn stories_15m_continues_as_recorded() {
    let Some(checkpoint) = data::cached("stories15M.bin") else {
        return;
    };
    let Some(vocabulary) = data::file("tokenizers/llama2-tokenizer.bin") else {
        return;
    };
    let digest = support::sha256_hex(&std::fs::read(&checkpoint).unwrap());
    assert_eq!(
        digest,
        "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a"
    );
    let engine = engine(&checkpoint, &vocabulary);
    let prompt = engine.tokenizer().encode("Once upon a time", true).unwrap();
    assert_eq!(prompt, STORIES_15M_PROMPT);
    let answer = generate(&engine, greedy(&prompt, 200));
    assert_eq!(answer.ids, STORIES_15M_ANSWER);
    assert!(answer.text().starts_with(
        ", there was a little girl named Lily. She loved to play outside in the sunshine."
    ));
}
