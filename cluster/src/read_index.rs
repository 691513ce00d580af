//! As of when this node's state lacks nothing that was committed (ReadIndex: Ongaro, Consensus: Bridging Theory and Practice, §6.4). What a
//! follower's leader says in passing does not tell that: a new leader does not know yet what was committed before it, one without a quorum does
//! not know what was since, and what it says may be read late. So a follower asks, and counts from when it asked.

use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::clock;
use crate::cluster::Cluster;
use crate::peer::client::Peer;
use crate::peer::frame::{Answer, Request};

/// How often a follower asks.
const EVERY: Duration = Duration::from_millis(300);
/// The same until it was answered once.
const AT_FIRST: Duration = Duration::from_millis(25);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_millis(700);

/// What is known of it.
#[derive(Debug, Default)]
pub(crate) struct ReadIndex {
    /// How many entries the leader had applied when it was asked, of which not all are known to be applied here, and when it was asked.
    told: Option<(u64, Instant)>,
    complete: Option<Instant>,
}

impl ReadIndex {
    /// The leader, asked at `asked`, had applied so many entries; this node has so many.
    pub(crate) fn told(&mut self, entries: u64, applied: u64, asked: Instant) {
        self.complete_as_of(applied);
        // The first that is waited for stays: under load there is always another one that is not applied yet.
        self.told.get_or_insert((entries, asked));
    }

    /// As of when a node that has applied so many entries lacks nothing. Nothing if it never was so.
    pub(crate) fn complete_as_of(&mut self, applied: u64) -> Option<Instant> {
        if let Some((_, asked)) = self.told.take_if(|(entries, _)| *entries <= applied) {
            self.complete = self.complete.max(Some(asked));
        }
        self.complete
    }
}

impl Cluster {
    fn read_index(&self) -> MutexGuard<'_, ReadIndex> {
        self.inner.read_index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many entries this node has applied, if it leads, nobody else can have led until now, and it knows what earlier leaders committed.
    pub(crate) fn applied_as_leader(&self) -> Option<u64> {
        let term = self.permit()?.term();
        // Last, since more is safe.
        (self.applied_term() == Some(term)).then(|| *self.inner.applied.borrow())
    }

    /// As of when this node's state lacks nothing that was committed. Nothing if that is not known since it started.
    pub fn complete_as_of(&self) -> Option<Instant> {
        let now = clock::now();
        match self.applied_as_leader() {
            Some(_) => Some(now),
            None => self.read_index().complete_as_of(*self.inner.applied.borrow()),
        }
    }
}

/// Asks the leader again and again, by a connection of its own: no bodies are in its way, and one that does not answer is given up.
pub(crate) async fn keep(cluster: Cluster) {
    let mut leader = None;
    loop {
        let asked = clock::now();
        let entries = match cluster.applied_as_leader() {
            Some(entries) => Some(entries),
            None => ask(&cluster, &mut leader).await,
        };
        let applied = *cluster.inner.applied.borrow();
        let complete = {
            let mut known = cluster.read_index();
            entries.into_iter().for_each(|entries| known.told(entries, applied, asked));
            known.complete_as_of(applied)
        };
        tokio::time::sleep(if complete.is_some() { EVERY } else { AT_FIRST }).await;
    }
}

async fn ask(cluster: &Cluster, connected: &mut Option<(u64, Peer)>) -> Option<u64> {
    let leader = cluster.leader().filter(|leader| *leader != cluster.inner.id)?;
    connected.take_if(|(id, _)| *id != leader);
    if connected.is_none() {
        let address = cluster.members().get(&leader)?.address.clone();
        *connected = Some((leader, Peer::new(cluster.inner.local.clone(), leader, address)));
    }
    let (_, peer) = connected.as_ref()?;
    match peer.ask(Request::ReadIndex, Vec::new(), PATIENCE).await {
        Ok((Answer::Applied(entries), _)) => entries,
        _ => {
            *connected = None;
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p5_a_state_is_complete_as_of_when_its_leader_had_no_more() {
        let began = clock::now();
        let at = |s| began + Duration::from_secs(s);
        let mut known = ReadIndex::default();
        assert_eq!(known.complete_as_of(100), None, "nobody has told how much there is");
        known.told(7, 3, at(1));
        assert_eq!(known.complete_as_of(6), None);
        known.told(9, 6, at(2));
        assert_eq!(known.complete_as_of(7), Some(at(1)), "it lags behind and goes on");
        known.told(12, 9, at(3));
        assert_eq!(known.complete_as_of(11), Some(at(1)));
        assert_eq!(known.complete_as_of(12), Some(at(3)));
        known.told(12, 12, at(4));
        assert_eq!(known.complete_as_of(12), Some(at(4)), "there is nothing new, and the leader says so");
        known.told(12, 12, at(2));
        assert_eq!(known.complete_as_of(12), Some(at(4)), "an answer that came late");
    }
}
