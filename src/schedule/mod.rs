//! Pure. Who is next: jobs by destination, fair among destinations, one probe for one that does not answer. Knows message
//! ids and nothing of messages, replies or sockets; time is milliseconds of a monotonic clock.

mod destination;
mod scheduler;

pub use destination::Pace;
pub use scheduler::{Job, Key, Limits, Scheduler};
