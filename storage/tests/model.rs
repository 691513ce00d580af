//! The log against a plain model: whatever is done to it, and whenever the power goes, what is found again is the state after
//! some operation at or after the last one whose completion ran. The simulated disk keeps any subset of unsynced blocks.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use holdfast_storage::codec::Vote;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::index::Standing;
use holdfast_storage::index::sim::{Lie, SimShelf};
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
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        12 => prop_oneof![Just(0usize), 1usize..6000, Just(262_144)].prop_map(|body| Operation::Append { body }),
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
}

fn open(disk: &SimDisk) -> (Log, Recovered) {
    let options = Options { move_below_percent: 60, ..common::options() };
    let identity = Identity { cluster: "test".into(), node: 1 };
    Log::open(Arc::new(disk.clone()), identity, options).expect("the directory opens")
}

impl Run {
    fn new(seed: u64) -> Run {
        let disk = SimDisk::new(seed);
        let (log, recovered) = open(&disk);
        let log = Arc::new(log);
        assert!(recovered.pristine);
        let shelf = SimShelf::default();
        Run {
            disk,
            rows: Some(Rows::new(log.clone(), Some(Box::new(shelf.clone())), 0)),
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
                let tables = vec![self.counter as u8; (self.counter as usize * 977) % 600_000];
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
        let (log, recovered) = open(&self.disk);
        let log = Arc::new(log);
        let rows = Rows::new(log.clone(), Some(Box::new(self.shelf.clone())), 0);
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

/// P2: a sync that failed ends the log. Nothing after it is acknowledged, and it is never tried again.
#[test]
fn p2_a_failed_sync_ends_the_log() {
    let disk = SimDisk::new(1);
    let failed = Arc::new(Mutex::new(None));
    let told = failed.clone();
    let options = Options {
        move_below_percent: 60,
        scrub_bytes_per_second: 0,
        segment_bytes: 4 << 20,
        on_erased: Arc::new(|_| {}),
        on_failure: Arc::new(move |why| *told.lock().unwrap() = Some(why.to_owned())),
    };
    let identity = Identity { cluster: "test".into(), node: 1 };
    let (log, _) = Log::open(Arc::new(disk.clone()), identity, options).unwrap();
    // The spare segment's zeroing syncs too; wait until its file is there, and below until all is quiet.
    while !holdfast_storage::disk::Disk::list(&disk).unwrap().iter().any(|name| name == "segment-000001") {
        std::thread::yield_now();
    }
    let append = |index: u64| {
        let (tell, told) = channel();
        let at = LogPosition { term: Term(1), index: LogIndex(index) };
        let entry = Entry { at, head: Bytes::from_static(b"h"), body: Bytes::from_static(b"b") };
        log.append(vec![entry], Box::new(move |r| drop(tell.send(r))));
        told.recv().unwrap()
    };
    append(0).unwrap();
    let quiet = std::time::Duration::from_millis(300);
    std::thread::sleep(quiet);
    disk.fail_sync_in(1);
    assert!(append(1).is_err(), "the failed sync is reported");
    assert!(append(2).is_err(), "and nothing is acknowledged after it");
    assert!(failed.lock().unwrap().as_deref().is_some_and(|why| why.contains("fdatasync")));
}

/// P3 for one node: what was erased stands in no file, and stays erased over a crash at every write of the erasure.
#[test]
fn p3_an_erased_body_stays_erased_wherever_power_goes() {
    for steps in 0..12 {
        let disk = SimDisk::new(steps);
        let (log, _) = open(&disk);
        let canary = b"canary-5c1f0e-canary".repeat(300);
        let (tell, told) = channel();
        for index in 0..4u64 {
            let at = LogPosition { term: Term(1), index: LogIndex(index) };
            let body = if index == 2 { canary.clone() } else { vec![b'x'; 5000] };
            let tell = tell.clone();
            let entry = Entry { at, head: Bytes::from_static(b"head"), body: body.into() };
            log.append(vec![entry], Box::new(move |r| drop(tell.send(r))));
            told.recv().unwrap().unwrap();
        }
        assert!(disk.contains(b"canary-5c1f0e"));
        disk.power_off_in(steps);
        log.erase(LogIndex(2));
        // Wait for the erasure or for the power to go.
        for _ in 0..60 {
            if !disk.contains(b"canary-5c1f0e") {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        drop(log);
        disk.crash();
        let (log, _) = open(&disk);
        // A node that was down erases what it finds dead before it serves.
        let live = [0, 1, 3].map(LogIndex).into();
        log.erase_all_but(&live, LogIndex(3));
        let deadline = 400;
        for n in 0.. {
            if !disk.contains(b"canary-5c1f0e") {
                break;
            }
            assert!(n < deadline, "power off after {steps} steps: the canary is still there");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        for index in [0, 1, 3] {
            assert_eq!(log.body(LogIndex(index)).unwrap().len(), 5000, "its neighbours are untouched");
        }
        log.check();
    }
}

/// P9: a flipped bit in synced bytes is never taken for data, and never silently skipped. In a header or a head it keeps the log
/// from being opened; in a body it makes that body one that is lost.
#[test]
fn p9_rot_below_the_mark_is_refused_loudly() {
    // From the first octet of a body: header, head, body.
    for (from_body, bit, in_body) in
        [(-60, 0, false), (-30, 7, false), (-2, 3, false), (0, 1, true), (8999, 7, true)]
    {
        let disk = SimDisk::new(7);
        let (log, _) = open(&disk);
        for index in 0..3u64 {
            let at = LogPosition { term: Term(1), index: LogIndex(index) };
            let (tell, told) = channel();
            let entry = Entry { at, head: Bytes::from_static(b"head"), body: vec![b'x'; 9000].into() };
            log.append(vec![entry], Box::new(move |r| drop(tell.send(r))));
            told.recv().unwrap().unwrap();
        }
        drop(log);
        let contents = disk.contents("segment-000000");
        let body = contents.windows(50).position(|window| window == [b'x'; 50]).unwrap();
        let offset = (body as i64 + from_body) as u64;
        disk.flip("segment-000000", offset, bit);
        let options = Options { move_below_percent: 60, ..common::options() };
        let identity = Identity { cluster: "test".into(), node: 1 };
        match Log::open(Arc::new(disk.clone()), identity, options) {
            Err(OpenError::Lost(_)) => assert!(!in_body, "offset {offset}"),
            Err(e) => panic!("{e}"),
            Ok((log, _)) => {
                assert!(in_body, "offset {offset} bit {bit}: rot was taken for data");
                let lost = log.lost();
                assert_eq!(lost.len(), 1);
                assert!(matches!(log.body(lost[0].index), Err(ReadError::Damaged { .. })));
                assert!(log.entries(0..9, usize::MAX).is_err(), "nobody gets it as an entry without a body");
                assert!(!log.has_body(lost[0].index));
            }
        }
    }
}

fn entry(index: u64, term: u64, body: &'static [u8]) -> Entry {
    let at = LogPosition { term: Term(term), index: LogIndex(index) };
    Entry { at, head: Bytes::from_static(b"h"), body: Bytes::from_static(body) }
}

fn append(log: &Log, entries: Vec<Entry>) {
    let (tell, told) = channel();
    log.append(entries, Box::new(move |r| drop(tell.send(r))));
    told.recv().unwrap().unwrap();
}

/// P6, P7: a committed position that reached the disk before its entry does not commit another leader's entry in its place.
#[test]
fn p7_a_committed_position_counts_only_with_its_entry() {
    let disk = SimDisk::new(3);
    let (log, _) = open(&disk);
    append(&log, (0..3).map(|n| entry(n, 4, b"")).collect());
    log.save_committed(LogPosition { term: Term(5), index: LogIndex(2) });
    append(&log, vec![entry(3, 4, b"")]);
    drop(log);
    let (log, _) = open(&disk);
    assert_eq!(log.committed(), None, "entry 2 of term 4 was never said to be committed");
    log.save_committed(LogPosition { term: Term(4), index: LogIndex(1) });
    append(&log, vec![entry(4, 4, b"")]);
    drop(log);
    let (log, _) = open(&disk);
    assert_eq!(log.committed(), Some(LogPosition { term: Term(4), index: LogIndex(1) }));
    // Said of an entry that is still to come, which a crash may take: what was said before counts.
    log.save_committed(LogPosition { term: Term(4), index: LogIndex(40) });
    append(&log, vec![entry(5, 4, b"")]);
    log.save_committed(LogPosition { term: Term(5), index: LogIndex(3) });
    append(&log, vec![entry(6, 4, b"")]);
    drop(log);
    let (log, _) = open(&disk);
    assert_eq!(log.committed(), Some(LogPosition { term: Term(4), index: LogIndex(1) }));
}

/// P1: a body that was fetched for a snapshot is not the one of the entry that is truncated, before and after a restart.
#[test]
fn p1_truncation_spares_a_fetched_body() {
    let disk = SimDisk::new(4);
    let (log, _) = open(&disk);
    append(&log, (0..4).map(|n| entry(n, 4, b"old")).collect());
    let (tell, told) = channel();
    let at = LogPosition { term: Term(5), index: LogIndex(2) };
    log.store_body(at, Bytes::from_static(b"fetched"), Box::new(move |r| drop(tell.send(r))));
    told.recv().unwrap().unwrap();
    log.truncate_from(LogIndex(1));
    append(&log, vec![entry(1, 5, b"new")]);
    assert_eq!(log.body(LogIndex(2)).unwrap(), &b"fetched"[..]);
    assert!(log.body(LogIndex(3)).is_err());
    log.check();
    drop(log);
    let (log, _) = open(&disk);
    assert_eq!(log.body(LogIndex(2)).unwrap(), &b"fetched"[..]);
    assert!(log.body(LogIndex(3)).is_err());
    // An entry with a body takes the index over; the fetched one dies, and is erased.
    append(&log, vec![entry(2, 5, b"newer")]);
    assert_eq!(log.body(LogIndex(2)).unwrap(), &b"newer"[..]);
    for n in 0.. {
        if !disk.contains(b"fetched") {
            break;
        }
        assert!(n < 400, "the fetched body is still there");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    log.check();
}

/// P2: what a restart reads is durable before anybody is told of it, though it stood in the page cache alone.
#[test]
fn p2_the_tail_is_synced_again_at_the_start() {
    for seed in 0..8 {
        let disk = SimDisk::new(seed);
        let (log, _) = open(&disk);
        append(&log, vec![entry(0, 1, b"a")]);
        // The next sync fails and leaves the pages clean: a process that starts now sees what no later sync would write.
        std::thread::sleep(std::time::Duration::from_millis(250));
        disk.fail_sync_in(1);
        let (tell, told) = channel();
        log.append(vec![entry(1, 1, b"b")], Box::new(move |r| drop(tell.send(r))));
        assert!(told.recv().unwrap().is_err());
        drop(log);
        let (log, _) = open(&disk);
        let seen = log.last();
        drop(log);
        disk.crash();
        let (log, _) = open(&disk);
        assert_eq!(log.last(), seen, "seed {seed}: what the first start took for durable is durable");
    }
}

/// A directory without a superblock is refused, and nothing in it is touched.
#[test]
fn p9_segments_without_a_superblock_are_refused_untouched() {
    let disk = SimDisk::new(5);
    let (log, _) = open(&disk);
    append(&log, vec![entry(0, 1, b"precious")]);
    drop(log);
    holdfast_storage::disk::Disk::remove(&disk, "superblock").unwrap();
    let before = disk.contents("segment-000000");
    let options = Options { move_below_percent: 60, ..common::options() };
    let identity = Identity { cluster: "test".into(), node: 1 };
    assert!(Log::open(Arc::new(disk.clone()), identity, options).is_err());
    assert_eq!(disk.contents("segment-000000"), before);
}

/// P1: segments that hold nothing but a checkpoint under way are not given back before it is complete.
#[test]
fn p1_a_checkpoint_larger_than_a_segment_keeps_its_rows() {
    let disk = SimDisk::new(6);
    let (log, _) = open(&disk);
    append(&log, vec![entry(0, 1, b"")]);
    let rows: Vec<(u128, Vec<u8>)> = (0..600).map(|n| (n, vec![n as u8; 60_000])).collect();
    let applied = LogPosition { term: Term(1), index: LogIndex(0) };
    let (tell, told) = channel();
    let checkpoint = Checkpoint { applied, rows, gone: Vec::new(), tables: vec![1; 1000] };
    log.checkpoint(checkpoint, Box::new(move |r| drop(tell.send(r))));
    told.recv().unwrap().unwrap();
    log.check();
    drop(log);
    let (log, recovered) = open(&disk);
    assert!(recovered.checkpoint.is_some());
    assert_eq!(log.row_keys(None, 1000).len(), 600);
    assert_eq!(log.row(599).unwrap().unwrap(), vec![599u32 as u8; 60_000]);
}

fn keys(log: &Log) -> Vec<u128> {
    log.row_keys(None, 99).iter().map(|(key, _)| *key).collect()
}

fn done(begin: impl FnOnce(holdfast_storage::Completion)) {
    common::outcome(begin).unwrap();
}

/// P1: a key whose row was void, and that a later replacement of all rows brings again, is there.
#[test]
fn p1_a_row_that_comes_back_is_there_after_a_restart() {
    let disk = SimDisk::new(12);
    let log = with_rows(&disk, 3);
    let at = LogPosition { term: Term(1), index: LogIndex(0) };
    for named in [vec![0, 2], vec![0, 1, 2]] {
        let mut replacement = log.replace();
        let rows: Vec<(u128, Vec<u8>)> = named.iter().map(|key| (*key, vec![*key as u8; 9])).collect();
        // Some at a time.
        for some in rows.chunks(1) {
            done(|done| log.add_rows(&mut replacement, some.to_vec(), done));
        }
        assert_eq!(replacement.rows(), named.len());
        assert_ne!(keys(&log), named, "it does not count yet");
        done(|done| log.end_replacement(replacement, at, &[1], done));
        assert_eq!(keys(&log), named);
        log.check();
    }
    drop(log);
    let (log, _) = open(&disk);
    assert_eq!(keys(&log), [0, 1, 2]);
    assert_eq!(log.row(1).unwrap().unwrap(), vec![1; 9]);
}

/// P1: rows of a replacement that nobody ended never count, whatever comes after it.
#[test]
fn p1_a_replacement_that_was_given_up_does_not_count() {
    let disk = SimDisk::new(13);
    let log = with_rows(&disk, 3);
    let at = LogPosition { term: Term(1), index: LogIndex(0) };
    let mut given_up = log.replace();
    let strange = vec![(1, vec![9; 9]), (7, vec![9; 9])];
    done(|done| log.add_rows(&mut given_up, strange, done));
    drop(given_up);
    let own = || Checkpoint { applied: at, rows: vec![(2, vec![5; 9])], gone: vec![0], tables: vec![1] };
    done(|done| log.checkpoint(own(), done));
    let is_right = |log: &Log| {
        assert_eq!(keys(log), [1, 2]);
        assert_eq!(log.row(1).unwrap().unwrap(), b"1".to_vec());
        assert_eq!(log.row(2).unwrap().unwrap(), vec![5; 9]);
    };
    is_right(&log);
    log.check();
    drop(log);
    let (log, _) = open(&disk);
    is_right(&log);
    done(|done| log.checkpoint(own(), done));
    drop(log);
    is_right(&open(&disk).0);
}

/// Waits until the index is as it should be.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for n in 0.. {
        if holds() {
            return;
        }
        assert!(n < 2000, "{what}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn with_rows(disk: &SimDisk, count: u128) -> Arc<Log> {
    let (log, _) = open(disk);
    append(&log, vec![entry(0, 1, b"")]);
    let rows = (0..count).map(|n| (n, n.to_string().into_bytes())).collect();
    let applied = LogPosition { term: Term(1), index: LogIndex(0) };
    let checkpoint = Checkpoint { applied, rows, gone: vec![], tables: vec![1] };
    let (tell, told) = channel();
    log.checkpoint(checkpoint, Box::new(move |r| drop(tell.send(r))));
    told.recv().unwrap().unwrap();
    Arc::new(log)
}

/// P9: an index that is stale, another node's or rotten is brought up to the log at the start: lacking rows are put, strange
/// ones removed.
#[test]
fn p9_a_strange_index_is_brought_up_to_the_log() {
    let disk = SimDisk::new(8);
    let log = with_rows(&disk, 2500);
    let shelf = SimShelf::default();
    shelf.plant(7, Bytes::from_static(b"stale"));
    shelf.plant(5000, Bytes::from_static(b"another node's"));
    let rows = Rows::new(log, Some(Box::new(shelf.clone())), 0);
    until("the index is folded", || rows.standing() == Standing::Ready);
    assert_eq!(shelf.keys(), (0..2500).collect::<Vec<u128>>());
    let before = shelf.counts().0;
    assert_eq!(rows.read(&[7, 5000]).unwrap(), [(7, Bytes::from_static(b"7"))]);
    assert_eq!(shelf.counts().0, before + 1, "the index was asked, but only for what the log knows");
    assert_eq!(rows.get(7).unwrap().unwrap(), &b"7"[..]);
    assert_eq!(shelf.counts().0, before + 1, "a single row is read from the log");
}

/// P9: an index that fails is set aside, and every row is still there.
#[test]
fn p9_an_index_that_fails_costs_no_row() {
    let cases = [
        (Lie::Panics, false),
        (Lie::Panics, true),
        (Lie::Fails, false),
        (Lie::Shut, true),
        (Lie::Loops, true),
    ];
    for (lie, at_start) in cases {
        let disk = SimDisk::new(9);
        let log = with_rows(&disk, 1500);
        let shelf = SimShelf::default();
        // So that a walk over the index takes more than one step.
        (0..1500).for_each(|key: u128| shelf.plant(key, key.to_string().into()));
        if at_start {
            shelf.lie(lie);
        }
        let rows = Rows::new(log, Some(Box::new(shelf.clone())), 0);
        if !at_start {
            until("the index is folded", || rows.standing() == Standing::Ready);
            shelf.lie(lie);
        }
        let keys: Vec<u128> = (0..1500).collect();
        for _ in 0..3 {
            let expected: Vec<(u128, Bytes)> = keys.iter().map(|k| (*k, k.to_string().into())).collect();
            assert_eq!(rows.read(&keys).unwrap(), expected, "{lie:?}");
        }
        until("it is set aside", || rows.standing() == Standing::Aside && shelf.counts().1 >= 1);
    }
}

/// The room on the disk is the log's first: without enough of it there is no index, and no row is missed.
#[test]
fn p9_without_room_there_is_no_index() {
    let disk = SimDisk::new(10);
    let log = with_rows(&disk, 10);
    let shelf = SimShelf::default();
    shelf.plant(1, Bytes::from_static(b"old"));
    let rows = Rows::new(log, Some(Box::new(shelf.clone())), u64::MAX);
    until("it is discarded", || rows.standing() == Standing::Aside && shelf.keys().is_empty());
    assert_eq!(rows.read(&[1]).unwrap(), [(1, Bytes::from_static(b"1"))]);
}

/// P1: a checkpoint that power cut short after its tombstones stays void when a later one is complete.
#[test]
fn p1_tombstones_of_a_checkpoint_that_was_cut_short_are_void() {
    let disk = SimDisk::new(11);
    let log = with_rows(&disk, 3);
    let at = LogPosition { term: Term(1), index: LogIndex(0) };
    // So many tombstones that the tables and the end are in a later batch.
    let gone = std::iter::once(1).chain((0..350_000).map(|n| u128::MAX - n)).collect();
    let cut_short = Checkpoint { applied: at, rows: vec![], gone, tables: vec![7] };
    // After two of its three batches, when nothing else is written.
    until("the spare segment", || {
        holdfast_storage::disk::Disk::list(&disk).unwrap().iter().any(|name| name == "segment-000001")
    });
    std::thread::sleep(std::time::Duration::from_millis(300));
    disk.power_off_in(4);
    log.checkpoint(cut_short, Box::new(|_| {}));
    drop(log);
    disk.crash();
    let (log, _) = open(&disk);
    assert_eq!(log.row_keys(None, 9).len(), 3, "it does not count");
    let (tell, told) = channel();
    let next = Checkpoint { applied: at, rows: vec![], gone: vec![2], tables: vec![1] };
    log.checkpoint(next, Box::new(move |r| drop(tell.send(r))));
    told.recv().unwrap().unwrap();
    assert_eq!(keys(&log), [0, 1]);
    drop(log);
    let (log, _) = open(&disk);
    assert_eq!(keys(&log), [0, 1], "and does not when a later one is complete");
}

/// P9: rows are read while checkpoints replace them, and their segments are given back and used again.
#[test]
fn p9_rows_are_read_while_their_segments_are_reused() {
    let disk = SimDisk::new(12);
    let log = with_rows(&disk, 40);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let checkpoint = |value: u8| {
        let at = LogPosition { term: Term(1), index: LogIndex(0) };
        let rows = (0..40).map(|key| (key, vec![value; 50_000])).collect();
        let (tell, told) = channel();
        let checkpoint = Checkpoint { applied: at, rows, gone: vec![], tables: vec![1] };
        log.checkpoint(checkpoint, Box::new(move |r| drop(tell.send(r))));
        told.recv().unwrap().unwrap();
    };
    checkpoint(0);
    std::thread::scope(|scope| {
        for reader in 0..2 {
            let (log, stop) = (&log, &stop);
            scope.spawn(move || {
                let mut key = reader;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    key = (key + 7) % 40;
                    let row = log.row(key).expect("every row is readable at any time").expect("it exists");
                    assert!(row.len() == 50_000 && row.iter().all(|octet| *octet == row[0]));
                }
            });
        }
        for value in 1..60 {
            checkpoint(value);
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let held = log.space().held_bytes;
    assert!(held < 60 << 20, "segments were given back meanwhile: {held}");
}
