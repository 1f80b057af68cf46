#!/usr/bin/env python3
"""Runs Casemate and other engines on the same shapes in turns, and prints ratios. See README.md."""

import argparse
import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent

# Peer: (environment, script and its options, encoding of the GGUF file it is given or None for the shape's name).
PEERS = {
    "llama.cpp Q8_0": ("llama.cpp", ["llama_cpp_engine.py"], "q8_0"),
    "llama.cpp Q4_0": ("llama.cpp", ["llama_cpp_engine.py"], "q4_0"),
    "llama.cpp BF16": ("llama.cpp", ["llama_cpp_engine.py"], "bf16"),
    "torch dynamic int8": ("torch", ["torch_engine.py"], None),
    "OpenVINO int8": ("openvino", ["openvino_engine.py", "--format", "int8"], None),
    "OpenVINO bf16": ("openvino", ["openvino_engine.py", "--format", "bf16"], None),
    "CTranslate2 int8": ("ctranslate2", ["ctranslate2_engine.py", "--format", "int8"], None),
    "ipex bf16": ("ipex", ["ipex_engine.py"], None),
}

# The C library asks for huge pages, and keeps memory that was freed instead of giving it back page by page.
HUGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=17179869184"


def requirements():
    lines = (HERE / "requirements.txt").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if line.strip() and not line.startswith("#"))
    return {name.strip(): packages.split() for name, packages in pairs}


def install(environment, folder, from_source):
    """An environment's Python, or the reason why there is none."""
    place = folder / environment.replace(".", "-")
    python, done = place / "bin/python", place / "installed"
    packages = requirements()[environment]
    if done.is_file() and done.read_text().split() == packages:
        return python, None
    say(f"installing {' '.join(packages)}")
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    binary = [] if from_source else ["--only-binary", ":all:"]
    ran = subprocess.run(
        ["nice", "-n", "19", python, "-m", "pip", "install", "--quiet", *binary, *packages], capture_output=True, text=True
    )
    if ran.returncode != 0:
        return None, last_line(ran.stderr)
    done.write_text(" ".join(packages))
    return python, None


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def say(text):
    print(f"· {text}", file=sys.stderr, flush=True)


def ours(options, compute, gguf):
    """One run of `casemate bench`, in the words of the peers."""
    batches = sorted({1, options.batch})
    command = [options.casemate, "bench", gguf, "--compute", compute, "--json", "--threads", options.threads]
    command += ["--prompt", 32, "--tokens", 2, "--batch", 1, "--latency-tokens", 1]
    command += ["--contexts", ",".join(map(str, options.contexts)), "--batches", ",".join(map(str, batches))]
    report = json.loads(call([str(word) for word in command], None))
    result = report["formats"][0]
    samples = {}
    for point in result["contexts"]:
        samples[f"prefill {point['context']}"] = point["prefill"]
        # By the mean, as the peers': medians leave out what sometimes takes longer.
        samples[f"decode at {point['context']}"] = 1e3 / point["next_token"]["mean"]
    for point in result["curve"]:
        if point["batch"] == options.batch > 1:
            samples[f"decode, batch {point['batch']}"] = point["decode"]
    load = result["load"]["open_seconds"] + result["load"]["convert_seconds"]
    return {"load": load, "samples": samples, "machine": report["machine"], "commit": report["program"]["commit"]}


def theirs(options, python, script, model, scratch):
    command = [str(python), str(HERE / "engines" / script[0]), *script[1:], "--model", str(model), "--scratch", str(scratch)]
    command += ["--threads", str(options.threads), "--contexts", ",".join(map(str, options.contexts))]
    command += ["--tokens", "64", "--batch", str(options.batch)]
    settings = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"], str(options.threads))
    if options.huge_pages:
        command.append("--huge-pages")
        settings["GLIBC_TUNABLES"] = HUGE_PAGES
    return json.loads(call(command, {**os.environ, **settings}).strip().splitlines()[-1])


def call(command, environment):
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode != 0:
        raise RuntimeError(last_line(ran.stderr))
    return ran.stdout


def interval(values):
    """Median, and its 95 % interval by resampling with a fixed seed; of fewer than six, least and most."""
    if len(values) < 6:
        return statistics.median(values), min(values), max(values)
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[50], medians[1949]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="tinyllama-1.1b", help="as casemate bench --synthetic has it")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contexts", type=lambda text: [int(n) for n in text.split(",")], default=[128, 512, 1024])
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--compute", default="int8-row,int8-g32", help="our formats")
    parser.add_argument("--peers", default=",".join(PEERS), help="which, by name")
    parser.add_argument("--casemate", default=str(HERE / "../../target/release/casemate"))
    parser.add_argument("--environments", type=pathlib.Path, default=HERE / "../../target/peers")
    parser.add_argument("--models", type=pathlib.Path, help="where model files are made (default: a temporary folder)")
    parser.add_argument("--from-source", action="store_true", help="also peers without a wheel for this platform")
    parser.add_argument("--huge-pages", action="store_true", help="grant the peers what we ask the system for ourselves")
    parser.add_argument("--json", type=pathlib.Path, help="write everything there")
    options = parser.parse_args()
    wanted = [name.strip() for name in options.peers.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in PEERS]
    if unknown:
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if options.rounds < 1 or options.threads < 1:
        parser.error("at least one round and one thread")

    with tempfile.TemporaryDirectory() as temporary:
        models = options.models or pathlib.Path(temporary)
        models.mkdir(parents=True, exist_ok=True)
        result = compare(options, wanted, models)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def compare(options, wanted, models):
    absent, runs, files = {}, {}, {}

    def file(encoding):
        if encoding not in files:
            path = models / f"{options.shape}-{encoding}.gguf"
            if not path.exists():
                say(f"writing {path.name}")
                call([options.casemate, "bench", "write", options.shape, encoding, str(path)], None)
            files[encoding] = path
        return files[encoding]

    for compute in options.compute.split(","):
        encoding = {"bf16": "bf16", "q4-g32": "q4_0"}.get(compute, "q8_0")
        runs[f"casemate {compute}"] = lambda c=compute, e=encoding: ours(options, c, file(e))
    for name in wanted:
        environment, script, encoding = PEERS[name]
        python, why = install(environment, options.environments, options.from_source)
        if why:
            absent[name] = why
            continue
        runs[name] = lambda p=python, s=script, e=encoding: theirs(options, p, s, file(e) if e else options.shape, models)

    samples, loads, facts = {}, {}, {}
    order = list(runs)
    for turn in range(options.rounds):
        # Who goes first rotates.
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if name in absent:
                continue
            say(f"round {turn + 1} of {options.rounds}: {name}")
            try:
                got = runs[name]()
            except (RuntimeError, ValueError) as error:
                absent[name] = str(error)
                samples.pop(name, None)
                continue
            facts = {key: got[key] for key in ("machine", "commit") if key in got} or facts
            loads.setdefault(name, []).append(got["load"])
            for measure, value in got["samples"].items():
                samples.setdefault(name, {}).setdefault(measure, []).append(value)
    mine = [name for name in samples if name.startswith("casemate ")]
    ratios = []
    for our_name in mine:
        for name in samples:
            if name in mine:
                continue
            for measure, values in samples[our_name].items():
                others = samples[name].get(measure, [])
                # Round by round: both of a pair met the machine in the same minutes.
                pairs = [a / b for a, b in zip(values, others)]
                if pairs:
                    median, low, high = interval(pairs)
                    ratios.append(
                        {"ours": our_name, "peer": name, "measure": measure, "median": median, "low": low, "high": high, "rounds": len(pairs)}
                    )
    return {
        "form": 1,
        "shape": options.shape,
        "threads": options.threads,
        "rounds": options.rounds,
        "huge_pages": options.huge_pages,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": requirements(),
        **facts,
        "unit": "tokens/s",
        "samples": samples,
        "load_seconds": loads,
        "ratios": ratios,
        "absent": absent,
    }


def show(result):
    granted = ", peers with huge pages" if result["huge_pages"] else ""
    print(f"{result['shape']}, {result['threads']} threads{granted}, {result['rounds']} rounds in turns; tokens/s, median (least - most)")
    measures = sorted({measure for values in result["samples"].values() for measure in values})
    for measure in measures:
        print(f"\n{measure}")
        for name, values in result["samples"].items():
            if got := values.get(measure):
                print(f"  {name:22} {statistics.median(got):9.1f}  ({min(got):.1f} - {max(got):.1f})")
        for ratio in result["ratios"]:
            if ratio["measure"] == measure:
                print(f"    {ratio['ours']} / {ratio['peer']}: {ratio['median']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})")
    for name, why in result["absent"].items():
        print(f"\nnot measured: {name}: {why}")


if __name__ == "__main__":
    main()
