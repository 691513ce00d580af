//! openraft's types, filled in: standard Raft (one leader a term), our proposal, our member.

use std::fmt;

use holdfast_storage::{Bytes, LogIndex, LogPosition, Term, codec::Vote as StoredVote};
use openraft::impls::leader_id_std::LeaderId;
use openraft::vote::leader_id_std::CommittedLeaderId;

use crate::placement::Member;

/// What is proposed: a command for the machine, and perhaps a body that it does not look into.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Proposal {
    pub(crate) command: Bytes,
    pub(crate) body: Bytes,
}

impl fmt::Debug for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proposal({} + {} bytes)", self.command.len(), self.body.len())
    }
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What the machine answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome(pub(crate) Vec<u8>);

openraft::declare_raft_types!(
    pub(crate) TypeConfig:
        D = Proposal,
        R = Outcome,
        NodeId = u64,
        Node = Member,
        LeaderId = LeaderId<u64, u64>,
);

pub(crate) type LogId = openraft::LogId<CommittedLeaderId<u64>>;
pub(crate) type Vote = openraft::impls::Vote<LeaderId<u64, u64>>;
pub(crate) type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, Member>;
pub(crate) type StoredMembership = openraft::StoredMembership<CommittedLeaderId<u64>, u64, Member>;
pub(crate) type Snapshot =
    openraft::storage::Snapshot<CommittedLeaderId<u64>, u64, Member, crate::snapshot::Manifest>;
pub(crate) type SnapshotMeta = openraft::storage::SnapshotMeta<CommittedLeaderId<u64>, u64, Member>;
pub(crate) type Raft = openraft::Raft<TypeConfig, crate::state_machine::StateMachine>;

pub(crate) fn log_id(at: LogPosition) -> LogId {
    LogId::new(CommittedLeaderId::new(at.term.0), at.index.0)
}

pub(crate) fn position(id: &LogId) -> LogPosition {
    LogPosition { term: Term(id.committed_leader_id().term), index: LogIndex(id.index()) }
}

pub(crate) fn stored_vote(vote: &Vote) -> StoredVote {
    let leader = vote.leader_id();
    StoredVote { term: Term(leader.term), node: leader.voted_for, committed: vote.is_committed() }
}

pub(crate) fn raft_vote(vote: &StoredVote) -> Vote {
    match vote.committed {
        true => Vote::new_committed(vote.term.0, vote.node),
        false => Vote::new(vote.term.0, vote.node),
    }
}
