"""PyTorch with intel-extension-for-pytorch in bf16, the stack of "Fortify Your Foundations"."""

import time

import intel_extension_for_pytorch as ipex
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import arguments, measure_whole, report
from shapes import SHAPES

options = arguments()
start = time.perf_counter()
torch.set_num_threads(options.threads)
torch.manual_seed(0)
shape = SHAPES[options.model]
config = LlamaConfig(
    max_position_embeddings=options.context, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], pad_token_id=0, **shape
)
torch.set_default_dtype(torch.bfloat16)
model = LlamaForCausalLM(config).eval()
torch.set_default_dtype(torch.float32)
model = ipex.llm.optimize(model, dtype=torch.bfloat16, inplace=True, deployment_mode=True)
load = time.perf_counter() - start


def seconds(prompts, count):
    ids = torch.tensor(prompts)
    start = time.perf_counter()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False, num_beams=1
        )
    taken = time.perf_counter() - start
    if found.shape[1] != ids.shape[1] + count:
        raise RuntimeError(f"IPEX generated {found.shape[1] - ids.shape[1]} of {count} tokens")
    return taken


report("ipex bf16", load, measure_whole(seconds, options, shape["vocab_size"]))
