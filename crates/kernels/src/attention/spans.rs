//! Which rows of a batch are whose, and on which pages their sequences lie.

use std::ops::Range;

use super::PAGE;

/// Consecutive tokens of one sequence in a batch.
#[derive(Debug, Clone)]
pub struct Span<'a> {
    /// Their rows in the queries and the output.
    pub rows: Range<usize>,
    /// Position of the first of them in its sequence; the others follow.
    pub position: usize,
    /// Pages of the sequence, from position 0. Attention wants the keys and values up to the last
    /// of these tokens written.
    pub pages: &'a [u32],
}

impl Span<'_> {
    /// Position after the last token.
    pub(super) fn end(&self) -> usize {
        self.position + self.rows.len()
    }
}

/// The spans of a batch. It keeps its memory when it is cleared, so that filling it again for each
/// step allocates nothing.
#[derive(Debug, Default)]
pub struct Spans {
    spans: Vec<Stored>,
    pages: Vec<u32>,
    /// Largest page number.
    largest: u32,
}

#[derive(Debug)]
struct Stored {
    rows: Range<usize>,
    position: usize,
    /// Where `pages` has this span's.
    pages: Range<usize>,
}

impl Spans {
    /// Room for so many spans with so many pages in all.
    pub fn with_capacity(spans: usize, pages: usize) -> Spans {
        Spans {
            spans: Vec::with_capacity(spans),
            pages: Vec::with_capacity(pages),
            largest: 0,
        }
    }

    /// Forgets all spans.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.pages.clear();
        self.largest = 0;
    }

    /// Adds a span. Pages beyond its last token are ignored.
    ///
    /// # Panics
    /// If its rows do not come after those of the span before it, or it has too few pages.
    pub fn push(&mut self, span: Span<'_>) {
        let end_of_previous = self.spans.last().map_or(0, |s| s.rows.end);
        assert!(
            span.rows.start >= end_of_previous,
            "spans are in the order of their rows and share none"
        );
        assert!(
            span.rows.start <= span.rows.end,
            "rows {:?} run backwards",
            span.rows
        );
        let needed = span
            .position
            .checked_add(span.rows.len())
            .expect("positions fit")
            .div_ceil(PAGE);
        assert!(
            span.pages.len() >= needed,
            "{} pages where {needed} are needed",
            span.pages.len()
        );
        let start = self.pages.len();
        self.pages.extend_from_slice(&span.pages[..needed]);
        let largest = self.pages[start..].iter().fold(0, |a, b| a.max(*b));
        self.largest = self.largest.max(largest);
        self.spans.push(Stored {
            rows: span.rows,
            position: span.position,
            pages: start..self.pages.len(),
        });
    }

    /// The spans in the order of their rows.
    pub fn iter(&self) -> impl Iterator<Item = Span<'_>> {
        self.spans.iter().map(|s| Span {
            rows: s.rows.clone(),
            position: s.position,
            pages: &self.pages[s.pages.clone()],
        })
    }

    /// All rows are below `rows` and all pages below `pages`.
    pub(super) fn check(&self, rows: usize, pages: usize) {
        let end = self.spans.last().map_or(0, |s| s.rows.end);
        assert!(end <= rows, "rows to {end} of {rows}");
        assert!(
            self.pages.is_empty() || (self.largest as usize) < pages,
            "a page beyond {pages}"
        );
    }
}

impl<'a> Extend<Span<'a>> for Spans {
    fn extend<I: IntoIterator<Item = Span<'a>>>(&mut self, spans: I) {
        spans.into_iter().for_each(|span| self.push(span));
    }
}

impl<'a> FromIterator<Span<'a>> for Spans {
    fn from_iter<I: IntoIterator<Item = Span<'a>>>(iter: I) -> Spans {
        let mut spans = Spans::default();
        spans.extend(iter);
        spans
    }
}
