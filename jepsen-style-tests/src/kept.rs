//! Data directories that were kept: three nodes of an earlier format with mail that waits, as `examples/keep.rs` writes them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::sender::message;

/// Members find each other at the addresses with which their cluster was formed.
pub const BASE_PORT: u16 = 2500;

/// Messages for two recipients each; one more is for one recipient.
pub const MESSAGES: usize = 12;

/// Where the archive of a feature level stands.
pub fn archive(feature: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("kept/{feature}.tar.gz"))
}

/// Name and octets of a message. One is longer than a piece.
pub fn octets(n: usize) -> (String, Vec<u8>) {
    let name = format!("kept{n:02}");
    let octets = message(&name, if n == 5 { 700_000 } else { 1500 });
    (name, octets)
}

/// Runs tar on an archive in a directory.
///
/// # Panics
/// If it fails.
pub fn tar(how: &str, archive: &Path, dir: &Path, args: &[&str]) {
    let status = Command::new("tar").arg(how).arg(archive).arg("-C").arg(dir).args(args).status();
    assert!(status.is_ok_and(|status| status.success()), "tar {how} {args:?}");
}
