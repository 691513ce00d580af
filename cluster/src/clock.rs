//! The `Clock` edge of this crate: monotonic time for leases, timers and deadlines.
#![expect(clippy::disallowed_methods, reason = "this is the Clock edge")]

use std::time::Instant;

/// The monotonic clock, as the async runtime has it: a simulation decides what time that is. Only differences mean anything.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
