//! What the tests of a log share: opening one on a simulated disk, and waiting for what it completes.
#![allow(dead_code, reason = "each test uses a part of it")]
#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, and waits for threads"
)]

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use holdfast_storage::disk::Disk;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::seal::{KEY_BYTES, Keyring};
use holdfast_storage::{
    Bytes, Completion, Entry, Identity, Log, LogIndex, LogPosition, OpenError, Options, StoreFailed, Term,
};

/// The smallest segment.
pub(crate) const SEGMENT: u64 = holdfast_storage::limits::SEGMENT_BYTES_MIN;

pub(crate) fn identity() -> Identity {
    Identity { cluster: "test".into(), node: 1 }
}

/// Nothing is moved and nothing scrubbed, unless a test says so.
pub(crate) fn options() -> Options {
    Options {
        segment_bytes: SEGMENT,
        move_below_percent: 0,
        scrub_bytes_per_second: 0,
        keys: keys(),
        on_erased: Arc::new(|_| {}),
        on_failure: Arc::new(|_| {}),
    }
}

/// With `HOLDFAST_AT_REST=1` what is written is sealed, and what these tests say holds all the same.
fn keys() -> Keyring {
    if is_sealed() { Keyring::new(&[[7; KEY_BYTES]]).unwrap() } else { Keyring::default() }
}

pub(crate) fn is_sealed() -> bool {
    std::env::var_os("HOLDFAST_AT_REST").is_some()
}

/// The same options with another at-rest key, if there is one; what the first has sealed can be opened.
pub(crate) fn rekeyed(options: Options) -> Options {
    match is_sealed() {
        true => Options { keys: Keyring::new(&[[8; KEY_BYTES], [7; KEY_BYTES]]).unwrap(), ..options },
        false => options,
    }
}

pub(crate) fn open_with(disk: &SimDisk, options: Options) -> Result<Log, OpenError> {
    Log::open(Arc::new(disk.clone()), identity(), options).map(|(log, _)| log)
}

pub(crate) fn at(term: u64, index: u64) -> LogPosition {
    LogPosition { term: Term(term), index: LogIndex(index) }
}

/// Octets that name their entry again and again.
pub(crate) fn body(index: u64, bytes: usize) -> Bytes {
    let stamp = format!("<the body of entry {index:06}>");
    stamp.bytes().cycle().take(bytes).collect::<Vec<u8>>().into()
}

pub(crate) fn entry(at: LogPosition, body: Bytes) -> Entry {
    Entry { at, head: Bytes::from_static(b"head"), body }
}

/// What comes of something that the log completes later.
pub(crate) fn outcome(begin: impl FnOnce(Completion)) -> Result<(), StoreFailed> {
    let (tell, told) = channel();
    begin(Box::new(move |result| drop(tell.send(result))));
    told.recv().unwrap_or(Err(StoreFailed("nobody was told".into())))
}

/// Waits until it is durable.
pub(crate) fn wait(log: &Log, begin: impl FnOnce(Completion)) {
    outcome(begin).unwrap();
    log.check();
}

/// Waits until a condition holds.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until what is dying is overwritten and the idle mark is written.
pub(crate) fn settle(log: &Log) {
    until("the dead are overwritten", || log.erase_backlog() == 0);
    std::thread::sleep(Duration::from_millis(120));
}

/// Files in which something stands.
pub(crate) fn segments(disk: &SimDisk) -> Vec<String> {
    let mut names: Vec<String> = disk.list().unwrap();
    names.retain(|name| name.starts_with("segment-") && disk.contents(name).iter().any(|octet| *octet != 0));
    names.sort();
    names
}

/// No spare segment, and no more room than this: the log is closed.
pub(crate) fn leave_no_room(disk: &SimDisk, bytes: u64) {
    let used = segments(disk);
    for name in
        disk.list().unwrap().iter().filter(|name| name.starts_with("segment-") && !used.contains(name))
    {
        disk.remove(name).unwrap();
    }
    disk.set_capacity(disk.used_bytes() + bytes);
}

/// How many cases of a property, unless the environment says otherwise.
pub(crate) fn cases(usual: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}
