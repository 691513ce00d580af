//! openraft's log over ours. Only `save_vote` is awaited until it is durable; appends report through their callback, and
//! truncations and purges are queued in order.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;

use holdfast_storage::{Log, LogIndex};
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use tokio::sync::oneshot;

use crate::codec::{entry_from_stored, entry_to_stored};
use crate::limits::APPEND_BYTES_MAX;
use crate::types::{Entry, LogId, TypeConfig, Vote, log_id, position, raft_vote, stored_vote};

/// A node's log as openraft wants it. Clones share it.
#[derive(Clone)]
pub(crate) struct LogStore {
    pub(crate) log: Arc<Log>,
}

impl LogStore {
    fn read(&self, start: u64, end: u64, bytes_max: usize) -> Result<Vec<Entry>, io::Error> {
        let entries = self.log.entries(start..end, bytes_max).map_err(io::Error::other)?;
        entries.into_iter().map(|entry| entry_from_stored(entry).map_err(io::Error::other)).collect()
    }
}

fn half_open(range: &impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(i) => *i,
        Bound::Excluded(i) => i + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(i) => i + 1,
        Bound::Excluded(i) => *i,
        Bound::Unbounded => u64::MAX,
    };
    start..end
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let Range { start, end } = half_open(&range);
        self.read(start, end, usize::MAX)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.log.vote().map(|vote| raft_vote(&vote)))
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        // A follower waits for a body that is being mended; to fail would end this node.
        let entries = self.log.intact_entries(start..end, APPEND_BYTES_MAX).map_err(io::Error::other)?;
        // Nobody needed them when they were given up, but a stream to a follower may not know yet that it has ended. What is left would
        // go out as what follows the entry before them.
        if entries.first().is_some_and(|first| first.at.index.0 != start) {
            return Ok(Vec::new());
        }
        entries.into_iter().map(|entry| entry_from_stored(entry).map_err(io::Error::other)).collect()
    }

    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl futures_util::Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let Range { start, end } = half_open(&range);
        let store = self.clone();
        let first: std::collections::VecDeque<Entry> = Default::default();
        // Read in pieces, so that applying a long stretch holds a piece of it in memory.
        futures_util::stream::unfold((store, start, first), move |(store, at, mut ready)| async move {
            if ready.is_empty() {
                if at >= end {
                    return None;
                }
                match store.read(at, end, APPEND_BYTES_MAX) {
                    Ok(entries) => ready.extend(entries),
                    Err(e) => return Some((Err(e), (store, end, ready))),
                }
                if ready.is_empty() && store.log.floor().is_some_and(|floor| at <= floor.index.0) {
                    let gone = io::Error::other(format!("entry {at} is due, and was given up"));
                    return Some((Err(gone), (store, end, ready)));
                }
            }
            let entry = ready.pop_front()?;
            let index = entry.log_id.index();
            // What is applied is each entry in its turn: a node that misses one ends, and does not go on with a state of its own.
            if index != at {
                let gap = io::Error::other(format!("entry {index} comes where entry {at} is due"));
                return Some((Err(gap), (store, end, Default::default())));
            }
            Some((Ok(entry), (store, index + 1, ready)))
        })
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        Ok(LogState {
            last_purged_log_id: self.log.floor().map(log_id),
            last_log_id: self.log.last().map(log_id),
        })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let (tell, told) = oneshot::channel();
        self.log.save_vote(stored_vote(vote), Box::new(move |result| drop(tell.send(result))));
        match told.await {
            Ok(result) => result.map_err(io::Error::other),
            Err(_) => Err(io::Error::other("the log has closed")),
        }
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        if let Some(committed) = committed {
            self.log.save_committed(position(&committed));
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.log.committed().map(log_id))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries = entries.into_iter().map(entry_to_stored).collect();
        let done = Box::new(move |result: Result<(), holdfast_storage::StoreFailed>| {
            callback.io_completed(result.map_err(io::Error::other));
        });
        self.log.append(entries, done);
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        self.log.truncate_from(LogIndex(last.map_or(0, |id| id.index() + 1)));
        Ok(())
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        self.log.purge(position(&upto));
        Ok(())
    }
}
