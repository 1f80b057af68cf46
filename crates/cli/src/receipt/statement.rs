//! What a verified receipt proves, and what it does not, in words for people.

use std::fmt::Write as _;

use casemate_attest::UnixTime;
use casemate_channel::keyset::ChannelBinding;
use casemate_channel::receipt::{Receipt, Steering, VerifiedExchange};
use serde_json::{Value, json};

use super::steering;
use crate::verdict::Trusted;

/// The two lists.
pub(super) struct Statement {
    pub(super) proven: Vec<String>,
    pub(super) not_proven: Vec<String>,
}

impl Statement {
    /// `by_hand`: somebody gave the time as of which the attestation was judged.
    pub(super) fn of(verified: &VerifiedExchange, by_hand: bool) -> Statement {
        let (receipt, service) = (verified.receipt(), verified.service());
        let (keyset, credential) = (service.keyset(), service.credential());
        let mut statement = Statement {
            proven: Vec::new(),
            not_proven: Vec::new(),
        };
        if service.appraised().is_development() {
            statement.not_proven.push(
                "ANYTHING ABOUT A TEE: the evidence is of a development root, not a TEE. Whoever ran it could sign what \
                 it liked, so everything listed above rests on trust in that machine."
                    .to_owned(),
            );
        }
        statement.proven.push(format!(
            "The code that the policy names as {:?} made this receipt, with a key that only it had.",
            service.appraised().claims().measurement_name
        ));
        statement.proven.push(format!(
            "Issuer {} vouched for that key as service {:?}.",
            service.issuer(),
            credential.service
        ));
        statement.proven.push(format!(
            "It served model {:?} version {}, digest {}, in {}.",
            keyset.model_name,
            keyset.model_version,
            hex::encode(keyset.model_digest),
            keyset.compute
        ));
        statement.proven.push(match receipt.adapter {
            Some(adapter) => format!(
                "The adapter {} was applied to the model for this answer; {} loaded.",
                hex::encode(adapter),
                adapters(&keyset.adapter_digests)
            ),
            None => format!(
                "No adapter was applied for this answer; {} loaded.",
                adapters(&keyset.adapter_digests)
            ),
        });
        statement.exchange(verified);
        if let Some(usage) = receipt.usage {
            statement.proven.push(format!(
                "The answer is whole as the service made it: {} tokens read, {} written, status {}.",
                usage.prompt_tokens, usage.completion_tokens, receipt.status
            ));
        }
        statement.proven.push(format!(
            "It was receipt number {} of its keyset; two of one number, or more than answers were given, would show a fault.",
            receipt.counter
        ));
        let whose = if by_hand {
            "the time you gave by hand"
        } else {
            "the clock of the machine on which the proxy ran"
        };
        statement.not_proven.extend([
            dictation(&receipt.parameters.steering),
            "That the answer is true.".to_owned(),
            format!(
                "When exactly it was made. {} is the enclave's clock, which its host sets; the attestation was judged as \
                 of {}, which is {whose}. Who was handed this file by somebody else takes that time on trust, and with \
                 it that keys of the TEE which were found broken later were sound then.",
                UnixTime::from_secs(receipt.time),
                verified.as_of()
            ),
            "That no other answer was made to this request, or that every answer has a receipt, beyond what the measured \
             code does."
                .to_owned(),
            "Who asked: the API key is not in the receipt.".to_owned(),
            "Anything against side channels, physical attacks and defects of the measured code.".to_owned(),
        ]);
        if let ChannelBinding::TlsExporter(_) = verified.binding() {
            statement.not_proven.push(
                "That the request went over the TLS connection of this evidence: the proxy makes several, and keeps the \
                 evidence of one per keyset. The receipt is signed under that keyset all the same."
                    .to_owned(),
            );
        }
        statement
    }

    fn exchange(&mut self, verified: &VerifiedExchange) {
        let receipt = verified.receipt();
        match (verified.covers_request(), verified.covers_answer()) {
            (true, true) => self.proven.push(format!(
                "From exactly this request, under these parameters, it made exactly this answer, {}.",
                receipt.id
            )),
            (request, answer) => {
                self.proven.push(format!(
                    "It made an answer, {}, from some request; the receipt holds salted hashes of both.",
                    receipt.id
                ));
                let mut one = |there: bool, what: &str| {
                    if there {
                        self.proven.push(format!("The {what} is the one given."));
                    } else {
                        self.not_proven.push(format!(
                            "Which {what}: none was given to compare (--{what} FILE)."
                        ));
                    }
                };
                one(request, "request");
                one(answer, "answer");
            }
        }
        let p = &receipt.parameters;
        let most = p.max_tokens.map_or_else(
            || "as many tokens as the context holds".to_owned(),
            |most| format!("at most {most} tokens"),
        );
        self.proven.push(format!(
            "Tokens were drawn with temperature {}, top_p {}, top_k {}, min_p {}, penalties {} (presence), {} (frequency), \
             {} (repetition), seed {}; {} choices per prompt, {most} each.",
            p.temperature,
            p.top_p,
            p.top_k,
            p.min_p,
            p.presence_penalty,
            p.frequency_penalty,
            p.repetition_penalty,
            p.seed,
            p.choices
        ));
        let means = steering::means(&p.steering);
        self.proven.push(match means.as_slice() {
            [] => "Beside the prompt and this drawing nothing steered the answer: no logit_bias, no grammar, no forced call, no stop string."
                .to_owned(),
            means => format!("Beside the prompt and this drawing these steered the answer: {}.", means.join("; ")),
        });
        if let Some(functions) = &p.steering.functions {
            self.proven.push(format!(
                "The model was shown {} function(s) that could be called.",
                functions.offered
            ));
        }
    }

    pub(super) fn to_text(&self) -> String {
        let mut text = String::new();
        for (title, list) in [("proven", &self.proven), ("NOT proven", &self.not_proven)] {
            let _ = writeln!(text, "\n{title}");
            for item in list {
                let _ = writeln!(text, "  - {item}");
            }
        }
        text.truncate(text.trim_end().len());
        text
    }
}

/// Whose words an answer may be.
fn dictation(in_force: &Steering) -> String {
    let mut text =
        "That the model would have said so by itself. A prompt can dictate an answer, always"
            .to_owned();
    if !steering::means(in_force).is_empty() {
        text.push_str(
            "; and here the request steered it by more than its prompt (above), which can dictate every word. The \
             receipt does not say what those held",
        );
    }
    text.push_str(
        ": read the whole request (--request FILE) before you take the answer for the model's own.",
    );
    text
}

fn adapters(loaded: &[[u8; 32]]) -> String {
    match loaded.len() {
        0 => "none was".to_owned(),
        1 => "one was".to_owned(),
        more => format!("{more} were"),
    }
}

/// What a receipt says, for machines.
pub(super) fn claims(receipt: &Receipt) -> Value {
    let p = &receipt.parameters;
    let adapters: Vec<_> = receipt.adapter_digests.iter().map(hex::encode).collect();
    let mut claims = json!({
        "id": receipt.id.as_str(),
        "counter": receipt.counter,
        "keyset_digest": receipt.keyset_digest.to_string(),
        "evidence_digest": hex::encode(receipt.evidence_digest),
        "model_digest": hex::encode(receipt.model_digest),
        "model_version": receipt.model_version,
        "adapters": adapters,
        "adapter": receipt.adapter.map(hex::encode),
        "compute": receipt.compute,
        "parameters": {
            "temperature": p.temperature,
            "top_p": p.top_p,
            "top_k": p.top_k,
            "min_p": p.min_p,
            "presence_penalty": p.presence_penalty,
            "frequency_penalty": p.frequency_penalty,
            "repetition_penalty": p.repetition_penalty,
            "seed": p.seed,
            "n": p.choices,
            "max_tokens": p.max_tokens,
        },
        "request_hash": hex::encode(receipt.request_hash.0),
        "status": receipt.status,
        "answer_hash": hex::encode(receipt.answer_hash.0),
        "usage": receipt.usage.map(|usage| json!({
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        })),
        "untrusted_time": UnixTime::from_secs(receipt.time),
    });
    claims["parameters"]["steering"] = Value::Object(steering::claims(&p.steering));
    claims
}

impl Trusted {
    /// About a verified receipt.
    pub(super) fn receipt(verified: &VerifiedExchange) -> Trusted {
        let mut trusted = Trusted::service(verified.service());
        let receipt = verified.receipt();
        trusted.sentence = format!("{}; receipt {}", trusted.sentence, receipt.id);
        trusted.claims["receipt"] = claims(receipt);
        trusted
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn a_prompt_may_have_dictated_any_answer_and_what_else_was_in_force_is_said() {
        let by_prompt = dictation(&Steering::default());
        let by_more = dictation(&Steering {
            stop_strings: NonZeroU32::new(1),
            ..Steering::default()
        });
        for text in [&by_prompt, &by_more] {
            assert!(
                text.contains("A prompt can dictate an answer, always"),
                "{text}"
            );
        }
        assert!(!by_prompt.contains("more than its prompt"), "{by_prompt}");
        assert!(by_more.contains("more than its prompt"), "{by_more}");
    }
}
