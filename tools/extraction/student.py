#!/usr/bin/env python3
"""Trains students that copy a model: `casemate audit extraction` runs this and speaks to it in lines of JSON, which
crates/audit/src/trainer.rs specifies. A student has the architecture of its model (Llama and its relatives), knows those
weights that its job says, and learns from examples: texts, or texts with some log-probabilities."""

import json
import math
import sys


def say(**event):
    print(json.dumps(event), flush=True)


try:
    import numpy
    import torch
    import torch.nn.functional as F
except ImportError as error:
    say(event="error", message=f"this Python cannot train students: {error}")
    sys.exit(0)


class Model:
    """A Llama by the names of its tensors."""

    def __init__(self, architecture, known, seed):
        self.a = architecture
        generator = torch.Generator().manual_seed(seed)
        self.w = {}
        for name, shape in self.shapes():
            if name in known:
                value = known[name].reshape(shape).clone()
            elif name.endswith("norm.weight"):
                value = torch.ones(shape)
            elif name.endswith(".bias"):
                value = torch.zeros(shape)
            else:
                deviation = 0.02 if name.startswith(("token_embd", "output")) else 1 / math.sqrt(shape[-1])
                value = torch.randn(shape, generator=generator) * deviation
            self.w[name] = value.requires_grad_()

    def shapes(self):
        a = self.a
        hidden, queries, keys = a["hidden"], a["heads"] * a["head_dim"], a["kv_heads"] * a["head_dim"]
        yield "token_embd.weight", (a["vocab"], hidden)
        for layer in range(a["layers"]):
            b = f"blk.{layer}."
            yield b + "attn_norm.weight", (hidden,)
            for part, rows in (("attn_q", queries), ("attn_k", keys), ("attn_v", keys)):
                yield b + part + ".weight", (rows, hidden)
                if a["bias"]:
                    yield b + part + ".bias", (rows,)
            yield b + "attn_output.weight", (hidden, queries)
            yield b + "ffn_norm.weight", (hidden,)
            yield b + "ffn_gate.weight", (a["ffn"], hidden)
            yield b + "ffn_up.weight", (a["ffn"], hidden)
            yield b + "ffn_down.weight", (hidden, a["ffn"])
        yield "output_norm.weight", (hidden,)
        if not a["tied"]:
            yield "output.weight", (a["vocab"], hidden)

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.a["norm_eps"]) * self.w[name]

    def rope(self, x):
        size, length = x.shape[-1], x.shape[-2]
        frequency = self.a["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        angle = torch.arange(length)[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        if self.a["interleaved"]:
            first, second = x[..., 0::2], x[..., 1::2]
            turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1)
            return turned.flatten(-2)
        first, second = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)

    def __call__(self, tokens, seen=None):
        """Logits; what the products of layers get is put into `seen`, by the names of their stacks."""
        a, w = self.a, self.w
        seen = {} if seen is None else seen
        x = w["token_embd.weight"][tokens]
        batch, length = tokens.shape
        for layer in range(a["layers"]):
            b = f"blk.{layer}."
            h = self.norm(x, b + "attn_norm.weight")
            seen[b + "attn_qkv"] = h

            def heads(part, count):
                y = F.linear(h, w[b + part + ".weight"], w.get(b + part + ".bias"))
                return y.view(batch, length, count, a["head_dim"]).transpose(1, 2)

            q, k = self.rope(heads("attn_q", a["heads"])), self.rope(heads("attn_k", a["kv_heads"]))
            v = heads("attn_v", a["kv_heads"])
            groups = a["heads"] // a["kv_heads"]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = y.transpose(1, 2).reshape(batch, length, -1)
            seen[b + "attn_output"] = y
            x = x + F.linear(y, w[b + "attn_output.weight"])
            h = self.norm(x, b + "ffn_norm.weight")
            seen[b + "ffn_gate_up"] = h
            gate = F.silu(F.linear(h, w[b + "ffn_gate.weight"])) * F.linear(h, w[b + "ffn_up.weight"])
            seen[b + "ffn_down"] = gate
            x = x + F.linear(gate, w[b + "ffn_down.weight"])
        x = self.norm(x, "output_norm.weight")
        return F.linear(x, w["token_embd.weight" if a["tied"] else "output.weight"])


def read_weights(weights, take):
    data = numpy.memmap(weights["file"], dtype="<f4", mode="r")
    known = {}
    for tensor in weights["tensors"]:
        if tensor["name"] in take:
            start, count = tensor["offset"] // 4, math.prod(tensor["shape"])
            known[tensor["name"]] = torch.from_numpy(numpy.array(data[start : start + count]))
    return known


def read_examples(path):
    with open(path) as file:
        examples = [dict(json.loads(line), index=index) for index, line in enumerate(file)]
    return [example for example in examples if len(example["answer"]) > 0]


class Transcript:
    """What a worker was sent of the first examples: rows of length 1 of each stack of matrices, as their public rotation
    leaves them. Their scales are known to nobody outside, so a student's rows are compared by direction."""

    def __init__(self, transcript):
        data = numpy.memmap(transcript["file"], dtype="<f4", mode="r")
        self.starts = [0]
        for length in transcript["lengths"]:
            self.starts.append(self.starts[-1] + length)
        self.stacks = {}
        for stack in transcript["stacks"]:
            n = stack["columns"]
            at = lambda offset, rows: data[offset // 4 : offset // 4 + rows * n].reshape(rows, n)
            rotation = torch.from_numpy(numpy.array(at(stack["rotation"], n)))
            self.stacks[stack["name"]] = at(stack["offset"], self.starts[-1]), rotation

    def loss(self, examples, seen):
        """1 - cosine, on the average of rows that are known."""
        total, count = 0, 0
        for row, e in enumerate(examples):
            if e["index"] + 1 >= len(self.starts):
                continue
            start, end = self.starts[e["index"] : e["index"] + 2]
            length = min(end - start, len(e["prompt"]) + len(e["answer"]) - 1)
            for name, (rows, rotation) in self.stacks.items():
                sent = torch.from_numpy(numpy.array(rows[start : start + length]))
                own = F.normalize(seen[name][row, :length] @ rotation, dim=-1)
                total = total + length - (own * sent).sum()
                count += length
        return total / max(count, 1)


def loss_of(model, examples, transcript):
    """Cross entropy of the answers' tokens. Where probabilities were told, against those: what they leave of one is the
    share of all other tokens together, as the student divides it."""
    length = max(len(e["prompt"]) + len(e["answer"]) for e in examples)
    tokens = torch.zeros((len(examples), length), dtype=torch.long)
    for row, e in enumerate(examples):
        text = e["prompt"] + e["answer"]
        tokens[row, : len(text)] = torch.tensor(text)
    seen = {}
    logs = F.log_softmax(model(tokens[:, :-1], seen), -1)
    total, count = 0, 0
    hard_row, hard_at, hard_next = [], [], []
    soft = []
    for row, e in enumerate(examples):
        start = len(e["prompt"])
        for i, token in enumerate(e["answer"]):
            count += 1
            told = e["told"][i] if i < len(e["told"]) else []
            if told:
                soft.append((row, start + i - 1, told))
            else:
                hard_row.append(row)
                hard_at.append(start + i - 1)
                hard_next.append(token)
    if hard_row:
        total = total - logs[hard_row, hard_at, hard_next].sum()
    if soft:
        width = max(len(told) for _, _, told in soft)
        ids = torch.zeros((len(soft), width), dtype=torch.long)
        p = torch.zeros((len(soft), width))
        for i, (_, _, told) in enumerate(soft):
            ids[i, : len(told)] = torch.tensor([id for id, _ in told])
            p[i, : len(told)] = torch.tensor([value for _, value in told]).exp()
        p = p / p.sum(-1, keepdim=True).clamp(min=1)
        rows = logs[[row for row, _, _ in soft], [at for _, at, _ in soft]]
        q = rows.gather(1, ids)
        rest = (1 - p.sum(-1)).clamp(min=0)
        named = (q.exp() * (p > 0)).sum(-1)
        total = total - (p * q).sum() - (rest * (1 - named).clamp(min=1e-6).log()).sum()
    loss = total / max(count, 1)
    return loss if transcript is None else loss + transcript.loss(examples, seen)


def train(model, job):
    examples = read_examples(job["examples"])
    transcript = Transcript(job["transcript"]) if job["transcript"] else None
    steps = job["steps"] if examples else 0
    parameters = list(model.w.values())
    optimiser = torch.optim.AdamW(parameters, lr=job["rate"], betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, steps // 20)
    rate = lambda step: min(1, (step + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * step / max(1, steps)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    generator = torch.Generator().manual_seed(job["seed"])
    order, loss = [], None
    for step in range(steps):
        if len(order) < job["batch"]:
            order += torch.randperm(len(examples), generator=generator).tolist()
        batch, order = order[: job["batch"]], order[job["batch"] :]
        optimiser.zero_grad()
        loss = loss_of(model, [examples[i] for i in batch], transcript)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            say(event="step", step=step + 1, loss=loss.item())


@torch.no_grad()
def evaluate(model, job):
    with open(job["log_probabilities"], "wb") as file:
        for text in job["held_out"]:
            if len(text) > 1:
                logs = F.log_softmax(model(torch.tensor([text[:-1]])), -1)[0]
                file.write(logs.numpy().astype("<f4").tobytes())
    continuations = [None] * len(job["prompts"])
    for length in {len(prompt) for prompt in job["prompts"]}:
        places = [i for i, prompt in enumerate(job["prompts"]) if len(prompt) == length]
        texts = torch.tensor([job["prompts"][i] for i in places])
        for _ in range(job["continue"]):
            texts = torch.cat((texts, model(texts)[:, -1].argmax(-1, keepdim=True)), 1)
        for i, text in zip(places, texts[:, length:].tolist()):
            continuations[i] = text
    return continuations


def main():
    torch.set_num_threads(int(sys.argv[1]))
    say(event="ready", torch=torch.__version__)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            known = read_weights(job["weights"], set(job["take"]))
            model = Model(job["architecture"], known, job["seed"])
            train(model, job)
            say(event="done", continuations=evaluate(model, job))
        except Exception as error:
            say(event="error", message=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
