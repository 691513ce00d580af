//! The `Clock` edge of this crate: monotonic time for leases, timers and deadlines.
#![expect(clippy::disallowed_methods, reason = "this is the Clock edge")]

use std::time::Instant;

/// The monotonic clock. Only differences mean anything.
pub fn now() -> Instant {
    Instant::now()
}
