//! A connection to a worker that holds the public matrices, and what it was checked against.
//!
//! Rows go in as [`Masked`] and come out as `Checked`; there is nothing in between that somebody could
//! use. Several rows may be on their way at once.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use casemate_field::Field;
use casemate_kernels::team::Team;
use casemate_wire::{Client, MAX_PAYLOAD, Shape, Timed, WireError};

use crate::check::{Challenge, Checked, Expected};
use crate::pad::Masked;
use crate::public::PublicMatrix;

/// What bytes to and from a worker go through.
pub trait Transport: Read + Write + Send {
    /// Sets how long everything until the next call may take, all together. What takes longer fails
    /// with [`io::ErrorKind::TimedOut`].
    fn within(&mut self, limit: Duration);
}

impl Transport for Timed {
    fn within(&mut self, limit: Duration) {
        Timed::within(self, Some(limit));
    }
}

/// How a connection to a worker is made, each time one is needed.
pub type Connect = Box<dyn Fn() -> io::Result<Box<dyn Transport>> + Send + Sync>;

/// Why a worker's help ended. None of it depends on anything secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Fault {
    /// No connection, or it broke.
    #[error("the connection to the worker failed: see that it runs and can be reached")]
    Unreachable,
    /// Whoever answered has not the pinned key.
    #[error("whoever answered is not the pinned worker: compare its key with the configuration")]
    OtherPeer,
    /// It took too long.
    #[error("the worker did not answer in time: see what else runs there, or allow more time")]
    Late,
    /// It said that it would not.
    #[error("the worker refused: compare its memory with the bytes that the plan sends")]
    Refused,
    /// What it said is not the protocol's.
    #[error("the worker's answer is not one of the protocol: compare versions, do not trust it")]
    Malformed,
    /// It holds other weights than it was sent.
    #[error("the worker holds other weights than it was sent: do not trust it")]
    OtherWeights,
    /// A product that failed its check.
    #[error("the worker returned a wrong product, which was noticed: do not trust it")]
    WrongProduct,
}

impl Fault {
    /// Why there is no connection. Who answers in a worker's place is no fault of the worker.
    pub(crate) fn of_connecting(error: io::Error) -> Fault {
        match error.kind() {
            io::ErrorKind::InvalidData => Fault::OtherPeer,
            io::ErrorKind::TimedOut => Fault::Late,
            _ => Fault::Unreachable,
        }
    }

    /// Whether an honest worker could be behind it.
    #[must_use]
    pub fn is_misconduct(self) -> bool {
        match self {
            Fault::Unreachable | Fault::OtherPeer | Fault::Late | Fault::Refused => false,
            Fault::Malformed | Fault::OtherWeights | Fault::WrongProduct => true,
        }
    }
}

impl From<WireError> for Fault {
    fn from(error: WireError) -> Fault {
        match error {
            WireError::Io(_)
            | WireError::Closed
            | WireError::Truncated
            | WireError::Over
            | WireError::WindowFull
            | WireError::Misuse(_) => Fault::Unreachable,
            WireError::Late => Fault::Late,
            WireError::Refused(_) | WireError::Shape { .. } => Fault::Refused,
            WireError::Digest { .. } => Fault::OtherWeights,
            _ => Fault::Malformed,
        }
    }
}

/// A worker that holds the matrices.
pub(crate) struct Link {
    client: Client<Box<dyn Transport>>,
    challenges: Arc<[Challenge]>,
    patience: Duration,
}

/// Rows that were sent and cannot be sent again.
pub(crate) struct Sent {
    group: u32,
    request: u64,
    expected: Expected,
    elements: usize,
}

impl Link {
    /// Opens a connection and has the worker load all matrices, in their order. `goes_on` is asked
    /// before each part.
    pub(crate) fn open(
        mut transport: Box<dyn Transport>,
        field: Field,
        matrices: &[PublicMatrix],
        challenges: Arc<[Challenge]>,
        patience: Duration,
        goes_on: impl Fn() -> bool,
    ) -> Result<Link, Fault> {
        transport.within(patience);
        let mut client = Client::open(transport, field, MAX_PAYLOAD)?;
        for matrix in matrices {
            let weights = matrix.matrix();
            let shape = Shape {
                rows: u32::try_from(weights.rows()).map_err(|_| Fault::Refused)?,
                columns: u32::try_from(weights.columns()).map_err(|_| Fault::Refused)?,
            };
            let row = |i: u32, out: &mut [i8]| {
                // Scales stay here.
                let _ = weights.row(i as usize, out);
            };
            client.load(shape, row, |stream| {
                let limit = if goes_on() { patience } else { Duration::ZERO };
                stream.within(limit);
            })?;
        }
        Ok(Link {
            client,
            challenges,
            patience,
        })
    }

    /// Most rows that one message takes.
    pub(crate) fn most_rows(&self, group: u32) -> usize {
        self.client.most_rows(group).unwrap_or(1).into()
    }

    /// Messages that may be without an answer.
    pub(crate) fn window(&self) -> usize {
        self.client.welcome().window.into()
    }

    /// Sends rows. They are gone afterwards, whether or not they arrived.
    pub(crate) fn send(&mut self, team: &Team, group: u32, masked: Masked) -> Result<Sent, Fault> {
        let challenge = &self.challenges[group as usize];
        self.client.stream().within(self.patience);
        let request = self.client.multiply(group, masked.elements())?;
        // The worker has something to do; so have we.
        let expected = challenge.expect(team, &masked);
        Ok(Sent {
            group,
            request,
            expected,
            elements: masked.rows() * challenge.outputs(),
        })
    }

    /// Waits for the product of the rows that were sent first, and checks it.
    pub(crate) fn receive(&mut self, team: &Team, sent: &Sent) -> Result<Checked, Fault> {
        let mut answer = vec![0; sent.elements];
        self.client.stream().within(self.patience);
        let due = self.client.product(&mut answer)?;
        if due.request != sent.request {
            return Err(Fault::Malformed);
        }
        let challenge = &self.challenges[sent.group as usize];
        let checked = challenge.check(team, &sent.expected, answer);
        checked.map_err(|_| Fault::WrongProduct)
    }
}
