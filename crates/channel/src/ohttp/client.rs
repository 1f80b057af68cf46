//! The user's half: encapsulates a request to a verified key and opens the answer as it arrives.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{HeaderMap, Request, StatusCode};

use super::TransportError;
use super::chunks::{self, ChunkFault, ChunkReader, MAX_CHUNK_PLAINTEXT};
use super::frames::{self, FRAME_BYTES, padded_frames};
use super::message::{self, AnswerDecoder, MessageFault};
use super::suite::{
    ANSWER_NONCE_BYTES, AnswerCipher, AnswerSecret, CryptoFailure, ENC_BYTES, Forged, PublicKey,
    REQUEST_HEAD_BYTES, RequestSealer,
};

/// The key requests are encrypted to. Take it from a verified keyset and from nowhere else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipient {
    id: u8,
    key: PublicKey,
}

/// A key configuration of another suite, or none at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a key configuration for X-Wing, HKDF-SHA256 and AES-128-GCM alone")]
pub struct UnsupportedConfig;

/// Why a request could not be encapsulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncapsulateError {
    /// The request itself cannot be expressed.
    #[error("the request cannot be sent: {0}")]
    Message(#[from] MessageFault),
    /// Encryption failed; with a checked key that is a failure of the random generator.
    #[error("encryption failed")]
    Encryption,
}

/// Why an answer is not to be believed. Whatever part of the body was handed out before is genuine,
/// but not the whole.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Transport(#[source] TransportError),
    /// The answer was cut off.
    #[error("the answer was cut off")]
    Truncated,
    /// Something does not authenticate.
    #[error("the answer was changed on its way, or is not for this request")]
    Forged,
    /// Not an encapsulated answer.
    #[error("not an encapsulated answer")]
    Malformed,
    /// A frame of the wrong form, or a number of frames that padding does not yield.
    #[error("the service does not pad its answers as specified")]
    Padding,
    /// The decrypted message is not what the specification asks for.
    #[error("the service's answer is malformed: {0}")]
    Message(#[from] MessageFault),
}

impl Recipient {
    /// Reads one key configuration, as a keyset holds it.
    ///
    /// # Errors
    /// [`UnsupportedConfig`] for anything but one X-Wing key under our one suite.
    pub fn from_config(config: &[u8]) -> Result<Recipient, UnsupportedConfig> {
        let (id, key) = PublicKey::from_config(config).ok_or(UnsupportedConfig)?;
        Ok(Recipient { id, key })
    }

    /// The key's id, as requests name it.
    pub fn key_id(&self) -> u8 {
        self.id
    }

    /// Encrypts a request. The result's length tells no more than the padded length of the request.
    ///
    /// # Errors
    /// [`EncapsulateError`].
    pub fn encapsulate(
        &self,
        request: &Request<Bytes>,
    ) -> Result<(Bytes, PendingAnswer), EncapsulateError> {
        let plaintext = message::encode_request(request)?;
        self.encapsulate_plaintext(&plaintext)
    }

    /// Encapsulates any bytes, of which a service may say that they are no request.
    ///
    /// # Errors
    /// [`EncapsulateError::Encryption`].
    pub fn encapsulate_plaintext(
        &self,
        plaintext: &[u8],
    ) -> Result<(Bytes, PendingAnswer), EncapsulateError> {
        self.seal(plaintext)
            .map_err(|_| EncapsulateError::Encryption)
    }

    fn seal(&self, plaintext: &[u8]) -> Result<(Bytes, PendingAnswer), CryptoFailure> {
        let (head, mut sealer) = RequestSealer::new(self.id, &self.key)?;
        let mut out = Vec::with_capacity(head.len() + plaintext.len() / 16 * 17 + 64);
        out.extend_from_slice(&head);
        for chunk in plaintext.chunks(MAX_CHUNK_PLAINTEXT) {
            chunks::put(&sealer.seal(chunk, false)?, &mut out);
        }
        chunks::put_last(&sealer.seal(&[], true)?, &mut out);
        let pending = PendingAnswer {
            secret: sealer.answer_secret()?,
            head,
        };
        Ok((out.into(), pending))
    }
}

/// What is needed to open the answer to one request.
pub struct PendingAnswer {
    secret: AnswerSecret,
    head: [u8; REQUEST_HEAD_BYTES],
}

impl PendingAnswer {
    /// Opens the answer that arrives on `transport` and returns when its head is there.
    ///
    /// # Errors
    /// [`AnswerError`].
    pub async fn open<S, E>(self, transport: S) -> Result<Answer, AnswerError>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<TransportError>,
    {
        let transport = transport.map(|item| item.map_err(Into::into));
        FrameReader {
            transport: Box::pin(transport),
            opening: Opening::Nonce(Box::new(self), Vec::with_capacity(ANSWER_NONCE_BYTES)),
            plaintext: Vec::new(),
            frames: 0,
        }
        .answer()
        .await
    }
}

#[cfg(test)]
impl PendingAnswer {
    /// The same again, to open the same answer repeatedly.
    pub(super) fn again(&self) -> PendingAnswer {
        PendingAnswer {
            secret: self.secret.again(),
            head: self.head,
        }
    }

    pub(super) fn cipher(&self, enc: &[u8], nonce: &[u8; ANSWER_NONCE_BYTES]) -> AnswerCipher {
        self.secret.cipher(enc, nonce).unwrap()
    }
}

/// An answer whose head has arrived.
pub struct Answer {
    /// Status of the inner answer.
    pub status: StatusCode,
    /// Its fields.
    pub headers: HeaderMap,
    /// Its body.
    pub body: AnswerBody,
}

/// The body of an answer, as a stream. It ends without an error only after the last chunk was
/// authenticated, nothing followed it and the padding was as specified.
pub struct AnswerBody {
    stream: Pin<Box<dyn Stream<Item = Result<Bytes, AnswerError>> + Send>>,
}

impl Stream for AnswerBody {
    type Item = Result<Bytes, AnswerError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.stream.poll_next_unpin(cx)
    }
}

/// Turns the transport into the frames of an answer.
struct FrameReader {
    transport: Pin<Box<dyn Stream<Item = Result<Bytes, TransportError>> + Send>>,
    opening: Opening,
    /// Opened, but not yet taken as frames.
    plaintext: Vec<u8>,
    frames: u64,
}

enum Opening {
    /// Collecting the answer's nonce.
    Nonce(Box<PendingAnswer>, Vec<u8>),
    Chunks(ChunkReader, AnswerCipher),
    /// The last chunk has been authenticated.
    Done,
}

impl FrameReader {
    async fn answer(mut self) -> Result<Answer, AnswerError> {
        let mut decoder = AnswerDecoder::new();
        let (head, rest) = loop {
            let data = self.next().await?.ok_or(MessageFault::Incomplete)?;
            if let Some(head) = decoder.head(&data)? {
                break head;
            }
        };
        let first = decoder.body(&rest)?;
        let stream = futures::stream::try_unfold(
            (self, decoder, Some(first)),
            |(mut reader, mut decoder, mut ready)| async move {
                loop {
                    let body = match ready.take() {
                        Some(first) => first,
                        None => match reader.next().await? {
                            Some(data) => decoder.body(&data)?,
                            None if decoder.is_done() => return Ok(None),
                            None => return Err(MessageFault::Incomplete.into()),
                        },
                    };
                    if !body.is_empty() {
                        return Ok(Some((Bytes::from(body), (reader, decoder, None))));
                    }
                }
            },
        );
        let body = AnswerBody {
            stream: Box::pin(stream),
        };
        Ok(Answer {
            status: head.status,
            headers: head.headers,
            body,
        })
    }

    /// The data of the next frame, or nothing after the last.
    async fn next(&mut self) -> Result<Option<Vec<u8>>, AnswerError> {
        loop {
            if let Some(frame) = self.plaintext.first_chunk::<FRAME_BYTES>() {
                let data = frames::data(frame).ok_or(AnswerError::Padding)?.to_vec();
                self.plaintext.drain(..FRAME_BYTES);
                self.frames += 1;
                return Ok(Some(data));
            }
            if matches!(self.opening, Opening::Done) {
                let padded = self.plaintext.is_empty() && padded_frames(self.frames) == self.frames;
                return if padded {
                    Ok(None)
                } else {
                    Err(AnswerError::Padding)
                };
            }
            match self.transport.next().await {
                Some(Ok(bytes)) => self.open(&bytes)?,
                Some(Err(error)) => return Err(AnswerError::Transport(error)),
                None => self.finish()?,
            }
        }
    }

    fn open(&mut self, mut bytes: &[u8]) -> Result<(), AnswerError> {
        if let Opening::Nonce(pending, buffer) = &mut self.opening {
            let (part, rest) = bytes.split_at(bytes.len().min(ANSWER_NONCE_BYTES - buffer.len()));
            buffer.extend_from_slice(part);
            bytes = rest;
            let Some(nonce) = buffer.first_chunk::<ANSWER_NONCE_BYTES>() else {
                return Ok(());
            };
            let enc = &pending.head[REQUEST_HEAD_BYTES - ENC_BYTES..];
            let cipher = pending
                .secret
                .cipher(enc, nonce)
                .map_err(|_| AnswerError::Forged)?;
            self.opening = Opening::Chunks(ChunkReader::new(), cipher);
        }
        if let Opening::Chunks(reader, cipher) = &mut self.opening {
            for mut chunk in reader.push(bytes)? {
                cipher.open(&mut chunk, false)?;
                self.plaintext.extend_from_slice(&chunk);
            }
        }
        Ok(())
    }

    /// The transport has ended.
    fn finish(&mut self) -> Result<(), AnswerError> {
        match std::mem::replace(&mut self.opening, Opening::Done) {
            Opening::Chunks(reader, mut cipher) => {
                let mut last = reader.finish()?;
                cipher.open(&mut last, true)?;
                self.plaintext.extend_from_slice(&last);
                Ok(())
            }
            Opening::Nonce(..) => Err(AnswerError::Truncated),
            Opening::Done => Ok(()),
        }
    }
}

impl From<ChunkFault> for AnswerError {
    fn from(fault: ChunkFault) -> AnswerError {
        match fault {
            ChunkFault::Malformed => AnswerError::Malformed,
            ChunkFault::Truncated => AnswerError::Truncated,
        }
    }
}

impl From<Forged> for AnswerError {
    fn from(_: Forged) -> AnswerError {
        AnswerError::Forged
    }
}
