//! The index on a real disk, as sled leaves it: whatever is done to its files, every row is still there, and it is folded again.

#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test may panic, and damages files")]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use holdfast_storage::disk::os::OsDisk;
use holdfast_storage::index::Standing;
use holdfast_storage::index::spilled::Directory;
use holdfast_storage::{Bytes, Checkpoint, Entry, Identity, Log, LogIndex, LogPosition, Options, Rows, Term};

const ROWS: u128 = 3000;

fn row(key: u128) -> Vec<u8> {
    format!("row {key} ").repeat(20).into_bytes()
}

fn open(dir: &Path) -> (Arc<Log>, Rows) {
    let options = Options {
        segment_bytes: 4 << 20,
        move_below_percent: 60,
        scrub_bytes_per_second: 0,
        keys: Default::default(),
        on_erased: Arc::new(|_| {}),
        on_failure: Arc::new(|_| {}),
    };
    let identity = Identity { cluster: "test".into(), node: 1 };
    let disk = OsDisk::open(dir, Duration::ZERO).unwrap();
    let (log, _) = Log::open(Arc::new(disk), identity, options).unwrap();
    let log = Arc::new(log);
    let rows = Rows::new(log.clone(), Some(Box::new(Directory(dir.join("index")))), 0);
    (log, rows)
}

fn checkpoint(log: &Log, index: u64, rows: Vec<(u128, Vec<u8>)>, gone: Vec<u128>) {
    let at = LogPosition { term: Term(1), index: LogIndex(index) };
    let entry = Entry { at, head: Bytes::from_static(b"h"), body: Bytes::new() };
    log.append(vec![entry], Box::new(|_| {}));
    let (tell, told) = channel();
    let checkpoint = Checkpoint { applied: at, rows, gone, tables: vec![] };
    log.checkpoint(checkpoint, Box::new(move |r| drop(tell.send(r))));
    told.recv().unwrap().unwrap();
}

fn until_ready(rows: &Rows, what: &str) {
    for n in 0.. {
        if rows.standing() == Standing::Ready {
            return;
        }
        assert!(n < 1000, "{what}: the index is not folded again");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn damage(index: &Path, what: &str) {
    let file = std::fs::OpenOptions::new().write(true).open(index.join("db"));
    match what {
        "nothing" => {}
        "gone" => std::fs::remove_dir_all(index).unwrap(),
        "truncated" => file.unwrap().set_len(10_000).unwrap(),
        "flipped" => {
            let file = file.unwrap();
            for n in 0..200 {
                file.write_all_at(b"!", n * 997).unwrap();
            }
        }
        "no directory" => {
            std::fs::remove_dir_all(index).unwrap();
            std::fs::write(index, "a file in its place").unwrap();
        }
        other => panic!("{other}"),
    }
}

#[test]
fn p9_whatever_happens_to_the_index_costs_no_row() {
    for what in ["nothing", "gone", "truncated", "flipped", "no directory"] {
        let dir = tempfile::tempdir().unwrap();
        let (log, rows) = open(dir.path());
        checkpoint(&log, 0, (0..ROWS).map(|key| (key, row(key))).collect(), vec![]);
        until_ready(&rows, what);
        rows.spilled((0..ROWS).collect());
        checkpoint(&log, 1, vec![(1, b"changed".to_vec())], vec![2]);
        rows.gone(vec![2]);
        drop(rows);
        drop(log);
        damage(&dir.path().join("index"), what);
        let (log, rows) = open(dir.path());
        for round in ["at once", "after the index is folded"] {
            assert_eq!(rows.keys(None, 10_000).len() as u128, ROWS - 1, "{what}, {round}");
            let all = rows.read(&(0..ROWS).collect::<Vec<_>>()).unwrap();
            assert_eq!(all.len() as u128, ROWS - 1, "{what}, {round}");
            for (key, found) in all {
                let expected = if key == 1 { b"changed".to_vec() } else { row(key) };
                assert_eq!(found, expected, "{what}, {round}, row {key}");
            }
            assert_eq!(rows.get(2).unwrap(), None, "{what}, {round}");
            until_ready(&rows, what);
        }
        drop(rows);
        drop(log);
    }
}
