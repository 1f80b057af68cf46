//! `casemate inspect`: what a sealed model says about itself.

use std::fmt::Write as _;
use std::path::PathBuf;

use casemate_container::{
    Access, AdapterConfig, DataKey, Header, Inspected, Kind, Manifest, ModelConfig,
};
use serde_json::{Value, json};

use crate::exit::{self, Failure, InJson};
use crate::sealed;

/// Show what is in a sealed model or adapter: without a key the header, with the data key the manifest too.
///
/// This looks and does not judge: who signed is shown, not compared, and the tensors are not read. Use check to have a
/// file verified.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The sealed model.
    model: PathBuf,
    /// Data key file, as made by keygen.
    #[arg(long, value_name = "FILE")]
    data_key: Option<PathBuf>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    inspect(args).in_json(args.json)
}

fn inspect(args: &Args) -> Result<(), Failure> {
    // The key first: a mistyped path is found before a large file is looked at.
    let data_key = args
        .data_key
        .as_deref()
        .map(DataKey::read_file)
        .transpose()?;
    let file = sealed::open(&args.model)?;
    let header = file.header().clone();
    let inspected = data_key.map(|key| file.inspect(&key)).transpose();
    let inspected = inspected.map_err(|error| sealed::of(&args.model, error))?;
    match args.json {
        true => exit::print_json(&json!({
            "header": header_json(&header),
            "manifest": inspected.as_ref().map(manifest_json),
        })),
        false => {
            let mut text = header_text(&header);
            match &inspected {
                Some(inspected) => text += &manifest_text(inspected),
                None => text += "\nname, tensors and signer are encrypted; --data-key shows them",
            }
            exit::print(&text)
        }
    }
}

fn header_json(header: &Header) -> Value {
    json!({
        "format": header.format(),
        "suite": header.suite(),
        "file_id": hex::encode(header.file_id()),
        "file_bytes": header.file_len(),
        "manifest_section_bytes": header.manifest_section_len(),
        "payload_bytes": header.payload_len(),
        "chunk_bytes": header.chunk_len(),
        "chunks": header.chunks(),
        "authenticated": false,
    })
}

fn header_text(header: &Header) -> String {
    format!(
        "format        {}\nsuite         {}\nfile id       {}\nsize          {} bytes\npayload       {} bytes in {} \
         chunks of {}",
        header.format(),
        header.suite(),
        hex::encode(header.file_id()),
        header.file_len(),
        header.payload_len(),
        header.chunks(),
        header.chunk_len(),
    )
}

fn manifest_json(inspected: &Inspected) -> Value {
    let manifest = inspected.manifest();
    let tensors: Vec<Value> = manifest
        .tensors()
        .iter()
        .map(|t| {
            json!({
                "name": t.name,
                "dtype": t.dtype.name(),
                "shape": t.shape,
                "offset": t.offset,
                "size": t.size,
                "digest": hex::encode(t.digest),
                "public": t.access == Access::Public,
            })
        })
        .collect();
    let assets: Vec<Value> = manifest
        .assets()
        .iter()
        .map(|a| json!({ "name": a.name, "offset": a.offset, "size": a.size, "digest": hex::encode(a.digest) }))
        .collect();
    let (config, adapter) = match manifest.kind() {
        Kind::Model(config) => (Some(config_json(config)), None),
        Kind::Adapter(adapter) => (None, Some(adapter_json(adapter))),
    };
    json!({
        "name": manifest.name(),
        "version": manifest.version(),
        "model_digest": inspected.digest().to_string(),
        "signed_by": inspected.signer().to_string(),
        "config": config,
        "adapter": adapter,
        "tensors": tensors,
        "assets": assets,
    })
}

fn adapter_json(a: &AdapterConfig) -> Value {
    json!({
        "base": a.base.to_string(),
        "rank": a.rank,
        "alpha": a.alpha,
        "rank_stabilised": a.rank_stabilised,
        "rope_layout": format!("{:?}", a.rope_layout),
    })
}

fn config_json(c: &ModelConfig) -> Value {
    json!({
            "family": format!("{:?}", c.family),
            "hidden": c.hidden,
            "layers": c.layers,
            "heads": c.heads,
            "kv_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "ffn": c.ffn,
            "vocab": c.vocab,
            "context": c.context,
            "norm_eps": c.norm_eps,
            "rope_theta": c.rope_theta,
            "rope_scaling": format!("{:?}", c.rope_scaling),
            "rope_layout": format!("{:?}", c.rope_layout),
            "sliding_window": c.sliding_window,
            "tied_embeddings": c.tied_embeddings,
            "qkv_bias": c.qkv_bias,
            "bos": c.bos,
            "eos": c.eos,
            "add_bos": c.add_bos,
    })
}

fn manifest_text(inspected: &Inspected) -> String {
    let manifest = inspected.manifest();
    let (what, digest, about) = match manifest.kind() {
        Kind::Model(c) => (
            "model  ",
            "model digest ",
            format!(
                "architecture  {:?}: {} layers, hidden {}, {}/{} heads of {}, ffn {}, vocabulary {}, context {}",
                c.family,
                c.layers,
                c.hidden,
                c.heads,
                c.kv_heads,
                c.head_dim,
                c.ffn,
                c.vocab,
                c.context,
            ),
        ),
        Kind::Adapter(a) => (
            "adapter",
            "adapter digest",
            format!(
                "base          {}\nLoRA          rank {}, alpha {}{}",
                a.base,
                a.rank,
                a.alpha,
                match a.rank_stabilised {
                    true => ", rank-stabilised",
                    false => "",
                },
            ),
        ),
    };
    let mut text = format!(
        "\n{what}       {} version {}\n{digest} {}\nsigned by     {}\n{about}\n\n",
        manifest.name(),
        manifest.version(),
        inspected.digest(),
        inspected.signer(),
    );
    text += &table(manifest);
    text
}

fn table(manifest: &Manifest) -> String {
    let names = manifest.tensors().iter().map(|t| t.name.len());
    let width = names
        .chain(manifest.assets().iter().map(|a| a.name.len()))
        .max()
        .unwrap_or(0);
    let mut text = format!(
        "{:<width$}  {:<5} {:>20} {:>14}  access   BLAKE3",
        "name", "type", "shape", "bytes"
    );
    for t in manifest.tensors() {
        let shape: Vec<String> = t.shape.iter().map(u64::to_string).collect();
        let access = match t.access {
            Access::Private => "private",
            Access::Public => "PUBLIC ",
        };
        let digest = hex::encode(&t.digest[..8]);
        let _ = write!(
            text,
            "\n{:<width$}  {:<5} {:>20} {:>14}  {access}  {digest}…",
            t.name,
            t.dtype,
            shape.join(" × "),
            t.size
        );
    }
    for a in manifest.assets() {
        let digest = hex::encode(&a.digest[..8]);
        let _ = write!(
            text,
            "\n{:<width$}  {:<5} {:>20} {:>14}  private  {digest}…",
            a.name, "asset", "", a.size
        );
    }
    text
}
