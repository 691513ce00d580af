//! Forgetting: the thread that overwrites dead bodies with zeros, gives back segments that hold nothing live, and keeps
//! a zeroed one ready.
//!
//! Live records of mostly dead segments are moved first (`relocate`).
//!
//! A round writes an intent to the log and syncs it, then overwrites, then syncs. A crash in between leaves an intent;
//! the next start overwrites again and never calls those ranges damaged. Headers and heads are never rewritten by it.

pub(crate) mod plan;
mod relocate;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock;
use crate::codec::{self, Gone, Intent, Reset};
use crate::limits::ERASE_ROUND_BYTES_MAX;
use crate::log::Inner;
use crate::log::writer::{Note, Request};
use crate::position::{LogIndex, LogPosition, SegmentId};
use crate::record::{Kind, Record};
use crate::sync::mpsc::{SyncSender, channel};
use plan::Range;
use relocate::Relocation;

/// Pause between rounds: what dies within it is erased together.
const ROUND: Duration = Duration::from_millis(100);

/// A segment that could not be emptied is looked at again after so many rounds.
const TRY_AGAIN_ROUNDS: u64 = 600;

/// How far the log is synced is written to the superblock this often, or when a long step is over.
const NOTE_END: Duration = Duration::from_secs(1);

/// What is being moved.
#[derive(Default)]
struct Moving {
    under_way: Option<Relocation>,
    /// Segments that were looked at lately: what is left in them cannot be moved now.
    tried: BTreeSet<SegmentId>,
    rounds: u64,
}

/// Ranges that one intent record names at the most.
const INTENT_RANGES_MAX: usize = 50_000;

pub(crate) struct Eraser {
    pub(crate) inner: Arc<Inner>,
    pub(crate) requests: SyncSender<Request>,
}

impl Eraser {
    /// Runs until the log closes or fails. `unused` are files found at the start in which no segment stands.
    pub(crate) fn run(self, unused: Vec<u32>) {
        let mut result = self.inner.adopt(unused).map_err(|e| format!("zeroing a spare segment: {e}"));
        let (mut moving, mut noted) = (Moving::default(), clock::now());
        while result.is_ok() {
            self.inner.fill_pool();
            if self.inner.pause(ROUND) || self.inner.state().failed.is_some() {
                return;
            }
            result = self.erase_and_recycle(&mut noted).and_then(|()| self.relocate(&mut moving));
            result = result.and_then(|()| self.note_end(&mut noted));
            self.leave_other_key();
        }
        if let Err(why) = result {
            self.inner.fail(&why);
        }
    }

    /// Has the writer leave a segment of another key, which it does with the next batch: there may be none for long.
    fn leave_other_key(&self) {
        let active = self.inner.state().segments.last_key_value().map(|(id, _)| *id);
        if active.is_some_and(|id| self.inner.is_to_be_left(id)) {
            // If the log has closed nobody reads it any more.
            drop(self.requests.send(Request { records: Vec::new(), done: None }));
        }
    }

    /// Writes records through the one writer and waits until they are durable.
    fn write(&self, records: Vec<(Record, Note)>) -> Result<(), String> {
        let (tell, told) = channel();
        let done = Box::new(move |result| drop(tell.send(result)));
        self.requests.send(Request { records, done: Some(done) }).map_err(|_| "the log has closed")?;
        match told.recv() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(e.to_string()),
            Err(_) => Err("the log has closed".into()),
        }
    }

    /// Overwrites what a salvage found that nobody can read, which may be octets of mail, and then takes the salvage for done. Until that is
    /// durable the next start salvages again, so nothing may be promised meanwhile.
    pub(crate) fn end_salvage(&self, holes: &[(SegmentId, u32, u32)]) -> Result<(), String> {
        // With whatever is written first the reset is durable.
        self.write(vec![(Record::of(Kind::Reset, codec::encode(&Reset::default())), Note::None)])?;
        for (id, from, to) in holes {
            let Some(file) = self.inner.state().segments.get(id).map(|s| s.file.clone()) else { continue };
            overwrite(&*file, &[(*from, to - from)])
                .map_err(|e| format!("overwriting what cannot be read in segment {id}: {e}"))?;
        }
        self.inner.end_pending(|pending| pending.void_but.is_some()).map_err(|e| format!("superblock: {e}"))
    }

    /// Overwrites what is dead by now, and gives back the segments that held nothing live by now. What dies meanwhile waits for the next
    /// time: there may always be more, and room must come back all the same.
    ///
    /// A truncated body that is not yet overwritten is known from the record of the truncation alone. Where that stands in one of these
    /// segments, the body is among the dead that are overwritten first.
    fn erase_and_recycle(&self, noted: &mut Instant) -> Result<(), String> {
        let (dead, idle) = {
            let state = self.inner.state();
            (state.dying.len(), state.idle_segments().map(|(id, _)| *id).collect::<BTreeSet<_>>())
        };
        self.erase(dead, noted)?;
        self.recycle(&idle)
    }

    /// Says now and then to the superblock how far the log is synced.
    fn note_end(&self, noted: &mut Instant) -> Result<(), String> {
        let now = clock::now();
        if now < *noted + NOTE_END {
            return Ok(());
        }
        *noted = now;
        self.inner.note_end().map_err(|e| format!("superblock: {e}"))
    }

    /// Overwrites the oldest of the dying, so many.
    fn erase(&self, mut count: usize, noted: &mut Instant) -> Result<(), String> {
        while count > 0 {
            self.note_end(noted)?;
            let (taken, ranges) = {
                let mut state = self.inner.state();
                let round = plan::round(&mut state.dying, count, ERASE_ROUND_BYTES_MAX);
                state.being_erased = round.0.len();
                round
            };
            if taken.is_empty() {
                return Ok(());
            }
            count -= taken.len();
            self.write(intents(&ranges))?;
            for (id, list) in &ranges {
                let Some(slot) = self.inner.state().segments.get(id).map(|s| s.slot) else { continue };
                // Not by the writer's descriptor: an error is told to each of them once, and the writer must hear of its own.
                let overwritten = self.inner.open_segment_file(slot).and_then(|file| overwrite(&*file, list));
                overwritten.map_err(|e| format!("erasing in segment {id}: {e}"))?;
            }
            self.say_synced();
            let now = clock::now();
            let mut erased: BTreeMap<LogIndex, Duration> = BTreeMap::new();
            for dying in &taken {
                let lag = now.saturating_duration_since(dying.since);
                erased.entry(dying.index).and_modify(|longest| *longest = lag.max(*longest)).or_insert(lag);
            }
            {
                let mut state = self.inner.state();
                state.being_erased = 0;
                // One that was moved lives on in another place, or dies there later.
                let dying: BTreeSet<LogIndex> = state.dying.iter().map(|dying| dying.index).collect();
                erased.retain(|index, _| !state.bodies.contains_key(index) && !dying.contains(index));
                for dying in &taken {
                    state.body_erased(dying);
                }
                for (id, list) in ranges {
                    if let Some(segment) = state.segments.get_mut(&id) {
                        segment.erased.extend(list);
                        plan::merge(&mut segment.erased);
                    }
                }
            }
            let erased: Vec<(LogIndex, Duration)> = erased.into_iter().collect();
            (self.inner.options.on_erased)(&erased);
        }
        Ok(())
    }

    /// What was erased so far is durable: no start need do it again. Nobody waits for this.
    fn say_synced(&self) {
        let records = vec![(Record::of(Kind::Intent, codec::encode(&Intent::none())), Note::None)];
        // If the log has closed nobody reads it any more.
        drop(self.requests.send(Request { records, done: None }));
    }

    /// Moves the next records out of a mostly dead segment.
    fn relocate(&self, moving: &mut Moving) -> Result<(), String> {
        moving.rounds += 1;
        if moving.rounds.is_multiple_of(TRY_AGAIN_ROUNDS) {
            moving.tried.clear();
        }
        if moving.under_way.is_none() {
            let begun = Relocation::begin(&self.inner, &moving.tried);
            moving.under_way = begun.map_err(|e| format!("reading a sparse segment: {e}"))?;
        }
        let Some(relocation) = &mut moving.under_way else { return Ok(()) };
        let room = self.inner.room_to_move();
        if !self.inner.state().fits(relocation.segment(), room) {
            // Others have taken the room meanwhile: another one may fit.
            moving.under_way = None;
            return Ok(());
        }
        let copies = relocation
            .next(&self.inner)
            .map_err(|e| format!("moving records out of segment {}: {e}", relocation.segment()))?;
        if copies.is_empty() {
            moving.tried.insert(relocation.segment());
            moving.under_way = None;
            return Ok(());
        }
        self.write(copies)
    }

    /// Gives back those of these segments in which nothing is live. What their records still say about other segments is said again
    /// first: erase intents, and keys whose rows are void.
    fn recycle(&self, segments: &BTreeSet<SegmentId>) -> Result<(), String> {
        let mut say_again = Vec::new();
        let mut empty = Vec::new();
        {
            let state = self.inner.state();
            for (id, segment) in state.idle_segments().filter(|(id, _)| segments.contains(id)) {
                empty.push(*id);
                for named in segment.intents_for.iter().filter(|named| *named != id) {
                    if let Some(other) = state.segments.get(named) {
                        say_again.extend(intents(&BTreeMap::from([(*named, other.erased.clone())])));
                    }
                }
                let keys: Vec<u128> =
                    segment.gone_keys.iter().filter(|k| state.gone.get(k) == Some(id)).copied().collect();
                for keys in keys.chunks(10_000) {
                    let head = codec::encode(&Gone { keys: keys.to_vec() });
                    // Rows up to the newest complete checkpoint are meant: a later one may bring a key again.
                    let at = LogPosition { index: LogIndex(state.complete), ..LogPosition::default() };
                    let record = Record { at, ..Record::of(Kind::Gone, head) };
                    say_again.push((record, Note::GoneAgain(keys.to_vec())));
                }
            }
        }
        if empty.is_empty() {
            return Ok(());
        }
        // All that is said again was overwritten long ago.
        say_again.push((Record::of(Kind::Intent, codec::encode(&Intent::none())), Note::None));
        // Also without records this waits for what stands before it: the floor or the truncation that emptied the segments.
        self.write(say_again)?;
        for id in empty {
            let io = |e: std::io::Error| format!("recycling segment {id}: {e}");
            if let Some(segment) = self.inner.retire(id).map_err(io)? {
                tracing::debug!(segment = id.0, "recycled");
                self.inner.give_back(segment.slot, segment.file, segment.other_key).map_err(io)?;
            }
        }
        Ok(())
    }
}

fn intents(ranges: &BTreeMap<SegmentId, Vec<Range>>) -> Vec<(Record, Note)> {
    let mut records = Vec::new();
    for (segment, list) in ranges {
        for part in list.chunks(INTENT_RANGES_MAX) {
            let intent = Intent { segment: *segment, ranges: part.to_vec() };
            records.push((Record::of(Kind::Intent, codec::encode(&intent)), Note::Intent(*segment)));
        }
    }
    records
}

/// Overwrites ranges with zeros and syncs.
pub(crate) fn overwrite(file: &dyn crate::disk::DiskFile, ranges: &[Range]) -> std::io::Result<()> {
    let longest = ranges.iter().map(|(_, len)| *len).max().unwrap_or(0);
    let zeros = vec![0; longest as usize];
    for (start, len) in ranges {
        file.write_at(&zeros[..*len as usize], *start as u64)?;
    }
    file.sync_data()
}
