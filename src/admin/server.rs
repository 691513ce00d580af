//! Answering operators on a node. Only who shows an operator's certificate of the cluster's authority is answered.
#![expect(clippy::disallowed_methods, reason = "listeners bind")]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holdfast_cluster::{Bytes, Cluster, Fence, LogIndex, NodeReport, ProposeError, RECOVERING};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::api::{About, Failure, LINE_BYTES_MAX, Line, OPERATOR_NAME, Request, Selector, Waiting};
use super::metrics;
use crate::clock;
use crate::deliver::leader::Delivery;
use crate::deliver::route::{hex, is_held, lifetime_ms, pending_under, target};
use crate::live::Live;
use crate::pki::Certificate;
use crate::queue::command::{Answer, Command, Route, RouteChange, TlsPolicy};
use crate::queue::message::State;
use crate::queue::{Message, MessageId, Queue, Totals, level};
use crate::receive::intake::Intake;
use crate::smtp::address::is_domain;

/// Operators' connections at the same time; who comes beyond waits.
const CONNECTIONS_MAX: usize = 32;
/// An operator's request comes within this time.
const REQUEST: Duration = Duration::from_secs(10);
/// Pinned keys of one route: the one in use, the next one, and for several hosts.
const PINS_MAX: usize = 16;
/// Messages of one page of a walk.
const LIST_STEP: usize = 500;
/// How long a node that does not lead looks for what is held before it says that it does not know.
const COUNT_PATIENCE: Duration = Duration::from_secs(3);
/// How long `route remove --bounce` waits for results of what is under way.
const BOUNCE_WAIT: Duration = Duration::from_secs(20);

/// What operators may look at and touch.
pub struct Admin {
    /// The cluster.
    pub cluster: Cluster,
    /// The queue.
    pub queue: Arc<Mutex<Queue>>,
    /// Delivery.
    pub delivery: Arc<Delivery>,
    /// Intake, for whether mail is accepted.
    pub intake: Arc<Intake>,
    /// The cluster's id.
    pub cluster_id: String,
    /// What the settings say.
    pub facts: Live<Facts>,
}

/// What the settings say that operators want to know.
pub struct Facts {
    /// Hash of the shared settings.
    pub config_hash: String,
    /// Its certificates.
    pub certificates: Vec<Certificate>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens the operators' port.
///
/// # Errors
/// The system's answer.
pub async fn bind(address: std::net::SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|e| format!("[admin] listen = {address}: {e}"))
}

/// Serves operators for as long as the node runs.
pub async fn run(listener: TcpListener, tls: Arc<Live<TlsAcceptor>>, admin: Arc<Admin>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (tls, admin) = (tls.get(), admin.clone());
        tokio::spawn(async move {
            let served = timeout(Duration::from_secs(600), serve(stream, &tls, admin)).await;
            if let Ok(Err(e)) = served {
                tracing::debug!(error = %e, "an operator's connection ended");
            }
            drop(permit);
        });
    }
}

async fn serve(stream: tokio::net::TcpStream, tls: &TlsAcceptor, admin: Arc<Admin>) -> anyhow::Result<()> {
    let stream = timeout(Duration::from_secs(5), tls.accept(stream)).await??;
    let operator = {
        let certificates = stream.get_ref().1.peer_certificates();
        certificates.and_then(|c| c.first()).is_some_and(|leaf| {
            let name = rustls::pki_types::ServerName::try_from(OPERATOR_NAME);
            let leaf = webpki::EndEntityCert::try_from(leaf);
            matches!((leaf, name), (Ok(leaf), Ok(name)) if leaf.verify_is_valid_for_subject_name(&name).is_ok())
        })
    };
    let (reader, mut writer) = tokio::io::split(stream);
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(LINE_BYTES_MAX as u64));
    timeout(REQUEST, reader.read_line(&mut line)).await??;
    if line.starts_with("GET ") {
        // The rest of the request says nothing that counts here.
        let mut rest = String::new();
        while reader.read_line(&mut rest).await? > 2 {
            rest.clear();
        }
        writer.write_all(metrics::answer(&line, || admin.metrics()).as_bytes()).await?;
        writer.shutdown().await?;
        return Ok(());
    }
    let (tell, mut items) = mpsc::channel::<Value>(256);
    let answer = async {
        let result = match serde_json::from_str::<Request>(&line) {
            _ if !operator => Err(failed("the certificate is not an operator's")),
            Ok(request) => admin.answer(request, &tell).await,
            Err(e) => Err(failed(&format!("not a request: {e}"))),
        };
        drop(tell);
        result
    };
    let write = async {
        let all = async {
            while let Some(item) = items.recv().await {
                let mut line = serde_json::to_vec(&Line::Item(item))?;
                line.push(b'\n');
                writer.write_all(&line).await?;
            }
            anyhow::Ok(())
        };
        let written = all.await;
        // Nobody reads any more: who still tells hears of it.
        items.close();
        written
    };
    let (result, written) = tokio::join!(answer, write);
    written?;
    let mut end = serde_json::to_vec(&Line::End { error: result.err() })?;
    end.push(b'\n');
    writer.write_all(&end).await?;
    writer.shutdown().await?;
    Ok(())
}

pub(super) fn failed(text: &str) -> Failure {
    Failure { text: text.into(), unknown: false }
}

/// A key as it is pinned: SHA-256 of its SubjectPublicKeyInfo, in hexadecimal, with colons or without.
fn pinned_key(text: &str) -> Result<[u8; 32], String> {
    let digits = text.replace(':', "");
    let octet = |at: usize| digits.get(2 * at..2 * at + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
    let octets: Option<Vec<u8>> = (0..digits.len().div_ceil(2)).map(octet).collect();
    let key = octets.and_then(|octets| octets.try_into().ok());
    key.ok_or_else(|| {
        format!("`{text}` is no SHA-256 of a key: 64 hexadecimal digits, as in a TLSA record 3 1 1 of it")
    })
}

fn not_done(error: &ProposeError) -> Failure {
    match error {
        ProposeError::OutcomeUnknown => {
            Failure { text: "the outcome is unknown: look again".into(), unknown: true }
        }
        e => failed(&format!("{e}: is there a quorum?")),
    }
}

/// A walk over the whole queue in pages; between them the queue goes on.
struct Walk<'a> {
    queue: &'a Mutex<Queue>,
    after: Option<MessageId>,
    /// Set if one message is wanted and no other.
    only: Option<MessageId>,
}

impl<'a> Walk<'a> {
    fn new(queue: &'a Mutex<Queue>) -> Walk<'a> {
        Walk { queue, after: None, only: None }
    }

    /// The messages that a selector can mean: one, if it names one.
    fn of(queue: &'a Mutex<Queue>, selector: &Selector) -> Walk<'a> {
        Walk { only: selector.id.as_ref().and_then(|id| MessageId::parse(id)), ..Walk::new(queue) }
    }

    async fn next(&mut self) -> Option<Vec<Arc<Message>>> {
        if let Some(only) = self.only {
            let found = if self.after.is_none() { lock(self.queue).message(only) } else { None };
            self.after = Some(only);
            return found.map(|message| vec![message]);
        }
        let page = lock(self.queue).page(self.after, LIST_STEP);
        self.after = Some(page.last?);
        holdfast_cluster::blocking(|| page.read()).await.ok()
    }
}

impl Admin {
    async fn answer(&self, request: Request, tell: &mpsc::Sender<Value>) -> Result<(), Failure> {
        let gone = |_| failed("the operator has gone");
        match request {
            Request::Status => tell.send(self.status().await).await.map_err(gone),
            Request::RouteList => {
                let routes = lock(&self.queue).routes().clone();
                for (domain, entry) in routes {
                    let Some(route) = entry.route else {
                        tell.send(json!({ "domain": domain, "held": true })).await.map_err(gone)?;
                        continue;
                    };
                    let to: Vec<String> = route.hosts.iter().map(|(h, p)| format!("{h}:{p}")).collect();
                    let item = json!({
                        "domain": domain, "held": false, "to": to, "mx": route.hosts.is_empty(),
                        "tls": route.tls.word(), "tls_min": route.tls_min,
                        "lifetime_s": route.lifetime_ms.map(|ms| ms / 1000),
                        "pins": route.pins.iter().map(|pin| hex(pin)).collect::<Vec<_>>(),
                    });
                    tell.send(item).await.map_err(gone)?;
                }
                Ok(())
            }
            Request::RouteSet { domain, to, tls, tls_min, lifetime_ms, pins } => {
                let domain = domain.to_ascii_lowercase();
                if domain != "*" && !is_domain(domain.strip_prefix('.').unwrap_or(&domain)) {
                    return Err(failed(&format!("`{domain}` is no domain, `.domain` or `*`")));
                }
                let tls =
                    TlsPolicy::parse(&tls).ok_or_else(|| failed(&format!("`{tls}` is no TLS policy")))?;
                let pins: Result<Vec<_>, _> = pins.iter().map(|pin| pinned_key(pin)).collect();
                let pins = pins.map_err(|why| failed(&why))?;
                if pins.len() > PINS_MAX {
                    return Err(failed(&format!("{} pinned keys: at most {PINS_MAX}", pins.len())));
                }
                if !pins.is_empty() && (tls != TlsPolicy::Verify || to.is_empty()) {
                    return Err(failed("a pinned key needs --tls verify and --to"));
                }
                let route = Route { hosts: to, tls, tls_min, lifetime_ms, pins };
                self.change_route(&domain, RouteChange::Set(route), None).await.map(drop)
            }
            Request::RouteRemove { domain, waiting } => {
                let item = self.remove_route(&domain.to_ascii_lowercase(), waiting).await?;
                tell.send(item).await.map_err(gone)
            }
            Request::QueueList(selector) => {
                let waits = self.delivery.waits();
                let mut walk = Walk::of(&self.queue, &selector);
                while let Some(messages) = walk.next().await {
                    let items: Vec<Value> = {
                        let queue = lock(&self.queue);
                        let wanted = messages.iter().filter(|m| self.selects(&selector, &queue, m));
                        wanted.map(|m| self.describe(&queue, m, waits.get(&m.id).copied())).collect()
                    };
                    for item in items {
                        tell.send(item).await.map_err(gone)?;
                    }
                }
                Ok(())
            }
            Request::ClusterAdd(new) => {
                let item = self.add_member(new, tell).await?;
                tell.send(item).await.map_err(gone)
            }
            Request::ClusterRemove { id, force } => {
                let item = self.remove_member(id, force).await?;
                tell.send(item).await.map_err(gone)
            }
            Request::ClusterTransfer { to } => {
                let item = self.transfer(to).await?;
                tell.send(item).await.map_err(gone)
            }
            Request::QueueRetry(selector) => {
                if self.cluster.leading().is_none() {
                    return Err(failed("this node does not lead"));
                }
                let ids = self.select(&selector, can_be_tried).await?;
                let count = ids.len();
                self.delivery.retry_now(ids);
                tell.send(json!({ "retried": count })).await.map_err(gone)
            }
            Request::QueueRemove { selector, dry_run } => {
                let ids = self.select(&selector, |_, _| true).await?;
                if dry_run {
                    let item = json!({ "removed": ids.len(), "in_transit": 0, "dry_run": true });
                    return tell.send(item).await.map_err(gone);
                }
                let removal = self.delivery.remove(&ids).await.map_err(|e| not_done(&e))?;
                let item = json!({
                    "removed": removal.removed, "in_transit": removal.in_transit, "dry_run": false,
                });
                tell.send(item).await.map_err(gone)
            }
        }
    }

    async fn propose(&self, command: Command) -> Result<Option<Answer>, Failure> {
        let deadline = clock::after(Duration::from_secs(15));
        match self.cluster.propose(command.encode().into(), Bytes::new(), Fence::Any, false, deadline).await {
            Ok(proposed) => Ok(Answer::decode(&proposed.outcome)),
            Err(ProposeError::Refused { outcome, .. }) => Ok(Answer::decode(&outcome)),
            Err(e) => Err(not_done(&e)),
        }
    }

    /// Changes a route if it is still what was seen; whether it was.
    async fn change_route(
        &self,
        domain: &str,
        change: RouteChange,
        only_if: Option<LogIndex>,
    ) -> Result<bool, Failure> {
        let too_low = || {
            failed(
                "pinned keys need a version that not every node of the cluster runs yet: upgrade the others first, and wait some \
                 seconds",
            )
        };
        // Not left to the leader: an older one would take what it cannot read, and stop.
        if level::of_change(&change) > lock(&self.queue).level() {
            return Err(too_low());
        }
        let command = Command::Route { domain: domain.into(), change, only_if };
        match self.propose(command).await? {
            Some(Answer::LevelTooLow) => Err(too_low()),
            answer => Ok(answer != Some(Answer::Changed)),
        }
    }

    /// Removes a route. It is held first, so that nothing is delivered, nothing more is taken for it, and what waits is seen
    /// whole. Mail that is still coming in was taken for the route's sake, and is held once it is gone, or goes by a wider one.
    async fn remove_route(&self, domain: &str, waiting: Waiting) -> Result<Value, Failure> {
        if self.cluster.leading().is_none() {
            return Err(failed("this node does not lead"));
        }
        let meanwhile = || failed(&format!("the route of {domain} was changed meanwhile: look again"));
        let entry = lock(&self.queue).routes().get(domain).cloned();
        let Some(entry) = entry else { return Err(failed(&format!("there is no route for {domain}"))) };
        let refuse = |waits: usize| {
            failed(&format!(
                "{waits} messages wait for {domain}: deliver or remove them first, keep them with --hold, or return them to \
                 their senders with --bounce"
            ))
        };
        if waiting == Waiting::Refuse {
            // A look before anything is touched.
            match self.under(domain).await.len() {
                0 => {}
                waits => return Err(refuse(waits)),
            }
        }
        if !self.change_route(domain, RouteChange::Hold, Some(entry.made_by)).await? {
            return Err(meanwhile());
        }
        let Some(held_by) = self.held_by(domain) else { return Err(meanwhile()) };
        let waits = self.under(domain).await.len();
        let mut bounced = 0;
        match waiting {
            _ if waits == 0 => {}
            Waiting::Hold => return Ok(json!({ "domain": domain, "held": waits, "bounced": 0 })),
            Waiting::Refuse => {
                let back = entry.route.map_or(RouteChange::Hold, RouteChange::Set);
                self.change_route(domain, back, Some(held_by)).await?;
                return Err(refuse(waits));
            }
            Waiting::Bounce => {
                let deadline = clock::after(BOUNCE_WAIT);
                let left = loop {
                    let ids = self.under(domain).await;
                    if self.held_by(domain) != Some(held_by) {
                        return Err(meanwhile());
                    }
                    if ids.is_empty() || clock::now() > deadline {
                        break ids.len();
                    }
                    bounced += self.delivery.bounce(domain, &ids).await.map_err(|e| not_done(&e))?;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                };
                if left > 0 {
                    return Err(failed(&format!(
                        "{bounced} recipients were returned; {left} messages are still under way and are held if they come \
                         back: remove the route again"
                    )));
                }
            }
        }
        if !self.change_route(domain, RouteChange::Remove, Some(held_by)).await? {
            return Err(meanwhile());
        }
        Ok(json!({ "domain": domain, "held": 0, "bounced": bounced }))
    }

    /// The log entry by which a domain's mail is held, if it is.
    fn held_by(&self, domain: &str) -> Option<LogIndex> {
        let queue = lock(&self.queue);
        queue.routes().get(domain).filter(|entry| entry.route.is_none()).map(|entry| entry.made_by)
    }

    /// Messages that wait and stand under a name in the table of routes.
    async fn under(&self, name: &str) -> Vec<MessageId> {
        let mut found = Vec::new();
        let mut walk = Walk::new(&self.queue);
        while let Some(messages) = walk.next().await {
            let queue = lock(&self.queue);
            let under = messages.iter().filter(|m| pending_under(&queue, m, name).next().is_some());
            found.extend(under.map(|m| m.id));
        }
        found
    }

    /// The messages that a selector means, as far as something can be done with them.
    async fn select(
        &self,
        selector: &Selector,
        can: impl Fn(&Queue, &Message) -> bool,
    ) -> Result<Vec<MessageId>, Failure> {
        if *selector == Selector::default() {
            return Err(failed(
                "say which messages: an id, --to-domain, --from, --older-than, --state or --all",
            ));
        }
        let (mut found, mut meant) = (Vec::new(), 0);
        let mut walk = Walk::of(&self.queue, selector);
        while let Some(messages) = walk.next().await {
            let queue = lock(&self.queue);
            for message in messages.iter().filter(|m| self.selects(selector, &queue, m)) {
                meant += 1;
                found.extend(can(&queue, message).then_some(message.id));
            }
        }
        match &selector.id {
            Some(id) if meant == 0 => Err(failed(&format!("{id}: no such message"))),
            _ => Ok(found),
        }
    }

    fn selects(&self, s: &Selector, queue: &Queue, m: &Message) -> bool {
        let age_ms = queue.now().0.saturating_sub(m.id.born().0);
        let domain = |d: &String| m.envelope.recipients.iter().any(|r| r.address.domain() == d);
        s.id.as_ref().is_none_or(|id| MessageId::parse(id) == Some(m.id))
            && s.to_domain.as_ref().is_none_or(domain)
            && s.from.as_ref().is_none_or(|from| m.envelope.sender.to_string() == *from)
            && s.older_than_ms.is_none_or(|ms| age_ms > ms)
            && s.state.as_ref().is_none_or(|state| message_state(queue, m) == state)
    }

    fn describe(&self, queue: &Queue, m: &Message, wait_ms: Option<u64>) -> Value {
        let age_ms = queue.now().0.saturating_sub(m.id.born().0);
        let recipients: Vec<Value> = m
            .envelope
            .recipients
            .iter()
            .map(|r| {
                let state = match r.state {
                    State::Pending if r.attempts > 0 => "deferred",
                    State::Pending => "pending",
                    State::Delivered => "delivered",
                    State::Failed => "failed",
                    State::Expired => "expired",
                    State::Removed => "removed",
                };
                json!({
                    "address": r.address.to_string(),
                    "destination": target(queue, r).map_or("held".into(), |target| target.key),
                    "state": state, "attempts": r.attempts, "next_attempt_s": wait_ms.map(|ms| ms / 1000),
                    "last_reply": r.last_reply,
                })
            })
            .collect();
        let default = self.delivery.setup().settings.lifetime_ms;
        let lifetimes = m.envelope.recipients.iter().map(|r| lifetime_ms(queue, r, default));
        let lifetime = lifetimes.min().unwrap_or(default);
        json!({
            "id": m.id.to_string(), "sender": m.envelope.sender.to_string(), "size": m.size,
            "arrival_time": m.envelope.arrival_unix_s, "age_s": age_ms / 1000,
            "expires_in_s": lifetime.saturating_sub(age_ms) / 1000, "state": message_state(queue, m), "recipients": recipients,
        })
    }

    /// How many messages have a recipient that is held, and how many of these were tried before. The leader knows; another node
    /// has to look at all of them.
    async fn count_held(&self) -> (usize, usize) {
        let (mut held, mut tried) = (0, 0);
        let mut walk = Walk::new(&self.queue);
        while let Some(messages) = walk.next().await {
            let queue = lock(&self.queue);
            for message in messages.iter().filter(|message| is_held(&queue, message)) {
                held += 1;
                tried += usize::from(message.is_deferred());
            }
        }
        (held, tried)
    }

    /// What a monitoring system reads of this node.
    fn metrics(&self) -> String {
        let node = self.cluster.own_report();
        let about = serde_json::from_slice::<About>(&node.about).unwrap_or_default();
        let (totals, oldest_ms) = self.extent();
        let why_not = self.intake.not_accepting().map(|(why, _)| why);
        let facts = self.facts.get();
        let sample = metrics::Sample {
            why_not: why_not.as_deref(),
            node: &node,
            about: &about,
            totals,
            oldest_ms,
            held: self.delivery.held(),
            certificates: &facts.certificates,
        };
        sample.text()
    }

    /// What the queue amounts to, and the age of its oldest message in ms.
    fn extent(&self) -> (Totals, u64) {
        let queue = lock(&self.queue);
        let oldest = queue.ids(None, 1).first().copied();
        (queue.totals(), oldest.map_or(0, |id| queue.now().0.saturating_sub(id.born().0)))
    }

    async fn status(&self) -> Value {
        let report = self.cluster.report().await;
        let facts = self.facts.get();
        let (totals, oldest_ms) = self.extent();
        let (young, level) = {
            let queue = lock(&self.queue);
            (queue.young(), queue.level())
        };
        let about = |node: &Option<NodeReport>| {
            node.as_ref().and_then(|node| serde_json::from_slice::<About>(&node.about).ok())
        };
        // The leader keeps count; without one the queue is looked at.
        let leader = report.leader.and_then(|leader| about(&report.nodes.get(&leader)?.1)?.held);
        let held = match self.delivery.held().or(leader) {
            Some(held) => Some(held),
            None => timeout(COUNT_PATIENCE, self.count_held()).await.ok(),
        };
        let deferred = totals.deferred - held.map_or(0, |(_, tried)| tried).min(totals.deferred);
        let why_not = self.intake.not_accepting().map(|(why, _)| why);
        let why_not = why_not.or_else(|| report.leader.is_none().then(|| "no leader".into()));
        // What is proposed goes to the leader, who may refuse it.
        let leader = report.leader.and_then(|leader| report.nodes.get(&leader));
        let why_not = why_not.or_else(|| about(&leader?.1)?.why_not);
        let nodes: Vec<Value> = report
            .nodes
            .iter()
            .map(|(id, (member, node))| {
                let recovers = node.as_ref().is_some_and(|n| n.role == RECOVERING);
                let healthy = node.as_ref().is_some_and(|n| n.leader.is_some()) && !recovers;
                let about = about(node);
                let own_why_not = match node {
                    None => Some("unreachable".into()),
                    Some(_) if report.leader.is_none() => Some("no leader".into()),
                    Some(_) if recovers => Some("it gets what it lacks from the others".into()),
                    Some(_) => about.as_ref().and_then(|about| about.why_not.clone()),
                };
                json!({
                    "id": id, "role": node.as_ref().map_or("unreachable", |n| &n.role), "healthy": healthy,
                    "accepting": healthy && own_why_not.is_none(), "why_not": own_why_not,
                    "egress": about.as_ref().map(|about| &about.egress),
                    "scrub": about.as_ref().map(|about| &about.scrub),
                    "at_rest": about.as_ref().map(|about| &about.at_rest),
                    "address": member.address, "admin": member.admin,
                    "placement": {
                        "datacenter": member.placement.datacenter, "power": member.placement.power,
                        "network": member.placement.network,
                    },
                    "last_index": node.as_ref().and_then(|n| n.last_index),
                    "matched_index": report.matched.get(id),
                    "floor_index": node.as_ref().and_then(|n| n.floor_index),
                    "disk_free_bytes": node.as_ref().map(|n| n.disk_free_bytes),
                    "held_bytes": node.as_ref().map(|n| n.held_bytes),
                    "sealed_bytes": node.as_ref().map(|n| n.sealed_bytes),
                    "sealed_live_bytes": node.as_ref().map(|n| n.sealed_live_bytes),
                    "live_body_bytes": node.as_ref().map(|n| n.live_body_bytes),
                    "erase_backlog": node.as_ref().map(|n| n.erase_backlog),
                    "index": node.as_ref().map(|n| &n.index),
                })
            })
            .collect();
        json!({
            "cluster": self.cluster_id, "version": env!("CARGO_PKG_VERSION"), "config_hash": facts.config_hash,
            "stale": report.stale, "leader": report.leader, "term": report.term, "accepting": why_not.is_none(),
            "why_not": why_not, "feature_level": level, "nodes": nodes,
            "warnings": facts.certificates.iter().filter_map(Certificate::warning).collect::<Vec<_>>(),
            "queue": {
                "messages": totals.messages, "bytes": totals.bytes, "deferred": deferred,
                "held": held.map(|(held, _)| held),
                "oldest_age_s": oldest_ms / 1000, "young": young,
            },
        })
    }
}

/// Whether any of it may be tried now.
fn can_be_tried(queue: &Queue, m: &Message) -> bool {
    m.pending().any(|n| target(queue, &m.envelope.recipients[n as usize]).is_some())
}

fn message_state(queue: &Queue, m: &Message) -> &'static str {
    match m.is_deferred() {
        _ if is_held(queue, m) => "held",
        true => "deferred",
        false => "active",
    }
}
