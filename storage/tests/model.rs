//! The log against a plain model: whatever is done to it, and whenever the power goes, what is found again is the state after
//! some operation at or after the last one whose completion ran. The simulated disk keeps any subset of unsynced blocks, and may be full: the log
//! waits then.
//!
//! The disk may also lie: flip a bit, lose a write that it acknowledged, put one elsewhere. Then a start may say that something is lost (the
//! others would bring it), or find an earlier state; what it never may is show a state that there never was, or another body.
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
use holdfast_storage::disk::Disk;
use holdfast_storage::disk::sim::{SimDisk, WriteLie};
use holdfast_storage::index::Sealed;
use holdfast_storage::index::sim::{Lie, SimShelf};
use holdfast_storage::limits::{BODY_BYTES_MAX, SEGMENT_BYTES_MIN};
use holdfast_storage::log::dump;
use holdfast_storage::seal::{KEY_BYTES, Keyring};
use holdfast_storage::{
    Bytes, Checkpoint, Entry, Identity, Log, LogIndex, LogPosition, OpenError, Options, ReadError, Recovered,
    Rows, Term,
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
    /// Room for so many more half segments, or no bound.
    Full {
        halves: Option<u64>,
    },
    /// While the node is down a bit flips somewhere in what was written.
    Rot {
        file: usize,
        at: f64,
        bit: u8,
    },
    /// After so many more writes one is not what the disk says.
    Deceive {
        after: u64,
        lie: WriteLie,
    },
    /// Ends and starts again with another at-rest key on top of the ring, which keeps those before.
    Rekey {
        key: u8,
    },
}

/// One of a node whose disk loses power and may be full; and lies, or does not.
fn operation(lies: bool) -> BoxedStrategy<Operation> {
    let lie = prop_oneof![Just(WriteLie::Lost), Just(WriteLie::Misdirected)];
    let lying = prop_oneof![
        (0usize..9, 0.0..1.0f64, 0u8..8).prop_map(|(file, at, bit)| Operation::Rot { file, at, bit }),
        (0u64..12, lie).prop_map(|(after, lie)| Operation::Deceive { after, lie }),
    ];
    match lies {
        true => prop_oneof![18 => sound_operation(), 1 => lying].boxed(),
        false => sound_operation().boxed(),
    }
}

fn sound_operation() -> impl Strategy<Value = Operation> {
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
        1 => prop_oneof![(0u64..4).prop_map(Some), Just(None)].prop_map(|halves| Operation::Full { halves }),
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
    killed: BTreeSet<LogPosition>,
    counter: u64,
    term: u64,
    keys: Keyring,
    /// Why the log has stopped: the node ends, and starts again.
    failed: Failed,
    /// Every state that there was on this disk.
    past: Vec<Model>,
    /// Every body that there was, by its CRC-32: what other nodes would bring.
    bodies: BTreeMap<(LogIndex, u32), Bytes>,
}

type Failed = Arc<Mutex<Option<String>>>;

/// At-rest keys that there are.
const KEYS: u8 = 3;

/// One of them seals, all open.
fn ring(sealing: u8) -> Keyring {
    let others = (1..=KEYS).filter(|key| *key != sealing);
    let keys: Vec<_> = std::iter::once(sealing).chain(others).map(|key| [key; KEY_BYTES]).collect();
    Keyring::new(&keys).unwrap()
}

fn open(disk: &SimDisk, keys: &Keyring, failed: &Failed) -> Result<(Log, Recovered), OpenError> {
    *failed.lock().unwrap() = None;
    let failed = failed.clone();
    let on_failure = Arc::new(move |why: &str| *failed.lock().unwrap() = Some(why.to_owned()));
    let options = Options { move_below_percent: 60, keys: keys.clone(), on_failure, ..common::options() };
    let identity = Identity { cluster: "test".into(), node: 1 };
    Log::open(Arc::new(disk.clone()), identity, options)
}

impl Run {
    fn new(seed: u64) -> Run {
        let disk = SimDisk::new(seed);
        let keys = Keyring::default();
        let failed = Arc::default();
        let (log, recovered) = open(&disk, &keys, &failed).expect("an empty directory opens");
        let log = Arc::new(log);
        assert!(recovered.pristine);
        let shelf = SimShelf::default();
        Run {
            disk,
            rows: Some(Rows::new(log.clone(), Some(Box::new(shelf.clone())), 0)),
            keys,
            failed,
            past: Vec::new(),
            bodies: BTreeMap::new(),
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
        let failed = self.failed.lock().unwrap().clone();
        if let Some(why) = failed {
            assert!(self.disk.lies() > 0, "a log has stopped on a sound disk: {why}");
            self.restart(false);
        }
        let mut model = self.now();
        self.counter += 1;
        match operation {
            Operation::Append { body } => {
                let at = LogPosition { term: Term(self.term), index: LogIndex(model.next()) };
                let stamp = format!("{}-", self.counter);
                let body: Bytes = stamp.bytes().cycle().take(*body).collect::<Vec<u8>>().into();
                self.bodies.insert((at.index, crc32fast::hash(&body)), body.clone());
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
                if common::outcome(|done| self.log().append(Vec::new(), done)).is_err() {
                    return;
                }
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
                let at = model.entries.iter().map(|(at, _)| *at).find(|at| at.index.0 == index);
                self.killed.extend(at);
                return;
            }
            Operation::Settle => {
                let (tell, told) = channel();
                self.log().append(Vec::new(), Box::new(move |r| drop(tell.send(r))));
                if let Ok(Ok(())) = told.recv() {
                    match all_rows(self.rows.as_ref().unwrap()) {
                        // The log has stopped, and the next start says what is lost.
                        Err(_) if self.disk.lies() > 0 => {}
                        found => assert_eq!(found.unwrap(), model.rows, "P9: whatever the index says"),
                    }
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
            Operation::Full { halves } => {
                let room = halves.map(|halves| self.disk.used_bytes() + halves * SEGMENT_BYTES_MIN / 2);
                self.disk.set_capacity(room.unwrap_or(u64::MAX));
                // Whoever waits for a log that waits for room would do so for good.
                self.disk.relent_in(20);
                return;
            }
            Operation::Rot { file, at, bit } => {
                drop((self.rows.take(), self.log.take()));
                let files = self.disk.list().unwrap();
                let name = &files[file % files.len()];
                let contents = self.disk.contents(name);
                let written = contents.iter().rposition(|octet| *octet != 0).map_or(0, |last| last + 1);
                if written > 0 {
                    self.disk.flip(name, (at * written as f64) as u64, *bit);
                }
                self.restart(false);
                return;
            }
            Operation::Deceive { after, lie } => {
                self.disk.lie_in(*after, *lie);
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
        } else if let Some(log) = self.log.take() {
            log.check();
        }
        self.past.append(&mut self.states.clone());
        let opened = open(&self.disk, &self.keys, &self.failed);
        // What a disk that lies does cannot always be told from what it was told to do. While this looks it does not.
        self.disk.lie_no_more();
        let lied = self.disk.lies() > 0;
        let (log, recovered) = match opened {
            Err(OpenError::Lost(damage)) if lied && damage.count > 0 => return self.begin_anew(),
            opened => opened.expect("the directory opens"),
        };
        let log = Arc::new(log);
        for lost in log.lost() {
            assert!(lied, "a sound disk has lost {lost:?}");
            let crc = lost.crc.expect("a start reads each header");
            let body = self.bodies.get(&(lost.index, crc));
            let body = body.unwrap_or_else(|| panic!("nobody ever had {lost:?}")).clone();
            drop(common::outcome(|done| log.mend_body(lost.index, body, done)));
        }
        let shelf = Sealed { shelf: self.shelf.clone(), keys: self.keys.clone() };
        let rows = Rows::new(log.clone(), Some(Box::new(shelf)), 0);
        log.check();
        assert!(lied || !recovered.ambiguous_tail, "a crash is never ambiguous");
        drop(log.end_ambiguity());
        let all = match log.entries(0..u64::MAX, usize::MAX) {
            // What was to be mended found no room, or the disk has lied again.
            Err(_) if lied => return self.begin_anew(),
            all => all.expect("what is found is readable"),
        };
        let found_rows = match all_rows(&rows) {
            Err(_) if lied => return self.begin_anew(),
            found => found.expect("every row is readable"),
        };
        let checkpoint = recovered.checkpoint.unwrap_or_default();
        let mut found = Model {
            floor: log.floor(),
            entries: all.iter().map(|e| (e.at, e.body.clone())).collect(),
            vote: recovered.vote,
            rows: found_rows,
            tables: checkpoint.tables.to_vec(),
            applied: Some(checkpoint.applied).filter(|a| *a != LogPosition::default()),
        };
        let durable = *self.durable.lock().unwrap();
        let known = if lied { &self.past[..] } else { &self.states[durable.min(self.states.len() - 1)..] };
        let killed = &self.killed;
        let same = |state: &&Model| {
            let entries = state.entries.iter().zip(&found.entries).all(|((at, body), (at2, body2))| {
                at == at2 && (body == body2 || body2.is_empty() && (lied || killed.contains(at)))
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
        if matching.is_none() {
            self.show();
        }
        assert!(
            matching.is_some(),
            "found {:?} which is none of the {} states since operation {durable}; last: {:?}",
            brief(&found),
            known.len(),
            known.last().map(brief),
        );
        // A body of which nothing is left, as its last record was cut off, is brought by others: the state says that it should be there.
        let should_be = matching.map(|m| m.entries.clone()).unwrap_or_default();
        for ((at, body), (_, found)) in should_be.iter().zip(&mut found.entries) {
            if found.is_empty() && !body.is_empty() && !killed.contains(at) {
                *found = body.clone();
                if common::outcome(|done| log.mend_body(at.index, body.clone(), done)).is_err() {
                    return self.begin_anew();
                }
            }
        }
        self.states = vec![found];
        *self.durable.lock().unwrap() = 0;
        (self.log, self.rows) = (Some(log), Some(rows));
        self.term += 1;
    }
}

impl Run {
    /// On an empty disk, as a node that is replaced.
    fn begin_anew(&mut self) {
        drop((self.rows.take(), self.log.take()));
        self.counter += 1;
        let anew = Run::new(self.counter);
        let (shelf, counter, term) = (self.shelf.clone(), self.counter, self.term + 1);
        *self = Run { shelf, counter, term, keys: self.keys.clone(), ..anew };
    }
}

impl Run {
    /// What stands on the disk, for whoever has to explain a failure.
    fn show(&self) {
        let shown = dump::dump(&self.disk, &self.keys, &mut |line| eprintln!("{line:?}"));
        eprintln!("{shown:?}");
        for name in self.disk.list().unwrap() {
            let contents = self.disk.contents(&name);
            let written = contents.iter().rposition(|octet| *octet != 0);
            eprintln!("{name}: written up to {written:?}, segment {:?}", contents.get(32..40));
        }
        self.past.iter().enumerate().for_each(|(n, state)| eprintln!("state {n}: {}", brief(state)));
    }
}

/// All rows, read in small steps.
fn all_rows(rows: &Rows) -> Result<BTreeMap<u128, Vec<u8>>, ReadError> {
    let (mut all, mut after) = (BTreeMap::new(), None);
    loop {
        let keys = rows.keys(after, 3);
        let Some(last) = keys.last() else { return Ok(all) };
        after = Some(*last);
        // As a walk reads them, and one by one.
        for (key, row) in rows.read(&keys)? {
            assert!(rows.contains(key));
            assert_eq!(rows.get(key)?.as_ref(), Some(&row));
            all.insert(key, row.to_vec());
        }
    }
}

fn brief(m: &Model) -> String {
    format!(
        "floor {:?}, {} entries to {:?}, bodies {:?}, vote {:?}, rows {:?}, tables {} bytes, applied {:?}",
        m.floor,
        m.entries.len(),
        m.entries.last().map(|(at, _)| at),
        m.entries.iter().map(|(at, body)| (at.term.0, body.len())).collect::<Vec<_>>(),
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
    fn p1_log_matches_its_model(
        seed: u64,
        operations in prop::bool::weighted(0.25).prop_flat_map(|lies| prop::collection::vec(operation(lies), 1..120)),
    ) {
        let mut run = Run::new(seed);
        for operation in &operations {
            run.step(operation);
        }
        run.restart(true);
        run.restart(false);
    }
}
