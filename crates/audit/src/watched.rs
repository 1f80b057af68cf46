//! The rows that a worker would be sent if nothing hid them: what the inputs of public products are in int8, rotated, as the
//! enclave quantises them. Their scales stay inside in any case.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use casemate_container::Access;
use casemate_engine::linear::{LinearLayer, LinearScratch};
use casemate_engine::outsource::{ExactLayer, Outsource, Place};
use casemate_kernels::team::Team;

/// The rows that one stack of matrices got.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// As `blk.0.attn_qkv`.
    pub stack: String,
    /// Elements of a row.
    pub columns: usize,
    /// Row after row.
    pub quants: Vec<i8>,
}

/// Notes the inputs of all public products of an engine, in the order in which a worker would number their matrices.
/// Everything is computed where it was.
#[derive(Clone, Default)]
pub struct Watch(Arc<Mutex<Vec<Rows>>>);

fn lock(rows: &Mutex<Vec<Rows>>) -> MutexGuard<'_, Vec<Rows>> {
    rows.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    /// What was noted since this was asked last, by stacks.
    pub fn take(&self) -> Vec<Rows> {
        let mut rows = lock(&self.0);
        let emptied = |rows: &mut Rows| Rows {
            stack: rows.stack.clone(),
            columns: rows.columns,
            quants: std::mem::take(&mut rows.quants),
        };
        rows.iter_mut().map(emptied).collect()
    }
}

impl Outsource for Watch {
    fn layer(&self, place: Place, access: Access, layer: ExactLayer) -> Box<dyn LinearLayer> {
        if access != Access::Public {
            return Box::new(layer);
        }
        let mut rows = lock(&self.0);
        rows.push(Rows {
            stack: place.to_string(),
            columns: layer.inputs(),
            quants: Vec::new(),
        });
        Box::new(Watched {
            stack: rows.len() - 1,
            layer,
            rows: Arc::clone(&self.0),
        })
    }

    fn idle(&self, _: &Team) -> bool {
        false
    }
}

struct Watched {
    stack: usize,
    layer: ExactLayer,
    rows: Arc<Mutex<Vec<Rows>>>,
}

impl LinearLayer for Watched {
    fn inputs(&self) -> usize {
        self.layer.inputs()
    }

    fn outputs(&self) -> usize {
        self.layer.outputs()
    }

    fn forward(&self, team: &Team, scratch: &mut LinearScratch, x: &[f32], y: &mut [f32]) {
        let quantised = self.layer.quantise(team, scratch, x);
        let mut row = vec![0; quantised.columns()];
        let mut rows = lock(&self.rows);
        for i in 0..quantised.rows() {
            quantised.row(i, &mut row);
            rows[self.stack].quants.extend_from_slice(&row);
        }
        drop(rows);
        self.layer.forward(team, scratch, x, y);
    }

    fn bytes(&self) -> u64 {
        self.layer.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_container::signing::SigningKey;
    use casemate_container::{DataKey, SealOptions, SealedFile, Silent, seal};
    use casemate_engine::{Compute, Engine, EngineOptions};
    use casemate_testkit::models::Tiny;

    #[test]
    fn inputs_of_public_products_are_noted_and_change_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.casemate");
        let (data_key, provider) = (DataKey::generate(), SigningKey::generate());
        let options = SealOptions {
            version: 1,
            public_tensors: vec!["blk.*.ffn_*.weight".into()],
            ..SealOptions::default()
        };
        let tiny = Tiny::default().build();
        seal(&tiny, &options, &data_key, &provider, &path, &Silent).unwrap();
        let logits = |watch: Option<Watch>| {
            let model = SealedFile::open(&path).unwrap();
            let model = model.unlock(&data_key, &provider.verifying_key()).unwrap();
            let model = model.load(1, &Silent).unwrap();
            let options = EngineOptions {
                compute: Compute::Int8Row,
                threads: 1,
                ..EngineOptions::default()
            };
            let outsource = watch.map(|watch| Arc::new(watch) as Arc<dyn Outsource>);
            let engine = Engine::load_with(model, vec![], &options, outsource, &Silent).unwrap();
            let mut logits = Vec::new();
            let text = [5, 6, 7, 8, 9];
            engine
                .evaluate(&text, |_, row| logits.extend_from_slice(row))
                .unwrap();
            logits
        };
        let watch = Watch::default();
        assert_eq!(logits(Some(watch.clone())), logits(None));
        let rows = watch.take();
        let stacks: Vec<_> = rows.iter().map(|r| (r.stack.as_str(), r.columns)).collect();
        // Norms fit the pattern, too, and are no products.
        let expected = [
            ("blk.0.ffn_gate_up", 64),
            ("blk.0.ffn_down", 128),
            ("blk.1.ffn_gate_up", 64),
            ("blk.1.ffn_down", 128),
        ];
        assert_eq!(stacks, expected);
        for rows in &rows {
            assert_eq!(rows.quants.len(), 5 * rows.columns, "{}", rows.stack);
            // Every row has its largest magnitude at the end of the range.
            let mut each = rows.quants.chunks(rows.columns);
            assert!(each.all(|row| row.iter().any(|x| x.unsigned_abs() == 127)));
        }
        assert!(watch.take().iter().all(|rows| rows.quants.is_empty()));
    }
}
