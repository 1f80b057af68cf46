//! Receipts at the proxy: fetched through the encrypted channel, verified, completed with the attestation of their
//! keyset, handed out or saved (docs/receipts.md, section 4).

use std::fmt::Display;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use casemate_channel::ohttp::Answer;
use casemate_channel::receipt::{
    Bundle, FetchedReceipt, MAX_FETCHED, RECEIPT_FIELD, RECEIPTS_PATH, RequestId, SignedReceipt,
};
use casemate_container::atomic_file::{AtomicFile, Mode, Replace};
use futures::{Stream, StreamExt};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio::sync::Semaphore;
use tracing::{info, warn};

use super::forward::{Failure, carry, exchange, send_direct};
use super::refusal::Refusal;
use super::session::{Current, Session};

/// Receipts that are being saved at the same time.
const SAVING: usize = 32;
/// How often an unfinished answer's receipt is asked for: the service learns a moment later that its client left.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(250);
/// How long receipts may still be saved after a request to stop.
const GRACE: Duration = Duration::from_secs(5);

/// Why there is no bundle.
pub(super) enum NoBundle {
    /// The service's own answer, such as that it knows no such receipt.
    Answer(StatusCode, HeaderMap, Bytes),
    Refusal(Refusal),
}

impl From<Refusal> for NoBundle {
    fn from(refusal: Refusal) -> NoBundle {
        NoBundle::Refusal(refusal)
    }
}

/// The request that fetches a receipt, with the credentials of the one that it is about.
pub(super) fn request_for(
    id: &RequestId,
    authorization: Option<&HeaderValue>,
) -> http::Request<Bytes> {
    let mut request = http::Request::new(Bytes::new());
    *request.uri_mut() = format!("{RECEIPTS_PATH}{id}")
        .parse()
        .expect("a request id is safe in a path");
    if let Some(value) = authorization {
        request
            .headers_mut()
            .insert(header::AUTHORIZATION, value.clone());
    }
    request
}

/// Completes what the service answered to [`request_for`], asked under `asked`; none over attested TLS.
pub(super) async fn complete(
    session: &Session,
    asked: Option<&Arc<Current>>,
    id: &RequestId,
    status: StatusCode,
    headers: HeaderMap,
    body: impl Stream<Item = Result<Bytes, impl Display>> + Unpin,
) -> Result<Bundle, NoBundle> {
    let bad_gateway = |code, message: String| Refusal::new(StatusCode::BAD_GATEWAY, code, message);
    let body = read(body)
        .await
        .map_err(|error| bad_gateway("answer_refused", error.to_string()))?;
    if status != StatusCode::OK {
        return Err(NoBundle::Answer(status, headers, body));
    }
    let refused = |error: &dyn Display| {
        bad_gateway(
            "receipt_refused",
            format!("the service's receipt does not hold: {error}"),
        )
    };
    let fetched = FetchedReceipt::from_json(&body, id).map_err(|error| refused(&error))?;
    let signed = SignedReceipt::parse(&fetched.receipt).map_err(|error| refused(&error))?;
    let digest = &signed.unverified().keyset_digest;
    let asked = asked.filter(|asked| asked.service.keyset_digest() == digest);
    let Some(current) = session.of_keyset(digest).or_else(|| asked.cloned()) else {
        let message = "this proxy does not have the evidence of the receipt's keyset: it was started since, or has \
                       seen many keysets since";
        return Err(Refusal::new(StatusCode::NOT_FOUND, "evidence_not_kept", message).into());
    };
    signed
        .verify(&current.service)
        .map_err(|error| refused(&error))?;
    Ok(Bundle {
        fetched,
        attestation: current.attestation.clone(),
    })
}

/// Completes the service's answer to `request`, or looks under other keysets if it knows no such receipt.
pub(super) async fn anywhere(
    session: &Session,
    asked: &Arc<Current>,
    id: &RequestId,
    request: &http::Request<Bytes>,
    answer: Answer,
) -> Result<Bundle, NoBundle> {
    let Answer {
        status,
        headers,
        body,
    } = answer;
    match complete(session, Some(asked), id, status, headers, body).await {
        Err(NoBundle::Answer(StatusCode::NOT_FOUND, headers, body)) => {
            let found = elsewhere(session, asked, id, request).await;
            found.unwrap_or(Err(NoBundle::Answer(StatusCode::NOT_FOUND, headers, body)))
        }
        other => other,
    }
}

/// Asks for a receipt under every other keyset that may still be used: another replica may have made it. One that is gone,
/// or has no such receipt, is passed over.
async fn elsewhere(
    session: &Session,
    asked: &Current,
    id: &RequestId,
    request: &http::Request<Bytes>,
) -> Option<Result<Bundle, NoBundle>> {
    for other in session.others(asked) {
        let Ok(answer) = exchange(session, &other, request).await else {
            continue;
        };
        let (status, headers) = (answer.status, answer.headers);
        match complete(session, Some(&other), id, status, headers, answer.body).await {
            Err(NoBundle::Answer(..)) => {}
            found => return Some(found),
        }
    }
    None
}

async fn read<E>(mut body: impl Stream<Item = Result<Bytes, E>> + Unpin) -> Result<Bytes, E> {
    let mut bytes = BytesMut::new();
    while let Some(piece) = body.next().await {
        let piece = piece?;
        // One byte over the limit is enough to be refused by size.
        let room = (MAX_FETCHED + 1).saturating_sub(bytes.len());
        bytes.extend_from_slice(&piece[..piece.len().min(room)]);
    }
    Ok(bytes.freeze())
}

/// Saves a bundle for each answer, in a directory.
#[derive(Clone)]
pub(super) struct Saver {
    directory: Arc<PathBuf>,
    places: Arc<Semaphore>,
}

impl Saver {
    pub(super) fn new(directory: PathBuf) -> Saver {
        Saver {
            directory: Arc::new(directory),
            places: Arc::new(Semaphore::new(SAVING)),
        }
    }

    /// Waits for what is being saved, but not for ever.
    pub(super) async fn finish(&self) {
        let all = self.places.acquire_many(SAVING as u32);
        if tokio::time::timeout(GRACE, all).await.is_err() {
            warn!("receipts were still being saved and are lost");
        }
    }

    /// The body of an answer, unchanged, after whose end the receipt is saved. `current` is what its request was
    /// encrypted under; none over attested TLS.
    pub(super) fn watch<B>(
        &self,
        session: &Arc<Session>,
        current: Option<&Arc<Current>>,
        authorization: Option<&HeaderValue>,
        headers: &HeaderMap,
        body: B,
    ) -> Watched<B> {
        let id = headers.get(RECEIPT_FIELD);
        let id = id.and_then(|value| value.to_str().ok()?.parse().ok());
        let pending = id.map(|id| Pending {
            saver: self.clone(),
            session: Arc::clone(session),
            current: current.cloned(),
            authorization: authorization.cloned(),
            id,
        });
        Watched { body, pending }
    }
}

/// A receipt that is to be saved.
struct Pending {
    saver: Saver,
    session: Arc<Session>,
    /// The verification under which the request was encrypted.
    current: Option<Arc<Current>>,
    authorization: Option<HeaderValue>,
    id: RequestId,
}

impl Pending {
    /// In the background: the answer's client waits for nothing.
    fn start(self) {
        let Ok(place) = Arc::clone(&self.saver.places).try_acquire_owned() else {
            warn!(id = %self.id, "too many receipts are being saved; this one is not");
            return;
        };
        tokio::spawn(async move {
            match self.save().await {
                Ok(()) => info!(id = %self.id, "receipt saved"),
                Err(reason) => warn!(id = %self.id, %reason, "the receipt could not be saved"),
            }
            drop(place);
        });
    }

    async fn save(&self) -> Result<(), String> {
        let json = self.fetch().await?.to_json();
        let path = self.saver.directory.join(format!("{}.json", self.id));
        let write = move || {
            let file = AtomicFile::create(&path, Replace::Nothing, Mode::OwnerOnly)?;
            file.write_all_at(json.as_bytes(), 0)?;
            file.commit()
        };
        let written = tokio::task::spawn_blocking(write).await;
        written
            .map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())
    }

    async fn fetch(&self) -> Result<Bundle, String> {
        let request = request_for(&self.id, self.authorization.as_ref());
        let mut pause = PAUSE;
        for attempt in 1..=ATTEMPTS {
            match self.ask(&request).await {
                Ok(bundle) => return Ok(bundle),
                Err(NoBundle::Answer(StatusCode::NOT_FOUND, ..)) if attempt < ATTEMPTS => {}
                Err(NoBundle::Answer(status, ..)) => {
                    return Err(format!("the service answered {status}"));
                }
                Err(NoBundle::Refusal(refusal)) => return Err(refusal.message),
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        unreachable!("the last attempt returns")
    }

    async fn ask(&self, request: &http::Request<Bytes>) -> Result<Bundle, NoBundle> {
        let (session, id) = (&self.session, &self.id);
        if let Some(direct) = session.service().direct() {
            let answer = send_direct(session, direct, request.clone()).await?;
            let (parts, body) = answer.into_parts();
            return complete(session, None, id, parts.status, parts.headers, body).await;
        }
        if let Some(current) = &self.current {
            // Whether that verification still holds or not: the answer is one under it, and this is its end. Nothing goes
            // to that key which it has not had with the request itself.
            match exchange(session, current, request).await {
                // The keyset has ended, and whoever made the receipt has others.
                Err(Failure::KeyUnknown) => {}
                answer => {
                    let answer = answer.map_err(Refusal::from)?;
                    let (status, headers) = (answer.status, answer.headers);
                    return complete(session, Some(current), id, status, headers, answer.body)
                        .await;
                }
            }
        }
        let (current, answer) = carry(session, request).await?;
        anywhere(session, &current, id, request, answer).await
    }
}

/// An answer on its way to the client.
pub(super) struct Watched<B> {
    body: B,
    pending: Option<Pending>,
}

impl<B: Stream + Unpin> Stream for Watched<B> {
    type Item = B::Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.body.poll_next_unpin(cx)
    }
}

impl<B> Drop for Watched<B> {
    /// Also where the client left or the answer broke off: there is a receipt that says so.
    fn drop(&mut self) {
        if let Some(pending) = self.pending.take() {
            pending.start();
        }
    }
}
