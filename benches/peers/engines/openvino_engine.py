"""OpenVINO GenAI over a converted model with random weights. It generates as a whole and knows
prompts again, so the times are those of its own metrics."""

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
    # Left to itself, the exporter makes models of more than a billion weights 8 bits wide.
    bits = {"quantization_config": OVWeightQuantizationConfig(bits=8)} if options.format == "int8" else {"load_in_8bit": False}
    OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, **bits).save_pretrained(converted)
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
    metrics = pipeline.generate(inputs, config).perf_metrics
    made = metrics.get_num_generated_tokens()
    if made != len(prompts) * count:
        raise RuntimeError(f"OpenVINO generated {made} of {len(prompts) * count} tokens")
    first, all = metrics.get_ttft().mean / 1e3, metrics.get_generate_duration().mean / 1e3
    # Its time per token is divided by the batch, so what came after the first tokens is counted here.
    return first, (made - len(prompts)) / (all - first)


generate([tokens(32, 1, vocab)], 2)
samples = {}
for context in options.contexts:
    first, rate = generate([tokens(context, context + 7, vocab)], options.tokens)
    samples[f"prefill {context}"] = context / first
    samples[f"decode at {context}"] = rate
if options.batch > 1:
    context = min(options.contexts)
    prompts = [tokens(context, sequence + 99, vocab) for sequence in range(options.batch)]
    samples[f"decode, batch {options.batch}"] = generate(prompts, options.tokens)[1]
report("OpenVINO", load, samples)
