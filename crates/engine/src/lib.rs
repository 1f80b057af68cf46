//! Tokenizer, model, KV cache, sampler, scheduler.

#![forbid(unsafe_code)]
