//! The CBOR of a receipt.

use std::num::NonZeroU32;

use casemate_release::Malformed;
use minicbor::bytes::ByteArray;
use minicbor::{Decode, Encode};

use super::{
    AnswerFormat, AnswerHash, Bias, FORMAT, Functions, Parameters, Receipt, RequestHash, Steering,
    Usage,
};
use crate::keyset::KeysetDigest;

#[derive(Encode, Decode)]
#[cbor(map)]
pub(super) struct Envelope {
    #[cbor(n(0), with = "minicbor::bytes")]
    pub(super) body: Vec<u8>,
    #[cbor(n(1), with = "minicbor::bytes")]
    pub(super) signature: [u8; 64],
}

#[derive(Encode, Decode)]
#[cbor(map)]
pub(super) struct Body {
    #[n(0)]
    format: u32,
    #[n(1)]
    id: String,
    #[n(2)]
    counter: u64,
    #[cbor(n(3), with = "minicbor::bytes")]
    keyset_digest: [u8; 32],
    #[cbor(n(4), with = "minicbor::bytes")]
    evidence_digest: [u8; 32],
    #[cbor(n(5), with = "minicbor::bytes")]
    model_digest: [u8; 32],
    #[n(6)]
    model_version: u64,
    #[n(7)]
    adapter_digests: Vec<ByteArray<32>>,
    #[n(8)]
    compute: String,
    #[n(9)]
    parameters: ParametersMap,
    #[cbor(n(10), with = "minicbor::bytes")]
    request_hash: [u8; 32],
    #[n(11)]
    status: u16,
    #[cbor(n(12), with = "minicbor::bytes")]
    answer_hash: [u8; 32],
    #[n(13)]
    usage: Option<UsageArray>,
    #[n(14)]
    time: u64,
    #[n(15)]
    adapter: Option<ByteArray<32>>,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct ParametersMap {
    #[cbor(n(0), with = "shortest_float")]
    temperature: f32,
    #[cbor(n(1), with = "shortest_float")]
    top_p: f32,
    #[n(2)]
    top_k: u32,
    #[cbor(n(3), with = "shortest_float")]
    min_p: f32,
    #[cbor(n(4), with = "shortest_float")]
    presence_penalty: f32,
    #[cbor(n(5), with = "shortest_float")]
    frequency_penalty: f32,
    #[cbor(n(6), with = "shortest_float")]
    repetition_penalty: f32,
    #[n(7)]
    seed: u64,
    #[n(8)]
    choices: u32,
    #[n(9)]
    max_tokens: Option<u32>,
    #[n(10)]
    bias: Option<Bias>,
    #[n(11)]
    format: Option<AnswerFormat>,
    #[n(12)]
    functions: Option<Functions>,
    #[n(13)]
    stop_strings: Option<NonZeroU32>,
}

#[derive(Encode, Decode)]
#[cbor(array)]
struct UsageArray {
    #[n(0)]
    prompt_tokens: u64,
    #[n(1)]
    completion_tokens: u64,
}

/// Floats in the shorter of half and single precision that holds the value (RFC 8949, section 4.2.1).
pub(super) mod shortest_float {
    use half::f16;
    use minicbor::data::Type;
    use minicbor::decode::{self, Decoder};
    use minicbor::encode::{self, Encoder, Write};

    pub(in super::super) fn encode<C, W: Write>(
        value: &f32,
        encoder: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), encode::Error<W::Error>> {
        if f16::from_f32(*value).to_f32().to_bits() == value.to_bits() {
            encoder.f16(*value)?.ok()
        } else {
            encoder.f32(*value)?.ok()
        }
    }

    pub(in super::super) fn decode<C>(
        decoder: &mut Decoder<'_>,
        _: &mut C,
    ) -> Result<f32, decode::Error> {
        match decoder.datatype()? {
            Type::F16 => decoder.f16(),
            _ => decoder.f32(),
        }
    }
}

impl From<&Parameters> for ParametersMap {
    fn from(parameters: &Parameters) -> ParametersMap {
        let steering = &parameters.steering;
        ParametersMap {
            temperature: parameters.temperature,
            top_p: parameters.top_p,
            top_k: parameters.top_k,
            min_p: parameters.min_p,
            presence_penalty: parameters.presence_penalty,
            frequency_penalty: parameters.frequency_penalty,
            repetition_penalty: parameters.repetition_penalty,
            seed: parameters.seed,
            choices: parameters.choices,
            max_tokens: parameters.max_tokens,
            bias: steering.bias,
            format: steering.format,
            functions: steering.functions,
            stop_strings: steering.stop_strings,
        }
    }
}

impl From<ParametersMap> for Parameters {
    fn from(map: ParametersMap) -> Parameters {
        Parameters {
            temperature: map.temperature,
            top_p: map.top_p,
            top_k: map.top_k,
            min_p: map.min_p,
            presence_penalty: map.presence_penalty,
            frequency_penalty: map.frequency_penalty,
            repetition_penalty: map.repetition_penalty,
            seed: map.seed,
            choices: map.choices,
            max_tokens: map.max_tokens,
            steering: Steering {
                bias: map.bias,
                format: map.format,
                functions: map.functions,
                stop_strings: map.stop_strings,
            },
        }
    }
}

impl From<&Receipt> for Body {
    fn from(receipt: &Receipt) -> Body {
        Body {
            format: FORMAT,
            id: receipt.id.as_str().to_owned(),
            counter: receipt.counter,
            keyset_digest: receipt.keyset_digest.0,
            evidence_digest: receipt.evidence_digest,
            model_digest: receipt.model_digest,
            model_version: receipt.model_version,
            adapter_digests: receipt.adapter_digests.iter().map(|&d| d.into()).collect(),
            compute: receipt.compute.clone(),
            parameters: (&receipt.parameters).into(),
            request_hash: receipt.request_hash.0,
            status: receipt.status,
            answer_hash: receipt.answer_hash.0,
            usage: receipt.usage.map(|usage| UsageArray {
                prompt_tokens: usage.prompt_tokens,
                completion_tokens: usage.completion_tokens,
            }),
            time: receipt.time,
            adapter: receipt.adapter.map(Into::into),
        }
    }
}

impl TryFrom<Body> for Receipt {
    type Error = Malformed;

    fn try_from(body: Body) -> Result<Receipt, Malformed> {
        if body.format != FORMAT {
            return Err(Malformed::Unsupported {
                what: "receipt.format",
                found: body.format.to_string(),
                expected: "2",
            });
        }
        Ok(Receipt {
            id: body
                .id
                .parse()
                .map_err(|_| Malformed::Text { what: "receipt.id" })?,
            counter: body.counter,
            keyset_digest: KeysetDigest(body.keyset_digest),
            evidence_digest: body.evidence_digest,
            model_digest: body.model_digest,
            model_version: body.model_version,
            adapter_digests: body.adapter_digests.into_iter().map(Into::into).collect(),
            adapter: body.adapter.map(Into::into),
            compute: body.compute,
            parameters: body.parameters.into(),
            request_hash: RequestHash(body.request_hash),
            status: body.status,
            answer_hash: AnswerHash(body.answer_hash),
            usage: body.usage.map(|usage| Usage {
                prompt_tokens: usage.prompt_tokens,
                completion_tokens: usage.completion_tokens,
            }),
            time: body.time,
        })
    }
}
