//! A directory of a run's own. What a run made and could not take away, as it was killed, a process takes away that waits for its end; what
//! that could not is taken away by the next run.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::cgroup;
use crate::tools::{forget_clocks, waited};

/// How the names of all of them begin.
pub(crate) const PREFIX: &str = "holdfast-test-";
/// Tells a process to whose run it belongs: to that of the process with this id.
pub(crate) const RUN: &str = "HOLDFAST_RUN";
/// How long what a run made may outlive it.
const PATIENCE: Duration = Duration::from_secs(20);
/// Here stand the ids of processes that have wall clocks of their own.
const CLOCKS: &str = "clocks";
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
        let prefix = prefix_of(&run());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir().expect("a temporary directory");
        let lock = File::create(dir.path().join(LOCK)).expect("a file of our own");
        lock.lock().expect("nobody else knows it yet");
        Scratch { dir, _lock: lock }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A process has a wall clock of its own from now on, of which something may be left when it was killed.
    pub(crate) fn has_clock(&self, pid: u32) {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(self.path().join(CLOCKS));
        let noted = file.and_then(|mut file| writeln!(file, "{pid}"));
        assert!(noted.is_ok(), "a file of our own cannot be written");
    }

    pub(crate) fn name(&self) -> String {
        self.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// The run that this process belongs to.
pub(crate) fn run() -> String {
    std::env::var(RUN).unwrap_or_else(|_| std::process::id().to_string())
}

fn prefix_of(run: &str) -> String {
    format!("{PREFIX}{run}-")
}

/// Once this process has ended, however it ends, another one takes away what its run has left.
///
/// # Errors
/// If that one cannot be started.
pub fn clean_up_after_us() -> std::io::Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    // Whoever interrupts us does not interrupt it.
    command.args(["clean-up", &run()]).process_group(0);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    // Its standard input ends with us.
    std::mem::forget(child);
    Ok(())
}

/// Waits until standard input ends, and takes away the directories and control groups of a run.
pub fn clean_up(run: &str) {
    drop(std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
    let prefix = prefix_of(run);
    waited(PATIENCE, || {
        let entries = std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten();
        let own = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
        let left = own.filter(|entry| remove(&entry.path()).is_err()).count();
        cgroup::sweep(&prefix) == 0 && left == 0
    });
}

/// Takes away a directory, and the clocks of its processes.
fn remove(dir: &Path) -> std::io::Result<()> {
    let pids = std::fs::read_to_string(dir.join(CLOCKS)).unwrap_or_default();
    forget_clocks(pids.lines().filter_map(|pid| pid.parse().ok()));
    std::fs::remove_dir_all(dir)
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(remove(self.path()));
    }
}

fn sweep(temp: &Path, young: Duration) {
    let entries = std::fs::read_dir(temp).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX)) {
        if is_left_behind(&entry.path(), young) {
            cgroup::sweep(&entry.file_name().to_string_lossy());
            drop(remove(&entry.path()));
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
