//! The superblock: who owns the directory and which segment stands in which file.
//!
//! File `superblock`, two copies of 1 MiB each. A copy is `HFSB`, version (1 byte), three zero bytes, payload length
//! (u32), CRC-32 of the payload (u32), payload; then, behind it, where earlier builds do not look, up to where segments
//! were synced at least: `HFSE`, how many (u32), for each its id (u64) and the offset (u32), CRC-32 of all of the copy up
//! to here (u32). Valid
//! if and only if magic, version, length and CRC are right; the valid copy with the higher sequence number counts. A write goes to one copy and
//! is synced, then to the other: a crash at the worst moment leaves one of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use bincode::{Decode, Encode};

use crate::codec::{self, Reset};
use crate::disk::{Disk, DiskFile};
use crate::error::{Damage, OpenError};
use crate::limits::SUPERBLOCK_COPY_BYTES;
use crate::position::SegmentId;

/// Offsets in segments.
pub(crate) type Ends = BTreeMap<SegmentId, u32>;

const NAME: &str = "superblock";
const UNFINISHED: &str = "superblock.new";
const MAGIC: [u8; 4] = *b"HFSB";
const VERSION: u8 = 1;
const ENDS_MAGIC: [u8; 4] = *b"HFSE";
const END_BYTES: usize = 12;
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
    /// Up to where segments were synced at least: the newest as of a second or two ago or of the log's closing, the others as they were
    /// left. One that ends before has lost something. None of a segment to which an earlier build wrote.
    pub(crate) ends: Ends,
    /// The copy that is written first by the next store, if that matters: one that is not valid; or, of two that are, the one that was
    /// read, as the other may be all that is on the medium.
    first: Option<u64>,
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
        let mut superblock = Superblock { file, contents, ends: Ends::new(), first: None };
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
        let mut newest: Option<(Contents, u64)> = None;
        let mut ends = [None, None];
        let (mut invalid, mut newer) = (None, None);
        for copy in 0..2 {
            let mut bytes = vec![0; SUPERBLOCK_COPY_BYTES as usize];
            let read = file.read_at(&mut bytes, copy * SUPERBLOCK_COPY_BYTES);
            let parsed = if read.is_ok() { parse(disk, &bytes) } else { Ok(None) };
            // One octet that rots may look like that. Who wrote a newer one has written both.
            let parsed = parsed.unwrap_or_else(|error| {
                newer = Some(error);
                None
            });
            let Some(contents) = parsed else {
                invalid = Some(copy);
                continue;
            };
            ends[copy as usize] = ends_of(&bytes);
            if newest.as_ref().is_none_or(|(n, _)| n.sequence < contents.sequence) {
                newest = Some((contents, copy));
            }
        }
        match newest {
            Some((contents, copy)) => {
                // What the other one says was so once, and ends only move on.
                ends.rotate_left(copy as usize);
                let ends = ends.into_iter().flatten().next().unwrap_or_default();
                Ok(Some(Superblock { file, contents, ends, first: Some(invalid.unwrap_or(copy)) }))
            }
            // Both copies are written before anything refers to the directory: it was there.
            None => {
                if let Some(newer) = newer {
                    return Err(newer);
                }
                let mut damage = Damage::default();
                damage.note(format!("{}/{NAME}", disk.name()), "no copy of the superblock is valid");
                Err(OpenError::Lost(Box::new(damage)))
            }
        }
    }

    /// Whether both copies say what they should. One that does not is the first that is written next.
    pub(crate) fn is_whole(&mut self) -> bool {
        let is_right = |copy: &u64| {
            let mut bytes = vec![0; SUPERBLOCK_COPY_BYTES as usize];
            self.file.read_from_medium(&mut bytes, copy * SUPERBLOCK_COPY_BYTES).is_ok()
                && contents_of(&bytes).is_some_and(|contents| contents == self.contents)
                && ends_of(&bytes).is_some_and(|ends| ends == self.ends)
        };
        let wrong = (0..2).find(|copy| !is_right(copy));
        self.first = wrong.or(self.first);
        wrong.is_none()
    }

    /// Writes the contents to one copy and syncs it, then to the other: one copy that rots is never replaced by a stale one. An invalid copy
    /// comes first.
    pub(crate) fn store(&mut self) -> std::io::Result<()> {
        self.contents.sequence += 1;
        let payload = codec::encode(&self.contents);
        let mut bytes = Vec::with_capacity(PREFIX_BYTES + payload.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&[VERSION, 0, 0, 0]);
        bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(&payload).to_le_bytes());
        bytes.extend_from_slice(&payload);
        // So many segments that not all of their ends find room are some terabytes: the newest ends count most.
        let ends_max =
            (SUPERBLOCK_COPY_BYTES as usize).saturating_sub(bytes.len() + PREFIX_BYTES) / END_BYTES;
        while self.ends.len() > ends_max {
            self.ends.pop_first();
        }
        bytes.extend_from_slice(&ENDS_MAGIC);
        bytes.extend_from_slice(&(self.ends.len() as u32).to_le_bytes());
        for (segment, offset) in &self.ends {
            bytes.extend_from_slice(&segment.0.to_le_bytes());
            bytes.extend_from_slice(&offset.to_le_bytes());
        }
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        if bytes.len() as u64 > SUPERBLOCK_COPY_BYTES {
            return Err(std::io::Error::other("the list of segments has outgrown the superblock"));
        }
        let first = self.first.take().unwrap_or(self.contents.sequence % 2);
        for copy in [first, 1 - first] {
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

/// Up to where a copy says that segments were synced; nothing if that list is damaged, or the copy was written by an earlier build.
fn ends_of(bytes: &[u8]) -> Option<Ends> {
    let number = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let begin = PREFIX_BYTES + number(8)? as usize;
    let from = begin + ENDS_MAGIC.len() + size_of::<u32>();
    let count = number(begin + ENDS_MAGIC.len())? as usize;
    let to = from.checked_add(count.checked_mul(END_BYTES)?)?;
    let is_valid =
        bytes.get(begin..)?.starts_with(&ENDS_MAGIC) && number(to)? == crc32fast::hash(bytes.get(..to)?);
    let end = |field: &[u8]| {
        let (segment, offset) = field.split_first_chunk::<8>()?;
        let offset = u32::from_le_bytes(*offset.first_chunk()?);
        Some((SegmentId(u64::from_le_bytes(*segment)), offset))
    };
    bytes[from..to].chunks(END_BYTES).map(end).collect::<Option<Ends>>().filter(|_| is_valid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Vote;
    use crate::disk::sim::SimDisk;
    use crate::position::{LogIndex, LogPosition, Term};

    fn of_one_segment() -> Contents {
        Contents {
            sequence: 0,
            cluster: "test".into(),
            node: 1,
            boots: 1,
            segment_bytes: 64 << 20,
            segments: vec![(SegmentId(1), 0)],
            newest: SegmentId(1),
            pending: None,
        }
    }

    /// A version that rots is no newer version while the other copy is as it was written.
    #[test]
    fn p9_a_rotten_version_is_not_a_newer_one() {
        let disk = SimDisk::new(1);
        Superblock::create(&disk, of_one_segment()).expect("a sound disk");
        let flip = |copy: u64| disk.flip(NAME, copy * SUPERBLOCK_COPY_BYTES + 4, 7);
        for copy in 0..2 {
            flip(copy);
            let mut read = Superblock::load(&disk).expect("readable").expect("there");
            assert!(!read.is_whole() && read.contents.node == 1, "copy {copy}");
            flip(copy);
        }
        (0..2).for_each(flip);
        let refused = Superblock::load(&disk).map(|_| ());
        assert!(matches!(refused, Err(OpenError::NewerFormat { found: 129, .. })), "{refused:?}");
    }

    /// One copy's list of ends rots, not what it says beside that: the other's counts.
    #[test]
    fn p9_ends_are_known_while_one_copy_has_them() {
        let disk = SimDisk::new(1);
        let mut superblock = Superblock::create(&disk, of_one_segment()).expect("a sound disk");
        superblock.ends = Ends::from([(SegmentId(1), 8192)]);
        superblock.store().expect("a sound disk");
        let at = disk.contents(NAME).windows(4).position(|part| part == ENDS_MAGIC).expect("it is there");
        for copy in 0..2 {
            let place = copy * SUPERBLOCK_COPY_BYTES + at as u64 + 10;
            disk.flip(NAME, place, 3);
            let read = Superblock::load(&disk).expect("readable").expect("there");
            assert_eq!(read.ends, superblock.ends, "copy {copy}");
            disk.flip(NAME, place, 3);
        }
    }

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
        superblock.ends = Ends::from([(SegmentId(6), 1 << 20), (SegmentId(300), 4096)]);
        superblock.store().expect("a sound disk");
        assert_eq!(hex(&disk), golden[1]);
        let read = Superblock::load(&disk).expect("readable").expect("there");
        assert_eq!(read.ends, superblock.ends);
        assert_eq!(read.contents, Contents { sequence: 43, ..contents });
        // More than there is room for.
        superblock.ends = (0..100_000).map(|id| (SegmentId(id), 4096)).collect();
        superblock.store().expect("a sound disk");
        let mut read = Superblock::load(&disk).expect("readable").expect("there");
        assert_eq!(read.ends, superblock.ends);
        assert_eq!(read.ends.last_key_value(), Some((&SegmentId(99_999), &4096)));
        assert!(read.is_whole() && read.ends.len() > 80_000);
        superblock.ends = Ends::from([(SegmentId(6), 1 << 20)]);
        superblock.store().expect("a sound disk");
        // As an earlier build leaves it: a payload, and behind it what does not go with it.
        let mut bytes = disk.contents(NAME)[..SUPERBLOCK_COPY_BYTES as usize].to_vec();
        bytes[PREFIX_BYTES] ^= 1;
        assert_eq!(ends_of(&bytes), None);
        assert_eq!(ends_of(&bytes[..40]), None);
    }

    /// One copy is torn or rotten, and the power goes while the next store is under way: the other one is still there.
    #[test]
    fn p9_the_only_valid_copy_is_not_the_first_that_is_written() {
        for bad in 0..2 {
            for steps in 0..4 {
                let disk = SimDisk::new(steps);
                let contents = Contents {
                    sequence: bad,
                    cluster: "c".into(),
                    node: 1,
                    boots: 1,
                    segment_bytes: 4 << 20,
                    segments: vec![(SegmentId(1), 0)],
                    newest: SegmentId(1),
                    pending: None,
                };
                drop(Superblock::create(&disk, contents).expect("a sound disk"));
                let at = bad * SUPERBLOCK_COPY_BYTES + 20;
                disk.flip(NAME, at, 3);
                let mut superblock = Superblock::load(&disk).expect("one copy").expect("there");
                disk.power_off_in(steps);
                drop(superblock.store());
                // The copy that was being written is torn.
                let (seen, medium) = (disk.contents(NAME), disk.medium(NAME));
                let copies = [0, 1].map(|copy| copy * SUPERBLOCK_COPY_BYTES as usize);
                let torn = copies.into_iter().find(|from| {
                    let copy = *from..*from + SUPERBLOCK_COPY_BYTES as usize;
                    seen[copy.clone()] != medium[copy]
                });
                disk.crash();
                torn.into_iter().for_each(|from| disk.flip(NAME, from as u64 + 21, 4));
                let read = Superblock::load(&disk);
                assert!(matches!(read, Ok(Some(_))), "copy {bad} is bad, the power goes after {steps} steps");
            }
        }
    }
}
