//! A snapshot on its way. The leader keeps the entries that its follower needs next; the follower fetches the bodies that it lacks,
//! some at a time, and does not fetch again what an attempt before this one brought.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt};
use holdfast_storage::{Bytes, LogIndex, LogPosition};
use openraft::async_runtime::WatchReceiver;

use crate::clock;
use crate::cluster::Cluster;
use crate::limits::{BODIES_IN_FLIGHT_MAX, SNAPSHOT_PART, TRANSFER_PATIENCE};
use crate::peer::client::Peer;
use crate::peer::frame::{Answer, Request};
use crate::snapshot::{Assembly, Contents, Manifest, Part};
use crate::state_machine::{Incoming, StateMachine};
use crate::types::{Raft, Snapshot, SnapshotMeta, log_id};

/// Pause between looks for a snapshot that stopped coming.
const LOOK: Duration = Duration::from_secs(1);

/// Snapshots that this node sends.
#[derive(Debug, Default)]
pub(crate) struct Transfers {
    /// By follower: the first index that is not in its snapshot, and when it was last heard of.
    under_way: Mutex<BTreeMap<u64, (u64, Instant)>>,
}

impl Transfers {
    fn under_way(&self) -> MutexGuard<'_, BTreeMap<u64, (u64, Instant)>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A snapshot of a position begins to go to a follower.
    pub(crate) fn begin(&self, to: u64, at: Option<LogPosition>) {
        let next = at.map_or(0, |at| at.index.0 + 1);
        let mut under_way = self.under_way();
        // One that was sent before may still be installed. That it is sent again is no word of the follower's.
        let (before, _) = under_way.entry(to).or_insert((next, clock::now()));
        *before = next.min(*before);
    }

    /// The follower was heard of: it still fetches, or has just installed the snapshot.
    pub(crate) fn goes_on(&self, to: u64) {
        if let Some((_, heard)) = self.under_way().get_mut(&to) {
            *heard = clock::now();
        }
    }

    /// The follower will not have it.
    pub(crate) fn end(&self, to: u64) {
        self.under_way().remove(&to);
    }

    /// None of them matters any more.
    pub(crate) fn end_all(&self) {
        self.under_way().clear();
    }

    /// Forgets followers that have so many entries, by id, if that is as many as their snapshot and no fewer than `kept_from`: what they need next is
    /// kept as for any other follower.
    pub(crate) fn forget_who_caught_up(&self, matched: &BTreeMap<u64, u64>, kept_from: u64) {
        let has_caught_up =
            |to: &u64, next: u64| matched.get(to).is_some_and(|has| *has >= next && *has >= kept_from);
        self.under_way().retain(|to, (next, _)| !has_caught_up(to, *next));
    }

    /// The first index that a follower needs next. One that was not heard of for a while is given up: it gets another snapshot when
    /// it is back.
    pub(crate) fn needed_from(&self, now: Instant) -> Option<u64> {
        let mut under_way = self.under_way();
        under_way.retain(|_, (_, heard)| now.saturating_duration_since(*heard) < TRANSFER_PATIENCE);
        under_way.values().map(|(next, _)| *next).min()
    }
}

/// A snapshot that comes in. Its rows go to the log part by part, and no checkpoint is written meanwhile.
#[derive(Default)]
pub(crate) struct Arriving {
    assembly: Assembly,
    incoming: Option<Incoming>,
    heard: Option<Instant>,
}

impl Arriving {
    /// Takes a part. The first one of another snapshot begins anew.
    ///
    /// # Errors
    /// Why it is not taken. The sender begins again.
    pub(crate) async fn part(
        &mut self,
        state_machine: &StateMachine,
        of: (u64, Option<LogPosition>),
        number: u32,
        part: Part,
    ) -> Result<(), String> {
        let rows = self.assembly.add(of, number, part)?;
        if number == 0 {
            self.incoming = None;
            self.incoming = Some(state_machine.replace().await);
        }
        self.heard = Some(clock::now());
        let incoming = self.incoming.as_mut().ok_or("it was given up meanwhile")?;
        state_machine.add_rows(incoming, rows).await.map_err(|e| e.to_string())
    }

    /// All of it, if so many parts have come.
    fn complete(&mut self, of: (u64, Option<LogPosition>), parts: u32) -> Result<Contents, String> {
        let Arriving { mut assembly, incoming, .. } = std::mem::take(self);
        let (tables, bodies) = assembly.complete(of, parts)?;
        Ok(Contents { tables, incoming: incoming.ok_or("it was given up meanwhile")?, bodies })
    }

    /// Gives up one of which nothing was heard for a while: checkpoints go on.
    pub(crate) fn give_up_quiet(&mut self, now: Instant) {
        if self.heard.is_some_and(|heard| now.saturating_duration_since(heard) > 2 * SNAPSHOT_PART) {
            *self = Arriving::default();
        }
    }
}

/// Gives up snapshots that stopped coming, also while the node starts. Ends with the node.
pub(crate) async fn give_up_quiet(cluster: Cluster) {
    loop {
        tokio::time::sleep(LOOK).await;
        cluster.inner.arriving.lock().await.give_up_quiet(clock::now());
    }
}

/// Why a snapshot cannot be installed.
pub(crate) enum NotInstalled {
    /// An earlier one still is.
    Busy,
    /// For another reason.
    Failed(String),
}

impl<T: Into<String>> From<T> for NotInstalled {
    fn from(why: T) -> NotInstalled {
        NotInstalled::Failed(why.into())
    }
}

/// Fetches the bodies that a snapshot needs and this node lacks, so that it can be installed.
///
/// # Errors
/// Why it cannot be. What was fetched stays for the next attempt. The guard is held until the snapshot is installed.
pub(crate) async fn receive<'c>(
    cluster: &'c Cluster,
    raft: &Raft,
    last: Option<LogPosition>,
    parts: u32,
    from: u64,
) -> Result<(Snapshot, tokio::sync::MutexGuard<'c, ()>), NotInstalled> {
    // One at a time: a leader that lost patience sends everything again while the first one still fetches.
    let one = cluster.inner.installing.try_lock().map_err(|_| NotInstalled::Busy)?;
    let contents = cluster.inner.arriving.lock().await.complete((from, last), parts)?;
    // The leader may have come in while this node was away: then the snapshot says where it is.
    let membership = contents.tables.membership().map_err(|e| e.to_string())?;
    let sender = membership.nodes().find(|(id, _)| **id == from).map(|(_, member)| member.address.clone());
    let local = || cluster.inner.local.clone();
    let peer = cluster.peer(from).or_else(|| Some(Peer::new(local(), from, sender?)));
    let peer = peer.ok_or("the sender of the snapshot is not a member")?;
    let known = raft.metrics().borrow_watched().last_applied.as_ref().map(|id| id.index());
    let term = last.map(|at| at.term).unwrap_or_default();
    // A body at or below what this node applied is the committed one; another may be that of an entry which was taken back.
    let is_known =
        |index: &LogIndex| known.is_some_and(|known| index.0 <= known) && cluster.inner.log.has_body(*index);
    let wanted: Vec<LogIndex> = contents.bodies.iter().copied().filter(|index| !is_known(index)).collect();
    let began = clock::now();
    let last_entry = cluster.inner.log.last().map(|at| at.index);
    let applied = *cluster.inner.applied.borrow();
    let fetches = futures_util::stream::iter(wanted).map(|index| {
        let (cluster, peer) = (cluster.clone(), peer.clone());
        async move {
            let bytes =
                fetch(&cluster, &peer, LogPosition { term, index }, is_apart(index, last_entry)).await?;
            // Another leader may feed this node by its log meanwhile, and have it settle the message that this is of.
            let now = *cluster.inner.applied.borrow();
            if now != applied && now > index.0 && !cluster.inner.is_needed(index) {
                cluster.inner.log.erase(index);
            }
            Ok::<u64, String>(bytes)
        }
    });
    let fetched = fetches.buffer_unordered(BODIES_IN_FLIGHT_MAX);
    let (fetched, bytes) = fetched
        .try_fold(
            (0u64, 0),
            |(count, sum), bytes| async move { Ok((count + u64::from(bytes > 0), sum + bytes)) },
        )
        .await?;
    tracing::info!(
        last = %last.map_or(0, |at| at.index.0),
        rows = contents.incoming.replacement.rows(),
        bodies = contents.bodies.len(),
        fetched,
        bytes,
        took_ms = clock::now().duration_since(began).as_millis() as u64,
        "the bodies of a snapshot are here"
    );
    Ok((snapshot(contents, last)?, one))
}

fn snapshot(contents: Contents, last: Option<LogPosition>) -> Result<Snapshot, String> {
    let last_membership = contents.tables.membership().map_err(|e| e.to_string())?;
    let meta = SnapshotMeta { last_log_id: last.map(log_id), last_membership };
    Ok(Snapshot { meta, snapshot: Manifest::Contents(Arc::new(Mutex::new(Some(contents)))) })
}

/// Whether a body that is here did not come with an entry of this node's log. One that did dies with its entry if the snapshot's leader has
/// another one, and openraft voids all that is not known to be committed then: it is fetched anew, whatever it is.
fn is_apart(index: LogIndex, last_entry: Option<LogIndex>) -> bool {
    last_entry.is_none_or(|last| index > last)
}

/// Brings the body of an entry here, unless it is and counts; how many octets came.
async fn fetch(cluster: &Cluster, peer: &Peer, at: LogPosition, counts: bool) -> Result<u64, String> {
    let inner = &cluster.inner;
    if let Ok((bytes, crc)) = inner.log.digest(at.index)
        && counts
    {
        match peer.ask(Request::Digest(at.index), Vec::new(), SNAPSHOT_PART).await {
            Ok((answer, _)) if answer == Answer::Digest(bytes, crc) => return Ok(0),
            Ok((Answer::Digest(..) | Answer::BodyGone, _)) => {}
            // Nothing that is here is given up for a doubt.
            Ok((answer, _)) => return Err(format!("comparing body {}: {answer:?}", at.index)),
            Err(e) => return Err(format!("comparing body {}: {e}", at.index)),
        }
    }
    match peer.ask(Request::Body(at.index), Vec::new(), SNAPSHOT_PART).await {
        Ok((Answer::Body, body)) => {
            if !inner.has_room_for(body.len() as u64, 0) {
                return Err("no room for the bodies of the snapshot".into());
            }
            let (tell, told) = tokio::sync::oneshot::channel();
            let bytes = body.len() as u64;
            let body = Bytes::copy_from_slice(&body);
            inner.log.store_body(at, body, Box::new(move |r| drop(tell.send(r))));
            told.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
            Ok(bytes)
        }
        // Settled since the snapshot was taken: a later entry says so.
        Ok((Answer::BodyGone, _)) => Ok(0),
        Ok((answer, _)) => Err(format!("fetching body {}: {answer:?}", at.index)),
        Err(e) => Err(format!("fetching body {}: {e}", at.index)),
    }
}

#[cfg(test)]
mod tests {
    use holdfast_storage::Term;
    use openraft::RaftSnapshotBuilder;
    use openraft::testing::log::StoreBuilder;

    use super::*;
    use crate::contract::Builder;

    /// P1: a snapshot of which no more parts come holds up no checkpoint for good, and its rows never count.
    #[tokio::test]
    async fn p1_a_snapshot_that_stops_coming_is_given_up() {
        let ((), store, mut state_machine) = Builder.build().await.unwrap();
        let of = (2, Some(LogPosition { term: Term(3), index: LogIndex(70) }));
        let part = Part { rows: vec![(5, vec![1; 9])], ..Part::default() };
        let mut arriving = Arriving::default();
        arriving.part(&state_machine, of, 0, part.clone()).await.unwrap();
        arriving.part(&state_machine, of, 1, part.clone()).await.unwrap();
        let soon = Duration::from_millis(100);
        assert!(tokio::time::timeout(soon, state_machine.build_snapshot()).await.is_err(), "it goes on");
        arriving.give_up_quiet(clock::now());
        assert!(
            tokio::time::timeout(soon, state_machine.build_snapshot()).await.is_err(),
            "it was just heard of"
        );
        arriving.give_up_quiet(clock::now() + 2 * SNAPSHOT_PART + soon);
        tokio::time::timeout(soon, state_machine.build_snapshot()).await.unwrap().unwrap();
        assert!(arriving.part(&state_machine, of, 2, part).await.is_err(), "it begins anew");
        assert_eq!(store.log.row_keys(None, 9), []);
    }

    #[test]
    fn what_came_with_an_entry_is_fetched_anew() {
        assert!(is_apart(LogIndex(5), None) && is_apart(LogIndex(5), Some(LogIndex(4))));
        assert!(!is_apart(LogIndex(4), Some(LogIndex(4))) && !is_apart(LogIndex(1), Some(LogIndex(4))));
    }

    #[test]
    fn p1_the_entries_behind_a_snapshot_are_kept_for_as_long_as_it_is_fetched() {
        let transfers = Transfers::default();
        let at = |index| Some(LogPosition { term: Term(1), index: LogIndex(index) });
        let now = clock::now();
        assert_eq!(transfers.needed_from(now), None);
        transfers.begin(2, at(70));
        transfers.begin(3, at(50));
        assert_eq!(transfers.needed_from(now), Some(51));
        transfers.begin(3, at(90));
        assert_eq!(transfers.needed_from(now), Some(51), "the one before may still be installed");
        let late = clock::now() + TRANSFER_PATIENCE - Duration::from_millis(1);
        assert_eq!(transfers.needed_from(late), Some(51));
        std::thread::sleep(Duration::from_millis(20));
        transfers.goes_on(2);
        let later = late + Duration::from_millis(10);
        assert_eq!(transfers.needed_from(later), Some(71), "the other is given up");
        assert_eq!(transfers.needed_from(later + TRANSFER_PATIENCE), None);
    }
}
