//! The `Disk` edge: the only file I/O of this crate. [`os::OsDisk`] is real; `sim::SimDisk` (feature `sim`) lies as disks
//! do. Names are plain file names within one data directory.

pub mod os;
#[cfg(any(test, feature = "sim"))]
pub mod sim;

use std::io;
use std::sync::Arc;

/// A data directory.
pub trait Disk: Send + Sync + 'static {
    /// What to call it in messages.
    fn name(&self) -> String;
    /// Names of the files in it.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Opens a file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Creates a file that must not exist. Not durable before [`Disk::sync_dir`].
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Removes a file. Not durable before [`Disk::sync_dir`].
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Renames a file within the directory. Not durable before [`Disk::sync_dir`].
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Makes the directory's entries durable.
    fn sync_dir(&self) -> io::Result<()>;
    /// Free octets on the file system.
    fn free_bytes(&self) -> io::Result<u64>;
}

/// Zeros to write, aligned as direct I/O wants memory.
#[repr(align(4096))]
struct Zeros([u8; 1 << 20]);
static ZEROS: Zeros = Zeros([0; 1 << 20]);

/// Calls `write` with zeros and their offset until `from..to` is covered.
fn zeros(from: u64, to: u64, mut write: impl FnMut(&[u8], u64) -> io::Result<()>) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let n = (to - at).min(ZEROS.0.len() as u64);
        write(&ZEROS.0[..n as usize], at)?;
        at += n;
    }
    Ok(())
}

/// An open file. Offsets and lengths are in bytes.
pub trait DiskFile: Send + Sync {
    /// Reads exactly `buf.len()` octets.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// As [`DiskFile::read_at`], from the medium where the system can be told to: what it has in memory is no proof of that.
    fn read_from_medium(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_at(buf, offset)
    }
    /// Writes all of `bytes`. Not durable before [`DiskFile::sync_data`].
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Writes zeros to many whole blocks, past the cache where that can be done: what is zeroed is not read soon. Not durable
    /// before [`DiskFile::sync_data`].
    fn write_zeros(&self, from: u64, to: u64) -> io::Result<()> {
        zeros(from, to, |zeros, at| self.write_at(zeros, at))
    }
    /// fdatasync(2). A failure is final: what was written since the last success is unknown.
    fn sync_data(&self) -> io::Result<()>;
}
