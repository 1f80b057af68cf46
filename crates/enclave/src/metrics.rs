//! Counters for operators. Nothing here depends on what a prompt or an answer says; there are no labels per request.
//! Anybody may read them, so they tell no more of a request's length than its padding does: tokens are counted when a
//! request has ended, rounded up to a power of two, and memory is rounded likewise.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use casemate_engine::Stats;
use casemate_listen::Counters;
use casemate_offload::Offload;

use crate::bodies::Bodies;
use crate::grammars::Grammars;

/// Why a caller's request was not let through to the API.
#[derive(Clone, Copy, Debug)]
pub enum Denied {
    /// No API key, or none of the grant.
    Key,
    /// Too many requests per minute.
    Requests,
    /// Too many tokens per minute.
    Tokens,
    /// Too many requests at the same time.
    Concurrency,
    /// Too many bytes of all callers' requests wait to be parsed.
    Room,
    /// Too many bytes of what answers must be are held, by all callers or by this one.
    Grammars,
}

impl Denied {
    const ALL: [(Denied, &'static str); 6] = [
        (Denied::Key, "key"),
        (Denied::Requests, "requests"),
        (Denied::Tokens, "tokens"),
        (Denied::Concurrency, "concurrency"),
        (Denied::Room, "room"),
        (Denied::Grammars, "grammars"),
    ];
}

/// A request that is open, until this is dropped.
pub struct Open(Arc<Metrics>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the enclave counts besides the engine's own figures.
#[derive(Default)]
pub struct Metrics {
    accepted: AtomicU64,
    refused: AtomicU64,
    attestations: AtomicU64,
    open: AtomicU64,
    denied: [AtomicU64; Denied::ALL.len()],
    connections: OnceLock<Arc<Counters>>,
    bodies_waiting: OnceLock<Arc<Bodies>>,
    grammars: OnceLock<Arc<Grammars>>,
    offload: OnceLock<Arc<Offload>>,
    relayed: AtomicU64,
    relays_running: AtomicU64,
    key_release: OnceLock<Duration>,
    model_load: OnceLock<Duration>,
}

impl Metrics {
    /// A request was opened, or came whole over attested TLS.
    pub fn accepted(&self) {
        self.accepted.fetch_add(1, Ordering::Relaxed);
    }

    /// A request was refused before it was.
    pub fn refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Evidence was given to a user.
    pub fn attested(&self) {
        self.attestations.fetch_add(1, Ordering::Relaxed);
    }

    /// A decrypted request is with the API until what is returned is dropped.
    #[must_use]
    pub fn open_request(self: &Arc<Self>) -> Open {
        self.open.fetch_add(1, Ordering::Relaxed);
        Open(Arc::clone(self))
    }

    /// A caller was not let through.
    pub fn denied(&self, why: Denied) {
        self.denied[why as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// The figures of the listener.
    pub fn connections(&self, counters: Arc<Counters>) {
        let _ = self.connections.set(counters);
    }

    /// The bodies that have arrived and are not parsed yet.
    pub fn bodies_waiting(&self, bodies: Arc<Bodies>) {
        let _ = self.bodies_waiting.set(bodies);
    }

    /// What answers under way must be.
    pub fn grammars(&self, grammars: Arc<Grammars>) {
        let _ = self.grammars.set(grammars);
    }

    /// Another replica answered a request that was relayed to it.
    pub fn relayed(&self) {
        self.relayed.fetch_add(1, Ordering::Relaxed);
    }

    /// An answer of another replica is being passed on, until the value is dropped.
    pub fn relay_runs(self: &Arc<Self>) -> RelayRuns {
        self.relays_running.fetch_add(1, Ordering::Relaxed);
        RelayRuns(Arc::clone(self))
    }

    /// Whose products a worker computes.
    pub fn offload(&self, offload: Arc<Offload>) {
        let _ = self.offload.set(offload);
    }

    /// How long obtaining the key took, at start.
    pub fn key_released(&self, took: Duration) {
        let _ = self.key_release.set(took);
    }

    /// How long opening, checking and packing the model took, at start.
    pub fn model_loaded(&self, took: Duration) {
        let _ = self.model_load.set(took);
    }

    /// The Prometheus text format.
    pub fn render(&self, engine: Option<&Stats>) -> String {
        let mut out = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, value: f64| {
            let _ = write!(
                out,
                "# HELP casemate_{name} {help}\n# TYPE casemate_{name} {kind}\ncasemate_{name} {value}\n"
            );
        };
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64;
        metric(
            "requests_total",
            "counter",
            "Requests that were opened, or came over attested TLS.",
            count(&self.accepted),
        );
        metric(
            "requests_refused_total",
            "counter",
            "Requests that were refused unopened, or while they came over attested TLS.",
            count(&self.refused),
        );
        metric(
            "attestations_total",
            "counter",
            "Evidence given to users.",
            count(&self.attestations),
        );
        metric(
            "requests_relayed_total",
            "counter",
            "Requests that another replica opened and answered.",
            count(&self.relayed),
        );
        metric(
            "relays_running",
            "gauge",
            "Answers of other replicas being passed on.",
            count(&self.relays_running),
        );
        metric(
            "requests_open",
            "gauge",
            "Decrypted requests whose answer is not complete.",
            count(&self.open),
        );
        if let Some(bodies) = self.bodies_waiting.get() {
            metric(
                "request_bytes_waiting",
                "gauge",
                "Bodies that are not parsed yet, each rounded up to a power of two.",
                bodies.held() as f64,
            );
        }
        if let Some(grammars) = self.grammars.get() {
            metric(
                "grammar_bytes_used",
                "gauge",
                "What answers under way must be, each and all of it rounded up to a power of two.",
                coarse(grammars.held() as u64) as f64,
            );
        }
        if let Some(offload) = self.offload.get() {
            // A token is a row of every matrix that is sent, so exact counts, or counts in even steps, would tell
            // how many tokens somebody's prompt and answer have, and what was reused.
            let found = offload.metrics();
            for (name, help, value) in [
                (
                    "offload_rows_total",
                    "Rows of products that a worker computed, rounded up to a power of two.",
                    coarse(found.rows_outside) as f64,
                ),
                (
                    "offload_rows_without_masks_total",
                    "Rows computed here because no masks were left, likewise.",
                    coarse(found.rows_without_masks) as f64,
                ),
                (
                    "offload_rows_without_worker_total",
                    "Rows computed here because there was no worker, likewise.",
                    coarse(found.rows_without_worker) as f64,
                ),
                (
                    "offload_rows_recomputed_total",
                    "Rows computed here again because a worker failed, likewise.",
                    coarse(found.rows_recomputed) as f64,
                ),
                (
                    "offload_masks_made_total",
                    "Masks made, likewise.",
                    coarse(found.masks_made) as f64,
                ),
                (
                    "offload_masks_used_total",
                    "Masks used, likewise.",
                    coarse(found.masks_used) as f64,
                ),
                (
                    "offload_failures_total",
                    "Faults of workers that an honest one may have.",
                    found.failures as f64,
                ),
                (
                    "offload_set_aside_total",
                    "How often a worker was set aside because waiting for it cost too much time.",
                    found.set_aside as f64,
                ),
                (
                    "offload_misconduct_total",
                    "Answers of workers that no honest one gives, all of them noticed.",
                    found.misconduct as f64,
                ),
            ] {
                metric(name, "counter", help, value);
            }
            metric(
                "offload_masks_ready",
                "gauge",
                "1 while there are masks for every matrix that is sent.",
                f64::from(u8::from(found.masks_level > 0)),
            );
        }
        if let Some(connections) = self.connections.get() {
            metric(
                "connections_open",
                "gauge",
                "Connections, this one included.",
                connections.open() as f64,
            );
            metric(
                "connections_evicted_total",
                "counter",
                "Idle connections that were closed because their place was needed.",
                connections.evicted() as f64,
            );
        }
        for (name, help, value) in [
            (
                "key_release_seconds",
                "Time to attest and receive the key.",
                &self.key_release,
            ),
            (
                "model_load_seconds",
                "Time to open, check and pack the model.",
                &self.model_load,
            ),
        ] {
            if let Some(took) = value.get() {
                metric(name, "gauge", help, took.as_secs_f64());
            }
        }
        // Nothing of what was reused or is kept for it: anybody may read this, and it would tell that
        // two prompts begin alike.
        if let Some(stats) = engine {
            metric(
                "requests_running",
                "gauge",
                "Answers being generated.",
                stats.running as f64,
            );
            metric(
                "requests_waiting",
                "gauge",
                "Answers waiting for a slot.",
                stats.waiting as f64,
            );
            metric(
                "prompt_tokens_total",
                "counter",
                "Prompt tokens of ended requests, each request's rounded up to a power of two.",
                stats.coarse_prompt_tokens as f64,
            );
            metric(
                "completion_tokens_total",
                "counter",
                "Tokens generated for ended requests, each request's rounded up to a power of two.",
                stats.coarse_completion_tokens as f64,
            );
            metric(
                "preemptions_total",
                "counter",
                "Times that a running answer gave its memory back, to go on later.",
                stats.preemptions as f64,
            );
            metric(
                "kv_bytes_used",
                "gauge",
                "KV cache in use, rounded up to a power of two.",
                coarse(stats.kv_bytes_used) as f64,
            );
            metric(
                "kv_bytes_total",
                "gauge",
                "KV cache reserved.",
                stats.kv_bytes as f64,
            );
        }
        out.push_str(
            "# HELP casemate_denied_total Decrypted requests that were not let through, by what was lacking.\n\
             # TYPE casemate_denied_total counter\n",
        );
        for (why, label) in Denied::ALL {
            let value = self.denied[why as usize].load(Ordering::Relaxed);
            let _ = writeln!(out, "casemate_denied_total{{reason=\"{label}\"}} {value}");
        }
        out
    }
}

/// Zero, or the next power of two.
fn coarse(bytes: u64) -> u64 {
    match bytes {
        0 => 0,
        bytes => bytes.checked_next_power_of_two().unwrap_or(u64::MAX),
    }
}

/// Counts an answer of another replica for as long as it is passed on.
pub struct RelayRuns(Arc<Metrics>);

impl Drop for RelayRuns {
    fn drop(&mut self) {
        self.0.relays_running.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_appear_in_the_text_format() {
        let metrics = Metrics::default();
        metrics.accepted();
        metrics.accepted();
        metrics.refused();
        metrics.denied(Denied::Tokens);
        let metrics = Arc::new(metrics);
        let open = metrics.open_request();
        assert!(
            metrics
                .render(None)
                .contains("\ncasemate_requests_open 1\n")
        );
        drop(open);
        metrics.key_released(Duration::from_millis(250));
        let text = metrics.render(None);
        assert!(text.contains("\ncasemate_requests_total 2\n"), "{text}");
        assert!(
            text.contains("\ncasemate_requests_refused_total 1\n"),
            "{text}"
        );
        assert!(
            text.contains("\ncasemate_key_release_seconds 0.25\n"),
            "{text}"
        );
        assert!(text.contains("\ncasemate_requests_open 0\n"), "{text}");
        assert!(
            text.contains("\ncasemate_denied_total{reason=\"tokens\"} 1\n"),
            "{text}"
        );
        assert!(!text.contains("model_load_seconds"), "{text}");
    }
}
