//! What a real worker is sent for real texts, recorded, beside what it would have been sent without pads.
//!
//! An engine with all of `casemate_offload` in it asks `casemate-worker` through a tap that writes down what passes; the model, the
//! masks and the protocol are those of an enclave. The record is a file ([`transcript`](casemate_audit::transcript)), and
//! attackers have it from there.

use std::fs;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use casemate_audit::transcript::{Stack, centred, from_bytes, to_bytes};
use casemate_audit::watched::{Rows, Watch};
use casemate_engine::Engine;
use casemate_kernels::cpu::Isa;
use casemate_kernels::rotate::Rotation;
use casemate_offload::layers::Layers;
use casemate_offload::plan::Preset;
use casemate_offload::{BootKey, Config, Offload, Transport, Workers};
use casemate_testkit::deployment::{Launch, Program};
use casemate_testkit::tap::{Seen, Tap};
use casemate_wire::Address;
use serde::Serialize;
use zeroize::Zeroizing;

use crate::exit::Usage;
use crate::victim::Victim;

/// How long the worker may take to start, to take all matrices, and to be given masks.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long a worker that runs may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// The program that is started where no worker is named.
const WORKER: &str = "casemate-worker";

/// A worker that multiplies.
pub(crate) struct Worker {
    address: Address,
    /// Ends with this value.
    _program: Option<Program>,
}

impl Worker {
    /// The one at an address, or else one that is started from beside this program.
    pub(crate) fn find(named: Option<&Address>, folder: &Path) -> Result<Self> {
        if let Some(address) = named {
            // Nobody wants to wait for one that is not there.
            address
                .connect(CONNECT)
                .with_context(|| format!("no worker answers at {address}"))?;
            return Ok(Self {
                address: address.clone(),
                _program: None,
            });
        }
        let path = std::env::current_exe()?.with_file_name(WORKER);
        if !path.is_file() {
            let message = format!(
                "{} is not there; build it with `cargo build --release -p {WORKER}` and put it beside this program, name one that \
                 listens with --worker, or record nothing with --recorded 0",
                path.display()
            );
            return Err(Usage(message).into());
        }
        let socket = folder.join("worker.sock");
        let launch = Launch::new(WORKER, path)
            .option("--listen", format!("unix:{}", socket.display()))
            .option("--memory", "8GiB");
        let program = launch.serve(folder, PATIENCE)?;
        Ok(Self {
            address: program.address().parse()?,
            _program: Some(program),
        })
    }
}

/// Transcripts of some texts, with pads and without.
pub(crate) struct Recorded {
    pub(crate) texts: Vec<Vec<u32>>,
    /// As a worker was sent them, by the order in which it got the matrices.
    pub(crate) masked: Vec<Stack>,
    /// The same before pads.
    pub(crate) plain: Vec<Rows>,
}

/// Has the texts computed with the help of a worker, and again where nobody helps. `file` is where the record lies.
pub(crate) fn record(
    victim: &Victim,
    texts: Vec<Vec<u32>>,
    threads: usize,
    worker: &Worker,
    (file, folder): (&Path, &Path),
) -> Result<Recorded> {
    let watch = Watch::default();
    let alone = victim.exact(threads, Arc::new(watch.clone()))?;
    let mut expected = Vec::new();
    for text in &texts {
        expected.push(last_logits(&alone, text)?);
    }
    drop(alone);
    let plain = watch.take();

    let tap = Tap::start(&folder.join("tap.sock"), worker.address.clone())?;
    let address = tap.address();
    let connect = Box::new(move || {
        let connection = address.connect(CONNECT)?;
        Ok(Box::new(connection) as Box<dyn Transport>)
    });
    let mut key = Zeroizing::new([0; 32]);
    aws_lc_rs::rand::fill(&mut *key)
        .ok()
        .context("the system gave no randomness")?;
    let longest = texts.iter().map(Vec::len).max().unwrap_or(0) as u64;
    let config = Config {
        // Masks for more than a text.
        pool_bytes: 2 * longest * victim.bytes_of_masks(),
        reserve: 0,
        patience: PATIENCE,
        waiting: PATIENCE,
        ..Config::default()
    };
    let observer = Box::new(|event| eprintln!("worker: {event}"));
    let workers = Workers::One(connect);
    let offload = Arc::new(Offload::new(config, BootKey::new(key), workers, observer));
    let layers = Arc::new(Layers::new(Arc::clone(&offload), Preset::FullLinear));
    let helped = victim.exact(threads, layers.clone())?;
    layers.start()?;
    ensure!(
        offload.wait(PATIENCE),
        "the worker does not take the matrices"
    );
    for (text, expected) in texts.iter().zip(&expected) {
        wait_for_masks(&offload, text.len() as u64)?;
        let same = last_logits(&helped, text)? == *expected;
        ensure!(
            same,
            "a worker changed what the model says; this must never happen"
        );
    }
    let metrics = offload.metrics();
    ensure!(
        metrics.rows_without_masks == 0 && metrics.failures + metrics.misconduct == 0,
        "the record has holes: {metrics:?}"
    );
    drop(helped);
    fs::write(file, to_bytes(&stacks(tap.take(), &plain)?))
        .with_context(|| file.display().to_string())?;
    let masked = from_bytes(&fs::read(file)?)?;
    Ok(Recorded {
        texts,
        masked,
        plain,
    })
}

fn last_logits(engine: &Engine, text: &[u32]) -> Result<Vec<f32>> {
    let mut last = Vec::new();
    engine
        .evaluate(text, |_, logits| {
            last.clear();
            last.extend_from_slice(logits);
        })
        .context("the model cannot be evaluated")?;
    Ok(last)
}

fn wait_for_masks(offload: &Offload, rows: u64) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while offload.metrics().masks_level < rows {
        ensure!(Instant::now() < end, "no masks for {rows} tokens in time");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// The rows that passed, by matrices, which are named as they are inside.
fn stacks(seen: Seen, plain: &[Rows]) -> Result<Vec<Stack>> {
    let opened = match &seen.connections[..] {
        [opened] => opened.clone(),
        others => anyhow::bail!("{} connections instead of one", others.len()),
    };
    ensure!(
        opened.matrices.len() == plain.len(),
        "{} matrices instead of {}",
        opened.matrices.len(),
        plain.len()
    );
    let mut stacks: Vec<Stack> = plain
        .iter()
        .map(|rows| Stack {
            name: rows.stack.clone(),
            field: opened.field,
            columns: rows.columns,
            elements: Vec::with_capacity(rows.quants.len()),
        })
        .collect();
    for message in seen.messages {
        let stack = stacks.get_mut(message.matrix as usize);
        let stack = stack.context("rows for a matrix that was not loaded")?;
        stack.elements.extend(message.elements);
    }
    for (stack, rows) in stacks.iter().zip(plain) {
        ensure!(
            stack.elements.len() == rows.quants.len(),
            "{}: {} numbers were recorded instead of {}",
            stack.name,
            stack.elements.len(),
            rows.quants.len()
        );
    }
    Ok(stacks)
}

/// A transcript as students get it: rows of length 1 in a file, and the public rotation of each width. Scales of rows are
/// known to nobody outside.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Features {
    file: PathBuf,
    /// Tokens of each text, in the order of the questions.
    lengths: Vec<usize>,
    stacks: Vec<StackFeatures>,
}

#[derive(Clone, Debug, Serialize)]
struct StackFeatures {
    name: String,
    columns: usize,
    /// Of its rows, in bytes.
    offset: u64,
    /// Of the matrix that rows are multiplied with from the right, in bytes.
    rotation: u64,
}

impl Recorded {
    /// What was sent to the worker, for students.
    pub(crate) fn masked_features(&self, file: PathBuf) -> Result<Features> {
        let stack = |stack: &Stack| {
            let all = stack.elements.iter();
            let values = all.map(|&x| centred(stack.field, x)).collect();
            (stack.name.clone(), stack.columns, values)
        };
        self.features(file, self.masked.iter().map(stack))
    }

    /// The same without pads.
    pub(crate) fn plain_features(&self, file: PathBuf) -> Result<Features> {
        let stack = |rows: &Rows| {
            let values = rows.quants.iter().map(|&x| f32::from(x)).collect();
            (rows.stack.clone(), rows.columns, values)
        };
        self.features(file, self.plain.iter().map(stack))
    }

    fn features(
        &self,
        path: PathBuf,
        stacks: impl Iterator<Item = (String, usize, Vec<f32>)>,
    ) -> Result<Features> {
        let mut file = BufWriter::new(fs::File::create(&path)?);
        let mut offset = 0;
        let mut write = |values: &[f32]| -> Result<u64> {
            let at = offset;
            for value in values {
                file.write_all(&value.to_le_bytes())?;
            }
            offset += 4 * values.len() as u64;
            Ok(at)
        };
        let mut rotations: Vec<(usize, u64)> = Vec::new();
        let mut placed = Vec::new();
        for (name, columns, mut values) in stacks {
            for row in values.chunks_exact_mut(columns) {
                let length = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-30);
                row.iter_mut().for_each(|x| *x /= length);
            }
            let known = rotations.iter().find(|(width, _)| *width == columns);
            let rotation = match known {
                Some((_, at)) => *at,
                None => {
                    let at = write(&rotation(columns))?;
                    rotations.push((columns, at));
                    at
                }
            };
            let offset = write(&values)?;
            placed.push(StackFeatures {
                name,
                columns,
                offset,
                rotation,
            });
        }
        file.flush()?;
        Ok(Features {
            file: path,
            lengths: self.texts.iter().map(Vec::len).collect(),
            stacks: placed,
        })
    }

    /// What the first stack got.
    pub(crate) fn first_rows(&self) -> Result<FirstRows<'_>> {
        let none = "nothing was recorded";
        let masked = self.masked.first().context(none)?;
        let plain = self.plain.first().context(none)?;
        let field = masked.field;
        let of_masked = |row: &[u32]| row.iter().map(|&x| centred(field, x)).collect();
        let of_plain = |row: &[i8]| row.iter().map(|&x| f32::from(x)).collect();
        Ok(FirstRows {
            stack: &masked.name,
            masked: masked.rows().map(of_masked).collect(),
            plain: plain.quants.chunks(plain.columns).map(of_plain).collect(),
            tokens: self.texts.iter().flatten().copied().collect(),
        })
    }
}

/// The rows of the first stack, and the token of each.
pub(crate) struct FirstRows<'a> {
    pub(crate) stack: &'a str,
    /// Numbers from -1 to 1.
    pub(crate) masked: Vec<Vec<f32>>,
    pub(crate) plain: Vec<Vec<f32>>,
    pub(crate) tokens: Vec<u32>,
}

/// The rotation of a width as a matrix: row k is what becomes of the k-th unit vector.
fn rotation(width: usize) -> Vec<f32> {
    let rotation = Rotation::new(width);
    let mut matrix = vec![0.0; width * width];
    for (k, row) in matrix.chunks_exact_mut(width).enumerate() {
        row[k] = 1.0;
        rotation.apply(Isa::detect(), row);
    }
    matrix
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_field::Field;
    use casemate_testkit::tap::{Message, Opened};
    use casemate_wire::Shape;

    fn plain() -> Vec<Rows> {
        let rows = |stack: &str, columns| Rows {
            stack: stack.into(),
            columns,
            quants: (0..2 * columns).map(|i| i as i8 - 3).collect(),
        };
        vec![rows("blk.0.attn_qkv", 4), rows("blk.0.ffn_down", 6)]
    }

    fn seen() -> Seen {
        let shape = |columns| Shape { rows: 8, columns };
        let message = |matrix, rows: u16, elements: &[u32]| Message {
            connection: 0,
            matrix,
            rows,
            elements: elements.to_vec(),
        };
        Seen {
            connections: vec![Opened {
                field: Field::P29,
                matrices: vec![shape(4), shape(6)],
            }],
            messages: vec![
                message(0, 1, &[1, 2, 3, 4]),
                message(1, 2, &[9; 12]),
                message(0, 1, &[5, 6, 7, 8]),
            ],
        }
    }

    #[test]
    fn messages_become_rows_of_their_matrices() {
        let found = stacks(seen(), &plain()).unwrap();
        assert_eq!(found[0].name, "blk.0.attn_qkv");
        assert_eq!(found[0].elements, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(found[1].elements, [9; 12]);
        let mut hole = seen();
        hole.messages.pop();
        let told = stacks(hole, &plain()).unwrap_err().to_string();
        assert!(
            told.contains("4 numbers were recorded instead of 8"),
            "{told}"
        );
        let mut two = seen();
        two.connections.push(two.connections[0].clone());
        assert!(stacks(two, &plain()).is_err());
    }

    #[test]
    fn students_get_rows_of_length_1_and_the_rotation() {
        let folder = tempfile::tempdir().unwrap();
        let recorded = Recorded {
            texts: vec![vec![7], vec![8]],
            masked: stacks(seen(), &plain()).unwrap(),
            plain: plain(),
        };
        let features = recorded.plain_features(folder.path().join("f")).unwrap();
        assert_eq!(features.lengths, [1, 1]);
        let bytes = fs::read(&features.file).unwrap();
        let at = |offset: u64, count: usize| -> Vec<f32> {
            let words = bytes[offset as usize..][..4 * count].as_chunks::<4>().0;
            words.iter().map(|word| f32::from_le_bytes(*word)).collect()
        };
        let first = &features.stacks[0];
        // (-3, -2, -1, 0) by the root of 14.
        let row = at(first.offset, 4);
        assert!(
            (row[0] + 3.0 / 14f32.sqrt()).abs() < 1e-6 && row[3] == 0.0,
            "{row:?}"
        );
        // Rows of a rotation are as long as unit vectors.
        let rotation = at(first.rotation, 16);
        for row in rotation.chunks(4) {
            assert!((row.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-6);
        }
        assert_ne!(features.stacks[0].rotation, features.stacks[1].rotation);
        let first = recorded.first_rows().unwrap();
        assert_eq!(
            (first.stack, &first.tokens[..]),
            ("blk.0.attn_qkv", &[7, 8][..])
        );
        assert_eq!(first.masked.len(), 2);
        assert_eq!(first.plain[1], [1.0, 2.0, 3.0, 4.0]);
    }
}
