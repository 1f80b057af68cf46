//! What a receipt costs: `cargo run --release -p casemate-channel --example receipt_cost [TOKENS]`.
//!
//! One answer of so many streamed tokens (128 unless given) to a request of 2 KiB, as the enclave accounts for it: two
//! salts, the request's hash, one update per server-sent event, the signature. Prints medians over many rounds.

use std::hint::black_box;
use std::time::{Duration, Instant};

use casemate_channel::receipt::{AnswerHash, AnswerHasher, Receipt, RequestHash, Salt};
use casemate_container::signing::SigningKey;
use casemate_testkit::statements;

const ROUNDS: usize = 2000;
/// A server-sent event with one token is about as long.
const EVENT: &[u8] = &[b'x'; 240];

fn main() {
    let tokens: usize = std::env::args()
        .nth(1)
        .map_or(128, |text| text.parse().expect("a number of tokens"));
    let key = SigningKey::generate();
    let keyset = statements::keyset(vec![0; 1300], 1_790_000_000);
    let (request, answer) = (RequestHash([0; 32]), AnswerHash([0; 32]));
    let honest = statements::receipt(&keyset, request, answer, 1_790_000_000);
    let request = vec![b'r'; 2048];
    let (mut opening, mut passing, mut signing) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let start = Instant::now();
        let (request_salt, answer_salt) = (Salt::random(), Salt::random());
        let request_hash = RequestHash::of(
            &request_salt,
            "POST",
            "/v1/chat/completions",
            black_box(&request),
        );
        let mut hasher = AnswerHasher::new(&answer_salt);
        opening.push(start.elapsed());

        let start = Instant::now();
        for _ in 0..tokens {
            hasher.update(black_box(EVENT));
        }
        passing.push(start.elapsed());

        let start = Instant::now();
        let receipt = Receipt {
            counter: round as u64 + 1,
            request_hash,
            answer_hash: hasher.finish(),
            ..honest.clone()
        };
        black_box(receipt.sign(&key).expect("a receipt that keeps the rules"));
        signing.push(start.elapsed());
    }
    let micros = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e6
    };
    let (opening, passing, signing) = (
        micros(&mut opening),
        micros(&mut passing),
        micros(&mut signing),
    );
    println!("{tokens} tokens, medians of {ROUNDS} rounds");
    println!("salts and request hash  {opening:8.1} µs");
    println!("per token               {:8.3} µs", passing / tokens as f64);
    println!("receipt and signature   {signing:8.1} µs");
    println!(
        "per answer              {:8.1} µs",
        opening + passing + signing
    );
}
