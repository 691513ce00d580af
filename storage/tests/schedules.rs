//! Schedules that break a naive log, one test each.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::{Arc, Mutex};

use common::{at, body, entry, open_with, options, outcome, segments, settle, until, wait};
use holdfast_storage::codec::Vote;
use holdfast_storage::disk::Disk;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::{Bytes, Checkpoint, Entry, Log, LogIndex, OpenError, Options, ReadError, Term};

fn open(disk: &SimDisk) -> Log {
    open_with(disk, Options { move_below_percent: 60, ..options() }).unwrap()
}

/// Entries that are settled at once, a checkpoint behind them, a rising floor: segments are opened and given back.
fn traffic(log: &Log, indexes: std::ops::Range<u64>) {
    for index in indexes {
        wait(log, |done| log.append(vec![entry(at(7, index), body(index, 200_000))], done));
        log.erase(LogIndex(index));
        if index % 10 == 9 {
            let tables = vec![index as u8; 400];
            let rows = vec![(1, b"a row that nobody changes".to_vec())];
            let rows = if index == 9 { rows } else { vec![] };
            let applied = at(7, index);
            let made = Checkpoint { applied, rows, gone: vec![], tables };
            wait(log, |done| log.checkpoint(made, done));
            log.purge(applied);
        }
    }
    settle(log);
}

/// The segment in which the newest vote was written is used again for something else: the vote is still known.
#[test]
fn p1_the_newest_vote_outlives_its_segment() {
    let disk = SimDisk::new(1);
    let log = open(&disk);
    let vote = Vote { term: Term(7), node: 2, committed: true };
    wait(&log, |done| log.save_vote(vote, done));
    let first = disk.contents("segment-000000");
    traffic(&log, 0..120);
    until("its segment was given back", || {
        let now = disk.list().unwrap().contains(&"segment-000000".to_string());
        !now || disk.contents("segment-000000")[..4096] != first[..4096]
    });
    drop(log);
    disk.crash();
    let log = open(&disk);
    assert_eq!(log.vote(), Some(vote));
    assert_eq!(
        log.row(1).unwrap().as_deref(),
        Some(&b"a row that nobody changes"[..]),
        "nor is the row lost"
    );
    assert_eq!(log.floor(), Some(at(7, 119)));
}

/// A leader appended an entry and was cut off; another's entries stand in its place when it is back: its body dies as any other does,
/// and no start ever finds it live, wherever the power goes.
#[test]
fn p3_a_truncated_body_is_erased_and_never_live_again() {
    for steps in (0..40).step_by(3) {
        let disk = SimDisk::new(steps);
        let log = open(&disk);
        wait(&log, |done| log.append(vec![entry(at(1, 0), body(0, 9000))], done));
        wait(&log, |done| log.append(vec![entry(at(1, 1), body(777, 9000))], done));
        log.truncate_from(LogIndex(1));
        wait(&log, |done| log.append(vec![entry(at(2, 1), body(1, 9000))], done));
        disk.power_off_in(steps);
        std::thread::sleep(std::time::Duration::from_millis(300));
        drop(log);
        disk.crash();
        let log = open(&disk);
        assert_eq!(log.entries(1..2, usize::MAX).unwrap()[0].body, body(1, 9000), "{steps}");
        assert_eq!(log.body(LogIndex(1)).unwrap(), body(1, 9000), "{steps}");
        until("the truncated body is overwritten", || log.erase_backlog() == 0);
        assert!(!disk.contains(b"<the body of entry 000777>"), "{steps}");
    }
}

/// The sync of an erasure fails, which leaves zeros in the page cache and octets on the medium: the next start does it again, though it reads
/// zeros.
#[test]
fn p3_an_erasure_whose_sync_failed_is_done_again() {
    let secret = b"<the body of entry 000001>";
    let on_medium = |disk: &SimDisk| {
        let holds = |name: &String| disk.medium(name).windows(secret.len()).any(|part| part == secret);
        segments(disk).iter().any(holds)
    };
    for seed in 0.. {
        let disk = SimDisk::new(seed);
        let log = open(&disk);
        wait(&log, |done| {
            log.append(vec![entry(at(1, 0), body(0, 9000)), entry(at(1, 1), body(1, 9000))], done)
        });
        std::thread::sleep(std::time::Duration::from_millis(100));
        // The intent's, then that of the zeros; unless this machine is so slow that a mark comes between them.
        disk.fail_sync_in(2);
        log.erase(LogIndex(1));
        std::thread::sleep(std::time::Duration::from_millis(500));
        drop(log);
        let is_in_cache =
            segments(&disk).iter().any(|name| disk.contents(name).windows(26).any(|part| part == secret));
        assert!(seed < 20, "the schedule does not come about");
        if is_in_cache || !on_medium(&disk) {
            continue;
        }
        let log = open(&disk);
        assert!(!on_medium(&disk), "it can be read again once the page cache is gone");
        assert_eq!(log.body(LogIndex(0)).unwrap(), body(0, 9000));
        return;
    }
}

/// A body that comes late, fetched for a snapshot or to mend one, after its message was erased: it is overwritten like any other.
#[test]
fn p3_a_body_that_arrives_late_is_erased() {
    let disk = SimDisk::new(3);
    let log = open(&disk);
    wait(&log, |done| log.append(vec![entry(at(1, 0), body(0, 9000))], done));
    // The completion may run before or after the erasure is asked for: both, many times.
    for index in 1..60 {
        let octets = body(index, 9000);
        match index % 3 {
            0 => log.store_body(at(1, index), octets, Box::new(|_| {})),
            1 => log.mend_body(LogIndex(index), octets, Box::new(|_| {})),
            _ => wait(&log, |done| log.store_body(at(1, index), octets, done)),
        }
        log.erase(LogIndex(index));
    }
    wait(&log, |done| log.append(vec![entry(at(1, 1), Default::default())], done));
    settle(&log);
    let readable =
        |disk: &SimDisk| (1..60).filter(|index| disk.contains(&body(*index, 60))).collect::<Vec<u64>>();
    assert_eq!(readable(&disk), Vec::<u64>::new());
    assert!((1..60).all(|index| !log.has_body(LogIndex(index))));
    drop(log);
    disk.crash();
    let log = open(&disk);
    assert!((1..60).all(|index| !log.has_body(LogIndex(index))), "no start finds it live");
    assert_eq!(log.body(LogIndex(0)).unwrap(), body(0, 9000));
    assert!(!segments(&disk).is_empty());
}

/// P2: a sync that failed ends the log. Nothing after it is acknowledged, and it is never tried again.
#[test]
fn p2_a_failed_sync_ends_the_log() {
    let disk = SimDisk::new(1);
    let failed = Arc::new(Mutex::new(None));
    let told = failed.clone();
    let options = Options {
        on_failure: Arc::new(move |why| *told.lock().unwrap() = Some(why.to_owned())),
        ..options()
    };
    let log = open_with(&disk, options).unwrap();
    // The spare segment's zeroing syncs too; wait until its file is there, and below until all is quiet.
    while !holdfast_storage::disk::Disk::list(&disk).unwrap().iter().any(|name| name == "segment-000001") {
        std::thread::yield_now();
    }
    let append = |index| outcome(|done| log.append(vec![brief(index, 1, b"b")], done));
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
        let log = open(&disk);
        let canary = b"canary-5c1f0e-canary".repeat(300);
        for index in 0..4u64 {
            let body = if index == 2 { canary.clone() } else { vec![b'x'; 5000] };
            append(&log, vec![entry(at(1, index), body.into())]);
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
        let log = open(&disk);
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
        let log = open(&disk);
        for index in 0..3u64 {
            append(&log, vec![entry(at(1, index), vec![b'x'; 9000].into())]);
        }
        drop(log);
        let contents = disk.contents("segment-000000");
        let body = contents.windows(50).position(|window| window == [b'x'; 50]).unwrap();
        let offset = (body as i64 + from_body) as u64;
        disk.flip("segment-000000", offset, bit);
        match open_with(&disk, options()) {
            Err(OpenError::Lost(_)) => assert!(!in_body, "offset {offset}"),
            Err(e) => panic!("{e}"),
            Ok(log) => {
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

fn brief(index: u64, term: u64, body: &'static [u8]) -> Entry {
    entry(at(term, index), Bytes::from_static(body))
}

fn append(log: &Log, entries: Vec<Entry>) {
    outcome(|done| log.append(entries, done)).unwrap();
}

/// P6, P7: a committed position that reached the disk before its entry does not commit another leader's entry in its place.
#[test]
fn p7_a_committed_position_counts_only_with_its_entry() {
    let disk = SimDisk::new(3);
    let log = open(&disk);
    append(&log, (0..3).map(|n| brief(n, 4, b"")).collect());
    log.save_committed(at(5, 2));
    append(&log, vec![brief(3, 4, b"")]);
    drop(log);
    let log = open(&disk);
    assert_eq!(log.committed(), None, "entry 2 of term 4 was never said to be committed");
    log.save_committed(at(4, 1));
    append(&log, vec![brief(4, 4, b"")]);
    drop(log);
    let log = open(&disk);
    assert_eq!(log.committed(), Some(at(4, 1)));
    // Said of an entry that is still to come, which a crash may take: what was said before counts.
    log.save_committed(at(4, 40));
    append(&log, vec![brief(5, 4, b"")]);
    log.save_committed(at(5, 3));
    append(&log, vec![brief(6, 4, b"")]);
    drop(log);
    let log = open(&disk);
    assert_eq!(log.committed(), Some(at(4, 1)));
}

/// P1: a body that was fetched for a snapshot is not the one of the entry that is truncated, before and after a restart.
#[test]
fn p1_truncation_spares_a_fetched_body() {
    let disk = SimDisk::new(4);
    let log = open(&disk);
    append(&log, (0..4).map(|n| brief(n, 4, b"old")).collect());
    wait(&log, |done| log.store_body(at(5, 2), Bytes::from_static(b"fetched"), done));
    log.truncate_from(LogIndex(1));
    append(&log, vec![brief(1, 5, b"new")]);
    assert_eq!(log.body(LogIndex(2)).unwrap(), &b"fetched"[..]);
    assert!(log.body(LogIndex(3)).is_err());
    log.check();
    drop(log);
    let log = open(&disk);
    assert_eq!(log.body(LogIndex(2)).unwrap(), &b"fetched"[..]);
    assert!(log.body(LogIndex(3)).is_err());
    // An entry with a body takes the index over; the fetched one dies, and is erased.
    append(&log, vec![brief(2, 5, b"newer")]);
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
        let log = open(&disk);
        append(&log, vec![brief(0, 1, b"a")]);
        // The next sync fails and leaves the pages clean: a process that starts now sees what no later sync would write.
        std::thread::sleep(std::time::Duration::from_millis(250));
        disk.fail_sync_in(1);
        assert!(outcome(|done| log.append(vec![brief(1, 1, b"b")], done)).is_err());
        drop(log);
        let log = open(&disk);
        let seen = log.last();
        drop(log);
        disk.crash();
        let log = open(&disk);
        assert_eq!(log.last(), seen, "seed {seed}: what the first start took for durable is durable");
    }
}

/// A directory without a superblock is refused, and nothing in it is touched.
#[test]
fn p9_segments_without_a_superblock_are_refused_untouched() {
    let disk = SimDisk::new(5);
    let log = open(&disk);
    append(&log, vec![brief(0, 1, b"precious")]);
    drop(log);
    holdfast_storage::disk::Disk::remove(&disk, "superblock").unwrap();
    let before = disk.contents("segment-000000");
    assert!(open_with(&disk, options()).is_err());
    assert_eq!(disk.contents("segment-000000"), before);
}
