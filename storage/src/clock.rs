//! The `Clock` edge of this crate: how long an erasure took, and randomness.
#![expect(clippy::disallowed_methods, reason = "this is the Clock edge")]

use std::time::Instant;

/// Not for secrets.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

/// Monotonic time.
pub(crate) fn now() -> Instant {
    #[cfg(all(any(test, feature = "sim"), not(feature = "shuttle")))]
    if let Some(now) = crate::sync::turns::now() {
        return now;
    }
    Instant::now()
}
