//! What operators do to the cluster's members: bring one in, take one out, hand leadership over.

use std::time::Duration;

use holdfast_cluster::{ChangeError, Member, Placement};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::api::{Failure, NewMember};
use super::server::{Admin, failed};

/// A new member that has not caught up within this time stays a learner until the command is repeated.
const CATCH_UP: Duration = Duration::from_secs(540);
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
            if !self.cluster.members().contains_key(&to) {
                return Err(failed(&format!("node {to} is not a member")));
            }
            if to == self.cluster.id() {
                return Ok(json!({ "leader": to }));
            }
        }
        // No transaction is open while leadership changes hands.
        self.delivery.drain(HAND_OVER).await;
        let moved = self.cluster.hand_over(to, HAND_OVER).await;
        self.delivery.resume();
        match moved {
            true => Ok(json!({ "leader": self.cluster.leader() })),
            false => Err(failed(
                "leadership was not taken over in time: is the other node there, and not far behind?",
            )),
        }
    }
}
