//! Where the engine meets all this: layers whose sums may come from a worker.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use casemate_container::Access;
use casemate_engine::linear::{LinearLayer, LinearScratch};
use casemate_engine::outsource::{ExactLayer, Outsource, Place, Stack};
use casemate_kernels::panels::{Int8Matrix, matmul_int8};
use casemate_kernels::team::Team;

use crate::memory::Buffer;
use crate::offload::{Group, Offload};
use crate::plan::{Kind, Preset, Why, decide};
use crate::public::{PublicMatrix, Weights};

/// The layers of one engine, by a preset.
pub struct Layers {
    offload: Arc<Offload>,
    preset: Preset,
    /// For the sums of one layer after the other.
    sums: Arc<Mutex<Buffer<i32>>>,
}

impl Layers {
    /// Layers that go where the preset says, with what they need in `offload`. Start it when the model
    /// is loaded.
    #[must_use]
    pub fn new(offload: Arc<Offload>, preset: Preset) -> Layers {
        Layers {
            offload,
            preset,
            sums: Arc::default(),
        }
    }

    /// [Starts](Offload::start) workers once all layers are known.
    ///
    /// # Errors
    /// The operating system's refusal of memory, or to start a thread.
    pub fn start(&self) -> io::Result<()> {
        self.offload.start()
    }
}

impl Weights for ExactLayer {
    fn matrix(&self) -> &Int8Matrix {
        self.weights()
    }
}

impl From<Stack> for Kind {
    fn from(stack: Stack) -> Kind {
        match stack {
            Stack::Qkv => Kind::Qkv,
            Stack::AttentionOutput => Kind::AttentionOutput,
            Stack::GateUp => Kind::GateUp,
            Stack::Down => Kind::Down,
            Stack::Head => Kind::Head,
        }
    }
}

impl Outsource for Layers {
    fn layer(&self, place: Place, access: Access, layer: ExactLayer) -> Box<dyn LinearLayer> {
        let columns = layer.inputs() as u64;
        if decide(self.preset, place.stack.into(), access, columns) != Why::Sent {
            return Box::new(layer);
        }
        let layer = Arc::new(layer);
        let public = PublicMatrix::new(access, Arc::clone(&layer) as Arc<dyn Weights>);
        let group = public.ok().and_then(|public| self.offload.add(public).ok());
        match group {
            Some(group) => Box::new(Outsourced {
                offload: Arc::clone(&self.offload),
                group,
                layer,
                sums: Arc::clone(&self.sums),
            }),
            // It was decided to be public and narrow enough; only its number can be too high.
            None => Box::new(Inside(layer)),
        }
    }

    fn idle(&self, team: &Team) -> bool {
        self.offload.step(team)
    }
}

/// A layer whose sums may come from a worker.
struct Outsourced {
    offload: Arc<Offload>,
    group: Arc<Group>,
    layer: Arc<ExactLayer>,
    sums: Arc<Mutex<Buffer<i32>>>,
}

impl LinearLayer for Outsourced {
    fn inputs(&self) -> usize {
        self.layer.inputs()
    }

    fn outputs(&self) -> usize {
        self.layer.outputs()
    }

    fn forward(&self, team: &Team, scratch: &mut LinearScratch, x: &[f32], y: &mut [f32]) {
        let rows = self.layer.quantise(team, scratch, x);
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let count = rows.rows() * self.layer.outputs();
        let sums = sums.room(count);
        if self.offload.outside(team, &self.group, rows, sums) {
            self.layer.finish(team, rows, sums, y);
        } else {
            matmul_int8(team, rows, self.layer.weights(), y);
        }
    }

    fn bytes(&self) -> u64 {
        self.layer.bytes()
    }
}

/// A layer that stays, though it is shared already.
struct Inside(Arc<ExactLayer>);

impl LinearLayer for Inside {
    fn inputs(&self) -> usize {
        self.0.inputs()
    }

    fn outputs(&self) -> usize {
        self.0.outputs()
    }

    fn forward(&self, team: &Team, scratch: &mut LinearScratch, x: &[f32], y: &mut [f32]) {
        self.0.forward(team, scratch, x, y);
    }

    fn bytes(&self) -> u64 {
        self.0.bytes()
    }
}
