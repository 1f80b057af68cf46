//! LoRA adapters as PEFT saves them, of which one file is the input and the other is sound.

use std::fs;

use casemate_container::{AdapterSource, ModelConfig, ModelDigest};
use casemate_testkit::adapters::TinyAdapter;
use casemate_testkit::models::Tiny;

use crate::scratch;

const SETTINGS: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const BASE: ModelDigest = ModelDigest([9; 32]);

fn base() -> ModelConfig {
    let tiny = Tiny {
        hidden: 32,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        ffn: 32,
        context: 64,
        ..Tiny::default()
    };
    tiny.build().config
}

/// The two files of an adapter, and the length of the second's header.
fn sound() -> (Vec<u8>, Vec<u8>, usize) {
    let directory = scratch::directory();
    let adapter = TinyAdapter {
        rank: 2,
        ..TinyAdapter::default()
    };
    let adapter = adapter.build(&base(), BASE);
    adapter
        .write_peft(directory.path())
        .expect("files in memory");
    let read = |name| fs::read(directory.path().join(name)).expect("just written");
    let weights = read(WEIGHTS);
    let data: u64 = adapter.tensors.iter().map(|tensor| tensor.size).sum();
    let header = weights.len() - data as usize;
    (read(SETTINGS), weights, header)
}

thread_local! {
    static SOUND: (Vec<u8>, Vec<u8>, usize) = sound();
    static CONFIG: ModelConfig = base();
}

/// Settings, or the header of the weights; the first byte chooses, and whether the base is known. What is accepted can be
/// read to its last byte, is what a sealed file may hold, and fits the base where that is known.
pub(crate) fn adapter(data: &[u8]) {
    let (which, bytes) = data.split_first().unwrap_or((&0, &[]));
    let directory = scratch::directory();
    SOUND.with(|(settings, weights, header)| {
        let (settings, weights) = match which & 1 {
            0 => (bytes, weights.clone()),
            _ => (&settings[..], [bytes, &weights[*header..]].concat()),
        };
        for (name, bytes) in [(SETTINGS, settings), (WEIGHTS, &weights)] {
            fs::write(directory.path().join(name), bytes).expect("a file in memory");
        }
    });
    CONFIG.with(|config| {
        let known = (which & 2 == 0).then_some(config);
        match casemate_import::open_adapter(directory.path(), BASE, known) {
            Err(error) => assert!(!error.to_string().is_empty()),
            Ok(adapter) => read(adapter.as_ref(), known),
        }
    });
}

fn read(adapter: &dyn AdapterSource, base: Option<&ModelConfig>) {
    let config = adapter.config();
    config
        .check()
        .expect("an importer gives a valid configuration");
    assert_eq!(config.base, BASE);
    let tensors = adapter.tensors();
    let fields = tensors.iter().map(|t| (&*t.name, t.dtype, &t.shape[..]));
    config
        .check_tensors(fields, base)
        .expect("an importer gives tensors that fit");
    for (index, tensor) in tensors.iter().enumerate() {
        let mut bytes = vec![0; tensor.size as usize];
        adapter
            .read_tensor(index, 0, &mut bytes)
            .expect("a tensor lies within its file");
    }
}

pub(crate) fn adapter_seeds() -> Vec<Vec<u8>> {
    let (settings, weights, header) = sound();
    let mut seeds = vec![[&[1], &weights[..header]].concat()];
    let named = |key: &str, modules: &str| {
        let settings = String::from_utf8_lossy(&settings);
        let none = format!("\"{key}\":null");
        assert!(settings.contains(&none), "{settings}");
        settings.replace(&none, &format!("\"{key}\":{modules}"))
    };
    for settings in [
        String::from_utf8_lossy(&settings).into_owned(),
        named("target_modules", "\"all-linear\""),
        named("target_modules", "\".*_proj\""),
        named(
            "target_modules",
            r#"["q_proj","self_attn.k_proj","v_proj","o_proj","gate_proj","layers.0.mlp.up_proj","model.layers.0.mlp.down_proj"]"#,
        ),
        named(
            "target_modules",
            r#""all-linear","exclude_modules":["0.self_attn.q_proj"]"#,
        ),
    ] {
        for which in [0, 2] {
            seeds.push([&[which], settings.as_bytes()].concat());
        }
    }
    seeds
}
