//! The processes of the demonstration: nodes and the customer's server.
#![expect(clippy::disallowed_methods, reason = "the demonstration starts processes and binds free ports")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::customer::Copy;
use crate::clock;

fn this_program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("finding this program")
}

/// Three nodes.
pub(super) struct Nodes {
    dir: PathBuf,
    base_port: u16,
    running: BTreeMap<u64, Child>,
}

impl Nodes {
    /// Writes the node files, on ports that are free.
    pub(super) fn prepare(dir: &Path, erase_within: Duration) -> anyhow::Result<Nodes> {
        let base_port = free_base_port()?;
        let init = std::process::Command::new(this_program()?)
            .args(["init", &dir.display().to_string(), "--base-port", &base_port.to_string()])
            .stdout(Stdio::null())
            .status()?;
        if !init.success() {
            bail!("`holdfast init` failed");
        }
        for id in 1..=3 {
            let file = dir.join(format!("node-{id}.toml"));
            let mut text = std::fs::read_to_string(&file)?;
            text += &format!(
                "\n[queue]\nerase_within = \"{}s\"\n\n[delivery]\nretry_min = \"1s\"\nprobe_max = \"2s\"\n\n\
                 [storage]\nsegment_bytes = \"16MiB\"\nreserve_bytes = \"64MiB\"\n\n\
                 [log]\noutput = \"node-{id}.maillog\"\n",
                erase_within.as_secs()
            );
            std::fs::write(&file, text)?;
        }
        Ok(Nodes { dir: dir.into(), base_port, running: BTreeMap::new() })
    }

    fn config(&self, id: u64) -> PathBuf {
        self.dir.join(format!("node-{id}.toml"))
    }

    pub(super) fn smtp(&self, id: u64) -> String {
        format!("127.0.0.1:{}", self.base_port + id as u16)
    }

    pub(super) fn start(&mut self, id: u64) -> anyhow::Result<()> {
        let log = self.dir.join(format!("node-{id}.stderr"));
        let stderr = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let child = Command::new(this_program()?)
            .args(["run", "--config"])
            .arg(self.config(id))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()?;
        self.running.insert(id, child);
        Ok(())
    }

    /// SIGKILL.
    pub(super) fn kill(&mut self, id: u64) -> anyhow::Result<()> {
        let child = self.running.get_mut(&id).context("the node is not running")?;
        child.start_kill()?;
        Ok(())
    }

    fn ask(&self, args: &[&str]) -> anyhow::Result<Option<Value>> {
        for id in self.running.keys() {
            let output = std::process::Command::new(this_program()?)
                .args(args)
                .arg("--json")
                .arg("--config")
                .arg(self.config(*id))
                .stdin(Stdio::null())
                .output()?;
            if output.status.success() {
                return Ok(serde_json::from_slice(&output.stdout).ok());
            }
        }
        Ok(None)
    }

    pub(super) async fn wait_for_leader(&self, patience: Duration) -> anyhow::Result<u64> {
        let deadline = clock::after(patience);
        while clock::now() < deadline {
            if let Some(status) = self.ask(&["status"])?
                && status["accepting"] == true
                && let Some(leader) = status["leader"].as_u64()
            {
                return Ok(leader);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        bail!("no leader within {} s; see {}/node-*.stderr", patience.as_secs(), self.dir.display())
    }

    pub(super) fn route(&self, domain: &str, to: &str) -> anyhow::Result<()> {
        let status = std::process::Command::new(this_program()?)
            .args(["route", "set", domain, "--to", to, "--config"])
            .arg(self.config(1))
            .status()?;
        if !status.success() {
            bail!("`holdfast route set` failed");
        }
        Ok(())
    }

    pub(super) fn queued(&self) -> anyhow::Result<u64> {
        let status = self.ask(&["status"])?;
        Ok(status.and_then(|s| s["queue"]["messages"].as_u64()).unwrap_or(u64::MAX))
    }

    pub(super) async fn stop(mut self) {
        for child in self.running.values_mut() {
            drop(child.start_kill());
        }
        for child in self.running.values_mut() {
            drop(child.wait().await);
        }
    }
}

/// Ports that are free now, such that base + 1 to base + 23 are.
fn free_base_port() -> anyhow::Result<u16> {
    for _ in 0..200 {
        let base = 20_000 + (clock::random() % 400) as u16 * 100;
        let ports = (1..=3).flat_map(|n| [n, n + 10, n + 20]);
        if ports.map(|n| base + n).all(|port| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return Ok(base);
        }
    }
    bail!("no free ports on 127.0.0.1")
}

/// The customer's server, a process of its own that tells each copy it takes.
pub(super) struct Customer {
    pub(super) address: String,
    child: Child,
    got: Arc<Mutex<BTreeMap<String, Copy>>>,
    reader: tokio::task::JoinHandle<()>,
}

impl Customer {
    pub(super) async fn start(dir: &Path) -> anyhow::Result<Customer> {
        let pki = dir.join("pki");
        let mut child = Command::new(this_program()?)
            .arg("demo-customer")
            .arg("--cert")
            .arg(pki.join("node-1.crt"))
            .arg("--key")
            .arg(pki.join("node-1.key"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdout = child.stdout.take().context("the customer has no output")?;
        let mut lines = BufReader::new(stdout).lines();
        let address = lines.next_line().await?.context("the customer's server did not start")?;
        let got: Arc<Mutex<BTreeMap<String, Copy>>> = Arc::default();
        let into = got.clone();
        let reader = tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                if let Some((copy, intact)) = line.split_once(' ') {
                    let mut got = into.lock().unwrap_or_else(PoisonError::into_inner);
                    let entry = got.entry(copy.into()).or_insert(Copy { times: 0, intact: true });
                    entry.times += 1;
                    entry.intact &= intact == "intact";
                }
            }
        });
        Ok(Customer { address, child, got, reader })
    }

    pub(super) fn count(&self) -> usize {
        self.got.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(super) fn has(&self, copy: &str) -> bool {
        self.got.lock().unwrap_or_else(PoisonError::into_inner).contains_key(copy)
    }

    /// Ends the server and tells what it took.
    pub(super) async fn stop(&mut self) -> anyhow::Result<BTreeMap<String, Copy>> {
        self.child.start_kill()?;
        self.child.wait().await?;
        (&mut self.reader).await?;
        Ok(std::mem::take(&mut *self.got.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}
