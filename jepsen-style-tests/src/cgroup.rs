//! Bounds that the system keeps for a node's process: a control group of its own, version 1 or 2. Takes root.

use std::io;
use std::path::{Path, PathBuf};

/// Where the system shows them.
const ROOT: &str = "/sys/fs/cgroup";

/// A group. Removed with this value, once nobody is in it.
pub struct Group {
    /// One in version 2, one for each controller in version 1.
    dirs: Vec<PathBuf>,
    is_v2: bool,
}

impl Group {
    /// A group of this name for one process, which may be killed for memory beyond so many octets.
    ///
    /// # Errors
    /// If the system lets us make none.
    pub fn new(name: &str, memory: u64) -> io::Result<Group> {
        let root = Path::new(ROOT);
        let is_v2 = root.join("cgroup.controllers").is_file();
        let dirs = match is_v2 {
            true => {
                std::fs::write(root.join("cgroup.subtree_control"), "+memory +io")?;
                vec![root.join(name)]
            }
            false => vec![root.join("memory").join(name), root.join("blkio").join(name)],
        };
        let group = Group { dirs, is_v2 };
        group.dirs.iter().try_for_each(std::fs::create_dir)?;
        let bound = if is_v2 { "memory.max" } else { "memory.limit_in_bytes" };
        group.set(bound, &memory.to_string())?;
        Ok(group)
    }

    /// A process belongs to it from now on, with all that it starts.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn add(&self, pid: u32) -> io::Result<()> {
        self.dirs.iter().try_for_each(|dir| std::fs::write(dir.join("cgroup.procs"), pid.to_string()))
    }

    /// So many octets a second are written to a block device, by its numbers (`7:0`), or as many as it takes.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn limit_writes(&self, device: &str, rate: Option<u64>) -> io::Result<()> {
        match self.is_v2 {
            true => {
                let rate = rate.map_or("max".into(), |rate| rate.to_string());
                self.set("io.max", &format!("{device} wbps={rate}"))
            }
            false => self.set("blkio.throttle.write_bps_device", &format!("{device} {}", rate.unwrap_or(0))),
        }
    }

    fn set(&self, file: &str, value: &str) -> io::Result<()> {
        let with = self.dirs.iter().map(|dir| dir.join(file)).find(|path| path.exists());
        std::fs::write(with.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, file.to_string()))?, value)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.dirs.iter().for_each(|dir| drop(std::fs::remove_dir(dir)));
    }
}

/// Removes groups whose names begin like this, if nobody is in them. How many are left.
pub(crate) fn sweep(prefix: &str) -> usize {
    let root = Path::new(ROOT);
    let mut left = 0;
    for parent in [root.to_path_buf(), root.join("memory"), root.join("blkio")] {
        for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                left += usize::from(std::fs::remove_dir(entry.path()).is_err());
            }
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_bounds_whoever_is_in_it() {
        let name = format!("holdfast-group-{}", std::process::id());
        let group = match Group::new(&name, 64 << 20) {
            Ok(group) => group,
            Err(why) => {
                assert!(std::env::var_os("HOLDFAST_REQUIRE_PEERS").is_none(), "no control group: {why}");
                return eprintln!("skipped: no control group can be made here: {why}");
            }
        };
        let taker = "i=0; s=$(printf '%01000000d' 0); while [ $i -lt 8 ]; do s=\"$s$s\"; i=$((i+1)); done";
        let wait = format!("while ! grep -q {name} /proc/self/cgroup; do sleep 0.01; done; {taker}");
        let mut child = std::process::Command::new("sh").args(["-c", &wait]).spawn().unwrap();
        group.add(child.id()).unwrap();
        let status = child.wait().unwrap();
        assert!(!status.success(), "256 MB fit into 64 MB");
        drop(group);
        let left = std::fs::read_dir(ROOT)
            .unwrap()
            .flatten()
            .chain(std::fs::read_dir(Path::new(ROOT).join("memory")).into_iter().flatten().flatten());
        assert!(left.into_iter().all(|entry| *entry.file_name() != *name), "it is still there");
    }
}
