"""OpenVINO GenAI over a GGUF file. It generates as a whole, so the times are those of its own metrics."""

import time

import numpy
import openvino
import openvino_genai

from common import arguments, report, tokens

options = arguments()
start = time.perf_counter()
pipeline = openvino_genai.LLMPipeline(options.model, "CPU", INFERENCE_NUM_THREADS=options.threads)
load = time.perf_counter() - start


def generate(prompts, count):
    ids = numpy.array(prompts, dtype=numpy.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
    config = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
    return pipeline.generate(inputs, config).perf_metrics


# Ids that every vocabulary of these models has.
VOCAB = 4096
generate([tokens(32, 1, VOCAB)], 2)
samples = {}
for context in options.contexts:
    metrics = generate([tokens(context, context + 7, VOCAB)], options.tokens)
    samples[f"prefill {context}"] = context * 1e3 / metrics.get_ttft().mean
    samples[f"decode at {context}"] = 1e3 / metrics.get_tpot().mean
if options.batch > 1:
    first = min(options.contexts)
    prompts = [tokens(first, sequence + 99, VOCAB) for sequence in range(options.batch)]
    metrics = generate(prompts, options.tokens)
    samples[f"decode, batch {options.batch}"] = options.batch * 1e3 / metrics.get_tpot().mean
report("OpenVINO", load, samples)
