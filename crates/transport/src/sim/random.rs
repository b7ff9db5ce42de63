//! Numbers that a seed decides.

/// A generator whose numbers follow from its seed alone, the same on every machine.
///
/// # Source
/// Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators" (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The generator of that seed.
    pub fn new(seed: u64) -> Self {
        let mut random = Self(seed);
        // Neighbouring seeds part ways at once.
        Self(random.next() ^ seed.rotate_left(32))
    }

    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "it never ends; an iterator would say that it may")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`; 0 if that is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// A number from `least` to `most`.
    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.below(most.saturating_sub(least).saturating_add(1))
    }

    /// `true` in `cases` of a thousand.
    pub fn per_mille(&mut self, cases: u32) -> bool {
        cases > 0 && self.below(1000) < u64::from(cases)
    }

    /// One of `choices`, which are not empty.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_from_the_seed_and_stay_in_bounds() {
        let numbers = |seed| -> Vec<u64> {
            let mut random = Random::new(seed);
            (0..1000).map(|_| random.between(3, 12)).collect()
        };
        assert_eq!(numbers(7), numbers(7));
        assert_ne!(numbers(7), numbers(8));
        let drawn = numbers(7);
        assert!((3..=12).all(|number| drawn.contains(&number)) && drawn.iter().all(|number| (3..=12).contains(number)));
        let mut random = Random::new(1);
        assert_eq!((random.below(0), random.below(1), random.per_mille(0)), (0, 0, false));
        assert!(random.per_mille(1000));
    }
}
