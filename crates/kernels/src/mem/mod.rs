//! Anonymous memory for weights, caches and keys: huge pages, kept out of core dumps and (where
//! allowed) out of swap, overwritten before it goes back to the system.
//!
//! No file is ever mapped here, and nothing here knows what the bytes mean.

mod granted;

pub use granted::{Extent, Granted};

use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;

/// Size of a transparent huge page on the platforms we serve; regions of at least this size start
/// on such a boundary.
pub const HUGE_PAGE: usize = 2 << 20;

/// Size of a page.
pub const PAGE: usize = 4096;

/// What a region is for; decides which protections are asked of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Purpose {
    /// Keys and other small secrets: locked in memory, never in a core dump, no huge pages.
    Keys,
    /// Model weights: huge pages, never in a core dump, locked if the limit allows.
    Weights,
    /// Activations, KV cache and other state derived from prompts: as weights.
    State,
    /// Nothing secret (benchmarks): huge pages only.
    Public,
}

/// What the kernel accepted for a region ([`Granted`] says what it did). A refusal is not an error: containers and small
/// `RLIMIT_MEMLOCK` values refuse routinely, and the caller decides how loudly to report it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemReport {
    /// Length in bytes as asked for.
    pub bytes: usize,
    /// `MADV_HUGEPAGE` was accepted (the kernel may still hand out small pages).
    pub huge_pages: bool,
    /// `MADV_DONTDUMP` was accepted.
    pub dump_excluded: bool,
    /// `mlock2(MLOCK_ONFAULT)` was accepted: no page of it reaches swap.
    pub locked: bool,
}

/// Plain data that a [`Region`] may be viewed as.
///
/// # Safety
/// Every bit pattern is a valid value, there is no padding, no interior mutability and no drop
/// glue, and the alignment is at most 4096.
pub unsafe trait Element: Copy + Send + Sync + 'static {}

macro_rules! elements {
    ($($t:ty),*) => { $(
        // SAFETY: a primitive number (or a transparent wrapper around one): any bits, no padding,
        // small alignment.
        unsafe impl Element for $t {}
    )* };
}
elements!(
    u8,
    i8,
    u16,
    i16,
    u32,
    i32,
    u64,
    i64,
    f32,
    f64,
    half::f16,
    half::bf16
);

/// An owned, zero-initialised, page-aligned range of anonymous memory.
///
/// Pages come into being when first written: touch a large region in parallel, from the threads
/// that will use it. On drop every resident page is overwritten with zeros before it is unmapped.
pub struct Region {
    start: NonNull<u8>,
    len: usize,
    mapped: usize,
    report: MemReport,
}

// SAFETY: a Region owns its mapping exclusively, as a Vec<u8> owns its buffer; shared access only
// ever reads.
unsafe impl Send for Region {}
// SAFETY: as above: `&Region` gives out `&[u8]` and nothing else.
unsafe impl Sync for Region {}

impl Region {
    /// Reserves `len` zero bytes. `len` 0 is allowed and maps nothing.
    ///
    /// # Errors
    /// The operating system's refusal of the mapping itself; refusals of advice are in
    /// [`Region::report`].
    pub fn zeroed(len: usize, purpose: Purpose) -> io::Result<Region> {
        let mut report = MemReport {
            bytes: len,
            huge_pages: false,
            dump_excluded: false,
            locked: false,
        };
        if len == 0 {
            return Ok(Region {
                start: NonNull::dangling(),
                len,
                mapped: 0,
                report,
            });
        }
        if len > isize::MAX as usize - 2 * HUGE_PAGE {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        let want_huge = purpose != Purpose::Keys && len >= HUGE_PAGE;
        check_page_size()?;
        let mapped = len.next_multiple_of(PAGE);
        let start = if want_huge {
            map_aligned(mapped, HUGE_PAGE)?
        } else {
            map(mapped)?
        };
        // SAFETY: for all calls below: `start..start + mapped` is a mapping this function has just
        // made and owns; advice and locking change neither its contents nor its validity.
        unsafe {
            let p = start.as_ptr().cast();
            report.huge_pages = want_huge && libc::madvise(p, mapped, libc::MADV_HUGEPAGE) == 0;
            if purpose != Purpose::Public {
                report.dump_excluded = libc::madvise(p, mapped, libc::MADV_DONTDUMP) == 0;
                report.locked = libc::mlock2(p, mapped, libc::MLOCK_ONFAULT) == 0;
            }
        }
        Ok(Region {
            start,
            len,
            mapped,
            report,
        })
    }

    /// Splits the first `len` bytes off as a region of their own, with everything this one was
    /// granted, or returns `None` if there are not so many. Parts are whole pages: this region
    /// shrinks by `len` rounded up to [`PAGE`].
    ///
    /// One large region taken to pieces is how small matrices share huge pages.
    pub fn take(&mut self, len: usize) -> Option<Region> {
        let mapped = len.checked_next_multiple_of(PAGE)?;
        if len > self.len || mapped > self.mapped {
            return None;
        }
        let report = MemReport {
            bytes: len,
            ..self.report
        };
        if mapped == 0 {
            return Some(Region {
                report,
                ..Region::default()
            });
        }
        let part = Region {
            start: self.start,
            len,
            mapped,
            report,
        };
        // The rest begins where the part ends. From here on each unmaps its own pages and nothing
        // else. SAFETY: `mapped <= self.mapped`, so the sum stays inside the mapping or just past
        // its end.
        self.start = unsafe { self.start.add(mapped) };
        self.mapped -= mapped;
        self.len = self.len.saturating_sub(mapped);
        self.report.bytes = self.len;
        Some(part)
    }

    /// [Takes](Region::take) `len` bytes, or reserves new ones if this region has not so many left.
    pub(crate) fn take_or_reserve(&mut self, len: usize, purpose: Purpose) -> io::Result<Region> {
        self.take(len)
            .map_or_else(|| Region::zeroed(len, purpose), Ok)
    }

    /// What the kernel granted.
    pub fn report(&self) -> MemReport {
        self.report
    }

    /// The region as elements of another plain type; a tail shorter than one element is not part of
    /// the view.
    pub fn view<T: Element>(&self) -> &[T] {
        let count = if size_of::<T>() == 0 {
            0
        } else {
            self.len / size_of::<T>()
        };
        if count == 0 {
            return &[];
        }
        assert!(
            self.start.as_ptr().cast::<T>().is_aligned(),
            "a region is page-aligned and Element bounds alignment"
        );
        // SAFETY: the mapping holds `count * size_of::<T>() <= len` initialised bytes (anonymous
        // pages read as zeros), aligned as just checked; Element promises that any bits are a T;
        // `&self` keeps writers out.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast::<T>(), count) }
    }

    /// As [`Region::view`], writable.
    pub fn view_mut<T: Element>(&mut self) -> &mut [T] {
        let count = if size_of::<T>() == 0 {
            0
        } else {
            self.len / size_of::<T>()
        };
        if count == 0 {
            return &mut [];
        }
        assert!(
            self.start.as_ptr().cast::<T>().is_aligned(),
            "a region is page-aligned and Element bounds alignment"
        );
        // SAFETY: as in `view`; `&mut self` makes the access exclusive, and no T written can be an
        // invalid u8.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast::<T>(), count) }
    }

    /// The region as f32; see [`Region::view`].
    pub fn as_f32(&self) -> &[f32] {
        self.view()
    }

    /// The region as writable f32; see [`Region::view`].
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        self.view_mut()
    }

    /// The region as i8; see [`Region::view`].
    pub fn as_i8(&self) -> &[i8] {
        self.view()
    }

    /// Overwrites a range with zeros and keeps its memory, as it was granted. Where it is locked, pages
    /// that were never touched stay so. Where it is not, all are written: a page that is not in memory
    /// may be in swap, and would come back with what it held.
    ///
    /// # Panics
    /// If the range does not lie in the region.
    pub fn clear(&mut self, range: Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "clear {range:?} of a region of {}",
            self.len
        );
        let first = range.start.next_multiple_of(PAGE);
        let last = range.end / PAGE * PAGE;
        if first >= last || !self.report.locked {
            self[range].fill(0);
            // As in `wipe`: nobody may ever read these bytes again.
            std::hint::black_box(self.start.as_ptr());
            return;
        }
        self[range.start..first].fill(0);
        self.wipe(first..last);
        self[last..range.end].fill(0);
    }

    /// Gives the pages that lie wholly inside `range` back to the system, after overwriting them,
    /// and returns how many bytes that were. The whole range reads as zeros afterwards; writing to
    /// it takes fresh pages, which are locked as those before, but may be small ones where they
    /// were a part of a huge one.
    ///
    /// # Panics
    /// If the range does not lie in the region.
    pub fn release(&mut self, range: Range<usize>) -> usize {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "release {range:?} of a region of {}",
            self.len
        );
        if range.is_empty() {
            return 0;
        }
        let first = range.start.next_multiple_of(PAGE);
        // The last page belongs to the region as a whole, so a range that reaches the end takes it
        // along.
        let last = if range.end == self.len {
            self.mapped
        } else {
            range.end / PAGE * PAGE
        };
        self.clear(range);
        if first >= last {
            return 0;
        }
        // SAFETY: `first..last` are whole pages inside this mapping and `&mut self` proves that
        // nobody looks at them. A private anonymous page that was dropped reads as zeros, so every
        // view stays initialised. Locked pages cannot be dropped, hence munlock first; its failure
        // only makes madvise fail, which leaves zeroed pages in place.
        let dropped = unsafe {
            let p = self.start.as_ptr().add(first).cast();
            if self.report.locked {
                libc::munlock(p, last - first);
            }
            let dropped = libc::madvise(p, last - first, libc::MADV_DONTNEED) == 0;
            if self.report.locked {
                self.report.locked = libc::mlock2(p, last - first, libc::MLOCK_ONFAULT) == 0;
            }
            dropped
        };
        if dropped { last - first } else { 0 }
    }

    /// Overwrites resident pages in a page-aligned range with zeros. Pages that were never touched
    /// are left alone: writing zeros to them would make the kernel find memory for them first. So are
    /// pages in swap, which there are only where locking was refused: what was written there stays on
    /// the disk whatever is done here, so a caller unmaps or drops them.
    fn wipe(&mut self, range: Range<usize>) {
        const WINDOW: usize = 4096;
        let mut resident = [0u8; WINDOW];
        let mut at = range.start;
        while at < range.end {
            let bytes = (range.end - at).min(WINDOW * PAGE);
            let pages = bytes.div_ceil(PAGE);
            resident[..pages].fill(1);
            // SAFETY: the window lies inside the mapping; the vector has a byte for each of its
            // pages. When the call fails all pages count as resident.
            unsafe {
                let p = self.start.as_ptr().add(at).cast();
                if libc::mincore(p, bytes, resident.as_mut_ptr()) != 0 {
                    resident[..pages].fill(1);
                }
            }
            for (i, _) in resident[..pages]
                .iter()
                .enumerate()
                .filter(|(_, r)| **r & 1 == 1)
            {
                // SAFETY: page `i` of the window is inside the mapping (`range.end <= mapped`, a
                // multiple of the page size) and exclusively ours.
                unsafe { self.start.as_ptr().add(at + i * PAGE).write_bytes(0, PAGE) };
            }
            at += bytes;
        }
        // The pointer escapes into this and into the system call that follows, so the stores above
        // cannot be dropped.
        std::hint::black_box(self.start.as_ptr());
    }
}

impl Default for Region {
    /// An empty region, which maps nothing.
    fn default() -> Region {
        let report = MemReport {
            bytes: 0,
            huge_pages: false,
            dump_excluded: false,
            locked: false,
        };
        Region {
            start: NonNull::dangling(),
            len: 0,
            mapped: 0,
            report,
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.mapped == 0 {
            return;
        }
        self.wipe(0..self.mapped);
        // SAFETY: the mapping was made by `zeroed`, is owned by this value alone and is never used
        // again. A failure would leak it, already wiped.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.mapped) };
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.view()
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.view_mut()
    }
}

/// Regions are cut at [`PAGE`]; a system with other pages (none that has a TEE on x86) is refused.
fn check_page_size() -> io::Result<()> {
    // SAFETY: sysconf takes no pointers; _SC_PAGESIZE always exists.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    if size == PAGE as libc::c_long {
        Ok(())
    } else {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn map(len: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: a fresh private anonymous mapping at an address of the kernel's choice touches no
    // existing memory.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if p == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(p.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}

/// Maps `len` bytes (a multiple of the page size) at a multiple of `align` by mapping more and
/// giving the ends back.
fn map_aligned(len: usize, align: usize) -> io::Result<NonNull<u8>> {
    let start = map(len + align)?;
    let head = start.as_ptr().align_offset(align);
    let tail = align - head;
    // SAFETY: `head + len + tail` is exactly what was just mapped, and nobody holds a reference
    // into it; the parts given back are whole pages because `align`, `len` and the start are.
    unsafe {
        let aligned = start.as_ptr().add(head);
        if head > 0 {
            libc::munmap(start.as_ptr().cast(), head);
        }
        if tail > 0 {
            libc::munmap(aligned.add(len).cast(), tail);
        }
        Ok(NonNull::new_unchecked(aligned))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resident_bytes(region: &Region) -> usize {
        let mut pages = vec![0u8; region.mapped / PAGE];
        // SAFETY: the region's whole mapping, with one byte per page.
        let rc = unsafe {
            libc::mincore(
                region.start.as_ptr().cast(),
                region.mapped,
                pages.as_mut_ptr(),
            )
        };
        assert_eq!(rc, 0);
        pages.iter().filter(|p| **p & 1 == 1).count() * PAGE
    }

    #[test]
    fn region_is_zeroed_writable_and_aligned() {
        for len in [
            0,
            1,
            4095,
            4096,
            4097,
            HUGE_PAGE - 1,
            HUGE_PAGE,
            3 * HUGE_PAGE + 5,
        ] {
            let mut r = Region::zeroed(len, Purpose::Weights).unwrap();
            assert_eq!(r.len(), len);
            assert!(r.iter().all(|b| *b == 0));
            if len > 0 {
                r[len - 1] = 7;
                r[0] |= 1;
                assert_eq!(r[len - 1] & 7, 7);
                assert_eq!(r.as_ptr().align_offset(4096), 0);
            }
            if len >= HUGE_PAGE {
                assert_eq!(r.as_ptr().align_offset(HUGE_PAGE), 0);
            }
        }
    }

    #[test]
    fn impossible_sizes_are_refused_not_wrapped() {
        assert!(Region::zeroed(usize::MAX, Purpose::Weights).is_err());
        assert!(Region::zeroed(isize::MAX as usize, Purpose::State).is_err());
    }

    #[test]
    fn views_cover_whole_elements_only() {
        let mut r = Region::zeroed(11, Purpose::Keys).unwrap();
        assert_eq!(r.as_f32().len(), 2);
        assert_eq!(r.view::<u64>().len(), 1);
        assert_eq!(r.as_i8().len(), 11);
        r.as_f32_mut()[1] = 1.0;
        assert_eq!(r[4..8], 1.0f32.to_le_bytes());
        assert!(
            Region::zeroed(3, Purpose::Keys)
                .unwrap()
                .as_f32()
                .is_empty()
        );
    }

    #[test]
    fn release_gives_pages_back_and_reads_zero() {
        let mut r = Region::zeroed(4 * HUGE_PAGE, Purpose::Weights).unwrap();
        r.fill(0xAB);
        assert_eq!(resident_bytes(&r), r.len());
        let freed = r.release(100..2 * HUGE_PAGE + 50);
        assert_eq!(freed, 2 * HUGE_PAGE - 4096);
        assert_eq!(resident_bytes(&r), r.len() - freed);
        assert!(r[..100].iter().all(|b| *b == 0xAB));
        assert!(r[100..2 * HUGE_PAGE + 50].iter().all(|b| *b == 0));
        assert!(r[2 * HUGE_PAGE + 50..].iter().all(|b| *b == 0xAB));
        r[4096] = 1;
        assert_eq!(r[4096], 1, "released pages can be used again");
        assert_eq!(r.release(10..20), 0);
        assert_eq!(r.release(0..0), 0);
    }

    #[test]
    fn cleared_memory_is_zero_and_stays_what_it_was() {
        let mut r = Region::zeroed(4 * HUGE_PAGE, Purpose::State).unwrap();
        r[..3 * HUGE_PAGE].fill(0xAB);
        let before = r.extent().granted();
        for range in [100..2 * HUGE_PAGE + 50, 10..20, 0..0] {
            r.clear(range.clone());
            assert!(r[range].iter().all(|b| *b == 0));
        }
        assert!(r[..10].iter().all(|b| *b == 0xAB));
        assert!(
            r[2 * HUGE_PAGE + 50..3 * HUGE_PAGE]
                .iter()
                .all(|b| *b == 0xAB)
        );
        r.clear(3 * HUGE_PAGE..4 * HUGE_PAGE);
        // What is not locked could be in swap, so there the last range is touched, whatever it was.
        if r.report().locked {
            assert_eq!(resident_bytes(&r), 3 * HUGE_PAGE, "untouched pages stay so");
            if let (Ok(before), Ok(after)) = (before, r.extent().granted()) {
                assert_eq!(after, before);
            }
        }
    }

    /// As if it was in swap, which no test can bring about: it is not in memory.
    #[test]
    fn what_is_not_in_memory_is_cleared_unless_it_was_locked() {
        let mut r = Region::zeroed(8 * PAGE + 100, Purpose::Public).unwrap();
        assert!(!r.report().locked);
        assert_eq!(resident_bytes(&r), 0);
        r.clear(PAGE + 7..6 * PAGE + 9);
        assert_eq!(resident_bytes(&r), 6 * PAGE);
        let mut r = Region::zeroed(8 * PAGE + 100, Purpose::State).unwrap();
        let locked = r.report().locked;
        r.clear(PAGE..6 * PAGE);
        assert_eq!(resident_bytes(&r), if locked { 0 } else { 5 * PAGE });
    }

    #[test]
    fn released_memory_is_locked_again() {
        let mut r = Region::zeroed(4 * HUGE_PAGE, Purpose::State).unwrap();
        r.fill(1);
        r.release(PAGE..HUGE_PAGE + 5 * PAGE);
        r.fill(2);
        let locked = r.report().locked;
        if let Ok(granted) = r.extent().granted() {
            assert_eq!(granted.locked, locked);
        }
    }

    #[test]
    fn release_to_the_end_takes_the_partial_last_page() {
        let mut r = Region::zeroed(2 * 4096 + 10, Purpose::State).unwrap();
        r.fill(1);
        assert_eq!(r.release(4096..2 * 4096 + 10), 2 * 4096);
        assert_eq!(resident_bytes(&r), 4096);
    }

    #[test]
    fn wiping_leaves_untouched_pages_untouched() {
        let mut r = Region::zeroed(64 * 4096, Purpose::Keys).unwrap();
        r[5 * 4096 + 3] = 9;
        let mapped = r.mapped;
        let before = resident_bytes(&r);
        r.wipe(0..mapped);
        assert_eq!(resident_bytes(&r), before);
        assert_eq!(r[5 * 4096 + 3], 0);
    }

    #[test]
    fn dumps_are_excluded_for_secrets() {
        let r = Region::zeroed(4096, Purpose::Keys).unwrap();
        assert!(
            r.report().dump_excluded,
            "every Linux since 3.4 accepts MADV_DONTDUMP"
        );
        assert!(!r.report().huge_pages);
    }

    #[test]
    fn parts_are_independent_regions() {
        let mut arena = Region::zeroed(3 * PAGE + 100, Purpose::State).unwrap();
        arena.fill(5);
        let mut a = arena.take(10).unwrap();
        let b = arena.take(PAGE + 1).unwrap();
        assert_eq!((a.len(), b.len(), arena.len()), (10, PAGE + 1, 100));
        assert_eq!((a.mapped, b.mapped, arena.mapped), (PAGE, 2 * PAGE, PAGE));
        assert_eq!(
            a.report(),
            MemReport {
                bytes: 10,
                ..b.report()
            }
        );
        a.fill(7);
        assert!(b.iter().chain(arena.iter()).all(|x| *x == 5));
        drop(a);
        assert!(
            b.iter().chain(arena.iter()).all(|x| *x == 5),
            "dropping a part unmaps its own pages only"
        );
        assert!(arena.take(101).is_none());
        let rest = arena.take(100).unwrap();
        assert_eq!((rest.len(), arena.len(), arena.mapped), (100, 0, 0));
        drop(arena);
        drop(b);
        assert_eq!(rest[99], 5);
        assert!(Region::default().take(1).is_none());
        assert_eq!(Region::default().take(0).unwrap().len(), 0);
    }

    #[test]
    #[should_panic(expected = "release")]
    fn release_outside_the_region_panics() {
        Region::zeroed(4096, Purpose::State)
            .unwrap()
            .release(0..4097);
    }
}
