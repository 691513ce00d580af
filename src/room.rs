//! Room on the disks of a cluster, as its leader sees it: new mail is taken only while nodes on which it could be placed have room for
//! it, and whoever has the least of it does not lead.
//!
//! | the leader | others | then |
//! | --- | --- | --- |
//! | has room | all that answer have room | mail is taken |
//! | has room | some are short; those that answer and have room are enough to place a message | mail is taken |
//! | has room | some are short; too few others answer | new mail gets 452; what is here is delivered and erased |
//! | has less than its reserve | one with a quarter more than that, whose log is as long | it hands leadership over once nothing is in a transaction |
//! | has less than its reserve | none | new mail gets 452 |
//!
//! A follower without room takes no bodies and goes on: settlements of what it has still reach it, since entries of settled messages
//! carry none (`cluster`, peer/server).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_cluster::placement::{Placement, is_placed};
use holdfast_cluster::{Cluster, FOLLOWER};

use crate::clock;
use crate::deliver::leader::Delivery;
use crate::queue::Queue;

/// Pause between looks.
const LOOK: Duration = Duration::from_secs(1);
/// Leadership is handed over for want of room no more often than this.
const HAND_OVER_EVERY: Duration = Duration::from_secs(30);
/// Entries by which the next leader may lag.
const LAG_MAX: u64 = 1000;
/// How long transactions may take to end before leadership is handed over.
const DRAIN: Duration = Duration::from_secs(10);

/// What a member has said of its disk.
#[derive(Clone, Debug)]
struct Disk {
    placement: Placement,
    /// Free octets; `None` while it does not answer.
    free: Option<u64>,
    /// Whether it follows, with nearly all that the leader has: one that lags cannot take over, and a transfer is not taken back.
    can_lead: bool,
}

/// What to do about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Decision {
    /// Whether new mail can be placed.
    takes_mail: bool,
    /// Who should lead instead.
    hand_over_to: Option<u64>,
}

fn decide(own: u64, disks: &BTreeMap<u64, Disk>, reserve: u64) -> Decision {
    let has = |disk: &Disk, bytes: u64| disk.free.is_some_and(|free| free >= bytes);
    let is_short = |disk: &Disk| disk.free.is_some_and(|free| free < reserve);
    let roomy: Vec<&Disk> = disks.values().filter(|disk| has(disk, reserve)).collect();
    let is_roomy = disks.get(&own).is_some_and(|disk| has(disk, reserve));
    // Where nobody is short it is no question of room: without a quorum the reply is another one. A short one that is needed would
    // refuse the bodies, and all that comes behind them in the log would wait.
    let placeable = roomy.len() > disks.len() / 2 && is_placed(roomy.iter().map(|disk| &disk.placement));
    let takes_mail = is_roomy && (placeable || !disks.values().any(is_short));
    let enough = reserve.saturating_add(reserve / 4);
    let others = disks.iter().filter(|(id, disk)| **id != own && disk.can_lead && has(disk, enough));
    let roomiest = others.max_by_key(|(_, disk)| disk.free).map(|(id, _)| *id);
    Decision { takes_mail, hand_over_to: roomiest.filter(|_| !is_roomy) }
}

/// Looks for as long as the node runs.
pub async fn run(cluster: Cluster, queue: Arc<Mutex<Queue>>, delivery: Arc<Delivery>, reserve: u64) {
    let mut handed_over = None;
    let set_takes_mail = |takes_mail| {
        queue.lock().unwrap_or_else(PoisonError::into_inner).set_takes_mail(takes_mail);
    };
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(term) = cluster.leading() else {
            set_takes_mail(true); // that is the leader's to say
            continue;
        };
        let report = cluster.report().await;
        if cluster.leading() != Some(term) {
            continue;
        }
        let last = report.matched.values().max().copied().unwrap_or(0);
        // Who is still coming in counts for nothing.
        let voters = report.voters;
        let nodes = report.nodes.into_iter().filter(|(id, _)| voters.contains(id));
        let disks = nodes.map(|(id, (member, node))| {
            let matched = report.matched.get(&id).copied().unwrap_or(0);
            let follows = node.as_ref().is_some_and(|node| node.role == FOLLOWER);
            let can_lead = follows && matched + LAG_MAX >= last;
            let free = node.map(|node| node.disk_free_bytes);
            (id, Disk { placement: member.placement, free, can_lead })
        });
        let Decision { takes_mail, hand_over_to } = decide(cluster.id(), &disks.collect(), reserve);
        set_takes_mail(takes_mail);
        let now = clock::now();
        let Some(to) = hand_over_to.filter(|_| handed_over.is_none_or(|at| now >= at + HAND_OVER_EVERY))
        else {
            continue;
        };
        handed_over = Some(now);
        tracing::warn!(to, "too little room here: handing leadership over");
        // A transaction that does not end would be begun again by the next leader: then rather later.
        if !delivery.drain(DRAIN).await || !cluster.hand_over(Some(to), DRAIN).await {
            tracing::warn!(to, "leadership was not handed over");
        }
        delivery.resume();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(free: [Option<u64>; 3]) -> BTreeMap<u64, Disk> {
        let label =
            |n: u64| Placement { datacenter: "dc".into(), power: format!("p{n}"), network: format!("n{n}") };
        (1..).zip(free).map(|(id, free)| (id, Disk { placement: label(id), free, can_lead: true })).collect()
    }

    #[test]
    fn the_table() {
        for (free, takes_mail, hand_over_to) in [
            ([Some(500), Some(500), Some(500)], true, None),
            ([Some(500), Some(10), Some(500)], true, None),
            ([Some(500), None, Some(500)], true, None),
            ([Some(500), Some(10), Some(10)], false, None),
            ([Some(500), None, Some(10)], false, None),
            ([Some(500), None, Some(500)], true, None),
            ([Some(500), None, None], true, None),
            ([Some(10), Some(500), Some(700)], false, Some(3)),
            ([Some(10), Some(120), None], false, None),
            ([Some(10), Some(125), None], false, Some(2)),
            ([Some(10), Some(10), Some(10)], false, None),
        ] {
            let decision = decide(1, &disks(free), 100);
            assert_eq!(decision, Decision { takes_mail, hand_over_to }, "{free:?}");
        }
    }

    #[test]
    fn who_lags_does_not_lead() {
        let mut disks = disks([Some(10), Some(500), Some(700)]);
        assert_eq!(decide(1, &disks, 100).hand_over_to, Some(3));
        disks.get_mut(&3).unwrap().can_lead = false;
        assert_eq!(decide(1, &disks, 100).hand_over_to, Some(2));
    }

    /// P2: room on nodes that share a power feed is no room.
    #[test]
    fn p2_room_counts_where_a_message_could_be_placed() {
        let mut disks = disks([Some(500), Some(500), Some(10)]);
        assert!(decide(1, &disks, 100).takes_mail);
        disks.get_mut(&2).unwrap().placement.power = "p1".into();
        assert!(!decide(1, &disks, 100).takes_mail);
    }
}
