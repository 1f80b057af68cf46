//! Requests that came together with one prompt: one of them reads it.

use super::guess_tests::{ONE, Setting, greedy, model, setting};
use super::tests::A;
use super::*;
use crate::speculation::Speculation;

/// Three requests for 5 tokens each after one prompt of 100.
fn three(tokens: usize) -> Setting {
    let prompt: Vec<u32> = (0..100).map(|i| i * i % 13).collect();
    let mut asked = vec![greedy(&prompt, tokens); 3];
    asked.iter_mut().for_each(|a| a.request.user = A);
    let mut of = setting(model(4, 3, None), &asked, 3, 3 * ONE, Speculation::None);
    for id in 0..3 {
        let queue = &mut of.scheduler.queue;
        let mut sequence = queue.take_arrival(id).unwrap();
        sequence.read_with(RequestId(0));
        queue.put(sequence.account.unwrap(), id, sequence);
    }
    of
}

#[test]
fn one_reads_the_prompt_and_the_others_are_not_charged_for_it() {
    let Setting {
        mut scheduler,
        heard,
    } = three(5);
    scheduler.admit();
    let account = scheduler.running[0].account.unwrap();
    assert_eq!(scheduler.running.len(), 3);
    // 64 positions are a page that is full; 36 each of them reads.
    assert_eq!(scheduler.queue.served(account), 100 + 2 * 36);
    scheduler.step();
    assert_eq!(scheduler.queue.served(account), 100 + 2 * 36);
    assert_eq!(scheduler.kv.bytes_used(), 2 * scheduler.kv.page_bytes());
    scheduler.step();
    assert_eq!(scheduler.queue.served(account), 100 + 2 * 36 + 2);
    // The page in common, and one for each.
    assert_eq!(scheduler.kv.bytes_used(), 4 * scheduler.kv.page_bytes());
    while !scheduler.running.is_empty() {
        scheduler.step();
    }
    let counters = &scheduler.mailbox.counters;
    assert_eq!(counters.prompt_tokens.load(Ordering::Relaxed), 100 + 2 * 36);
    assert_eq!(counters.recomputed_tokens.load(Ordering::Relaxed), 0);
    let all = heard.into_iter().map(|heard| heard.try_iter().collect());
    let all: Vec<Vec<_>> = all.collect();
    assert_eq!(all[0].len(), 6);
    assert!(all.iter().all(|events| *events == all[0]));
}

#[test]
fn a_reader_whose_first_token_is_its_last_leaves_the_prompt_to_the_others() {
    let Setting {
        mut scheduler,
        heard,
    } = three(1);
    scheduler.admit();
    while !scheduler.running.is_empty() {
        scheduler.step();
    }
    let counters = &scheduler.mailbox.counters;
    assert_eq!(counters.prompt_tokens.load(Ordering::Relaxed), 100 + 2 * 36);
    let ends: Vec<usize> = heard.iter().map(|heard| heard.try_iter().count()).collect();
    assert_eq!(ends, [2, 2, 2]);
}

#[test]
fn when_the_reader_leaves_the_next_one_reads_and_is_charged() {
    let Setting {
        mut scheduler,
        heard,
    } = three(5);
    scheduler.admit();
    let account = scheduler.running[0].account.unwrap();
    scheduler.cancel(RequestId(0));
    scheduler.step();
    assert_eq!(scheduler.queue.served(account), 100 + 2 * 36 + 64);
    scheduler.step();
    assert_eq!(scheduler.queue.served(account), 100 + 2 * 36 + 64 + 2);
    assert_eq!(scheduler.kv.bytes_used(), 3 * scheduler.kv.page_bytes());
    while !scheduler.running.is_empty() {
        scheduler.step();
    }
    let ends: Vec<usize> = heard.iter().map(|heard| heard.try_iter().count()).collect();
    assert_eq!(ends, [1, 6, 6]);
}
