//! A cluster of real processes on loopback, made by the product's own `init`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::cgroup::Group;
use crate::hosts::Hosts;
use crate::scratch::Scratch;
use crate::tools::{wait_for, waited};

/// A node that is told to end does so within this time.
pub const END_WITHIN: Duration = Duration::from_secs(40);

/// The product's binary, built beside this test.
///
/// # Panics
/// If it was not built.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("HOLDFAST_BINARY") {
        return path.into();
    }
    let mut dir = std::env::current_exe().expect("a test knows where it stands");
    while dir.pop() {
        let candidate = dir.join("holdfast");
        if candidate.is_file() {
            return candidate;
        }
    }
    panic!("target/*/holdfast is missing: run the tests of the whole workspace");
}

/// Runs the product's command line to its end.
///
/// # Panics
/// If it cannot be started.
pub fn holdfast(args: &[&str]) -> Output {
    Command::new(binary()).args(args).stdin(Stdio::null()).output().expect("the binary runs")
}

/// A cluster and its files.
pub struct Nodes {
    dir: Scratch,
    /// Nothing if each has a machine of its own.
    base_port: Option<u16>,
    running: BTreeMap<u64, Child>,
    groups: BTreeMap<u64, Group>,
    /// The library by which nodes have wall clocks of their own.
    faketime: Option<PathBuf>,
    /// Whether nodes end with the thread that starts them, however it ends.
    end_with_us: bool,
}

impl Nodes {
    /// Files for three nodes on free ports, with settings that suit tests. `edit` changes each node's file.
    ///
    /// # Panics
    /// If `init` fails.
    pub fn prepare(edit: impl Fn(u64, String) -> String) -> Nodes {
        Nodes::prepare_at(free_base_port(), edit)
    }

    /// As [`Nodes::prepare`], on ports that the caller knows to be free: members find each other where they did when the cluster was
    /// formed.
    ///
    /// # Panics
    /// If `init` fails.
    pub fn prepare_at(base_port: u16, edit: impl Fn(u64, String) -> String) -> Nodes {
        let dir = Scratch::new();
        let path = dir.path().display().to_string();
        let output = holdfast(&["init", &path, "--base-port", &base_port.to_string()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Nodes::with_settings(dir, Some(base_port), edit)
    }

    /// As [`Nodes::prepare`], each node on a machine of its own.
    ///
    /// # Panics
    /// If `init` fails.
    pub fn prepare_on_hosts(edit: impl Fn(u64, String) -> String) -> Nodes {
        let dir = Scratch::new();
        let path = dir.path().display().to_string();
        let mut words = vec!["init".to_string(), path];
        for (id, power) in (1..).zip(["A", "B", "C"]) {
            let address = Hosts::address(id);
            words.extend(["--node".into(), format!("{id}={address},power={power},network={id}")]);
        }
        let output = holdfast(&words.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let within = |id: u64| format!("data_dir = \"data/node-{id}\"");
        Nodes::with_settings(dir, None, |id, text| {
            edit(id, text.replace("data_dir = \"/var/lib/holdfast\"", &within(id)))
        })
    }

    fn with_settings(dir: Scratch, base_port: Option<u16>, edit: impl Fn(u64, String) -> String) -> Nodes {
        for id in 1..=3 {
            let file = dir.path().join(format!("node-{id}.toml"));
            let mut text = std::fs::read_to_string(&file).expect("init wrote it");
            text += &format!(
                "\n[queue]\nerase_within = \"3s\"\naccept_timeout = \"5s\"\n\n[delivery]\nretry_min = \"1s\"\n\
                 retry_max = \"2s\"\nprobe_min = \"250ms\"\nprobe_max = \"500ms\"\n\n\
                 [storage]\nyoung_horizon = \"500ms\"\nsegment_bytes = \"8MiB\"\nreserve_bytes = \"16MiB\"\n\n[log]\noutput = \"node-{id}.maillog\"\n"
            );
            std::fs::write(&file, edit(id, text)).expect("the file is ours");
        }
        let (running, groups) = (BTreeMap::new(), BTreeMap::new());
        Nodes { dir, base_port, running, groups, faketime: None, end_with_us: false }
    }

    /// Each node that is started from now on ends with the thread that starts it, also if that is killed.
    pub(crate) fn end_with_us(&mut self) {
        self.end_with_us = true;
    }

    /// Each node that is started from now on has a control group of its own, and no more memory than this.
    ///
    /// # Errors
    /// If the system lets us make none.
    pub fn bound(&mut self, memory: u64) -> std::io::Result<()> {
        let name = self.dir.name();
        for id in 1..=3 {
            self.groups.insert(id, Group::new(&format!("{name}-{id}"), memory)?);
        }
        Ok(())
    }

    /// Each node that is started from now on has a wall clock of its own, which goes right until [`Nodes::set_clock`] says otherwise.
    pub fn with_clocks(&mut self, faketime: PathBuf) {
        self.faketime = Some(faketime);
        (1..=3).for_each(|id| self.set_clock(id, 0));
    }

    /// A node's wall clock goes wrong by so many hours within a second.
    ///
    /// # Panics
    /// If the file that says so cannot be written.
    pub fn set_clock(&self, id: u64, hours: i64) {
        // Nobody reads half of it.
        let (file, new) = (self.clock(id), self.clock(id).with_extension("new"));
        std::fs::write(&new, format!("{hours:+}h\n"))
            .and_then(|()| std::fs::rename(&new, &file))
            .expect("a file of our own");
    }

    fn clock(&self, id: u64) -> PathBuf {
        self.dir.path().join(format!("node-{id}.clock"))
    }

    /// A node's control group, if it has one.
    pub fn group(&self, id: u64) -> Option<&Group> {
        self.groups.get(&id)
    }

    /// Three running nodes that accept mail, after `edit` has changed each node file.
    pub fn start_with(edit: impl Fn(u64, String) -> String) -> Nodes {
        let mut nodes = Nodes::prepare(edit);
        (1..=3).for_each(|id| nodes.start(id));
        nodes.wait_accepting();
        nodes
    }

    /// Three running nodes that accept mail, with `test.example` routed to `customer`.
    pub fn start_all(customer: &str) -> Nodes {
        let nodes = Nodes::start_with(|_, text| text);
        nodes.route("test.example", customer);
        nodes
    }

    /// Where everything lies.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A node's file.
    pub fn config(&self, id: u64) -> String {
        self.dir.path().join(format!("node-{id}.toml")).display().to_string()
    }

    /// A node's data directory.
    pub fn data(&self, id: u64) -> PathBuf {
        self.dir.path().join(format!("data/node-{id}"))
    }

    /// A node's mail log.
    pub fn maillog(&self, id: u64) -> String {
        std::fs::read_to_string(self.dir.path().join(format!("node-{id}.maillog"))).unwrap_or_default()
    }

    /// What a node wrote to standard error.
    pub fn stderr(&self, id: u64) -> String {
        std::fs::read_to_string(self.dir.path().join(format!("node-{id}.stderr"))).unwrap_or_default()
    }

    /// Where a node takes mail.
    pub fn smtp(&self, id: u64) -> String {
        match self.base_port {
            Some(base) => format!("127.0.0.1:{}", base + id as u16),
            None => format!("{}:25", Hosts::address(id)),
        }
    }

    /// Starts a node.
    ///
    /// # Panics
    /// If the process cannot be started.
    pub fn start(&mut self, id: u64) {
        let log = self.dir.path().join(format!("node-{id}.stderr"));
        let stderr = std::fs::OpenOptions::new().create(true).append(true).open(log).expect("a log file");
        let mut command = match self.base_port {
            Some(_) if self.end_with_us => {
                let mut command = Command::new("setpriv");
                command.args(["--pdeathsig", "KILL"]).arg(binary());
                command
            }
            Some(_) => Command::new(binary()),
            None => {
                let mut command = Hosts::command(id);
                command.arg(binary());
                command
            }
        };
        if let Some(library) = &self.faketime {
            command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", self.clock(id));
            // What is measured is not to be changed, and the file is read again after a second.
            let names = ["FAKETIME_DONT_FAKE_MONOTONIC", "NO_FAKE_STAT", "FAKETIME_CACHE_DURATION"];
            command.envs(names.map(|name| (name, "1")));
        }
        let child = command
            .args(["run", "--config", &self.config(id)])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .expect("the node's process starts");
        if self.faketime.is_some() {
            self.dir.has_clock(child.id());
        }
        let bounded = self.groups.get(&id).map_or(Ok(()), |group| group.add(child.id()));
        self.running.insert(id, child);
        assert!(bounded.is_ok(), "node {id} cannot be put into its control group");
    }

    /// Process id of a running node.
    pub fn pid(&self, id: u64) -> Option<u32> {
        self.running.get(&id).map(Child::id)
    }

    /// Whether a node's process, once started, has not ended.
    pub fn is_running(&mut self, id: u64) -> bool {
        self.running.get_mut(&id).is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self, id: u64) {
        if let Some(mut child) = self.running.remove(&id) {
            drop(child.kill());
            drop(child.wait());
        }
    }

    /// Stops a node's process where it stands, or lets it go on.
    pub fn pause(&self, id: u64, pauses: bool) {
        if let Some(pid) = self.pid(id) {
            let signal = if pauses { "-STOP" } else { "-CONT" };
            drop(Command::new("kill").args([signal, &pid.to_string()]).status());
        }
    }

    /// SIGTERM, and waits for the end; the exit status. None if a signal ended it: SIGKILL does when it takes longer than [`END_WITHIN`].
    pub fn stop(&mut self, id: u64) -> Option<i32> {
        let mut child = self.running.remove(&id)?;
        drop(Command::new("kill").arg(child.id().to_string()).status());
        if !waited(END_WITHIN, || !matches!(child.try_wait(), Ok(None))) {
            drop(child.kill());
        }
        child.wait().ok()?.code()
    }

    /// Waits until a node ends by itself; its exit status.
    pub fn wait_exit(&mut self, id: u64, patience: Duration) -> Option<i32> {
        let child = self.running.get_mut(&id)?;
        let mut status = None;
        wait_for("the node to end", patience, || {
            status = child.try_wait().ok().flatten();
            status.is_some()
        });
        self.running.remove(&id);
        status?.code()
    }

    /// Runs an operator's command against a running node.
    pub fn ask(&self, args: &[&str]) -> Output {
        let id = self.running.keys().next().copied().unwrap_or(1);
        let config = self.config(id);
        let mut all = args.to_vec();
        all.extend(["--config", &config]);
        holdfast(&all)
    }

    /// `status --json` of a running node.
    pub fn status(&self) -> Option<Value> {
        let output = self.ask(&["status", "--json"]);
        serde_json::from_slice(&output.stdout).ok().filter(|_| output.status.success())
    }

    /// The leader, if a running node knows one.
    pub fn leader(&self) -> Option<u64> {
        let leader = self.status()?["leader"].as_u64()?;
        self.running.contains_key(&leader).then_some(leader)
    }

    /// Waits until there is a leader that is running; who it is.
    pub fn wait_leader(&self) -> u64 {
        let mut leader = None;
        wait_for("a leader", Duration::from_secs(20), || {
            leader = self.leader();
            leader.is_some()
        });
        leader.unwrap_or_default()
    }

    /// Waits until mail is accepted.
    pub fn wait_accepting(&self) {
        wait_for("mail to be accepted", Duration::from_secs(30), || {
            self.status().is_some_and(|s| s["accepting"] == true && s["leader"].is_u64())
        });
    }

    /// Sets a route.
    ///
    /// # Panics
    /// If the command fails.
    pub fn route(&self, domain: &str, to: &str) {
        let output = self.ask(&["route", "set", domain, "--to", to]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Messages in the queue.
    pub fn queued(&self) -> Option<u64> {
        self.status()?["queue"]["messages"].as_u64()
    }

    /// Waits until the queue is empty.
    pub fn wait_drained(&self, patience: Duration) {
        let drained = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_for("the queue to drain", patience, || self.queued() == Some(0));
        }));
        if let Err(panic) = drained {
            let waiting = self.ask(&["queue", "list", "--json"]);
            eprintln!("still queued: {}", String::from_utf8_lossy(&waiting.stdout));
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for child in self.running.values_mut() {
            drop(child.kill());
            drop(child.wait());
        }
        if std::thread::panicking() {
            for id in 1..=3 {
                let log = self.maillog(id);
                let tail: Vec<&str> = log.lines().rev().take(40).collect();
                let tail: Vec<&str> = tail.into_iter().rev().collect();
                eprintln!("--- node {id}: {}\n{}", self.stderr(id), tail.join("\n"));
            }
        }
    }
}

/// Ports such that base + 1 to base + 23 are free now. The listeners of the tests bind before they are used, and a test that
/// runs beside this one draws from another range by its process id.
fn free_base_port() -> u16 {
    static CLUSTERS: AtomicU16 = AtomicU16::new(0);
    // Each cluster of this process begins to look elsewhere: the ports of one that is starting are not taken yet.
    let own = CLUSTERS.fetch_add(1, Ordering::SeqCst).wrapping_mul(29);
    let seed = (std::process::id() as u16).wrapping_mul(37).wrapping_add(own);
    for n in 0..300u16 {
        let base = 21_000 + (seed.wrapping_add(n) % 350) * 30;
        let ports = (1..=3).flat_map(|n| [n, n + 10, n + 13, n + 20]);
        if ports.map(|n| base + n).all(|port| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return base;
        }
    }
    panic!("no free ports on 127.0.0.1");
}
