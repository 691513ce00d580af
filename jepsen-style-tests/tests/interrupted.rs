//! A run that is ended in its middle leaves nothing broken behind: no process, link, mount, disk or group of its own.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use jepsen_style_tests::tools::wait_for;

/// Names in a directory of the system's.
fn names(dir: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// What there is of a run: files and groups by its name, processes and disks that name its files.
fn left(run: u32) -> Vec<String> {
    let prefix = format!("holdfast-test-{run}-");
    let temp = std::env::temp_dir().display().to_string();
    let mut left = Vec::new();
    for dir in [temp.as_str(), "/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/blkio"] {
        left.extend(
            names(dir)
                .into_iter()
                .filter(|name| name.starts_with(&prefix))
                .map(|name| format!("{dir}/{name}")),
        );
    }
    let named = |file: &Path| {
        std::fs::read(file).is_ok_and(|octets| String::from_utf8_lossy(&octets).contains(&prefix))
    };
    for pid in names("/proc").into_iter().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) {
        let is_own = named(Path::new(&format!("/proc/{pid}/cmdline")));
        left.extend(is_own.then(|| format!("process {pid}")));
    }
    for device in names("/sys/block") {
        let file = format!("/sys/block/{device}/loop/backing_file");
        left.extend(named(Path::new(&file)).then_some(device));
    }
    left.extend(named(Path::new("/proc/mounts")).then(|| "a mount".to_string()));
    left
}

/// Ends a run like this by a signal as soon as something is broken.
fn interrupt(nemesis: &str, signal: &str, more: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let before = (names("/sys/class/net"), names("/run/netns"), names("/dev/shm"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_jepsen-style-tests"));
    command.args([
        "run",
        "--nemesis",
        nemesis,
        "--seconds",
        "60",
        "--dir",
        &dir.path().display().to_string(),
    ]);
    // As from a shell, where an interruption goes to the whole group.
    let mut child =
        command.args(more).process_group(0).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let broken = lines.find(|line| line.contains(" ms  "));
    let Some(broken) = broken else { panic!("nothing was broken with {nemesis}") };
    assert!(!left(child.id()).is_empty(), "this test sees nothing of a run: {broken}");
    let group = if signal == "KILL" { child.id().to_string() } else { format!("-{}", child.id()) };
    assert!(Command::new("kill").args(["-s", signal, "--", &group]).status().unwrap().success());
    assert!(!child.wait().unwrap().success());
    let mut rest = Vec::new();
    let gone = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        wait_for("everything to be gone", Duration::from_secs(20), || {
            rest = left(child.id());
            rest.is_empty()
        });
    }));
    assert!(gone.is_ok(), "left by {signal} while {broken}: {rest:?}");
    let after = (names("/sys/class/net"), names("/run/netns"), names("/dev/shm"));
    assert_eq!(before, after, "{signal} while {broken}");
}

#[test]
fn a_run_that_is_interrupted_leaves_nothing_behind() {
    interrupt("slow-disk", "INT", &[]);
    interrupt("jitter", "INT", &[]);
    interrupt("one-way", "INT", &["--loopback"]);
}

#[test]
fn a_run_that_is_killed_leaves_nothing_behind() {
    interrupt("fill-disk", "KILL", &[]);
    interrupt("isolate-leader,wall-clock", "KILL", &[]);
    interrupt("wall-clock", "KILL", &["--loopback"]);
}
