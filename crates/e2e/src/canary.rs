//! Looking for many secrets at once in many bytes: in the forms of [`crate::search`], and as JSON strings.

use crate::search;

/// Shorter secrets would be found by chance.
const SHORTEST: usize = 8;

/// Secrets to look for, each under a name.
#[derive(Default)]
pub struct Canaries {
    forms: Vec<(&'static str, Vec<u8>)>,
    /// Whether some form begins with these two bytes.
    begins: Vec<bool>,
}

impl Canaries {
    /// None.
    pub fn new() -> Canaries {
        Canaries {
            forms: Vec::new(),
            begins: vec![false; 1 << 16],
        }
    }

    /// Adds a secret in all its forms.
    ///
    /// # Panics
    /// For one of fewer than 8 bytes.
    pub fn add(&mut self, name: &'static str, secret: &[u8]) {
        assert!(
            secret.len() >= SHORTEST,
            "{name} is too short to be told from chance"
        );
        let mut forms = search::forms(secret);
        if let Ok(text) = std::str::from_utf8(secret) {
            let json = serde_json::Value::from(text).to_string();
            forms.push(json.as_bytes()[1..json.len() - 1].to_vec());
        }
        for form in forms {
            self.begins[begin(&form)] = true;
            self.forms.push((name, form));
        }
    }

    /// The name of a secret that stands in `bytes`.
    pub fn find(&self, bytes: &[u8]) -> Option<&'static str> {
        for (at, pair) in bytes.windows(2).enumerate() {
            if self.begins[begin(pair)] {
                let rest = &bytes[at..];
                let found = self.forms.iter().find(|(_, form)| rest.starts_with(form));
                if let Some((name, _)) = found {
                    return Some(name);
                }
            }
        }
        None
    }
}

fn begin(bytes: &[u8]) -> usize {
    usize::from(u16::from_le_bytes([bytes[0], bytes[1]]))
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;

    use super::*;

    const SECRET: &[u8] = b"a \"secret\" of \x7f bytes";

    #[test]
    fn finds_every_form_wherever_it_stands() {
        let mut canaries = Canaries::new();
        canaries.add("secret", SECRET);
        canaries.add("other", b"something else");
        for before in 0..20 {
            let around = [&vec![b'x'; before], SECRET, b"yz"].concat();
            let texts = [
                around.clone(),
                hex::encode(&around).into_bytes(),
                STANDARD.encode(&around).into_bytes(),
                serde_json::Value::from(String::from_utf8_lossy(&around))
                    .to_string()
                    .into_bytes(),
            ];
            for text in texts {
                assert_eq!(canaries.find(&text), Some("secret"), "{before}");
            }
        }
    }

    #[test]
    fn finds_nothing_where_a_part_is_missing() {
        let mut canaries = Canaries::new();
        canaries.add("secret", SECRET);
        assert_eq!(canaries.find(&SECRET[1..]), None);
        assert_eq!(canaries.find(&SECRET[..SECRET.len() - 1]), None);
        assert_eq!(canaries.find(b""), None);
    }
}
