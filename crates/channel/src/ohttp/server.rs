//! The enclave's half: holds the private keys, opens requests once each, encrypts answers.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::rand;
use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{HeaderMap, Request, Response, StatusCode, header};

use super::chunks::{self, ChunkFault, ChunkReader};
use super::frames::{self, FRAME_DATA_BYTES, padded_frames};
use super::message::{self, ANSWER_END, MessageFault};
use super::replay::{Refusal, ReplayCache};
use super::suite::{
    ANSWER_NONCE_BYTES, AnswerCipher, CryptoFailure, ENC_BYTES, Forged, PrivateKey, PublicKey,
    REQUEST_HEAD_BYTES, RequestOpener, SUITE,
};
use super::{KEY_PROBLEM, PROBLEM_MEDIA_TYPE, TransportError};

/// How many requests a key serves unless the caller says otherwise: at 32 bytes each and the set's
/// overhead, about 24 MiB when full.
const DEFAULT_REPLAY_CAPACITY: usize = 1 << 18;
/// A request of which more than so many bytes came may be refused by its head, and its head must be there. Shorter ones are
/// read to their end, so that nobody sees that they were refused. The largest head is within it, unless it comes in tiny
/// chunks, of which each byte takes eighteen.
pub const LOOKED_AT_EARLY: u64 = 40 << 10;
/// Padding is sealed in runs of this many frames, so that its memory does not grow with the answer.
const PADDING_RUN: u64 = 64;

/// The private keys of a service. Each lives until it expires or is erased; several may live at
/// once, so that requests under the previous key are served while users learn the next.
pub struct Keyring {
    state: Mutex<State>,
    replay_capacity: usize,
}

#[derive(Default)]
struct State {
    /// In the order of generation.
    keys: Vec<Arc<ServerKey>>,
    next_id: u8,
}

struct ServerKey {
    private: PrivateKey,
    id: u8,
    expires_at: u64,
    replay: Mutex<ReplayCache>,
}

/// The public part of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKeyConfig {
    /// The id that requests will name.
    pub id: u8,
    /// The encoded key configuration, as a keyset holds it.
    pub encoded: Vec<u8>,
}

/// Every key id is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("256 keys are alive already")]
pub struct NoFreeKeyId;

/// Why a request was refused before anything of it was believed. None of these is worth an answer
/// inside the channel: there is no channel yet.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Transport(#[source] TransportError),
    /// More bytes than the caller's limit.
    #[error("the request is over the limit of {limit} bytes")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// Not an encapsulated request of our suite.
    #[error("not an encapsulated request")]
    Malformed,
    /// The request was cut off.
    #[error("the request was cut off")]
    Truncated,
    /// Something does not authenticate.
    #[error("the request cannot be decrypted")]
    Forged,
    /// The key it names is not held, or no longer.
    #[error("key {0} is not held")]
    UnknownKey(u8),
    /// The key has served as many requests as it can remember.
    #[error("key {0} is used up")]
    KeyUsedUp(u8),
    /// The same request was served before.
    #[error("the request was sent before")]
    Replayed,
    /// The cryptographic library or the random generator failed.
    #[error("cryptographic failure")]
    Crypto,
}

impl ReceiveError {
    /// Whether attesting again and encrypting to the new key may help the sender.
    pub fn is_about_the_key(&self) -> bool {
        matches!(
            self,
            ReceiveError::UnknownKey(_) | ReceiveError::KeyUsedUp(_)
        )
    }

    /// The answer outside the channel, a problem document that says no more than its type.
    pub fn to_response(&self) -> Response<Bytes> {
        let (status, kind, title) = match self {
            ReceiveError::UnknownKey(_) | ReceiveError::KeyUsedUp(_) => {
                (StatusCode::BAD_REQUEST, KEY_PROBLEM, "the key is not held")
            }
            ReceiveError::TooLarge { .. } => (
                StatusCode::PAYLOAD_TOO_LARGE,
                "about:blank",
                "the request is too large",
            ),
            ReceiveError::Replayed => (
                StatusCode::CONFLICT,
                "about:blank",
                "the request was sent before",
            ),
            ReceiveError::Transport(_)
            | ReceiveError::Malformed
            | ReceiveError::Truncated
            | ReceiveError::Forged
            | ReceiveError::Crypto => (
                StatusCode::BAD_REQUEST,
                "about:blank",
                "the request cannot be opened",
            ),
        };
        let body = format!(
            r#"{{"type":"{kind}","title":"{title}","status":{}}}"#,
            status.as_u16()
        );
        let mut response = Response::new(body.into());
        *response.status_mut() = status;
        let media_type = header::HeaderValue::from_static(PROBLEM_MEDIA_TYPE);
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, media_type);
        response
    }
}

impl From<ChunkFault> for ReceiveError {
    fn from(fault: ChunkFault) -> ReceiveError {
        match fault {
            ChunkFault::Malformed => ReceiveError::Malformed,
            ChunkFault::Truncated => ReceiveError::Truncated,
        }
    }
}

impl From<Forged> for ReceiveError {
    fn from(_: Forged) -> ReceiveError {
        ReceiveError::Forged
    }
}

impl From<CryptoFailure> for ReceiveError {
    fn from(_: CryptoFailure) -> ReceiveError {
        ReceiveError::Crypto
    }
}

/// A request that arrived for the first time.
pub struct Received {
    /// The request; or, if what was decrypted is not one, what to tell its sender inside the channel.
    pub request: Result<Request<Bytes>, MessageFault>,
    /// Which of the keys opened it.
    pub key_id: u8,
    /// Answers it.
    pub responder: Responder,
}

/// A transport of which no more than so many bytes are read.
struct Limited<S> {
    transport: S,
    arrived: u64,
    limit: u64,
}

impl<S, E> Limited<S>
where
    S: Stream<Item = Result<Bytes, E>> + Send + Unpin,
    E: Into<TransportError>,
{
    async fn next(&mut self) -> Result<Option<Bytes>, ReceiveError> {
        let Some(item) = self.transport.next().await else {
            return Ok(None);
        };
        let bytes = item.map_err(|error| ReceiveError::Transport(error.into()))?;
        self.arrived += bytes.len() as u64;
        let limit = self.limit;
        if self.arrived > limit {
            return Err(ReceiveError::TooLarge { limit });
        }
        Ok(Some(bytes))
    }
}

/// Why the rest of a request is not read.
enum Early<R> {
    Refused(R),
    NoRequest(MessageFault),
}

/// What came of a request that may be refused by its head.
pub enum Arrived<R> {
    /// It was read to its end.
    Whole(Box<Received>),
    /// What came first is the beginning of no request, as its `request` says, and of the rest nothing was read.
    NoRequest(Box<Received>),
    /// It was refused, and of the rest nothing was read.
    Refused(R, Responder),
}

impl Default for Keyring {
    fn default() -> Keyring {
        Keyring::new(DEFAULT_REPLAY_CAPACITY)
    }
}

impl Keyring {
    /// An empty keyring whose keys each serve at most `replay_capacity` requests.
    pub fn new(replay_capacity: usize) -> Keyring {
        Keyring {
            state: Mutex::default(),
            replay_capacity,
        }
    }

    /// Makes a key that is held until `expires_at` (seconds since the Unix epoch).
    ///
    /// # Errors
    /// [`NoFreeKeyId`] when 256 keys are held.
    pub fn generate(&self, expires_at: u64) -> Result<PublicKeyConfig, NoFreeKeyId> {
        self.add(expires_at, PrivateKey::generate())
    }

    fn add(
        &self,
        expires_at: u64,
        (private, public): (PrivateKey, PublicKey),
    ) -> Result<PublicKeyConfig, NoFreeKeyId> {
        let mut state = self.state();
        let id = (0..=u8::MAX)
            .map(|i| state.next_id.wrapping_add(i))
            .find(|id| state.keys.iter().all(|key| key.id != *id))
            .ok_or(NoFreeKeyId)?;
        let replay = Mutex::new(ReplayCache::new(self.replay_capacity));
        state.keys.push(Arc::new(ServerKey {
            private,
            id,
            expires_at,
            replay,
        }));
        state.next_id = id.wrapping_add(1);
        Ok(PublicKeyConfig {
            id,
            encoded: public.to_config(id),
        })
    }

    /// As [`Keyring::generate`], with the key derived from `seed`: for test vectors.
    #[cfg(test)]
    pub(super) fn derive(&self, expires_at: u64, seed: &[u8; 32]) -> PublicKeyConfig {
        self.add(expires_at, PrivateKey::derive(seed)).unwrap()
    }

    /// Drops a key. Its memory is cleared when the last request that is being opened with it is.
    pub fn erase(&self, id: u8) {
        self.state().keys.retain(|key| key.id != id);
    }

    /// Drops the keys whose time has come by `now`.
    pub fn erase_expired(&self, now: u64) {
        self.state().keys.retain(|key| now < key.expires_at);
    }

    /// The ids of the keys that are held, oldest first.
    pub fn ids(&self) -> Vec<u8> {
        self.state().keys.iter().map(|key| key.id).collect()
    }

    /// Whether the newest key has served so many requests that it should be succeeded soon.
    pub fn wants_rotation(&self) -> bool {
        self.state()
            .keys
            .last()
            .is_some_and(|key| key.replay().is_filling())
    }

    /// Reads one encapsulated request of at most `limit` bytes from `transport`, and returns it once
    /// its last chunk has been authenticated.
    ///
    /// # Errors
    /// [`ReceiveError`]; the transport is then not worth reading on.
    pub async fn receive<S, E>(
        &self,
        transport: S,
        limit: u64,
        now: u64,
    ) -> Result<Received, ReceiveError>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + Unpin,
        E: Into<TransportError>,
    {
        let anybody = |_: &HeaderMap| Ok::<(), Infallible>(());
        match self.receive_if(transport, limit, now, anybody).await? {
            Arrived::Whole(received) | Arrived::NoRequest(received) => Ok(*received),
            Arrived::Refused(never, _) => match never {},
        }
    }

    /// As [`Keyring::receive`], but asks `admit` about the fields of a request of which more than [`LOOKED_AT_EARLY`] came,
    /// and reads no further if it refuses. Nor if what is there is the head of no request. What is refused so counts as
    /// served: it is not opened again, so nobody can ask again in its sender's name.
    ///
    /// The fields are authentic, as far as anything is that anybody may encrypt. Whether the rest belongs to them shows
    /// only at its end, so nothing else may follow from them.
    ///
    /// # Errors
    /// [`ReceiveError`], as there.
    pub async fn receive_if<S, E, R>(
        &self,
        transport: S,
        limit: u64,
        now: u64,
        admit: impl FnOnce(&HeaderMap) -> Result<(), R>,
    ) -> Result<Arrived<R>, ReceiveError>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + Unpin,
        E: Into<TransportError>,
    {
        let mut transport = Limited {
            transport,
            arrived: 0,
            limit,
        };
        // key id ‖ suite ‖ enc: enough to refuse without opening anything.
        let mut start = Vec::with_capacity(REQUEST_HEAD_BYTES);
        let head = loop {
            start.extend_from_slice(&transport.next().await?.ok_or(ReceiveError::Truncated)?);
            if let Some(head) = start.first_chunk::<REQUEST_HEAD_BYTES>() {
                break head;
            }
        };
        if head[1..1 + SUITE.len()] != SUITE {
            return Err(ReceiveError::Malformed);
        }
        let key = self.key(head[0], now)?;
        let enc = &head[REQUEST_HEAD_BYTES - ENC_BYTES..];
        key.refuse(|replay| replay.check(enc))?;

        let mut opener = RequestOpener::new(head, &key.private)?;
        let mut reader = ChunkReader::new();
        let mut plaintext = Vec::new();
        let mut ready = reader.push(&start[REQUEST_HEAD_BYTES..])?;
        let mut undecided = Some(admit);
        let early = loop {
            for chunk in ready {
                plaintext.extend(opener.open(&chunk, false)?);
            }
            if transport.arrived > LOOKED_AT_EARLY
                && let Some(admit) = undecided.take()
            {
                match message::decode_request_head(&plaintext) {
                    Ok(Some(head)) => {
                        if let Err(refusal) = admit(head.headers()) {
                            break Some(Early::Refused(refusal));
                        }
                    }
                    Ok(None) => {
                        let fault = MessageFault::Limit("head of the request");
                        break Some(Early::NoRequest(fault));
                    }
                    Err(fault) => break Some(Early::NoRequest(fault)),
                }
            }
            match transport.next().await? {
                Some(bytes) => ready = reader.push(&bytes)?,
                None => break None,
            }
        };
        if early.is_none() {
            plaintext.extend(opener.open(&reader.finish()?, true)?);
        }

        // Only a request that was opened may take room in the cache; two copies that were opened at
        // the same time are told apart here.
        key.refuse(|replay| replay.admit(enc))?;

        let mut nonce = [0; ANSWER_NONCE_BYTES];
        rand::fill(&mut nonce).map_err(|_| ReceiveError::Crypto)?;
        let cipher = opener.answer_secret()?.cipher(enc, &nonce)?;
        let sealer = Sealer {
            cipher,
            out: nonce.to_vec(),
            frames: 0,
        };
        let responder = Responder { sealer };
        let received = |request, responder| {
            Box::new(Received {
                request,
                key_id: key.id,
                responder,
            })
        };
        Ok(match early {
            Some(Early::Refused(refusal)) => Arrived::Refused(refusal, responder),
            Some(Early::NoRequest(fault)) => Arrived::NoRequest(received(Err(fault), responder)),
            None => {
                let request = message::decode_request(&plaintext);
                Arrived::Whole(received(request, responder))
            }
        })
    }

    fn key(&self, id: u8, now: u64) -> Result<Arc<ServerKey>, ReceiveError> {
        let state = self.state();
        let key = state
            .keys
            .iter()
            .find(|key| key.id == id && now < key.expires_at);
        key.cloned().ok_or(ReceiveError::UnknownKey(id))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServerKey {
    fn replay(&self) -> MutexGuard<'_, ReplayCache> {
        self.replay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse(
        &self,
        ask: impl FnOnce(&mut ReplayCache) -> Result<(), Refusal>,
    ) -> Result<(), ReceiveError> {
        ask(&mut self.replay()).map_err(|refusal| match refusal {
            Refusal::Seen => ReceiveError::Replayed,
            Refusal::Full => ReceiveError::KeyUsedUp(self.id),
        })
    }
}

/// Encrypts the answer to one request.
pub struct Responder {
    sealer: Sealer,
}

impl Responder {
    /// Turns an answer into the bytes to send. The head leaves at once, and each item of `body` in
    /// the same poll that brought it; an item that is an error is passed on and cuts the answer off,
    /// which the user's half notices. Errors that the user should read are answers like any other.
    pub fn respond<B, E>(
        self,
        status: StatusCode,
        headers: &HeaderMap,
        body: B,
    ) -> Result<impl Stream<Item = Result<Bytes, E>> + Send + use<B, E>, MessageFault>
    where
        B: Stream<Item = Result<Bytes, E>> + Send,
        E: Send,
    {
        let head = message::encode_answer_head(status, headers)?;
        let step = Step::Head(head);
        let state = Some((self.sealer, Box::pin(body), step));
        Ok(futures::stream::unfold(state, |state| async move {
            let (mut sealer, mut body, step) = state?;
            let next = match step {
                Step::Head(head) => {
                    sealer.push(&head);
                    Step::Body
                }
                Step::Body => match next_piece(&mut body).await {
                    Some(Ok(piece)) => {
                        let mut data = Vec::with_capacity(piece.len() + 8);
                        message::encode_answer_piece(&piece, &mut data);
                        sealer.push(&data);
                        Step::Body
                    }
                    Some(Err(error)) => return Some((Err(error), None)),
                    None => {
                        sealer.push(&ANSWER_END);
                        Step::Padding
                    }
                },
                Step::Padding => {
                    let missing = padded_frames(sealer.frames) - sealer.frames;
                    for _ in 0..missing.min(PADDING_RUN) {
                        sealer.push(&[]);
                    }
                    if missing <= PADDING_RUN {
                        return Some((Ok(sealer.finish()), None));
                    }
                    Step::Padding
                }
            };
            Some((Ok(sealer.take()), Some((sealer, body, next))))
        }))
    }
}

enum Step {
    Head(Vec<u8>),
    Body,
    Padding,
}

/// The next item that is not empty.
async fn next_piece<B, E>(body: &mut Pin<Box<B>>) -> Option<Result<Bytes, E>>
where
    B: Stream<Item = Result<Bytes, E>>,
{
    loop {
        match body.next().await {
            Some(Ok(piece)) if piece.is_empty() => {}
            other => return other,
        }
    }
}

struct Sealer {
    cipher: AnswerCipher,
    out: Vec<u8>,
    frames: u64,
}

impl Sealer {
    /// Seals data into as many frames as they need, at least one, each a chunk of its own.
    fn push(&mut self, data: &[u8]) {
        let (first, rest) = data.split_at(data.len().min(FRAME_DATA_BYTES));
        for piece in std::iter::once(first).chain(rest.chunks(FRAME_DATA_BYTES)) {
            let mut chunk = frames::build(piece).to_vec();
            self.cipher
                .seal(&mut chunk, false)
                .expect("sealing a short chunk cannot fail");
            chunks::put(&chunk, &mut self.out);
            self.frames += 1;
        }
    }

    fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.out).into()
    }

    fn finish(mut self) -> Bytes {
        let mut chunk = Vec::new();
        self.cipher
            .seal(&mut chunk, true)
            .expect("sealing nothing cannot fail");
        chunks::put_last(&chunk, &mut self.out);
        self.take()
    }
}
