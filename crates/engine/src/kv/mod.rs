//! Who uses which pages of the KV cache. Memory is set aside once; a sequence takes pages as it grows.
//! Layout and arithmetic of pages are the kernels'.
//!
//! **Sharing.** Several sequences may have one page. It is copied before one of them writes to it.
//!
//! **Reuse.** Full pages of a request with a [`User`] can be found by that user's later requests that
//! begin with the same tokens under the same adapter, and by nobody else's (`prefix`). When their last sequence ends they
//! stay, until their memory is needed (unused for longest first), their time is over, or the user's
//! unused pages are more than a share of all. Kernels give the same bits for a position whatever it
//! was computed together with, so it is all the same who computed a page, and in which pieces.
//!
//! Whatever way a page goes back, it is erased.

mod prefix;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::time::Duration;

use casemate_container::ModelConfig;
use casemate_kernels::attention::{KvPool, KvShape, KvType, PAGE, Span as AttentionSpan, Spans};
use casemate_kernels::mem::Granted;

use crate::adapters::AdapterIndex;
use crate::error::LoadError;
use crate::model::Span;
use crate::request::User;
use prefix::{Origin, Prefixes};

/// Default limit where the caller sets none.
const DEFAULT_BYTES: u64 = 1 << 30;
/// One user's unused pages are at most this part of all pages.
const SHARE_OF_ONE_USER: usize = 2;

/// A sequence's place in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot(usize);

/// What of a text the cache holds already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Pages from position 0 on.
    pub(crate) pages: usize,
    /// Those of them that nobody uses.
    pub(crate) idle: usize,
}

/// The pages of a sequence.
#[derive(Default)]
struct Table {
    open: bool,
    user: Option<User>,
    /// What its keys and values are computed with, besides the model.
    adapter: Option<AdapterIndex>,
    /// In the order of positions.
    pages: Vec<u32>,
    /// So many of them, from the first, can be found.
    known: usize,
}

/// The pages and their users.
pub(crate) struct KvCache {
    pool: KvPool,
    page_bytes: u64,
    /// Erased pages.
    free: Vec<u32>,
    /// How many sequences have each page.
    uses: Vec<u32>,
    prefixes: Prefixes,
    /// How long unused pages stay; zero: nothing is reused.
    age: Duration,
    tables: Vec<Table>,
    /// Where the sequences of the last batch lie.
    located: Spans,
    /// What [`Self::fork`] copies, kept for its memory: each sequence's pages, and how many are known.
    forked: Vec<(Range<usize>, usize)>,
    forked_pages: Vec<u32>,
}

impl KvCache {
    /// A cache of `kv_type` for `slots` sequences of up to `context` tokens in `bytes` (or the default), at least
    /// one whole context. Unused pages stay for `age`.
    pub(crate) fn new(
        config: &ModelConfig,
        kv_type: KvType,
        context: usize,
        slots: usize,
        bytes: Option<u64>,
        age: Duration,
    ) -> Result<Self, LoadError> {
        let shape = KvShape {
            layers: config.layers as usize,
            kv_heads: config.kv_heads as usize,
            head_dim: config.head_dim as usize,
            kv_type,
        };
        let page_bytes = shape.page_bytes().ok_or(LoadError::Config {
            field: "head_dim",
            value: config.head_dim.to_string(),
            rule: "one page of keys and values must fit the address space",
        })? as u64;
        let one = context.div_ceil(PAGE) as u64;
        let all = one.saturating_mul(slots as u64);
        let pages = match bytes {
            Some(bytes) => all.min(bytes / page_bytes),
            None => all.min((DEFAULT_BYTES / page_bytes).max(one)),
        };
        if pages < one {
            let needed = one.saturating_mul(page_bytes);
            return Err(LoadError::KvBudget {
                context,
                needed,
                given: bytes.unwrap_or(DEFAULT_BYTES),
            });
        }
        let pages = u32::try_from(pages).unwrap_or(u32::MAX - 1);
        let pool = KvPool::new(shape, pages as usize)?;
        let table = || Table {
            pages: Vec::with_capacity(one as usize),
            ..Table::default()
        };
        Ok(Self {
            pool,
            page_bytes,
            free: (0..pages).rev().collect(),
            uses: vec![0; pages as usize],
            prefixes: Prefixes::new(pages as usize),
            age,
            tables: (0..slots).map(|_| table()).collect(),
            located: Spans::with_capacity(slots, slots * one as usize),
            forked: Vec::with_capacity(slots),
            forked_pages: Vec::with_capacity(slots * one as usize),
        })
    }

    /// What of `tokens` the cache holds for `user`. At least one token is left to compute: somebody
    /// wants the logits after the last one.
    pub(crate) fn find(
        &self,
        user: Option<User>,
        adapter: Option<AdapterIndex>,
        tokens: &[u32],
        now: Duration,
    ) -> Found {
        let mut found = Found::default();
        self.walk(user, adapter, tokens, now, |page| {
            found.pages += 1;
            found.idle += usize::from(self.prefixes.idle_since(page).is_some());
        });
        found
    }

    fn walk(
        &self,
        user: Option<User>,
        adapter: Option<AdapterIndex>,
        tokens: &[u32],
        now: Duration,
        mut each: impl FnMut(u32),
    ) {
        let Some(user) = user else { return };
        let origin = Origin { user, adapter };
        let before_last = &tokens[..tokens.len().saturating_sub(1)];
        let mut parent = None;
        for tokens in before_last.chunks_exact(PAGE) {
            let Some(page) = self.prefixes.find(origin, parent, tokens) else {
                return;
            };
            // Its time may be over before anybody looked.
            if self
                .prefixes
                .idle_since(page)
                .is_some_and(|since| self.is_over(since, now))
            {
                return;
            }
            each(page);
            parent = Some(page);
        }
    }

    /// Whether the time of a page is over that nobody used since then.
    fn is_over(&self, since: Duration, now: Duration) -> bool {
        now.saturating_sub(since) >= self.age
    }

    /// Opens a place for a sequence that begins with `tokens`, and tells how many positions of it are
    /// there already. `None`: every place is taken.
    pub(crate) fn open(
        &mut self,
        user: Option<User>,
        adapter: Option<AdapterIndex>,
        tokens: &[u32],
        now: Duration,
    ) -> Option<(Slot, usize)> {
        let user = user.filter(|_| !self.age.is_zero());
        let slot = self.tables.iter().position(|table| !table.open)?;
        let mut pages = std::mem::take(&mut self.tables[slot].pages);
        self.walk(user, adapter, tokens, now, |page| pages.push(page));
        for &page in &pages {
            self.uses[page as usize] += 1;
            self.prefixes.wake(page);
        }
        let known = pages.len();
        self.tables[slot] = Table {
            open: true,
            user,
            adapter,
            pages,
            known,
        };
        Some((Slot(slot), known * PAGE))
    }

    /// The adapter that a sequence is computed with.
    pub(crate) fn adapter_of(&self, slot: Slot) -> Option<AdapterIndex> {
        self.tables[slot.0].adapter
    }

    /// Pages that a sequence has.
    pub(crate) fn pages_of(&self, slot: Slot) -> usize {
        self.tables[slot.0].pages.len()
    }

    /// Pages that would be free without some sequences, which differ, or unused. Those that several of
    /// them have, and nobody else, are counted once.
    pub(crate) fn pages_of_their_own(&self, slots: impl Iterator<Item = Slot> + Clone) -> usize {
        let mut own = 0;
        for (i, slot) in slots.clone().enumerate() {
            for (at, &page) in self.tables[slot.0].pages.iter().enumerate() {
                // Whoever shares a page has it at the same position.
                let has = |other: &Slot| self.tables[other.0].pages.get(at) == Some(&page);
                let first = !slots.clone().take(i).any(|other| has(&other));
                let among_them = slots.clone().filter(has).count() as u32;
                own += usize::from(first && among_them == self.uses[page as usize]);
            }
        }
        own
    }

    /// Pages that a sequence takes to write the positions from `first` up to `end`, as if those that it
    /// shares stayed shared.
    pub(crate) fn pages_to_write(&self, slot: Slot, first: usize, end: usize) -> usize {
        let (pages, end) = (&self.tables[slot.0].pages, end.div_ceil(PAGE));
        let own = pages.get(first / PAGE..end.min(pages.len())).unwrap_or(&[]);
        let copied = own.iter().filter(|&&page| self.uses[page as usize] > 1);
        end.saturating_sub(pages.len()) + copied.count()
    }

    /// Pages that can be had: free ones and unused ones.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.prefixes.idle()
    }

    /// How many positions from `first` on a sequence can write with the pages that can be had; it has
    /// no page behind that of `first`.
    pub(crate) fn writable(&self, slot: Slot, first: usize) -> usize {
        let pages = &self.tables[slot.0].pages;
        let shared = pages
            .get(first / PAGE)
            .is_some_and(|&page| self.uses[page as usize] > 1);
        match self.available().checked_sub(usize::from(shared)) {
            Some(more) => (pages.len() + more) * PAGE - first,
            None => 0,
        }
    }

    /// Takes the pages that a sequence needs to write the positions from `first` up to `end`, a copy
    /// of those that it shares. `false`: there are not enough; what was taken stays.
    pub(crate) fn ensure(&mut self, slot: Slot, first: usize, end: usize) -> bool {
        let have = self.tables[slot.0].pages.len();
        for at in first / PAGE..have.min(end.div_ceil(PAGE)) {
            let page = self.tables[slot.0].pages[at];
            debug_assert!(!self.prefixes.knows(page), "page {page} is full");
            if self.uses[page as usize] > 1 {
                let Some(own) = self.take() else { return false };
                self.pool.copy_page(page, own);
                self.uses[page as usize] -= 1;
                self.tables[slot.0].pages[at] = own;
            }
        }
        for _ in have..end.div_ceil(PAGE) {
            let Some(page) = self.take() else {
                return false;
            };
            self.tables[slot.0].pages.push(page);
        }
        true
    }

    /// A page of zeros for one user.
    fn take(&mut self) -> Option<u32> {
        if self.free.is_empty() {
            let (page, _) = self.prefixes.oldest()?;
            self.forget(page);
        }
        let page = self.free.pop()?;
        self.uses[page as usize] = 1;
        Some(page)
    }

    /// Erases an unused page that could be found.
    fn forget(&mut self, page: u32) {
        self.prefixes.remove(page);
        self.erase(page);
    }

    fn erase(&mut self, page: u32) {
        self.pool.erase_page(page);
        self.free.push(page);
    }

    /// Gives each of some sequences, which differ, the pages of one of them: sequence i those of
    /// sequence `from[i]`. They share them from then on.
    pub(crate) fn fork(&mut self, slots: impl Iterator<Item = Slot> + Clone, from: &[usize]) {
        let same = from.iter().enumerate().all(|(i, &of)| i == of);
        if same {
            return;
        }
        self.forked.clear();
        self.forked_pages.clear();
        for slot in slots.clone() {
            let table = &self.tables[slot.0];
            let start = self.forked_pages.len();
            self.forked_pages.extend_from_slice(&table.pages);
            self.forked
                .push((start..self.forked_pages.len(), table.known));
        }
        for &of in from {
            for &page in &self.forked_pages[self.forked[of].0.clone()] {
                self.uses[page as usize] += 1;
            }
        }
        for (slot, &of) in slots.zip(from) {
            for at in (0..self.tables[slot.0].pages.len()).rev() {
                let page = self.tables[slot.0].pages[at];
                self.drop_use(page, Duration::ZERO);
            }
            let (pages, known) = &self.forked[of];
            let table = &mut self.tables[slot.0];
            table.pages.clear();
            table
                .pages
                .extend_from_slice(&self.forked_pages[pages.clone()]);
            table.known = *known;
        }
    }

    /// Gives a sequence the first `count` pages of another one, which are full and hold what it would
    /// write itself. They are one user's or nobody's, with the same adapter.
    pub(crate) fn share(&mut self, slot: Slot, from: Slot, count: usize) {
        let origin = |slot: Slot| (self.tables[slot.0].user, self.tables[slot.0].adapter);
        debug_assert!(origin(slot) == origin(from));
        for at in 0..count {
            let page = self.tables[from.0].pages[at];
            self.uses[page as usize] += 1;
            let own = &mut self.tables[slot.0].pages;
            match own.get_mut(at) {
                None => own.push(page),
                Some(own) => {
                    let before = std::mem::replace(own, page);
                    self.drop_use(before, Duration::ZERO);
                }
            }
        }
        let known = self.tables[from.0].known.min(count);
        let own = &mut self.tables[slot.0].known;
        *own = known.max(*own);
    }

    /// Lets the full pages of a sequence be found whose first `fed` positions are written. `token`
    /// tells the token at a position.
    pub(crate) fn know(&mut self, slot: Slot, fed: usize, token: impl Fn(usize) -> u32) {
        let Some(user) = self.tables[slot.0].user else {
            return;
        };
        let adapter = self.tables[slot.0].adapter;
        let origin = Origin { user, adapter };
        while (self.tables[slot.0].known + 1) * PAGE <= fed {
            let at = self.tables[slot.0].known;
            let pages = &self.tables[slot.0].pages;
            let (page, parent) = (pages[at], at.checked_sub(1).map(|i| pages[i]));
            let tokens: [u32; PAGE] = std::array::from_fn(|i| token(at * PAGE + i));
            match self.prefixes.find(origin, parent, &tokens) {
                None => self.prefixes.insert(page, origin, parent, &tokens),
                // Another sequence was faster: the same text has the same bits.
                Some(same) if same != page => {
                    self.prefixes.wake(same);
                    self.uses[same as usize] += 1;
                    self.tables[slot.0].pages[at] = same;
                    self.drop_use(page, Duration::ZERO);
                }
                Some(_) => {}
            }
            self.tables[slot.0].known += 1;
        }
    }

    /// Ends a sequence: pages that can be found stay, the others are erased.
    pub(crate) fn release(&mut self, slot: Slot, now: Duration) {
        let mut pages = std::mem::take(&mut self.tables[slot.0].pages);
        // From the last, so that what is below a page is never unused for less time.
        for page in pages.drain(..).rev() {
            self.drop_use(page, now);
        }
        let user = self.tables[slot.0].user;
        self.tables[slot.0] = Table {
            pages,
            ..Table::default()
        };
        let most = self.pool.pages() / SHARE_OF_ONE_USER;
        while let Some((oldest, _)) = user
            .and_then(|user| self.prefixes.oldest_of(user))
            .filter(|&(_, count)| count > most)
        {
            self.forget(oldest);
        }
    }

    fn drop_use(&mut self, page: u32, now: Duration) {
        let uses = &mut self.uses[page as usize];
        *uses -= 1;
        if *uses > 0 {
            return;
        }
        if self.prefixes.knows(page) {
            self.prefixes.rest(page, now);
        } else {
            self.erase(page);
        }
    }

    /// Erases the pages whose time is over.
    pub(crate) fn expire(&mut self, now: Duration) {
        while let Some((page, since)) = self.prefixes.oldest()
            && self.is_over(since, now)
        {
            self.forget(page);
        }
    }

    /// How long until the next page's time is over, if there is one.
    pub(crate) fn until_next_expires(&self, now: Duration) -> Option<Duration> {
        let (_, since) = self.prefixes.oldest()?;
        Some(since.saturating_add(self.age).saturating_sub(now))
    }

    /// The memory, and where in it the sequences of a batch lie.
    pub(crate) fn locate(&mut self, spans: &[Span]) -> (&mut KvPool, &Spans) {
        self.located.clear();
        for span in spans {
            self.located.push(AttentionSpan {
                rows: span.rows.clone(),
                position: span.first,
                pages: &self.tables[span.slot.0].pages,
            });
        }
        (&mut self.pool, &self.located)
    }

    /// What the kernel makes of the memory, if it says.
    pub(crate) fn memory(&mut self) -> Option<Granted> {
        self.pool.granted().ok()
    }

    /// Bytes of keys and values of one position.
    pub(crate) fn bytes_per_position(&self) -> u64 {
        self.page_bytes / PAGE as u64
    }

    /// Bytes of a page.
    pub(crate) fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Pages in all.
    pub(crate) fn pages(&self) -> usize {
        self.pool.pages()
    }

    /// Bytes that running requests use.
    pub(crate) fn bytes_used(&self) -> u64 {
        (self.pool.pages() - self.available()) as u64 * self.page_bytes
    }

    /// Bytes of unused pages that can be found.
    pub(crate) fn bytes_kept(&self) -> u64 {
        self.prefixes.idle() as u64 * self.page_bytes
    }
}
