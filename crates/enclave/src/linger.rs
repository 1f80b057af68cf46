//! What is still coming of a request that was answered already: it is read and thrown away for a moment.
//!
//! A system that closes a connection on which bytes lie unread tells the other side so at once, and the answer before that
//! may be lost: a user with a wrong API key would learn of a broken connection instead. So whoever is refused while its
//! request still comes may send on for [`MOMENT`]. That takes a connection, and neither a place among those that arrive nor
//! room: nothing is kept of what comes. Where [`MOST`] do so already, the connection is closed on the next one.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes, HttpBody as _};
use futures::{Stream, StreamExt as _};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// For how long. The answer is small, and sent when this begins.
pub const MOMENT: Duration = Duration::from_secs(1);
/// For how many requests at the same time.
pub const MOST: usize = 64;

/// Throws away the rest of requests.
#[derive(Clone)]
pub struct Lingering(Arc<Semaphore>);

impl Default for Lingering {
    fn default() -> Lingering {
        Lingering(Arc::new(Semaphore::new(MOST)))
    }
}

impl Lingering {
    /// The same body, of which the rest is thrown away if it is dropped before its end.
    pub fn over(&self, body: Body) -> Body {
        if body.is_end_stream() {
            return body;
        }
        Body::from_stream(Rest {
            pieces: Some(body.into_data_stream()),
            places: Arc::clone(&self.0),
        })
    }
}

/// A body, unless it has ended.
struct Rest {
    pieces: Option<BodyDataStream>,
    places: Arc<Semaphore>,
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
        let (Ok(place), Ok(runtime)) = (
            Arc::clone(&self.places).try_acquire_owned(),
            Handle::try_current(),
        ) else {
            return;
        };
        runtime.spawn(async move {
            let _place = place;
            let all = async { while let Some(Ok(_)) = pieces.next().await {} };
            let _ = timeout(MOMENT, all).await;
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
        assert_eq!(lingering.0.available_permits(), MOST);
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
        assert_eq!(lingering.0.available_permits(), 0);
        sleep(2 * MOMENT).await;
        let read = counts
            .iter()
            .filter(|taken| taken.load(Ordering::SeqCst) > 0);
        assert_eq!(read.count(), MOST);
        assert_eq!(lingering.0.available_permits(), MOST);
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
        assert_eq!(lingering.0.available_permits(), MOST);
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
