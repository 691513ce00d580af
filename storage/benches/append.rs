//! How fast the log appends, beside the floor of the same disk in the same run: `cargo bench -p holdfast-storage --bench append`.
//!
//! The floor is a bare loop of pwrite and fdatasync into a file of written zeros, as a segment is: its latency at one waiter, its rate in
//! writes of the largest batch. `BENCH_DIR` names the directory, `BENCH_SECONDS` the length of each line.
//! With `HOLDFAST_AT_REST=1` records are sealed.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a benchmark reads the clock, and may panic"
)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use holdfast_storage::disk::Disk;
use holdfast_storage::disk::os::OsDisk;
use holdfast_storage::limits::{BATCH_BYTES_MAX, MOVE_BELOW_PERCENT};
use holdfast_storage::seal::{KEY_BYTES, Keyring};
use holdfast_storage::{Bytes, Entry, Identity, Log, LogIndex, LogPosition, Options, Term};

const SEGMENT: u64 = 64 << 20;
/// Octets of a burst: no more than the first segment holds, so that none is zeroed beside it.
const BURST: usize = 480 << 20;
/// A segment that holds it; the floor's file is as large.
const BURST_SEGMENT: u64 = 512 << 20;
const BURSTS: usize = 5;

fn seconds() -> Duration {
    let text = std::env::var("BENCH_SECONDS").unwrap_or_default();
    Duration::from_secs_f64(text.parse().unwrap_or(2.0))
}

/// The median, and the 99th percentile.
fn percentiles(mut each: Vec<Duration>) -> (Duration, Duration) {
    each.sort_unstable();
    let at = |part: usize| each.get(each.len() * part / 100).copied().unwrap_or_default();
    (at(50), at(99))
}

/// Writes and syncs one by one; how many a second, and how long one takes.
fn floor(dir: &Path, delay: Duration, bytes: usize) -> (f64, Duration, Duration) {
    let disk = OsDisk::open(dir, delay).unwrap();
    let file = disk.create("floor").unwrap();
    file.write_zeros(0, BURST_SEGMENT).unwrap();
    file.sync_data().unwrap();
    let octets = vec![0x5a; bytes];
    let (began, mut each, mut at) = (Instant::now(), Vec::new(), 0);
    while began.elapsed() < seconds() {
        let one = Instant::now();
        file.write_at(&octets, at).unwrap();
        file.sync_data().unwrap();
        each.push(one.elapsed());
        at = (at + bytes as u64) % (BURST_SEGMENT - bytes as u64) / 4096 * 4096;
    }
    let rate = each.len() as f64 / began.elapsed().as_secs_f64();
    disk.remove("floor").unwrap();
    let (p50, p99) = percentiles(each);
    (rate, p50, p99)
}

fn keys() -> Keyring {
    let wanted = std::env::var_os("HOLDFAST_AT_REST").is_some();
    if wanted { Keyring::new(&[[7; KEY_BYTES]]).unwrap() } else { Keyring::default() }
}

fn open(dir: &Path, delay: Duration, segment_bytes: u64) -> Log {
    let disk = Arc::new(OsDisk::open(dir, delay).unwrap());
    let options = Options {
        segment_bytes,
        move_below_percent: MOVE_BELOW_PERCENT,
        scrub_bytes_per_second: 0,
        keys: keys(),
        on_erased: Arc::new(|_| {}),
        on_failure: Arc::new(|why| panic!("{why}")),
    };
    let identity = Identity { cluster: "bench".into(), node: 1 };
    Log::open(disk, identity, options).unwrap().0
}

/// How long 256 waiters take to have so many octets written into segments that were zeroed before, in bodies of so many, with nothing erased beside it:
/// what the floor does.
fn burst(dir: &Path, delay: Duration, octets: usize, bytes: usize) -> Duration {
    let log = open(dir, delay, BURST_SEGMENT);
    std::thread::sleep(Duration::from_secs(2)); // a spare segment is made
    let body = Bytes::from(vec![0x5a; bytes]);
    let (tell, told) = channel();
    let append = |index: usize| {
        let at = LogPosition { term: Term(1), index: LogIndex(index as u64) };
        let entry = Entry { at, head: Bytes::from_static(&[7; 120]), body: body.clone() };
        let tell = tell.clone();
        let done = move |result: Result<(), _>| {
            result.unwrap();
            tell.send(()).unwrap();
        };
        log.append(vec![entry], Box::new(done));
    };
    let (began, count) = (Instant::now(), octets / bytes);
    (0..count.min(256)).for_each(append);
    for done in 0..count {
        told.recv().unwrap();
        if done + 256 < count {
            append(done + 256);
        }
    }
    began.elapsed()
}

/// So many waiters, each of which appends again as soon as it was told. What has passed is erased and purged, as in service.
fn appends(dir: &Path, delay: Duration, waiters: usize, bytes: usize) -> (f64, Duration, Duration) {
    let log = open(dir, delay, SEGMENT);
    let body = Bytes::from(vec![0x5a; bytes]);
    let durable = Arc::new(AtomicU64::new(0));
    let (tell, told) = channel();
    let append = |index: u64| {
        let (tell, durable, began) = (tell.clone(), durable.clone(), Instant::now());
        let at = LogPosition { term: Term(1), index: LogIndex(index) };
        let entry = Entry { at, head: Bytes::from_static(&[7; 120]), body: body.clone() };
        let done = move |result: Result<(), _>| {
            result.unwrap();
            durable.fetch_add(1, Ordering::Relaxed);
            tell.send(began.elapsed()).ok();
        };
        log.append(vec![entry], Box::new(done));
    };
    let (began, mut next, mut each) = (Instant::now(), 0, Vec::new());
    (0..waiters).for_each(|_| {
        append(next);
        next += 1;
    });
    while began.elapsed() < seconds() {
        each.push(told.recv().unwrap());
        append(next);
        next += 1;
        if next.is_multiple_of(1000) {
            let floor = LogPosition { term: Term(1), index: LogIndex(next - 1000) };
            (floor.index.0.saturating_sub(1000)..=floor.index.0).for_each(|index| log.erase(LogIndex(index)));
            log.purge(floor);
        }
    }
    let rate = each.len() as f64 / began.elapsed().as_secs_f64();
    drop(log);
    let (p50, p99) = percentiles(each);
    (rate, p50, p99)
}

/// Octets that this process has written, as the kernel counts them.
fn written() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("wchar: "));
    line.and_then(|number| number.parse().ok()).unwrap_or(0)
}

fn main() {
    // What `cargo test --benches` or a filter of nextest passes means nothing here.
    if std::env::args().any(|arg| arg == "--list") {
        return;
    }
    let base = std::env::var("BENCH_DIR").map_or_else(|_| std::env::temp_dir(), Into::into);
    let scratch = tempfile::Builder::new().prefix("holdfast-bench-").tempdir_in(base).unwrap();
    println!(
        "sync+  waiters  body   appends/s     MB/s    p50 ms    p99 ms  written per byte   of the floor"
    );
    for delay in [0, 1, 5].map(Duration::from_millis) {
        let (batches, ..) = floor(&scratch.path().join("floor"), delay, BATCH_BYTES_MAX);
        let sequential = batches * BATCH_BYTES_MAX as f64;
        println!(
            "{:>3} ms  floor: {:.0} MB/s in writes of {} KiB",
            delay.as_millis(),
            sequential / 1e6,
            BATCH_BYTES_MAX >> 10
        );
        for bytes in [4 << 10, 64 << 10] {
            let (one, one_p50, _) = floor(&scratch.path().join("floor"), delay, bytes);
            println!(
                "{:>3} ms  floor: {one:.0} writes of {} KiB a second, p50 {:.3} ms",
                delay.as_millis(),
                bytes >> 10,
                one_p50.as_secs_f64() * 1e3
            );
            // By turns with the floor, as other machines' load comes and goes.
            let mut of_floor: Vec<f64> = (0..BURSTS)
                .map(|_| {
                    let (batches, ..) = floor(&scratch.path().join("floor"), delay, BATCH_BYTES_MAX);
                    let took = burst(&scratch.path().join("burst"), delay, BURST, bytes);
                    std::fs::remove_dir_all(scratch.path().join("burst")).unwrap();
                    BURST as f64 / took.as_secs_f64() / (batches * BATCH_BYTES_MAX as f64)
                })
                .collect();
            of_floor.sort_by(f64::total_cmp);
            println!(
                "{:>3} ms  bursts of {} MiB by 256 waiters in {} KiB, nothing erased meanwhile: {:.0} % of the floor's rate (from {:.0} to {:.0})",
                delay.as_millis(),
                BURST >> 20,
                bytes >> 10,
                of_floor[BURSTS / 2] * 100.0,
                of_floor[0] * 100.0,
                of_floor[BURSTS - 1] * 100.0,
            );
            for waiters in [1, 16, 256] {
                let dir = scratch.path().join(format!("{}-{bytes}-{waiters}", delay.as_millis()));
                let before = written();
                let (rate, p50, p99) = appends(&dir, delay, waiters, bytes);
                let per_byte = (written() - before) as f64 / (rate * seconds().as_secs_f64() * bytes as f64);
                std::fs::remove_dir_all(&dir).unwrap();
                let of_floor = match waiters {
                    1 => format!("{:.2} x its latency", p50.as_secs_f64() / one_p50.as_secs_f64()),
                    _ => format!("{:.0} % of its rate", rate * bytes as f64 * 100.0 / sequential),
                };
                println!(
                    "{:>3} ms  {waiters:>7} {:>3} KiB {rate:>10.0} {:>8.1} {:>9.3} {:>9.3} {per_byte:>17.2}   {of_floor}",
                    delay.as_millis(),
                    bytes >> 10,
                    rate * bytes as f64 / 1e6,
                    p50.as_secs_f64() * 1e3,
                    p99.as_secs_f64() * 1e3,
                );
            }
        }
    }
}
