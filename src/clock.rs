//! The `Clock` edge: monotonic time for deadlines, wall time for log lines and headers only, and randomness.
#![expect(clippy::disallowed_methods, reason = "this is the Clock edge")]

use std::time::{Duration, Instant, SystemTime};

use chrono::{DateTime, Utc};

/// Monotonic time.
pub fn now() -> Instant {
    holdfast_cluster::clock::now()
}

/// A deadline that is `wait` away.
pub fn after(wait: Duration) -> Instant {
    now() + wait
}

/// Wall time, for people.
pub fn wall() -> DateTime<Utc> {
    SystemTime::now().into()
}

/// Seconds since 1970, for people.
pub fn unix_s() -> u64 {
    wall().timestamp().try_into().unwrap_or(0)
}

/// A date as RFC 5322 §3.3 writes it.
pub fn rfc5322(unix_s: u64) -> String {
    DateTime::<Utc>::from_timestamp(unix_s as i64, 0).unwrap_or_default().to_rfc2822()
}

/// Not for secrets: spreads retries.
pub fn random() -> u32 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish() as u32
}
