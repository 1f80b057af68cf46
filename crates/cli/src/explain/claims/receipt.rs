//! Claims about receipts: what a service signed about one exchange.

use super::{Explanation, about};

pub(super) const TABLE: &[Explanation] = &[
    about(
        &["receipt.structure"],
        "The receipt is in the format that this program knows.",
        "The file is damaged, was edited, or was written by another version of Casemate.",
        "Take the bundle that the proxy saved, unchanged.",
    ),
    about(
        &["receipt.keyset", "receipt.evidence"],
        "Receipt, evidence and credential are of one and the same enclave session.",
        "Pieces of two bundles were put together, or the service was started again between answer and receipt.",
        "Take the bundle that the proxy made for this exchange. If it fails too, tell the provider.",
    ),
    about(
        &["receipt.signature"],
        "The attested enclave signed the receipt as it is.",
        "Somebody altered the receipt, or made one himself.",
        "Do not rely on it. Take the copy that the proxy saved.",
    ),
    about(
        &["receipt.model"],
        "The receipt names the model that the enclave was attested with.",
        "The service contradicts itself, which a genuine enclave does not.",
        "Do not rely on it, and tell the provider.",
    ),
    about(
        &["receipt.time"],
        "The receipt was signed while the enclave's keys were valid.",
        "The host set the enclave's clock. A receipt's time is the host's word in any case.",
        "Rely on a time stamp of your own where the time matters; tell the provider.",
    ),
    about(
        &["receipt.complete"],
        "The answer ended as the service intended.",
        "The client left in the middle, or the service failed; what arrived is a part.",
        "Ask again if you need the whole answer and a receipt for it.",
    ),
    about(
        &["request"],
        "The receipt is about this request.",
        "The file holds other bytes than the client sent: parsed and written again, with another line end, or of another \
         request. Or the receipt is shown for a question that was never asked.",
        "Give the exact bytes that were sent, and the path if it was not that of chat completions.",
    ),
    about(
        &["answer"],
        "The receipt is about this answer.",
        "The file holds other bytes than the client received: formatted, cut or edited. Or somebody attributes an answer \
         to the service that it did not give.",
        "Give the exact bytes that were received, including those between the events of a stream.",
    ),
];
