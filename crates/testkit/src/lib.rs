//! A fake TEE with its own root of trust, hostile samples, tiny models, deployments for tests.

#![forbid(unsafe_code)]
