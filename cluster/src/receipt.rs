//! Proof that a message is durable where it must be. Only the placement check makes one, and it is the only thing from which
//! a 250 to end-of-data can be built.

use holdfast_storage::LogIndex;

use crate::placement::Member;

/// The entry at `index`, and all before it, was durable on these nodes when the receipt was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    index: LogIndex,
    nodes: Vec<(u64, Member)>,
}

impl Receipt {
    /// For `durability` and for the node that asked it over the wire.
    pub(crate) fn new(index: LogIndex, nodes: Vec<(u64, Member)>) -> Receipt {
        Receipt { index, nodes }
    }

    /// Index of the entry that was placed.
    pub fn index(&self) -> LogIndex {
        self.index
    }

    /// The nodes that hold it, with where they stand.
    pub fn nodes(&self) -> &[(u64, Member)] {
        &self.nodes
    }
}
