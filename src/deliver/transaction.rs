//! Handing one message to one destination, over a connection that is greeted.
//!
//! Commands are pipelined where that is offered (RFC 2920), and the message goes in chunks (RFC 3030), else behind DATA. The body is read from
//! the log piece by piece, so a large message never stands in memory. Before the final dot, or the last octet, the lease is asked once more;
//! without it the connection is dropped, and the destination has nothing. A crash after the dot and before the settlement is committed is the one case in which the next
//! leader sends the message again (P4).

use std::collections::VecDeque;
use std::time::Duration;

use holdfast_cluster::{Bytes, Cluster, FinalDotPermit, LogIndex, ReadError, Term};

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
    c.chunking &= c.takes_chunks() != Some(false); // that may be known since the greeting
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
    if !c.chunking {
        commands.push("DATA".into());
    }
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
            if n == last
                && !c.chunking
                && !replies[1..].iter().any(|r| meaning(Stage::Rcpt, r.code) == Meaning::Good)
            {
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
    let sent = match (c.chunking, at_data) {
        (true, _) => send_chunks(means, c, message).await?,
        (false, None) => return Err(Stop::Broken(Broken("4.5.0 no reply to DATA".into()))),
        (false, Some(reply)) if meaning(Stage::Data, reply.code) != Meaning::Good => {
            Sent::Refused(Stage::Data, reply.clone())
        }
        (false, Some(_)) => send_data(means, c, message).await?,
    };
    let (permit, end) = match sent {
        Sent::AllButTheEnd(permit, end) => (permit, end),
        Sent::Refused(Stage::End, reply) if is_unknown(c, &reply) => return Err(closing(&reply)),
        Sent::Refused(stage, reply) => {
            let means = meaning(stage, reply.code);
            let words = reply.one_line();
            if let Some(fate) = fate(stage, means) {
                outcomes.extend(taken.iter().map(|r| outcome(message, *r, fate.clone(), &words)));
            }
            return match means {
                Meaning::Closing => Err(closing(&reply)),
                _ => reset(c, patience).await,
            };
        }
    };
    let reply = send_end(c, permit, &end, means.reply_timeout).await;
    let reply = match reply {
        Ok(reply) => reply,
        Err(Broken(why)) => {
            let why = format!("{why}; sent and not answered, it may be sent more than once");
            outcomes.extend(taken.iter().map(|r| outcome(message, *r, Fate::Deferred, &why)));
            return Err(Stop::Broken(Broken(why)));
        }
    };
    if is_unknown(c, &reply) {
        return Err(closing(&reply));
    }
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

/// Whether a destination answers a chunk as a command that it does not know, though it offered to take them: no word on the message.
/// It takes what the chunk holds for commands, so the connection ends, and the next one does without.
fn is_unknown(c: &Connection, reply: &Received) -> bool {
    let is_unknown = c.chunking && matches!(reply.code, 500..=504);
    if is_unknown {
        tracing::warn!(
            host = c.host.name,
            reply = reply.one_line(),
            "CHUNKING was offered, and BDAT is unknown"
        );
        c.note_chunks(false);
    }
    is_unknown
}

async fn reset(c: &mut Connection, patience: Duration) -> Result<(), Stop> {
    c.send(b"RSET\r\n").await?;
    match c.reply(patience).await? {
        reply if reply.code == 250 => Ok(()),
        reply => Err(Stop::Broken(Broken(reply.one_line()))),
    }
}

/// How far the message got.
enum Sent {
    /// All is sent but these octets, without which the destination has nothing.
    AllButTheEnd(FinalDotPermit, Vec<u8>),
    /// The destination wants no more of it.
    Refused(Stage, Received),
}

/// Sends the message up to the final dot.
async fn send_data(means: &Means<'_>, c: &mut Connection, message: &Message) -> Result<Sent, Stop> {
    let mut encoder = Encoder::default();
    let mut out = Vec::with_capacity(CHUNK_BYTES + 4096);
    for index in &message.bodies {
        for part in read(means, message, *index)?.chunks(CHUNK_BYTES) {
            encoder.write(part, &mut out);
            if out.len() >= CHUNK_BYTES {
                c.send(&out).await?;
                out.clear();
            }
        }
    }
    out.extend_from_slice(encoder.end());
    c.send(&out).await?;
    Ok(Sent::AllButTheEnd(permit(means).await?, b".\r\n".to_vec()))
}

/// Sends the message up to the last octet of its last chunk. A message of one body is one chunk, and else the last chunk is a short one. A
/// host of which it is not known that it takes chunks gets one with nothing but our own trace header's first line before that: if it
/// takes what a chunk holds for commands, it holds none.
async fn send_chunks(means: &Means<'_>, c: &mut Connection, message: &Message) -> Result<Sent, Stop> {
    let is_known = c.takes_chunks() == Some(true);
    let (mut lengths, mut begun) = (VecDeque::new(), 0);
    let (mut left, mut rest) = (0, Vec::new());
    for (n, index) in message.bodies.iter().enumerate() {
        let mut octets = read(means, message, *index)?;
        if n == 0 {
            let line = memchr::memchr(b'\n', &octets).map_or(0, |at| at as u64 + 1);
            lengths.extend(Some(line).filter(|line| !is_known && *line > 0));
            begun = lengths.iter().sum();
            let more = message.size.saturating_sub(begun + CHUNK_BYTES as u64);
            lengths.extend(Some(more).filter(|more| message.bodies.len() > 1 && *more > 0));
        }
        while !octets.is_empty() {
            if left == 0 {
                let Some(length) = lengths.pop_front() else {
                    rest.extend_from_slice(&octets);
                    break;
                };
                c.send(format!("BDAT {length}\r\n").as_bytes()).await?;
                left = length;
            }
            let now = usize::try_from(left).map_or(octets.len(), |left| left.min(octets.len()));
            for part in octets.split_to(now).chunks(CHUNK_BYTES) {
                c.send(part).await?;
            }
            left -= now as u64;
            if left == 0 {
                let reply = match c.reply(means.reply_timeout).await {
                    // Whoever hangs up on its first chunk is taken for one that does not know them: DATA is known to all.
                    Err(why) if !is_known => {
                        c.note_chunks(false);
                        return Err(why.into());
                    }
                    reply => reply?,
                };
                if meaning(Stage::End, reply.code) != Meaning::Good {
                    return Ok(Sent::Refused(Stage::End, reply));
                }
                c.note_chunks(true);
            }
        }
    }
    if left > 0
        || !lengths.is_empty()
        || message.bodies.len() > 1 && rest.len() as u64 > begun + CHUNK_BYTES as u64
    {
        // What was announced is not what is here: the queue lets no such message in.
        tracing::error!(id = %message.id, size = message.size, "a message is not as long as it should be");
        return Err(Stop::Broken(Broken("4.3.0 local error: the message's length is wrong".into())));
    }
    // The permit is for a moment, and the last chunk may take longer.
    let mut last = format!("BDAT {} LAST\r\n", rest.len()).into_bytes();
    last.append(&mut rest);
    let end = last.split_off(last.len() - 1);
    c.send(&last).await?;
    Ok(Sent::AllButTheEnd(permit(means).await?, end))
}

fn read(means: &Means<'_>, message: &Message, index: LogIndex) -> Result<Bytes, Stop> {
    match means.cluster.body(index) {
        Ok(octets) => Ok(octets),
        // It left the queue meanwhile; the destination has no end of it and drops what it got.
        Err(ReadError::Absent(_)) => Err(Stop::Untried),
        Err(e) => {
            tracing::error!(id = %message.id, error = %e, "a body cannot be read");
            Err(Stop::Broken(Broken(format!("4.3.0 local error: {e}"))))
        }
    }
}

/// Gets the permit for the end of a message.
async fn permit(means: &Means<'_>) -> Result<FinalDotPermit, Stop> {
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

/// The final dot, or the last octet of the last chunk, goes out on a permit and nothing else. Of an empty last chunk that is the LF of its
/// command.
async fn send_end(
    c: &mut Connection,
    _permit: FinalDotPermit,
    end: &[u8],
    patience: Duration,
) -> Result<Received, Broken> {
    c.send(end).await?;
    c.reply(patience).await
}
