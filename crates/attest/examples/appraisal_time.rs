//! How long it takes to appraise a quote with its collateral, on one core: parsing, certificate chains, revocation lists,
//! every signature, the policy.
//!
//! ```sh
//! cargo run --release -p casemate-attest --example appraisal_time -- QUOTE COLLATERAL.json TIME [ROUNDS]
//! ```
//! TIME is when the collateral was valid, such as `2025-06-19T12:00:00Z`. The policy is the quote's own measurement.

use std::time::Instant;

use casemate_attest::{Collateral, Evidence, Policy, Quote, UnixTime, appraise};
use casemate_testkit::policies::entry_for;

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [quote, collateral, time, more @ ..] = &arguments[..] else {
        eprintln!("usage: appraisal_time QUOTE COLLATERAL.json TIME [ROUNDS]");
        std::process::exit(2);
    };
    let rounds = more
        .first()
        .map_or(200, |n| n.parse().expect("ROUNDS is a number"));
    let now: UnixTime = time.parse().expect("TIME is RFC 3339");
    let quote = std::fs::read(quote).expect("the quote can be read");
    let collateral = std::fs::read(collateral).expect("the collateral can be read");

    let parsed = Quote::parse(&quote).expect("the quote parses");
    let expected = *parsed.report().report_data();
    let policy = format!(
        "version = 1\ntee = [\"{}\"]\n[tcb]\nminimum_evaluation_data_number = 1\n{}",
        parsed.tee().name(),
        entry_for(parsed.report())
    );
    let policy = Policy::from_toml(&policy).expect("the policy is valid");

    // Parsed anew in each round, as for every request for evidence.
    let mut times: Vec<f64> = (0..rounds)
        .map(|_| {
            let started = Instant::now();
            let collateral: Collateral =
                serde_json::from_slice(&collateral).expect("the collateral is JSON");
            let evidence = Evidence {
                tee: parsed.tee(),
                quote: quote.clone(),
                collateral: Some(collateral),
            };
            let appraisal = appraise(&evidence, &expected, &policy, now);
            let took = started.elapsed().as_secs_f64();
            if let Err(denial) = appraisal.outcome {
                panic!("the evidence is not accepted: {denial}");
            }
            took
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let milliseconds = |part: f64| times[((times.len() - 1) as f64 * part) as usize] * 1e3;
    println!(
        "{rounds} appraisals on one core: median {:.2} ms, 95 % below {:.2} ms, slowest {:.2} ms",
        milliseconds(0.5),
        milliseconds(0.95),
        milliseconds(1.0),
    );
}
