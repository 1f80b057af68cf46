//! What is wrong with a TOML file, in words that leave its text out.

use std::fmt;

/// Where a TOML file is wrong, and how. Unlike the reader's own error it quotes no line of the file: one that was named by
/// mistake may hold a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TomlFault {
    /// Line and column, both counted from 1, the column in characters.
    pub position: Option<(usize, usize)>,
    /// The reader's words. They can name a key of the file, and a value that a key cannot have.
    pub message: String,
}

impl TomlFault {
    /// Of the error with which `text` was read.
    #[must_use]
    pub fn new(text: &str, error: &toml::de::Error) -> Self {
        let position = error.span().and_then(|span| {
            let before = text.get(..span.start)?;
            let line = before.rsplit('\n').next().unwrap_or_default();
            Some((1 + before.matches('\n').count(), 1 + line.chars().count()))
        });
        Self {
            position,
            message: error.message().trim_end().to_owned(),
        }
    }
}

impl fmt::Display for TomlFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((line, column)) = self.position {
            write!(f, "line {line}, column {column}: ")?;
        }
        f.write_str(&self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> String {
        let error = toml::from_str::<toml::Table>(text).unwrap_err();
        TomlFault::new(text, &error).to_string()
    }

    #[test]
    fn a_fault_has_a_place_and_no_text() {
        assert_eq!(
            fault("CANARY"),
            "line 1, column 7: key with no value, expected `=`"
        );
        let later = fault("a = 1\nb = \"ü\" CANARY\n");
        assert!(later.starts_with("line 2, column 9: "), "{later}");
        assert!(!later.contains("CANARY"), "{later}");
    }
}
