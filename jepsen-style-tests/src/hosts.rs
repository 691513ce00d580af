//! A machine for each node: network namespaces on one bridge, with links that can be cut in each direction or lose packets.
//!
//! All of it is made in namespaces of the harness's own, in which it is process 1: when it ends, however it ends, its processes,
//! interfaces and mounts are gone with it.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

/// Set in the process that runs inside.
const INSIDE: &str = "HOLDFAST_OWN_MACHINE";

/// What was promised to be there is not.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct NoHosts {
    what: String,
    why: String,
}

/// Runs this program once more with namespaces of its own, and returns its exit status. Nothing if it is inside already, or none can be
/// had: without root that takes user namespaces that anybody may make.
pub fn seclude() -> Option<ExitCode> {
    if is_inside() {
        return None;
    }
    let own = std::env::current_exe().ok()?;
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout == b"0\n");
    let mut unshare = vec!["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
    if !is_root {
        unshare.extend(["--user", "--map-root-user"]);
    }
    // Whoever is interrupted takes what it made with it.
    let secluded = || {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare"]).args(&unshare);
        command
    };
    let possible = secluded().arg("true").stderr(Stdio::null()).status();
    if !possible.is_ok_and(|status| status.success()) {
        return None;
    }
    let inside = secluded().arg(own).args(std::env::args_os().skip(1)).env(INSIDE, "1").status();
    Some(
        inside
            .ok()
            .and_then(|status| status.code())
            .map_or(ExitCode::FAILURE, |code| ExitCode::from(code as u8)),
    )
}

/// Whether this process has namespaces of its own.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some() && std::process::id() == 1
}

/// The machines.
pub struct Hosts {
    count: u64,
}

impl Hosts {
    /// Makes so many, in the namespaces of this process.
    ///
    /// # Errors
    /// If a command fails; its name and its words.
    pub fn new(count: u64) -> Result<Hosts, NoHosts> {
        run("mount -t tmpfs tmpfs /run")?;
        run("ip link set lo up")?;
        run("ip link add br0 type bridge")?;
        run(&format!("ip addr add {}/24 dev br0", Hosts::OUTSIDE))?;
        run("ip link set br0 up")?;
        for id in 1..=count {
            run(&format!("ip netns add n{id}"))?;
            run(&format!("ip link add v{id} type veth peer name eth0 netns n{id}"))?;
            run(&format!("ip link set v{id} master br0 up"))?;
            run(&format!("ip -n n{id} addr add {}/24 dev eth0", Hosts::address(id)))?;
            run(&format!("ip -n n{id} link set eth0 up"))?;
            run(&format!("ip -n n{id} link set lo up"))?;
            run(&format!("ip netns exec n{id} nft add table ip links"))?;
            let chain = "add chain ip links in { type filter hook input priority 0 ; }";
            nft(id, chain)?;
        }
        Ok(Hosts { count })
    }

    /// Where senders, customers and operators are.
    pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 254);

    /// A node's address.
    pub fn address(id: u64) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, 0, id as u8)
    }

    /// A command that runs on a node's machine.
    pub fn command(id: u64) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("n{id}")]);
        command
    }

    /// What one node sends another does not arrive. The sender hears nothing of it.
    ///
    /// # Errors
    /// If it cannot be done.
    pub fn cut(&self, from: u64, to: u64) -> Result<(), NoHosts> {
        nft(to, &format!("add rule ip links in ip saddr {} drop", Hosts::address(from)))
    }

    /// So many of a hundred packets between nodes do not arrive.
    ///
    /// # Errors
    /// If it cannot be done.
    pub fn lose(&self, percent: u64) -> Result<(), NoHosts> {
        let nodes = format!("{}-{}", Hosts::address(1), Hosts::address(self.count));
        let rule = format!("add rule ip links in ip saddr {nodes} numgen random mod 100 < {percent} drop");
        (1..=self.count).try_for_each(|id| nft(id, &rule))
    }

    /// All links are well again.
    ///
    /// # Errors
    /// If it cannot be done.
    pub fn mend(&self) -> Result<(), NoHosts> {
        (1..=self.count).try_for_each(|id| nft(id, "flush chain ip links in"))
    }
}

/// A disk of so many MiB, in memory, that is gone with this process.
///
/// # Errors
/// If it cannot be mounted.
pub fn mount_disk(at: &Path, mib: u64) -> Result<(), NoHosts> {
    let failed = |why: std::io::Error| NoHosts { what: at.display().to_string(), why: why.to_string() };
    std::fs::create_dir_all(at).map_err(failed)?;
    let mut command = Command::new("mount");
    command.args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"]).arg(at);
    finish("mount -t tmpfs", command)
}

/// Takes it away again.
pub fn unmount_disk(at: &Path) {
    drop(Command::new("umount").arg("-l").arg(at).status());
}

fn nft(id: u64, words: &str) -> Result<(), NoHosts> {
    let mut command = Hosts::command(id);
    command.arg("nft").arg(words);
    finish(&format!("nft {words}"), command)
}

/// Runs a command of words without spaces in them.
pub(crate) fn run(words: &str) -> Result<(), NoHosts> {
    let mut split = words.split(' ');
    let mut command = Command::new(split.next().unwrap_or_default());
    command.args(split);
    finish(words, command)
}

fn finish(what: &str, mut command: Command) -> Result<(), NoHosts> {
    let failed = |why: String| NoHosts { what: what.into(), why };
    let output = command.stdin(Stdio::null()).output().map_err(|e| failed(e.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_string())),
    }
}
