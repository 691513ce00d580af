//! A network of a test's own: a namespace with nothing but loopback, in which all ports are free. Takes root.

use std::process::{Command, Stdio};

/// Set in the process that runs inside.
const INSIDE: &str = "HOLDFAST_OWN_NETWORK";

/// Runs the test of this name once more, in a network of its own. True in the process that is inside and does the work; whoever gets
/// false is outside, and the work is done.
///
/// # Panics
/// If the test fails inside, or there is no network to be had and `HOLDFAST_REQUIRE_PEERS` is set.
pub fn is_own(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let up = "ip link set lo up";
    let possible = Command::new("unshare").args(["--net", "sh", "-c", up]).stderr(Stdio::null()).status();
    if !possible.is_ok_and(|status| status.success()) {
        assert!(std::env::var_os("HOLDFAST_REQUIRE_PEERS").is_none(), "no network namespace can be made");
        eprintln!("skipped: no network namespace can be made here; this run does not count");
        return false;
    }
    let own = std::env::current_exe().expect("a test knows where it stands");
    let status = Command::new("unshare")
        .args([
            "--net",
            "sh",
            "-c",
            &format!("{up} && exec \"$0\" --exact {test} --include-ignored --nocapture"),
        ])
        .arg(own)
        .env(INSIDE, "1")
        .status();
    assert!(status.is_ok_and(|status| status.success()), "{test} failed in its own network");
    false
}
