//! openraft's network over ours: appends as a pipelined stream, votes and snapshots as requests.
//!
//! Reading and writing are driven inside the one stream that is returned. A stream without progress ends in an error, since a
//! follower that is frozen with its connection open would otherwise block purging for good.
#![expect(clippy::disallowed_methods, reason = "this is the Peers edge")]
#![expect(clippy::result_large_err, reason = "the error type is openraft's")]

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use holdfast_storage::LogPosition;
use holdfast_storage::codec::encode;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError, StreamAppendResult,
    VoteRequest, VoteResponse,
};
use openraft::raft::{TransferLeaderRequest, TransferLeaderResponse};
use openraft::{OptionalSend, RaftNetworkFactory, RaftNetworkV2};
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;

use super::client::{AskError, Connection, Local, Peer, Reader, Writer, connect};
use super::frame::{self, Answer, AppendAnswer, Purpose, Request};
use crate::clock;
use crate::codec::entry_to_stored;
use crate::limits::{APPENDS_IN_FLIGHT_MAX, NO_PROGRESS, REQUEST, SNAPSHOT_PART};
use crate::placement::Member;
use crate::snapshot::Manifest;
use crate::types::{Snapshot, TypeConfig, Vote, log_id, position, raft_vote, stored_vote};

/// Makes connections to peers.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) local: Arc<Local>,
}

/// One peer, for one purpose of openraft's.
pub(crate) struct Link {
    local: Arc<Local>,
    target: u64,
    address: String,
    peer: Peer,
    /// Kept open between streams that ended well.
    spare: Option<Connection>,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Link;

    async fn new_client(&mut self, target: u64, node: &Member) -> Link {
        Link {
            local: self.local.clone(),
            target,
            address: node.address.clone(),
            peer: Peer::new(self.local.clone(), target, node.address.clone()),
            spare: None,
        }
    }
}

type Failure = RPCError<TypeConfig>;

fn unreachable(why: impl std::fmt::Display) -> Failure {
    RPCError::Unreachable(Unreachable::from_string(why.to_string()))
}

fn broken(why: impl std::fmt::Display) -> Failure {
    RPCError::Network(NetworkError::from_string(why.to_string()))
}

/// Tells a stream that stands still: it was begun for entries that were given up since, or whose body is being mended, and asks for them again
/// and again. openraft ends such a stream only when it breaks, and hears of nothing else meanwhile; when it does break it looks afresh at what
/// the follower needs, which may be a snapshot.
#[derive(Default)]
struct Standstill {
    /// Behind which entry there was nothing to send though more was committed.
    behind: Option<Option<LogPosition>>,
}

impl Standstill {
    /// A request is to be sent. Whether it is the second in a row that should have entries and has none.
    fn sees(&mut self, previous: Option<LogPosition>, commit: Option<LogPosition>, is_empty: bool) -> bool {
        // A heartbeat, or one that tells a follower that has everything how far the commit is, lacks nothing.
        let lacks = is_empty && commit > previous;
        let again = lacks && self.behind == Some(previous);
        self.behind = lacks.then_some(previous);
        again
    }
}

/// A stream of appends under way.
struct Appending<'s, S> {
    input: S,
    input_ended: bool,
    reader: Reader,
    writer: Writer,
    in_flight: usize,
    standstill: Standstill,
    deadline: Instant,
    out: BytesMut,
    local: &'s Local,
    target: u64,
    spare: &'s mut Option<Connection>,
}

impl<S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin> Appending<'_, S> {
    async fn next(mut self) -> Option<(Result<StreamAppendResult<TypeConfig>, Failure>, Option<Self>)> {
        loop {
            if self.input_ended && self.in_flight == 0 {
                *self.spare = Some((self.reader, self.writer));
                return None;
            }
            let room = !self.input_ended && self.in_flight < APPENDS_IN_FLIGHT_MAX;
            tokio::select! {
                biased;
                answer = self.reader.next(), if self.in_flight > 0 => {
                    let answer = answer.map_err(broken).and_then(|f| {
                        f.head::<AppendAnswer>("append answer").map_err(broken)
                    });
                    self.in_flight -= 1;
                    self.deadline = Instant::now() + NO_PROGRESS;
                    return Some(match answer {
                        Ok(AppendAnswer::Durable(at)) => {
                            self.local.contact().followed(self.target, clock::now());
                            (Ok(Ok(at.map(log_id))), Some(self))
                        }
                        // The other side ends its stream after these two.
                        Ok(AppendAnswer::Conflict(at)) => {
                            (Ok(Err(StreamAppendError::Conflict(log_id(at)))), None)
                        }
                        Ok(AppendAnswer::HigherVote(vote)) => {
                            (Ok(Err(StreamAppendError::HigherVote(raft_vote(&vote)))), None)
                        }
                        Err(e) => (Err(e), None),
                    });
                }
                request = self.input.next(), if room => match request {
                    None => self.input_ended = true,
                    Some(request) => {
                        let previous = request.prev_log_id.as_ref().map(position);
                        let commit = request.leader_commit.as_ref().map(position);
                        if self.standstill.sees(previous, commit, request.entries.is_empty()) {
                            return Some((Err(broken("what it reads was given up, or is being mended")), None));
                        }
                        if self.in_flight == 0 {
                            self.deadline = Instant::now() + NO_PROGRESS;
                        }
                        self.in_flight += 1;
                        put(&mut self.out, request);
                        let sent = async {
                            self.writer.write_all(&self.out).await?;
                            self.writer.flush().await
                        };
                        match tokio::time::timeout(NO_PROGRESS, sent).await {
                            Ok(Ok(())) => self.out.clear(),
                            Ok(Err(e)) => return Some((Err(broken(e)), None)),
                            Err(_) => return Some((Err(broken("sending made no progress")), None)),
                        }
                    }
                },
                () = tokio::time::sleep_until(self.deadline), if self.in_flight > 0 => {
                    return Some((Err(broken("no answer to an append")), None));
                }
            }
        }
    }
}

fn put(out: &mut BytesMut, request: AppendEntriesRequest<TypeConfig>) {
    let entries: Vec<_> = request.entries.into_iter().map(entry_to_stored).collect();
    let previous = request.prev_log_id.as_ref().map(position);
    let commit = request.leader_commit.as_ref().map(position);
    frame::put_append(out, stored_vote(&request.vote), previous, commit, &entries);
}

impl Link {
    async fn ask(&self, request: Request, raw: Vec<Bytes>, patience: Duration) -> Result<Answer, Failure> {
        match self.peer.ask(request, raw, patience).await {
            Ok((Answer::Failed(why), _)) => Err(unreachable(why)),
            Ok((answer, _)) => Ok(answer),
            Err(AskError::NotSent(why)) => Err(unreachable(why)),
            Err(AskError::NoAnswer(why)) => Err(broken(why)),
        }
    }

    async fn ask_vote(
        &self,
        request: Request,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Failure> {
        match self.ask(request, Vec::new(), option.soft_ttl()).await? {
            Answer::Vote { vote, granted, last } => {
                if granted {
                    self.local.contact().followed(self.target, clock::now());
                }
                Ok(VoteResponse::new(raft_vote(&vote), last.map(log_id), granted))
            }
            _ => Err(broken("not an answer to a vote")),
        }
    }
}

fn vote_request(rpc: &VoteRequest<TypeConfig>) -> frame::VoteRequest {
    frame::VoteRequest {
        vote: stored_vote(&rpc.vote),
        last: rpc.last_log_id.as_ref().map(position),
        transfer: rpc.leadership_transfer,
    }
}

impl RaftNetworkV2<TypeConfig> for Link {
    type SnapshotData = Manifest;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, Failure> {
        let mut answers = self.stream_append(futures_util::stream::iter([rpc]), option).await?;
        answers.next().await.unwrap_or_else(|| Err(broken("no answer"))).map(Into::into)
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<TypeConfig>, Failure>>, Failure>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            let (reader, writer) = match self.spare.take() {
                Some(connection) => connection,
                None => connect(&self.local, self.target, &self.address, Purpose::Append)
                    .await
                    .map_err(unreachable)?,
            };
            let appending = Appending {
                input,
                input_ended: false,
                reader,
                writer,
                in_flight: 0,
                standstill: Standstill::default(),
                deadline: Instant::now() + NO_PROGRESS,
                out: BytesMut::new(),
                local: &self.local,
                target: self.target,
                spare: &mut self.spare,
            };
            let stream =
                futures_util::stream::unfold(Some(appending), |state| async move { state?.next().await });
            let stream: BoxStream<'s, _> = Box::pin(stream);
            Ok(stream)
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Failure> {
        self.ask_vote(Request::Vote(vote_request(&rpc)), option).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Failure> {
        self.ask_vote(Request::PreVote(vote_request(&rpc)), option).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let Manifest::Here(state_machine) = snapshot.snapshot else {
            let why = Unreachable::from_string("the node is starting and has no snapshot yet");
            return Err(StreamingError::Unreachable(why));
        };
        let ask = async {
            // The state is read only for a node that is there.
            self.ask(Request::Status, Vec::new(), REQUEST).await?;
            // Purging does not overtake what is being read and sent.
            let transfers = &self.local.transfers;
            transfers.begin(self.target, state_machine.position());
            let (last, mut sending) = state_machine.snapshot().await;
            let mut parts = 0;
            transfers.goes_on(self.target);
            while let Some(part) = sending.next().await.map_err(unreachable)? {
                let raw = vec![encode(&part).into()];
                match self.ask(Request::SnapshotPart { last, number: parts }, raw, SNAPSHOT_PART).await? {
                    Answer::Done => transfers.goes_on(self.target),
                    other => return Ok(other),
                }
                parts += 1;
            }
            // The bodies may take their time: checkpoints go on.
            drop(sending);
            let request = Request::Snapshot { vote: stored_vote(&vote), last, parts };
            match self.peer.ask(request, Vec::new(), option.hard_ttl()).await {
                Ok((Answer::Failed(why), _)) => {
                    transfers.end(self.target);
                    Err(unreachable(why))
                }
                Ok((answer, _)) => {
                    transfers.goes_on(self.target);
                    Ok(answer)
                }
                // It may still be at it.
                Err(why) => Err(broken(why)),
            }
        };
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            answer = ask => match answer {
                Ok(Answer::Snapshot(vote)) => Ok(SnapshotResponse::new(raft_vote(&vote))),
                Ok(_) => Err(StreamingError::Network(NetworkError::from_string("not an answer to a snapshot"))),
                Err(e) => Err(StreamingError::Unreachable(Unreachable::from_string(e.to_string()))),
            }
        }
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, Failure> {
        let request = Request::TransferLeader {
            from: stored_vote(req.from_leader()),
            to: *req.to_node_id(),
            last: req.last_log_id().map(position),
        };
        match self.ask(request, Vec::new(), option.soft_ttl()).await? {
            Answer::Done => Ok(Ok(())),
            _ => Err(broken("the hand-over was refused")),
        }
    }
}

#[cfg(test)]
mod tests {
    use holdfast_storage::{LogIndex, Term};

    use super::*;

    /// P1: a stream whose entries were given up ends, so that the follower gets a snapshot. One that has nothing to send goes on.
    #[test]
    fn p1_a_stream_that_stands_still_ends() {
        let at = |index| Some(LogPosition { term: Term(2), index: LogIndex(index) });
        let mut stream = Standstill::default();
        assert!(!stream.sees(at(5), at(9), true), "the first may come from a probe, which is one request");
        assert!(stream.sees(at(5), at(9), true));
        let mut stream = Standstill::default();
        for (previous, commit, is_empty) in [
            (5, 9, true),
            (5, 9, false),
            (9, 9, true),
            (9, 9, true),
            (9, 8, true),
            (9, 12, true),
            (11, 12, true),
        ] {
            assert!(!stream.sees(at(previous), at(commit), is_empty), "{previous} {commit} {is_empty}");
        }
        assert!(!Standstill::default().sees(None, None, true));
    }
}
