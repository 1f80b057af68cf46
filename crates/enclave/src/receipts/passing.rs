//! An answer on its way: hashed piece by piece, signed with its last piece.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, BodyDataStream, Bytes, HttpBody as _};
use axum::http::StatusCode;
use casemate_channel::receipt::{AnswerHasher, FetchedReceipt, RequestHash, Salt};
use casemate_container::one_line;
use futures::{Stream, StreamExt as _};
use tracing::error;

use super::{Receipts, Signed, Signer, Statement};
use crate::access::Caller;
use crate::api::Served;

/// A receipt in the making.
pub(super) struct Open {
    receipts: Arc<Receipts>,
    signer: Arc<Signer>,
    owner: Caller,
    served: Served,
    status: StatusCode,
    request_salt: Salt,
    request_hash: RequestHash,
    answer_salt: Salt,
    hasher: AnswerHasher,
}

impl Open {
    pub(super) fn new(
        receipts: Arc<Receipts>,
        signer: Arc<Signer>,
        owner: Caller,
        served: Served,
        status: StatusCode,
        request_salt: Salt,
        request_hash: RequestHash,
    ) -> Open {
        let answer_salt = Salt::random();
        let hasher = AnswerHasher::new(&answer_salt);
        Open {
            receipts,
            signer,
            owner,
            served,
            status,
            request_salt,
            request_hash,
            answer_salt,
            hasher,
        }
    }

    /// Signs and keeps the receipt. `whole` says that every piece passed; whether the engine finished, the API knows.
    fn close(self, whole: bool) {
        let now = (self.receipts.clock)();
        let statement = Statement {
            id: self.served.id.clone(),
            adapter: self.served.adapter.map(|digest| digest.0),
            parameters: self.served.parameters.clone(),
            request_hash: self.request_hash,
            status: self.status.as_u16(),
            answer_hash: self.hasher.finish(),
            usage: self.served.ending.usage().filter(|_| whole),
        };
        let receipt = match self.signer.sign(statement, now) {
            Ok(Signed::Receipt(receipt)) => receipt,
            // The keyset has ended, and its key with it: nobody can sign for it any more.
            Ok(Signed::KeysetEnded) => return,
            Err(error) => {
                let error = one_line(&error);
                error!(%error, "no receipt");
                return;
            }
        };
        let fetched = FetchedReceipt {
            receipt,
            request_salt: self.request_salt,
            answer_salt: self.answer_salt,
        };
        let store = &self.receipts.store;
        store.keep(self.served.id, self.owner, fetched, now);
    }
}

/// The body of an answer, unchanged. The receipt is there before the last piece leaves, so that whoever has the end can
/// fetch it.
pub(super) struct Passing {
    pieces: BodyDataStream,
    /// What is left of a body whose length is known.
    remaining: Option<u64>,
    open: Option<Open>,
}

impl Passing {
    pub(super) fn new(body: Body, open: Open) -> Passing {
        Passing {
            remaining: body.size_hint().exact(),
            pieces: body.into_data_stream(),
            open: Some(open),
        }
    }

    fn close(&mut self, whole: bool) {
        if let Some(open) = self.open.take() {
            open.close(whole);
        }
    }

    fn pass(&mut self, piece: &Bytes) {
        let Some(open) = &mut self.open else {
            return;
        };
        open.hasher.update(piece);
        let last = match &mut self.remaining {
            Some(remaining) => {
                *remaining = remaining.saturating_sub(piece.len() as u64);
                *remaining == 0
            }
            // The API notes the end while it makes the last piece of a stream.
            None => open.served.ending.usage().is_some(),
        };
        if last {
            self.close(true);
        }
    }
}

impl Stream for Passing {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let piece = std::task::ready!(self.pieces.poll_next_unpin(cx));
        match &piece {
            Some(Ok(piece)) => self.pass(piece),
            Some(Err(_)) => self.close(false),
            None => self.close(true),
        }
        Poll::Ready(piece)
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.close(false);
    }
}

#[cfg(test)]
mod tests {
    use casemate_channel::receipt::{Parameters, RequestId, SignedReceipt};
    use futures::stream;

    use super::*;
    use crate::api::Ending;
    use crate::receipts::{Limits, signer_until};

    type Piece = Result<Bytes, &'static str>;

    /// What is signed of an answer of these pieces that the engine never noted to have ended.
    async fn usage_is_stated(pieces: Vec<Piece>) -> bool {
        let receipts = Arc::new(Receipts::new(Limits::default(), || 0));
        let id = RequestId::new("chatcmpl", [5; 16]);
        let served = Served {
            id: id.clone(),
            adapter: None,
            parameters: Parameters::default(),
            ending: Ending::default(),
        };
        let salt = Salt::random();
        let open = Open::new(
            Arc::clone(&receipts),
            Arc::new(signer_until(1)),
            Caller::anonymous(),
            served,
            StatusCode::OK,
            Salt::random(),
            RequestHash::of(&salt, "POST", "/", b""),
        );
        let body = Body::from_stream(stream::iter(pieces));
        let _: Vec<_> = Passing::new(body, open).collect().await;
        let json = receipts.store.find(&id, &Caller::anonymous(), 0).unwrap();
        let fetched = FetchedReceipt::from_json(json.as_bytes(), &id)
            .ok()
            .unwrap();
        let signed = SignedReceipt::parse(&fetched.receipt).unwrap();
        signed.unverified().usage.is_some()
    }

    #[tokio::test]
    async fn an_answer_that_the_engine_did_not_finish_is_incomplete_though_its_stream_ended() {
        // An error inside a stream is an event, and the stream ends after it like any other.
        let error = Bytes::from_static(b"data: {\"error\":{}}\n\n");
        assert!(!usage_is_stated(vec![Ok(error)]).await);
        assert!(!usage_is_stated(vec![Ok(Bytes::from_static(b"x")), Err("broken")]).await);
    }
}
