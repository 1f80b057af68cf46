//! tiktoken's vocabulary file, as Llama 3 publishes it: one line `base64-of-token rank` per token.
//!
//! The file says nothing of special tokens; Llama 3's, the 256 that follow the ranked ones, are published with it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::split::Split;
use super::{ByteLevel, Kind, MAX_TOKEN, Token, byte_character, merges};
use crate::error::{Fault, Problem, Unsupported};

/// The most lines; Llama 3 has 128,000.
const MAX_LINES: usize = 1 << 20;
/// How many ranked tokens Llama 3 has.
const LLAMA3_RANKED: usize = 128_000;
/// How many special tokens follow them.
const LLAMA3_SPECIAL: usize = 256;

/// Whether `bytes` look like a tiktoken vocabulary rather than a SentencePiece model.
pub(crate) fn looks_like(bytes: &[u8]) -> bool {
    let line = bytes
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    line.is_ascii() && parse_line(line).is_ok()
}

/// Parses a vocabulary whose special tokens are Llama 3's.
pub(crate) fn parse_llama3(bytes: &[u8]) -> Result<ByteLevel, Problem> {
    let ranked = parse(bytes)?;
    if ranked.len() != LLAMA3_RANKED {
        return Err(Unsupported::TokenizerModel {
            name: format!("tiktoken with {} tokens", ranked.len()),
        }
        .into());
    }
    let merges = merges::from_ranks(&ranked);
    let mut tokens: Vec<Token> = ranked
        .into_iter()
        .map(|text| Token {
            text,
            kind: Kind::Normal,
        })
        .collect();
    let bos = tokens.len() as u32;
    tokens.extend(llama3_specials().map(|text| Token {
        text,
        kind: Kind::Control,
    }));
    Ok(ByteLevel {
        tokens,
        merges,
        split: Split::Llama3,
        bos: Some(bos),
    })
}

/// Llama 3.1's special tokens in order of id. Llama 3.0 had not named those at 4, 8 and 10 yet.
fn llama3_specials() -> impl Iterator<Item = String> {
    let mut reserved = 0;
    (0..LLAMA3_SPECIAL).map(move |place| {
        let name = match place {
            0 => "begin_of_text",
            1 => "end_of_text",
            4 => "finetune_right_pad_id",
            6 => "start_header_id",
            7 => "end_header_id",
            8 => "eom_id",
            9 => "eot_id",
            10 => "python_tag",
            _ => {
                reserved += 1;
                return format!("<|reserved_special_token_{}|>", reserved - 1);
            }
        };
        format!("<|{name}|>")
    })
}

/// The ranked tokens in GPT-2's alphabet.
pub(crate) fn parse(bytes: &[u8]) -> Result<Vec<String>, Problem> {
    let mut tokens = Vec::new();
    let mut single_bytes = 0;
    let lines = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    for (number, line) in lines.split(|byte| *byte == b'\n').enumerate() {
        let fault = |reason| Fault::Tiktoken {
            line: number + 1,
            reason,
        };
        if number == MAX_LINES {
            return Err(fault("too many lines").into());
        }
        let (token, rank) = parse_line(line).map_err(fault)?;
        if rank != number as u64 {
            return Err(fault("a rank out of order").into());
        }
        single_bytes += usize::from(token.len() == 1);
        tokens.push(token.into_iter().map(byte_character).collect());
    }
    if single_bytes != 256 {
        return Err(Fault::Tiktoken {
            line: tokens.len(),
            reason: "not every byte a token",
        }
        .into());
    }
    Ok(tokens)
}

fn parse_line(line: &[u8]) -> Result<(Vec<u8>, u64), &'static str> {
    let space = line
        .iter()
        .position(|byte| *byte == b' ')
        .ok_or("no space")?;
    let (token, rank) = (&line[..space], &line[space + 1..]);
    if token.len() > MAX_TOKEN {
        return Err("too long a token");
    }
    let token = STANDARD.decode(token).map_err(|_| "no base64")?;
    if token.is_empty() {
        return Err("an empty token");
    }
    let rank = std::str::from_utf8(rank)
        .ok()
        .filter(|rank| rank.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|rank| rank.parse().ok())
        .ok_or("no rank")?;
    Ok((token, rank))
}
