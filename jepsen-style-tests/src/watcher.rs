//! Looks at the cluster while it is broken, and takes what customers took.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;

use crate::customer::Customer;
use crate::history::{Notice, Sample, What};
use crate::nodes::{Nodes, holdfast};
use crate::record::Record;
use crate::replacement::machine_of;
use crate::tools::{lock, waited};

/// How often the cluster is looked at.
const SAMPLE: Duration = Duration::from_millis(400);

/// Looks at the cluster again and again, and takes what customers took.
pub(crate) struct Watcher {
    newest: Arc<Mutex<Option<Value>>>,
    /// A node's end is the nemesis' doing.
    ends: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Watcher {
    pub(crate) fn start(
        nodes: &Arc<Mutex<Nodes>>,
        customers: &Arc<(Customer, Customer)>,
        record: &Record,
    ) -> Watcher {
        let (newest, ends, stop) = (Arc::default(), Arc::new(AtomicBool::new(false)), Arc::default());
        let samples = {
            let (nodes, record) = (nodes.clone(), record.clone());
            let (newest, ends, stop) = (Arc::clone(&newest), ends.clone(), Arc::clone(&stop));
            std::thread::spawn(move || sample_all(&nodes, &record, &newest, &ends, &stop))
        };
        let copies = {
            let (customers, record, stop) = (customers.clone(), record.clone(), Arc::clone(&stop));
            std::thread::spawn(move || take_all(&customers, &record, &stop))
        };
        Watcher { newest, ends, stop, threads: vec![samples, copies] }
    }

    /// What was seen last.
    pub(crate) fn status(&self) -> Option<Value> {
        lock(&self.newest).clone()
    }

    /// Whether all nodes are well and none has bodies to mend, seen from now on.
    pub(crate) fn is_well(&self) -> bool {
        lock(&self.newest).take();
        let mut seen = None;
        waited(Duration::from_secs(5), || {
            seen = self.status();
            seen.is_some()
        });
        seen.is_some_and(|s| {
            let nodes = s["nodes"].as_array();
            s["accepting"] == true && nodes.is_some_and(|n| n.len() == 3 && n.iter().all(is_whole))
        })
    }

    /// Nodes end now because they are made to.
    pub(crate) fn expect_ends(&self, expects: bool) {
        self.ends.store(expects, Ordering::SeqCst);
    }

    /// Looks once more, and no more.
    pub(crate) fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|thread| drop(thread.join()));
    }
}

fn is_whole(node: &Value) -> bool {
    node["healthy"] == true && node["scrub"]["to_mend"] == 0
}

fn sample_all(
    nodes: &Mutex<Nodes>,
    record: &Record,
    newest: &Mutex<Option<Value>>,
    ends: &AtomicBool,
    stop: &AtomicBool,
) {
    let mut ended: BTreeSet<u64> = BTreeSet::new();
    let mut turn = 0;
    while !stop.load(Ordering::SeqCst) {
        let (mut resident, mut peak) = (Vec::new(), Vec::new());
        let mut configs = Vec::new();
        for id in 1..=3 {
            let mut nodes = lock(nodes);
            let Some(pid) = nodes.pid(id) else { continue };
            if nodes.is_running(id) {
                ended.remove(&id);
                resident.push((id, octets(pid, "VmRSS:")));
                peak.push((id, octets(pid, "VmHWM:")));
                configs.push(nodes.config(id));
            } else if !ends.load(Ordering::SeqCst) && ended.insert(id) {
                record.note(What::Ended { node: id, status: None });
            }
        }
        // Another one each time: one of them may be stopped, or alone.
        turn += 1;
        let status: Option<Value> = configs.get(turn % configs.len().max(1)).and_then(|config| {
            let output = holdfast(&["status", "--json", "--config", config]);
            serde_json::from_slice(&output.stdout).ok().filter(|_| output.status.success())
        });
        let known = status.clone().unwrap_or_default();
        let backlogs = known["nodes"].as_array().into_iter().flatten();
        record.note(What::Sample(Sample {
            leader: known["leader"].as_u64().map(machine_of),
            term: known["term"].as_u64(),
            accepting: known["accepting"] == true,
            queued: known["queue"]["messages"].as_u64(),
            erase_backlog: backlogs.filter_map(|n| n["erase_backlog"].as_u64()).max(),
            resident,
            peak,
        }));
        if status.is_some() {
            *lock(newest) = status;
        }
        std::thread::sleep(SAMPLE);
    }
}

/// Octets of memory, by a field of proc_pid_status(5).
fn octets(pid: u32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}

fn take_all((customer, senders_own): &(Customer, Customer), record: &Record, stop: &AtomicBool) {
    loop {
        let is_last = stop.load(Ordering::SeqCst);
        for (moment, mut taken) in customer.drain() {
            taken.octets = Vec::new();
            record.note_at(moment, What::Taken(taken));
        }
        for (moment, recipient) in customer.drain_unanswered() {
            record.note_at(moment, What::Unanswered { recipient });
        }
        for (moment, taken) in senders_own.drain() {
            record.note_at(moment, What::Notice(notice(&taken.recipient, &taken.octets)));
        }
        if is_last {
            return;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// A notice goes to the message's name, as that is the local part of its sender (RFC 3464 §2.3 has the fields).
fn notice(name: &str, octets: &[u8]) -> Notice {
    let text = String::from_utf8_lossy(octets);
    let field = |wanted: &'static str| {
        let is_it = move |line: &&str| {
            line.get(..wanted.len()).is_some_and(|start| start.eq_ignore_ascii_case(wanted))
        };
        text.lines().filter(is_it).map(move |line| line[wanted.len()..].trim().to_string())
    };
    let recipients = field("final-recipient:").filter_map(|value| {
        let address = value.split(';').nth(1)?.trim().to_string();
        Some(address.split('@').next()?.to_string())
    });
    Notice {
        name: name.into(),
        id: field("message-id:").next().unwrap_or_default(),
        recipients: recipients.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notice_names_whom_it_is_about() {
        let text = b"Message-ID: <x@y>\r\n\r\nFinal-Recipient: rfc822; bounce-m@test.example\r\nfinal-recipient: rfc822;r@a.b\r\n";
        let told = notice("m", text);
        assert_eq!((told.id.as_str(), told.recipients), ("<x@y>", vec!["bounce-m".to_string(), "r".into()]));
    }
}
