//! Codes with which the proxy, and the service behind it, refuse requests.

use super::{Explanation, about};

pub(super) const TABLE: &[Explanation] = &[
    about(
        &["service_not_verified"],
        "The evidence that the service shows is accepted.",
        "It was verified before and shows evidence now that the policy refuses: its credential ran out, or it changed. The \
         message ends with the reason.",
        "Run `casemate verify` with the same policy and URL: it shows the whole transcript. Nothing was sent meanwhile. \
         `GET /readyz` of the proxy tells when the service verifies again.",
    ),
    about(
        &["service_unreachable", "unreachable"],
        "The service can be reached.",
        "It is down, the URL is wrong, or a firewall is between.",
        "Compare the URL in the message with the one that the provider gave you; it has a scheme and no /v1 at its end. What \
         follows it is what the system said. `GET /readyz` of the proxy tells when the service is back.",
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
        &["service_busy"],
        "The service has room for the request.",
        "Many requests are arriving at once, the service is about to stop, or its credential ran out and is being renewed. What \
         was said is not authenticated: a gateway may have said it.",
        "Ask again after the seconds in Retry-After, which OpenAI clients do by themselves. If it stays so, ask the operator.",
    ),
    about(
        &["answer_refused"],
        "The whole answer arrived as the enclave encrypted it.",
        "Somebody between enclave and proxy cut the answer short or altered it: a gateway with a limit on time or size, a \
         broken connection, or a man in the middle.",
        "Do not use the part that arrived. Ask again; if it stays so, look for timeouts and buffering in gateways.",
    ),
    about(
        &["incomplete_request"],
        "The whole request arrived.",
        "The connection broke while it was sent, or the client counted its bytes wrongly.",
        "Ask again. Nothing was computed.",
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
        &["invalid_api_key"],
        "Whoever asks has an API key that the provider granted.",
        "The client sends no key, or one that was mistyped, replaced or never granted.",
        "Give the client the key that the provider gave you; it begins with cm-. The proxy passes it on, encrypted.",
    ),
    about(
        &["rate_limit_exceeded"],
        "The API key is within its limits.",
        "More was asked in a minute, or at the same time, than the provider allows for this key.",
        "Wait for as long as Retry-After says, or ask the provider for a higher limit.",
    ),
    about(
        &["insufficient_quota"],
        "The API key is within its budget of the day.",
        "More was asked within a day than the provider allows for this key, to bound what anybody can learn of the model.",
        "Wait for as long as Retry-After says: the budget fills up evenly. Where Retry-After is absent, the prompt alone is \
         above it. Only the provider can grant more.",
    ),
    about(
        &["overloaded"],
        "The service has room for another request.",
        "More users ask at once than it can answer.",
        "Wait for as long as Retry-After says, and ask again.",
    ),
    about(
        &["context_length_exceeded", "empty_prompt"],
        "The prompt has a length that the model can take.",
        "The conversation grew beyond the context, or the prompt is empty.",
        "Shorten the prompt or ask for fewer tokens; the message has the numbers.",
    ),
    about(
        &["model_not_found"],
        "The request names the model that is served.",
        "The name is another service's, or mistyped.",
        "GET /v1/models lists the name.",
    ),
    about(
        &[
            "invalid_json",
            "invalid_request",
            "invalid_value",
            "missing_required_parameter",
            "unknown_parameter",
            "unsupported_parameter",
        ],
        "The request is one that this API takes.",
        "A field is missing, mistyped, out of its range, or asks for something that is not offered.",
        "The message names the field; docs/enclave.md lists what is supported.",
    ),
    about(
        &["encryption_failed"],
        "The request could be encrypted.",
        "The system gave no randomness.",
        "Look at this machine; nothing was sent.",
    ),
    about(
        &["receipt_not_found", "evidence_not_kept"],
        "The service has the receipt, and the proxy the evidence for it.",
        "The id is another answer's or mistyped, the service forgot the receipt since, or the proxy was started again.",
        "Fetch receipts soon after their answers, or let the proxy save them: `casemate proxy --help`.",
    ),
    about(
        &["receipt_refused"],
        "The receipt that the service gave out holds.",
        "It was altered on its way, or the service contradicts itself.",
        "Fetch it again; if it stays so, tell the provider.",
    ),
    about(
        &["extraction_policy"],
        "The request stays within what the provider lets users learn of the model's numbers.",
        "It asks for more log-probabilities or stronger biases than the provider allows, which would help to copy the model.",
        "Ask for less; the message says what is allowed. Only the provider can change it.",
    ),
];
