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

/// An open file. Offsets and lengths are in bytes.
pub trait DiskFile: Send + Sync {
    /// Reads exactly `buf.len()` octets.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `bytes`. Not durable before [`DiskFile::sync_data`].
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// fdatasync(2). A failure is final: what was written since the last success is unknown.
    fn sync_data(&self) -> io::Result<()>;
}
