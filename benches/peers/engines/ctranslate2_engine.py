"""CTranslate2 over a converted model with random weights."""

import pathlib
import time

import ctranslate2
from ctranslate2.converters import TransformersConverter

import hf_model
from common import arguments, measure_whole, report
from shapes import SHAPES

options = arguments()
vocab = SHAPES[options.model]["vocab_size"]
scratch = pathlib.Path(options.scratch)
converted = scratch / f"{options.model}-ctranslate2-{options.format}"
if not (converted / "model.bin").exists():
    folder = hf_model.write(options.model, scratch / f"{options.model}-hf")
    TransformersConverter(str(folder), low_cpu_mem_usage=True).convert(str(converted), quantization=options.format, force=True)
start = time.perf_counter()
generator = ctranslate2.Generator(
    str(converted), device="cpu", compute_type=options.format, inter_threads=1, intra_threads=options.threads
)
load = time.perf_counter() - start


def seconds(prompts, count):
    words = [[hf_model.word(token) for token in prompt] for prompt in prompts]
    start = time.perf_counter()
    results = generator.generate_batch(
        words, max_length=count, min_length=count, beam_size=1, sampling_topk=1, include_prompt_in_result=False
    )
    taken = time.perf_counter() - start
    if any(len(result.sequences_ids[0]) != count for result in results):
        raise RuntimeError(f"CTranslate2 generated {[len(r.sequences_ids[0]) for r in results]} of {count} tokens")
    return taken


report("CTranslate2", load, measure_whole(seconds, options, vocab))
