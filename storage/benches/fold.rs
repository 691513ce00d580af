//! How long a start takes with so many messages waiting: the log is folded and the index folded again from it, beside the traffic.
//! `cargo bench -p holdfast-storage --bench fold`; `BENCH_ROWS` sets how many (1,000,000), `BENCH_DIR` where.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a benchmark reads the clock, and may panic"
)]

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use holdfast_storage::disk::os::OsDisk;
use holdfast_storage::index::Standing;
use holdfast_storage::index::spilled::Directory;
use holdfast_storage::{Bytes, Checkpoint, Entry, Identity, Log, LogIndex, LogPosition, Options, Rows, Term};

/// The one of the product.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn open(dir: &std::path::Path) -> Log {
    let options = Options {
        segment_bytes: 64 << 20,
        move_below_percent: 0,
        scrub_bytes_per_second: 0,
        keys: Default::default(),
        on_erased: Arc::new(|_| {}),
        on_failure: Arc::new(|why| panic!("{why}")),
    };
    let identity = Identity { cluster: "bench".into(), node: 1 };
    Log::open(Arc::new(OsDisk::open(dir, Duration::ZERO).unwrap()), identity, options).unwrap().0
}

/// Octets of memory in use, as the kernel counts them.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn main() {
    if std::env::args().any(|arg| arg == "--list") {
        return;
    }
    let count: u64 = std::env::var("BENCH_ROWS").ok().and_then(|text| text.parse().ok()).unwrap_or(1_000_000);
    let base = std::env::var("BENCH_DIR").map_or_else(|_| std::env::temp_dir(), Into::into);
    let scratch = tempfile::Builder::new().prefix("holdfast-bench-").tempdir_in(base).unwrap();
    let dir = scratch.path().join("data");
    let log = open(&dir);
    let at = |index: u64| LogPosition { term: Term(1), index: LogIndex(index) };
    let wait = |begin: &mut dyn FnMut(holdfast_storage::Completion)| {
        let (tell, told) = channel();
        begin(Box::new(move |result| drop(tell.send(result))));
        told.recv().unwrap().unwrap();
    };
    const STEP: u64 = 10_000;
    for first in (0..count).step_by(STEP as usize) {
        let last = (first + STEP).min(count) - 1;
        let body = Bytes::from(vec![b'x'; 100]);
        let entry = |index| Entry { at: at(index), head: Bytes::from_static(&[7; 150]), body: body.clone() };
        wait(&mut |done| log.append((first..=last).map(entry).collect(), done));
        let rows = (first..=last).map(|key| (u128::from(key), vec![7; 200])).collect();
        let mut made = Some(Checkpoint { applied: at(last), rows, gone: vec![], tables: vec![1; 200] });
        wait(&mut |done| log.checkpoint(made.take().unwrap(), done));
        log.purge(at(last));
    }
    drop(log);
    let before = resident();
    let began = Instant::now();
    let log = Arc::new(open(&dir));
    let opened = began.elapsed();
    let rows = Rows::new(log.clone(), Some(Box::new(Directory(scratch.path().join("index")))), 0);
    let (mut appended, mut slowest) = (0, Duration::ZERO);
    while rows.standing() != Standing::Ready {
        // Mail is accepted meanwhile.
        let one = Instant::now();
        let index = count + appended;
        let entry =
            Entry { at: at(index), head: Bytes::from_static(&[7; 150]), body: Bytes::from_static(&[1; 100]) };
        wait(&mut |done| log.append(vec![entry.clone()], done));
        slowest = slowest.max(one.elapsed());
        appended += 1;
    }
    println!(
        "{count} rows: opened in {:.2} s, index folded in {:.2} s more; {appended} appends meanwhile, the slowest {:.1} ms; \
         {} MiB of memory",
        opened.as_secs_f64(),
        began.elapsed().saturating_sub(opened).as_secs_f64(),
        slowest.as_secs_f64() * 1e3,
        (resident().saturating_sub(before)) >> 20
    );
}
