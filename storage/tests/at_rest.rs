//! The at-rest key on a real disk, log and index: nothing stands there in the clear, keys can be changed, and without its key a directory
//! is refused untouched.

#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test may panic, and looks into files")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{at, until, wait};
use holdfast_storage::codec::{Reset, Vote};
use holdfast_storage::disk::os::OsDisk;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::index::spilled::Directory;
use holdfast_storage::index::{Sealed, Standing};
use holdfast_storage::log::dump::{BodyState, Line, dump};
use holdfast_storage::seal::KEY_BYTES;
use holdfast_storage::{Checkpoint, Entry, Keyring, Log, LogIndex, OpenError, Options, Rows, Term};

const ENTRIES: u64 = 60;
/// What stands in bodies, heads, rows and tables.
const TEXTS: [&str; 4] =
    ["a patient's record", "<sender@clinic.example>", "<patient@home.example>", "route of clinic"];

/// The first seals.
fn ring(keys: &[u8]) -> Keyring {
    Keyring::new(&keys.iter().map(|key| [*key; KEY_BYTES]).collect::<Vec<_>>()).unwrap()
}

fn try_open(dir: &Path, keys: &Keyring) -> Result<Log, OpenError> {
    let options = Options { keys: keys.clone(), scrub_bytes_per_second: 64 << 20, ..common::options() };
    let disk = Arc::new(OsDisk::open(dir, Duration::ZERO).unwrap());
    Log::open(disk, common::identity(), options).map(|(log, _)| log)
}

fn open(dir: &Path, keys: &Keyring) -> (Arc<Log>, Rows) {
    let log = Arc::new(try_open(dir, keys).unwrap());
    let shelf = Sealed { shelf: Directory::within(dir, keys.sealing()), keys: keys.clone() };
    let rows = Rows::new(log.clone(), Some(Box::new(shelf)), 0);
    until("the index is folded", || rows.standing() == Standing::Ready);
    (log, rows)
}

fn entry(index: u64) -> Entry {
    let body = format!("{index}: {} ", TEXTS[0]).bytes().cycle().take(200_000).collect::<Vec<u8>>();
    Entry { at: at(1, index), head: TEXTS[1].into(), body: body.into() }
}

fn row(key: u128) -> Vec<u8> {
    format!("{key}: {}", TEXTS[2]).into_bytes()
}

/// Entries, of which every other one dies; rows, a table and a vote.
fn fill(log: &Log, rows: &Rows) {
    wait(log, |done| log.save_vote(Vote { term: Term(1), node: 1, committed: true }, done));
    wait(log, |done| log.append((0..ENTRIES).map(entry).collect(), done));
    let checkpoint = Checkpoint {
        applied: at(1, ENTRIES - 1),
        rows: (0..100).map(|key| (key, row(key))).collect(),
        gone: vec![],
        tables: TEXTS[3].repeat(10).into_bytes(),
    };
    wait(log, |done| log.checkpoint(checkpoint, done));
    rows.spilled((0..100).collect());
    (0..ENTRIES).filter(|index| index % 2 == 1).for_each(|index| log.erase(LogIndex(index)));
    log.purge(at(1, ENTRIES - 1));
    common::settle(log);
}

/// That all of it is there.
fn look(log: &Log, rows: &Rows) {
    for index in 0..ENTRIES {
        match log.body(LogIndex(index)) {
            Ok(body) if index % 2 == 0 => assert_eq!(body, entry(index).body, "body {index}"),
            found => assert!(found.is_err() && index % 2 == 1, "body {index}: {:?}", found.map(|b| b.len())),
        }
    }
    let found: BTreeMap<u128, Vec<u8>> = rows
        .read(&(0..100).collect::<Vec<_>>())
        .unwrap()
        .into_iter()
        .map(|(k, row)| (k, row.to_vec()))
        .collect();
    assert_eq!(found, (0..100).map(|key| (key, row(key))).collect());
    assert_eq!(log.digest(LogIndex(0)).unwrap(), (200_000, crc32fast::hash(&entry(0).body)));
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// Which of the texts stand in which files.
fn in_the_clear(dir: &Path) -> Vec<(PathBuf, &'static str)> {
    let mut found = Vec::new();
    for file in files(dir) {
        let bytes = std::fs::read(&file).unwrap();
        let stands = |text: &&&str| bytes.windows(text.len()).any(|part| part == text.as_bytes());
        found.extend(TEXTS.iter().filter(stands).map(|text| (file.clone(), *text)));
    }
    found
}

#[test]
fn p3_with_a_key_nothing_stands_on_the_medium_in_the_clear() {
    for keys in [ring(&[]), ring(&[1])] {
        let dir = tempfile::tempdir().unwrap();
        for start in 0..2 {
            let (log, rows) = open(dir.path(), &keys);
            if start == 0 {
                fill(&log, &rows);
            }
            look(&log, &rows);
            drop((rows, log));
        }
        let found = in_the_clear(dir.path());
        match keys.sealing() {
            Some(_) => assert_eq!(found, [], "sealed"),
            None => assert!(TEXTS.iter().all(|text| found.iter().any(|(_, at)| at == text)), "{found:?}"),
        }
    }
}

/// From none to one, and from that to another, which is all that is needed in the end.
#[test]
fn keys_are_changed_while_mail_waits() {
    let dir = tempfile::tempdir().unwrap();
    let (log, rows) = open(dir.path(), &ring(&[]));
    fill(&log, &rows);
    drop((rows, log));
    for keys in [ring(&[1]), ring(&[2, 1])] {
        let (log, rows) = open(dir.path(), &keys);
        look(&log, &rows);
        assert!(log.space().other_key_bytes > 0);
        // Tables and what stands beside them move with the next checkpoint.
        let next = at(1, log.last().unwrap().index.0 + 1);
        wait(&log, |done| log.append(vec![Entry { at: next, head: "".into(), body: "".into() }], done));
        let tables = TEXTS[3].repeat(10).into_bytes();
        let checkpoint = Checkpoint { applied: next, rows: vec![], gone: vec![], tables };
        wait(&log, |done| log.checkpoint(checkpoint, done));
        log.purge(next);
        until("all is sealed anew", || log.space().other_key_bytes == 0);
        common::settle(&log);
        look(&log, &rows);
        drop((rows, log));
        assert_eq!(in_the_clear(dir.path()), []);
    }
    let (log, rows) = open(dir.path(), &ring(&[2]));
    look(&log, &rows);
}

#[test]
fn p9_without_its_key_a_directory_is_refused_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let (log, rows) = open(dir.path(), &ring(&[1]));
    fill(&log, &rows);
    drop((rows, log));
    let bytes = || files(dir.path()).into_iter().map(|file| (file.clone(), std::fs::read(file).unwrap()));
    let before: BTreeMap<PathBuf, Vec<u8>> = bytes().collect();
    for keys in [ring(&[]), ring(&[2])] {
        let refused = try_open(dir.path(), &keys).map(|_| ()).unwrap_err();
        let id = ring(&[1]).sealing().unwrap();
        assert!(matches!(&refused, OpenError::NoKey { key, .. } if *key == id), "{refused}");
        assert!(refused.to_string().contains(&format!("the at-rest key {id}")), "{refused}");
        assert!(bytes().collect::<BTreeMap<_, _>>() == before, "not an octet changed");
    }
    let (log, rows) = open(dir.path(), &ring(&[1]));
    look(&log, &rows);
}

/// So is one that lost its superblock: what its segments hold is not taken for nothing.
#[test]
fn p9_without_its_key_nothing_is_salvaged() {
    let dir = tempfile::tempdir().unwrap();
    let (log, rows) = open(dir.path(), &ring(&[1]));
    fill(&log, &rows);
    drop((rows, log));
    std::fs::remove_file(dir.path().join("superblock")).unwrap();
    let contents = || files(dir.path()).into_iter().map(|file| (file.clone(), std::fs::read(file).unwrap()));
    let before: BTreeMap<PathBuf, Vec<u8>> = contents().collect();
    let salvage = |keys: &Keyring| {
        let options = Options { keys: keys.clone(), ..common::options() };
        let disk = Arc::new(OsDisk::open(dir.path(), Duration::ZERO).unwrap());
        let reset = Reset { void_but: Some(LogIndex(ENTRIES)), ..Reset::default() };
        Log::salvage(disk, common::identity(), options, reset).map(|(log, _)| log)
    };
    for keys in [ring(&[]), ring(&[2])] {
        assert!(matches!(try_open(dir.path(), &keys).map(|_| ()), Err(OpenError::Lost(_))));
        assert!(matches!(salvage(&keys).map(|_| ()), Err(OpenError::NoKey { .. })));
        assert!(contents().collect::<BTreeMap<_, _>>() == before, "not an octet changed");
    }
    let log = salvage(&ring(&[2, 1])).unwrap();
    for index in (0..ENTRIES).step_by(2) {
        assert_eq!(log.body(LogIndex(index)).unwrap(), entry(index).body, "body {index}");
    }
}

/// A key is given to a node whose disk others have filled: what is sealed anew takes no room that settlements need, and once there
/// is room it goes on.
#[test]
fn p6_changing_keys_takes_no_room_that_is_needed() {
    let disk = SimDisk::new(5);
    let log = common::open_with(&disk, Options { keys: ring(&[]), ..common::options() }).unwrap();
    let body = |index| common::body(index, 250_000);
    wait(&log, |done| log.append((0..ENTRIES).map(|n| common::entry(at(1, n), body(n))).collect(), done));
    log.purge(at(1, ENTRIES - 1));
    drop(log);
    common::leave_no_room(&disk, common::SEGMENT / 2);
    let failed = Arc::new(AtomicBool::new(false));
    let told = failed.clone();
    let on_failure = Arc::new(move |why: &str| told.store(!why.is_empty(), Ordering::Relaxed));
    let log =
        common::open_with(&disk, Options { keys: ring(&[1]), on_failure, ..common::options() }).unwrap();
    let sound = |what: &str| assert!(!failed.load(Ordering::Relaxed), "{what}: the log has failed");
    std::thread::sleep(Duration::from_secs(1));
    sound("left alone");
    assert!(log.space().other_key_bytes > 0);
    for index in 0..ENTRIES / 2 {
        log.erase(LogIndex(index));
    }
    common::settle(&log);
    sound("while half is erased");
    until("all is sealed anew", || log.space().other_key_bytes == 0);
    sound("in the end");
    for index in ENTRIES / 2..ENTRIES {
        assert_eq!(log.body(LogIndex(index)).unwrap(), body(index));
    }
}

/// Rot under a key is found, told by length and CRC of the plain body, and mended with that.
#[test]
fn p9_rot_under_a_key_is_told_as_without_one() {
    let dir = tempfile::tempdir().unwrap();
    let keys = ring(&[1]);
    let (log, rows) = open(dir.path(), &keys);
    fill(&log, &rows);
    drop((rows, log));
    let mut place = None;
    let disk = OsDisk::open_to_read(dir.path()).unwrap();
    dump(&disk, &keys, &mut |line| match line {
        Line::Record { segment, offset, at, bytes, body: BodyState::Whole, .. } if at.index.0 == 4 => {
            place = Some((segment.1, offset as usize + 64 + bytes.0 as usize));
        }
        _ => {}
    })
    .unwrap();
    drop(disk);
    let (file, body_at) = place.unwrap();
    let file = dir.path().join(file);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[body_at + 1000] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let (log, rows) = open(dir.path(), &keys);
    let lost = log.lost();
    let crc = crc32fast::hash(&entry(4).body);
    assert_eq!(
        lost.iter().map(|l| (l.index.0, l.bytes, l.crc)).collect::<Vec<_>>(),
        [(4, 200_000, Some(crc))]
    );
    wait(&log, |done| log.mend_body(LogIndex(4), entry(4).body, done));
    look(&log, &rows);
}
