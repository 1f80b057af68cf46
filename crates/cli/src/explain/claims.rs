//! What each claim means, why it fails in practice, and what to do: one table per party that refuses. Claims are the
//! names of checks in transcripts and the codes of errors. A test walks the sources for claims that are not in here.

mod access;
mod evidence;
mod files;
mod receipt;
mod release;
mod service;

/// About one claim, or several that fail for the same reasons.
pub(super) struct Explanation {
    /// The claims, by name.
    pub(super) claims: &'static [&'static str],
    /// What holds where the claim does, as a sentence.
    pub(super) means: &'static str,
    /// Why it fails, the likeliest reason first.
    pub(super) cause: &'static str,
    /// What the reader can do.
    pub(super) remedy: &'static str,
}

const TABLES: [&[Explanation]; 6] = [
    evidence::TABLE,
    service::TABLE,
    release::TABLE,
    files::TABLE,
    access::TABLE,
    receipt::TABLE,
];

/// The explanation of a claim.
pub(super) fn find(claim: &str) -> Option<&'static Explanation> {
    all().find(|explanation| explanation.claims.contains(&claim))
}

fn all() -> impl Iterator<Item = &'static Explanation> {
    TABLES.into_iter().flatten()
}

/// For tables: claims, meaning, cause, remedy.
const fn about(
    claims: &'static [&'static str],
    means: &'static str,
    cause: &'static str,
    remedy: &'static str,
) -> Explanation {
    Explanation {
        claims,
        means,
        cause,
        remedy,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_claim_is_explained_once_and_in_sentences() {
        let mut seen = std::collections::BTreeSet::new();
        for explanation in all() {
            assert!(!explanation.claims.is_empty());
            for claim in explanation.claims {
                assert!(seen.insert(claim), "{claim} is explained twice");
            }
            for text in [explanation.means, explanation.cause, explanation.remedy] {
                assert!(text.len() > 15 && text.ends_with('.'), "{text:?}");
            }
        }
        assert!(find("no such claim").is_none());
    }
}
