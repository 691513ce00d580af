//! The log against a plain model: whatever is done to it, and whenever the power goes, what is found again is the state after
//! some operation at or after the last one whose completion ran. The simulated disk keeps any subset of unsynced blocks.
//!
//! `storage/interleavings` builds it with small limits, which makes a life short: for many lives.

// Where a test decides which thread goes on, nobody runs this.
#![cfg(not(feature = "shuttle"))]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use holdfast_storage::codec::Vote;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::index::Sealed;
use holdfast_storage::index::sim::{Lie, SimShelf};
use holdfast_storage::limits::{BODY_BYTES_MAX, SEGMENT_BYTES_MIN};
use holdfast_storage::seal::{KEY_BYTES, Keyring};
use holdfast_storage::{
    Bytes, Checkpoint, Entry, Identity, Log, LogIndex, LogPosition, Options, Recovered, Rows, Term,
};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Operation {
    Append {
        body: usize,
    },
    Truncate {
        keep: usize,
    },
    Vote,
    Checkpoint {
        rows: u8,
        gone: u8,
    },
    /// All rows anew, in some steps; it may be given up before its end.
    Replace {
        steps: u8,
        ends: bool,
    },
    Purge,
    Erase {
        back: usize,
    },
    Settle,
    /// The index begins to lie, and somebody's row is planted in it.
    Lie {
        lie: Lie,
    },
    /// Some rows leave memory.
    Spill,
    Crash {
        after: u64,
    },
    Restart,
    /// Ends and starts again with another at-rest key on top of the ring, which keeps those before.
    Rekey {
        key: u8,
    },
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        12 => prop_oneof![Just(0usize), 1usize..6000, Just(BODY_BYTES_MAX)].prop_map(|body| Operation::Append { body }),
        2 => (0usize..5).prop_map(|keep| Operation::Truncate { keep }),
        2 => Just(Operation::Vote),
        2 => (0u8..4, 0u8..3).prop_map(|(rows, gone)| Operation::Checkpoint { rows, gone }),
        2 => (0u8..4, any::<bool>()).prop_map(|(steps, ends)| Operation::Replace { steps, ends }),
        1 => Just(Operation::Purge),
        4 => (0usize..30).prop_map(|back| Operation::Erase { back }),
        3 => Just(Operation::Settle),
        1 => prop_oneof![
            Just(Lie::None), Just(Lie::LosesWrites), Just(Lie::Flips), Just(Lie::Panics), Just(Lie::Fails), Just(Lie::Shut), Just(Lie::Loops),
        ].prop_map(|lie| Operation::Lie { lie }),
        3 => Just(Operation::Spill),
        2 => (0u64..12).prop_map(|after| Operation::Crash { after }),
        1 => Just(Operation::Restart),
        1 => (1..=KEYS).prop_map(|key| Operation::Rekey { key }),
    ]
}

/// What the log should say.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    floor: Option<LogPosition>,
    entries: Vec<(LogPosition, Bytes)>,
    vote: Option<Vote>,
    rows: BTreeMap<u128, Vec<u8>>,
    tables: Vec<u8>,
    applied: Option<LogPosition>,
}

impl Model {
    fn next(&self) -> u64 {
        let last = self.entries.last().map(|(at, _)| *at).or(self.floor);
        last.map_or(0, |at| at.index.0 + 1)
    }
}

struct Run {
    disk: SimDisk,
    log: Option<Arc<Log>>,
    shelf: SimShelf,
    rows: Option<Rows>,
    /// The state after each operation since the last restart.
    states: Vec<Model>,
    /// How many operations are known durable.
    durable: Arc<Mutex<usize>>,
    killed: BTreeSet<LogIndex>,
    counter: u64,
    term: u64,
    keys: Keyring,
}

/// At-rest keys that there are.
const KEYS: u8 = 3;

/// One of them seals, all open.
fn ring(sealing: u8) -> Keyring {
    let others = (1..=KEYS).filter(|key| *key != sealing);
    let keys: Vec<_> = std::iter::once(sealing).chain(others).map(|key| [key; KEY_BYTES]).collect();
    Keyring::new(&keys).unwrap()
}

fn open(disk: &SimDisk, keys: &Keyring) -> (Log, Recovered) {
    let options = Options { move_below_percent: 60, keys: keys.clone(), ..common::options() };
    let identity = Identity { cluster: "test".into(), node: 1 };
    Log::open(Arc::new(disk.clone()), identity, options).expect("the directory opens")
}

impl Run {
    fn new(seed: u64) -> Run {
        let disk = SimDisk::new(seed);
        let keys = Keyring::default();
        let (log, recovered) = open(&disk, &keys);
        let log = Arc::new(log);
        assert!(recovered.pristine);
        let shelf = SimShelf::default();
        Run {
            disk,
            rows: Some(Rows::new(log.clone(), Some(Box::new(shelf.clone())), 0)),
            keys,
            log: Some(log),
            shelf,
            states: vec![Model::default()],
            durable: Arc::default(),
            killed: BTreeSet::new(),
            counter: 0,
            term: 1,
        }
    }

    fn now(&self) -> Model {
        self.states.last().cloned().unwrap_or_default()
    }

    fn done(&self) -> holdfast_storage::Completion {
        let (number, durable) = (self.states.len(), self.durable.clone());
        Box::new(move |result| {
            if result.is_ok() {
                let mut durable = durable.lock().unwrap();
                assert!(*durable <= number, "completions run in order");
                *durable = number;
            }
        })
    }

    fn log(&self) -> &Log {
        self.log.as_ref().unwrap()
    }

    fn step(&mut self, operation: &Operation) {
        let mut model = self.now();
        self.counter += 1;
        match operation {
            Operation::Append { body } => {
                let at = LogPosition { term: Term(self.term), index: LogIndex(model.next()) };
                let stamp = format!("{}-", self.counter);
                let body: Bytes = stamp.bytes().cycle().take(*body).collect::<Vec<u8>>().into();
                self.killed.remove(&at.index);
                let head = Bytes::from(at.index.0.to_string());
                let done = self.done();
                self.log().append(vec![Entry { at, head, body: body.clone() }], done);
                model.entries.push((at, body));
            }
            Operation::Truncate { keep } => {
                let committed = model.applied.map_or(0, |a| a.index.0 + 1);
                let from = model.next().saturating_sub(*keep as u64).max(committed);
                if model.entries.is_empty() || from >= model.next() {
                    return;
                }
                self.term += 1;
                self.log().truncate_from(LogIndex(from));
                model.entries.retain(|(at, _)| at.index.0 < from);
            }
            Operation::Vote => {
                let vote = Vote { term: Term(self.counter), node: 1, committed: false };
                self.log().save_vote(vote, self.done());
                model.vote = Some(vote);
            }
            Operation::Checkpoint { rows, gone } => {
                let Some((applied, _)) = model.entries.last().cloned() else { return };
                let rows: Vec<(u128, Vec<u8>)> = (0..*rows)
                    .map(|n| (self.counter as u128 * 8 + n as u128 % 3, vec![n; n as usize * 100]))
                    .collect::<BTreeMap<_, _>>()
                    .into_iter()
                    .collect();
                let gone: Vec<u128> = model.rows.keys().take(*gone as usize).copied().collect();
                self.rows.as_ref().unwrap().gone(gone.clone());
                let tables = vec![
                    self.counter as u8;
                    (self.counter as usize * 977) % (SEGMENT_BYTES_MIN as usize / 7)
                ];
                let checkpoint =
                    Checkpoint { applied, rows: rows.clone(), gone: gone.clone(), tables: tables.clone() };
                self.log().checkpoint(checkpoint, self.done());
                model.rows.extend(rows);
                gone.iter().for_each(|key| drop(model.rows.remove(key)));
                (model.tables, model.applied) = (tables, Some(applied));
            }
            Operation::Replace { steps, ends } => {
                let Some((applied, _)) = model.entries.last().cloned() else { return };
                // The checkpoint before it is complete.
                common::outcome(|done| self.log().append(Vec::new(), done)).unwrap();
                let mut replacement = self.log().replace();
                let mut rows = BTreeMap::new();
                for step in 0..*steps {
                    // Keys of now and of before, and new ones.
                    let key =
                        |n: u8| (self.counter as u128 * 8).saturating_sub(n as u128 * 20) + step as u128;
                    let some: BTreeMap<u128, Vec<u8>> =
                        (0..3).map(|n| (key(n), vec![step ^ 0x80; 50 + n as usize])).collect();
                    let some: Vec<_> = some.into_iter().filter(|(key, _)| !rows.contains_key(key)).collect();
                    rows.extend(some.clone());
                    self.log().add_rows(&mut replacement, some, Box::new(|_| {}));
                }
                if !ends {
                    return;
                }
                let tables = vec![self.counter as u8; 3000];
                self.log().end_replacement(replacement, applied, &tables, self.done());
                self.rows.as_ref().unwrap().replaced();
                (model.rows, model.tables, model.applied) = (rows, tables, Some(applied));
            }
            Operation::Purge => {
                let Some(applied) = model.applied else { return };
                if model.floor.is_some_and(|f| f >= applied) {
                    return;
                }
                self.log().purge(applied);
                model.entries.retain(|(at, _)| at.index > applied.index);
                model.floor = Some(applied);
            }
            Operation::Erase { back } => {
                let Some(index) = model.next().checked_sub(*back as u64 + 1) else { return };
                self.log().erase(LogIndex(index));
                self.killed.insert(LogIndex(index));
                return;
            }
            Operation::Settle => {
                let (tell, told) = channel();
                self.log().append(Vec::new(), Box::new(move |r| drop(tell.send(r))));
                if let Ok(Ok(())) = told.recv() {
                    assert_eq!(
                        all_rows(self.rows.as_ref().unwrap()),
                        model.rows,
                        "P9: whatever the index says"
                    );
                }
                return;
            }
            Operation::Lie { lie } => {
                self.shelf.lie(*lie);
                self.shelf.plant(self.counter as u128 % 40, Bytes::from_static(b"somebody else's"));
                return;
            }
            Operation::Spill => {
                self.rows.as_ref().unwrap().spilled(model.rows.keys().copied().collect());
                return;
            }
            Operation::Crash { after } => {
                self.disk.power_off_in(*after);
                self.restart(true);
                return;
            }
            Operation::Restart => {
                self.restart(false);
                return;
            }
            Operation::Rekey { key } => {
                self.keys = ring(*key);
                self.restart(false);
                return;
            }
        }
        self.states.push(model);
    }

    fn restart(&mut self, crash: bool) {
        drop(self.rows.take());
        if crash {
            // The last operation hangs in the air while the power goes.
            let _ = self.log.take();
            self.disk.crash();
        } else {
            self.log().check();
            drop(self.log.take());
        }
        let (log, recovered) = open(&self.disk, &self.keys);
        let log = Arc::new(log);
        let shelf = Sealed { shelf: self.shelf.clone(), keys: self.keys.clone() };
        let rows = Rows::new(log.clone(), Some(Box::new(shelf)), 0);
        log.check();
        assert!(!recovered.ambiguous_tail, "a crash is never ambiguous");
        let all = log.entries(0..u64::MAX, usize::MAX).expect("what is found is readable");
        let checkpoint = recovered.checkpoint.unwrap_or_default();
        let found = Model {
            floor: log.floor(),
            entries: all.iter().map(|e| (e.at, e.body.clone())).collect(),
            vote: recovered.vote,
            rows: all_rows(&rows),
            tables: checkpoint.tables.to_vec(),
            applied: Some(checkpoint.applied).filter(|a| *a != LogPosition::default()),
        };
        let durable = *self.durable.lock().unwrap();
        let known = &self.states[durable.min(self.states.len() - 1)..];
        let killed = &self.killed;
        let same = |state: &&Model| {
            let entries = state.entries.iter().zip(&found.entries).all(|((at, body), (at2, body2))| {
                at == at2 && (body == body2 || body2.is_empty() && killed.contains(&at.index))
            });
            entries
                && state.entries.len() == found.entries.len()
                && Model { entries: vec![], ..(*state).clone() } == Model { entries: vec![], ..found.clone() }
        };
        // Position 0 stands for "no checkpoint" in this model.
        let known: Vec<Model> = known
            .iter()
            .map(|m| Model { applied: m.applied.filter(|a| *a != LogPosition::default()), ..m.clone() })
            .collect();
        let matching = known.iter().find(|m| same(m));
        assert!(
            matching.is_some(),
            "found {:?} which is none of the {} states since operation {durable}; last: {:?}",
            brief(&found),
            known.len(),
            known.last().map(brief),
        );
        self.states = vec![found];
        *self.durable.lock().unwrap() = 0;
        (self.log, self.rows) = (Some(log), Some(rows));
        self.term += 1;
    }
}

/// All rows, read in small steps.
fn all_rows(rows: &Rows) -> BTreeMap<u128, Vec<u8>> {
    let (mut all, mut after) = (BTreeMap::new(), None);
    loop {
        let keys = rows.keys(after, 3);
        let Some(last) = keys.last() else { return all };
        after = Some(*last);
        // As a walk reads them, and one by one.
        for (key, row) in rows.read(&keys).expect("every row is readable") {
            assert!(rows.contains(key));
            assert_eq!(rows.get(key).expect("readable").as_ref(), Some(&row));
            all.insert(key, row.to_vec());
        }
    }
}

fn brief(m: &Model) -> String {
    format!(
        "floor {:?}, {} entries to {:?}, vote {:?}, rows {:?}, tables {} bytes, applied {:?}",
        m.floor,
        m.entries.len(),
        m.entries.last().map(|(at, _)| at),
        m.vote.map(|v| v.term),
        m.rows.keys().collect::<Vec<_>>(),
        m.tables.len(),
        m.applied
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: common::cases(64), max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// P1 and P2 for one node: nothing whose completion ran is lost, nothing else is invented.
    #[test]
    fn p1_log_matches_its_model(seed: u64, operations in prop::collection::vec(operation(), 1..120)) {
        let mut run = Run::new(seed);
        for operation in &operations {
            run.step(operation);
        }
        run.restart(true);
        run.restart(false);
    }
}
