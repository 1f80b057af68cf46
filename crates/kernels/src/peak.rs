//! How fast this machine computes from registers: the limit that products are measured against.

use std::hint::black_box;
use std::time::Instant;

use crate::cpu::Kernel;
use crate::isa::{LANES, Simd};
use crate::team::Team;

/// 10^9 operations a second of the whole team in f32 multiply-adds (two operations each) that touch
/// no memory.
pub fn measure_f32(team: &Team) -> f64 {
    measure(team, 2 * LANES, |rounds| Chains {
        rounds,
        int8: false,
    })
}

/// 10^9 operations a second of the whole team in int8 multiply-adds (two operations each) that
/// touch no memory.
pub fn measure_int8(team: &Team) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if team.isa().has_tiles() {
        return tiles::measure(team, true);
    }
    measure(team, 2 * 4 * LANES, |rounds| Chains { rounds, int8: true })
}

/// 10^9 operations a second of the whole team in bf16 multiply-adds (two operations each) that touch
/// no memory.
pub fn measure_bf16(team: &Team) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if team.isa().has_tiles() {
        return tiles::measure(team, false);
    }
    measure(team, 2 * 2 * LANES, |rounds| Pairs { rounds })
}

fn measure<K: Kernel<Output = usize>>(
    team: &Team,
    operations: usize,
    kernel: impl Fn(usize) -> K + Sync,
) -> f64 {
    let isa = team.isa();
    measure_rounds(team, operations, |rounds| {
        isa.dispatch(black_box(kernel(rounds)))
    })
}

/// `chains_of(rounds)` runs so many rounds of as many chains as it returns.
fn measure_rounds(
    team: &Team,
    operations: usize,
    chains_of: impl Fn(usize) -> usize + Sync,
) -> f64 {
    const ROUNDS: usize = 100_000;
    let mut times: Vec<_> = (0..9)
        .map(|_| {
            let start = Instant::now();
            let chains = std::sync::atomic::AtomicUsize::new(0);
            team.run(|_, _| {
                let used = chains_of(ROUNDS);
                chains.fetch_add(used, std::sync::atomic::Ordering::Relaxed);
            });
            (start.elapsed(), chains.into_inner())
        })
        .collect();
    times.sort();
    let (time, chains) = times[times.len() / 2];
    (chains * ROUNDS * operations) as f64 / time.as_secs_f64() / 1e9
}

/// Independent chains of one operation, as many as registers hold; returns how many.
struct Chains {
    rounds: usize,
    int8: bool,
}

impl Kernel for Chains {
    type Output = usize;

    #[inline(always)]
    fn run<V: Simd>(self, v: V) -> usize {
        match (self.int8, V::WIDE) {
            (false, true) => multiply_add::<V, 12>(v, self.rounds),
            (false, false) => multiply_add::<V, 5>(v, self.rounds),
            (true, true) => dots::<V, 12>(v, self.rounds),
            (true, false) => dots::<V, 4>(v, self.rounds),
        }
    }
}

/// As [`Chains`], of pairs of bf16.
struct Pairs {
    rounds: usize,
}

impl Kernel for Pairs {
    type Output = usize;

    const BF16: bool = true;

    #[inline(always)]
    fn run<V: Simd>(self, v: V) -> usize {
        if V::WIDE {
            pairs::<V, 12>(v, self.rounds)
        } else {
            pairs::<V, 4>(v, self.rounds)
        }
    }
}

#[inline(always)]
fn pairs<V: Simd, const N: usize>(v: V, rounds: usize) -> usize {
    let w = v.bf16_pairs(&black_box([0x3F; 64]));
    let x = black_box(0x3F80_3F80);
    let mut sums = [v.splat(0.0); N];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = v.dot_bf16(*sum, w, x);
        }
    }
    for sum in sums {
        black_box(v.sum(sum));
    }
    N
}

#[inline(always)]
fn multiply_add<V: Simd, const N: usize>(v: V, rounds: usize) -> usize {
    let (a, b) = (v.splat(black_box(0.5)), v.splat(black_box(1.0)));
    let mut sums = [b; N];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = v.fma(*sum, a, b);
        }
    }
    for sum in sums {
        black_box(v.sum(sum));
    }
    N
}

#[inline(always)]
fn dots<V: Simd, const N: usize>(v: V, rounds: usize) -> usize {
    let w = v.weights(&black_box([129; 64]));
    let mut a = [0x0101_0101; N];
    let mut sums = [v.dot_start(0); N];
    for _ in 0..rounds {
        // Otherwise the part of `dot4` that does not depend on the sum is shared by all chains or
        // leaves the loop.
        a = if V::WIDE {
            [black_box(a[0]); N]
        } else {
            black_box(a)
        };
        for (sum, a) in sums.iter_mut().zip(a) {
            *sum = v.dot4(*sum, w, a);
        }
    }
    for sum in sums {
        black_box(v.sum(v.widen(sum)));
    }
    N
}

/// The same of tile registers: two tiles of each factor, four of sums, as in a product.
#[cfg(target_arch = "x86_64")]
mod tiles {
    use super::measure_rounds;
    use crate::cpu::TileKernel;
    use crate::isa::Simd;
    use crate::isa::amx::{Config, ROW_BYTES, ROWS, Tiles};
    use crate::team::Team;

    const CHAINS: usize = 4;

    pub(super) fn measure(team: &Team, int8: bool) -> f64 {
        let words = ROW_BYTES / 4;
        let operations = ROWS * ROWS * words * if int8 { 8 } else { 4 };
        let isa = team.isa();
        measure_rounds(team, operations, |rounds| {
            isa.dispatch_tiles(Chains { rounds, int8 });
            CHAINS
        })
    }

    pub(super) struct Chains {
        pub(super) rounds: usize,
        pub(super) int8: bool,
    }

    impl TileKernel for Chains {
        #[inline(always)]
        fn run<V: Simd, T: Tiles>(self, _: V, tiles: &mut T) {
            tiles.configure(&Config::new([(ROWS, ROW_BYTES); 8]));
            for _ in 0..self.rounds {
                // SAFETY: all tiles are of one size, so each fits each. Zeros take as long as others.
                unsafe {
                    if self.int8 {
                        tiles.dot_int8::<0, 4, 6>();
                        tiles.dot_int8::<1, 4, 7>();
                        tiles.dot_int8::<2, 5, 6>();
                        tiles.dot_int8::<3, 5, 7>();
                    } else {
                        tiles.dot_bf16::<0, 4, 6>();
                        tiles.dot_bf16::<1, 4, 7>();
                        tiles.dot_bf16::<2, 5, 6>();
                        tiles.dot_bf16::<3, 5, 7>();
                    }
                }
            }
            tiles.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn chains_of_tiles_are_what_the_manual_allows() {
        for int8 in [true, false] {
            Isa::INTERPRETED.dispatch_tiles(tiles::Chains { rounds: 1, int8 });
        }
    }

    #[test]
    fn peaks_are_believable() {
        for isa in Isa::available() {
            let team = Team::with_isa(1, isa).unwrap();
            // A chain that was optimised away would be orders of magnitude beyond any core.
            assert!((0.001..2_000.0).contains(&measure_f32(&team)), "{isa}");
            assert!((0.001..16_000.0).contains(&measure_int8(&team)), "{isa}");
            assert!((0.001..8_000.0).contains(&measure_bf16(&team)), "{isa}");
        }
    }
}
