//! Models written by this room come back from the importer as they were.

use casemate_container::{DType, Family, ModelSource};
use casemate_testkit::models::{MemoryModel, Tiny};
use casemate_testkit::{data, gguf, llama2c};
use tokenizers::Tokenizer;

fn import(model: &MemoryModel) -> Box<dyn ModelSource> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    gguf::write(model, &path).unwrap();
    casemate_import::open(&path).unwrap()
}

fn tokenizer(source: &dyn ModelSource) -> Tokenizer {
    let (_, json) = source
        .assets()
        .iter()
        .find(|(name, _)| name == "tokenizer.json")
        .unwrap();
    Tokenizer::from_bytes(json).unwrap()
}

fn assert_same_tensors(model: &MemoryModel, imported: &dyn ModelSource) {
    assert_eq!(imported.tensors().len(), model.tensors.len());
    for (index, tensor) in imported.tensors().iter().enumerate() {
        let at = model
            .tensors
            .iter()
            .position(|other| other == tensor)
            .unwrap();
        let mut bytes = vec![0; tensor.size as usize];
        imported.read_tensor(index, 0, &mut bytes).unwrap();
        assert_eq!(bytes, model.data[at], "{}", tensor.name);
    }
}

#[test]
fn tiny_models_survive_gguf() {
    for (family, dtype, tied) in [
        (Family::Llama, DType::F32, true),
        (Family::Llama, DType::Q8_0, false),
        (Family::Qwen2, DType::F32, true),
    ] {
        let model = Tiny {
            family,
            dtype,
            tied,
            ..Tiny::default()
        }
        .build();
        let imported = import(&model);
        assert_eq!(imported.config(), &model.config, "{family:?} {dtype}");
        assert_same_tensors(&model, &*imported);

        let (ours, theirs) = (tokenizer(&model), tokenizer(&*imported));
        for text in [
            "the ring of the sea",
            "  Größe\n\t42 ✓",
            "<|im_start|>user\nhi<|im_end|>",
            "",
        ] {
            let ids = ours.encode(text, true).unwrap().get_ids().to_vec();
            assert_eq!(
                ids,
                theirs.encode(text, true).unwrap().get_ids(),
                "{text:?}"
            );
            assert_eq!(ids[0], model.config.bos.unwrap());
            assert!(ids.iter().all(|&id| id < model.config.vocab));
            assert_eq!(ours.decode(&ids, true).unwrap(), plain(text), "{text:?}");
        }
    }
}

/// What is left of a text when special tokens are not printed.
fn plain(text: &str) -> String {
    text.replace("<|im_start|>", "").replace("<|im_end|>", "")
}

#[test]
fn stories260k_gets_its_tokenizer_from_the_importer() {
    let Some(checkpoint) = data::file("models/stories260K/stories260K.bin") else {
        return;
    };
    let model = llama2c::read(&checkpoint, &checkpoint.with_file_name("tok512.bin"));
    let imported = import(&model);
    assert_eq!(imported.config(), &model.config);
    assert_same_tensors(&model, &*imported);
    // The prompt of the golden continuation.
    let ids = tokenizer(&*imported)
        .encode("Once upon a time", true)
        .unwrap();
    assert_eq!(ids.get_ids(), [1, 403, 407, 261, 378]);
}
