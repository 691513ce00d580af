//! Durable bytes for one node: a segmented, append-only log that is the only source of truth.
//!
//! What this crate promises: a record whose completion ran is on stable storage; records complete in the
//! order in which they were handed over; a body that was erased reads as zeros; what [`Log::open`] returns is
//! what the log's bytes say and nothing else.
//!
//! What it must not know: Raft messages, who leads, SMTP, what a command or a body means. Entries, votes and
//! checkpoints are opaque bytes with a term and an index. It has no async runtime: completions are closures.
//!
//! A crash at the worst moment leaves a torn batch at the tail of the newest segment. Nobody was told of it;
//! recovery cuts it off.

mod clock;
pub mod codec;
pub mod disk;
pub mod erase;
mod error;
pub mod index;
pub mod limits;
pub mod log;
pub mod position;
pub mod record;
mod scrub;
pub mod seal;
mod sync;

pub use bytes::Bytes;
pub use error::{Damage, OpenError, ReadError, StoreFailed};
pub use index::{Rows, Shelf};
pub use log::{
    Checkpoint, Completion, Entry, Identity, Log, LostBody, Options, Recovered, Replacement, SpaceReport,
};
pub use position::{LogIndex, LogPosition, Offset, SegmentId, Term};
pub use scrub::ScrubReport;
pub use seal::Keyring;
#[cfg(all(any(test, feature = "sim"), not(feature = "shuttle")))]
pub use sync::turns;
