//! Codes with which the proxy, and the service behind it, refuse requests.

use super::{Explanation, about};

pub(super) const TABLE: &[Explanation] = &[
    about(
        &["service_not_verified"],
        "The service was verified, and that is not too long ago.",
        "The evidence or credential ran out and the service could not be verified again: it is down, or it changed and is \
         refused now. The message ends with the reason.",
        "Run `casemate verify` with the same policy and URL: it shows the whole transcript. Nothing was sent meanwhile.",
    ),
    about(
        &["service_unreachable", "unreachable"],
        "The service can be reached.",
        "It is down, the URL is wrong, or a firewall is between.",
        "Compare the URL with the one that the provider gave you; it has a scheme and no /v1 at its end.",
    ),
    about(
        &["key_refused"],
        "The host passes requests to the enclave whose key was attested.",
        "A gateway sends requests to another replica than it fetched the evidence from; or somebody claims that the key is \
         gone, to see the prompt encrypted to another one.",
        "Ask again. If it stays so, have the operator send both to the same replica.",
    ),
    about(
        &["refused_by_host"],
        "The host passes encrypted requests to the enclave.",
        "A gateway, a limit or a firewall before the enclave refused the request. What it says is not authenticated.",
        "The status in the message says what kind of refusal it was; ask the operator.",
    ),
    about(
        &["answer_refused"],
        "The whole answer arrived as the enclave encrypted it.",
        "Somebody between enclave and proxy cut the answer short or altered it: a gateway with a limit on time or size, a \
         broken connection, or a man in the middle.",
        "Do not use the part that arrived. Ask again; if it stays so, look for timeouts and buffering in gateways.",
    ),
    about(
        &["foreign_origin"],
        "Only programs of the user use the proxy.",
        "A web page of some other site tried to speak in the user's name.",
        "Close the page. A program of your own must not send an Origin header of another site.",
    ),
    about(
        &["not_found", "method_not_allowed", "unknown_url"],
        "The path and method exist.",
        "The client uses a path that is not offered, or forgot /v1 in its base URL.",
        "OpenAI clients take the proxy's URL with /v1 at its end.",
    ),
    about(
        &["request_too_large", "too_large"],
        "The request is within the limits.",
        "The prompt is too long, or something else than a prompt was sent.",
        "Send less; the message says how much is allowed.",
    ),
    about(
        &[
            "unreadable_request",
            "unsendable_request",
            "invalid_message",
        ],
        "The request can be read and carried.",
        "The client broke off, or uses header fields that cannot be carried.",
        "Try another client or fewer header fields.",
    ),
    about(
        &["encryption_failed"],
        "The request could be encrypted.",
        "The system gave no randomness.",
        "Look at this machine; nothing was sent.",
    ),
];
