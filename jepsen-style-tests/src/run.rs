//! One run: a cluster, senders, a nemesis, then all is mended, all is delivered, and the files are searched.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::checkers::{ERASE_WITHIN, RESIDENT_MAX};
use crate::customer::Customer;
use crate::disk::SmallDisk;
use crate::evidence::{canaries, left, read_maillogs, read_stderr};
use crate::folder::{Options, keep};
use crate::history::{Fault, History, What};
use crate::hosts::{self, Hosts};
use crate::links::Links;
use crate::nemesis::{DISK_MIB, Needs, Nemesis, World};
use crate::nodes::Nodes;
use crate::random::Random;
use crate::record::Record;
use crate::relays::{self, Relays};
use crate::replacement::machine_of;
use crate::sender::{Client, message};
use crate::tools::{faketime, lock, waited};
use crate::watcher::Watcher;
use crate::workload::{Senders, Workload};

/// Time that a run has before the first fault.
const WARM_UP: Duration = Duration::from_secs(3);
/// How long all nodes may take to be well after everything was mended.
const HEAL: Duration = Duration::from_secs(60);
/// How long the queue may take to drain after that.
const DRAIN: Duration = Duration::from_secs(120);
/// Tries of a nemesis that finds nothing to break.
const TRIES: u32 = 20;

/// Runs it, and keeps history, options and the nodes' logs in `folder`.
///
/// # Panics
/// If the cluster cannot be formed, or a file of the run not be written.
pub fn run(options: &Options, workload: Workload, nemeses: &[Nemesis], folder: &Path) -> History {
    let has = |which: fn(Needs) -> bool| nemeses.iter().any(|nemesis| which(nemesis.needs));
    let wires = has(|needs| needs == Needs::Wires).then_some(options.seed);
    let hosts = hosts::is_inside().then(|| Hosts::new(3, wires).expect("machines of our own"));
    let listen = if hosts.is_some() { format!("{}:0", Hosts::OUTSIDE) } else { "127.0.0.1:0".into() };
    let (customer, senders_own) = (Customer::start_at(&listen), Customer::start_at(&listen));
    let has_relays = hosts.is_none() && has(|needs| needs == Needs::Links);
    let mut nodes = match hosts {
        Some(_) => Nodes::prepare_on_hosts(keep_little),
        None if has_relays => Nodes::prepare(|id, text| relays::behind(id, &keep_little(id, text))),
        None => Nodes::prepare(keep_little),
    };
    if hosts.is_none() {
        nodes.end_with_us();
    }
    let relays = has_relays.then(|| Relays::start(&nodes, options.seed).expect("ports of our own"));
    if let Some(library) = faketime().filter(|_| has(|needs| needs == Needs::Faketime)) {
        nodes.with_clocks(library);
    }
    // What stands in a disk in memory counts as its node's memory: there that has no bound.
    let mut disks = Vec::new();
    if has(Needs::has_small_disks) && hosts::is_root() {
        let disk = |id| SmallDisk::at(DISK_MIB, &nodes.data(id)).expect("a disk of our own");
        disks.extend((1..=3).map(disk));
    } else if has(Needs::has_small_disks) {
        (1..=3).for_each(|id| hosts::mount_disk(&nodes.data(id), DISK_MIB).expect("a disk of our own"));
    }
    if hosts::is_root() && !is_in_memory(nodes.dir()) {
        nodes.bound(RESIDENT_MAX).expect("control groups of our own");
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
    let mut senders = Senders::start(workload, &addresses, &mut random, &record);
    let until = Instant::now() + WARM_UP + Duration::from_secs(options.seconds);
    std::thread::sleep(WARM_UP);
    let mut stage = Stage {
        nodes: &nodes,
        links: hosts.as_ref().map(|hosts| hosts as &dyn Links).or(relays.as_ref().map(|r| r as &dyn Links)),
        hosts: hosts.as_ref(),
        disks: &mut disks,
        customer: &customers.0,
        watcher: &watcher,
        record: &record,
    };
    stage.torment(nemeses, until, &mut random);
    std::thread::sleep(until.saturating_duration_since(Instant::now()));
    senders.stop();
    eprintln!("{} acknowledged; everything is mended now, and the rest delivered", record.acknowledged());
    customers.0.set_down(false);
    let healing = Instant::now();
    let is_well = waited(HEAL, || watcher.is_well());
    record.note(What::Healed { took: is_well.then(|| healing.elapsed().as_millis() as u64) });
    senders.finish();
    for (node, address) in &addresses {
        probe(*node, address, &record);
    }
    let is_empty = || watcher.status().is_some_and(|s| s["queue"]["messages"] == 0);
    waited(DRAIN, is_empty);
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
    read_stderr(&lock(&nodes), epoch, &record);
    let history = History { events: record.finish() };
    keep(folder, options, &history, &lock(&nodes));
    (1..=3).for_each(|id| lock(&nodes).kill(id));
    if has(Needs::has_small_disks) && !hosts::is_root() {
        (1..=3).for_each(|id| hosts::unmount_disk(&lock(&nodes).data(id)));
    }
    drop(disks);
    history
}

/// A node that was away for some seconds gets a snapshot, not all entries.
fn keep_little(_node: u64, text: String) -> String {
    text.replace("[storage]\n", "[storage]\nkeep_entries = 300\n")
}

/// Name of a message by which a node is asked, when all is mended, whether it takes mail; the node's id follows.
pub const PROBE: &str = "probe";

fn probe(node: u64, address: &str, record: &Record) {
    let name = format!("{PROBE}{node}");
    let began = record.now();
    let Ok(mut client) = Client::connect(node, address) else { return };
    let sent = client.transact(&name, &["r"], &message(&name, 2_000));
    record.note(What::Sent { began, dot: None, sent });
}

/// What a nemesis works on, and who looks on.
struct Stage<'a> {
    nodes: &'a Mutex<Nodes>,
    links: Option<&'a dyn Links>,
    hosts: Option<&'a Hosts>,
    disks: &'a mut [SmallDisk],
    customer: &'a Customer,
    watcher: &'a Watcher,
    record: &'a Record,
}

impl Stage<'_> {
    /// One nemesis after the other, each of them once before any comes again, until the time is over and each was there.
    fn torment(&mut self, nemeses: &[Nemesis], until: Instant, random: &mut Random) {
        let mut number = 0;
        let mut is_first = true;
        while !nemeses.is_empty() && (is_first || Instant::now() < until) {
            let mut waiting: Vec<&Nemesis> = nemeses.iter().collect();
            while !waiting.is_empty() && (is_first || Instant::now() < until) {
                let nemesis = waiting.remove(random.within(0, waiting.len() as u64) as usize);
                number += 1;
                for _ in 0..TRIES {
                    if self.once(nemesis, number, random) {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(200));
                }
            }
            is_first = false;
        }
    }

    /// Breaks something for a while, mends it, and waits until the cluster is well. False if there was nothing to break.
    fn once(&mut self, nemesis: &Nemesis, number: u64, random: &mut Random) -> bool {
        let Stage { links, hosts, customer, watcher, record, .. } = *self;
        let leader = watcher.status().and_then(|s| s["leader"].as_u64()).map(machine_of);
        watcher.expect_ends(true);
        let begun = {
            let mut nodes = lock(self.nodes);
            let mut world =
                World { nodes: &mut nodes, links, hosts, disks: self.disks, customer, record, leader };
            nemesis.begin(&mut world, random)
        };
        let Some(broken) = begun else {
            watcher.expect_ends(false);
            return false;
        };
        eprintln!("{:>7} ms  {}: {}", record.at(broken.began), nemesis.name, broken.what);
        let fault = |begins| {
            let (nodes, what) = (broken.nodes.clone(), broken.what.clone());
            What::Fault(Fault { number, nemesis: nemesis.name.into(), begins, nodes, what })
        };
        record.note_at(broken.began, fault(true));
        record.note(What::Away { nodes: broken.down.clone() });
        for (node, status) in broken.ended.iter().filter(|(_, status)| *status != Some(0)) {
            record.note(What::Ended { node: *node, status: *status });
        }
        std::thread::sleep(nemesis.lasts(random));
        record.note(What::Away { nodes: Vec::new() });
        {
            let mut nodes = lock(self.nodes);
            broken.end(&mut World {
                nodes: &mut nodes,
                links,
                hosts,
                disks: self.disks,
                customer,
                record,
                leader,
            });
        }
        watcher.expect_ends(false);
        if !waited(HEAL, || watcher.is_well()) {
            record.note(What::Healed { took: None });
        }
        record.note(fault(false));
        std::thread::sleep(Duration::from_millis(random.within(300, 3_000)));
        true
    }
}

/// Whether files of a directory are memory.
fn is_in_memory(dir: &Path) -> bool {
    let kind = std::process::Command::new("stat").args(["-f", "-c", "%T"]).arg(dir).output();
    kind.is_ok_and(|kind| kind.stdout.starts_with(b"tmpfs") || kind.stdout.starts_with(b"ramfs"))
}

/// Nemeses that can be had here.
pub fn is_possible(nemesis: &Nemesis) -> bool {
    match nemesis.needs {
        Needs::Nothing => true,
        Needs::Links => hosts::is_inside() || Path::new("/proc/net/tcp").exists(),
        Needs::SmallDisks => hosts::is_inside(),
        Needs::Wires => hosts::is_inside() && Path::new("/dev/net/tun").exists(),
        Needs::Root => hosts::is_root(),
        Needs::Strace => {
            let mut strace = std::process::Command::new("strace");
            strace.arg("-V").output().is_ok_and(|output| output.status.success())
        }
        Needs::Faketime => faketime().is_some(),
    }
}
