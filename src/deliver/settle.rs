//! Getting results committed: gathered for a few milliseconds, proposed together, and proposed again until they are.
//!
//! A result is a fact, whoever leads: a node that lost its leadership still brings what it handed off, through the next
//! leader. The queue ignores what it knows. A crash before the commit loses the result, and the message is sent again.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use holdfast_cluster::{Cluster, Fence, ProposeError};
use tokio::sync::{Semaphore, mpsc};

use crate::clock;
use crate::queue::command::{Command, Fate, Notice, Outcome};
use crate::queue::{MessageId, Queue};

/// Results wait this long for company.
const GATHER: Duration = Duration::from_millis(5);
/// Results in one entry.
const OUTCOMES_MAX: usize = 512;
/// Entries on their way at the same time.
const PROPOSALS_MAX: usize = 8;
/// Results that wait; a worker with more waits with them.
const QUEUE_MAX: usize = 4096;
/// Longest reply that is kept of a destination, characters.
const REPLY_CHARS_MAX: usize = 500;
/// One try at proposing.
const TRY: Duration = Duration::from_secs(10);

/// Results of one message, and the notice they cause.
pub(super) struct Settlement {
    pub(super) outcomes: Vec<Outcome>,
    pub(super) notice: Option<(Notice, Bytes)>,
    /// [`Fence::Any`] for facts, which any leader may commit. A decision counts in the term in which it was taken or not at all.
    pub(super) fence: Fence,
}

/// Where results go. Clones share it.
#[derive(Clone)]
pub(super) struct Settler {
    queue: mpsc::Sender<Settlement>,
    /// Recipients whose results are not yet committed: not to be tried again meanwhile.
    under_way: Arc<Mutex<BTreeSet<(MessageId, u16)>>>,
}

impl Settler {
    pub(super) fn new(cluster: Cluster, scheduled: Arc<Mutex<Queue>>) -> Settler {
        let (queue, results) = mpsc::channel(QUEUE_MAX);
        let under_way = Arc::new(Mutex::new(BTreeSet::new()));
        tokio::spawn(gather(cluster, scheduled, results, under_way.clone()));
        Settler { queue, under_way }
    }

    /// Brings results under way.
    pub(super) async fn settle(&self, mut settlement: Settlement) {
        for outcome in &mut settlement.outcomes {
            if let Some((at, _)) = outcome.reply.char_indices().nth(REPLY_CHARS_MAX) {
                outcome.reply.truncate(at);
            }
        }
        {
            let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
            under_way.extend(final_ones(&settlement.outcomes));
        }
        if self.queue.send(settlement).await.is_err() {
            tracing::error!("the settler has ended; results are lost, and mail may be sent twice");
        }
    }

    /// Whether a result that ends this recipient's story is not yet committed.
    pub(super) fn is_under_way(&self, id: MessageId, recipient: u16) -> bool {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).contains(&(id, recipient))
    }

    /// How many results are not yet committed.
    pub(super) fn count(&self) -> usize {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// Recipients whose story the outcomes end. A deferral ends nothing: its job waits for its time, whatever is committed when.
fn final_ones(outcomes: &[Outcome]) -> impl Iterator<Item = (MessageId, u16)> + '_ {
    outcomes.iter().filter(|o| o.fate != Fate::Deferred).map(|o| (o.id, o.recipient))
}

type UnderWay = Arc<Mutex<BTreeSet<(MessageId, u16)>>>;

async fn gather(
    cluster: Cluster,
    queue: Arc<Mutex<Queue>>,
    mut results: mpsc::Receiver<Settlement>,
    under_way: UnderWay,
) {
    let room = Arc::new(Semaphore::new(PROPOSALS_MAX));
    while let Some(first) = results.recv().await {
        let mut outcomes = Vec::new();
        let mut alone = Vec::new();
        let mut put = |settlement: Settlement, outcomes: &mut Vec<Outcome>| {
            let Settlement { outcomes: own, notice, fence } = settlement;
            match notice {
                // A notice's octets are the body of its entry, so it has one of its own.
                Some((notice, octets)) => alone.push((own, Some(notice), octets, fence)),
                None if fence != Fence::Any => alone.push((own, None, Bytes::new(), fence)),
                None => outcomes.extend(own),
            }
        };
        put(first, &mut outcomes);
        let until = tokio::time::sleep(GATHER);
        tokio::pin!(until);
        while outcomes.len() < OUTCOMES_MAX {
            tokio::select! {
                biased;
                more = results.recv() => match more {
                    Some(more) => put(more, &mut outcomes),
                    None => break,
                },
                () = &mut until => break,
            }
        }
        if !outcomes.is_empty() {
            alone.push((outcomes, None, Bytes::new(), Fence::Any));
        }
        for (outcomes, notice, octets, fence) in alone {
            let Ok(permit) = room.clone().acquire_owned().await else { return };
            let (cluster, queue, under_way) = (cluster.clone(), queue.clone(), under_way.clone());
            tokio::spawn(async move {
                let names: BTreeSet<(MessageId, u16)> = final_ones(&outcomes).collect();
                let command: Bytes = Command::Settle { outcomes, notice }.encode().into();
                loop {
                    let deadline = clock::after(TRY);
                    let proposed =
                        cluster.propose(command.clone(), octets.clone(), fence, false, deadline).await;
                    match proposed {
                        Ok(_) => break,
                        Err(ProposeError::TooLarge) => {
                            // The bounds above exclude it; to try again would only stop what comes after.
                            tracing::error!(results = names.len(), "results are larger than an entry");
                            break;
                        }
                        // Whoever leads now decides anew.
                        Err(_) if fence != Fence::Any => break,
                        Err(e) => tracing::warn!(error = %e, results = names.len(), "settling; trying again"),
                    }
                }
                under_way.lock().unwrap_or_else(PoisonError::into_inner).retain(|name| !names.contains(name));
                if fence != Fence::Any {
                    // A decision that was not committed leaves recipients that nobody tries.
                    let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
                    names.iter().for_each(|(id, _)| queue.reschedule(*id));
                }
                drop(permit);
            });
        }
    }
}
