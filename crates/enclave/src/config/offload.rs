//! `[offload]`: which products workers compute, where they are, and how long they may take.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use casemate_offload::plan::Preset;
use casemate_offload::{Config, Pin};
use casemate_wire::Address;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// `[offload]`
#[derive(Deserialize, Clone)]
#[serde(try_from = "Written")]
pub struct Offload {
    /// Which matrices go to workers.
    pub plan: Preset,
    /// Who computes.
    pub workers: Workers,
    /// Where masks lie for which memory has no room; absent, there are no more than memory has room for.
    pub spill: Option<Spill>,
    /// Memory for masks, and how long workers may take.
    pub limits: Config,
}

/// Who computes. Nobody has to trust them.
#[derive(Clone, Debug)]
pub enum Workers {
    /// One, who sees rows under masks.
    One {
        /// Where it listens.
        address: Address,
        /// Its key, if it is to be reached through TLS, so that nobody on the way can spoil its answers.
        key: Option<Pin>,
    },
    /// Two of operators who do not share what they receive.
    Two([Share; 2]),
}

/// A worker of two, which is reached through TLS.
#[derive(Deserialize, Clone, Copy, Debug)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Where it listens: `tcp:IP:PORT`.
    #[serde(deserialize_with = "remote")]
    pub worker: SocketAddr,
    /// Its key, as it prints it when it starts.
    #[serde(deserialize_with = "pin")]
    pub key: Pin,
}

/// A file for masks that are sealed under a key of this run.
#[derive(Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct Spill {
    /// Where it is made. It has no name and is gone when the enclave is.
    pub directory: PathBuf,
    /// Most bytes of it.
    pub bytes: u64,
}

/// The section as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    /// `"secureinfer"` or `"full-linear"`.
    #[serde(deserialize_with = "preset")]
    plan: Preset,
    /// Where `casemate-worker` listens: `tcp:IP:PORT` or `unix:PATH`.
    #[serde(default, deserialize_with = "worker")]
    worker: Option<Address>,
    #[serde(default, deserialize_with = "some_pin")]
    key: Option<Pin>,
    /// Two workers instead of one.
    shares: Option<[Share; 2]>,
    /// Memory for masks, in bytes.
    pool_bytes: Option<u64>,
    spill: Option<Spill>,
    /// How long one product may take, all its messages together.
    patience_ms: Option<u32>,
    /// How many times as long as inside products may take in the long run.
    slowness: Option<u32>,
    /// What they may take beyond that in sum before a worker is set aside.
    waiting_ms: Option<u32>,
    /// For how long it is, at first.
    aside_seconds: Option<u32>,
}

impl TryFrom<Written> for Offload {
    type Error = String;

    fn try_from(written: Written) -> Result<Offload, String> {
        let usual = Config::default();
        let milliseconds = |ms: u32| Duration::from_millis(ms.into());
        let patience = within("patience_ms", written.patience_ms, 1..=600_000)?;
        let slowness = within("slowness", written.slowness, 1..=1000)?;
        let waiting = within("waiting_ms", written.waiting_ms, 0..=3_600_000)?;
        let aside = within("aside_seconds", written.aside_seconds, 1..=86_400)?;
        let limits = Config {
            pool_bytes: written.pool_bytes.unwrap_or(usual.pool_bytes),
            patience: patience.map_or(usual.patience, milliseconds),
            slowness: slowness.unwrap_or(usual.slowness),
            waiting: waiting.map_or(usual.waiting, milliseconds),
            aside: aside.map_or(usual.aside, |s| Duration::from_secs(s.into())),
            ..usual
        };
        let needs_masks = written.pool_bytes.is_some() || written.spill.is_some();
        let workers = match (written.worker, written.shares) {
            (Some(address), None) => {
                let key = written.key;
                Workers::One { address, key }
            }
            (None, Some(_)) if needs_masks => {
                return Err("two workers need no masks: leave pool_bytes and spill out".into());
            }
            (None, Some(_)) if written.key.is_some() => {
                return Err("each of two workers has a key of its own: write it there".into());
            }
            (None, Some([one, two]))
                if one.worker.ip().to_canonical() == two.worker.ip().to_canonical() =>
            {
                return Err("two shares on one host are no shares: name workers on two".into());
            }
            (None, Some([one, two])) if one.key == two.key => {
                return Err("two shares with one key are no shares: name two workers".into());
            }
            (None, Some(shares)) => Workers::Two(shares),
            _ => return Err("[offload] names one worker, or two shares".into()),
        };
        Ok(Offload {
            plan: written.plan,
            workers,
            spill: written.spill,
            limits,
        })
    }
}

/// A number, if it is written, that makes sense.
fn within(
    name: &str,
    number: Option<u32>,
    sensible: std::ops::RangeInclusive<u32>,
) -> Result<Option<u32>, String> {
    match number {
        Some(number) if !sensible.contains(&number) => {
            let (least, most) = (sensible.start(), sensible.end());
            Err(format!("{name} is from {least} to {most}"))
        }
        number => Ok(number),
    }
}

fn preset<'de, D: Deserializer<'de>>(d: D) -> Result<Preset, D::Error> {
    let preset: Preset = String::deserialize(d)?.parse().map_err(D::Error::custom)?;
    match preset {
        Preset::None => Err(D::Error::custom(
            "a plan of `none` sends nothing: leave [offload] out",
        )),
        preset => Ok(preset),
    }
}

fn worker<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Address>, D::Error> {
    let address = String::deserialize(d)?.parse();
    address.map(Some).map_err(D::Error::custom)
}

fn remote<'de, D: Deserializer<'de>>(d: D) -> Result<SocketAddr, D::Error> {
    match String::deserialize(d)?.parse() {
        Ok(Address::Tcp(address)) => Ok(address),
        _ => Err(D::Error::custom(
            "a worker of two is on another host: tcp:IP:PORT",
        )),
    }
}

fn pin<'de, D: Deserializer<'de>>(d: D) -> Result<Pin, D::Error> {
    String::deserialize(d)?.parse().map_err(D::Error::custom)
}

fn some_pin<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Pin>, D::Error> {
    pin(d).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(lines: &str) -> Result<Offload, String> {
        let text = format!("plan = \"full-linear\"\n{lines}\n");
        toml::from_str(&text).map_err(|error| error.to_string())
    }

    fn key(digit: char) -> String {
        String::from_iter([digit; 64])
    }

    fn shares(one: &str, two: &str) -> String {
        let share =
            |worker: &str, digit| format!("{{ worker = \"{worker}\", key = \"{}\" }}", key(digit));
        format!("shares = [{}, {}]", share(one, 'a'), share(two, 'b'))
    }

    #[test]
    fn limits_are_the_usual_ones_unless_written() {
        let usual = Config::default();
        let offload = parse("worker = \"tcp:10.0.0.9:8600\"").unwrap();
        let limits = |offload: &Offload| {
            let Config {
                pool_bytes,
                patience,
                slowness,
                waiting,
                aside,
                ..
            } = offload.limits;
            (pool_bytes, patience, slowness, waiting, aside)
        };
        let seconds = Duration::from_secs;
        let documented = (1 << 30, seconds(5), 2, seconds(2), seconds(30));
        assert_eq!(limits(&offload), documented);
        assert_eq!(offload.limits.rows_at_once, usual.rows_at_once);
        let written = parse(
            "worker = \"unix:/run/w\"\npool_bytes = 5\npatience_ms = 700\nslowness = 6\nwaiting_ms = 0\naside_seconds = 9",
        );
        let milliseconds = Duration::from_millis(700);
        let expected = (5, milliseconds, 6, Duration::ZERO, seconds(9));
        assert_eq!(limits(&written.unwrap()), expected);
        for (line, said) in [
            ("patience_ms = 0", "patience_ms is from 1 to 600000"),
            ("slowness = 0", "slowness is from 1 to 1000"),
            ("waiting_ms = 3600001", "waiting_ms is from 0"),
            ("aside_seconds = 0", "aside_seconds is from 1"),
            ("patience = 5", "unknown field"),
        ] {
            let message = parse(&format!("worker = \"unix:/run/w\"\n{line}"))
                .err()
                .unwrap();
            assert!(message.contains(said), "{message}");
        }
    }

    #[test]
    fn one_worker_may_have_a_key_and_masks_may_lie_in_a_file() {
        let pinned = format!(
            "worker = \"tcp:10.0.0.9:8600\"\nkey = \"{}\"\nspill = {{ directory = \"/var/lib/c\", bytes = 77 }}",
            key('c')
        );
        let offload = parse(&pinned).unwrap();
        assert!(
            matches!(offload.workers, Workers::One { key: Some(pin), .. } if pin.to_string() == key('c'))
        );
        let spill = offload.spill.unwrap();
        assert_eq!((spill.directory, spill.bytes), ("/var/lib/c".into(), 77));
        let plain = parse("worker = \"unix:/run/w\"").unwrap();
        assert!(matches!(plain.workers, Workers::One { key: None, .. }));
        assert!(plain.spill.is_none());
    }

    #[test]
    fn shares_go_to_two_hosts_with_a_key_each_and_need_no_masks() {
        let two = shares("tcp:10.0.0.9:8600", "tcp:10.1.0.9:8600");
        let offload = parse(&two).unwrap();
        let Workers::Two([one, other]) = offload.workers else {
            panic!("two workers");
        };
        assert_eq!(one.worker.to_string(), "10.0.0.9:8600");
        assert_eq!(other.key.to_string(), key('b'));
        for (lines, said) in [
            (String::new(), "one worker, or two shares"),
            (
                format!("worker = \"unix:/w\"\n{two}"),
                "one worker, or two shares",
            ),
            (format!("{two}\npool_bytes = 5"), "need no masks"),
            (
                format!("{two}\nspill = {{ directory = \"/\", bytes = 1 }}"),
                "need no masks",
            ),
            (format!("{two}\nkey = \"{}\"", key('d')), "a key of its own"),
            (shares("tcp:10.0.0.9:1", "tcp:10.0.0.9:2"), "on one host"),
            (
                shares("tcp:10.0.0.9:1", "tcp:[::ffff:10.0.0.9]:2"),
                "on one host",
            ),
            (two.replace('b', "a"), "with one key"),
            (shares("unix:/run/w", "tcp:10.0.0.9:2"), "on another host"),
            (two.replacen("aaaa", "", 1), "64 hexadecimal digits"),
            (two.replacen(", key", ", x = 1, key", 1), "unknown field"),
            ("shares = []".into(), "invalid length"),
        ] {
            let message = parse(&lines).err().unwrap_or_else(|| panic!("{lines}"));
            assert!(message.contains(said), "{lines}: {message}");
        }
    }
}
