//! What outcomes lead to: lines in the mail log, notices to senders, settlements; and the outcomes that a leader decides: removal by
//! an operator, expiry by time.

use std::sync::Arc;
use std::time::Duration;

use holdfast_cluster::{Bytes, Fence, ProposeError, Term};

use super::fate::status;
use super::leader::{Delivery, lock};
use super::route::{is_too_old, pending_under};
use super::settle::Settlement;
use crate::clock;
use crate::maillog::{Service, clean};
use crate::queue::bounce::{Failure, Setting, notice};
use crate::queue::command::{Command, Fate, Notice, Outcome};
use crate::queue::message::{Envelope, Recipient, Tick};
use crate::queue::retry::is_expired;
use crate::queue::{Message, MessageId};

/// Messages that are looked at for expiry in one go, while the queue is locked.
const EXPIRY_LOOK_MAX: usize = 100;
/// Recipients that one entry removes.
const REMOVED_MAX: usize = 200;
/// Messages that are read while the queue is locked.
const READ_MAX: usize = 50;

/// What came of an operator's wish to remove messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// Messages that had recipients to remove; they are gone.
    pub removed: usize,
    /// Messages of which a transaction is open: its result counts.
    pub in_transit: usize,
}

impl Delivery {
    pub(super) fn log_outcomes(
        &self,
        message: &Message,
        outcomes: &[Outcome],
        number: u64,
        relay: &str,
        (setup, transfer): (Duration, Duration),
    ) {
        let total = clock::unix_s().saturating_sub(message.envelope.arrival_unix_s) as f64;
        let (c, d) = (setup.as_secs_f64(), transfer.as_secs_f64());
        let waited = (total - c - d).max(0.0);
        let activation = format!(
            "{}: from=<{}>, size={}, nrcpt={} (queue active)",
            message.id,
            message.envelope.sender,
            message.size,
            message.envelope.recipients.len()
        );
        let lines: Vec<(Service, String)> = std::iter::once((Service::Qmgr, activation))
            .chain(outcomes.iter().map(|o| {
                let address = &message.envelope.recipients[o.recipient as usize].address;
                let word = match o.fate {
                    Fate::Delivered => "sent",
                    Fate::Deferred => "deferred",
                    Fate::Failed | Fate::Expired | Fate::Removed => "bounced",
                };
                let text = match o.fate {
                    Fate::Expired => format!("delivery time expired; last: {}", clean(&o.reply)),
                    _ => clean(&o.reply),
                };
                let dsn = if o.fate == Fate::Expired { "5.4.7".into() } else { status(&o.reply) };
                let line = format!(
                    "{}: to=<{address}>, relay={relay}, delay={:.2}, delays={waited:.2}/0/{c:.2}/{d:.2}, dsn={dsn}, \
                     status={word} ({text})",
                    message.id,
                    waited + c + d
                );
                (Service::Smtp, line)
            }))
            .collect();
        self.log.write(number, &lines);
    }

    /// Settles outcomes; failures with a notice to the sender, in the same entry. That a copy was taken is a fact, and so is that it was put off;
    /// that nobody takes it is decided by who leads: the next leader may be handing it off by now, to somebody who takes it.
    pub(super) async fn settle_with_notice(
        &self,
        message: &Message,
        outcomes: Vec<Outcome>,
        number: u64,
        relay: Option<&str>,
        term: Term,
    ) {
        let (failed, facts): (Vec<Outcome>, Vec<Outcome>) =
            outcomes.into_iter().partition(|o| matches!(o.fate, Fate::Failed | Fate::Expired));
        if !facts.is_empty() {
            self.settler.settle(Settlement { outcomes: facts, notice: None, fence: Fence::Any }).await;
        }
        if failed.is_empty() {
            return;
        }
        let failures: Vec<Failure> = failed
            .iter()
            .map(|o| Failure {
                address: message.envelope.recipients[o.recipient as usize].address.to_string(),
                status: if o.fate == Fate::Expired { "5.4.7".into() } else { status(&o.reply) },
                remote: relay.filter(|_| o.fate == Fate::Failed).map(Into::into),
                reply: o.reply.clone(),
            })
            .collect();
        let mut notice = None;
        // A notice is never answered with a notice (RFC 5321 §4.5.5, §6.1).
        match &message.envelope.sender.0 {
            Some(sender) => notice = Some(self.compose(message, sender, &failures)),
            None => {
                let line = format!("{}: undeliverable notice discarded", message.id);
                self.log.line(number, Service::Bounce, line);
            }
        }
        if let Some((n, _)) = &notice {
            let line = format!("{}: sender non-delivery notification: {}", message.id, n.id);
            self.log.line(number, Service::Bounce, line);
        }
        self.settler.settle(Settlement { outcomes: failed, notice, fence: Fence::Term(term) }).await;
    }

    fn compose(
        &self,
        message: &Message,
        sender: &crate::smtp::address::Mailbox,
        failures: &[Failure],
    ) -> (Notice, Bytes) {
        let original = message.bodies.first().and_then(|index| self.cluster.body(*index).ok());
        let now = clock::unix_s();
        let id = self.intake.new_id();
        let (date, arrival) = (clock::rfc5322(now), clock::rfc5322(message.envelope.arrival_unix_s));
        let setup = self.setup.get();
        let setting = Setting { id, hostname: &setup.settings.hostname, date: &date, arrival: &arrival };
        let octets = notice(&setting, message, &sender.to_string(), failures, &original.unwrap_or_default());
        let envelope = Envelope {
            sender: Default::default(),
            recipients: vec![Recipient::new(sender.clone(), true)],
            eight_bit: false,
            arrival_unix_s: now,
            confidential: message.envelope.confidential,
        };
        (Notice { id, envelope }, octets.into())
    }

    /// Removes recipients that no connection has in hand, without a notice. Only a leader may: it alone knows what is open.
    ///
    /// # Errors
    /// [`ProposeError::NotTaken`] if this node does not lead; otherwise what became of the proposal.
    pub async fn remove(self: &Arc<Self>, ids: &[MessageId]) -> Result<Removal, ProposeError> {
        let term = self.cluster.leading().ok_or(ProposeError::NotTaken)?;
        let mut removal = Removal::default();
        for ids in ids.chunks(READ_MAX) {
            // To its end, also if the operator has gone: what is taken in hand is let go of.
            let (this, ids) = (self.clone(), ids.to_vec());
            let removed = tokio::spawn(async move { this.remove_some(term, &ids).await }).await;
            let removed = removed.unwrap_or(Err(ProposeError::OutcomeUnknown))?;
            removal.removed += removed.removed;
            removal.in_transit += removed.in_transit;
        }
        Ok(removal)
    }

    async fn remove_some(&self, term: Term, ids: &[MessageId]) -> Result<Removal, ProposeError> {
        let mut removal = Removal::default();
        let mut ids = ids.iter();
        loop {
            let mut outcomes = Vec::new();
            {
                let queue = lock(&self.queue);
                let mut in_hand = lock(&self.in_hand);
                while outcomes.len() < REMOVED_MAX {
                    let Some(id) = ids.next() else { break };
                    let Some(message) = queue.message(*id) else { continue };
                    let open = |n: &u16| self.settler.is_under_way(*id, *n) || in_hand.contains(&(*id, *n));
                    let (open, free): (Vec<u16>, Vec<u16>) = message.pending().partition(open);
                    removal.in_transit += !open.is_empty() as usize;
                    removal.removed += open.is_empty() as usize;
                    in_hand.extend(free.iter().map(|n| (*id, *n)));
                    outcomes.extend(free.into_iter().map(|recipient| {
                        let reply = "removed by an operator".into();
                        Outcome { id: *id, recipient, fate: Fate::Removed, reply }
                    }));
                }
            }
            if outcomes.is_empty() {
                return Ok(removal);
            }
            let taken: Vec<(MessageId, u16)> = outcomes.iter().map(|o| (o.id, o.recipient)).collect();
            let command = Command::Settle { outcomes, notice: None }.encode().into();
            let deadline = clock::after(Duration::from_secs(15));
            let proposed =
                self.cluster.propose(command, Bytes::new(), Fence::Term(term), false, deadline).await;
            let mut queue = lock(&self.queue);
            for (id, n) in taken {
                self.let_go(id, &[n]);
                // Its job was dropped if its turn came meanwhile.
                queue.reschedule(id);
            }
            drop(queue);
            proposed?;
        }
    }

    /// Gives up what is older than its lifetime, by cluster time, unless a connection has it in hand. Goes on after `from` at
    /// the next call, so that mail with a long lifetime never hides mail with a short one.
    pub(super) async fn expire(&self, term: Term, now: Tick, from: &mut Option<MessageId>) {
        if self.cluster.permit().is_none_or(|p| p.term() != term) {
            return;
        }
        let lifetime_ms = self.setup.get().settings.lifetime_ms;
        let mut old = Vec::new();
        {
            let mut queue = lock(&self.queue);
            let routes = queue.routes().values().filter_map(|entry| entry.route.as_ref());
            let shortest = routes.filter_map(|route| route.lifetime_ms).min();
            let shortest = shortest.unwrap_or(u64::MAX).min(lifetime_ms);
            let mut in_hand = lock(&self.in_hand);
            let mut last = None;
            // Ids sort by birth, so the old ones stand first.
            let ids = queue.ids(*from, EXPIRY_LOOK_MAX).into_iter();
            let candidates = ids.take_while(|id| is_expired(id.born(), shortest, now));
            for (n, id) in candidates.enumerate() {
                last = Some(id).filter(|_| n + 1 == EXPIRY_LOOK_MAX);
                let Some(message) = queue.message(id) else { continue };
                let outcomes: Vec<Outcome> = message
                    .pending()
                    .filter(|n| {
                        let recipient = &message.envelope.recipients[*n as usize];
                        is_too_old(&queue, message.id, recipient, lifetime_ms, now)
                            && !self.settler.is_under_way(message.id, *n)
                            && !in_hand.contains(&(message.id, *n))
                    })
                    .map(|recipient| {
                        let last = &message.envelope.recipients[recipient as usize].last_reply;
                        let reply = if last.is_empty() { "4.4.7 never tried" } else { last };
                        Outcome { id: message.id, recipient, fate: Fate::Expired, reply: reply.into() }
                    })
                    .collect();
                if !outcomes.is_empty() {
                    in_hand.extend(outcomes.iter().map(|o| (o.id, o.recipient)));
                    old.push((message, outcomes));
                }
            }
            *from = last;
            for (message, _) in &old {
                queue.open(message.id);
            }
        }
        for (message, outcomes) in old {
            let line = format!(
                "{}: from=<{}>, status=expired, returned to sender",
                message.id, message.envelope.sender
            );
            self.give_up(term, &message, outcomes).await;
            self.log.line(0, Service::Qmgr, line);
        }
    }

    /// Ends recipients that this leader took in hand and decided about, with a notice.
    async fn give_up(&self, term: Term, message: &Message, outcomes: Vec<Outcome>) {
        self.log_outcomes(message, &outcomes, 0, "none", Default::default());
        let recipients: Vec<u16> = outcomes.iter().map(|o| o.recipient).collect();
        self.settle_with_notice(message, outcomes, 0, None, term).await;
        let mut queue = lock(&self.queue);
        self.let_go(message.id, &recipients);
        // Its job was dropped if its turn came meanwhile; and the settlement may have failed already.
        queue.reschedule(message.id);
    }

    /// Returns to their senders the recipients of these messages that are held under a name in the table of routes, but for those
    /// that a connection has in hand. Only a leader may; how many recipients it gave up.
    ///
    /// # Errors
    /// [`ProposeError::NotTaken`] if this node does not lead, or no more.
    pub async fn bounce(self: &Arc<Self>, route: &str, ids: &[MessageId]) -> Result<usize, ProposeError> {
        let term = self.cluster.leading().ok_or(ProposeError::NotTaken)?;
        let mut count = 0;
        for ids in ids.chunks(READ_MAX) {
            if self.cluster.permit().is_none_or(|p| p.term() != term) {
                return Err(ProposeError::NotTaken);
            }
            let taken = self.take_under(route, ids);
            count += taken.iter().map(|(_, outcomes)| outcomes.len()).sum::<usize>();
            // To its end, also if the operator has gone: what is taken in hand is let go of.
            let this = self.clone();
            let given_up = tokio::spawn(async move {
                for (message, outcomes) in taken {
                    this.give_up(term, &message, outcomes).await;
                }
            });
            given_up.await.map_err(|_| ProposeError::OutcomeUnknown)?;
        }
        Ok(count)
    }

    /// Takes in hand what is held under a name and nobody else has.
    fn take_under(&self, route: &str, ids: &[MessageId]) -> Vec<(Arc<Message>, Vec<Outcome>)> {
        let mut queue = lock(&self.queue);
        let mut in_hand = lock(&self.in_hand);
        let mut taken = Vec::new();
        for id in ids {
            // Somebody may have set the route again since the operator asked.
            if queue.routes().get(route).is_none_or(|entry| entry.route.is_some()) {
                break;
            }
            let Some(message) = queue.message(*id) else { continue };
            let free = |n: &u16| !self.settler.is_under_way(*id, *n) && !in_hand.contains(&(*id, *n));
            let outcomes: Vec<Outcome> = pending_under(&queue, &message, route)
                .filter(free)
                .map(|recipient| {
                    let reply = format!("5.4.4 mail for {route} is no longer taken here");
                    Outcome { id: *id, recipient, fate: Fate::Failed, reply }
                })
                .collect();
            if !outcomes.is_empty() && queue.open(*id).is_some() {
                in_hand.extend(outcomes.iter().map(|o| (o.id, o.recipient)));
                taken.push((message, outcomes));
            }
        }
        taken
    }
}
