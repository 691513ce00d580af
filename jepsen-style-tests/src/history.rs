//! What happened, in the order in which it was seen, kept so that it can be judged now or later.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, Write};

use serde::{Deserialize, Serialize};

/// What a sender knows of its message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It read 250.
    Ok,
    /// It read a 4yz or 5yz, or was cut off before its final dot (0): the message must never be delivered.
    Fail(u16),
    /// The connection ended after the final dot without a reply: neither of the two.
    Unknown,
}

/// A message that was sent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sent {
    /// Names the message and each of its copies together with the recipient.
    pub name: String,
    /// Local parts of the recipients.
    pub recipients: Vec<String>,
    /// The node it was sent to.
    pub node: u64,
    /// What the sender knows.
    pub outcome: Outcome,
    /// The id under which it was queued, as the reply said.
    pub id: Option<String>,
    /// How many octets stand between DATA and the final dot, before stuffing.
    pub bytes: usize,
    /// Their digest.
    pub digest: u64,
}

/// A copy that a customer took with 250.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Taken {
    /// Local part of the recipient.
    pub recipient: String,
    /// The message's name, if it carries one.
    pub name: Option<String>,
    /// Digest of what stands behind one added header; none if there is no such header.
    pub digest: Option<u64>,
    /// Octets as they arrived, unstuffed. Not kept.
    #[serde(skip)]
    pub octets: Vec<u8>,
}

/// A notice that a sender's own server took: which message it is about, and who did not get it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Notice {
    /// The name of the message.
    pub name: String,
    /// The notice's own id, which tells a second notice from a second copy of one.
    pub id: String,
    /// Local parts of the recipients it names.
    pub recipients: Vec<String>,
}

/// Something is broken on purpose, or mended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fault {
    /// Which one, counted from the beginning of the run.
    pub number: u64,
    /// Name of the nemesis.
    pub nemesis: String,
    /// False when it is mended.
    pub begins: bool,
    /// Nodes whose clients may see it.
    pub nodes: Vec<u64>,
    /// What was done, for people.
    pub what: String,
}

/// What could be seen of the cluster at one moment.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Sample {
    /// The machine of the leader, if anybody knew one.
    pub leader: Option<u64>,
    /// The term.
    pub term: Option<u64>,
    /// Whether mail was accepted.
    pub accepting: bool,
    /// Messages in the queue.
    pub queued: Option<u64>,
    /// Bodies of dead messages that are not overwritten yet, on the node with the most of them.
    pub erase_backlog: Option<u64>,
    /// Resident octets of each node's process, by its id.
    pub resident: Vec<(u64, u64)>,
    /// The most that they were since its start.
    #[serde(default)]
    pub peak: Vec<(u64, u64)>,
}

/// A line of a node's mail log about a message's custody.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Custody {
    /// The message's id.
    pub id: String,
    /// Ids of the nodes that had synced it when the sender was answered: whoever takes the place of node 2 has another one.
    pub nodes: Vec<u64>,
    /// Labels of their power.
    pub power: Vec<String>,
    /// Labels of their network.
    pub network: Vec<String>,
}

/// What can happen.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum What {
    /// A sender has finished with a message.
    Sent {
        /// When it said MAIL.
        began: u64,
        /// When it sent the final dot, if it came so far.
        dot: Option<u64>,
        /// The message and its outcome.
        #[serde(flatten)]
        sent: Sent,
    },
    /// A customer took a copy.
    Taken(Taken),
    /// A customer had all of a copy and ended the connection without a word: its sender cannot know whether it was taken.
    Unanswered {
        /// Local part of the first recipient.
        recipient: String,
    },
    /// A sender was told.
    Notice(Notice),
    /// A fault begins or ends.
    Fault(Fault),
    /// From now on these nodes and no others can do nothing for the rest. Told when it is so, and told to be over before it is.
    Away {
        /// Their ids.
        nodes: Vec<u64>,
    },
    /// The cluster was looked at.
    Sample(Sample),
    /// A node said which nodes hold a message.
    Custody(Custody),
    /// A node said that it has overwritten a message, so many milliseconds after it died.
    Erased {
        /// The message's id.
        id: String,
        /// The node.
        node: u64,
        /// How long it took.
        lag: u64,
    },
    /// A node's process ended though nobody had ended it.
    Ended {
        /// The node.
        node: u64,
        /// Its exit status.
        status: Option<i32>,
    },
    /// A node's process wrote to standard error that a thread of it panicked.
    Panicked {
        /// The node.
        node: u64,
        /// What it wrote.
        what: String,
    },
    /// A node wrote lines to its log at times that cannot be: its wall clock was wrong.
    WrongClock {
        /// The node.
        node: u64,
    },
    /// A node wrote to standard error that it has back what damage had taken.
    Repaired {
        /// The node.
        node: u64,
    },
    /// A node wrote to standard error that it has a snapshot, and so many bodies with it.
    Snapshot {
        /// The node.
        node: u64,
        /// Bodies of mail that waits.
        bodies: u64,
    },
    /// Everything was mended, and so many milliseconds later all nodes were well; none if they never were.
    Healed {
        /// How long it took.
        took: Option<u64>,
    },
    /// What was still queued at the end: names of messages.
    Left {
        /// Their names.
        names: Vec<String>,
    },
    /// After the drain and the erasure time the files of a node were searched for the octets of every message.
    Searched {
        /// The node.
        node: u64,
        /// Names of messages of which octets were found.
        found: Vec<String>,
    },
}

/// Something that happened, so many milliseconds after the beginning.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    /// When.
    pub at: u64,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// All that happened.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// In the order of time.
    pub events: Vec<Event>,
}

/// A line that is no event.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// The file cannot be read.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// A line is no event.
    #[error("line {line}: {why}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        why: serde_json::Error,
    },
}

impl History {
    /// One JSON object a line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        for event in &self.events {
            serde_json::to_writer(&mut *out, event)?;
            out.write_all(b"\n")?;
        }
        out.flush()
    }

    /// What [`History::write`] wrote.
    ///
    /// # Errors
    /// [`Unreadable`] names the line.
    pub fn read(input: impl BufRead) -> Result<History, Unreadable> {
        let mut events: Vec<Event> = Vec::new();
        for (n, line) in input.lines().enumerate() {
            let event = serde_json::from_str(&line?).map_err(|why| Unreadable::Line { line: n + 1, why })?;
            events.push(event);
        }
        Ok(History { events })
    }

    /// All messages that were sent, with when each was answered.
    pub fn sent(&self) -> impl Iterator<Item = (u64, &Sent)> {
        self.events.iter().filter_map(|event| match &event.what {
            What::Sent { sent, .. } => Some((event.at, sent)),
            _ => None,
        })
    }

    /// All copies that were taken, with when.
    pub fn taken(&self) -> impl Iterator<Item = (u64, &Taken)> {
        self.events.iter().filter_map(|event| match &event.what {
            What::Taken(taken) => Some((event.at, taken)),
            _ => None,
        })
    }

    /// All notices, with when each was taken.
    pub fn notices(&self) -> impl Iterator<Item = (u64, &Notice)> {
        self.events.iter().filter_map(|event| match &event.what {
            What::Notice(notice) => Some((event.at, notice)),
            _ => None,
        })
    }

    /// The time from the beginning of each fault to its end, or to the end of the history.
    pub fn windows(&self) -> Vec<Window> {
        let mut windows: Vec<Window> = Vec::new();
        let end = self.events.last().map_or(0, |event| event.at);
        for event in &self.events {
            let What::Fault(fault) = &event.what else { continue };
            if fault.begins {
                windows.push(Window { from: event.at, to: end, fault: fault.clone() });
            } else if let Some(window) = windows.iter_mut().find(|w| w.fault.number == fault.number) {
                window.to = event.at;
            }
        }
        windows
    }
}

/// A fault and its time.
#[derive(Clone, Debug)]
pub struct Window {
    /// When it began.
    pub from: u64,
    /// When it was mended.
    pub to: u64,
    /// The fault.
    pub fault: Fault,
}

impl Window {
    /// Whether it and a span of time have a moment in common.
    pub fn overlaps(&self, from: u64, to: u64) -> bool {
        self.from <= to && from <= self.to
    }
}

/// A digest for comparing octets within one run.
pub fn digest(octets: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    octets.hash(&mut hasher);
    hasher.finish()
}

impl Taken {
    /// Of octets as they arrived.
    pub fn new(recipient: String, octets: Vec<u8>) -> Taken {
        let digest = behind_one_header(&octets).map(digest);
        Taken { recipient, name: crate::checkers::name_of(&octets), digest, octets }
    }
}

/// What stands behind the header that a relay adds: one `Received`, folded with tabs (RFC 5321 §4.4).
fn behind_one_header(octets: &[u8]) -> Option<&[u8]> {
    let mut rest = octets.strip_prefix(b"Received: from ")?;
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n")?;
        rest = &rest[end + 2..];
        if rest.first() != Some(&b'\t') {
            return Some(rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_and_a_bad_line_is_named() {
        let sent = Sent {
            name: "m".into(),
            recipients: vec!["r".into()],
            node: 2,
            outcome: Outcome::Fail(451),
            id: None,
            bytes: 3,
            digest: u64::MAX,
        };
        let taken = Taken::new("r".into(), b"Received: from a\r\n\tby b\r\nX: y\r\n".to_vec());
        assert_eq!(taken.digest, Some(digest(b"X: y\r\n")));
        let events = [
            What::Sent { began: 1, dot: Some(2), sent },
            What::Taken(taken),
            What::Healed { took: None },
            What::Sample(Sample { resident: vec![(1, 5)], ..Sample::default() }),
        ];
        let events = events.into_iter().map(|what| Event { at: 7, what }).collect();
        let history = History { events };
        let mut written = Vec::new();
        history.write(&mut written).unwrap();
        let read = History::read(&written[..]).unwrap();
        let mut again = Vec::new();
        read.write(&mut again).unwrap();
        assert_eq!(written, again);
        assert_eq!((read.events.len(), read.sent().count(), read.taken().count()), (4, 1, 1));
        written.extend_from_slice(b"{\"at\":1}\n");
        assert!(History::read(&written[..]).is_err_and(|e| e.to_string().starts_with("line 5: ")));
    }
}
