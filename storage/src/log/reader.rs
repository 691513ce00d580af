//! Reading entries and bodies back. Every read is verified against the record's header, so a wrong octet is an error and
//! never a message.

use std::borrow::Cow;
use std::ops::{Bound, Range};
use std::sync::Arc;

use bytes::Bytes;

use super::recovery::ROW_KEY_BYTES;
use super::state::RowPlace;
use super::{Entry, Log};
use crate::disk::DiskFile;
use crate::error::ReadError;
use crate::position::{Location, LogIndex, LogPosition, Term};
use crate::record::{self, HEADER_BYTES, Header, Invalid};
use crate::seal::Keyring;

enum Source {
    Memory(Bytes, Bytes),
    /// The head stands in the one place; the body, if it is live, in the other, which is the same unless it was fetched again.
    Disk {
        file: Arc<dyn DiskFile>,
        location: Location,
        body: Option<(Arc<dyn DiskFile>, Location)>,
    },
}

impl Log {
    /// Entries of `range`, as far as the log has them and until their octets exceed `bytes_max`; at least one if there
    /// is one. A body that was erased is empty.
    ///
    /// # Errors
    /// If a record cannot be read or is damaged.
    pub fn entries(&self, range: Range<u64>, bytes_max: usize) -> Result<Vec<Entry>, ReadError> {
        self.read_entries(range, bytes_max, false)
    }

    /// The same, but it ends before an entry whose body is damaged and not yet mended: there may be none then.
    ///
    /// # Errors
    /// If a record cannot be read or is damaged, but for a body that is known to be.
    pub fn intact_entries(&self, range: Range<u64>, bytes_max: usize) -> Result<Vec<Entry>, ReadError> {
        self.read_entries(range, bytes_max, true)
    }

    fn read_entries(
        &self,
        range: Range<u64>,
        bytes_max: usize,
        until_lost: bool,
    ) -> Result<Vec<Entry>, ReadError> {
        let mut sources = Vec::new();
        {
            let state = self.inner.state();
            let mut bytes = 0;
            for index in range.start.max(state.first)..range.end {
                let index = LogIndex(index);
                let Some(slot) = state.slot(index) else { break };
                let at = LogPosition { term: slot.term, index };
                let source = match (&slot.cached, slot.location) {
                    (Some((head, body)), _) => {
                        bytes += head.len() + body.len();
                        Source::Memory(head.clone(), body.clone())
                    }
                    (None, Some(location)) => {
                        let is_lost = state.lost.get(&index).is_some_and(|(place, _)| *place == location);
                        if is_lost && until_lost {
                            break;
                        }
                        if is_lost {
                            return Err(damaged(location, "the body's CRC is wrong"));
                        }
                        let body = match state.bodies.get(&index) {
                            Some((ticket, Some(place))) if *ticket == slot.ticket => {
                                state.segments.get(&place.segment).map(|s| (s.file.clone(), *place))
                            }
                            _ => None,
                        };
                        let Some(segment) = state.segments.get(&location.segment) else {
                            return Err(damaged(location, "its segment is gone"));
                        };
                        bytes += location.head_bytes as usize + location.body_bytes as usize;
                        Source::Disk { file: segment.file.clone(), location, body }
                    }
                    (None, None) => unreachable!("an entry is in memory until its record is written"),
                };
                sources.push((at, source));
                if bytes >= bytes_max {
                    break;
                }
            }
        }
        let mut found = Vec::with_capacity(sources.len());
        for (at, source) in sources {
            match self.read_entry(at, source) {
                // It was found damaged between looking and reading.
                Err(_) if until_lost && self.is_lost(at.index) => break,
                entry => found.push(entry?),
            }
        }
        Ok(found)
    }

    fn read_entry(&self, at: LogPosition, source: Source) -> Result<Entry, ReadError> {
        match source {
            Source::Memory(head, body) => Ok(Entry { at, head, body }),
            Source::Disk { file, location, body } => {
                let keys = &self.inner.options.keys;
                let (head, _) = read(&*file, keys, location, Some(at.index), false)?;
                let body = body.map(|(file, place)| (read(&*file, keys, place, Some(at.index), true), place));
                let body = match body {
                    Some((Ok((_, body)), _)) => body,
                    // Between looking and reading it was moved, or erased.
                    Some((Err(error @ ReadError::Damaged { .. }), place))
                        if !self.is_live(at.index, place) =>
                    {
                        if self.is_lost(at.index) {
                            return Err(error);
                        }
                        match self.body(at.index) {
                            Ok(body) => body,
                            Err(ReadError::Absent(_)) => Bytes::new(),
                            Err(error) => return Err(error),
                        }
                    }
                    Some((Err(error), _)) => return Err(error),
                    None => Bytes::new(),
                };
                Ok(Entry { at, head, body })
            }
        }
    }

    fn is_lost(&self, index: LogIndex) -> bool {
        self.inner.state().lost.contains_key(&index)
    }

    /// The last position that is durable here, and the highest index of which the body is lost.
    pub fn has(&self) -> (Option<LogPosition>, Option<LogIndex>) {
        let state = self.inner.state();
        let written = state.slots.iter().rposition(|slot| slot.location.is_some());
        let last = written.map(|n| {
            let index = LogIndex(state.first + n as u64);
            LogPosition { term: state.slots[n].term, index }
        });
        (last.or(state.floor), state.lost.keys().next_back().copied())
    }

    /// Length and CRC-32 of the body of an index, as its record has them.
    ///
    /// # Errors
    /// As [`Log::body`].
    pub fn digest(&self, index: LogIndex) -> Result<(u32, u32), ReadError> {
        let (file, location) = {
            let state = self.inner.state();
            match state.bodies.get(&index).copied() {
                Some((_, Some(location))) => match state.segments.get(&location.segment) {
                    Some(segment) => (segment.file.clone(), location),
                    None => return Err(damaged(location, "its segment is gone")),
                },
                Some((_, None)) => {
                    drop(state);
                    return self.body(index).map(|body| (body.len() as u32, crc32fast::hash(&body)));
                }
                // It was not erased: nobody may take it for that.
                None => {
                    return Err(match state.lost.get(&index) {
                        Some((location, _)) => damaged(*location, "the body's CRC is wrong"),
                        None => ReadError::Absent(index),
                    });
                }
            }
        };
        body_crc_at(&*file, &self.inner.options.keys, location).map(|crc| (location.body_bytes, crc))
    }

    /// Position and head of an entry, if the log has it.
    ///
    /// # Errors
    /// As [`Log::entries`].
    pub fn head(&self, index: LogIndex) -> Result<Option<(LogPosition, Bytes)>, ReadError> {
        let (at, file, location) = {
            let state = self.inner.state();
            let Some(slot) = state.slot(index) else { return Ok(None) };
            let at = LogPosition { term: slot.term, index };
            if let Some((head, _)) = &slot.cached {
                return Ok(Some((at, head.clone())));
            }
            let Some(location) = slot.location else { return Ok(None) };
            let Some(segment) = state.segments.get(&location.segment) else {
                return Err(damaged(location, "its segment is gone"));
            };
            (at, segment.file.clone(), location)
        };
        read(&*file, &self.inner.options.keys, location, Some(index), false).map(|(head, _)| Some((at, head)))
    }

    /// The term of the entry at `index`, if the log has it.
    pub fn term_of(&self, index: LogIndex) -> Option<Term> {
        self.inner.state().slot(index).map(|slot| slot.term)
    }

    /// The body that entry `index` brought.
    ///
    /// # Errors
    /// [`ReadError::Absent`] if it was erased or never was here; otherwise the disk's fault.
    pub fn body(&self, index: LogIndex) -> Result<Bytes, ReadError> {
        loop {
            match self.body_once(index)? {
                Some(body) => return Ok(body),
                None => continue, // it was moved between looking and reading
            }
        }
    }

    fn body_once(&self, index: LogIndex) -> Result<Option<Bytes>, ReadError> {
        let (file, location) = {
            let state = self.inner.state();
            let Some((ticket, location)) = state.bodies.get(&index).copied() else {
                return Err(match state.lost.get(&index) {
                    Some((location, _)) => damaged(*location, "the body's CRC is wrong"),
                    None => ReadError::Absent(index),
                });
            };
            if let Some(slot) = state.slot(index)
                && slot.ticket == ticket
                && let Some((_, body)) = &slot.cached
            {
                return Ok(Some(body.clone()));
            }
            let Some(location) = location else { return Err(ReadError::Absent(index)) };
            let Some(segment) = state.segments.get(&location.segment) else {
                return Err(damaged(location, "its segment is gone"));
            };
            (segment.file.clone(), location)
        };
        match read(&*file, &self.inner.options.keys, location, Some(index), true) {
            // It was moved, or found damaged, or erased.
            Err(error @ ReadError::Damaged { .. }) if !self.is_live(index, location) => {
                if self.has_body(index) {
                    Ok(None)
                } else if self.is_lost(index) {
                    Err(error)
                } else {
                    Err(ReadError::Absent(index))
                }
            }
            found => found.map(|(_, body)| Some(body)),
        }
    }

    /// The row of `key` as the newest complete checkpoint wrote it, read from the log.
    ///
    /// # Errors
    /// If its record cannot be read or is damaged.
    pub fn row(&self, key: u128) -> Result<Option<Bytes>, ReadError> {
        loop {
            let (file, place) = {
                let state = self.inner.state();
                let Some(place) = state.rows.get(&key).copied() else { return Ok(None) };
                let Some(segment) = state.segments.get(&place.location.segment) else {
                    return Err(damaged(place.location, "its segment is gone"));
                };
                (segment.file.clone(), place)
            };
            let found =
                read(&*file, &self.inner.options.keys, place.location, None, false).and_then(|(head, _)| {
                    let same = row_crc(key, &head[ROW_KEY_BYTES.min(head.len())..]) == place.crc;
                    let row = || head.slice(ROW_KEY_BYTES..);
                    if same { Ok(row()) } else { Err(damaged(place.location, "another row stands here")) }
                });
            match found {
                // A newer checkpoint has replaced it, and its segment was given back, between looking and reading.
                Err(ReadError::Damaged { .. }) if self.row_place(key) != Some(place) => {}
                found => return found.map(Some),
            }
        }
    }

    fn row_place(&self, key: u128) -> Option<RowPlace> {
        self.inner.state().rows.get(&key).copied()
    }

    /// The CRC-32 of the key and row that the newest complete checkpoint has for `key`, key first.
    pub fn row_crc(&self, key: u128) -> Option<u32> {
        self.row_place(key).map(|place| place.crc)
    }

    /// Up to `max` keys above `after` that have a row, in rising order, with the CRC-32 of each.
    pub fn row_keys(&self, after: Option<u128>, max: usize) -> Vec<(u128, u32)> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let state = self.inner.state();
        state.rows.range((from, Bound::Unbounded)).take(max).map(|(key, place)| (*key, place.crc)).collect()
    }

    /// Stops the log: a row that the state needs is in no place where it could be read.
    pub(crate) fn fail_reading(&self, error: &ReadError) {
        self.inner.fail(&error.to_string());
    }

    /// Whether the body at a place is still live.
    fn is_live(&self, index: LogIndex, location: Location) -> bool {
        self.inner.state().bodies.get(&index).is_some_and(|(_, place)| *place == Some(location))
    }
}

/// CRC-32 of a key and its row, as the head of a row's record has it.
pub(crate) fn row_crc(key: u128, row: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&key.to_le_bytes());
    crc.update(row);
    crc.finalize()
}

fn damaged(at: Location, why: &str) -> ReadError {
    ReadError::Damaged { at, why: why.into() }
}

/// The header that stands at a place.
pub(crate) fn header_at(file: &dyn DiskFile, location: Location) -> Result<Header, ReadError> {
    let mut bytes = [0; HEADER_BYTES];
    file.read_at(&mut bytes, location.offset as u64)
        .map_err(|error| ReadError::Io { at: location, error })?;
    record::read_header(&bytes, location.segment, location.offset)
        .map_err(|invalid| damaged(location, &invalid.to_string()))
}

/// CRC-32 of the body that was handed over for a place, whatever has become of it there.
pub(crate) fn body_crc_at(file: &dyn DiskFile, keys: &Keyring, location: Location) -> Result<u32, ReadError> {
    let mut bytes = vec![0; HEADER_BYTES + location.head_bytes as usize];
    file.read_at(&mut bytes, location.offset as u64)
        .map_err(|error| ReadError::Io { at: location, error })?;
    record::read_header(&bytes, location.segment, location.offset)
        .and_then(|header| header.open_head(&bytes[HEADER_BYTES..], &keys.of_segment(location.segment)))
        .map(|head| head.body_crc)
        .map_err(|invalid| damaged(location, &invalid.to_string()))
}

pub(crate) fn read(
    file: &dyn DiskFile,
    keys: &Keyring,
    location: Location,
    index: Option<LogIndex>,
    with_body: bool,
) -> Result<(Bytes, Bytes), ReadError> {
    let head_end = HEADER_BYTES + location.head_bytes as usize;
    let body_bytes = if with_body { location.body_bytes as usize } else { 0 };
    let mut bytes = vec![0; head_end + body_bytes];
    file.read_at(&mut bytes, location.offset as u64)
        .map_err(|error| ReadError::Io { at: location, error })?;
    let header = record::read_header(&bytes, location.segment, location.offset)
        .map_err(|invalid| damaged(location, &invalid.to_string()))?;
    if index.is_some_and(|index| header.at.index != index)
        || header.head_bytes != location.head_bytes
        || header.body_bytes != location.body_bytes
    {
        return Err(damaged(location, "another record stands here"));
    }
    let bytes = Bytes::from(bytes);
    let (head, body) = (bytes.slice(HEADER_BYTES..head_end), bytes.slice(head_end..));
    let keys = keys.of_segment(location.segment);
    let open = || {
        let text = match header.open_head(&head, &keys)?.text {
            Cow::Borrowed(_) => head.clone(),
            Cow::Owned(text) => text.into(),
        };
        let body = if with_body { header.open_body(&head, body, &keys)? } else { body };
        Ok((text, body))
    };
    open().map_err(|invalid: Invalid| damaged(location, &invalid.to_string()))
}
