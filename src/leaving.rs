//! A node that leads in the middle of a change of the membership which leaves it out: it ends what is open, and hands leadership over to
//! somebody who can finish the change.

use std::sync::Arc;
use std::time::Duration;

use holdfast_cluster::Cluster;

use crate::deliver::leader::Delivery;

/// Pause between looks.
const LOOK: Duration = Duration::from_secs(1);
/// Patience with what is open: as long as a slow server may take, and no longer, as the change holds up others.
const DRAIN: Duration = Duration::from_secs(120);
/// Patience with the next leader.
const HAND_OVER: Duration = Duration::from_secs(10);

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
        // What does not end in time may be begun again by the next leader (P4: once more).
        if !delivery.drain(DRAIN).await {
            tracing::warn!("some transactions did not end in time");
        }
        if cluster.is_leaving() && !cluster.hand_over(None, HAND_OVER).await {
            tracing::warn!("leadership was not handed over");
        }
        delivery.resume();
    }
}
