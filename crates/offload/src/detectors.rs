//! What looks for a secret in what a worker sees. Each detector passes over what is really sent, and
//! fires on builds that are broken on purpose: pads used twice, pads that are not uniform, pads with a
//! hole. Seeds are fixed, so none of this can fail by chance tomorrow.

use std::collections::HashMap;

use casemate_field::Field;
use casemate_kernels::team::Team;
use casemate_testkit::uniform::{self, Bits};

use crate::keys::BootKey;
use crate::memory::Buffer;
use crate::pad::{Masked, Pad, Pads};
use crate::testing::Random;

/// Elements of each kind of message that are looked at.
pub(crate) const ELEMENTS: usize = 10_000_000;
const COLUMNS: usize = 4096;
const ROWS: usize = ELEMENTS.div_ceil(COLUMNS);

/// Distance from what is expected, in standard deviations, that is called a finding.
pub(crate) const FINDING: f64 = 4.5;

/// How many pairs of rows look as if they had one pad: the difference of two int8 numbers is at most
/// 254 in magnitude, that of two uniform elements almost never is. Among 64 columns chance has it three
/// times in fewer than one pair of ten billion.
pub(crate) fn pairs_with_one_pad(field: Field, rows: &[&[u32]]) -> usize {
    let mut near = HashMap::new();
    for column in 0..64 {
        // All rows have one pad: that is enough.
        if near.len() > 100_000 {
            break;
        }
        // Near ones are neighbours in order, and the least is near the largest.
        let mut sorted: Vec<(u64, usize)> = (rows.iter().enumerate())
            .map(|(row, elements)| (elements[column].into(), row))
            .collect();
        sorted.sort_unstable();
        let wrapped = sorted
            .iter()
            .map(|(x, row)| (x + u64::from(field.modulus()), *row));
        let wrapped: Vec<_> = wrapped.collect();
        sorted.extend(wrapped);
        for (at, (x, row)) in sorted[..rows.len()].iter().enumerate() {
            for (_, other) in sorted[at + 1..].iter().take_while(|(y, _)| y - x <= 254) {
                *near
                    .entry((*row.min(other), *row.max(other)))
                    .or_insert(0u32) += 1;
            }
        }
    }
    near.values().filter(|columns| **columns > 2).count()
}

/// How well a linear classifier, trained on transcripts of two prompts, tells others of them apart: the
/// area under its curve. 0.5 is guessing.
pub(crate) fn area_under_curve(
    train: &[Vec<f32>; 2],
    held_out: &[Vec<f32>; 2],
    features: usize,
) -> f64 {
    // Features on one scale.
    let all = || train.iter().flat_map(|class| class.chunks_exact(features));
    let count = all().count() as f64;
    let mut mean = vec![0f64; features];
    let mut square = vec![0f64; features];
    for row in all() {
        for ((mean, square), x) in mean.iter_mut().zip(&mut square).zip(row) {
            *mean += f64::from(*x) / count;
            *square += f64::from(*x).powi(2) / count;
        }
    }
    let scale: Vec<f64> = mean
        .iter()
        .zip(square)
        .map(|(mean, square)| 1.0 / (square - mean * mean).max(1e-30).sqrt())
        .collect();
    let score = |w: &[f64], row: &[f32]| -> f64 {
        let terms = row.iter().zip(w).zip(mean.iter().zip(&scale));
        terms
            .map(|((x, w), (mean, scale))| w * (f64::from(*x) - mean) * scale)
            .sum()
    };
    // Logistic regression by gradient descent, one transcript at a time, the classes in turn.
    let mut w = vec![0f64; features];
    for epoch in 0..4 {
        let rate = 0.02 / (1.0 + f64::from(epoch));
        let turns = train[0]
            .chunks_exact(features)
            .zip(train[1].chunks_exact(features));
        for (row, label) in turns.flat_map(|(a, b)| [(a, 0.0), (b, 1.0)]) {
            let miss = label - 1.0 / (1.0 + (-score(&w, row)).exp());
            let terms = row.iter().zip(mean.iter().zip(&scale));
            for (w, (x, (mean, scale))) in w.iter_mut().zip(terms) {
                *w += rate * miss * (f64::from(*x) - mean) * scale;
            }
        }
    }
    let mut scores: Vec<(f64, bool)> = held_out
        .iter()
        .zip([false, true])
        .flat_map(|(class, label)| class.chunks_exact(features).map(move |row| (row, label)))
        .map(|(row, label)| (score(&w, row), label))
        .collect();
    scores.sort_by(|a, b| a.0.total_cmp(&b.0));
    // Of all pairs, those whose second class is above the first; equal ones count half.
    let (mut below, mut pairs, mut at) = (0usize, 0.0, 0);
    while at < scores.len() {
        let same = scores[at..]
            .iter()
            .take_while(|s| s.0 == scores[at].0)
            .count();
        let ours = scores[at..at + same].iter().filter(|s| s.1).count();
        let theirs = same - ours;
        pairs += ours as f64 * (below as f64 + theirs as f64 / 2.0);
        below += theirs;
        at += same;
    }
    let positive = scores.iter().filter(|s| s.1).count();
    pairs / (positive * (scores.len() - positive)) as f64
}

/// Activations that are as far from uniform as they get, so that whatever of them comes through shows.
fn prompt(row: usize) -> Vec<i8> {
    (0..COLUMNS)
        .map(|i| match row % 3 {
            0 => 127,
            1 => 0,
            _ => (i % 7) as i8,
        })
        .collect()
}

/// What a worker receives for so many rows, row by row.
fn sent(pads: &Pads, field: Field, reuse: bool) -> Vec<Masked> {
    let mut sequence = pads.sequence();
    let first = sequence.next();
    (0..ROWS)
        .map(|row| {
            let pad = match reuse && row % 1000 == 999 {
                true => first.again(),
                false => sequence.next(),
            };
            let (mut pad, room) = (vec![pad], Buffer::default());
            pads.hide(&team(), field, &mut pad, &prompt(row), COLUMNS, room)
        })
        .collect()
}

fn shares(pads: &Pads, field: Field) -> [Vec<Masked>; 2] {
    let mut sequence = pads.sequence();
    let rows = (0..ROWS).map(|row| {
        let mut pad = vec![sequence.next()];
        let rooms = Default::default();
        pads.share(&team(), field, &mut pad, &prompt(row), COLUMNS, rooms)
    });
    let (first, second) = rows.map(|[first, second]| (first, second)).unzip();
    [first, second]
}

/// Over the 2^16 highest or lowest bits.
fn chi_square<'a>(field: Field, bits: Bits, rows: impl Iterator<Item = &'a [u32]>) -> f64 {
    uniform::chi_square(field, bits, 16, rows.flatten().copied())
}

fn elements(rows: &[Masked]) -> impl Iterator<Item = &[u32]> {
    rows.iter().map(Masked::elements)
}

fn team() -> Team {
    Team::new(1).unwrap()
}

fn boot() -> BootKey {
    BootKey::of(*b"a fixed key for fixed messages. ")
}

#[test]
fn everything_a_worker_receives_is_uniform() {
    let kinds = Field::ALL.into_iter().flat_map(|field| {
        let [first, second] = shares(&Pads::new(&boot(), b"shares"), field);
        let masked = sent(&Pads::new(&boot(), b"pads"), field, false);
        [
            (field, "masked", masked),
            (field, "share 1", first),
            (field, "share 2", second),
        ]
    });
    for (field, kind, rows) in kinds {
        assert!(elements(&rows).map(<[u32]>::len).sum::<usize>() >= ELEMENTS);
        for bits in [Bits::High, Bits::Low] {
            let distance = chi_square(field, bits, elements(&rows));
            assert!(
                distance.abs() < FINDING,
                "{field:?}, {kind}, {bits:?}: {distance}"
            );
        }
    }
}

#[test]
fn pads_that_are_not_uniform_are_found() {
    for field in Field::ALL {
        // One element in 32 is halved: a few more small ones than there should be.
        let high = Pads::broken(&boot(), |_, row| {
            row.iter_mut()
                .filter(|x| **x % 32 == 5)
                .for_each(|x| *x /= 2);
        });
        // One in 64 has four of its lower bits cleared.
        let low = Pads::broken(&boot(), |_, row| {
            row.iter_mut()
                .filter(|x| (**x >> 16) % 64 == 5)
                .for_each(|x| *x &= !0xF000);
        });
        let high = chi_square(field, Bits::High, elements(&sent(&high, field, false)));
        let low = chi_square(field, Bits::Low, elements(&sent(&low, field, false)));
        assert!(
            high > 2.0 * FINDING && low > 2.0 * FINDING,
            "{field:?}: {high}, {low}"
        );
    }
}

#[test]
fn no_two_rows_have_one_pad() {
    for field in Field::ALL {
        let rows = sent(&Pads::new(&boot(), b"pads"), field, false);
        let rows: Vec<&[u32]> = elements(&rows).collect();
        assert_eq!(pairs_with_one_pad(field, &rows), 0);
        let [first, second] = shares(&Pads::new(&boot(), b"shares"), field);
        for share in [first, second] {
            let rows: Vec<&[u32]> = elements(&share).collect();
            assert_eq!(pairs_with_one_pad(field, &rows), 0);
        }
    }
}

#[test]
fn pads_used_twice_are_found() {
    for field in Field::ALL {
        let rows = sent(&Pads::new(&boot(), b"pads"), field, true);
        let rows: Vec<&[u32]> = elements(&rows).collect();
        // Rows 999 and 1999 have the pad that was drawn first and not used elsewhere.
        assert_eq!(pairs_with_one_pad(field, &rows), 1);
    }
}

/// Rows of a prompt in a transcript, and their width.
const STEPS: usize = 4;
const WIDTH: usize = 64;
/// A feature for an element's size and one for its lowest bits.
const FEATURES: usize = 2 * STEPS * WIDTH;

/// Transcripts of a prompt, each of which is what a worker sees of it in one run; all under the same
/// pads, if there are any to be used again.
fn transcripts(
    pads: &Pads,
    field: Field,
    prompt: &[i8],
    count: usize,
    used: Option<&[Pad]>,
) -> Vec<f32> {
    let mut sequence = pads.sequence();
    let mut features = Vec::with_capacity(count * FEATURES);
    for _ in 0..count {
        let mut spent = match used {
            Some(used) => used.iter().map(Pad::again).collect(),
            None => (0..STEPS).map(|_| sequence.next()).collect(),
        };
        let room = Buffer::default();
        let masked = pads.hide(&team(), field, &mut spent, prompt, WIDTH, room);
        for x in masked.elements() {
            features.push(field.centre(*x) as f32);
            features.push((x & 0xFF) as f32);
        }
    }
    features
}

fn distinguish(pads: &Pads, field: Field, reuse: bool) -> f64 {
    let mut random = Random::new(77);
    let prompts = [random.row(STEPS * WIDTH), random.row(STEPS * WIDTH)];
    let mut sequence = pads.sequence();
    let used: Vec<Pad> = (0..STEPS).map(|_| sequence.next()).collect();
    let used = reuse.then_some(used.as_slice());
    let train = prompts
        .each_ref()
        .map(|x| transcripts(pads, field, x, 5000, used));
    let held_out = prompts
        .each_ref()
        .map(|x| transcripts(pads, field, x, 5000, used));
    area_under_curve(&train, &held_out, FEATURES)
}

#[test]
fn two_prompts_look_alike() {
    for field in Field::ALL {
        let area = distinguish(&Pads::new(&boot(), b"pads"), field, false);
        assert!((area - 0.5).abs() < 0.02, "{field:?}: {area}");
    }
}

#[test]
fn two_prompts_under_broken_pads_are_told_apart() {
    let short = Pads::broken(&boot(), |_, row| row.iter_mut().for_each(|x| *x %= 1 << 10));
    let hole = Pads::broken(&boot(), |_, row| row[17] = 0);
    for field in Field::ALL {
        for pads in [&short, &hole] {
            let area = distinguish(pads, field, false);
            assert!(area > 0.9, "{field:?}: {area}");
        }
        let area = distinguish(&Pads::new(&boot(), b"pads"), field, true);
        assert!(area > 0.9, "one pad for all: {area}");
    }
}
