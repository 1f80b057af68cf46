//! Claims about a service: its keys, whose it is, and which model it serves.

use super::{Explanation, about};

pub(super) const TABLE: &[Explanation] = &[
    about(
        &["response.structure"],
        "The service answers with evidence, keyset and credential.",
        "The URL is not that of a Casemate service: a web page, an API behind it, or a gateway that rewrites answers.",
        "Use the base URL that the provider gave you, without /v1 and without a path to the API.",
    ),
    about(
        &[
            "keyset.structure",
            "keyset.ohttp_config",
            "credential.structure",
        ],
        "The service's keys and credential are in the format that this program knows.",
        "Service and user have different versions of Casemate.",
        "Update the older one of the two.",
    ),
    about(
        &["keyset.validity"],
        "The service's keys are valid now.",
        "A clock is wrong, here or there; or somebody keeps an old enclave alive whose keys should be gone.",
        "Compare this machine's clock. If it is right, have the operator look why the service does not renew its keys.",
    ),
    about(
        &["credential.issuer"],
        "The credential is from the issuer that your policy pins: this is your provider's service.",
        "This is a genuine enclave of somebody else. It may run the same program and even the same model, but what it is \
         for, and who can change it, your provider does not say. Or your provider has a new issuer key.",
        "Check the URL. Take a new issuer key only from the provider itself, not from the service.",
    ),
    about(
        &["credential.signature"],
        "The pinned issuer signed the credential.",
        "Somebody made or changed a credential in the issuer's name: a broker impersonator, or whoever answers in its place.",
        "Do not use this service. If you operate the enclave: compare the broker's address and issuer key in its \
         configuration with what `casemate-broker init` printed.",
    ),
    about(
        &["credential.validity"],
        "The credential is valid now.",
        "A clock is wrong, or the enclave could not renew its credential since the broker does not answer or refuses it.",
        "Compare clocks, then see the broker's log (`casemate-broker admin log show --json`) for a refusal.",
    ),
    about(
        &["credential.keyset", "credential.binding"],
        "The issuer vouched for this enclave's keys and not for another's.",
        "Somebody shows one enclave's credential with another one's keys; or a gateway answers from two replicas at once.",
        "Send nothing. Have the operator check that each answer comes from one replica.",
    ),
    about(
        &["credential.model"],
        "The issuer vouched for the model that the enclave serves.",
        "The enclave serves another model than it told its broker.",
        "Do not use this service, and tell its provider.",
    ),
    about(
        &["credential.service", "service"],
        "The service has the name that was agreed on.",
        "The URL leads to another service of the same provider, or the name in policy or resource is mistyped.",
        "Compare the names. The provider sets a service's name with `admin resource put --service`.",
    ),
    about(
        &["credential.policy_version", "keyset.policy_version"],
        "The broker decided under a policy that is new enough.",
        "The broker still works with an older policy, or its policy changed while the enclave attested.",
        "If it does not go away when the enclave attests again, have the provider update the broker's policy.",
    ),
    about(
        &["model.digest", "keyset.model_digest"],
        "The model is one of those that the policy names.",
        "The provider published a new model, or another one is served in its name.",
        "Ask the provider for the digest of the model. If you accept it, add it to [model] digests and raise the policy's \
         version.",
    ),
    about(
        &["model.version", "keyset.model_version", "grant.version"],
        "The model is not older than the policy or the key grant allows.",
        "The operator still serves, or serves again, a version that was replaced, perhaps since it was withdrawn for a \
         fault.",
        "Have the operator serve the newer version. Lower the minimum only if you know why the old one is back.",
    ),
    about(
        &["model.adapters", "keyset.adapter"],
        "The adapters beside the model are among those that the policy names, and their keys were released.",
        "The provider published a new adapter, or the operator configured one that nobody allowed.",
        "Ask the provider for the digest of the adapter. If you accept it, add it to [model] adapters and raise the \
         policy's version.",
    ),
    about(
        &["adapter.base"],
        "The adapter was made for the model that is served.",
        "The model was sealed anew, which gave it another digest, and the adapter was not; or the two are of different \
         models.",
        "Seal the adapter again with the sealed model as --base, or serve the model that it is for.",
    ),
    about(
        &["adapter.tensors", "adapter.twice"],
        "Each adapter has tensors in the shapes of its model, and is there once.",
        "It was sealed with only a digest as --base, so that nothing could be compared; or one file is configured under two \
         names.",
        "Seal it again with the sealed model as --base and its --base-key, which compares all shapes.",
    ),
    about(
        &["freshness"],
        "The evidence is younger than the policy's maximum age.",
        "The answer took too long: a slow network, a suspended machine, or somebody who holds answers back.",
        "Ask again. If it stays so, look at the path to the service.",
    ),
    about(
        &["policy.service", "policy.model"],
        "The policy says whose service and which model are accepted.",
        "The policy was written for a broker, which needs neither section.",
        "Add [service] and [model] as in docs/policy.md; the provider publishes the values.",
    ),
    about(
        &["request.replayed"],
        "Each encrypted request is answered once.",
        "Somebody recorded a request and sent it again, or a gateway repeats requests by itself.",
        "Nothing was lost: the first request was answered. Switch off retries in gateways before the service.",
    ),
    about(
        &["request.sealed"],
        "The request arrived as it was encrypted, to a key that the enclave holds.",
        "It was cut or altered on its way, or was encrypted by something else than `casemate proxy`.",
        "Ask again; if it stays so, look for what alters requests between proxy and enclave.",
    ),
    about(
        &["tls.handshake"],
        "The service makes a full TLS 1.3 handshake with a post-quantum key exchange, and signs it with the key it shows.",
        "The port is another than that of attested TLS; or a load balancer or an inspecting proxy in between speaks an \
         older TLS, or ends it.",
        "Compare the port with the one that the enclave printed as `attested TLS on`. If it is right, reach the enclave \
         directly, or use the service's https URL.",
    ),
    about(
        &["tls.key"],
        "The TLS connection ends inside the attested enclave.",
        "Somebody between you and the enclave ends TLS: a load balancer, a company's inspecting proxy, or a man in the \
         middle who relays genuine evidence.",
        "Reach the enclave directly. Or use its https URL, where gateways may end TLS, since requests are encrypted to \
         the enclave inside of it.",
    ),
];
