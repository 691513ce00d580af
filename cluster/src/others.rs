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

/// Who else is to be heard: the voters of the newest membership that the node itself or anybody else knows. The node's file may name some that
/// were taken out long ago, and its own log may be what was lost.
///
/// To hear those is enough, also if that membership is not committed yet, and if the node is none of them: a node appends it only when the
/// joint one before it is committed, and who was elected since then, with a vote that is forgotten here, was elected by a majority of the
/// new voters as well (Raft §6).
pub(crate) struct Others {
    local: Arc<Local>,
    /// The position of that membership; none while the file's counts.
    at: Option<LogPosition>,
    peers: BTreeMap<u64, Peer>,
}

impl Others {
    /// Those that the node knows by itself: of its log, or else `peers`, of its file. Must be called within the runtime.
    pub(crate) fn new(local: Arc<Local>, found: Option<Known>, peers: BTreeMap<u64, Peer>) -> Others {
        let mut others = Others { local, at: None, peers };
        if let Some(found) = found {
            others.become_those_of(found);
        }
        others
    }

    fn become_those_of(&mut self, known: Known) {
        let others = known.voters.into_iter().filter(|(id, _)| *id != self.local.id);
        self.peers = others.map(|(id, at)| (id, Peer::new(self.local.clone(), id, at))).collect();
        self.at = known.at;
    }

    /// This node's own id.
    pub(crate) fn own(&self) -> u64 {
        self.local.id
    }

    /// They themselves.
    pub(crate) fn peers(&self) -> BTreeMap<u64, Peer> {
        self.peers.clone()
    }

    /// How many they are.
    pub(crate) fn count(&self) -> usize {
        self.peers.len()
    }

    /// Asks all of them what they know. Who does not tell which membership it knows is not heard: it may be a newer one.
    pub(crate) async fn ask(&mut self) -> BTreeMap<u64, Seen> {
        for _ in 0..MEMBERSHIPS_MAX {
            let seen = ask(&self.peers).await;
            // Asked after that, so that whatever they knew then is told.
            let told = memberships(&self.peers).await;
            match newer(self.at, told.values()) {
                Some(newest) => self.become_those_of(newest),
                None => return seen.into_iter().filter(|(id, _)| told.contains_key(id)).collect(),
            }
        }
        BTreeMap::new()
    }
}

/// The newest of the memberships that are told, if it is newer than `at`.
fn newer<'k>(at: Option<LogPosition>, told: impl Iterator<Item = &'k Known>) -> Option<Known> {
    told.filter(|known| known.at > at).max_by_key(|known| known.at).cloned()
}

/// Asks all peers at once which membership they know.
async fn memberships(peers: &BTreeMap<u64, Peer>) -> BTreeMap<u64, Known> {
    let asks = peers.iter().map(|(id, peer)| async move {
        match peer.ask(Request::Members, Vec::new(), ASK).await {
            Ok((Answer::Members(known), _)) => Some((*id, known)),
            _ => None,
        }
    });
    futures_util::future::join_all(asks).await.into_iter().flatten().collect()
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
        let told = [known(5, &[1, 2, 3]), known(9, &[1, 2, 4]), known(7, &[1, 2, 3, 4]), Known::default()];
        assert_eq!(ids(newer(None, told.iter())), Some(vec![1, 2, 4]));
        assert_eq!(ids(newer(Some(at(7)), told.iter())), Some(vec![1, 2, 4]));
        assert_eq!(ids(newer(Some(at(9)), told.iter())), None, "the node itself knows as much");
        assert_eq!(ids(newer(None, told[3..].iter())), None, "who knows none knows no newer one");
    }
}
