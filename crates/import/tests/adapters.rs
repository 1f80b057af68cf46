//! LoRA adapters as PEFT saves them: what is read, and what is refused by name.

use std::fs;
use std::path::Path;

use casemate_container::{
    AdapterMismatch, AdapterSource, DType, ModelConfig, ModelDigest, RopeLayout, Target,
};
use casemate_import::{Fault, ImportError, Missing, Unsupported, open_adapter};
use casemate_testkit::adapters::{MemoryAdapter, TinyAdapter};
use casemate_testkit::data;
use casemate_testkit::models::Tiny;
use serde_json::{Value, json};
use tempfile::TempDir;

const BASE: ModelDigest = ModelDigest([9; 32]);

fn base() -> ModelConfig {
    Tiny::default().build().config
}

fn adapter() -> MemoryAdapter {
    TinyAdapter::default().build(&base(), BASE)
}

/// Writes an adapter, after a change to its settings.
fn written(adapter: &MemoryAdapter, change: impl FnOnce(&mut Value)) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    adapter.write_peft(directory.path()).unwrap();
    let file = directory.path().join("adapter_config.json");
    let mut settings: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    change(&mut settings);
    fs::write(&file, settings.to_string()).unwrap();
    directory
}

fn open(directory: &Path) -> Result<Box<dyn AdapterSource>, ImportError> {
    open_adapter(directory, BASE, Some(&base()))
}

fn refused(directory: &TempDir) -> ImportError {
    match open(directory.path()) {
        Ok(_) => panic!("the adapter was accepted"),
        Err(error) => error,
    }
}

#[test]
fn an_adapter_of_every_product_is_read_to_the_byte() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let tiny = TinyAdapter {
            rank: 3,
            alpha: 4.5,
            rank_stabilised: true,
            dtype,
            ..TinyAdapter::default()
        };
        let wanted = tiny.build(&base(), BASE);
        let directory = written(&wanted, |_| {});
        let found = open(directory.path()).ok().unwrap();
        // PEFT's rows are in the order of transformers, whatever the base has.
        assert_eq!(found.config().rope_layout, RopeLayout::Half);
        assert_eq!(found.config(), &wanted.config);
        assert_eq!(found.tensors().len(), wanted.tensors.len());
        for (index, tensor) in found.tensors().iter().enumerate() {
            let at = wanted.tensors.iter().position(|t| t == tensor);
            let at = at.unwrap_or_else(|| panic!("{tensor:?}"));
            let (mut ours, mut theirs) = (vec![0; tensor.size as usize], Vec::new());
            found.read_tensor(index, 0, &mut ours).unwrap();
            theirs.resize(ours.len(), 0);
            wanted.read_tensor(at, 0, &mut theirs).unwrap();
            assert_eq!(ours, theirs, "{}", tensor.name);
            assert!(
                found
                    .read_tensor(index, tensor.size, &mut ours[..1])
                    .is_err()
            );
        }
    }
}

#[test]
fn the_published_adapter_is_read() {
    let Some(settings) = data::file("lora/qwen2.5-0.5b-r8-why/adapter_config.json") else {
        return;
    };
    let directory = settings.parent().unwrap();
    let found = open_adapter(directory, BASE, None).ok().unwrap();
    let config = found.config();
    assert_eq!((config.rank, config.alpha, config.scale()), (8, 16.0, 2.0));
    // Q and V of 24 layers, two factors each.
    assert_eq!(found.tensors().len(), 96);
    let q = found
        .tensors()
        .iter()
        .find(|t| t.name == "blk.23.attn_q.weight.lora_b")
        .unwrap();
    assert_eq!((q.dtype, &q.shape[..]), (DType::F32, &[896, 8][..]));
    // Another base's architecture: blocks that it does not have.
    let error = open_adapter(directory, BASE, Some(&base())).err().unwrap();
    let ImportError::Malformed {
        fault: Fault::Adapter { .. },
        ..
    } = error
    else {
        panic!("{error}")
    };
}

#[test]
fn what_would_change_the_arithmetic_is_refused_by_name() {
    for (key, value) in [
        ("use_dora", json!(true)),
        ("bias", json!("lora_only")),
        ("lora_bias", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("rank_pattern", json!({"q_proj": 8})),
        ("alpha_pattern", json!({"q_proj": 8})),
        ("layers_to_transform", json!([0, 1])),
        ("layers_pattern", json!("layers")),
        ("layer_replication", json!([[0, 1]])),
        ("fan_in_fan_out", json!(true)),
        ("trainable_token_indices", json!([5])),
        ("use_qalora", json!(true)),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("olora")),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("peft_type", json!("LOHA")),
        ("invented_later", json!(3)),
    ] {
        let directory = written(&adapter(), |settings| settings[key] = value.clone());
        match refused(&directory) {
            ImportError::Unsupported {
                need: Unsupported::Setting { key: named, .. },
                path,
            } => {
                assert_eq!(named, key);
                assert!(path.ends_with("adapter_config.json"));
            }
            other => panic!("{key}: {other}"),
        }
    }
    // What asks for nothing, and what training alone has use for, is nobody's business.
    let harmless = [
        ("invented_later", json!(null)),
        ("another", json!({})),
        ("lora_dropout", json!(0.1)),
        ("init_lora_weights", json!("gaussian")),
        ("target_modules", json!("all-linear")),
    ];
    let directory = written(&adapter(), |settings| {
        for (key, value) in harmless {
            settings[key] = value;
        }
    });
    assert!(open(directory.path()).is_ok());
}

#[test]
fn settings_must_be_there_and_possible() {
    for (key, value, said) in [
        ("r", json!(0), "`r` is 0"),
        ("r", json!(4096), "`r` is 4096"),
        ("r", json!("4"), "`r` is not a number of rows"),
        ("r", json!(null), "`r` is missing"),
        ("lora_alpha", json!(0), "`lora_alpha` is 0"),
        ("lora_alpha", json!(-1), "`lora_alpha` is -1"),
        ("lora_alpha", json!("x"), "`lora_alpha` is not a number"),
        ("use_rslora", json!(1), "`use_rslora` is not a Boolean"),
        ("peft_type", json!(null), "`peft_type` is missing"),
        ("target_modules", json!([1]), "`target_modules` is not"),
    ] {
        let directory = written(&adapter(), |settings| settings[key] = value.clone());
        let error = refused(&directory).to_string();
        assert!(error.contains(said), "{error}");
    }
}

/// What comes of an adapter for Q and down, in both blocks, with these lists of modules.
fn with_modules(targets: Value, excluded: Value) -> Result<(), ImportError> {
    let adapter = TinyAdapter {
        targets: vec![Target::Query, Target::Down],
        ..TinyAdapter::default()
    };
    with_modules_of(&adapter.build(&base(), BASE), targets, excluded)
}

fn with_modules_of(
    adapter: &MemoryAdapter,
    targets: Value,
    excluded: Value,
) -> Result<(), ImportError> {
    let directory = written(adapter, |settings| {
        settings["target_modules"] = targets;
        settings["exclude_modules"] = excluded;
    });
    // Without the base's architecture, the last block that has tensors is the last.
    let without = open_adapter(directory.path(), BASE, None).map(|_| ());
    let with = open(directory.path()).map(|_| ());
    let said = |outcome: &Result<(), ImportError>| outcome.as_ref().err().map(ToString::to_string);
    assert_eq!(said(&without), said(&with));
    with
}

/// Only Q of the first block and down of the second.
fn uneven() -> MemoryAdapter {
    let adapter = TinyAdapter {
        targets: vec![Target::Query, Target::Down],
        ..TinyAdapter::default()
    };
    let full = adapter.build(&base(), BASE);
    let empty = TinyAdapter {
        targets: Vec::new(),
        ..adapter
    };
    let mut built = empty.build(&base(), BASE);
    for (tensor, values) in full.tensors.iter().zip(&full.values) {
        if tensor.name.starts_with("blk.0.attn_q") || tensor.name.starts_with("blk.1.ffn_down") {
            built.push(&tensor.name, tensor.dtype, &tensor.shape, values);
        }
    }
    built
}

#[test]
fn tensors_and_settings_must_agree() {
    let none = || json!(null);
    for listed in [
        json!(["q_proj", "down_proj"]),
        json!(["self_attn.q_proj", "down_proj"]),
        // In full, as PEFT writes what cannot be said shorter.
        json!([
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.0.mlp.down_proj",
            "model.layers.1.mlp.down_proj",
        ]),
        json!(["q_proj", "layers.0.mlp.down_proj", "1.mlp.down_proj"]),
        // Names that models of other kinds have.
        json!(["q_proj", "down_proj", "query_key_value", "c_attn"]),
        json!(".*\\.(q_proj|down_proj)"),
    ] {
        assert!(with_modules(listed.clone(), none()).is_ok(), "{listed}");
    }
    let refused = |listed: Value| with_modules(listed, none()).unwrap_err().to_string();
    for (listed, said) in [
        (
            json!(["q_proj"]),
            "there are tensors for model.layers.0.mlp.down_proj, but adapter_config.json does not list it",
        ),
        (
            json!(["q_proj", "down_proj", "up_proj"]),
            "lists up_proj under target_modules, but there are no tensors for model.layers.0.mlp.up_proj",
        ),
        // `j_proj` is no module because its letters end one.
        (json!(["_proj"]), "does not list it under target_modules"),
        (json!([]), "does not list it under target_modules"),
        // A block more than the base has, and one less.
        (
            json!(["q_proj", "down_proj", "model.layers.2.self_attn.q_proj"]),
            "lists model.layers.2.self_attn.q_proj under target_modules",
        ),
        (
            json!(["model.layers.0.self_attn.q_proj", "down_proj"]),
            "there are tensors for model.layers.1.self_attn.q_proj",
        ),
        // One digit more is another block.
        (
            json!(["0.self_attn.q_proj", "11.self_attn.q_proj", "down_proj"]),
            "there are tensors for model.layers.1.self_attn.q_proj",
        ),
        (
            json!(["q_proj", "down_proj", "lm_head"]),
            "lists lm_head under target_modules, but there are no tensors for lm_head",
        ),
        (
            json!(["q_proj", "down_proj", "embed_tokens"]),
            "there are no tensors for model.embed_tokens",
        ),
        (
            json!("all-linear"),
            "has all-linear under target_modules, but there are no tensors for model.layers.0.self_attn.k_proj",
        ),
    ] {
        let found = refused(listed.clone());
        assert!(found.contains(said), "{listed}: {found}");
    }
}

#[test]
fn what_is_excluded_has_no_tensors_and_lacks_none() {
    let linear = json!("all-linear");
    let attention = ["k_proj", "v_proj", "o_proj"];
    let excluded = json!([&attention[..], &["gate_proj", "mlp.up_proj"]].concat());
    assert!(with_modules(linear.clone(), excluded).is_ok());
    let found = with_modules(linear.clone(), json!(attention)).unwrap_err();
    let said = "no tensors for model.layers.0.mlp.gate_proj";
    assert!(found.to_string().contains(said), "{found}");
    let found = with_modules(json!(["q_proj", "down_proj"]), json!(["1.mlp.down_proj"]));
    let said = "there are tensors for model.layers.1.mlp.down_proj, but adapter_config.json lists it under exclude_modules";
    assert!(found.unwrap_err().to_string().contains(said));
    for nothing in [json!(null), json!([]), json!("")] {
        assert!(with_modules(json!(["q_proj", "down_proj"]), nothing).is_ok());
    }
    let uneven = uneven();
    let listed = json!(["q_proj", "down_proj"]);
    let excluded = json!(["model.layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"]);
    assert!(with_modules_of(&uneven, listed.clone(), excluded).is_ok());
    let excluded = json!(["model.layers.1.self_attn.q_proj"]);
    let found = with_modules_of(&uneven, listed, excluded).unwrap_err();
    let said = "no tensors for model.layers.0.mlp.down_proj";
    assert!(found.to_string().contains(said), "{found}");
}

/// A regular expression is believed where the tensors leave only one thing that it can mean.
#[test]
fn an_expression_is_refused_where_blocks_differ() {
    let uneven = uneven();
    let full = json!([
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj"
    ]);
    assert!(with_modules_of(&uneven, full, json!(null)).is_ok());
    let expression = "model\\.layers\\.(0\\.self_attn\\.q|1\\.mlp\\.down)_proj";
    let linear = "all-linear";
    for (targets, excluded, key) in [
        (json!(expression), json!(null), "target_modules"),
        (json!(linear), json!(".*1\\.self.*"), "exclude_modules"),
        (
            json!(["q_proj", "down_proj"]),
            json!(".*1\\.self.*"),
            "exclude_modules",
        ),
    ] {
        match with_modules_of(&uneven, targets, excluded) {
            Err(ImportError::Unsupported {
                need: Unsupported::ModulePattern { key: named, .. },
                path,
            }) => {
                assert_eq!(named, key);
                assert!(path.ends_with("adapter_model.safetensors"));
            }
            other => panic!("{key}: {other:?}"),
        }
    }
}

#[test]
fn wrong_rank_targets_and_shapes_are_refused_by_tensor() {
    let mismatch = |adapter: &MemoryAdapter, change: fn(&mut Value)| {
        let directory = written(adapter, change);
        match refused(&directory) {
            ImportError::Malformed {
                fault: Fault::Adapter { mismatch },
                path,
            } => {
                assert!(path.ends_with("adapter_model.safetensors"));
                mismatch
            }
            other => panic!("{other}"),
        }
    };
    let said = mismatch(&adapter(), |settings| settings["r"] = json!(5));
    assert!(
        matches!(said, AdapterMismatch::Rank { rank: 5, .. }),
        "{said}"
    );
    // Made for a wider model.
    let wide = Tiny {
        hidden: 128,
        ..Tiny::default()
    };
    let wide = TinyAdapter::default().build(&wide.build().config, BASE);
    let said = mismatch(&wide, |_| {});
    assert!(matches!(said, AdapterMismatch::Shape { .. }), "{said}");
    // For a deeper one.
    let deep = Tiny {
        layers: 3,
        ..Tiny::default()
    };
    let deep = TinyAdapter::default().build(&deep.build().config, BASE);
    let said = mismatch(&deep, |_| {});
    assert!(
        matches!(said, AdapterMismatch::Layer { layers: 2, .. }),
        "{said}"
    );
    let mut half = adapter();
    half.tensors.pop();
    let said = mismatch(&half, |_| {});
    assert!(matches!(said, AdapterMismatch::Unpaired { .. }), "{said}");
}

/// A file with one tensor of this name beside those of an adapter.
fn with_tensor(name: &str) -> TempDir {
    let directory = written(&adapter(), |_| {});
    let file = directory.path().join("adapter_model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let data = bytes.len() - 8 - length;
    header[name] = json!({"dtype": "F32", "shape": [1, 1], "data_offsets": [data, data + 4]});
    let header = header.to_string().into_bytes();
    let parts = [
        &(header.len() as u64).to_le_bytes()[..],
        &header,
        &bytes[8 + length..],
        &[0; 4],
    ];
    fs::write(&file, parts.concat()).unwrap();
    directory
}

#[test]
fn tensors_that_are_no_factor_are_refused_by_name() {
    for name in [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
        "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight",
    ] {
        match refused(&with_tensor(name)) {
            ImportError::Unsupported {
                need: Unsupported::AdapterTensor { tensor },
                ..
            } => assert_eq!(tensor, name),
            other => panic!("{name}: {other}"),
        }
    }
    let norm = "base_model.model.model.layers.0.input_layernorm.lora_A.weight";
    let error = refused(&with_tensor(norm)).to_string();
    assert!(error.contains("attn_norm.weight.lora_a"), "{error}");
}

#[test]
fn a_directory_without_weights_or_with_pickled_ones_is_refused() {
    let directory = written(&adapter(), |_| {});
    let file = directory.path().join("adapter_model.safetensors");
    fs::remove_file(&file).unwrap();
    assert!(matches!(
        refused(&directory),
        ImportError::Missing {
            part: Missing::File { .. },
            ..
        }
    ));
    fs::write(directory.path().join("adapter_model.bin"), b"PK").unwrap();
    assert!(matches!(
        refused(&directory),
        ImportError::Unsupported {
            need: Unsupported::WeightFormat { .. },
            ..
        }
    ));
}

#[test]
fn an_adapter_is_no_model() {
    let directory = written(&adapter(), |_| {});
    let error = casemate_import::open(directory.path()).err().unwrap();
    assert!(error.to_string().contains("--adapter"), "{error}");
}
