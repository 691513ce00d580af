//! Pure. What a checkpoint holds beside the messages, and the bytes of both. The first byte is the feature level.

use std::collections::BTreeMap;

use bincode::{Decode, Encode};
use holdfast_cluster::LogIndex;
use holdfast_storage::codec::{decode_large, encode};

use super::apply::Pieces;
use super::command::{FEATURE, Route};
use super::message::{Message, MessageId, Tick};

/// What stands under a domain in the table of routes.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct RouteEntry {
    /// The route. `None` if it was removed and mail that waited for it is held.
    pub route: Option<Route>,
    /// Since when it is so.
    pub since: Tick,
    /// The log entry that made it so.
    pub made_by: LogIndex,
}

/// The small tables.
#[derive(Clone, PartialEq, Eq, Debug, Default, Encode, Decode)]
pub(super) struct Tables {
    /// Cluster time.
    pub(super) now: Tick,
    /// Ids that left the queue not long ago; true if withdrawn.
    pub(super) window: BTreeMap<MessageId, bool>,
    pub(super) routes: BTreeMap<String, RouteEntry>,
    pub(super) pieces: BTreeMap<MessageId, Pieces>,
}

fn with_feature<T: Encode>(value: &T) -> Vec<u8> {
    let mut bytes = vec![FEATURE];
    bytes.extend_from_slice(&encode(value));
    bytes
}

fn without_feature<T: Decode<()>>(what: &'static str, bytes: &[u8]) -> Result<T, String> {
    match bytes.split_first() {
        Some((&FEATURE, rest)) => decode_large(what, rest).map_err(|e| e.to_string()),
        _ => Err(format!("{what}: unknown feature level; run the version that wrote it")),
    }
}

impl Tables {
    pub(super) fn encode(&self) -> Vec<u8> {
        with_feature(self)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Tables, String> {
        without_feature("queue tables", bytes)
    }
}

impl Message {
    /// The message as a row of a checkpoint.
    pub(super) fn row(&self) -> Vec<u8> {
        with_feature(self)
    }

    pub(super) fn from_row(bytes: &[u8]) -> Result<Message, String> {
        without_feature("queue row", bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// P1: what a checkpoint writes at the highest rate of mail is read again: four minutes of ids, at 12,000 messages a second.
    #[test]
    fn p1_a_long_window_is_read_back() {
        let window = (0..3_000_000).map(|n| (MessageId(n), n % 2 == 0)).collect();
        let tables = Tables { window, ..Tables::default() };
        assert!(Tables::decode(&tables.encode()).unwrap() == tables);
    }
}
