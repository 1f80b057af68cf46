"""PyTorch: `transformers`' Llama with random weights of the shape, its linear layers quantised dynamically to int8
(oneDNN)."""

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from common import Engine, main
from shapes import SHAPES


class Torch(Engine):
    name = "torch dynamic int8"

    def __init__(self, options):
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        shape = SHAPES[options.model]
        config = LlamaConfig(max_position_embeddings=options.context, tie_word_embeddings=False, **shape)
        self.vocab, self.batch = shape["vocab_size"], options.batch
        model = LlamaForCausalLM(config).eval()
        self.model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        self.clear()

    def clear(self):
        self.waiting, self.caches = [], None

    def prompt(self, sequence, tokens):
        # One alone at once; those of a batch together, with the last of them.
        if sequence == 0:
            self.waiting = []
        self.waiting.append(tokens)
        if sequence in (0, self.batch - 1):
            self.compute(self.waiting)

    def compute(self, prompts):
        self.caches = DynamicCache()
        self.forward(torch.tensor(prompts), 0)

    def forward(self, ids, position):
        with torch.inference_mode():
            positions = torch.arange(position, position + ids.shape[1])
            self.model(
                input_ids=ids, past_key_values=self.caches, cache_position=positions, use_cache=True, logits_to_keep=1
            )

    def step(self, position, sequences):
        self.forward(torch.full((sequences, 1), position % self.vocab), position)


main(Torch)
