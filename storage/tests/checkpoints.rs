//! Checkpoints: the rows that they write, replace and void, and the index over them.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;
use std::sync::mpsc::channel;

use common::entry;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::index::Standing;
use holdfast_storage::index::sim::{Lie, SimShelf};
use holdfast_storage::{Bytes, Checkpoint, Log, LogIndex, LogPosition, Options, Recovered, Rows, Term};

fn open(disk: &SimDisk) -> (Log, Recovered) {
    let options = Options { move_below_percent: 60, ..common::options() };
    Log::open(Arc::new(disk.clone()), common::identity(), options).unwrap()
}

fn append_one(log: &Log) {
    done(|done| log.append(vec![entry(common::at(1, 0), Bytes::new())], done));
}

/// P1: segments that hold nothing but a checkpoint under way are not given back before it is complete.
#[test]
fn p1_a_checkpoint_larger_than_a_segment_keeps_its_rows() {
    let disk = SimDisk::new(6);
    let (log, _) = open(&disk);
    append_one(&log);
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
    append_one(&log);
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
