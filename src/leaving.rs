//! A node that leads in the middle of a change of the membership which leaves it out: it ends what is open, and hands leadership over to
//! somebody who can finish the change.

use std::sync::Arc;
use std::time::Duration;

use holdfast_cluster::Cluster;

use crate::deliver::leader::Delivery;

/// Pause between looks.
const LOOK: Duration = Duration::from_secs(1);
/// Patience with what is open, and with the next leader.
const DRAIN: Duration = Duration::from_secs(10);

/// Looks for as long as the node runs.
pub async fn run(cluster: Cluster, delivery: Arc<Delivery>) {
    loop {
        tokio::time::sleep(LOOK).await;
        if !cluster.is_leaving() {
            continue;
        }
        tracing::warn!(
            "a change of the membership that leaves this node out is half done: handing leadership over"
        );
        // What does not end in time is begun again by the next leader: it is tried again here first.
        if !delivery.drain(DRAIN).await || !cluster.hand_over(None, DRAIN).await {
            tracing::warn!("leadership was not handed over");
        }
        delivery.resume();
    }
}
