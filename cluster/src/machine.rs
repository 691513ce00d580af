//! The seam to the queue: what a replicated state machine must be able to do. It sees committed commands in order and nothing
//! of Raft but their term and index.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_storage::{Bytes, LogIndex, LogPosition};

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

/// The machine does not accept a proposal now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Told to whoever proposed it, as the outcome.
    pub outcome: Vec<u8>,
}

/// The replicated state machine. Everything here runs with the machine locked, and must not block.
pub trait Machine: Send + 'static {
    /// Applies a committed command. Must depend on nothing but the state, `at` and the command: every node must come to
    /// the same state. `body_bytes` is the length of the entry's body, 0 if it was erased before it came here.
    fn apply(&mut self, at: LogPosition, command: &[u8], body_bytes: u32) -> Applied;

    /// Asked on the leader before a command is proposed, under the lock that `apply` runs under.
    ///
    /// # Errors
    /// [`Refusal`] if the command must not be proposed now.
    fn admit(&mut self, command: &[u8]) -> Result<(), Refusal>;

    /// An admitted command was certainly not proposed: what `admit` did for it is undone.
    fn give_up(&mut self, command: &[u8]);

    /// Rows and tables that changed since the last call, and begins to count anew.
    fn delta(&mut self) -> Delta;

    /// All rows and tables.
    fn whole(&self) -> Delta;

    /// Replaces the state by what a checkpoint or a snapshot says.
    ///
    /// # Errors
    /// The reason, if the bytes are not a state.
    fn restore(&mut self, tables: &[u8], rows: &BTreeMap<u128, Bytes>) -> Result<(), String>;

    /// Bodies that the state still needs.
    fn live_bodies(&self) -> BTreeSet<LogIndex>;
}
