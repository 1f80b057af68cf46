//! Products with the help of honest workers: the same sums, what the worker sees, masks that run out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use casemate_container::Access;
use casemate_field::Field;
use casemate_kernels::panels::{Int8Rows, matmul_int8_sums};
use casemate_kernels::team::Team;
use casemate_offload::offload::{Unsuited, Workers};
use casemate_offload::{BootKey, Config, Event, Metrics, Offload, PublicMatrix};

use crate::fake::{Enclave, Fake, config};
use crate::testing::{Random, packed};

/// With one worker and with two.
fn workers(count: usize) -> Workers {
    match count {
        1 => Workers::One(Fake::honest().connect()),
        _ => Workers::Two([Fake::honest().encrypted(), Fake::honest().encrypted()]),
    }
}

#[test]
fn sums_are_those_of_the_enclave_over_random_shapes() {
    let mut random = Random::new(1);
    for round in 0..12 {
        let shapes: Vec<_> = (0..3)
            .map(|_| {
                (
                    1 + random.below(70) as usize,
                    1 + random.below(200) as usize,
                )
            })
            .collect();
        let matrices = shapes.iter().map(|(m, n)| random.matrix(*m, *n)).collect();
        let enclave = Enclave::new(config(), round, workers(1 + round as usize % 2), matrices);
        enclave.wait();
        enclave.fill();
        let mut expected = 0;
        for (group, (_, columns)) in shapes.iter().enumerate() {
            // Up to four messages.
            for rows in [1, 2, 33, 100] {
                assert!(
                    enclave.product(group, &random.row(rows * columns)),
                    "{rows} of {shapes:?}"
                );
                expected += rows as u64;
            }
        }
        let metrics = enclave.offload.metrics();
        assert_eq!(metrics.rows_outside, expected);
        assert_eq!(
            (
                metrics.failures,
                metrics.misconduct,
                metrics.rows_recomputed
            ),
            (0, 0, 0)
        );
    }
}

#[test]
fn sums_are_exact_at_the_limits_of_both_fields() {
    for count in [1, 2] {
        for columns in [16_643, 16_644, 66_572] {
            let extreme: Vec<i8> = (0..2 * columns)
                .map(|i| if i < columns { 127 } else { -127 })
                .collect();
            let matrix = packed(&extreme, 2, columns);
            // A few masks.
            let config = Config {
                pool_bytes: 500,
                ..config()
            };
            let enclave = Enclave::new(config, 1, workers(count), vec![matrix]);
            enclave.wait();
            enclave.fill();
            assert!(enclave.product(0, &extreme));
            assert!(enclave.product(0, &vec![0; columns]));
        }
    }
}

#[test]
fn wider_matrices_and_late_ones_stay_inside() {
    let mut random = Random::new(2);
    let enclave = Enclave::new(config(), 1, workers(1), vec![random.matrix(2, 2)]);
    let add = |offload: &Offload, columns| {
        let matrix = packed(&vec![1; columns], 1, columns);
        offload.add(PublicMatrix::new(Access::Public, Arc::new(matrix)).unwrap())
    };
    assert!(matches!(add(&enclave.offload, 4), Err(Unsuited::Started)));
    let boot = BootKey::new([1; 32].into());
    let fresh = Offload::new(config(), boot, workers(1), Box::new(|_| {}));
    assert!(matches!(
        add(&fresh, 66_573),
        Err(Unsuited::TooWide(66_573))
    ));
    assert!(add(&fresh, 66_572).is_ok());
}

#[test]
fn a_private_matrix_is_none_that_could_be_sent() {
    let matrix = Arc::new(Random::new(3).matrix(2, 2));
    assert!(PublicMatrix::new(Access::Private, Arc::clone(&matrix) as _).is_err());
    assert!(PublicMatrix::new(Access::Public, matrix).is_ok());
}

#[test]
fn without_masks_the_enclave_computes_and_prompts_leave_some_for_answers() {
    let mut random = Random::new(4);
    let config = Config {
        reserve: 3,
        // Ten masks of each, with what is kept beside them.
        pool_bytes: 10 * (2 * 4 * 100 + 96) + 100,
        ..config()
    };
    let matrices = vec![random.matrix(100, 20), random.matrix(100, 20)];
    let enclave = Enclave::new(config, 1, workers(1), matrices);
    enclave.wait();
    let row = random.row(9 * 20);
    assert!(!enclave.product(0, &row[..20]), "there are none yet");
    enclave.fill();
    let full = enclave.offload.metrics();
    assert_eq!(
        (full.masks_level, full.masks_depth, full.masks_made),
        (10, 10, 20)
    );
    assert!(
        !enclave.product(0, &row[..8 * 20]),
        "a prompt would leave two"
    );
    assert!(enclave.product(0, &row[..7 * 20]));
    assert!(
        enclave.product(0, &row[..3 * 20]),
        "an answer takes the last"
    );
    assert!(!enclave.product(0, &row[..20]));
    assert!(enclave.product(1, &row[..20]));
    let expected = Metrics {
        masks_level: 0,
        masks_depth: 10,
        masks_made: 20,
        masks_used: 11,
        rows_outside: 11,
        rows_without_masks: 1 + 8 + 1,
        ..Metrics::default()
    };
    assert_eq!(enclave.offload.metrics(), expected);
    // Idle time brings them back.
    enclave.fill();
    assert_eq!(enclave.offload.metrics().masks_level, 10);
    assert!(enclave.product(0, &row[..20]));
}

/// As the system itself says, where it says something.
#[test]
fn masks_lie_in_memory_that_is_left_out_of_dumps() {
    let mut random = Random::new(9);
    let matrices = vec![random.matrix(100, 20), random.matrix(300, 20)];
    let enclave = Enclave::new(config(), 1, workers(1), matrices);
    enclave.fill();
    let granted = enclave.offload.mask_memory().expect("Linux says so");
    assert!(granted.dump_excluded);
    // 150 masks, 400 elements each.
    assert!(granted.resident >= 150 * 400 * 4, "{granted:?}");
    assert!(granted.bytes <= 5 << 20, "{granted:?}");
    let shares = Enclave::new(config(), 1, workers(2), vec![random.matrix(2, 2)]);
    assert_eq!(shares.offload.mask_memory(), None, "there are none");
}

#[test]
fn masks_that_lay_outside_restore_the_same_sums() {
    let mut random = Random::new(8);
    let boot = BootKey::new([3; 32].into());
    // Memory for one mask of 30 outputs, and a file for some tens.
    let config = Config {
        pool_bytes: 250,
        ..config()
    };
    let offload = Offload::new(config, boot, workers(1), Box::new(|_| {}));
    let matrix = Arc::new(random.matrix(30, 20));
    let public = PublicMatrix::new(Access::Public, Arc::clone(&matrix) as _).unwrap();
    let group = offload.add(public).unwrap();
    offload.spill_to(tempfile::tempfile().unwrap(), 5000);
    offload.start().unwrap();
    assert!(offload.wait(Duration::from_secs(60)));
    let team = Team::new(1).unwrap();
    let mut outside = u64::MAX;
    for _ in 0..20 {
        until(|| {
            let metrics = offload.metrics();
            // What was made has to be carried there, which is another thread's.
            metrics.masks_outside >= 30 && metrics.masks_level == 1 || {
                offload.step(&team);
                false
            }
        });
        assert_eq!(offload.metrics().masks_depth, 1);
        outside = offload.metrics().masks_outside.min(outside);
        let mut rows = Int8Rows::with_capacity(1, 20);
        rows.assign(&team, &random.row(20), 20);
        let (mut sums, mut expected) = ([0; 30], [0; 30]);
        matmul_int8_sums(&team, &rows, &matrix, &mut expected);
        assert!(offload.outside(&team, &group, &rows, &mut sums));
        assert_eq!(sums, expected);
        // The next comes from there, by itself.
        let made = offload.metrics().masks_made;
        until(|| offload.metrics().masks_level == 1);
        assert_eq!(offload.metrics().masks_made, made);
    }
    assert!(outside >= 30);
    assert_eq!(offload.metrics().masks_lost, 0);
}

/// Waits for something that other threads do.
fn until(done: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < end, "it does not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Frames of a recording: header and, of MULTIPLY, what follows it before the elements, and the elements.
fn frames(mut bytes: &[u8]) -> Vec<(Vec<u8>, Vec<u32>)> {
    const MULTIPLY: u8 = 7;
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let length = u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize;
        let (frame, rest) = bytes.split_at(16 + length);
        let open = if frame[0] == MULTIPLY {
            24
        } else {
            frame.len()
        };
        let elements = frame[open..].as_chunks::<4>().0.iter();
        let elements = elements.map(|x| u32::from_le_bytes(*x)).collect();
        frames.push((frame[..open].to_vec(), elements));
        bytes = rest;
    }
    frames
}

#[test]
fn a_worker_sees_the_same_of_two_prompts_but_for_uniform_numbers() {
    const WIDTH: usize = 64;
    let mut random = Random::new(5);
    let weights = random.row(48 * WIDTH);
    for count in [1, 2] {
        let mut transcripts = Vec::new();
        for prompt in [vec![0i8; 40 * WIDTH], random.row(40 * WIDTH)] {
            let fakes: Vec<Fake> = (0..count).map(|_| Fake::honest()).collect();
            let workers = match &fakes[..] {
                [one] => Workers::One(one.connect()),
                [one, two, ..] => Workers::Two([one.encrypted(), two.encrypted()]),
                [] => unreachable!(),
            };
            let matrices = vec![packed(&weights, 48, WIDTH)];
            // Another key each time, as after every start.
            let enclave = Enclave::new(config(), random.next(), workers, matrices);
            enclave.wait();
            enclave.fill();
            assert!(enclave.product(0, &prompt));
            for row in prompt.chunks_exact(WIDTH) {
                assert!(enclave.product(0, row));
            }
            transcripts.push(
                fakes
                    .iter()
                    .map(|fake| frames(&fake.seen()))
                    .collect::<Vec<_>>(),
            );
        }
        let [first, second] = &transcripts[..] else {
            unreachable!()
        };
        for (first, second) in first.iter().zip(second) {
            assert!(first.len() > 40);
            let open = |frames: &[(Vec<u8>, Vec<u32>)]| -> Vec<Vec<u8>> {
                frames.iter().map(|(open, _)| open.clone()).collect()
            };
            assert!(
                open(first) == open(second),
                "all but the elements is the same"
            );
            let elements = |frames: &[(Vec<u8>, Vec<u32>)]| -> Vec<u32> {
                frames
                    .iter()
                    .flat_map(|(_, elements)| elements.clone())
                    .collect()
            };
            let (first, second) = (elements(first), elements(second));
            assert_eq!(first.len(), 80 * WIDTH);
            assert!(Field::P29.contains(&first) && Field::P29.contains(&second));
            let same = first.iter().zip(&second).filter(|(a, b)| a == b).count();
            assert!(same < 2, "{same} elements are the same");
        }
    }
}

#[test]
fn what_is_asked_before_there_is_a_worker_is_computed_inside() {
    let mut random = Random::new(6);
    let nobody = Workers::One(Box::new(|| {
        Err(std::io::ErrorKind::ConnectionRefused.into())
    }));
    let config = Config {
        retry: std::time::Duration::from_secs(3600),
        ..config()
    };
    let enclave = Enclave::new(config, 1, nobody, vec![random.matrix(4, 8)]);
    enclave.fill();
    assert!(!enclave.product(0, &random.row(8)));
    let metrics = enclave.offload.metrics();
    assert_eq!((metrics.rows_without_worker, metrics.masks_used), (1, 0));
    // Dropping it does not wait for the hour.
}

#[test]
fn a_group_without_start_or_without_matrices_is_computed_inside() {
    let boot = || BootKey::new([1; 32].into());
    let none = Offload::new(config(), boot(), workers(1), Box::new(|_: Event| {}));
    none.start().unwrap();
    let team = casemate_kernels::team::Team::new(1).unwrap();
    assert!(!none.step(&team));
    let offload = Offload::new(config(), boot(), workers(1), Box::new(|_: Event| {}));
    let matrix = Arc::new(Random::new(7).matrix(2, 4));
    let group = offload
        .add(PublicMatrix::new(Access::Public, matrix).unwrap())
        .unwrap();
    let mut rows = Int8Rows::with_capacity(1, 4);
    rows.assign(&team, &[1, 2, 3, 4], 4);
    assert!(!offload.outside(&team, &group, &rows, &mut [0; 2]));
}
