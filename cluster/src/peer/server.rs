//! Answering peers.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use holdfast_storage::ReadError;
use holdfast_storage::codec::{decode, encode};
use openraft::EntryPayload;
use openraft::async_runtime::WatchReceiver;
use openraft::raft::TransferLeaderRequest;
use openraft::raft::{AppendEntriesRequest, StreamAppendError, VoteRequest};
use tokio::io::AsyncWriteExt;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::client::{FrameReader, Local};
use super::frame::{
    self, Answer, AppendAnswer, AppendHead, Frame, Hello, Known, PROTOCOL, Past, Purpose, Request,
};
use super::tls::is_node;
use crate::blocking::blocking;
use crate::clock;
use crate::cluster::{Cluster, Inner};
use crate::codec::entry_from_stored;
use crate::limits::{
    APPENDS_IN_FLIGHT_MAX, CONNECT, PROPOSAL_MAX, REQUEST, REQUESTS_IN_FLIGHT_MAX, UNACKNOWLEDGED,
};
use crate::net::{Listener, Stream};
use crate::proposal::{Fence, Here};
use crate::snapshot::Part;
use crate::transfer::{self, NotInstalled};
use crate::types::{Proposal, Raft, log_id, position, raft_vote, stored_vote};

/// Connections of peers at the same time: each peer has a handful.
const CONNECTIONS_MAX: usize = 256;

/// Answers peers until the listener fails.
pub(crate) async fn serve(listener: Listener, local: Arc<Local>, cluster: Cluster) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                let (local, cluster) = (local.clone(), cluster.clone());
                tokio::spawn(async move {
                    if let Err(why) = connection(stream, local, cluster).await {
                        tracing::debug!(%from, why, "peer connection ended");
                    }
                    drop(permit);
                });
            }
            Err(e) => {
                tracing::warn!(error = %e, "accepting a peer");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(stream: Stream, local: Arc<Local>, cluster: Cluster) -> Result<(), String> {
    let open = async {
        stream.set_nodelay().map_err(|e| e.to_string())?;
        stream.set_user_timeout(UNACKNOWLEDGED).map_err(|e| e.to_string())?;
        let acceptor = TlsAcceptor::from(local.tls.server());
        let stream = acceptor.accept(stream).await.map_err(|e| format!("TLS: {e}"))?;
        let certificates = stream.get_ref().1.peer_certificates().map(|c| c.to_vec());
        let (reader, writer) = tokio::io::split(stream);
        let mut reader = FrameReader::new(reader);
        let hello: Hello = reader.next().await?.head("hello").map_err(|e| e.to_string())?;
        Ok::<_, String>((reader, writer, hello, certificates))
    };
    let (reader, writer, hello, certificates) =
        timeout(CONNECT, open).await.map_err(|_| "no hello in time")??;
    if hello.protocol != PROTOCOL {
        return Err(format!("node {} speaks protocol {}", hello.from, hello.protocol));
    }
    if hello.cluster != local.cluster || hello.to != local.id {
        let Hello { cluster, from, to, .. } = hello;
        return Err(format!("node {from} of cluster {cluster} looks for node {to}"));
    }
    if !is_node(certificates.as_deref(), hello.from) {
        return Err(format!("the certificate is not that of node {}", hello.from));
    }
    match hello.purpose {
        Purpose::Append => appends(reader, writer, cluster).await,
        Purpose::Request => requests(reader, writer, cluster, hello.from).await,
    }
}

type Reader = FrameReader<tokio::io::ReadHalf<TlsStream<Stream>>>;
type Writer = tokio::io::WriteHalf<TlsStream<Stream>>;

async fn send(writer: &mut Writer, out: &mut BytesMut) -> Result<(), String> {
    let sent = async {
        writer.write_all(out).await?;
        writer.flush().await
    };
    timeout(REQUEST, sent).await.map_err(|_| "sending made no progress")?.map_err(|e| e.to_string())?;
    out.clear();
    Ok(())
}

fn parse_append(frame: Frame) -> Result<AppendEntriesRequest<crate::types::TypeConfig>, String> {
    let head: AppendHead = frame.head("append").map_err(|e| e.to_string())?;
    let entries = frame::entries(&head, frame.raw).map_err(|e| e.to_string())?;
    let entries: Result<Vec<_>, _> = entries.into_iter().map(entry_from_stored).collect();
    Ok(AppendEntriesRequest {
        vote: raft_vote(&head.vote),
        prev_log_id: head.previous.map(log_id),
        entries: entries.map_err(|e| e.to_string())?,
        leader_commit: head.commit.map(log_id),
    })
}

/// Whether there is room for what an append brings. What this node has already, which a new leader sends again, needs none.
fn has_room(inner: &Inner, request: &AppendEntriesRequest<crate::types::TypeConfig>) -> bool {
    let (mut more, mut draining) = (0, 0);
    for entry in &request.entries {
        let at = position(&entry.log_id);
        let EntryPayload::Normal(proposal) = &entry.payload else { continue };
        let bytes = proposal.body.len() as u64;
        if bytes == 0 || inner.log.term_of(at.index) == Some(at.term) {
            continue;
        }
        let machine = inner.machine.lock().unwrap_or_else(PoisonError::into_inner);
        let into = if machine.is_draining(&proposal.command) { &mut draining } else { &mut more };
        *into += bytes;
    }
    inner.has_room_for(more, draining)
}

/// Feeds a stream of appends to Raft and answers each when it is durable here.
async fn appends(reader: Reader, mut writer: Writer, cluster: Cluster) -> Result<(), String> {
    let raft = cluster.inner.raft.get().cloned().ok_or("this node is not part of the cluster yet")?;
    let (feed, fed) = mpsc::channel(APPENDS_IN_FLIGHT_MAX);
    let room = cluster.inner.clone();
    let read = async move {
        let mut reader = reader;
        loop {
            let request = parse_append(reader.next().await?)?;
            // An append that fails ends the node, so one for which there is no room is refused before Raft sees it. Heartbeats have a
            // stream of their own.
            if !request.entries.is_empty() && !has_room(&room, &request) {
                return Err("no room for these entries".into());
            }
            if feed.send(request).await.is_err() {
                return Ok(()); // Raft ended the stream
            }
        }
    };
    let input = futures_util::stream::unfold(fed, |mut fed| async move { Some((fed.recv().await?, fed)) });
    let answer = async move {
        let mut out = BytesMut::new();
        let mut answers = std::pin::pin!(raft.stream_append(input));
        while let Some(answer) = answers.next().await {
            let answer = match answer.map_err(|e| e.to_string())? {
                Ok(at) => {
                    cluster.inner.local.contact().led(clock::now());
                    AppendAnswer::Durable(at.as_ref().map(position))
                }
                Err(StreamAppendError::Conflict(at)) => AppendAnswer::Conflict(position(&at)),
                Err(StreamAppendError::HigherVote(vote)) => AppendAnswer::HigherVote(stored_vote(&vote)),
            };
            frame::put(&mut out, 0, &answer, &[]);
            send(&mut writer, &mut out).await?;
        }
        Ok(())
    };
    tokio::select! { result = read => result, result = answer => result }
}

/// Answers requests, many at a time.
async fn requests(mut reader: Reader, mut writer: Writer, cluster: Cluster, from: u64) -> Result<(), String> {
    let (tell, mut answers) = mpsc::channel::<(u64, Answer, Bytes)>(REQUESTS_IN_FLIGHT_MAX);
    let room = Arc::new(Semaphore::new(REQUESTS_IN_FLIGHT_MAX));
    let read = async {
        loop {
            let frame = reader.next().await?;
            let permit = room.clone().acquire_owned().await.map_err(|e| e.to_string())?;
            let (cluster, tell) = (cluster.clone(), tell.clone());
            let request: Request = match frame.head("request") {
                Ok(request) => request,
                // A newer version may ask what this one does not know.
                Err(e) => {
                    drop(tell.send((frame.id, Answer::Failed(e.to_string()), Bytes::new())).await);
                    continue;
                }
            };
            tokio::spawn(async move {
                let (answer, raw) = respond(&cluster, request, frame.raw, from).await;
                drop(tell.send((frame.id, answer, raw)).await);
                drop(permit);
            });
        }
    };
    let write = async {
        let mut out = BytesMut::new();
        while let Some((id, answer, raw)) = answers.recv().await {
            frame::put(&mut out, id, &answer, &[&raw]);
            while out.len() < (1 << 20)
                && let Ok((id, answer, raw)) = answers.try_recv()
            {
                frame::put(&mut out, id, &answer, &[&raw]);
            }
            send(&mut writer, &mut out).await?;
        }
        Ok(())
    };
    tokio::select! { result = read => result, result = write => result }
}

async fn respond(cluster: &Cluster, request: Request, raw: Bytes, from: u64) -> (Answer, Bytes) {
    let failed = |why: &dyn std::fmt::Display| (Answer::Failed(why.to_string()), Bytes::new());
    let plain = |answer| (answer, Bytes::new());
    match request {
        Request::Past => return plain(Answer::Past(past(cluster))),
        // Also before it takes part: two nodes that lack bodies may each have what the other wants.
        Request::Body(index) => {
            cluster.inner.transfers.goes_on(from);
            return match cluster.body(index) {
                Ok(body) => (Answer::Body, body),
                Err(ReadError::Absent(_)) => plain(Answer::BodyGone),
                Err(ReadError::Damaged { .. }) => plain(Answer::BodyDamaged),
                Err(e) => failed(&e),
            };
        }
        Request::Members => {
            return plain(Answer::Members(known(cluster).unwrap_or_default()));
        }
        Request::Prepare => {
            return match prepare(cluster).await {
                Ok(()) => plain(Answer::Done),
                Err(why) => failed(&why),
            };
        }
        _ => {}
    }
    let Some(raft) = cluster.inner.raft.get() else {
        if request == Request::Seen && matches!(past(cluster), Past::Formed(_)) {
            return plain(Answer::Seen(crate::repair::seen_before(cluster)));
        }
        return failed(&"this node is not part of the cluster yet");
    };
    match request {
        Request::Past | Request::Prepare | Request::Body(_) | Request::Members => {
            unreachable!("answered above")
        }
        Request::PreVote(r) => vote(cluster, raft, r, true).await,
        Request::Vote(r) => vote(cluster, raft, r, false).await,
        Request::TransferLeader { .. } if !cluster.inner.is_whole.load(Ordering::Relaxed) => {
            failed(&"it lacks entries that it may have acknowledged")
        }
        Request::TransferLeader { from, to, last } => {
            let request = TransferLeaderRequest::new(raft_vote(&from), to, last.map(log_id));
            match raft.handle_transfer_leader(request).await {
                Ok(Ok(())) => plain(Answer::Done),
                Ok(Err(e)) => failed(&e),
                Err(e) => failed(&e),
            }
        }
        Request::Propose { command, term, placed, left_ms } => {
            let command_bytes = command as usize;
            if command_bytes > crate::COMMAND_BYTES_MAX.min(raw.len())
                || raw.len() - command_bytes > crate::BODY_BYTES_MAX
            {
                return failed(&"a proposal out of bounds");
            }
            let command = Bytes::copy_from_slice(&raw[..command_bytes]);
            let body = Bytes::copy_from_slice(&raw[command_bytes..]);
            let fence = term.map_or(Fence::Any, Fence::Term);
            let left = Duration::from_millis(left_ms).min(PROPOSAL_MAX);
            match cluster.propose_here(Proposal { command, body }, fence, placed, left).await {
                Here::Done(p) => {
                    let nodes = p.receipt.iter().flat_map(|r| r.nodes()).map(|(id, _)| *id).collect();
                    (Answer::Proposed { at: p.at, nodes }, p.outcome.into())
                }
                Here::Refused(outcome) => (Answer::Refused, outcome.into()),
                Here::NotLeader(leader) => plain(Answer::NotLeader(leader)),
                Here::Unknown => plain(Answer::Unknown),
            }
        }
        Request::Digest(index) => {
            cluster.inner.transfers.goes_on(from);
            match cluster.inner.log.digest(index) {
                _ if !has_applied(cluster, index) => failed(&"it is not here yet"),
                Ok((bytes, crc)) => plain(Answer::Digest(bytes, crc)),
                Err(ReadError::Absent(_)) => plain(Answer::BodyGone),
                Err(e) => failed(&e),
            }
        }
        Request::SnapshotPart { last, number } => {
            if cluster.inner.installing.try_lock().is_err() {
                return plain(Answer::Installing);
            }
            if !cluster.inner.has_room_for(raw.len() as u64, 0) {
                return failed(&"no room for the rows of a snapshot");
            }
            let part = blocking(move || decode::<Part>("snapshot part", &raw)).await;
            let added = match part {
                Ok(Ok(part)) => {
                    let mut arriving = cluster.inner.arriving.lock().await;
                    arriving.part(&cluster.inner.state_machine, (from, last), number, part).await
                }
                Ok(Err(e)) => Err(e.to_string()),
                Err(e) => Err(e.to_string()),
            };
            added.map_or_else(|why| failed(&why), |()| plain(Answer::Done))
        }
        Request::Snapshot { vote, last, parts } => {
            match transfer::receive(cluster, raft, last, parts, from).await {
                Ok((snapshot, _one)) => match raft.install_full_snapshot(raft_vote(&vote), snapshot).await {
                    Ok(response) => plain(Answer::Snapshot(stored_vote(&response.vote))),
                    Err(e) => failed(&e),
                },
                Err(NotInstalled::Busy) => plain(Answer::Installing),
                Err(NotInstalled::Failed(why)) => failed(&why),
            }
        }
        Request::Status => (Answer::Status, encode(&cluster.own_report()).into()),
        Request::Seen => plain(Answer::Seen(crate::repair::seen(cluster, raft, from))),
        Request::ReadIndex => plain(Answer::Applied(cluster.applied_as_leader())),
    }
}

/// Whether this node can say what became of a committed entry's body.
fn has_applied(cluster: &Cluster, index: holdfast_storage::LogIndex) -> bool {
    cluster.inner.is_whole.load(Ordering::Relaxed) && *cluster.inner.applied.borrow() > index.0
}

async fn vote(cluster: &Cluster, raft: &Raft, r: frame::VoteRequest, pre: bool) -> (Answer, Bytes) {
    if clock::now() < cluster.inner.votes_from {
        return (Answer::Failed("just started: it has forgotten what it promised".into()), Bytes::new());
    }
    if let Some(doubt) = cluster.inner.log.doubt()
        && r.last < Some(doubt)
    {
        // What it would have compared is lost; that it was at least this long is known.
        let why = format!("it may have acknowledged entries up to {doubt}, and the candidate has fewer");
        return (Answer::Failed(why), Bytes::new());
    }
    let mut request = VoteRequest::new(raft_vote(&r.vote), r.last.map(log_id));
    request.leadership_transfer = r.transfer;
    let response = if pre { raft.pre_vote(request).await } else { raft.vote(request).await };
    let answer = match response {
        Ok(v) => Answer::Vote {
            vote: stored_vote(&v.vote),
            granted: v.vote_granted,
            last: v.last_log_id.as_ref().map(position),
        },
        Err(e) => Answer::Failed(e.to_string()),
    };
    (answer, Bytes::new())
}

/// The newest membership that this node knows: openraft's, or the log's until that runs.
fn known(cluster: &Cluster) -> Option<Known> {
    let Some(raft) = cluster.inner.raft.get() else { return cluster.inner.found.clone() };
    let metrics = raft.server_metrics();
    let metrics = metrics.borrow_watched();
    Known::of(&metrics.membership_config)
}

/// What this node says of its own past.
pub(crate) fn past(cluster: &Cluster) -> Past {
    let inner = &cluster.inner;
    let voted = inner.log.vote().is_some_and(|vote| vote.term.0 > 0);
    if inner.log.last().is_some() || inner.log.doubt().is_some() || voted {
        let members = match inner.raft.get() {
            Some(_) => cluster.members(),
            None => inner.configured.clone(),
        };
        return Past::Formed(members.into_keys().collect());
    }
    match *inner.prepared.lock().unwrap_or_else(PoisonError::into_inner) {
        true => Past::Prepared,
        false => Past::Pristine,
    }
}

/// Agrees to a first formation: durable, so that it is never taken for an empty directory later.
pub(crate) async fn prepare(cluster: &Cluster) -> Result<(), String> {
    if let Past::Formed(_) = past(cluster) {
        return Err("this node has data of an earlier formation".into());
    }
    let (tell, told) = tokio::sync::oneshot::channel();
    cluster.inner.log.save_vote(Default::default(), Box::new(move |result| drop(tell.send(result))));
    told.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    *cluster.inner.prepared.lock().unwrap_or_else(PoisonError::into_inner) = true;
    Ok(())
}
