//! Writing the state of the queue to the log: what changed since the checkpoint before, or all of it anew.
//!
//! A checkpoint counts from its last record on. A crash before that leaves rows that the next checkpoint declares void.

use crate::codec::{self, CheckpointEnd, TablePart};
use crate::error::StoreFailed;
use crate::position::{LogIndex, LogPosition};
use crate::record::{Kind, Record};

use super::writer::{Note, Request};
use super::{Completion, Log};

/// The state of the queue at a position: what changed since the checkpoint before.
pub struct Checkpoint {
    /// Everything up to here is folded in.
    pub applied: LogPosition,
    /// New or changed rows. A row is at most [`HEAD_BYTES_MAX`](crate::limits::HEAD_BYTES_MAX) minus 16 octets.
    pub rows: Vec<(u128, Vec<u8>)>,
    /// Keys that are no longer part of the state.
    pub gone: Vec<u128>,
    /// The small tables, whole.
    pub tables: Vec<u8>,
}

/// A checkpoint of another node's state, whose rows are written as they come in. It replaces all rows once it is ended, and is void if it
/// never is.
#[derive(Debug)]
pub struct Replacement {
    number: u64,
    keys: Vec<u128>,
}

impl Replacement {
    /// Rows that were added.
    pub fn rows(&self) -> usize {
        self.keys.len()
    }
}

type Noted = (Record, Note);

fn position(number: u64) -> LogPosition {
    LogPosition { index: LogIndex(number), ..LogPosition::default() }
}

fn row(number: u64, key: u128, row: &[u8]) -> Noted {
    let mut head = Vec::with_capacity(size_of_val(&key) + row.len());
    head.extend_from_slice(&key.to_le_bytes());
    head.extend_from_slice(row);
    (Record { at: position(number), ..Record::of(Kind::Row, head) }, Note::Row { key, number })
}

/// What stands behind the rows. The last record makes all of it count.
fn end(number: u64, applied: LogPosition, gone: &[u128], tables: &[u8], void: Vec<u64>) -> Vec<Noted> {
    let at = position(number);
    let mut records = Vec::new();
    for keys in gone.chunks(10_000) {
        let head = codec::encode(&codec::Gone { keys: keys.to_vec() });
        records.push((Record { at, ..Record::of(Kind::Gone, head) }, Note::Gone(keys.to_vec())));
    }
    let mut parts = 0;
    for bytes in tables.chunks(codec::TABLE_PART_BYTES) {
        let head = codec::encode(&TablePart { part: parts, bytes: bytes.to_vec() });
        records.push((Record { at, ..Record::of(Kind::Table, head) }, Note::Table { number }));
        parts += 1;
    }
    let head = codec::encode(&CheckpointEnd { applied, parts, void });
    records.push((Record { at, ..Record::of(Kind::CheckpointEnd, head) }, Note::CheckpointEnd));
    records
}

impl Log {
    /// Writes a checkpoint; `done` runs when a restart would fold from it. A [`Replacement`] that was begun and not ended is void.
    pub fn checkpoint(&self, checkpoint: Checkpoint, done: Completion) {
        let Checkpoint { applied, rows, gone, tables } = checkpoint;
        let (number, void) = {
            let mut state = self.inner.state();
            (state.begin_checkpoint(), state.void.iter().copied().collect())
        };
        let mut records = Vec::with_capacity(rows.len() + 3);
        records.extend(rows.into_iter().map(|(key, octets)| row(number, key, &octets)));
        records.extend(end(number, applied, &gone, &tables, void));
        self.send(Request { records, done: Some(done) });
    }

    /// Begins to replace all rows. Every [`Log::checkpoint`] before it is complete; the caller sees to that. Another [`Replacement`] that was
    /// begun and not ended is void.
    pub fn replace(&self) -> Replacement {
        let mut state = self.inner.state();
        let number = state.begin_checkpoint();
        state.replacement = Some(number);
        Replacement { number, keys: Vec::new() }
    }

    /// Adds rows, within the bounds of [`Checkpoint::rows`] and each key once. Whoever awaits `done` keeps memory bounded.
    pub fn add_rows(&self, to: &mut Replacement, rows: Vec<(u128, Vec<u8>)>, done: Completion) {
        to.keys.extend(rows.iter().map(|(key, _)| *key));
        let records = rows.into_iter().map(|(key, octets)| row(to.number, key, &octets)).collect();
        self.send(Request { records, done: Some(done) });
    }

    /// Ends it: every other row is void. `done` runs when a restart would fold from it. If another checkpoint was begun meanwhile, this one
    /// does not count.
    pub fn end_replacement(&self, ended: Replacement, applied: LogPosition, tables: &[u8], done: Completion) {
        let Replacement { number, mut keys } = ended;
        keys.sort_unstable();
        let (gone, void): (Vec<u128>, Vec<u64>) = {
            let mut state = self.inner.state();
            if state.replacement.take_if(|begun| *begun == number).is_none() {
                drop(state);
                return done(Err(StoreFailed("another checkpoint was begun, and this one is void".into())));
            }
            let others = state.row_copies.keys().filter(|key| keys.binary_search(key).is_err());
            (others.copied().collect(), state.void.iter().copied().collect())
        };
        let records = end(number, applied, &gone, tables, void);
        self.send(Request { records, done: Some(done) });
    }
}
