"""llama.cpp through llama-cpp-python's C interface, over a GGUF file."""

import ctypes

import llama_cpp as c

from common import Engine, main


class LlamaCpp(Engine):
    name = "llama.cpp"

    def __init__(self, options):
        c.llama_backend_init()
        params = c.llama_model_default_params()
        # A mapped file has no huge pages.
        params.use_mmap = not options.huge_pages
        self.model = c.llama_model_load_from_file(options.model.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {options.model}")
        params = c.llama_context_default_params()
        params.n_ctx = options.context * options.batch
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = options.batch
        params.n_threads = params.n_threads_batch = options.threads
        self.context = c.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp gives no context")
        self.batch = c.llama_batch_init(512, 0, 1)
        self.vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))

    def clear(self):
        c.llama_memory_clear(c.llama_get_memory(self.context), True)

    def prompt(self, sequence, tokens):
        for start in range(0, len(tokens), 512):
            part = tokens[start : start + 512]
            last = start + len(part) == len(tokens)
            self.decode([(t, start + i, sequence, last and i == len(part) - 1) for i, t in enumerate(part)])

    def step(self, position, sequences):
        self.decode([((position * 31 + s) % self.vocab, position, s, True) for s in range(sequences)])

    def decode(self, rows):
        b = self.batch
        b.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, wanted
            b.seq_id[i][0] = sequence
        if c.llama_decode(self.context, b) != 0:
            raise RuntimeError("llama.cpp does not decode")
        # Logits are computed when they are looked at.
        ctypes.cast(c.llama_get_logits(self.context), ctypes.c_void_p)


main(LlamaCpp)
