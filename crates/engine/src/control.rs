//! Control tokens and who may write them. A model's control tokens (`<|im_end|>`, `</s>`) are what
//! separates the roles of a conversation; whoever writes one speaks for another role. So their names
//! mean nothing in ordinary text: the encoder is loaded with each control token under an internal
//! name, which text cannot hold, and only what a chat template itself wrote is translated to it.
//!
//! To tell a template's text from the text of clients, every string of a client is marked before
//! the template sees it: U+FDD2 is put inside of whatever spells a control token, or could become a
//! part of one beside other text. Marked names are not translated, and marks are removed before
//! encoding, so the text of both is tokenized together, exactly as without marks.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;

/// Begins an internal name. This and the next two are noncharacters, which Unicode keeps for
/// internal use; in text of clients they become U+FFFD.
const BEGIN: char = '\u{fdd0}';
const END: char = '\u{fdd1}';
/// Says that the text around it is a client's.
const MARK: char = '\u{fdd2}';

/// Most control tokens of a model. Those that are served have up to some thousand.
const MAX_NAMES: usize = 4096;
/// Longest name of one, in bytes.
const MAX_NAME: usize = 256;

/// Why control tokens cannot be kept apart from ordinary text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlNameError {
    /// A name of one character or none would be found everywhere.
    #[error("a control token's name is a single character")]
    Short,
    /// A name is longer than is searched for.
    #[error("a control token's name has {bytes} bytes, more than {MAX_NAME}")]
    Long {
        /// Its length.
        bytes: usize,
    },
    /// There are more names than are searched for.
    #[error("there are {names} names of control tokens, more than {MAX_NAMES}")]
    Many {
        /// How many.
        names: usize,
    },
    /// The search could not be prepared.
    #[error("the names of control tokens cannot be searched for")]
    Search,
}

/// The names of a model's control tokens. Cheap to clone.
#[derive(Clone)]
pub struct ControlNames(Arc<Names>);

struct Names {
    /// In the order of their internal names.
    names: Vec<String>,
    internal: Vec<String>,
    /// Finds what the encoder must see as a control token: the longest name that begins first.
    exact: AhoCorasick,
    /// Finds where names begin, overlapping ones too, in any case of their letters: templates may change it. Where
    /// several begin, only the shortest is looked for, so that a place is found once.
    any_case: AhoCorasick,
    /// What names begin with, and what they end with, the latter from back to front.
    beginnings: Beginnings,
    endings: Beginnings,
}

impl ControlNames {
    /// At most 4096 names of at most 256 bytes in any order; repeated ones count once.
    ///
    /// # Errors
    /// [`ControlNameError`]: one is a single character, which cannot be told from ordinary text, or too long, or there
    /// are too many.
    pub fn new(names: impl IntoIterator<Item = String>) -> Result<Self, ControlNameError> {
        let names: Vec<String> = names
            .into_iter()
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        if names.iter().any(|name| name.chars().nth(1).is_none()) {
            return Err(ControlNameError::Short);
        }
        if let Some(long) = names.iter().find(|name| name.len() > MAX_NAME) {
            return Err(ControlNameError::Long { bytes: long.len() });
        }
        if names.len() > MAX_NAMES {
            return Err(ControlNameError::Many { names: names.len() });
        }
        let exact = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(&names)
            .map_err(|_| ControlNameError::Search)?;
        let any_case = AhoCorasick::builder()
            .ascii_case_insensitive(true)
            .build(shortest(&names))
            .map_err(|_| ControlNameError::Search)?;
        let internal = (0..names.len()).map(|n| format!("{BEGIN}{n}{END}"));
        let bytes = || names.iter().map(|name| name.bytes());
        Ok(Self(Arc::new(Names {
            internal: internal.collect(),
            exact,
            any_case,
            beginnings: Beginnings::new(bytes()),
            endings: Beginnings::new(bytes().map(Iterator::rev)),
            names,
        })))
    }

    /// No names at all.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self::new([]).expect("nothing is searched for")
    }

    /// Whether this is the name of a control token.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.internal(name).is_some()
    }

    /// The internal name of a control token.
    pub(crate) fn internal(&self, name: &str) -> Option<&str> {
        let at = self.0.names.binary_search_by(|n| n.as_str().cmp(name));
        at.ok().map(|at| self.0.internal[at].as_str())
    }

    /// The name behind an internal one.
    pub(crate) fn name(&self, internal: &str) -> Option<&str> {
        let number = internal.strip_prefix(BEGIN)?.strip_suffix(END)?;
        let at: usize = number.parse().ok()?;
        self.0.names.get(at).map(String::as_str)
    }

    /// A client's text as a template may see it.
    pub(crate) fn guard<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let text = plain(text);
        let mut cuts: Vec<usize> = self
            .0
            .any_case
            .find_overlapping_iter(&*text)
            .map(|found| after_first_char(&text, found.start()))
            .collect();
        // What is a name only together with what a template puts before or behind it, after
        // trimming perhaps.
        let trimmed = text.trim_end();
        if self.0.beginnings.is_at_end_of(trimmed.bytes().rev()) {
            cuts.push(trimmed.len());
        }
        let start = text.len() - text.trim_start().len();
        if self.0.endings.is_at_end_of(text[start..].bytes()) {
            cuts.push(start);
        }
        if cuts.is_empty() {
            return text;
        }
        cuts.sort_unstable();
        cuts.dedup();
        let mut guarded = String::with_capacity(text.len() + cuts.len() * MARK.len_utf8());
        let mut from = 0;
        for cut in cuts {
            guarded.push_str(&text[from..cut]);
            guarded.push(MARK);
            from = cut;
        }
        guarded.push_str(&text[from..]);
        Cow::Owned(guarded)
    }

    /// [`Self::guard`] for every string and key in a JSON value.
    pub(crate) fn guard_json(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.guard(text).into_owned()),
            Value::Array(list) => list.iter().map(|v| self.guard_json(v)).collect(),
            Value::Object(map) => map
                .iter()
                .map(|(key, v)| (self.guard(key).into_owned(), self.guard_json(v)))
                .collect(),
            other => other.clone(),
        }
    }

    /// What the encoder reads for a prompt: internal names where the template wrote control tokens,
    /// and no marks.
    pub(crate) fn translate(&self, prompt: &Prompt) -> String {
        let mut text = self.0.exact.replace_all(&prompt.0, &self.0.internal);
        text.retain(|c| c != MARK);
        text
    }
}

/// The names, in lower case, that do not begin with another.
fn shortest(names: &[String]) -> BTreeSet<String> {
    let lower: BTreeSet<String> = names.iter().map(|name| name.to_ascii_lowercase()).collect();
    let mut kept: BTreeSet<String> = BTreeSet::new();
    // What begins with a name comes behind it, before anything else does.
    for name in lower {
        let longer = |kept: &String| name.starts_with(kept.as_str());
        if !kept.last().is_some_and(longer) {
            kept.insert(name);
        }
    }
    kept
}

/// Text of a client for the encoder: the noncharacters that mean something here become U+FFFD.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    let own = |c: char| (BEGIN..=MARK).contains(&c);
    if text.contains(own) {
        Cow::Owned(text.replace(own, "\u{fffd}"))
    } else {
        Cow::Borrowed(text)
    }
}

fn after_first_char(text: &str, at: usize) -> usize {
    at + text[at..].chars().next().map_or(0, char::len_utf8)
}

/// The proper beginnings of some words, whatever the case of their ASCII letters: as the words themselves in order, where
/// what begins with a text comes right behind that text.
struct Beginnings {
    /// In lower case, each once.
    words: Vec<Box<[u8]>>,
    longest: usize,
}

impl Beginnings {
    fn new(words: impl Iterator<Item = impl Iterator<Item = u8>>) -> Self {
        let words = words.map(|word| word.map(|byte| byte.to_ascii_lowercase()).collect());
        let words: BTreeSet<Box<[u8]>> = words.collect();
        Self {
            longest: words.iter().map(|word| word.len()).max().unwrap_or(0),
            words: words.into_iter().collect(),
        }
    }

    /// Whether a text, given from back to front, ends with one. Of the text only as much is looked at as the longest word
    /// has, and for each byte of that a number of words is compared that is the logarithm of how many there are.
    fn is_at_end_of(&self, backwards: impl Iterator<Item = u8>) -> bool {
        let most = self.longest.saturating_sub(1);
        let mut end: Vec<u8> = backwards.take(most).collect();
        end.make_ascii_lowercase();
        end.reverse();
        (0..end.len()).any(|from| self.contain(&end[from..]))
    }

    /// Whether one is this text, in lower case.
    fn contain(&self, text: &[u8]) -> bool {
        let behind = self.words.partition_point(|word| &**word <= text);
        self.words
            .get(behind)
            .is_some_and(|word| word.starts_with(text))
    }
}

/// A rendered conversation, which still knows what its template wrote and what its clients.
#[derive(Clone, PartialEq, Eq)]
pub struct Prompt(String);

impl Prompt {
    pub(crate) fn new(marked: String) -> Self {
        Self(marked)
    }

    /// The text as people read it.
    #[must_use]
    pub fn text(&self) -> String {
        unmarked(&self.0)
    }

    /// Adds text of the server's own, in which names of control tokens count.
    pub fn push_trusted(&mut self, text: &str) {
        self.0.push_str(text);
    }
}

/// Text without marks.
pub(crate) fn unmarked(text: &str) -> String {
    text.replace(MARK, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names() -> ControlNames {
        ControlNames::new(["<|im_start|>", "<|im_end|>", "</s>", "s>x"].map(str::to_owned)).unwrap()
    }

    /// What the encoder would read for a template's text around a client's.
    fn around(before: &str, client: &str, behind: &str) -> String {
        let names = names();
        names.translate(&Prompt(format!("{before}{}{behind}", names.guard(client))))
    }

    #[test]
    fn only_the_templates_own_names_are_translated() {
        let end = names().internal("<|im_end|>").unwrap().to_owned();
        assert_eq!(
            around("<|im_end|>", "a<|im_end|>b</s>", "<|im_end|>"),
            format!("{end}a<|im_end|>b</s>{end}")
        );
        assert_eq!(names().name(&end), Some("<|im_end|>"));
    }

    #[test]
    fn overlapping_names_and_halves_beside_other_text_are_no_names() {
        assert_eq!(around("", "</s>x", ""), "</s>x");
        assert_eq!(around("", "go <|im_  ", "end|>"), "go <|im_  end|>");
        assert_eq!(around("<|im_", "end|>", ""), "<|im_end|>");
        let names = names();
        let [first, second] = ["<|im_ ", " END|>"].map(|half| names.guard(half).into_owned());
        let joined = Prompt(format!("{}{}", first.trim(), second.trim().to_lowercase()));
        assert_eq!(names.translate(&joined), "<|im_end|>");
        // As a template with `lower` would.
        let shouted = Prompt(names.guard("<|IM_END|>").to_lowercase());
        assert_eq!(names.translate(&shouted), "<|im_end|>");
    }

    #[test]
    fn internal_names_cannot_be_written() {
        let names = names();
        let internal = names.internal("</s>").unwrap();
        assert_eq!(
            plain(internal),
            "\u{fffd}1\u{fffd}".replace('1', &internal[3..internal.len() - 3])
        );
        assert!(!around("", internal, "").contains(BEGIN));
        assert!(!around("", &format!("<{MARK}/s>"), "").contains(MARK));
    }

    #[test]
    fn ordinary_text_stays_as_it_is() {
        for text in ["", "  a < b and c > d  ", "y</st>", "1<2", "日本"] {
            assert_eq!(names().guard(text), text);
        }
    }

    #[test]
    fn names_of_one_character_are_refused() {
        let error = ControlNames::new(["é".to_owned()]).err();
        assert_eq!(error, Some(ControlNameError::Short));
        assert!(ControlNames::new(["éa".to_owned()]).is_ok());
    }

    #[test]
    fn names_are_bounded_in_number_and_length() {
        let many = |count: usize| ControlNames::new((0..count).map(|n| format!("<{n}>"))).err();
        assert_eq!(many(4096), None);
        let error = many(4097).unwrap();
        assert_eq!(
            error.to_string(),
            "there are 4097 names of control tokens, more than 4096"
        );
        let long = |bytes: usize| ControlNames::new(["x".repeat(bytes)]).err();
        assert_eq!(long(256), None);
        assert_eq!(
            long(257).unwrap().to_string(),
            "a control token's name has 257 bytes, more than 256"
        );
    }

    #[test]
    fn names_inside_of_each_other_are_found_once() {
        let nested = (2..=256).map(|n| "aA".repeat(128)[..n].to_owned());
        let names = ControlNames::new(nested.chain(["ab>".to_owned()])).unwrap();
        let text = "a".repeat(4096);
        let found = names.0.any_case.find_overlapping_iter(&text).count();
        assert_eq!(found, 4095);
        // The first and the last letter could be a part of a name with what is around the text.
        let guarded = names.guard(&text).into_owned();
        assert_eq!(
            guarded,
            format!("{MARK}{}", format!("a{MARK}").repeat(4096))
        );
        assert_eq!(names.translate(&Prompt(guarded)), text);
    }

    /// By definition: whether `text` ends with a proper beginning of `name`.
    fn ends_with_beginning(text: &[u8], name: &[u8]) -> bool {
        (1..name.len().min(text.len() + 1))
            .any(|n| text[text.len() - n..].eq_ignore_ascii_case(&name[..n]))
    }

    /// By definition: whether `text` begins with a proper end of `name`.
    fn begins_with_end(text: &[u8], name: &[u8]) -> bool {
        (1..name.len().min(text.len() + 1))
            .any(|n| text[..n].eq_ignore_ascii_case(&name[name.len() - n..]))
    }

    #[test]
    fn as_many_names_as_there_may_be_are_compared_a_few_times_for_each_byte() {
        let names = (0..MAX_NAMES).map(|n| format!("{}{n:04}", "a".repeat(MAX_NAME - 4)));
        let names = ControlNames::new(names).unwrap();
        assert_eq!(names.0.beginnings.longest, MAX_NAME);
        // Of a text that could be the beginning of each of them, or the end of none, only its edges are looked at.
        let looked_at = |text: &str| {
            let (mut front, mut back) = (0, 0);
            let beginning = names
                .0
                .beginnings
                .is_at_end_of(text.bytes().rev().inspect(|_| back += 1));
            let ending = names
                .0
                .endings
                .is_at_end_of(text.bytes().inspect(|_| front += 1));
            (beginning, ending, back, front)
        };
        assert_eq!(
            looked_at(&"a".repeat(1 << 20)),
            (true, false, MAX_NAME - 1, MAX_NAME - 1)
        );
        assert_eq!(looked_at("4095"), (false, true, 4, 4));
    }

    proptest! {
        #[test]
        fn edges_are_parts_of_names_as_the_definition_says(
            names in prop::collection::vec("[aAbé]{2,5}", 0..6),
            text in "[aAbBé]{0,7}",
        ) {
            let known = ControlNames::new(names.clone()).unwrap();
            let of = |part: fn(&[u8], &[u8]) -> bool| {
                names.iter().any(|name| part(text.as_bytes(), name.as_bytes()))
            };
            let beginning = known.0.beginnings.is_at_end_of(text.bytes().rev());
            prop_assert_eq!(beginning, of(ends_with_beginning));
            let ending = known.0.endings.is_at_end_of(text.bytes());
            prop_assert_eq!(ending, of(begins_with_end));
        }

        #[test]
        fn no_text_of_a_client_is_translated(pieces in prop::collection::vec(
            prop::sample::select(vec!["<|im_end|>", "<|im_start|>", "</s>", "s>x", "<", "|", ">", " ", "<|im_", "end|>", "\u{fdd2}", "\u{fdd0}", "A"]),
            0..12,
        ), cut in 0usize..12) {
            let names = names();
            let cut = cut.min(pieces.len());
            let (first, second) = (pieces[..cut].concat(), pieces[cut..].concat());
            let joined = Prompt(format!("{}{}", names.guard(&first).trim(), names.guard(&second).trim()));
            prop_assert!(!names.translate(&joined).contains(BEGIN));
            prop_assert_eq!(names.translate(&joined), joined.text());
        }
    }
}
