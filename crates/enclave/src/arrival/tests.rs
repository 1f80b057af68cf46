use std::convert::Infallible;

use futures::channel::mpsc;
use futures::future::join_all;
use futures::stream;
use tokio::time::sleep;

use super::*;
use crate::bodies::Bodies;

async fn sends(arriving: &Arriving, bytes: usize) {
    let piece = Ok::<_, Infallible>(Bytes::from(vec![0; bytes]));
    let _ = arriving.counted(stream::iter([piece])).count().await;
}

#[tokio::test(start_paused = true)]
async fn uploads_that_trickle_lock_nobody_out() {
    let (arrivals, bodies) = (Arrivals::new(8), Arc::default());
    for _ in 0..8 {
        let hostile = arrivals.enter().await.unwrap();
        tokio::spawn(async move {
            let trickle = async {
                loop {
                    sends(&hostile, 1).await;
                    sleep(Duration::from_millis(100)).await;
                }
            };
            tokio::select! {
                () = trickle => {}
                () = hostile.overdue() => {}
            }
        });
    }
    sleep(Duration::from_secs(1)).await;
    // All places at once, without waiting for any limit, and no honest one is given up for another.
    let start = Instant::now();
    let honest = (0..8).map(|_| uploads(&arrivals, &bodies, 64 << 10, 100));
    let honest = join_all(honest);
    let one_more = async {
        sleep(Duration::from_secs(1)).await;
        assert!(arrivals.enter().await.is_none(), "all hurry");
    };
    let (honest, ()) = tokio::join!(honest, one_more);
    assert!(honest.into_iter().all(|arrived| arrived));
    assert_eq!(start.elapsed(), Duration::from_secs(10));
    assert_eq!(arrivals.free(), 8);
}

#[tokio::test(start_paused = true)]
async fn who_has_arrived_or_left_is_not_asked_to_give_way() {
    let arrivals = Arc::new(Arrivals::new(2));
    drop(arrivals.enter().await.unwrap());
    let _arrived = arrivals.enter().await.unwrap().arrived();
    sleep(Duration::from_secs(1)).await;
    let hostile = arrivals.enter().await.unwrap();
    tokio::spawn(async move { hostile.overdue().await });
    sleep(Duration::from_secs(1)).await;
    let start = Instant::now();
    assert!(arrivals.enter().await.is_some());
    assert!(start.elapsed() < UNHURRIED);
}

#[tokio::test(start_paused = true)]
async fn who_sends_too_slowly_is_given_up() {
    let arrivals = Arrivals::new(1);
    let start = Instant::now();
    arrivals.enter().await.unwrap().overdue().await;
    assert_eq!(start.elapsed(), ALLOWANCE);

    // A second's worth for each second is enough, up to the longest time.
    let arriving = arrivals.enter().await.unwrap();
    let start = Instant::now();
    let steady = async {
        loop {
            sends(&arriving, RATE as usize).await;
            sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        () = steady => {}
        () = arriving.overdue() => {}
    }
    assert_eq!(start.elapsed(), ARRIVAL);
}

/// Begins an upload of that many bytes at once, and then of `more` each second; it leaves its place when it is overdue.
async fn stalls(arrivals: &Arrivals, bodies: &Arc<Bodies>, at_once: usize, more: usize) {
    let arriving = arrivals.enter().await.unwrap();
    let room = Arc::new(bodies.room());
    let (send, transport) = mpsc::unbounded();
    let mut kept = arriving.kept(&room, transport.map(Ok::<_, Full>)).boxed();
    send.unbounded_send(zeros(at_once)).unwrap();
    kept.next().await.unwrap().unwrap();
    tokio::spawn(async move {
        let _room = room;
        let trickle = async {
            loop {
                sleep(Duration::from_secs(1)).await;
                send.unbounded_send(zeros(more)).unwrap();
                kept.next().await.unwrap().unwrap();
            }
        };
        tokio::select! {
            () = trickle => {}
            () = arriving.overdue() => {}
        }
    });
}

fn zeros(bytes: usize) -> Bytes {
    Bytes::from(vec![0; bytes])
}

/// Uploads that many bytes evenly, in so many tenths of a second; whether all arrived.
async fn uploads(arrivals: &Arrivals, bodies: &Arc<Bodies>, bytes: usize, tenths: u32) -> bool {
    let Some(arriving) = arrivals.enter().await else {
        return false;
    };
    let room = Arc::new(bodies.room());
    let piece = zeros(bytes / tenths as usize);
    let pieces = stream::iter(0..tenths).then(move |_| {
        let piece = piece.clone();
        async move {
            sleep(Duration::from_millis(100)).await;
            Ok::<_, Full>(piece)
        }
    });
    let mut kept = arriving.kept(&room, pieces).boxed();
    let all = async {
        while let Some(piece) = kept.next().await {
            if piece.is_err() {
                return false;
            }
        }
        true
    };
    tokio::select! {
        all = all => all,
        () = arriving.overdue() => false,
    }
}

#[tokio::test(start_paused = true)]
async fn a_burst_keeps_no_place_once_it_has_stopped() {
    const PLACES: usize = 64;
    let (arrivals, bodies) = (Arrivals::new(PLACES), Arc::default());
    // More than twice, so that places are taken from bursts that came when there were none.
    for _ in 0..3 {
        let bursts = (0..PLACES).map(|_| stalls(&arrivals, &bodies, 128 << 10, 0));
        join_all(bursts).await;
        assert_eq!(arrivals.free(), 0);
        // Who comes right after the bursts waits, and is not turned away.
        let start = Instant::now();
        let honest = (0..PLACES).map(|_| uploads(&arrivals, &bodies, 1000, 1));
        assert!(join_all(honest).await.into_iter().all(|arrived| arrived));
        assert!(start.elapsed() <= ATTEMPTS * UNHURRIED + Duration::from_millis(100));
    }
    // Who comes later does not even wait.
    let bursts = (0..PLACES).map(|_| stalls(&arrivals, &bodies, 128 << 10, 0));
    join_all(bursts).await;
    sleep(AHEAD + UNHURRIED).await;
    let start = Instant::now();
    let honest = (0..PLACES).map(|_| arrivals.enter());
    let honest = join_all(honest).await;
    assert!(honest.iter().all(Option::is_some));
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn bytes_that_only_lie_there_give_way() {
    // Many small bodies that stop; few large ones that go on at the least rate.
    for (senders, at_once, more) in [(640, 100 << 10, 0), (6, (8 << 20) - 1000, RATE as usize)] {
        let (arrivals, bodies) = (Arrivals::new(1024), Arc::<Bodies>::default());
        let hostile = (0..senders).map(|_| stalls(&arrivals, &bodies, at_once, more));
        join_all(hostile).await;
        let held = bodies.held();
        assert!(held > 47 << 20, "{held}");
        // Nobody is behind yet, and nobody waits for it.
        let start = Instant::now();
        let large = bodies.room();
        assert!(grow(&arrivals.arriving, &large, 4 << 20).await.is_err());
        assert_eq!(start.elapsed(), Duration::ZERO);

        sleep(Duration::from_secs(3)).await;
        let start = Instant::now();
        let honest = (0..8).map(|_| uploads(&arrivals, &bodies, 4 << 20, 20));
        assert!(join_all(honest).await.into_iter().all(|arrived| arrived));
        assert_eq!(start.elapsed(), Duration::from_secs(2), "nobody waited");
        let left = lock(&arrivals.arriving).senders.len();
        assert!(0 < left && left < senders, "{left}: no more than needed");
    }
}

#[tokio::test(start_paused = true)]
async fn who_holds_much_for_long_gives_way_before_who_holds_little() {
    let (arrivals, bodies) = (Arrivals::new(8), Arc::<Bodies>::default());
    // Stopped sooner, but that frees nothing.
    stalls(&arrivals, &bodies, 1, 0).await;
    sleep(Duration::from_secs(1)).await;
    let large = (0..5).map(|_| stalls(&arrivals, &bodies, 8 << 20, 0));
    join_all(large).await;
    sleep(Duration::from_secs(1)).await;
    assert!(uploads(&arrivals, &bodies, 16 << 20, 4).await);
    // The small one is still there, and as many of the large ones as there is room for beside the newcomer.
    assert_eq!(lock(&arrivals.arriving).senders.len(), 4);
    assert_eq!(bodies.held(), 3 * (8 << 20) + 1);
}

#[tokio::test(start_paused = true)]
async fn who_comes_evenly_never_gives_way() {
    let (arrivals, bodies) = (Arrivals::new(2), Arc::<Bodies>::default());
    // As slowly as the time allows, and in bursts with pauses that are no longer than a burst counts.
    let even = uploads(&arrivals, &bodies, 8 << 20, 299);
    let bursts = uploads(&arrivals, &bodies, 200 << 10, 200);
    let newcomers = async {
        for _ in 0..15 {
            assert!(arrivals.enter().await.is_none(), "both hurry");
            let large = bodies.room();
            assert!(grow(&arrivals.arriving, &large, 48 << 20).await.is_err());
        }
    };
    let (even, bursts, ()) = tokio::join!(even, bursts, newcomers);
    assert!(even && bursts);
}

#[tokio::test(start_paused = true)]
async fn a_burst_may_rest_while_nobody_needs_its_place() {
    let arrivals = Arrivals::new(2);
    let small = arrivals.enter().await.unwrap();
    sends(&small, 1000).await;
    let large = arrivals.enter().await.unwrap();
    sends(&large, 64 << 10).await;
    // As long as its bytes count at the least rate, and the allowance.
    let start = Instant::now();
    let (small, large) = tokio::join!(
        async {
            small.overdue().await;
            start.elapsed()
        },
        async {
            large.overdue().await;
            start.elapsed()
        }
    );
    assert!(small >= ALLOWANCE, "{small:?}");
    assert_eq!(large, ALLOWANCE + Duration::from_secs(16));
}
