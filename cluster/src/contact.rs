//! Pure. When was a quorum last known: what decides whether mail is taken. It grants nothing that a lease would.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// What other members were heard to say.
#[derive(Debug)]
pub(crate) struct Contact {
    /// When a leader last spoke to this node; its own start until then.
    leader: Instant,
    /// When each member last followed this node: granted it a vote or took its entries.
    followed: BTreeMap<u64, Instant>,
}

impl Contact {
    /// A node that starts gets the benefit of the doubt.
    pub(crate) fn new(began: Instant) -> Contact {
        Contact { leader: began, followed: BTreeMap::new() }
    }

    /// A leader spoke.
    pub(crate) fn led(&mut self, now: Instant) {
        self.leader = now;
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
