//! Which entries a node keeps below its checkpoint. It could start without any of them; they are kept so that others that are behind
//! get entries and no snapshot, and they pin the segments in which they stand.
//!
//! | the node | and | keeps |
//! | --- | --- | --- |
//! | any | less than twice the reserve is free | none: room to drain comes before whoever is behind |
//! | leads | all followers are near | what the slowest of them lacks |
//! | leads | a follower is far behind, or away | the newest `keep_entries` |
//! | leads | a snapshot is on its way | also all that came after it |
//! | follows | most of what is held is live | some, for when it leads, unless they are sealed with another key than now |
//! | follows | most of it is dead | none |

use std::collections::BTreeMap;
use std::time::Instant;

use holdfast_storage::SpaceReport;

use crate::limits::FOLLOWER_KEEPS;
use crate::transfer::Transfers;

/// What a node is asked to keep, and has room for.
pub(crate) struct Retention {
    /// Entries that a leader keeps for a follower that is behind.
    pub(crate) keep_entries: u64,
    /// Octets that stay free.
    pub(crate) reserve_bytes: u64,
}

/// How far the node's log is: of each, the first index that is not in it.
pub(crate) struct Progress {
    pub(crate) applied: u64,
    pub(crate) checkpoint: u64,
    /// What each follower has, by its id, if the node leads.
    pub(crate) followers: Option<BTreeMap<u64, u64>>,
}

impl Retention {
    /// The first index that is kept, at most that of the checkpoint. Snapshots whose followers need nothing kept any more are forgotten.
    pub(crate) fn kept_from(
        &self,
        log: &Progress,
        space: &SpaceReport,
        transfers: &Transfers,
        now: Instant,
    ) -> u64 {
        let is_short = space.free_bytes < 2 * self.reserve_bytes;
        let newest = log.applied.saturating_sub(self.keep_entries);
        let Some(followers) = &log.followers else {
            // Who follows a snapshot that was sent is another leader's to care for.
            transfers.end_all();
            if is_short || is_wasteful(space) {
                return log.checkpoint;
            }
            let some = log.checkpoint.saturating_sub(FOLLOWER_KEEPS.min(self.keep_entries));
            return log.checkpoint.min(some.max(space.other_key_upto.map_or(0, |upto| upto.0 + 1)));
        };
        transfers.forget_who_caught_up(followers, newest);
        let needed_next = transfers.needed_from(now).unwrap_or(u64::MAX);
        if is_short {
            return log.checkpoint;
        }
        let slowest = followers.values().min().copied().unwrap_or(0);
        log.checkpoint.min(slowest.max(newest)).min(needed_next)
    }
}

/// Whether what is held is more than twice what is live, but for a few segments.
fn is_wasteful(space: &SpaceReport) -> bool {
    space.sealed_bytes > 2 * space.sealed_live_bytes + 2 * space.segment_bytes
}

#[cfg(test)]
mod tests {
    use holdfast_storage::{LogIndex, LogPosition, Term};

    use super::*;
    use crate::clock;
    use crate::limits::TRANSFER_PATIENCE;

    const RETENTION: Retention = Retention { keep_entries: 10_000, reserve_bytes: 100 };

    fn leader(followers: &[u64]) -> Progress {
        let followers = (2..).zip(followers.iter().copied()).collect();
        Progress { applied: 90_000, checkpoint: 88_000, followers: Some(followers) }
    }

    fn follower() -> Progress {
        Progress { applied: 90_000, checkpoint: 88_000, followers: None }
    }

    fn roomy() -> SpaceReport {
        SpaceReport {
            free_bytes: 200,
            segment_bytes: 10,
            sealed_bytes: 120,
            sealed_live_bytes: 50,
            ..SpaceReport::default()
        }
    }

    fn kept(log: &Progress, space: &SpaceReport) -> u64 {
        RETENTION.kept_from(log, space, &Transfers::default(), clock::now())
    }

    #[test]
    fn p6_room_comes_before_whoever_is_behind() {
        let short = SpaceReport { free_bytes: 199, ..roomy() };
        assert_eq!(kept(&leader(&[80_500, 90_000]), &roomy()), 80_500);
        assert_eq!(kept(&leader(&[80_500, 90_000]), &short), 88_000);
        assert_eq!(kept(&follower(), &roomy()), 86_000);
        assert_eq!(kept(&follower(), &short), 88_000);
        let transfers = sent_to_two();
        assert_eq!(RETENTION.kept_from(&leader(&[0, 0]), &short, &transfers, clock::now()), 88_000);
        assert_eq!(RETENTION.kept_from(&leader(&[0, 0]), &roomy(), &transfers, clock::now()), 70);
    }

    #[test]
    fn p6_what_a_leader_keeps_has_a_bound() {
        assert_eq!(
            kept(&leader(&[90_000, 89_000]), &roomy()),
            88_000,
            "the checkpoint needs what comes after it"
        );
        assert_eq!(kept(&leader(&[79_999, 90_000]), &roomy()), 80_000);
        assert_eq!(kept(&leader(&[0, 90_000]), &roomy()), 80_000);
        let young = Progress { applied: 50, checkpoint: 40, ..leader(&[7]) };
        assert_eq!(kept(&young, &roomy()), 7);
        let alone = Progress { applied: 90_000, checkpoint: 88_000, followers: Some(BTreeMap::new()) };
        assert_eq!(kept(&alone, &roomy()), 80_000, "who is added next may need them");
    }

    #[test]
    fn p6_a_follower_holds_no_dead_segments_for_old_entries() {
        let wasteful = SpaceReport { sealed_bytes: 121, ..roomy() };
        assert_eq!(kept(&follower(), &wasteful), 88_000);
        assert_eq!(kept(&leader(&[80_500, 90_000]), &wasteful), 80_500, "a leader's followers may need them");
        let rekeyed = |upto| SpaceReport { other_key_upto: Some(LogIndex(upto)), ..roomy() };
        assert_eq!(kept(&follower(), &rekeyed(500)), 86_000);
        assert_eq!(kept(&follower(), &rekeyed(86_999)), 87_000);
        assert_eq!(kept(&follower(), &rekeyed(89_000)), 88_000);
        let thrifty = Retention { keep_entries: 1_000, reserve_bytes: 100 };
        assert_eq!(thrifty.kept_from(&follower(), &roomy(), &Transfers::default(), clock::now()), 87_000);
    }

    fn sent_to_two() -> Transfers {
        let transfers = Transfers::default();
        transfers.begin(2, Some(LogPosition { term: Term(1), index: LogIndex(69) }));
        transfers
    }

    #[test]
    fn p6_who_is_back_by_a_snapshot_keeps_nothing_for_long() {
        let (transfers, now) = (sent_to_two(), clock::now());
        let kept = |has| RETENTION.kept_from(&leader(&[has, 89_000]), &roomy(), &transfers, now);
        assert_eq!(kept(69), 70, "it does not have it yet");
        assert_eq!(kept(70), 70, "it has, and what it needs next would go");
        assert_eq!(kept(79_999), 70);
        assert_eq!(kept(80_000), 80_000);
        assert_eq!(kept(0), 80_000, "it is forgotten");
    }

    #[test]
    fn p1_what_comes_after_a_snapshot_is_kept_until_its_follower_is_given_up() {
        let (transfers, now) = (sent_to_two(), clock::now());
        let kept = |now| RETENTION.kept_from(&leader(&[0, 89_000]), &roomy(), &transfers, now);
        assert_eq!(kept(now), 70);
        assert_eq!(kept(now + TRANSFER_PATIENCE * 2), 80_000);
    }

    /// P6: a leader that was deposed kept all entries for five minutes for the followers of its snapshots.
    #[test]
    fn p6_who_leads_no_more_keeps_nothing_for_its_snapshots() {
        let (transfers, now) = (sent_to_two(), clock::now());
        assert_eq!(RETENTION.kept_from(&follower(), &roomy(), &transfers, now), 86_000);
        let again = RETENTION.kept_from(&leader(&[0, 89_000]), &roomy(), &transfers, now);
        assert_eq!(again, 80_000, "when it leads again it sends another one");
    }
}
