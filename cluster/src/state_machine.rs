//! openraft's state machine over the queue's: applies, checkpoints to the log, and hands out and installs snapshots.
//!
//! A crash at the worst moment leaves the checkpoint before; entries after it are applied again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::{Stream, StreamExt};
use holdfast_storage::codec::{decode_large, encode};
use holdfast_storage::{Checkpoint, Completion, Log, LogIndex, LogPosition, ReadError, Replacement, Rows};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use tokio::sync::{OwnedMutexGuard, oneshot, watch};

use crate::blocking;
use crate::codec::Tables;
use crate::machine::{Delta, Machine, Steps, Whole};
use crate::placement::Member;
use crate::snapshot::{Assembly, Contents, Manifest, Part, Parts};
use crate::types::{LogId, Outcome, Snapshot, SnapshotMeta, StoredMembership, TypeConfig, position};

/// How far the machine has come.
#[derive(Clone, Default)]
pub(crate) struct Progress {
    pub(crate) applied: Option<LogId>,
    pub(crate) membership: StoredMembership,
}

/// What a start has found of bodies.
#[derive(Default)]
pub(crate) struct Started {
    /// How many nobody needs; they are being erased.
    pub(crate) erased: usize,
    /// The position of the state.
    pub(crate) applied: Option<LogPosition>,
    /// Bodies that the state needs.
    pub(crate) needed: BTreeSet<LogIndex>,
}

/// Clones share the machine.
#[derive(Clone)]
pub(crate) struct StateMachine {
    machine: Arc<Mutex<dyn Machine>>,
    log: Arc<Log>,
    rows: Arc<Rows>,
    /// One checkpoint at a time, from the machine's delta to the log's completion: a snapshot never comes in between.
    checkpointing: Arc<tokio::sync::Mutex<()>>,
    /// Changed under the machine's lock only, so that rows and position agree.
    progress: Arc<Mutex<Progress>>,
    applied: watch::Sender<u64>,
    /// While the node starts: the checkpoint from which it did. openraft asks for that position only, and gives back the log up to there;
    /// what was applied again since is in no checkpoint yet.
    starting: Arc<Mutex<Option<SnapshotMeta>>>,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StateMachine {
    /// The machine as a checkpoint left it, and a channel that tells the last applied index plus one.
    ///
    /// # Errors
    /// If the checkpoint does not decode: version skew.
    pub(crate) fn restore(
        machine: Arc<Mutex<dyn Machine>>,
        log: Arc<Log>,
        rows: Arc<Rows>,
        checkpoint: Option<holdfast_storage::log::RecoveredCheckpoint>,
    ) -> Result<(StateMachine, watch::Receiver<u64>), String> {
        let mut progress = Progress::default();
        lock(&*machine).attach(rows.clone());
        if let Some(found) = checkpoint {
            let tables: Tables = decode_large("tables", &found.tables).map_err(|e| e.to_string())?;
            progress.membership = tables.membership().map_err(|e| e.to_string())?;
            progress.applied = Some(crate::types::log_id(found.applied));
            // It is noted with the next batch that an entry was committed: that note may be lost, and this one is not.
            log.save_committed(log.committed().map_or(found.applied, |known| known.max(found.applied)));
            let reading = lock(&*machine).reading();
            let state = reading(&tables.machine)?;
            lock(&*machine).restore(state);
        }
        let starting = Arc::new(Mutex::new(Some(Self::meta(&progress))));
        let next = progress.applied.map_or(0, |id| id.index() + 1);
        let (applied, watch) = watch::channel(next);
        let state_machine = StateMachine {
            machine,
            log,
            rows,
            checkpointing: Arc::default(),
            progress: Arc::new(Mutex::new(progress)),
            applied,
            starting,
        };
        Ok((state_machine, watch))
    }

    /// Start-up is over: every body that the state does not need is erased, and snapshots may be sent.
    ///
    /// # Errors
    /// If the state cannot be read.
    pub(crate) async fn started(&self) -> Result<Started, io::Error> {
        let (_one, progress, whole) = self.whole().await;
        let needed = blocking(move || needed(whole.steps)).await?.map_err(io::Error::other)?;
        *lock(&self.starting) = None;
        let Some(applied) = progress.applied.as_ref().map(position) else { return Ok(Started::default()) };
        let erased = self.log.erase_all_but(&needed, applied.index);
        Ok(Started { erased, applied: Some(applied), needed })
    }

    /// The state of another store of this very process, as a snapshot that came in.
    async fn copy(&self, other: &StateMachine) -> Result<Contents, io::Error> {
        let (at, mut sending) = other.snapshot().await;
        let (mut assembly, mut rows, mut count) = (Assembly::default(), Vec::new(), 0);
        while let Some(part) = sending.next().await? {
            rows.extend(assembly.add((0, at), count, part).map_err(io::Error::other)?);
            count += 1;
        }
        drop(sending);
        let (tables, bodies) = assembly.complete((0, at), count).map_err(io::Error::other)?;
        let mut incoming = self.replace().await;
        self.add_rows(&mut incoming, rows).await?;
        Ok(Contents { tables, incoming, bodies })
    }

    /// Begins to take in a snapshot's rows. While that is there no checkpoint is completed; if it is dropped, they do not count.
    pub(crate) async fn replace(&self) -> Incoming {
        let one = self.checkpointing.clone().lock_owned().await;
        Incoming { replacement: self.log.replace(), _one: one }
    }

    /// Writes rows of a snapshot to the log. They count once it is installed.
    pub(crate) async fn add_rows(
        &self,
        to: &mut Incoming,
        rows: Vec<(u128, Vec<u8>)>,
    ) -> Result<(), io::Error> {
        durable(|done| self.log.add_rows(&mut to.replacement, rows, done)).await
    }

    /// The members, as far as entries were applied.
    pub(crate) fn members(&self) -> BTreeMap<u64, Member> {
        let progress = lock(&self.progress);
        progress.membership.nodes().map(|(id, member)| (*id, member.clone())).collect()
    }

    /// The position of the last entry that was applied.
    pub(crate) fn position(&self) -> Option<LogPosition> {
        lock(&self.progress).applied.as_ref().map(position)
    }

    /// A snapshot of now, and its position.
    pub(crate) async fn snapshot(&self) -> (Option<LogPosition>, Sending) {
        let (one, progress, Whole { tables, steps }) = self.whole().await;
        let tables = Tables::new(&progress.membership, tables);
        let parts = Some(Parts::new(&tables, steps));
        (progress.applied.as_ref().map(position), Sending { parts, _one: one })
    }

    /// The whole state and its position. It is to be read on a thread of its own, while commands are applied; no checkpoint is
    /// completed as long as the guard is there.
    async fn whole(&self) -> (OwnedMutexGuard<()>, Progress, Whole) {
        let one = self.checkpointing.clone().lock_owned().await;
        let machine = lock(&*self.machine);
        (one, lock(&self.progress).clone(), machine.whole())
    }

    fn meta(progress: &Progress) -> SnapshotMeta {
        SnapshotMeta { last_log_id: progress.applied, last_membership: progress.membership.clone() }
    }

    async fn write_checkpoint(&self, checkpoint: Checkpoint) -> Result<(), io::Error> {
        let gone = checkpoint.gone.clone();
        durable(|done| self.log.checkpoint(checkpoint, done)).await?;
        let spilled = lock(&*self.machine).checkpointed();
        self.rows.gone(gone);
        self.rows.spilled(spilled);
        Ok(())
    }
}

/// Rows of another node's snapshot that are in the log and do not count yet.
pub(crate) struct Incoming {
    pub(crate) replacement: Replacement,
    _one: OwnedMutexGuard<()>,
}

/// Waits until what the log was asked for is durable.
async fn durable(ask: impl FnOnce(Completion)) -> Result<(), io::Error> {
    let (tell, told) = oneshot::channel();
    ask(Box::new(move |result| drop(tell.send(result))));
    match told.await {
        Ok(result) => result.map_err(io::Error::other),
        Err(_) => Err(io::Error::other("the log has closed")),
    }
}

/// Bodies that a state needs.
fn needed(steps: Steps) -> Result<BTreeSet<LogIndex>, ReadError> {
    let mut needed = BTreeSet::new();
    for step in steps {
        needed.extend(step?.bodies);
    }
    Ok(needed)
}

/// A snapshot that is read part by part as it is sent. While it is there no checkpoint is completed.
pub(crate) struct Sending {
    /// None once something went wrong.
    parts: Option<Parts>,
    _one: OwnedMutexGuard<()>,
}

impl Sending {
    /// The next part.
    pub(crate) async fn next(&mut self) -> Result<Option<Part>, io::Error> {
        let mut parts = self.parts.take().ok_or_else(|| io::Error::other("the state could not be read"))?;
        let (parts, part) = blocking(move || {
            let part = parts.next();
            (parts, part)
        })
        .await?;
        self.parts = Some(parts);
        part.transpose().map_err(io::Error::other)
    }
}

impl RaftSnapshotBuilder<TypeConfig> for StateMachine {
    type SnapshotData = Manifest;

    /// Writes a checkpoint to the log: what lives longer than the time between two of them is spilled by it.
    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let _one = self.checkpointing.lock().await;
        let (delta, progress) = {
            let mut machine = lock(&*self.machine);
            (machine.delta(), lock(&self.progress).clone())
        };
        let Some(applied) = progress.applied else {
            return Ok(Snapshot { meta: Self::meta(&progress), snapshot: Manifest::None });
        };
        let Delta { rows, gone, tables } = delta;
        let tables = encode(&Tables::new(&progress.membership, tables));
        let applied = position(&applied);
        self.write_checkpoint(Checkpoint { applied, rows, gone, tables }).await?;
        Ok(Snapshot { meta: Self::meta(&progress), snapshot: Manifest::None })
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = Manifest;
    type SnapshotBuilder = StateMachine;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let progress = lock(&self.progress);
        Ok((progress.applied, progress.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let index = entry.log_id.index();
            let mut outcome = Vec::new();
            {
                let mut machine = lock(&*self.machine);
                let mut progress = lock(&self.progress);
                match entry.payload {
                    EntryPayload::Blank => {}
                    EntryPayload::Normal(proposal) => {
                        let at = position(&entry.log_id);
                        let applied = machine.apply(at, &proposal.command, proposal.body.len() as u32);
                        let applied = applied.map_err(io::Error::other)?;
                        applied.erase.into_iter().for_each(|index| self.log.erase(index));
                        outcome = applied.outcome;
                    }
                    EntryPayload::Membership(membership) => {
                        progress.membership = StoredMembership::new(Some(entry.log_id), membership);
                    }
                }
                progress.applied = Some(entry.log_id);
            }
            self.applied.send_replace(index + 1);
            if let Some(responder) = responder {
                responder.send(Outcome(outcome));
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> StateMachine {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Manifest) -> Result<(), io::Error> {
        let Some(applied) = meta.last_log_id else { return Ok(()) };
        let contents = match snapshot {
            Manifest::Contents(contents) => lock(&contents).take(),
            Manifest::Here(other) => Some(self.copy(&other).await?),
            Manifest::None => None,
        };
        let contents = contents.ok_or_else(|| io::Error::other("a snapshot without contents"))?;
        let Contents { tables, incoming: Incoming { replacement, _one }, bodies } = contents;
        // First the log has it, then the machine: rows are read from the log alone.
        let at = position(&applied);
        let encoded = encode(&tables);
        durable(|done| self.log.end_replacement(replacement, at, &encoded, done)).await?;
        // All rows are read: neither the machine nor this thread, on which heartbeats are answered, is held up by that.
        let reading = lock(&*self.machine).reading();
        let state = blocking(move || reading(&tables.machine)).await?.map_err(io::Error::other)?;
        {
            let mut machine = lock(&*self.machine);
            machine.restore(state);
            let mut progress = lock(&self.progress);
            progress.applied = Some(applied);
            progress.membership = meta.last_membership.clone();
            self.log.erase_all_but(&bodies, at.index);
        }
        self.rows.replaced();
        self.applied.send_replace(applied.index() + 1);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let starting = lock(&self.starting).clone();
        if let Some(meta) = starting {
            return Ok(meta.last_log_id.map(|_| Snapshot { meta, snapshot: Manifest::None }));
        }
        // The state is read when there is somebody to send it to: openraft asks here before every attempt, also at a node that is
        // down, and applies nothing meanwhile. What is sent then is at this position or a later one.
        let meta = Self::meta(&lock(&self.progress));
        Ok(meta.last_log_id.map(|_| Snapshot { meta, snapshot: Manifest::Here(self.clone()) }))
    }
}
