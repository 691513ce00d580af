//! Raises the cluster's feature level (see [`crate::queue::level`]) once every member runs a version that knows it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_cluster::{Bytes, Cluster, Fence};

use crate::admin::api::About;
use crate::clock;
use crate::queue::level::NEWEST;
use crate::queue::{Command, Queue};

/// Pause between looks at what the members know.
const LOOK: Duration = Duration::from_secs(2);

/// Looks until the level is the newest that this version knows. Only the leader asks and proposes; a level that was proposed twice is the
/// same level.
pub async fn run(cluster: Cluster, queue: Arc<Mutex<Queue>>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let level = queue.lock().unwrap_or_else(PoisonError::into_inner).level();
        if level >= NEWEST {
            return;
        }
        let Some(term) = cluster.leading() else { continue };
        let members = cluster.report().await.nodes;
        let known = members.values().map(|(_, report)| {
            let about =
                report.as_ref().and_then(|report| serde_json::from_slice::<About>(&report.about).ok());
            about.map_or(0, |about| about.level)
        });
        // A member that is away may come back with an older version: it has to be there.
        let Some(known) = known.min().filter(|known| *known > level) else { continue };
        let command = Command::Level { level: known.min(NEWEST) }.encode();
        let deadline = clock::after(Duration::from_secs(5));
        if cluster.propose(command.into(), Bytes::new(), Fence::Term(term), false, deadline).await.is_ok() {
            tracing::info!(level = known, "the cluster's feature level was raised: all members know it");
        }
    }
}
