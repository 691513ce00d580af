//! Space: what is held stays below twice what is live, however long some of it lives; and moving costs nothing but time.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, and waits for threads"
)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use common::{SEGMENT, open_with, options};
use holdfast_storage::disk::Disk;
use holdfast_storage::disk::os::OsDisk;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::{Bytes, Checkpoint, Entry, Log, LogIndex, LogPosition, OpenError, Options, Term};

fn open(disk: &SimDisk) -> Result<Log, OpenError> {
    open_with(disk, Options { move_below_percent: 60, ..options() })
}

fn at(index: u64) -> LogPosition {
    LogPosition { term: Term(1), index: LogIndex(index) }
}

fn body(index: u64) -> Bytes {
    format!("<{index:06}>").bytes().cycle().take(9000).collect::<Vec<u8>>().into()
}

fn row(index: u64) -> Vec<u8> {
    format!("row of {index}").repeat(20).into_bytes()
}

/// What must be there.
type Stuck = BTreeMap<u64, Bytes>;

/// Traffic of which every `one_in`th message is stuck: entries, rows, checkpoints, erasures, a rising floor. Ends early when the
/// disk does.
fn traffic(log: &Log, count: u64, one_in: u64) -> Stuck {
    let mut stuck = Stuck::new();
    for first in (0..count).step_by(50) {
        let indexes = first..(first + 50).min(count);
        let entry = |index| Entry { at: at(index), head: Bytes::from_static(b"h"), body: body(index) };
        log.append(indexes.clone().map(entry).collect(), Box::new(|_| {}));
        let kept: Vec<u64> = indexes.clone().filter(|index| index % one_in == 0).collect();
        indexes.clone().filter(|index| index % one_in != 0).for_each(|index| log.erase(LogIndex(index)));
        let rows = kept.iter().map(|index| (*index as u128, row(*index))).collect();
        let applied = at(indexes.end - 1);
        let (tell, told) = channel();
        let checkpoint = Checkpoint { applied, rows, gone: Vec::new(), tables: vec![7; 3000] };
        log.checkpoint(checkpoint, Box::new(move |result| drop(tell.send(result))));
        if !matches!(told.recv(), Ok(Ok(()))) {
            return stuck;
        }
        stuck.extend(kept.into_iter().map(|index| (index, body(index))));
        log.purge(applied);
    }
    stuck
}

fn check(log: &Log, stuck: &Stuck) {
    log.check();
    assert!(log.lost().is_empty(), "what was erased on purpose is no damage: {:?}", log.lost());
    for (index, body) in stuck {
        assert!(log.body(LogIndex(*index)).unwrap() == *body, "body {index}");
        assert_eq!(log.row(*index as u128).unwrap().as_deref(), Some(&row(*index)[..]), "row {index}");
    }
}

fn ratio(log: &Log) -> f64 {
    let space = log.space();
    space.sealed_bytes as f64 / space.sealed_live_bytes.max(SEGMENT / 2) as f64
}

#[test]
fn p1_what_is_held_stays_below_twice_what_is_live() {
    for (one_in, count) in [(2, 3000), (1000, 4000)] {
        let disk = SimDisk::new(one_in);
        let log = open(&disk).unwrap();
        let stuck = traffic(&log, count, one_in);
        assert_eq!(stuck.len() as u64, count / one_in);
        let until = Instant::now() + Duration::from_secs(60);
        while ratio(&log) > 2.0 || log.erase_backlog() > 0 {
            assert!(Instant::now() < until, "one in {one_in}: {:?}", log.space());
            std::thread::sleep(Duration::from_millis(20));
            check(&log, &stuck);
        }
        drop(log);
        let log = open(&disk).unwrap();
        check(&log, &stuck);
        assert!(ratio(&log) <= 2.0, "one in {one_in}: {:?}", log.space());
        // And nothing of the copies is left once they end as well.
        stuck.keys().for_each(|index| log.erase(LogIndex(*index)));
        while log.erase_backlog() > 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
        for index in stuck.keys().take(5) {
            assert!(
                !disk.contains(&body(*index)[..64]),
                "P3: body {index} was moved, and its first copy stands"
            );
        }
    }
}

/// Wherever the power goes while records are moved, each is found once and right.
#[test]
fn p1_moving_survives_a_power_cut_at_any_step() {
    for after in (0..400).step_by(9) {
        let disk = SimDisk::new(after);
        let log = open(&disk).unwrap();
        // More than one round of moving takes.
        let stuck = traffic(&log, 900, 3);
        disk.power_off_in(after);
        let until = Instant::now() + Duration::from_millis(700);
        while Instant::now() < until && ratio(&log) > 1.0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(log);
        disk.crash();
        let log = open(&disk).unwrap();
        check(&log, &stuck);
        let settled = Instant::now() + Duration::from_secs(20);
        while log.erase_backlog() > 0 || ratio(&log) > 2.0 {
            assert!(Instant::now() < settled);
            std::thread::sleep(Duration::from_millis(5));
        }
        check(&log, &stuck);
        drop(log);
        check(&open(&disk).unwrap(), &stuck);
        assert!(!disk.contains(&body(1)[..64]), "power off after {after}: an erased body is readable");
    }
}

/// P3, P6: on a disk whose syncs take their time, bodies die faster than a round of erasing takes. Room comes back all the same.
#[test]
fn p6_room_comes_back_while_mail_dies_without_a_pause() {
    let dir = tempfile::tempdir().unwrap();
    let disk = OsDisk::open(dir.path(), Duration::from_millis(3)).unwrap();
    let log = Log::open(Arc::new(disk), common::identity(), options()).unwrap().0;
    let (tell, told) = channel();
    let (mut next, mut most) = (0, 0);
    let mut begin = |log: &Log| {
        let (index, tell) = (next, tell.clone());
        next += 1;
        let entry = common::entry(at(index), common::body(index, 100_000));
        log.append(
            vec![entry],
            Box::new(move |result| tell.send(result.map(|()| index)).unwrap_or_default()),
        );
    };
    (0..4).for_each(|_| begin(&log));
    const ENTRIES: u64 = 1200;
    for _ in 0..ENTRIES {
        let index = told.recv().unwrap().unwrap();
        log.erase(LogIndex(index));
        log.purge(at(index));
        begin(&log);
        most = most.max(log.space().held_bytes);
    }
    let written = ENTRIES * 100_000;
    assert!(most < written / 3, "{} MiB held of {} that were written", most >> 20, written >> 20);
}

/// A segment's file is zeroed, or goes, only once the superblock no longer names it: wherever the power goes meanwhile, nothing looks lost.
#[test]
fn p1_a_segment_is_given_back_when_the_superblock_says_so() {
    let (mut after, mut undisturbed) = (0, 0);
    while undisturbed < 2 {
        let disk = SimDisk::new(after);
        let failed = Arc::new(AtomicBool::new(false));
        let told = failed.clone();
        let on_failure = Arc::new(move |_: &str| told.store(true, Ordering::Relaxed));
        let log = open_with(&disk, Options { on_failure, ..options() }).unwrap();
        const ENTRIES: u64 = 40;
        let entry = |index| common::entry(at(index), common::body(index, 256 << 10));
        common::wait(&log, |done| log.append((0..ENTRIES).map(entry).collect(), done));
        assert!(log.space().held_bytes >= 3 * SEGMENT);
        disk.power_off_in(after);
        (0..ENTRIES).for_each(|index| log.erase(LogIndex(index)));
        log.purge(at(ENTRIES - 1));
        let until = Instant::now() + Duration::from_secs(20);
        let is_over = || log.space().held_bytes <= 2 * SEGMENT && log.erase_backlog() == 0;
        while !failed.load(Ordering::Relaxed) && !is_over() {
            assert!(Instant::now() < until, "power off after {after}: {:?}", log.space());
            std::thread::sleep(Duration::from_millis(2));
        }
        drop(log);
        undisturbed = if failed.load(Ordering::Relaxed) { 0 } else { undisturbed + 1 };
        disk.crash();
        open(&disk).map(drop).unwrap_or_else(|error| panic!("power off after {after}: {error}"));
        after += 1;
    }
    assert!(after > 20, "all was given back after {after} operations");
}

/// A full disk, and a segment that must be emptied and does not fit: those that fit are emptied, and bring the room that it needs.
#[test]
fn p6_a_segment_that_does_not_fit_keeps_no_other_from_being_emptied() {
    let disk = SimDisk::new(9);
    let log = open(&disk).unwrap();
    // Some four segments; the newest has room for a fourth of one.
    const ENTRIES: u64 = 60;
    let entry = |index| common::entry(at(index), common::body(index, 250_000));
    common::wait(&log, |done| log.append((0..ENTRIES).map(entry).collect(), done));
    log.purge(at(ENTRIES - 1));
    common::settle(&log);
    drop(log);
    common::leave_no_room(&disk, 0);
    let scrubbed = Options { scrub_bytes_per_second: 1 << 30, move_below_percent: 60, ..options() };
    let log = open_with(&disk, scrubbed).unwrap();
    // A header in the first segment rots.
    let [first, second] = &common::segments(&disk)[..2] else { panic!("more segments than that") };
    let octets = disk.contents(first);
    let needle = b"<the body of entry 000003>";
    let place = octets.windows(needle.len()).position(|w| w == needle).unwrap() as u64;
    disk.flip(first, place - 50, 2);
    common::until("it is found", || log.scrubbed().damaged > 0);
    (17..ENTRIES - 13).filter(|index| index % 8 != 0).for_each(|index| log.erase(LogIndex(index)));
    // Its file is zeros then, or holds another segment: what did not fit before may be moved there at once.
    common::until("the sparse segment is emptied", || {
        let stamp = b"<the body of entry 000016>";
        !disk.contents(second).windows(stamp.len()).any(|part| part == stamp)
    });
    for index in (0..17).chain(48..ENTRIES).filter(|index| *index != 3) {
        assert!(log.body(LogIndex(index)).is_ok(), "body {index}");
    }
}

/// P6: others fill the disk in the moment after a segment was begun, so that there is none ready. The log waits, loses nothing and fails nobody, and
/// goes on when there is room again; it can be closed meanwhile, and what it said is there.
#[test]
fn p6_a_log_without_room_for_a_segment_waits() {
    for closes in [false, true] {
        let disk = SimDisk::new(11);
        let log = open(&disk).unwrap();
        common::wait(&log, |done| log.append(vec![common::entry(at(0), common::body(0, 1000))], done));
        drop(log);
        common::leave_no_room(&disk, 0);
        let log = open(&disk).unwrap();
        const ENTRIES: u64 = 40;
        let (tell, told) = channel();
        for index in 1..ENTRIES {
            let (tell, entry) = (tell.clone(), common::entry(at(index), common::body(index, 256 << 10)));
            log.append(
                vec![entry],
                Box::new(move |done| tell.send((index, done.is_ok())).unwrap_or_default()),
            );
        }
        let mut durable = 0;
        while let Ok((index, is_done)) = told.recv_timeout(Duration::from_millis(500)) {
            assert!(is_done, "entry {index}: a log that waits for room has failed");
            durable = index;
        }
        assert!(durable + 5 < ENTRIES, "there was room for {durable} entries");
        if closes {
            drop(log);
            let rest: Vec<(u64, bool)> = told.try_iter().collect();
            assert!(rest.len() as u64 == ENTRIES - 1 - durable && rest.iter().all(|(_, is_done)| !is_done));
        } else {
            disk.set_capacity(u64::MAX);
            for index in durable + 1..ENTRIES {
                assert_eq!(told.recv_timeout(Duration::from_secs(20)).unwrap(), (index, true));
            }
            durable = ENTRIES - 1;
            drop(log);
        }
        disk.set_capacity(u64::MAX);
        disk.crash();
        let log = open(&disk).unwrap();
        for index in 0..=durable {
            assert!(log.body(LogIndex(index)).is_ok(), "entry {index}");
        }
    }
}

/// P6: a spare segment that was being made when the power went is shorter than a segment. On a full disk it goes, and the log does not go with it.
#[test]
fn p6_a_spare_file_that_finds_no_room_goes() {
    let disk = SimDisk::new(12);
    let log = open(&disk).unwrap();
    common::wait(&log, |done| log.append(vec![common::entry(at(0), common::body(0, 1000))], done));
    drop(log);
    let spare = disk.create("segment-000077").unwrap();
    spare.write_at(&[1; 100_000], 0).unwrap();
    spare.sync_data().unwrap();
    disk.sync_dir().unwrap();
    common::leave_no_room(&disk, 0);
    let failed = Arc::new(AtomicBool::new(false));
    let told = failed.clone();
    let on_failure = Arc::new(move |_: &str| told.store(true, Ordering::Relaxed));
    let log = open_with(&disk, Options { on_failure, ..options() }).unwrap();
    common::until("it is gone", || {
        assert!(!failed.load(Ordering::Relaxed), "a spare file ended the log");
        !disk.list().unwrap().contains(&"segment-000077".to_string())
    });
    common::wait(&log, |done| log.append(vec![common::entry(at(1), common::body(1, 1000))], done));
}
