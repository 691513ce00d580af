//! A directory of a run's own. One that a run left behind that was killed is taken away by the next.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use crate::cgroup;

/// How the names of all of them begin.
pub(crate) const PREFIX: &str = "holdfast-test-";
/// Whoever lives holds a lock on this file in it.
const LOCK: &str = "lock";
/// A directory that is younger may not have its lock yet.
const YOUNG: Duration = Duration::from_secs(60);

/// The directory; it goes with this value.
pub(crate) struct Scratch {
    dir: tempfile::TempDir,
    _lock: File,
}

impl Scratch {
    /// A new one, after those that nobody holds any more are gone, with the control groups that are called after them.
    ///
    /// # Panics
    /// If there is no room for one.
    pub(crate) fn new() -> Scratch {
        sweep(&std::env::temp_dir(), YOUNG);
        let dir = tempfile::Builder::new().prefix(PREFIX).tempdir().expect("a temporary directory");
        let lock = File::create(dir.path().join(LOCK)).expect("a file of our own");
        lock.lock().expect("nobody else knows it yet");
        Scratch { dir, _lock: lock }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn name(&self) -> String {
        self.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

fn sweep(temp: &Path, young: Duration) {
    let entries = std::fs::read_dir(temp).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX)) {
        if is_left_behind(&entry.path(), young) {
            cgroup::sweep(&entry.file_name().to_string_lossy());
            drop(std::fs::remove_dir_all(entry.path()));
        }
    }
}

fn is_left_behind(dir: &Path, young: Duration) -> bool {
    let Ok(lock) = File::open(dir.join(LOCK)) else { return false };
    let age = lock.metadata().and_then(|m| m.modified()).ok().and_then(|at| at.elapsed().ok());
    age.is_some_and(|age| age >= young) && lock.try_lock().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_holds_is_taken_away() {
        let temp = tempfile::tempdir().unwrap();
        let make = |name: &str, with_lock: bool| {
            let dir = temp.path().join(name);
            std::fs::create_dir(&dir).unwrap();
            with_lock.then(|| File::create(dir.join(LOCK)).unwrap())
        };
        let held = make("holdfast-test-held", true).unwrap();
        held.lock().unwrap();
        drop(make("holdfast-test-left", true));
        make("holdfast-test-new", false);
        drop(make("another-thing", true));
        let names = || {
            let mut names: Vec<_> =
                std::fs::read_dir(temp.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        sweep(temp.path(), YOUNG);
        assert_eq!(names().len(), 4, "all are young");
        sweep(temp.path(), Duration::ZERO);
        assert_eq!(names(), ["another-thing", "holdfast-test-held", "holdfast-test-new"]);
    }
}
