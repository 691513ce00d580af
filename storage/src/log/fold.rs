//! Opening a directory: the state of the log from its bytes alone.
//!
//! Segments are read in order of their ids and their records replayed in order. What a crash left is judged by
//! [`verdict`](super::recovery::verdict); intents are carried out again. Nothing is changed before the whole log was read and found
//! sound, but for the zeroing of a torn tail, whose batch is shortened to what is left of it.
//!
//! | found | then |
//! | --- | --- |
//! | a batch that was never synced | cut off |
//! | a body whose octets are wrong, under a header that is right | opened; the body is [`Log::lost`](super::Log::lost) until somebody brings it |
//! | anything else that is wrong | [`OpenError::Lost`], untouched; [`salvage`](super::salvage) keeps the bodies and voids the rest |

use std::collections::{BTreeMap, BTreeSet};

use super::batch;
use super::judge::{Scanned, scan_all};
use super::recovery::Found;
use super::segment::{create, slot_of};
use super::state::{LogState, RowPlace, Slot};
use super::superblock::{Contents, Superblock};
use super::writer::Written;
use super::{Identity, Options, Recovered, RecoveredCheckpoint};
use crate::codec::{self, CheckpointEnd, Gone, Intent, Reset, TablePart, Vote};
use crate::disk::{Disk, DiskFile};
use crate::erase::{overwrite, plan};
use crate::error::{Damage, OpenError};
use crate::limits::{BATCH_BYTES_MAX, BLOCK_BYTES, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN};
use crate::position::{Location, LogIndex, LogPosition, SegmentId, Term};
use crate::record::{self, Invalid, Kind, VERSION};
use crate::seal::Keyring;

/// Octets of a segment that are no record: from, to.
pub(crate) type Hole = (SegmentId, u32, u32);

pub(super) struct Opened {
    pub(super) state: LogState,
    pub(super) superblock: Superblock,
    pub(super) active: SegmentId,
    pub(super) next_slot: u32,
    pub(super) unused_slots: Vec<u32>,
    pub(super) written: Written,
    pub(super) synced: (SegmentId, u32),
    pub(super) recovered: Recovered,
    /// If it was salvaged: what the active segment begins with, and what is to be overwritten once that is durable.
    pub(super) salvage: Option<(Reset, Vec<Hole>)>,
}

/// What is wrong with a directory that is only looked at, and what it holds.
#[derive(Debug, Default)]
pub struct Survey {
    /// Segments in use.
    pub segments: usize,
    /// Records that were read.
    pub records: u64,
    /// Entries above the floor.
    pub entries: u64,
    /// Bodies that are not erased, and their octets.
    pub bodies: (u64, u64),
    /// Rows of the newest complete checkpoint.
    pub rows: u64,
    /// Whether the tail is torn, as after a kill: harmless, cut at the next start.
    pub torn_tail: bool,
    /// Whether the tail is damaged, and not as a kill leaves it.
    pub ambiguous_tail: bool,
    /// Bodies whose octets are not those that were written: a node fetches those that it needs from the others.
    pub lost_bodies: u64,
}

/// Reads a directory and verifies every record without changing a byte.
///
/// # Errors
/// What a start would refuse with.
pub fn survey(disk: &dyn Disk, keys: &Keyring) -> Result<Survey, OpenError> {
    let Some(superblock) = Superblock::load(disk)? else {
        return Err(OpenError::Damaged {
            at: disk.name(),
            why: "no superblock: not a data directory".into(),
        });
    };
    let mut state = LogState::default();
    let scanned = scan_all(disk, keys, &superblock.contents, &superblock.ends, &mut state)?;
    scanned.check(disk)?;
    let lost_bodies = scanned.lost.len() as u64;
    let records = scanned.records.len() as u64;
    let (torn_tail, ambiguous_tail) = (scanned.cut.is_some() && !scanned.ambiguous, scanned.ambiguous);
    replay(scanned, &mut state)?;
    Ok(Survey {
        segments: state.segments.len(),
        records,
        entries: state.slots.len() as u64,
        bodies: (
            state.bodies.len() as u64,
            state.bodies.values().filter_map(|(_, l)| l.map(|l| l.body_bytes as u64)).sum(),
        ),
        torn_tail,
        ambiguous_tail,
        lost_bodies,
        rows: state.rows.len() as u64,
    })
}

pub(super) fn open(disk: &dyn Disk, identity: &Identity, options: &Options) -> Result<Opened, OpenError> {
    let mut superblock = match Superblock::load(disk)? {
        Some(superblock) => superblock,
        None => create_directory(disk, identity, options.segment_bytes)?,
    };
    check_owner(disk, identity, &superblock.contents)?;
    // Names that a killed process had not synced yet are seen all the same.
    disk.sync_dir().map_err(io("syncing the directory"))?;
    if let Some(reset) = superblock.contents.pending.filter(|reset| reset.void_but.is_some()) {
        return super::salvage::salvage(disk, identity, options, &reset);
    }
    let mut state = LogState::default();
    let mut scanned = scan_all(disk, &options.keys, &superblock.contents, &superblock.ends, &mut state)?;
    note_strange_segments(disk, &superblock.contents, &mut scanned)?;
    // A tail that was cut where it was ambiguous looks whole.
    scanned.damage.end_is_whole &= superblock.contents.pending.is_none();
    scanned.check(disk)?;
    if scanned.ambiguous && superblock.contents.pending.is_none() {
        // Before the cut, which leaves nothing to see: a crash in between must not forget it.
        superblock.contents.pending = Some(Reset::default());
        superblock.store().map_err(io("writing the superblock"))?;
    }
    scanned.ambiguous |= superblock.contents.pending.is_some();
    if let Some((id, from)) = scanned.cut {
        let file = &state.segments[&id].file;
        let size = superblock.contents.segment_bytes;
        if let Some((at, mark)) = batch::cut_mark(&scanned.records, options.keys.of_segment(id), from) {
            let shorter = file.write_at(&mark, at as u64).and_then(|()| file.sync_data());
            shorter.map_err(io("shortening a torn batch"))?;
        }
        super::segment::zero_from(&**file, from as u64, size).map_err(io("cutting a torn tail"))?;
    }
    // What was read may stand in the page cache alone: after a kill between write and sync, or after a failed sync, which
    // leaves pages clean that were never written. It is written again and synced before anybody is told of it; so are the zeros behind
    // it, as far as a batch may have reached there.
    for (id, segment) in state.segments.range(scanned.mark.0..) {
        let from = if *id == scanned.mark.0 { scanned.mark.1 as u64 / BLOCK_BYTES * BLOCK_BYTES } else { 0 };
        let end = match *id == scanned.end.0 {
            true => (scanned.end.1 as u64 + BATCH_BYTES_MAX as u64).min(superblock.contents.segment_bytes),
            false => segment.end as u64,
        };
        if from < end {
            let again = write_again(&*segment.file, from, end).and_then(|()| segment.file.sync_data());
            again.map_err(io("syncing the tail again"))?;
        }
    }
    finish(disk, superblock, state, scanned)
}

/// Writes what is read, so that it is on the medium once it is synced.
pub(super) fn write_again(file: &dyn DiskFile, from: u64, to: u64) -> std::io::Result<()> {
    let mut bytes = vec![0; (to - from) as usize];
    file.read_at(&mut bytes, from)?;
    file.write_at(&bytes, from)
}

pub(super) fn io(what: &'static str) -> impl Fn(std::io::Error) -> OpenError {
    move |error| OpenError::Io { what: what.into(), error }
}

pub(super) fn check_owner(disk: &dyn Disk, identity: &Identity, found: &Contents) -> Result<(), OpenError> {
    if found.cluster == identity.cluster && found.node == identity.node {
        return Ok(());
    }
    Err(OpenError::WrongIdentity {
        dir: disk.name(),
        cluster: identity.cluster.clone(),
        node: identity.node,
        found_cluster: found.cluster.clone(),
        found_node: found.node,
    })
}

/// A file that no segment stands in, and that says it holds one younger than the superblock knows: the superblock is an old copy.
fn note_strange_segments(
    disk: &dyn Disk,
    contents: &Contents,
    scanned: &mut Scanned,
) -> Result<(), OpenError> {
    for name in disk.list().map_err(io("listing the directory"))? {
        let Some(slot) = slot_of(&name).filter(|slot| contents.segments.iter().all(|(_, used)| used != slot))
        else {
            continue;
        };
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        let file = disk.open(&super::segment::file_name(slot)).map_err(io("opening a spare segment"))?;
        if file.read_at(&mut bytes, 0).is_ok()
            && let Some(id) = segment_of(&name, &bytes)?.filter(|id| *id > contents.newest)
        {
            scanned.damage.end_is_whole = false;
            scanned.damage.note(name, format!("it holds segment {id}, which the superblock does not know"));
        }
    }
    Ok(())
}

/// The segment that a file says it holds.
pub(super) fn segment_of(name: &str, bytes: &[u8]) -> Result<Option<SegmentId>, OpenError> {
    record::segment_of(bytes).map_err(|invalid| match invalid {
        Invalid::Newer(found) => OpenError::NewerFormat { what: name.into(), found, known: VERSION },
        other => OpenError::Damaged { at: name.into(), why: other.to_string() },
    })
}

pub(super) fn finish(
    disk: &dyn Disk,
    mut superblock: Superblock,
    mut state: LogState,
    mut scanned: Scanned,
) -> Result<Opened, OpenError> {
    let redo = std::mem::take(&mut scanned.redo);
    for (id, ranges) in &redo {
        overwrite(&*state.segments[id].file, ranges).map_err(io("erasing again after a crash"))?;
    }
    let ambiguous_tail = scanned.ambiguous;
    let synced = scanned.end;
    let mut damage = scanned.left();
    let (written, mut recovered) = match replay(scanned, &mut state) {
        // Records that are right one by one and do not fit together: something between them is gone.
        Err(OpenError::Damaged { at, why }) => {
            damage.note(at, why);
            return Err(OpenError::Lost(Box::new(damage)));
        }
        replayed => replayed?,
    };
    superblock.contents.boots += 1;
    superblock.ends = state.segments.iter().map(|(id, segment)| (*id, segment.end)).collect();
    superblock.store().map_err(io("writing the superblock"))?;
    recovered.boots = superblock.contents.boots;
    recovered.ambiguous_tail = ambiguous_tail;
    state.check();
    let slots: BTreeSet<u32> = superblock.contents.segments.iter().map(|(_, slot)| *slot).collect();
    let on_disk: Vec<u32> =
        disk.list().map_err(io("listing the directory"))?.iter().filter_map(|name| slot_of(name)).collect();
    let next_slot = on_disk.iter().chain(&slots).max().map_or(0, |s| s + 1);
    let unused_slots = on_disk.into_iter().filter(|slot| !slots.contains(slot)).collect();
    let active = synced.0;
    let salvage = None;
    Ok(Opened { state, superblock, active, next_slot, unused_slots, written, synced, recovered, salvage })
}

fn create_directory(
    disk: &dyn Disk,
    identity: &Identity,
    segment_bytes: u64,
) -> Result<Superblock, OpenError> {
    let io = |error| OpenError::Io { what: format!("creating a data directory in {}", disk.name()), error };
    // A start that was cut short before the superblock stood leaves segment 0, all zeros, and nothing else. Whatever holds
    // an octet is somebody's log.
    for name in disk.list().map_err(io)?.into_iter().filter(|name| slot_of(name).is_some()) {
        if slot_of(&name) != Some(0) || !is_zero(disk, &name).map_err(io)? {
            let mut damage = Damage::default();
            damage.note(disk.name(), format!("{name} stands here without a superblock"));
            return Err(OpenError::Lost(Box::new(damage)));
        }
        disk.remove(&name).map_err(io)?;
    }
    let segment_bytes =
        segment_bytes.clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX).next_multiple_of(BLOCK_BYTES);
    create(disk, 0, segment_bytes).map_err(io)?;
    let contents = Contents {
        sequence: 0,
        cluster: identity.cluster.clone(),
        node: identity.node,
        boots: 0,
        segment_bytes,
        segments: vec![(SegmentId(1), 0)],
        newest: SegmentId(1),
        pending: None,
    };
    Superblock::create(disk, contents).map_err(io)
}

/// Whether a file holds nothing but zeros, however long it is.
fn is_zero(disk: &dyn Disk, name: &str) -> std::io::Result<bool> {
    let file = disk.open(name)?;
    let mut block = vec![0; BLOCK_BYTES as usize];
    for n in 0.. {
        match file.read_at(&mut block, n * BLOCK_BYTES) {
            Ok(()) if block.iter().any(|b| *b != 0) => return Ok(false),
            Ok(()) => {}
            // Shorter than a block: a file that was being created.
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(true),
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

pub(super) fn decode<T: bincode::Decode<()>>(what: &'static str, found: &Found) -> Result<T, OpenError> {
    codec::decode(what, &found.head)
        .map_err(|e| OpenError::Damaged { at: found.location.to_string(), why: e.to_string() })
}

/// Rows, tombstones and tables as they are found, by checkpoint.
#[derive(Default)]
struct Checkpoints {
    rows: Vec<(u64, u128, RowPlace)>,
    gone: Vec<(u64, u128, SegmentId)>,
    tables: BTreeMap<u64, BTreeMap<u32, (Vec<u8>, SegmentId)>>,
    ends: BTreeMap<u64, (CheckpointEnd, SegmentId)>,
}

/// Where a body stands, and the CRC-32 of what was written.
#[derive(Clone, Copy)]
struct Place {
    location: Location,
    crc: u32,
    /// Of the entry that brought it.
    term: Term,
}

impl Place {
    /// Whether two places hold the same octets, as far as their records say.
    fn is_same(&self, other: &Place) -> bool {
        (self.term, self.location.body_bytes, self.crc) == (other.term, other.location.body_bytes, other.crc)
    }
}

/// Replays the records in order.
fn replay(scanned: Scanned, state: &mut LogState) -> Result<(Written, Recovered), OpenError> {
    let mut written = Written::default();
    let mut checkpoints = Checkpoints::default();
    let mut committed: BTreeSet<LogPosition> = BTreeSet::new();
    let mut log: BTreeMap<LogIndex, (LogPosition, Place)> = BTreeMap::new();
    let mut bodies: BTreeMap<LogIndex, Place> = BTreeMap::new();
    let mut lost: BTreeMap<LogIndex, Place> = BTreeMap::new();
    let mut dead: Vec<(LogIndex, Location)> = Vec::new();
    let mut pristine = true;
    let mut kept = None;
    for found in scanned.records {
        let (index, location) = (found.at.index, found.location);
        let segment = location.segment;
        let erased = {
            let s = &state.segments[&segment];
            let range = (location.body_offset() as u32, location.body_bytes);
            location.body_bytes == 0 || plan::covers(&s.erased, range)
        };
        pristine &= matches!(found.kind, Kind::SegmentHead | Kind::Mark | Kind::Truncate);
        match found.kind {
            Kind::SegmentHead | Kind::Mark => {}
            Kind::Vote => written.vote = Some(decode::<Vote>("vote", &found)?),
            Kind::Committed => {
                // It may stand ahead of its entry, which a crash then took: an earlier one counts.
                committed.insert(found.at);
                written.committed = Some(found.at);
            }
            Kind::Floor => {
                written.floor = written.floor.max(Some(found.at));
                written.next = written.next.max(index.0 + 1);
            }
            Kind::Truncate => {
                written.next = written.next.min(index.0);
                for (index, (_, own)) in log.split_off(&index) {
                    // A body that was fetched under this index is another one, and stays; its own that was fetched goes.
                    for all in [&mut bodies, &mut lost] {
                        if all.get(&index).is_some_and(|body| body.is_same(&own)) {
                            dead.extend(all.remove(&index).map(|body| (index, body.location)));
                        }
                    }
                }
            }
            Kind::Entry | Kind::Body => {
                let place = Place { location, crc: found.body_crc, term: found.at.term };
                if found.kind == Kind::Entry {
                    log.insert(index, (found.at, place));
                    written.next = index.0 + 1;
                }
                if !erased {
                    let older = bodies.remove(&index).or(lost.remove(&index));
                    dead.extend(older.map(|older| (index, older.location)));
                    let found_in = if found.body_intact { &mut bodies } else { &mut lost };
                    found_in.insert(index, place);
                }
            }
            Kind::Reset => {
                let reset: Reset = decode("reset", &found)?;
                state.doubt = state.doubt.max(reset.last);
                if let Some(upto) = reset.void_but {
                    kept = Some(upto);
                    let void =
                        bodies.split_off(&LogIndex(upto.0 + 1)).into_iter().chain(std::mem::take(&mut lost));
                    dead.extend(void.map(|(index, body)| (index, body.location)));
                    (checkpoints, log, written) = Default::default();
                    committed.clear();
                    state.reset = Some(segment);
                }
                written.vote = reset.vote.or(written.vote);
            }
            Kind::Intent => {
                let intent: Intent = decode("intent", &found)?;
                if let Some(s) = state.segments.get_mut(&segment) {
                    s.intents_for.insert(intent.segment);
                }
            }
            Kind::Row => {
                let Some(key) = found.head.first_chunk() else {
                    let why = "a row without a key".into();
                    return Err(OpenError::Damaged { at: location.to_string(), why });
                };
                let place = RowPlace { location, crc: found.head_crc };
                checkpoints.rows.push((index.0, u128::from_le_bytes(*key), place));
            }
            Kind::Gone => {
                let gone: Gone = decode("tombstones", &found)?;
                checkpoints.gone.extend(gone.keys.into_iter().map(|key| (index.0, key, segment)));
            }
            Kind::Table => {
                let part: TablePart = decode("table", &found)?;
                let parts = checkpoints.tables.entry(index.0).or_default();
                parts.insert(part.part, (part.bytes, segment));
            }
            Kind::CheckpointEnd => {
                checkpoints.ends.insert(index.0, (decode("checkpoint", &found)?, segment));
            }
        }
    }
    // Entries that stand above the floor; those below left their bodies at most.
    let floor = written.floor.map_or(0, |f| f.index.0 + 1);
    let start = if written.floor.is_some() { floor } else { log.keys().next().map_or(0, |i| i.0) };
    state.first = start;
    for (expected, (index, (at, place))) in (start..).zip(log.split_off(&LogIndex(start))) {
        if index.0 != expected {
            let why = format!("entry {expected} is missing, {index} follows");
            return Err(OpenError::Damaged { at: place.location.to_string(), why });
        }
        if index.0 >= written.next {
            break;
        }
        state.next_ticket += 1;
        let ticket = state.next_ticket;
        state.slots.push_back(Slot { term: at.term, ticket, location: None, cached: None });
        let head_only = Location { body_bytes: 0, ..place.location };
        state.entry_written(index, ticket, head_only);
        if let Some(slot) = state.slot_mut(index) {
            slot.location = Some(place.location);
        }
        if let Some(body) = bodies.get(&index).filter(|body| body.is_same(&place)) {
            state.bodies.insert(index, (ticket, None));
            state.body_written(index, ticket, body.location);
        }
    }
    for (index, Place { location, .. }) in bodies {
        if !state.bodies.contains_key(&index) {
            state.next_ticket += 1;
            let ticket = state.next_ticket;
            state.bodies.insert(index, (ticket, None));
            state.body_written(index, ticket, location);
        }
    }
    for (index, Place { location, crc, .. }) in lost {
        state.body_lost(index, location, Some(crc));
    }
    for (index, location) in dead {
        // Counted as live until it is overwritten, like any dying body.
        state.body_written(index, 0, location);
    }
    state.floor = written.floor;
    state.vote = written.vote;
    written.committed = committed.into_iter().rev().find(|at| state.has(*at));
    state.committed = written.committed;
    let checkpoint = fold_checkpoints(checkpoints, state)?;
    let recovered = Recovered {
        boots: 0,
        pristine,
        vote: written.vote,
        committed: written.committed,
        checkpoint,
        ambiguous_tail: false,
        doubt: state.doubt,
        kept: if state.slots.is_empty() && state.floor.is_none() { kept } else { None },
    };
    Ok((written, recovered))
}

/// The state at the newest complete checkpoint.
fn fold_checkpoints(
    found: Checkpoints,
    state: &mut LogState,
) -> Result<Option<RecoveredCheckpoint>, OpenError> {
    let Checkpoints { rows, gone, mut tables, ends } = found;
    let newest = ends.last_key_value().map(|(number, (end, segment))| (*number, end.clone(), *segment));
    let declared: BTreeSet<u64> = newest.iter().flat_map(|(_, end, _)| end.void.iter().copied()).collect();
    let limit = newest.as_ref().map_or(0, |(number, _, _)| *number);
    let counts = |number: u64| number <= limit && !declared.contains(&number);
    let mut highest = limit;
    let mut current: BTreeMap<u128, (u64, RowPlace)> = BTreeMap::new();
    for (number, key, place) in rows {
        highest = highest.max(number);
        state.row_written(key, number, place.location.segment);
        if !counts(number) {
            state.void.insert(number);
        } else if current.get(&key).is_none_or(|(n, _)| *n <= number) {
            current.insert(key, (number, place));
        }
    }
    let mut void_keys = Vec::new();
    for (number, key, segment) in gone {
        highest = highest.max(number);
        if let Some(s) = state.segments.get_mut(&segment) {
            s.checkpoints.insert(number);
        }
        if !counts(number) {
            state.void.insert(number);
            continue;
        }
        // One that was said again by an earlier version has no number, and means all rows of its key.
        let upto = if number == 0 { u64::MAX } else { number };
        if current.get(&key).is_none_or(|(row, _)| *row <= upto) {
            current.remove(&key);
            void_keys.push((key, segment));
        }
    }
    for (number, parts) in &tables {
        highest = highest.max(*number);
        if !counts(*number) {
            state.void.insert(*number);
        }
        for (_, segment) in parts.values() {
            if let Some(s) = state.segments.get_mut(segment) {
                s.checkpoints.insert(*number);
            }
        }
    }
    state.checkpoint = highest;
    let Some((number, end, end_segment)) = newest else { return Ok(None) };
    let parts = tables.remove(&number).unwrap_or_default();
    if parts.len() != end.parts as usize {
        let why = format!("checkpoint {number} has {} of {} table parts", parts.len(), end.parts);
        return Err(OpenError::Damaged { at: format!("segment {end_segment}"), why });
    }
    let mut places: Vec<SegmentId> = parts.values().map(|(_, segment)| *segment).collect();
    places.push(end_segment);
    let mut bytes = Vec::new();
    parts.values().for_each(|(part, _)| bytes.extend_from_slice(part));
    let row_places: Vec<(u128, RowPlace)> = current.into_iter().map(|(k, (_, place))| (k, place)).collect();
    state.checkpoint_complete(number, &row_places, &void_keys, places);
    Ok(Some(RecoveredCheckpoint { applied: end.applied, tables: bytes.into() }))
}
