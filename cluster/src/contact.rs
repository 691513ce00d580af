//! Pure. When was a quorum last known: what decides whether mail is taken; and as of when a follower's state is complete: what decides whether
//! it may say that there is no such route. Neither grants what a lease would.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// What other members were heard to say.
#[derive(Debug)]
pub(crate) struct Contact {
    /// When a leader last spoke to this node; its own start until then.
    leader: Instant,
    /// When each member last followed this node: granted it a vote or took its entries.
    followed: BTreeMap<u64, Instant>,
    /// What the leader had committed at a moment, which is not known to be applied here: how many entries, and when.
    told: Option<(u64, Instant)>,
    /// Nothing that was committed by then is missing here, as far as the leader of then knew.
    complete: Option<Instant>,
}

impl Contact {
    /// A node that starts gets the benefit of the doubt.
    pub(crate) fn new(began: Instant) -> Contact {
        Contact { leader: began, followed: BTreeMap::new(), told: None, complete: None }
    }

    /// A leader spoke.
    pub(crate) fn led(&mut self, now: Instant) {
        self.leader = now;
    }

    /// The leader whom this node follows said at `at` that so many entries are committed; this node has applied so many.
    pub(crate) fn told(&mut self, committed: u64, applied: u64, at: Instant) {
        self.complete_as_of(applied);
        // The first that is waited for stays: under load there is always another one that is not applied yet.
        self.told.get_or_insert((committed, at));
    }

    /// As of when a node that has applied so many entries lacks nothing that its leader had committed. Nothing if it never was so.
    pub(crate) fn complete_as_of(&mut self, applied: u64) -> Option<Instant> {
        if let Some((_, at)) = self.told.take_if(|(committed, _)| *committed <= applied) {
            self.complete = Some(at);
        }
        self.complete
    }

    /// Member `id` followed this node.
    pub(crate) fn followed(&mut self, id: u64, now: Instant) {
        self.followed.insert(id, now);
    }

    /// When this node, which is `own`, last knew of a quorum of `voters`: a leader spoke, or so many followed that with itself they are one. A
    /// node that leads no more, or not yet in its own name, knows what it knew before.
    pub(crate) fn quorum_known(&self, own: u64, voters: &BTreeSet<u64>) -> Instant {
        let others = voters.iter().filter(|id| **id != own);
        let mut times: Vec<Instant> = others.filter_map(|id| self.followed.get(id).copied()).collect();
        times.sort_unstable_by(|a, b| b.cmp(a));
        let needed = (voters.len() / 2 + 1).saturating_sub(usize::from(voters.contains(&own)));
        let followed = needed.checked_sub(1).and_then(|last| times.get(last)).copied();
        followed.map_or(self.leader, |at| at.max(self.leader))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn p5_a_quorum_stays_known_when_leadership_changes_hands() {
        let began = crate::clock::now();
        let at = |s| began + Duration::from_secs(s);
        let three = BTreeSet::from([1, 2, 3]);
        let mut contact = Contact::new(began);
        assert_eq!(contact.quorum_known(1, &three), began);
        contact.led(at(5));
        assert_eq!(contact.quorum_known(1, &three), at(5), "a leader spoke");
        contact.followed(3, at(6));
        assert_eq!(contact.quorum_known(1, &three), at(6), "one of two others makes a quorum of three");
        contact.followed(2, at(9));
        assert_eq!(contact.quorum_known(1, &three), at(9));
        contact.led(at(7));
        assert_eq!(
            contact.quorum_known(1, &three),
            at(9),
            "what it knew as leader it still knows as follower"
        );
    }

    #[test]
    fn p5_a_state_is_complete_as_of_when_its_leader_had_committed_what_it_has() {
        let began = crate::clock::now();
        let at = |s| began + Duration::from_secs(s);
        let mut contact = Contact::new(began);
        assert_eq!(contact.complete_as_of(100), None, "nobody has told how much there is");
        contact.told(7, 3, at(1));
        assert_eq!(contact.complete_as_of(6), None);
        contact.told(9, 6, at(2));
        assert_eq!(contact.complete_as_of(7), Some(at(1)), "it lags behind and goes on");
        contact.told(12, 9, at(3));
        assert_eq!(contact.complete_as_of(11), Some(at(1)));
        assert_eq!(contact.complete_as_of(12), Some(at(3)));
        contact.told(12, 12, at(4));
        assert_eq!(contact.complete_as_of(12), Some(at(4)), "nothing is committed, and the leader says so");
    }

    #[test]
    fn p6_a_minority_is_no_quorum() {
        let began = crate::clock::now();
        let at = |s| began + Duration::from_secs(s);
        let five = BTreeSet::from([1, 2, 3, 4, 5]);
        let mut contact = Contact::new(began);
        contact.followed(2, at(9));
        assert_eq!(contact.quorum_known(1, &five), began, "two of five");
        contact.followed(7, at(9));
        assert_eq!(contact.quorum_known(1, &five), began, "a learner has no say");
        contact.followed(3, at(4));
        assert_eq!(
            contact.quorum_known(1, &five),
            at(4),
            "a quorum is as old as the last of it that is needed"
        );
        contact.followed(4, at(8));
        assert_eq!(contact.quorum_known(1, &five), at(8));
        // A node that has no vote needs a whole quorum of others.
        assert_eq!(contact.quorum_known(9, &BTreeSet::from([2, 3, 4])), at(8));
        assert_eq!(contact.quorum_known(1, &BTreeSet::new()), began, "before there are members");
    }
}
