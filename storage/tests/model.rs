//! The log against a plain model: whatever is done to it, and whenever the power goes, what is found again is the state after
//! some operation at or after the last one whose completion ran. The simulated disk keeps any subset of unsynced blocks.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use holdfast_storage::codec::Vote;
use holdfast_storage::disk::sim::SimDisk;
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
