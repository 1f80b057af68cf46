//! Receipts at the proxy: fetched through the encrypted channel, verified, completed with the attestation of their
//! keyset, handed out or saved (docs/receipts.md, section 4).

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use casemate_channel::ohttp::{Answer, AnswerBody, AnswerError};
use casemate_channel::receipt::{
    Bundle, FetchedReceipt, MAX_FETCHED, RECEIPT_FIELD, RECEIPTS_PATH, RequestId, SignedReceipt,
};
use casemate_container::atomic_file::{AtomicFile, Mode, Replace};
use futures::{Stream, StreamExt};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio::sync::Semaphore;
use tracing::{info, warn};

use super::forward::exchange;
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

/// Completes what the service answered to [`request_for`].
pub(super) async fn complete(
    session: &Session,
    id: &RequestId,
    answer: Answer,
) -> Result<Bundle, NoBundle> {
    let bad_gateway = |code, message: String| Refusal::new(StatusCode::BAD_GATEWAY, code, message);
    let (status, headers) = (answer.status, answer.headers);
    let body = read(answer.body)
        .await
        .map_err(|error| bad_gateway("answer_refused", error.to_string()))?;
    if status != StatusCode::OK {
        return Err(NoBundle::Answer(status, headers, body));
    }
    let refused = |error: &dyn std::fmt::Display| {
        bad_gateway(
            "receipt_refused",
            format!("the service's receipt does not hold: {error}"),
        )
    };
    let fetched = FetchedReceipt::from_json(&body, id).map_err(|error| refused(&error))?;
    let signed = SignedReceipt::parse(&fetched.receipt).map_err(|error| refused(&error))?;
    let Some(current) = session.of_keyset(&signed.unverified().keyset_digest) else {
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

async fn read(mut body: AnswerBody) -> Result<Bytes, AnswerError> {
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

    /// The body of an answer, unchanged, after whose end the receipt is saved.
    pub(super) fn watch(
        &self,
        session: &Arc<Session>,
        current: &Arc<Current>,
        authorization: Option<&HeaderValue>,
        answer: Answer,
    ) -> (StatusCode, HeaderMap, Watched) {
        let id = answer.headers.get(RECEIPT_FIELD);
        let id = id.and_then(|value| value.to_str().ok()?.parse().ok());
        let pending = id.map(|id| Pending {
            saver: self.clone(),
            session: Arc::clone(session),
            current: Arc::clone(current),
            authorization: authorization.cloned(),
            id,
        });
        let body = Watched {
            body: answer.body,
            pending,
        };
        (answer.status, answer.headers, body)
    }
}

/// A receipt that is to be saved.
struct Pending {
    saver: Saver,
    session: Arc<Session>,
    /// The verification under which the request was sent.
    current: Arc<Current>,
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
            // The replica that answered has the receipt; a verification that has run out must not be used.
            let current = match self.session.still_holds(&self.current) {
                true => Arc::clone(&self.current),
                false => {
                    let renewed = self.session.use_service().await;
                    renewed.map_err(|refusal| refusal.message)?
                }
            };
            let answer = exchange(&self.session, &current, &request)
                .await
                .map_err(|failure| Refusal::from(failure).message)?;
            match complete(&self.session, &self.id, answer).await {
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
}

/// An answer on its way to the client.
pub(super) struct Watched {
    body: AnswerBody,
    pending: Option<Pending>,
}

impl Stream for Watched {
    type Item = Result<Bytes, AnswerError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.body.poll_next_unpin(cx)
    }
}

impl Drop for Watched {
    /// Also where the client left or the answer broke off: there is a receipt that says so.
    fn drop(&mut self) {
        if let Some(pending) = self.pending.take() {
            pending.start();
        }
    }
}
