use std::collections::{BinaryHeap, HashMap};
use std::fs;

use tokenizers::Tokenizer;

use super::*;
use crate::test_data::{Dice, cached, shared};

fn load(json: &[u8]) -> Tokenizer {
    Tokenizer::from_bytes(json).expect("the library loads the document")
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer
        .encode_fast(text, false)
        .unwrap()
        .get_ids()
        .to_vec()
}

/// The texts and expected ids of a pair of `.inp` and `.out` files.
fn vectors(name: &str) -> Option<Vec<(String, Vec<u32>)>> {
    let input = shared(&format!("tokenizers/{name}.inp"))?;
    let output = shared(&format!("tokenizers/{name}.out"))?;
    let input = fs::read_to_string(input).unwrap();
    let output = fs::read_to_string(output).unwrap();
    let mut texts: Vec<&str> = input.split("\n__ggml_vocab_test__\n").collect();
    assert_eq!(texts.pop(), Some(""), "a separator ends the last text");
    let expected: Vec<Vec<u32>> = output
        .lines()
        .map(|line| {
            line.split_whitespace()
                .map(|id| id.parse().unwrap())
                .collect()
        })
        .collect();
    assert_eq!(texts.len(), expected.len());
    Some(texts.into_iter().map(str::to_owned).zip(expected).collect())
}

fn llama2_pieces() -> Option<Pieces> {
    let model = fs::read(shared("tokenizers/llama2-tokenizer.model")?).unwrap();
    let model = sentencepiece::parse(&model).unwrap();
    assert!(model.add_dummy_prefix);
    Some(Pieces {
        tokens: model.tokens,
        scores: model.scores,
        unknown: model.unknown,
        bos: model.bos,
        space_prefix: SpacePrefix::EachStretch,
    })
}

fn llama3() -> Option<ByteLevel> {
    let model = fs::read(shared("tokenizers/llama3-tokenizer.model")?).unwrap();
    assert!(tiktoken::looks_like(&model));
    Some(tiktoken::parse_llama3(&model).unwrap())
}

/// Real text of several kinds, line by line and in larger stretches.
fn real_texts() -> Option<Vec<String>> {
    let mut texts = Vec::new();
    for name in [
        "data/wikitext-2/valid.txt",
        "data/tinystories/cs336_tinystories_sample.txt",
        "data/medical-claims-cms/EOB-Carrier-Sample.json",
        "data/medical-claims-cms/rif-synthea-snf.csv",
        "evidence/README.txt",
        "design/engine.md",
    ] {
        let text = fs::read_to_string(shared(name)?).unwrap();
        texts.extend(text.split_inclusive('\n').map(str::to_owned));
        texts.extend(
            text.chars()
                .collect::<Vec<_>>()
                .chunks(3000)
                .take(20)
                .map(String::from_iter),
        );
    }
    // Code: this crate's own.
    texts.extend(include_str!("tests.rs").lines().map(str::to_owned));
    texts.push(include_str!("merges.rs").to_owned());
    Some(texts)
}

/// Text that nobody writes: pieces glued at random, runs, blanks of all kinds, scripts mixed, lone marks.
fn hostile_texts(pieces: &[String], count: usize) -> Vec<String> {
    const ODD: [&str; 24] = [
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\u{a0}",
        "\u{3000}",
        "\u{200b}",
        "\u{feff}",
        "\u{301}",
        "'s",
        "'LL",
        "123",
        "٣٤",
        "ⅷ",
        "½",
        "🦙",
        "👩‍👩‍👧",
        "नमस्ते",
        "漢字",
        "\u{0}",
        "\u{10ffff}",
        "aaaaa",
        "ĠĊ",
    ];
    let mut dice = Dice(count as u64);
    (0..count)
        .map(|_| {
            let mut text = String::new();
            for _ in 0..1 + dice.below(12) {
                match dice.below(4) {
                    0 => text.push_str(dice.pick::<&str>(&ODD)),
                    1 => {
                        let piece = dice.pick(pieces).clone();
                        let times = 1 + dice.below(9);
                        text.push_str(&piece.repeat(times));
                    }
                    2 => {
                        let point = dice.next() as u32 % 0x11_0000;
                        text.extend(char::from_u32(point));
                    }
                    _ => text.push_str(dice.pick::<String>(pieces)),
                }
            }
            text
        })
        .collect()
}

/// Runs `check` over `texts` and reports the first few disagreements together.
fn compare<'a>(
    texts: impl IntoIterator<Item = &'a String>,
    mut ours: impl FnMut(&str) -> Vec<u32>,
    mut theirs: impl FnMut(&str) -> Vec<u32>,
) {
    let mut compared = 0;
    let mut wrong = Vec::new();
    for text in texts {
        compared += 1;
        let (ours, theirs) = (ours(text), theirs(text));
        if ours != theirs {
            wrong.push((text.clone(), ours, theirs));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {compared} texts differ (text, ours, theirs): {:#?}",
        wrong.len(),
        &wrong[..wrong.len().min(3)]
    );
    assert!(compared > 0);
}

/// SentencePiece's algorithm as published: the best pair first, the leftmost of equals, bytes for what remains.
struct SentencePieceReference {
    ids: HashMap<String, u32>,
    scores: Vec<f32>,
    bytes: HashMap<u8, u32>,
}

impl SentencePieceReference {
    fn new(pieces: &Pieces) -> Self {
        let normal = |kind| {
            pieces
                .tokens
                .iter()
                .enumerate()
                .filter(move |(_, t)| t.kind == kind)
        };
        Self {
            ids: normal(Kind::Normal)
                .map(|(id, t)| (t.text.clone(), id as u32))
                .collect(),
            scores: pieces.scores.clone(),
            bytes: normal(Kind::Byte)
                .map(|(id, t)| (u8::from_str_radix(&t.text[3..5], 16).unwrap(), id as u32))
                .collect(),
        }
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        if text.is_empty() {
            return Vec::new();
        }
        let text = format!(" {text}").replace(' ', "\u{2581}");
        let mut symbols: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let mut best: Option<(f32, usize)> = None;
            for at in 0..symbols.len().saturating_sub(1) {
                let joined = format!("{}{}", symbols[at], symbols[at + 1]);
                if let Some(id) = self.ids.get(&joined) {
                    let score = self.scores[*id as usize];
                    if best.is_none_or(|(top, _)| score > top) {
                        best = Some((score, at));
                    }
                }
            }
            let Some((_, at)) = best else { break };
            let right = symbols.remove(at + 1);
            symbols[at].push_str(&right);
        }
        let mut out = Vec::new();
        for symbol in symbols {
            match self.ids.get(&symbol) {
                Some(id) => out.push(*id),
                None => out.extend(symbol.bytes().map(|byte| self.bytes[&byte])),
            }
        }
        out
    }
}

/// tiktoken's merging of one word: the pair whose joined bytes rank lowest, the leftmost of equals.
fn tiktoken_word(ranks: &HashMap<&str, u32>, word: &str) -> Vec<u32> {
    if let Some(id) = ranks.get(word) {
        return vec![*id];
    }
    let mut symbols: Vec<String> = word.chars().map(String::from).collect();
    loop {
        let mut queue = BinaryHeap::new();
        for at in 0..symbols.len().saturating_sub(1) {
            let joined = format!("{}{}", symbols[at], symbols[at + 1]);
            if let Some(rank) = ranks.get(joined.as_str()) {
                queue.push(std::cmp::Reverse((*rank, at)));
            }
        }
        let Some(std::cmp::Reverse((_, at))) = queue.pop() else {
            break;
        };
        let right = symbols.remove(at + 1);
        symbols[at].push_str(&right);
    }
    symbols
        .iter()
        .map(|symbol| ranks[symbol.as_str()])
        .collect()
}

#[test]
fn gguf_sentencepiece_vocabulary_matches_every_vector() {
    let (Some(path), Some(vectors)) = (
        shared("tokenizers/ggml-vocab-llama-spm.gguf"),
        vectors("ggml-vocab-llama-spm.gguf"),
    ) else {
        return;
    };
    let tokenizer = load(&crate::gguf::tokenizer_json(&path).unwrap());
    assert_eq!(vectors.len(), 46);
    for (text, expected) in vectors {
        assert_eq!(ids(&tokenizer, &text), expected, "{text:?}");
        let marked = tokenizer.encode_fast(text.as_str(), true).unwrap();
        assert_eq!(marked.get_ids()[0], 1, "begins with <s>");
        assert_eq!(&marked.get_ids()[1..], expected);
        if !text.is_empty() {
            assert_eq!(tokenizer.decode(&expected, true).unwrap(), text);
        }
    }
}

#[test]
fn sentencepiece_model_matches_every_vector() {
    let (Some(pieces), Some(vectors)) = (llama2_pieces(), vectors("ggml-vocab-llama-spm.gguf"))
    else {
        return;
    };
    let tokenizer = load(&Vocabulary::Pieces(pieces).to_json().unwrap());
    for (text, expected) in vectors {
        assert_eq!(ids(&tokenizer, &text), expected, "{text:?}");
    }
}

#[test]
fn tiktoken_model_matches_every_vector() {
    let (Some(llama3), Some(vectors)) = (llama3(), vectors("ggml-vocab-llama-bpe.gguf")) else {
        return;
    };
    let tokenizer = load(&Vocabulary::ByteLevel(llama3).to_json().unwrap());
    for (text, expected) in vectors {
        assert_eq!(ids(&tokenizer, &text), expected, "{text:?}");
        let marked = tokenizer.encode_fast(text.as_str(), true).unwrap();
        assert_eq!(
            marked.get_ids()[0],
            128_000,
            "begins with <|begin_of_text|>"
        );
        assert_eq!(tokenizer.decode(&expected, true).unwrap(), text);
    }
    for (text, id) in [
        ("<|begin_of_text|>", 128_000),
        ("<|end_of_text|>", 128_001),
        ("<|reserved_special_token_1|>", 128_003),
        ("<|start_header_id|>", 128_006),
        ("<|end_header_id|>", 128_007),
        ("<|eom_id|>", 128_008),
        ("<|eot_id|>", 128_009),
        ("<|python_tag|>", 128_010),
        ("<|reserved_special_token_3|>", 128_011),
        ("<|reserved_special_token_247|>", 128_255),
    ] {
        assert_eq!(ids(&tokenizer, text), [id], "{text}");
    }
    assert_eq!(tokenizer.get_vocab_size(true), 128_256);
}

#[test]
fn converted_llama2_model_agrees_with_its_published_json() {
    let (Some(pieces), Some(path), Some(texts)) = (
        llama2_pieces(),
        shared("tokenizers/llama2-tokenizer.json"),
        real_texts(),
    ) else {
        return;
    };
    let glue: Vec<String> = pieces.tokens[259..]
        .iter()
        .map(|t| t.text.replace('\u{2581}', " "))
        .collect();
    let ours = load(&Vocabulary::Pieces(pieces).to_json().unwrap());
    let mut theirs = Tokenizer::from_file(path).unwrap();
    theirs.with_truncation(None).unwrap();
    assert_eq!(ours.get_vocab(true), theirs.get_vocab(true));
    let hostile = hostile_texts(&glue, 3_000);
    compare(
        texts.iter().chain(&hostile),
        |t| ids(&ours, t),
        |t| ids(&theirs, t),
    );
}

#[test]
fn converted_llama2_model_encodes_like_sentencepiece() {
    let Some(pieces) = llama2_pieces() else {
        return;
    };
    let reference = SentencePieceReference::new(&pieces);
    let glue: Vec<String> = pieces.tokens[259..]
        .iter()
        .map(|t| t.text.replace('\u{2581}', " "))
        .collect();
    let ours = load(&Vocabulary::Pieces(pieces).to_json().unwrap());
    let hostile = hostile_texts(&glue, 3_000);
    let special = |text: &str| ["<s>", "</s>", "<unk>"].iter().any(|s| text.contains(s));
    let texts = hostile.iter().filter(|text| !special(text));
    compare(texts, |t| ids(&ours, t), |t| reference.encode(t));
}

#[test]
fn converted_tiktoken_model_encodes_like_tiktoken() {
    let Some(llama3) = llama3() else { return };
    let words: Vec<String> = llama3.tokens[..128_000]
        .iter()
        .map(|token| token.text.clone())
        .collect();
    let ranks: HashMap<&str, u32> = words
        .iter()
        .enumerate()
        .map(|(rank, text)| (text.as_str(), rank as u32))
        .collect();
    // Merging alone: without the split, any glued tokens are one word.
    let mut document: serde_json::Value =
        serde_json::from_slice(&Vocabulary::ByteLevel(llama3).to_json().unwrap()).unwrap();
    document["pre_tokenizer"] = serde_json::Value::Null;
    document["added_tokens"] = serde_json::json!([]);
    let ours = load(&serde_json::to_vec(&document).unwrap());
    let mut dice = Dice(3);
    let texts: Vec<String> = (0..3_000)
        .map(|_| {
            let mut text = String::new();
            for _ in 0..1 + dice.below(6) {
                let word = dice.pick(&words).clone();
                let times = if dice.below(4) == 0 {
                    1 + dice.below(9)
                } else {
                    1
                };
                text.push_str(&word.repeat(times));
            }
            text
        })
        .filter(|text| text.len() < 400)
        .collect();
    compare(&texts, |t| ids(&ours, t), |t| tiktoken_word(&ranks, t));
}

#[test]
fn llama2_model_and_binary_hold_the_same_pieces() {
    let (Some(pieces), Some(path)) = (llama2_pieces(), shared("tokenizers/llama2-tokenizer.bin"))
    else {
        return;
    };
    // llama2.c: longest length u32, then score f32, length u32 and text of each piece, blanks plain.
    let bytes = fs::read(path).unwrap();
    let mut rest = &bytes[4..];
    let word = |rest: &mut &[u8]| {
        let (head, tail) = rest.split_first_chunk::<4>().unwrap();
        *rest = tail;
        *head
    };
    for (token, score) in pieces.tokens.iter().zip(&pieces.scores) {
        assert_eq!(f32::from_le_bytes(word(&mut rest)), *score);
        let length = u32::from_le_bytes(word(&mut rest)) as usize;
        let text = std::str::from_utf8(&rest[..length]).unwrap();
        rest = &rest[length..];
        match token.kind {
            Kind::Control => assert_eq!(text.trim(), token.text),
            _ => assert_eq!(text, token.text.replace('\u{2581}', " ")),
        }
    }
    assert!(rest.is_empty());
}

#[test]
fn smollm2_gguf_agrees_with_its_published_json() {
    let (Some(gguf), Some(path), Some(texts)) = (
        cached("SmolLM2-135M-Instruct.Q4_1.gguf"),
        shared("models/smollm2-135m-instruct/tokenizer.json"),
        real_texts(),
    ) else {
        return;
    };
    let ours = load(&crate::gguf::tokenizer_json(&gguf).unwrap());
    let theirs = Tokenizer::from_file(path).unwrap();
    assert_eq!(ours.get_vocab(true), theirs.get_vocab(true));
    let mut glue: Vec<String> = theirs
        .get_vocab(false)
        .into_values()
        .map(|id| theirs.decode(&[id], false).unwrap())
        .collect();
    glue.sort_unstable();
    glue.extend([
        "<|im_start|>".to_owned(),
        "<|im_end|>\n".to_owned(),
        "<|endoftext|>".to_owned(),
    ]);
    let hostile = hostile_texts(&glue, 3_000);
    compare(
        texts.iter().chain(&hostile),
        |t| ids(&ours, t),
        |t| ids(&theirs, t),
    );
    for text in hostile.iter().take(2000) {
        let ids = ids(&ours, text);
        assert_eq!(
            ours.decode(&ids, false).unwrap(),
            theirs.decode(&ids, false).unwrap()
        );
    }
}

#[test]
fn splits_cut_words_where_their_models_do() {
    use tokenizers::tokenizer::{OffsetReferential, OffsetType};
    use tokenizers::{PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

    let text = "I'LL pay $1234 for HelloWorld  \n x";
    for (names, expected) in [
        (
            &["gpt-2"][..],
            "I|'|LL| pay| $|1234| for| HelloWorld|  \n| x",
        ),
        (
            &["smollm"],
            "I|'|LL| pay| $|1|2|3|4| for| HelloWorld|  \n| x",
        ),
        (
            &["llama-bpe", "llama3", "llama-v3", "smaug-bpe"],
            "I|'LL| pay| $|123|4| for| HelloWorld|  \n| x",
        ),
        (
            &["qwen2", "deepseek-r1-qwen"],
            "I|'LL| pay| $|1|2|3|4| for| HelloWorld|  \n| x",
        ),
        (
            &["default"],
            "I|'|LL| pay| |$|123|4| for| HelloWorld|  \n| x",
        ),
        (
            &["tekken"],
            "I|'LL| pay| $|1|2|3|4| for| Hello|World|  \n| x",
        ),
    ] {
        for name in names {
            assert!(split::NAMES.contains(name));
            let mut json = Split::from_name(name).unwrap().pre_tokenizer();
            // Without the last step, which writes bytes as characters.
            json["pretokenizers"].as_array_mut().unwrap().pop();
            let split: PreTokenizerWrapper = serde_json::from_value(json).unwrap();
            let mut words = PreTokenizedString::from(text);
            split.pre_tokenize(&mut words).unwrap();
            let words: Vec<&str> = words
                .get_splits(OffsetReferential::Original, OffsetType::Byte)
                .into_iter()
                .map(|(word, ..)| word)
                .collect();
            assert_eq!(words.join("|"), expected, "{name}");
        }
    }
    assert_eq!(Split::from_name("jais"), None);
}

#[test]
fn bytes_have_the_characters_of_gpt2() {
    for (byte, character) in [
        (b'!', '!'),
        (b'~', '~'),
        (b' ', '\u{120}'),
        (b'\n', '\u{10a}'),
        (0x00, '\u{100}'),
        (0x7f, '\u{121}'),
        (0xa0, '\u{142}'),
        (0xad, '\u{143}'),
        (0xff, '\u{ff}'),
    ] {
        assert_eq!(byte_character(byte), character, "{byte:#x}");
    }
    let all: std::collections::HashSet<char> = (0..=255).map(byte_character).collect();
    assert_eq!(all.len(), 256);
}

#[test]
fn merging_never_makes_control_or_unused_tokens() {
    let tokens = [
        ("<unk>", Kind::Unknown),
        ("<s>", Kind::Control),
        ("<", Kind::Normal),
        ("s", Kind::Normal),
        (">", Kind::Normal),
        ("<s", Kind::Normal),
        ("s>", Kind::Normal),
        ("ss", Kind::Unused),
    ];
    let pieces = Pieces {
        tokens: tokens
            .map(|(text, kind)| Token {
                text: text.to_owned(),
                kind,
            })
            .to_vec(),
        scores: (0..8u8).map(|id| -f32::from(id)).collect(),
        unknown: Some(0),
        bos: None,
        space_prefix: SpacePrefix::Never,
    };
    let mut tokenizer = load(&Vocabulary::Pieces(pieces).to_json().unwrap());
    assert_eq!(ids(&tokenizer, "<s>"), [1], "a template may write it");
    assert_eq!(ids(&tokenizer, "ss"), [3, 3]);
    // A user's text is encoded so, and cannot forge it.
    tokenizer.set_encode_special_tokens(true);
    assert_eq!(ids(&tokenizer, "<s>"), [5, 4]);
}
