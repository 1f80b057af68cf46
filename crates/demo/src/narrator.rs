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

/// What should have been proven, and is not so.
pub(crate) fn failed(what: &str) {
    println!("      {} {what}", style("✘ NOT SO:").red().bold());
}

/// Drawings of characters beside each other, each under its title.
pub(crate) fn plot(titles: &[String; 2], drawings: &[Vec<String>; 2]) {
    let width = drawings[0].first().map_or(0, |row| row.chars().count());
    let gap = width.max(titles[0].chars().count()) + 4;
    println!("\n        {:<gap$}{}", titles[0], titles[1]);
    for (left, right) in drawings[0].iter().zip(&drawings[1]) {
        let pad = " ".repeat(gap - width);
        println!(
            "        {}{pad}{}",
            style(left).cyan(),
            style(right).yellow()
        );
    }
    println!();
}

/// A fact that proves nothing by itself.
pub(crate) fn fact(name: &str, value: &str) {
    println!("        {} {value}", style(format!("{name:<31}")).dim());
}

/// Something that must not be overlooked.
pub(crate) fn warning(what: &str) {
    let mut mark = "!";
    for line in wrapped(what) {
        println!(
            "      {} {}",
            style(mark).yellow().bold(),
            style(line).yellow()
        );
        mark = " ";
    }
}

/// Lines of at most 100 characters, unless a word is longer.
fn wrapped(text: &str) -> Vec<String> {
    const WIDTH: usize = 100;
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is one");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= WIDTH {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_short_and_lose_nothing() {
        let text = "word ".repeat(60) + &"x".repeat(120) + " end";
        let lines = wrapped(&text);
        assert_eq!(lines.join(" "), text);
        let long = |line: &&String| line.chars().count() > 100;
        assert_eq!(lines.iter().filter(long).count(), 1);
        assert_eq!(lines.len(), 5);
    }
}
