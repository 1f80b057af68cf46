//! Where keys and values lie, and how they get there.
//!
//! ```text
//! page: for each layer, for each key/value head:
//!   f32, f16   keys    head_dim x 64 elements    row d: element d of positions 0..64
//!              values  64 x padded elements      row p: the value of position p, zero-padded to a multiple of 16
//!   bf16       keys    (head_dim / 2, rounded up) x 64 x 2 elements: pair q of position p holds elements 2q and 2q + 1
//!              values  32 x padded x 2 elements: pair r holds, element by element, positions 2r and 2r + 1
//!   int8       64 x f32   scale of each position's key
//!              keys       (head_dim / 4, rounded up) x 64 x 4 bytes, each 128 above the quant:
//!                         quad q of position p holds elements 4q..4q+4
//!              64 x f32   scale of each position's value
//!              values     32 x padded x 2 quants, in pairs as of bf16
//! ```
//! Rows of keys hold positions, so that sixteen scores need no sum over lanes.

use std::io;

use half::f16;

use super::quant::quantise;
use super::{MAX_HEAD_DIM, PAGE, Spans};
use crate::cpu::Kernel;
use crate::isa::{LANES, Simd};
use crate::mem::{Element, Granted, MemReport, Purpose, Region};
use crate::panels::round_bf16;
use crate::rotate::Rotation;
use crate::team::{SharedMut, Team};

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    /// Exactly as computed.
    F32,
    /// Rounded to half precision: half the memory and memory traffic.
    F16,
    /// Rounded to bfloat16: as small as `F16`, with the range of `F32` and 8 instead of 11 bits.
    /// Queries and attention's weights are rounded as well, and multiplied in pairs.
    Bf16,
    /// 8-bit integers with one f32 scale for each position's key and one for its value, head by
    /// head. Queries and attention's weights are quantised as well, to 8 and 15 bits.
    Int8,
}

impl KvType {
    /// Every one, the most exact first.
    pub const ALL: [KvType; 4] = [KvType::F32, KvType::F16, KvType::Bf16, KvType::Int8];

    /// `"f32"`, `"f16"`, `"bf16"` or `"int8"`.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
            KvType::Bf16 => "bf16",
            KvType::Int8 => "int8",
        }
    }
}

/// Shape of the cache of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers of the model.
    pub layers: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// Elements of a head, at most [`MAX_HEAD_DIM`].
    pub head_dim: usize,
    /// Storage of elements.
    pub kv_type: KvType,
}

impl KvShape {
    /// Bytes of one page, or `None` for a shape that is empty, too wide, or does not fit the
    /// address space.
    pub fn page_bytes(&self) -> Option<usize> {
        let valid =
            self.layers > 0 && self.kv_heads > 0 && (1..=MAX_HEAD_DIM).contains(&self.head_dim);
        valid
            .then(|| {
                self.layers
                    .checked_mul(self.kv_heads)?
                    .checked_mul(self.head_bytes())
            })
            .flatten()
    }

    fn head_bytes(&self) -> usize {
        self.key_bytes() + self.value_bytes()
    }

    /// Bytes of the keys of one head in a page, their scales included.
    fn key_bytes(&self) -> usize {
        match self.kv_type {
            KvType::F32 => PAGE * self.head_dim * size_of::<f32>(),
            KvType::F16 => PAGE * self.head_dim * size_of::<u16>(),
            KvType::Bf16 => PAGE * self.head_dim.next_multiple_of(2) * size_of::<u16>(),
            KvType::Int8 => SCALES + PAGE * self.head_dim.next_multiple_of(4),
        }
    }

    /// Likewise of the values.
    fn value_bytes(&self) -> usize {
        match self.kv_type {
            KvType::F32 => PAGE * self.padded_dim() * size_of::<f32>(),
            KvType::F16 | KvType::Bf16 => PAGE * self.padded_dim() * size_of::<u16>(),
            KvType::Int8 => SCALES + PAGE * self.padded_dim(),
        }
    }

    pub(super) fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Where a head of a page begins.
    fn head_start(&self, page: usize, layer: usize, kv_head: usize) -> usize {
        ((page * self.layers + layer) * self.kv_heads + kv_head) * self.head_bytes()
    }
}

/// Bytes of the scales of a page's keys, or values, of one head.
const SCALES: usize = PAGE * size_of::<f32>();

/// Memory for the keys and values of all sequences.
pub struct KvPool {
    region: Region,
    shape: KvShape,
    pages: usize,
    /// Of keys and queries, where they are quantised.
    rotation: Option<Rotation>,
}

impl KvPool {
    /// Reserves `pages` pages. They take memory as they are written.
    ///
    /// # Errors
    /// `InvalidInput` for a shape without [`KvShape::page_bytes`] or a size beyond the address
    /// space, otherwise the operating system's refusal.
    pub fn new(shape: KvShape, pages: usize) -> io::Result<KvPool> {
        let bytes = shape
            .page_bytes()
            .and_then(|bytes| bytes.checked_mul(pages));
        let region = Region::zeroed(bytes.ok_or(io::ErrorKind::InvalidInput)?, Purpose::State)?;
        Ok(KvPool {
            region,
            shape,
            pages,
            rotation: (shape.kv_type == KvType::Int8).then(|| Rotation::new(shape.head_dim)),
        })
    }

    /// Pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The shape given at the start.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// What the kernel granted to the memory underneath.
    pub fn memory(&self) -> MemReport {
        self.region.report()
    }

    /// What the kernel makes of the memory underneath, after its first page was brought into being:
    /// before there is nothing to be seen, and all others are as that one.
    ///
    /// # Errors
    /// As [`Extent::granted`](crate::mem::Extent::granted).
    pub fn granted(&mut self) -> io::Result<Granted> {
        if let Some(first) = self.region.first_mut() {
            *first = 0;
        }
        self.region.extent().granted()
    }

    /// Stores the keys and values (`kv_heads * head_dim` a row) of the tokens of `spans`.
    ///
    /// # Panics
    /// If a length, the layer, a row or a page is out of range.
    pub fn write(
        &mut self,
        team: &Team,
        layer: usize,
        spans: &Spans,
        keys: &[f32],
        values: &[f32],
    ) {
        let shape = self.shape;
        let width = shape.kv_heads * shape.head_dim;
        assert_eq!(keys.len(), values.len(), "keys and values have one shape");
        assert!(
            keys.len().is_multiple_of(width),
            "{} is not a number of rows of {width}",
            keys.len()
        );
        assert!(layer < shape.layers, "layer {layer} of {}", shape.layers);
        spans.check(keys.len() / width, self.pages);
        let (isa, rotation) = (team.isa(), &self.rotation);
        let pool = SharedMut::new(self.region.view_mut::<u8>());
        let write_head = |kv_head: usize| {
            for span in spans.iter() {
                for (token, row) in span.rows.clone().enumerate() {
                    let position = span.position + token;
                    let page = span.pages[position / PAGE] as usize;
                    // SAFETY: heads do not overlap, each is written by one call of this closure,
                    // and that call holds one such part at a time.
                    let head = unsafe {
                        pool.slice(shape.head_start(page, layer, kv_head), shape.head_bytes())
                    };
                    let at = (row * shape.kv_heads + kv_head) * shape.head_dim;
                    isa.dispatch(Write {
                        shape,
                        rotation: rotation.as_ref(),
                        head,
                        slot: position % PAGE,
                        key: &keys[at..at + shape.head_dim],
                        value: &values[at..at + shape.head_dim],
                    });
                }
            }
        };
        // Waking the team costs more than writing a handful of tokens.
        const WORTH_SHARING: usize = 1 << 14;
        if keys.len() < WORTH_SHARING {
            (0..shape.kv_heads).for_each(write_head);
        } else {
            team.for_each(shape.kv_heads, write_head);
        }
    }

    /// Copies all layers of page `from` to page `to` (copy on write for sequences that share
    /// pages).
    ///
    /// # Panics
    /// If there is no such page.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let bytes = self.page_bytes();
        let (from, to) = (from as usize, to as usize);
        assert!(
            from < self.pages && to < self.pages,
            "pages {from} and {to} of {}",
            self.pages
        );
        self.region
            .copy_within(from * bytes..(from + 1) * bytes, to * bytes);
    }

    /// Overwrites a page with zeros. Its memory stays: pages share huge pages, which would fall to
    /// pieces if a part of one was given back, and then the next sequence's keys and values would
    /// lie in small ones.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn erase_page(&mut self, page: u32) {
        let bytes = self.page_bytes();
        let page = page as usize;
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.region.clear(page * bytes..(page + 1) * bytes);
    }

    fn page_bytes(&self) -> usize {
        self.shape
            .page_bytes()
            .expect("checked when the pool was made")
    }

    /// The keys of one head of one page as numbers.
    #[inline(always)]
    pub(super) fn keys<E: Element>(
        &self,
        page: u32,
        layer: usize,
        kv_head: usize,
    ) -> &[[E; LANES]] {
        let start = self.shape.head_start(page as usize, layer, kv_head);
        self.part(start, self.shape.key_bytes()).as_chunks().0
    }

    /// The values of one head of one page as numbers.
    #[inline(always)]
    pub(super) fn values<E: Element>(
        &self,
        page: u32,
        layer: usize,
        kv_head: usize,
    ) -> &[[E; LANES]] {
        let start = self.shape.head_start(page as usize, layer, kv_head) + self.shape.key_bytes();
        self.part(start, self.shape.value_bytes()).as_chunks().0
    }

    /// The keys of one head of one page: four lines to each pair of elements.
    #[inline(always)]
    pub(super) fn bf16_keys(&self, page: u32, layer: usize, kv_head: usize) -> &[[u8; 64]] {
        self.bytes(page, layer, kv_head).0.as_chunks().0
    }

    /// The values of one head of one page: `padded_dim / 16` lines to each pair of positions.
    #[inline(always)]
    pub(super) fn bf16_values(&self, page: u32, layer: usize, kv_head: usize) -> &[[u8; 64]] {
        self.bytes(page, layer, kv_head).1.as_chunks().0
    }

    /// The scales of the keys of one head of one page, and their lines: four to each quad.
    #[inline(always)]
    pub(super) fn int8_keys(
        &self,
        page: u32,
        layer: usize,
        kv_head: usize,
    ) -> (&[[f32; LANES]], &[[u8; 64]]) {
        let start = self.shape.head_start(page as usize, layer, kv_head);
        let lines = self.part(start + SCALES, self.shape.key_bytes() - SCALES);
        (self.part(start, SCALES).as_chunks().0, lines.as_chunks().0)
    }

    /// The scales of the values of one head of one page, and their pairs: `padded_dim / 16` parts
    /// to each.
    #[inline(always)]
    pub(super) fn int8_values(
        &self,
        page: u32,
        layer: usize,
        kv_head: usize,
    ) -> (&[[f32; LANES]], &[[i8; 2 * LANES]]) {
        let start = self.shape.head_start(page as usize, layer, kv_head) + self.shape.key_bytes();
        let pairs = self.part(start + SCALES, self.shape.value_bytes() - SCALES);
        (self.part(start, SCALES).as_chunks().0, pairs.as_chunks().0)
    }

    /// What keys were rotated by.
    #[inline(always)]
    pub(super) fn rotation(&self) -> Option<&Rotation> {
        self.rotation.as_ref()
    }

    /// All bytes of the keys, and of the values, of one head of one page.
    #[inline(always)]
    pub(super) fn bytes(&self, page: u32, layer: usize, kv_head: usize) -> (&[u8], &[u8]) {
        let start = self.shape.head_start(page as usize, layer, kv_head);
        self.part(start, self.shape.head_bytes())
            .split_at(self.shape.key_bytes())
    }

    /// `bytes` bytes from `start`; both are multiples of the element's size.
    #[inline(always)]
    fn part<E: Element>(&self, start: usize, bytes: usize) -> &[E] {
        &self.region.view::<E>()[start / size_of::<E>()..(start + bytes) / size_of::<E>()]
    }
}

/// The bytes of a bf16.
fn half(x: f32) -> [u8; 2] {
    (round_bf16(x) as u16).to_ne_bytes()
}

/// Stores the key and the value of one position in its head.
struct Write<'a> {
    shape: KvShape,
    rotation: Option<&'a Rotation>,
    head: &'a mut [u8],
    slot: usize,
    key: &'a [f32],
    value: &'a [f32],
}

impl Kernel for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        match self.shape.kv_type {
            KvType::F32 => self.floats(f32::to_ne_bytes),
            KvType::F16 => self.floats(|x| f16::from_f32(x).to_ne_bytes()),
            KvType::Bf16 => self.pairs(),
            KvType::Int8 => self.int8(v),
        }
    }
}

impl Write<'_> {
    fn floats<const SIZE: usize>(self, bytes: impl Fn(f32) -> [u8; SIZE]) {
        let (keys, values) = self.head.split_at_mut(self.shape.key_bytes());
        let (keys, values) = (keys.as_chunks_mut().0, values.as_chunks_mut().0);
        for (row, x) in keys.chunks_exact_mut(PAGE).zip(self.key) {
            row[self.slot] = bytes(*x);
        }
        let row = &mut values[self.slot * self.shape.padded_dim()..];
        for (to, x) in row.iter_mut().zip(self.value) {
            *to = bytes(*x);
        }
    }

    fn pairs(self) {
        let (keys, values) = self.head.split_at_mut(self.shape.key_bytes());
        let keys = keys.as_chunks_mut::<2>().0;
        for (d, x) in self.key.iter().enumerate() {
            keys[(d / 2 * PAGE + self.slot) * 2 + d % 2] = half(*x);
        }
        let row = self.slot / 2 * self.shape.padded_dim();
        let row = &mut values.as_chunks_mut::<2>().0[2 * row + self.slot % 2..];
        for (to, x) in row.iter_mut().step_by(2).zip(self.value) {
            *to = half(*x);
        }
    }

    #[inline(always)]
    fn int8<V: Simd>(self, v: V) {
        let mut quants = [0i8; MAX_HEAD_DIM];
        let (keys, values) = self.head.split_at_mut(self.shape.key_bytes());

        let (scales, quads) = keys.split_at_mut(SCALES);
        let mut rotated = [0f32; MAX_HEAD_DIM];
        let key = &mut rotated[..self.key.len()];
        key.copy_from_slice(self.key);
        if let Some(rotation) = self.rotation {
            rotation.apply_with(v, key);
        }
        let scale = quantise(v, key, &mut quants);
        scales.as_chunks_mut().0[self.slot] = scale.to_ne_bytes();
        let quads = quads.as_chunks_mut::<4>().0.chunks_exact_mut(PAGE);
        for (quad, quants) in quads.zip(quants.as_chunks::<4>().0) {
            quad[self.slot] = quants.map(|q| q as u8 ^ 0x80);
        }

        let (scales, pairs) = values.split_at_mut(SCALES);
        let scale = quantise(v, self.value, &mut quants);
        scales.as_chunks_mut().0[self.slot] = scale.to_ne_bytes();
        let pairs = pairs.as_chunks_mut::<2>().0;
        let row = &mut pairs[self.slot / 2 * self.shape.padded_dim()..];
        for (pair, q) in row.iter_mut().zip(&quants[..self.value.len()]) {
            pair[self.slot % 2] = *q as u8;
        }
    }
}
