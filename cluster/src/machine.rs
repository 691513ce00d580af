//! The seam to the queue: what a replicated state machine must be able to do. It sees committed commands in order and nothing
//! of Raft but their term and index.

use std::any::Any;
use std::sync::Arc;

use holdfast_storage::{Bytes, LogIndex, LogPosition, ReadError};

/// Rows of the newest complete checkpoint, for a machine that does not keep all of them in memory.
pub trait Rows: Send + Sync {
    /// Whether there is a row. Never blocks.
    fn contains(&self, key: u128) -> bool;

    /// The row of a key: one read of the disk at most.
    ///
    /// # Errors
    /// If it cannot be read; the node ends then.
    fn get(&self, key: u128) -> Result<Option<Bytes>, ReadError>;

    /// The rows of keys in rising order, as far as they still exist. May block for long: never called with the machine locked.
    ///
    /// # Errors
    /// As [`Rows::get`].
    fn read(&self, keys: &[u128]) -> Result<Vec<(u128, Bytes)>, ReadError>;

    /// Up to `max` keys of rows above `after`, in rising order. Never blocks.
    fn keys(&self, after: Option<u128>, max: usize) -> Vec<u128>;
}

impl Rows for holdfast_storage::Rows {
    fn contains(&self, key: u128) -> bool {
        holdfast_storage::Rows::contains(self, key)
    }

    fn get(&self, key: u128) -> Result<Option<Bytes>, ReadError> {
        holdfast_storage::Rows::get(self, key)
    }

    fn read(&self, keys: &[u128]) -> Result<Vec<(u128, Bytes)>, ReadError> {
        holdfast_storage::Rows::read(self, keys)
    }

    fn keys(&self, after: Option<u128>, max: usize) -> Vec<u128> {
        holdfast_storage::Rows::keys(self, after, max)
    }
}

/// What came of a command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Told to whoever proposed it.
    pub outcome: Vec<u8>,
    /// Bodies whose story is over, by the index of the entry that brought them; this entry's own may be among them.
    pub erase: Vec<LogIndex>,
}

/// What changed since the checkpoint before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// New or changed rows; a row is at most [`crate::COMMAND_BYTES_MAX`] minus 16 octets.
    pub rows: Vec<(u128, Vec<u8>)>,
    /// Keys that are gone.
    pub gone: Vec<u128>,
    /// The small tables, whole.
    pub tables: Vec<u8>,
}

/// Some of a state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Rows with their keys.
    pub rows: Vec<(u128, Vec<u8>)>,
    /// Bodies that the state needs.
    pub bodies: Vec<LogIndex>,
}

/// Reads a state step by step, each row once. A step is small, and may block.
pub type Steps = Box<dyn Iterator<Item = Result<Step, ReadError>> + Send>;

/// A state, whole.
pub struct Whole {
    /// The small tables.
    pub tables: Vec<u8>,
    /// Everything else.
    pub steps: Steps,
}

/// A state that was read and is not yet a machine's.
pub type Found = Box<dyn Any + Send>;

/// Reads a state from its small tables and from the rows of the newest complete checkpoint. May block for long.
///
/// # Errors
/// The reason, if the bytes are not a state.
pub type Reading = Box<dyn FnOnce(&[u8]) -> Result<Found, String> + Send>;

/// Why a committed command was not applied. The node ends: to go on without it would be another state than everybody else's.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A row that the command needs cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It was written by a version with other features.
    #[error(
        "the command of entry {0} has feature level {1}, which this version does not know; run the version that wrote it"
    )]
    UnknownFeature(LogIndex, u8),
}

/// The machine does not accept a proposal now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Told to whoever proposed it, as the outcome.
    pub outcome: Vec<u8>,
}

/// The replicated state machine. Everything here runs with the machine locked, and must not block.
pub trait Machine: Send + 'static {
    /// Whether a command ends what is here rather than bringing more: it is taken to the last of the room, with its body.
    fn is_draining(&self, command: &[u8]) -> bool;

    /// Called once, before anything else: where the rows of the newest complete checkpoint are read.
    fn attach(&mut self, rows: Arc<dyn Rows>);

    /// Applies a committed command. Must depend on nothing but the state, `at` and the command: every node must come to
    /// the same state. `body_bytes` is the length of the entry's body, 0 if it was erased before it came here.
    ///
    /// # Errors
    /// [`ApplyError`]. The state is void then, and the node ends.
    fn apply(&mut self, at: LogPosition, command: &[u8], body_bytes: u32) -> Result<Applied, ApplyError>;

    /// Asked on the leader before a command is proposed, under the lock that `apply` runs under.
    ///
    /// # Errors
    /// [`Refusal`] if the command must not be proposed now.
    fn admit(&mut self, command: &[u8]) -> Result<(), Refusal>;

    /// An admitted command was certainly not proposed: what `admit` did for it is undone.
    fn give_up(&mut self, command: &[u8]);

    /// Rows and tables that changed since the last call, and begins to count anew.
    fn delta(&mut self) -> Delta;

    /// The checkpoint of the last [`Machine::delta`] is complete: its rows are where [`Rows`] finds them. Returns the keys of rows that the machine let go of: they outlived the young horizon.
    fn checkpointed(&mut self) -> Vec<u128>;

    /// Names for people of what a body belongs to; `command` is that of its entry, if the log still has it. May read all of the
    /// state.
    fn owners(&self, body: LogIndex, command: Option<&[u8]>) -> Vec<String>;

    /// The bodies that a checkpoint's row needs, and a name for people of what it is; nothing if it is no row.
    fn row_owner(&self, row: &[u8]) -> Option<(Vec<LogIndex>, String)>;

    /// Names for people of what octets belonged to in which a log's records can no longer be told.
    fn owners_in(&self, octets: &[u8]) -> Vec<String>;

    /// All of the state as it is now, to be read without the machine: no checkpoint is completed before that is done.
    fn whole(&self) -> Whole;

    /// Reads another state without the machine, from the rows of [`Machine::attach`].
    fn reading(&self) -> Reading;

    /// Replaces the state by one that [`Machine::reading`] found.
    fn restore(&mut self, found: Found);
}
