//! Small disks that can really be full: an ext4 file system in a file, mounted through a loop device. Takes root.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::tools::{find, wait_for};

/// A mounted file system; it is unmounted with this value.
pub struct SmallDisk {
    image: tempfile::NamedTempFile,
    mount: PathBuf,
    /// The directory it is mounted at, if that is its own.
    _own: Option<tempfile::TempDir>,
}

impl SmallDisk {
    /// A file system of so many MiB. `None` if this machine does not let us mount one.
    ///
    /// # Panics
    /// If it is not possible and `HOLDFAST_REQUIRE_PEERS` is set: in CI it must be.
    pub fn new(mib: u64) -> Option<SmallDisk> {
        let own = tempfile::Builder::new().prefix("holdfast-disk-").tempdir().expect("a directory");
        let mut disk = SmallDisk::at(mib, own.path());
        match &mut disk {
            Some(disk) => disk._own = Some(own),
            None => {
                assert!(
                    std::env::var_os("HOLDFAST_REQUIRE_PEERS").is_none(),
                    "a loop device cannot be mounted"
                );
                eprintln!("skipped: a loop device cannot be mounted here; this run does not count");
            }
        }
        disk
    }

    /// A file system of so many MiB, mounted at this directory, which is made if it is not there. `None` if this machine does not let us
    /// mount one.
    ///
    /// # Panics
    /// If there is no room for its image.
    pub fn at(mib: u64, mount: &Path) -> Option<SmallDisk> {
        std::fs::create_dir_all(mount).expect("a directory");
        let image = image(mount);
        image.as_file().set_len(mib << 20).expect("a sparse file");
        let disk = SmallDisk { image, mount: mount.into(), _own: None };
        let is_made = run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(disk.image.path()));
        (is_made && disk.mount()).then_some(())?;
        drop(std::fs::remove_dir(mount.join("lost+found")));
        Some(disk)
    }

    fn mount(&self) -> bool {
        run(Command::new("mount").args(["-o", "loop"]).arg(self.image.path()).arg(&self.mount))
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mount
    }

    /// The numbers of its block device, `7:0`. Nothing if they cannot be had.
    pub fn device(&self) -> Option<String> {
        let mut command = Command::new("findmnt");
        let output = command.args(["-n", "-o", "MAJ:MIN", "-M"]).arg(&self.mount).output().ok()?;
        let numbers = String::from_utf8_lossy(&output.stdout).trim().to_string();
        numbers.contains(':').then_some(numbers)
    }

    /// Cuts its power: what was not synced is gone, as far as the system has not written it by itself. Nobody may be using it: kill
    /// its node first.
    ///
    /// The image is copied before anything can flush it, and the copy is mounted, which replays its journal.
    ///
    /// # Panics
    /// If the copy cannot be made or mounted.
    pub fn cut_power(&mut self) {
        let copy = image(&self.mount);
        let copied =
            Command::new("cp").arg("--sparse=always").arg(self.image.path()).arg(copy.path()).status();
        assert!(copied.is_ok_and(|status| status.success()), "the image cannot be copied");
        // Into the old image, which nobody looks at any more.
        wait_for("nobody to use the disk", Duration::from_secs(10), || {
            run(Command::new("umount").arg(&self.mount))
        });
        self.image = copy;
        assert!(self.mount(), "the disk cannot be mounted after a power cut");
    }

    /// Whether `needle` stands anywhere on the medium, whatever the file system says.
    ///
    /// # Panics
    /// If the medium cannot be read.
    pub fn medium_contains(&self, needle: &[u8]) -> bool {
        assert!(run(Command::new("sync").arg("-f").arg(&self.mount)), "it cannot be synced");
        let octets = std::fs::read(self.image.path()).expect("the image is ours");
        find(&octets, needle)
    }

    /// Takes all the room that is left, to the last block. Returns the file that takes it.
    ///
    /// # Panics
    /// If the disk does not become full.
    pub fn fill(&self) -> PathBuf {
        let path = self.path().join("filler");
        let mut file = std::fs::File::create(&path).expect("the disk takes a file");
        let mut piece = vec![1; 1 << 20];
        while piece.len() >= 512 {
            if file.write_all(&piece).is_err() {
                piece.truncate(piece.len() / 2);
            }
            assert!(file.metadata().is_ok_and(|m| m.len() < 8 << 30), "the disk does not become full");
        }
        drop(file.sync_all());
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily, since a process that was killed a moment ago may still be letting go of it.
        run(Command::new("umount").arg("-l").arg(&self.mount));
        drop(self.image.as_file().set_len(0));
    }
}

/// A file beside the directory at which it is to be mounted: whoever takes that away takes both.
fn image(mount: &Path) -> tempfile::NamedTempFile {
    let beside = mount.parent().expect("nobody mounts a disk at the root");
    tempfile::Builder::new().prefix("holdfast-image-").tempfile_in(beside).expect("a temporary file")
}

fn run(command: &mut Command) -> bool {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}
