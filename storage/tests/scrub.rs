//! P9: rot that comes while a node runs is found by reading everything again, and what is not rot is not taken for it.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{at, body, entry, identity, open_with, options, outcome, segments, settle, until, wait};
use std::sync::Arc;

use holdfast_storage::codec::Reset;
use holdfast_storage::disk::Disk;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::{Checkpoint, Log, LogIndex, OpenError, Options, ReadError};

/// Fast enough for tests.
const RATE: u64 = 1 << 30;

const ENTRIES: u64 = 120;
const BODY: usize = 100_000;

fn open(disk: &SimDisk) -> Log {
    open_with(disk, Options { scrub_bytes_per_second: RATE, ..options() }).unwrap()
}

/// Several segments of bodies without entries, as they are once the floor has passed: an eighth of them erased.
fn filled(disk: &SimDisk) -> Log {
    let log = open_with(disk, options()).unwrap();
    for index in 0..ENTRIES {
        wait(&log, |done| log.append(vec![entry(at(1, index), body(index, BODY))], done));
    }
    let rows = (0..ENTRIES).map(|key| (key.into(), format!("row {key}").into_bytes())).collect();
    let applied = at(1, ENTRIES - 1);
    let checkpoint = Checkpoint { applied, rows, gone: vec![], tables: vec![1] };
    wait(&log, |done| log.checkpoint(checkpoint, done));
    log.purge(applied);
    (0..ENTRIES).filter(|index| index % 8 == 3).for_each(|index| log.erase(LogIndex(index)));
    settle(&log);
    drop(log);
    open(disk)
}

/// Waits until everything was read once more from now on.
fn pass(log: &Log) {
    let before = log.scrubbed().passes;
    until("all was read again", || log.scrubbed().passes >= before + 2);
}

/// The file in which a body stands, and where.
fn place(disk: &SimDisk, index: u64) -> (String, u64) {
    let needle = body(index, 60);
    let found = segments(disk).into_iter().find_map(|name| {
        let octets = disk.contents(&name);
        let at = octets.windows(needle.len()).position(|w| w == needle)?;
        Some((name, at as u64))
    });
    found.unwrap()
}

fn live() -> impl Iterator<Item = u64> {
    (0..ENTRIES).filter(|index| index % 8 != 3)
}

#[test]
fn p9_rot_in_a_body_is_found_while_the_node_runs() {
    let disk = SimDisk::new(1);
    let log = filled(&disk);
    pass(&log);
    assert_eq!((log.scrubbed().damaged, log.lost()), (0, vec![]), "what was erased is no damage");
    let (name, offset) = place(&disk, 17);
    disk.flip(&name, offset + 5000, 3);
    until("the scrub has found it", || !log.lost().is_empty());
    let lost = log.lost()[0];
    let crc = crc32fast::hash(&body(17, BODY));
    assert_eq!((lost.index, lost.bytes as usize, lost.crc), (LogIndex(17), BODY, Some(crc)));
    // Nobody may take it for erased.
    assert!(matches!(log.body(LogIndex(17)), Err(ReadError::Damaged { .. })));
    assert!(matches!(log.digest(LogIndex(17)), Err(ReadError::Damaged { .. })));
    wait(&log, |done| log.mend_body(LogIndex(17), body(17, BODY), done));
    assert_eq!(log.body(LogIndex(17)).unwrap(), body(17, BODY));
    pass(&log);
    assert_eq!((log.scrubbed().damaged, log.lost()), (1, vec![]));
    assert!(live().all(|index| log.body(LogIndex(index)).unwrap() == body(index, BODY)));
}

/// What is still in memory is written again at once.
#[test]
fn p9_a_body_that_is_in_memory_is_written_again() {
    let disk = SimDisk::new(5);
    let log = open(&disk);
    for index in 0..60 {
        wait(&log, |done| log.append(vec![entry(at(1, index), body(index, BODY))], done));
    }
    let (name, offset) = place(&disk, 7);
    disk.flip(&name, offset + 70_000, 0);
    until("the scrub has found it", || log.scrubbed().damaged == 1);
    assert_eq!(log.entries(7..8, usize::MAX).unwrap()[0].body, body(7, BODY));
    pass(&log);
    settle(&log);
    assert_eq!((log.scrubbed().damaged, log.lost()), (1, vec![]));
    drop(log);
    let log = open(&disk);
    assert_eq!((log.lost(), log.last()), (vec![], Some(at(1, 59))));
    assert!((0..60).all(|index| log.body(LogIndex(index)).unwrap() == body(index, BODY)));
    assert_eq!(log.entries(7..8, usize::MAX).unwrap()[0].body, body(7, BODY));
}

/// Until what somebody brought is durable the body is damaged: neither erased nor empty. Its entry is not replicated meanwhile.
#[test]
fn p9_a_body_that_is_being_mended_is_not_taken_for_erased() {
    let disk = SimDisk::new(6);
    let log = open(&disk);
    for index in 0..60 {
        wait(&log, |done| log.append(vec![entry(at(1, index), body(index, BODY))], done));
    }
    drop(log);
    let log = open(&disk);
    let (name, offset) = place(&disk, 17);
    disk.flip(&name, offset + 500, 1);
    until("the scrub has found it", || !log.lost().is_empty());
    disk.power_off_in(0);
    assert!(outcome(|done| log.mend_body(LogIndex(17), body(17, BODY), done)).is_err());
    assert!(matches!(log.body(LogIndex(17)), Err(ReadError::Damaged { .. })));
    assert!(matches!(log.digest(LogIndex(17)), Err(ReadError::Damaged { .. })));
    assert!(log.entries(15..20, usize::MAX).is_err());
    let intact = log.intact_entries(15..20, usize::MAX).unwrap();
    assert_eq!(intact.iter().map(|entry| entry.at.index.0).collect::<Vec<_>>(), [15, 16]);
    assert!(log.intact_entries(17..20, usize::MAX).unwrap().is_empty());
}

/// A segment with a damaged header gives all that is live in it to another, and is given back; what cannot be read in it is named.
#[test]
fn p9_a_segment_with_a_damaged_header_is_emptied() {
    for victim in [9, 11] {
        let disk = SimDisk::new(2);
        let log = filled(&disk);
        let (name, offset) = place(&disk, if victim == 11 { 12 } else { victim });
        if victim == 11 {
            // The body of 11 was erased: only its header is left, just before the mark that precedes 12.
            let start = offset / 4096 * 4096 - 4096 * 2;
            let octets = disk.contents(&name);
            let magic = octets[..4].to_vec();
            let header = (0..start as usize).rev().find(|n| octets[*n..*n + 4] == magic[..]).unwrap();
            disk.flip(&name, header as u64 + 20, 1);
        } else {
            let header = offset - 4 - 64;
            disk.flip(&name, header + 20, 1);
        }
        until("the scrub has found it", || log.scrubbed().damaged > 0);
        if victim == 9 {
            until("the body is known to be lost", || !log.lost().is_empty());
            let lost = log.lost()[0];
            assert_eq!((lost.index, lost.bytes as usize, lost.crc), (LogIndex(9), BODY, None));
            assert!(matches!(log.body(LogIndex(9)), Err(ReadError::Damaged { .. })));
            wait(&log, |done| log.mend_body(LogIndex(9), body(9, BODY), done));
        }
        until("its segment is empty", || {
            let octets = disk.contents(&name);
            !disk.list().unwrap().contains(&name) || octets.iter().all(|octet| *octet == 0)
        });
        assert!(live().all(|index| log.body(LogIndex(index)).unwrap() == body(index, BODY)), "{victim}");
        assert!((0..ENTRIES).all(|key| log.row(key.into()).unwrap().is_some()));
        log.check();
        drop(log);
        let log = open(&disk);
        assert!(live().all(|index| log.body(LogIndex(index)).unwrap() == body(index, BODY)), "{victim}");
    }
}

#[test]
fn p9_a_copy_of_the_superblock_that_rots_is_written_again() {
    let disk = SimDisk::new(3);
    let log = filled(&disk);
    let whole = disk.contents("superblock");
    for offset in [20, (1 << 20) + 20] {
        disk.flip("superblock", offset, 5);
        pass(&log);
        let now = disk.contents("superblock");
        assert_eq!(now[..1 << 20], now[1 << 20..], "both copies are whole");
        // But for the sequence they say what they said.
        let said = |octets: &[u8]| {
            let end = octets.windows(4).position(|part| part == b"HFSE").unwrap();
            octets[16 + 1..end].to_vec()
        };
        assert_eq!(said(&now), said(&whole));
    }
    assert_eq!(log.scrubbed().damaged, 2);
}

/// What a salvage overwrote with zeros was told then: it is no new damage, and the bodies around it are whole.
#[test]
fn p9_the_scrub_takes_no_salvage_for_damage() {
    let disk = SimDisk::new(6);
    let log = open_with(&disk, options()).unwrap();
    for first in (0..60).step_by(4) {
        let entries = (first..first + 4).map(|index| entry(at(1, index), body(index, 30_000))).collect();
        wait(&log, |done| log.append(entries, done));
    }
    log.save_committed(at(1, 59));
    drop(log);
    let name = "segment-000000";
    let stamp = body(6, 30);
    let contents = disk.contents(name);
    let place = contents.windows(stamp.len()).position(|w| w == &stamp[..]).unwrap() as u64;
    disk.flip(name, place - 68 + 8, 1);
    let scrubs = || Options { scrub_bytes_per_second: 64 << 20, ..options() };
    let Err(OpenError::Lost(damage)) = open_with(&disk, scrubs()) else { panic!("it is damaged") };
    let reset = Reset { vote: None, last: damage.last, void_but: Some(LogIndex(59)) };
    let (log, _) = Log::salvage(Arc::new(disk.clone()), identity(), scrubs(), reset).unwrap();
    pass(&log);
    assert_eq!((log.scrubbed().damaged, log.lost()), (0, vec![]));
    assert!((0..4).all(|index| log.body(LogIndex(index)).unwrap() == body(index, 30_000)));
}

/// Traffic with all that changes segments under the scrub's eyes: nothing of it is damage.
#[test]
fn p9_the_scrub_takes_nothing_for_damage_that_is_none() {
    let disk = SimDisk::new(4);
    let sparse = Options { scrub_bytes_per_second: 64 << 20, move_below_percent: 60, ..options() };
    let log = open_with(&disk, sparse).unwrap();
    for first in (0..3000).step_by(20) {
        let entries = (first..first + 20).map(|index| entry(at(1, index), body(index, 9000))).collect();
        wait(&log, |done| log.append(entries, done));
        (first..first + 20).filter(|index| index % 10 != 0).for_each(|index| log.erase(LogIndex(index)));
        let rows = (first..first + 20).step_by(10).map(|key| (u128::from(key), vec![7; 300])).collect();
        let applied = at(1, first + 19);
        let checkpoint = Checkpoint { applied, rows, gone: vec![], tables: vec![1; 500] };
        wait(&log, |done| log.checkpoint(checkpoint, done));
        log.purge(applied);
    }
    pass(&log);
    assert_eq!((log.scrubbed().damaged, log.lost()), (0, vec![]));
    assert!(log.scrubbed().bytes > 0);
    assert!((0..3000).step_by(10).all(|index| log.body(LogIndex(index)).unwrap() == body(index, 9000)));
}
