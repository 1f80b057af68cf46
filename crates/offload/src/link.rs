//! A connection to a worker that holds the public matrices, and what it was checked against.
//!
//! Rows go in as [`Masked`] and come out as `Checked`; there is nothing in between that somebody could
//! use. Several rows may be on their way at once.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use casemate_field::Field;
use casemate_kernels::team::Team;
use casemate_wire::{Client, MAX_PAYLOAD, Shape, Timed, WireError};

use crate::check::{Challenge, Checked, Expected};
use crate::memory::Spare;
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
    /// What it returns is right, and comes so slowly that the enclave is better off alone.
    #[error(
        "the worker is slower than no worker: see what else runs there, or allow more slowness"
    )]
    Slow,
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
            Fault::Unreachable | Fault::OtherPeer | Fault::Late | Fault::Slow | Fault::Refused => {
                false
            }
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
    /// How long this side has waited since it [began](Link::begin).
    waited: Duration,
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
            waited: Duration::ZERO,
        })
    }

    /// Sets how long everything until the next call may take, all messages together.
    pub(crate) fn begin(&mut self, limit: Duration) {
        self.client.stream().within(limit);
        self.waited = Duration::ZERO;
    }

    /// How long this side has waited for the other since it began.
    pub(crate) fn waited(&self) -> Duration {
        self.waited
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
    pub(crate) fn send(
        &mut self,
        team: &Team,
        group: u32,
        masked: Masked,
        spare: &mut Spare,
    ) -> Result<Sent, Fault> {
        let begun = Instant::now();
        let request = self.client.multiply(group, masked.elements());
        self.waited += begun.elapsed();
        let request = request?;
        let challenge = &self.challenges[group as usize];
        // The worker has something to do; so have we.
        let expected = challenge.expect(team, &masked, spare.take());
        let elements = masked.rows() * challenge.outputs();
        spare.give(masked.into_room());
        Ok(Sent {
            group,
            request,
            expected,
            elements,
        })
    }

    /// Waits for the product of the rows that were sent first, and checks it.
    pub(crate) fn receive(
        &mut self,
        team: &Team,
        sent: Sent,
        spare: &mut Spare,
    ) -> Result<Checked, Fault> {
        let mut answer = spare.take();
        answer.room(sent.elements);
        let begun = Instant::now();
        let due = self.client.product(&mut answer);
        self.waited += begun.elapsed();
        if due?.request != sent.request {
            return Err(Fault::Malformed);
        }
        let challenge = &self.challenges[sent.group as usize];
        let mut room = spare.take();
        let checked = challenge.check(team, &sent.expected, answer, &mut room);
        spare.give(room);
        spare.give(sent.expected.into_room());
        checked.map_err(|_| Fault::WrongProduct)
    }
}

#[cfg(test)]
impl Link {
    /// Waits for a byte that does not come, and returns how long it has waited.
    pub(crate) fn wait_in_vain(&mut self) -> Duration {
        let begun = Instant::now();
        assert!(self.client.stream().read(&mut [0]).is_err());
        self.waited += begun.elapsed();
        self.waited
    }
}
