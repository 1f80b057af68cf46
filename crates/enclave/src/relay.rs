//! Requests that reach a replica which cannot open them, and what it does about it: it carries them, as ciphertext, to
//! the replica that can. `docs/channel.md`, section 7, is the specification.
//!
//! Anybody can send anything here, so nothing that arrives decides where this room connects to, how often it asks, or
//! what it sends beside the ciphertext: addresses, path and fields come from the measured configuration and from
//! constants, and peers are asked for their keysets at a rate that no number of requests raises.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Response, StatusCode, header};
use casemate_channel::keyset::KeysetDigest;
use casemate_channel::ohttp::{
    ANSWER_MEDIA_TYPE, GATEWAY_PATH, KEYSET_HINT, KEYSETS_PATH, PROBLEM_MEDIA_TYPE, RELAYED_MARK,
    REQUEST_MEDIA_TYPE,
};
use futures::{Stream, StreamExt as _};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::arrival::Arrivals;
use crate::config::Peer;
use crate::metrics::Metrics;
use crate::refusal::Refusal;

/// Relays at the same time, from the first byte of a request to the last one of its answer.
pub const RELAYS: usize = 256;
/// Requests that may wait until the peers were asked for their keysets.
const WAITING: usize = 64;
/// The least time between two questions to the peers.
const PAUSE: Duration = Duration::from_millis(250);
/// The longest time for connecting to a peer.
const CONNECT: Duration = Duration::from_secs(1);
/// The longest time for a peer to list its keysets.
const LISTING: Duration = Duration::from_secs(2);
/// The most keysets of one peer that are remembered: as many keys as one replica can hold.
pub const MAX_KEYSETS: usize = 256;
/// The longest list of keysets that is read, in bytes.
const MAX_LIST: usize = 32 << 10;
/// The longest refusal of a peer that is passed on, in bytes.
const MAX_REFUSAL: usize = 4 << 10;

/// The keysets of one replica, as it lists them.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeysetList {
    /// Digests in hexadecimal.
    pub keysets: Vec<String>,
}

impl KeysetList {
    /// The digests in a list that a peer sent, the first [`MAX_KEYSETS`] of them; nothing if it is no such list.
    #[must_use]
    pub fn digests(list: &[u8]) -> Option<Vec<KeysetDigest>> {
        let list: KeysetList = serde_json::from_slice(list).ok()?;
        let digests = list.keysets.iter().take(MAX_KEYSETS);
        digests.map(|text| text.parse().ok()).collect()
    }
}

/// Which keyset the sender names, if any, and whether another replica relayed the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// The keyset that the request claims to be encrypted to.
    pub keyset: Option<KeysetDigest>,
    /// Whether it came from another replica, or says so.
    pub relayed: bool,
}

impl Hint {
    /// Reads the fields outside the encapsulation. Nothing for fields that are repeated or not of their one form.
    pub fn of(headers: &HeaderMap) -> Option<Hint> {
        let only = |name: &str| {
            let mut values = headers.get_all(name).iter();
            match (values.next(), values.next()) {
                (None, _) => Some(None),
                (Some(value), None) => value.to_str().ok().map(Some),
                (Some(_), Some(_)) => None,
            }
        };
        let keyset = match only(KEYSET_HINT)? {
            None => None,
            Some(text) => Some(text.parse().ok()?),
        };
        let relayed = match only(RELAYED_MARK)? {
            None => false,
            Some("1") => true,
            Some(_) => return None,
        };
        Some(Hint { keyset, relayed })
    }
}

/// The other replicas of this service.
pub struct Peers {
    directory: Arc<Directory>,
    /// When the last question that was finished began; held while they are asked.
    asked: Arc<tokio::sync::Mutex<Option<Instant>>>,
    waiting: Semaphore,
    places: Arrivals,
    metrics: Arc<Metrics>,
    limits: Limits,
}

/// Who the others are, and what they hold.
struct Directory {
    http: reqwest::Client,
    peers: Vec<Peer>,
    /// Who held which keyset when it last answered: at most [`MAX_KEYSETS`] for each peer.
    known: Mutex<HashMap<KeysetDigest, usize>>,
}

/// How much of a request is carried.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The largest request, in bytes.
    pub bytes: u64,
    /// The longest time for it to arrive.
    pub arrival: Duration,
}

/// Where a keyset was found.
enum Found {
    At(usize),
    Nowhere,
    TooManyWait,
}

impl Peers {
    /// The replicas at `peers`. Connects to nobody yet.
    ///
    /// # Errors
    /// When the system gives no HTTP client.
    pub fn new(
        peers: Vec<Peer>,
        limits: Limits,
        metrics: Arc<Metrics>,
    ) -> Result<Peers, reqwest::Error> {
        let http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .tls_certs_only([])
            .connect_timeout(CONNECT)
            // A connection that waited in a pool may be dead, and a request that was sent into it cannot be sent
            // again: nobody knows whether it was served.
            .pool_max_idle_per_host(0)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(15))
            .build()?;
        Ok(Peers {
            directory: Arc::new(Directory {
                http,
                peers,
                known: Mutex::default(),
            }),
            asked: Arc::default(),
            waiting: Semaphore::new(WAITING),
            places: Arrivals::new(RELAYS),
            metrics,
            limits,
        })
    }

    /// Carries an encapsulated request to the peer that holds `keyset`, and its answer back as it comes.
    ///
    /// # Errors
    /// [`Refusal`], by the peer or by this replica.
    pub async fn relay<S, E>(
        &self,
        keyset: &KeysetDigest,
        transport: S,
    ) -> Result<Response<Body>, Refusal>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let Directory { http, peers, .. } = &*self.directory;
        if peers.is_empty() {
            return Err(Refusal::key_unknown());
        }
        let peer = match self.find(keyset).await {
            Found::At(peer) => peer,
            Found::Nowhere => return Err(Refusal::key_unknown()),
            Found::TooManyWait => return Err(Refusal::TooManyRelayed),
        };
        let place = self.places.enter().await;
        let arriving = place.ok_or(Refusal::TooManyRelayed)?;
        let (finished, mut end) = oneshot::channel();
        let deadline = Instant::now() + self.limits.arrival;
        let body = self.bounded(arriving.counted(transport), deadline, finished);
        let mut sent = pin!(
            http.post(peers[peer].join(GATEWAY_PATH))
                .header(header::CONTENT_TYPE, REQUEST_MEDIA_TYPE)
                .header(KEYSET_HINT, keyset.to_string())
                .header(RELAYED_MARK, "1")
                .body(reqwest::Body::wrap_stream(body))
                .send()
        );
        // Looked at here and not where pieces are taken: nobody takes any while the peer does not read.
        let (sent, place) = tokio::select! {
            // Perhaps before the end of the request, of which its head is enough to be refused.
            sent = &mut sent => (sent, arriving.arrived()),
            Ok(()) = &mut end => {
                let place = arriving.arrived();
                (sent.await, place)
            }
            _ = timeout_at(deadline, arriving.overdue()) => return Err(Refusal::TooSlow),
        };
        match sent {
            Ok(answer) => self.pass(keyset, answer, place).await,
            Err(error) if error.is_connect() => {
                // Nothing was sent, so nothing was served.
                self.directory.forget(peer);
                tracing::warn!(peer = %peers[peer], "a peer cannot be reached");
                Err(Refusal::key_unknown())
            }
            // Cut off, by the sender or the peer; whether it was served is unknown.
            Err(_) => Err(Refusal::BadGateway("the relayed request was cut off\n")),
        }
    }

    /// The peer's answer, if it is one of those that a replica gives.
    async fn pass(
        &self,
        keyset: &KeysetDigest,
        answer: reqwest::Response,
        place: OwnedSemaphorePermit,
    ) -> Result<Response<Body>, Refusal> {
        let status = answer.status();
        let is = |media_type: &str| {
            answer
                .headers()
                .get(header::CONTENT_TYPE)
                .is_some_and(|value| value == media_type)
        };
        if status == StatusCode::OK && is(ANSWER_MEDIA_TYPE) {
            self.metrics.relayed();
            let running = self.metrics.relay_runs();
            let stream = answer.bytes_stream().map(move |piece| {
                let _held_to_the_end = (&place, &running);
                piece
            });
            return Ok(encapsulated(Body::from_stream(stream)));
        }
        let problem = is(PROBLEM_MEDIA_TYPE);
        Err(match status {
            StatusCode::MISDIRECTED_REQUEST => {
                self.directory.known().remove(keyset);
                Refusal::key_unknown()
            }
            StatusCode::BAD_REQUEST | StatusCode::CONFLICT | StatusCode::PAYLOAD_TOO_LARGE
                if problem =>
            {
                match read(answer, MAX_REFUSAL).await {
                    Some(document) => Refusal::ByPeer(status, document),
                    None => Refusal::BadGateway("a peer's refusal is too long\n"),
                }
            }
            StatusCode::SERVICE_UNAVAILABLE => Refusal::TooManyRelayed,
            StatusCode::REQUEST_TIMEOUT => Refusal::TooSlow,
            _ => Refusal::BadGateway("a peer's answer makes no sense\n"),
        })
    }

    /// The peer that holds `keyset`, by memory or by asking all of them. One question serves everybody who waits for
    /// it, and questions keep their distance, so requests under made-up keysets cause no more of them.
    async fn find(&self, keyset: &KeysetDigest) -> Found {
        let known = || self.directory.known().get(keyset).copied();
        if let Some(peer) = known() {
            return Found::At(peer);
        }
        let Ok(_waiting) = self.waiting.try_acquire() else {
            return Found::TooManyWait;
        };
        let arrived = Instant::now();
        let mut asked = Arc::clone(&self.asked).lock_owned().await;
        if asked.is_none_or(|began| began < arrived) {
            let directory = Arc::clone(&self.directory);
            // The question is everybody's: whoever caused it may leave, and the others still get its answer.
            let question = tokio::spawn(async move {
                if let Some(began) = *asked {
                    sleep_until(began + PAUSE).await;
                }
                let began = Instant::now();
                directory.ask().await;
                *asked = Some(began);
            });
            let _ = question.await;
        }
        known().map_or(Found::Nowhere, Found::At)
    }

    /// The request's bytes, which fail when they are too many or late, also when its answer is there already; `finished` is
    /// told of their end.
    fn bounded<S, E>(
        &self,
        transport: S,
        deadline: Instant,
        finished: oneshot::Sender<()>,
    ) -> impl Stream<Item = Result<Bytes, Cut>> + Send + use<S, E>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let state = (Box::pin(transport), self.limits.bytes, finished);
        futures::stream::try_unfold(state, move |(mut transport, left, finished)| async move {
            let next = timeout_at(deadline, transport.next()).await;
            match next.map_err(|_| Cut::TooLate)? {
                None => {
                    let _ = finished.send(());
                    Ok(None)
                }
                Some(Err(error)) => Err(Cut::Transport(error.into())),
                Some(Ok(piece)) => {
                    let left = left.checked_sub(piece.len() as u64).ok_or(Cut::TooLarge)?;
                    Ok(Some((piece, (transport, left, finished))))
                }
            }
        })
    }
}

impl Directory {
    /// Asks all peers at the same time. What a peer held is remembered if it does not answer: it may only be slow, and
    /// one that is gone is forgotten when it cannot be connected to.
    async fn ask(&self) {
        let lists = (0..self.peers.len()).map(|peer| self.list(peer));
        let lists = futures::future::join_all(lists).await;
        let mut known = self.known();
        known.retain(|_, holder| lists[*holder].is_none());
        for (peer, list) in lists.into_iter().enumerate() {
            known.extend(list.into_iter().flatten().map(|digest| (digest, peer)));
        }
    }

    /// The keysets of one peer; nothing if it does not answer as a replica does.
    async fn list(&self, peer: usize) -> Option<Vec<KeysetDigest>> {
        let ask = async {
            let url = self.peers[peer].join(KEYSETS_PATH);
            let answer = self.http.get(url).send().await.ok()?;
            if answer.status() != StatusCode::OK {
                return None;
            }
            KeysetList::digests(&read(answer, MAX_LIST).await?)
        };
        let list = timeout(LISTING, ask).await.ok().flatten();
        if list.is_none() {
            tracing::debug!(peer = %self.peers[peer], "a peer lists no keysets");
        }
        list
    }

    fn forget(&self, peer: usize) {
        self.known().retain(|_, holder| *holder != peer);
    }

    fn known(&self) -> MutexGuard<'_, HashMap<KeysetDigest, usize>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why the rest of a request is not carried.
#[derive(Debug, thiserror::Error)]
enum Cut {
    #[error("the connection failed: {0}")]
    Transport(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the request is too large")]
    TooLarge,
    #[error("the request did not arrive in time")]
    TooLate,
}

/// At most `limit` bytes of an answer's body; nothing if there are more, or the connection fails.
async fn read(mut answer: reqwest::Response, limit: usize) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(piece) = answer.chunk().await.ok()? {
        if body.len() + piece.len() > limit {
            return None;
        }
        body.extend_from_slice(&piece);
    }
    Some(body)
}

/// An encapsulated answer, with the fields it has on any path.
pub fn encapsulated(body: Body) -> Response<Body> {
    Response::builder()
        .header(header::CONTENT_TYPE, ANSWER_MEDIA_TYPE)
        .header(header::CACHE_CONTROL, "no-store")
        // Asks proxies in between to pass each piece on at once.
        .header("x-accel-buffering", "no")
        .body(body)
        .expect("constant headers are valid")
}

#[cfg(test)]
mod tests;
