//! A machine for each node: network namespaces on one bridge, or on a switch of the harness's own whose wires can be as bad as one likes, with
//! links that can be cut in each direction.
//!
//! All of it is made in namespaces of the harness's own, in which it is process 1: when it ends, however it ends, its processes,
//! interfaces and mounts are gone with it.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::OnceLock;

use crate::cgroup::Group;
use crate::disk::SmallDisk;
use crate::links::{Links, Unavailable};
use crate::scratch::{self, PREFIX};
use crate::wires::{Quality, Switch};

/// Set in the process that runs inside.
const INSIDE: &str = "HOLDFAST_OWN_MACHINE";

/// Runs this program once more with namespaces of its own, and returns its exit status. Nothing if it is inside already, or none can be
/// had: without root that takes user namespaces that anybody may make.
pub fn seclude() -> Option<ExitCode> {
    if is_inside() { None } else { again(std::env::args_os().skip(1)) }
}

/// Runs the test of this name once more, with namespaces of its own. True in the process that is inside and does the work; whoever gets
/// false is outside, and the work is done.
///
/// # Panics
/// If the test fails inside, or no namespaces are to be had and `HOLDFAST_REQUIRE_PEERS` is set.
pub fn are_own(test: &str) -> bool {
    if is_inside() {
        return true;
    }
    match again(["--exact", test, "--include-ignored", "--nocapture"].map(OsString::from).into_iter()) {
        Some(status) => assert_eq!(status, ExitCode::SUCCESS, "{test} failed on machines of its own"),
        None => {
            assert!(std::env::var_os("HOLDFAST_REQUIRE_PEERS").is_none(), "no namespaces can be made");
            eprintln!("skipped: no namespaces can be made here; this run does not count");
        }
    }
    false
}

/// Runs this program with these words within namespaces of its own. Nothing if none can be had.
fn again(words: impl Iterator<Item = OsString>) -> Option<ExitCode> {
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
    let inside = secluded().arg(own).args(words).env(INSIDE, "1").env(scratch::RUN, scratch::run()).status();
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

/// Whether this process may besides mount disks on loop devices and make control groups. It is tried.
pub fn is_root() -> bool {
    static CAN: OnceLock<bool> = OnceLock::new();
    let can = || {
        let mount = tempfile::tempdir().ok()?;
        SmallDisk::at(16, &mount.path().join("disk"))?;
        let name = mount.path().file_name()?.to_string_lossy().into_owned();
        Group::new(&format!("{PREFIX}{name}"), 1 << 30).ok()
    };
    *CAN.get_or_init(|| is_inside() && can().is_some())
}

/// The machines.
pub struct Hosts {
    count: u64,
    switch: Option<Switch>,
}

impl Hosts {
    /// Makes so many, in the namespaces of this process. With a seed for their chances their wires can be made bad; each frame passes
    /// through this process then.
    ///
    /// # Errors
    /// If a command fails; its name and its words.
    pub fn new(count: u64, wires: Option<u64>) -> Result<Hosts, Unavailable> {
        run("mount -t tmpfs tmpfs /run")?;
        // What libfaketime leaves there goes with us.
        run("mount -t tmpfs tmpfs /dev/shm")?;
        run("ip link set lo up")?;
        let no_tap = |why: std::io::Error| Unavailable { what: "a tap device".into(), why: why.to_string() };
        let switch = wires.map(|seed| Switch::start(count as usize + 1, seed)).transpose().map_err(no_tap)?;
        let outside = match &switch {
            Some(_) => {
                run(&format!("ip link set {} address {}", Switch::port(0), Switch::address(0)))?;
                Switch::port(0)
            }
            None => {
                run("ip link add br0 type bridge")?;
                "br0".into()
            }
        };
        run(&format!("ip addr add {}/24 dev {outside}", Hosts::OUTSIDE))?;
        run(&format!("ip link set {outside} up"))?;
        for id in 1..=count {
            run(&format!("ip netns add n{id}"))?;
            match &switch {
                Some(_) => {
                    let port = Switch::port(id as usize);
                    run(&format!("ip link set {port} address {}", Switch::address(id as usize)))?;
                    run(&format!("ip link set {port} netns n{id}"))?;
                    run(&format!("ip -n n{id} link set {port} name eth0"))?;
                }
                None => {
                    run(&format!("ip link add v{id} type veth peer name eth0 netns n{id}"))?;
                    run(&format!("ip link set v{id} master br0 up"))?;
                }
            }
            run(&format!("ip -n n{id} addr add {}/24 dev eth0", Hosts::address(id)))?;
            run(&format!("ip -n n{id} link set eth0 up"))?;
            run(&format!("ip -n n{id} link set lo up"))?;
            run(&format!("ip netns exec n{id} nft add table ip links"))?;
            let chain = "add chain ip links in { type filter hook input priority 0 ; }";
            nft(id, chain)?;
        }
        Ok(Hosts { count, switch })
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

    /// The wires between these nodes are like this in both directions.
    ///
    /// # Errors
    /// If the machines were made without wires.
    pub fn wire(&self, a: u64, b: u64, quality: Quality) -> Result<(), Unavailable> {
        let none = || Unavailable { what: format!("a wire from {a} to {b}"), why: "there is none".into() };
        let switch = self.switch.as_ref().ok_or_else(none)?;
        switch.wire(a as usize, b as usize, quality);
        switch.wire(b as usize, a as usize, quality);
        Ok(())
    }
}

impl Links for Hosts {
    fn cut(&self, from: u64, to: u64) -> Result<(), Unavailable> {
        nft(to, &format!("add rule ip links in ip saddr {} drop", Hosts::address(from)))
    }

    fn lose(&self, percent: u64) -> Result<(), Unavailable> {
        let nodes = format!("{}-{}", Hosts::address(1), Hosts::address(self.count));
        let rule = format!("add rule ip links in ip saddr {nodes} numgen random mod 100 < {percent} drop");
        (1..=self.count).try_for_each(|id| nft(id, &rule))
    }

    fn reset(&self, from: u64, to: u64) -> Result<(), Unavailable> {
        let from = Hosts::address(from);
        nft(to, &format!("add rule ip links in ip saddr {from} meta l4proto tcp reject with tcp reset"))
    }

    fn mend(&self) -> Result<(), Unavailable> {
        self.switch.iter().for_each(Switch::mend);
        (1..=self.count).try_for_each(|id| nft(id, "flush chain ip links in"))
    }
}

/// A disk of so many MiB, in memory, that is gone with this process.
///
/// # Errors
/// If it cannot be mounted.
pub fn mount_disk(at: &Path, mib: u64) -> Result<(), Unavailable> {
    let failed = |why: std::io::Error| Unavailable { what: at.display().to_string(), why: why.to_string() };
    std::fs::create_dir_all(at).map_err(failed)?;
    let mut command = Command::new("mount");
    command.args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"]).arg(at);
    finish("mount -t tmpfs", command)
}

/// Takes it away again.
pub fn unmount_disk(at: &Path) {
    drop(Command::new("umount").arg("-l").arg(at).status());
}

fn nft(id: u64, words: &str) -> Result<(), Unavailable> {
    let mut command = Hosts::command(id);
    command.arg("nft").arg(words);
    finish(&format!("nft {words}"), command)
}

/// Runs a command of words without spaces in them.
pub(crate) fn run(words: &str) -> Result<(), Unavailable> {
    let mut split = words.split(' ');
    let mut command = Command::new(split.next().unwrap_or_default());
    command.args(split);
    finish(words, command)
}

fn finish(what: &str, mut command: Command) -> Result<(), Unavailable> {
    let failed = |why: String| Unavailable { what: what.into(), why };
    let output = command.stdin(Stdio::null()).output().map_err(|e| failed(e.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_string())),
    }
}
