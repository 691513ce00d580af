//! What breaks things. Each fault is chosen by chance, lasts a while, and several may overlap; what it may not do is what no cluster of
//! three survives: take two copies of the same thing for good.

use std::time::Duration;

use holdfast_cluster::net::sim::Link;
use holdfast_storage::disk::Disk;
use holdfast_storage::index::sim::Lie;

use super::relay::{self, NODES, Order};
use super::world::World;
use super::{clients, customers, mail};

/// Breaks things for a while. At the end some may still be broken.
pub(super) fn torment(world: &mut World, how_long: Duration) -> Result<(), String> {
    let until = world.now() + how_long;
    // What comes back, and when.
    let mut later: Vec<(Duration, Back)> = Vec::new();
    while world.now() < until {
        let next = world.now() + world.chance.ms(100, 3000);
        later.extend(one(world));
        while world.now() < next {
            world.go_on(Duration::from_millis(10))?;
            let now = world.now();
            let (due, rest): (Vec<_>, Vec<_>) = later.into_iter().partition(|(at, _)| *at <= now);
            later = rest;
            due.into_iter().for_each(|(_, back)| back.come(world));
        }
    }
    // Whoever is down comes back with the healing.
    Ok(())
}

enum Back {
    Node(u64),
    Customer(u8),
    Links,
    Disk(u64),
    Room(u64),
    Index(u64),
}

impl Back {
    fn come(self, world: &mut World) {
        match self {
            Back::Node(id) => {
                world.nodes[&id].disk.heal();
                if !world.nodes[&id].is_up() {
                    world.boot(id);
                }
            }
            Back::Customer(n) => customers::start(world, customers::address(n)),
            Back::Links => world.net.mend(),
            Back::Disk(id) => {
                let disk = &world.nodes[&id].disk;
                disk.set_sync_time(Duration::from_micros(100), Duration::from_millis(5));
            }
            Back::Room(id) => {
                world.nodes[&id].disk.set_capacity(u64::MAX);
                if !world.nodes[&id].is_up() {
                    world.boot(id);
                }
            }
            Back::Index(id) => world.shelves[&id].lie(Lie::None),
        }
    }
}

/// Bits of a node's files flip, or one of them ends too soon.
fn rot(world: &mut World, id: u64) {
    let disk = world.nodes[&id].disk.clone();
    let names = disk.list().unwrap_or_default();
    for _ in 0..1 + world.chance.below(4) {
        let Some(name) = names.get(world.chance.below(names.len().max(1) as u64) as usize) else { return };
        let length = disk.contents(name).len() as u64;
        if length == 0 {
            continue;
        }
        let at = world.chance.below(length);
        match world.chance.below(8) {
            0 => disk.truncate(name, at),
            bit => disk.flip(name, at, bit as u8),
        }
    }
}

/// A bit flips where a message's entry begins, in one of a node's segments.
pub(super) fn damage_a_header(world: &mut World, id: u64) {
    let disk = world.nodes[&id].disk.clone();
    let mut marks = disk.marks();
    marks.retain(|(mark, _, _)| mail::is_first(*mark));
    marks.sort_unstable();
    if marks.is_empty() {
        return;
    }
    let (_, name, at) = marks.swap_remove(world.chance.below(marks.len() as u64) as usize);
    // The mark is in the message's header, and the record's header is less than a block before.
    let before = 200 + world.chance.below(400);
    disk.flip(&name, (at as u64).saturating_sub(before), 3);
}

/// A way to break something, or to have an operator do something.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill,
    PowerCut,
    PowerCutOfAll,
    Pause,
    Alone,
    OneWay,
    SlowLink,
    NoClients,
    Reset,
    CustomerAway,
    SlowDisk,
    Stop,
    HandOver,
    SyncFails,
    FullDisk,
    Rot,
    IndexLies,
}

/// Each is as likely as it stands here often.
const FAULTS: [Fault; 20] = [
    Fault::Kill,
    Fault::Kill,
    Fault::PowerCut,
    Fault::PowerCutOfAll,
    Fault::Pause,
    Fault::Pause,
    Fault::Alone,
    Fault::OneWay,
    Fault::SlowLink,
    Fault::NoClients,
    Fault::Reset,
    Fault::CustomerAway,
    Fault::SlowDisk,
    Fault::Stop,
    Fault::HandOver,
    Fault::HandOver,
    Fault::SyncFails,
    Fault::FullDisk,
    Fault::Rot,
    Fault::IndexLies,
];

/// One fault.
fn one(world: &mut World) -> Vec<(Duration, Back)> {
    let now = world.now();
    let id = 1 + world.chance.below(NODES);
    let other = 1 + world.chance.below(NODES);
    let (a, b) = (relay::address(id), relay::address(other));
    let soon = now + world.chance.ms(10, 10_000);
    let fault = FAULTS[world.chance.below(FAULTS.len() as u64) as usize];
    *world.faults.entry(format!("{fault:?}")).or_default() += 1;
    match fault {
        Fault::Kill => {
            world.kill(id, true);
            vec![(soon, Back::Node(id))]
        }
        Fault::PowerCut => {
            world.kill(id, false);
            vec![(soon, Back::Node(id))]
        }
        Fault::PowerCutOfAll => {
            // All of them at once.
            (1..=NODES).for_each(|id| world.kill(id, false));
            (1..=NODES).map(|id| (now + world.chance.ms(10, 8_000), Back::Node(id))).collect()
        }
        Fault::Pause => {
            let how_long = world.chance.ms(10, 8_000);
            world.nodes.get_mut(&id).expect("a node").stop_for(now, how_long);
            vec![]
        }
        Fault::Alone => {
            // Alone.
            for other in (1..=NODES).filter(|other| *other != id) {
                world.net.cut(a, relay::address(other));
                world.net.cut(relay::address(other), a);
            }
            vec![(soon, Back::Links)]
        }
        Fault::OneWay => {
            world.net.cut(a, b);
            vec![(soon, Back::Links)]
        }
        Fault::SlowLink => {
            let link = Link { delay: (Duration::from_millis(5), world.chance.ms(20, 400)), loses: 50 };
            world.net.slow(a, b, link);
            world.net.slow(b, a, link);
            vec![(soon, Back::Links)]
        }
        Fault::NoClients => {
            world.net.cut(a, clients::address());
            vec![(soon, Back::Links)]
        }
        Fault::Reset => {
            let choice = world.chance.next();
            world.net.reset_one(choice);
            vec![]
        }
        Fault::CustomerAway => {
            let n = 1 + world.chance.below(customers::DOMAINS.len() as u64) as u8;
            let host = world.others.get_mut(&customers::address(n)).expect("a customer");
            host.kill(true);
            vec![(soon, Back::Customer(n))]
        }
        Fault::SlowDisk => {
            let most = world.chance.ms(20, 1_500);
            world.nodes[&id].disk.set_sync_time(Duration::from_millis(1), most);
            vec![(soon, Back::Disk(id))]
        }
        Fault::Stop => {
            world.stops.insert(id);
            world.order(id, Order::Stop);
            // It may take a while to end, and is killed if that is too long.
            vec![(soon, Back::Node(id)), (soon + Duration::from_secs(40), Back::Node(id))]
        }
        Fault::HandOver => {
            (1..=NODES).for_each(|leader| world.order(leader, Order::HandOver(id)));
            vec![]
        }
        Fault::SyncFails => {
            // It ends by itself with the first sync that fails, or before that.
            world.fails.insert(id);
            world.nodes[&id].disk.fail_sync_in(world.chance.below(30));
            vec![(soon, Back::Node(id))]
        }
        Fault::FullDisk => {
            let disk = world.nodes[&id].disk.clone();
            disk.set_capacity(disk.used_bytes() + world.chance.below(12 << 20));
            vec![(soon, Back::Room(id))]
        }
        Fault::Rot => {
            let id = world.rotten;
            let with_power = !world.chance.next().is_multiple_of(3);
            world.kill(id, with_power);
            rot(world, id);
            vec![(soon, Back::Node(id))]
        }
        Fault::IndexLies => {
            let lies = [Lie::LosesWrites, Lie::Flips, Lie::Fails, Lie::Shut];
            world.shelves[&id].lie(lies[world.chance.below(lies.len() as u64) as usize]);
            vec![(soon, Back::Index(id))]
        }
    }
}
