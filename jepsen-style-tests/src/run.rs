//! One run: a cluster, senders, a nemesis, then all is mended, all is delivered, and the files are searched.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkers::ERASE_WITHIN;
use crate::customer::Customer;
use crate::history::{Custody, Fault, History, Notice, Sample, What};
use crate::hosts::{self, Hosts};
use crate::nemesis::{DISK_MIB, Needs, Nemesis, World};
use crate::nodes::{Nodes, holdfast};
use crate::random::Random;
use crate::workload::{Record, Senders, Workload};

/// Time that a run has before the first fault.
const WARM_UP: Duration = Duration::from_secs(3);
/// How long all nodes may take to be well after everything was mended.
const HEAL: Duration = Duration::from_secs(60);
/// How long the queue may take to drain after that.
const DRAIN: Duration = Duration::from_secs(180);
/// How often the cluster is looked at.
const SAMPLE: Duration = Duration::from_millis(400);
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
}

impl Options {
    /// The command that does it again.
    pub fn command(&self) -> String {
        format!(
            "cargo run --release -p jepsen-style-tests -- run --workload {} --nemesis {} --seconds {} --seed {}",
            self.workload,
            if self.nemeses.is_empty() { "none".into() } else { self.nemeses.join(",") },
            self.seconds,
            self.seed
        )
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs it, and keeps history, options and the nodes' logs in `folder`.
///
/// # Panics
/// If the cluster cannot be formed, or a file of the run not be written.
pub fn run(options: &Options, workload: Workload, nemeses: &[Nemesis], folder: &Path) -> History {
    let hosts = hosts::is_inside().then(|| Hosts::new(3).expect("machines of our own"));
    let listen = if hosts.is_some() { format!("{}:0", Hosts::OUTSIDE) } else { "127.0.0.1:0".into() };
    let (customer, senders_own) = (Customer::start_at(&listen), Customer::start_at(&listen));
    let mut nodes = match hosts {
        Some(_) => Nodes::prepare_on_hosts(|_, text| text),
        None => Nodes::prepare(|_, text| text),
    };
    if nemeses.iter().any(|nemesis| nemesis.needs == Needs::SmallDisks) {
        (1..=3).for_each(|id| hosts::mount_disk(&nodes.data(id), DISK_MIB).expect("a disk of our own"));
    }
    (1..=3).for_each(|id| nodes.start(id));
    nodes.wait_accepting();
    nodes.route("test.example", customer.address());
    nodes.route("client.test.example", senders_own.address());
    let mut random = Random::new(options.seed);
    let record = Record::new();
    let epoch = std::time::SystemTime::now();
    customer.set_down(workload.is_away);
    let addresses: Vec<(u64, String)> = (1..=3).map(|id| (id, nodes.smtp(id))).collect();
    let nodes = Arc::new(Mutex::new(nodes));
    let customers = Arc::new((customer, senders_own));
    let watcher = Watcher::start(&nodes, &customers, &record);
    let senders = Senders::start(workload, &addresses, &mut random, &record);
    let until = Instant::now() + WARM_UP + Duration::from_secs(options.seconds);
    std::thread::sleep(WARM_UP);
    let mut number = 0;
    while Instant::now() < until && !nemeses.is_empty() {
        number += 1;
        torment(
            random.pick(nemeses),
            number,
            &nodes,
            hosts.as_ref(),
            &customers.0,
            &watcher,
            &mut random,
            &record,
        );
    }
    std::thread::sleep(until.saturating_duration_since(Instant::now()));
    senders.stop();
    eprintln!("{} acknowledged; everything is mended now, and the rest delivered", record.acknowledged());
    customers.0.set_down(false);
    let healing = Instant::now();
    let is_well = wait(HEAL, || watcher.is_well());
    record.note(What::Healed { took: is_well.then(|| healing.elapsed().as_millis() as u64) });
    let is_empty = || watcher.status().is_some_and(|s| s["queue"]["messages"] == 0);
    wait(DRAIN, is_empty);
    // The last copy may still be on its way from the customer's thread.
    std::thread::sleep(Duration::from_millis(ERASE_WITHIN + 2_000));
    let left = left(&lock(&nodes));
    if let Some(left) = &left {
        record.note(What::Left { names: left.iter().cloned().collect() });
    }
    let left = left.unwrap_or_default();
    for id in 1..=3 {
        let mut found = BTreeSet::new();
        // A segment may be given back under our eyes; a directory that cannot be read was not searched.
        if canaries(&lock(&nodes).data(id), &mut found).is_ok() {
            let found = found.difference(&left).cloned().collect();
            record.note(What::Searched { node: id, found });
        }
    }
    watcher.stop();
    read_maillogs(&lock(&nodes), epoch, &record);
    let history = History { events: record.finish() };
    keep(folder, options, &history, &lock(&nodes));
    if nemeses.iter().any(|nemesis| nemesis.needs == Needs::SmallDisks) {
        (1..=3).for_each(|id| lock(&nodes).kill(id));
        (1..=3).for_each(|id| hosts::unmount_disk(&lock(&nodes).data(id)));
    }
    history
}

/// Breaks something for a while, mends it, and waits until the cluster is well.
#[expect(clippy::too_many_arguments, reason = "all there is")]
fn torment(
    nemesis: &Nemesis,
    number: u64,
    nodes: &Mutex<Nodes>,
    hosts: Option<&Hosts>,
    customer: &Customer,
    watcher: &Watcher,
    random: &mut Random,
    record: &Record,
) {
    let leader = watcher.status().and_then(|s| s["leader"].as_u64());
    // Clients that see the first of it are to find the fault in the history.
    let began = Instant::now();
    watcher.expect_ends(true);
    let begun = {
        let mut nodes = lock(nodes);
        let mut world = World { nodes: &mut nodes, hosts, customer, leader };
        nemesis.begin(&mut world, random)
    };
    let Some(broken) = begun else {
        watcher.expect_ends(false);
        std::thread::sleep(Duration::from_millis(200));
        return;
    };
    eprintln!("{:>7} ms  {}: {}", record.at(began), nemesis.name, broken.what);
    let fault = |begins| {
        let (nodes, what) = (broken.nodes.clone(), broken.what.clone());
        What::Fault(Fault { number, nemesis: nemesis.name.into(), begins, nodes, what })
    };
    record.note_at(began, fault(true));
    record.note(What::Away { nodes: broken.down.clone() });
    std::thread::sleep(nemesis.lasts(random));
    record.note(What::Away { nodes: Vec::new() });
    {
        let mut nodes = lock(nodes);
        broken.end(&mut World { nodes: &mut nodes, hosts, customer, leader });
    }
    watcher.expect_ends(false);
    if !wait(HEAL, || watcher.is_well()) {
        record.note(What::Healed { took: None });
    }
    record.note(fault(false));
    std::thread::sleep(Duration::from_millis(random.within(300, 3_000)));
}

fn wait(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    true
}

/// Looks at the cluster again and again, and takes what customers took.
struct Watcher {
    newest: Arc<Mutex<Option<Value>>>,
    /// A node's end is the nemesis' doing.
    ends: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Watcher {
    fn start(nodes: &Arc<Mutex<Nodes>>, customers: &Arc<(Customer, Customer)>, record: &Record) -> Watcher {
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
    fn status(&self) -> Option<Value> {
        lock(&self.newest).clone()
    }

    /// Whether all nodes are well, seen from now on.
    fn is_well(&self) -> bool {
        lock(&self.newest).take();
        let mut seen = None;
        wait(Duration::from_secs(5), || {
            seen = self.status();
            seen.is_some()
        });
        seen.is_some_and(|s| {
            let nodes = s["nodes"].as_array();
            s["accepting"] == true
                && nodes.is_some_and(|n| n.len() == 3 && n.iter().all(|n| n["healthy"] == true))
        })
    }

    fn expect_ends(&self, expects: bool) {
        self.ends.store(expects, Ordering::SeqCst);
    }

    fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|thread| drop(thread.join()));
    }
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
        let mut resident = Vec::new();
        let mut configs = Vec::new();
        for id in 1..=3 {
            let mut nodes = lock(nodes);
            let Some(pid) = nodes.pid(id) else { continue };
            if nodes.is_running(id) {
                ended.remove(&id);
                resident.push((id, resident_octets(pid)));
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
            leader: known["leader"].as_u64(),
            term: known["term"].as_u64(),
            accepting: known["accepting"] == true,
            queued: known["queue"]["messages"].as_u64(),
            erase_backlog: backlogs.filter_map(|n| n["erase_backlog"].as_u64()).max(),
            resident,
        }));
        if status.is_some() {
            *lock(newest) = status;
        }
        std::thread::sleep(SAMPLE);
    }
}

/// Octets of a process that are in memory.
fn resident_octets(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}

fn take_all((customer, senders_own): &(Customer, Customer), record: &Record, stop: &AtomicBool) {
    loop {
        let is_last = stop.load(Ordering::SeqCst);
        for (moment, mut taken) in customer.drain() {
            taken.octets = Vec::new();
            record.note_at(moment, What::Taken(taken));
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

/// Names of messages that are queued: the local parts of their senders. Nothing if nobody says.
fn left(nodes: &Nodes) -> Option<BTreeSet<String>> {
    let listed = nodes.ask(&["queue", "list", "--json"]);
    listed.status.success().then_some(())?;
    let lines = String::from_utf8_lossy(&listed.stdout).into_owned();
    let name = |line: &str| {
        let value: Value = serde_json::from_str(line).ok()?;
        let sender = value["sender"].as_str()?;
        Some(sender.trim_start_matches('<').split('@').next()?.to_string())
    };
    Some(lines.lines().filter_map(name).collect())
}

/// Names of messages of which a line stands in a file of a directory.
fn canaries(dir: &Path, found: &mut BTreeSet<String>) -> std::io::Result<()> {
    for path in std::fs::read_dir(dir)?.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            canaries(&path, found)?;
        } else if let Ok(octets) = std::fs::read(&path) {
            names_in(&octets, found);
        }
    }
    Ok(())
}

/// What stands between the words that each line of a message has.
fn names_in(octets: &[u8], found: &mut BTreeSet<String>) {
    const BEFORE: &[u8] = b".canary-";
    const NAME_MAX: usize = 40;
    let mut rest = octets;
    while let Some(dot) = rest.iter().position(|octet| *octet == b'.') {
        rest = &rest[dot..];
        let Some(name) = rest.strip_prefix(BEFORE) else {
            rest = &rest[1..];
            continue;
        };
        let name = &name[..name.len().min(NAME_MAX)];
        let end = name.windows(6).position(|w| w == b"-line-");
        if let Some(end) = end.filter(|end| name[..*end].iter().all(u8::is_ascii_alphanumeric)) {
            found.insert(String::from_utf8_lossy(&name[..end]).into_owned());
        }
        rest = &rest[BEFORE.len()..];
    }
}

/// What the nodes wrote of custody and erasure.
fn read_maillogs(nodes: &Nodes, epoch: std::time::SystemTime, record: &Record) {
    let epoch = epoch.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64);
    let began = Instant::now() - Duration::from_millis(record.now());
    for id in 1..=3 {
        for line in nodes.maillog(id).lines() {
            let Some((at, what)) = custody_line(id, line) else { continue };
            let at = Duration::from_millis((at - epoch).max(0) as u64);
            record.note_at(began + at, what);
        }
    }
}

/// A line `TIME HOST NAME/SERVICE[N]: ID: durable, nodes=1+3, power=A+C, network=1+3, ...` or `... ID: erased, lag=0.8`; when it was
/// written, in milliseconds since 1970.
fn custody_line(node: u64, line: &str) -> Option<(i64, What)> {
    let (before, rest) = line.split_once("]: ")?;
    let at = milliseconds(before.split(' ').next()?)?;
    let (id, rest) = rest.split_once(": ")?;
    let (word, rest) = rest.split_once(", ")?;
    let value = |key: &str| rest.split(", ").find_map(|field| field.strip_prefix(key)?.strip_prefix('='));
    let labels = |key: &str| value(key).map(|all| all.split('+').map(str::to_string).collect::<Vec<_>>());
    let what = match word {
        "durable" => What::Custody(Custody {
            id: id.into(),
            nodes: labels("nodes")?.iter().filter_map(|node| node.parse().ok()).collect(),
            power: labels("power")?,
            network: labels("network")?,
        }),
        "erased" => {
            let lag = (value("lag")?.parse::<f64>().ok()? * 1000.0) as u64;
            What::Erased { id: id.into(), node, lag }
        }
        _ => return None,
    };
    Some((at, what))
}

/// A time as `2026-01-31T12:34:56.789+02:00`, since 1970.
fn milliseconds(text: &str) -> Option<i64> {
    let number = |from: usize, to: usize| text.get(from..to)?.parse::<i64>().ok();
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second, milli) = (number(11, 13)?, number(14, 16)?, number(17, 19)?, number(20, 23)?);
    let sign = if text.get(23..24)? == "-" { -1 } else { 1 };
    let ahead = if text.get(23..24)? == "Z" { 0 } else { sign * (number(24, 26)? * 60 + number(27, 29)?) };
    // Days of the proleptic Gregorian calendar: years that begin in March, so that the leap day is the last.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days =
        365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (153 * m + 2) / 5 + day - 1;
    let days = days - 719_468;
    Some((((days * 24 + hour) * 60 + minute - ahead) * 60 + second) * 1000 + milli)
}

fn keep(folder: &Path, options: &Options, history: &History, nodes: &Nodes) {
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

/// What a run was made of and what happened, as [`run`] kept it.
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

/// Nemeses that can be had here.
pub fn is_possible(nemesis: &Nemesis) -> bool {
    nemesis.needs == Needs::Nothing || hosts::is_inside()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_mail_log_tell_custody() {
        let line = "2026-03-01T01:00:00.250+01:00 node-1 holdfast/cluster[7]: 4F2A: durable, nodes=1+3, power=A+C, network=1+3, index=9";
        let Some((at, What::Custody(custody))) = custody_line(1, line) else { panic!("{line}") };
        assert_eq!(at, 1_772_323_200_250);
        assert_eq!((custody.id.as_str(), custody.nodes, custody.power.len()), ("4F2A", vec![1, 3], 2));
        let line = "1970-01-01T00:00:01.000Z node-2 holdfast/erase[7]: 4F2A: erased, lag=0.8";
        let told = custody_line(2, line);
        assert!(matches!(told, Some((1000, What::Erased { node: 2, lag: 800, .. }))), "{told:?}");
        assert!(
            custody_line(1, "2026-03-01T01:00:00.250+01:00 node-1 holdfast/qmgr[7]: 4F2A: removed").is_none()
        );
    }

    #[test]
    fn names_are_found_wherever_a_line_of_them_stands() {
        let mut found = BTreeSet::new();
        names_in(b"..canary-a1-line-000001-abc\r\n.canary-\0\0.canary-b2-line-", &mut found);
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["a1", "b2"]);
    }

    #[test]
    fn a_notice_names_whom_it_is_about() {
        let text = b"Message-ID: <x@y>\r\n\r\nFinal-Recipient: rfc822; bounce-m@test.example\r\nfinal-recipient: rfc822;r@a.b\r\n";
        let told = notice("m", text);
        assert_eq!((told.id.as_str(), told.recipients), ("<x@y>", vec!["bounce-m".to_string(), "r".into()]));
    }
}
