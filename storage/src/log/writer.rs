//! Group commit: one thread takes everything that waits, writes it with one write, makes one fdatasync, then completes the
//! waiters strictly in order. A failed write or sync ends the log for good: it is never tried again.
//!
//! A crash at the worst moment leaves a batch of which any blocks may be missing. None of its waiters was told.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::batch::{self, Batch};
use super::segment::is_want_of_room;
use super::state::{RowPlace, Segment, Ticket};
use super::{Completion, Inner};
use crate::codec::{self, Reset, SegmentHead, Vote};
use crate::disk::DiskFile;
use crate::error::StoreFailed;
use crate::limits::{BATCH_BYTES_MAX, ROOM_AGAIN};
use crate::position::{Location, LogIndex, LogPosition, SegmentId};
use crate::record::{Kind, Record};
use crate::seal::SegmentKeys;
use crate::sync::mpsc::{Receiver, RecvTimeoutError};
use crate::sync::receive;

/// After this much idleness the synced position is written as a mark of its own.
const IDLE_MARK: Duration = Duration::from_millis(10);

/// What to note about a record once it is on disk.
pub(crate) enum Note {
    None,
    Entry(Ticket),
    Body(Ticket),
    /// A body that is moved from one place to another.
    MovedBody(Ticket, Location),
    /// A body that was lost, or of which nothing was left; and what its mending is called.
    MendedBody(Ticket, Ticket),
    /// A row of a checkpoint that is moved from one place to another.
    MovedRow {
        key: u128,
        from: Location,
    },
    Intent(SegmentId),
    Row {
        key: u128,
        number: u64,
    },
    Gone(Vec<u128>),
    /// Tombstones of a completed checkpoint, said again since their segment goes.
    GoneAgain(Vec<u128>),
    Table {
        number: u64,
    },
    CheckpointEnd,
}

/// Records to be written in order, and whom to tell when all of them are durable.
pub(crate) struct Request {
    pub(crate) records: Vec<(Record, Note)>,
    pub(crate) done: Option<Completion>,
}

struct Tag {
    note: Note,
    /// Called when this record is durable: it is its request's last.
    done: Option<Completion>,
}

/// What the records written so far amount to; a new segment opens with it.
#[derive(Default, Clone)]
pub(crate) struct Written {
    pub(crate) vote: Option<Vote>,
    pub(crate) floor: Option<LogPosition>,
    pub(crate) committed: Option<LogPosition>,
    /// Index after the last entry.
    pub(crate) next: u64,
}

/// The rows, tombstones and table parts of a checkpoint that is being written.
#[derive(Default)]
struct Pending {
    rows: Vec<(u128, RowPlace)>,
    gone: Vec<(u128, SegmentId)>,
    tables: Vec<SegmentId>,
}

/// By the number of the checkpoint. One that is never ended is forgotten with the next that is.
type AllPending = BTreeMap<u64, Pending>;

pub(crate) struct Writer {
    pub(crate) inner: Arc<Inner>,
    pub(crate) active: SegmentId,
    /// Of the active segment.
    pub(crate) keys: SegmentKeys,
    pub(crate) written: Written,
    pub(crate) synced: (SegmentId, u32),
    pub(crate) fresh: bool,
    /// What the segment that is active now begins with, before anything else can be read into it.
    pub(crate) first: Vec<Record>,
}

impl Writer {
    /// Runs until all senders are gone or the disk fails.
    pub(crate) fn run(mut self, requests: Receiver<Request>) {
        let mut waiting: VecDeque<(Record, Tag)> = VecDeque::new();
        let mut bytes = Vec::with_capacity(BATCH_BYTES_MAX);
        let mut pending = AllPending::default();
        let mut marked = true;
        loop {
            if waiting.is_empty() {
                let next = if marked {
                    requests.recv().map_err(|_| RecvTimeoutError::Disconnected)
                } else {
                    receive(&requests, IDLE_MARK)
                };
                match next {
                    Ok(request) => self.enqueue(&mut waiting, request),
                    Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) => {} // an empty batch: just the mark
                }
            }
            let mut queued: usize = waiting.iter().map(|(r, _)| r.stored_bytes(&self.keys)).sum();
            while queued < BATCH_BYTES_MAX {
                let Ok(request) = requests.try_recv() else { break };
                queued += request.records.iter().map(|(r, _)| r.stored_bytes(&self.keys)).sum::<usize>();
                self.enqueue(&mut waiting, request);
            }
            marked = waiting.is_empty();
            if let Err(e) = self.commit(&mut bytes, &mut waiting, &mut pending) {
                self.inner.fail(&e);
                // The requests that wait learn of it too; none of them is durable.
                for (_, tag) in waiting.drain(..) {
                    tag.done.into_iter().for_each(|done| done(Err(StoreFailed(e.clone()))));
                }
                for request in requests.iter() {
                    request.done.into_iter().for_each(|done| done(Err(StoreFailed(e.clone()))));
                }
                return;
            }
        }
    }

    /// Writes and syncs one batch, notes where its records stand, then tells those who wait.
    fn commit(
        &mut self,
        bytes: &mut Vec<u8>,
        waiting: &mut VecDeque<(Record, Tag)>,
        pending: &mut AllPending,
    ) -> Result<(), String> {
        let (file, start) = self.inner.active_end(self.active);
        if self.inner.is_to_be_left(self.active) {
            self.roll(start)?;
            return self.commit(bytes, waiting, pending);
        }
        let mut opening = Vec::new();
        // Not ahead of its entry, which may be in a later batch: it would say nothing after a crash between the two.
        let committed = self.inner.state().committed.filter(|at| at.index.0 < self.written.next);
        let committed = committed.or(self.written.committed);
        if committed != self.written.committed
            && let Some(at) = committed
        {
            opening.push(Record { at, ..Record::of(Kind::Committed, Vec::new()) });
        }
        let size = self.inner.segment_bytes;
        let idle = waiting.is_empty();
        let previous_written = self.written.clone();
        self.written.committed = committed;
        let mut opening_for_segment = Vec::new();
        if self.fresh {
            opening_for_segment = self.opening_records(start == 0, &previous_written);
        }
        opening_for_segment.extend(opening);
        let Batch { placed, end } =
            batch::lay_out(bytes, opening_for_segment, waiting, self.synced, &self.keys, start, size);
        if placed.is_empty() && !idle || bytes.is_empty() {
            self.written = previous_written;
            if idle {
                return Ok(()); // a full segment takes no idle mark
            }
            self.roll(start)?;
            return self.commit(bytes, waiting, pending);
        }
        let durable = file
            .write_at(bytes, start as u64)
            .map_err(|e| format!("writing {} bytes: {e}", bytes.len()))
            .and_then(|()| file.sync_data().map_err(|e| format!("fdatasync: {e}")));
        if let Err(why) = durable {
            let failed = StoreFailed(why.clone());
            placed.into_iter().filter_map(|p| p.tag.done).for_each(|done| done(Err(failed.clone())));
            return Err(why);
        }
        self.fresh = false;
        self.first.clear();
        self.synced = (self.active, end);
        let mut completions = Vec::new();
        {
            let mut state = self.inner.state();
            state.synced = self.synced;
            if let Some(segment) = state.segments.get_mut(&self.active) {
                segment.end = end;
            }
            for p in placed {
                let (at, location) = (p.record.at, p.location);
                match p.record.kind {
                    Kind::Vote => self.written.vote = codec::decode("vote", &p.record.head).ok(),
                    Kind::Reset => {
                        let reset = codec::decode::<Reset>("reset", &p.record.head).ok();
                        self.written.vote = reset.and_then(|reset| reset.vote).or(self.written.vote);
                    }
                    Kind::Entry => self.written.next = at.index.0 + 1,
                    Kind::Truncate => self.written.next = self.written.next.min(at.index.0),
                    Kind::Floor => {
                        self.written.floor = Some(at);
                        self.written.next = self.written.next.max(at.index.0 + 1);
                    }
                    _ => {}
                }
                match p.tag.note {
                    Note::None => {}
                    Note::Entry(ticket) => state.entry_written(at.index, ticket, location),
                    Note::Body(ticket) => state.body_written(at.index, ticket, location),
                    Note::MovedBody(ticket, from) => state.body_moved(at.index, ticket, from, location),
                    Note::MendedBody(ticket, mend) => state.body_mended(at.index, ticket, mend, location),
                    Note::MovedRow { key, from } => {
                        let crc = crc32fast::hash(&p.record.head);
                        state.row_moved(key, at.index.0, from, RowPlace { location, crc });
                    }
                    Note::Intent(named) => {
                        if let Some(segment) = state.segments.get_mut(&location.segment) {
                            segment.intents_for.insert(named);
                        }
                    }
                    Note::Row { key, number } => {
                        state.pending.insert(location.segment);
                        state.row_written(key, number, location.segment);
                        let crc = crc32fast::hash(&p.record.head);
                        pending.entry(number).or_default().rows.push((key, RowPlace { location, crc }));
                    }
                    Note::Gone(keys) => {
                        state.pending.insert(location.segment);
                        if let Some(segment) = state.segments.get_mut(&location.segment) {
                            segment.checkpoints.insert(at.index.0);
                        }
                        let gone = keys.into_iter().map(|k| (k, location.segment));
                        pending.entry(at.index.0).or_default().gone.extend(gone);
                    }
                    Note::GoneAgain(keys) => state.gone_again(keys, location.segment),
                    Note::Table { number } => {
                        state.pending.insert(location.segment);
                        pending.entry(number).or_default().tables.push(location.segment);
                        if let Some(segment) = state.segments.get_mut(&location.segment) {
                            segment.checkpoints.insert(number);
                        }
                    }
                    Note::CheckpointEnd => {
                        let Pending { rows, gone, mut tables } =
                            pending.remove(&at.index.0).unwrap_or_default();
                        pending.retain(|number, _| *number > at.index.0);
                        tables.push(location.segment);
                        state.checkpoint_complete(at.index.0, &rows, &gone, tables);
                    }
                }
                completions.extend(p.tag.done);
            }
            state.evict();
        }
        for done in completions {
            done(Ok(()));
        }
        Ok(())
    }

    /// What a segment opens with, so that it can be folded without those before it.
    fn opening_records(&self, first_batch: bool, written: &Written) -> Vec<Record> {
        let mut records = Vec::new();
        if first_batch {
            let head = SegmentHead {
                cluster: self.inner.identity.cluster.clone(),
                node: self.inner.identity.node,
                previous: Some(self.synced).filter(|(id, _)| *id != self.active),
            };
            records.push(Record::of(Kind::SegmentHead, codec::encode(&head)));
            records.extend(self.first.iter().cloned());
        }
        if let Some(vote) = &written.vote {
            records.push(Record::of(Kind::Vote, codec::encode(vote)));
        }
        if let Some(at) = written.floor {
            records.push(Record { at, ..Record::of(Kind::Floor, Vec::new()) });
        }
        if let Some(at) = written.committed {
            records.push(Record { at, ..Record::of(Kind::Committed, Vec::new()) });
        }
        if let Some(doubt) = self.inner.state().unresolved_doubt() {
            let again = Reset { last: Some(doubt), ..Reset::default() };
            records.push(Record::of(Kind::Reset, codec::encode(&again)));
        }
        let at = LogPosition { index: LogIndex(written.next), ..LogPosition::default() };
        records.push(Record { at, ..Record::of(Kind::Truncate, Vec::new()) });
        records
    }

    /// A copy of a body that is no longer live is not written: behind an entry that took the place of its own, the fold would take it
    /// for that one's.
    fn enqueue(&self, waiting: &mut VecDeque<(Record, Tag)>, mut request: Request) {
        if request.records.iter().any(|(_, note)| matches!(note, Note::MovedBody(..))) {
            let state = self.inner.state();
            request.records.retain(|(record, note)| match note {
                Note::MovedBody(ticket, from) => state.is_body(record.at.index, *ticket, *from),
                _ => true,
            });
        }
        enqueue(waiting, request);
    }

    /// A file for the next segment. Without room for one nothing was written that would have to be taken back: the log waits until there is
    /// some, as if its disk stood still, and says so. Ends with the log.
    fn take_segment_file(&self) -> std::io::Result<(u32, Arc<dyn DiskFile>)> {
        let mut said = false;
        loop {
            let taken = self.inner.take_segment_file();
            let Err(error) = &taken else { return taken };
            if !is_want_of_room(error) {
                return taken;
            }
            if !said {
                tracing::error!("no room for another segment: the log waits until there is some");
                said = true;
            }
            // A file that finds no room is not even begun again: it would take the last blocks from others for a while.
            loop {
                if self.inner.pause(ROOM_AGAIN) {
                    return taken;
                }
                if self.inner.free_bytes() >= self.inner.segment_bytes {
                    break;
                }
            }
        }
    }

    /// Goes on in a new segment. Its file is zeroed and synced, and the superblock names it, before anything is written.
    fn roll(&mut self, end: u32) -> Result<(), String> {
        let io = |e: std::io::Error| format!("opening a new segment: {e}");
        let (slot, file) = self.take_segment_file().map_err(io)?;
        let id = {
            let mut superblock = self.inner.superblock();
            superblock.contents.newest.0 += 1;
            let id = superblock.contents.newest;
            superblock.contents.segments.push((id, slot));
            superblock.ends.insert(self.active, end);
            superblock.store().map_err(|e| format!("superblock: {e}"))?;
            id
        };
        let mut state = self.inner.state();
        if let Some(old) = state.segments.get_mut(&self.active) {
            old.end = end;
        }
        state.segments.insert(id, Segment::new(slot, file));
        drop(state);
        tracing::debug!(segment = id.0, "opened");
        self.active = id;
        self.keys = self.inner.options.keys.of_segment(id);
        self.fresh = true;
        Ok(())
    }
}

fn enqueue(waiting: &mut VecDeque<(Record, Tag)>, request: Request) {
    let count = request.records.len();
    let mut done = request.done;
    for (n, (record, note)) in request.records.into_iter().enumerate() {
        let done = if n + 1 == count { done.take() } else { None };
        waiting.push_back((record, Tag { note, done }));
    }
    // A request without records is a barrier: it completes with what stands before it, or at once.
    if let Some(done) = done {
        match waiting.back_mut() {
            Some((_, tag)) if tag.done.is_none() => tag.done = Some(done),
            Some((_, tag)) => {
                let first = tag.done.take().expect("matched above");
                tag.done = Some(Box::new(move |result| {
                    first(result.clone());
                    done(result);
                }));
            }
            None => done(Ok(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Entry, open_for_test as open};
    use super::*;
    use crate::disk::sim::SimDisk;
    use crate::position::Term;
    use crate::sync::mpsc::channel;

    fn entry(term: u64, body: &'static [u8]) -> Entry {
        let at = LogPosition { term: Term(term), index: LogIndex(0) };
        Entry { at, head: "head".into(), body: body.into() }
    }

    /// The scrub read a rotten body, whose octets were still in memory, just before its entry was truncated: its copy comes after the entry
    /// that took its place.
    #[test]
    fn p7_a_copy_that_comes_late_is_not_taken_for_another_entrys_body() {
        let disk = SimDisk::new(1);
        let log = open(&disk);
        log.append(vec![entry(1, b"of the first leader")], Box::new(|_| {}));
        let (tell, told) = channel();
        log.append(vec![], Box::new(move |result| drop(tell.send(result))));
        told.recv().expect("told").expect("durable");
        let (ticket, place) = log.inner.state().bodies[&LogIndex(0)];
        log.truncate_from(LogIndex(0));
        log.append(vec![entry(2, b"of the second leader")], Box::new(|_| {}));
        let Entry { at, body, .. } = entry(1, b"of the first leader");
        let copy = Record { kind: Kind::Body, at, head: Default::default(), body };
        let (tell, told) = channel();
        log.send(Request {
            records: vec![(copy, Note::MovedBody(ticket, place.expect("it is on disk")))],
            done: Some(Box::new(move |result| drop(tell.send(result)))),
        });
        told.recv().expect("told").expect("durable");
        drop(log);
        let body = open(&disk).body(LogIndex(0));
        assert_eq!(body.ok().as_deref(), Some(&b"of the second leader"[..]));
    }
}
