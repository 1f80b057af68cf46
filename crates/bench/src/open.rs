//! `casemate bench open`: opening a sealed model beside opening the same data unsealed, as recorded in
//! `docs/performance.md`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use casemate_container::bench::{self, Instead, Limits, Synthetic, Unsealed};
use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, SealOptions, SealedFile, Silent};
use rustix::fs::Advice;
use serde_json::json;

use crate::{machine, memory, print, statistics};

/// Compare opening a sealed model with opening the same data unsealed.
///
/// Makes a model of made-up weights in a temporary directory, sealed and unsealed, and opens them in turn through the
/// same loader, all digests verified, files in the system's cache (--cold drops them from it first). Unsealed data pass
/// once with a copy where sealed ones have their AEAD, and once read straight into place, which no loader of sealed
/// data can beat. Prints medians, ratios, peak memory, and what reading, first touch, AES-256-GCM and BLAKE3 cost alone.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Size of the model: a number with KiB, MiB or GiB.
    #[arg(long, default_value = "1GiB", value_parser = parse_size)]
    size: u64,
    /// How often to open each.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Threads [default: as many as the machine has].
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Where to put the temporary files [default: the system's place for them].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Ask the system to forget the file before each opening.
    #[arg(long)]
    cold: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// One way of opening, measured several times.
#[derive(Default)]
struct Series {
    times: Vec<Duration>,
    peak: u64,
}

impl Series {
    fn median(&self) -> f64 {
        let seconds: Vec<f64> = self.times.iter().map(Duration::as_secs_f64).collect();
        statistics::median(&seconds)
    }

    fn fastest(&self) -> f64 {
        self.times.iter().min().map_or(0.0, Duration::as_secs_f64)
    }

    /// Runs `work` and keeps its time and the memory it peaked at beyond what the process held before. What `work`
    /// returns is dropped after the clock has stopped.
    fn measure<T>(&mut self, work: impl FnOnce() -> Result<T>) -> Result<()> {
        memory::reset()?;
        let before = memory::status("VmRSS:")?;
        let start = Instant::now();
        let kept = work()?;
        self.times.push(start.elapsed());
        self.peak = self
            .peak
            .max(memory::status("VmHWM:")?.saturating_sub(before));
        drop(kept);
        Ok(())
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let parent = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let dir = tempfile::Builder::new()
        .prefix("casemate-bench-")
        .tempdir_in(&parent)
        .with_context(|| parent.display().to_string())?;
    let source = Synthetic::new(args.size);
    let (data_key, provider) = (DataKey::generate(), SigningKey::generate());
    let sealed_path = dir.path().join("sealed");
    let unsealed_path = dir.path().join("unsealed");
    let options = SealOptions {
        threads: args.threads,
        ..SealOptions::default()
    };
    casemate_container::seal(
        &source,
        &options,
        &data_key,
        &provider,
        &sealed_path,
        &Silent,
    )?;
    let unsealed = Unsealed::write(&source, &unsealed_path)?;

    let mut series = [Series::default(), Series::default(), Series::default()];
    let mut weights = 0;
    for round in 0..=args.rounds as usize {
        // Who goes first rotates, so that nobody always finds the machine as the same other one left it.
        for turn in 0..series.len() {
            let way = (turn + round) % series.len();
            let mut once = Series::default();
            match way {
                SEALED => {
                    prepare(&sealed_path, args.cold)?;
                    once.measure(|| {
                        let file = SealedFile::open(&sealed_path)?;
                        let unlocked = file.unlock(&data_key, &provider.verifying_key())?;
                        weights = unlocked.manifest().tensor_bytes();
                        Ok(unlocked.load(args.threads, &Silent)?)
                    })?;
                }
                _ => {
                    prepare(&unsealed_path, args.cold)?;
                    let instead = if way == COPIED {
                        Instead::Copy
                    } else {
                        Instead::Nothing
                    };
                    once.measure(|| Ok(unsealed.load(instead, args.threads)?))?;
                }
            }
            // The first round does not count: it brings the files into the cache.
            if round > 0 {
                series[way].times.append(&mut once.times);
                series[way].peak = series[way].peak.max(once.peak);
            }
        }
    }
    let limits = bench::limits(&unsealed, args.threads)?;
    report(args, weights, &series, &limits)
}

/// Indices into the three series.
const SEALED: usize = 0;
/// The same loader with a copy where the AEAD is.
const COPIED: usize = 1;
/// The same loader reading straight into place.
const DIRECT: usize = 2;

fn report(args: &Args, weights: u64, series: &[Series; 3], limits: &Limits) -> Result<()> {
    let threads = match args.threads {
        0 => machine::cores(),
        n => n,
    };
    let median = |way: usize| series[way].median();
    let same_loader = median(SEALED) / median(COPIED);
    let direct = median(SEALED) / median(DIRECT);
    let memory_limit = weights + weights / 20 + (64 << 20);
    if args.json {
        let value = |way: usize| {
            let seconds: Vec<f64> = series[way]
                .times
                .iter()
                .map(Duration::as_secs_f64)
                .collect();
            json!({ "seconds": seconds, "median": median(way), "peak_bytes": series[way].peak })
        };
        let report = json!({
            "bytes": weights,
            "threads": threads,
            "cold": args.cold,
            "sealed": value(SEALED),
            "unsealed": value(COPIED),
            "unsealed_direct": value(DIRECT),
            "ratio": same_loader,
            "ratio_direct": direct,
            "peak_limit_bytes": memory_limit,
            "limits_seconds": {
                "read": limits.read.as_secs_f64(),
                "first_touch": limits.first_touch.as_secs_f64(),
                "aes_256_gcm": limits.aes_gcm.as_secs_f64(),
                "blake3": limits.blake3.as_secs_f64(),
            },
        });
        return print(&serde_json::to_string_pretty(&report)?);
    }
    let gigabytes = |seconds: f64| weights as f64 / 1e9 / seconds;
    let line = |name: &str, way: usize| {
        let (median, fastest) = (series[way].median(), series[way].fastest());
        let peak = series[way].peak >> 20;
        format!(
            "{name:<17} {median:>9.3} {fastest:>9.3} {:>8.2} {peak:>10}",
            gigabytes(median)
        )
    };
    let limit = |name: &str, d: Duration| {
        let seconds = d.as_secs_f64();
        format!(
            "{name:<17} {seconds:>9.3} {:>9} {:>8.2}",
            "",
            gigabytes(seconds)
        )
    };
    print(&format!(
        "{weights} bytes, {threads} threads, {} rounds, {}\n\n\
         {:<17} {:>9} {:>9} {:>8} {:>10}\n{}\n{}\n{}\n\n\
         ratio sealed / unsealed         {same_loader:.3}  (the same loader, a copy where the AEAD is)\n\
         ratio sealed / unsealed direct  {direct:.3}  (read straight into place)\n\
         peak memory allowed             {} MiB (weights × 1.05 + 64 MiB)\n\n\
         each ingredient alone, same bytes and threads:\n{}\n{}\n{}\n{}",
        args.rounds,
        if args.cold {
            "files not in the cache"
        } else {
            "files in the cache"
        },
        "opening",
        "median s",
        "best s",
        "GB/s",
        "peak MiB",
        line("sealed", SEALED),
        line("unsealed", COPIED),
        line("unsealed direct", DIRECT),
        memory_limit >> 20,
        limit("read", limits.read),
        limit("first touch", limits.first_touch),
        limit("AES-256-GCM", limits.aes_gcm),
        limit("BLAKE3", limits.blake3),
    ))
}

fn prepare(path: &Path, cold: bool) -> Result<()> {
    if cold {
        rustix::fs::fadvise(&fs::File::open(path)?, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

fn parse_size(text: &str) -> Result<u64, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let shift = match unit {
        "" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return Err(format!("`{unit}` is not KiB, MiB or GiB")),
    };
    number
        .parse::<u64>()
        .ok()
        .filter(|&n| n > 0)
        .and_then(|n| n.checked_mul(1 << shift))
        .filter(|&n| n <= 1 << 40)
        .ok_or_else(|| format!("`{text}` is not a size up to 1024GiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_bounds() {
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        for wrong in ["", "0", "GiB", "1GB", "-1", "99999999999GiB", "1.5GiB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
