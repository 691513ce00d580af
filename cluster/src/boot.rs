//! Starting a node's part in the cluster, in this order: open the log and fold the queue from it, listen to peers, agree on a
//! first formation or find that there was one, start Raft, apply what is known to be committed, erase what is dead. Only then
//! may the node serve.
//!
//! The first formation needs every initial member present and empty: two of three wiped directories never form a new
//! cluster over the mail of the third.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use holdfast_storage::disk::Disk;
use holdfast_storage::{Identity, Log, OpenError, Options, Rows, Shelf};
use openraft::async_runtime::WatchReceiver;
use openraft::{Config, SnapshotPolicy};

use crate::clock;
use crate::cluster::{Cluster, Inner};
use crate::contact::Contact;
use crate::durability::Gate;
use crate::limits::{APPEND_ENTRIES_MAX, REQUEST};
use crate::log_store::LogStore;
use crate::machine::Machine;
use crate::membership;
use crate::net::Listener;
use crate::others::Others;
use crate::owners;
use crate::peer::client::{Local, Peer};
use crate::peer::frame::{Answer, Known, Past, Request};
use crate::peer::network::Network;
use crate::peer::server::{past, prepare, serve};
use crate::peer::tls::PeerTls;
use crate::placement::Member;
use crate::read_index;
use crate::repair;
use crate::retention::{Progress, Retention};
use crate::state_machine::{Started, StateMachine};
use crate::transfer::{self, Transfers};
use crate::types::{Raft, position};

/// What a node needs to know to take part.
pub struct Settings {
    /// The cluster's id, written by `init`.
    pub cluster: String,
    /// This node's id.
    pub id: u64,
    /// Initial members, this node included.
    pub members: BTreeMap<u64, Member>,
    /// Where to listen for peers, `HOST:PORT`.
    pub listen: String,
    /// Who this node is among its peers.
    pub tls: PeerTls,
    /// Its data directory.
    pub disk: Arc<dyn Disk>,
    /// How to run the log.
    pub log: Options,
    /// Where the index stands.
    pub index: Box<dyn Shelf>,
    /// While less than this is free on the disk there is no index; while less than half of it is, no bodies are taken from a leader.
    pub reserve_bytes: u64,
    /// Shortest and longest election timeout, ms. The lease follows from the longest.
    pub election_ms: (u64, u64),
    /// Heartbeat interval, ms.
    pub heartbeat_ms: u64,
    /// Told, with the reason, when consensus has stopped for good. The node must end.
    pub on_fatal: Box<dyn Fn(&str) + Send + Sync>,
    /// Entries that a leader keeps for a follower that is behind; beyond it the follower gets a snapshot.
    pub keep_entries: u64,
    /// The machine is checkpointed at least this often.
    pub checkpoint_after: Duration,
}

/// Why a node does not take part.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The peers' port.
    #[error("[cluster] listen = {address}: {error}; is another process listening there?")]
    Listen {
        /// The address.
        address: String,
        /// The system's answer.
        error: std::io::Error,
    },
    /// The directory is empty, and the others know this node.
    #[error(
        "the data directory is empty, but node {by} knows this node as a member with data: refusing to start. Restore the \
         directory, or remove the node from the cluster and add it under a new id"
    )]
    KnownElsewhere {
        /// Who knows it.
        by: u64,
    },
    /// The state on disk does not decode, or Raft did not start.
    #[error("{0}")]
    State(String),
}

/// Starts the node's part on a thread and a single-threaded runtime of its own. Returns when the node may serve.
///
/// # Errors
/// [`StartError`], before anything was promised to a peer.
pub fn start(settings: Settings, machine: Arc<Mutex<dyn Machine>>) -> Result<Cluster, StartError> {
    let (tell, told) = std::sync::mpsc::channel();
    let failed = |e: std::io::Error| StartError::State(format!("starting the consensus thread: {e}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    std::thread::Builder::new()
        .name("consensus".into())
        .spawn(move || {
            runtime.block_on(run(settings, machine, |started| drop(tell.send(started))));
        })
        .map_err(failed)?;
    told.recv().map_err(|_| StartError::State("the consensus thread ended".into()))?
}

/// Takes part until consensus has stopped for good, on the runtime of whoever calls it. `started` is told once, when the node may serve or
/// why it may not.
pub async fn run(
    mut settings: Settings,
    machine: Arc<Mutex<dyn Machine>>,
    started: impl FnOnce(Result<Cluster, StartError>),
) {
    let (keep_entries, checkpoint_after) = (settings.keep_entries, settings.checkpoint_after);
    let on_fatal = std::mem::replace(&mut settings.on_fatal, Box::new(|_| {}));
    let booted = boot(settings, machine).await;
    let keep = booted.as_ref().ok().cloned();
    started(booted);
    if let Some(cluster) = keep {
        let why = housekeeping(cluster, keep_entries, checkpoint_after).await;
        on_fatal(&why);
    }
}

async fn boot(settings: Settings, machine: Arc<Mutex<dyn Machine>>) -> Result<Cluster, StartError> {
    let Settings {
        cluster,
        id,
        members,
        listen,
        tls,
        disk,
        log,
        index,
        reserve_bytes,
        election_ms,
        heartbeat_ms,
        ..
    } = settings;
    let began = clock::now();
    let listener = Listener::bind(&listen)
        .await
        .map_err(|error| StartError::Listen { address: listen.clone(), error })?;
    let transfers: Arc<Transfers> = Arc::default();
    let contact = Mutex::new(Contact::new(began));
    let local = Arc::new(Local { cluster: cluster.clone(), id, tls, transfers: transfers.clone(), contact });
    let connect = |members: &BTreeMap<u64, Member>| -> BTreeMap<u64, Peer> {
        let others = members.iter().filter(|(peer, _)| **peer != id);
        others.map(|(peer, m)| (*peer, Peer::new(local.clone(), *peer, m.address.clone()))).collect()
    };
    let mut peers = connect(&members);
    let identity = Identity { cluster, node: id };
    let mut opened = Log::open(disk.clone(), identity.clone(), log.clone());
    if let Err(OpenError::Lost(damage)) = &mut opened {
        owners::name(damage, &*disk, &log.keys, &*machine.lock().unwrap_or_else(PoisonError::into_inner));
    }
    let (log, recovered) = match opened {
        Err(OpenError::Lost(damage)) if !peers.is_empty() => {
            tracing::error!(%damage, "the log is damaged; this node asks the others before it takes part");
            let others = Others::new(local.clone(), None, peers.clone());
            let reset = repair::reset(others, &damage).await;
            Log::salvage(disk, identity, log, reset)?
        }
        opened => opened?,
    };
    let log = Arc::new(log);
    let pristine = recovered.pristine;
    let committed = log.committed();
    let rows = Arc::new(Rows::new(log.clone(), Some(index), reserve_bytes));
    let (state_machine, applied) =
        StateMachine::restore(machine.clone(), log.clone(), rows.clone(), recovered.checkpoint)
            .map_err(StartError::State)?;
    // The file says who the members were; the log knows who they are.
    let (found, mut known) = members_of_log(&log, &state_machine).await;
    if known.is_empty() {
        known = members.clone();
    } else if known.keys().ne(members.keys()) || known.iter().any(|(id, m)| members[id].address != m.address)
    {
        peers = connect(&known);
    }
    let addresses = known.iter().filter(|(peer, _)| **peer != id).map(|(id, m)| (*id, m.address.clone()));
    let addresses: BTreeMap<u64, String> = addresses.collect();
    let promise = Duration::from_millis(election_ms.1);
    let cluster = Cluster {
        inner: Arc::new(Inner {
            id,
            log: log.clone(),
            rows: rows.clone(),
            arriving: tokio::sync::Mutex::default(),
            state_machine: state_machine.clone(),
            installing: tokio::sync::Mutex::default(),
            transfers,
            machine,
            raft: OnceLock::new(),
            gate: OnceLock::new(),
            peers: Mutex::new(peers.clone()),
            changing: tokio::sync::Mutex::default(),
            local: local.clone(),
            configured: members.clone(),
            found,
            applied: applied.clone(),
            promise,
            votes_from: crate::lease::votes_from(began, promise),
            handed_over: AtomicU64::new(0),
            prepared: Mutex::new(!pristine),
            starts: recovered.boots,
            is_whole: AtomicBool::new(false),
            read_index: Mutex::default(),
            about: OnceLock::new(),
            reserve_bytes,
        }),
    };
    tokio::spawn(serve(listener, local.clone(), cluster.clone()));
    tokio::spawn(transfer::give_up_quiet(cluster.clone()));
    // Not before it answers the others: two such nodes would wait for each other.
    if !pristine {
        let others = Others::new(local.clone(), cluster.inner.found.clone(), peers.clone());
        let noticed = repair::notice_loss(&cluster, others, recovered.ambiguous_tail).await;
        noticed.map_err(StartError::State)?;
    }
    let form = match past(&cluster) {
        Past::Formed(_) => false,
        Past::Pristine | Past::Prepared => formation(&cluster).await?,
    };
    repair::mend_entries(&cluster).await.map_err(StartError::State)?;
    let holds_back = recovered.kept.is_some() || cluster.inner.log.doubt().is_some();
    let config = Config {
        cluster_name: local.cluster.clone(),
        election_timeout_min: election_ms.0,
        election_timeout_max: election_ms.1,
        heartbeat_interval: heartbeat_ms,
        install_snapshot_timeout: 600_000,
        max_payload_entries: APPEND_ENTRIES_MAX,
        snapshot_policy: SnapshotPolicy::Never,
        // A follower that lost entries says so itself, and votes as if it had them (see `repair`): it gets them again.
        allow_log_reversion: Some(true),
        // Purging is ours alone; openraft's own would go behind our back.
        max_in_snapshot_log_to_keep: u64::MAX,
        enable_pre_vote: Some(true),
        enable_leader_restore: Some(false),
        enable_elect: false,
        ..Config::default()
    };
    let config = config.validate().map_err(|e| StartError::State(format!("consensus settings: {e}")))?;
    let network = Network { local };
    let raft = Raft::new(id, Arc::new(config), network, LogStore { log }, state_machine.clone())
        .await
        .map_err(|e| StartError::State(format!("starting consensus: {e}")))?;
    drop(cluster.inner.gate.set(Gate::new(raft.clone())));
    drop(cluster.inner.raft.set(raft.clone()));
    tokio::spawn(membership::follow(cluster.clone(), raft.clone(), addresses));
    tokio::spawn(membership::finish(cluster.clone()));
    if form {
        raft.initialize(members).await.map_err(|e| StartError::State(format!("first formation: {e}")))?;
    }
    // Nothing looks at the state before it is where the last known commit left it.
    if let Some(committed) = committed {
        let mut applied = applied;
        let there = applied.wait_for(|next| *next > committed.index.0);
        let there = tokio::time::timeout(Duration::from_secs(600), there).await;
        there
            .map_err(|_| StartError::State("replaying the log took too long".into()))?
            .map_err(|e| StartError::State(e.to_string()))?;
    }
    if holds_back {
        repair::catch_up(&cluster).await;
    }
    let Started { erased, applied, needed } =
        state_machine.started().await.map_err(|e| StartError::State(e.to_string()))?;
    repair::mend(&cluster, applied, &needed).await.map_err(StartError::State)?;
    cluster.inner.is_whole.store(true, Ordering::Relaxed);
    tokio::spawn(repair::watch(cluster.clone()));
    tokio::spawn(read_index::keep(cluster.clone()));
    if erased > 0 {
        tracing::info!(bodies = erased, "erasing what settled while this node was down");
        while cluster.inner.log.erase_backlog() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let votes_from = cluster.inner.votes_from;
    tokio::spawn(async move {
        tokio::time::sleep_until(votes_from.into()).await;
        raft.runtime_config().elect(true);
    });
    Ok(cluster)
}

/// The members by the last entries that say so, committed or not. Empty if the log says nothing of them.
async fn members_of_log(
    log: &Arc<Log>,
    state_machine: &StateMachine,
) -> (Option<Known>, BTreeMap<u64, Member>) {
    let (mut store, mut machine) = (LogStore { log: log.clone() }, state_machine.clone());
    let found = openraft::storage::StorageHelper::new(&mut store, &mut machine).get_membership().await;
    let Ok(found) = found else { return (None, state_machine.members()) }; // damage, which is mended later
    let known = log.committed().map(|at| at.index);
    let is_committed = found.effective().log_id().as_ref().map(|id| position(id).index) <= known;
    // One that was taken out is not asked any more, and one that may not be in yet is.
    let before = found.committed().nodes().filter(|_| !is_committed);
    let members = before.chain(found.effective().nodes()).map(|(id, member)| (*id, member.clone())).collect();
    (Known::of(found.effective()), members)
}

/// Waits until it is clear how this empty node comes into a cluster. True if it is to form one.
async fn formation(cluster: &Cluster) -> Result<bool, StartError> {
    let inner = &cluster.inner;
    let lowest = inner.configured.keys().min().copied().unwrap_or(inner.id);
    let was_prepared = || *inner.prepared.lock().unwrap_or_else(PoisonError::into_inner);
    let mut said = None;
    loop {
        let others: Vec<(u64, Peer)> = {
            let peers = inner.peers.lock().unwrap_or_else(PoisonError::into_inner);
            peers.iter().map(|(id, peer)| (*id, peer.clone())).collect()
        };
        let asks = others.iter().map(|(id, peer)| async move {
            (*id, peer.ask(Request::Past, Vec::new(), Duration::from_secs(1)).await)
        });
        let (mut empty, mut stranger) = (1, None);
        for (id, answer) in futures_util::future::join_all(asks).await {
            match answer {
                Ok((Answer::Past(Past::Pristine | Past::Prepared), _)) => empty += 1,
                Ok((Answer::Past(Past::Formed(members)), _)) if members.contains(&inner.id) => {
                    if !was_prepared() {
                        return Err(StartError::KnownElsewhere { by: id });
                    }
                    return Ok(false); // the formation that this node agreed to has happened
                }
                Ok((Answer::Past(Past::Formed(_)), _)) => stranger = Some(id),
                _ => {}
            }
        }
        if inner.id == lowest && empty == inner.configured.len() {
            let agree = others.iter().map(|(_, peer)| peer.ask(Request::Prepare, Vec::new(), REQUEST));
            let agreed = futures_util::future::join_all(agree).await;
            if agreed.iter().all(|a| matches!(a, Ok((Answer::Done, _)))) {
                prepare(cluster).await.map_err(StartError::State)?;
                return Ok(true);
            }
        }
        if was_prepared() && inner.id != lowest {
            return Ok(false); // the lowest id forms it, and this node follows
        }
        if said != Some(stranger.is_some()) {
            match stranger {
                Some(by) => tracing::info!(
                    by,
                    "there is a cluster, and this node is not one of its members: waiting for `holdfast cluster add {}`",
                    inner.id
                ),
                None => tracing::info!("waiting for all initial members: each must be present and empty"),
            }
            said = Some(stranger.is_some());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Entries applied after which the queue is checkpointed, however little time has passed.
const CHECKPOINT_ENTRIES: u64 = 20_000;
/// Pause between looks at the log.
const HOUSEKEEPING: Duration = Duration::from_millis(250);

/// Checkpoints the queue now and then, and raises the floor behind it. Ends when consensus has, with the reason.
async fn housekeeping(cluster: Cluster, keep_entries: u64, checkpoint_after: Duration) -> String {
    let raft = cluster.raft().clone();
    let retention = Retention { keep_entries, reserve_bytes: cluster.inner.reserve_bytes };
    let mut last_time = clock::now();
    let mut requested = 0;
    loop {
        tokio::time::sleep(HOUSEKEEPING.min(checkpoint_after)).await;
        let (log, purged) = {
            let metrics = raft.metrics();
            let m = metrics.borrow_watched();
            if let Err(fatal) = &m.running_state {
                return format!("consensus has stopped: {fatal}");
            }
            let next = |id: &Option<crate::types::LogId>| id.as_ref().map_or(0, |id| id.index() + 1);
            let followers = m.replication.as_ref();
            let followers = followers.map(|all| all.iter().map(|(id, at)| (*id, next(at))).collect());
            let (applied, checkpoint) = (next(&m.last_applied), next(&m.snapshot));
            (Progress { applied, checkpoint, followers }, next(&m.purged))
        };
        let now = clock::now();
        let due = log.applied >= requested + CHECKPOINT_ENTRIES
            || log.applied > requested && now >= last_time + checkpoint_after;
        if due {
            (requested, last_time) = (log.applied, now);
            if let Err(fatal) = raft.trigger().snapshot().await {
                return format!("consensus has stopped: {fatal}");
            }
        }
        let floor = retention.kept_from(&log, &cluster.inner.log.space(), &cluster.inner.transfers, now);
        if floor > purged
            && let Err(fatal) = raft.trigger().purge_log(floor - 1).await
        {
            return format!("consensus has stopped: {fatal}");
        }
    }
}
