//! The log of one node: what goes in, what comes out, and who waits for what.
//!
//! Appends, votes, truncations and purges go through one queue to one writer thread (`writer`), so none overtakes
//! another. What an append adds is readable when [`Log::append`] returns and durable when its completion runs. A second
//! thread (`erase`) overwrites dead bodies, gives back empty segments and keeps zeroed ones ready.
//!
//! A crash at the worst moment leaves the entries whose completion ran, and perhaps some after them.

mod batch;
mod checkpoint;
pub mod dump;
mod fold;
mod judge;
pub(crate) mod reader;
pub mod recovery;
pub mod remains;
mod salvage;
mod segment;
pub(crate) mod state;
mod superblock;
pub(crate) mod writer;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;

use crate::codec::{self, Reset, Vote};
use crate::disk::{Disk, DiskFile};
use crate::error::{OpenError, StoreFailed};
use crate::limits::{HEAD_BYTES_MAX, WRITER_QUEUE_MAX};
use crate::position::{LogIndex, LogPosition, SegmentId, Term};
use crate::record::{Kind, Record};
use crate::scrub::{ScrubReport, Scrubber};
use crate::seal::{KeyId, Keyring};
use crate::sync::mpsc::{SyncSender, channel, sync_channel};
use crate::sync::{Condvar, Mutex, MutexGuard, lock, thread, wait};
use superblock::Superblock;
use writer::{Note, Request, Writer};

pub use checkpoint::{Checkpoint, Replacement};
pub use fold::{Survey, survey};
pub use segment::SpaceReport;
pub use state::Entry;
use state::LogState;

/// Runs on the writer thread once everything before it is durable, or will never be. Must not block.
pub type Completion = Box<dyn FnOnce(Result<(), StoreFailed>) + Send>;

/// Whose directory it is. Another one's is refused, untouched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster's id.
    pub cluster: String,
    /// The node's id, from 1.
    pub node: u64,
}

/// Gets the index of each body's entry of which no copy is left, and how long ago it died.
pub type OnErased = Arc<dyn Fn(&[(LogIndex, std::time::Duration)]) + Send + Sync>;

/// How to run a log. Clones share the callbacks.
#[derive(Clone)]
pub struct Options {
    /// Size of a segment file; counts when the directory is created.
    pub segment_bytes: u64,
    /// Segments of which less than this is live are emptied: what is live is moved, percent. 0 moves nothing.
    pub move_below_percent: u64,
    /// How fast sealed segments are read again in search of rot, octets a second. 0 reads nothing.
    pub scrub_bytes_per_second: u64,
    /// At-rest keys.
    pub keys: Keyring,
    /// Told of each body whose octets were overwritten and synced.
    pub on_erased: OnErased,
    /// Told once, with the reason, when a write or sync failed. The node must end.
    pub on_failure: Arc<dyn Fn(&str) + Send + Sync>,
}

/// What a directory's log says about the past.
#[derive(Debug, Default)]
pub struct Recovered {
    /// How often the directory was opened, this time included.
    pub boots: u64,
    /// True if nothing was ever written: the node may take part in a first formation.
    pub pristine: bool,
    /// The last vote.
    pub vote: Option<Vote>,
    /// The last position known to be committed.
    pub committed: Option<LogPosition>,
    /// The newest complete checkpoint.
    pub checkpoint: Option<RecoveredCheckpoint>,
    /// True if the tail may have held more than was found, by no fault of a torn write. So at each open until
    /// [`Log::end_ambiguity`].
    pub ambiguous_tail: bool,
    /// The node may have acknowledged entries up to here, whether it has them or not.
    pub doubt: Option<LogPosition>,
    /// The log was salvaged and has no entry yet: bodies up to this index were kept.
    pub kept: Option<LogIndex>,
}

/// A body that is damaged here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LostBody {
    /// Index of the entry that brought it.
    pub index: LogIndex,
    /// Its length.
    pub bytes: u32,
    /// CRC-32 of what was written, if its header still tells.
    pub crc: Option<u32>,
}

/// A checkpoint as it was found.
#[derive(Debug, Default, Clone)]
pub struct RecoveredCheckpoint {
    /// The state's position.
    pub applied: LogPosition,
    /// The small tables. The rows are read by key: [`Log::row`].
    pub tables: Bytes,
}

pub(crate) struct Inner {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) identity: Identity,
    pub(crate) segment_bytes: u64,
    state: Mutex<LogState>,
    superblock: Mutex<Superblock>,
    pool: Mutex<Vec<(u32, Arc<dyn DiskFile>)>>,
    next_slot: Mutex<u32>,
    /// Set while there is no room for a spare segment, so that this is said once.
    lacks_spare: AtomicBool,
    pub(crate) options: Options,
    scrub: Mutex<ScrubReport>,
    stop: Mutex<bool>,
    pub(crate) wake: Condvar,
}

impl Inner {
    pub(crate) fn state(&self) -> MutexGuard<'_, LogState> {
        lock(&self.state)
    }

    pub(crate) fn scrubbed(&self) -> MutexGuard<'_, ScrubReport> {
        lock(&self.scrub)
    }

    fn superblock(&self) -> MutexGuard<'_, Superblock> {
        lock(&self.superblock)
    }

    fn active_end(&self, id: SegmentId) -> (Arc<dyn DiskFile>, u32) {
        let state = self.state();
        let segment = state.segments.get(&id).expect("the active segment is never recycled");
        (segment.file.clone(), segment.end)
    }

    /// Stops the log for good.
    pub(crate) fn fail(&self, why: &str) {
        let first = self.state().failed.replace(why.to_owned()).is_none();
        if first {
            tracing::error!(why, "the log has stopped");
            (self.options.on_failure)(why);
        }
    }

    /// Waits a while or until the log closes; true once it has closed.
    pub(crate) fn pause(&self, how_long: std::time::Duration) -> bool {
        let stop = lock(&self.stop);
        if *stop {
            return true;
        }
        *wait(&self.wake, &self.stop, stop, how_long)
    }
}

/// A node's log. Dropping it completes what waits and stops its threads.
pub struct Log {
    inner: Arc<Inner>,
    requests: Option<SyncSender<Request>>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Log {
    /// Opens the log of `identity`, or creates it if the directory is empty.
    ///
    /// # Errors
    /// [`OpenError`] says what is wrong and what to do; the directory is untouched then, except that after a crash a
    /// torn tail may have been cut.
    pub fn open(
        disk: Arc<dyn Disk>,
        identity: Identity,
        options: Options,
    ) -> Result<(Log, Recovered), OpenError> {
        let opened = fold::open(&*disk, &identity, &options)?;
        Log::start(disk, identity, options, opened)
    }

    /// Opens what is left of a log that [`Log::open`] found damaged: its bodies of entries up to `reset.void_but`, and nothing else.
    /// Returns once that is durable.
    ///
    /// # Errors
    /// [`OpenError`]; the next open goes on with the same reset, if it had begun to change the directory.
    pub fn salvage(
        disk: Arc<dyn Disk>,
        identity: Identity,
        options: Options,
        reset: Reset,
    ) -> Result<(Log, Recovered), OpenError> {
        let reset = Reset { void_but: Some(reset.void_but.unwrap_or_default()), ..reset };
        let opened = salvage::salvage(&*disk, &identity, &options, &reset)?;
        Log::start(disk, identity, options, opened)
    }

    fn start(
        disk: Arc<dyn Disk>,
        identity: Identity,
        options: Options,
        mut opened: fold::Opened,
    ) -> Result<(Log, Recovered), OpenError> {
        opened.state.synced = opened.synced;
        let inner = Arc::new(Inner {
            segment_bytes: opened.superblock.contents.segment_bytes,
            disk,
            identity,
            pool: Mutex::new(Vec::new()),
            next_slot: Mutex::new(opened.next_slot),
            lacks_spare: AtomicBool::new(false),
            state: Mutex::new(opened.state),
            superblock: Mutex::new(opened.superblock),
            options,
            scrub: Mutex::default(),
            stop: Mutex::new(false),
            wake: Condvar::new(),
        });
        let (requests, receiver) = sync_channel(WRITER_QUEUE_MAX);
        let writer = Writer {
            inner: inner.clone(),
            keys: inner.options.keys.of_segment(opened.active),
            active: opened.active,
            written: opened.written,
            synced: opened.synced,
            fresh: true,
            first: opened
                .salvage
                .iter()
                .map(|(reset, _)| Record::of(Kind::Reset, codec::encode(reset)))
                .collect(),
        };
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            thread::Builder::new()
                .name(name.into())
                .spawn(run)
                .map_err(|error| OpenError::Io { what: format!("starting thread {name}"), error })
        };
        let writer = spawn("log-writer", Box::new(move || writer.run(receiver)))?;
        // Dropped last, as it waits for the writer, which waits for everybody who may ask it for something.
        let mut log = Log { inner: inner.clone(), requests: Some(requests.clone()), threads: vec![writer] };
        let eraser = crate::erase::Eraser { inner: inner.clone(), requests: requests.clone() };
        let scrubber = Scrubber { inner, requests };
        if let Some((reset, unreadable)) = opened.salvage {
            // The first thing that is written brings the reset with it.
            let (tell, told) = channel();
            let again = Reset { void_but: None, ..reset };
            log.note(again, Box::new(move |result| drop(tell.send(result))));
            let noted = match told.recv() {
                Ok(Ok(())) => Ok(()),
                _ => Err("the log has stopped".to_owned()),
            };
            noted.and_then(|()| eraser.end_salvage(&unreadable)).map_err(|why| OpenError::Io {
                what: "salvaging a damaged log".into(),
                error: std::io::Error::other(why),
            })?;
        }
        let eraser = spawn("log-eraser", Box::new(move || eraser.run(opened.unused_slots)))?;
        let scrubber = spawn("log-scrub", Box::new(move || scrubber.run()))?;
        log.threads.splice(0..0, [scrubber, eraser]);
        Ok((log, opened.recovered))
    }

    fn send(&self, request: Request) {
        let Some(requests) = &self.requests else { return };
        if let Err(refused) = requests.send(request) {
            let why = self.inner.state().failed.clone().unwrap_or_else(|| "closed".into());
            refused.0.done.into_iter().for_each(|done| done(Err(StoreFailed(why.clone()))));
        }
    }

    /// Appends entries that follow the last one without a hole. They are readable at once.
    ///
    /// Head and body must be within [`crate::limits`]; the caller checks.
    pub fn append(&self, entries: Vec<Entry>, done: Completion) {
        let mut records = Vec::with_capacity(entries.len());
        {
            let mut state = self.inner.state();
            for entry in entries {
                debug_assert!(entry.head.len() <= HEAD_BYTES_MAX);
                let ticket = state.push(&entry);
                let Entry { at, head, body } = entry;
                records.push((Record { kind: Kind::Entry, at, head, body }, Note::Entry(ticket)));
            }
        }
        self.send(Request { records, done: Some(done) });
    }

    /// Records a vote. Whoever awaits `done` knows it durable.
    pub fn save_vote(&self, vote: Vote, done: Completion) {
        let inner = self.inner.clone();
        let done: Completion = Box::new(move |result| {
            if result.is_ok() {
                inner.state().vote = Some(vote);
            }
            done(result);
        });
        let record = Record::of(Kind::Vote, codec::encode(&vote));
        self.send(Request { records: vec![(record, Note::None)], done: Some(done) });
    }

    /// Records what this node may have lost, and its vote from here on. Whoever awaits `done` knows it durable.
    pub fn note(&self, reset: Reset, done: Completion) {
        let inner = self.inner.clone();
        let done: Completion = Box::new(move |result| {
            if result.is_ok() {
                let mut state = inner.state();
                state.doubt = state.doubt.max(reset.last);
                state.vote = reset.vote.or(state.vote);
            }
            done(result);
        });
        let record = Record::of(Kind::Reset, codec::encode(&reset));
        self.send(Request { records: vec![(record, Note::None)], done: Some(done) });
    }

    /// What an ambiguous tail may have held was asked for, and noted: the next open need not say so again.
    ///
    /// # Errors
    /// The system's answer.
    pub fn end_ambiguity(&self) -> std::io::Result<()> {
        self.inner.end_pending(|pending| pending.void_but.is_none())
    }

    /// Notes how far the cluster has committed. Written with the next batch; nobody waits for it.
    pub fn save_committed(&self, at: LogPosition) {
        self.inner.state().committed = Some(at);
    }

    /// Voids all entries from `from` on. Returns once queued in order; what is appended next follows `from`.
    pub fn truncate_from(&self, from: LogIndex) {
        // Queued before the state changes, so that nothing that follows from it can be written first.
        let at = LogPosition { index: from, ..LogPosition::default() };
        let record = Record { at, ..Record::of(Kind::Truncate, Vec::new()) };
        self.send(Request { records: vec![(record, Note::None)], done: None });
        self.inner.state().truncate_from(from);
    }

    /// Raises the floor: entries up to `floor` are no longer asked for. Live bodies stay.
    pub fn purge(&self, floor: LogPosition) {
        let record = Record { at: floor, ..Record::of(Kind::Floor, Vec::new()) };
        self.send(Request { records: vec![(record, Note::None)], done: None });
        self.inner.state().purge(floor);
    }

    /// Stores a body that came from another node, under the index of the entry that brought it there.
    pub fn store_body(&self, at: LogPosition, body: Bytes, done: Completion) {
        let ticket = {
            let mut state = self.inner.state();
            state.kill_body(at.index);
            state.next_ticket += 1;
            let ticket = state.next_ticket;
            state.bodies.insert(at.index, (ticket, None));
            ticket
        };
        let record = Record { kind: Kind::Body, at, head: Bytes::new(), body };
        self.send(Request { records: vec![(record, Note::Body(ticket))], done: Some(done) });
    }

    /// Stores the body of [`Log::lost`] that somebody has brought, or one that should be here and of which nothing is left. The caller
    /// has compared its octets. It is lost until it is durable, and if its story has ended by then it dies at once.
    pub fn mend_body(&self, index: LogIndex, body: Bytes, done: Completion) {
        let (at, ticket, mend) = {
            let mut state = self.inner.state();
            let lost = state.lost.get(&index).map(|(place, _)| *place);
            // It stays the body of the entry that stands here, if it is that one's.
            let own = state.slot(index).map(|slot| (slot.term, slot.ticket, slot.location));
            let own = own.filter(|(_, _, place)| lost.is_none() || *place == lost);
            state.next_ticket += 1;
            let mend = state.next_ticket;
            state.mending.insert(index, mend);
            let (term, ticket) = own.map_or((Term::default(), mend), |(term, ticket, _)| (term, ticket));
            (LogPosition { term, index }, ticket, mend)
        };
        let record = Record { kind: Kind::Body, at, head: Bytes::new(), body };
        self.send(Request { records: vec![(record, Note::MendedBody(ticket, mend))], done: Some(done) });
    }

    /// Ends the story of a body: its octets are overwritten within a second or so.
    pub fn erase(&self, index: LogIndex) {
        self.inner.state().kill_body(index);
    }

    /// Ends the story of every body up to `applied` that is not in `live`: what a node does after a restart, before
    /// it serves, since it may have missed why they died. Returns how many that were.
    pub fn erase_all_but(&self, live: &BTreeSet<LogIndex>, applied: LogIndex) -> usize {
        let mut state = self.inner.state();
        let dead: Vec<LogIndex> =
            state.bodies.range(..=applied).map(|(i, _)| *i).filter(|i| !live.contains(i)).collect();
        dead.iter().for_each(|index| state.kill_body(*index));
        dead.len()
    }

    /// Bodies that are dead and not yet overwritten.
    pub fn erase_backlog(&self) -> usize {
        let state = self.inner.state();
        state.dying.len() + state.being_erased
    }

    /// Bodies of which this node has other octets than were written. Whoever has one brings it with [`Log::mend_body`];
    /// [`Log::erase`] ends the story of one that nobody needs.
    pub fn lost(&self) -> Vec<LostBody> {
        let state = self.inner.state();
        let lost = state.lost.iter();
        lost.map(|(index, (location, crc))| LostBody { index: *index, bytes: location.body_bytes, crc: *crc })
            .collect()
    }

    /// How far the scrub has come.
    pub fn scrubbed(&self) -> ScrubReport {
        self.inner.scrubbed().clone()
    }

    /// Where a lost body stood, for people.
    pub fn lost_place(&self, index: LogIndex) -> Option<String> {
        self.inner.state().lost.get(&index).map(|(location, _)| location.to_string())
    }

    /// The node may have acknowledged entries up to here and does not have as many: it must neither campaign nor vote for a shorter
    /// log.
    pub fn doubt(&self) -> Option<LogPosition> {
        self.inner.state().unresolved_doubt()
    }

    /// The last vote that is durable.
    pub fn vote(&self) -> Option<Vote> {
        self.inner.state().vote
    }

    /// The last position that was said to be committed, if the log has exactly that entry: it may have been written ahead
    /// of the entry, and another one may stand in its place.
    pub fn committed(&self) -> Option<LogPosition> {
        let state = self.inner.state();
        state.committed.filter(|at| state.has(*at))
    }

    /// The last purged position.
    pub fn floor(&self) -> Option<LogPosition> {
        self.inner.state().floor
    }

    /// The last entry's position, or the floor.
    pub fn last(&self) -> Option<LogPosition> {
        self.inner.state().last()
    }

    /// Whether a live body of this index is here.
    pub fn has_body(&self, index: LogIndex) -> bool {
        self.inner.state().bodies.contains_key(&index)
    }

    /// Size of a segment.
    pub fn segment_bytes(&self) -> u64 {
        self.inner.segment_bytes
    }

    /// Free octets on the file system, spare segments included.
    pub fn free_bytes(&self) -> u64 {
        self.inner.free_bytes()
    }

    /// The at-rest key that seals what is written.
    pub fn sealing(&self) -> Option<KeyId> {
        self.inner.options.keys.sealing()
    }

    /// Free room, what is held and what of it is live.
    pub fn space(&self) -> SpaceReport {
        self.inner.space()
    }

    /// Checks the invariants of what is held in memory. For tests.
    pub fn check(&self) {
        self.inner.state().check();
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        *lock(&self.inner.stop) = true;
        self.inner.wake.notify_all();
        self.requests = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the log panicked");
            }
        }
        if self.inner.state().failed.is_none()
            && let Err(error) = self.inner.note_end()
        {
            tracing::warn!(%error, "the superblock does not say where the log ends");
        }
    }
}

/// A log on a simulated disk that moves and scrubs nothing, for tests that look inside.
#[cfg(test)]
fn open_for_test(disk: &crate::disk::sim::SimDisk) -> Log {
    let options = Options {
        segment_bytes: crate::limits::SEGMENT_BYTES_MIN,
        move_below_percent: 0,
        keys: Keyring::default(),
        scrub_bytes_per_second: 0,
        on_erased: Arc::new(|_| {}),
        on_failure: Arc::new(|_| {}),
    };
    let identity = Identity { cluster: "c".into(), node: 1 };
    Log::open(Arc::new(disk.clone()), identity, options).expect("nothing but what a crash leaves").0
}
