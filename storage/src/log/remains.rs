//! What is left of a damaged directory that may tell whose the octets were that are lost, without changing a byte of it.

use super::judge::read_segment;
use super::reader::read;
use super::recovery::{self, ROW_KEY_BYTES};
use super::segment::file_name;
use super::superblock::Superblock;
use crate::Bytes;
use crate::codec::{self, Gone, Reset};
use crate::disk::Disk;
use crate::error::OpenError;
use crate::position::LogIndex;
use crate::record::Kind;
use crate::seal::Keyring;

/// Something that can still be read.
#[derive(Debug)]
pub enum Remnant<'a> {
    /// A body is here, or was erased on purpose.
    Body(LogIndex),
    /// A row of the checkpoint of this number. Of several rows of a key the one with the highest number counts.
    Row {
        /// Number of its checkpoint.
        checkpoint: u64,
        /// Its key.
        key: u128,
        /// The row.
        row: Bytes,
    },
    /// Rows of a key up to this checkpoint are void; all of them if it is 0.
    Gone {
        /// Number of the checkpoint.
        checkpoint: u64,
        /// The key.
        key: u128,
    },
    /// All before it is void but for bodies up to here: a salvage.
    Void(LogIndex),
    /// Octets that are no record any more.
    Hole(&'a [u8]),
}

/// Tells `each` remnant of a directory, in the order of the log. What cannot be read is passed over.
///
/// # Errors
/// If both copies of the superblock are damaged. Without one there is nothing to tell.
pub fn remains(disk: &dyn Disk, keys: &Keyring, each: &mut dyn FnMut(Remnant<'_>)) -> Result<(), OpenError> {
    let Some(superblock) = Superblock::load(disk)? else { return Ok(()) };
    for (id, slot) in &superblock.contents.segments {
        let Ok(file) = disk.open(&file_name(*slot)) else { continue };
        let (octets, _) = read_segment(&*file, superblock.contents.segment_bytes);
        let scan = recovery::scan(&keys.of_segment(*id), &octets);
        for found in scan.records {
            let number = found.at.index.0;
            match found.kind {
                Kind::Entry | Kind::Body if found.body_intact || found.body_zeroed => {
                    each(Remnant::Body(found.at.index));
                }
                Kind::Row => {
                    let Some(key) = found.head.first_chunk() else { continue };
                    let Ok((head, _)) = read(&*file, keys, found.location, None, false) else { continue };
                    let row = head.slice(ROW_KEY_BYTES.min(head.len())..);
                    each(Remnant::Row { checkpoint: number, key: u128::from_le_bytes(*key), row });
                }
                Kind::Reset => {
                    let reset = codec::decode::<Reset>("reset", &found.head).ok();
                    reset
                        .and_then(|reset| reset.void_but)
                        .into_iter()
                        .for_each(|upto| each(Remnant::Void(upto)));
                }
                Kind::Gone => {
                    let Ok(gone) = codec::decode::<Gone>("tombstones", &found.head) else { continue };
                    let mut tell = |key| each(Remnant::Gone { checkpoint: number, key });
                    gone.keys.into_iter().for_each(&mut tell);
                }
                _ => {}
            }
        }
        for hole in scan.holes {
            each(Remnant::Hole(&octets[hole.from as usize..hole.to as usize]));
        }
    }
    Ok(())
}
