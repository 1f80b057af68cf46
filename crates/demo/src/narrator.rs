//! How the story looks on a terminal: numbered steps, what each proved, waiting shown as a spinner.

use std::time::Duration;

use console::style;
use indicatif::{ProgressBar, ProgressStyle};

/// A headline without a number.
pub(crate) fn scene(title: &str) {
    println!("\n{}", style(title).bold().underlined());
}

/// One of the nine steps.
pub(crate) fn step(number: u32, title: &str) {
    println!(
        "\n{} {}",
        style(format!("[{number}/9]")).cyan().bold(),
        style(title).bold()
    );
}

/// What a step proved.
pub(crate) fn proved(what: &str) {
    println!("      {} {what}", style("✔").green().bold());
}

/// A fact that proves nothing by itself.
pub(crate) fn fact(name: &str, value: &str) {
    println!("        {} {value}", style(format!("{name:<31}")).dim());
}

/// Something that must not be overlooked.
pub(crate) fn warning(what: &str) {
    println!(
        "      {} {}",
        style("!").yellow().bold(),
        style(what).yellow()
    );
}

/// A spinner with a running clock; gone when dropped.
pub(crate) struct Waiting(ProgressBar);

impl Waiting {
    pub(crate) fn new(what: &str) -> Self {
        let bar = ProgressBar::new_spinner().with_message(what.to_owned());
        let template = "      {spinner} {msg} {elapsed}";
        bar.set_style(ProgressStyle::with_template(template).expect("the template is well formed"));
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(bar)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A digest short enough to read, long enough to compare.
pub(crate) fn short(digest: &str) -> String {
    match digest.get(..16) {
        Some(start) if digest.len() > 20 => format!("{start}…"),
        _ => digest.to_owned(),
    }
}

/// A duration as people say it.
pub(crate) fn seconds(duration: Duration) -> String {
    match duration.as_secs_f64() {
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}
