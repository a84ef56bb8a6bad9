//! Seeded draws, spelled out, so that a seed means the same in every version of every dependency.
//!
//! In: a seed. Out: numbers below a bound, permutations. The generator is SplitMix64 (Steele, Lea,
//! Flood 2014), the permutation Fisher–Yates.

/// A SplitMix64 stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draws(u64);

impl Draws {
    /// The stream of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Draws {
        Draws(seed)
    }

    /// A number below `bound`, or 0 where that is 0. It is the remainder of a 64-bit draw: biased by
    /// less than 2⁻⁴⁰ for any bound that counts things in memory.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        z.checked_rem(bound as u64)
            .and_then(|rest| usize::try_from(rest).ok())
            .unwrap_or(0)
    }

    /// A permutation of `0..n`.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut indices: Vec<usize> = (0..n).collect();
        for last in (1..n).rev() {
            indices.swap(last, self.below(last + 1));
        }
        indices
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_splitmix64s() {
        // The first outputs for seed 0 are 0xe220a8397b1dcdaf and 0x6e789e6aa1b965f4 (the
        // published reference implementation).
        let mut draws = Draws::new(0);
        let bound = 1 << 32;
        assert_eq!(draws.below(bound), 0x7b1d_cdaf);
        assert_eq!(draws.below(bound), 0xa1b9_65f4);
        assert_eq!(draws.below(0), 0);
    }

    #[test]
    fn a_permutation_holds_every_index_once() {
        let mut permutation = Draws::new(5).permutation(50);
        assert_ne!(permutation, (0..50).collect::<Vec<_>>());
        permutation.sort_unstable();
        assert_eq!(permutation, (0..50).collect::<Vec<_>>());
    }
}
