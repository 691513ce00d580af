//! Hosts, what is between them, and simulated time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holdfast_cluster::net::sim::{Link, Net};
use holdfast_storage::Keyring;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::index::sim::SimShelf;

use super::host::Host;
use super::judge::Watch;
use super::mail::{Ledger, MARK};
use super::relay::{self, Files, NODES, Order, Running, Shown};
use super::{clients, customers};

/// Simulated time moves on in steps of this.
const STEP: Duration = Duration::from_millis(1);

/// How far a node's clock goes too fast or too slow, in millionths. Real ones are off by some hundreds; the lease's margin is far more.
const DRIFT_MAX: u32 = 20_000;

/// Numbers that look random. SplitMix64 (Steele et al., OOPSLA'14).
#[derive(Clone)]
pub(super) struct Chance(pub(super) u64);

impl Chance {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// From `least` to `most`, milliseconds.
    pub(super) fn ms(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(least + self.below(most - least + 1))
    }
}

/// What panicked in this process, wherever: a task that does is gone without another word.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// From now on it is known what panics.
pub(super) fn note_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        lock(&PANICS).push(panic.to_string());
        before(panic);
    }));
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everything.
pub(super) struct World {
    pub(super) net: Net,
    pub(super) nodes: BTreeMap<u64, Host>,
    /// Clients and customers.
    pub(super) others: BTreeMap<IpAddr, Host>,
    pub(super) shelves: BTreeMap<u64, SimShelf>,
    pub(super) shown: BTreeMap<u64, Shown>,
    pub(super) ledger: Arc<Mutex<Ledger>>,
    pub(super) chance: Chance,
    /// Nodes whose disk fails, so that they end by themselves.
    pub(super) fails: BTreeSet<u64>,
    /// How often each kind of fault was there.
    pub(super) faults: BTreeMap<String, u64>,
    /// Nodes that were told to stop.
    pub(super) stops: BTreeSet<u64>,
    /// The node to whose files damage is done.
    pub(super) rotten: u64,
    watch: Watch,
    files: Files,
    now: Duration,
    trace: u64,
}

impl World {
    pub(super) fn new(seed: u64) -> World {
        let mut chance = Chance(seed);
        let delay = (Duration::from_micros(200), Duration::from_millis(1 + chance.below(5)));
        let net = Net::new(chance.next(), Link { delay, loses: 0 });
        let mut nodes = BTreeMap::new();
        for id in 1..=NODES {
            let disk = SimDisk::new(chance.next());
            disk.watch(MARK.as_bytes());
            disk.set_sync_time(Duration::from_micros(100), Duration::from_millis(1 + chance.below(10)));
            let mut node = Host::new(relay::address(id), &net, disk);
            node.clock_rate = (1_000_000 - DRIFT_MAX + chance.below(2 * u64::from(DRIFT_MAX)) as u32).max(1);
            nodes.insert(id, node);
        }
        let others = customers::addresses().chain([clients::address()]);
        let others = others.map(|a| (a, Host::new(a, &net, SimDisk::new(0)))).collect();
        let disks = nodes.values().map(|node: &Host| node.disk.clone()).collect();
        World {
            net,
            nodes,
            others,
            shelves: (1..=NODES).map(|id| (id, SimShelf::default())).collect(),
            shown: BTreeMap::new(),
            ledger: Arc::new(Mutex::new(Ledger::new(disks))),
            rotten: 1 + chance.below(NODES),
            chance,
            fails: BTreeSet::new(),
            stops: BTreeSet::new(),
            faults: BTreeMap::new(),
            watch: Watch::default(),
            files: Files::new(),
            now: Duration::ZERO,
            trace: 0,
        }
    }

    /// What happened so far, in a number.
    pub(super) fn trace(&self) -> u64 {
        self.trace
    }

    pub(super) fn now(&self) -> Duration {
        self.now
    }

    /// Starts a node that is down.
    pub(super) fn boot(&mut self, id: u64) {
        self.fails.remove(&id);
        self.stops.remove(&id);
        let shown: Shown = Arc::default();
        self.shown.insert(id, shown.clone());
        let (files, shelf, seed) = (&self.files, self.shelves[&id].clone(), self.chance.next());
        let host = self.nodes.get_mut(&id).expect("a node");
        // What was still to fail was to fail before.
        host.disk.heal();
        host.start(seed, |disk| files.main(id, disk, shelf, shown));
    }

    /// Starts every node and every customer.
    pub(super) fn boot_all(&mut self) {
        for id in 1..=NODES {
            if !self.nodes[&id].is_up() {
                self.boot(id);
            }
        }
        for address in customers::addresses() {
            customers::start(self, address);
        }
    }

    /// Nothing is broken any more.
    pub(super) fn heal(&mut self) {
        self.net.mend();
        // Some may have seen a sync fail that they are still to tell of, or be about to stop.
        for set in [std::mem::take(&mut self.fails), std::mem::take(&mut self.stops)] {
            set.into_iter().for_each(|id| self.kill(id, true));
        }
        for node in self.nodes.values_mut() {
            node.stopped_until = node.stopped_until.min(self.now + Duration::from_secs(10));
            node.disk.heal();
            node.disk.set_capacity(u64::MAX);
            node.disk.set_sync_time(Duration::from_micros(100), Duration::from_millis(2));
        }
        self.boot_all();
    }

    /// A node's process is killed.
    pub(super) fn kill(&mut self, id: u64, with_power: bool) {
        self.shown.remove(&id);
        self.nodes.get_mut(&id).expect("a node").kill(with_power);
    }

    /// An operator gives a node an order, if it serves.
    pub(super) fn order(&self, id: u64, order: Order) {
        let orders = self.shown.get(&id).and_then(|shown| lock(shown).orders.clone());
        if let Some(orders) = orders {
            drop(orders.send(order));
        }
    }

    /// Nodes that serve.
    pub(super) fn running(&self) -> BTreeMap<u64, Running> {
        let running = self.shown.iter().filter_map(|(id, shown)| {
            let seen = lock(shown);
            Some((*id, seen.running.clone()?))
        });
        running.collect()
    }

    /// One step of time.
    pub(super) fn step(&mut self) -> Result<(), String> {
        for node in self.nodes.values_mut().chain(self.others.values_mut()) {
            node.step(self.now, STEP)?;
        }
        self.now += STEP;
        lock(&self.ledger).now = self.now;
        let mut over = Vec::new();
        for (id, shown) in &self.shown {
            let seen = lock(shown);
            // Who has to write before it can start may find no room for that; as it runs, that is no reason to end.
            let lacks_room = |why: &String| seen.running.is_none() && why.contains("no storage space");
            let has_failed = |why: &String| self.fails.contains(id) && why.contains("Input/output error");
            let may_end =
                seen.ended.as_ref().is_some_and(has_failed) || seen.ended.as_ref().is_some_and(lacks_room);
            if seen.has_stopped || seen.ended.is_some() && may_end {
                over.push(*id);
            } else if let Some(why) = &seen.ended {
                if let Some(dir) = std::env::var_os("HOLDFAST_SIM_DUMP") {
                    self.dump(*id, std::path::Path::new(&dir));
                }
                return Err(format!("node {id} ended at {:?}: {why}", self.now));
            }
        }
        over.into_iter().for_each(|id| self.kill(id, true));
        self.watch.look(&self.shown, &self.nodes, &mut lock(&self.ledger))?;
        if self.now.as_millis().is_multiple_of(100) {
            let applied = self.running().into_iter().map(|(id, node)| (id, *node.cluster.applied().borrow()));
            let applied: Vec<(u64, u64)> = applied.collect();
            let mails = lock(&self.ledger).mails.len();
            let seen = format!("{} {applied:?} {mails}", self.trace);
            self.trace = Chance(u64::from(crc32fast::hash(seen.as_bytes()))).next();
            if std::env::var_os("HOLDFAST_SIM_TRACE").is_some() {
                println!("{:?} {seen}", self.now);
            }
        }
        if let Some(panic) = lock(&PANICS).first() {
            return Err(format!("at {:?}: {panic}", self.now));
        }
        let ledger = lock(&self.ledger);
        match ledger.wrong.first() {
            Some(wrong) => Err(format!("at {:?}: {wrong}", self.now)),
            None => Ok(()),
        }
    }

    /// Writes what a node's log holds to a file, for whoever looks for a failure's cause.
    pub(super) fn dump(&self, id: u64, dir: &std::path::Path) {
        let mut text = String::new();
        let mut each = |line| text += &format!("{line:?}\n");
        let dumped = holdfast_storage::log::dump::dump(&self.nodes[&id].disk, &Keyring::default(), &mut each);
        text += &format!("{dumped:?}\n");
        std::fs::write(dir.join(format!("node-{id}.dump")), text).unwrap();
    }

    pub(super) fn go_on(&mut self, how_long: Duration) -> Result<(), String> {
        let until = self.now + how_long;
        while self.now < until {
            self.step()?;
        }
        Ok(())
    }

    /// Goes on until something is so.
    pub(super) fn wait_until(
        &mut self,
        patience: Duration,
        what: &str,
        is_so: impl Fn(&World) -> bool,
    ) -> Result<(), String> {
        let until = self.now + patience;
        while self.now < until {
            self.go_on(Duration::from_millis(100))?;
            if is_so(self) {
                return Ok(());
            }
        }
        Err(format!("within {patience:?} there was not {what}: {}", super::judge::standing(self)))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // What belongs to a process must go before it does.
        self.shown.clear();
    }
}
