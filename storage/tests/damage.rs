//! P9: a log that is damaged in any way, in any number of places. What can be opened is what was written; what cannot says so; what
//! is salvaged is right, and nothing of the rest can be read on the disk any more.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, and waits for threads"
)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use common::{SEGMENT, cases, identity, open_with, options, rekeyed};
use holdfast_storage::codec::{Reset, Vote};
use holdfast_storage::disk::Disk;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::{
    Bytes, Checkpoint, Damage, Entry, Log, LogIndex, LogPosition, LostBody, OpenError, Term,
};
use proptest::prelude::*;

/// With another at-rest key than it was written with, if there is one.
fn open(disk: &SimDisk) -> Result<Log, OpenError> {
    open_with(disk, rekeyed(options()))
}

fn at(index: u64) -> LogPosition {
    LogPosition { term: Term(1 + index / 10), index: LogIndex(index) }
}

fn stamp(index: u64) -> String {
    format!("<the body of entry {index:04}>")
}

fn body(index: u64, bytes: usize) -> Bytes {
    stamp(index).bytes().cycle().take(bytes).collect::<Vec<u8>>().into()
}

fn wait(log: &Log, done: impl FnOnce(holdfast_storage::Completion)) {
    let (tell, told) = channel();
    done(Box::new(move |result| drop(tell.send(result))));
    told.recv().unwrap().unwrap();
    log.check();
}

/// What was written, all of it synced.
struct Written {
    bodies: BTreeMap<u64, Bytes>,
    erased: Vec<u64>,
    vote: Vote,
    committed: u64,
    last: LogPosition,
}

fn write(disk: &SimDisk, sizes: &[usize]) -> Written {
    let log = open_with(disk, options()).unwrap();
    let mut bodies = BTreeMap::new();
    let mut vote = Vote::default();
    for (index, bytes) in (0..).zip(sizes) {
        let body = body(index, *bytes);
        if index % 7 == 3 {
            vote = Vote { term: Term(1 + index), node: 2, committed: false };
            wait(&log, |done| log.save_vote(vote, done));
        }
        if index % 5 == 4 {
            log.save_committed(at(index - 2));
        }
        let entry = Entry { at: at(index), head: Bytes::from_static(b"head"), body: body.clone() };
        wait(&log, |done| log.append(vec![entry], done));
        bodies.insert(index, body);
    }
    let count = sizes.len() as u64;
    let erased: Vec<u64> = (0..count).filter(|index| index % 11 == 5).collect();
    erased.iter().for_each(|index| log.erase(LogIndex(*index)));
    settle(&log);
    let committed = log.committed().map_or(0, |at| at.index.0);
    Written { bodies, erased, vote, committed, last: at(count - 1) }
}

/// Waits until what is dying is overwritten and the idle mark is written.
fn settle(log: &Log) {
    let until = Instant::now() + Duration::from_secs(20);
    while log.erase_backlog() > 0 {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(120));
}

#[derive(Clone, Debug)]
enum Harm {
    Flip { at: f64, bit: u8 },
    Zero { at: f64, blocks: u64 },
    Garbage { at: f64, octets: usize },
    Remove,
    Swap,
    Truncate { at: f64 },
}

fn harm() -> impl Strategy<Value = Harm> {
    prop_oneof![
        4 => (0.0..1.0f64, 0..8u8).prop_map(|(at, bit)| Harm::Flip { at, bit }),
        2 => (0.0..1.0f64, 1..9u64).prop_map(|(at, blocks)| Harm::Zero { at, blocks }),
        2 => (0.0..1.0f64, 1..9000usize).prop_map(|(at, octets)| Harm::Garbage { at, octets }),
        1 => Just(Harm::Remove),
        1 => Just(Harm::Swap),
        1 => (0.0..1.0f64).prop_map(|at| Harm::Truncate { at }),
    ]
}

fn segments(disk: &SimDisk) -> Vec<String> {
    let mut names: Vec<String> = disk.list().unwrap();
    names.retain(|name| name.starts_with("segment-") && disk.contents(name).iter().any(|octet| *octet != 0));
    names.sort();
    names
}

fn overwrite(disk: &SimDisk, name: &str, octets: &[u8], offset: u64) {
    let file = disk.open(name).unwrap();
    file.write_at(octets, offset).unwrap();
    file.sync_data().unwrap();
}

/// Does harm to one of the segment files, as far as it was written.
fn inflict(disk: &SimDisk, harm: &Harm, which: usize) {
    let names = segments(disk);
    let Some(name) = names.get(which % names.len().max(1)) else { return };
    let contents = disk.contents(name);
    let written = contents.iter().rposition(|octet| *octet != 0).map_or(1, |at| at + 1);
    let place = |part: f64| (part * written as f64) as u64;
    match harm {
        Harm::Flip { at, bit } => disk.flip(name, place(*at), *bit),
        Harm::Zero { at, blocks } => {
            let from = place(*at) / 4096 * 4096;
            let to = (from + blocks * 4096).min(SEGMENT);
            overwrite(disk, name, &vec![0; (to - from) as usize], from);
        }
        Harm::Garbage { at, octets } => {
            let from = place(*at);
            let octets: Vec<u8> = (0..*octets).map(|n| (n * 31 % 251) as u8).collect();
            let room = (SEGMENT - from) as usize;
            overwrite(disk, name, &octets[..octets.len().min(room)], from);
        }
        Harm::Remove => {
            disk.remove(name).unwrap();
            disk.sync_dir().unwrap();
        }
        Harm::Truncate { at } => disk.truncate(name, place(*at)),
        Harm::Swap => {
            let other = &names[(which + 1) % names.len()];
            let others = disk.contents(other);
            overwrite(disk, name, &others, 0);
            overwrite(disk, other, &contents, 0);
        }
    }
}

/// Each body that the log has is the one that was written, and those that it does not have it names.
fn check_bodies(log: &Log, written: &Written, upto: u64) {
    let lost: Vec<u64> = log.lost().iter().map(|lost| lost.index.0).collect();
    for (index, body) in &written.bodies {
        let at = LogIndex(*index);
        if log.has_body(at) {
            assert!(*index <= upto, "entry {index}");
            assert!(log.body(at).unwrap() == *body, "entry {index} has another body");
        } else if *index <= upto && log.term_of(at).is_some() {
            assert!(
                lost.contains(index) || written.erased.contains(index) || body.is_empty(),
                "entry {index}"
            );
        }
    }
}

fn salvaged(disk: &SimDisk, written: &Written, damage: &Damage) {
    let vote = Vote { term: Term(1000), node: 1, committed: false };
    let kept = damage.committed.map(|at| at.index);
    let reset = Reset { vote: Some(vote), last: damage.last, void_but: kept };
    let (log, recovered) =
        Log::salvage(Arc::new(disk.clone()), identity(), rekeyed(options()), reset).unwrap();
    let upto = kept.map_or(0, |kept| kept.0);
    let check = |log: &Log| {
        log.check();
        check_bodies(log, written, upto);
        assert_eq!((log.last(), log.vote(), log.committed()), (None, Some(vote), None));
        assert_eq!(log.doubt(), damage.last);
        assert!(log.lost().iter().all(|lost| lost.index.0 <= upto));
    };
    assert!(!recovered.pristine && recovered.checkpoint.is_none());
    check(&log);
    let kept: Vec<LogIndex> = (0..=upto).map(LogIndex).filter(|index| log.has_body(*index)).collect();
    settle(&log);
    drop(log);
    for index in (0..written.bodies.len() as u64).filter(|index| *index > upto) {
        assert!(!disk.contains(stamp(index).as_bytes()), "P3: entry {index} is void and readable");
    }
    // Once more, and then on from a snapshot as any follower does.
    let log = open(disk).unwrap();
    check(&log);
    assert!(kept.iter().all(|index| log.has_body(*index)), "a body was forgotten at a restart");
    let floor = LogPosition { term: Term(900), index: LogIndex(2000) };
    log.purge(floor);
    let at = LogPosition { term: Term(900), index: LogIndex(2001) };
    let entry = Entry { at, head: Bytes::from_static(b"new"), body: Bytes::from_static(b"new body") };
    wait(&log, |done| log.append(vec![entry], done));
    drop(log);
    let log = open(disk).unwrap();
    log.check();
    assert_eq!((log.last(), log.floor(), log.vote(), log.doubt()), (Some(at), Some(floor), Some(vote), None));
    assert_eq!(log.entries(0..u64::MAX, usize::MAX).unwrap().len(), 1);
    assert!(kept.iter().all(|index| log.has_body(*index)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(8), ..ProptestConfig::default() })]

    #[test]
    fn p9_what_is_left_of_a_log_is_what_was_written(
        seed: u64,
        sizes in prop::collection::vec(0..200_000usize, 20..45),
        harms in prop::collection::vec((harm(), 0..3usize), 1..4),
    ) {
        let disk = SimDisk::new(seed);
        let written = write(&disk, &sizes);
        let newest = segments(&disk).pop().unwrap();
        let tail = |disk: &SimDisk| -> Vec<u8> {
            let contents = if segments(disk).contains(&newest) { disk.contents(&newest) } else { Vec::new() };
            let end = contents.iter().rposition(|octet| *octet != 0).unwrap_or(0);
            contents[end.saturating_sub(260_000)..].to_vec()
        };
        let before = tail(&disk);
        harms.iter().for_each(|(harm, which)| inflict(&disk, harm, *which));
        match open(&disk) {
            Ok(log) => {
                log.check();
                // Of what was written last and of the mark behind it nobody but the others can tell that it is gone.
                if tail(&disk) == before {
                    prop_assert_eq!(log.last(), Some(written.last), "an entry is missing and nobody said so");
                    prop_assert_eq!(log.vote(), Some(written.vote));
                }
                check_bodies(&log, &written, u64::MAX);
            }
            Err(OpenError::Lost(damage)) => {
                prop_assert!(damage.count > 0 && !damage.places.is_empty());
                prop_assert!(damage.committed.is_none_or(|at| at.index.0 <= written.committed));
                if damage.end_is_whole {
                    prop_assert_eq!(damage.vote, Some(written.vote));
                    prop_assert!(damage.last >= Some(written.last), "{:?}", damage.last);
                }
                salvaged(&disk, &written, &damage);
            }
            Err(e) => prop_assert!(false, "{}", e),
        }
    }
}

/// Both copies of the superblock are gone, or its file: the segments say what it said, but for what was promised last.
#[test]
fn p9_a_log_without_a_superblock_is_salvaged() {
    for remove in [false, true] {
        let disk = SimDisk::new(3);
        let written = write(&disk, &[100_000; 60]);
        if remove {
            disk.remove("superblock").unwrap();
        } else {
            overwrite(&disk, "superblock", &[0xff; 2 << 20], 0);
        }
        match open(&disk) {
            Err(OpenError::Lost(damage)) => {
                assert!(!damage.end_is_whole && damage.vote.is_none());
                // As the other nodes would say.
                let told = Damage { last: Some(written.last), committed: Some(at(30)), ..*damage };
                salvaged(&disk, &written, &told);
            }
            other => panic!("{:?}", other.err()),
        }
    }
}

/// A body that somebody brings is that of its entry again: for whoever reads the entry, and after a restart.
#[test]
fn p9_a_mended_body_is_the_body_of_its_entry() {
    let disk = SimDisk::new(21);
    let written = write(&disk, &[5000; 30]);
    let name = &segments(&disk)[0];
    let needle = stamp(4);
    let contents = disk.contents(name);
    let at = contents.windows(needle.len()).position(|window| window == needle.as_bytes()).unwrap();
    disk.flip(name, at as u64 + 2, 1);
    let log = open(&disk).unwrap();
    let lost = log.lost();
    let crc = Some(crc32fast::hash(&written.bodies[&4]));
    assert_eq!(lost, [LostBody { index: LogIndex(4), bytes: 5000, crc }]);
    wait(&log, |done| log.mend_body(LogIndex(4), written.bodies[&4].clone(), done));
    let whole = |log: &Log| {
        assert!(log.lost().is_empty());
        assert!(log.body(LogIndex(4)).unwrap() == written.bodies[&4]);
        let entries = log.entries(4..5, usize::MAX).unwrap();
        assert!(entries[0].body == written.bodies[&4], "whoever gets the entry gets its body");
        log.check();
    };
    whole(&log);
    settle(&log);
    drop(log);
    let log = open(&disk).unwrap();
    whole(&log);
    // And it goes with its entry.
    log.truncate_from(LogIndex(4));
    settle(&log);
    assert!(!disk.contains(needle.as_bytes()), "its entry was taken back");
    drop(log);
    assert!(!open(&disk).unwrap().has_body(LogIndex(4)));
}

/// What a salvage was about to do is done at the next start, wherever the power went: no damage is mended half, so that it would
/// pass for a shorter log.
#[test]
fn p9_a_salvage_that_power_cuts_short_is_done_again() {
    // A segment takes five steps to make, the superblock four, the reset two.
    let cuts = [(0, 8), (0, 13), (1, 0), (1, 8), (2, 6), (2, 7), (2, 8), (2, 9), (2, 10), (3, 5), (3, 12)];
    for (n, after) in cuts {
        let disk = SimDisk::new(after);
        let written = write(&disk, &[90_000; 50]);
        let names = segments(&disk);
        let newest = names.last().unwrap();
        match n {
            0 => {
                let needle = stamp(4);
                let contents = disk.contents(&names[0]);
                let at = contents.windows(needle.len()).position(|w| w == needle.as_bytes()).unwrap();
                disk.flip(&names[0], at as u64 - 30, 1); // in the header
            }
            1 => disk.truncate(newest, 300_000),
            2 => {
                disk.remove(newest).unwrap();
                disk.sync_dir().unwrap();
            }
            _ => overwrite(&disk, "superblock", &[0xff; 2 << 20], 0),
        }
        let Err(OpenError::Lost(damage)) = open(&disk) else { panic!("harm {n} was not noticed") };
        assert_eq!(damage.end_is_whole, n == 0);
        // As all others would say.
        let told = Damage { last: Some(written.last), committed: Some(at(10)), ..*damage };
        let vote = Some(Vote { term: Term(1000), node: 1, committed: false });
        let reset = Reset { vote, last: told.last, void_but: Some(LogIndex(10)) };
        disk.power_off_in(after);
        drop(Log::salvage(Arc::new(disk.clone()), identity(), rekeyed(options()), reset));
        disk.crash();
        match open(&disk) {
            Ok(log) => {
                let found = (log.last(), log.vote(), log.doubt());
                assert_eq!(found, (None, vote, told.last), "harm {n}, power off after {after}");
                check_bodies(&log, &written, 10);
            }
            Err(OpenError::Lost(again)) => {
                assert_eq!(again.end_is_whole, n == 0, "harm {n}, power off after {after}");
                salvaged(&disk, &written, &told);
            }
            Err(e) => panic!("harm {n}, power off after {after}: {e}"),
        }
    }
}

/// A salvage is over when it returns: what the node promises then outlives a loss of power, and no other salvage.
#[test]
fn p1_what_is_promised_after_a_salvage_stays_promised() {
    for seed in 0..8 {
        let disk = SimDisk::new(seed);
        let written = write(&disk, &[90_000; 50]);
        let names = segments(&disk);
        let needle = stamp(4);
        let contents = disk.contents(&names[0]);
        let place = contents.windows(needle.len()).position(|w| w == needle.as_bytes()).unwrap();
        disk.flip(&names[0], place as u64 - 30, 1);
        let Err(OpenError::Lost(damage)) = open(&disk) else { panic!("not noticed") };
        let reset =
            Reset { vote: damage.vote, last: damage.last, void_but: damage.committed.map(|at| at.index) };
        let (log, _) = Log::salvage(Arc::new(disk.clone()), identity(), rekeyed(options()), reset).unwrap();
        let vote = Vote { term: Term(1000), node: 2, committed: false };
        wait(&log, |done| log.save_vote(vote, done));
        disk.power_off_in(0);
        drop(log);
        disk.crash();
        let log = open(&disk).unwrap();
        assert_eq!((log.vote(), log.doubt()), (Some(vote), Some(written.last)), "seed {seed}");
    }
}

/// What was written last is in a hole, and behind it stands a segment that is whole: that the end is whole as well is not to be
/// believed.
#[test]
fn p1_an_end_behind_a_hole_is_not_whole() {
    let disk = SimDisk::new(5);
    let written = write(&disk, &[90_000; 40]);
    let log = open(&disk).unwrap();
    // Votes alone, until they stand in a segment of their own.
    let before = segments(&disk).len();
    for term in 2000.. {
        let vote = Vote { term: Term(term), node: 1, committed: false };
        wait(&log, |done| log.save_vote(vote, done));
        if segments(&disk).len() > before {
            break;
        }
    }
    settle(&log);
    drop(log);
    let needle = stamp(39);
    let (name, at) = segments(&disk)
        .into_iter()
        .find_map(|name| {
            let contents = disk.contents(&name);
            Some((name, contents.windows(needle.len()).position(|w| w == needle.as_bytes())?))
        })
        .unwrap();
    disk.flip(&name, at as u64 - 30, 1);
    let Err(OpenError::Lost(damage)) = open(&disk) else { panic!("not noticed") };
    assert!(damage.last < Some(written.last) && !damage.end_is_whole, "{damage:?}");
}

/// P9: a sealed segment whose last blocks became zeros does not pass for a shorter one.
#[test]
fn p9_a_sealed_segment_that_lost_its_tail_is_refused_loudly() {
    let disk = SimDisk::new(13);
    let log = open(&disk).unwrap();
    for index in 0..25 {
        let at = LogPosition { term: Term(1), index: LogIndex(index) };
        let body = vec![b'x'; 200_000].into();
        let entry = Entry { at, head: Bytes::from_static(b"h"), body };
        wait(&log, |done| log.append(vec![entry], done));
    }
    // The second segment ends with votes: no entry would be missed.
    for term in 0..1500 {
        let vote = Vote { term: Term(term), node: 1, committed: false };
        wait(&log, |done| log.save_vote(vote, done));
    }
    drop(log);
    let names = disk.list().unwrap();
    // The one whose records say that they are in segment 2.
    let second = |name: &&String| disk.contents(name).get(32..40) == Some(&2u64.to_le_bytes());
    let sealed = names.iter().filter(|name| name.starts_with("segment-")).find(second).expect("it is full");
    let file = disk.open(sealed).unwrap();
    let end = disk.contents(sealed).iter().rposition(|octet| *octet != 0).unwrap() as u64;
    file.write_at(&[0; 4096], end / 4096 * 4096).unwrap();
    file.sync_data().unwrap();
    assert!(matches!(open(&disk), Err(OpenError::Lost(_))));
    // The segment behind it says so too, where the superblock knows of no ends: an older build wrote it, or its lists have rotted.
    let superblock = disk.contents("superblock");
    let lists = (0..superblock.len()).filter(|at| superblock[*at..].starts_with(b"HFSE"));
    lists.for_each(|at| disk.flip("superblock", at as u64 + 10, 3));
    assert!(matches!(open(&disk), Err(OpenError::Lost(_))));
}

/// The newest segment's file turns into zeros or into an older self while the node is down. Its records end cleanly; where they end at
/// least stands elsewhere.
#[test]
fn p9_a_newest_segment_that_is_short_of_what_was_synced_is_noticed() {
    for (is_closed, is_zeroed) in [(true, true), (true, false), (false, true), (false, false)] {
        let disk = SimDisk::new(31);
        let log = open(&disk).unwrap();
        let append = |index| {
            let entry = Entry { at: at(index), head: Bytes::from_static(b"head"), body: body(index, 9000) };
            wait(&log, |done| log.append(vec![entry], done));
        };
        (0..3).for_each(append);
        let older = disk.contents("segment-000000");
        (3..6).for_each(append);
        if !is_closed {
            // Not longer ago than this: `erase` says it to the superblock.
            std::thread::sleep(Duration::from_millis(2500));
            disk.power_off_in(0);
        }
        drop(log);
        disk.crash();
        let whole = disk.contents("segment-000000");
        let zeros = vec![0; older.len()];
        overwrite(&disk, "segment-000000", if is_zeroed { &zeros } else { &older }, 0);
        match open(&disk) {
            Err(OpenError::Lost(damage)) => assert!(!damage.end_is_whole, "a vote may be lost as well"),
            other => panic!("closed {is_closed}, zeros {is_zeroed}: {:?}", other.err()),
        }
        overwrite(&disk, "segment-000000", &whole, 0);
        assert_eq!(open(&disk).unwrap().last(), Some(at(5)));
    }
}

/// A sealed segment turns into zeros or into an older self, whose successor, which knew where it ended, was given back.
#[test]
fn p9_a_sealed_segment_is_known_to_be_short_without_its_successor() {
    for is_zeroed in [true, false] {
        let disk = SimDisk::new(41);
        let log = open(&disk).unwrap();
        let append = |index: u64| {
            let entry =
                Entry { at: at(index), head: Bytes::from_static(b"head"), body: body(index, 200_000) };
            wait(&log, |done| log.append(vec![entry], done));
        };
        (0..3).for_each(append);
        let first = "segment-000000";
        let older = disk.contents(first);
        (3..70).for_each(append);
        // All dies that the segments between the first and the last hold, and their entries.
        let made = Checkpoint { applied: at(69), rows: vec![], gone: vec![], tables: vec![7; 400] };
        wait(&log, |done| log.checkpoint(made, done));
        log.purge(at(69));
        (3..70).for_each(|index| log.erase(LogIndex(index)));
        let second = |name: &String| disk.contents(name).get(32..40) == Some(&2u64.to_le_bytes());
        until(|| log.space().sealed_bytes <= 2 * SEGMENT);
        settle(&log);
        drop(log);
        assert!(!segments(&disk).iter().any(second));
        let zeros = vec![0; older.len()];
        overwrite(&disk, first, if is_zeroed { &zeros } else { &older }, 0);
        assert!(matches!(open(&disk), Err(OpenError::Lost(_))), "zeros {is_zeroed}");
    }
}

/// What a node has, and which body it lost: nobody may give up his own for one that is not there.
#[test]
fn p9_a_log_tells_what_it_has_and_what_it_lost() {
    let disk = SimDisk::new(51);
    let log = open(&disk).unwrap();
    assert_eq!(log.has(), (None, None));
    for index in 0..4 {
        let entry = Entry { at: at(index), head: Bytes::from_static(b"head"), body: body(index, 9000) };
        wait(&log, |done| log.append(vec![entry], done));
    }
    assert_eq!(log.has(), (Some(at(3)), None));
    drop(log);
    let contents = disk.contents("segment-000000");
    let place = contents.windows(stamp(2).len()).position(|w| w == stamp(2).as_bytes()).unwrap();
    disk.flip("segment-000000", place as u64 + 3, 1);
    let log = open(&disk).unwrap();
    assert_eq!(log.has(), (Some(at(3)), Some(LogIndex(2))));
    log.purge(at(3));
    assert_eq!(log.has(), (Some(at(3)), Some(LogIndex(2))), "also below the floor");
    wait(&log, |done| log.mend_body(LogIndex(2), body(2, 9000), done));
    assert_eq!(log.has(), (Some(at(3)), None));
}

fn until(holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A tail that may have held more than is found is cut, and each open says so until somebody was asked what it was.
#[test]
fn p9_an_ambiguous_tail_is_not_forgotten_before_it_is_settled() {
    let disk = SimDisk::new(21);
    let log = open(&disk).unwrap();
    for index in 0..3 {
        let entry = Entry { at: at(index), head: Bytes::from_static(b"head"), body: body(index, 9000) };
        wait(&log, |done| log.append(vec![entry], done));
    }
    settle(&log);
    // Killed: one that closes says where it ends.
    disk.power_off_in(0);
    drop(log);
    disk.crash();
    // The last batch but the idle mark: other octets, and no block of zeros.
    let octets = disk.contents("segment-000000");
    let end = octets.iter().rposition(|octet| *octet != 0).unwrap() as u64 + 1;
    let last = body(2, 40);
    let from = octets.windows(last.len()).position(|w| w == last).unwrap() as u64;
    overwrite(&disk, "segment-000000", &vec![0x77; (end - from) as usize], from);
    let ambiguous = |disk: &SimDisk| {
        let opened = Log::open(Arc::new(disk.clone()), identity(), rekeyed(options()));
        let (log, recovered) = opened.unwrap();
        (log, recovered.ambiguous_tail)
    };
    for power_off in [None, Some(1), Some(2), Some(3), Some(4), Some(6), None, None] {
        power_off.into_iter().for_each(|steps| disk.power_off_in(steps));
        let opened = Log::open(Arc::new(disk.clone()), identity(), rekeyed(options()));
        if let Ok((log, recovered)) = opened {
            assert!(recovered.ambiguous_tail, "{power_off:?}");
            assert_eq!(log.last(), Some(at(1)));
        }
        if power_off.is_some() {
            disk.crash();
        }
    }
    let (log, is_ambiguous) = ambiguous(&disk);
    assert!(is_ambiguous);
    wait(&log, |done| log.note(Reset { last: Some(at(2)), ..Reset::default() }, done));
    log.end_ambiguity().unwrap();
    drop(log);
    let (log, is_ambiguous) = ambiguous(&disk);
    assert!(!is_ambiguous);
    assert_eq!(log.doubt(), Some(at(2)));
}

/// Damage that nobody can mend is told with the entries that it took: by index, which the mail log has, people find the messages.
#[test]
fn p9_damage_is_told_with_its_entries() {
    for (flipped, of_head, told) in [
        (4, 8, ", entry 4: the header's CRC"),
        (4, 66, ", entry 4: the head's CRC"),
        (0, 8, ", before entry 1:"),
    ] {
        let disk = SimDisk::new(22);
        write(&disk, &[5000; 9]);
        let name = &segments(&disk)[0];
        let contents = disk.contents(name);
        let needle = stamp(flipped);
        let body_at = contents.windows(needle.len()).position(|w| w == needle.as_bytes()).unwrap() as u64;
        disk.flip(name, body_at - 68 + of_head, 1);
        match open(&disk).map(|_| ()) {
            Err(OpenError::Lost(damage)) => {
                assert!(
                    damage.places.iter().any(|place| place.contains(told)),
                    "{told}: {:?}",
                    damage.places
                );
            }
            other => panic!("{told}: {other:?}"),
        }
    }
}

/// P3: what nobody can read any more is overwritten by a salvage. If a sync fails on the way, its zeros may stand in the page cache alone: the next
/// start does it again.
#[test]
fn p3_a_salvage_whose_overwriting_failed_is_done_again() {
    let mut failures = 0;
    for step in 0.. {
        let disk = SimDisk::new(31);
        let written = write(&disk, &[5000; 20]);
        let name = &segments(&disk)[0];
        let needle = stamp(19);
        let contents = disk.contents(name);
        let body_at = contents.windows(needle.len()).position(|w| w == needle.as_bytes()).unwrap() as u64;
        // From the last entry on no batch can be told: what stands there, once it reads as zeros, is no hole but the end of the log.
        let from = (body_at as usize - 60) / 4096 * 4096;
        let batches = (from..contents.len()).step_by(4096).filter(|at| contents[*at..].starts_with(b"HFR1"));
        batches.for_each(|at| disk.flip(name, at as u64 + 5, 1));
        let Err(OpenError::Lost(damage)) = open(&disk) else { panic!("a damaged header is no damage") };
        let reset = Reset { vote: None, last: damage.last, void_but: Some(written.last.index) };
        disk.fail_in(step);
        let salvaged = Log::salvage(Arc::new(disk.clone()), identity(), options(), reset).map(drop);
        disk.heal();
        failures += u64::from(salvaged.is_err());
        // The system goes on, and the power goes later.
        let log = open(&disk).or_else(|_| {
            Log::salvage(Arc::new(disk.clone()), identity(), options(), reset).map(|(log, _)| log)
        });
        let log = log.unwrap_or_else(|e| panic!("operation {step} failed: {e}"));
        settle(&log);
        drop(log);
        disk.crash();
        assert!(!disk.contains(needle.as_bytes()), "operation {step} failed: what was void can be read");
        if salvaged.is_ok() && step > 5 {
            break;
        }
    }
    assert!(failures > 10, "{failures}");
}

/// The last block of a batch reads as zeros, which look like the padding at a batch's end. An entry that began in that block, of which the
/// checkpoint knows that it was applied, is not gone without a word.
#[test]
fn p9_zeros_within_a_batch_are_no_padding() {
    let disk = SimDisk::new(61);
    let log = open(&disk).unwrap();
    let entry =
        |index, bytes| Entry { at: at(index), head: Bytes::from_static(b"h"), body: body(index, bytes) };
    wait(&log, |done| log.append(vec![entry(0, 5000), entry(1, 300)], done));
    let made = Checkpoint { applied: at(1), rows: vec![], gone: vec![], tables: vec![7; 400] };
    wait(&log, |done| log.checkpoint(made, done));
    log.purge(at(1));
    wait(&log, |done| log.append(vec![entry(2, 300)], done));
    drop(log);
    let name = "segment-000000";
    let needle = stamp(1);
    let second =
        disk.contents(name).windows(needle.len()).position(|w| w == needle.as_bytes()).unwrap() as u64;
    overwrite(&disk, name, &[0; 4096], second / 4096 * 4096);
    match open(&disk) {
        Err(OpenError::Lost(damage)) => assert!(damage.count > 0),
        other => panic!("{:?}", other.map(|log| log.lost())),
    }
}
