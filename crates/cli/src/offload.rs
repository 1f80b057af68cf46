//! `casemate offload`: what of a model an untrusted worker would compute, and what it would see.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use casemate_container::{Access, DataKey, fits_pattern};
use casemate_offload::plan::{self, Place, Placement, Preset, Tensor};
use serde_json::json;

use crate::exit::{self, Failure, InJson};
use crate::sealed;

/// Masked products on a worker that nobody trusts (docs/offload.md).
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    Plan(Plan),
}

/// Show for each tensor where its product is computed, why, and what the worker has of it.
///
/// The enclave decides in the same way when it starts, by the manifest that the provider signed; of a model that is not sealed
/// yet, --public says what would be marked. Whatever is not public stays inside under every plan.
#[derive(clap::Args)]
pub(crate) struct Plan {
    /// A sealed model, a GGUF file, or a directory with config.json, tokenizer and safetensors
    model: PathBuf,
    /// The plan: none, secureinfer or full-linear
    #[arg(long, value_name = "PLAN", default_value = "full-linear")]
    plan: Preset,
    /// Data key file of a sealed model, as made by keygen
    #[arg(long, value_name = "FILE", conflicts_with = "public")]
    data_key: Option<PathBuf>,
    /// Tensors that would be public in a model that is not sealed, by name; * stands for any characters. May be repeated
    #[arg(long, value_name = "PATTERN")]
    public: Vec<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: &Command) -> Result<(), Failure> {
    let Command::Plan(args) = command;
    show(args).in_json(args.json)
}

fn show(args: &Plan) -> Result<(), Failure> {
    let tensors = match &args.data_key {
        Some(key) => of_sealed(&args.model, &DataKey::read_file(key)?)?,
        None => of_source(&args.model, &args.public)?,
    };
    let plan = plan::plan(args.plan, &tensors);
    match args.json {
        true => exit::print_json(&in_json(args.plan, &plan)),
        false => exit::print(&in_text(args.plan, &plan)),
    }
}

fn of_sealed(model: &Path, key: &DataKey) -> Result<Vec<Tensor>, Failure> {
    let inspected = sealed::open(model)?.inspect(key);
    let inspected = inspected.map_err(|error| sealed::of(model, error))?;
    let entries = inspected.manifest().tensors();
    Ok(entries.iter().map(Tensor::from).collect())
}

fn of_source(model: &Path, public: &[String]) -> Result<Vec<Tensor>, Failure> {
    sealed::refuse_sealed(model)?;
    let source = casemate_import::open(model)?;
    let access = |name: &str| match public.iter().any(|pattern| fits_pattern(pattern, name)) {
        true => Access::Public,
        false => Access::Private,
    };
    let tensor = |tensor: &casemate_container::SourceTensor| Tensor {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        access: access(&tensor.name),
    };
    Ok(source.tensors().iter().map(tensor).collect())
}

/// Sums over what is computed at a place.
#[derive(Default)]
struct Sums {
    tensors: usize,
    bytes: u64,
    operations: u64,
}

fn sums(plan: &[Placement], place: Place) -> Sums {
    let here = plan.iter().filter(|tensor| tensor.place == place);
    here.fold(Sums::default(), |sums, tensor| Sums {
        tensors: sums.tensors + 1,
        bytes: sums.bytes.saturating_add(tensor.bytes),
        operations: sums.operations.saturating_add(tensor.operations),
    })
}

fn in_json(preset: Preset, plan: &[Placement]) -> serde_json::Value {
    let tensor = |tensor: &Placement| {
        json!({
            "tensor": tensor.tensor,
            "place": tensor.place.to_string(),
            "why": tensor.why.to_string(),
            "bytes": tensor.bytes,
            "operations_per_token": tensor.operations,
            "worker_sees": tensor.seen_by_worker.to_string(),
        })
    };
    let total = |place| {
        let sums = sums(plan, place);
        json!({ "tensors": sums.tensors, "bytes": sums.bytes, "operations_per_token": sums.operations })
    };
    json!({
        "plan": preset.to_string(),
        "tensors": plan.iter().map(tensor).collect::<Vec<_>>(),
        "worker": total(Place::Worker),
        "enclave": total(Place::Inside),
    })
}

fn in_text(preset: Preset, plan: &[Placement]) -> String {
    let width = plan.iter().map(|tensor| tensor.tensor.len()).max();
    let width = width.unwrap_or(0).max("tensor".len());
    let mut text = format!(
        "plan {preset}\n\n{:<width$}  {:<7}  {:>12}  {:>14}  why; what the worker has of it",
        "tensor", "where", "bytes (int8)", "ops per token"
    );
    for tensor in plan {
        let _ = write!(
            text,
            "\n{:<width$}  {:<7}  {:>12}  {:>14}  {}; {}",
            tensor.tensor,
            tensor.place.to_string(),
            tensor.bytes,
            tensor.operations,
            tensor.why,
            tensor.seen_by_worker
        );
    }
    let (worker, enclave) = (sums(plan, Place::Worker), sums(plan, Place::Inside));
    let all = (worker.operations + enclave.operations).max(1) as f64;
    let _ = write!(
        text,
        "\n\nthe worker computes {} tensors: {} bytes, {:.1} % of the operations of products\nthe enclave computes {} tensors: {} \
         bytes, and everything that is no product",
        worker.tensors,
        worker.bytes,
        100.0 * worker.operations as f64 / all,
        enclave.tensors,
        enclave.bytes,
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Vec<Tensor> {
        let tensor = |name: &str, shape: &[u64], access| Tensor {
            name: name.into(),
            shape: shape.to_vec(),
            access,
        };
        vec![
            tensor("token_embd.weight", &[100, 8], Access::Private),
            tensor("blk.0.attn_output.weight", &[8, 8], Access::Public),
            tensor("blk.0.ffn_down.weight", &[8, 20], Access::Private),
            tensor("output.weight", &[100, 8], Access::Private),
        ]
    }

    #[test]
    fn a_plan_says_where_everything_is_and_adds_it_up() {
        let plan = plan::plan(Preset::FullLinear, &model());
        let json = in_json(Preset::FullLinear, &plan);
        assert_eq!(json["worker"]["tensors"], 1);
        assert_eq!(json["worker"]["bytes"], 64);
        assert_eq!(json["worker"]["operations_per_token"], 128);
        assert_eq!(json["enclave"]["tensors"], 3);
        // Looked up, not multiplied: the head is a tensor of its own.
        assert_eq!(json["enclave"]["operations_per_token"], 2 * (160 + 800));
        assert_eq!(json["tensors"][1]["place"], "worker");
        assert_eq!(json["tensors"][2]["place"], "enclave");
        let text = in_text(Preset::FullLinear, &plan);
        assert!(text.contains("blk.0.attn_output.weight  worker"), "{text}");
        assert!(text.contains("1 tensors: 64 bytes, 6.2 %"), "{text}");
    }
}
