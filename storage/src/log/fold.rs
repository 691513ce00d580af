//! Opening a directory: the state of the log from its bytes alone.
//!
//! Segments are read in order of their ids and their records replayed in order. What a crash left is judged by
//! [`recovery::verdict`]; intents are carried out again. Nothing is changed before the whole log was read and found
//! sound, but for the zeroing of a torn tail.

use std::collections::{BTreeMap, BTreeSet};

use super::recovery::{self, Found, Scan, Verdict};
use super::segment::{create, slot_of};
use super::state::{LogState, RowPlace, Segment, Slot};
use super::superblock::{Contents, Superblock};
use super::writer::Written;
use super::{Identity, Recovered, RecoveredCheckpoint};
use crate::codec::{self, CheckpointEnd, Gone, Intent, SegmentHead, TablePart, Vote};
use crate::disk::Disk;
use crate::erase::{overwrite, plan};
use crate::error::OpenError;
use crate::limits::{BLOCK_BYTES, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN};
use crate::position::{Location, LogIndex, LogPosition, SegmentId};
use crate::record::{Invalid, Kind, VERSION};

pub(super) struct Opened {
    pub(super) state: LogState,
    pub(super) superblock: Superblock,
    pub(super) active: SegmentId,
    pub(super) next_slot: u32,
    pub(super) unused_slots: Vec<u32>,
    pub(super) written: Written,
    pub(super) synced: (SegmentId, u32),
    pub(super) recovered: Recovered,
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
}

/// Reads a directory and verifies every record without changing a byte.
///
/// # Errors
/// What a start would refuse with.
pub fn survey(disk: &dyn Disk) -> Result<Survey, OpenError> {
    let Some(superblock) = Superblock::load(disk)? else {
        return Err(OpenError::Damaged {
            at: disk.name(),
            why: "no superblock: not a data directory".into(),
        });
    };
    let mut state = LogState::default();
    let scanned = scan_all(disk, &superblock, &mut state)?;
    let records = scanned.records.len() as u64;
    let torn_tail = scanned.cut.is_some();
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
        rows: state.rows.len() as u64,
    })
}

pub(super) fn open(disk: &dyn Disk, identity: &Identity, segment_bytes: u64) -> Result<Opened, OpenError> {
    let io = |what: &'static str| move |error| OpenError::Io { what: what.into(), error };
    let mut superblock = match Superblock::load(disk)? {
        Some(superblock) => superblock,
        None => create_directory(disk, identity, segment_bytes)?,
    };
    let found = &superblock.contents;
    if found.cluster != identity.cluster || found.node != identity.node {
        return Err(OpenError::WrongIdentity {
            dir: disk.name(),
            cluster: identity.cluster.clone(),
            node: identity.node,
            found_cluster: found.cluster.clone(),
            found_node: found.node,
        });
    }
    let mut state = LogState::default();
    let mut scanned = scan_all(disk, &superblock, &mut state)?;
    if let Some((id, from)) = scanned.cut {
        let file = &state.segments[&id].file;
        let size = superblock.contents.segment_bytes;
        super::segment::zero_from(&**file, from as u64, size).map_err(io("cutting a torn tail"))?;
    }
    // What was read may stand in the page cache alone: after a kill between write and sync, or after a failed sync, which
    // leaves pages clean that were never written. It is written again and synced before anybody is told of it.
    for (id, segment) in state.segments.range(scanned.mark.0..) {
        let from = if *id == scanned.mark.0 { scanned.mark.1 as u64 / BLOCK_BYTES * BLOCK_BYTES } else { 0 };
        let end = if *id == scanned.end.0 { scanned.end.1 } else { segment.end } as u64;
        if from < end {
            let mut bytes = vec![0; (end - from) as usize];
            let again = segment
                .file
                .read_at(&mut bytes, from)
                .and_then(|()| segment.file.write_at(&bytes, from))
                .and_then(|()| segment.file.sync_data());
            again.map_err(io("syncing the tail again"))?;
        }
    }
    let redo = std::mem::take(&mut scanned.redo);
    for (id, ranges) in &redo {
        overwrite(&*state.segments[id].file, ranges).map_err(io("erasing again after a crash"))?;
    }
    let ambiguous_tail = scanned.ambiguous;
    let synced = scanned.end;
    let (written, mut recovered) = replay(scanned, &mut state)?;
    superblock.contents.boots += 1;
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
    Ok(Opened { state, superblock, active, next_slot, unused_slots, written, synced, recovered })
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
            let why = format!("{name} stands here without a superblock");
            return Err(OpenError::Damaged { at: disk.name(), why });
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

/// All records of all segments in order, judged.
struct Scanned {
    records: Vec<Found>,
    /// Where the log ends: the newest segment and its next free block.
    end: (SegmentId, u32),
    /// Known to be synced up to here.
    mark: (SegmentId, u32),
    /// A torn or ambiguous tail to be zeroed.
    cut: Option<(SegmentId, u32)>,
    ambiguous: bool,
    /// Ranges under an intent that a crash left unerased.
    redo: BTreeMap<SegmentId, Vec<plan::Range>>,
}

fn scan_all(disk: &dyn Disk, superblock: &Superblock, state: &mut LogState) -> Result<Scanned, OpenError> {
    let contents = &superblock.contents;
    let mut scans: Vec<(SegmentId, Scan)> = Vec::new();
    for (id, slot) in &contents.segments {
        let name = super::segment::file_name(*slot);
        let io = |error| OpenError::Io { what: format!("reading {}/{name}", disk.name()), error };
        let file = disk.open(&name).map_err(io)?;
        let mut bytes = vec![0; contents.segment_bytes as usize];
        file.read_at(&mut bytes, 0).map_err(io)?;
        let scan = recovery::scan(*id, &bytes);
        let mut segment = Segment::new(*slot, file);
        segment.end = scan.end;
        state.segments.insert(*id, segment);
        scans.push((*id, scan));
    }
    let Some(newest) = scans.last().map(|(id, _)| *id) else {
        return Err(OpenError::Damaged { at: disk.name(), why: "the superblock names no segment".into() });
    };
    let mark = scans.iter().map(|(_, scan)| recovery::highest_mark(&scan.records)).max().unwrap_or_default();
    check_ends(disk, &scans)?;
    let mut intents: BTreeMap<SegmentId, Vec<plan::Range>> = BTreeMap::new();
    for found in scans.iter().flat_map(|(_, scan)| &scan.records).filter(|f| f.kind == Kind::Intent) {
        let intent: Intent = decode("intent", found)?;
        intents.entry(intent.segment).or_default().extend(intent.ranges);
    }
    intents.values_mut().for_each(plan::merge);
    let mut scanned = Scanned {
        records: Vec::new(),
        end: (newest, 0),
        mark,
        cut: None,
        ambiguous: false,
        redo: BTreeMap::new(),
    };
    let none = Vec::new();
    for (id, mut scan) in scans {
        let erased = intents.get(&id).unwrap_or(&none);
        let mut bad = scan.bad.take().map(|b| (b.offset, b.why, b.zero_block));
        // A body that is neither what was written nor erased on purpose is as bad as a header.
        let suspect = scan.records.iter().position(|f| {
            let range = (f.location.body_offset() as u32, f.location.body_bytes);
            !f.body_intact && !plan::covers(erased, range)
        });
        if let Some(n) = suspect {
            let found = &scan.records[n];
            bad = Some((found.location.offset, Invalid::Bad("the body's CRC is wrong"), found.zero_block));
            scan.records.truncate(n);
            scan.end =
                scan.records.last().map_or(0, Found::end).next_multiple_of(BLOCK_BYTES as usize) as u32;
        }
        if let Some((offset, why, zero_block)) = bad {
            if let Invalid::Newer(found) = why {
                let what = format!("segment {id} offset {offset}");
                return Err(OpenError::NewerFormat { what, found, known: VERSION });
            }
            let later_batch = scan.last_batch > offset;
            match recovery::verdict(id == newest, (id, offset), mark, zero_block, later_batch) {
                Verdict::Damaged => {
                    let at = format!("{}: segment {id} offset {offset}", disk.name());
                    return Err(OpenError::Damaged { at, why: why.to_string() });
                }
                Verdict::Ambiguous => scanned.ambiguous = true,
                Verdict::Torn | Verdict::Clean => {}
            }
            tracing::warn!(segment = id.0, offset, %why, "the tail of the log was cut off");
            scanned.cut = Some((id, scan.records.last().map_or(0, Found::end) as u32));
        }
        for found in &scan.records {
            let range = (found.location.body_offset() as u32, found.location.body_bytes);
            if range.1 > 0 && !found.body_zeroed && plan::covers(erased, range) {
                scanned.redo.entry(id).or_default().push(range);
            }
        }
        if let Some(segment) = state.segments.get_mut(&id) {
            segment.end = scan.end;
            segment.erased = erased.clone();
        }
        scanned.end = (id, scan.end);
        scanned.records.extend(scan.records);
    }
    Ok(scanned)
}

/// Each segment's head says where the records of the one before ended. A segment that ends sooner has lost its tail to zeros, which
/// look like an end.
fn check_ends(disk: &dyn Disk, scans: &[(SegmentId, Scan)]) -> Result<(), OpenError> {
    for (id, scan) in scans {
        let Some(head) = scan.records.iter().find(|f| f.kind == Kind::SegmentHead) else { continue };
        let head: SegmentHead = decode("segment head", head)?;
        let Some((before, end)) = head.previous else { continue };
        // One that was given back meanwhile cannot be looked at.
        if let Some((_, scan)) = scans.iter().find(|(other, _)| *other == before)
            && scan.bad.is_none()
            && scan.end < end
        {
            let at = format!("{}: segment {before} offset {}", disk.name(), scan.end);
            let why = format!("segment {id} says that it ended at {end}");
            return Err(OpenError::Damaged { at, why });
        }
    }
    Ok(())
}

fn decode<T: bincode::Decode<()>>(what: &'static str, found: &Found) -> Result<T, OpenError> {
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

/// Replays the records in order.
fn replay(scanned: Scanned, state: &mut LogState) -> Result<(Written, Recovered), OpenError> {
    let mut written = Written::default();
    let mut checkpoints = Checkpoints::default();
    let mut log: BTreeMap<LogIndex, (LogPosition, Location)> = BTreeMap::new();
    let mut bodies: BTreeMap<LogIndex, Location> = BTreeMap::new();
    let mut dead: Vec<(LogIndex, Location)> = Vec::new();
    let mut pristine = true;
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
            Kind::Committed => written.committed = Some(found.at),
            Kind::Floor => {
                written.floor = written.floor.max(Some(found.at));
                written.next = written.next.max(index.0 + 1);
            }
            Kind::Truncate => {
                written.next = written.next.min(index.0);
                for (index, (_, own)) in log.split_off(&index) {
                    // A body that was fetched under this index is another one, and stays.
                    if bodies.get(&index) == Some(&own) {
                        dead.extend(bodies.remove(&index).map(|location| (index, location)));
                    }
                }
            }
            Kind::Entry | Kind::Body => {
                if found.kind == Kind::Entry {
                    log.insert(index, (found.at, location));
                    written.next = index.0 + 1;
                }
                if !erased {
                    let older = bodies.insert(index, location);
                    dead.extend(older.map(|location| (index, location)));
                }
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
    for (expected, (index, (at, location))) in (start..).zip(log.split_off(&LogIndex(start))) {
        if index.0 != expected {
            let why = format!("entry {expected} is missing, {index} follows");
            return Err(OpenError::Damaged { at: location.to_string(), why });
        }
        if index.0 >= written.next {
            break;
        }
        state.next_ticket += 1;
        let ticket = state.next_ticket;
        state.slots.push_back(Slot { term: at.term, ticket, location: None, cached: None });
        let head_only = Location { body_bytes: 0, ..location };
        state.entry_written(index, ticket, head_only);
        if let Some(slot) = state.slot_mut(index) {
            slot.location = Some(location);
        }
        if let Some(body) = bodies.get(&index) {
            state.bodies.insert(index, (ticket, None));
            state.body_written(index, ticket, *body);
        }
    }
    for (index, location) in bodies {
        if !state.bodies.contains_key(&index) {
            state.next_ticket += 1;
            let ticket = state.next_ticket;
            state.bodies.insert(index, (ticket, None));
            state.body_written(index, ticket, location);
        }
    }
    for (index, location) in dead {
        // Counted as live until it is overwritten, like any dying body.
        state.body_written(index, 0, location);
    }
    state.floor = written.floor;
    state.vote = written.vote;
    state.committed = written.committed;
    let checkpoint = fold_checkpoints(checkpoints, state)?;
    let recovered = Recovered {
        boots: 0,
        pristine,
        vote: written.vote,
        committed: written.committed,
        checkpoint,
        ambiguous_tail: false,
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
        if counts(number) {
            current.remove(&key);
            void_keys.push((key, segment));
        } else {
            state.void.insert(number);
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
    state.checkpoint_complete(&row_places, &void_keys, places);
    Ok(Some(RecoveredCheckpoint { applied: end.applied, tables: bytes.into() }))
}
