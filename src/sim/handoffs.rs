//! Schedules of one message around its final dot: its leader dies, is paused or hands over between the dot and what comes of it, or is not
//! quite a leader yet. Each schedule fails if it did not meet its moment.

use std::time::Duration;

use holdfast_cluster::net::sim::Link;

use super::hold::Saying;
use super::mail::Told;
use super::relay::{self, NODES, Order};
use super::schedules::{leader, schedule, wait_leader};
use super::world::{World, lock};
use super::{clients, customers};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Octets that a customer holds who reads nothing.
const WINDOW: usize = 16 << 10;

/// A message past its final dot, or before the end of its last chunk: the leader waits for the customer.
struct Past {
    message: u64,
    leader: u64,
    /// The follower that its client talks to.
    entry: u64,
    /// The other one.
    third: u64,
}

/// Has a message come in by a follower, and waits until the leader is past its final dot with it. `before` is done before it is sent. Nothing
/// if it does not come to that, as somebody else leads by then.
fn past_dot(
    world: &mut World,
    sayings: &[Saying],
    before: impl FnOnce(&World, u64, u64),
) -> Result<Option<Past>, String> {
    let leader = wait_leader(world)?;
    let (entry, third) = (1 + leader % NODES, 1 + (leader + 1) % NODES);
    before(world, leader, entry);
    // Some are longer than what a customer holds unread.
    let message =
        clients::send_to(world, entry, if sayings[0] == Saying::Unread { 3 * WINDOW as u64 } else { 0 })?;
    lock(&world.ledger).hold.want(message, sayings);
    let until = world.now() + seconds(10);
    while world.now() < until {
        world.go_on(ms(1))?;
        let held = lock(&world.ledger).hold.held(0);
        if let Some(held) = held {
            if held.node == leader {
                return Ok(Some(Past { message, leader, entry, third }));
            }
            break;
        }
    }
    // It may still come, or be somebody else's.
    lock(&world.ledger).hold.end();
    Ok(None)
}

/// All is well again, before the next turn.
fn recover(world: &mut World) -> Result<(), String> {
    lock(&world.ledger).hold.end();
    world.net.mend();
    world.boot_all();
    world.wait_until(seconds(60), "all of them", relay::is_ready)
}

fn cut(world: &World, a: u64, b: u64) {
    world.net.cut(relay::address(a), relay::address(b));
    world.net.cut(relay::address(b), relay::address(a));
}

fn told(world: &World, message: u64) -> Option<Told> {
    lock(&world.ledger).mails.get(&message).map(|mail| mail.told)
}

/// How often a message was taken, and how often its sender was told that it failed.
fn ends(world: &World, message: u64) -> (u32, u32) {
    let ledger = lock(&world.ledger);
    let mail = &ledger.mails[&message];
    (mail.taken.values().sum(), mail.noticed.values().sum())
}

/// Whether a node that runs has a message in its queue.
fn has(world: &World, node: u64, message: u64) -> bool {
    let running = world.running();
    let Some(node) = running.get(&node) else { return false };
    let sender = format!("s{message}@senders.test");
    let queue = lock(&node.queue);
    let ids = queue.ids(None, 10_000);
    ids.into_iter().any(|id| queue.message(id).is_some_and(|m| m.envelope.sender.to_string() == sender))
}

/// The leader sends the dot, reads 2yz, and dies before anybody knows. The node that has the client has heard nothing of the message for as long
/// as it waits, and wants to take it back: its withdrawal arrives at the next leader, in whose queue the message stands untouched. That
/// one may not give it up: somebody has it.
#[test]
fn p7_what_an_earlier_leader_may_have_handed_off_is_not_withdrawn() {
    schedule(10, |world| {
        let mut met = 0;
        for _ in 0..10 {
            let deaf =
                |world: &World, leader, entry| world.net.cut(relay::address(leader), relay::address(entry));
            if let Some(Past { message, leader, entry, third }) = past_dot(world, &[Saying::Taken], deaf)? {
                [(leader, entry), (leader, third), (entry, third)]
                    .iter()
                    .for_each(|(a, b)| cut(world, *a, *b));
                lock(&world.ledger).hold.release(0);
                world.go_on(ms(30))?;
                world.kill(leader, false);
                for away in customers::addresses() {
                    world.others.get_mut(&away).ok_or("a customer")?.kill(true);
                }
                // It waits so long for what became of the message.
                world.go_on(seconds(31))?;
                let is_waiting = told(world, message) == Some(Told::Nothing);
                world.net.mend();
                world.wait_until(seconds(60), "an answer to the client", |world| {
                    told(world, message) != Some(Told::Nothing)
                })?;
                if told(world, message) == Some(Told::Refused) {
                    return Err(format!("message {message} was taken by a customer, and is refused"));
                }
                met += u64::from(is_waiting && has(world, third, message) && ends(world, message) == (1, 0));
            }
            recover(world)?;
        }
        if met < 2 { Err(format!("met {met} times")) } else { Ok(()) }
    });
}

/// What was settled stands in the next leader's log, and it does not know yet that it is committed: in its queue the message waits. Only
/// when its own first entry is applied it knows.
#[test]
fn p4_a_new_leader_delivers_nothing_before_its_own_first_entry() {
    schedule(11, |world| {
        let mut met = 0;
        for _ in 0..10 {
            if let Some(Past { message, leader: old, entry, third }) =
                past_dot(world, &[Saying::Taken], |_, _, _| ())?
            {
                // Of what else there is to write the result would have to wait its turn.
                for node in 1..=NODES {
                    world.net.cut(clients::address(), relay::address(node));
                }
                world.go_on(seconds(3))?;
                // It comes to the third node alone, and that it is committed would come after it.
                cut(world, old, entry);
                let late = Link { delay: (ms(100), ms(105)), loses: 0 };
                world.net.slow(relay::address(old), relay::address(third), late);
                lock(&world.ledger).hold.release(0);
                let apart = world.chance.ms(150, 330);
                world.go_on(apart)?;
                cut(world, old, third);
                world.kill(old, true);
                let until = world.now() + seconds(20);
                while leader(world) != Some(third) && world.now() < until {
                    world.go_on(ms(1))?;
                }
                // Nobody else syncs that entry for a while.
                let follower = world.nodes[&entry].disk.clone();
                follower.set_sync_time(seconds(1), ms(1_500));
                let waits = has(world, third, message);
                world.go_on(seconds(8))?;
                follower.set_sync_time(Duration::from_micros(100), ms(5));
                let (taken, _) = ends(world, message);
                let is_known = waits && !has(world, third, message);
                if is_known && taken > 1 {
                    return Err(format!("message {message} was settled, and is handed off again"));
                }
                met += u64::from(is_known && taken == 1);
            }
            recover(world)?;
        }
        if met < 2 { Err(format!("met {met} times")) } else { Ok(()) }
    });
}

/// An operator has leadership handed over while a copy is past its final dot: it stays until the customer has answered, and the copy is the
/// only one.
#[test]
fn p4_a_transfer_waits_for_what_is_past_its_dot() {
    schedule(12, |world| {
        let mut met = 0;
        for _ in 0..6 {
            if let Some(Past { message, leader: old, third, .. }) =
                past_dot(world, &[Saying::Taken], |_, _, _| ())?
            {
                world.order(old, Order::Transfer(third));
                world.go_on(seconds(3))?;
                if leader(world) != Some(old) {
                    return Err(format!(
                        "node {old} has handed over past the final dot of message {message}"
                    ));
                }
                lock(&world.ledger).hold.release(0);
                let is_moved = |world: &World| leader(world) == Some(third);
                world.wait_until(seconds(15), "another leader", is_moved)?;
                world.go_on(seconds(3))?;
                if ends(world, message) != (1, 0) {
                    return Err(format!("message {message} was handed off again after a transfer"));
                }
                met += 1;
            }
            recover(world)?;
        }
        if met < 3 { Err(format!("met {met} times")) } else { Ok(()) }
    });
}

/// A customer reads nothing of the last chunk for a while, and the leader cannot send all of it. It is cut off, and the next leader hands the message off.
/// When the customer reads on, the old leader's right to deliver is long over: the last octet does not come.
#[test]
fn p4_the_end_of_a_chunk_takes_a_permit_of_its_own() {
    schedule(14, |world| {
        let mut met = 0;
        for _ in 0..16 {
            let narrow =
                |world: &World, _, _| customers::addresses().for_each(|host| world.net.narrow(host, WINDOW));
            if let Some(Past { message, leader: old, entry, third }) =
                past_dot(world, &[Saying::Unread], narrow)?
            {
                world.go_on(ms(100))?;
                [entry, third].iter().for_each(|other| cut(world, old, *other));
                let until = world.now() + seconds(20);
                while ends(world, message).0 == 0 && world.now() < until {
                    world.go_on(ms(10))?;
                }
                met += u64::from(ends(world, message).0 == 1);
                lock(&world.ledger).hold.release(0);
                world.go_on(seconds(3))?;
            }
            recover(world)?;
        }
        if met < 2 { Err(format!("met {met} times")) } else { Ok(()) }
    });
}

/// The leader is paused between the final dot and the reply for longer than its lease, and the customer refuses what it was sent. The next leader
/// hands the message off anew, to the same customer, who takes it this time. What the first one read when it woke counts no more: nobody is
/// told that a message failed which was taken.
#[test]
fn p10_a_paused_leaders_refusal_counts_no_more() {
    schedule(13, |world| {
        let mut met = 0;
        for _ in 0..6 {
            if let Some(Past { message, leader: old, .. }) =
                past_dot(world, &[Saying::Refused, Saying::Taken], |_, _, _| ())?
            {
                let (now, how_long) = (world.now(), seconds(12));
                world.nodes.get_mut(&old).ok_or("a node")?.stop_for(now, how_long);
                let is_past = |world: &World| {
                    let held = lock(&world.ledger).hold.held(1);
                    held.is_some_and(|held| held.node != old)
                };
                let until = now + how_long - seconds(1);
                while !is_past(world) && world.now() < until {
                    world.go_on(ms(10))?;
                }
                let is_met = is_past(world);
                lock(&world.ledger).hold.release(0);
                // It wakes, and brings what it read.
                let rest = (now + how_long).saturating_sub(world.now());
                world.go_on(rest + seconds(3))?;
                lock(&world.ledger).hold.release(1);
                world.go_on(seconds(6))?;
                if is_met && ends(world, message) != (1, 0) {
                    let (taken, noticed) = ends(world, message);
                    return Err(format!("message {message}: taken {taken} times, {noticed} notices"));
                }
                met += u64::from(is_met);
            }
            recover(world)?;
        }
        if met < 2 { Err(format!("met {met} times")) } else { Ok(()) }
    });
}
