"""OpenVINO GenAI over a converted model with random weights. It generates as a whole, so the times are those of its own metrics."""

import pathlib
import time

import numpy
import openvino
import openvino_genai

from common import arguments, report, tokens
from shapes import SHAPES

options = arguments()
vocab = SHAPES[options.model]["vocab_size"]
scratch = pathlib.Path(options.scratch)
converted = scratch / f"{options.model}-openvino-{options.format}"
if not (converted / "written").exists():
    import hf_model
    import openvino_tokenizers
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    folder = hf_model.write(options.model, scratch / f"{options.model}-hf")
    eight = {"quantization_config": OVWeightQuantizationConfig(bits=8)} if options.format == "int8" else {}
    OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, **eight).save_pretrained(converted)
    tokenizer, back = openvino_tokenizers.convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
    openvino.save_model(tokenizer, converted / "openvino_tokenizer.xml")
    openvino.save_model(back, converted / "openvino_detokenizer.xml")
    (converted / "written").touch()
start = time.perf_counter()
pipeline = openvino_genai.LLMPipeline(str(converted), "CPU", INFERENCE_NUM_THREADS=options.threads)
load = time.perf_counter() - start


def generate(prompts, count):
    ids = numpy.array(prompts, dtype=numpy.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
    config = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
    return pipeline.generate(inputs, config).perf_metrics


generate([tokens(32, 1, vocab)], 2)
samples = {}
for context in options.contexts:
    metrics = generate([tokens(context, context + 7, vocab)], options.tokens)
    samples[f"prefill {context}"] = context * 1e3 / metrics.get_ttft().mean
    samples[f"decode at {context}"] = 1e3 / metrics.get_tpot().mean
if options.batch > 1:
    first = min(options.contexts)
    prompts = [tokens(first, sequence + 99, vocab) for sequence in range(options.batch)]
    metrics = generate(prompts, options.tokens)
    samples[f"decode, batch {options.batch}"] = options.batch * 1e3 / metrics.get_tpot().mean
report("OpenVINO", load, samples)
