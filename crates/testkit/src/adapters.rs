//! Random LoRA adapters for tiny models: held in memory for sealing, or written as PEFT saves them.

use std::fs;
use std::io;
use std::path::Path;

use casemate_container::{
    AdapterConfig, AdapterSource, AdapterTensor, DType, Factor, ModelConfig, ModelDigest,
    RopeLayout, SourceError, SourceTensor, Target,
};
use half::{bf16, f16};
use serde_json::{Map, json};

use crate::models::{Random, read};

/// An adapter held in memory.
#[derive(Clone)]
pub struct MemoryAdapter {
    /// Name to seal under.
    pub name: String,
    /// What it is, and for which base.
    pub config: AdapterConfig,
    /// Tensors; `values` and `data` are in the same order.
    pub tensors: Vec<SourceTensor>,
    /// Values of each tensor, as they are stored.
    pub values: Vec<Vec<f32>>,
    data: Vec<Vec<u8>>,
}

/// What to make.
#[derive(Clone, Debug)]
pub struct TinyAdapter {
    /// Where the factors come from.
    pub seed: u64,
    /// Rank.
    pub rank: u32,
    /// Numerator of the scale.
    pub alpha: f32,
    /// Whether the scale goes by the root of the rank.
    pub rank_stabilised: bool,
    /// The products that it changes, in every block.
    pub targets: Vec<Target>,
    /// Encoding: F32, F16 or BF16.
    pub dtype: DType,
}

impl Default for TinyAdapter {
    fn default() -> TinyAdapter {
        TinyAdapter {
            seed: 7,
            rank: 4,
            alpha: 8.0,
            rank_stabilised: false,
            targets: Target::ALL.to_vec(),
            dtype: DType::F32,
        }
    }
}

impl TinyAdapter {
    /// Makes an adapter to the model `digest` of this architecture. The same description gives the same bytes everywhere.
    pub fn build(&self, base: &ModelConfig, digest: ModelDigest) -> MemoryAdapter {
        let mut adapter = MemoryAdapter {
            name: "tiny-adapter".into(),
            config: AdapterConfig {
                base: digest,
                rank: self.rank,
                alpha: self.alpha,
                rank_stabilised: self.rank_stabilised,
                rope_layout: RopeLayout::Half,
            },
            tensors: Vec::new(),
            values: Vec::new(),
            data: Vec::new(),
        };
        let mut random = Random(self.seed);
        let rank = u64::from(self.rank);
        for layer in 0..base.layers {
            for &target in &self.targets {
                let (outputs, inputs) = target.shape(base);
                for (factor, shape) in [(Factor::A, [rank, inputs]), (Factor::B, [outputs, rank])] {
                    let name = AdapterTensor {
                        layer,
                        target,
                        factor,
                    };
                    // Large enough to change answers.
                    let scale = 0.8 / (shape[1] as f32).sqrt();
                    let values = random.values(shape[0] * shape[1], 0.0, scale);
                    adapter.push(&name.to_string(), self.dtype, &shape, &values);
                }
            }
        }
        adapter
    }
}

impl MemoryAdapter {
    /// Adds a tensor, rounding its values to the encoding.
    ///
    /// # Panics
    /// For encodings other than F32, F16 and BF16.
    pub fn push(&mut self, name: &str, dtype: DType, shape: &[u64], values: &[f32]) {
        let (data, values) = encode(dtype, values);
        self.tensors.push(SourceTensor {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
            size: data.len() as u64,
        });
        self.data.push(data);
        self.values.push(values);
    }

    /// Changes the values of the `index`th tensor.
    pub fn set(&mut self, index: usize, change: impl FnOnce(&mut [f32])) {
        let mut values = self.values[index].clone();
        change(&mut values);
        let encoded = encode(self.tensors[index].dtype, &values);
        (self.data[index], self.values[index]) = encoded;
    }

    /// The values of a tensor.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn values_of(&self, name: &str) -> &[f32] {
        let at = self.tensors.iter().position(|t| t.name == name);
        &self.values[at.expect("the adapter has this tensor")]
    }

    /// Writes it into `directory`, which is made, as PEFT does.
    ///
    /// # Errors
    /// When files cannot be written.
    pub fn write_peft(&self, directory: &Path) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        let config = json!({
            "alpha_pattern": {},
            "base_model_name_or_path": "tiny",
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": self.config.alpha,
            "lora_dropout": 0.0,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.config.rank,
            "rank_pattern": {},
            "target_modules": null,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.config.rank_stabilised,
        });
        fs::write(directory.join("adapter_config.json"), config.to_string())?;
        let mut header = Map::new();
        let mut data = Vec::new();
        for (tensor, bytes) in self.tensors.iter().zip(&self.data) {
            let entry = json!({
                "dtype": tensor.dtype.name(),
                "shape": tensor.shape,
                "data_offsets": [data.len(), data.len() + bytes.len()],
            });
            header.insert(peft_name(&tensor.name), entry);
            data.extend_from_slice(bytes);
        }
        let header = serde_json::Value::Object(header).to_string().into_bytes();
        let length = (header.len() as u64).to_le_bytes();
        let file = [&length[..], &header, &data].concat();
        fs::write(directory.join("adapter_model.safetensors"), file)
    }
}

/// What PEFT calls a tensor.
///
/// # Panics
/// If it is none of an adapter.
#[must_use]
pub fn peft_name(canonical: &str) -> String {
    let tensor = AdapterTensor::parse(canonical).expect("a tensor of an adapter");
    let module = match tensor.target {
        Target::Query => "self_attn.q_proj",
        Target::Key => "self_attn.k_proj",
        Target::Value => "self_attn.v_proj",
        Target::AttentionOutput => "self_attn.o_proj",
        Target::Gate => "mlp.gate_proj",
        Target::Up => "mlp.up_proj",
        Target::Down => "mlp.down_proj",
    };
    let factor = match tensor.factor {
        Factor::A => 'A',
        Factor::B => 'B',
    };
    format!(
        "base_model.model.model.layers.{}.{module}.lora_{factor}.weight",
        tensor.layer
    )
}

fn encode(dtype: DType, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = Vec::new();
    let mut rounded = Vec::new();
    for &value in values {
        match dtype {
            DType::F32 => {
                bytes.extend(value.to_le_bytes());
                rounded.push(value);
            }
            DType::F16 => {
                let value = f16::from_f32(value);
                bytes.extend(value.to_le_bytes());
                rounded.push(value.to_f32());
            }
            DType::BF16 => {
                let value = bf16::from_f32(value);
                bytes.extend(value.to_le_bytes());
                rounded.push(value.to_f32());
            }
            other => panic!("no encoder for {other}"),
        }
    }
    (bytes, rounded)
}

impl AdapterSource for MemoryAdapter {
    fn name(&self) -> &str {
        &self.name
    }

    fn config(&self) -> &AdapterConfig {
        &self.config
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read_tensor(&self, index: usize, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        read(&self.tensors[index], &self.data[index], offset, out)
    }
}
