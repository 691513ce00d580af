//! Opening what is left of a damaged log.

use std::collections::BTreeMap;

use super::fold::{Hole, Opened, check_owner, decode, finish, io, segment_of, write_again};
use super::judge::scan_all;
use super::recovery::{self, Found};
use super::segment::{create, file_name, slot_of};
use super::state::{LogState, Segment};
use super::superblock::{Contents, Ends, Superblock};
use super::{Identity, Options};
use crate::clock;
use crate::codec::{Reset, SegmentHead};
use crate::disk::Disk;
use crate::error::OpenError;
use crate::limits::{BLOCK_BYTES, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN};
use crate::position::SegmentId;
use crate::record::Kind;

/// Starts are counted from here if their number is lost: 14 bits of it go into message ids.
const BOOTS_UNKNOWN: u64 = 1 << 13;

/// Opens what is left of a damaged log: its bodies up to an index, and nothing else. A segment of its own begins behind it, with
/// `reset` as its first record. The superblock says so before anything else is changed, so that one that is cut short is done
/// again with the same reset; what cannot be read stays until that is durable.
pub(super) fn salvage(
    disk: &dyn Disk,
    identity: &Identity,
    options: &Options,
    reset: &Reset,
) -> Result<Opened, OpenError> {
    let (mut contents, superblock) = match Superblock::load(disk) {
        Ok(Some(superblock)) => (superblock.contents.clone(), Some(superblock)),
        Ok(None) | Err(OpenError::Lost(_)) => (rebuilt(disk, identity, options)?, None),
        Err(e) => return Err(e),
    };
    check_owner(disk, identity, &contents)?;
    let mut state = LogState::default();
    let mut scanned = scan_all(disk, &options.keys, &contents, &Ends::new(), &mut state)?;
    let size = contents.segment_bytes;
    // As at any open: bodies that stand in the page cache alone are not to be counted upon.
    for (id, segment) in state.segments.range(scanned.mark.0..) {
        let behind = |f: &&Found| (*id, f.location.offset) >= scanned.mark;
        let records = scanned.records.iter().filter(|f| f.location.segment == *id && f.body_intact);
        for found in records.filter(behind) {
            let (from, to) = (found.location.offset as u64, found.end() as u64);
            // What cannot be read now is void, or asked of the others when it is wanted.
            if let Err(error) = write_again(&*segment.file, from, to.min(size)) {
                tracing::warn!(%error, segment = id.0, from, "what is left could not be read again");
            }
        }
        segment.file.sync_data().map_err(io("syncing what is left again"))?;
    }
    let mut unreadable = std::mem::take(&mut scanned.holes);
    unreadable.extend(scanned.cut.take().map(|(id, from)| (id, from, size as u32)));
    if contents.pending.is_some_and(|pending| pending.void_but.is_some()) {
        // One that was cut short: zeros that are read where nobody could read anything may be those of a sync that failed.
        unreadable = gaps(&state, &scanned.records, size as u32);
    }
    let slots = disk.list().map_err(io("listing the directory"))?;
    let slots = slots.iter().filter_map(|name| slot_of(name));
    let slot = slots.chain(contents.segments.iter().map(|(_, slot)| *slot)).max().map_or(0, |s| s + 1);
    let file = create(disk, slot, size).map_err(io("creating a segment"))?;
    contents.segments.retain(|(id, _)| state.segments.contains_key(id));
    let last = contents.segments.last().map_or(0, |(id, _)| id.0);
    contents.newest = SegmentId(contents.newest.0.max(last) + 1);
    let newest = contents.newest;
    contents.segments.push((newest, slot));
    contents.pending = Some(*reset);
    state.segments.insert(newest, Segment::new(slot, file));
    scanned.end = (newest, 0);
    scanned.ambiguous = false;
    scanned.records.push(Found::of_reset(newest, reset));
    let superblock = match superblock {
        Some(mut superblock) => {
            superblock.contents = contents;
            superblock
        }
        None => Superblock::replace(disk, contents).map_err(io("writing a new superblock"))?,
    };
    let mut opened = finish(disk, superblock, state, scanned)?;
    opened.salvage = Some((*reset, unreadable));
    Ok(opened)
}

/// All that is no record.
fn gaps(state: &LogState, records: &[Found], size: u32) -> Vec<Hole> {
    let mut gaps = Vec::new();
    for id in state.segments.keys() {
        let mut from = 0;
        for found in records.iter().filter(|found| found.location.segment == *id) {
            if from < found.location.offset {
                gaps.push((*id, from, found.location.offset));
            }
            from = found.end() as u32;
        }
        if from < size {
            gaps.push((*id, from, size));
        }
    }
    gaps
}

/// A superblock from what the segments say of themselves. One that had been given back may be among them; a salvage voids it.
fn rebuilt(disk: &dyn Disk, identity: &Identity, options: &Options) -> Result<Contents, OpenError> {
    let mut segments = BTreeMap::new();
    for slot in disk.list().map_err(io("listing the directory"))?.iter().filter_map(|name| slot_of(name)) {
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        let file = disk.open(&file_name(slot)).map_err(io("opening a segment"))?;
        if file.read_at(&mut bytes, 0).is_err() {
            continue;
        }
        let Some(id) = segment_of(&file_name(slot), &bytes)? else { continue };
        let scan = recovery::scan(&options.keys.of_segment(id), &bytes);
        scan.check_key()?;
        let Some(head) = scan.records.into_iter().find(|f| f.kind == Kind::SegmentHead) else { continue };
        let head: SegmentHead = decode("segment head", &head)?;
        if head.cluster != identity.cluster || head.node != identity.node {
            return Err(OpenError::WrongIdentity {
                dir: disk.name(),
                cluster: identity.cluster.clone(),
                node: identity.node,
                found_cluster: head.cluster,
                found_node: head.node,
            });
        }
        segments.insert(id, slot);
    }
    let newest = segments.last_key_value().map_or(SegmentId(0), |(id, _)| *id);
    Ok(Contents {
        sequence: 0,
        cluster: identity.cluster.clone(),
        node: identity.node,
        // Message ids carry the number of the start: one that was never used, as far as anybody can tell.
        boots: BOOTS_UNKNOWN + clock::random() % BOOTS_UNKNOWN,
        segment_bytes: options
            .segment_bytes
            .clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX)
            .next_multiple_of(BLOCK_BYTES),
        segments: segments.into_iter().collect(),
        newest,
        pending: None,
    })
}
