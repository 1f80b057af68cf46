//! How fast this machine reads memory: the limit that decode is measured against.

use std::io;
use std::time::{Duration, Instant};

use crate::cpu::Kernel;
use crate::isa::{LANES, Simd};
use crate::mem::{Purpose, Region};
use crate::team::Team;

/// Result of [`measure_read`].
#[derive(Debug, Clone, Copy)]
pub struct ReadBandwidth {
    /// Bytes of one pass.
    pub bytes: usize,
    /// The fastest pass.
    pub best: Duration,
    /// The median pass.
    pub median: Duration,
}

impl ReadBandwidth {
    /// 10^9 bytes a second in the median pass.
    pub fn gigabytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.median.as_secs_f64() / 1e9
    }

    /// 10^9 bytes a second in the fastest pass.
    pub fn best_gigabytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.best.as_secs_f64() / 1e9
    }
}

/// Reads `bytes` of freshly written memory (in huge pages where granted) `passes` times with the
/// whole team. Choose several times the last-level cache, or the size of the data whose reading is
/// to be judged.
///
/// # Errors
/// `InvalidInput` for less than 1 MiB or no pass, otherwise the operating system's refusal of the
/// memory.
pub fn measure_read(team: &Team, bytes: usize, passes: usize) -> io::Result<ReadBandwidth> {
    const CHUNK: usize = 1 << 18;
    if bytes < 1 << 20 || passes == 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut region = Region::zeroed(bytes / CHUNK * CHUNK, Purpose::Public)?;
    // Untouched pages would all be the one zero page and come from cache.
    team.for_each_chunk_mut(&mut region, CHUNK, |i, chunk| chunk.fill(i as u8 | 1));
    let data = region.as_f32();
    let (isa, members) = (team.isa(), team.members());
    let chunks = data.len() / (CHUNK / 4);
    let mut times: Vec<Duration> = (0..=passes)
        .map(|_| {
            let start = Instant::now();
            team.run(|member, _| {
                let part = member * chunks / members..(member + 1) * chunks / members;
                let part = &data[part.start * (CHUNK / 4)..part.end * (CHUNK / 4)];
                std::hint::black_box(isa.dispatch(Read(part)));
            });
            start.elapsed()
        })
        .skip(1)
        .collect();
    times.sort();
    Ok(ReadBandwidth {
        bytes: region.len(),
        best: times[0],
        median: times[times.len() / 2],
    })
}

struct Read<'a>(&'a [f32]);

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<V: Simd>(self, v: V) -> f32 {
        const UNROLL: usize = 8;
        let mut largest = [v.splat_i(0); UNROLL];
        for block in self.0.as_chunks::<{ UNROLL * LANES }>().0 {
            for (largest, x) in largest.iter_mut().zip(block.as_chunks::<LANES>().0) {
                *largest = v.max_i(*largest, v.bits(v.load(x)));
            }
        }
        let mut all = largest[0];
        for x in largest {
            all = v.max_i(all, x);
        }
        v.largest(v.float_from_bits(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_byte_it_reports_at_a_believable_rate() {
        let team = Team::new(2).unwrap();
        let result = measure_read(&team, 64 << 20, 5).unwrap();
        assert_eq!(result.bytes, 64 << 20);
        assert!(result.best <= result.median);
        // 64 MiB cannot come from an inner cache: a loop that was optimised away would be far
        // beyond this.
        let rate = result.best_gigabytes_per_second();
        assert!((0.1..2000.0).contains(&rate), "{rate} GB/s");
    }

    #[test]
    fn refuses_sizes_that_measure_nothing() {
        let team = Team::new(1).unwrap();
        assert!(measure_read(&team, 4096, 3).is_err());
        assert!(measure_read(&team, 1 << 20, 0).is_err());
    }
}
