//! Waiting until an entry is durable where it must be. One task watches what the leader knows of each node's synced log and
//! wakes those whose entry the frontier has passed.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_storage::{LogIndex, LogPosition, Term};
use openraft::async_runtime::WatchReceiver;
use tokio::sync::{mpsc, oneshot, watch};

use crate::placement::{Member, frontier};
use crate::receipt::Receipt;
use crate::types::{Raft, position};

/// The leader that was to place the entry leads no more. The entry may be placed by the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LeadershipLost;

type Waiters = BTreeMap<LogIndex, Vec<oneshot::Sender<Result<Receipt, LeadershipLost>>>>;

struct Wait {
    at: LogPosition,
    tell: oneshot::Sender<Result<Receipt, LeadershipLost>>,
}

/// How far this node's log is placed while it leads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Frontier {
    /// The term it leads, if it does.
    pub(crate) term: Option<Term>,
    /// The highest placed index.
    pub(crate) index: Option<LogIndex>,
}

/// Where to wait. Clones share the task.
#[derive(Clone)]
pub(crate) struct Gate {
    waits: mpsc::Sender<Wait>,
    pub(crate) frontier: watch::Receiver<Frontier>,
}

/// Waiters that may be on their way to the task; more wait to wait.
const WAITS_MAX: usize = 4096;
/// From this many waiters on, those that nobody waits for any more are dropped now and then.
const PRUNE_MIN: usize = 4096;

impl Gate {
    pub(crate) fn new(raft: Raft) -> Gate {
        let (waits, receiver) = mpsc::channel(WAITS_MAX);
        let (tell, frontier) = watch::channel(Frontier::default());
        tokio::spawn(run(raft, receiver, tell));
        Gate { waits, frontier }
    }

    /// Waits until the entry that this node proposed at `at` is placed.
    pub(crate) async fn placed(&self, at: LogPosition) -> Result<Receipt, LeadershipLost> {
        let (tell, told) = oneshot::channel();
        self.waits.send(Wait { at, tell }).await.map_err(|_| LeadershipLost)?;
        told.await.unwrap_or(Err(LeadershipLost))
    }
}

/// Voters and term as they are now.
fn who(raft: &Raft) -> (BTreeMap<u64, Member>, Term) {
    let server = raft.server_metrics();
    let server = server.borrow_watched();
    // Who does not vote yet, or not for much longer, is not counted on.
    let configs = server.membership_config.membership().get_joint_config();
    let voters: BTreeSet<u64> = configs.last().cloned().unwrap_or_default();
    let members = server.membership_config.nodes().filter(|(id, _)| voters.contains(id));
    let members = members.map(|(id, node)| (*id, node.clone())).collect();
    (members, Term(server.vote.leader_id().term))
}

async fn run(raft: Raft, mut waits: mpsc::Receiver<Wait>, tell: watch::Sender<Frontier>) {
    let mut data = raft.data_metrics();
    let mut server = raft.server_metrics();
    let mut waiting = Waiters::new();
    let mut known: Option<(LogIndex, Vec<u64>)> = None;
    let mut leading: Option<Term> = None;
    let (mut members, mut term) = who(&raft);
    let mut prune_at = PRUNE_MIN;
    loop {
        let mut changed = false;
        tokio::select! {
            result = data.changed() => { if result.is_err() { return } changed = true }
            result = server.changed() => {
                if result.is_err() { return }
                changed = true;
                (members, term) = who(&raft);
            }
            wait = waits.recv() => {
                let Some(wait) = wait else { return };
                if leading.is_none_or(|term| term < wait.at.term) {
                    // The metrics may lag behind the write's result.
                    changed = true;
                    (members, term) = who(&raft);
                }
                waiting.entry(wait.at.index).or_default().push(wait.tell);
                if waiting.len() >= prune_at {
                    waiting.retain(|_, waiters| {
                        waiters.retain(|w| !w.is_closed());
                        !waiters.is_empty()
                    });
                    prune_at = PRUNE_MIN.max(2 * waiting.len());
                }
            }
        }
        if changed {
            let data = data.borrow_and_update();
            match &data.replication {
                Some(replication) => {
                    if leading.replace(term).is_some_and(|old| old != term) {
                        known = None;
                    }
                    let durable: BTreeMap<u64, LogIndex> = replication
                        .iter()
                        .filter_map(|(id, at)| Some((*id, position(at.as_ref()?).index)))
                        .collect();
                    if let Some(committed) = data.cluster_committed.as_ref().map(|id| position(id).index) {
                        let now = frontier(&durable, &members, committed);
                        // The frontier never goes back within a term: what was durable stays durable.
                        if now.as_ref().map(|(i, _)| *i) > known.as_ref().map(|(i, _)| *i) {
                            known = now;
                        }
                    }
                }
                None => {
                    (leading, known) = (None, None);
                    for (_, waiters) in std::mem::take(&mut waiting) {
                        waiters.into_iter().for_each(|w| drop(w.send(Err(LeadershipLost))));
                    }
                }
            }
            tell.send_if_modified(|old| {
                let new = Frontier { term: leading, index: known.as_ref().map(|(i, _)| *i) };
                std::mem::replace(old, new) != new
            });
        }
        if let Some((index, nodes)) = &known {
            let later = waiting.split_off(&LogIndex(index.0 + 1));
            for (_, waiters) in std::mem::replace(&mut waiting, later) {
                for waiter in waiters {
                    let nodes = nodes.iter().filter_map(|id| Some((*id, members.get(id)?.clone())));
                    drop(waiter.send(Ok(Receipt::new(*index, nodes.collect()))));
                }
            }
        }
    }
}
