//! Stop strings over streamed text: what may be shown now, what must wait, and when to stop. The
//! rule does not depend on how the text is cut into tokens: the stop string whose last byte comes
//! first ends the text (the longest of several ending there), and nothing from its first byte on is
//! ever released.

/// Watches one request's text for its stop strings.
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    /// Text that may still turn out to be the beginning of a stop string.
    held: String,
}

impl StopMatcher {
    /// A matcher for `stops`; empty strings are dropped.
    pub(crate) fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|s| !s.is_empty());
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Takes the next piece of text and appends to `shown` what is now certain to be shown. True: a
    /// stop string is complete, and nothing follows what was shown.
    pub(crate) fn push(&mut self, text: &str, shown: &mut String) -> bool {
        if self.stops.is_empty() {
            shown.push_str(text);
            return false;
        }
        self.held.push_str(text);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| {
                self.held
                    .find(stop.as_str())
                    .map(|start| (start + stop.len(), start))
            })
            .min();
        let certain = match first {
            Some((_, start)) => start,
            None => self.held.len() - self.longest_beginning_of_a_stop(),
        };
        shown.push_str(&self.held[..certain]);
        match first {
            Some(_) => self.held.clear(),
            None => drop(self.held.drain(..certain)),
        }
        first.is_some()
    }

    /// Appends to `shown` what was held back, as no more text will come.
    pub(crate) fn finish(&mut self, shown: &mut String) {
        shown.push_str(&self.held);
        self.held.clear();
    }

    /// Length of the longest end of the held text that is a proper beginning of a stop string.
    fn longest_beginning_of_a_stop(&self) -> usize {
        let held = self.held.as_str();
        let longest = self
            .stops
            .iter()
            .map(|s| s.len() - 1)
            .max()
            .unwrap_or(0)
            .min(held.len());
        (1..=longest)
            .rev()
            .find(|&n| {
                let at = held.len() - n;
                held.is_char_boundary(at)
                    && self
                        .stops
                        .iter()
                        .any(|s| s.len() > n && s.as_bytes().starts_with(&held.as_bytes()[at..]))
            })
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Everything shown, and whether it stopped.
    fn run<'a>(stops: &[&str], pieces: impl IntoIterator<Item = &'a str>) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut shown = String::new();
        for piece in pieces {
            if matcher.push(piece, &mut shown) {
                return (shown, true);
            }
        }
        matcher.finish(&mut shown);
        (shown, false)
    }

    /// What one more piece shows, where no stop string is complete.
    fn push(matcher: &mut StopMatcher, piece: &str) -> String {
        let mut shown = String::new();
        assert!(!matcher.push(piece, &mut shown));
        shown
    }

    fn finish(matcher: &mut StopMatcher) -> String {
        let mut shown = String::new();
        matcher.finish(&mut shown);
        shown
    }

    #[test]
    fn stops_across_pieces_and_never_shows_the_stop() {
        assert_eq!(
            run(&["END"], ["one E", "N", "D two"]),
            ("one ".into(), true)
        );
        assert_eq!(
            run(&["END"], ["one E", "N", "d two"]),
            ("one ENd two".into(), false)
        );
        assert_eq!(run(&["END"], ["END"]), (String::new(), true));
    }

    #[test]
    fn holds_back_only_what_could_begin_a_stop() {
        let mut matcher = StopMatcher::new(vec!["aab".into()]);
        assert_eq!(push(&mut matcher, "xaaa"), "xa");
        assert_eq!(push(&mut matcher, "c"), "aac");
        assert_eq!(push(&mut matcher, "aa"), "");
        assert_eq!(finish(&mut matcher), "aa");
        assert_eq!(finish(&mut matcher), "");
    }

    #[test]
    fn the_first_complete_stop_wins() {
        assert_eq!(run(&["abcd", "bc"], ["abcd"]), ("a".into(), true));
        assert_eq!(run(&["abc", "bc"], ["xabc"]), ("x".into(), true));
    }

    #[test]
    fn characters_of_several_bytes_stay_whole() {
        let mut matcher = StopMatcher::new(vec!["é!".into()]);
        assert_eq!(push(&mut matcher, "aé"), "a");
        assert_eq!(push(&mut matcher, "è"), "éè");
        // è and é share their first byte, which must not be held apart from the second.
        let mut matcher = StopMatcher::new(vec!["é".into()]);
        assert_eq!(push(&mut matcher, "è"), "è");
    }

    #[test]
    fn without_stops_everything_passes_at_once() {
        let mut matcher = StopMatcher::new(vec![String::new()]);
        assert_eq!(push(&mut matcher, "text"), "text");
    }

    /// The definition, by looking at every prefix of the whole text.
    fn definition(stops: &[String], text: &str) -> (String, bool) {
        for end in (0..=text.len()).filter(|&e| text.is_char_boundary(e)) {
            let starts = stops
                .iter()
                .filter(|s| text[..end].ends_with(s.as_str()))
                .map(|s| end - s.len());
            if let Some(start) = starts.min() {
                return (text[..start].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #[test]
        fn cutting_into_pieces_changes_nothing(
            stops in prop::collection::vec("[abé]{1,4}", 1..4),
            pieces in prop::collection::vec("[abcé]{0,3}", 0..12),
        ) {
            let refs: Vec<&str> = stops.iter().map(String::as_str).collect();
            let whole = pieces.concat();
            prop_assert_eq!(run(&refs, pieces.iter().map(String::as_str)), definition(&stops, &whole));
        }
    }
}
