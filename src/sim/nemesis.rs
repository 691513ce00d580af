//! What breaks things. Each fault is chosen by chance, lasts a while, and several may overlap; what it may not do is what no cluster of
//! three survives: take two copies of the same thing for good.

use std::time::Duration;

use holdfast_cluster::net::sim::Link;
use holdfast_storage::disk::Disk;
use holdfast_storage::index::sim::Lie;

use super::relay::{self, NODES, Order};
use super::world::World;
use super::{clients, customers};

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
            Back::Room(id) => world.nodes[&id].disk.set_capacity(u64::MAX),
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

/// One fault.
fn one(world: &mut World) -> Vec<(Duration, Back)> {
    let now = world.now();
    let id = 1 + world.chance.below(NODES);
    let other = 1 + world.chance.below(NODES);
    let (a, b) = (relay::address(id), relay::address(other));
    let soon = now + world.chance.ms(10, 10_000);
    match world.chance.below(20) {
        0 | 1 => {
            world.kill(id, true);
            vec![(soon, Back::Node(id))]
        }
        2 => {
            world.kill(id, false);
            vec![(soon, Back::Node(id))]
        }
        3 => {
            // All of them at once.
            (1..=NODES).for_each(|id| world.kill(id, false));
            (1..=NODES).map(|id| (now + world.chance.ms(10, 8_000), Back::Node(id))).collect()
        }
        4 | 5 => {
            let how_long = world.chance.ms(10, 8_000);
            world.nodes.get_mut(&id).expect("a node").stop_for(now, how_long);
            vec![]
        }
        6 => {
            // Alone.
            for other in (1..=NODES).filter(|other| *other != id) {
                world.net.cut(a, relay::address(other));
                world.net.cut(relay::address(other), a);
            }
            vec![(soon, Back::Links)]
        }
        7 => {
            world.net.cut(a, b);
            vec![(soon, Back::Links)]
        }
        8 => {
            let link = Link { delay: (Duration::from_millis(5), world.chance.ms(20, 400)), loses: 50 };
            world.net.slow(a, b, link);
            world.net.slow(b, a, link);
            vec![(soon, Back::Links)]
        }
        9 => {
            world.net.cut(a, clients::address());
            vec![(soon, Back::Links)]
        }
        10 => {
            let choice = world.chance.next();
            world.net.reset_one(choice);
            vec![]
        }
        11 => {
            let n = 1 + world.chance.below(customers::DOMAINS.len() as u64) as u8;
            let host = world.others.get_mut(&customers::address(n)).expect("a customer");
            host.kill(true);
            vec![(soon, Back::Customer(n))]
        }
        12 => {
            let most = world.chance.ms(20, 1_500);
            world.nodes[&id].disk.set_sync_time(Duration::from_millis(1), most);
            vec![(soon, Back::Disk(id))]
        }
        13 => {
            world.stops.insert(id);
            world.order(id, Order::Stop);
            // It may take a while to end, and is killed if that is too long.
            vec![(soon, Back::Node(id)), (soon + Duration::from_secs(40), Back::Node(id))]
        }
        14 | 15 => {
            (1..=NODES).for_each(|leader| world.order(leader, Order::HandOver(id)));
            vec![]
        }
        16 => {
            // It ends by itself with the first sync that fails, or before that.
            world.fails.insert(id);
            world.nodes[&id].disk.fail_sync_in(world.chance.below(30));
            vec![(soon, Back::Node(id))]
        }
        17 => {
            let disk = world.nodes[&id].disk.clone();
            disk.set_capacity(disk.used_bytes() + world.chance.below(12 << 20));
            vec![(soon, Back::Room(id))]
        }
        18 => {
            let id = world.rotten;
            let with_power = !world.chance.next().is_multiple_of(3);
            world.kill(id, with_power);
            rot(world, id);
            vec![(soon, Back::Node(id))]
        }
        _ => {
            let lies = [Lie::LosesWrites, Lie::Flips, Lie::Fails, Lie::Shut];
            world.shelves[&id].lie(lies[world.chance.below(lies.len() as u64) as usize]);
            vec![(soon, Back::Index(id))]
        }
    }
}
