//! Workers that cheat, stall, die or speak nonsense: nothing wrong is released, each is told by its
//! fault, and the enclave goes on.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use casemate_field::Field;
use casemate_offload::{Config, Event, Fault, Workers};
use casemate_wire::{Hello, MIN_PAYLOAD, Multiply, Responder};

use crate::fake::{Act, Conduct, Enclave, Fake, config, offer};
use crate::testing::Random;

/// Of each product so many rows.
const ROWS: usize = 3;
const OUTPUTS: usize = 12;
const WIDTH: usize = 40;

/// An enclave with one worker and a matrix.
fn enclave(config: Config, fake: &Fake) -> Enclave {
    let matrix = Random::new(99).matrix(OUTPUTS, WIDTH);
    let enclave = Enclave::new(config, 5, Workers::One(fake.connect()), vec![matrix]);
    enclave.fill();
    enclave
}

/// Readmits whoever it is, again and again.
fn patient() -> Config {
    Config {
        readmissions: u32::MAX,
        ..config()
    }
}

/// A worker that lets `honest` products pass and then does as it likes with each.
fn cheat(mut act: impl FnMut(&[u32]) -> Act + Send + 'static) -> Conduct {
    Box::new(move |n, _, product| match n % 2 {
        0 => Act::Answer(product),
        _ => act(&product),
    })
}

/// Asks a worker that cheats every second time; each time it must be found out, as `expected`, and come
/// back for more.
fn caught(times: usize, expected: Fault, conduct: Conduct) {
    let fake = Fake::new(conduct);
    let enclave = enclave(patient(), &fake);
    let mut random = Random::new(3);
    for _ in 0..times {
        for honest in [true, false] {
            enclave.wait();
            enclave.fill();
            assert_eq!(
                enclave.product(0, &random.row(ROWS * WIDTH)),
                honest,
                "{expected:?}"
            );
        }
    }
    enclave.wait();
    let faults: Vec<Fault> = enclave
        .events()
        .into_iter()
        .filter_map(|event| match event {
            Event::Admitted { .. } => None,
            Event::Failed { fault, .. } | Event::SetAside { fault, .. } => Some(fault),
            Event::Quarantined { fault, .. } | Event::GivenUp { fault, .. } => Some(fault),
        })
        .collect();
    assert_eq!(faults, vec![expected; times]);
    let metrics = enclave.offload.metrics();
    assert_eq!(metrics.rows_recomputed, (times * ROWS) as u64);
    let both = (metrics.failures, metrics.misconduct);
    match expected.is_misconduct() {
        true => assert_eq!(both, (0, times as u64)),
        false => assert_eq!(both, (times as u64, 0)),
    }
    assert_eq!(
        fake.connections(),
        times as u64 + 1,
        "matrices are loaded anew"
    );
}

#[test]
fn wrong_products_are_caught_over_the_connection() {
    let mut random = Random::new(4);
    caught(
        300,
        Fault::WrongProduct,
        cheat(move |product| {
            let mut wrong = product.to_vec();
            let at = random.below(wrong.len() as u64) as usize;
            // Bits that leave it an element, most of the time.
            wrong[at] = (wrong[at] ^ 1 << random.below(28)) % ((1 << 29) - 3);
            assert_ne!(wrong, product);
            Act::Answer(wrong)
        }),
    );
    caught(
        30,
        Fault::WrongProduct,
        cheat(|product| {
            let mut wrong = product.to_vec();
            wrong.rotate_left(OUTPUTS);
            Act::Answer(wrong)
        }),
    );
    caught(
        3,
        Fault::WrongProduct,
        cheat(|product| Act::Answer(vec![0; product.len()])),
    );
}

#[test]
fn answers_that_are_replayed_are_caught() {
    let mut last = Vec::new();
    let conduct: Conduct = Box::new(move |n, _, product| match n % 2 {
        0 => {
            last.clone_from(&product);
            Act::Answer(product)
        }
        _ => Act::Answer(last.clone()),
    });
    caught(30, Fault::WrongProduct, conduct);
}

#[test]
fn a_worker_that_computes_with_other_weights_is_caught() {
    let fake = Fake::honest().with_stale_weights();
    let config = Config {
        readmissions: 0,
        ..config()
    };
    let enclave = enclave(config, &fake);
    enclave.wait();
    let mut random = Random::new(3);
    assert!(!enclave.product(0, &random.row(ROWS * WIDTH)));
    assert!(
        !enclave.offload.wait(Duration::from_secs(60)),
        "it is given up"
    );
    let fault = Fault::WrongProduct;
    let expected = [
        Event::Admitted { worker: 0 },
        Event::GivenUp { worker: 0, fault },
    ];
    assert_eq!(enclave.events(), expected);
}

#[test]
fn a_worker_that_holds_other_weights_is_not_admitted() {
    let fake = Fake::honest().that_forgets();
    let config = Config {
        readmissions: 2,
        ..config()
    };
    let enclave = enclave(config, &fake);
    assert!(!enclave.offload.wait(Duration::from_secs(60)));
    let fault = Fault::OtherWeights;
    let quarantined = |readmissions_left| Event::Quarantined {
        worker: 0,
        fault,
        readmissions_left,
    };
    let expected = [
        quarantined(1),
        quarantined(0),
        Event::GivenUp { worker: 0, fault },
    ];
    assert_eq!(enclave.events(), expected);
    assert_eq!((fake.connections(), fake.products()), (3, 0));
}

#[test]
fn garbage_is_caught_and_costs_nothing_but_the_worker() {
    let mut random = Random::new(6);
    caught(
        30,
        Fault::Malformed,
        cheat(move |_| Act::Raw((0..64).map(|_| random.next() as u8).collect())),
    );
    // A frame that is well-formed but not due: too long, too short, another id, another kind, an
    // element that is none.
    let payload = 8 + 4 * ROWS * OUTPUTS;
    let frame = move |kind: u8, length: usize, id: u64, fill: u8| {
        let mut bytes = vec![kind, 1, 0, 0];
        bytes.extend((length as u32).to_le_bytes());
        bytes.extend(id.to_le_bytes());
        bytes.extend([0, 0, 0, 0, ROWS as u8, 0, 0, 0]);
        bytes.resize(16 + payload, fill);
        Act::Raw(bytes)
    };
    const PRODUCT: u8 = 8;
    for (kind, length, id, fill) in [
        (PRODUCT, usize::MAX >> 32, 2, 0),
        (PRODUCT, payload - 4, 2, 0),
        (PRODUCT, payload, 1, 0),
        (PRODUCT, payload, 3, 0),
        (PRODUCT - 1, payload, 2, 0),
        (PRODUCT, payload, 2, 0xFF),
    ] {
        caught(
            2,
            Fault::Malformed,
            cheat(move |_| frame(kind, length, id, fill)),
        );
    }
    // The same with everything as it has to be is an answer, and a wrong one.
    caught(
        2,
        Fault::WrongProduct,
        cheat(move |_| frame(PRODUCT, payload, 2, 0)),
    );
}

#[test]
fn workers_that_are_gone_or_refuse_are_tried_again() {
    caught(5, Fault::Unreachable, cheat(|_| Act::HangUp));
    caught(5, Fault::Unreachable, cheat(|_| Act::Raw(vec![8, 1, 0, 0])));
    caught(5, Fault::Refused, cheat(|_| Act::Refuse));
}

#[test]
fn a_worker_that_does_not_answer_is_not_waited_for() {
    let conduct = cheat(|product| Act::Delay(Duration::from_secs(600), product.to_vec()));
    let fake = Fake::new(conduct);
    let config = Config {
        patience: Duration::from_secs(2),
        aside: Duration::from_secs(3600),
        ..config()
    };
    let enclave = enclave(config, &fake);
    enclave.wait();
    let mut random = Random::new(3);
    assert!(enclave.product(0, &random.row(ROWS * WIDTH)));
    assert!(!enclave.product(0, &random.row(ROWS * WIDTH)));
    // It is not asked again before an hour has passed.
    assert!(!enclave.product(0, &random.row(ROWS * WIDTH)));
    assert_eq!(fake.products(), 2);
    let metrics = enclave.offload.metrics();
    assert_eq!(
        (metrics.rows_recomputed, metrics.rows_without_worker),
        (3, 3)
    );
    assert_eq!((metrics.failures, metrics.misconduct), (1, 0));
    assert_eq!(metrics.set_aside, 1);
}

/// Whatever moves meanwhile: a byte now and then, or a message now and then, each of which is in time.
#[test]
fn a_product_has_one_time_limit_however_it_comes() {
    const MESSAGES: u64 = 40;
    let pause = Duration::from_millis(100);
    let bytes: Conduct = Box::new(move |n, asked, product| match n {
        0..MESSAGES => Act::Answer(product),
        _ => Act::Trickle(pause, frame(asked, &product)),
    });
    let messages: Conduct = Box::new(move |n, _, product| match n {
        0..MESSAGES => Act::Answer(product),
        _ => Act::Delay(pause, product),
    });
    for conduct in [bytes, messages] {
        let config = Config {
            patience: Duration::from_millis(1500),
            rows_at_once: 1,
            aside: Duration::from_secs(3600),
            ..config()
        };
        let enclave = enclave(config, &Fake::new(conduct));
        enclave.wait();
        let x = Random::new(1).row(MESSAGES as usize * WIDTH);
        assert!(enclave.product(0, &x));
        // Four seconds at least, of which no single step takes a tenth of the limit.
        assert!(!enclave.product(0, &x));
        let (worker, fault) = (0, Fault::Late);
        let wait = Duration::from_secs(3600);
        let events = settled(&enclave, 2);
        assert_eq!(
            events[1],
            Event::SetAside {
                worker,
                fault,
                wait
            }
        );
    }
}

/// A frame of PRODUCT.
fn frame(asked: &Multiply, product: &[u32]) -> Vec<u8> {
    let hello = Hello {
        field: Field::P29,
        max_payload: MIN_PAYLOAD,
    };
    let mut bytes = Vec::new();
    let mut responder = Responder::open(&mut bytes, hello, &offer()).unwrap();
    responder.product(asked, product).unwrap();
    let opening = bytes.len() - (24 + 4 * product.len());
    bytes.split_off(opening)
}

/// Events, once there are so many; they are told by another thread.
fn settled(enclave: &Enclave, count: usize) -> Vec<Event> {
    let end = Instant::now() + Duration::from_secs(60);
    while enclave.events().len() < count {
        assert!(Instant::now() < end, "{:?}", enclave.events());
        thread::sleep(Duration::from_millis(5));
    }
    enclave.events()
}

/// Always right, always in time, and of no use.
#[test]
fn a_worker_that_is_always_just_in_time_is_set_aside_for_longer_each_time() {
    let pause = Duration::from_millis(300);
    let fake = Fake::new(Box::new(move |_, _, product| Act::Delay(pause, product)));
    let aside = Duration::from_millis(50);
    let config = Config {
        waiting: Duration::from_secs(1),
        aside,
        ..config()
    };
    let enclave = enclave(config, &fake);
    let mut random = Random::new(3);
    for round in 0..3u32 {
        enclave.wait();
        let mut asked = 0;
        while enclave.events().len() == 1 + 2 * round as usize {
            // Nothing of it is wrong, so nothing is computed again.
            let outside = enclave.product(0, &random.row(ROWS * WIDTH));
            asked += u64::from(outside);
            // The thread that tells is not this one.
            thread::sleep(Duration::from_millis(1));
            assert!(asked <= 40, "it is believed for ever");
        }
        let (worker, fault) = (0, Fault::Slow);
        let wait = aside * (1 << round);
        let told = enclave.events()[1 + 2 * round as usize];
        assert_eq!(
            told,
            Event::SetAside {
                worker,
                fault,
                wait
            }
        );
        enclave.wait();
        settled(&enclave, 3 + 2 * round as usize);
    }
    let metrics = enclave.offload.metrics();
    assert_eq!(
        (metrics.set_aside, metrics.failures, metrics.misconduct),
        (3, 3, 0)
    );
    assert_eq!(metrics.rows_recomputed, 0);
}

/// It keeps the engine waiting and then hangs up, which is another fault each time and costs as much.
#[test]
fn waiting_for_who_then_hangs_up_counts_too() {
    let pause = Duration::from_millis(300);
    let conduct: Conduct = Box::new(move |_, _, _| Act::HangUpAfter(pause));
    let config = Config {
        waiting: Duration::from_millis(1000),
        aside: Duration::from_secs(3600),
        ..config()
    };
    let enclave = enclave(config, &Fake::new(conduct));
    let (worker, fault) = (0, Fault::Unreachable);
    let wait = Duration::from_secs(3600);
    let set_aside = Event::SetAside {
        worker,
        fault,
        wait,
    };
    for asked in 0.. {
        assert!(asked < 40, "{:?}", enclave.events());
        while !enclave.offload.wait(Duration::from_millis(20)) {
            if enclave.events().last() == Some(&set_aside) {
                assert_eq!(enclave.offload.metrics().set_aside, 1);
                return;
            }
        }
        assert!(!enclave.product(0, &Random::new(1).row(WIDTH)));
    }
}

/// Every message of a long product can be the one that fails; then all of it is computed again.
#[test]
fn a_fault_in_any_message_of_a_product_spoils_all_of_it() {
    const MESSAGES: u64 = 7;
    for bad in 0..MESSAGES {
        let conduct: Conduct = Box::new(move |n, _, mut product| {
            if n == bad {
                product[0] ^= 1;
            }
            Act::Answer(product)
        });
        let config = Config {
            rows_at_once: 2,
            ..patient()
        };
        let enclave = enclave(config, &Fake::new(conduct));
        enclave.wait();
        let x = Random::new(bad).row(2 * MESSAGES as usize * WIDTH);
        assert!(!enclave.product(0, &x));
        enclave.wait();
        enclave.fill();
        assert!(enclave.product(0, &x), "and the next time it is right");
        assert_eq!(enclave.offload.metrics().rows_recomputed, 2 * MESSAGES);
    }
}

#[test]
fn rows_that_are_asked_for_again_have_other_pads() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&seen);
    let conduct: Conduct = Box::new(move |_, asked, mut product| {
        noted.lock().unwrap().push(asked.elements.clone());
        product[0] ^= 1;
        Act::Answer(product)
    });
    let enclave = enclave(patient(), &Fake::new(conduct));
    let x = Random::new(8).row(ROWS * WIDTH);
    for _ in 0..20 {
        enclave.wait();
        enclave.fill();
        assert!(!enclave.product(0, &x));
    }
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 20);
    for (i, one) in seen.iter().enumerate() {
        for other in &seen[i + 1..] {
            let same = one.iter().zip(other).filter(|(a, b)| a == b).count();
            assert!(same < 2, "{same} elements came twice");
        }
    }
}

#[test]
fn a_worker_that_cheats_is_given_up_after_as_many_chances_as_allowed() {
    let fake = Fake::new(Box::new(|_, _, mut product| {
        product[0] ^= 1;
        Act::Answer(product)
    }));
    let config = Config {
        readmissions: 2,
        ..config()
    };
    let enclave = enclave(config, &fake);
    let mut random = Random::new(3);
    for chance in 0..3 {
        enclave.wait();
        assert!(!enclave.product(0, &random.row(WIDTH)), "chance {chance}");
    }
    assert!(!enclave.offload.wait(Duration::from_secs(60)), "no more");
    assert!(!enclave.product(0, &random.row(WIDTH)));
    let (worker, fault) = (0, Fault::WrongProduct);
    let quarantined = |readmissions_left| Event::Quarantined {
        worker,
        fault,
        readmissions_left,
    };
    let admitted = Event::Admitted { worker };
    let given_up = Event::GivenUp { worker, fault };
    let expected = [
        admitted,
        quarantined(1),
        admitted,
        quarantined(0),
        admitted,
        given_up,
    ];
    assert_eq!(enclave.events(), expected);
    assert_eq!((fake.connections(), fake.products()), (3, 3));
}

#[test]
fn a_worker_in_quarantine_is_not_asked() {
    let fake = Fake::new(Box::new(|n, _, mut product| {
        product[0] ^= u32::from(n == 0);
        Act::Answer(product)
    }));
    let config = Config {
        quarantine: Duration::from_secs(3600),
        ..config()
    };
    let enclave = enclave(config, &fake);
    enclave.wait();
    let mut random = Random::new(3);
    for _ in 0..4 {
        assert!(!enclave.product(0, &random.row(WIDTH)));
    }
    assert_eq!((fake.connections(), fake.products()), (1, 1));
    assert_eq!(enclave.offload.metrics().rows_without_worker, 3);
}

/// Of two workers either may cheat; both shares are checked.
#[test]
fn either_of_two_workers_is_caught() {
    for culprit in 0..2 {
        let fakes = [0, 1].map(|which| {
            Fake::new(Box::new(move |n, _, mut product| {
                if which == culprit && n == 1 {
                    product[3] ^= 1;
                }
                Act::Answer(product)
            }))
        });
        let workers = Workers::Two(fakes.each_ref().map(Fake::encrypted));
        let matrix = Random::new(99).matrix(OUTPUTS, WIDTH);
        let enclave = Enclave::new(patient(), 5, workers, vec![matrix]);
        let x = Random::new(1).row(ROWS * WIDTH);
        for honest in [true, false, true] {
            enclave.wait();
            assert_eq!(enclave.product(0, &x), honest);
        }
        let blamed = enclave.events().into_iter().find_map(|event| match event {
            Event::Quarantined { worker, fault, .. } => Some((worker, fault)),
            _ => None,
        });
        assert_eq!(blamed, Some((culprit, Fault::WrongProduct)));
        // The other's connection begins anew, without blame.
        assert_eq!(enclave.offload.metrics().misconduct, 1);
        assert_eq!(enclave.offload.metrics().failures, 0);
    }
}
