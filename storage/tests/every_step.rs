//! A scripted life of a log with one thing gone wrong in it: each operation of the disk fails once, one after the other; and the power
//! goes at each write, sync, creation and removal, so also in the middle of every checkpoint, erasure, recycling and superblock.
//!
//! Whatever goes wrong: what was acknowledged is there at the next start, what was not is there whole or not at all, a log that has
//! failed acknowledges nothing more, and what was erased or truncated cannot be read once the node has started again.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, and waits for threads"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{at, body, entry, open_with, options, outcome, rekeyed, segments};
use holdfast_storage::codec::Vote;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::log::dump::{Line, dump};
use holdfast_storage::record::{HEADER_BYTES, Kind};
use holdfast_storage::{Checkpoint, Log, LogIndex, LogPosition, OpenError, Options};

const BODY: usize = 130_000;

/// What the log has said of itself.
#[derive(Default)]
struct Told {
    /// Entries that were acknowledged, and not truncated since.
    entries: BTreeMap<u64, LogPosition>,
    vote: Option<Vote>,
    rows: BTreeMap<u128, Vec<u8>>,
    /// Bodies that are dead: erased, or truncated.
    dead: BTreeSet<(u64, u64)>,
    /// Set once something failed.
    over: bool,
}

impl Told {
    /// Notes an outcome; false once the log has failed, after which nothing may succeed.
    fn note(&mut self, result: bool) -> bool {
        assert!(!(self.over && result), "a log that had failed acknowledged something");
        self.over |= !result;
        result
    }
}

fn vote(term: u64) -> Vote {
    Vote { term: holdfast_storage::Term(term), node: 1, committed: false }
}

/// Octets that differ by term, as a truncated entry's do from those of the one that takes its place.
fn octets(term: u64, index: u64) -> holdfast_storage::Bytes {
    body(term * 100_000 + index, BODY)
}

fn append(log: &Log, told: &mut Told, term: u64, indexes: std::ops::Range<u64>) {
    for index in indexes {
        let entry = entry(at(term, index), octets(term, index));
        if told.note(outcome(|done| log.append(vec![entry], done)).is_ok()) {
            told.entries.insert(index, at(term, index));
        }
    }
}

fn checkpoint(log: &Log, told: &mut Told, applied: LogPosition, number: u128) {
    let rows: Vec<(u128, Vec<u8>)> = (0..3).map(|n| (number * 10 + n, vec![number as u8; 700])).collect();
    let gone: Vec<u128> = told.rows.keys().take(1).copied().collect();
    let tables = vec![number as u8; 5000];
    let made = Checkpoint { applied, rows: rows.clone(), gone: gone.clone(), tables };
    if told.note(outcome(|done| log.checkpoint(made, done)).is_ok()) {
        gone.iter().for_each(|key| drop(told.rows.remove(key)));
        told.rows.extend(rows);
    }
}

fn erase(log: &Log, told: &mut Told, term: u64, indexes: std::ops::Range<u64>) {
    // A node whose log has failed has ended.
    for index in indexes.filter(|_| !told.over) {
        log.erase(LogIndex(index));
        told.dead.insert((term, index));
    }
}

/// Some rounds of the eraser: what is dead is overwritten and empty segments are given back.
fn rounds() {
    std::thread::sleep(Duration::from_millis(250));
}

/// Two segments and more of entries, votes, checkpoints, a truncation, a purge, erasures, recycling, a restart.
fn life(disk: &SimDisk, told: &mut Told) -> Result<(), OpenError> {
    let options = || Options { move_below_percent: 60, scrub_bytes_per_second: 1 << 30, ..options() };
    let log = open_with(disk, options())?;
    append(&log, told, 1, 0..20);
    if told.note(outcome(|done| log.save_vote(vote(2), done)).is_ok()) {
        told.vote = Some(vote(2));
    }
    checkpoint(&log, told, at(1, 9), 1);
    append(&log, told, 2, 20..30);
    // Another leader: what stands from 26 on was never committed.
    log.truncate_from(LogIndex(26));
    let before = told.entries.split_off(&26);
    append(&log, told, 3, 26..45);
    // A truncation is durable with what follows it.
    if told.entries.contains_key(&26) {
        told.dead.extend(before.keys().map(|index| (2, *index)));
    }
    erase(&log, told, 1, 0..15);
    rounds();
    checkpoint(&log, told, at(3, 40), 2);
    if !told.over {
        log.purge(at(1, 18));
        told.entries = told.entries.split_off(&19);
    }
    erase(&log, told, 1, 15..19);
    append(&log, told, 3, 45..75);
    rounds();
    rounds();
    drop(log);
    if told.over {
        return Ok(()); // what became of it is looked at by `check`
    }
    let log = open_with(disk, rekeyed(options()))?;
    append(&log, told, 3, 75..80);
    rounds();
    drop(log);
    Ok(())
}

/// What a start says that it has: it may be asked for that from then on.
#[derive(PartialEq, PartialOrd, Debug)]
struct Claim {
    last: Option<LogPosition>,
    vote: Option<holdfast_storage::Term>,
}

/// What a start finds, after whatever went wrong.
fn check(disk: &SimDisk, told: &Told, what: &str) -> Claim {
    let failures = std::sync::Arc::new(AtomicU64::new(0));
    let counted = failures.clone();
    let on_failure = std::sync::Arc::new(move |_: &str| {
        counted.fetch_add(1, Ordering::SeqCst);
    });
    let log = open_with(disk, rekeyed(Options { on_failure, ..options() }));
    let log = log.unwrap_or_else(|e| panic!("{what}: {e}"));
    log.check();
    for (index, position) in &told.entries {
        assert_eq!(log.term_of(LogIndex(*index)), Some(position.term), "{what}: entry {index}");
        if !told.dead.contains(&(position.term.0, *index)) {
            let found = log.body(LogIndex(*index));
            assert!(
                found.is_ok_and(|found| found == octets(position.term.0, *index)),
                "{what}: body {index}"
            );
        }
    }
    let term = |vote: Option<Vote>| vote.map(|vote| vote.term);
    let claim = Claim { last: log.last(), vote: term(log.vote()) };
    assert!(term(log.vote()) >= term(told.vote), "{what}: {:?} is not {:?}", log.vote(), told.vote);
    // A checkpoint that nobody was told of may stand as well: it has dropped a row at the most.
    let missing = told.rows.iter().filter(|(key, row)| log.row(**key).unwrap().as_deref() != Some(&row[..]));
    assert!(missing.count() <= 1, "{what}: rows are missing");
    // The caller says what is live; the rest is overwritten before the node serves.
    let upto = told.entries.keys().max().copied().unwrap_or(0);
    let live = (0..=upto).filter(|index| {
        let term = log.term_of(LogIndex(*index)).map_or(0, |term| term.0);
        term > 0 && !told.dead.contains(&(term, *index))
    });
    log.erase_all_but(&live.map(LogIndex).collect(), LogIndex(upto));
    let deadline = Instant::now() + Duration::from_secs(20);
    while log.erase_backlog() > 0 {
        assert!(Instant::now() < deadline, "{what}: the dead are not overwritten");
        std::thread::sleep(Duration::from_millis(5));
    }
    let readable = readable(disk);
    for (term, index) in &told.dead {
        assert!(!readable.contains(&(*term, *index)), "{what}: body {index} of term {term} can be read");
    }
    not_zero(
        disk,
        |term, index| told.dead.contains(&(term, index)),
        |place| panic!("{what}: {place} is not zeros"),
    );
    assert_eq!(failures.load(Ordering::SeqCst), 0, "{what}");
    claim
}

/// Terms and indexes of the bodies that stand in any file, for the system or on the medium.
fn readable(disk: &SimDisk) -> BTreeSet<(u64, u64)> {
    let stamp = b"<the body of entry ";
    let mut found = BTreeSet::new();
    for contents in segments(disk).iter().flat_map(|name| [disk.contents(name), disk.medium(name)]) {
        let begins = contents.iter().enumerate().filter(|(_, octet)| **octet == b'<').map(|(n, _)| n);
        for from in begins.filter(|n| contents[*n..].starts_with(stamp)) {
            let digits = contents.get(from + stamp.len()..from + stamp.len() + 6).unwrap_or_default();
            let number = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse::<u64>().ok());
            found.extend(number.map(|number| (number / 100_000, number % 100_000)));
        }
    }
    found
}

/// Tells the bodies' places that hold more than zeros, for the system or on the medium: what is sealed has no stamp.
fn not_zero(disk: &SimDisk, asked: impl Fn(u64, u64) -> bool, tell: impl Fn(String)) {
    let views: BTreeMap<String, [Vec<u8>; 2]> = segments(disk)
        .into_iter()
        .map(|name| (name.clone(), [disk.contents(&name), disk.medium(&name)]))
        .collect();
    let keys = rekeyed(options()).keys;
    dump(disk, &keys, &mut |line| match line {
        Line::Record {
            segment: (id, name),
            offset,
            kind: Kind::Entry | Kind::Body,
            at,
            bytes: (head, body),
            ..
        } if asked(at.term.0, at.index.0) => {
            let from = offset as usize + HEADER_BYTES + head as usize;
            let octets = |view: &Vec<u8>| view[from..from + body as usize].iter().any(|octet| *octet != 0);
            if views.get(&name).is_some_and(|views| views.iter().any(octets)) {
                tell(format!("the body of {at:?} in segment {id} at {from}"));
            }
        }
        _ => {}
    })
    .unwrap();
}

/// Runs a number of cases, some at a time: they mostly sleep.
fn cases(count: u64, step: u64, case: impl Fn(u64) + Sync) {
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(step, Ordering::SeqCst);
                    if n > count {
                        return;
                    }
                    case(n);
                }
            });
        }
    });
}

/// Operations of an undisturbed life.
fn operations() -> u64 {
    let (disk, mut told) = (SimDisk::new(0), Told::default());
    life(&disk, &mut told).unwrap();
    assert!(!told.over);
    check(&disk, &told, "undisturbed");
    disk.steps()
}

/// How many cases are left out between two: none if `HOLDFAST_EVERY_STEP` is set.
fn stride() -> u64 {
    if std::env::var_os("HOLDFAST_EVERY_STEP").is_some() { 1 } else { 3 }
}

#[test]
fn p2_each_operation_of_the_disk_may_fail_once() {
    let count = operations();
    assert!(count > 150, "{count}");
    cases(count, stride(), |n| {
        let (disk, mut told) = (SimDisk::new(n), Told::default());
        disk.fail_in(n);
        let lived = life(&disk, &mut told);
        let what = format!("operation {n} of {count} failed");
        if let Err(e) = &lived {
            assert!(matches!(e, OpenError::Io { .. }), "{what}: {e}");
        }
        disk.heal();
        // The system goes on: what it shows of that operation may never have been written.
        let claimed = check(&disk, &told, &format!("{what}, and the node starts again"));
        disk.crash();
        let found = check(&disk, &told, &format!("{what}, the node starts, and the power goes"));
        assert_eq!(found, claimed, "{what}");
    });
}

#[test]
fn p2_a_node_may_be_killed_at_each_step_and_its_power_go_later() {
    let count = operations();
    cases(count, stride(), |n| {
        let (disk, mut told) = (SimDisk::new(n + 3), Told::default());
        disk.power_off_in(n);
        drop(life(&disk, &mut told));
        let what = format!("killed after step {n} of {count}");
        disk.heal();
        // It goes on, also in segments whose files it had made before.
        let log = open_with(&disk, rekeyed(options())).unwrap_or_else(|e| panic!("{what}: {e}"));
        told.over = false;
        let next = log.last().map_or(0, |last| last.index.0 + 1);
        append(&log, &mut told, 9, next..next + 40);
        assert!(!told.over, "{what}");
        drop(log);
        disk.crash();
        check(&disk, &told, &format!("{what}, the node starts and goes on, and the power goes"));
    });
}

#[test]
fn p1_p3_the_power_may_go_at_each_step() {
    let count = operations();
    cases(count, stride(), |n| {
        let (disk, mut told) = (SimDisk::new(n + 7), Told::default());
        disk.power_off_in(n);
        let lived = life(&disk, &mut told);
        let what = format!("no power after step {n} of {count}");
        assert!(lived.is_ok() || matches!(lived, Err(OpenError::Io { .. })), "{what}");
        disk.crash();
        check(&disk, &told, &what);
    });
}
