//! openraft's own contract suite for stores, against ours.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::{Bytes, Identity, Log, LogIndex, LogPosition, Options};
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

use crate::log_store::LogStore;
use crate::machine::{Applied, Delta, Machine, Refusal};
use crate::state_machine::StateMachine;
use crate::types::TypeConfig;

/// Counts commands and nothing else.
#[derive(Default)]
struct Counter {
    count: u64,
}

impl Machine for Counter {
    fn apply(&mut self, _at: LogPosition, _command: &[u8], _body_bytes: u32) -> Applied {
        self.count += 1;
        Applied::default()
    }

    fn admit(&mut self, _command: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn give_up(&mut self, _command: &[u8]) {}

    fn delta(&mut self) -> Delta {
        self.whole()
    }

    fn whole(&self) -> Delta {
        Delta { tables: self.count.to_le_bytes().to_vec(), ..Delta::default() }
    }

    fn restore(&mut self, tables: &[u8], _rows: &BTreeMap<u128, Bytes>) -> Result<(), String> {
        self.count = u64::from_le_bytes(tables.try_into().map_err(|_| "not a count")?);
        Ok(())
    }

    fn live_bodies(&self) -> BTreeSet<LogIndex> {
        BTreeSet::new()
    }
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine> for Builder {
    async fn build(&self) -> Result<((), LogStore, StateMachine), StorageError<TypeConfig>> {
        let options = Options {
            segment_bytes: 4 << 20,
            on_erased: Box::new(|_| {}),
            on_failure: Box::new(|why| panic!("{why}")),
        };
        let identity = Identity { cluster: "suite".into(), node: 1 };
        let (log, _) = Log::open(Arc::new(SimDisk::new(1)), identity, options).unwrap();
        let log = Arc::new(log);
        let machine = Arc::new(Mutex::new(Counter::default()));
        let (state_machine, _) = StateMachine::restore(machine, log.clone(), None).unwrap();
        state_machine.started();
        Ok(((), LogStore { log }, state_machine))
    }
}

#[test]
fn openraft_contract_suite() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(Suite::test_all(Builder)).unwrap();
}
