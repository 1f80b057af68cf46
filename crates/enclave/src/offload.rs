//! Products that a worker computes, whom nobody has to trust: which of this model's matrices it gets, how it is reached, and
//! what is logged and counted. How rows are masked and answers checked is `casemate_offload`'s.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use casemate_container::Manifest;
use casemate_offload::layers::Layers;
use casemate_offload::plan::{self, Place, Preset, Tensor, Why};
use casemate_offload::{BootKey, Config, Event, Offload, Transport, Workers};
use tracing::{info, warn};
use zeroize::Zeroizing;

use crate::config;

/// How long a connection to the worker may take to come about.
const CONNECT: Duration = Duration::from_secs(5);

/// Prepares to hand over what the plan sends of this model. Nothing is connected before the layers are
/// [started](Layers::start).
///
/// # Errors
/// If the plan sends nothing of it, with the first tensor that it would send were it public; if there is no randomness.
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
    let address = config.worker.clone();
    let connect = Box::new(move || {
        let connection = address.connect(CONNECT)?;
        Ok(Box::new(connection) as Box<dyn Transport>)
    });
    let limits = Config {
        pool_bytes: config.pool_bytes,
        ..Config::default()
    };
    let worker = config.worker.to_string();
    let observer = Box::new(move |event| tell(&worker, event));
    let boot = BootKey::new(fresh);
    let offload = Arc::new(Offload::new(limits, boot, Workers::One(connect), observer));
    let layers = Arc::new(Layers::new(Arc::clone(&offload), config.plan));
    Ok((offload, layers))
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

fn tell(worker: &str, event: Event) {
    match event {
        Event::Admitted { .. } => info!(worker, "the worker holds all matrices"),
        Event::Failed { fault, .. } => warn!(worker, "{fault}; products are computed here"),
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
