//! A node's part in the cluster, as the layers above use it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bincode::{Decode, Encode};
use holdfast_storage::index::Standing;
use holdfast_storage::seal::KeyId;
use holdfast_storage::{Bytes, Log, LogIndex, ReadError, Rows, ScrubReport, SpaceReport, Term};
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use tokio::sync::watch;

use crate::clock;
use crate::durability::{Frontier, Gate};
use crate::lease::{FinalDotPermit, Lease};
use crate::machine::{Machine, Refusal};
use crate::peer::client::{Local, Peer};
use crate::peer::frame::{Answer, Known, Request};
use crate::placement::{Member, is_placed};
use crate::read_index::ReadIndex;
use crate::state_machine::StateMachine;
use crate::transfer::{Arriving, Transfers};
use crate::types::{Raft, position};

/// The role of a node that follows, or would if anybody led, and has all that it missed.
pub const FOLLOWER: &str = "follower";
/// The role of a node that lacks what it lost, or has not yet applied again what it has: others are not to rely on it.
pub const RECOVERING: &str = "recovering";

/// What a node says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct NodeReport {
    /// Its id.
    pub id: u64,
    /// `leader`, [`FOLLOWER`], `learner`, or [`RECOVERING`].
    pub role: String,
    /// Its term.
    pub term: u64,
    /// Whom it follows.
    pub leader: Option<u64>,
    /// Last index of its log.
    pub last_index: Option<u64>,
    /// Last index it applied.
    pub applied_index: Option<u64>,
    /// Last index that it no longer keeps.
    pub floor_index: Option<u64>,
    /// Free octets on its disk.
    pub disk_free_bytes: u64,
    /// Octets of live bodies in its log.
    pub live_body_bytes: u64,
    /// Octets of its segments.
    pub held_bytes: u64,
    /// Octets of its segments but for the one that is being written, and of what is live in those.
    pub sealed_bytes: u64,
    /// See `sealed_bytes`.
    pub sealed_live_bytes: u64,
    /// Bodies that wait to be overwritten.
    pub erase_backlog: u64,
    /// How its on-disk index is doing: `folding`, `ready` or `aside`.
    pub index: String,
    /// What the layers above say of themselves, in their own form; see [`Cluster::tell_about`].
    pub about: Vec<u8>,
}

/// What a node knows of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The leader, if one is known.
    pub leader: Option<u64>,
    /// The term.
    pub term: u64,
    /// True if no quorum is in touch.
    pub stale: bool,
    /// Members with their last report; `None` if unreachable.
    pub nodes: BTreeMap<u64, (Member, Option<NodeReport>)>,
    /// On the leader: the last index that each node has synced.
    pub matched: BTreeMap<u64, u64>,
    /// Members that vote; all others are still coming in.
    pub voters: BTreeSet<u64>,
}

/// What a peer says of itself, if it says it within a second.
async fn report_of(peer: &Peer) -> Option<NodeReport> {
    match peer.ask(Request::Status, Vec::new(), Duration::from_secs(1)).await {
        Ok((Answer::Status, raw)) => holdfast_storage::codec::decode::<NodeReport>("report", &raw).ok(),
        _ => None,
    }
}

pub(crate) struct Inner {
    pub(crate) id: u64,
    pub(crate) log: Arc<Log>,
    pub(crate) rows: Arc<Rows>,
    pub(crate) machine: Arc<Mutex<dyn Machine>>,
    /// A snapshot of which parts have come.
    pub(crate) arriving: tokio::sync::Mutex<Arriving>,
    pub(crate) state_machine: StateMachine,
    /// Held while a snapshot's bodies are fetched: one at a time.
    pub(crate) installing: tokio::sync::Mutex<()>,
    /// Snapshots that this node sends.
    pub(crate) transfers: Arc<Transfers>,
    pub(crate) raft: OnceLock<Raft>,
    pub(crate) gate: OnceLock<Gate>,
    /// Connections to the other members.
    pub(crate) peers: Mutex<BTreeMap<u64, Peer>>,
    /// Held while the membership is changed: one change at a time.
    pub(crate) changing: tokio::sync::Mutex<()>,
    /// Who this node is among them.
    pub(crate) local: Arc<Local>,
    /// Members as the node file says; the membership counts once there is one.
    pub(crate) configured: BTreeMap<u64, Member>,
    /// The membership that the log told when the node started.
    pub(crate) found: Option<Known>,
    pub(crate) applied: watch::Receiver<u64>,
    pub(crate) promise: Duration,
    /// Before this time the node grants no vote: it has forgotten what it promised.
    pub(crate) votes_from: Instant,
    /// The newest term that this node led and was told to hand over.
    pub(crate) handed_over: AtomicU64,
    pub(crate) prepared: Mutex<bool>,
    pub(crate) starts: u64,
    /// Set once this node has all that it needs.
    pub(crate) is_whole: AtomicBool,
    /// As of when its state lacks nothing.
    pub(crate) read_index: Mutex<ReadIndex>,
    /// What the layers above say of themselves.
    pub(crate) about: OnceLock<About>,
    /// Room that is kept for draining.
    pub(crate) reserve_bytes: u64,
}

impl Inner {
    /// Whether there is room for what a leader proposes or sends: so many octets of bodies that bring more into the queue, and of others, such as
    /// notices. The first leave half of the reserve to what drains the queue, which leaves a segment to what the node itself must write.
    pub(crate) fn has_room_for(&self, more: u64, draining: u64) -> bool {
        let keep = if more > 0 { self.reserve_bytes / 2 } else { 0 };
        self.log.free_bytes() >= more + draining + keep.max(self.log.segment_bytes())
    }

    /// Whether the state still needs the body of an entry.
    pub(crate) fn is_needed(&self, index: LogIndex) -> bool {
        !self.machine.lock().unwrap_or_else(PoisonError::into_inner).owners(index, None).is_empty()
    }
}

/// See [`Cluster::tell_about`].
pub(crate) type About = Box<dyn Fn(&Cluster) -> Vec<u8> + Send + Sync>;

/// See [`Cluster::placement_watch`].
pub struct PlacementWatch(watch::Receiver<Frontier>);

impl PlacementWatch {
    /// Waits for the next change; one that came since the last call counts.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// A handle to this node's part in the cluster. Clones share it.
#[derive(Clone)]
pub struct Cluster {
    pub(crate) inner: Arc<Inner>,
}

impl Cluster {
    /// This node's id.
    pub fn id(&self) -> u64 {
        self.inner.id
    }

    /// How often this node's data directory was opened.
    pub fn starts(&self) -> u64 {
        self.inner.starts
    }

    /// Raft is there before a `Cluster` is handed out.
    pub(crate) fn raft(&self) -> &Raft {
        self.inner.raft.get().expect("set before the handle is given away")
    }

    pub(crate) fn gate(&self) -> &Gate {
        self.inner.gate.get().expect("set before the handle is given away")
    }

    /// The leader as this node knows it; may be out of date.
    pub fn leader(&self) -> Option<u64> {
        self.raft().server_metrics().borrow_watched().current_leader
    }

    pub(crate) fn peers(&self) -> BTreeMap<u64, Peer> {
        self.inner.peers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn peer(&self, id: u64) -> Option<Peer> {
        self.inner.peers.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    pub(crate) fn admit(&self, command: &[u8]) -> Result<(), Refusal> {
        self.inner.machine.lock().unwrap_or_else(PoisonError::into_inner).admit(command)
    }

    pub(crate) fn give_up(&self, command: &[u8]) {
        self.inner.machine.lock().unwrap_or_else(PoisonError::into_inner).give_up(command);
    }

    /// All members.
    pub fn members(&self) -> BTreeMap<u64, Member> {
        let metrics = self.raft().server_metrics();
        let members: BTreeMap<u64, Member> = metrics
            .borrow_watched()
            .membership_config
            .nodes()
            .map(|(id, node)| (*id, node.clone()))
            .collect();
        if members.is_empty() { self.inner.configured.clone() } else { members }
    }

    pub(crate) fn members_of(&self, ids: &[u64]) -> Vec<(u64, Member)> {
        let members = self.members();
        ids.iter().filter_map(|id| Some((*id, members.get(id)?.clone()))).collect()
    }

    /// A channel that tells how many entries this node has applied.
    pub fn applied(&self) -> watch::Receiver<u64> {
        self.inner.applied.clone()
    }

    /// The term that this node leads, if it does.
    pub fn leading(&self) -> Option<Term> {
        let metrics = self.raft().server_metrics();
        let metrics = metrics.borrow_watched();
        (metrics.state == ServerState::Leader).then(|| Term(metrics.vote.leader_id().term))
    }

    /// How far the log is placed in the term that this node leads: entries of that term beyond it may not be scheduled.
    pub fn placed(&self) -> Option<(Term, Option<LogIndex>)> {
        let Frontier { term, index } = *self.gate().frontier.borrow();
        Some((term?, index))
    }

    /// Members that vote.
    pub(crate) fn voters(&self) -> BTreeSet<u64> {
        self.raft().voter_ids().collect()
    }

    /// Something to wait with for leadership or the placed index to change.
    pub fn placement_watch(&self) -> PlacementWatch {
        PlacementWatch(self.gate().frontier.clone())
    }

    /// As leader: when this node sent the last message that a quorum answered.
    fn quorum_heard(&self) -> Option<Instant> {
        let data = self.raft().data_metrics();
        let heard = data.borrow_watched().last_quorum_acked?;
        // The clock is read before the elapsed time, so what passes in between can only make the lease shorter.
        let now = clock::now();
        now.checked_sub(openraft::Instant::elapsed(&*heard))
    }

    /// Proof that this node may deliver now: see [`Lease`].
    pub fn permit(&self) -> Option<FinalDotPermit> {
        let lease = Lease {
            leads: Some(self.leading()?),
            applied: self.applied_term(),
            handed_over: Term(self.inner.handed_over.load(Ordering::SeqCst)),
            votes: self.voters().contains(&self.inner.id),
            quorum_heard: self.quorum_heard(),
            promise: self.inner.promise,
        };
        lease.permit(clock::now())
    }

    /// How long ago this node knew of a quorum: a leader spoke to it, or a majority followed it. A node that just started gets the benefit
    /// of the doubt.
    pub fn quorum_age(&self) -> Duration {
        let voters = self.voters();
        let at = self.inner.local.contact().quorum_known(self.inner.id, &voters);
        clock::now().saturating_duration_since(at)
    }

    /// The term of the last entry that is applied here.
    pub(crate) fn applied_term(&self) -> Option<Term> {
        let metrics = self.raft().data_metrics();
        let metrics = metrics.borrow_watched();
        metrics.last_applied.map(|at| position(&at).term)
    }

    /// Whether all members together could satisfy placement at all.
    pub fn can_place(&self) -> bool {
        let (members, voters) = (self.members(), self.voters());
        let voting = members.iter().filter(|(id, _)| voters.is_empty() || voters.contains(id));
        is_placed(voting.map(|(_, m)| &m.placement))
    }

    /// The body that entry `index` brought.
    ///
    /// # Errors
    /// See [`Log::body`].
    pub fn body(&self, index: LogIndex) -> Result<Bytes, ReadError> {
        self.inner.log.body(index)
    }

    /// Room on this node's disk.
    pub fn space(&self) -> SpaceReport {
        self.inner.log.space()
    }

    /// The at-rest key that seals what this node writes, and the octets of segments that hold something which it did not seal.
    pub fn at_rest(&self) -> (Option<KeyId>, u64) {
        (self.inner.log.sealing(), self.inner.log.space().other_key_bytes)
    }

    /// How far the search for rot has come on this node, and how many bodies wait to be fetched again.
    pub fn scrubbed(&self) -> (ScrubReport, usize) {
        (self.inner.log.scrubbed(), self.inner.log.lost().len())
    }

    /// Sets what the layers above add to this node's report, once; later calls change nothing.
    pub fn tell_about(&self, about: impl Fn(&Cluster) -> Vec<u8> + Send + Sync + 'static) {
        drop(self.inner.about.set(Box::new(about)));
    }

    /// What this node says of itself.
    pub fn own_report(&self) -> NodeReport {
        // Before the metrics are borrowed: openraft waits for who holds them, and who borrows them twice waits for openraft.
        let about = self.inner.about.get().map(|about| about(self)).unwrap_or_default();
        let metrics = self.raft().metrics();
        let metrics = metrics.borrow_watched();
        let role = match metrics.state {
            ServerState::Leader => "leader",
            _ if !self.inner.is_whole.load(Ordering::Relaxed) => RECOVERING,
            ServerState::Follower | ServerState::Candidate => FOLLOWER,
            ServerState::Learner => "learner",
            _ => RECOVERING,
        };
        let space = self.inner.log.space();
        NodeReport {
            id: self.inner.id,
            role: role.into(),
            term: metrics.current_term,
            leader: metrics.current_leader,
            last_index: metrics.last_log_index,
            applied_index: metrics.last_applied.as_ref().map(|id| id.index()),
            floor_index: self.inner.log.floor().map(|at| at.index.0),
            disk_free_bytes: space.free_bytes,
            live_body_bytes: space.live_body_bytes,
            held_bytes: space.held_bytes,
            sealed_bytes: space.sealed_bytes,
            sealed_live_bytes: space.sealed_live_bytes,
            erase_backlog: self.inner.log.erase_backlog() as u64,
            index: match self.inner.rows.standing() {
                Standing::Folding => "folding",
                Standing::Ready => "ready",
                Standing::Aside => "aside",
            }
            .into(),
            about,
        }
    }

    /// What this node knows of the cluster. Asks the others, for at most a second each, all at once.
    pub async fn report(&self) -> Report {
        let own = self.own_report();
        let mut nodes = BTreeMap::new();
        let mut asks = Vec::new();
        for (id, member) in self.members() {
            if id == self.inner.id {
                nodes.insert(id, (member, Some(own.clone())));
            } else if let Some(peer) = self.peer(id) {
                asks.push(async move { (id, (member, report_of(&peer).await)) });
            } else {
                nodes.insert(id, (member, None));
            }
        }
        nodes.extend(futures_util::future::join_all(asks).await);
        let data = self.raft().data_metrics();
        let matched = data.borrow_watched().replication.as_ref().map_or_else(BTreeMap::new, |replication| {
            replication.iter().filter_map(|(id, at)| Some((*id, position(at.as_ref()?).index.0))).collect()
        });
        let stale = self.quorum_age() > Duration::from_secs(2);
        let voters = self.voters();
        Report { leader: own.leader.filter(|_| !stale), term: own.term, stale, nodes, matched, voters }
    }

    /// Hands leadership to a follower, if this node leads: to the one that is wanted, or else to the one whose log is freshest. It must
    /// have all that it missed: a leader that has asked one who refuses leads on and takes nothing. Returns whether another node leads then.
    pub async fn hand_over(&self, wanted: Option<u64>, patience: Duration) -> bool {
        let own = self.inner.id;
        let Some(term) = self.leading() else { return true };
        let mut fresh: Vec<(Option<u64>, u64)> = {
            let data = self.raft().data_metrics();
            let data = data.borrow_watched();
            let voters: BTreeSet<u64> = self.raft().voter_ids().collect();
            let fresh =
                data.replication.iter().flatten().filter(|(id, _)| **id != own && voters.contains(id));
            let fresh = fresh.filter(|(id, _)| wanted.is_none_or(|wanted| wanted == **id));
            fresh.map(|(id, at)| (at.as_ref().map(|at| at.index()), *id)).collect()
        };
        let target = loop {
            fresh.sort_unstable();
            let Some((_, id)) = fresh.pop() else { return false };
            let Some(peer) = self.peer(id) else { continue };
            if report_of(&peer).await.is_some_and(|report| report.role == FOLLOWER) {
                break id;
            }
        };
        // It may have ceased to lead meanwhile.
        if self.leading() != Some(term) {
            return self.leading().is_none();
        }
        // It is not taken back: the request may arrive whenever it likes.
        self.inner.handed_over.fetch_max(term.0, Ordering::SeqCst);
        if self.raft().trigger().transfer_leader(target).await.is_err() {
            return false;
        }
        let mut metrics = self.raft().server_metrics();
        let other_leads = async {
            while metrics.borrow_watched().current_leader.is_none_or(|l| l == own) {
                if metrics.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::time::timeout(patience, other_leads).await.is_ok()
    }
}
