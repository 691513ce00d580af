//! Pure. Numbers that wear their names.

use std::fmt;

use bincode::{Decode, Encode};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash, Encode, Decode)]
        pub struct $name(pub u64);
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

number!(
    /// A Raft term.
    Term
);
number!(
    /// Index of an entry in the replicated log, from 0.
    LogIndex
);
number!(
    /// Number of a segment in the order of writing. Never used twice in one data directory.
    SegmentId
);
number!(
    /// Bytes from the beginning of a segment file.
    Offset
);

/// An entry's identity: two logs that agree on it agree on everything before it (Raft §5.3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash, Encode, Decode)]
pub struct LogPosition {
    /// Term in which the entry was proposed.
    pub term: Term,
    /// Index in the log.
    pub index: LogIndex,
}

impl fmt::Display for LogPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of term {}", self.index, self.term.0)
    }
}

/// Where a record stands: its header begins at `offset` of `segment`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Encode, Decode)]
pub struct Location {
    /// Segment that holds the record.
    pub segment: SegmentId,
    /// Offset of the record's header.
    pub offset: u32,
    /// Length of the head in bytes.
    pub head_bytes: u32,
    /// Length of the body in bytes.
    pub body_bytes: u32,
}

impl Location {
    /// Offset of the first octet of the body.
    pub fn body_offset(&self) -> u64 {
        self.offset as u64 + crate::record::HEADER_BYTES as u64 + self.head_bytes as u64
    }
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "segment {} offset {}", self.segment, self.offset)
    }
}
