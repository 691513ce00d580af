//! Delivery by the leader: from the moment it has applied its own term's first entry until it leads no more.
//!
//! A message of the leader's own term is scheduled once it is placed, since until then its client may still be told 451; a
//! message of an earlier term always. All state here is made anew from the queue with each term; a crash loses none of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use holdfast_cluster::{Bytes, Cluster, Fence, LogIndex, Term};
use tokio::sync::{Notify, watch};
use tracing::Instrument;

use super::connection::{Broken, Connection, Dialer};
use super::need::trust_word;
use super::resolve::{NoHost, Resolve};
use super::route::{Target, target};
use super::settle::{Settlement, Settler};
use super::transaction::{End, Means, run};
use crate::clock;
use crate::live::Live;
use crate::maillog::{MailLog, Service};
use crate::queue::command::{Command, Fate, Outcome};
use crate::queue::message::Tick;
use crate::queue::retry::Backoff;
use crate::queue::{Change, Message, MessageId, Queue};
use crate::receive::intake::Intake;
use crate::schedule::{Job, Key, Limits, Scheduler};

/// Cluster time goes on at least this often while there is a leader.
const TICK: Duration = Duration::from_secs(1);
/// An open connection waits this long for the next message.
const LINGER: Duration = Duration::from_secs(2);
/// A message that is being withdrawn is looked at again after this time.
const PASSED_OVER_MS: u64 = 200;
/// Recipients of one transaction: what every server must take (RFC 5321 §4.5.3.1.8).
const RECIPIENTS_PER_TRANSACTION: usize = 100;
/// Pages of the queue that one tick looks at for expiry.
const EXPIRY_PAGES: usize = 10;
/// Messages that are scheduled in one go when the whole queue is looked at.
const SURVEY_STEP: usize = 500;

/// What delivery needs.
pub struct Delivery {
    pub(super) cluster: Cluster,
    pub(super) queue: Arc<Mutex<Queue>>,
    pub(super) log: Arc<MailLog>,
    pub(super) intake: Arc<Intake>,
    pub(super) setup: Live<Setup>,
    pub(super) settler: Settler,
    pub(super) sessions: AtomicU64,
    /// Transactions that are open.
    pub(super) open: AtomicUsize,
    /// Recipients whose job is in the hands of a connection. Locked last, after queue, scheduler and targets.
    pub(super) in_hand: Mutex<BTreeSet<(MessageId, u16)>>,
    /// How many want nothing new to be begun, while the node hands over.
    pub(super) draining: AtomicUsize,
    /// Messages that an operator wants tried now.
    pub(super) retry: watch::Sender<BTreeSet<MessageId>>,
    pub(super) waits: Mutex<BTreeMap<MessageId, u64>>,
    /// As leader: messages with a recipient that is held, and whether they count as deferred otherwise.
    held: Mutex<BTreeMap<MessageId, bool>>,
    pub(super) began: Instant,
}

/// What delivery works with, and may be replaced while it works.
pub struct Setup {
    /// Makes connections.
    pub dialer: Dialer,
    /// Finds hosts.
    pub resolve: Resolve,
    /// How to deliver.
    pub settings: Settings,
}

/// How to deliver.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Our name, in notices.
    pub hostname: String,
    /// How long mail waits, unless its route says otherwise.
    pub lifetime_ms: u64,
    /// Pauses of a message that was put off.
    pub retry: Backoff,
    /// Connections.
    pub limits: Limits,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why an idle connection went on.
enum Waited {
    Job,
    Closed,
    Enough,
}

fn outcomes_of(job: &Job, fate: Fate, reply: &str) -> Vec<Outcome> {
    let outcome = |r: &u16| Outcome { id: job.id, recipient: *r, fate: fate.clone(), reply: reply.into() };
    job.recipients.iter().map(outcome).collect()
}

/// One term of this node's.
struct Reign {
    term: Term,
    scheduler: Mutex<Scheduler>,
    targets: Mutex<BTreeMap<Key, Target>>,
    /// Something changed for the leader loop, and for connections that wait for a job.
    wake: Notify,
    job: Notify,
    over: watch::Sender<bool>,
}

impl Delivery {
    /// Delivery for a node; must be made within the runtime on which it shall run.
    pub fn new(
        cluster: Cluster,
        queue: Arc<Mutex<Queue>>,
        log: Arc<MailLog>,
        intake: Arc<Intake>,
        setup: Setup,
    ) -> Delivery {
        Delivery {
            settler: Settler::new(cluster.clone(), queue.clone()),
            cluster,
            queue,
            log,
            intake,
            setup: Live::new(setup),
            sessions: AtomicU64::new(1),
            open: AtomicUsize::new(0),
            in_hand: Mutex::default(),
            draining: AtomicUsize::new(0),
            retry: watch::Sender::default(),
            waits: Mutex::default(),
            held: Mutex::default(),
            began: clock::now(),
        }
    }

    fn now_ms(&self) -> u64 {
        clock::now().duration_since(self.began).as_millis() as u64
    }

    /// What it works with.
    pub fn setup(&self) -> Arc<Setup> {
        self.setup.get()
    }

    /// Replaces what it works with; what is open goes on with what it has.
    pub fn set_up(&self, setup: Setup) {
        self.setup.set(setup);
    }

    /// Begins nothing new, and waits until what is open has ended and is committed, or until `patience` is over. Whether it has.
    pub async fn drain(&self, patience: Duration) -> bool {
        self.draining.fetch_add(1, Ordering::SeqCst);
        let deadline = clock::after(patience);
        while (self.open.load(Ordering::SeqCst) > 0 || self.settler.count() > 0) && clock::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.open.load(Ordering::SeqCst) == 0 && self.settler.count() == 0
    }

    /// Ends one [`Delivery::drain`]: if that was the last, and this node still leads, or leads again, it delivers.
    pub fn resume(&self) {
        self.draining.fetch_sub(1, Ordering::SeqCst);
    }

    /// Ends what is open and hands leadership over, each within `patience`. False if one of the two took too long: a transaction that does
    /// not end would be begun again by the next leader, so this one goes on.
    pub async fn hand_over(&self, to: Option<u64>, patience: Duration) -> bool {
        let moved = self.drain(patience).await && self.cluster.hand_over(to, patience).await;
        self.resume();
        moved
    }

    /// Tries these messages now, if this node leads.
    pub fn retry_now(&self, ids: Vec<MessageId>) {
        self.retry.send_modify(|wanted| wanted.extend(ids));
    }

    /// For how many milliseconds messages still wait, for the operator.
    pub fn waits(&self) -> BTreeMap<MessageId, u64> {
        let now = self.now_ms();
        lock(&self.waits).iter().map(|(id, at)| (*id, at.saturating_sub(now))).collect()
    }

    /// How many messages have a recipient that is held, and how many of these were tried before; `None` unless this node leads.
    pub fn held(&self) -> Option<(usize, usize)> {
        self.cluster.leading()?;
        let held = lock(&self.held);
        Some((held.len(), held.values().filter(|tried| **tried).count()))
    }

    /// Leads whenever this node is the leader, for as long as the node runs.
    pub async fn run(self: Arc<Self>) {
        loop {
            // Not before it knows all that was settled.
            let Some(permit) = self.cluster.permit() else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            self.lead(permit.term()).await;
            lock(&self.queue).end_journal();
            lock(&self.waits).clear();
            lock(&self.held).clear();
        }
    }

    async fn tick(&self, term: Term, now: Tick) {
        let command = Command::Tick { now }.encode();
        let deadline = clock::after(Duration::from_secs(5));
        let fence = Fence::Term(term);
        // If it fails, there is another one in a moment.
        drop(self.cluster.propose(command.into(), Bytes::new(), fence, false, deadline).await);
    }

    async fn lead(self: &Arc<Self>, term: Term) {
        tracing::info!(term = term.0, "delivering");
        let (over, _) = watch::channel(false);
        let reign = Arc::new(Reign {
            term,
            scheduler: Mutex::new(Scheduler::new(self.setup.get().settings.limits)),
            targets: Mutex::default(),
            wake: Notify::new(),
            job: Notify::new(),
            over,
        });
        let (tick_base, began) = (lock(&self.queue).now(), clock::now());
        let mut unplaced: BTreeMap<LogIndex, MessageId> = BTreeMap::new();
        lock(&self.queue).begin_journal();
        let mut applied = self.cluster.applied();
        let mut next_tick = tokio::time::interval(TICK);
        next_tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut placement = self.cluster.placement_watch();
        let mut expired_to = None;
        let mut retry = self.retry.subscribe();
        self.retry.send_if_modified(|asked| {
            asked.clear();
            false
        });
        while self.cluster.leading() == Some(term) {
            self.drain_journal(&reign, &mut unplaced);
            self.release_placed(&reign, &mut unplaced);
            let surveying = self.survey(&reign, &mut unplaced).await;
            self.open_connections(&reign);
            let wakes = lock(&reign.scheduler).wakes_at_ms();
            let wait = match wakes {
                _ if surveying => Duration::ZERO,
                Some(at) => Duration::from_millis(at.saturating_sub(self.now_ms()).max(10)),
                None => TICK,
            };
            tokio::select! {
                changed = applied.changed() => if changed.is_err() { break },
                () = placement.changed() => {}
                () = reign.wake.notified() => {}
                changed = retry.changed() => if changed.is_ok() {
                    let mut wanted = BTreeSet::new();
                    self.retry.send_if_modified(|asked| { wanted = std::mem::take(asked); false });
                    lock(&reign.scheduler).retry(&wanted, self.now_ms());
                    reign.job.notify_waiters();
                },
                () = tokio::time::sleep(wait) => {}
                _ = next_tick.tick() => {
                    let passed = clock::now().duration_since(began).as_millis() as u64;
                    let now = Tick(tick_base.0 + passed);
                    let this = self.clone();
                    tokio::spawn(async move { this.tick(term, now).await });
                    for _ in 0..EXPIRY_PAGES {
                        self.expire(term, now, &mut expired_to).await;
                        if expired_to.is_none() {
                            break;
                        }
                        tokio::task::yield_now().await;
                    }
                    lock(&reign.scheduler).set_limits(self.setup.get().settings.limits);
                    *lock(&self.waits) = lock(&reign.scheduler).waits_until_ms();
                }
            }
        }
        self.drain_journal(&reign, &mut unplaced);
        reign.over.send_replace(true);
        tracing::info!(term = term.0, "delivering no more");
    }

    /// Schedules the next messages of the whole queue; whether there may be more. It goes in pages, which are read while the queue
    /// is not locked.
    async fn survey(&self, reign: &Reign, unplaced: &mut BTreeMap<LogIndex, MessageId>) -> bool {
        let (page, in_hand) = {
            let mut queue = lock(&self.queue);
            let Some(page) = queue.survey(SURVEY_STEP) else { return false };
            (page, lock(&self.in_hand).clone())
        };
        let Ok(messages) = holdfast_cluster::blocking(|| page.read()).await else { return false };
        let queue = lock(&self.queue);
        let mut scheduler = lock(&reign.scheduler);
        for message in messages.iter().filter(|message| queue.contains(message.id)) {
            // What a connection had in hand when the page was made comes back through `put_back`.
            let free = |n: &u16| !in_hand.contains(&(message.id, *n));
            self.schedule(reign, &mut scheduler, &queue, message, unplaced, free);
        }
        true
    }

    /// Gives a message's pending recipients to the scheduler, by destination.
    fn schedule(
        &self,
        reign: &Reign,
        scheduler: &mut Scheduler,
        queue: &Queue,
        message: &Message,
        unplaced: &mut BTreeMap<LogIndex, MessageId>,
        wanted: impl Fn(&u16) -> bool,
    ) {
        let (term, index) = message.accepted;
        if term == reign.term.0 {
            let placed = self.cluster.placed().filter(|(t, _)| *t == reign.term).and_then(|(_, i)| i);
            if placed.is_none_or(|placed| index > placed) {
                unplaced.insert(index, message.id);
                return;
            }
        }
        let mut by_target: BTreeMap<Key, (Target, Vec<u16>)> = BTreeMap::new();
        let free = |n: &u16| {
            !self.settler.is_under_way(message.id, *n) && !lock(&self.in_hand).contains(&(message.id, *n))
        };
        for number in message.pending().filter(free).filter(wanted) {
            let Some(target) = target(queue, &message.envelope.recipients[number as usize]) else {
                lock(&self.held).insert(message.id, message.is_deferred());
                continue;
            };
            by_target.entry(target.key.clone()).or_insert_with(|| (target, Vec::new())).1.push(number);
        }
        for (key, (target, recipients)) in by_target {
            lock(&reign.targets).entry(key.clone()).or_insert(target);
            for recipients in recipients.chunks(RECIPIENTS_PER_TRANSACTION) {
                scheduler.add(&key, Job { id: message.id, recipients: recipients.to_vec(), attempts: 0 });
            }
            reign.job.notify_waiters();
        }
    }

    /// Takes the next job of a destination into the hands of a connection: those of its recipients that nobody else has in
    /// hand and that are not settled. From here on the message is not withdrawn any more.
    fn take(&self, reign: &Reign, key: &Key) -> Option<(Arc<Message>, Job)> {
        loop {
            let mut queue = lock(&self.queue);
            let mut scheduler = lock(&reign.scheduler);
            let mut job = scheduler.take(key)?;
            let Some(message) = queue.open(job.id) else {
                if queue.contains(job.id) {
                    // It is being withdrawn; if that comes to nothing it is delivered after all.
                    scheduler.add_later(key, job, self.now_ms() + PASSED_OVER_MS);
                }
                continue;
            };
            let pending: Vec<u16> = message.pending().collect();
            job.recipients.retain(|n| pending.contains(n));
            self.send_elsewhere(reign, &mut scheduler, &queue, &message, key, &mut job);
            let mut in_hand = lock(&self.in_hand);
            job.recipients
                .retain(|n| !self.settler.is_under_way(job.id, *n) && !in_hand.contains(&(job.id, *n)));
            if job.recipients.is_empty() {
                continue;
            }
            in_hand.extend(job.recipients.iter().map(|n| (job.id, *n)));
            return Some((message, job));
        }
    }

    /// Lets go of recipients that a connection has dealt with.
    pub(super) fn let_go(&self, id: MessageId, recipients: &[u16]) {
        let mut in_hand = lock(&self.in_hand);
        for n in recipients {
            in_hand.remove(&(id, *n));
        }
    }

    /// Gives a job back, for now or for later. If routes changed meanwhile its destination is found anew; if this node's
    /// term is over, the next term of its own hears of the message.
    fn put_back(&self, reign: &Reign, key: &Key, job: Job, at_ms: Option<u64>) {
        let mut queue = lock(&self.queue);
        let mut scheduler = lock(&reign.scheduler);
        self.let_go(job.id, &job.recipients);
        if *reign.over.borrow() {
            queue.reschedule(job.id);
            return;
        }
        if !queue.contains(job.id) || queue.is_ahead(job.id) {
            return; // it left, or the survey finds it
        }
        let Some(message) = queue.message(job.id) else { return };
        let mut job = job;
        if lock(&reign.targets).contains_key(key) {
            self.send_elsewhere(reign, &mut scheduler, &queue, &message, key, &mut job);
        } else {
            self.schedule(reign, &mut scheduler, &queue, &message, &mut BTreeMap::new(), |_| true);
            return;
        }
        match at_ms {
            _ if job.recipients.is_empty() => {}
            Some(at) => scheduler.add_later(key, job, at),
            None => scheduler.give_back(key, job),
        }
    }

    /// Takes those recipients out of a job whose route is another one by now, or that are held, and gives them to where they
    /// belong. A destination may serve many domains: that it is still known says nothing of this one.
    fn send_elsewhere(
        &self,
        reign: &Reign,
        scheduler: &mut Scheduler,
        queue: &Queue,
        message: &Message,
        key: &Key,
        job: &mut Job,
    ) {
        let recipients = &message.envelope.recipients;
        let stays = |n: &u16| {
            recipients
                .get(*n as usize)
                .and_then(|r| target(queue, r))
                .is_some_and(|target| target.key == *key)
        };
        let (own, others): (Vec<u16>, Vec<u16>) = job.recipients.iter().partition(|n| stays(n));
        if !others.is_empty() {
            job.recipients = own;
            self.schedule(reign, scheduler, queue, message, &mut BTreeMap::new(), |n| others.contains(n));
        }
    }

    fn drain_journal(&self, reign: &Reign, unplaced: &mut BTreeMap<LogIndex, MessageId>) {
        let mut removed = Vec::new();
        {
            let mut queue = lock(&self.queue);
            let changes = queue.take_journal();
            if changes.is_empty() {
                return;
            }
            let mut scheduler = lock(&reign.scheduler);
            if changes.contains(&Change::Routes) {
                // Jobs wait under the destination that their route had; the whole queue is looked at anew, but for what
                // connections have in hand, which comes back through `put_back`.
                scheduler.clear_jobs();
                lock(&reign.targets).clear();
                lock(&self.held).clear();
                unplaced.clear();
                queue.begin_survey();
            }
            for change in changes {
                match change {
                    Change::Added(id) if queue.is_ahead(id) => {}
                    Change::Added(id) => {
                        if let Some(message) = queue.message(id) {
                            self.schedule(reign, &mut scheduler, &queue, &message, unplaced, |_| true);
                        }
                    }
                    Change::Left(id) => {
                        lock(&self.held).remove(&id);
                        removed.push((Service::Qmgr, format!("{id}: removed")));
                    }
                    Change::Routes => {}
                }
            }
        }
        if !removed.is_empty() {
            self.log.write(0, &removed);
        }
    }

    fn release_placed(&self, reign: &Reign, unplaced: &mut BTreeMap<LogIndex, MessageId>) {
        let Some((term, Some(placed))) = self.cluster.placed() else { return };
        if term != reign.term || unplaced.first_key_value().is_none_or(|(index, _)| *index > placed) {
            return;
        }
        let later = unplaced.split_off(&LogIndex(placed.0 + 1));
        let ready = std::mem::replace(unplaced, later);
        let queue = lock(&self.queue);
        let mut scheduler = lock(&reign.scheduler);
        for id in ready.into_values() {
            if let Some(message) = queue.message(id) {
                self.schedule(reign, &mut scheduler, &queue, &message, unplaced, |_| true);
            }
        }
    }

    fn open_connections(self: &Arc<Self>, reign: &Arc<Reign>) {
        if self.draining.load(Ordering::SeqCst) > 0 {
            return;
        }
        let now = self.now_ms();
        if lock(&reign.scheduler).advance(now) {
            reign.job.notify_waiters();
        }
        loop {
            let key = lock(&reign.scheduler).open_next(now);
            let Some(key) = key else { return };
            let (this, reign) = (self.clone(), reign.clone());
            let span = tracing::info_span!("delivery", destination = key, term = reign.term.0);
            let deliver = async move {
                this.connection(&reign, &key).await;
                lock(&reign.scheduler).closed(&key);
                reign.wake.notify_one();
            };
            tokio::spawn(deliver.instrument(span));
        }
    }

    /// Connects to a destination's first host that answers.
    async fn connect(&self, target: &Target) -> Result<Connection, NoHost> {
        let mut last = Broken("4.4.1 no host".into());
        let setup = self.setup.get();
        for host in setup.resolve.hosts(target).await? {
            match setup.dialer.open(&host, target.tls_min).await {
                Ok(connection) => return Ok(connection),
                Err(why) => last = why,
            }
        }
        Err(NoHost::Later(last.0))
    }

    /// One connection from its beginning to its end.
    async fn connection(&self, reign: &Reign, key: &Key) {
        let target = lock(&reign.targets).get(key).cloned();
        let Some(target) = target else {
            // Routes changed since: its jobs go where they belong now.
            while let Some((_, job)) = self.take(reign, key) {
                self.put_back(reign, key, job, None);
                if lock(&reign.targets).contains_key(key) {
                    break; // it is known again: the next connection goes there
                }
            }
            return;
        };
        let number = self.sessions.fetch_add(1, Ordering::Relaxed);
        let connecting = clock::now();
        let mut connection = match self.connect(&target).await {
            Ok(connection) => connection,
            Err(NoHost::Later(why)) => return self.not_reached(reign, key, number, &why).await,
            Err(NoHost::Failed(why)) => return self.no_such_destination(reign, key, number, &why).await,
        };
        let mut setup = clock::now().duration_since(connecting);
        if let Some(tls) = &connection.tls {
            let host = &connection.host;
            let trust = trust_word(&host.need, host.is_proven);
            let line = format!(
                "{trust} TLS connection established to {}[{}]:{}: {tls}",
                host.name,
                host.address.ip(),
                host.address.port()
            );
            self.log.line(number, Service::Smtp, line);
        }
        let mut over = reign.over.subscribe();
        loop {
            let more = reign.job.notified();
            let stopping = self.draining.load(Ordering::SeqCst) > 0 || *over.borrow();
            let Some((message, job)) = (if stopping { None } else { self.take(reign, key) }) else {
                if stopping {
                    return connection.quit().await;
                }
                lock(&reign.scheduler).idle(key, true);
                let waited = tokio::select! {
                    () = more => Waited::Job,
                    () = connection.spoken_to() => Waited::Closed,
                    _ = over.changed() => Waited::Enough,
                    () = tokio::time::sleep(LINGER) => Waited::Enough,
                };
                lock(&reign.scheduler).idle(key, false);
                match waited {
                    Waited::Job => continue,
                    Waited::Closed => return,
                    Waited::Enough => return connection.quit().await,
                }
            };
            // The lease is asked when a transaction is opened, and again before the final dot.
            if self.cluster.permit().is_none_or(|p| p.term() != reign.term) {
                self.put_back(reign, key, job, None);
                if self.cluster.leading() != Some(reign.term) {
                    return connection.quit().await;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
            self.open.fetch_add(1, Ordering::SeqCst);
            let reply_timeout = self.setup.get().dialer.reply_timeout;
            let means = Means { cluster: &self.cluster, term: reign.term, reply_timeout };
            let started = clock::now();
            let span = tracing::debug_span!("transaction", id = %message.id);
            let end = run(&means, &mut connection, &message, &job).instrument(span).await;
            let times = (setup, clock::now().duration_since(started));
            setup = Duration::ZERO;
            let host = &connection.host;
            let relay = format!("{}[{}]:{}", host.name, host.address.ip(), host.address.port());
            let good = match end {
                End::Untried => {
                    // It left the queue, or this node may not deliver now; the destination waits for data that will not come.
                    self.put_back(reign, key, job, Some(self.now_ms() + PASSED_OVER_MS));
                    false
                }
                End::Done(outcomes) => {
                    lock(&reign.scheduler).reached(key);
                    self.conclude(reign, key, &message, job, outcomes, number, &relay, times).await;
                    true
                }
                End::Lost(outcomes) => {
                    lock(&reign.scheduler).not_reached(key, self.now_ms(), clock::random());
                    self.conclude(reign, key, &message, job, outcomes, number, &relay, times).await;
                    false
                }
            };
            self.open.fetch_sub(1, Ordering::SeqCst);
            if !good {
                return;
            }
        }
    }

    /// Brings outcomes under way, writes them to the log, and puts off what is to be tried again.
    #[expect(clippy::too_many_arguments, reason = "the facts of one delivery, each used once")]
    async fn conclude(
        &self,
        reign: &Reign,
        key: &Key,
        message: &Message,
        job: Job,
        outcomes: Vec<Outcome>,
        number: u64,
        relay: &str,
        times: (Duration, Duration),
    ) {
        self.log_outcomes(message, &outcomes, number, relay, times);
        let (put_off, ended): (Vec<&Outcome>, Vec<&Outcome>) =
            outcomes.iter().partition(|o| o.fate == Fate::Deferred);
        let (put_off, ended): (Vec<u16>, Vec<u16>) =
            (put_off.iter().map(|o| o.recipient).collect(), ended.iter().map(|o| o.recipient).collect());
        // Under way first, let go then: at no moment may somebody else take them.
        self.settle_with_notice(message, outcomes, number, Some(relay), reign.term).await;
        self.let_go(message.id, &ended);
        if !put_off.is_empty() {
            let attempts = job.attempts + 1;
            let at = self.now_ms() + self.setup.get().settings.retry.pause_ms(attempts, clock::random());
            self.put_back(reign, key, Job { id: message.id, recipients: put_off, attempts }, Some(at));
        }
    }

    /// A destination that could not be reached: one line for the message that was its probe; all of them wait.
    async fn not_reached(&self, reign: &Reign, key: &Key, number: u64, why: &str) {
        if !lock(&reign.scheduler).not_reached(key, self.now_ms(), clock::random()) {
            return; // one that was opened with this one has said so
        }
        let Some((message, mut job)) = self.take(reign, key) else { return };
        let outcomes = outcomes_of(&job, Fate::Deferred, why);
        self.log_outcomes(&message, &outcomes, number, "none", Default::default());
        self.settler.settle(Settlement { outcomes, notice: None, fence: Fence::Any }).await;
        job.attempts += 1;
        self.put_back(reign, key, job, None);
    }

    /// A domain that takes no mail: everything for it fails at once. To say so takes the right to deliver.
    async fn no_such_destination(&self, reign: &Reign, key: &Key, number: u64, why: &str) {
        while self.cluster.permit().is_some_and(|p| p.term() == reign.term) {
            let Some((message, job)) = self.take(reign, key) else { return };
            let outcomes = outcomes_of(&job, Fate::Failed, why);
            self.log_outcomes(&message, &outcomes, number, "none", Default::default());
            self.settle_with_notice(&message, outcomes, number, None, reign.term).await;
            self.let_go(job.id, &job.recipients);
        }
        lock(&reign.scheduler).not_reached(key, self.now_ms(), clock::random());
    }
}
