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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Placement;

    /// What stands in a data directory is read by every later version: these octets are never to change.
    fn holds(name: &str, octets: &[u8]) {
        let golden = include_str!("../testdata/golden.txt")
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let hex: String = octets.iter().map(|octet| format!("{octet:02x}")).collect();
        assert_eq!(Some(&hex[..]), golden, "{name}");
    }

    #[test]
    fn golden_entries_and_tables() {
        let member = |n: u64| {
            let placement =
                Placement { datacenter: "dc".into(), power: format!("p{n}"), network: format!("n{n}") };
            (n, Member { address: format!("h{n}:1"), admin: format!("h{n}:2"), placement })
        };
        let nodes: BTreeMap<u64, Member> = (1..=4).map(member).collect();
        let configs = vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([1, 2, 4])];
        let membership = Members { configs, nodes }.into_raft().expect("sound");
        let at = LogPosition { term: holdfast_storage::Term(300), index: holdfast_storage::LogIndex(70_000) };
        let command = Proposal { command: Bytes::from_static(b"command"), body: Bytes::from_static(b"body") };
        for (name, payload) in [
            ("blank", EntryPayload::Blank),
            ("command", EntryPayload::Normal(command)),
            ("membership", EntryPayload::Membership(membership.clone())),
        ] {
            let entry = Entry { log_id: log_id(at), payload };
            let stored = entry_to_stored(entry.clone());
            holds(name, &stored.head);
            assert_eq!(entry_from_stored(stored).expect("what was encoded"), entry);
        }
        let membership = StoredMembership::new(Some(log_id(at)), membership);
        let tables = Tables::new(&membership, b"the machine's".to_vec());
        holds("tables", &encode(&tables));
        let read: Tables = decode("tables", &encode(&tables)).expect("what was encoded");
        assert_eq!(read.membership().expect("sound"), membership);
    }
}
