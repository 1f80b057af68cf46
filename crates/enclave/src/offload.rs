//! Products that a worker computes, whom nobody has to trust: which of this model's matrices it gets, how it is reached, and
//! what is logged and counted. How rows are masked and answers checked is `casemate_offload`'s.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use casemate_container::Manifest;
use casemate_offload::layers::Layers;
use casemate_offload::plan::{self, Place, Preset, Tensor, Why};
use casemate_offload::{BootKey, Connect, Encrypted, Event, Offload, Pin, Transport, Workers};
use casemate_wire::Address;
use tracing::{info, warn};
use zeroize::Zeroizing;

use crate::config;

/// How long a connection to the worker may take to come about.
const CONNECT: Duration = Duration::from_secs(5);

/// Prepares to hand over what the plan sends of this model. Nothing is connected before the layers are
/// [started](Layers::start).
///
/// # Errors
/// If the plan sends nothing of it, with the first tensor that it would send were it public; if there is no randomness, or no
/// file where masks are to lie.
pub fn prepare(
    config: &config::Offload,
    manifest: &Manifest,
) -> Result<(Arc<Offload>, Arc<Layers>)> {
    let tensors: Vec<Tensor> = manifest.tensors().iter().map(Tensor::from).collect();
    check(config.plan, &tensors)?;
    let mut fresh = Zeroizing::new([0; 32]);
    aws_lc_rs::rand::fill(&mut *fresh)
        .ok()
        .context("the system gave no randomness")?;
    let (names, workers) = reach(&config.workers);
    let observer = Box::new(move |event| tell(&names, event));
    let (limits, boot) = (config.limits.clone(), BootKey::new(fresh));
    let offload = Arc::new(Offload::new(limits, boot, workers, observer));
    if let Some(spill) = &config.spill {
        let directory = spill.directory.display();
        let file = unnamed(&spill.directory)
            .with_context(|| format!("cannot keep masks in {directory}"))?;
        offload.spill_to(file, spill.bytes);
    }
    let layers = Arc::new(Layers::new(Arc::clone(&offload), config.plan));
    Ok((offload, layers))
}

/// What workers are called in logs, and how they are reached.
fn reach(workers: &config::Workers) -> (Vec<String>, Workers) {
    let encrypted =
        |address: Address, key: Pin| Encrypted::new(move || address.connect(CONNECT), key, CONNECT);
    match workers {
        config::Workers::One { address, key } => {
            let names = vec![address.to_string()];
            let address = address.clone();
            let connect: Connect = match key {
                Some(key) => encrypted(address, *key).into_connect(),
                None => Box::new(move || {
                    let connection = address.connect(CONNECT)?;
                    Ok(Box::new(connection) as Box<dyn Transport>)
                }),
            };
            (names, Workers::One(connect))
        }
        config::Workers::Two(shares) => {
            let address = |share: &config::Share| Address::Tcp(share.worker);
            let names = shares.iter().map(|share| address(share).to_string());
            let both = shares
                .each_ref()
                .map(|share| encrypted(address(share), share.key));
            (names.collect(), Workers::Two(both))
        }
    }
}

/// A new file without a name, so that nobody opens it by one and it is gone when this process is.
fn unnamed(directory: &Path) -> io::Result<File> {
    let mut random = [0; 16];
    aws_lc_rs::rand::fill(&mut random).map_err(io::Error::other)?;
    let path = directory.join(format!("casemate-masks-{}", hex::encode(random)));
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

/// Refuses a plan that the provider did not allow, and logs what becomes of the others.
fn check(preset: Preset, tensors: &[Tensor]) -> Result<()> {
    let plan = plan::plan(preset, tensors);
    let sent = plan.iter().filter(|tensor| tensor.place == Place::Worker);
    let (count, bytes) = sent.fold((0, 0u64), |(n, bytes), tensor| {
        (n + 1, bytes + tensor.bytes)
    });
    let kept = |why: Why| plan.iter().filter(move |tensor| tensor.why == why);
    let private: Vec<_> = kept(Why::NotPublic)
        .chain(kept(Why::AmongPrivate))
        .collect();
    if count == 0 {
        let Some(first) = private.first() else {
            bail!("the offload plan {preset} sends nothing of this model: leave [offload] out");
        };
        bail!(
            "the offload plan {preset} would send {}, which the provider's manifest does not mark public, and there is nothing \
             else to send: leave [offload] out, or have the model sealed with --public",
            first.tensor
        );
    }
    info!(
        plan = %preset,
        tensors = count,
        bytes,
        kept_because_private = private.len(),
        "products that a worker may compute"
    );
    Ok(())
}

fn tell(names: &[String], event: Event) {
    let worker = names.get(event.worker()).map_or("", String::as_str);
    match event {
        Event::Admitted { .. } => info!(worker, "the worker holds all matrices"),
        Event::Failed { fault, .. } => warn!(worker, "{fault}; products are computed here"),
        Event::SetAside { fault, wait, .. } => warn!(
            worker,
            seconds = wait.as_secs(),
            "{fault}; it is set aside, and products are computed here"
        ),
        Event::Quarantined {
            fault,
            readmissions_left,
            ..
        } => warn!(
            worker,
            readmissions_left, "{fault}; it is in quarantine, and products are computed here"
        ),
        Event::GivenUp { fault, .. } => warn!(
            worker,
            "{fault}; it is not asked any more before the next start, and products are computed here"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use casemate_container::Access;

    fn tensor(name: &str, access: Access) -> Tensor {
        Tensor {
            name: name.into(),
            shape: vec![64, 64],
            access,
        }
    }

    #[test]
    fn a_file_for_masks_has_no_name_and_needs_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = unnamed(directory.path()).unwrap();
        file.write_all(b"sealed").unwrap();
        assert_eq!(file.metadata().unwrap().len(), 6);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        assert!(unnamed(&directory.path().join("nothing")).is_err());
    }

    #[test]
    fn a_plan_that_the_provider_did_not_allow_is_refused() {
        let private = [
            tensor("blk.0.attn_output.weight", Access::Private),
            tensor("output.weight", Access::Private),
        ];
        let why = check(Preset::FullLinear, &private).unwrap_err().to_string();
        assert!(why.contains("blk.0.attn_output.weight"), "{why}");
        assert!(why.contains("--public"), "{why}");

        let public = [
            tensor("blk.0.attn_output.weight", Access::Public),
            tensor("output.weight", Access::Private),
        ];
        assert!(check(Preset::FullLinear, &public).is_ok());

        let kept = [tensor("blk.0.ffn_down.weight", Access::Public)];
        let why = check(Preset::SecureInfer, &kept).unwrap_err().to_string();
        assert!(why.contains("sends nothing"), "{why}");
    }
}
