//! A node whose disk is gone makes way for a new one, with an empty disk and an id that was never used, as src/docs/operating.md tells
//! operators to do it. What this harness calls node 2 stays node 2: its machine, whatever id lives there.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::nodes::{Nodes, binary};

/// How many machines there are. The ids of those that live on one of them, one after the other, are multiples of this apart.
const MACHINES: u64 = 3;
/// How long a replacement may take: somebody has to lead, and the new one gets what waits.
const PATIENCE: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_millis(200);
/// The highest id that a member may have.
const ID_MAX: u64 = 255;

/// The machine that a node lives on, counted from 1.
pub(crate) fn machine_of(id: u64) -> u64 {
    (id + MACHINES - 1) % MACHINES + 1
}

/// The id of the node that lives on a machine, as its file has it.
pub(crate) fn id_on(nodes: &Nodes, machine: u64) -> Option<u64> {
    let text = read(&nodes.config(machine)).ok()?;
    text.lines().find_map(|line| line.strip_prefix("id = ")?.parse().ok())
}

/// Whether there is an id left for whoever comes to this machine, whatever has become of the others.
pub(crate) fn can_be_replaced(nodes: &Nodes) -> bool {
    let highest = (1..=MACHINES).filter_map(|machine| id_on(nodes, machine)).max();
    highest.is_some_and(|highest| highest + MACHINES <= ID_MAX)
}

/// The lowest id that is higher than those of all members and of the one that is gone from this machine.
fn next_id(members: &[u64], old: u64) -> u64 {
    let (machine, highest) = (machine_of(old), members.iter().copied().fold(old, u64::max));
    (highest + 1..).find(|id| machine_of(*id) == machine).expect("ids do not end")
}

/// All that stands in a directory is gone; the directory, which may be where a disk is mounted, is not.
pub(crate) fn lose_disk(data: &Path) -> std::io::Result<()> {
    for path in std::fs::read_dir(data)?.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            std::fs::remove_dir_all(path)?;
        } else {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Takes the dead node of a machine out, and brings a new one in. Says why if that takes too long.
pub(crate) fn replace(nodes: &mut Nodes, machine: u64) -> Result<(), String> {
    let old = id_on(nodes, machine).ok_or("its file names no id")?;
    let operator = (1..=MACHINES).find(|other| *other != machine && nodes.is_running(*other));
    let operator = nodes.config(operator.ok_or("nobody else runs")?);
    let deadline = Instant::now() + PATIENCE;
    let mut new = None;
    let mut said = "nobody tells who is a member".to_string();
    while Instant::now() < deadline {
        let status = ask(&operator, &["status", "--json"]);
        let members = status.ok().and_then(|text| members(&text)).unwrap_or_default();
        let ids: Vec<u64> = members.iter().map(|(id, _)| *id).collect();
        let step = match new {
            _ if members.is_empty() => Ok(()),
            _ if ids.contains(&old) => ask(&operator, &["cluster", "remove", &old.to_string()]).map(drop),
            None => {
                let id = next_id(&ids, old);
                prepare(nodes, machine, old, id)?;
                nodes.start(machine);
                new = Some(id);
                Ok(())
            }
            Some(id) if members.contains(&(id, true)) => return Ok(()),
            // One that is in by half goes on from there.
            Some(id) => add(&operator, id),
        };
        if let Err(why) = step {
            said = why;
        }
        std::thread::sleep(AGAIN);
    }
    Err(said)
}

/// The certificate of the new node, and its line in every node's file.
fn prepare(nodes: &Nodes, machine: u64, old: u64, new: u64) -> Result<(), String> {
    let own = read(&nodes.config(machine))?;
    let address = member_field(&own, old, "address").ok_or("its file does not name it")?;
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let pki = nodes.dir().join("pki").display().to_string();
    run(&["pki", "node", &new.to_string(), "--host", host, "--dir", &pki])?;
    for node in 1..=MACHINES {
        let text = read(&nodes.config(node))?;
        let text = text.replace(&format!("{{ id = {old}, "), &format!("{{ id = {new}, "));
        let text = text.replace(&format!("\nid = {old}\n"), &format!("\nid = {new}\n"));
        let text = text.replace(&format!("\"pki/node-{old}."), &format!("\"pki/node-{new}."));
        std::fs::write(nodes.config(node), text).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// `cluster add`, with what the file says of the node. Its peers may have heard of it already.
fn add(operator: &str, id: u64) -> Result<(), String> {
    let text = read(operator)?;
    let field =
        |key| member_field(&text, id, key).ok_or_else(|| format!("{operator} has no {key} of node {id}"));
    let (address, admin) = (field("address")?, field("admin")?);
    let (power, network) = (field("power")?, field("network")?);
    let id = id.to_string();
    let what = ["cluster", "add", &id, "--address", address, "--admin", admin];
    ask(operator, &[&what[..], &["--power", power, "--network", network]].concat()).map(drop)
}

/// A field of a member's line in a node's file.
pub(crate) fn member_field<'a>(text: &'a str, id: u64, key: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.trim_start().starts_with(&format!("{{ id = {id}, ")))?;
    line.split_once(&format!(" {key} = \""))?.1.split('"').next()
}

/// The ids of all members, and whether they vote.
fn members(status: &str) -> Option<Vec<(u64, bool)>> {
    let status: Value = serde_json::from_str(status).ok()?;
    let member = |node: &Value| {
        let votes = ["leader", "follower"].iter().any(|role| node["role"] == *role);
        Some((node["id"].as_u64()?, votes))
    };
    status["nodes"].as_array()?.iter().map(member).collect()
}

fn read(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))
}

fn ask(config: &str, words: &[&str]) -> Result<String, String> {
    run(&[words, &["--config", config]].concat())
}

fn run(words: &[&str]) -> Result<String, String> {
    // A command may wait for a node to catch up for longer than this harness does.
    let mut command = Command::new("timeout");
    command.arg(PATIENCE.as_secs().to_string()).arg(binary()).args(words);
    let output = command.stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
    let text = |octets: &[u8]| String::from_utf8_lossy(octets).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_id_is_higher_than_any_and_lives_on_the_same_machine() {
        assert_eq!([1, 2, 3, 4, 8].map(machine_of), [1, 2, 3, 1, 2]);
        assert_eq!(next_id(&[1, 2], 3), 6);
        assert_eq!(next_id(&[1, 6], 2), 8);
        assert_eq!(next_id(&[1, 3], 2), 5);
        assert_eq!(next_id(&[1, 2], 6), 9);
    }

    #[test]
    fn a_members_line_says_where_it_is() {
        let text = "peers = [\n  { id = 1, address = \"a:1\", admin = \"b:2\", placement = { power = \"A\", network = \"1\" } },\n";
        let fields = ["address", "admin", "power", "network"].map(|key| member_field(text, 1, key));
        assert_eq!(fields, [Some("a:1"), Some("b:2"), Some("A"), Some("1")]);
        assert_eq!(member_field(text, 11, "address"), None);
    }
}
