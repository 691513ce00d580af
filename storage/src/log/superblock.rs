//! The superblock: who owns the directory and which segment stands in which file.
//!
//! File `superblock`, two copies of 1 MiB each. A copy is `HFSB`, version (1 byte), three zero bytes, payload length
//! (u32), CRC-32 of the payload (u32), payload; then, if it is known, where the log ends at least: `HFSE`, segment (u64), offset (u32),
//! CRC-32 of these sixteen bytes (u32), which earlier builds do not look at. Valid if and only if magic, version, length and CRC are right; the
//! valid copy with the higher sequence number counts. A write goes to the other copy and is synced, so a crash
//! at the worst moment leaves the one before.

use std::sync::Arc;

use bincode::{Decode, Encode};

use crate::codec::{self, Reset};
use crate::disk::{Disk, DiskFile};
use crate::error::{Damage, OpenError};
use crate::limits::SUPERBLOCK_COPY_BYTES;
use crate::position::SegmentId;

/// A segment, and an offset in it.
pub(crate) type End = (SegmentId, u32);

const NAME: &str = "superblock";
const UNFINISHED: &str = "superblock.new";
const MAGIC: [u8; 4] = *b"HFSB";
const VERSION: u8 = 1;
const END_MAGIC: [u8; 4] = *b"HFSE";
const END_BYTES: usize = 20;
const PREFIX_BYTES: usize = 16;

/// What the superblock says.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub(crate) struct Contents {
    pub(crate) sequence: u64,
    pub(crate) cluster: String,
    pub(crate) node: u64,
    /// How often the directory was opened.
    pub(crate) boots: u64,
    pub(crate) segment_bytes: u64,
    /// Segments in use and the number of the file of each, in rising order.
    pub(crate) segments: Vec<(SegmentId, u32)>,
    /// The highest segment id ever used.
    pub(crate) newest: SegmentId,
    /// Set from the moment at which a salvage begins to change the directory until its reset stands in the log and what cannot be read
    /// is overwritten: until then each open salvages again, with this. One that voids nothing (`void_but` is none) was set before an
    /// ambiguous tail was cut: until the others were heard each open says that there was one.
    pub(crate) pending: Option<Reset>,
}

/// The superblock's file.
pub(crate) struct Superblock {
    file: Arc<dyn DiskFile>,
    pub(crate) contents: Contents,
    /// The log was synced up to here at least, as of a second or two ago or of its closing: if it ends before, something is lost.
    pub(crate) end: Option<End>,
}

impl Superblock {
    /// Creates the superblock of an empty directory, durably.
    pub(crate) fn create(disk: &dyn Disk, contents: Contents) -> std::io::Result<Superblock> {
        // Made under another name, so that a superblock is there whole or not at all.
        if disk.list()?.iter().any(|name| name == UNFINISHED) {
            disk.remove(UNFINISHED)?;
        }
        let file = disk.create(UNFINISHED)?;
        file.write_at(&vec![0; 2 * SUPERBLOCK_COPY_BYTES as usize], 0)?;
        let mut superblock = Superblock { file, contents, end: None };
        superblock.store()?;
        disk.rename(UNFINISHED, NAME)?;
        disk.sync_dir()?;
        Ok(superblock)
    }

    /// Puts a new superblock in the place of one that cannot be read, or that is not there, durably.
    pub(crate) fn replace(disk: &dyn Disk, contents: Contents) -> std::io::Result<Superblock> {
        if disk.list()?.iter().any(|name| name == NAME) {
            // Whoever wants to look at it finds it there.
            let aside = format!("{NAME}.damaged");
            if disk.list()?.contains(&aside) {
                disk.remove(&aside)?;
            }
            disk.rename(NAME, &aside)?;
        }
        Superblock::create(disk, contents)
    }

    /// Reads the superblock; `None` if the directory holds none.
    pub(crate) fn load(disk: &dyn Disk) -> Result<Option<Superblock>, OpenError> {
        let io = |error| OpenError::Io { what: format!("{}/{NAME}", disk.name()), error };
        if !disk.list().map_err(io)?.iter().any(|name| name == NAME) {
            return Ok(None);
        }
        let file = disk.open(NAME).map_err(io)?;
        let mut newest: Option<Contents> = None;
        let mut end = None;
        for copy in 0..2 {
            let mut bytes = vec![0; SUPERBLOCK_COPY_BYTES as usize];
            if file.read_at(&mut bytes, copy * SUPERBLOCK_COPY_BYTES).is_err() {
                continue;
            }
            let Some(contents) = parse(disk, &bytes)? else { continue };
            // It never goes back: the highest counts.
            end = end.max(end_of(&bytes));
            if newest.as_ref().is_none_or(|n| n.sequence < contents.sequence) {
                newest = Some(contents);
            }
        }
        match newest {
            Some(contents) => Ok(Some(Superblock { file, contents, end })),
            // Both copies are written before anything refers to the directory: it was there.
            None => {
                let mut damage = Damage::default();
                damage.note(format!("{}/{NAME}", disk.name()), "no copy of the superblock is valid");
                Err(OpenError::Lost(Box::new(damage)))
            }
        }
    }

    /// Whether both copies say what they should.
    pub(crate) fn is_whole(&self) -> bool {
        (0..2).all(|copy| {
            let mut bytes = vec![0; SUPERBLOCK_COPY_BYTES as usize];
            self.file.read_from_medium(&mut bytes, copy * SUPERBLOCK_COPY_BYTES).is_ok()
                && contents_of(&bytes).is_some_and(|contents| contents == self.contents)
                && end_of(&bytes) == self.end
        })
    }

    /// Writes the contents to the older copy and syncs it, then to the other: one copy that rots is never replaced by a stale one.
    pub(crate) fn store(&mut self) -> std::io::Result<()> {
        self.contents.sequence += 1;
        let payload = codec::encode(&self.contents);
        let mut bytes = Vec::with_capacity(PREFIX_BYTES + payload.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&[VERSION, 0, 0, 0]);
        bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(&payload).to_le_bytes());
        bytes.extend_from_slice(&payload);
        if let Some((segment, offset)) = self.end {
            let from = bytes.len();
            bytes.extend_from_slice(&END_MAGIC);
            bytes.extend_from_slice(&segment.0.to_le_bytes());
            bytes.extend_from_slice(&offset.to_le_bytes());
            bytes.extend_from_slice(&crc32fast::hash(&bytes[from..]).to_le_bytes());
        }
        if bytes.len() as u64 > SUPERBLOCK_COPY_BYTES {
            return Err(std::io::Error::other("the list of segments has outgrown the superblock"));
        }
        for copy in [self.contents.sequence % 2, (self.contents.sequence + 1) % 2] {
            self.file.write_at(&bytes, copy * SUPERBLOCK_COPY_BYTES)?;
            self.file.sync_data()?;
        }
        Ok(())
    }
}

fn parse(disk: &dyn Disk, bytes: &[u8]) -> Result<Option<Contents>, OpenError> {
    if bytes[..4] != MAGIC {
        return Ok(None);
    }
    if bytes[4] > VERSION {
        let what = format!("{}/{NAME}", disk.name());
        return Err(OpenError::NewerFormat { what, found: bytes[4], known: VERSION });
    }
    Ok(contents_of(bytes))
}

/// What a copy says, if its length and CRC are right.
fn contents_of(bytes: &[u8]) -> Option<Contents> {
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let payload = bytes.get(PREFIX_BYTES..PREFIX_BYTES + number(8) as usize)?;
    if bytes[..4] != MAGIC || crc32fast::hash(payload) != number(12) {
        return None;
    }
    codec::decode("superblock", payload).ok()
}

/// Where a copy says that the log ends at least.
fn end_of(bytes: &[u8]) -> Option<End> {
    let payload_bytes = u32::from_le_bytes(*bytes[8..].first_chunk()?) as usize;
    let end = bytes.get(PREFIX_BYTES + payload_bytes..)?.first_chunk::<END_BYTES>()?;
    let (fields, crc) = end.split_at(END_BYTES - 4);
    let (magic, fields_left) = fields.split_at(4);
    let (segment, offset) = fields_left.split_at(8);
    let is_valid = magic == END_MAGIC && crc == crc32fast::hash(fields).to_le_bytes();
    let segment = SegmentId(u64::from_le_bytes(segment.try_into().ok()?));
    is_valid.then_some((segment, u32::from_le_bytes(offset.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Vote;
    use crate::disk::sim::SimDisk;
    use crate::position::{LogIndex, LogPosition, Term};

    /// What stands in a data directory is read by every later version: the superblock as it was first written, and as it is written now.
    #[test]
    fn golden_superblock() {
        let vote = Vote { term: Term(7), node: 2, committed: true };
        let last = LogPosition { term: Term(7), index: LogIndex(300) };
        let contents = Contents {
            sequence: 41,
            cluster: "example".into(),
            node: 3,
            boots: 5,
            segment_bytes: 64 << 20,
            segments: vec![(SegmentId(6), 1), (SegmentId(300), 0)],
            newest: SegmentId(300),
            pending: Some(Reset { vote: Some(vote), last: Some(last), void_but: Some(LogIndex(299)) }),
        };
        let disk = SimDisk::new(1);
        let mut superblock = Superblock::create(&disk, contents.clone()).expect("a sound disk");
        let hex = |disk: &SimDisk| -> String {
            let copy = disk.contents(NAME)[..128].to_vec();
            copy.iter()
                .map(|octet| format!("{octet:02x}"))
                .collect::<String>()
                .trim_end_matches('0')
                .to_owned()
        };
        let golden: Vec<&str> = include_str!("../../testdata/superblock.hex").lines().collect();
        assert_eq!(hex(&disk), golden[0]);
        superblock.end = Some((SegmentId(300), 4096));
        superblock.store().expect("a sound disk");
        assert_eq!(hex(&disk), golden[1]);
        let read = Superblock::load(&disk).expect("readable").expect("there");
        assert_eq!(read.end, superblock.end);
        assert_eq!(read.contents, Contents { sequence: 43, ..contents });
        // Octets that are no end are none.
        let mut bytes = disk.contents(NAME);
        let at = bytes.windows(4).position(|part| part == END_MAGIC).expect("it stands there");
        bytes[at + 6] ^= 1;
        assert_eq!(end_of(&bytes[..SUPERBLOCK_COPY_BYTES as usize]), None);
    }
}
