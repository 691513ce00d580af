//! The real disk.
#![expect(clippy::disallowed_methods, reason = "this is the Disk edge")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::{Disk, DiskFile, zeros};
use crate::error::OpenError;
use crate::limits::BLOCK_BYTES;

/// A directory of the operating system, locked against a second process for as long as this lives.
pub struct OsDisk {
    dir: PathBuf,
    /// Added to each sync, to measure on a fast machine what a slow disk would give (a test setting).
    sync_delay: Duration,
    _lock: Option<File>,
}

impl OsDisk {
    /// Opens `dir`, creating it if need be.
    ///
    /// # Errors
    /// If another process holds it, or the system refuses.
    pub fn open(dir: &Path, sync_delay: Duration) -> Result<OsDisk, OpenError> {
        let io = |what: String| move |error| OpenError::Io { what, error };
        std::fs::create_dir_all(dir).map_err(io(format!("creating {}", dir.display())))?;
        let path = dir.join("LOCK");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(io(format!("opening {}", path.display())))?;
        match lock.try_lock() {
            Ok(()) => Ok(OsDisk { dir: dir.to_owned(), sync_delay, _lock: Some(lock) }),
            Err(std::fs::TryLockError::WouldBlock) => {
                Err(OpenError::Locked { dir: dir.display().to_string() })
            }
            Err(std::fs::TryLockError::Error(e)) => Err(io(format!("locking {}", path.display()))(e)),
        }
    }

    /// Opens an existing directory for reading, beside a process that may be running on it.
    ///
    /// # Errors
    /// If it does not exist or cannot be listed.
    pub fn open_to_read(dir: &Path) -> Result<OsDisk, OpenError> {
        let disk = OsDisk { dir: dir.to_owned(), sync_delay: Duration::ZERO, _lock: None };
        disk.list().map_err(|error| OpenError::Io { what: format!("listing {}", dir.display()), error })?;
        Ok(disk)
    }

    fn file(&self, name: &str, file: File) -> Arc<dyn DiskFile> {
        let path = self.dir.join(name);
        Arc::new(OsFile { file, path, sync_delay: self.sync_delay })
    }
}

impl Disk for OsDisk {
    fn name(&self) -> String {
        self.dir.display().to_string()
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in self.dir.read_dir()? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let write = self._lock.is_some();
        Ok(self.file(name, OpenOptions::new().read(true).write(write).open(self.dir.join(name))?))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let path = self.dir.join(name);
        Ok(self.file(name, OpenOptions::new().read(true).write(true).create_new(true).open(path)?))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.dir.join(name))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.dir.join(from), self.dir.join(to))
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.dir)?;
        Ok(stat.f_bavail * stat.f_frsize)
    }
}

/// open(2): past the page cache.
const O_DIRECT: i32 = rustix::fs::OFlags::DIRECT.bits() as i32;

struct OsFile {
    file: File,
    path: PathBuf,
    sync_delay: Duration,
}

impl DiskFile for OsFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn read_from_medium(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        // Advice: where it is not taken, what is in memory is read.
        let length = std::num::NonZeroU64::new(buf.len() as u64);
        let _ = rustix::fs::fadvise(&self.file, offset, length, rustix::fs::Advice::DontNeed);
        self.read_at(buf, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn write_zeros(&self, from: u64, to: u64) -> io::Result<()> {
        let aligned = from.is_multiple_of(BLOCK_BYTES) && to.is_multiple_of(BLOCK_BYTES);
        // Not every file system has direct I/O; those that have it take blocks alone.
        let direct = OpenOptions::new().write(true).custom_flags(O_DIRECT).open(&self.path);
        if let (Ok(direct), true) = (direct, aligned) {
            match zeros(from, to, |zeros, at| direct.write_all_at(zeros, at)) {
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => {}
                result => return result,
            }
        }
        zeros(from, to, |zeros, at| self.file.write_all_at(zeros, at))
    }

    fn sync_data(&self) -> io::Result<()> {
        if !self.sync_delay.is_zero() {
            std::thread::sleep(self.sync_delay);
        }
        self.file.sync_data()
    }
}
