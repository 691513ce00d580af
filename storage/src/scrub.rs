//! Looking for rot: a thread that reads all sealed segments again and again, at a bounded rate and past the page cache, and checks every
//! record in them. What nobody reads rots unseen otherwise, until the other copies have rotted as well.
//!
//! | found | then |
//! | --- | --- |
//! | a live body with other octets | written again if it is still in memory; else [`Log::lost`](crate::Log::lost), and its owner brings it from another node |
//! | a header or head, a hole, octets that cannot be read | the segment is emptied: what is live in it is moved, and it is given back |
//! | a live row in such a place | the log stops: the node's next start gets the state from the others |
//! | a copy of the superblock | both are written again |
//!
//! The segment that is being written is left out: what stands in it was written moments ago. Erased bodies are no damage, dead ones no
//! matter.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::clock;
use crate::disk::DiskFile;
use crate::error::ReadError;
use crate::limits::SCRUB_WINDOW_BYTES;
use crate::log::Inner;
use crate::log::reader::read;
use crate::log::recovery;
use crate::log::writer::{Note, Request};
use crate::position::{Location, LogIndex, SegmentId};
use crate::record::{Kind, Record};
use crate::sync::mpsc::SyncSender;

/// Pause before another pass if there was nothing to read.
const NOTHING_TO_READ: Duration = Duration::from_secs(1);

/// How far the scrub has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Times that everything was read.
    pub passes: u64,
    /// How much of this pass is done, percent.
    pub percent: u64,
    /// Octets read since the start.
    pub bytes: u64,
    /// Places that were found damaged since the start.
    pub damaged: u64,
    /// How long the last whole pass took.
    pub last_pass: Option<Duration>,
}

/// The log has closed, or has stopped.
struct Over;

pub(crate) struct Scrubber {
    pub(crate) inner: Arc<Inner>,
    pub(crate) requests: SyncSender<Request>,
}

impl Scrubber {
    /// Runs until the log closes.
    pub(crate) fn run(self) {
        if self.inner.options.scrub_bytes_per_second > 0 {
            while self.pass().is_ok() {}
        }
    }

    fn pass(&self) -> Result<(), Over> {
        let began = clock::now();
        let sealed: Vec<SegmentId> = {
            let state = self.inner.state();
            state.segments.keys().rev().skip(1).rev().copied().collect()
        };
        for (n, id) in sealed.iter().enumerate() {
            self.inner.scrubbed().percent = n as u64 * 100 / sealed.len() as u64;
            self.segment(*id)?;
        }
        match self.inner.mend_superblock() {
            Ok(false) => {}
            Ok(true) => self.note("superblock", "a copy was not what was written; both are again"),
            Err(e) => self.inner.fail(&format!("superblock: {e}")),
        }
        let took = clock::now().saturating_duration_since(began);
        {
            let mut report = self.inner.scrubbed();
            report.passes += 1;
            report.percent = 0;
            report.last_pass = Some(took);
        }
        self.rest(if took < NOTHING_TO_READ { NOTHING_TO_READ } else { Duration::ZERO })
    }

    fn rest(&self, how_long: Duration) -> Result<(), Over> {
        match self.inner.pause(how_long) || self.inner.state().failed.is_some() {
            true => Err(Over),
            false => Ok(()),
        }
    }

    fn note(&self, at: impl std::fmt::Display, why: &str) {
        tracing::error!(%at, why, "the scrub found damage");
        self.inner.scrubbed().damaged += 1;
    }

    /// Reads a segment in windows, each of which begins with a batch.
    fn segment(&self, id: SegmentId) -> Result<(), Over> {
        let Some((file, end)) = self.sealed(id) else { return Ok(()) };
        let mut window = vec![0; SCRUB_WINDOW_BYTES.min(end as usize)];
        let mut base = 0;
        while base < end {
            let began = clock::now();
            let bytes = window.len().min((end - base) as usize);
            let window = &mut window[..bytes];
            let next = match file.read_from_medium(window, base as u64) {
                Ok(()) => self.window(id, &*file, base, window, end),
                Err(e) => {
                    self.hole(id, (base, base + bytes as u32), &e.to_string());
                    base + bytes as u32
                }
            };
            self.inner.scrubbed().bytes += u64::from(next - base);
            self.rest(pause(next - base, self.inner.options.scrub_bytes_per_second, began))?;
            base = next;
            if self.sealed(id).is_none() {
                return Ok(()); // given back meanwhile: its file holds something else now
            }
        }
        Ok(())
    }

    fn sealed(&self, id: SegmentId) -> Option<(Arc<dyn DiskFile>, u32)> {
        let state = self.inner.state();
        state.segments.get(&id).map(|segment| (segment.file.clone(), segment.end))
    }

    /// Checks what stands in a window. Returns where the next one begins.
    fn window(&self, id: SegmentId, file: &dyn DiskFile, base: u32, bytes: &[u8], end: u32) -> u32 {
        let scan = recovery::scan_part(&self.inner.options.keys.of_segment(id), base, bytes);
        let next = scan.next_window(base, base + bytes.len() as u32, end);
        for hole in scan.holes.iter().filter(|hole| hole.from < next) {
            self.hole(id, (hole.from, hole.to), &hole.why.to_string());
        }
        if next == end && scan.holes.is_empty() && scan.end < end {
            self.hole(id, (scan.end, end), "nothing stands here, and something was written");
        }
        for found in scan.records.iter().filter(|f| f.location.offset < next && !f.body_intact) {
            self.body(file, found.at.index, found.location, Some(found.body_crc));
        }
        next
    }

    /// A record whose body is not what was written: it matters if it is live, and nobody has erased it since it was read.
    fn body(&self, file: &dyn DiskFile, index: LogIndex, location: Location, crc: Option<u32>) {
        let again = read(file, &self.inner.options.keys, location, Some(index), true);
        if !matches!(again, Err(ReadError::Damaged { .. } | ReadError::Io { .. })) {
            return;
        }
        let cached = {
            let mut state = self.inner.state();
            if !state.stands_at(index, location) {
                return;
            }
            let cached = state.cached_body(index);
            if cached.is_none() {
                state.body_lost(index, location, crc);
            }
            cached
        };
        self.note(location, "the body is not what was written");
        if let Some((at, ticket, body)) = cached {
            let record = Record { kind: Kind::Body, at, head: Bytes::new(), body };
            let note = Note::MovedBody(ticket, location);
            // If the log has closed nobody reads it any more.
            drop(self.requests.send(Request { records: vec![(record, note)], done: None }));
        }
    }

    /// Octets that are no record. Whatever is live among them is lost; the rest of the segment is moved out of it.
    fn hole(&self, id: SegmentId, (from, to): (u32, u32), why: &str) {
        let (is_news, file, bodies) = {
            let mut state = self.inner.state();
            let Some(file) = state.segments.get(&id).map(|segment| segment.file.clone()) else { return };
            // What a salvage has overwritten was told then.
            let was_told = state.reset.is_some_and(|reset| id < reset);
            let is_news = state.damaged.insert(id) && !was_told;
            let bodies = state.bodies_in(id).filter(|(_, place)| (from..to).contains(&place.offset));
            (is_news, file, bodies.collect::<Vec<_>>())
        };
        if is_news {
            self.note(format!("segment {id} offset {from}"), why);
        }
        for (index, location) in bodies {
            self.body(&*file, index, location, None);
        }
    }
}

/// How long to rest after so many octets, so that the rate is kept.
fn pause(bytes: u32, per_second: u64, began: Instant) -> Duration {
    let due = Duration::from_millis(u64::from(bytes) * 1000 / per_second.max(1));
    due.saturating_sub(clock::now().saturating_duration_since(began))
}
