//! The five instructions in plain code, after the manual's pseudo-code, and stricter: what a processor
//! would refuse or leave undefined panics.

use half::bf16;

use super::{Config, ROW_BYTES, ROWS, Tiles};

/// Tile registers that any machine has.
pub(crate) struct Interpreter {
    config: Option<Config>,
    tiles: [[[u8; ROW_BYTES]; ROWS]; 8],
}

impl Interpreter {
    pub(crate) fn new() -> Interpreter {
        Interpreter {
            config: None,
            tiles: [[[0; ROW_BYTES]; ROWS]; 8],
        }
    }

    fn size(&self, tile: u8) -> (usize, usize) {
        let config = self.config.as_ref().expect("tiles are configured");
        let size = config.tile(tile.into());
        assert!(size.0 > 0 && size.1 > 0, "tile {tile} is not in use");
        size
    }

    /// Rows of `c`, columns of `c` (words), rows of `b`.
    fn shapes<const C: u8, const A: u8, const B: u8>(&self) -> (usize, usize, usize) {
        let (c, a, b) = (self.size(C), self.size(A), self.size(B));
        assert!(
            C != A && C != B && A != B,
            "the manual refuses one tile twice"
        );
        assert_eq!(c.0, a.0, "rows of the sums and of the first factor");
        assert_eq!(c.1, b.1, "columns of the sums and of the second factor");
        assert_eq!(
            a.1,
            b.0 * 4,
            "columns of the first factor and rows of the second"
        );
        (c.0, c.1 / 4, b.0)
    }

    fn word(&self, tile: u8, row: usize, word: usize) -> [u8; 4] {
        self.tiles[usize::from(tile)][row].as_chunks::<4>().0[word]
    }

    fn set(&mut self, tile: u8, row: usize, word: usize, to: [u8; 4]) {
        self.tiles[usize::from(tile)][row].as_chunks_mut::<4>().0[word] = to;
    }
}

/// Subnormal numbers are zeros of their sign.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() {
        0f32.copysign(x)
    } else {
        x
    }
}

fn pair(word: [u8; 4]) -> [f32; 2] {
    let [a, b, c, d] = word;
    [[a, b], [c, d]].map(|x| flushed(bf16::from_le_bytes(x).to_f32()))
}

// SAFETY: rows are read and written where the methods say.
unsafe impl Tiles for Interpreter {
    fn configure(&mut self, config: &Config) {
        self.config = Some(*config);
        self.tiles = [[[0; ROW_BYTES]; ROWS]; 8];
    }

    unsafe fn load<const TILE: u8>(&mut self, from: *const u8, stride: usize) {
        let (rows, bytes) = self.size(TILE);
        let tile = &mut self.tiles[usize::from(TILE)];
        *tile = [[0; ROW_BYTES]; ROWS];
        for (i, row) in tile[..rows].iter_mut().enumerate() {
            // SAFETY: the caller answers for each row.
            unsafe {
                from.add(i * stride)
                    .copy_to_nonoverlapping(row.as_mut_ptr(), bytes)
            };
        }
    }

    unsafe fn store<const TILE: u8>(&self, to: *mut u8, stride: usize) {
        let (rows, bytes) = self.size(TILE);
        for (i, row) in self.tiles[usize::from(TILE)][..rows].iter().enumerate() {
            // SAFETY: the caller answers for each row.
            unsafe {
                to.add(i * stride)
                    .copy_from_nonoverlapping(row.as_ptr(), bytes)
            };
        }
    }

    unsafe fn dot_int8<const C: u8, const A: u8, const B: u8>(&mut self) {
        let (rows, columns, depth) = self.shapes::<C, A, B>();
        for m in 0..rows {
            for k in 0..depth {
                for n in 0..columns {
                    let a = self.word(A, m, k).map(|a| i32::from(a as i8));
                    let b = self.word(B, k, n).map(i32::from);
                    let dot: i32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                    let sum = i32::from_le_bytes(self.word(C, m, n)).wrapping_add(dot);
                    self.set(C, m, n, sum.to_le_bytes());
                }
            }
        }
    }

    unsafe fn dot_bf16<const C: u8, const A: u8, const B: u8>(&mut self) {
        let (rows, columns, depth) = self.shapes::<C, A, B>();
        for m in 0..rows {
            for n in 0..columns {
                let mut sums = [0f32; 2];
                for k in 0..depth {
                    let (a, b) = (pair(self.word(A, m, k)), pair(self.word(B, k, n)));
                    for i in 0..2 {
                        sums[i] = flushed(a[i].mul_add(b[i], sums[i]));
                    }
                }
                let both = flushed(sums[0] + sums[1]);
                let so_far = flushed(f32::from_le_bytes(self.word(C, m, n)));
                let sum = flushed(so_far + both);
                self.set(C, m, n, sum.to_le_bytes());
            }
        }
    }

    fn release(&mut self) {
        self.config = None;
    }
}
