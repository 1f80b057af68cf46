//! Claims about files: sealed models, keys, grants, and what commands take.

use super::{Explanation, about};

pub(super) const TABLE: &[Explanation] = &[
    about(
        &["not-a-container"],
        "The file is a sealed model.",
        "It is another kind of file, often the model before it was sealed; or its beginning is damaged.",
        "Seal a GGUF file or a directory of safetensors with `casemate seal`; a sealed model ends in .casemate.",
    ),
    about(
        &["format", "suite", "manifest-format"],
        "The sealed model has a format that this program knows.",
        "It was sealed by a newer version of Casemate.",
        "Update this program.",
    ),
    about(
        &["truncated"],
        "The file is as long as its header says.",
        "It was cut: by an interrupted copy, a full disk, or somebody who removed the end.",
        "Copy it again from the provider and compare the sizes.",
    ),
    about(
        &["trailing-data"],
        "Nothing follows the model's last chunk.",
        "Something was appended to the file.",
        "Copy it again from the provider.",
    ),
    about(
        &[
            "chunk-size",
            "manifest-length",
            "payload-length",
            "payload-mismatch",
            "padding",
            "manifest-too-large",
            "not-a-manifest",
            "not-canonical",
            "model-name",
            "config",
            "manifest-kind",
            "adapter",
            "entry-count",
            "entry-name",
            "entry-order",
            "tensor-rank",
            "entry-size",
            "entry-overlap",
            "entry-gap",
            "payload-too-large",
        ],
        "The sealed model keeps to the format, as docs/container-format.md writes it down.",
        "The file was damaged, or was made by another program than `casemate seal`. The provider's signature does not \
         excuse it.",
        "Copy it again from the provider; if it stays so, have the provider seal the model again.",
    ),
    about(
        &["wrong-key"],
        "The data key is the one that this file was sealed under.",
        "The key belongs to another model; or the header of the file was altered.",
        "Use the data key that was given to `casemate seal`; otherwise copy the file again.",
    ),
    about(
        &["manifest-altered"],
        "Header and list of contents are as they were sealed.",
        "The front of the file was damaged or altered, or belongs to another file.",
        "Copy the file again from the provider. If it stays so, do not use it.",
    ),
    about(
        &["wrong-signer"],
        "The expected provider signed the model.",
        "Somebody else sealed it. Who holds the data key can encrypt, but cannot sign for the provider.",
        "Compare the two keys. Take the provider's key from the provider, not from the file.",
    ),
    about(
        &["signature"],
        "The provider's signature fits this model.",
        "A signature was copied from another model, or the model was altered after signing.",
        "Do not use the file. Copy it again from the provider.",
    ),
    about(
        &["chunk"],
        "Every piece of the model is as it was sealed, and in its place.",
        "Bits of the file changed: a failing disk or copy; or somebody altered, exchanged or spliced in pieces, from \
         another sealing perhaps.",
        "Copy the file again from the provider. If a good copy fails again on this machine, suspect the machine or its \
         operator.",
    ),
    about(
        &["tensor-digest", "asset-digest"],
        "The weights are, bit for bit, those that the provider's signed list names.",
        "Someone who holds the data key put other weights or another tokenizer behind the provider's signature. A damaged \
         disk cannot do this: the pieces were encrypted anew.",
        "Do not use the file. Find out who has the data key, and seal the model under a new one.",
    ),
    about(
        &["memory"],
        "The machine has memory for the model.",
        "The model is larger than the free memory, or a limit is set for the process.",
        "Free memory or raise the limit; the message says how many bytes are needed.",
    ),
    about(
        &["io", "source", "key-file"],
        "What is to be read or written can be.",
        "A path is mistyped, a permission is missing, or a disk is full.",
        "The message names the file and what the system said.",
    ),
    about(
        &["source-changed"],
        "The model does not change while it is sealed.",
        "Somebody wrote to the model's files meanwhile.",
        "Seal again when nothing else uses the files.",
    ),
    about(
        &["exists"],
        "Nothing is overwritten by accident.",
        "The output file exists already.",
        "Choose another name, or give --force to replace it.",
    ),
    about(
        &["key-file-exposed"],
        "Nobody but its owner can read the key file.",
        "The file was copied or made with wide permissions.",
        "Give it mode 600 (`chmod 600 FILE`). If others could read it, make a new key.",
    ),
    about(
        &["not-a-key"],
        "The file or text is a key of the kind that is asked for.",
        "Another file was named, the public in place of the secret one perhaps, or hexadecimal digits are missing.",
        "`casemate keygen` makes data-key.pem, signing-key.pem and signing-key.pub.pem, and prints the provider's key.",
    ),
    about(
        &["model"],
        "The model can be imported.",
        "It is of an architecture or encoding that is not supported, or the file is damaged.",
        "docs/import.md lists what is supported; the message says what is not.",
    ),
    about(
        &["not-a-transcript"],
        "The file records a refusal.",
        "Another file was given to `casemate explain`; the message says what it looks like.",
        "Run the command that refused again with --json, and give its output to `casemate explain`.",
    ),
    about(
        &["other-kind", "base-kind"],
        "A model is where a model belongs, and an adapter where an adapter does.",
        "The two paths are exchanged, or an adapter was named as the base of another.",
        "`casemate inspect --data-key` says of a sealed file which of the two it is.",
    ),
    about(
        &["base-key"],
        "A sealed base comes with its data key, and a digest without.",
        "--base names a sealed model, which cannot be read without --base-key; or both a digest and a key were given.",
        "Give --base FILE with --base-key FILE, or only the digest that `casemate seal` printed for the model.",
    ),
    about(
        &["nothing-to-seal"],
        "There is something to seal.",
        "Neither a model nor an adapter was named.",
        "Name a GGUF file or a directory, or an adapter with --adapter DIR --base MODEL.",
    ),
    about(
        &["sealed-already"],
        "What is to be sealed is a model in the clear.",
        "The file is sealed already.",
        "Give the GGUF file or directory that it was made from.",
    ),
    about(
        &["nothing-public"],
        "Each pattern of --public fits some tensor.",
        "A pattern is mistyped.",
        "`casemate inspect --data-key` lists the names of the tensors.",
    ),
    about(
        &["grant", "minimum-version"],
        "The grant is one that an enclave can use.",
        "The file is no grant or is damaged, or names a minimum version above that of the model.",
        "Make it again with `casemate grant`.",
    ),
    about(
        &["policy"],
        "The policy file can be used.",
        "It has a mistake in form, an unknown field, or lacks a section that this command needs.",
        "The message names the place; docs/policy.md describes the file.",
    ),
    about(
        &[
            "arguments",
            "environment",
            "name",
            "url",
            "ca",
            "too-large",
            "not-implemented",
        ],
        "The command's arguments can be used.",
        "One of them has another form than is expected.",
        "The message says which; --help describes it.",
    ),
    about(
        &["api-keys", "no-api-keys", "no-such-key"],
        "The file lists the API keys that are asked for.",
        "It has a mistake in form, lists none, or none of the name that was given.",
        "`casemate apikey list` shows what is listed, `casemate apikey new` makes an entry. A service without API keys is \
         granted with `casemate grant --open`.",
    ),
    about(
        &["access", "grant.access"],
        "Whether anybody may use the model is said, by the provider and by the broker's administrator.",
        "The grant was made with --open, or renewed without thinking of --api-keys, for a service that asked for API keys \
         until now; or neither was given; or the broker was told --open for a grant that lists API keys.",
        "Make the grant with `casemate grant --api-keys` and put it again. Only if anybody who reaches the enclave shall use \
         the model: `casemate grant --open`, then `casemate-broker admin resource put --grant FILE --open`.",
    ),
    about(
        &["bundle", "bundle.structure"],
        "The file is a receipt with its evidence, as the proxy gives it out.",
        "It is another file, or was edited or cut.",
        "Fetch it again from the proxy: GET /v1/receipts/ and the answer's id.",
    ),
    about(
        &["randomness"],
        "The system gives randomness.",
        "It has none to give, as early in the start of a machine.",
        "Try again; if it lasts, look at the machine.",
    ),
    about(
        &["signer", "not-back", "rollback", "provider"],
        "A rollback goes one step back, and the provider signs it.",
        "The grant or rollback is signed by another key than the broker's provider, the version does not go down, or the \
         rollback was used or has expired.",
        "Sign it with the provider's key that the broker was made for; going up needs no rollback.",
    ),
    about(
        &["version"],
        "Versions of policies and models only go up.",
        "The file has the version that is in force, or an older one.",
        "Raise the version. To go back on purpose, have the provider sign it: `casemate rollback --help`.",
    ),
    about(
        &["no-bench-program"],
        "The program that measures lies beside this one.",
        "Only `casemate` was built or copied. What runs models is a program of its own, so that `casemate` need not hold an engine.",
        "Build it, `cargo build --release -p casemate-bench`, or copy casemate-bench into the same directory.",
    ),
    about(
        &["no-audit-program"],
        "The program that attacks models to measure them lies beside this one.",
        "Only `casemate` was built or copied. What runs models is a program of its own, so that `casemate` need not hold an engine.",
        "Build it, `cargo build --release -p casemate-audit`, or copy casemate-audit into the same directory.",
    ),
    about(
        &["key-exists"],
        "Each API key has a name of its own.",
        "The list has a key of that name already.",
        "Give the new key another name, or take the old one out first: casemate apikey remove.",
    ),
    about(
        &["too-many-keys"],
        "A grant lists at most 256 API keys.",
        "The list is full.",
        "Take out what nobody uses: casemate apikey list shows them, casemate apikey remove takes one out.",
    ),
];
