//! What a running node knows of its log: where each entry, body and row stands, and what keeps a segment alive.
//!
//! The invariants, checked by `LogState::check` in tests and debug builds:
//! `floor < first entry`, entries are consecutive, and each segment's count of live things is what a recount gives.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::clock;
use crate::codec::Vote;
use crate::disk::DiskFile;
use crate::limits::CACHE_BYTES_MAX;
use crate::position::{Location, LogIndex, LogPosition, SegmentId, Term};
use crate::record::HEADER_BYTES;
use crate::seal::SEALED_BYTES;

/// An entry of the replicated log. The meaning of head and body is the caller's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Term and index.
    pub at: LogPosition,
    /// Structured part, always present.
    pub head: Bytes,
    /// Raw part; empty if there was none or it was erased.
    pub body: Bytes,
}

/// Names one append, so that a late write is not taken for an entry that replaced it.
pub(crate) type Ticket = u64;

pub(crate) struct Slot {
    pub(crate) term: Term,
    pub(crate) ticket: Ticket,
    pub(crate) location: Option<Location>,
    pub(crate) cached: Option<(Bytes, Bytes)>,
}

/// A segment in use.
pub(crate) struct Segment {
    pub(crate) slot: u32,
    pub(crate) file: Arc<dyn DiskFile>,
    /// Where its records end; for the active segment, where the next batch begins.
    pub(crate) end: u32,
    /// Entries above the floor, bodies, current rows and table parts in it.
    pub(crate) live: u64,
    /// Entries above the floor among them: their records cannot be moved.
    pub(crate) entries: u64,
    /// Octets of bodies and current rows in it.
    pub(crate) live_bytes: u64,
    /// Octets of bodies in it that are live.
    pub(crate) live_body_bytes: u64,
    /// Whether a record in it is not sealed with the key that seals now: it is emptied.
    pub(crate) other_key: bool,
    /// Ranges that were erased, from intents.
    pub(crate) erased: Vec<(u32, u32)>,
    /// Segments that intents in this one name.
    pub(crate) intents_for: BTreeSet<SegmentId>,
    /// Keys with a row record here, current or not.
    pub(crate) row_keys: Vec<u128>,
    /// Keys with a `Gone` record here.
    pub(crate) gone_keys: Vec<u128>,
    /// Numbers of checkpoints that have a row, table part or end here.
    pub(crate) checkpoints: BTreeSet<u64>,
}

impl Segment {
    pub(crate) fn new(slot: u32, file: Arc<dyn DiskFile>) -> Segment {
        Segment {
            slot,
            file,
            end: 0,
            live: 0,
            entries: 0,
            live_bytes: 0,
            live_body_bytes: 0,
            other_key: false,
            erased: Vec::new(),
            intents_for: BTreeSet::new(),
            row_keys: Vec::new(),
            gone_keys: Vec::new(),
            checkpoints: BTreeSet::new(),
        }
    }
}

/// Where the current row of a key stands, and the CRC-32 of its record's head (key and row): whatever claims to be this
/// row elsewhere is believed if it has that CRC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowPlace {
    pub(crate) location: Location,
    pub(crate) crc: u32,
}

/// What a record takes beside its body, or its key and row: header, seal, alignment.
const RECORD_BYTES: u64 = (HEADER_BYTES + SEALED_BYTES + 8) as u64;

/// A body whose story is over and whose octets are still there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dying {
    pub(crate) index: LogIndex,
    pub(crate) location: Location,
    /// When it died, as far as this start of the node knows.
    pub(crate) since: Instant,
}

#[derive(Default)]
pub(crate) struct LogState {
    /// Index of `slots[0]`.
    pub(crate) first: u64,
    pub(crate) slots: VecDeque<Slot>,
    pub(crate) floor: Option<LogPosition>,
    pub(crate) vote: Option<Vote>,
    pub(crate) committed: Option<LogPosition>,
    /// Bodies that are not erased, above and below the floor.
    pub(crate) bodies: BTreeMap<LogIndex, (Ticket, Option<Location>)>,
    pub(crate) segments: BTreeMap<SegmentId, Segment>,
    /// The current row of each key: that of the newest complete checkpoint.
    pub(crate) rows: BTreeMap<u128, RowPlace>,
    /// How many row records each key has in all segments.
    pub(crate) row_copies: BTreeMap<u128, u32>,
    /// Keys whose rows are void, and the segment of the record that says so.
    pub(crate) gone: BTreeMap<u128, SegmentId>,
    /// Segments of the newest checkpoint's tables and end.
    pub(crate) tables: Vec<SegmentId>,
    /// Number of the newest checkpoint that was begun.
    pub(crate) checkpoint: u64,
    /// Segments with records of a checkpoint that is not complete yet: they are kept whatever else is in them.
    pub(crate) pending: BTreeSet<SegmentId>,
    /// Numbers of checkpoints that were cut short, by a crash or since nobody wanted them any more.
    pub(crate) void: BTreeSet<u64>,
    /// Number of the replacement that was begun and not ended.
    pub(crate) replacement: Option<u64>,
    /// Number of the newest complete checkpoint.
    pub(crate) complete: u64,
    pub(crate) dying: Vec<Dying>,
    /// Bodies that were taken from there and are being overwritten.
    pub(crate) being_erased: usize,
    /// Bodies whose octets are not what was written, with the CRC-32 of what was. Their records count as live until somebody
    /// has brought the body, or nobody needs it.
    pub(crate) lost: BTreeMap<LogIndex, (Location, Option<u32>)>,
    /// Bodies that somebody has brought and that are being written.
    pub(crate) mending: BTreeMap<LogIndex, Ticket>,
    /// Sealed segments in which something was found that is no record: they are emptied.
    pub(crate) damaged: BTreeSet<SegmentId>,
    /// This node may have acknowledged entries up to here that it does not have.
    pub(crate) doubt: Option<LogPosition>,
    /// The segment of the record that voids what stands before it: kept as long as anything does.
    pub(crate) reset: Option<SegmentId>,
    pub(crate) next_ticket: Ticket,
    /// The log is synced up to here.
    pub(crate) synced: (SegmentId, u32),
    cached_bytes: usize,
    evicted_to: u64,
    pub(crate) failed: Option<String>,
}

impl LogState {
    /// Up to where this node may have acknowledged entries, if it does not have as many.
    pub(crate) fn unresolved_doubt(&self) -> Option<LogPosition> {
        self.doubt.filter(|doubt| self.last() < Some(*doubt))
    }

    /// Position of the last entry, or the floor if there is none above it.
    pub(crate) fn last(&self) -> Option<LogPosition> {
        match self.slots.back() {
            Some(slot) => Some(LogPosition {
                term: slot.term,
                index: LogIndex(self.first + self.slots.len() as u64 - 1),
            }),
            None => self.floor,
        }
    }

    pub(crate) fn slot(&self, index: LogIndex) -> Option<&Slot> {
        self.slots.get(usize::try_from(index.0.checked_sub(self.first)?).ok()?)
    }

    /// Whether the log has, or had until it was purged, exactly this entry.
    pub(crate) fn has(&self, at: LogPosition) -> bool {
        let below = self.floor.is_some_and(|floor| at.index <= floor.index);
        let same = self.slot(at.index).is_some_and(|slot| slot.term == at.term);
        below || same
    }

    pub(crate) fn slot_mut(&mut self, index: LogIndex) -> Option<&mut Slot> {
        self.slots.get_mut(usize::try_from(index.0.checked_sub(self.first)?).ok()?)
    }

    fn add_live(&mut self, segment: SegmentId, body_bytes: u32) {
        if let Some(s) = self.segments.get_mut(&segment) {
            s.live += 1;
            s.live_bytes += body_bytes as u64;
            s.live_body_bytes += body_bytes as u64;
        }
    }

    fn add_row(&mut self, row: Location) {
        self.add_live(row.segment, 0);
        if let Some(s) = self.segments.get_mut(&row.segment) {
            s.live_bytes += row.head_bytes as u64;
        }
    }

    fn drop_row(&mut self, row: Location) {
        self.drop_live(row.segment, 0);
        if let Some(s) = self.segments.get_mut(&row.segment) {
            s.live_bytes = s.live_bytes.saturating_sub(row.head_bytes as u64);
        }
    }

    fn drop_live(&mut self, segment: SegmentId, body_bytes: u32) {
        if let Some(s) = self.segments.get_mut(&segment) {
            debug_assert!(s.live > 0, "segment {segment} has fewer live things than were dropped");
            s.live = s.live.saturating_sub(1);
            s.live_bytes = s.live_bytes.saturating_sub(body_bytes as u64);
            s.live_body_bytes = s.live_body_bytes.saturating_sub(body_bytes as u64);
        }
    }

    /// Adds an entry at the end. Its location is not known yet.
    pub(crate) fn push(&mut self, entry: &Entry) -> Ticket {
        if self.slots.is_empty() {
            self.first = entry.at.index.0;
            self.evicted_to = self.first;
        }
        assert_eq!(entry.at.index.0, self.first + self.slots.len() as u64, "the log has no holes");
        self.next_ticket += 1;
        let ticket = self.next_ticket;
        self.cached_bytes += entry.head.len() + entry.body.len();
        self.slots.push_back(Slot {
            term: entry.at.term,
            ticket,
            location: None,
            cached: Some((entry.head.clone(), entry.body.clone())),
        });
        if !entry.body.is_empty() {
            // A body of the same index can be there already if it was fetched for a snapshot that was not installed.
            let older = self.bodies.insert(entry.at.index, (ticket, None));
            if let Some((_, Some(location))) = older {
                self.dying.push(Dying { index: entry.at.index, location, since: clock::now() });
            }
        }
        ticket
    }

    /// An entry's record is on disk.
    pub(crate) fn entry_written(&mut self, index: LogIndex, ticket: Ticket, location: Location) {
        if let Some(slot) = self.slot_mut(index)
            && slot.ticket == ticket
        {
            slot.location = Some(location);
            self.add_live(location.segment, 0);
            if let Some(s) = self.segments.get_mut(&location.segment) {
                s.entries += 1;
            }
        }
        if location.body_bytes > 0 {
            self.body_written(index, ticket, location);
        }
    }

    /// A body is on disk. If it died meanwhile it goes to the erase plan.
    pub(crate) fn body_written(&mut self, index: LogIndex, ticket: Ticket, location: Location) {
        match self.bodies.get_mut(&index) {
            Some((t, place)) if *t == ticket => {
                *place = Some(location);
                self.add_live(location.segment, location.body_bytes);
            }
            _ => {
                self.add_live(location.segment, location.body_bytes);
                self.dying.push(Dying { index, location, since: clock::now() });
            }
        }
    }

    /// A body is found to be other octets than were written.
    pub(crate) fn body_lost(&mut self, index: LogIndex, location: Location, crc: Option<u32>) {
        match self.bodies.remove(&index) {
            Some((_, Some(_))) => {} // counted already
            _ => self.add_live(location.segment, location.body_bytes),
        }
        self.lost.insert(index, (location, crc));
    }

    /// Whether a live body stands at this place and nowhere else on the disk.
    pub(crate) fn stands_at(&self, index: LogIndex, location: Location) -> bool {
        matches!(self.bodies.get(&index), Some((_, Some(place))) if *place == location)
    }

    /// Whether a live body is this one and stands there.
    pub(crate) fn is_body(&self, index: LogIndex, ticket: Ticket, location: Location) -> bool {
        self.bodies.get(&index) == Some(&(ticket, Some(location)))
    }

    /// A body as it is in memory, if it is still there, to be written to another place as well.
    pub(crate) fn cached_body(&self, index: LogIndex) -> Option<(LogPosition, Ticket, Bytes)> {
        let slot = self.slot(index)?;
        let body = slot.cached.as_ref().map(|(_, body)| body.clone()).filter(|body| !body.is_empty())?;
        let (ticket, _) = self.bodies.get(&index).filter(|(ticket, _)| *ticket == slot.ticket)?;
        Some((LogPosition { term: slot.term, index }, *ticket, body))
    }

    /// A body that was lost, or of which nothing was left, is on disk. If its story has ended meanwhile, or another mending was begun, it
    /// dies.
    pub(crate) fn body_mended(&mut self, index: LogIndex, ticket: Ticket, mend: Ticket, to: Location) {
        self.add_live(to.segment, to.body_bytes);
        let since = clock::now();
        if self.mending.get(&index) != Some(&mend) || self.bodies.contains_key(&index) {
            self.dying.push(Dying { index, location: to, since });
            return;
        }
        self.mending.remove(&index);
        let lost = self.lost.remove(&index);
        self.dying.extend(lost.map(|(location, _)| Dying { index, location, since }));
        self.bodies.insert(index, (ticket, Some(to)));
    }

    /// Live bodies that stand in a segment.
    pub(crate) fn bodies_in(&self, id: SegmentId) -> impl Iterator<Item = (LogIndex, Location)> {
        let bodies = self.bodies.iter().filter_map(|(index, (_, place))| Some((*index, (*place)?)));
        bodies.filter(move |(_, place)| place.segment == id)
    }

    /// Current rows that stand in a segment.
    pub(crate) fn rows_in(&self, id: SegmentId) -> impl Iterator<Item = (u128, Location)> {
        let rows = self.rows.iter().map(|(key, place)| (*key, place.location));
        rows.filter(move |(_, place)| place.segment == id)
    }

    /// Ends a body's story. Its octets go to the erase plan as soon as their place is known.
    pub(crate) fn kill_body(&mut self, index: LogIndex) {
        self.mending.remove(&index);
        if let Some((location, _)) = self.lost.remove(&index) {
            self.dying.push(Dying { index, location, since: clock::now() });
        }
        if let Some((_, place)) = self.bodies.remove(&index)
            && let Some(location) = place
        {
            self.dying.push(Dying { index, location, since: clock::now() });
        }
        if let Some(slot) = self.slot_mut(index)
            && let Some((_, body)) = &mut slot.cached
        {
            let freed = std::mem::take(body).len();
            self.cached_bytes -= freed;
        }
    }

    /// The octets are gone from the disk.
    pub(crate) fn body_erased(&mut self, dying: &Dying) {
        self.drop_live(dying.location.segment, dying.location.body_bytes);
    }

    /// Voids entries from `from` on; their bodies die.
    pub(crate) fn truncate_from(&mut self, from: LogIndex) {
        // What takes their place is in memory again.
        self.evicted_to = self.evicted_to.min(from.0).max(self.first);
        while !self.slots.is_empty() && self.first + self.slots.len() as u64 > from.0 {
            let index = LogIndex(self.first + self.slots.len() as u64 - 1);
            let own = self.slots.back().map(|slot| slot.ticket);
            // A body that was fetched under this index is another one, and stays.
            let place = self.slots.back().and_then(|slot| slot.location);
            self.mending.remove(&index);
            let lost = self.lost.get(&index).is_some_and(|(location, _)| Some(*location) == place);
            if lost || self.bodies.get(&index).map(|(ticket, _)| *ticket) == own {
                self.kill_body(index);
            }
            let slot = self.slots.pop_back().expect("not empty");
            self.forget_slot(&slot);
        }
    }

    /// Forgets entries up to `floor`; their bodies stay.
    pub(crate) fn purge(&mut self, floor: LogPosition) {
        while !self.slots.is_empty() && self.first <= floor.index.0 {
            let slot = self.slots.pop_front().expect("not empty");
            self.first += 1;
            self.forget_slot(&slot);
        }
        if self.floor.is_none_or(|old| old.index < floor.index) {
            self.floor = Some(floor);
        }
        self.evicted_to = self.evicted_to.max(self.first);
    }

    fn forget_slot(&mut self, slot: &Slot) {
        if let Some((head, body)) = &slot.cached {
            self.cached_bytes -= head.len() + body.len();
        }
        if let Some(location) = slot.location {
            self.drop_live(location.segment, 0);
            if let Some(s) = self.segments.get_mut(&location.segment) {
                s.entries = s.entries.saturating_sub(1);
            }
        }
    }

    /// Lets go of the oldest cached entries beyond the bound, as far as they are on disk.
    pub(crate) fn evict(&mut self) {
        while self.cached_bytes > CACHE_BYTES_MAX {
            let index = LogIndex(self.evicted_to);
            let Some(slot) = self.slot_mut(index) else { return };
            if slot.location.is_none() {
                return;
            }
            if let Some((head, body)) = slot.cached.take() {
                self.cached_bytes -= head.len() + body.len();
            }
            self.evicted_to += 1;
        }
    }

    /// The number of a new checkpoint. A replacement that is not ended will never be.
    pub(crate) fn begin_checkpoint(&mut self) -> u64 {
        if let Some(given_up) = self.replacement.take() {
            self.void.insert(given_up);
            self.pending.clear();
        }
        self.checkpoint += 1;
        self.checkpoint
    }

    /// A row's record is on disk; it counts once its checkpoint is complete.
    pub(crate) fn row_written(&mut self, key: u128, number: u64, segment: SegmentId) {
        *self.row_copies.entry(key).or_default() += 1;
        if let Some(s) = self.segments.get_mut(&segment) {
            s.row_keys.push(key);
            s.checkpoints.insert(number);
        }
    }

    /// A checkpoint is complete: its rows replace older ones, its tables the older tables.
    pub(crate) fn checkpoint_complete(
        &mut self,
        number: u64,
        rows: &[(u128, RowPlace)],
        gone: &[(u128, SegmentId)],
        tables: Vec<SegmentId>,
    ) {
        for (key, place) in rows {
            if let Some(old) = self.rows.insert(*key, *place) {
                self.drop_row(old.location);
            }
            self.add_row(place.location);
            self.gone.remove(key);
        }
        for (key, segment) in gone {
            if let Some(old) = self.rows.remove(key) {
                self.drop_row(old.location);
            }
            if self.row_copies.contains_key(key) {
                self.gone.insert(*key, *segment);
                if let Some(s) = self.segments.get_mut(segment) {
                    s.gone_keys.push(*key);
                }
            }
        }
        for segment in &tables {
            self.add_live(*segment, 0);
        }
        for old in std::mem::replace(&mut self.tables, tables) {
            self.drop_live(old, 0);
        }
        self.pending.clear();
        self.complete = number;
    }

    /// A body stands in another place as well. If it is still live that is its place, and the old one dies; if not, the new one.
    pub(crate) fn body_moved(&mut self, index: LogIndex, ticket: Ticket, from: Location, to: Location) {
        self.add_live(to.segment, to.body_bytes);
        let dead = match self.bodies.get_mut(&index) {
            Some((t, place)) if *t == ticket && *place == Some(from) => {
                *place = Some(to);
                from
            }
            _ => to,
        };
        self.dying.push(Dying { index, location: dead, since: clock::now() });
    }

    /// A row stands in another place as well, which counts if the old one still did.
    pub(crate) fn row_moved(&mut self, key: u128, number: u64, from: Location, to: RowPlace) {
        self.row_written(key, number, to.location.segment);
        if let Some(place) = self.rows.get_mut(&key).filter(|place| place.location == from) {
            *place = to;
            self.add_row(to.location);
            self.drop_row(from);
        }
    }

    /// Whether what is live in a segment takes no more than so many octets where it is moved to. It comes back as a spare one then.
    pub(crate) fn fits(&self, id: SegmentId, room: u64) -> bool {
        self.segments.get(&id).is_none_or(|s| s.live_bytes + s.live * RECORD_BYTES <= room)
    }

    /// The segment that would give back most if what is live in it were moved, if that is worth it: less than `percent` of it is
    /// live, all of that can be moved, and there is `room` for it. One that is damaged comes first; one that holds records of another at-rest key is always worth it.
    pub(crate) fn sparse_segment(
        &self,
        percent: u64,
        but: &BTreeSet<SegmentId>,
        room: u64,
    ) -> Option<SegmentId> {
        let newest = self.segments.keys().rev().take(2).copied().collect::<Vec<_>>();
        // Where little is written the one before the newest would be so for long.
        let is_settled =
            |id: &SegmentId, s: &Segment| !newest.contains(id) || s.other_key && newest.first() != Some(id);
        let can_be_moved = |id: &SegmentId, s: &Segment| {
            s.live > 0
                && s.entries == 0
                && is_settled(id, s)
                && !but.contains(id)
                && self.fits(*id, room)
                && !self.pending.contains(id)
                && !self.tables.contains(id)
                && (s.live_bytes * 100 < s.end as u64 * percent || s.other_key || self.damaged.contains(id))
        };
        let sparse = self.segments.iter().filter(|(id, s)| can_be_moved(id, s));
        sparse
            .min_by_key(|(id, s)| (!self.damaged.contains(id), s.live_bytes * 1000 / (s.end as u64).max(1)))
            .map(|(id, _)| *id)
    }

    /// The last entry that is kept in a segment of another at-rest key. Entries stand in the order of their segments.
    pub(crate) fn other_key_upto(&self) -> Option<LogIndex> {
        let last =
            self.segments.iter().rev().find(|(_, s)| s.other_key && s.entries > 0).map(|(id, _)| *id)?;
        let is_up_to = |slot: &Slot| slot.location.is_some_and(|location| location.segment <= last);
        let count = self.slots.partition_point(is_up_to) as u64;
        count.checked_sub(1).map(|n| LogIndex(self.first + n))
    }

    /// Tombstones stand in another segment now.
    pub(crate) fn gone_again(&mut self, keys: Vec<u128>, segment: SegmentId) {
        for key in keys {
            if let Some(place) = self.gone.get_mut(&key) {
                *place = segment;
                if let Some(s) = self.segments.get_mut(&segment) {
                    s.gone_keys.push(key);
                }
            }
        }
    }

    /// Segments that hold nothing live and never will again: all but the newest, which is written or about to be, whatever the
    /// writer has told of it yet.
    pub(crate) fn idle_segments(&self) -> impl Iterator<Item = (&SegmentId, &Segment)> {
        let mut ends = self.segments.iter().rev();
        let newest = ends.next();
        // What the one before said of vote and floor counts until the newest has said it again.
        let before = ends.next().filter(|_| newest.is_some_and(|(_, s)| s.end == 0));
        let busy = [newest, before].map(|s| s.map(|(id, _)| *id));
        self.segments
            .iter()
            .filter(move |(id, s)| !busy.contains(&Some(**id)) && s.live == 0 && !self.pending.contains(id))
            // What voids older records stays as long as there are any.
            .filter(|(id, _)| self.reset != Some(**id) || self.segments.keys().next() == Some(id))
    }

    /// Forgets a segment that holds nothing live, and what only its records made necessary.
    pub(crate) fn remove_segment(&mut self, id: SegmentId) -> Option<Segment> {
        let segment = self.segments.remove(&id)?;
        self.damaged.remove(&id);
        for key in &segment.row_keys {
            if let Some(copies) = self.row_copies.get_mut(key) {
                *copies -= 1;
                if *copies == 0 {
                    self.row_copies.remove(key);
                    self.gone.remove(key);
                }
            }
        }
        for other in self.segments.values_mut() {
            other.intents_for.remove(&id);
        }
        let void = std::mem::take(&mut self.void);
        self.void = void
            .into_iter()
            // Of one that was given up after the newest complete one, rows may still be on their way to the disk.
            .filter(|number| {
                *number > self.complete || self.segments.values().any(|s| s.checkpoints.contains(number))
            })
            .collect();
        Some(segment)
    }

    /// Recounts what is live and compares. For tests and debug builds.
    pub(crate) fn check(&self) {
        let mut live: BTreeMap<SegmentId, u64> = BTreeMap::new();
        for slot in &self.slots {
            if let Some(l) = slot.location {
                *live.entry(l.segment).or_default() += 1;
            }
        }
        let places = self.bodies.values().filter_map(|(_, l)| *l).chain(self.lost.values().map(|(l, _)| *l));
        for l in places.chain(self.dying.iter().map(|d| d.location)) {
            *live.entry(l.segment).or_default() += 1;
        }
        for segment in self.rows.values().map(|row| &row.location.segment).chain(&self.tables) {
            *live.entry(*segment).or_default() += 1;
        }
        for (id, segment) in &self.segments {
            // Bodies in the hands of the keeper are counted in the segment and no longer in `dying`.
            assert!(
                segment.live >= live.get(id).copied().unwrap_or(0),
                "segment {id} would be recycled too early"
            );
        }
        if let Some(floor) = self.floor
            && !self.slots.is_empty()
        {
            assert!(floor.index.0 < self.first, "floor < first entry");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk;
    use crate::disk::sim::SimDisk;

    /// P8: entries that take the place of truncated ones leave memory as those did.
    #[test]
    fn p8_the_cache_is_bounded_after_a_truncation() {
        let disk = SimDisk::new(2);
        let mut state = LogState::default();
        state.segments.insert(SegmentId(1), Segment::new(0, disk.create("segment-000000").unwrap()));
        let body = bytes::Bytes::from(vec![1; 256 << 10]);
        let append = |state: &mut LogState, term: u64, index: u64| {
            let at = LogPosition { term: crate::position::Term(term), index: LogIndex(index) };
            let ticket = state.push(&Entry { at, head: bytes::Bytes::new(), body: body.clone() });
            let location =
                Location { segment: SegmentId(1), offset: index as u32 * 4096, head_bytes: 0, body_bytes: 9 };
            state.entry_written(at.index, ticket, location);
            state.evict();
        };
        (1..600).for_each(|index| append(&mut state, 1, index));
        assert!(state.cached_bytes <= CACHE_BYTES_MAX && state.cached_bytes > CACHE_BYTES_MAX / 2);
        state.truncate_from(LogIndex(10));
        (10..400).for_each(|index| append(&mut state, 2, index));
        assert!(state.cached_bytes <= CACHE_BYTES_MAX, "{} MiB", state.cached_bytes >> 20);
    }

    /// P1: a segment that was just opened holds nothing yet and is no spare one, though the writer has not said that it is active.
    #[test]
    fn p1_the_newest_segment_is_never_given_back() {
        let disk = SimDisk::new(1);
        let file = disk.create("segment-000000").unwrap();
        let mut state = LogState::default();
        for id in 1..=3 {
            state.segments.insert(SegmentId(id), Segment::new(0, file.clone()));
        }
        state.add_live(SegmentId(2), 0);
        let idle = |state: &LogState| state.idle_segments().map(|(id, _)| id.0).collect::<Vec<_>>();
        assert_eq!(idle(&state), [1]);
        state.drop_live(SegmentId(2), 0);
        assert_eq!(idle(&state), [1], "the newest has not said again what the one before says");
        state.segments.get_mut(&SegmentId(3)).unwrap().end = 4096;
        assert_eq!(idle(&state), [1, 2]);
    }
}
