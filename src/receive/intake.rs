//! The only place that chooses between 250, 451, 452 and hanging up after the data of a message (RFC 5321 §4.2.5, RFC 1047).
//!
//! 250 is made from a [`Receipt`] and nothing else. 451 is said only when the message is certainly not kept: no leader took it,
//! or its withdrawal was committed. When neither is known in time the connection is closed without a reply, and the client,
//! having heard nothing, tries again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use holdfast_cluster::{Cluster, Fence, ProposeError, Receipt};
use tokio::sync::Semaphore;

use crate::clock;
use crate::queue::command::{Answer, Command, PieceRef};
use crate::queue::message::{Envelope, Tick};
use crate::queue::{MessageId, Queue};
use crate::smtp::reply::Reply;

/// Without a sign of a quorum for this long, MAIL is answered with 451.
const QUORUM_LOST_AFTER: Duration = Duration::from_secs(10);

/// A node that knows of no route for a domain says so for good only if it knew all routes this recently; else it refuses for now.
const ROUTES_KNOWN_FOR: Duration = Duration::from_secs(2);

/// What the client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// 250: placed as the receipt says.
    Accepted(Receipt),
    /// 451 4.3.0: certainly not kept.
    NotKept,
    /// 452 4.3.1: no room, certainly not kept.
    NoRoom,
    /// Nothing can be said: close without a reply.
    HangUp,
}

/// Gives ids to messages. Ids carry the cluster's time, which goes on between two committed ticks by this node's clock.
struct Ids {
    node: u64,
    start: u64,
    committed: Tick,
    seen: Instant,
    last: Tick,
    count: u16,
}

/// Puts messages into the queue.
pub struct Intake {
    cluster: Cluster,
    queue: Arc<Mutex<Queue>>,
    ids: Mutex<Ids>,
    accept_timeout: Duration,
    reserve_bytes: u64,
    /// In KiB, over all sessions of this node.
    memory: Arc<Semaphore>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Intake {
    /// An intake; `start` is how often this node was started.
    pub fn new(
        cluster: Cluster,
        queue: Arc<Mutex<Queue>>,
        start: u64,
        accept_timeout: Duration,
        reserve_bytes: u64,
        memory_bytes: u64,
    ) -> Intake {
        let ids = Ids {
            node: cluster.id(),
            start,
            committed: Tick(0),
            seen: clock::now(),
            last: Tick(0),
            count: 0,
        };
        let memory = Arc::new(Semaphore::new((memory_bytes >> 10) as usize));
        Intake { cluster, queue, ids: Mutex::new(ids), accept_timeout, reserve_bytes, memory }
    }

    /// A fresh id.
    pub fn new_id(&self) -> MessageId {
        let committed = lock(&self.queue).now();
        let now = clock::now();
        let mut ids = lock(&self.ids);
        if committed > ids.committed {
            (ids.committed, ids.seen) = (committed, now);
        }
        let estimate = Tick(ids.committed.0 + now.duration_since(ids.seen).as_millis() as u64);
        if estimate > ids.last {
            (ids.last, ids.count) = (estimate, 0);
        } else if ids.count == u16::MAX {
            // More ids than fit into a tick: borrow from the next one.
            (ids.last, ids.count) = (Tick(ids.last.0 + 1), 0);
        } else {
            ids.count += 1;
        }
        MessageId::new(ids.last, ids.node, ids.start, ids.count)
    }

    /// Memory for messages under way, in KiB.
    pub(super) fn memory(&self) -> Arc<Semaphore> {
        self.memory.clone()
    }

    /// The queue, for a look at its routes.
    pub(super) fn queue(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }

    /// Why no mail is taken now, in words and as the reply to MAIL.
    pub fn not_accepting(&self) -> Option<(String, Reply)> {
        if self.cluster.space().free_bytes < self.reserve_bytes {
            let reply = Reply::new(452, "4.3.1", "Error: no room, try again later");
            return Some(("no room: free disk space is below reserve_bytes".into(), reply));
        }
        if !lock(&self.queue).takes_mail() {
            let reply = Reply::new(452, "4.3.1", "Error: no room, try again later");
            return Some(("no room: too few nodes have any to place a message on".into(), reply));
        }
        if self.cluster.quorum_age() > QUORUM_LOST_AFTER {
            let reply = Reply::new(451, "4.3.0", "Error: no quorum, try again later");
            return Some(("no quorum".into(), reply));
        }
        None
    }

    /// As of when there is no route but those that this node knows. One that has just started, or was cut off or stopped, may lack some.
    pub(super) fn routes_complete_as_of(&self) -> Option<Instant> {
        self.cluster.complete_as_of()
    }

    /// Whether who looked for a route after that knew all of them until a moment ago.
    pub(super) fn is_recent(complete: Option<Instant>) -> bool {
        complete.is_some_and(|at| clock::now().saturating_duration_since(at) < ROUTES_KNOWN_FOR)
    }

    async fn propose(&self, command: &Command, body: Bytes, placed: bool, deadline: Instant) -> Said {
        let proposed =
            self.cluster.propose(command.encode().into(), body, Fence::Any, placed, deadline).await;
        match proposed {
            Ok(p) => Said::Answer(Answer::decode(&p.outcome), p.receipt),
            Err(ProposeError::Refused { outcome, perhaps }) => match Answer::decode(&outcome) {
                // There is no room for it now; an earlier leader may have had it.
                Some(Answer::NoRoom) if perhaps => Said::Unknown,
                answer => Said::Answer(answer, None),
            },
            Err(ProposeError::NotTaken | ProposeError::TooLarge) => Said::NotTaken,
            Err(ProposeError::OutcomeUnknown) => Said::Unknown,
        }
    }

    /// Replicates a piece of a message that is still coming in. Its octets may leave memory once this returns.
    ///
    /// # Errors
    /// The verdict on the message if the piece was not taken.
    pub(super) async fn piece(&self, id: MessageId, seq: u32, octets: Bytes) -> Result<PieceRef, Verdict> {
        let piece = PieceRef { bytes: octets.len() as u32, digest: crc32fast::hash(&octets) };
        let deadline = clock::after(self.accept_timeout);
        match self.propose(&Command::Piece { id, seq, piece }, octets, false, deadline).await {
            Said::Answer(Some(Answer::Done), _) => Ok(piece),
            Said::Answer(Some(Answer::NoRoom), _) => Err(Verdict::NoRoom),
            _ => Err(Verdict::NotKept),
        }
    }

    /// Gives up a message of which pieces were sent; it is certainly never accepted, since nobody else knows its id.
    pub(super) async fn abandon(&self, id: MessageId) {
        let deadline = clock::after(self.accept_timeout);
        self.propose(&Command::Withdraw { id }, Bytes::new(), false, deadline).await;
    }

    /// Accepts a message: its octets are `body`, or the pieces sent before.
    pub async fn accept(
        &self,
        id: MessageId,
        envelope: Envelope,
        size: u64,
        body: Bytes,
        pieces: Vec<PieceRef>,
    ) -> Verdict {
        let accept = Command::Accept { id, envelope, size, pieces };
        let deadline = clock::after(self.accept_timeout);
        match self.propose(&accept, body.clone(), true, deadline).await {
            Said::NotTaken => Verdict::NotKept,
            Said::Answer(answer, receipt) => verdict(answer, receipt),
            Said::Unknown => {
                let deadline = clock::after(self.accept_timeout);
                match self.propose(&Command::Withdraw { id }, Bytes::new(), false, deadline).await {
                    Said::Answer(Some(Answer::Withdrawn), _) => Verdict::NotKept,
                    // It stands: proposed again, the queue knows it, and the answer comes when it is placed.
                    Said::Answer(Some(Answer::Stands), _) => {
                        match self.propose(&accept, body, true, deadline).await {
                            // A leader that has not applied it yet has no room for it, and it stands.
                            Said::Answer(Some(Answer::NoRoom), _) => Verdict::HangUp,
                            Said::Answer(answer, receipt) => verdict(answer, receipt),
                            Said::NotTaken | Said::Unknown => Verdict::HangUp,
                        }
                    }
                    _ => Verdict::HangUp,
                }
            }
        }
    }
}

enum Said {
    Answer(Option<Answer>, Option<Receipt>),
    NotTaken,
    Unknown,
}

fn verdict(answer: Option<Answer>, receipt: Option<Receipt>) -> Verdict {
    match (answer, receipt) {
        (Some(Answer::Accepted), Some(receipt)) => Verdict::Accepted(receipt),
        (Some(Answer::Withdrawn | Answer::PiecesMissing), _) => Verdict::NotKept,
        (Some(Answer::NoRoom), _) => Verdict::NoRoom,
        _ => Verdict::HangUp,
    }
}

/// The reply to a message's data. There is none for [`Verdict::HangUp`].
pub fn reply(verdict: &Verdict, id: MessageId) -> Option<Reply> {
    match verdict {
        Verdict::Accepted(_) => Some(Reply::new(250, "2.0.0", &format!("Ok: queued as {id}"))),
        Verdict::NotKept => {
            Some(Reply::new(451, "4.3.0", "Error: not replicated, nothing was kept, try again later"))
        }
        Verdict::NoRoom => Some(Reply::new(452, "4.3.1", "Error: no room, try again later")),
        Verdict::HangUp => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// P6: whatever the queue answers, 250 needs a receipt, and 451 needs certainty.
    #[test]
    fn p6_no_reply_is_a_guess() {
        for answer in [
            Some(Answer::Accepted),
            Some(Answer::Done),
            Some(Answer::Stands),
            Some(Answer::TooOld),
            Some(Answer::Malformed),
            None,
        ] {
            assert_eq!(verdict(answer.clone(), None), Verdict::HangUp, "{answer:?} without a receipt");
        }
        assert_eq!(verdict(Some(Answer::Withdrawn), None), Verdict::NotKept);
        assert!(reply(&Verdict::HangUp, MessageId(0)).is_none());
    }
}
