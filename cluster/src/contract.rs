//! openraft's own contract suite for stores, against ours.

use std::sync::{Arc, Mutex};

use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::{Identity, Log, LogPosition, Options, Rows};
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

use crate::log_store::LogStore;
use crate::machine::{Applied, ApplyError, Delta, Found, Machine, Reading, Refusal, Whole};
use crate::state_machine::StateMachine;
use crate::types::TypeConfig;

/// Counts commands and nothing else.
#[derive(Default)]
struct Counter {
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

impl StoreBuilder<TypeConfig, LogStore, StateMachine> for Builder {
    async fn build(&self) -> Result<((), LogStore, StateMachine), StorageError<TypeConfig>> {
        let options = Options {
            segment_bytes: 4 << 20,
            move_below_percent: 60,
            scrub_bytes_per_second: 0,
            keys: Default::default(),
            on_erased: Arc::new(|_| {}),
            on_failure: Arc::new(|why| panic!("{why}")),
        };
        let identity = Identity { cluster: "suite".into(), node: 1 };
        let (log, _) = Log::open(Arc::new(SimDisk::new(1)), identity, options).unwrap();
        let log = Arc::new(log);
        let rows = Arc::new(Rows::new(log.clone(), None, 0));
        let machine = Arc::new(Mutex::new(Counter::default()));
        let (state_machine, _) = StateMachine::restore(machine, log.clone(), rows, None).unwrap();
        state_machine.started().await.unwrap();
        Ok(((), LogStore { log }, state_machine))
    }
}

#[test]
fn openraft_contract_suite() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(Suite::test_all(Builder)).unwrap();
}
