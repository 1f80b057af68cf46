"""Trains a small LoRA adapter for SmolLM2-135M-Instruct, and records what PEFT computes with it.

Independent of Casemate: PyTorch, `transformers` and `peft` read the same GGUF file that the demo serves. Run once by
hand (see README.md); adapter and recording are committed, tests never run this.

    python train.py MODEL.gguf TOKENIZER.json CLAIMS.csv OUT [--steps 14]

CLAIMS.csv is a carrier file of CMS's synthetic claims (columns separated by `|`). Only the shape of its columns is
used: names, codes, and how amounts are written. Every claim line below is made up.
"""

import argparse
import csv
import hashlib
import json
import math
import pathlib
import random
import time

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

SEED = 20261121
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
END = 2
# What is asked, and the column that answers it.
QUESTIONS = [
    ("What was charged?", "LINE_SBMTD_CHRG_AMT"),
    ("What was allowed?", "LINE_ALOWD_CHRG_AMT"),
    ("What was paid?", "LINE_NCH_PMT_AMT"),
    ("What is the coinsurance?", "LINE_COINSRNC_AMT"),
]
COLUMNS = [column for _, column in QUESTIONS]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Claims:
    """Makes lines of the shape of the file's."""

    def __init__(self, path: pathlib.Path):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="|"))
        for column in COLUMNS:
            for row in rows:
                whole, _, cents = row[column].partition(".")
                assert whole.isdigit() and len(cents) == 2 and cents.isdigit(), (column, row[column])
        self.largest = max(float(row["LINE_SBMTD_CHRG_AMT"]) for row in rows)

    def line(self, rng: random.Random) -> dict[str, str]:
        charged = rng.randrange(1000, int(self.largest * 100))
        allowed = charged * rng.randrange(50, 100) // 100
        coinsurance = allowed * 20 // 100
        amounts = [charged, allowed, allowed - coinsurance, coinsurance]
        values = [f"{cents // 100}.{cents % 100:02d}" for cents in amounts]
        return dict(zip(COLUMNS, values))

    def example(self, rng: random.Random) -> tuple[str, str]:
        line = self.line(rng)
        question, column = rng.choice(QUESTIONS)
        text = "\n".join(f"{name}={value}" for name, value in line.items())
        return f"{text}\n{question}", f"{column}: {line[column]} USD"


def prompt(user: str) -> str:
    """As the model's own chat template writes it."""
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


class Greedy:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, user: str, most: int = 24) -> dict:
        """The likeliest tokens, how far the likeliest logit lies above the next, and the first position's logits."""
        ids = self.tokenizer.encode(prompt(user), add_special_tokens=False).ids
        tokens, gaps, first, past = [], [], None, None
        feed = torch.tensor([ids])
        with torch.inference_mode():
            while len(tokens) < most:
                out = self.model(feed, past_key_values=past, use_cache=True, logits_to_keep=1)
                past, logits = out.past_key_values, out.logits[0, -1].double()
                top = torch.topk(logits, 8)
                first = first or [[int(i), round(float(v), 4)] for i, v in zip(top.indices, top.values)]
                gaps.append(round(float(top.values[0] - top.values[1]), 4))
                tokens.append(int(top.indices[0]))
                if tokens[-1] == END:
                    break
                feed = torch.tensor([[tokens[-1]]])
        text = self.tokenizer.decode([t for t in tokens if t != END], skip_special_tokens=False)
        return {"prompt_tokens": ids, "tokens": tokens, "gaps": gaps, "first_logits": first, "text": text}


def train(model, tokenizer, claims: Claims, steps: int, batch: int, rate: float) -> None:
    rng = random.Random(SEED)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    started = time.monotonic()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 10)
        optimiser.param_groups[0]["lr"] = rate * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        rows = []
        for _ in range(batch):
            user, answer = claims.example(rng)
            before = tokenizer.encode(prompt(user), add_special_tokens=False).ids
            after = tokenizer.encode(answer, add_special_tokens=False).ids + [END]
            rows.append((before, after))
        # Padded on the left, so that all answers end together and only their logits are computed.
        longest = max(len(before) + len(after) for before, after in rows)
        answers = max(len(after) for _, after in rows)
        ids = torch.full((batch, longest), END)
        mask = torch.zeros((batch, longest), dtype=torch.long)
        labels = torch.full((batch, answers), -100)
        for i, (before, after) in enumerate(rows):
            ids[i, longest - len(before) - len(after) :] = torch.tensor(before + after)
            mask[i, longest - len(before) - len(after) :] = 1
            labels[i, answers - len(after) :] = torch.tensor(after)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        # Half the work where the processor multiplies in bf16; what is recorded below is computed in f32.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(ids, attention_mask=mask, position_ids=places, logits_to_keep=answers + 1, use_cache=False)
        logits = out.logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        print(f"step {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)


def right(answer: dict, expected: str) -> bool:
    return answer["text"] == expected and answer["tokens"][-1] == END


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("tokenizer", type=pathlib.Path)
    parser.add_argument("claims", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=6)
    parser.add_argument("--recorded", type=int, default=4)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    base = AutoModelForCausalLM.from_pretrained(
        str(args.model.parent), gguf_file=args.model.name, dtype=torch.float32, attn_implementation="eager"
    )
    claims = Claims(args.claims)
    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    train(model, tokenizer, claims, args.steps, args.batch, args.rate)

    model.eval()
    # What is measured is what is stored: weights rounded to f16.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.half().float())
    model.save_pretrained(str(args.out))
    file = args.out / "adapter_model.safetensors"
    save_file({k: v.half().contiguous() for k, v in load_file(str(file)).items()}, str(file), {"format": "pt"})
    (args.out / "README.md").unlink(missing_ok=True)
    settings = json.loads((args.out / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    settings["target_modules"] = sorted(settings["target_modules"])
    (args.out / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    # Other lines than those of the training.
    rng = random.Random(SEED + 1)
    examples = [claims.example(rng) for _ in range(args.held_out)]
    greedy = Greedy(model, tokenizer)
    adapted = [greedy(user) for user, _ in examples]
    hits = sum(right(a, expected) for a, (_, expected) in zip(adapted, examples))
    print(f"with the adapter: {hits} of {len(examples)} held-out questions answered as trained")
    with model.disable_adapter():
        plain = [greedy(user) for user, _ in examples[: args.recorded]]
    hits = sum(right(a, expected) for a, (_, expected) in zip(plain, examples))
    print(f"without it: {hits} of {len(plain)}")

    recorded = []
    for (user, expected), with_adapter, without in zip(examples, adapted, plain):
        assert with_adapter["prompt_tokens"] == without["prompt_tokens"]
        recorded.append(
            {
                "question": user,
                "trained": expected,
                "prompt_tokens": with_adapter.pop("prompt_tokens"),
                "with": with_adapter,
                "without": {k: v for k, v in without.items() if k != "prompt_tokens"},
            }
        )
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    golden = {"model_sha256": digest(args.model), "adapter_sha256": digest(file), "answers": recorded}
    (args.out / "recorded.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(file.stat().st_size, "bytes of adapter,", digest(file))


if __name__ == "__main__":
    main()
