//! Members that come and go. A new one is empty and under an id that was never used; it catches up as a learner and votes then. Every
//! change must leave a quorum and a placement among the nodes that answer, or be forced.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use holdfast_storage::LogIndex;
use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::raft::{ClientWriteResponse, Precondition};

use crate::clock;
use crate::cluster::{Cluster, NodeReport, RECOVERING};
use crate::limits::REQUEST;
use crate::peer::client::Peer;
use crate::peer::frame::{Answer, Past, Request};
use crate::placement::{Member, frontier, is_placed};
use crate::types::{LogId, Raft, TypeConfig, position};

/// Entries that a new member may be behind when it gets its vote: what comes in while that is agreed on.
const NEARLY: u64 = 1000;
/// Pause between looks at how far a new member has come.
const LOOK: Duration = Duration::from_millis(250);
/// How long a node that is to go is kept until the others hold what it helped to acknowledge.
const PLACE: Duration = Duration::from_secs(10);
/// Pause between looks for a change that was left half done.
const FINISH: Duration = Duration::from_secs(2);
/// A change of the membership is committed within this time, or nobody knows what became of it.
const COMMIT: Duration = Duration::from_secs(15);

/// Why the membership was not changed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChangeError {
    /// This node does not lead, or leads no more. Nothing was changed.
    #[error("this node does not lead")]
    NotLeader,
    /// It must not be. Nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// The new member does not keep up yet. It stays a learner; the same command goes on from there.
    #[error(
        "node {id} has caught up to entry {at} of {of} and is still a learner: repeat the command, and it goes on from there"
    )]
    NotYet {
        /// The new member.
        id: u64,
        /// How far it is.
        at: u64,
        /// How far the leader is.
        of: u64,
    },
    /// A node was taken out, and the others do not yet hold all that it held.
    #[error(
        "node {id} is no member any more, but the others do not yet hold all mail under two power and two network labels: keep its disk \
         until `status` shows that they have caught up"
    )]
    KeepIt {
        /// The node.
        id: u64,
    },
    /// It may have been changed or not.
    #[error("the outcome is unknown: look at `status`")]
    Unknown,
}

/// Whether these voters can go on without anybody's help: the ones that answer are a quorum, and placed.
fn can_go_on(voters: &BTreeMap<u64, Member>, answering: &BTreeSet<u64>) -> Result<(), String> {
    let alive: Vec<&Member> =
        voters.iter().filter(|(id, _)| answering.contains(id)).map(|(_, m)| m).collect();
    let quorum = voters.len() / 2 + 1;
    if alive.len() < quorum {
        return Err(format!(
            "{} of {} voters would answer, and a quorum is {quorum}: no mail would be taken",
            alive.len(),
            voters.len()
        ));
    }
    if !is_placed(alive.iter().map(|member| &member.placement)) {
        return Err(
            "the voters that would answer share one power or one network: no mail would be taken".into()
        );
    }
    Ok(())
}

/// Whether a node may come in under this id.
fn may_come(
    id: u64,
    member: &Member,
    members: &BTreeMap<u64, Member>,
    voters: &BTreeSet<u64>,
) -> Result<(), String> {
    if !(1..=255).contains(&id) {
        return Err("a node's id is 1 to 255".into());
    }
    match members.get(&id) {
        Some(_) if voters.contains(&id) => Err(format!("node {id} is a member already")),
        Some(known) if known != member => {
            Err(format!("node {id} is coming in already, at {}: remove it first", known.address))
        }
        Some(_) => Ok(()), // an earlier attempt goes on
        None => match members.keys().max() {
            Some(highest) if id < *highest => Err(format!(
                "ids are never used again, and node {highest} is a member: take {} or higher",
                highest + 1
            )),
            _ => Ok(()),
        },
    }
}

/// A change of the membership that has begun.
struct Change<'a> {
    _one: tokio::sync::MutexGuard<'a, ()>,
    /// Where the membership stands that it was decided upon.
    known: Option<LogId>,
}

impl Cluster {
    /// Who is there and has what it should have.
    async fn answering(&self) -> BTreeSet<u64> {
        let report = self.report().await;
        let is_whole = |node: &Option<NodeReport>| node.as_ref().is_some_and(|node| node.role != RECOVERING);
        report.nodes.into_iter().filter(|(_, (_, node))| is_whole(node)).map(|(id, _)| id).collect()
    }

    /// A node that is new must not be needed from its first moment on: if it dies then, nobody could take it out again.
    async fn answering_but(&self, new: u64) -> BTreeSet<u64> {
        let mut answering = self.answering().await;
        answering.remove(&new);
        answering
    }

    fn voting(&self, ids: &BTreeSet<u64>) -> BTreeMap<u64, Member> {
        self.members().into_iter().filter(|(id, _)| ids.contains(id)).collect()
    }

    /// One change at a time, by the leader, and none across another one that is half done.
    fn begin_change(&self) -> Result<Change<'_>, ChangeError> {
        let one = self.inner.changing.try_lock().map_err(|_| under_way())?;
        if self.leading().is_none() {
            return Err(ChangeError::NotLeader);
        }
        // Before anything else is looked at: what is decided upon is this membership or a later one.
        let metrics = self.raft().server_metrics();
        let known = *metrics.borrow_watched().membership_config.log_id();
        if self.configs().len() > 1 {
            return Err(under_way());
        }
        Ok(Change { _one: one, known })
    }

    /// Changes the membership if it is still the one that `change` was decided upon, and waits for that to be committed.
    async fn change(
        &self,
        change: &mut Change<'_>,
        to: ChangeMembers<u64, Member>,
        retain: bool,
    ) -> Result<(), ChangeError> {
        let unchanged = Precondition::LastMembershipLogId { last_membership_log_id: change.known };
        let at = committed(self.raft().change_membership_if(to, retain, [unchanged])).await?;
        change.known = Some(at);
        Ok(())
    }

    /// As leader: brings a new, empty node in. `tell` hears how far it is, in entries, and how far the leader is, and says whether
    /// anybody still wants it.
    ///
    /// # Errors
    /// See [`ChangeError`]. `force` overrides what would leave too few nodes that answer.
    pub async fn add(
        &self,
        id: u64,
        member: Member,
        force: bool,
        patience: Duration,
        tell: impl Fn(u64, u64) -> bool + Send,
    ) -> Result<(), ChangeError> {
        let mut change = self.begin_change()?;
        let refused = |why: String| Err(ChangeError::Refused(why));
        let (members, voters) = (self.members(), self.voters());
        if let Err(why) = may_come(id, &member, &members, &voters) {
            return refused(why);
        }
        let mut after = self.voting(&voters);
        after.insert(id, member.clone());
        if let Err(why) = can_go_on(&after, &self.answering_but(id).await)
            && !force
        {
            return refused(format!(
                "without node {id}, {why}, so that all would depend on it at once: first take out the nodes that do not answer, with `cluster \
                 remove`, or --force"
            ));
        }
        let peer = Peer::new(self.inner.local.clone(), id, member.address.clone());
        if !members.contains_key(&id) {
            let reach = |why: String| {
                format!("node {id} at {}: {why}; start it with an empty data directory first", member.address)
            };
            match peer.ask(Request::Past, Vec::new(), REQUEST).await {
                Ok((Answer::Past(Past::Pristine | Past::Prepared), _)) => {}
                Ok((Answer::Past(Past::Formed(_)), _)) => return refused(reach("it has data".into())),
                Ok((answer, _)) => return refused(reach(format!("{answer:?}"))),
                Err(e) => return refused(reach(e.to_string())),
            }
            // From here on it knows that it is wanted, also after a crash.
            match peer.ask(Request::Prepare, Vec::new(), REQUEST).await {
                Ok((Answer::Done, _)) => {}
                Ok((answer, _)) => return refused(reach(format!("{answer:?}"))),
                Err(e) => return refused(reach(e.to_string())),
            }
            let learner = BTreeMap::from([(id, member)]);
            self.change(&mut change, ChangeMembers::AddNodes(learner), true).await?;
        }
        let deadline = clock::now() + patience;
        loop {
            let (at, of) = (applied(&peer).await, self.last_index());
            let is_wanted = tell(at, of);
            if at + NEARLY >= of && at > 0 {
                break;
            }
            if !is_wanted || clock::now() > deadline || self.leading().is_none() {
                return Err(ChangeError::NotYet { id, at, of });
            }
            tokio::time::sleep(LOOK).await;
        }
        // It took a while: who answers now?
        if let Err(why) = can_go_on(&after, &self.answering_but(id).await)
            && !force
        {
            return refused(format!(
                "without node {id}, {why}; it stays a learner, and --force gives it its vote all the same"
            ));
        }
        let new = BTreeSet::from([id]);
        self.change(&mut change, ChangeMembers::AddVoterIds(new), false).await
    }

    fn last_index(&self) -> u64 {
        self.own_report().last_index.unwrap_or(0)
    }

    /// Whether the nodes that stay have, with a placement, all that is committed now.
    fn is_placed_without(&self, staying: &BTreeMap<u64, Member>, committed: LogIndex) -> bool {
        let data = self.raft().data_metrics();
        let data = data.borrow_watched();
        let durable = data.replication.iter().flatten();
        let durable = durable.filter_map(|(id, at)| Some((*id, position(at.as_ref()?).index)));
        let durable = durable.filter(|(id, _)| staying.contains_key(id)).collect();
        frontier(&durable, staying, committed).is_some_and(|(index, _)| index >= committed)
    }

    /// As leader: takes a node out. What it holds stays on its disk.
    ///
    /// # Errors
    /// See [`ChangeError`]. `force` overrides what would leave too few nodes that answer.
    pub async fn remove(&self, id: u64, force: bool) -> Result<(), ChangeError> {
        let mut change = self.begin_change()?;
        let refused = |why: String| Err(ChangeError::Refused(why));
        if !self.members().contains_key(&id) {
            return refused(format!("node {id} is not a member"));
        }
        if id == self.inner.id {
            return refused(format!("node {id} leads: hand leadership over first, with `cluster transfer`"));
        }
        let mut voters = self.voters();
        if !voters.remove(&id) {
            let learner = BTreeSet::from([id]);
            return self.change(&mut change, ChangeMembers::RemoveNodes(learner), false).await;
        }
        let staying = self.voting(&voters);
        if let Err(why) = can_go_on(&staying, &self.answering().await)
            && !force
        {
            return refused(format!("{why}; --force does it all the same"));
        }
        // What was acknowledged on the strength of the one that goes must stand without it.
        if !force && !self.wait_placed_without(&staying).await {
            return refused(
                "the nodes that stay do not yet hold all mail under two power and two network labels; wait until they have caught up, or \
                 --force"
                    .into(),
            );
        }
        let gone = BTreeSet::from([id]);
        self.change(&mut change, ChangeMembers::RemoveVoters(gone), false).await?;
        // And what was acknowledged until then.
        match self.wait_placed_without(&staying).await {
            true => Ok(()),
            false => Err(ChangeError::KeepIt { id }),
        }
    }

    /// Waits a while for the nodes that stay to hold, with a placement, all that is committed now.
    async fn wait_placed_without(&self, staying: &BTreeMap<u64, Member>) -> bool {
        let now = self.raft().data_metrics().borrow_watched().cluster_committed;
        let now = now.as_ref().map_or(LogIndex(0), |id| position(id).index);
        let deadline = clock::now() + PLACE;
        while now.0 > 0 && !self.is_placed_without(staying, now) {
            if clock::now() > deadline {
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
        true
    }

    /// Whether this node leads in the middle of a change that leaves it out. Whoever delivers ends what is open and then hands leadership
    /// over, to somebody who can finish the change.
    pub fn is_leaving(&self) -> bool {
        self.leading().is_some() && leaves_out(&self.configs(), self.inner.id)
    }

    /// The voters, as one set, or as two while they change.
    fn configs(&self) -> Vec<BTreeSet<u64>> {
        let metrics = self.raft().server_metrics();
        metrics.borrow_watched().membership_config.membership().get_joint_config().clone()
    }
}

/// Whether a change is half done that leaves a node without a vote.
fn leaves_out(configs: &[BTreeSet<u64>], id: u64) -> bool {
    configs.len() > 1 && configs.last().is_some_and(|last| !last.contains(&id))
}

fn under_way() -> ChangeError {
    ChangeError::Refused("another change of the membership is under way: try again in some seconds".into())
}

/// How far a node has applied the log; 0 if it does not answer.
async fn applied(peer: &Peer) -> u64 {
    match peer.ask(Request::Status, Vec::new(), REQUEST).await {
        Ok((Answer::Status, raw)) => {
            let report = holdfast_storage::codec::decode::<NodeReport>("report", &raw);
            report.ok().and_then(|report| report.applied_index).unwrap_or(0)
        }
        _ => 0,
    }
}

/// Finishes what a leader has left half done: a change goes by way of a membership of two halves, and until it has left that both must
/// agree. Ends with the node.
pub(crate) async fn finish(cluster: Cluster) {
    let mut said = false;
    loop {
        tokio::time::sleep(FINISH).await;
        let configs = cluster.configs();
        if configs.len() < 2 || cluster.leading().is_none() {
            said = false;
            continue;
        }
        if leaves_out(&configs, cluster.inner.id) {
            continue; // it would step down with mail in its hands: see `Cluster::is_leaving`
        }
        let Ok(_one) = cluster.inner.changing.try_lock() else { continue };
        let nobody = ChangeMembers::AddVoterIds(BTreeSet::new());
        let finished = committed(cluster.raft().change_membership(nobody, false)).await;
        if !std::mem::replace(&mut said, true) {
            tracing::warn!(?finished, "a change of the membership was left half done: finishing it");
        }
    }
}

/// Waits for a change to be committed. Where the new membership stands then.
async fn committed(
    change: impl Future<
        Output = Result<ClientWriteResponse<TypeConfig>, RaftError<TypeConfig, ClientWriteError<TypeConfig>>>,
    >,
) -> Result<LogId, ChangeError> {
    match tokio::time::timeout(COMMIT, change).await {
        Ok(Ok(response)) => Ok(response.log_id),
        Ok(Err(RaftError::APIError(ClientWriteError::PreconditionFailed(_)))) => Err(ChangeError::Refused(
            "the membership was changed meanwhile: look at `status` and decide again".into(),
        )),
        Ok(Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(why)))) => {
            Err(ChangeError::Refused(why.to_string()))
        }
        Ok(Err(_)) | Err(_) => Err(ChangeError::Unknown),
    }
}

/// Keeps the connections to peers those of the membership. Ends with the node.
pub(crate) async fn follow(cluster: Cluster, raft: Raft, mut addresses: BTreeMap<u64, String>) {
    let mut metrics = raft.server_metrics();
    loop {
        let wanted: BTreeMap<u64, String> = metrics
            .borrow_and_update()
            .membership_config
            .nodes()
            .filter(|(id, _)| **id != cluster.inner.id)
            .map(|(id, member)| (*id, member.address.clone()))
            .collect();
        // A node that has no membership yet goes by its file.
        if !wanted.is_empty() && wanted != addresses {
            let mut peers = cluster.inner.peers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            peers.retain(|id, _| wanted.contains_key(id));
            for (id, address) in &wanted {
                if addresses.get(id) != Some(address) {
                    peers.insert(*id, Peer::new(cluster.inner.local.clone(), *id, address.clone()));
                }
            }
            addresses = wanted;
        }
        if metrics.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Placement;

    fn member(power: &str) -> Member {
        let placement = Placement { datacenter: "dc".into(), power: power.into(), network: power.into() };
        Member { address: format!("{power}:1"), admin: format!("{power}:2"), placement }
    }

    fn members(of: &[(u64, &str)]) -> BTreeMap<u64, Member> {
        of.iter().map(|(id, power)| (*id, member(power))).collect()
    }

    #[test]
    fn p4_who_is_left_out_half_way_is_told_from_who_finishes() {
        let sets = |sets: &[&[u64]]| sets.iter().map(|ids| ids.iter().copied().collect()).collect::<Vec<_>>();
        assert!(leaves_out(&sets(&[&[1, 2, 3], &[2, 3]]), 1));
        assert!(!leaves_out(&sets(&[&[1, 2, 3], &[2, 3]]), 2));
        assert!(!leaves_out(&sets(&[&[1, 2], &[1, 2, 3]]), 1), "one comes in");
        assert!(!leaves_out(&sets(&[&[2, 3]]), 1), "it is over");
    }

    #[test]
    fn p6_no_change_leaves_too_few_nodes_that_answer() {
        let go_on = |voters: &[(u64, &str)], answering: &[u64]| {
            can_go_on(&members(voters), &answering.iter().copied().collect()).is_ok()
        };
        let three = [(1, "A"), (2, "B"), (3, "C")];
        assert!(go_on(&three, &[1, 2]));
        assert!(!go_on(&three, &[1]));
        assert!(!go_on(&three[..2], &[1]), "two need both");
        let four = [(1, "A"), (2, "B"), (3, "C"), (4, "D")];
        assert!(go_on(&four, &[2, 3, 4]));
        assert!(!go_on(&four, &[3, 4]), "two of four are no quorum");
        assert!(!go_on(&[(1, "A"), (2, "A"), (3, "B")], &[1, 2]), "they share one power");
        assert!(go_on(&four, &[1, 2, 3, 9]), "who is no voter does not count");
    }

    #[test]
    fn ids_are_never_used_again() {
        let (known, voters) = (members(&[(1, "A"), (2, "B"), (5, "C"), (6, "D")]), BTreeSet::from([1, 2, 5]));
        let may = |id, power: &str| may_come(id, &member(power), &known, &voters).is_ok();
        assert!(may(7, "E") && may(255, "E"));
        assert!(!may(0, "E") && !may(256, "E"));
        assert!(!may(2, "B"), "a member");
        assert!(!may(4, "E"), "perhaps it was one");
        assert!(may(6, "D"), "an earlier attempt goes on");
        assert!(!may(6, "E"), "it is coming in elsewhere");
    }
}
