//! Errors, sorted by what the caller can do.

use crate::codec::Vote;
use crate::position::{Location, LogPosition, SegmentId};
use crate::seal::KeyId;

/// Why a data directory was not opened. Nothing in it was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process holds the directory.
    #[error("{dir}: in use by another process; stop it, or give this node another data_dir")]
    Locked {
        /// The directory.
        dir: String,
    },
    /// The directory belongs to another cluster or node.
    #[error(
        "{dir}: belongs to node {found_node} of cluster {found_cluster}, not to node {node} of cluster {cluster}; \
         correct data_dir, or move the directory away if this node is to start empty"
    )]
    WrongIdentity {
        /// The directory.
        dir: String,
        /// Cluster id that was asked for.
        cluster: String,
        /// Node id that was asked for.
        node: u64,
        /// Cluster id on disk.
        found_cluster: String,
        /// Node id on disk.
        found_node: u64,
    },
    /// Written by a newer version.
    #[error(
        "{what}: format version {found}, this program reads up to {known}; run the version that wrote it"
    )]
    NewerFormat {
        /// File or record.
        what: String,
        /// Version found.
        found: u8,
        /// Newest version known.
        known: u8,
    },
    /// Sealed with an at-rest key that is not on the ring.
    #[error(
        "segment {segment} offset {offset}: sealed with the at-rest key {key}, which is not at hand; add that key to \
         the file that [storage] key_file names. Nothing was changed"
    )]
    NoKey {
        /// Segment of the first such record.
        segment: SegmentId,
        /// Its offset.
        offset: u32,
        /// The key's id.
        key: KeyId,
    },
    /// The log is damaged at or below what had been synced.
    #[error(
        "damage at {at}: {why}; this node will not guess. Move the directory away and start the node empty under a \
         new id, while the other nodes hold the mail"
    )]
    Damaged {
        /// Where.
        at: String,
        /// What is wrong there.
        why: String,
    },
    /// Parts of the log are lost at or below what had been synced. What is left can be opened with [`crate::Log::salvage`], once the
    /// other nodes have said what this one may have promised.
    #[error("{0}")]
    Lost(Box<Damage>),
    /// The operating system refused.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's answer.
        error: std::io::Error,
    },
}

/// What is lost of a log, and what is left that counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Damage {
    /// Where, and what is wrong there; the first few.
    pub places: Vec<String>,
    /// How many places there are.
    pub count: usize,
    /// The newest vote that is left.
    pub vote: Option<Vote>,
    /// The last position of which a record is left.
    pub last: Option<LogPosition>,
    /// The last position that is known to have been committed.
    pub committed: Option<LogPosition>,
    /// Names for people of what the lost octets may have belonged to, if somebody could tell.
    pub owners: Vec<String>,
    /// Whether vote and last position are certainly the newest there were: what was written last is whole.
    pub end_is_whole: bool,
}

impl Damage {
    /// Places that are named.
    const PLACES_MAX: usize = 5;
    /// Owners that are shown.
    const OWNERS_MAX: usize = 20;

    pub(crate) fn note(&mut self, at: impl std::fmt::Display, why: impl std::fmt::Display) {
        self.count += 1;
        if self.places.len() < Self::PLACES_MAX {
            self.places.push(format!("{at}: {why}"));
        }
    }
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "damage in {} places: {}", self.count, self.places.join("; "))?;
        let named = self.owners.iter().take(Self::OWNERS_MAX).map(String::as_str).collect::<Vec<_>>();
        match self.owners.len().saturating_sub(named.len()) {
            _ if named.is_empty() => Ok(()),
            0 => write!(f, "; it may have taken {}", named.join(", ")),
            more => write!(f, "; it may have taken {}, and {more} more", named.join(", ")),
        }
    }
}

/// Why an entry or a body could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The body was erased, or never was here.
    #[error("the body of entry {0} is not here")]
    Absent(crate::LogIndex),
    /// The record at this place is not the record that was written.
    #[error("damaged record at {at}: {why}")]
    Damaged {
        /// Where.
        at: Location,
        /// What is wrong.
        why: String,
    },
    /// The operating system refused.
    #[error("reading {at}: {error}")]
    Io {
        /// Where.
        at: Location,
        /// The system's answer.
        error: std::io::Error,
    },
}

/// The log has stopped after a failed write or sync. It never retries: after a failed fsync the kernel has marked
/// the pages clean, so what is on disk is unknown until a restart reads it (Rebello et al., ATC'20).
#[derive(Debug, Clone, thiserror::Error)]
#[error("the log has stopped: {0}")]
pub struct StoreFailed(pub String);
