//! Pure. The bounds of what nodes say to each other.

use std::time::Duration;

/// The longest body of one proposal.
pub const BODY_BYTES_MAX: usize = holdfast_storage::limits::BODY_BYTES_MAX;
/// The longest command of one proposal. A longer one is refused before it is sent.
pub const COMMAND_BYTES_MAX: usize = holdfast_storage::limits::HEAD_BYTES_MAX - 1;

/// Entries in one append message, and their octets.
pub(crate) const APPEND_ENTRIES_MAX: u64 = 256;
pub(crate) const APPEND_BYTES_MAX: usize = 1 << 20;
/// The longest frame that a node reads.
pub(crate) const FRAME_BYTES_MAX: usize = 64 << 20;
/// Tables, rows and bodies of a snapshot in one request, about: one step of a reading more at the most.
pub(crate) const SNAPSHOT_PART_BYTES: usize = 1 << 20;
/// Rows of a snapshot in all. A larger one is refused; the follower stays behind until the queue is smaller.
pub(crate) const SNAPSHOT_BYTES_MAX: usize = 8 << 30;
/// Bodies of a snapshot that a follower fetches at the same time: a few MiB of memory on either side.
pub(crate) const BODIES_IN_FLIGHT_MAX: usize = 32;
/// For so long after a follower that gets a snapshot was last heard of, the entries that it needs next are kept for it.
pub(crate) const TRANSFER_PATIENCE: Duration = Duration::from_secs(300);
/// Entries that a follower keeps below its checkpoint, so that it rarely has to send a snapshot when it leads.
pub(crate) const FOLLOWER_KEEPS: u64 = 2_000;
/// Append messages on their way to one follower.
pub(crate) const APPENDS_IN_FLIGHT_MAX: usize = 32;
/// Requests on their way to one peer on one connection. More wait.
pub(crate) const REQUESTS_IN_FLIGHT_MAX: usize = 1024;
/// A stream of appends without an answer for this long is given up.
pub(crate) const NO_PROGRESS: Duration = Duration::from_secs(2);
/// Connecting and shaking hands.
pub(crate) const CONNECT: Duration = Duration::from_secs(2);
/// A connection between nodes ends when what was sent is not acknowledged by the other's system for so long.
pub(crate) const UNACKNOWLEDGED: Duration = Duration::from_secs(4);
/// A request that is neither a vote nor a proposal.
pub(crate) const REQUEST: Duration = Duration::from_secs(5);
/// Longest time for which a node works on another one's proposal.
pub(crate) const PROPOSAL_MAX: Duration = Duration::from_secs(120);
/// Taking a part of a snapshot.
pub(crate) const SNAPSHOT_PART: Duration = Duration::from_secs(30);
/// Pause before a proposal is tried again.
pub(crate) const RETRY: Duration = Duration::from_millis(25);
/// The same on a leader that finds no room for what it brings.
pub(crate) const WITHOUT_ROOM: Duration = Duration::from_millis(500);

const _: () = assert!(SNAPSHOT_PART_BYTES + 2 * COMMAND_BYTES_MAX < FRAME_BYTES_MAX);
const _: () = assert!(APPEND_BYTES_MAX + COMMAND_BYTES_MAX + BODY_BYTES_MAX < FRAME_BYTES_MAX);
