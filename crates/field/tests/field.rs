//! Every operation against arithmetic on 128 bits, at the edges and anywhere.

use casemate_field::digits::{BASE, DIGITS};
use casemate_field::products::{MAX_ROWS, accumulate};
use casemate_field::{Field, Field::P29, Field::P31};
use proptest::prelude::*;

fn p(field: Field) -> i128 {
    i128::from(field.modulus())
}

fn modulo(field: Field, x: i128) -> u32 {
    x.rem_euclid(p(field)) as u32
}

/// Elements around which things go wrong, and both sides of the middle.
fn edges(field: Field) -> Vec<u32> {
    let p = field.modulus();
    vec![
        0,
        1,
        2,
        126,
        127,
        128,
        254,
        255,
        256,
        p / 2 - 1,
        p / 2,
        p / 2 + 1,
        p - 128,
        p - 2,
        p - 1,
    ]
}

/// Elements, of which every third or so is an edge.
fn elements(
    field: Field,
    length: impl Into<prop::collection::SizeRange>,
) -> impl Strategy<Value = Vec<u32>> {
    let element = prop_oneof![
        1 => prop::sample::select(edges(field)),
        2 => 0..field.modulus(),
    ];
    prop::collection::vec(element, length)
}

fn field() -> impl Strategy<Value = Field> {
    prop::sample::select(&Field::ALL[..])
}

fn field_and_rows(longest: usize) -> impl Strategy<Value = (Field, Vec<u32>, Vec<u32>)> {
    (field(), 0..=longest).prop_flat_map(|(field, length)| {
        (
            Just(field),
            elements(field, length),
            elements(field, length),
        )
    })
}

#[test]
fn moduli_are_prime_and_of_their_size() {
    for (field, power, below) in [(P29, 29, 3), (P31, 31, 1)] {
        let modulus = field.modulus();
        assert_eq!(u64::from(modulus), (1u64 << power) - below);
        assert_eq!(field.bits(), power);
        assert!(
            (2..)
                .take_while(|d| d * d <= modulus)
                .all(|d| modulus % d != 0)
        );
    }
}

#[test]
fn a_field_is_chosen_by_the_width_that_it_holds() {
    assert_eq!((P29.max_width(), P31.max_width()), (16_643, 66_572));
    for (width, chosen) in [
        (0, None),
        (1, Some(P29)),
        (16_643, Some(P29)),
        (16_644, Some(P31)),
        (66_572, Some(P31)),
        (66_573, None),
        (usize::MAX, None),
    ] {
        assert_eq!(Field::for_width(width), chosen, "{width}");
    }
    for field in Field::ALL {
        let largest = |width: usize| 2 * width as u64 * 127 * 127;
        assert!(largest(field.max_width()) < u64::from(field.modulus()));
        assert!(largest(field.max_width() + 1) > u64::from(field.modulus()));
    }
}

#[test]
fn ids_name_fields() {
    for id in 0..=u8::MAX {
        let named = Field::from_id(id);
        assert_eq!(named.is_some(), matches!(id, 1 | 2), "{id}");
        assert!(named.is_none_or(|field| field.id() == id));
    }
}

#[test]
fn every_pair_of_edges_is_added_subtracted_and_multiplied() {
    for field in Field::ALL {
        for a in edges(field) {
            for b in edges(field) {
                let (x, y) = (i128::from(a), i128::from(b));
                assert_eq!(field.add(a, b), modulo(field, x + y), "{a} + {b}");
                assert_eq!(field.sub(a, b), modulo(field, x - y), "{a} - {b}");
                assert_eq!(field.mul(a, b), modulo(field, x * y), "{a} * {b}");
            }
        }
    }
}

#[test]
fn any_number_is_reduced() {
    for field in Field::ALL {
        let multiples = (0..64).map(|i| (u64::from(field.modulus()) << i) & (u64::MAX >> 1));
        for x in multiples.chain([0, 1, u64::MAX - 1, u64::MAX]) {
            for x in [x.wrapping_sub(1), x, x.wrapping_add(1)] {
                assert_eq!(field.reduce(x), modulo(field, i128::from(x)), "{x}");
                let x = x as i64;
                assert_eq!(field.from_integer(x), modulo(field, i128::from(x)), "{x}");
            }
        }
        for x in [i64::MIN, i64::MIN + 1, i64::MAX] {
            assert_eq!(field.from_integer(x), modulo(field, i128::from(x)), "{x}");
        }
        let wide = [i32::MIN, i32::MIN + 1, -1, 0, 1, i32::MAX - 1, i32::MAX];
        let mut out = [u32::MAX; 7];
        field.from_integers(&wide, &mut out);
        assert_eq!(out, wide.map(|x| modulo(field, i128::from(x))));
    }
}

#[test]
fn centred_residues_are_the_least_and_come_back() {
    for field in Field::ALL {
        let row = edges(field);
        let mut centred = vec![0; row.len()];
        field.centre_row(&row, &mut centred);
        for (x, v) in row.iter().zip(&centred) {
            assert_eq!(field.centre(*x), *v);
            assert!(
                i64::from(v.unsigned_abs()) <= i64::from(field.modulus() / 2),
                "{x}"
            );
            assert_eq!(modulo(field, i128::from(*v)), *x);
        }
        let mut again = vec![0; row.len()];
        field.from_integers(&centred, &mut again);
        assert_eq!(again, row);
    }
}

#[test]
fn what_is_no_element_is_told() {
    for field in Field::ALL {
        assert!(field.contains(&[]));
        assert!(field.contains(&edges(field)));
        for other in [field.modulus(), field.modulus() + 1, u32::MAX] {
            for at in 0..9 {
                let mut row = [0; 9];
                row[at] = other;
                assert!(!field.contains(&row), "{other} at {at}");
            }
        }
    }
}

#[test]
fn every_activation_is_masked_and_unmasked() {
    for field in Field::ALL {
        for pad in edges(field) {
            let x: Vec<i8> = (-127..=127).collect();
            let pads = vec![pad; x.len()];
            let mut masked = vec![0; x.len()];
            field.mask_row(&x, &pads, &mut masked);
            assert!(field.contains(&masked));
            field.sub_row(&mut masked, &pads);
            let mut back = vec![0; x.len()];
            field.centre_row(&masked, &mut back);
            assert!(back.iter().zip(&x).all(|(back, x)| *back == i32::from(*x)));
        }
    }
}

/// Each in one pass is what the two passes make of it.
#[test]
fn what_is_done_in_one_pass_is_what_two_make_of_it() {
    for field in Field::ALL {
        let (a, x) = (edges(field), [-127i8, -126, -1, 0, 1, 2, 100, 126, 127]);
        for (b, x) in a.iter().zip(x.iter().cycle()) {
            let (b, x) = (vec![*b; a.len()], vec![*x; a.len()]);
            let mut masked = vec![0; a.len()];
            field.mask_row(&x, &a, &mut masked);
            let mut in_place = a.clone();
            field.mask_in_place(&mut in_place, &x);
            assert_eq!(in_place, masked);

            let mut share = vec![0; a.len()];
            field.share_row(&x, &a, &mut share);
            assert!(field.contains(&share));
            let mut whole = vec![0; a.len()];
            field.sum_row(&share, &a, &mut whole);
            assert!(
                whole
                    .iter()
                    .zip(&x)
                    .all(|(whole, x)| *whole == i32::from(*x))
            );

            let (mut two, mut centred, mut one) = (a.clone(), vec![0; a.len()], vec![0; a.len()]);
            field.sub_row(&mut two, &b);
            field.centre_row(&two, &mut centred);
            field.difference_row(&a, &b, &mut one);
            assert_eq!(one, centred);
            field.add_row(&mut two, &b);
            field.add_row(&mut two, &b);
            field.centre_row(&two, &mut centred);
            field.sum_row(&a, &b, &mut one);
            assert_eq!(one, centred);
        }
    }
}

/// What masks are for: a masked product, without the product of the mask, is the product.
#[test]
fn a_masked_product_of_extremes_is_exact_at_every_fields_full_width() {
    for field in Field::ALL {
        let width = field.max_width();
        for (x, w) in [(127i8, 127i8), (127, -127), (-127, -127)] {
            let pad: Vec<u32> = (0..width as u64)
                .map(|i| field.reduce(i.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
                .collect();
            let mut masked = vec![0; width];
            field.mask_row(&vec![x; width], &pad, &mut masked);
            let weights = vec![field.from_integer(i64::from(w)); width];
            let product = field.dot(&masked, &weights);
            let restored = field.sub(product, field.dot(&pad, &weights));
            let exact = i64::from(x) * i64::from(w) * width as i64;
            assert_eq!(i64::from(field.centre(restored)), exact);
        }
    }
}

#[test]
fn sums_of_the_longest_rows_of_the_largest_elements_do_not_overflow() {
    for field in Field::ALL {
        for length in [0, 1, 7, 8, 9, 31, 32, 33, 511, 512, 513, 4096, 200_003] {
            let row = vec![field.modulus() - 1; length];
            // (-1) * (-1), so many times.
            assert_eq!(
                field.dot(&row, &row),
                modulo(field, length as i128),
                "{length}"
            );
        }
    }
}

#[test]
fn as_many_rows_as_allowed_are_accumulated() {
    for field in Field::ALL {
        for w in [-127i8, 127] {
            let factor = field.modulus() - 1;
            // The sum of all rows but one, then that one.
            let before = i64::from(factor) * i64::from(w) * (MAX_ROWS as i64 - 1);
            let mut sums = [before];
            accumulate(&mut sums, factor, &[w]);
            let exact = i128::from(factor) * i128::from(w) * MAX_ROWS as i128;
            assert_eq!(i128::from(sums[0]), exact);
            let mut out = [0];
            field.settle_row(&sums, &mut out);
            assert_eq!(out[0], modulo(field, exact));
        }
    }
}

#[test]
#[should_panic(expected = "rows differ in length")]
fn rows_of_different_lengths_panic() {
    P29.add_row(&mut [0, 1], &[0]);
}

#[test]
#[should_panic(expected = "rows differ in length")]
fn digits_of_another_length_panic() {
    P29.split_row(&[0, 1], &mut [0; 7]);
}

proptest! {
    #[test]
    fn rows_are_added_and_subtracted((field, a, b) in field_and_rows(70)) {
        let mut sum = a.clone();
        field.add_row(&mut sum, &b);
        let mut difference = a.clone();
        field.sub_row(&mut difference, &b);
        for i in 0..a.len() {
            let (x, y) = (i128::from(a[i]), i128::from(b[i]));
            prop_assert_eq!(sum[i], modulo(field, x + y));
            prop_assert_eq!(difference[i], modulo(field, x - y));
        }
    }

    #[test]
    fn dot_products_are_exact((field, a, b) in field_and_rows(1100)) {
        let exact = |a: &[u32], b: &[u32]| {
            let products = a.iter().zip(b).map(|(a, b)| i128::from(*a) * i128::from(*b));
            modulo(field, products.sum())
        };
        prop_assert_eq!(field.dot(&a, &b), exact(&a, &b));
        prop_assert_eq!(field.dots([&a, &b], &b), [exact(&a, &b), exact(&b, &b)]);
    }

    #[test]
    fn digits_are_small_and_count_what_they_should((field, row, _) in field_and_rows(40)) {
        let mut digits = vec![-128i8; row.len() * DIGITS];
        field.split_row(&row, &mut digits);
        prop_assert!(!digits.contains(&-128));
        for (k, x) in row.iter().enumerate() {
            let digit = |l: usize| i64::from(digits[l * row.len() + k]);
            let value = (0..DIGITS).rev().fold(0, |sum, l| sum * BASE + digit(l));
            prop_assert_eq!(value, i64::from(field.centre(*x)));
        }
    }

    /// The way of an accelerator: digits, products in int8 with exact sums, recombination.
    #[test]
    fn products_of_digits_are_products_of_elements(
        (field, row, _) in field_and_rows(90),
        w in prop::collection::vec(prop_oneof![Just(-127i8), Just(127), -127..=127i8], 90),
    ) {
        let w = &w[..row.len()];
        let mut digits = vec![0; row.len() * DIGITS];
        field.split_row(&row, &mut digits);
        let sums: Vec<i32> = (0..DIGITS)
            .map(|l| {
                let digits = digits[l * row.len()..].iter().zip(w);
                digits.map(|(d, w)| i32::from(*d) * i32::from(*w)).sum()
            })
            .collect();
        let mut out = [u32::MAX];
        field.recombine_row(&sums, &mut out);
        let exact = row.iter().zip(w).map(|(x, w)| i128::from(*x) * i128::from(*w)).sum();
        prop_assert_eq!(out[0], modulo(field, exact));
    }

    #[test]
    fn any_sums_are_recombined(
        field in field(),
        sums in prop::collection::vec(
            prop_oneof![Just(i32::MIN), Just(i32::MAX), Just(0), any::<i32>()],
            0..=20usize,
        ),
    ) {
        let rows = sums.len() / DIGITS;
        let mut out = vec![u32::MAX; rows];
        field.recombine_row(&sums[..rows * DIGITS], &mut out);
        for (j, out) in out.iter().enumerate() {
            let sum = |l: usize| i128::from(sums[l * rows + j]);
            let value = (0..DIGITS).rev().fold(0, |value, l| value * i128::from(BASE) + sum(l));
            prop_assert_eq!(*out, modulo(field, value));
        }
    }

    #[test]
    fn combinations_of_int8_rows_are_exact(
        (field, factors, _) in field_and_rows(40),
        w in prop::collection::vec(-127..=127i8, 40 * 5),
    ) {
        let mut sums = [0; 5];
        for (factor, row) in factors.iter().zip(w.chunks(5)) {
            accumulate(&mut sums, *factor, row);
        }
        let mut out = [u32::MAX; 5];
        field.settle_row(&sums, &mut out);
        for (k, out) in out.iter().enumerate() {
            let terms = factors.iter().zip(w.chunks(5));
            let exact = terms.map(|(factor, row)| i128::from(*factor) * i128::from(row[k])).sum();
            prop_assert_eq!(*out, modulo(field, exact));
        }
    }
}
