//! Pure. May we deliver, and may we vote: the leader's own lease, and what it rests on. openraft's leader does not step down by itself when it
//! is cut off, so a leader asks here before it opens a transaction and again before it sends the final dot.
//!
//! A follower that heard from the leader at time t grants no vote before t plus one election timeout (on its own clock).
//! The leader counts from the time it *sent* what a quorum answered, which is earlier, and gives up a margin for
//! clocks that do not run alike and for the time between asking and sending.

use std::time::{Duration, Instant};

use holdfast_storage::Term;

/// Proof that this node had the right to deliver a moment ago. Only [`Lease::permit`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FinalDotPermit {
    term: Term,
}

impl FinalDotPermit {
    /// The term whose leader may deliver.
    pub fn term(&self) -> Term {
        self.term
    }
}

/// What a node knows of its right to deliver: its lease, and whatever else there is to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The term that this node leads, if it does.
    pub leads: Option<Term>,
    /// The term of the last entry that it has applied. Before one of its own term it may lack results that are committed.
    pub applied: Option<Term>,
    /// The newest term in which it was told to hand over, 0 if it never was: whom it hands over to is voted for without regard to promises.
    pub handed_over: Term,
    /// Whether it is a member that votes. Consensus hands over by itself when its leader is none any more.
    pub votes: bool,
    /// When this node sent the last message that a quorum answered.
    pub quorum_heard: Option<Instant>,
    /// Shortest time for which a follower keeps its promise.
    pub promise: Duration,
}

impl Lease {
    /// The part of the promise that is not used.
    pub const MARGIN_PERCENT: u32 = 25;

    /// A permit, if this node leads, knows all that was settled before, and the promise of a quorum still holds at `now`.
    pub fn permit(&self, now: Instant) -> Option<FinalDotPermit> {
        let term = self.leads?;
        let has_all = self.applied == Some(term);
        let hands_over = self.handed_over >= term;
        let usable = self.promise * (100 - Self::MARGIN_PERCENT) / 100;
        let is_held = now < self.quorum_heard? + usable;
        (has_all && !hands_over && self.votes && is_held).then_some(FinalDotPermit { term })
    }
}

/// When a node that started at `began` may vote: what it promised before it has forgotten, but not for how long promises hold.
pub fn votes_from(began: Instant, promise: Duration) -> Instant {
    began + promise
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leads(heard: Instant) -> Lease {
        Lease {
            leads: Some(Term(3)),
            applied: Some(Term(3)),
            handed_over: Term(2),
            votes: true,
            quorum_heard: Some(heard),
            promise: Duration::from_millis(400),
        }
    }

    #[test]
    fn p4_a_lease_ends_before_the_promise_does() {
        let heard = crate::clock::now();
        let lease = leads(heard);
        assert_eq!(lease.permit(heard).map(|p| p.term()), Some(Term(3)));
        assert!(lease.permit(heard + Duration::from_millis(299)).is_some());
        assert!(lease.permit(heard + Duration::from_millis(300)).is_none(), "the margin is not used");
        assert!(lease.permit(heard + Duration::from_millis(401)).is_none());
    }

    #[test]
    fn p4_each_part_of_the_right_to_deliver_is_needed() {
        let now = crate::clock::now();
        let whole = leads(now);
        assert!(whole.permit(now).is_some());
        for (what, lease) in [
            ("it follows", Lease { leads: None, ..whole }),
            ("it has not applied its own first entry", Lease { applied: Some(Term(2)), ..whole }),
            ("it has applied nothing", Lease { applied: None, ..whole }),
            ("it hands over", Lease { handed_over: Term(3), ..whole }),
            ("it is no voter any more", Lease { votes: false, ..whole }),
            ("nobody has answered yet", Lease { quorum_heard: None, ..whole }),
        ] {
            assert!(lease.permit(now).is_none(), "{what}");
        }
    }

    #[test]
    fn p4_who_started_votes_for_nobody_as_long_as_a_promise_holds() {
        let (began, promise) = (crate::clock::now(), Duration::from_millis(400));
        let heard = leads(began).quorum_heard.unwrap();
        let last = (0..1000)
            .map(|ms| heard + Duration::from_millis(ms))
            .take_while(|at| leads(heard).permit(*at).is_some());
        assert!(last.last().unwrap() < votes_from(began, promise));
    }
}
