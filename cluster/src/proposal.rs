//! Proposing, from any node: here if this node leads, at the leader otherwise, again at the next leader if that one dies.
//!
//! A proposal that is tried again may be committed twice. The machine recognises it by the id in its command, so that it
//! takes effect once; openraft says the same of its `LogEntryDiscarded`.

use std::sync::PoisonError;
use std::time::Instant;

use bytes::Bytes;
use holdfast_storage::{LogPosition, Term};
use openraft::async_runtime::WatchReceiver;
use openraft::errors::ClientWriteError;
use openraft::impls::ProgressResponder;

use crate::clock;
use crate::cluster::Cluster;
use crate::durability::LeadershipLost;
use crate::limits::{BODY_BYTES_MAX, COMMAND_BYTES_MAX, RETRY, WITHOUT_ROOM};
use crate::peer::client::AskError;
use crate::peer::frame::{Answer, Request};
use crate::receipt::Receipt;
use crate::types::{Proposal, position};

/// Whether another leader may propose it too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// Any leader may, and it is tried until the deadline.
    Any,
    /// Only the leader of this term (openraft's `with_leader`). It is tried once.
    Term(Term),
}

/// A proposal that was applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposed {
    /// Where it stands in the log. If it was proposed twice, the later place.
    pub at: LogPosition,
    /// The machine's answer.
    pub outcome: Vec<u8>,
    /// Present if placement was asked for.
    pub receipt: Option<Receipt>,
}

/// Why a proposal has no outcome.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// No leader ever took it: it will certainly not come to pass.
    #[error("no leader took the proposal")]
    NotTaken,
    /// It may or may not come to pass.
    #[error("the outcome of the proposal is unknown")]
    OutcomeUnknown,
    /// It is longer than an entry may be. It was not proposed.
    #[error("the proposal is longer than an entry may be")]
    TooLarge,
    /// The machine refused it on the leader, before it was proposed.
    #[error("refused")]
    Refused {
        /// What the machine says to that.
        outcome: Vec<u8>,
        /// Whether an earlier leader took it, so that it may come to pass all the same.
        perhaps: bool,
    },
}

/// One attempt at one leader.
enum Attempt {
    Done(Proposed),
    Refused(Vec<u8>),
    /// Certainly not proposed.
    NotTaken,
    /// Perhaps proposed.
    Unknown,
}

impl Cluster {
    /// Proposes a command and waits until it is applied, and placed if `placed`, or until `deadline`.
    ///
    /// # Errors
    /// [`ProposeError`] says whether the command can still come to pass.
    pub async fn propose(
        &self,
        command: Bytes,
        body: Bytes,
        fence: Fence,
        placed: bool,
        deadline: Instant,
    ) -> Result<Proposed, ProposeError> {
        if command.len() > COMMAND_BYTES_MAX || body.len() > BODY_BYTES_MAX {
            return Err(ProposeError::TooLarge);
        }
        let proposal = Proposal { command, body };
        let mut taken = false;
        loop {
            let now = clock::now();
            let Some(left) = deadline.checked_duration_since(now).filter(|d| !d.is_zero()) else {
                return Err(if taken { ProposeError::OutcomeUnknown } else { ProposeError::NotTaken });
            };
            let attempt = match self.leader() {
                Some(leader) => {
                    tokio::select! {
                        attempt = self.attempt(leader, &proposal, fence, placed, left) => attempt,
                        // A leader that hangs holds nobody up once another one leads.
                        () = self.other_leader_than(leader) => Attempt::Unknown,
                        () = tokio::time::sleep(left) => Attempt::Unknown,
                    }
                }
                None => Attempt::NotTaken,
            };
            match attempt {
                Attempt::Done(proposed) => return Ok(proposed),
                Attempt::Refused(outcome) => return Err(ProposeError::Refused { outcome, perhaps: taken }),
                Attempt::NotTaken => {}
                Attempt::Unknown => taken = true,
            }
            if fence != Fence::Any {
                return Err(if taken { ProposeError::OutcomeUnknown } else { ProposeError::NotTaken });
            }
            tokio::time::sleep(RETRY.min(left)).await;
        }
    }

    async fn attempt(
        &self,
        leader: u64,
        proposal: &Proposal,
        fence: Fence,
        placed: bool,
        left: std::time::Duration,
    ) -> Attempt {
        if leader == self.id() {
            // Runs to its end even if nobody waits for it any more: what was admitted is applied or given up.
            let (this, proposal) = (self.clone(), proposal.clone());
            let here = tokio::spawn(async move { this.propose_here(proposal, fence, placed, left).await });
            return here.await.map_or(Attempt::Unknown, Into::into);
        }
        let Some(peer) = self.peer(leader) else { return Attempt::NotTaken };
        let term = match fence {
            Fence::Any => None,
            Fence::Term(term) => Some(term),
        };
        let left_ms = left.as_millis() as u64;
        let request = Request::Propose { command: proposal.command.len() as u32, term, placed, left_ms };
        match peer.ask(request, vec![proposal.command.clone(), proposal.body.clone()], left).await {
            Ok((Answer::Proposed { at, nodes }, outcome)) => {
                let nodes = self.members_of(&nodes);
                let receipt = placed.then(|| Receipt::new(at.index, nodes));
                Attempt::Done(Proposed { at, outcome: outcome.to_vec(), receipt })
            }
            Ok((Answer::Refused, outcome)) => Attempt::Refused(outcome.to_vec()),
            Ok((Answer::NotLeader(_), _)) | Err(AskError::NotSent(_)) => Attempt::NotTaken,
            Ok(_) | Err(AskError::NoAnswer(_)) => Attempt::Unknown,
        }
    }

    /// Proposes on this node, for itself or for a peer.
    pub(crate) async fn propose_here(
        &self,
        proposal: Proposal,
        fence: Fence,
        placed: bool,
        left: std::time::Duration,
    ) -> Here {
        if let Err(refusal) = self.admit(&proposal.command) {
            return Here::Refused(refusal.outcome);
        }
        // How much room there is is asked for once a second, and this may be the moment after it went. At the next try it is refused for
        // want of room, or there is another leader; whoever proposes waits meanwhile, with its octets.
        if !self.has_room_for(&proposal) {
            self.give_up(&proposal.command);
            tokio::time::sleep(WITHOUT_ROOM.min(left)).await;
            return Here::NotLeader(None);
        }
        let (responder, told) = ProgressResponder::complete_only();
        let command = proposal.command.clone();
        let mut write = self.raft().write(proposal).responder(responder);
        if let Fence::Term(term) = fence {
            write = write.with_leader(term.0);
        }
        if write.await.is_err() {
            self.give_up(&command);
            return Here::NotLeader(None);
        }
        let written = match told.await {
            Ok(Ok(written)) => written,
            Ok(Err(ClientWriteError::ForwardToLeader(to))) => {
                self.give_up(&command);
                return Here::NotLeader(to.leader_id);
            }
            Ok(Err(_)) | Err(_) => return Here::Unknown,
        };
        let at = position(&written.log_id);
        let mut receipt = None;
        if placed {
            match tokio::time::timeout(left, self.gate().placed(at)).await {
                Ok(Ok(placed)) => receipt = Some(placed),
                Ok(Err(LeadershipLost)) | Err(_) => return Here::Unknown,
            }
        }
        Here::Done(Proposed { at, outcome: written.data.0, receipt })
    }

    /// Whether the log has room for what a proposal brings; whatever ends what is here is always taken.
    fn has_room_for(&self, proposal: &Proposal) -> bool {
        let bytes = proposal.body.len() as u64;
        let machine = self.inner.machine.lock().unwrap_or_else(PoisonError::into_inner);
        let is_draining = bytes == 0 || machine.is_draining(&proposal.command);
        drop(machine);
        is_draining || self.inner.has_room_for(bytes, 0)
    }

    async fn other_leader_than(&self, leader: u64) {
        let mut metrics = self.raft().server_metrics();
        loop {
            let current = metrics.borrow_watched().current_leader;
            if current.is_some_and(|now| now != leader) {
                return;
            }
            if metrics.changed().await.is_err() {
                // The node is stopping; the other branches end the wait.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// What came of proposing on this node.
pub(crate) enum Here {
    Done(Proposed),
    Refused(Vec<u8>),
    NotLeader(Option<u64>),
    Unknown,
}

impl From<Here> for Attempt {
    fn from(here: Here) -> Attempt {
        match here {
            Here::Done(proposed) => Attempt::Done(proposed),
            Here::Refused(outcome) => Attempt::Refused(outcome),
            Here::NotLeader(_) => Attempt::NotTaken,
            Here::Unknown => Attempt::Unknown,
        }
    }
}
