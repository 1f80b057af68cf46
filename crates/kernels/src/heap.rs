//! A global allocator that counts, for tests and measurements of loops that claim to allocate
//! nothing. Programs that do not name it as theirs have nothing of it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

/// The system's allocator, which counts how often it is called.
///
/// ```
/// use casemate_kernels::heap::CountingHeap;
///
/// #[global_allocator]
/// static HEAP: CountingHeap = CountingHeap::new();
///
/// let before = HEAP.calls();
/// drop(Box::new(7));
/// assert_eq!(HEAP.calls(), before + 2);
/// ```
pub struct CountingHeap {
    calls: AtomicU64,
}

impl CountingHeap {
    /// A heap that was never called.
    #[expect(
        clippy::new_without_default,
        reason = "it is made in a constant expression"
    )]
    pub const fn new() -> CountingHeap {
        CountingHeap {
            calls: AtomicU64::new(0),
        }
    }

    /// How often any thread has allocated, resized or freed memory so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    fn count(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator as it is; counting neither allocates nor
// unwinds.
unsafe impl GlobalAlloc for CountingHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.count();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.count();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.count();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        self.count();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(block, layout) }
    }
}
