//! A report made by hand, for the tests of its forms.

use std::collections::BTreeMap;

use super::*;
use crate::limits::{Arithmetic, ComputeLimit};

fn summary(median: f64, count: usize, dropped: usize) -> Summary {
    Summary {
        count,
        dropped,
        mean: median * 1.01,
        deviation: median * 0.02,
        least: median * 0.95,
        median,
        p95: median * 1.05,
        p99: median * 1.1,
        most: median * 1.2,
        median_low: median - 0.2,
        median_high: median + 0.3,
    }
}

pub(crate) fn report() -> Report {
    let shares = ComputeShares {
        of_registers: Some(0.39),
        of_product: Some(0.41),
    };
    Report {
        form: FORM,
        program: Program {
            version: "0.1.0".into(),
            commit: "0123456789ab".into(),
            profile: "release".into(),
            command: "casemate bench --synthetic tinyllama-1.1b".into(),
            started: "2026-11-21T16:00:00Z".into(),
        },
        machine: Machine {
            processor: "Processor <9000> & more".into(),
            cores: 2,
            instructions: "avx512-vnni".into(),
            features: vec!["avx2".into(), "avx512_vnni".into()],
            cache: Some(32 << 20),
            memory: 24 << 30,
            huge_pages: Some("madvise".into()),
            system: "Linux 6.1".into(),
            load: Some(0.1),
        },
        protocol: Protocol {
            threads: 2,
            throughput: Load {
                batch: 6,
                beam: 1,
                prompt: 1024,
                tokens: 128,
            },
            latency_tokens: 1000,
            contexts: vec![128, 1024],
            batches: vec![1, 6],
            curve_prompt: 128,
            curve_tokens: 64,
            traced_tokens: 200,
            quick: false,
        },
        model: ModelFacts {
            name: "tinyllama-1.1b".into(),
            origin: "tinyllama-1.1b, random weights".into(),
            parameters: 1_100_048_384,
            hidden: 2048,
            layers: 22,
            heads: 32,
            kv_heads: 4,
            ffn: 5632,
            vocab: 32000,
            context: 4096,
            operations_per_token: 1_937_768_448,
        },
        limits: Limits {
            compute: vec![
                ComputeLimit {
                    arithmetic: Arithmetic::Int8,
                    registers: Some(912.0),
                    product: Some(871.0),
                },
                ComputeLimit {
                    arithmetic: Arithmetic::Bf16,
                    registers: None,
                    product: None,
                },
            ],
            read: vec![33.0, 34.0, 36.0],
        },
        formats: vec![FormatResult {
            compute: "int8-g32".into(),
            kv_type: "f16".into(),
            load: Loaded {
                sealed_bytes: 1_169_000_000,
                seal_seconds: 1.2,
                open_seconds: 0.35,
                convert_seconds: 0.8,
            },
            memory: Memory {
                weights: 1_169_000_000,
                kv: 156_000_000,
                peak: 1_420_000_000,
                huge: Some(1_000_000_000),
                per_pass: 1_100_000_000,
                kv_per_position: 22_528,
            },
            latency: Latency {
                next_token: summary(38.1, 1010, 6),
                samples: (0..1016).map(|i| 37.0 + f64::from(i % 40) * 0.06).collect(),
                first_token: summary(2750.0, 8, 0),
                prefill: 371.5,
                prefill_shares: shares,
                decode_share: 0.86,
            },
            throughput: Throughput {
                runs: 2,
                tokens_per_second: 31.7,
                decode: Some(101.5),
                decode_share: Some(0.58),
                seconds: vec![24.1, 24.3],
            },
            contexts: [(128, 26.6), (1024, 26.0)]
                .map(|(context, decode)| ContextPoint {
                    context,
                    next_token: summary(1e3 / decode, 63, 0),
                    decode,
                    decode_share: 0.85,
                    prefill: 380.0,
                    prefill_shares: shares,
                    read: 34.0,
                })
                .to_vec(),
            beyond: vec![8000],
            curve: [(1, 26.6, 30.6), (6, 118.3, 180.1)]
                .map(|(batch, decode, roofline)| BatchPoint {
                    batch,
                    decode,
                    decode_share: decode / roofline,
                    roofline,
                    read: 34.0,
                })
                .to_vec(),
            system_calls: SystemCalls::Measured {
                tokens: 200,
                calls: 3,
                per_token: 0.015,
                names: BTreeMap::from([("futex".into(), 3)]),
            },
        }],
        skipped: vec![Skipped {
            compute: "f32".into(),
            why: "about 27.2 GB of memory are needed".into(),
        }],
        protected: Some(Protected {
            compute: "int8-g32".into(),
            kv_type: "f16".into(),
            prompt_tokens: 1021,
            tokens: 128,
            events: 131,
            ratio: crate::statistics::Ratio {
                pairs: 20,
                mean: 1.012,
                low: 1.004,
                high: 1.021,
            },
            ratios: (0..20).map(|i| 1.0 + f64::from(i % 5) * 0.006).collect(),
            protected: summary(7650.0, 20, 0),
            plain: summary(7560.0, 20, 0),
            first_token_added: summary(3.4, 20, 0),
            cpu_enclave: 15_100.0,
            cpu_plain: 15_020.0,
            cpu_proxy: 21.0,
            cpu_protection: 0.56,
            cpu_share: 0.000_037,
            first_verified_byte: summary(40.0, 5, 0),
            enclave_start: 2210.0,
        }),
    }
}
