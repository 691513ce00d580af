//! openraft's own contract suite for stores, against ours.

use std::sync::{Arc, Mutex};

use futures_util::StreamExt;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::{Identity, Log, LogIndex, LogPosition, OpenError, Options, Recovered, Rows, Term};
use openraft::storage::RaftStateMachine;
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::{EntryPayload, RaftLogReader, RaftSnapshotBuilder, StorageError};

use crate::codec::entry_to_stored;
use crate::log_store::LogStore;
use crate::machine::{Applied, ApplyError, Delta, Found, Machine, Reading, Refusal, Whole};
use crate::state_machine::StateMachine;
use crate::types::{Entry, TypeConfig, log_id};

/// Counts commands. A row is the index of a body, and octets are named by what stands there up to a blank.
#[derive(Default)]
pub(crate) struct Counter {
    count: u64,
}

impl Machine for Counter {
    fn is_draining(&self, _command: &[u8]) -> bool {
        false
    }

    fn attach(&mut self, _rows: Arc<dyn crate::machine::Rows>) {}

    fn apply(&mut self, _at: LogPosition, _command: &[u8], _body_bytes: u32) -> Result<Applied, ApplyError> {
        self.count += 1;
        Ok(Applied::default())
    }

    fn owners(&self, _body: holdfast_storage::LogIndex, _command: Option<&[u8]>) -> Vec<String> {
        Vec::new()
    }

    fn row_owner(&self, row: &[u8]) -> Option<(Vec<LogIndex>, String)> {
        let index = u64::from_le_bytes(row.try_into().ok()?);
        Some((vec![LogIndex(index)], format!("row {index}")))
    }

    fn owners_in(&self, octets: &[u8]) -> Vec<String> {
        let texts = octets.split(|octet| !octet.is_ascii_graphic()).filter_map(|t| str::from_utf8(t).ok());
        texts.filter(|text| text.starts_with("body-")).map(Into::into).collect()
    }

    fn admit(&mut self, _command: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn give_up(&mut self, _command: &[u8]) {}

    fn delta(&mut self) -> Delta {
        Delta { tables: self.count.to_le_bytes().to_vec(), ..Delta::default() }
    }

    fn checkpointed(&mut self) -> Vec<u128> {
        Vec::new()
    }

    fn whole(&self) -> Whole {
        let tables = self.count.to_le_bytes().to_vec();
        Whole { tables, steps: Box::new(std::iter::empty()) }
    }

    fn reading(&self) -> Reading {
        Box::new(|tables| Ok(Box::new(u64::from_le_bytes(tables.try_into().map_err(|_| "not a count")?))))
    }

    fn restore(&mut self, found: Found) {
        self.count = *found.downcast().expect("a count");
    }
}

/// Makes an empty store.
pub(crate) struct Builder;

/// The log of a disk.
pub(crate) fn open(disk: &SimDisk) -> Result<(Log, Recovered), OpenError> {
    let options = Options {
        segment_bytes: 4 << 20,
        move_below_percent: 60,
        scrub_bytes_per_second: 0,
        keys: Default::default(),
        on_erased: Arc::new(|_| {}),
        on_failure: Arc::new(|why| panic!("{why}")),
    };
    let identity = Identity { cluster: "suite".into(), node: 1 };
    Log::open(Arc::new(disk.clone()), identity, options)
}

impl Builder {
    /// As a start finds it.
    fn starting(disk: &SimDisk) -> (LogStore, StateMachine) {
        let (log, recovered) = open(disk).unwrap();
        let log = Arc::new(log);
        let rows = Arc::new(Rows::new(log.clone(), None, 0));
        let machine = Arc::new(Mutex::new(Counter::default()));
        let (state_machine, _) =
            StateMachine::restore(machine, log.clone(), rows, recovered.checkpoint).unwrap();
        (LogStore { log }, state_machine)
    }
}

impl StoreBuilder<TypeConfig, LogStore, StateMachine> for Builder {
    async fn build(&self) -> Result<((), LogStore, StateMachine), StorageError<TypeConfig>> {
        let (log, state_machine) = Builder::starting(&SimDisk::new(1));
        state_machine.started().await.unwrap();
        Ok(((), log, state_machine))
    }
}

#[test]
fn openraft_contract_suite() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(Suite::test_all(Builder)).unwrap();
}

/// P1: a start applies again what is committed and in no checkpoint. openraft gives back the log up to what it is told to be in one: a node
/// that said it of all that it has applied, and died before its next checkpoint, could never start again.
#[test]
fn p1_what_a_start_applies_again_is_in_no_checkpoint() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (_store, mut state_machine) = Builder::starting(&SimDisk::new(1));
    let at = log_id(LogPosition { term: Term(1), index: LogIndex(0) });
    let again = Entry { log_id: at, payload: EntryPayload::Blank };
    runtime.block_on(async {
        state_machine.apply(futures_util::stream::iter([Ok((again, None))])).await.unwrap();
        assert_eq!(state_machine.applied_state().await.unwrap().0, Some(at));
        assert!(state_machine.get_current_snapshot().await.unwrap().is_none(), "there is no checkpoint");
        state_machine.build_snapshot().await.unwrap();
        state_machine.started().await.unwrap();
        let snapshot = state_machine.get_current_snapshot().await.unwrap();
        assert_eq!(snapshot.unwrap().meta.last_log_id, Some(at));
    });
}

/// P9: what a checkpoint has was committed, also if the note of that is lost, which is written with the next batch: a node that takes it for
/// perhaps not committed does not believe the others that a body of it was erased, and never starts.
#[test]
fn p9_what_a_checkpoint_has_is_committed() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (disk, position) = (SimDisk::new(1), LogPosition { term: Term(1), index: LogIndex(0) });
    let (store, mut state_machine) = Builder::starting(&disk);
    let entry = Entry { log_id: log_id(position), payload: EntryPayload::Blank };
    store.log.append(vec![entry_to_stored(entry.clone())], Box::new(|done| done.unwrap()));
    runtime.block_on(async {
        state_machine.apply(futures_util::stream::iter([Ok((entry, None))])).await.unwrap();
        state_machine.build_snapshot().await.unwrap();
    });
    drop((store, state_machine));
    let (store, _state_machine) = Builder::starting(&disk);
    assert_eq!(store.log.committed(), Some(position));
}

pub(crate) fn at(index: u64) -> LogPosition {
    LogPosition { term: Term(1), index: LogIndex(index) }
}

fn of_twenty_entries() -> LogStore {
    let (store, _) = Builder::starting(&SimDisk::new(1));
    let entry = |index| entry_to_stored(Entry { log_id: log_id(at(index)), payload: EntryPayload::Blank });
    store.log.append((0..20).map(entry).collect(), Box::new(|done| done.unwrap()));
    store
}

/// P1: a leader's reader hands out what it was asked for or nothing. A stream to a follower that is behind may ask for entries that were given
/// up a moment ago; the next ones in their place would make a gap in the follower's log.
#[test]
fn p1_what_follows_on_what_was_given_up_is_not_sent_for_it() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut store = of_twenty_entries();
    let log = store.log.clone();
    let mut read = |start| {
        let entries = runtime.block_on(store.limited_get_log_entries(start, 20)).unwrap();
        entries.iter().map(|entry| entry.log_id.index()).collect::<Vec<_>>()
    };
    assert_eq!(read(5), (5..20).collect::<Vec<_>>());
    log.purge(at(9));
    assert_eq!(read(10), (10..20).collect::<Vec<_>>());
    assert_eq!(read(5), [0; 0]);
}

/// P1: what is applied is each entry in its turn. A node that misses one ends instead of going on with another state than the others.
#[test]
fn p1_no_entry_is_passed_over() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut store = of_twenty_entries();
    store.log.purge(at(9));
    let mut read = |start, end| {
        let entries =
            runtime.block_on(async { store.entries_stream(start..end).await.collect::<Vec<_>>().await });
        entries.into_iter().map(|entry| entry.map(|entry| entry.log_id.index()).ok()).collect::<Vec<_>>()
    };
    assert_eq!(read(10, 20), (10..20).map(Some).collect::<Vec<_>>());
    assert_eq!(read(5, 20), [None]);
    assert_eq!(read(5, 8), [None]);
}
