//! Moving what is live out of mostly dead segments, so that a message which waits for days does not hold a segment for days. A few
//! octets each round; the copy goes through the one writer, and whether it is still needed is asked again when it is written. A
//! body that was moved leaves octets that die like any other's.
//!
//! A crash between copy and erasure leaves two copies: the fold takes the later one and erases the other.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::disk::DiskFile;
use crate::error::ReadError;
use crate::limits::{BODY_BYTES_MAX, MOVE_ROUND_BYTES, SCRUB_WINDOW_BYTES};
use crate::log::Inner;
use crate::log::reader::{body_crc_at, header_at, read};
use crate::log::recovery::{self, Found};
use crate::log::writer::Note;
use crate::position::{Location, LogIndex, SegmentId};
use crate::record::{Kind, Record};

/// A segment that is being emptied.
pub(super) struct Relocation {
    segment: SegmentId,
    file: Arc<dyn DiskFile>,
    /// Its records that may be live.
    left: VecDeque<Live>,
}

/// A record that may be live, and where it stands.
#[derive(Clone, Copy)]
enum Live {
    Body(LogIndex, Location),
    Row(u128, Location),
}

impl Live {
    fn of(found: Found) -> Option<Live> {
        match found.kind {
            Kind::Entry | Kind::Body => Some(Live::Body(found.at.index, found.location)),
            Kind::Row => Some(Live::Row(u128::from_le_bytes(*found.head.first_chunk()?), found.location)),
            _ => None,
        }
    }
}

impl Relocation {
    /// Begins with the sparsest segment that was not `tried` lately, if there is one that is worth it and there is room for what is live in it.
    pub(super) fn begin(inner: &Inner, tried: &BTreeSet<SegmentId>) -> std::io::Result<Option<Relocation>> {
        let percent = inner.options.move_below_percent;
        let room = inner.room_to_move();
        let (segment, file, end) = {
            let state = inner.state();
            let Some(id) = state.sparse_segment(percent, tried, room) else { return Ok(None) };
            let file = state.segments[&id].file.clone();
            if state.damaged.contains(&id) {
                // Its records cannot all be found by reading it.
                let bodies = state.bodies_in(id).map(|(index, place)| Live::Body(index, place));
                let rows = state.rows_in(id).map(|(key, place)| Live::Row(key, place));
                let left = bodies.chain(rows).collect();
                return Ok(Some(Relocation { segment: id, file, left }));
            }
            (id, file, state.segments[&id].end)
        };
        let keys = inner.options.keys.of_segment(segment);
        let mut left = VecDeque::new();
        let mut window = vec![0; SCRUB_WINDOW_BYTES.min(end as usize)];
        let mut base = 0;
        while base < end {
            let bytes = window.len().min((end - base) as usize);
            file.read_at(&mut window[..bytes], base as u64)?;
            let scan = recovery::scan_part(&keys, base, &window[..bytes]);
            let next = scan.next_window(base, base + bytes as u32, end);
            let whole = scan.records.into_iter().filter(|found| found.location.offset < next);
            left.extend(whole.filter_map(Live::of));
            base = next;
        }
        Ok(Some(Relocation { segment, file, left }))
    }

    /// Which segment it empties.
    pub(super) fn segment(&self) -> SegmentId {
        self.segment
    }

    /// The next copies; nothing once all was looked at.
    ///
    /// # Errors
    /// If what is live cannot be read.
    pub(super) fn next(&mut self, inner: &Inner) -> Result<Vec<(Record, Note)>, ReadError> {
        let mut copies = Vec::new();
        let mut bytes = 0;
        while bytes < MOVE_ROUND_BYTES
            && let Some(live) = self.left.pop_front()
        {
            let copy = match live {
                Live::Body(index, location) => self.body(inner, index, location)?,
                Live::Row(key, location) => self.row(inner, key, location)?,
            };
            bytes += copy.as_ref().map_or(0, |(record, _)| record.head.len() + record.body.len());
            copies.extend(copy);
        }
        Ok(copies)
    }

    fn body(
        &self,
        inner: &Inner,
        index: LogIndex,
        location: Location,
    ) -> Result<Option<(Record, Note)>, ReadError> {
        let live = |inner: &Inner| match inner.state().bodies.get(&index) {
            Some((ticket, place)) if *place == Some(location) => Some(*ticket),
            _ => None,
        };
        let Some(ticket) = live(inner) else { return Ok(None) };
        debug_assert!(location.body_bytes as usize <= BODY_BYTES_MAX);
        let keys = &inner.options.keys;
        match read(&*self.file, keys, location, Some(index), true) {
            Ok((_, body)) => {
                let at = header_at(&*self.file, location)?.at;
                let record = Record { kind: Kind::Body, at, head: Bytes::new(), body };
                Ok(Some((record, Note::MovedBody(ticket, location))))
            }
            // It was erased between looking and reading.
            Err(_) if live(inner).is_none() => Ok(None),
            // Whoever needs it finds out; the segment stays until the others have brought it.
            Err(error) => {
                let crc = body_crc_at(&*self.file, keys, location).ok();
                let mut state = inner.state();
                if state.stands_at(index, location) {
                    tracing::error!(%error, "a body is damaged");
                    state.body_lost(index, location, crc);
                }
                Ok(None)
            }
        }
    }

    fn row(&self, inner: &Inner, key: u128, location: Location) -> Result<Option<(Record, Note)>, ReadError> {
        let live =
            |inner: &Inner| inner.state().rows.get(&key).is_some_and(|place| place.location == location);
        if !live(inner) {
            return Ok(None);
        }
        match read(&*self.file, &inner.options.keys, location, None, false) {
            Ok((head, _)) => {
                let at = header_at(&*self.file, location)?.at;
                let record = Record { kind: Kind::Row, at, head, body: Bytes::new() };
                Ok(Some((record, Note::MovedRow { key, from: location })))
            }
            Err(_) if !live(inner) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
