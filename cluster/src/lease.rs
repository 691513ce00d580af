//! Pure. May we deliver: the leader's own lease. openraft's leader does not step down by itself when it is cut off, so a
//! leader asks here before it opens a transaction and again before it sends the final dot.
//!
//! A follower that heard from the leader at time t grants no vote before t plus one election timeout (on its own clock).
//! The leader counts from the time it *sent* what a quorum answered, which is earlier, and gives up a margin for
//! clocks that do not run alike and for the time between asking and sending.

use std::time::{Duration, Instant};

use holdfast_storage::Term;

/// Proof that the lease held a moment ago. Only [`Lease::permit`] makes one.
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

/// What is known about the right to deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The term that this node leads.
    pub term: Term,
    /// When this node sent the last message that a quorum answered.
    pub quorum_heard: Instant,
    /// Shortest time for which a follower keeps its promise.
    pub promise: Duration,
}

impl Lease {
    /// The part of the promise that is not used.
    pub const MARGIN_PERCENT: u32 = 25;

    /// A permit, if the promise of a quorum still holds at `now`.
    pub fn permit(&self, now: Instant) -> Option<FinalDotPermit> {
        let usable = self.promise * (100 - Self::MARGIN_PERCENT) / 100;
        (now < self.quorum_heard + usable).then_some(FinalDotPermit { term: self.term })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p4_a_lease_ends_before_the_promise_does() {
        let heard = crate::clock::now();
        let lease = Lease { term: Term(3), quorum_heard: heard, promise: Duration::from_millis(400) };
        assert_eq!(lease.permit(heard).map(|p| p.term()), Some(Term(3)));
        assert!(lease.permit(heard + Duration::from_millis(299)).is_some());
        assert!(lease.permit(heard + Duration::from_millis(300)).is_none(), "the margin is not used");
        assert!(lease.permit(heard + Duration::from_millis(401)).is_none());
    }
}
