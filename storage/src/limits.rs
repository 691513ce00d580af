//! Pure. The bounds of the log, and how they depend on each other.

use std::time::Duration;

/// Tests that go through many schedules or lives (`storage/interleavings`) want the bounds to be met soon.
const SMALL: bool = cfg!(feature = "small");

/// Batches begin and end on this boundary, so that a torn block never holds acknowledged bytes.
pub const BLOCK_BYTES: u64 = 4096;

/// Size of one copy of the superblock; two copies stand one after the other.
pub const SUPERBLOCK_COPY_BYTES: u64 = if SMALL { 16 << 10 } else { 1 << 20 };

/// The longest head (structured part) of a record. A longer one is refused before it is queued.
pub const HEAD_BYTES_MAX: usize = if SMALL { 8 << 10 } else { 1 << 20 };

/// The longest body of a record: DESIGN's bound of a piece.
pub const BODY_BYTES_MAX: usize = if SMALL { 8 << 10 } else { 256 << 10 };

/// What one group commit writes at the most. The rest waits for the next one.
pub const BATCH_BYTES_MAX: usize = if SMALL { 32 << 10 } else { 2 << 20 };

/// Pause between looks for room for another segment.
pub(crate) const ROOM_AGAIN: Duration = Duration::from_millis(if SMALL { 2 } else { 200 });

/// Smallest and largest size of a segment file.
pub const SEGMENT_BYTES_MIN: u64 = if SMALL { 64 << 10 } else { 4 << 20 };
/// See [`SEGMENT_BYTES_MIN`]. Offsets within a segment are 32 bits wide.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// Requests that may wait for the writer thread. A sender beyond this waits, which is the back-pressure that
/// keeps memory bounded.
pub const WRITER_QUEUE_MAX: usize = if SMALL { 2 } else { 4096 };

/// What one round of erasing overwrites at the most, so that it does not ride on somebody's fdatasync.
pub const ERASE_ROUND_BYTES_MAX: u64 = 8 << 20;

/// Segments of which less than this is live are emptied, percent: what is held stays below twice what is live.
pub const MOVE_BELOW_PERCENT: u64 = 60;

/// What one round of moving live records copies at the most: with ten rounds a second, 10 MiB/s.
pub const MOVE_ROUND_BYTES: usize = 1 << 20;

/// What the scrub reads at once: more than a batch, so that each window but the last ends where a batch begins.
pub const SCRUB_WINDOW_BYTES: usize = 4 << 20;

/// Zeroed segments kept ready; more are given back to the file system.
pub const POOL_SEGMENTS_MAX: usize = 2;

/// Bytes of recent entries that stay in memory so that replication and apply need not read the disk.
pub const CACHE_BYTES_MAX: usize = 64 << 20;

/// What one read of a range of entries returns at the most (never less than one entry).
pub const READ_BYTES_MAX: usize = 2 << 20;

/// Rows that the index is given or asked for in one go.
pub const INDEX_BATCH_ROWS: usize = 1000;

/// Pieces of news that may wait for the index's thread. Beyond it they are dropped, and the index is compared with the log.
pub const INDEX_NEWS_MAX: usize = 64;

/// Cache of the index. sled's bound is a loose one.
pub const INDEX_CACHE_BYTES: u64 = 32 << 20;

// A segment must hold its opening records (head, vote, floor: under a block each) and the largest batch.
const _: () = assert!(SEGMENT_BYTES_MIN >= BATCH_BYTES_MAX as u64 + (HEAD_BYTES_MAX + BODY_BYTES_MAX) as u64);
const _: () = assert!(SEGMENT_BYTES_MAX <= u32::MAX as u64);
const _: () = assert!(SCRUB_WINDOW_BYTES >= 2 * BATCH_BYTES_MAX);
// A batch takes at least one record of the largest size.
const _: () = assert!(BATCH_BYTES_MAX > HEAD_BYTES_MAX + BODY_BYTES_MAX + 4096);
