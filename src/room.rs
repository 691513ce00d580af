//! Room on the disks of a cluster, as its leader sees it: new mail is taken only while nodes on which it could be placed have room for
//! it, and whoever has the least of it does not lead.
//!
//! | the leader | others | then |
//! | --- | --- | --- |
//! | has room | enough to place a message | mail is taken |
//! | has room | too few | new mail gets 452; what is here is delivered and erased |
//! | has less than its reserve | one with twice that | it hands leadership over once nothing is in a transaction |
//! | has less than its reserve | none | new mail gets 452 |
//!
//! A follower without room takes no bodies and goes on: settlements of what it has still reach it, since entries of settled messages
//! carry none (`cluster`, peer/server).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_cluster::Cluster;
use holdfast_cluster::placement::{Placement, is_placed};

use crate::clock;
use crate::deliver::leader::Delivery;
use crate::queue::Queue;

/// Pause between looks.
const LOOK: Duration = Duration::from_secs(1);
/// Leadership is handed over for want of room no more often than this.
const HAND_OVER_EVERY: Duration = Duration::from_secs(30);
/// How long transactions may take to end before leadership is handed over.
const DRAIN: Duration = Duration::from_secs(10);

/// What a member has said of its disk.
#[derive(Clone, Debug)]
struct Disk {
    placement: Placement,
    /// Free octets; `None` while it does not answer.
    free: Option<u64>,
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
    // One that does not answer is no question of room: without a quorum the reply is another one.
    let roomy: Vec<&Disk> =
        disks.values().filter(|disk| disk.free.is_none_or(|free| free >= reserve)).collect();
    let is_roomy = disks.get(&own).is_some_and(|disk| has(disk, reserve));
    let takes_mail =
        is_roomy && roomy.len() > disks.len() / 2 && is_placed(roomy.iter().map(|disk| &disk.placement));
    let others = disks.iter().filter(|(id, disk)| **id != own && has(disk, reserve.saturating_mul(2)));
    let roomiest = others.max_by_key(|(_, disk)| disk.free).map(|(id, _)| *id);
    Decision { takes_mail, hand_over_to: roomiest.filter(|_| !is_roomy) }
}

/// Looks for as long as the node runs.
pub async fn run(cluster: Cluster, queue: Arc<Mutex<Queue>>, delivery: Arc<Delivery>, reserve: u64) {
    let mut handed_over = None;
    loop {
        tokio::time::sleep(LOOK).await;
        if cluster.leading().is_none() {
            continue;
        }
        let members = cluster.report().await.nodes;
        let disk = |(member, report): (holdfast_cluster::Member, Option<holdfast_cluster::NodeReport>)| {
            Disk { placement: member.placement, free: report.map(|report| report.disk_free_bytes) }
        };
        let disks = members.into_iter().map(|(id, about)| (id, disk(about))).collect();
        let Decision { takes_mail, hand_over_to } = decide(cluster.id(), &disks, reserve);
        queue.lock().unwrap_or_else(PoisonError::into_inner).set_takes_mail(takes_mail);
        let now = clock::now();
        let Some(to) = hand_over_to.filter(|_| handed_over.is_none_or(|at| now >= at + HAND_OVER_EVERY))
        else {
            continue;
        };
        handed_over = Some(now);
        tracing::warn!(to, "too little room here: handing leadership over");
        delivery.drain(DRAIN).await;
        if !cluster.hand_over(Some(to), DRAIN).await {
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
        (1..).zip(free).map(|(id, free)| (id, Disk { placement: label(id), free })).collect()
    }

    #[test]
    fn the_table() {
        for (free, takes_mail, hand_over_to) in [
            ([Some(500), Some(500), Some(500)], true, None),
            ([Some(500), Some(10), Some(500)], true, None),
            ([Some(500), None, Some(500)], true, None),
            ([Some(500), Some(10), Some(10)], false, None),
            ([Some(500), None, Some(10)], true, None),
            ([Some(500), None, None], true, None),
            ([Some(10), Some(500), Some(700)], false, Some(3)),
            ([Some(10), Some(150), None], false, None),
            ([Some(10), Some(10), Some(10)], false, None),
        ] {
            let decision = decide(1, &disks(free), 100);
            assert_eq!(decision, Decision { takes_mail, hand_over_to }, "{free:?}");
        }
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
