//! What operators do to the cluster's members: bring one in, take one out, hand leadership over.

use std::time::Duration;

use holdfast_cluster::{ChangeError, Member, Placement};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::api::{Failure, NewMember};
use super::server::{Admin, failed};

/// A new member that has not caught up within this time stays a learner until the command is repeated.
const CATCH_UP: Duration = Duration::from_secs(540);
/// Entries that a node may lack and still be handed leadership.
const LAG_MAX: u64 = 1000;
/// How long handing over takes at the most.
const HAND_OVER: Duration = Duration::from_secs(10);

fn not_changed(error: ChangeError) -> Failure {
    Failure { unknown: error == ChangeError::Unknown, text: error.to_string() }
}

impl Admin {
    /// Brings a node in; items tell how far it is.
    pub(super) async fn add_member(
        &self,
        new: NewMember,
        tell: &mpsc::Sender<Value>,
    ) -> Result<Value, Failure> {
        let NewMember { id, address, admin, datacenter, power, network, force } = new;
        let own = self.cluster.members().remove(&self.cluster.id());
        let datacenter = datacenter.or_else(|| Some(own?.placement.datacenter));
        let Some(datacenter) = datacenter else { return Err(failed("--datacenter is missing")) };
        for (what, text) in [("--power", &power), ("--network", &network), ("--datacenter", &datacenter)] {
            if text.is_empty() {
                return Err(failed(&format!("{what} must not be empty")));
            }
        }
        let member = Member { address, admin, placement: Placement { datacenter, power, network } };
        let progress = |at: u64, of: u64| {
            // Whoever reads slowly hears less of it.
            drop(tell.try_send(json!({ "id": id, "at": at, "of": of })));
            !tell.is_closed()
        };
        self.cluster.add(id, member, force, CATCH_UP, progress).await.map_err(not_changed)?;
        Ok(json!({ "added": id }))
    }

    /// Takes a node out.
    pub(super) async fn remove_member(&self, id: u64, force: bool) -> Result<Value, Failure> {
        self.cluster.remove(id, force).await.map_err(not_changed)?;
        Ok(json!({ "removed": id }))
    }

    /// Hands leadership over, to a node or to the one whose log is freshest.
    pub(super) async fn transfer(&self, to: Option<u64>) -> Result<Value, Failure> {
        if self.cluster.leading().is_none() {
            return Err(failed("this node does not lead"));
        }
        if let Some(to) = to {
            if to == self.cluster.id() {
                return Ok(json!({ "leader": to }));
            }
            let report = self.cluster.report().await;
            let last = report.matched.values().max().copied().unwrap_or(0);
            let matched = report.matched.get(&to).copied().unwrap_or(0);
            match report.nodes.get(&to) {
                None => return Err(failed(&format!("node {to} is not a member"))),
                Some((_, None)) => return Err(failed(&format!("node {to} does not answer"))),
                Some(_) if !report.voters.contains(&to) => {
                    return Err(failed(&format!("node {to} has no vote yet: it is still catching up")));
                }
                Some(_) if matched + LAG_MAX < last => {
                    return Err(failed(&format!(
                        "node {to} is at entry {matched} of {last}: let it catch up first"
                    )));
                }
                Some(_) => {}
            }
        }
        let delivery = self.delivery.clone();
        // To its end, whatever becomes of the operator's connection: what was drained goes on.
        let hand_over = tokio::spawn(async move { delivery.hand_over(to, HAND_OVER).await });
        let moved = hand_over.await.unwrap_or(false);
        match self.cluster.leader().filter(|leader| moved && to.is_none_or(|to| to == *leader)) {
            Some(leader) => Ok(json!({ "leader": leader })),
            None => Err(failed(
                "leadership was not handed over in time: a transaction was open, or the other node did not take it; `status` says who \
                 leads",
            )),
        }
    }
}
