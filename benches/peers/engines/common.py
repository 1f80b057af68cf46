"""What every peer is asked: one process, one model, a line of JSON with the samples in tokens per second.

A peer is a class with `prompt(sequence, tokens)` (compute a prompt), `step(position, sequences)` (one more token for each of
so many sequences) and `clear()`. Times are taken here, so that all peers are timed alike.
"""

import argparse
import json
import time


class Engine:
    name = "?"
    vocab = 32000


def tokens(count, seed, vocab):
    state, out = seed, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        out.append((state >> 33) % vocab)
    return out


def measure(engine, options):
    samples = {}
    # Once for nothing, so that everything has been touched.
    engine.prompt(0, tokens(32, 1, engine.vocab))
    for context in options.contexts:
        engine.clear()
        prompt = tokens(context, context + 7, engine.vocab)
        start = time.perf_counter()
        engine.prompt(0, prompt)
        samples[f"prefill {context}"] = context / (time.perf_counter() - start)
        start = time.perf_counter()
        for i in range(options.tokens):
            engine.step(context + i, 1)
        samples[f"decode at {context}"] = options.tokens / (time.perf_counter() - start)
    if options.batch > 1:
        engine.clear()
        first = min(options.contexts)
        for sequence in range(options.batch):
            engine.prompt(sequence, tokens(first, sequence + 99, engine.vocab))
        start = time.perf_counter()
        for i in range(options.tokens):
            engine.step(first + i, options.batch)
        samples[f"decode, batch {options.batch}"] = options.batch * options.tokens / (time.perf_counter() - start)
    return samples


def measure_whole(seconds, options, vocab):
    """For engines that only generate as a whole: `seconds(prompts, tokens)`. Decoding is what more tokens take longer."""

    def after(prompts):
        first = seconds(prompts, 1)
        rest = seconds(prompts, options.tokens + 1) - first
        if rest <= 0:
            raise RuntimeError(f"{options.tokens} tokens more took {rest:.3f} s longer: too small a model for this measure")
        return first, len(prompts) * options.tokens / rest

    seconds([tokens(32, 1, vocab)], 2)
    samples = {}
    for context in options.contexts:
        first, rate = after([tokens(context, context + 7, vocab)])
        samples[f"prefill {context}"] = context / first
        samples[f"decode at {context}"] = rate
    if options.batch > 1:
        context = min(options.contexts)
        prompts = [tokens(context, sequence + 99, vocab) for sequence in range(options.batch)]
        samples[f"decode, batch {options.batch}"] = after(prompts)[1]
    return samples


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--contexts", type=lambda text: [int(n) for n in text.split(",")], required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--format", default="int8", help="what the engine computes in, where it has a choice")
    parser.add_argument("--scratch", default=".", help="folder for converted models")
    parser.add_argument("--huge-pages", action="store_true", help="the model goes into memory that may have huge pages")
    options = parser.parse_args()
    options.context = -(-(max(options.contexts) + options.tokens) // 256) * 256
    return options


def report(name, load, samples):
    print(json.dumps({"engine": name, "load": load, "samples": samples}))


def main(kind):
    options = arguments()
    start = time.perf_counter()
    engine = kind(options)
    load = time.perf_counter() - start
    report(kind.name, load, measure(engine, options))
