//! A snapshot is a manifest: the machine's rows and tables and a list of the bodies they need. The follower fetches the
//! bodies it lacks before it installs.

use std::collections::{BTreeMap, BTreeSet};

use bincode::{Decode, Encode};
use holdfast_storage::{Bytes, LogIndex};

use crate::codec::Tables;

/// The state of the queue at a position.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Contents {
    pub(crate) tables: Tables,
    pub(crate) rows: BTreeMap<u128, Vec<u8>>,
    pub(crate) bodies: BTreeSet<LogIndex>,
}

/// What openraft hands around as a snapshot. It is made when one is sent, not when one is taken.
#[derive(Clone, Debug, Default)]
pub(crate) struct Manifest(pub(crate) Option<Box<Contents>>);

impl Contents {
    pub(crate) fn row_bytes(&self) -> BTreeMap<u128, Bytes> {
        self.rows.iter().map(|(key, row)| (*key, Bytes::copy_from_slice(row))).collect()
    }
}
