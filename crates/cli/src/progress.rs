//! Progress bars on standard error, shown only where it is a terminal.

use std::sync::Mutex;
use std::time::Duration;

use casemate_container::{Progress, Stage};
use indicatif::{ProgressBar, ProgressStyle};

/// One bar per stage, one after the other.
pub(crate) struct Bars(Mutex<ProgressBar>);

impl Bars {
    pub(crate) fn new() -> Self {
        Bars(Mutex::new(ProgressBar::hidden()))
    }

    fn current(&self) -> ProgressBar {
        // The bar is a handle; a panic while it was being replaced leaves a valid one.
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    fn replace(&self, bar: ProgressBar) {
        *self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = bar;
    }
}

impl Progress for Bars {
    fn begin(&self, stage: Stage, total: u64) {
        let what = match stage {
            Stage::Digest => "hashing",
            Stage::Seal => "sealing",
            Stage::Open => "verifying",
            Stage::Convert => "converting",
        };
        let style = ProgressStyle::with_template(
            "{msg:<10} {bar:40} {bytes:>11} of {total_bytes} {bytes_per_sec:>13} {eta:>4}",
        )
        .expect("the template is valid");
        let bar = ProgressBar::new(total).with_style(style).with_message(what);
        bar.enable_steady_tick(Duration::from_millis(200));
        self.replace(bar);
    }

    fn advance(&self, bytes: u64) {
        self.current().inc(bytes);
    }

    fn end(&self) {
        self.current().finish_and_clear();
        self.replace(ProgressBar::hidden());
    }
}
