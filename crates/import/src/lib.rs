//! GGUF files and Hugging Face directories, parsed with limits into tensors, configuration and tokenizer.

#![forbid(unsafe_code)]
