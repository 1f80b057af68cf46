use casemate_container::{DType, Family, RopeLayout, RopeScaling};

use crate::test_data::cached;

#[test]
fn opens_the_demo_model() {
    let Some(path) = cached("SmolLM2-135M-Instruct.Q4_1.gguf") else {
        return;
    };
    let model = crate::open(&path).unwrap();
    assert_eq!(model.name(), "Smollm2 135M 8k Lc100K Mix1 Ep2");
    let config = model.config();
    assert_eq!(
        (config.hidden, config.layers, config.heads, config.kv_heads),
        (576, 30, 9, 3)
    );
    assert_eq!(
        (config.head_dim, config.ffn, config.vocab),
        (64, 1536, 49152)
    );
    assert_eq!((config.context, config.rope_theta), (8192, 100_000.0));
    assert_eq!(config.norm_eps, 1e-5);
    assert_eq!(config.family, Family::Llama);
    assert_eq!(config.rope_scaling, RopeScaling::None);
    assert_eq!(config.rope_layout, RopeLayout::Interleaved);
    assert!(config.tied_embeddings && !config.qkv_bias && !config.add_bos);
    assert_eq!(
        (config.bos, config.eos.as_slice()),
        (Some(1), [2, 0].as_slice())
    );

    assert_eq!(model.tensors().len(), 272);
    let embedding = &model.tensors()[0];
    assert_eq!(embedding.name, "token_embd.weight");
    assert_eq!(
        (embedding.dtype, embedding.shape.as_slice()),
        (DType::Q8_0, [49152, 576].as_slice())
    );
    // The tensors fill the file's data section, as its writer laid it out.
    let last = model
        .tensors()
        .iter()
        .position(|t| t.name == "output_norm.weight")
        .unwrap();
    let mut norm = vec![0; model.tensors()[last].size as usize];
    model.read_tensor(last, 0, &mut norm).unwrap();
    let first = f32::from_le_bytes(norm[..4].try_into().unwrap());
    assert!(
        (0.1..100.0).contains(&first),
        "a norm's weight is near one: {first}"
    );

    let names: Vec<&str> = model
        .assets()
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(names, ["tokenizer.json", "chat_template.jinja"]);
    assert!(
        model.assets()[1]
            .1
            .starts_with(b"{% for message in messages %}")
    );
}
