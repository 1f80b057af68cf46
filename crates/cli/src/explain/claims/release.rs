//! Claims about the release of keys: between broker and enclave.

use super::{Explanation, about};

pub(super) const TABLE: &[Explanation] = &[
    about(
        &["grant.signature"],
        "The key was granted by the provider that the enclave's configuration names.",
        "Whoever answers in the broker's place does not speak for the provider: an impersonator plants a key, and with it \
         a model of its own. Or the configuration names another provider's key.",
        "Check the broker's address in the configuration, and that `provider` there is what `casemate keygen` printed.",
    ),
    about(
        &["grant.encryption"],
        "The key was encrypted to this enclave.",
        "An answer to another enclave, or an altered one, was passed on.",
        "Start the enclave again; if it stays so, look for who answers between here and the broker.",
    ),
    about(
        &["grant.model"],
        "The model on disk is the one that the provider granted the key for.",
        "The host put another model, or another version of it, in its place. All models sealed under one data key decrypt \
         with it; the grant says which one may be served.",
        "Copy the granted model into its place. To serve this one, have the provider grant it: `casemate grant --model`.",
    ),
    about(
        &["grant.adapter"],
        "The broker's grant for an adapter is for the one whose digest the enclave's configuration has under that name.",
        "The digest in the configuration is of an older seal of the adapter, or the grant of another one was stored under \
         its resource. If neither is so, the host or the network exchanged the broker's answers about two adapters.",
        "Compare three: `digest` in the configuration, what `casemate seal` printed, and what `casemate-broker admin \
         resource list` shows under the resource. Correct the one that differs; if they agree, look at the path between \
         enclave and broker.",
    ),
    about(
        &["received"],
        "Each key grant that the enclave holds is the one that the broker released under the name that the enclave asked for.",
        "A grant was replaced at the broker while the enclave asked. Or the host or the network asked the broker for another \
         grant than the enclave did, to have another list of API keys decide who may use a model or an adapter.",
        "Start the enclave again, or leave it to try again. If it stays so, look at the path between enclave and broker.",
    ),
    about(
        &["configuration.measured"],
        "The configuration that the enclave read is the one that the TEE measured.",
        "The file changed while the enclave started, or was named by a path that leads elsewhere meanwhile.",
        "Leave the file alone during the start, and start again.",
    ),
    about(
        &["resource", "resource_not_found"],
        "The broker has what the enclave asks for.",
        "The path in the enclave's configuration differs from the one under which the grant was stored.",
        "Compare `resource` in the enclave's configuration with `casemate-broker admin resource list`.",
    ),
    about(
        &["grant.former"],
        "The grant says who may use the model.",
        "It was made, and stored, by a version of Casemate whose grants did not say so. It is kept, but released to nobody.",
        "Make it anew with `casemate grant --api-keys` or `--open`, and put it in its place: `casemate-broker admin resource \
         put`. `casemate-broker admin resource list` names all of them.",
    ),
    about(
        &["session"],
        "The request belongs to a session of the broker that is still open.",
        "The session ended, since sessions live for minutes only, or the broker was started again meanwhile.",
        "An enclave attests again by itself.",
    ),
    about(
        &["nothing_released"],
        "A credential is signed only for an enclave that received a model's key in the same session.",
        "The enclave asked for a credential before the key, as ours never does, or asks another broker.",
        "Look at which program asks: it is not Casemate's enclave, or is of another version.",
    ),
    about(
        &["evidence_denied", "not_allowed"],
        "The enclave's evidence is accepted by the broker's policy, at attestation and again at release.",
        "The denial in the same answer says which claim failed.",
        "Explain the denial: it is in the answer and in the broker's log.",
    ),
    about(
        &["no_policy"],
        "The broker has a policy.",
        "None was set since the broker was made.",
        "Set one: `casemate-broker admin policy set policy.toml`.",
    ),
    about(
        &["too_many_sessions", "busy"],
        "The broker has room for another attempt.",
        "Many enclaves start at once, or somebody opens sessions and leaves them.",
        "Try again in a few seconds; enclaves do. If it lasts, look at the broker's metrics.",
    ),
    about(
        &["storage", "internal"],
        "The broker could record its decision; what it cannot record, it does not release.",
        "The disk of the broker is full, or its database cannot be written.",
        "Look at the broker's log and its disk.",
    ),
    about(
        &["malformed"],
        "The message is one that the protocol knows.",
        "Another program, or another version of it, spoke to the broker.",
        "Compare versions on both sides.",
    ),
    about(
        &["timeout"],
        "The request arrived in time.",
        "The connection is slow or broken, or somebody sends slowly on purpose.",
        "Try again; look at the network if it lasts.",
    ),
];
