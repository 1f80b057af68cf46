//! Who may use which pages of the KV cache. Memory is set aside once; a request reserves all pages
//! it may come to need when it starts, so that none runs out half-way. Layout and arithmetic of
//! pages are the kernels'.

use casemate_container::ModelConfig;
use casemate_kernels::attention::{KvPool, KvShape, KvType, PAGE, Span as AttentionSpan, Spans};
use casemate_kernels::mem::Granted;

use crate::error::LoadError;
use crate::model::Span;

/// Default limit where the caller sets none.
const DEFAULT_BYTES: u64 = 1 << 30;

/// A running request's place in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot(usize);

/// The pages and their owners.
pub(crate) struct KvCache {
    pool: KvPool,
    page_bytes: u64,
    free: Vec<u32>,
    /// Pages of each slot in the order of positions; an empty list is a free slot.
    owned: Vec<Vec<u32>>,
    /// Where the sequences of the last batch lie.
    located: Spans,
}

impl KvCache {
    /// A cache of `kv_type` for `slots` requests of up to `context` tokens in `bytes` (or the default), at least
    /// one whole context.
    pub(crate) fn new(
        config: &ModelConfig,
        kv_type: KvType,
        context: usize,
        slots: usize,
        bytes: Option<u64>,
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
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        let pool = KvPool::new(shape, pages as usize)?;
        Ok(Self {
            pool,
            page_bytes,
            free: (0..pages).rev().collect(),
            owned: vec![Vec::new(); slots],
            located: Spans::with_capacity(slots, pages as usize),
        })
    }

    /// Sets pages aside for `positions` positions. `None`: not now.
    pub(crate) fn reserve(&mut self, positions: usize) -> Option<Slot> {
        let count = positions.div_ceil(PAGE).max(1);
        let slot = self.owned.iter().position(Vec::is_empty)?;
        let left = self.free.len().checked_sub(count)?;
        self.owned[slot].extend(self.free.drain(left..).rev());
        Some(Slot(slot))
    }

    /// Erases and returns a slot's pages.
    pub(crate) fn release(&mut self, slot: Slot) {
        for page in std::mem::take(&mut self.owned[slot.0]).into_iter().rev() {
            self.pool.erase_page(page);
            self.free.push(page);
        }
    }

    /// The memory, and where in it the sequences of a batch lie.
    pub(crate) fn locate(&mut self, spans: &[Span]) -> (&mut KvPool, &Spans) {
        self.located.clear();
        for span in spans {
            self.located.push(AttentionSpan {
                rows: span.rows.clone(),
                position: span.first,
                pages: &self.owned[span.slot.0],
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

    /// Bytes set aside in all.
    pub(crate) fn bytes(&self) -> u64 {
        self.pool.pages() as u64 * self.page_bytes
    }

    /// Bytes that running requests have reserved.
    pub(crate) fn bytes_used(&self) -> u64 {
        (self.pool.pages() - self.free.len()) as u64 * self.page_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_container::{Family, RopeLayout, RopeScaling};

    fn config() -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
            hidden: 8,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            ffn: 8,
            vocab: 8,
            context: 1000,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            rope_layout: RopeLayout::Half,
            sliding_window: None,
            tied_embeddings: true,
            qkv_bias: false,
            bos: None,
            eos: vec![],
            add_bos: false,
        }
    }

    /// Keys 4 wide, values padded to 16, f32, two layers.
    const PAGE_BYTES: u64 = (PAGE * (4 + 16) * 4 * 2) as u64;

    #[test]
    fn pages_have_one_owner_and_come_back() {
        let mut cache = KvCache::new(
            &config(),
            KvType::F32,
            4 * PAGE,
            3,
            Some(5 * PAGE_BYTES + 1),
        )
        .unwrap();
        assert_eq!(cache.bytes(), 5 * PAGE_BYTES);
        let a = cache.reserve(2 * PAGE).unwrap();
        let b = cache.reserve(2 * PAGE + 1).unwrap();
        let mut owned = [&cache.owned[a.0][..], &cache.owned[b.0]].concat();
        owned.sort_unstable();
        assert_eq!(owned, [0, 1, 2, 3, 4]);
        assert_eq!(cache.bytes_used(), 5 * PAGE_BYTES);
        assert_eq!(cache.reserve(1), None, "no page is left");
        cache.release(a);
        let c = cache.reserve(1).unwrap();
        assert_eq!(cache.owned[c.0].len(), 1);
        let d = cache.reserve(1).unwrap();
        assert_ne!(c, d);
        cache.release(d);
        cache.release(b);
        cache.release(c);
        assert_eq!(cache.bytes_used(), 0);
    }

    #[test]
    fn slots_limit_the_batch() {
        let mut cache = KvCache::new(&config(), KvType::F32, PAGE, 2, None).unwrap();
        assert_eq!(cache.bytes(), 2 * PAGE_BYTES);
        cache.reserve(1).unwrap();
        cache.reserve(1).unwrap();
        assert_eq!(cache.reserve(1), None);
    }

    #[test]
    fn refuses_less_than_one_context() {
        let given = 4 * PAGE_BYTES - 1;
        match KvCache::new(&config(), KvType::F32, 4 * PAGE, 3, Some(given)) {
            Err(LoadError::KvBudget {
                context,
                needed,
                given: g,
            }) => {
                assert_eq!((context, needed, g), (4 * PAGE, 4 * PAGE_BYTES, given));
            }
            other => panic!("{:?}", other.map(|c| c.bytes())),
        }
    }

    #[test]
    fn released_pages_forget_their_values() {
        use casemate_kernels::attention::{Attention, AttentionScratch};
        use casemate_kernels::team::Team;

        let team = Team::new(1).unwrap();
        let mut cache = KvCache::new(&config(), KvType::F32, PAGE, 1, None).unwrap();
        let attention = Attention {
            layer: 1,
            heads: 1,
            scale: 1.0,
            window: None,
        };
        let seen = |cache: &mut KvCache, slot: Slot, write: bool| {
            let span = Span {
                slot,
                first: 0,
                rows: 0..1,
                wanted: crate::model::Wanted::None,
            };
            let (pool, spans) = cache.locate(std::slice::from_ref(&span));
            if write {
                pool.write(&team, 1, spans, &[1.0; 4], &[5.0; 4]);
            }
            let mut out = [9.0; 4];
            let mut scratch = AttentionScratch::new(1, 1, 4, PAGE).unwrap();
            attention.run(&team, pool, &mut scratch, spans, &[1.0; 4], &mut out);
            out
        };
        let first = cache.reserve(1).unwrap();
        assert_eq!(seen(&mut cache, first, true), [5.0; 4]);
        cache.release(first);
        let second = cache.reserve(1).unwrap();
        assert_eq!(seen(&mut cache, second, false), [0.0; 4]);
    }
}
