//! Small things that several tests need: waiting, finding octets in files, and other people's programs.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Waits until `condition` holds. Nothing sleeps for its own sake.
///
/// # Panics
/// If it does not hold in time.
pub fn wait_for(what: &str, patience: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {patience:?} for {what}");
        std::thread::sleep(Duration::from_millis(25));
    }
}

/// The same; whether it did.
pub(crate) fn waited(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    true
}

/// The library by which a program has a wall clock of its own, if it is installed.
pub(crate) fn faketime() -> Option<PathBuf> {
    let places = std::fs::read_dir("/usr/lib").ok()?.flatten().map(|entry| entry.path());
    places.map(|place| place.join("faketime/libfaketimeMT.so.1")).find(|library| library.is_file())
}

/// Takes away what that library leaves in shared memory for processes that were killed.
pub(crate) fn forget_clocks(pids: impl Iterator<Item = u32>) {
    for pid in pids {
        let files = [format!("faketime_shm_{pid}"), format!("sem.faketime_sem_{pid}")];
        files.iter().for_each(|file| drop(std::fs::remove_file(Path::new("/dev/shm").join(file))));
    }
}

/// Locks it, whoever panicked with it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether `needle` stands in any file of a directory.
pub fn files_contain(dir: &Path, needle: &[u8]) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else { return false };
    entries.flatten().any(|entry| {
        let path = entry.path();
        if path.is_dir() {
            return files_contain(&path, needle);
        }
        let octets = std::fs::read(&path).unwrap_or_default();
        find(&octets, needle)
    })
}

/// Whether `needle` stands in `hay`.
pub(crate) fn find(hay: &[u8], needle: &[u8]) -> bool {
    let Some(first) = needle.first() else { return true };
    let mut at = 0;
    while let Some(next) = hay[at..].iter().position(|b| b == first) {
        at += next;
        if hay[at..].starts_with(needle) {
            return true;
        }
        at += 1;
    }
    false
}

/// Whether another program is installed.
pub fn is_installed(name: &str) -> bool {
    find_program(name).is_some()
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let dirs = path.split(':').chain(["/usr/sbin", "/usr/bin"]);
    dirs.map(|dir| Path::new(dir).join(name)).find(|path| path.exists())
}

/// Another program, if it is installed. In CI everything must be.
///
/// # Panics
/// If it is missing and `HOLDFAST_REQUIRE_PEERS` is set.
pub fn program(name: &str) -> Option<PathBuf> {
    let found = find_program(name);
    if found.is_none() {
        assert!(std::env::var_os("HOLDFAST_REQUIRE_PEERS").is_none(), "{name} is not installed");
        eprintln!("skipped: {name} is not installed; this run does not count");
    }
    found
}
