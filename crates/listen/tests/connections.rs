//! Hostile and honest clients over streams in memory, with time that only passes when nothing else happens.

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Extension;
use axum::routing::{get, post};
use axum::serve::Listener;
use casemate_listen::{Counters, Ended, Establish, Limits, Server};
use futures::stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

const REQUEST: &[u8] = b"GET /quick HTTP/1.1\r\nhost: x\r\n\r\n";
const HEAD: Duration = Duration::from_secs(10);
const IDLE: Duration = Duration::from_secs(60);
const STALLED: Duration = Duration::from_secs(30);
const GRACE: Duration = Duration::from_secs(20);

/// Accepts streams that the test made.
struct InMemory(mpsc::UnboundedReceiver<DuplexStream>);

impl Listener for InMemory {
    type Io = DuplexStream;
    type Addr = ();

    async fn accept(&mut self) -> (DuplexStream, ()) {
        match self.0.recv().await {
            Some(stream) => (stream, ()),
            None => pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

struct Served {
    connect: mpsc::UnboundedSender<DuplexStream>,
    counters: Arc<Counters>,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Ended>,
}

/// A body of `pieces` pieces, one each second.
fn slow(pieces: u32) -> Body {
    Body::from_stream(stream::unfold(pieces, |left| async move {
        if left == 0 {
            return None;
        }
        sleep(Duration::from_secs(1)).await;
        Some((Ok::<_, io::Error>(Bytes::from("piece\n")), left - 1))
    }))
}

fn router() -> Router {
    Router::new()
        .route("/quick", get(|| async { "done" }))
        .route("/minutes", get(|| async { slow(600) }))
        .route("/seconds", get(|| async { slow(5) }))
        .route("/large", get(|| async { vec![b'x'; 1 << 20] }))
        .route("/body", post(|body: Bytes| async move { body }))
}

fn limits(connections: usize) -> Limits {
    Limits {
        connections,
        head: HEAD,
        idle: IDLE,
        stalled: STALLED,
        head_bytes: 8192,
        grace: GRACE,
    }
}

fn serve(connections: usize) -> Served {
    serve_with(connections, router())
}

fn serve_with(connections: usize, establish: impl Establish<DuplexStream>) -> Served {
    let (connect, streams) = mpsc::unbounded_channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let server = Server::new(limits(connections));
    let counters = server.counters();
    let ended = tokio::spawn(server.serve(InMemory(streams), establish, async {
        let _ = stopped.await;
    }));
    Served {
        connect,
        counters,
        stop,
        ended,
    }
}

impl Served {
    fn connect(&self) -> DuplexStream {
        let (client, server) = duplex(4096);
        self.connect.send(server).unwrap();
        client
    }
}

/// Sends a request and reads its answer, whose body is `done`.
async fn ask(stream: &mut DuplexStream) -> io::Result<()> {
    stream.write_all(REQUEST).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"done") {
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    assert!(answer.starts_with(b"HTTP/1.1 200"));
    Ok(())
}

/// How long it takes until the server closes the stream.
async fn closed_after(stream: &mut DuplexStream) -> Duration {
    let start = Instant::now();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    start.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_is_closed_when_its_head_is_due() {
    let served = serve(4);
    let waited = closed_after(&mut served.connect()).await;
    assert_eq!(waited.as_secs(), HEAD.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_head_that_trickles_in_is_not_waited_for() {
    let served = serve(4);
    let mut stream = served.connect();
    let start = Instant::now();
    for byte in REQUEST.iter().cycle() {
        sleep(Duration::from_secs(1)).await;
        if stream.write_all(&[*byte]).await.is_err() {
            break;
        }
    }
    let noticed = HEAD..HEAD + Duration::from_secs(2);
    assert!(noticed.contains(&start.elapsed()));
}

#[tokio::test(start_paused = true)]
async fn a_kept_connection_may_wait_longer_for_a_request_than_for_the_rest_of_its_head() {
    let served = serve(4);
    let mut stream = served.connect();
    ask(&mut stream).await.unwrap();
    sleep(IDLE - Duration::from_secs(1)).await;
    ask(&mut stream).await.unwrap();
    sleep(Duration::from_secs(30)).await;
    stream.write_all(b"GET").await.unwrap();
    assert_eq!(closed_after(&mut stream).await.as_secs(), HEAD.as_secs());

    let mut stream = served.connect();
    ask(&mut stream).await.unwrap();
    assert_eq!(closed_after(&mut stream).await.as_secs(), IDLE.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_long_answer_is_not_cut() {
    let served = serve(1);
    let mut stream = served.connect();
    let request = b"GET /minutes HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert!(answer.ends_with(b"0\r\n\r\n"), "the answer is whole");
    assert_eq!(
        String::from_utf8_lossy(&answer).matches("piece").count(),
        600
    );
}

#[tokio::test(start_paused = true)]
async fn who_does_not_read_is_given_up() {
    let served = serve(4);
    let mut stream = served.connect();
    let request = b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let start = Instant::now();
    while served.counters.open() > 0 || start.elapsed().is_zero() {
        sleep(Duration::from_secs(1)).await;
        assert!(start.elapsed() < 2 * STALLED, "still held");
    }
    assert!(start.elapsed() >= STALLED);

    // As little as a byte now and then is not reading.
    let mut stream = served.connect();
    let request = b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let start = Instant::now();
    while served.counters.open() > 0 || start.elapsed().is_zero() {
        sleep(Duration::from_secs(1)).await;
        let _ = stream.read_u8().await;
        assert!(start.elapsed() < 2 * STALLED, "still held");
    }

    // Who reads slowly, but reads, gets everything.
    let mut stream = served.connect();
    let request = b"GET /large HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut read = 0;
    let mut buffer = [0; 4096];
    loop {
        sleep(STALLED / 6).await;
        match stream.read(&mut buffer).await.unwrap() {
            0 => break,
            bytes => read += bytes,
        }
    }
    assert!(read > 1 << 20, "{read}");
}

#[tokio::test(start_paused = true)]
async fn who_read_everything_has_the_whole_time_again() {
    let served = serve(4);
    let mut stream = served.connect();
    let mut body = vec![0; 1 << 20];
    for _ in 0..3 {
        let request = b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n";
        stream.write_all(request).await.unwrap();
        sleep(STALLED - Duration::from_secs(1)).await;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        stream.read_exact(&mut body).await.unwrap();
        sleep(STALLED + Duration::from_secs(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn idle_connections_lock_nobody_out() {
    let served = serve(8);
    let start = Instant::now();
    // Silent, in the middle of a head, and kept after an answer: each fills all places.
    let mut streams = Vec::new();
    for number in 0..24 {
        let mut stream = served.connect();
        match number % 3 {
            0 => {}
            1 => stream.write_all(b"GET /qu").await.unwrap(),
            _ => ask(&mut stream).await.unwrap(),
        }
        streams.push(stream);
        sleep(Duration::from_millis(1)).await;
    }
    for _ in 0..4 {
        let mut honest = served.connect();
        ask(&mut honest).await.unwrap();
        streams.push(honest);
    }
    // Nobody had to wait for a time limit.
    assert!(start.elapsed() < Duration::from_secs(1));
    // The oldest had to go, and only as many as needed.
    assert_eq!((served.counters.open(), served.counters.evicted()), (8, 20));
    for gone in &mut streams[..20] {
        assert!(closed_after(gone).await.is_zero());
    }
    for open in &mut streams[20..] {
        let closes = timeout(Duration::from_secs(1), closed_after(open)).await;
        assert!(closes.is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn an_old_connection_that_was_used_lately_outlives_younger_ones() {
    let served = serve(2);
    let mut old = served.connect();
    ask(&mut old).await.unwrap();
    let mut young = served.connect();
    ask(&mut young).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    ask(&mut old).await.unwrap();
    ask(&mut served.connect()).await.unwrap();
    assert!(closed_after(&mut young).await.is_zero());
    ask(&mut old).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_does_not_take_the_end_of_an_answer_gives_way() {
    let served = serve(4);
    let start = Instant::now();
    let mut hostile = Vec::new();
    for _ in 0..4 {
        let mut stream = served.connect();
        let request = b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n";
        stream.write_all(request).await.unwrap();
        hostile.push(stream);
    }
    sleep(Duration::from_millis(10)).await;
    for _ in 0..4 {
        ask(&mut served.connect()).await.unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(served.counters.evicted() >= 1);
}

#[tokio::test(start_paused = true)]
async fn connections_in_use_do_not_give_way() {
    let served = serve(2);
    let mut streams: Vec<_> = (0..2).map(|_| served.connect()).collect();
    for stream in &mut streams {
        let request = b"GET /seconds HTTP/1.1\r\nhost: x\r\n\r\n";
        stream.write_all(request).await.unwrap();
    }
    sleep(Duration::from_millis(10)).await;
    let start = Instant::now();
    let mut newcomer = served.connect();
    let (first, asked) = tokio::join!(
        async {
            let mut answer = Vec::new();
            while !answer.ends_with(b"0\r\n\r\n") {
                assert_ne!(streams[0].read_buf(&mut answer).await.unwrap(), 0);
            }
            start.elapsed()
        },
        async {
            ask(&mut newcomer).await.unwrap();
            start.elapsed()
        }
    );
    assert_eq!(first.as_secs(), 4, "five seconds, less what has passed");
    // As soon as one of the two became idle, and not when its idle time was over.
    assert!(asked >= first && asked < first + Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn stopping_lets_running_answers_end() {
    let served = serve(8);
    let mut running = served.connect();
    let request = b"GET /seconds HTTP/1.1\r\nhost: x\r\n\r\n";
    running.write_all(request).await.unwrap();
    let mut kept = served.connect();
    ask(&mut kept).await.unwrap();
    let mut silent = served.connect();
    sleep(Duration::from_millis(10)).await;

    let start = Instant::now();
    served.stop.send(()).unwrap();
    assert!(closed_after(&mut kept).await.is_zero());
    assert!(closed_after(&mut silent).await.is_zero());
    let mut answer = Vec::new();
    running.read_to_end(&mut answer).await.unwrap();
    assert!(answer.ends_with(b"0\r\n\r\n"), "the answer is whole");
    assert_eq!(served.ended.await.unwrap(), Ended { cut_off: 0 });
    assert_eq!(start.elapsed().as_secs(), 4);
    assert!(served.connect.is_closed(), "the listener is gone");
}

#[tokio::test(start_paused = true)]
async fn stopping_is_bounded() {
    let served = serve(8);
    let mut running = served.connect();
    let request = b"GET /minutes HTTP/1.1\r\nhost: x\r\n\r\n";
    running.write_all(request).await.unwrap();
    sleep(Duration::from_millis(10)).await;
    let start = Instant::now();
    served.stop.send(()).unwrap();
    let reader = tokio::spawn(async move { closed_after(&mut running).await });
    assert_eq!(served.ended.await.unwrap(), Ended { cut_off: 1 });
    assert_eq!(start.elapsed().as_secs(), GRACE.as_secs());
    reader.await.unwrap();
    assert_eq!(served.counters.open(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_head_has_a_largest_size() {
    let served = serve(8);
    let mut stream = served.connect();
    let head = format!(
        "GET /quick HTTP/1.1\r\nlong: {}\r\n\r\n",
        "x".repeat(20_000)
    );
    let mut answer = Vec::new();
    let (_, _) = {
        let (mut read, mut write) = tokio::io::split(&mut stream);
        tokio::join!(
            async { write.write_all(head.as_bytes()).await.is_ok() },
            async { read.read_to_end(&mut answer).await.is_ok() }
        )
    };
    assert!(answer.starts_with(b"HTTP/1.1 431"));
    ask(&mut served.connect()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_closes_its_half_has_hung_up() {
    let served = serve(8);
    let mut stream = served.connect();
    let request = b"GET /minutes HTTP/1.1\r\nhost: x\r\n\r\n";
    stream.write_all(request).await.unwrap();
    sleep(Duration::from_millis(1500)).await;
    assert_eq!(served.counters.open(), 1);
    stream.shutdown().await.unwrap();
    sleep(Duration::from_millis(1500)).await;
    assert_eq!(served.counters.open(), 0);
}

/// Expects one byte before HTTP and hands it to every request.
struct Greeting;

impl Establish<DuplexStream> for Greeting {
    type Io = DuplexStream;

    async fn establish(&self, mut stream: DuplexStream) -> io::Result<(DuplexStream, Router)> {
        let byte = stream.read_u8().await?;
        if byte == b'!' {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let router = Router::new()
            .route(
                "/quick",
                get(|Extension(byte): Extension<u8>| async move { [byte] }),
            )
            .layer(Extension(byte));
        Ok((stream, router))
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_learnt_of_a_connection_reaches_its_requests() {
    let served = serve_with(8, Greeting);
    // One that never finishes its handshake holds up nobody else.
    let mut silent = served.connect();
    for byte in [b'a', b'b'] {
        let mut stream = served.connect();
        stream.write_all(&[byte]).await.unwrap();
        for _ in 0..2 {
            stream.write_all(REQUEST).await.unwrap();
            let mut answer = Vec::new();
            while !answer.ends_with(&[b'\n', byte]) {
                assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0);
            }
        }
    }
    let mut refused = served.connect();
    refused.write_all(b"!").await.unwrap();
    assert!(closed_after(&mut refused).await.is_zero());
    assert_eq!(closed_after(&mut silent).await.as_secs(), HEAD.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_arrive_is_the_handlers_to_limit() {
    let served = serve(1);
    let mut stream = served.connect();
    let head = b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n";
    stream.write_all(head).await.unwrap();
    sleep(10 * IDLE).await;
    stream.write_all(b"done").await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"done") {
        assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0);
    }
    let waits = timeout(IDLE - Duration::from_secs(1), stream.read_u8()).await;
    assert!(waits.is_err(), "kept for the next request");
}
