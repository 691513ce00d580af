//! The `Clock` edge of this crate: only to tell how long an erasure took.
#![expect(clippy::disallowed_methods, reason = "this is the Clock edge")]

use std::time::Instant;

/// Monotonic time.
pub(crate) fn now() -> Instant {
    Instant::now()
}
