//! What senders do: strict clients of each node, at a rate, with sizes and recipients that a workload chooses.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::history::{Outcome, Sent, What};
use crate::random::Random;
use crate::record::Record;
use crate::relayed::Relayed;
use crate::sender::{Client, Open, message};

/// A kind of traffic.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Its name.
    pub name: &'static str,
    /// What it is like.
    pub about: &'static str,
    /// Messages a second over all nodes, if nothing holds them up.
    pub rate: u64,
    /// Clients of each node.
    pub clients: u64,
    /// Whether some are large, have many recipients, or ones that are refused or put off.
    pub is_mixed: bool,
    /// Whether it comes in bursts with silence in between.
    pub has_pauses: bool,
    /// Whether the customer is away until the end.
    pub is_away: bool,
    /// Whether a Postfix hands it on.
    pub by_postfix: bool,
}

/// All of them.
pub const ALL: [Workload; 5] = [
    Workload {
        name: "steady",
        about: "2 to 50 KB to one or two recipients, an even stream",
        rate: 300,
        clients: 8,
        is_mixed: false,
        has_pauses: false,
        is_away: false,
        by_postfix: false,
    },
    Workload {
        name: "mixed",
        about: "1 octet to 10 MB, up to 20 recipients, some refused for good, some put off, some cut off after the dot, some taken slowly",
        rate: 120,
        clients: 6,
        is_mixed: true,
        has_pauses: false,
        is_away: false,
        by_postfix: false,
    },
    Workload {
        name: "bursts",
        about: "half a second as fast as it goes, then a second of silence, in which the log goes idle",
        rate: 2_000,
        clients: 8,
        is_mixed: false,
        has_pauses: true,
        is_away: false,
        by_postfix: false,
    },
    Workload {
        name: "postfix",
        about: "2 to 50 KB to one or two recipients, an even stream into a Postfix, which hands it on (takes root and Postfix)",
        rate: 60,
        clients: 2,
        is_mixed: false,
        has_pauses: false,
        is_away: false,
        by_postfix: true,
    },
    Workload {
        name: "away",
        about: "the customer is away for the whole run; all of it waits and is delivered at the end",
        rate: 150,
        clients: 4,
        is_mixed: true,
        has_pauses: false,
        is_away: true,
        by_postfix: false,
    },
];

/// The one of this name.
pub fn named(name: &str) -> Option<Workload> {
    ALL.into_iter().find(|workload| workload.name == name)
}

/// Senders at work.
pub struct Senders {
    stop: Arc<AtomicBool>,
    relayed: Option<Arc<Relayed>>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Senders {
    /// Starts the clients of nodes at these addresses.
    pub fn start(
        workload: Workload,
        nodes: &[(u64, String)],
        random: &mut Random,
        record: &Record,
    ) -> Senders {
        let stop = Arc::new(AtomicBool::new(false));
        let all = workload.clients * nodes.len() as u64;
        let between = Duration::from_secs(1) * all as u32 / workload.rate.max(1) as u32;
        let mut threads = Vec::new();
        let relayed =
            workload.by_postfix.then(|| Relayed::start(nodes, record).expect("Postfix is installed"));
        let relayed = relayed.map(Arc::new);
        let entries = match &relayed {
            Some(relayed) => nodes.iter().map(|(id, _)| (*id, relayed.address())).collect(),
            None => nodes.to_vec(),
        };
        for (node, address) in &entries {
            for number in 0..workload.clients {
                let sender = Sender {
                    workload,
                    node: *node,
                    number,
                    address: address.clone(),
                    between,
                    random: Random::new(random.next()),
                    record: record.clone(),
                    stop: stop.clone(),
                    relayed: relayed.clone(),
                };
                threads.push(std::thread::spawn(move || sender.work()));
            }
        }
        Senders { stop, relayed, threads }
    }

    /// Lets each finish its message.
    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }

    /// Once all is well: what a Postfix still has it hands on.
    pub fn finish(mut self) {
        self.relayed.take().and_then(Arc::into_inner).into_iter().for_each(Relayed::finish);
    }
}

/// How long a sender waits before it tries a node again that was not there.
const AGAIN: Duration = Duration::from_millis(500);
/// Octets in a chunk: some messages are one, some are many.
const CHUNK: usize = 20_000;
/// A burst and the silence behind it.
const BURST: Duration = Duration::from_millis(500);
const SILENCE: Duration = Duration::from_millis(1000);

struct Sender {
    workload: Workload,
    node: u64,
    number: u64,
    address: String,
    between: Duration,
    random: Random,
    record: Record,
    stop: Arc<AtomicBool>,
    relayed: Option<Arc<Relayed>>,
}

impl Sender {
    fn work(mut self) {
        let mut connection: Option<Client> = None;
        let mut count = 0;
        let began = Instant::now();
        // Not all in step.
        let mut due =
            began + Duration::from_millis(self.random.within(0, self.between.as_millis() as u64 + 1));
        while !self.stop.load(Ordering::SeqCst) {
            due = (due + self.between).max(Instant::now() - Duration::from_secs(1));
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let in_period = began.elapsed().as_millis() % (BURST + SILENCE).as_millis();
            if self.workload.has_pauses && in_period > BURST.as_millis() {
                std::thread::sleep(AGAIN);
                continue;
            }
            let Some(client) = &mut connection else {
                let began = self.record.now();
                // Half of them encrypt, half of them pipeline, a third of them sends chunks.
                let connect = if self.number % 4 < 2 { Client::connect } else { Client::connect_encrypted };
                connection = connect(self.node, &self.address).ok();
                match &mut connection {
                    Some(client) => {
                        client.pipelines = self.number.is_multiple_of(2);
                        client.chunk = self.number.is_multiple_of(3).then_some(CHUNK);
                    }
                    None => {
                        // A node that lets nobody in has refused what would have been sent.
                        count += 1;
                        let name = format!("n{}c{}m{count}", self.node, self.number);
                        let (id, recipients, outcome) = (None, Vec::new(), Outcome::Fail(0));
                        let node = self.node;
                        let sent = Sent { name, recipients, node, outcome, id, bytes: 0, digest: 0 };
                        self.record.note(What::Sent { began, dot: None, sent });
                        std::thread::sleep(AGAIN);
                    }
                }
                continue;
            };
            count += 1;
            let name = format!("n{}c{}m{count}", self.node, self.number);
            let (recipients, bytes) = self.choose(&name);
            let recipients: Vec<&str> = recipients.iter().map(String::as_str).collect();
            let octets = message(&name, bytes);
            let began = Instant::now();
            let (dot, sent) = match client.open_from(&name, &name, &recipients, &octets) {
                Ok(open) if self.relayed.is_some() => {
                    connection = self.relay(open, began, connection.take());
                    continue;
                }
                Ok(open) => {
                    let dot = self.record.now();
                    (Some(dot), self.record.past_dot(self.node, || client.finish(open)))
                }
                Err(sent) => (None, *sent),
            };
            if sent.outcome != Outcome::Ok {
                connection = None;
            }
            let began = self.record.at(began);
            self.record.note(What::Sent { began, dot, sent });
        }
    }

    /// Ends a message that Postfix is to hand on: what becomes of it its log tells. The connection, if it is still good.
    fn relay(&self, open: Open, began: Instant, connection: Option<Client>) -> Option<Client> {
        let (relayed, mut client) = (self.relayed.as_ref()?, connection?);
        relayed.expect(&open, self.record.at(began));
        let sent = client.finish(open);
        if let Outcome::Fail(_) = sent.outcome {
            relayed.forget(&sent.name);
        }
        (sent.outcome == Outcome::Ok).then_some(client)
    }

    /// Recipients and size of the next message.
    fn choose(&mut self, name: &str) -> (Vec<String>, usize) {
        let random = &mut self.random;
        let usual = random.within(2_000, 50_000) as usize;
        if !self.workload.is_mixed {
            let second = random.percent(20).then(|| "s".to_string());
            return (std::iter::once("r".to_string()).chain(second).collect(), usual);
        }
        let bytes = match random.within(0, 100) {
            0..10 => random.within(1, 200) as usize,
            10..12 => random.within(1 << 20, 10_000_000) as usize,
            12..20 => random.within(50_000, 700_000) as usize,
            _ => usual,
        };
        // What a customer says after the dot it says for all, so these have no company.
        let alone = ["no", "late", "drop", "reset", "stall", "slow"];
        let recipients = match random.within(0, 100) {
            0..8 => vec![format!("{}-{name}", random.pick(&alone))],
            8..12 => vec!["r".into(), format!("{}-{name}", random.pick(&["bounce", "defer"]))],
            12..16 => (0..random.within(3, 21)).map(|n| format!("r{n}")).collect(),
            _ => vec!["r".into()],
        };
        (recipients, bytes)
    }
}
