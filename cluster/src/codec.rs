//! Pure. What stands in the head of an entry, and the small tables of a checkpoint.
//!
//! Head of an entry: one byte, 0 blank, 1 command, 2 membership; the rest is the command, or the membership in bincode.

use std::collections::{BTreeMap, BTreeSet};

use bincode::{Decode, Encode};
use holdfast_storage::codec::{CodecError, decode, encode};
use holdfast_storage::{Bytes, Entry as StoredEntry, LogPosition};
use openraft::EntryPayload;

use crate::placement::Member;
use crate::types::{Entry, Membership, Proposal, StoredMembership, log_id, position};

const BLANK: u8 = 0;
const COMMAND: u8 = 1;
const MEMBERSHIP: u8 = 2;

/// A membership as it is stored and sent.
#[derive(Clone, PartialEq, Eq, Debug, Default, Encode, Decode)]
pub(crate) struct Members {
    pub(crate) configs: Vec<BTreeSet<u64>>,
    pub(crate) nodes: BTreeMap<u64, Member>,
}

impl Members {
    pub(crate) fn of(membership: &Membership) -> Members {
        Members {
            configs: membership.get_joint_config().clone(),
            nodes: membership.nodes().map(|(id, node)| (*id, node.clone())).collect(),
        }
    }

    fn into_raft(self) -> Result<Membership, CodecError> {
        Membership::new(self.configs, self.nodes)
            .map_err(|e| CodecError { what: "membership", why: e.to_string() })
    }
}

/// The small tables of a checkpoint: ours, and the machine's.
#[derive(Clone, PartialEq, Eq, Debug, Default, Encode, Decode)]
pub(crate) struct Tables {
    pub(crate) members_at: Option<LogPosition>,
    pub(crate) members: Members,
    pub(crate) machine: Vec<u8>,
}

impl Tables {
    pub(crate) fn new(membership: &StoredMembership, machine: Vec<u8>) -> Tables {
        Tables {
            members_at: membership.log_id().as_ref().map(position),
            members: Members::of(membership.membership()),
            machine,
        }
    }

    pub(crate) fn membership(&self) -> Result<StoredMembership, CodecError> {
        if self.members == Members::default() {
            return Ok(StoredMembership::default());
        }
        Ok(StoredMembership::new(self.members_at.map(log_id), self.members.clone().into_raft()?))
    }
}

pub(crate) fn entry_to_stored(entry: Entry) -> StoredEntry {
    let at = position(&entry.log_id);
    let (head, body) = match entry.payload {
        EntryPayload::Blank => (Bytes::from_static(&[BLANK]), Bytes::new()),
        EntryPayload::Normal(Proposal { command, body }) => {
            let mut head = Vec::with_capacity(1 + command.len());
            head.push(COMMAND);
            head.extend_from_slice(&command);
            (head.into(), body)
        }
        EntryPayload::Membership(membership) => {
            let mut head = vec![MEMBERSHIP];
            head.extend_from_slice(&encode(&Members::of(&membership)));
            (head.into(), Bytes::new())
        }
    };
    StoredEntry { at, head, body }
}

pub(crate) fn entry_from_stored(entry: StoredEntry) -> Result<Entry, CodecError> {
    let payload = match entry.head.first() {
        Some(&BLANK) => EntryPayload::Blank,
        Some(&COMMAND) => EntryPayload::Normal(Proposal { command: entry.head.slice(1..), body: entry.body }),
        Some(&MEMBERSHIP) => {
            EntryPayload::Membership(decode::<Members>("membership", &entry.head[1..])?.into_raft()?)
        }
        _ => return Err(CodecError { what: "entry", why: "unknown kind of entry".into() }),
    };
    Ok(Entry { log_id: log_id(entry.at), payload })
}
