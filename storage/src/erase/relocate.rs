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
use crate::limits::{BODY_BYTES_MAX, MOVE_ROUND_BYTES};
use crate::log::Inner;
use crate::log::reader::read;
use crate::log::recovery::{self, Found};
use crate::log::writer::Note;
use crate::position::SegmentId;
use crate::record::{Kind, Record};

/// A segment that is being emptied.
pub(super) struct Relocation {
    segment: SegmentId,
    file: Arc<dyn DiskFile>,
    /// Its records that may be live.
    left: VecDeque<Found>,
}

impl Relocation {
    /// Begins with the sparsest segment that was not `tried` lately, if there is one that is worth it.
    pub(super) fn begin(inner: &Inner, tried: &BTreeSet<SegmentId>) -> std::io::Result<Option<Relocation>> {
        let percent = inner.options.move_below_percent;
        let (segment, file) = {
            let state = inner.state();
            let Some(id) = state.sparse_segment(percent, tried) else { return Ok(None) };
            (id, state.segments[&id].file.clone())
        };
        let mut bytes = vec![0; inner.segment_bytes as usize];
        file.read_at(&mut bytes, 0)?;
        let mut left: VecDeque<Found> = recovery::scan(segment, &bytes).records.into();
        left.retain(|found| matches!(found.kind, Kind::Entry | Kind::Body | Kind::Row));
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
            && let Some(found) = self.left.pop_front()
        {
            let copy = match found.kind {
                Kind::Row => self.row(inner, &found)?,
                _ => self.body(inner, &found)?,
            };
            bytes += copy.as_ref().map_or(0, |(record, _)| record.stored_bytes());
            copies.extend(copy);
        }
        Ok(copies)
    }

    fn body(&self, inner: &Inner, found: &Found) -> Result<Option<(Record, Note)>, ReadError> {
        let index = found.at.index;
        let live = |inner: &Inner| match inner.state().bodies.get(&index) {
            Some((ticket, place)) if *place == Some(found.location) => Some(*ticket),
            _ => None,
        };
        let Some(ticket) = live(inner) else { return Ok(None) };
        debug_assert!(found.location.body_bytes as usize <= BODY_BYTES_MAX);
        match read(&*self.file, found.location, Some(index), true) {
            Ok((_, body)) => {
                let record = Record { kind: Kind::Body, at: found.at, head: Bytes::new(), body };
                Ok(Some((record, Note::MovedBody(ticket, found.location))))
            }
            // It was erased between looking and reading.
            Err(ReadError::Damaged { .. }) if live(inner).is_none() => Ok(None),
            // Whoever needs it finds out; the segment stays until the others have brought it.
            Err(ReadError::Damaged { .. }) => {
                inner.state().body_lost(index, found.location, found.body_crc);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn row(&self, inner: &Inner, found: &Found) -> Result<Option<(Record, Note)>, ReadError> {
        let Some(key) = found.head.first_chunk().map(|key| u128::from_le_bytes(*key)) else {
            return Ok(None);
        };
        let live = inner.state().rows.get(&key).is_some_and(|place| place.location == found.location);
        if !live {
            return Ok(None);
        }
        let (head, _) = read(&*self.file, found.location, None, false)?;
        let record = Record { kind: Kind::Row, at: found.at, head, body: Bytes::new() };
        Ok(Some((record, Note::MovedRow { key, from: found.location })))
    }
}
