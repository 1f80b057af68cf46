//! Guesses of a text's next tokens, so that one pass over the weights can compute several: *prompt
//! lookup*. Where the last tokens of prompt and answer stood before, what followed them there is the
//! guess. It costs no model. Which guesses were right is the sampler's word; here is no probability
//! and no cache.
//!
//! **How far.** As many tokens ahead as were guessed right in a row until now. Every token is compared
//! with what would have been guessed for it, so it costs no row to find out that a text repeats itself:
//! one that does not is never guessed at.
//!
//! **Whose tokens.** The sequence's own. A guess from anybody else's text would show in the time of an
//! answer that they have it in common.

/// How several tokens of an answer can come from one pass. It changes no answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculation {
    /// Not at all. An answer's tokens come one a pass, whatever they are.
    #[default]
    None,
    /// What followed the last tokens where they stood before in prompt and answer is computed along.
    /// How many tokens come from one pass, and so their times, then tell how far the text repeats itself.
    PromptLookup,
}

impl Speculation {
    /// Each.
    pub const ALL: [Speculation; 2] = [Speculation::None, Speculation::PromptLookup];

    /// `"none"` or `"prompt-lookup"`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::PromptLookup => "prompt-lookup",
        }
    }

    /// For each of `places`, what guesses texts of up to `context` tokens.
    pub(crate) fn lookups(self, places: usize, context: usize) -> Vec<Lookup> {
        match self {
            Self::None => Vec::new(),
            Self::PromptLookup => (0..places).map(|_| Lookup::new(context)).collect(),
        }
    }
}

/// Lengths of what is looked up: the longest that is found counts.
const SHORTEST: usize = 2;
const LONGEST: usize = 3;
/// Most places that an index has. A text with more beginnings loses old ones.
const MOST_PLACES: usize = 1 << 16;

/// Where in one text its last tokens stood before. It takes all its memory when it is made, and a token
/// costs two places of it.
pub(crate) struct Lookup {
    /// By the hash of some tokens, the position after the last of them where they stood last; 0 is none.
    /// Hashes that are alike push each other out, so what is found is compared.
    ends: Box<[u32]>,
    /// Tokens of the text that were read.
    read: usize,
    /// Where the token stands that is the guess for the next one.
    next: Option<usize>,
    /// How many tokens in a row, up to the last one, were what had been the guess.
    streak: usize,
}

impl Lookup {
    /// For texts of up to `context` tokens.
    pub(crate) fn new(context: usize) -> Self {
        Self::with_places((2 * context).clamp(2, MOST_PLACES).next_power_of_two())
    }

    fn with_places(places: usize) -> Self {
        Self {
            ends: vec![0; places].into(),
            read: 0,
            next: None,
            streak: 0,
        }
    }

    /// Forgets the text.
    pub(crate) fn forget(&mut self) {
        self.ends.fill(0);
        (self.read, self.next, self.streak) = (0, None, 0);
    }

    /// Reads what `text` has more than before.
    pub(crate) fn read(&mut self, text: &[u32]) {
        for at in self.read..text.len() {
            let right = self.next.filter(|&next| text[next] == text[at]);
            self.streak = right.map_or(0, |_| self.streak + 1);
            let found = self.note(&text[..=at]);
            // While the guesses are right it goes on where they come from.
            self.next = right.map(|next| next + 1).or(found);
        }
        self.read = self.read.max(text.len());
    }

    /// Notes where the last tokens of `text` end, and finds where they ended before.
    fn note(&mut self, text: &[u32]) -> Option<usize> {
        let mut found = None;
        for length in SHORTEST..=LONGEST.min(text.len()) {
            let last = &text[text.len() - length..];
            let place = self.place(last);
            let end = std::mem::replace(&mut self.ends[place], text.len() as u32) as usize;
            // The place may be shared by what was noted just now.
            if (length..text.len()).contains(&end) && text[end - length..end] == *last {
                found = Some(end);
            }
        }
        found
    }

    fn place(&self, tokens: &[u32]) -> usize {
        // Fibonacci hashing. Who has many tokens share a place loses guesses, their own.
        let mut hash = 0xff51_afd7_ed55_8ccd_u64.wrapping_mul(tokens.len() as u64);
        for &token in tokens {
            hash = (hash ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            hash ^= hash >> 32;
        }
        hash as usize & (self.ends.len() - 1)
    }

    /// Appends guesses of what follows `text`, which was read, at most `most`.
    pub(crate) fn guess(&self, text: &[u32], most: usize, guesses: &mut Vec<u32>) {
        let Some(next) = self.next else { return };
        let first = guesses.len();
        for source in (next..).take(self.streak.min(most)) {
            // Beyond the end of the text the guesses themselves go on: a text that repeats its end.
            let guess = match text.get(source) {
                Some(&token) => token,
                None => guesses[first + source - text.len()],
            };
            guesses.push(guess);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn guess(text: &[u32], most: usize) -> Vec<u32> {
        let mut lookup = Lookup::new(64);
        lookup.read(text);
        let mut guesses = Vec::new();
        lookup.guess(text, most, &mut guesses);
        guesses
    }

    #[test]
    fn guesses_are_as_many_as_were_right_in_a_row() {
        let text = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        let again = |tokens: usize| [&text[..], &[70], &text[..tokens]].concat();
        assert!(guess(&text, 5).is_empty());
        // The first two tokens tell where it may be, and that is not yet right.
        assert!(guess(&again(2), 5).is_empty());
        assert_eq!(guess(&again(3), 5), [4]);
        assert_eq!(guess(&again(4), 5), [5, 6]);
        assert_eq!(guess(&again(4), 1), [5]);
        assert_eq!(guess(&again(6), 5), [7, 8, 9, 70]);
        // A wrong one ends it.
        assert!(guess(&[&again(6)[..], &[80]].concat(), 5).is_empty());
        assert!(guess(&[&again(6)[..], &[80, 81]].concat(), 5).is_empty());
    }

    #[test]
    fn the_last_place_counts_and_the_longer_beginning() {
        // 1 2 was followed by 3 and then by 4: guessed is 4, which comes, so the text goes on there.
        assert_eq!(guess(&[1, 2, 3, 9, 1, 2, 4, 5, 8, 1, 2, 4], 1), [5]);
        // 1 2 stood last before 4, but 7 1 2 before 3, which comes.
        let text = [7, 1, 2, 3, 7, 1, 9, 8, 1, 2, 4, 7, 1, 2, 3];
        assert_eq!(guess(&text, 1), [7]);
    }

    #[test]
    fn a_text_that_repeats_its_end_is_guessed_beyond_it() {
        assert_eq!(guess(&[5; 9], 4), [5; 4]);
        assert_eq!(guess(&[1, 2, 3, 1, 2, 3, 1, 2, 3, 1], 6), [2, 3, 1, 2, 3]);
    }

    #[test]
    fn a_text_in_pieces_is_the_text_and_a_forgotten_one_is_none() {
        let text: Vec<u32> = (0..40).map(|i| i * i % 7).collect();
        let mut lookup = Lookup::new(64);
        for end in [1, 2, 10, 10, 33, 40] {
            lookup.read(&text[..end]);
            let mut guesses = vec![90];
            lookup.guess(&text[..end], 5, &mut guesses);
            assert_eq!(guesses[1..], guess(&text[..end], 5));
        }
        lookup.forget();
        let other = [1, 2, 4];
        lookup.read(&other);
        let mut guesses = Vec::new();
        lookup.guess(&other, 5, &mut guesses);
        assert!(guesses.is_empty());
        assert!(lookup.ends.iter().all(|&end| end <= 3));
    }

    /// What the definition guesses for the token after `text`, and how many were right before it.
    fn definition(text: &[u32]) -> (Option<u32>, usize) {
        let (mut next, mut streak): (Option<usize>, _) = (None, 0);
        for at in 0..text.len() {
            let right = next.is_some_and(|next| text[next] == text[at]);
            streak = if right { streak + 1 } else { 0 };
            let before = |length: usize| {
                let start = (at + 1).checked_sub(length)?;
                (length..=at)
                    .rev()
                    .find(|&end| text[end - length..end] == text[start..=at])
            };
            next = match right {
                true => next.map(|next| next + 1),
                false => before(3).or_else(|| before(2)),
            };
        }
        (next.map(|next| text[next]), streak)
    }

    proptest! {
        #[test]
        fn guesses_are_the_definitions(text in prop::collection::vec(0u32..6, 0..50)) {
            // So much room that no two of these share a place.
            let mut lookup = Lookup::with_places(1 << 22);
            lookup.read(&text);
            let mut guesses = Vec::new();
            lookup.guess(&text, 9, &mut guesses);
            let (next, streak) = definition(&text);
            prop_assert_eq!(guesses.first().copied(), next.filter(|_| streak > 0));
            prop_assert_eq!(guesses.len(), if next.is_some() { streak.min(9) } else { 0 });
        }

        #[test]
        fn without_room_guesses_still_stand_in_the_text(text in prop::collection::vec(0u32..6, 0..200)) {
            let mut lookup = Lookup::with_places(8);
            lookup.read(&text);
            let mut guesses = Vec::new();
            lookup.guess(&text, 9, &mut guesses);
            prop_assert!(guesses.iter().all(|guess| text.contains(guess)));
        }
    }
}
