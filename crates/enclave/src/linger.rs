//! What is still coming of a request that was answered already: it is read and thrown away for a moment.
//!
//! A system that closes a connection on which bytes lie unread tells the other side so at once, and the answer before that
//! may be lost: a user with a wrong API key would learn of a broken connection instead. So whoever is refused while its
//! request still comes may send on for [`MOMENT`], and [`BYTES`]. That takes a connection, and neither a place among those that arrive nor
//! room: nothing is kept of what comes. Where [`MOST`] do so already, the one that has done so for longest ends: it had most
//! time to read its answer, and nobody keeps others from theirs by being refused often.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes, HttpBody as _};
use futures::{Stream, StreamExt as _};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// For how long. The answer is small, and sent when this begins.
pub const MOMENT: Duration = Duration::from_secs(1);
/// For how many bytes: more than any request may have, and so than any that was sent in good faith. The time alone would
/// be hundreds of megabytes from somebody close by.
pub const BYTES: usize = 16 << 20;
/// For how many requests at the same time.
pub const MOST: usize = 64;

/// Throws away the rest of requests.
#[derive(Clone, Default)]
pub struct Lingering(Arc<Mutex<Table>>);

/// Who sends on, oldest first.
#[derive(Default)]
struct Table {
    places: VecDeque<(u64, oneshot::Sender<()>)>,
    next: u64,
}

/// One of the places, free again when this is dropped.
struct Place {
    of: Lingering,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = self.of.table();
        table.places.retain(|(number, _)| *number != self.number);
    }
}

impl Lingering {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place, and what completes when a newcomer needs it.
    fn enter(&self) -> (Place, oneshot::Receiver<()>) {
        let (needed, told) = oneshot::channel();
        let mut table = self.table();
        let number = table.next;
        table.next += 1;
        table.places.push_back((number, needed));
        if table.places.len() > MOST {
            // Dropping its sender tells it.
            table.places.pop_front();
        }
        drop(table);
        let of = self.clone();
        (Place { of, number }, told)
    }

    /// The same body, of which the rest is thrown away if it is dropped before its end.
    pub fn over(&self, body: Body) -> Body {
        if body.is_end_stream() {
            return body;
        }
        Body::from_stream(Rest {
            pieces: Some(body.into_data_stream()),
            of: self.clone(),
        })
    }
}

/// A body, unless it has ended.
struct Rest {
    pieces: Option<BodyDataStream>,
    of: Lingering,
}

impl Stream for Rest {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(pieces) = &mut self.pieces else {
            return Poll::Ready(None);
        };
        let piece = std::task::ready!(pieces.poll_next_unpin(cx));
        if !matches!(piece, Some(Ok(_))) {
            self.pieces = None;
        }
        Poll::Ready(piece)
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        let Some(mut pieces) = self.pieces.take() else {
            return;
        };
        // Outside of a runtime nobody reads: the program ends.
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let (place, needed) = self.of.enter();
        runtime.spawn(async move {
            let _place = place;
            let all = async {
                let mut left = BYTES;
                while let Some(Ok(piece)) = pieces.next().await {
                    left = left.saturating_sub(piece.len());
                    if left == 0 {
                        break;
                    }
                }
            };
            let all_or_needed = async {
                tokio::select! {
                    biased;
                    _ = needed => {}
                    () = all => {}
                }
            };
            let _ = timeout(MOMENT, all_or_needed).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::body::to_bytes;
    use futures::stream;
    use tokio::time::{Instant, sleep};

    use super::*;

    /// A body of one piece each 10 ms, for as long as somebody takes them, and how many were.
    fn endless() -> (Body, Arc<AtomicUsize>) {
        let taken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&taken);
        let pieces = stream::repeat(()).then(move |()| {
            let count = Arc::clone(&count);
            async move {
                sleep(Duration::from_millis(10)).await;
                count.fetch_add(1, Ordering::SeqCst);
                Ok::<_, Infallible>(Bytes::from_static(b"x"))
            }
        });
        (Body::from_stream(pieces), taken)
    }

    fn taken_by(lingering: &Lingering) -> usize {
        lingering.table().places.len()
    }

    #[tokio::test(start_paused = true)]
    async fn the_rest_of_a_refused_request_is_read_for_a_moment_and_no_longer() {
        let lingering = Lingering::default();
        let (body, taken) = endless();
        let mut pieces = lingering.over(body).into_data_stream();
        assert_eq!(pieces.next().await.unwrap().unwrap(), "x");
        drop(pieces);
        sleep(MOMENT / 2).await;
        assert!((45..=55).contains(&taken.load(Ordering::SeqCst)));
        sleep(MOMENT).await;
        let in_all = taken.load(Ordering::SeqCst);
        assert!((95..=105).contains(&in_all), "{in_all}");
        sleep(MOMENT).await;
        assert_eq!(taken.load(Ordering::SeqCst), in_all);
        assert_eq!(taken_by(&lingering), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_sends_fast_is_cut_off_before_the_moment_is_over() {
        const PIECE: usize = 1 << 20;
        let lingering = Lingering::default();
        let taken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&taken);
        let pieces = stream::repeat_with(move || {
            count.fetch_add(PIECE, Ordering::SeqCst);
            Ok::<_, Infallible>(Bytes::from(vec![0; PIECE]))
        });
        let begun = Instant::now();
        drop(lingering.over(Body::from_stream(pieces)));
        while taken_by(&lingering) > 0 {
            sleep(Duration::from_millis(1)).await;
        }
        assert!(begun.elapsed() < MOMENT / 2);
        assert_eq!(taken.load(Ordering::SeqCst), BYTES);
    }

    #[tokio::test(start_paused = true)]
    async fn only_so_many_may_send_on() {
        let lingering = Lingering::default();
        let counts: Vec<_> = (0..MOST + 3)
            .map(|_| {
                let (body, taken) = endless();
                drop(lingering.over(body));
                taken
            })
            .collect();
        assert_eq!(taken_by(&lingering), MOST);
        sleep(2 * MOMENT).await;
        let read: Vec<_> = counts
            .iter()
            .map(|taken| taken.load(Ordering::SeqCst) > 0)
            .collect();
        // Those that were there first make way for the others.
        assert_eq!(read, [vec![false; 3], vec![true; MOST]].concat());
        assert_eq!(taken_by(&lingering), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_refused_often_keeps_nobody_from_its_answer() {
        let lingering = Lingering::default();
        let others = || drop(lingering.over(endless().0));
        for _ in 0..2 * MOST {
            others();
        }
        let (body, taken) = endless();
        drop(lingering.over(body));
        // Nearly as many as take its place.
        for _ in 1..MOST {
            others();
        }
        sleep(MOMENT / 2).await;
        assert!((45..=55).contains(&taken.load(Ordering::SeqCst)));
        others();
        sleep(2 * MOMENT).await;
        assert!((45..=55).contains(&taken.load(Ordering::SeqCst)));
        assert_eq!(taken_by(&lingering), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_read_to_its_end_or_has_none_keeps_nobody() {
        let lingering = Lingering::default();
        let begun = Instant::now();
        drop(lingering.over(Body::empty()));
        let body = lingering.over(Body::from("whole"));
        assert_eq!(to_bytes(body, 10).await.unwrap(), "whole");
        let broken = stream::iter([Ok(Bytes::from_static(b"x")), Err("cut off")]);
        let body = lingering.over(Body::from_stream(broken));
        assert!(to_bytes(body, 10).await.is_err());
        assert_eq!(taken_by(&lingering), 0);
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
