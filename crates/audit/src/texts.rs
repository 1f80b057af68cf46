//! Texts to ask about, and texts to compare on; no text is both.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use casemate_engine::Tokenizer;

use crate::exit::Usage;
use crate::random::Random;

/// Order of the passages; the same in every run.
const ORDER: u64 = 2026;

/// Token ids of passages, each beginning as the model wants texts to begin.
pub(crate) struct Texts {
    /// To compare on.
    pub(crate) held_out: Vec<Vec<u32>>,
    /// To ask about.
    open: Vec<Vec<u32>>,
    /// The token before every text, if there is one.
    begin: Option<u32>,
}

impl Texts {
    /// Reads passages; the held-out ones have exactly `length` tokens, the others at least `prompt`.
    pub(crate) fn read(
        path: &Path,
        tokenizer: &Tokenizer,
        held_out: usize,
        length: usize,
        prompt: usize,
    ) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let begin = tokenizer.encode("", true)?.first().copied();
        let mut passages = passages(&text)
            .map(|passage| Ok(tokenizer.encode(passage, true)?))
            .collect::<Result<Vec<_>>>()?;
        passages.sort_unstable();
        passages.dedup();
        Random::new(ORDER).shuffle(&mut passages);
        let mut texts = Self {
            held_out: Vec::new(),
            open: Vec::new(),
            begin,
        };
        for mut passage in passages {
            if texts.held_out.len() < held_out && passage.len() >= length {
                passage.truncate(length);
                texts.held_out.push(passage);
            } else if passage.len() > prompt {
                texts.open.push(passage);
            }
        }
        if texts.held_out.len() < held_out || texts.open.is_empty() {
            let message = format!(
                "{} has too few passages: {held_out} of at least {length} tokens are needed, and others of more than {prompt}",
                path.display()
            );
            return Err(Usage(message).into());
        }
        Ok(texts)
    }

    /// Questions: beginnings of passages, then later pieces of them.
    pub(crate) fn questions(&self, count: usize, tokens: usize) -> Result<Vec<Vec<u32>>, Usage> {
        let mut questions = Vec::with_capacity(count);
        for round in 0.. {
            let before = questions.len();
            for passage in &self.open {
                let words = match self.begin {
                    Some(_) => &passage[1..],
                    None => passage,
                };
                let Some(piece) = words.chunks_exact(tokens).nth(round) else {
                    continue;
                };
                if questions.len() == count {
                    return Ok(questions);
                }
                let begin = self.begin.into_iter();
                questions.push(begin.chain(piece.iter().copied()).collect());
            }
            if questions.len() == before {
                break;
            }
        }
        match questions.len() == count {
            true => Ok(questions),
            false => Err(Usage(format!(
                "the texts give {} questions and {count} are to be asked; give more with --prompts, or ask fewer",
                questions.len()
            ))),
        }
    }

    /// Tokens as they occur, for what looks at single ones.
    pub(crate) fn tokens(&self, count: usize) -> Vec<u32> {
        self.open.iter().flatten().copied().take(count).collect()
    }
}

/// What lies between empty lines, or between the marks that collections of texts have for it.
fn passages(text: &str) -> impl Iterator<Item = &str> {
    text.split("\n\n")
        .flat_map(|part| part.split("<|endoftext|>"))
        .map(str::trim)
        .filter(|passage| !passage.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passages_lie_between_empty_lines_and_marks() {
        let text = "one\ntwo\n\nthree<|endoftext|>\nfour\n\n\n\n";
        let found: Vec<_> = passages(text).collect();
        assert_eq!(found, ["one\ntwo", "three", "four"]);
    }

    #[test]
    fn questions_are_different_pieces() {
        let texts = Texts {
            held_out: Vec::new(),
            open: vec![vec![1, 10, 11, 12, 13], vec![1, 20, 21]],
            begin: Some(1),
        };
        let questions = texts.questions(3, 2).unwrap();
        assert_eq!(questions, [[1, 10, 11], [1, 20, 21], [1, 12, 13]]);
        let refused = texts.questions(4, 2).unwrap_err().to_string();
        assert!(refused.contains("3 questions and 4"), "{refused}");
    }
}
