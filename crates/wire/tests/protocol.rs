//! Honest connections, and what any bytes come to.

mod support;

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Duration;

use casemate_field::Field;
use casemate_wire::{Address, Client, MIN_PAYLOAD, Receiver, Request, Shape, Welcome, WireError};
use proptest::prelude::*;
use support::{asked, elements, hear, honest, offer, product, receive, transcript, weight};

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn products_come_as_they_were_asked_for() {
    let (_, worker) = transcript();
    let heard = hear(worker.concat()).unwrap();
    let weights: Vec<i8> = (0..3)
        .flat_map(|row| (0..5).map(move |column| weight(row, column)))
        .collect();
    for (asked, heard) in asked().iter().zip(heard) {
        assert_eq!(heard, product(Field::P29, support::SHAPE, &weights, asked));
    }
}

/// `docs/offload.md` gives these offsets; another implementation could be written from them.
#[test]
fn frames_have_the_documented_bytes() {
    let (client, worker) = transcript();
    let hello = [1, 1, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(
        client[0],
        [&hello[..], b"CMWK", &[1, 0, 0, 0, 0, 0, 16, 0]].concat()
    );
    let load = [
        3, 1, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0,
    ];
    assert_eq!(client[1], load);
    assert_eq!(
        client[2][..16],
        [5, 1, 0, 0, 15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    let multiply = [
        7, 1, 0, 0, 48, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0,
    ];
    assert_eq!(client[3][..24], multiply);
    assert_eq!(client[3][24..28], elements(1)[0].to_le_bytes());

    let welcome = [2, 1, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let offered = [
        1, 0, 4, 0, 0, 0, 16, 0, 0, 0, 0, 4, 0, 0, 0, 0, 100, 0, 0, 8,
    ];
    assert_eq!(worker[0], [&welcome[..], &offered, b"test-1.0"].concat());
    assert_eq!(worker[1], [4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(worker[2][..8], [6, 1, 0, 0, 32, 0, 0, 0]);
    let named = [b"casemate worker matrix v1", &load[16..], &client[2][16..]].concat();
    assert_eq!(worker[2][16..], blake3::hash(&named).as_bytes()[..]);
    let product = [
        8, 1, 0, 0, 32, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0,
    ];
    assert_eq!(worker[3][..24], product);
    let mut refused = vec![];
    casemate_wire::refuse(&mut refused, casemate_wire::Refusal::Busy).unwrap();
    assert_eq!(
        refused,
        [9, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0]
    );
}

#[test]
fn a_matrix_of_several_parts_arrives_whole() {
    let mut honest = honest(Field::P31, offer());
    // Parts end inside of rows: 3 MiB and a bit.
    let shape = Shape {
        rows: 101,
        columns: 31_337,
    };
    let fill = |row: u32, out: &mut [i8]| {
        out.iter_mut()
            .enumerate()
            .for_each(|(column, w)| *w = weight(row, column));
    };
    let mut times = 0;
    let matrix = honest.client.load(shape, fill, |_| times += 1).unwrap();
    assert!(times >= 4, "{times} chances to prolong the time limit");
    assert_eq!((matrix, honest.client.shape(0)), (0, Some(shape)));
    assert_eq!(honest.client.most_rows(0), Some(8));
    let x = elements(31_337);
    honest.client.multiply(matrix, &x).unwrap();
    let mut found = vec![0; 101];
    honest.client.product(&mut found).unwrap();
    let weights: Vec<i8> = (0..101u32)
        .flat_map(|row| (0..31_337).map(move |column| weight(row, column)))
        .collect();
    assert_eq!(found, product(Field::P31, shape, &weights, &x));
}

#[test]
fn most_rows_fit_what_both_take() {
    let mut honest = honest(
        Field::P29,
        Welcome {
            max_rows: 7,
            ..offer()
        },
    );
    let mut load = |rows, columns| {
        let shape = Shape { rows, columns };
        let matrix = honest
            .client
            .load(shape, |_, out| out.fill(1), |_| ())
            .unwrap();
        let most = honest.client.most_rows(matrix).unwrap();
        // As many are served, and one more is not sent.
        let one = vec![1; columns as usize];
        let mut out = vec![0; rows as usize * usize::from(most)];
        honest
            .client
            .multiply(matrix, &one.repeat(most.into()))
            .unwrap();
        honest.client.product(&mut out).unwrap();
        assert!(out.iter().all(|x| *x == columns));
        let more = honest
            .client
            .multiply(matrix, &one.repeat(usize::from(most) + 1));
        assert!(matches!(more, Err(WireError::Misuse(_))), "{more:?}");
        most
    };
    assert_eq!(load(1, 1), 7);
    assert_eq!(load(1, 16_643), 7);
    assert_eq!(load(262_142, 1), 1);
    assert_eq!(load(131_072, 1), 1);
    assert_eq!(load(131_071, 1), 2);
}

#[test]
fn what_cannot_be_is_not_sent() {
    let mut honest = honest(Field::P29, offer());
    let client = &mut honest.client;
    let mut load = |rows, columns, weight: i8| {
        let fill = |_: u32, out: &mut [i8]| out.fill(weight);
        client.load(Shape { rows, columns }, fill, |_| ())
    };
    assert!(matches!(load(0, 1, 1), Err(WireError::Shape { .. })));
    assert!(matches!(load(1, 16_644, 1), Err(WireError::Shape { .. })));
    assert!(matches!(load(262_143, 1, 1), Err(WireError::Shape { .. })));
    assert_eq!(load(2, 3, 1).unwrap(), 0);
    let misuse = |sent: Result<u64, WireError>| {
        assert!(matches!(sent, Err(WireError::Misuse(_))), "{sent:?}")
    };
    misuse(client.multiply(1, &[0; 3]));
    misuse(client.multiply(0, &[]));
    misuse(client.multiply(0, &[0; 4]));
    misuse(client.multiply(0, &[0, 0, Field::P29.modulus()]));
    assert!(matches!(
        client.product(&mut [0; 2]),
        Err(WireError::Misuse(_))
    ));
    client.multiply(0, &[1, 2, 3]).unwrap();
    assert!(matches!(
        client.product(&mut [0; 3]),
        Err(WireError::Misuse(_))
    ));
    // None of it hurt.
    let mut product = [0; 2];
    client.product(&mut product).unwrap();
    assert_eq!(product, [6, 6]);
}

#[test]
fn addresses_are_those_of_sockets() {
    for good in [
        "unix:/run/worker.sock",
        "tcp:127.0.0.1:7000",
        "tcp:[::1]:7000",
    ] {
        assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
    }
    for wrong in [
        "",
        "unix:",
        "tcp:",
        "tcp:host:1",
        "tcp:127.0.0.1",
        "/run/worker.sock",
        "127.0.0.1:7000",
    ] {
        assert!(wrong.parse::<Address>().is_err(), "{wrong}");
    }
}

#[test]
fn both_kinds_of_sockets_carry_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("worker");
    let unix = UnixListener::bind(&path).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let addresses = [Address::Unix(path), Address::Tcp(tcp.local_addr().unwrap())];
    let serving = thread::spawn(move || {
        let unix = unix.accept().unwrap().0;
        support::serve(unix.try_clone().unwrap(), unix, &offer()).unwrap();
        let tcp = tcp.accept().unwrap().0;
        support::serve(tcp.try_clone().unwrap(), tcp, &offer()).unwrap();
    });
    for address in addresses {
        let mut stream = address.connect(PATIENCE).unwrap();
        stream.within(Some(PATIENCE));
        let mut client = Client::open(stream, Field::P29, MIN_PAYLOAD).unwrap();
        assert_eq!(*client.welcome(), offer());
        support::run(&mut client).unwrap();
    }
    serving.join().unwrap();
}

#[test]
fn a_worker_that_is_not_there_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let nobody = Address::Unix(directory.path().join("worker"));
    assert!(nobody.connect(PATIENCE).is_err());
    let long = Address::Unix("/".repeat(200).into());
    assert!(long.connect(PATIENCE).is_err());
}

/// Any beginning of an honest conversation ends in one of two errors, by where it ends.
#[test]
fn a_conversation_cut_anywhere_is_over() {
    let (client, worker) = transcript();
    let ends = |frames: &[Vec<u8>]| {
        let lengths = frames.iter().scan(0, |sum, frame| {
            *sum += frame.len();
            Some(*sum)
        });
        lengths.collect::<Vec<usize>>()
    };
    let bytes = worker.concat();
    for cut in 0..bytes.len() {
        let between = cut == 0 || ends(&worker).contains(&cut);
        match hear(bytes[..cut].to_vec()) {
            Err(WireError::Closed) => assert!(between, "{cut}"),
            Err(WireError::Truncated) => assert!(!between, "{cut}"),
            other => panic!("cut at {cut}: {other:?}"),
        }
    }
    let bytes = client.concat();
    for cut in 0..bytes.len() {
        // A client may leave between requests, but not before HELLO or while its weights are due.
        let ends = ends(&client);
        let may = ends[..1].contains(&cut) || ends[2..].contains(&cut);
        match receive(&bytes[..cut], offer()) {
            Ok(()) => assert!(may, "{cut}"),
            Err(WireError::Closed) => assert!(cut == 0 || cut == ends[1], "{cut}"),
            Err(WireError::Truncated) => assert!(!may && cut != 0 && cut != ends[1], "{cut}"),
            other => panic!("cut at {cut}: {other:?}"),
        }
    }
}

proptest! {
    /// Whatever is asked for is what arrives, and arrives as what is due.
    #[test]
    fn any_honest_conversation_is_understood(
        field in prop::sample::select(&Field::ALL[..]),
        shapes in prop::collection::vec((1..=20u32, 1..=40u32), 1..=3),
        requests in prop::collection::vec((0..3usize, 1..=9usize), 0..=12),
    ) {
        let mut honest = honest(field, offer());
        let fill = |row: u32, out: &mut [i8]| {
            out.iter_mut().enumerate().for_each(|(column, w)| *w = weight(row, column));
        };
        for (rows, columns) in &shapes {
            honest.client.load(Shape { rows: *rows, columns: *columns }, fill, |_| ()).unwrap();
        }
        let mut due = std::collections::VecDeque::new();
        let take = |client: &mut Client<support::Recorded>, due: &mut std::collections::VecDeque<Vec<u32>>| {
            let expected: Vec<u32> = due.pop_front().unwrap();
            let mut found = vec![u32::MAX; expected.len()];
            client.product(&mut found).unwrap();
            assert_eq!(found, expected);
        };
        for (i, (matrix, rows)) in requests.iter().enumerate() {
            let matrix = matrix % shapes.len();
            let (outputs, columns) = shapes[matrix];
            if honest.client.unanswered() == 4 {
                take(&mut honest.client, &mut due);
            }
            let x = elements(rows * columns as usize + i)[i..].to_vec();
            honest.client.multiply(matrix as u32, &x).unwrap();
            let weights: Vec<i8> = (0..outputs)
                .flat_map(|row| (0..columns as usize).map(move |column| weight(row, column)))
                .collect();
            let shape = Shape { rows: outputs, columns };
            due.push_back(product(field, shape, &weights, &x));
        }
        while !due.is_empty() {
            take(&mut honest.client, &mut due);
        }
        drop(honest.client);
        prop_assert!(honest.worker.join().unwrap().is_ok());
    }

    /// Changed bytes never make anybody panic, and what is understood says only what it says.
    #[test]
    fn mutated_conversations_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (client, worker) = CONVERSATION.get_or_init(transcript);
        for (bytes, from_client) in [(client.concat(), true), (worker.concat(), false)] {
            let mut bytes = bytes;
            for (at, value) in &edits {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            if from_client {
                let _ = receive(&bytes, offer());
            } else if let Ok(products) = hear(bytes) {
                prop_assert!(products.iter().all(|product| Field::P29.contains(product)));
            }
        }
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = receive(&bytes, offer());
        let _ = hear(bytes);
    }
}

/// What a client says and what a worker says.
type Conversation = (Vec<Vec<u8>>, Vec<Vec<u8>>);

static CONVERSATION: std::sync::OnceLock<Conversation> = std::sync::OnceLock::new();

/// The reading half says what it was asked, element by element.
#[test]
fn requests_say_what_was_sent() {
    let bytes = transcript().0.concat();
    let mut receiver = Receiver::open(&bytes[..], offer()).unwrap();
    let Request::Load(load) = receiver.request().unwrap() else {
        panic!("LOAD is first");
    };
    assert_eq!((load.matrix, load.shape), (0, support::SHAPE));
    assert!(matches!(receiver.request(), Err(WireError::Misuse(_))));
    let weights = receiver.weights(|_| ()).unwrap();
    assert_eq!(weights.weights[7], weight(1, 2));
    assert!(matches!(
        receiver.weights(|_| ()),
        Err(WireError::Misuse(_))
    ));
    for (asked, number) in asked().into_iter().zip(1..) {
        let Request::Multiply(multiply) = receiver.request().unwrap() else {
            panic!("MULTIPLY is due");
        };
        assert_eq!((multiply.request, multiply.matrix), (number, 0));
        assert_eq!(usize::from(multiply.rows) * 5, asked.len());
        assert_eq!(multiply.elements, asked);
    }
    assert!(!receiver.wait().unwrap());
}
