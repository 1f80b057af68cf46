"""The shapes that `casemate bench --synthetic` knows, in the words of `transformers`."""


def shape(hidden, layers, heads, kv_heads, ffn, vocab):
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
    }


SHAPES = {
    "llama2-7b": shape(4096, 32, 32, 32, 11008, 32000),
    "llama2-13b": shape(5120, 40, 40, 40, 13824, 32000),
    "tinyllama-1.1b": shape(2048, 22, 32, 4, 5632, 32000),
    "llama3-8b": shape(4096, 32, 32, 8, 14336, 128256),
    "smoke": shape(256, 4, 4, 2, 768, 4096),
}
