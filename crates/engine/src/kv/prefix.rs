//! Which full pages can be found again: by the user who had them computed, the adapter that they
//! were computed with, and every token from position 0 on. Nothing else leads to a page, so what one user's prompts were is out of reach of
//! every other's.
//!
//! Pages form a tree for each user, a page below the one before it. Whoever uses a page uses all
//! pages above it, so the pages that nobody uses lie at the leaves, and the one unused for longest
//! always is a leaf.

use std::time::Duration;

use casemate_kernels::attention::PAGE;

use crate::adapters::AdapterIndex;
use crate::request::User;

/// No page.
const NONE: u32 = u32::MAX;

/// Whose a page is, and what its keys and values follow from besides the model and its tokens.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) user: User,
    pub(super) adapter: Option<AdapterIndex>,
}

/// What is known of a page that can be found.
struct Node {
    origin: Option<Origin>,
    parent: u32,
    /// The first page below, and the next one beside.
    child: u32,
    sibling: u32,
    tokens: [u32; PAGE],
    /// Since when nobody uses it, and its neighbours in the list of such pages.
    idle_since: Option<Duration>,
    older: u32,
    newer: u32,
}

const EMPTY: Node = Node {
    origin: None,
    parent: NONE,
    child: NONE,
    sibling: NONE,
    tokens: [0; PAGE],
    idle_since: None,
    older: NONE,
    newer: NONE,
};

/// The pages that can be found. A page that cannot has an empty node.
pub(super) struct Prefixes {
    nodes: Vec<Node>,
    /// The first of all pages that begin a text.
    roots: u32,
    oldest: u32,
    newest: u32,
    idle: usize,
}

impl Prefixes {
    pub(super) fn new(pages: usize) -> Self {
        Self {
            nodes: (0..pages).map(|_| EMPTY).collect(),
            roots: NONE,
            oldest: NONE,
            newest: NONE,
            idle: 0,
        }
    }

    fn node(&mut self, page: u32) -> &mut Node {
        &mut self.nodes[page as usize]
    }

    /// The page of `origin` that holds these tokens, behind the page `parent` or at the beginning.
    pub(super) fn find(&self, origin: Origin, parent: Option<u32>, tokens: &[u32]) -> Option<u32> {
        let mut page = match parent {
            None => self.roots,
            Some(parent) => self.nodes[parent as usize].child,
        };
        while page != NONE {
            let node = &self.nodes[page as usize];
            if node.origin == Some(origin) && node.tokens == *tokens {
                return Some(page);
            }
            page = node.sibling;
        }
        None
    }

    /// Makes a page known, behind `parent`, which is known.
    pub(super) fn insert(
        &mut self,
        page: u32,
        origin: Origin,
        parent: Option<u32>,
        tokens: &[u32],
    ) {
        let beside = match parent {
            None => std::mem::replace(&mut self.roots, page),
            Some(parent) => std::mem::replace(&mut self.node(parent).child, page),
        };
        let node = self.node(page);
        debug_assert!(node.origin.is_none(), "page {page} is known already");
        node.origin = Some(origin);
        node.parent = parent.unwrap_or(NONE);
        node.sibling = beside;
        node.tokens.copy_from_slice(tokens);
    }

    /// Forgets a page that nobody uses and that has no page below it.
    pub(super) fn remove(&mut self, page: u32) {
        debug_assert_eq!(
            self.nodes[page as usize].child, NONE,
            "page {page} is no leaf"
        );
        self.wake(page);
        let Node {
            parent, sibling, ..
        } = std::mem::replace(self.node(page), EMPTY);
        let mut link = match parent {
            NONE => &mut self.roots,
            parent => &mut self.nodes[parent as usize].child,
        };
        while *link != page {
            let next = *link as usize;
            link = &mut self.nodes[next].sibling;
        }
        *link = sibling;
    }

    /// Whether a page can be found.
    pub(super) fn knows(&self, page: u32) -> bool {
        self.nodes[page as usize].origin.is_some()
    }

    /// Records that nobody uses a known page any more.
    pub(super) fn rest(&mut self, page: u32, now: Duration) {
        let newest = std::mem::replace(&mut self.newest, page);
        let node = self.node(page);
        debug_assert!(node.origin.is_some() && node.idle_since.is_none());
        node.idle_since = Some(now);
        node.older = newest;
        match newest {
            NONE => self.oldest = page,
            newest => self.node(newest).newer = page,
        }
        self.idle += 1;
    }

    /// Records that somebody uses a known page, again or still.
    pub(super) fn wake(&mut self, page: u32) {
        let node = self.node(page);
        if node.idle_since.take().is_none() {
            return;
        }
        let older = std::mem::replace(&mut node.older, NONE);
        let newer = std::mem::replace(&mut node.newer, NONE);
        match older {
            NONE => self.oldest = newer,
            older => self.node(older).newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.node(newer).older = older,
        }
        self.idle -= 1;
    }

    /// Known pages that nobody uses.
    pub(super) fn idle(&self) -> usize {
        self.idle
    }

    /// Since when nobody uses a page, which is known.
    pub(super) fn idle_since(&self, page: u32) -> Option<Duration> {
        self.nodes[page as usize].idle_since
    }

    /// The page unused for longest, and since when. It is a leaf.
    pub(super) fn oldest(&self) -> Option<(u32, Duration)> {
        let node = self.nodes.get(self.oldest as usize)?;
        Some((self.oldest, node.idle_since?))
    }

    /// The page of `user` unused for longest, which is a leaf, and how many of the user's are unused.
    pub(super) fn oldest_of(&self, user: User) -> Option<(u32, usize)> {
        let mut found = None;
        let mut page = self.oldest;
        while page != NONE {
            let node = &self.nodes[page as usize];
            if node.origin.is_some_and(|origin| origin.user == user) {
                let (first, count) = found.unwrap_or((page, 0));
                found = Some((first, count + 1));
            }
            page = node.newer;
        }
        found
    }
}
