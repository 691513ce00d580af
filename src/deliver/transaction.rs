//! Handing one message to one destination, over a connection that is greeted.
//!
//! Commands are pipelined where that is offered (RFC 2920). The body is read from the log piece by piece, so a large message
//! never stands in memory. Before the final dot the lease is asked once more; without it the connection is dropped, and the
//! destination has nothing. A crash after the dot and before the settlement is committed is the one case in which the next
//! leader sends the message again (P4).

use std::time::Duration;

use holdfast_cluster::{Cluster, FinalDotPermit, ReadError, Term};

use super::connection::{Broken, Connection};
use super::fate::{Meaning, Stage, fate, meaning};
use crate::clock;
use crate::queue::Message;
use crate::queue::command::{Fate, Outcome};
use crate::schedule::Job;
use crate::smtp::data::Encoder;
use crate::smtp::reply::Received;

/// Octets that are gathered before they are sent.
const CHUNK_BYTES: usize = 64 << 10;
/// How long to wait for the lease to hold again before the dot.
const LEASE_WAIT: Duration = Duration::from_secs(5);

/// How a transaction ended.
pub(super) enum End {
    /// Each recipient has an outcome, and the connection is good for the next message.
    Done(Vec<Outcome>),
    /// Each recipient has an outcome, and the connection is not good any more.
    Lost(Vec<Outcome>),
    /// The message was not tried: it left the queue, or this node may not deliver now.
    Untried,
}

/// What a transaction needs beside its message.
pub(super) struct Means<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) term: Term,
    pub(super) reply_timeout: Duration,
}

fn outcome(message: &Message, recipient: u16, fate: Fate, reply: &str) -> Outcome {
    Outcome { id: message.id, recipient, fate, reply: reply.chars().take(500).collect() }
}

/// Hands `message` to those of its recipients that `job` names.
pub(super) async fn run(means: &Means<'_>, c: &mut Connection, message: &Message, job: &Job) -> End {
    let mut outcomes = Vec::new();
    let result = attempt(means, c, message, job, &mut outcomes).await;
    let settled: Vec<u16> = outcomes.iter().map(|o| o.recipient).collect();
    let open = job.recipients.iter().copied().filter(|r| !settled.contains(r));
    match result {
        Ok(()) => End::Done(outcomes),
        Err(Stop::Untried) if outcomes.is_empty() => End::Untried,
        Err(Stop::Untried) => {
            outcomes.extend(open.map(|r| outcome(message, r, Fate::Deferred, "4.3.2 not tried")));
            End::Lost(outcomes)
        }
        Err(Stop::Broken(why)) => {
            outcomes.extend(open.map(|r| outcome(message, r, Fate::Deferred, &why.0)));
            End::Lost(outcomes)
        }
    }
}

enum Stop {
    Untried,
    Broken(Broken),
}

impl From<Broken> for Stop {
    fn from(broken: Broken) -> Stop {
        Stop::Broken(broken)
    }
}

async fn attempt(
    means: &Means<'_>,
    c: &mut Connection,
    message: &Message,
    job: &Job,
    outcomes: &mut Vec<Outcome>,
) -> Result<(), Stop> {
    let patience = means.reply_timeout / 2;
    let mut mail = format!("MAIL FROM:<{}>", message.envelope.sender);
    if c.size {
        mail += &format!(" SIZE={}", message.size);
    }
    if c.eight_bit && message.envelope.eight_bit {
        mail += " BODY=8BITMIME";
    }
    let mut commands = vec![mail];
    for number in &job.recipients {
        let recipient = &message.envelope.recipients[*number as usize];
        commands.push(format!("RCPT TO:<{}>", recipient.address));
    }
    commands.push("DATA".into());
    let mut replies: Vec<Received> = Vec::with_capacity(commands.len());
    if c.pipelining {
        let all: String = commands.iter().flat_map(|line| [line.as_str(), "\r\n"]).collect();
        c.send(all.as_bytes()).await?;
        for _ in &commands {
            replies.push(c.reply(patience).await?);
        }
    } else {
        let last = commands.len() - 1;
        for (n, line) in commands.iter().enumerate() {
            // Without a recipient that was taken there is nothing to send data for.
            if n == last && !replies[1..].iter().any(|r| meaning(Stage::Rcpt, r.code) == Meaning::Good) {
                break;
            }
            c.send(format!("{line}\r\n").as_bytes()).await?;
            replies.push(c.reply(patience).await?);
            if n == 0 && meaning(Stage::Mail, replies[0].code) != Meaning::Good {
                break;
            }
        }
    }
    let closing = |reply: &Received| Stop::Broken(Broken(reply.one_line()));
    // MAIL speaks for all recipients.
    let at_mail = meaning(Stage::Mail, replies[0].code);
    if let Some(fate) = fate(Stage::Mail, at_mail) {
        let reply = replies[0].one_line();
        outcomes.extend(job.recipients.iter().map(|r| outcome(message, *r, fate.clone(), &reply)));
        if at_mail == Meaning::Closing {
            return Err(closing(&replies[0]));
        }
        return reset(c, patience).await;
    }
    let mut taken = Vec::new();
    for (number, reply) in job.recipients.iter().zip(&replies[1..]) {
        let means = meaning(Stage::Rcpt, reply.code);
        match fate(Stage::Rcpt, means) {
            None => taken.push(*number),
            Some(fate) => outcomes.push(outcome(message, *number, fate, &reply.one_line())),
        }
        if means == Meaning::Closing {
            return Err(closing(reply));
        }
    }
    let at_data = replies.get(1 + job.recipients.len());
    if taken.is_empty() {
        if at_data.is_some_and(|r| r.code == 354) {
            // It waits for data that nobody should get: leave.
            return Err(Stop::Broken(Broken("4.5.0 354 without a recipient".into())));
        }
        return reset(c, patience).await;
    }
    let Some(at_data) = at_data else { return Err(Stop::Broken(Broken("4.5.0 no reply to DATA".into()))) };
    let means_data = meaning(Stage::Data, at_data.code);
    if let Some(fate) = fate(Stage::Data, means_data) {
        let reply = at_data.one_line();
        outcomes.extend(taken.iter().map(|r| outcome(message, *r, fate.clone(), &reply)));
        return match means_data {
            Meaning::Closing => Err(closing(at_data)),
            _ => reset(c, patience).await,
        };
    }
    let permit = body(means, c, message).await?;
    let reply = final_dot(c, permit, means.reply_timeout).await;
    let reply = match reply {
        Ok(reply) => reply,
        Err(Broken(why)) => {
            let why = format!("{why}; sent and not answered, it may be sent more than once");
            outcomes.extend(taken.iter().map(|r| outcome(message, *r, Fate::Deferred, &why)));
            return Err(Stop::Broken(Broken(why)));
        }
    };
    let at_end = meaning(Stage::End, reply.code);
    if let Some(fate) = fate(Stage::End, at_end) {
        let words = reply.one_line();
        outcomes.extend(taken.iter().map(|r| outcome(message, *r, fate.clone(), &words)));
    }
    match at_end {
        Meaning::Closing => Err(closing(&reply)),
        _ => Ok(()),
    }
}

async fn reset(c: &mut Connection, patience: Duration) -> Result<(), Stop> {
    c.send(b"RSET\r\n").await?;
    match c.reply(patience).await? {
        reply if reply.code == 250 => Ok(()),
        reply => Err(Stop::Broken(Broken(reply.one_line()))),
    }
}

/// Sends the message up to the final dot, and gets the permit for it.
async fn body(means: &Means<'_>, c: &mut Connection, message: &Message) -> Result<FinalDotPermit, Stop> {
    let mut encoder = Encoder::default();
    let mut out = Vec::with_capacity(CHUNK_BYTES + 4096);
    for index in &message.bodies {
        let octets = match means.cluster.body(*index) {
            Ok(octets) => octets,
            // It left the queue meanwhile; the destination has no final dot and drops what it got.
            Err(ReadError::Absent(_)) => return Err(Stop::Untried),
            Err(e) => {
                tracing::error!(id = %message.id, error = %e, "a body cannot be read");
                return Err(Stop::Broken(Broken(format!("4.3.0 local error: {e}"))));
            }
        };
        for part in octets.chunks(CHUNK_BYTES) {
            encoder.write(part, &mut out);
            if out.len() >= CHUNK_BYTES {
                c.send(&out).await?;
                out.clear();
            }
        }
    }
    out.extend_from_slice(encoder.end());
    c.send(&out).await?;
    let deadline = clock::after(LEASE_WAIT);
    loop {
        match means.cluster.permit() {
            Some(permit) if permit.term() == means.term => return Ok(permit),
            Some(_) => return Err(Stop::Untried),
            None if means.cluster.leading() != Some(means.term) || clock::now() > deadline => {
                return Err(Stop::Untried);
            }
            None => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// The final dot goes out on a permit and nothing else.
async fn final_dot(
    c: &mut Connection,
    _permit: FinalDotPermit,
    patience: Duration,
) -> Result<Received, Broken> {
    c.send(b".\r\n").await?;
    c.reply(patience).await
}
