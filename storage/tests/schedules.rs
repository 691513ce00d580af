//! Schedules that break a naive log, one test each.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{at, body, entry, open_with, options, segments, settle, until, wait};
use holdfast_storage::codec::Vote;
use holdfast_storage::disk::Disk;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::{Checkpoint, Log, LogIndex, Options, Term};

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
