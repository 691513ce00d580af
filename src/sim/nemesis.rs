//! What breaks things. Each fault is chosen by chance, lasts a while, and several may overlap; what it may not do is what no cluster of
//! three survives: take two copies of the same thing for good.

use std::time::Duration;

use holdfast_cluster::net::sim::Link;
use holdfast_storage::index::sim::Lie;

use super::relay::{self, NODES};
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
    Index(u64),
}

impl Back {
    fn come(self, world: &mut World) {
        match self {
            Back::Node(id) if !world.nodes[&id].is_up() => world.boot(id),
            Back::Node(_) => {}
            Back::Customer(n) => customers::start(world, customers::address(n)),
            Back::Links => world.net.mend(),
            Back::Disk(id) => {
                let disk = &world.nodes[&id].disk;
                disk.set_sync_time(Duration::from_micros(100), Duration::from_millis(5));
            }
            Back::Index(id) => world.shelves[&id].lie(Lie::None),
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
    match world.chance.below(14) {
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
        _ => {
            let lies = [Lie::LosesWrites, Lie::Flips, Lie::Fails, Lie::Shut];
            world.shelves[&id].lie(lies[world.chance.below(lies.len() as u64) as usize]);
            vec![(soon, Back::Index(id))]
        }
    }
}
