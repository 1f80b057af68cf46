"""Makes the teacher-forced reference of SmolLM2-135M-Instruct that the engine's tests compare with.

Independent of Casemate: PyTorch and `transformers` read the same GGUF file, dequantise it themselves and run the
model in f32. Run once by hand (see README.md); the result is committed, tests never run this.

    python make_reference.py MODEL.gguf TOKENIZER.json TEXT OUT [--tokens 2000]
"""

import argparse
import hashlib
import pathlib
import struct

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

MAGIC = b"CMREF1\0\0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("tokenizer", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=2000)
    args = parser.parse_args()

    # The first 64 KiB of text hold far more than 2,000 tokens.
    text = args.text.read_text(encoding="utf-8")[:65536]
    ids = Tokenizer.from_file(str(args.tokenizer)).encode(text, add_special_tokens=False).ids
    ids = ids[: args.tokens]
    assert len(ids) == args.tokens

    model = AutoModelForCausalLM.from_pretrained(
        str(args.model.parent),
        gguf_file=args.model.name,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    model.eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].double()
    assert logits.shape[0] == len(ids)

    rows = logits[:-1]
    top = torch.topk(rows, 2, dim=-1)
    gap = (top.values[:, 0] - top.values[:, 1]).numpy().astype("<f4")
    top1 = top.indices[:, 0].numpy().astype("<u4")
    target = torch.tensor(ids[1:])
    logprob = torch.log_softmax(rows, dim=-1).gather(1, target[:, None])[:, 0].numpy().astype("<f4")

    record = np.zeros(len(top1), dtype=[("top1", "<u4"), ("gap", "<f4"), ("logprob", "<f4")])
    record["top1"], record["gap"], record["logprob"] = top1, gap, logprob
    data = MAGIC + struct.pack("<II", len(ids), len(top1)) + np.array(ids, "<u4").tobytes() + record.tobytes()
    args.out.write_bytes(data)
    print("perplexity", float(np.exp(-logprob.astype("f8").mean())))
    print("top-1 hits on the text", float((top1 == np.array(ids[1:])).mean()))
    print("smallest gap", float(gap.min()), "gaps under 0.6:", int((gap < 0.6).sum()))
    print("sha256", hashlib.sha256(data).hexdigest(), "bytes", len(data))


if __name__ == "__main__":
    main()
