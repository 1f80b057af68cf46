use super::*;
use crate::model::Wanted;
use crate::testing::small_config;
use casemate_kernels::attention::{Attention, AttentionScratch};
use casemate_kernels::team::Team;
use proptest::prelude::*;

/// Keys 4 wide, values padded to 16, f32, two layers.
const PAGE_BYTES: u64 = (PAGE * (4 + 16) * 4 * 2) as u64;
const A: Option<User> = Some(User::new([1; 32]));
const B: Option<User> = Some(User::new([2; 32]));

/// Five pages for three sequences of up to four; unused ones stay for ten seconds.
fn cache() -> KvCache {
    sized(5, 3, 4)
}

fn sized(pages: u64, slots: usize, each: usize) -> KvCache {
    let bytes = Some(pages * PAGE_BYTES + 1);
    let age = seconds(10);
    let cache = KvCache::new(&small_config(), KvType::F32, each * PAGE, slots, bytes, age).unwrap();
    assert_eq!(
        cache.pages() as u64 * cache.page_bytes(),
        pages * PAGE_BYTES
    );
    cache
}

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// Opens a place and takes all pages for `positions`.
fn reserve(cache: &mut KvCache, positions: usize) -> Option<Slot> {
    let (slot, _) = cache.open(None, None, &[], seconds(0))?;
    assert!(cache.ensure(slot, 0, positions));
    Some(slot)
}

/// `pages` whole pages and a token of a text that `name` begins.
fn text(name: u32, pages: usize) -> Vec<u32> {
    (0..=(pages * PAGE) as u32).map(|i| name + i).collect()
}

/// A sequence that reads `tokens` and ends; returns how many positions it found.
fn read(cache: &mut KvCache, user: Option<User>, tokens: &[u32], now: Duration) -> usize {
    let (slot, found) = cache.open(user, None, tokens, now).unwrap();
    assert!(cache.ensure(slot, found, tokens.len()));
    cache.know(slot, tokens.len(), |at| tokens[at]);
    cache.release(slot, now);
    found
}

/// What attention over the first position of a sequence gives in the second layer; with `write`, that
/// is written before.
fn seen(cache: &mut KvCache, slot: Slot, position: usize, write: Option<f32>) -> [f32; 4] {
    Eye::new().seen(cache, slot, position, write)
}

/// What it takes to look.
struct Eye(Team, AttentionScratch);

impl Eye {
    fn new() -> Self {
        let scratch = AttentionScratch::new(1, 1, 4, PAGE).unwrap();
        Self(Team::new(1).unwrap(), scratch)
    }

    fn seen(
        &mut self,
        cache: &mut KvCache,
        slot: Slot,
        position: usize,
        write: Option<f32>,
    ) -> [f32; 4] {
        let Self(team, scratch) = self;
        let attention = Attention {
            layer: 1,
            heads: 1,
            scale: 1.0,
            window: Some(1),
        };
        let span = Span {
            slot,
            first: position,
            rows: 0..1,
            wanted: Wanted::None,
        };
        let (pool, spans) = cache.locate(std::slice::from_ref(&span));
        if let Some(value) = write {
            pool.write(team, 1, spans, &[1.0; 4], &[value; 4]);
        }
        let mut out = [9.0; 4];
        attention.run(team, pool, scratch, spans, &[1.0; 4], &mut out);
        out
    }
}

#[test]
fn pages_have_one_owner_and_come_back() {
    let mut cache = cache();
    let a = reserve(&mut cache, 2 * PAGE).unwrap();
    let b = reserve(&mut cache, 2 * PAGE + 1).unwrap();
    let mut owned = [&cache.tables[a.0].pages[..], &cache.tables[b.0].pages].concat();
    owned.sort_unstable();
    assert_eq!(owned, [0, 1, 2, 3, 4]);
    assert_eq!(cache.bytes_used(), 5 * PAGE_BYTES);
    let (c, _) = cache.open(None, None, &[], seconds(0)).unwrap();
    assert_eq!(cache.writable(c, 0), 0);
    assert!(!cache.ensure(c, 0, 1), "no page is left");
    cache.release(a, seconds(0));
    assert_eq!(cache.writable(c, 0), 2 * PAGE);
    assert!(cache.ensure(c, 0, 1));
    assert_eq!(cache.writable(c, 1), 2 * PAGE - 1);
    assert_eq!(cache.pages_of(c), 1);
    cache.release(b, seconds(0));
    cache.release(c, seconds(0));
    assert_eq!((cache.bytes_used(), cache.available()), (0, 5));
}

#[test]
fn slots_limit_the_batch() {
    let mut cache = sized(2, 2, 1);
    reserve(&mut cache, 1).unwrap();
    reserve(&mut cache, 1).unwrap();
    assert_eq!(cache.open(None, None, &[], seconds(0)), None);
}

#[test]
fn refuses_less_than_one_context() {
    let given = 4 * PAGE_BYTES - 1;
    match KvCache::new(
        &small_config(),
        KvType::F32,
        4 * PAGE,
        3,
        Some(given),
        seconds(1),
    ) {
        Err(LoadError::KvBudget {
            context,
            needed,
            given: g,
        }) => {
            assert_eq!((context, needed, g), (4 * PAGE, 4 * PAGE_BYTES, given));
        }
        other => panic!("{:?}", other.map(|c| c.pages())),
    }
}

#[test]
fn released_pages_forget_their_values() {
    let mut cache = sized(1, 1, 1);
    let first = reserve(&mut cache, 1).unwrap();
    assert_eq!(seen(&mut cache, first, 0, Some(5.0)), [5.0; 4]);
    cache.release(first, seconds(0));
    let second = reserve(&mut cache, 1).unwrap();
    assert_eq!(seen(&mut cache, second, 0, None), [0.0; 4]);
}

#[test]
fn evicted_and_expired_pages_forget_their_values() {
    let tokens = text(3, 1);
    for expire in [false, true] {
        // A user may leave one page of two behind, and another sequence wants both.
        let mut cache = sized(2, 2, 2);
        let (slot, _) = cache.open(A, None, &tokens, seconds(0)).unwrap();
        assert!(cache.ensure(slot, 0, PAGE));
        assert_eq!(seen(&mut cache, slot, 0, Some(5.0)), [5.0; 4]);
        cache.know(slot, PAGE, |at| tokens[at]);
        cache.release(slot, seconds(3));
        assert_eq!((cache.bytes_kept(), cache.bytes_used()), (PAGE_BYTES, 0));
        if expire {
            assert_eq!(cache.until_next_expires(seconds(12)), Some(seconds(1)));
            cache.expire(seconds(12));
            assert_eq!(cache.bytes_kept(), PAGE_BYTES);
            cache.expire(seconds(13));
            assert_eq!(cache.until_next_expires(seconds(13)), None);
            assert_eq!(cache.bytes_kept(), 0);
        }
        let both = reserve(&mut cache, 2 * PAGE).unwrap();
        assert_eq!(cache.bytes_kept(), 0);
        for position in [0, PAGE] {
            assert_eq!(seen(&mut cache, both, position, None), [0.0; 4]);
        }
        assert_eq!(cache.find(A, None, &tokens, seconds(0)), Found::default());
        assert!(cache.prefixes.oldest().is_none());
    }
}

#[test]
fn a_page_whose_time_is_over_is_not_found_although_it_is_there() {
    let mut cache = sized(8, 3, 4);
    let tokens = text(3, 3);
    read(&mut cache, A, &tokens[..=PAGE], seconds(1));
    read(&mut cache, A, &tokens, seconds(3));
    // The whole text was used at 3, so nothing of it is older.
    let pages = |cache: &KvCache, now| cache.find(A, None, &tokens, seconds(now)).pages;
    assert_eq!((pages(&cache, 12), pages(&cache, 13)), (3, 0));
    let (slot, found) = cache.open(A, None, &tokens, seconds(13)).unwrap();
    assert_eq!((found, cache.bytes_kept()), (0, 3 * PAGE_BYTES));
    cache.release(slot, seconds(13));
    // What somebody uses has no age.
    let (slot, found) = cache.open(A, None, &tokens, seconds(12)).unwrap();
    assert_eq!(found, 3 * PAGE);
    assert_eq!(pages(&cache, 100), 3);
    cache.release(slot, seconds(100));
}

#[test]
fn a_shared_page_is_copied_before_it_is_written() {
    let mut cache = cache();
    let (a, b, c) = (
        reserve(&mut cache, 3).unwrap(),
        reserve(&mut cache, PAGE + 1).unwrap(),
        cache.open(None, None, &[], seconds(0)).unwrap().0,
    );
    seen(&mut cache, a, 0, Some(5.0));
    seen(&mut cache, a, 1, Some(6.0));
    cache.fork([a, b, c].into_iter(), &[0, 0, 0]);
    assert_eq!(cache.bytes_used(), PAGE_BYTES, "one page for three");
    let of_their_own =
        |cache: &KvCache, slots: &[Slot]| cache.pages_of_their_own(slots.iter().copied());
    assert_eq!(of_their_own(&cache, &[b]), 0);
    assert_eq!(of_their_own(&cache, &[c, a]), 0);
    assert_eq!(of_their_own(&cache, &[c, a, b]), 1);
    // A copy, and those beyond.
    assert_eq!(cache.pages_to_write(b, 1, 2), 1);
    assert_eq!(cache.pages_to_write(b, 1, 2 * PAGE + 1), 3);
    assert_eq!(cache.pages_to_write(b, PAGE, PAGE + 1), 1);
    for (slot, value) in [(b, 7.0), (c, 8.0), (a, 9.0)] {
        assert!(cache.ensure(slot, 1, 2));
        assert_eq!(seen(&mut cache, slot, 0, None), [5.0; 4], "copied");
        assert_eq!(seen(&mut cache, slot, 1, None), [6.0; 4], "copied");
        seen(&mut cache, slot, 1, Some(value));
    }
    // The last one had the page to itself.
    assert_eq!(cache.bytes_used(), 3 * PAGE_BYTES);
    assert_eq!(of_their_own(&cache, &[b, a]), 2);
    assert_eq!(cache.pages_to_write(b, 1, PAGE), 0);
    for (slot, value) in [(b, 7.0), (c, 8.0), (a, 9.0)] {
        assert_eq!(seen(&mut cache, slot, 1, None), [value; 4]);
    }
    // Without a page for a copy nothing is written over.
    assert!(cache.ensure(a, 2, 2 * PAGE + 1));
    cache.fork([a, b].into_iter(), &[0, 0]);
    cache.fork([a, b, c].into_iter(), &[1, 0, 2]);
    assert_eq!((cache.available(), cache.writable(b, 2)), (1, 3 * PAGE - 2));
    let d = reserve(&mut cache, 1);
    assert!(d.is_none(), "three places are taken");
    cache.release(c, seconds(0));
    let d = reserve(&mut cache, 2 * PAGE).unwrap();
    assert_eq!((cache.available(), cache.writable(b, 2)), (0, 0));
    assert!(!cache.ensure(b, 2, 3));
    assert_eq!(seen(&mut cache, a, 1, None), [9.0; 4]);
    [a, b, d]
        .into_iter()
        .for_each(|slot| cache.release(slot, seconds(0)));
    assert_eq!((cache.bytes_used(), cache.available()), (0, 5));
}

#[test]
fn only_the_same_user_finds_the_same_beginning() {
    let mut cache = sized(8, 2, 4);
    let tokens = text(3, 3);
    assert_eq!(read(&mut cache, A, &tokens, seconds(0)), 0);
    assert_eq!(cache.bytes_kept(), 3 * PAGE_BYTES);
    for other in [B, None] {
        assert_eq!(
            cache.find(other, None, &tokens, seconds(0)),
            Found::default()
        );
        let (slot, found) = cache.open(other, None, &tokens, seconds(0)).unwrap();
        assert_eq!((found, cache.pages_of(slot)), (0, 0));
        cache.release(slot, seconds(0));
    }
    let all = Found { pages: 3, idle: 3 };
    assert_eq!(cache.find(A, None, &tokens, seconds(0)), all);
    // One token is left to compute, and a page counts as a whole.
    assert_eq!(
        cache.find(A, None, &tokens[..3 * PAGE], seconds(0)).pages,
        2
    );
    assert_eq!(
        cache
            .find(A, None, &tokens[..2 * PAGE + 5], seconds(0))
            .pages,
        2
    );
    for at in [0, PAGE - 1, PAGE, 2 * PAGE + 7] {
        let mut changed = tokens.clone();
        changed[at] += 1;
        assert_eq!(
            cache.find(A, None, &changed, seconds(0)).pages,
            at / PAGE,
            "changed at {at}"
        );
    }
    // Page two is not found behind another page one.
    let moved = [&tokens[PAGE..], &tokens[..PAGE]].concat();
    assert_eq!(cache.find(A, None, &moved, seconds(0)).pages, 0);
    assert_eq!(read(&mut cache, B, &tokens, seconds(1)), 0);
    assert_eq!(read(&mut cache, A, &tokens, seconds(1)), 3 * PAGE);
    // Without an age there is nothing to find.
    let mut none =
        KvCache::new(&small_config(), KvType::F32, 256, 2, None, Duration::ZERO).unwrap();
    read(&mut none, A, &tokens, seconds(0));
    assert_eq!(
        (
            none.bytes_kept(),
            none.find(A, None, &tokens, seconds(0)).pages
        ),
        (0, 0)
    );
}

#[test]
fn running_sequences_are_found_and_use_one_page_for_the_same_text() {
    let mut cache = sized(8, 3, 4);
    let tokens = text(3, 2);
    let open = |cache: &mut KvCache| {
        let (slot, found) = cache.open(A, None, &tokens, seconds(0)).unwrap();
        assert!(cache.ensure(slot, found, tokens.len()));
        (slot, found)
    };
    let ((a, of_a), (b, of_b)) = (open(&mut cache), open(&mut cache));
    assert_eq!((of_a, of_b, cache.bytes_used()), (0, 0, 6 * PAGE_BYTES));
    cache.know(a, 2 * PAGE + 1, |at| tokens[at]);
    let (c, of_c) = open(&mut cache);
    assert_eq!(of_c, 2 * PAGE);
    cache.know(b, 2 * PAGE + 1, |at| tokens[at]);
    assert_eq!(
        cache.bytes_used(),
        5 * PAGE_BYTES,
        "two and each one's last"
    );
    cache.release(a, seconds(0));
    cache.release(c, seconds(0));
    assert_eq!(
        (cache.bytes_used(), cache.bytes_kept()),
        (3 * PAGE_BYTES, 0)
    );
    cache.release(b, seconds(0));
    assert_eq!(
        (cache.bytes_used(), cache.bytes_kept()),
        (0, 2 * PAGE_BYTES)
    );
}

#[test]
fn the_page_unused_for_longest_goes_first_and_nobody_keeps_more_than_a_share() {
    let mut cache = sized(8, 2, 8);
    read(&mut cache, A, &text(100, 2), seconds(1));
    read(&mut cache, B, &text(200, 2), seconds(2));
    read(&mut cache, A, &text(100, 1), seconds(3));
    // Four free ones are taken, then the last page of A's text, unused since 1.
    let (slot, _) = cache.open(None, None, &[], seconds(0)).unwrap();
    assert!(cache.ensure(slot, 0, 5 * PAGE));
    let pages = |cache: &KvCache| {
        [A, B].map(|user| {
            let name = if user == A { 100 } else { 200 };
            cache.find(user, None, &text(name, 2), seconds(0)).pages
        })
    };
    assert_eq!(pages(&cache), [1, 2]);
    assert!(cache.ensure(slot, 5 * PAGE, 7 * PAGE));
    assert_eq!(pages(&cache), [1, 0]);
    cache.release(slot, seconds(4));
    // Half of the pages are the most that stays of one user; others' stay as they are.
    read(&mut cache, B, &text(200, 2), seconds(5));
    read(&mut cache, A, &text(300, 3), seconds(6));
    assert_eq!(cache.bytes_kept(), 6 * PAGE_BYTES);
    read(&mut cache, A, &text(400, 2), seconds(7));
    assert_eq!(cache.bytes_kept(), 6 * PAGE_BYTES);
    let of_a = [(100, 1), (300, 3), (400, 2)]
        .map(|(n, len)| cache.find(A, None, &text(n, len), seconds(0)).pages);
    assert_eq!((pages(&cache)[1], of_a), (2, [0, 2, 2]));
}

/// What must hold at any time.
fn check(cache: &KvCache) {
    let mut uses = vec![0; cache.pages()];
    for table in &cache.tables {
        table
            .pages
            .iter()
            .for_each(|&page| uses[page as usize] += 1);
        assert!(table.known <= table.pages.len());
        let known = table.pages[..table.known].iter();
        known.for_each(|&page| assert!(cache.prefixes.knows(page)));
        assert!(table.open || table.pages.is_empty());
    }
    assert_eq!(uses, cache.uses);
    let mut idle = 0;
    for page in 0..cache.pages() as u32 {
        let free = cache.free.contains(&page);
        let unused = cache.prefixes.knows(page) && uses[page as usize] == 0;
        assert_eq!(unused, cache.prefixes.idle_since(page).is_some());
        assert_eq!(free, uses[page as usize] == 0 && !unused);
        idle += usize::from(unused);
    }
    assert_eq!(idle, cache.prefixes.idle());
    assert_eq!(cache.free.len() + idle, cache.available());
}

/// A running sequence: whose it is, its tokens, and how many are fed.
struct Running {
    slot: Slot,
    user: Option<User>,
    tokens: Vec<u32>,
    fed: usize,
}

/// What is written at a position: all tokens up to it decide.
fn value(tokens: &[u32], at: usize) -> f32 {
    tokens[..=at].iter().sum::<u32>() as f32
}

proptest! {
    #[test]
    fn pages_are_free_used_or_unused_whatever_happens(
        steps in prop::collection::vec((0u8..10, 0usize..4, 0u32..3, 1usize..300), 1..120),
    ) {
        let mut cache = sized(9, 4, 8);
        let mut eye = Eye::new();
        let mut running: Vec<Running> = Vec::new();
        for (now, (what, which, name, length)) in steps.into_iter().enumerate() {
            let now = seconds(now as u64);
            match what {
                0..3 => {
                    // Texts of one name differ from their second page on.
                    let tokens: Vec<u32> = (0..length as u32)
                        .map(|i| if i < 64 { name } else { name + which as u32 % 2 + i })
                        .collect();
                    let user = [A, B, None][which % 3];
                    let hit = cache.find(user, None, &tokens, seconds(0));
                    if let Some((slot, found)) = cache.open(user, None, &tokens, seconds(0)) {
                        prop_assert_eq!(hit.pages * PAGE, found);
                        prop_assert!(found < tokens.len());
                        running.push(Running { slot, user, tokens, fed: found });
                    }
                }
                3..6 if which < running.len() => {
                    let Running { slot, tokens, fed, .. } = &mut running[which];
                    let end = tokens.len().min(*fed + length % 100);
                    let (writable, have) = (cache.writable(*slot, *fed), cache.pages_of(*slot));
                    let enough = end == *fed || cache.ensure(*slot, *fed, end);
                    prop_assert_eq!(enough, end - *fed <= writable);
                    if enough {
                        for at in *fed..end {
                            if at / PAGE >= have {
                                // Nothing of whoever had the page before.
                                prop_assert_eq!(eye.seen(&mut cache, *slot, at, None), [0.0; 4]);
                            }
                            eye.seen(&mut cache, *slot, at, Some(value(tokens, at)));
                        }
                        // Guesses that were wrong.
                        for at in (end..end.next_multiple_of(PAGE)).take(if end > *fed { 2 } else { 0 }) {
                            eye.seen(&mut cache, *slot, at, Some(-1.0));
                        }
                        *fed = end;
                        cache.know(*slot, end, |at| tokens[at]);
                    }
                }
                6 if which < running.len() => {
                    let Running { slot, .. } = running.swap_remove(which);
                    cache.release(slot, now);
                }
                7 if which < running.len() => {
                    // As beams: those after the first have no user.
                    let Some(to) = (0..running.len()).find(|&i| i != which && running[i].user.is_none()) else {
                        continue;
                    };
                    let fed = running[which].fed;
                    let mut tokens = running[which].tokens[..fed].to_vec();
                    tokens.extend((0..1 + length as u32 % 150).map(|i| 1000 + name + i));
                    let slots = [which, to].map(|i| running[i].slot);
                    cache.fork(slots.into_iter(), &[0, 0]);
                    (running[to].tokens, running[to].fed) = (tokens, fed);
                }
                _ => cache.expire(now),
            }
            check(&cache);
            for Running { slot, tokens, fed, .. } in &running {
                for at in (0..*fed).rev().step_by(PAGE - 1) {
                    prop_assert_eq!(eye.seen(&mut cache, *slot, at, None), [value(tokens, at); 4]);
                }
            }
        }
        running.into_iter().for_each(|running| cache.release(running.slot, seconds(500)));
        check(&cache);
        cache.expire(seconds(1000));
        prop_assert_eq!(cache.available(), 9);
        prop_assert_eq!(cache.bytes_kept(), 0);
    }
}
