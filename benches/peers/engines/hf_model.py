"""A Hugging Face directory with random weights of a shape, for engines that convert one."""

import json
import pathlib

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from shapes import SHAPES


def word(token):
    return f"w{token}"


def write(name, place):
    """Writes model and tokenizer of the shape `name` to the folder `place`, unless they are there."""
    place = pathlib.Path(place)
    done = place / "written"
    if done.exists():
        return place
    torch.manual_seed(0)
    shape = SHAPES[name]
    config = LlamaConfig(max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).eval().save_pretrained(place)
    torch.set_default_dtype(torch.float32)
    # Words without merges: prompts are given as tokens, but engines want a tokenizer.
    tokenizer = Tokenizer(models.BPE({word(i): i for i in range(shape["vocab_size"])}, [], unk_token=word(3)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(place / "tokenizer.json"))
    special = {"bos_token": word(1), "eos_token": word(2), "unk_token": word(3), "pad_token": word(0)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    done.touch()
    return place
