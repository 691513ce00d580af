//! Who else is to be heard by a node that may have forgotten something (`repair`), and what they say.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use holdfast_storage::LogPosition;

use crate::peer::client::{Local, Peer};
use crate::peer::frame::{Answer, Known, Request, Seen};

/// How long one question to a peer may take.
pub(crate) const ASK: Duration = Duration::from_secs(1);
/// Times that a membership leads to a newer one, at the most, in one round of questions.
const MEMBERSHIPS_MAX: usize = 5;

/// Who else is to be heard: the voters of the newest membership that anybody tells. The node's file may name some that were taken out long
/// ago, and its own log may be what was lost.
///
/// To hear those is enough, also if that membership is not committed yet: a node appends it only when the joint one before it is, and who
/// was elected since then, with a vote that is forgotten here, was elected by a majority of the new voters as well (Raft §6).
pub(crate) struct Others {
    local: Arc<Local>,
    /// The position of that membership; none while the file's counts, or the log's.
    at: Option<LogPosition>,
    peers: BTreeMap<u64, Peer>,
}

impl Others {
    /// Those that the node knows by itself. Must be called within the runtime.
    pub(crate) fn new(local: Arc<Local>, peers: BTreeMap<u64, Peer>) -> Others {
        Others { local, at: None, peers }
    }

    /// Hears who they are, as far as anybody tells.
    async fn look(&mut self) {
        for _ in 0..MEMBERSHIPS_MAX {
            let asks = self.peers.values().map(|peer| peer.ask(Request::Members, Vec::new(), ASK));
            let answers = futures_util::future::join_all(asks).await.into_iter();
            let told = answers.filter_map(|answer| match answer {
                Ok((Answer::Members(known), _)) => Some(known),
                _ => None, // also one that is older than the question
            });
            let Some(newest) = newer(self.local.id, self.at, told) else { return };
            let others = newest.voters.into_iter().filter(|(id, _)| *id != self.local.id);
            let peer = |(id, address)| (id, Peer::new(self.local.clone(), id, address));
            self.peers = others.map(peer).collect();
            self.at = newest.at;
        }
    }

    /// This node's own id.
    pub(crate) fn own(&self) -> u64 {
        self.local.id
    }

    /// How many they are.
    pub(crate) fn count(&self) -> usize {
        self.peers.len()
    }

    /// Asks all of them at once what they know.
    pub(crate) async fn ask(&mut self) -> BTreeMap<u64, Seen> {
        self.look().await;
        ask(&self.peers).await
    }
}

/// The newest of the memberships that are told, if it is newer than `at` and this node is one of it.
fn newer(own: u64, at: Option<LogPosition>, told: impl Iterator<Item = Known>) -> Option<Known> {
    told.filter(|known| known.at > at && known.voters.contains_key(&own)).max_by_key(|known| known.at)
}

/// Asks all peers at once.
pub(crate) async fn ask(peers: &BTreeMap<u64, Peer>) -> BTreeMap<u64, Seen> {
    let asks = peers.iter().map(|(id, peer)| async move {
        match peer.ask(Request::Seen, Vec::new(), ASK).await {
            Ok((Answer::Seen(seen), _)) => Some((*id, seen)),
            _ => None, // also one that has nothing, since it was wiped
        }
    });
    futures_util::future::join_all(asks).await.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use holdfast_storage::{LogIndex, Term};

    use super::*;

    fn at(index: u64) -> LogPosition {
        LogPosition { term: Term(1), index: LogIndex(index) }
    }

    #[test]
    fn p1_the_newest_membership_says_who_is_heard() {
        let known = |index, ids: &[u64]| Known {
            at: Some(at(index)),
            voters: ids.iter().map(|id| (*id, String::new())).collect(),
        };
        let ids = |found: Option<Known>| found.map(|known| known.voters.into_keys().collect::<Vec<_>>());
        let told = [known(5, &[1, 2, 3]), known(9, &[1, 2, 4]), known(7, &[1, 2, 3, 4])];
        assert_eq!(ids(newer(1, None, told.clone().into_iter())), Some(vec![1, 2, 4]));
        assert_eq!(ids(newer(1, Some(at(9)), told.clone().into_iter())), None, "nothing is newer");
        // A node that was taken out hears those whom it knew.
        assert_eq!(ids(newer(3, None, told.into_iter())), Some(vec![1, 2, 3, 4]));
    }
}
