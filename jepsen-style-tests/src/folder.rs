//! The folder of a run: what it was made of, what happened, and the nodes' logs.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::history::History;
use crate::nodes::Nodes;

/// Files of a run.
const HISTORY: &str = "history.jsonl";
const OPTIONS: &str = "options.json";

/// What a run is made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Options {
    /// The workload's name.
    pub workload: String,
    /// The nemeses' names.
    pub nemeses: Vec<String>,
    /// How long things are broken, in seconds.
    pub seconds: u64,
    /// What chances are taken from. Processes, clocks and the network are their own: the same seed makes the same choices, not the same
    /// history.
    pub seed: u64,
    /// Whether all nodes ran on loopback although machines could be made for them.
    #[serde(default)]
    pub loopback: bool,
}

impl Options {
    /// The command that does it again.
    pub fn command(&self) -> String {
        format!(
            "cargo run --release -p jepsen-style-tests -- run --workload {} --nemesis {} --seconds {} --seed {}{}",
            self.workload,
            if self.nemeses.is_empty() { "none".into() } else { self.nemeses.join(",") },
            self.seconds,
            self.seed,
            if self.loopback { " --loopback" } else { "" }
        )
    }
}

/// Keeps them.
///
/// # Panics
/// If a file cannot be written.
pub(crate) fn keep(folder: &Path, options: &Options, history: &History, nodes: &Nodes) {
    std::fs::create_dir_all(folder).expect("the run's folder can be made");
    let file = std::fs::File::create(folder.join(HISTORY)).expect("a file of the run");
    history.write(&mut std::io::BufWriter::new(file)).expect("the history is kept");
    let text = serde_json::to_string_pretty(options).unwrap_or_default();
    std::fs::write(folder.join(OPTIONS), text).expect("a file of the run");
    for id in 1..=3 {
        drop(std::fs::write(folder.join(format!("node-{id}.maillog")), nodes.maillog(id)));
        drop(std::fs::write(folder.join(format!("node-{id}.stderr")), nodes.stderr(id)));
    }
}

/// What a run was made of and what happened, as [`crate::run::run`] kept it.
///
/// # Errors
/// Which file is missing or cannot be read.
pub fn load(folder: &Path) -> Result<(Options, History), String> {
    let name = |file: &str| -> PathBuf { folder.join(file) };
    let text = std::fs::read(name(OPTIONS)).map_err(|e| format!("{}: {e}", name(OPTIONS).display()))?;
    let options = serde_json::from_slice(&text).map_err(|e| format!("{}: {e}", name(OPTIONS).display()))?;
    let file = std::fs::File::open(name(HISTORY)).map_err(|e| format!("{}: {e}", name(HISTORY).display()))?;
    let history = History::read(std::io::BufReader::new(file));
    Ok((options, history.map_err(|e| format!("{}: {e}", name(HISTORY).display()))?))
}
