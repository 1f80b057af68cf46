//! One fault each, and the error that it must be. Everything else about the samples is honest.

mod support;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use casemate_field::Field;
use casemate_wire::{Client, MAX_PAYLOAD, MIN_PAYLOAD, Refusal, Timed, Welcome, WireError};
use support::{hear, offer, receive, transcript};

/// Places of frames in what a client says.
const HELLO: usize = 0;
const LOAD: usize = 1;
const PART: usize = 2;
const FIRST: usize = 3;
const SECOND: usize = 4;

/// And in what a worker says.
const WELCOME: usize = 0;
const READY: usize = 1;
const LOADED: usize = 2;

type Frames = Vec<Vec<u8>>;

/// Overwrites bytes of a frame.
fn put(frames: &mut Frames, frame: usize, at: usize, bytes: &[u8]) {
    frames[frame][at..at + bytes.len()].copy_from_slice(bytes);
}

/// Gives a frame another length, and its payload the same.
fn resize(frames: &mut Frames, frame: usize, payload: usize) {
    frames[frame].resize(16 + payload, 0);
    put(frames, frame, 4, &(payload as u32).to_le_bytes());
}

macro_rules! refused {
    ($of:ident: $($name:ident, $damage:expr => $expected:pat,)*) => {$(
        #[test]
        fn $name() {
            let damage: fn(&mut Frames) = $damage;
            let error = $of(damage);
            assert!(matches!(error, $expected), "{error:?}");
        }
    )*};
}

/// What a worker finds wrong with a client.
fn client(damage: fn(&mut Frames)) -> WireError {
    let mut frames = transcript().0;
    assert!(receive(&frames.concat(), offer()).is_ok());
    damage(&mut frames);
    receive(&frames.concat(), offer()).expect_err("a fault")
}

/// What a client finds wrong with a worker.
fn worker(damage: fn(&mut Frames)) -> WireError {
    let mut frames = transcript().1;
    assert!(hear(frames.concat()).is_ok());
    damage(&mut frames);
    hear(frames.concat()).expect_err("a fault")
}

refused! { client:
    a_client_of_another_protocol, |f| put(f, HELLO, 16, b"GET ") => WireError::Magic,
    a_client_of_another_version, |f| put(f, HELLO, 20, &[2, 0]) => WireError::Version { found: 2 },
    a_hello_with_something_after_its_version, |f| put(f, HELLO, 22, &[1]) => WireError::Reserved { kind: 1 },
    a_hello_without_field, |f| put(f, HELLO, 1, &[0]) => WireError::Field { found: 0, .. },
    a_hello_with_an_unknown_field, |f| put(f, HELLO, 1, &[3]) => WireError::Field { found: 3, .. },
    a_hello_with_an_id, |f| put(f, HELLO, 8, &[1]) => WireError::Id { kind: 1, found: 1, expected: 0 },
    a_hello_that_is_too_long, |f| resize(f, HELLO, 13) => WireError::Length { kind: 1, found: 13, expected: 12 },
    a_client_that_takes_too_little, |f| put(f, HELLO, 24, &(MIN_PAYLOAD - 1).to_le_bytes())
        => WireError::Limit { found: 1_048_575, .. },
    a_client_that_takes_too_much, |f| put(f, HELLO, 24, &(MAX_PAYLOAD + 1).to_le_bytes())
        => WireError::Limit { found: 67_108_865, .. },
    a_client_that_does_not_open, |f| drop(f.remove(HELLO)) => WireError::Kind { found: 3, expected: "HELLO" },
    a_second_hello, |f| f.insert(1, f[0].clone()) => WireError::Kind { found: 1, .. },
    a_frame_of_no_known_type, |f| put(f, LOAD, 0, &[77]) => WireError::Kind { found: 77, .. },
    a_frame_that_only_workers_send, |f| put(f, FIRST, 0, &[8]) => WireError::Kind { found: 8, .. },
    a_header_with_flags, |f| put(f, FIRST, 2, &[1]) => WireError::Reserved { kind: 7 },

    a_matrix_in_another_field, |f| put(f, LOAD, 1, &[2]) => WireError::Field { found: 2, .. },
    a_matrix_out_of_order, |f| put(f, LOAD, 8, &[1]) => WireError::Id { kind: 3, found: 1, expected: 0 },
    a_matrix_again, |f| { let again = [f[LOAD].clone(), f[PART].clone()]; f.splice(3..3, again); }
        => WireError::Id { kind: 3, found: 0, expected: 1 },
    a_load_that_is_too_short, |f| resize(f, LOAD, 7) => WireError::Length { kind: 3, found: 7, expected: 8 },
    a_matrix_without_rows, |f| put(f, LOAD, 16, &[0]) => WireError::Shape { rows: 0, columns: 5 },
    a_matrix_without_columns, |f| put(f, LOAD, 20, &[0]) => WireError::Shape { rows: 3, columns: 0 },
    a_matrix_too_wide_for_the_field, |f| put(f, LOAD, 20, &16_644u32.to_le_bytes())
        => WireError::Shape { rows: 3, columns: 16_644 },
    a_matrix_whose_product_fits_no_frame, |f| put(f, LOAD, 16, &262_143u32.to_le_bytes())
        => WireError::Shape { rows: 262_143, .. },
    a_matrix_beyond_the_memory, |f| { put(f, LOAD, 16, &10_000u32.to_le_bytes()); put(f, LOAD, 20, &10_000u32.to_le_bytes()); }
        => WireError::Memory { needed: 100_000_000, left: 67_108_864 },
    weights_under_another_number, |f| put(f, PART, 8, &[1]) => WireError::Id { kind: 5, found: 1, expected: 0 },
    weights_in_another_field, |f| put(f, PART, 1, &[2]) => WireError::Field { found: 2, .. },
    too_few_weights, |f| resize(f, PART, 14) => WireError::Length { kind: 5, found: 14, expected: 15 },
    too_many_weights, |f| resize(f, PART, 16) => WireError::Length { kind: 5, found: 16, expected: 15 },
    a_weight_without_counterpart, |f| put(f, PART, 16 + 9, &[0x80]) => WireError::Weight { index: 9 },
    a_product_before_the_weights, |f| f.swap(PART, FIRST) => WireError::Kind { found: 7, expected: "PART" },
    weights_that_nobody_announced, |f| drop(f.remove(LOAD)) => WireError::Kind { found: 5, .. },

    a_request_again, |f| f.insert(SECOND, f[FIRST].clone()) => WireError::Id { kind: 7, found: 1, expected: 2 },
    requests_in_another_order, |f| f.swap(FIRST, SECOND) => WireError::Id { kind: 7, found: 2, expected: 1 },
    a_request_left_out, |f| drop(f.remove(FIRST)) => WireError::Id { kind: 7, found: 2, expected: 1 },
    a_request_in_another_field, |f| put(f, FIRST, 1, &[2]) => WireError::Field { found: 2, .. },
    a_request_with_an_unknown_matrix, |f| put(f, FIRST, 16, &[1]) => WireError::Matrix { found: 1 },
    a_request_of_no_rows, |f| put(f, FIRST, 20, &[0, 0]) => WireError::Rows { found: 0, .. },
    a_request_of_too_many_rows, |f| put(f, FIRST, 20, &[101, 0])
        => WireError::TooLarge { what: "rows", found: 101, limit: 100 },
    a_request_of_fewer_rows_than_it_carries, |f| put(f, FIRST, 20, &[1, 0])
        => WireError::Length { kind: 7, found: 48, expected: 28 },
    a_request_with_something_after_its_rows, |f| put(f, FIRST, 22, &[1]) => WireError::Reserved { kind: 7 },
    a_request_that_is_too_large, |f| put(f, FIRST, 4, &(MIN_PAYLOAD + 1).to_le_bytes())
        => WireError::TooLarge { what: "bytes of a payload", found: 1_048_577, limit: 1_048_576 },
    a_request_without_elements, |f| resize(f, FIRST, 8) => WireError::Length { kind: 7, found: 8, expected: 12 },
    an_element_that_is_p, |f| put(f, FIRST, 24 + 4 * 7, &Field::P29.modulus().to_le_bytes())
        => WireError::Element { index: 7 },
    an_element_above_p, |f| put(f, SECOND, 24 + 4 * 4, &[255; 4]) => WireError::Element { index: 4 },
    a_request_that_ends_early, |f| { f[SECOND].pop(); } => WireError::Truncated,
    a_header_that_ends_early, |f| f[SECOND].truncate(15) => WireError::Truncated,
    a_client_that_says_nothing, |f| f.clear() => WireError::Closed,
}

refused! { worker:
    a_worker_of_another_version, |f| put(f, WELCOME, 16, &[2, 0]) => WireError::Version { found: 2 },
    a_worker_in_another_field, |f| put(f, WELCOME, 1, &[2]) => WireError::Field { found: 2, .. },
    a_welcome_with_an_id, |f| put(f, WELCOME, 8, &[1]) => WireError::Id { kind: 2, found: 1, expected: 0 },
    a_worker_without_window, |f| put(f, WELCOME, 18, &[0, 0]) => WireError::Limit { what: "the window", found: 0 },
    a_worker_with_too_large_a_window, |f| put(f, WELCOME, 18, &[65, 0]) => WireError::Limit { what: "the window", found: 65 },
    a_worker_that_takes_too_little, |f| put(f, WELCOME, 20, &[0; 4]) => WireError::Limit { found: 0, .. },
    a_worker_that_takes_too_much, |f| put(f, WELCOME, 20, &(MAX_PAYLOAD + 1).to_le_bytes())
        => WireError::Limit { found: 67_108_865, .. },
    a_worker_that_takes_no_rows, |f| put(f, WELCOME, 32, &[0, 0]) => WireError::Limit { what: "the most rows", found: 0 },
    a_welcome_with_something_before_its_name, |f| put(f, WELCOME, 34, &[1]) => WireError::Reserved { kind: 2 },
    a_name_of_another_length, |f| put(f, WELCOME, 35, &[7]) => WireError::Length { kind: 2, found: 28, expected: 27 },
    no_name, |f| { resize(f, WELCOME, 20); put(f, WELCOME, 35, &[0]); } => WireError::Length { kind: 2, found: 20, expected: 21 },
    a_name_that_is_too_long, |f| { resize(f, WELCOME, 53); put(f, WELCOME, 35, &[33]); }
        => WireError::Length { kind: 2, found: 53, expected: 52 },
    a_name_that_moves_the_cursor, |f| put(f, WELCOME, 36, b"\x1b[2J") => WireError::Name,
    a_name_that_is_no_text, |f| put(f, WELCOME, 36, &[0xff]) => WireError::Name,
    a_worker_that_does_not_open, |f| drop(f.remove(WELCOME)) => WireError::Kind { found: 4, expected: "WELCOME" },

    ready_for_another_matrix, |f| put(f, READY, 8, &[1]) => WireError::Id { kind: 4, found: 1, expected: 0 },
    ready_with_a_payload, |f| resize(f, READY, 1) => WireError::Length { kind: 4, found: 1, expected: 0 },
    loaded_before_it_was_sent, |f| drop(f.remove(READY)) => WireError::Kind { found: 6, expected: "READY" },
    another_matrix_was_loaded, |f| put(f, LOADED, 8, &[1]) => WireError::Id { kind: 6, found: 1, expected: 0 },
    other_weights_were_loaded, |f| { f[LOADED][20] ^= 1; } => WireError::Digest { matrix: 0 },
    a_digest_of_another_length, |f| resize(f, LOADED, 33) => WireError::Length { kind: 6, found: 33, expected: 32 },

    a_product_again, |f| { f[SECOND] = f[FIRST].clone(); } => WireError::Id { kind: 8, found: 1, expected: 2 },
    products_in_another_order, |f| f.swap(FIRST, SECOND) => WireError::Id { kind: 8, found: 2, expected: 1 },
    a_product_left_out, |f| drop(f.remove(FIRST)) => WireError::Id { kind: 8, found: 2, expected: 1 },
    a_product_in_another_field, |f| put(f, FIRST, 1, &[2]) => WireError::Field { found: 2, .. },
    a_product_of_another_length, |f| resize(f, FIRST, 28) => WireError::Length { kind: 8, found: 28, expected: 32 },
    a_product_that_is_too_large, |f| put(f, FIRST, 4, &[255; 4])
        => WireError::Length { kind: 8, found: u32::MAX, expected: 32 },
    a_product_with_another_matrix, |f| put(f, FIRST, 16, &[1]) => WireError::Matrix { found: 1 },
    a_product_of_other_rows, |f| put(f, FIRST, 20, &[1]) => WireError::Rows { found: 1, .. },
    a_product_with_something_after_its_rows, |f| put(f, FIRST, 22, &[1]) => WireError::Reserved { kind: 8 },
    a_product_with_flags, |f| put(f, FIRST, 3, &[1]) => WireError::Reserved { kind: 8 },
    a_product_with_p_in_it, |f| put(f, FIRST, 24 + 4 * 5, &Field::P29.modulus().to_le_bytes())
        => WireError::Element { index: 5 },
    a_product_that_ends_early, |f| { f[SECOND].pop(); } => WireError::Truncated,
    a_worker_that_leaves, |f| f.truncate(SECOND) => WireError::Closed,
    an_error_in_a_field, |f| f[FIRST] = error(1, 0, &[1, 0]) => WireError::Field { found: 1, .. },
    an_error_with_an_id, |f| f[FIRST] = error(0, 1, &[1, 0]) => WireError::Id { kind: 9, found: 1, expected: 0 },
    an_error_with_a_text, |f| f[FIRST] = error(0, 0, b"rm -rf /") => WireError::Length { kind: 9, found: 8, expected: 2 },
    an_error_of_an_unknown_code, |f| f[FIRST] = error(0, 0, &[99, 0]) => WireError::Refused(Refusal::Failed),
    an_error_instead_of_a_welcome, |f| f[WELCOME] = error(0, 0, &[5, 0]) => WireError::Refused(Refusal::Busy),
    an_error_instead_of_ready, |f| f[READY] = error(0, 0, &[4, 0]) => WireError::Refused(Refusal::Memory),
}

fn error(field: u8, id: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![
        9,
        field,
        0,
        0,
        payload.len() as u8,
        0,
        0,
        0,
        id,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    frame.extend(payload);
    frame
}

#[test]
fn every_refusal_has_its_code() {
    for (refusal, code) in Refusal::ALL.into_iter().zip(1u16..) {
        let mut frames = transcript().1;
        frames[FIRST] = error(0, 0, &code.to_le_bytes());
        let heard = hear(frames.concat()).expect_err("a refusal");
        assert!(
            matches!(heard, WireError::Refused(found) if found == refusal),
            "{heard:?}"
        );
    }
}

#[test]
fn a_connection_is_over_after_a_fault() {
    let mut frames = transcript().1;
    frames[FIRST][24] ^= 1;
    put(&mut frames, SECOND, 8, &[3]);
    let script = support::Script::new(frames.concat());
    let mut client = Client::open(script, Field::P29, MIN_PAYLOAD).unwrap();
    assert!(matches!(
        support::run(&mut client),
        Err(WireError::Id { .. })
    ));
    // The frame that was due is there now, and nobody reads it.
    assert!(matches!(client.product(&mut [0; 3]), Err(WireError::Over)));
    assert!(matches!(client.multiply(0, &[0; 5]), Err(WireError::Over)));
    let load = client.load(support::SHAPE, |_, _| (), |_| ());
    assert!(matches!(load, Err(WireError::Over)));
}

/// What the worker says is not sent whole at once, and slower and slower.
fn trickle(bytes: Vec<u8>, mut stream: UnixStream) {
    thread::spawn(move || {
        for byte in bytes {
            // Ends when the client has gone.
            if stream.write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        thread::sleep(Duration::from_secs(30));
    });
}

/// Each byte comes well within the limit, all of them do not.
#[test]
fn a_worker_that_sends_a_byte_now_and_then_is_late() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    trickle(transcript().1.concat(), theirs);
    let mut stream = Timed::unix(ours);
    stream.within(Some(Duration::from_millis(300)));
    let opened = Client::open(stream, Field::P29, MIN_PAYLOAD);
    assert!(matches!(opened, Err(WireError::Late)), "{:?}", opened.err());
}

#[test]
fn a_worker_that_says_nothing_is_late() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut stream = Timed::unix(ours);
    stream.within(Some(Duration::from_millis(100)));
    let opened = Client::open(stream, Field::P29, MIN_PAYLOAD);
    assert!(matches!(opened, Err(WireError::Late)), "{:?}", opened.err());
}

#[test]
fn a_worker_that_takes_nothing_is_late() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let (_, worker) = transcript();
    let mut theirs_writing = theirs.try_clone().unwrap();
    theirs_writing
        .write_all(&worker[..READY + 1].concat())
        .unwrap();
    ours.flush().unwrap();
    let mut client = Client::open(Timed::unix(ours), Field::P29, MIN_PAYLOAD).unwrap();
    // Larger than any buffer of a socket, and READY is there; nobody reads a part.
    let shape = casemate_wire::Shape {
        rows: 4096,
        columns: 4096,
    };
    let limit = Some(Duration::from_millis(200));
    let loaded = client.load(shape, |_, out| out.fill(1), |stream| stream.within(limit));
    assert!(matches!(loaded, Err(WireError::Late)), "{loaded:?}");
    drop(theirs);
}

/// A worker with a small window, and a client that would ask for more.
#[test]
fn the_window_bounds_what_is_on_its_way() {
    let small = Welcome {
        window: 2,
        ..offer()
    };
    let mut honest = support::honest(Field::P31, small);
    let fill = |_: u32, out: &mut [i8]| out.fill(3);
    let matrix = honest.client.load(support::SHAPE, fill, |_| ()).unwrap();
    honest.client.multiply(matrix, &[1; 5]).unwrap();
    honest.client.multiply(matrix, &[2; 5]).unwrap();
    let third = honest.client.multiply(matrix, &[3; 5]);
    assert!(matches!(third, Err(WireError::WindowFull)));
    let load = honest.client.load(support::SHAPE, fill, |_| ());
    assert!(matches!(load, Err(WireError::Misuse(_))));
    // Neither was sent, and both are possible later.
    let mut product = [0; 3];
    assert_eq!(honest.client.product(&mut product).unwrap().request, 1);
    assert_eq!(product, [15; 3]);
    honest.client.multiply(matrix, &[3; 5]).unwrap();
    honest.client.product(&mut product).unwrap();
    honest.client.product(&mut product).unwrap();
    assert_eq!(product, [45; 3]);
    assert_eq!(honest.client.unanswered(), 0);
}
