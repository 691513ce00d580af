//! Schedules that are worth being met each time, where chance may take long.

use std::collections::BTreeSet;
use std::time::Duration;

use holdfast_cluster::net::sim::Link;

use super::judge::Summary;
use super::mail::Told;
use super::relay::{self, NODES, Order};
use super::world::{World, lock};
use super::{clients, customers, judge, nemesis, number, play};

/// Who says of itself that it leads, the newest first: one that is cut off need not know of the next.
pub(super) fn leader(world: &World) -> Option<u64> {
    let terms = world.running().into_iter().filter_map(|(id, node)| {
        let term = world.nodes[&id].within(world.now(), || node.cluster.leading())??;
        Some((term, id))
    });
    terms.max().map(|(_, id)| id)
}

pub(super) fn wait_leader(world: &mut World) -> Result<u64, String> {
    world.wait_until(Duration::from_secs(30), "a leader", |world| leader(world).is_some())?;
    leader(world).ok_or_else(|| "it led a moment ago".into())
}

/// Plays a schedule under load; then all must be well. `HOLDFAST_SEED` plays it with other chances.
pub(super) fn schedule(
    seed: u64,
    script: impl FnOnce(&mut World) -> Result<(), String> + Send + 'static,
) -> Summary {
    match play(number("HOLDFAST_SEED").unwrap_or(seed), script) {
        Ok(summary) => {
            println!("{summary}");
            summary
        }
        Err(why) => panic!("{why}"),
    }
}

/// Whoever is told to hand over has no right to deliver any more, while the other is voted for without regard to the lease.
#[test]
fn p4_who_hands_over_delivers_no_more() {
    schedule(1, |world| {
        for turn in 0..30 {
            let from = wait_leader(world)?;
            // It hears late of who leads next.
            let late = Link { delay: (Duration::from_millis(100), Duration::from_millis(100)), loses: 0 };
            for other in (1..=NODES).filter(|id| *id != from) {
                world.net.slow(relay::address(other), relay::address(from), late);
            }
            world.go_on(Duration::from_millis(300))?;
            world.order(from, Order::HandOver(1 + (from + turn % 2) % NODES));
            world.go_on(Duration::from_millis(700))?;
            world.net.mend();
        }
        Ok(())
    });
}

/// A leader has its lease still by what one follower promised, and that one has forgotten it: it was killed, and is back at once. The
/// other has been cut off from the leader before, and stands for election again and again.
#[test]
fn p4_voters_that_restart_within_the_lease_keep_their_promise() {
    schedule(2, |world| {
        for _ in 0..20 {
            let old = wait_leader(world)?;
            let (voter, candidate) = (1 + old % NODES, 1 + (old + 1) % NODES);
            let part = |world: &World, from| {
                world.net.cut(relay::address(old), relay::address(from));
                world.net.cut(relay::address(from), relay::address(old));
            };
            // Nothing is written meanwhile: who has less than the voter would not be elected anyhow.
            for node in 1..=NODES {
                world.net.cut(clients::address(), relay::address(node));
            }
            world.go_on(Duration::from_secs(4))?;
            part(world, candidate);
            world.go_on(Duration::from_millis(1_000))?;
            let apart = world.chance.ms(0, 900);
            world.go_on(apart)?;
            part(world, voter);
            world.kill(voter, true);
            world.boot(voter);
            let is_new = |world: &World| leader(world).is_some_and(|leader| leader != old);
            world.wait_until(Duration::from_secs(30), "another leader", is_new)?;
            world.net.mend();
            world.wait_until(Duration::from_secs(30), "all of them", relay::is_ready)?;
        }
        Ok(())
    });
}

/// The same, but the voter learns at once that nobody lets it reach the old leader: it takes part a moment after it was killed. Nothing but its
/// having just started keeps it from electing another leader, or from standing itself, while the old one has its lease by what it promised.
#[test]
fn p4_who_has_just_started_votes_for_nobody() {
    schedule(8, |world| {
        let mut met = 0;
        for _ in 0..30 {
            let old = wait_leader(world)?;
            let (voter, candidate) = (1 + old % NODES, 1 + (old + 1) % NODES);
            for node in 1..=NODES {
                world.net.cut(clients::address(), relay::address(node));
            }
            world.go_on(Duration::from_secs(3))?;
            world.net.cut(relay::address(old), relay::address(candidate));
            world.net.cut(relay::address(candidate), relay::address(old));
            let apart = world.chance.ms(1_000, 1_900);
            world.go_on(apart)?;
            world.kill(voter, true);
            world.net.refuse(relay::address(old), relay::address(voter));
            world.net.refuse(relay::address(voter), relay::address(old));
            world.boot(voter);
            let mut is_met = false;
            let is_held = |world: &World| {
                let running = world.running();
                let node = running.get(&old)?;
                world.nodes[&old].within(world.now(), || node.cluster.permit().is_some())
            };
            while is_held(world) == Some(true) {
                world.go_on(Duration::from_millis(1))?;
                is_met |= world.running().contains_key(&voter);
                if is_held(world) == Some(true) && leader(world) != Some(old) {
                    return Err(format!("node {old} may still deliver, and node {:?} leads", leader(world)));
                }
            }
            met += u64::from(is_met);
            world.net.mend();
            world.wait_until(Duration::from_secs(30), "all of them", relay::is_ready)?;
        }
        if met < 10 { Err(format!("met {met} times")) } else { Ok(()) }
    });
}

/// Others fill the leader's disk in a moment. It is asked how much room it has once a second, and takes no mail from that moment on all the same:
/// what is left belongs to what is here.
#[test]
fn p6_a_leader_whose_disk_is_filled_takes_no_mail() {
    schedule(9, |world| {
        let (mut sent, mut turns) = (0, 0);
        for _ in 0..20 {
            let full = wait_leader(world)?;
            let disk = world.nodes[&full].disk.clone();
            disk.set_capacity(disk.used_bytes());
            // What is on its way is let in.
            world.go_on(Duration::from_millis(50))?;
            let last = lock(&world.ledger).mails.keys().next_back().copied().unwrap_or(0);
            // Unless somebody else leads by now, who has room, or some has come back: a segment was given back.
            let is_short = |world: &World| {
                let free = world.running().get(&full).and_then(|node| {
                    world.nodes[&full].within(world.now(), || node.cluster.space().free_bytes)
                });
                free.is_some_and(|free| free < relay::RESERVE_BYTES / 2)
            };
            let mut is_full = is_short(world);
            for _ in 0..20 {
                world.go_on(Duration::from_millis(20))?;
                is_full &= is_short(world);
            }
            if is_full && leader(world) == Some(full) {
                let ledger = lock(&world.ledger);
                let since = ledger.mails.range(last + 1..);
                turns += 1;
                sent += since.clone().count();
                if let Some((number, _)) = since.clone().find(|(_, mail)| mail.told == Told::Accepted) {
                    return Err(format!("message {number} was taken by a leader without room"));
                }
            }
            disk.set_capacity(u64::MAX);
            world.wait_until(Duration::from_secs(60), "all of them", relay::is_ready)?;
            world.go_on(Duration::from_secs(2))?;
        }
        if turns < 3 || sent < 10 {
            return Err(format!("{sent} messages in {turns} turns say nothing"));
        }
        Ok(())
    });
}

/// A node misses an hour of traffic (`HOLDFAST_AWAY_SECONDS`; some minutes otherwise), and then leads.
#[test]
fn p1_a_node_that_was_away_for_long_leads() {
    let away = Duration::from_secs(number("HOLDFAST_AWAY_SECONDS").unwrap_or(60));
    schedule(3, move |world| {
        let late = 1 + wait_leader(world)? % NODES;
        world.kill(late, true);
        world.go_on(away)?;
        world.boot(late);
        world.wait_until(Duration::from_secs(60), "all of them", relay::is_ready)?;
        let first = wait_leader(world)?;
        // Until it takes over: one that lags is not handed anything.
        for _ in 0..20 {
            if leader(world) == Some(late) {
                break;
            }
            let now = wait_leader(world)?;
            world.order(now, Order::HandOver(late));
            world.go_on(Duration::from_secs(2))?;
        }
        if leader(world) != Some(late) {
            return Err(format!("node {late} does not lead: {}", judge::standing(world)));
        }
        // Alone with the one that led least.
        world.kill(first, false);
        world.go_on(Duration::from_secs(20))?;
        world.boot(first);
        Ok(())
    });
}

/// A node that is told to stop first ends what it has begun, though customers take their time with their replies: nothing comes twice for it.
#[test]
fn p4_a_stop_ends_what_is_past_its_dot() {
    let summary = schedule(4, |world| {
        for _ in 0..8 {
            let old = wait_leader(world)?;
            world.stops.insert(old);
            world.order(old, Order::Stop);
            world.wait_until(Duration::from_secs(40), "the end of a node", |world| {
                !world.nodes[&old].is_up()
            })?;
            world.boot(old);
            world.wait_until(Duration::from_secs(30), "all of them", relay::is_ready)?;
        }
        Ok(())
    });
    assert!(summary.repeated <= summary.ambiguous, "{summary}");
}

/// A node whose log is damaged gets the state from its leader while mail is settled all the time: what it still lacks when it asks may
/// have been handed off and erased meanwhile.
#[test]
fn p9_a_damaged_node_comes_back_while_mail_is_settled() {
    schedule(5, |world| {
        for turn in 0..40 {
            world.go_on(Duration::from_millis(1500))?;
            let id = world.rotten;
            world.kill(id, turn % 2 == 0);
            nemesis::damage_a_header(world, id);
            world.boot(id);
            world.wait_until(Duration::from_secs(60), "all of them", relay::is_ready)?;
        }
        Ok(())
    });
}

/// A node dies in the middle of a snapshot, and a body of it is damaged. Nothing needs that body: the snapshot is sent again. When the node
/// is back its message is settled, and nobody has it any more.
#[test]
fn p9_a_snapshot_that_was_cut_short_leaves_nothing_to_mend() {
    schedule(6, |world| {
        let late = 1 + wait_leader(world)? % NODES;
        let seconds = Duration::from_secs;
        for away in customers::addresses().skip(1) {
            world.others.get_mut(&away).ok_or("a customer")?.kill(true);
        }
        world.kill(late, true);
        // More than entries are kept for it.
        world.go_on(seconds(20))?;
        let had: BTreeSet<u64> = world.nodes[&late].disk.marks().iter().map(|(mark, _, _)| *mark).collect();
        let slow = Link { delay: (Duration::from_millis(100), Duration::from_millis(200)), loses: 0 };
        for other in (1..=NODES).filter(|id| *id != late) {
            world.net.slow(relay::address(other), relay::address(late), slow);
        }
        world.boot(late);
        let new = |world: &World| {
            let mut marks = world.nodes[&late].disk.marks();
            marks.retain(|(mark, _, _)| !had.contains(mark));
            marks
        };
        world.wait_until(seconds(60), "a part of a snapshot", |world| new(world).len() > 20)?;
        world.kill(late, true);
        let (came, all) = (new(world), lock(&world.ledger).mails.len());
        if came.len() > all / 2 {
            return Err(format!("the snapshot may be complete: {} marks of {all} messages", came.len()));
        }
        let damaged: Vec<u64> = came.iter().take(5).map(|(mark, _, _)| *mark).collect();
        for (_, name, at) in came.iter().take(5) {
            world.nodes[&late].disk.flip(name, *at as u64, 0);
        }
        world.net.mend();
        for back in customers::addresses() {
            customers::start(world, back);
        }
        world.wait_until(seconds(120), "the end of what is damaged", |world| {
            let others = (1..=NODES).filter(|id| *id != late);
            let mut marks = others.flat_map(|id| world.nodes[&id].disk.marks());
            !marks.any(|(mark, _, _)| damaged.contains(&mark))
        })?;
        world.boot(late);
        world.wait_until(seconds(60), "all of them", relay::is_ready)
    });
}

/// A leader is told to hand over to a node that still gets what it lost. That one would refuse, and the leader, having asked, would take no
/// mail until somebody is elected: it does not ask.
#[test]
fn p5_nothing_is_handed_to_who_recovers() {
    schedule(7, |world| {
        for _ in 0..3 {
            let old = wait_leader(world)?;
            let late = world.rotten;
            if late == old {
                world.order(old, Order::HandOver(1 + late % NODES));
                world.go_on(Duration::from_secs(3))?;
                continue;
            }
            world.kill(late, true);
            nemesis::damage_a_header(world, late);
            let slow = Link { delay: (Duration::from_millis(300), Duration::from_millis(400)), loses: 0 };
            for other in (1..=NODES).filter(|id| *id != late) {
                world.net.slow(relay::address(other), relay::address(late), slow);
            }
            world.boot(late);
            world.go_on(Duration::from_millis(700))?;
            world.order(old, Order::HandOver(late));
            world.go_on(Duration::from_millis(3_000))?;
            if leader(world) != Some(old) {
                return Err(format!("node {old} does not lead any more: {}", judge::standing(world)));
            }
            world.net.mend();
            world.wait_until(Duration::from_secs(60), "all of them", relay::is_ready)?;
        }
        Ok(())
    });
}
