//! Pure. When to try again, and when a message is too old.

use super::message::Tick;

/// How the pauses between attempts grow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backoff {
    /// The first pause, ms.
    pub min_ms: u64,
    /// The longest pause, ms.
    pub max_ms: u64,
}

impl Backoff {
    /// The pause after the `attempts`th failure in a row, ms: doubling, with up to a quarter taken off by `random` so that
    /// many do not come back at once.
    pub fn pause_ms(self, attempts: u32, random: u32) -> u64 {
        let doubled = self.min_ms.saturating_mul(1 << attempts.saturating_sub(1).min(20));
        let pause = doubled.clamp(self.min_ms, self.max_ms.max(self.min_ms));
        pause - pause / 4 * (random as u64 % 1000) / 1000
    }
}

/// Whether a message born at `born` has outlived `lifetime_ms` at `now`, all in cluster time (P10: never before).
pub fn is_expired(born: Tick, lifetime_ms: u64, now: Tick) -> bool {
    now.0 >= born.0.saturating_add(lifetime_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let backoff = Backoff { min_ms: 1000, max_ms: 10_000 };
        let pauses: Vec<u64> = (1..8).map(|n| backoff.pause_ms(n, 0)).collect();
        assert_eq!(pauses, [1000, 2000, 4000, 8000, 10_000, 10_000, 10_000]);
        assert!(backoff.pause_ms(5, 999) > 7500 && backoff.pause_ms(u32::MAX, 0) == 10_000);
    }

    #[test]
    fn p10_expiry_never_comes_before_the_lifetime() {
        assert!(!is_expired(Tick(5), 100, Tick(104)));
        assert!(is_expired(Tick(5), 100, Tick(105)));
        assert!(!is_expired(Tick(5), u64::MAX, Tick(u64::MAX - 1)));
    }
}
