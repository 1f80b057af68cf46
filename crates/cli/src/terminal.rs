//! Text from outside on a reader's terminal: it must not move the cursor, colour a verdict or turn the direction of
//! writing.

/// Control characters, those of C1 included, and the marks that break lines or turn their direction (Unicode's Bidi_Control
/// and its line and paragraph separators).
fn is_harmless(c: char) -> bool {
    !c.is_control()
        && !matches!(
            c,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// The text with spaces in place of what does more than show a character.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if is_harmless(c) { c } else { ' ' })
        .collect()
}

/// JSON text that means the same, with such characters escaped. They stand only inside strings there, but for the line
/// feeds of indentation.
pub(crate) fn printable_json(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c == '\n' || is_harmless(c) {
            text.push(c);
        } else {
            // All of them lie in the basic plane, so one escape is enough.
            text.push_str(&format!("\\u{:04x}", u32::from(c)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const MARKS: &str =
        "a\u{1b}[2J\u{7f}\u{9b}1m\u{61c}\u{200e}\u{200f}\u{2028}\u{2029}\u{202e}\u{2066}\n\tb";

    #[test]
    fn nothing_is_left_that_does_more_than_show() {
        assert_eq!(printable(MARKS), "a [2J  1m         b");
        assert_eq!(printable("größer als 5 € 中"), "größer als 5 € 中");
    }

    #[test]
    fn json_means_the_same_and_is_printable() {
        let value = json!({ MARKS: [MARKS, 1] });
        let text = printable_json(&serde_json::to_string_pretty(&value).unwrap());
        assert!(
            text.chars().all(|c| c == '\n' || is_harmless(c)),
            "{text:?}"
        );
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }
}
