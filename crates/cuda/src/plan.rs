//! Sizes of tiles, launches and memory, as `kernels/product.cu` has them. Nothing here needs a GPU.

use casemate_field::Field;
use casemate_field::digits::DIGITS;

/// Rows of weights and of digits are padded with zeros to whole multiples of so many columns, the narrowest piece that
/// kernels take at once.
const PADDING: u32 = 64;

/// Rows of elements are padded to multiples of so many.
const GROUP: u32 = 4;

/// Columns of one thread of `split`.
const SPLIT_COLUMNS: u32 = 4;

/// Threads of a block of `split`.
const SPLIT_THREADS: u32 = 256;

/// Blocks in the second direction.
const MOST_ROWS: u32 = 65_535;

/// What a driver gives memory in, at least for allocations of half of it and more.
const GRANULE: u64 = 2 << 20;

/// And for smaller ones.
const SMALL_GRANULE: u64 = 512;

/// Bytes of a row of weights or digits; none for no columns, or for more than either field takes.
#[must_use]
pub fn width(columns: u32) -> Option<u32> {
    let fits = Field::for_width(columns as usize).is_some();
    fits.then(|| columns.next_multiple_of(PADDING))
}

/// Bytes of device memory that a matrix takes; none if it cannot be kept.
#[must_use]
pub fn matrix_bytes(outputs: u32, columns: u32) -> Option<u64> {
    let bytes = u64::from(outputs) * u64::from(width(columns)?);
    let granule = if bytes < GRANULE / 2 {
        SMALL_GRANULE
    } else {
        GRANULE
    };
    (bytes > 0).then(|| bytes.next_multiple_of(granule))
}

/// Words of the digits of so many rows.
pub(crate) fn digit_words(rows: u32, width: u32) -> usize {
    rows.next_multiple_of(GROUP) as usize * DIGITS * (width / 4) as usize
}

/// A kernel that makes products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// `dp4a`, one row.
    Few1,
    /// `dp4a`, two rows.
    Few2,
    /// `dp4a`, three or four rows.
    Few4,
    /// Tensor cores, tiles of 32 outputs by 16 rows.
    Narrow,
    /// Tensor cores, tiles of 128 outputs by 32 rows.
    Wide,
}

impl Kernel {
    /// All.
    pub const ALL: [Kernel; 5] = [
        Kernel::Few1,
        Kernel::Few2,
        Kernel::Few4,
        Kernel::Narrow,
        Kernel::Wide,
    ];

    /// The name in `product.cu`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Few1 => "few_1",
            Kernel::Few2 => "few_2",
            Kernel::Few4 => "few_4",
            Kernel::Narrow => "narrow",
            Kernel::Wide => "wide",
        }
    }

    /// Outputs and rows of one block, and its threads.
    fn tile(self) -> (u32, u32, u32) {
        match self {
            Kernel::Few1 => (16, 1, 128),
            Kernel::Few2 => (16, 2, 128),
            Kernel::Few4 => (16, 4, 128),
            Kernel::Narrow => (32, 16, 128),
            Kernel::Wide => (128, 32, 256),
        }
    }

    fn blocks(self, rows: u32, outputs: u32) -> u64 {
        let (tile_outputs, tile_rows, _) = self.tile();
        u64::from(rows.div_ceil(tile_rows)) * u64::from(outputs.div_ceil(tile_outputs))
    }
}

/// How a product is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// What.
    pub kernel: Kernel,
    /// Blocks, in one direction.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
}

/// How the product of so many rows with a matrix of so many outputs is launched on a GPU of so many multiprocessors; none if
/// there is nothing to do, or too much.
///
/// Few rows are bound by reading weights. Of four digits of four rows, `dp4a` takes about the time that memory takes,
/// which is why tensor cores take over from there. Their large tiles use them better, if there are enough of them for all
/// multiprocessors; small tiles read weights once for sixteen rows.
#[must_use]
pub fn launch(rows: u32, outputs: u32, processors: u32) -> Option<Launch> {
    let kernel = match rows {
        0 => return None,
        1 => Kernel::Few1,
        2 => Kernel::Few2,
        3..=4 => Kernel::Few4,
        _ if Kernel::Wide.blocks(rows, outputs) >= u64::from(processors) => Kernel::Wide,
        _ => Kernel::Narrow,
    };
    let blocks = i32::try_from(kernel.blocks(rows, outputs)).ok()?;
    let (_, _, threads) = kernel.tile();
    (blocks > 0 && rows.next_multiple_of(GROUP) <= MOST_ROWS).then(|| Launch {
        kernel,
        blocks: blocks.unsigned_abs(),
        threads,
    })
}

/// Blocks of `split` in two directions, and threads of each.
pub(crate) fn split(rows: u32, width: u32) -> ((u32, u32), u32) {
    let blocks = (width / SPLIT_COLUMNS).div_ceil(SPLIT_THREADS);
    ((blocks, rows.next_multiple_of(GROUP)), SPLIT_THREADS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_chosen_by_rows_and_by_how_many_blocks_there_would_be() {
        let kernel = |rows, outputs| launch(rows, outputs, 132).map(|launch| launch.kernel);
        assert_eq!(kernel(1, 1), Some(Kernel::Few1));
        assert_eq!(kernel(2, 4096), Some(Kernel::Few2));
        assert_eq!(kernel(3, 4096), Some(Kernel::Few4));
        assert_eq!(kernel(4, 4096), Some(Kernel::Few4));
        assert_eq!(kernel(5, 4096), Some(Kernel::Narrow));
        // 32 tiles of outputs by 4 of rows are too few, by 5 enough.
        assert_eq!(kernel(128, 4096), Some(Kernel::Narrow));
        assert_eq!(kernel(129, 4096), Some(Kernel::Wide));
        assert_eq!(kernel(5, 32_000), Some(Kernel::Wide));
        assert_eq!(kernel(0, 4096), None);
        assert_eq!(kernel(1, 0), None);
    }

    #[test]
    fn every_output_of_every_row_is_in_a_block() {
        for kernel in Kernel::ALL {
            let (outputs, rows, _) = kernel.tile();
            assert_eq!(kernel.blocks(rows, outputs), 1);
            assert_eq!(kernel.blocks(rows + 1, outputs), 2);
            assert_eq!(kernel.blocks(rows, outputs + 1), 2);
        }
        // The largest that a worker is ever asked for: 8 MiB of elements each way.
        assert!(launch(1, 2 << 20, 1).is_some());
        assert!(launch(1024, 2048, 1000).is_some());
        assert_eq!(launch(65_536, 1, 1), None);
        assert_eq!(launch(65_535, 1, 1), None);
        assert!(launch(65_532, 1, 1).is_some());
    }

    #[test]
    fn rows_are_padded_and_matrices_take_what_a_driver_gives() {
        assert_eq!(width(0), None);
        assert_eq!(width(1), Some(64));
        assert_eq!(width(64), Some(64));
        assert_eq!(width(65), Some(128));
        assert_eq!(width(66_572), Some(66_624));
        assert_eq!(width(66_573), None);
        assert_eq!(matrix_bytes(1, 1), Some(512));
        assert_eq!(matrix_bytes(4096, 4096), Some(16 << 20));
        assert_eq!(matrix_bytes(4097, 4096), Some(18 << 20));
        assert_eq!(matrix_bytes(0, 1), None);
        assert_eq!(matrix_bytes(1, 66_573), None);
        assert!(matrix_bytes(u32::MAX, 66_572).is_some());
        assert_eq!(digit_words(5, 128), 8 * 4 * 32);
        assert_eq!(split(5, 1088), ((2, 8), 256));
    }
}
