//! Mail that a Postfix hands on for senders: it tries each message again until a node takes it, on whichever node answers. What it learned is
//! read from its log while it writes it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::history::{Outcome, Sent, What};
use crate::postfix::Postfix;
use crate::record::Record;
use crate::sender::Open;
use crate::tools::{lock, waited};

/// Time from one look at the log to the next.
const LOOK: Duration = Duration::from_millis(50);
/// How long it may take Postfix to hand on what it has once all is well: it tries again every few seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// A message that Postfix has, and who has got it from there.
struct Waiting {
    sent: Sent,
    began: u64,
    done: BTreeSet<String>,
}

/// A Postfix between senders and nodes.
pub(crate) struct Relayed {
    postfix: Arc<Postfix>,
    waiting: Arc<Mutex<BTreeMap<String, Waiting>>>,
    record: Record,
    stop: Arc<AtomicBool>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Relayed {
    /// Starts one in front of nodes at these addresses. Nothing if Postfix is not installed.
    pub(crate) fn start(nodes: &[(u64, String)], record: &Record) -> Option<Relayed> {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let port = free.expect("a free port").port();
        let addresses: Vec<String> = nodes.iter().map(|(_, address)| address.clone()).collect();
        let postfix = Arc::new(Postfix::start_as_sender(port, &addresses)?);
        let (waiting, stop) =
            (Arc::<Mutex<BTreeMap<String, Waiting>>>::default(), Arc::<AtomicBool>::default());
        let reader = {
            let (postfix, waiting, record, stop) =
                (postfix.clone(), waiting.clone(), record.clone(), stop.clone());
            let nodes = nodes.to_vec();
            std::thread::spawn(move || {
                let mut log = Log { nodes, names: BTreeMap::new(), read: 0 };
                while !stop.load(Ordering::SeqCst) {
                    log.look(&postfix.maillog(), &waiting, &record);
                    std::thread::sleep(LOOK);
                }
            })
        };
        Some(Relayed { postfix, waiting, record: record.clone(), stop, reader: Some(reader) })
    }

    /// Where senders hand in.
    pub(crate) fn address(&self) -> String {
        self.postfix.address()
    }

    /// Postfix is about to get this message, to hand it on.
    pub(crate) fn expect(&self, open: &Open, began: u64) {
        let sent = open.message().clone();
        let waiting = Waiting { began, done: BTreeSet::new(), sent };
        lock(&self.waiting).insert(waiting.sent.name.clone(), waiting);
    }

    /// Postfix did not get it.
    pub(crate) fn forget(&self, name: &str) {
        lock(&self.waiting).remove(name);
    }

    /// Waits until all is handed on; of what is not nobody can say whether a node has it.
    pub(crate) fn finish(mut self) {
        waited(PATIENCE, || lock(&self.waiting).is_empty());
        self.stop.store(true, Ordering::SeqCst);
        self.reader.take().into_iter().for_each(|reader| drop(reader.join()));
        for (_, Waiting { sent, began, .. }) in std::mem::take(&mut *lock(&self.waiting)) {
            self.record.note(What::Sent { began, dot: None, sent });
        }
    }
}

/// Postfix's log, as far as it was read.
struct Log {
    nodes: Vec<(u64, String)>,
    /// Names of messages by Postfix's own ids.
    names: BTreeMap<String, String>,
    read: usize,
}

impl Log {
    fn look(&mut self, text: &str, waiting: &Mutex<BTreeMap<String, Waiting>>, record: &Record) {
        let new = text.get(self.read..).unwrap_or_default();
        // The last line may not be whole.
        let Some(end) = new.rfind('\n') else { return };
        for line in new[..end].lines() {
            match Line::of(line) {
                Some(Line::From { id, name }) => drop(self.names.insert(id, name)),
                Some(Line::Sent { id, recipient, relay, queued_as }) => {
                    let Some(name) = self.names.get(&id) else { continue };
                    let mut waiting = lock(waiting);
                    let Some(message) = waiting.get_mut(name) else { continue };
                    message.done.insert(recipient);
                    if message.done.len() < message.sent.recipients.len() {
                        continue;
                    }
                    let Some(Waiting { sent, began, .. }) = waiting.remove(name) else { continue };
                    let node =
                        self.nodes.iter().find(|(_, address)| *address == relay).map_or(0, |(id, _)| *id);
                    let sent = Sent { node, outcome: Outcome::Ok, id: Some(queued_as), ..sent };
                    record.note(What::Sent { began, dot: None, sent });
                }
                None => {}
            }
        }
        self.read += end + 1;
    }
}

/// What a line of Postfix's log says.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    /// It has a message under an id of its own.
    From { id: String, name: String },
    /// A node took it for a recipient.
    Sent { id: String, recipient: String, relay: String, queued_as: String },
}

impl Line {
    /// Of `... postfix/qmgr[9]: ID: from=<name@...>, ...` and `... postfix/smtp[9]: ID: to=<r@...>, relay=host[address]:port, ...,
    /// status=sent (250 2.0.0 Ok: queued as ID)`.
    fn of(line: &str) -> Option<Line> {
        let (before, rest) = line.split_once("]: ")?;
        let (id, rest) = rest.split_once(": ")?;
        let local = |field: &str| {
            let value = rest.split(", ").find_map(|part| part.strip_prefix(field))?;
            Some(value.trim_start_matches('<').split('@').next()?.to_string())
        };
        if before.contains("/qmgr[") {
            return Some(Line::From { id: id.into(), name: local("from=")? });
        }
        let queued_as = rest.split_once("status=sent (250 ")?.1.split_once("queued as ")?.1;
        let relay = rest.split(", ").find_map(|part| part.strip_prefix("relay="))?;
        let (host, port) = relay.split_once("]:")?;
        let address = host.split_once('[')?.1;
        Some(Line::Sent {
            id: id.into(),
            recipient: local("to=")?,
            relay: format!("{address}:{port}"),
            queued_as: queued_as.trim_end_matches(')').into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
Nov 24 04:00:00 host postfix/smtpd[7]: 4F2A: client=localhost[127.0.0.1]
Nov 24 04:00:00 host postfix/qmgr[9]: 4F2A: from=<n0c1m1@client.test.example>, size=3, nrcpt=2 (queue active)
Nov 24 04:00:00 host postfix/smtp[8]: 4F2A: to=<r@test.example>, relay=10.99.0.1[10.99.0.1]:25, delay=0.1, delays=0/0/0/0, dsn=4.3.0, status=deferred (host 10.99.0.1[10.99.0.1] said: 451 4.3.0 no (in reply to end of DATA command))
Nov 24 04:00:01 host postfix/smtp[8]: 4F2A: to=<r@test.example>, relay=10.99.0.2[10.99.0.2]:25, delay=0.1, delays=0/0/0/0, dsn=2.0.0, status=sent (250 2.0.0 Ok: queued as 0000AB)
Nov 24 04:00:01 host postfix/smtp[8]: 4F2A: to=<s@test.example>, relay=10.99.0.2[10.99.0.2]:25, delay=0.1, delays=0/0/0/0, dsn=2.0.0, status=sent (250 2.0.0 Ok: queued as 0000AB)
Nov 24 04:00:01 host postfix/qmgr[9]: 4F2A: removed
";

    #[test]
    fn a_message_is_acknowledged_when_all_its_recipients_are() {
        let record = Record::new();
        let recipients = vec!["r".to_string(), "s".into()];
        let sent = Sent {
            name: "n0c1m1".into(),
            recipients,
            node: 0,
            outcome: Outcome::Unknown,
            id: None,
            bytes: 3,
            digest: 5,
        };
        let waiting = Waiting { sent, began: 7, done: BTreeSet::new() };
        let waiting = Mutex::new(BTreeMap::from([("n0c1m1".to_string(), waiting)]));
        let mut log = Log { nodes: vec![(2, "10.99.0.2:25".into())], names: BTreeMap::new(), read: 0 };
        // However much of it is there when it is read.
        let last = LOG.rfind("Nov").unwrap();
        for end in (0..last).step_by(13) {
            log.look(&LOG[..end], &waiting, &record);
        }
        assert_eq!(
            (record.acknowledged(), lock(&waiting).len()),
            (0, 1),
            "one recipient's line is not whole yet"
        );
        log.look(LOG, &waiting, &record);
        let events = record.finish();
        let [crate::history::Event { what: What::Sent { began: 7, sent, .. }, .. }] = &events[..] else {
            panic!("{events:?}")
        };
        assert_eq!((sent.node, &sent.outcome, sent.id.as_deref()), (2, &Outcome::Ok, Some("0000AB")));
        assert!(lock(&waiting).is_empty());
    }
}
