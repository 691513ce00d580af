//! A node that lost something of its log: what it must ask before it takes part, and how it gets back what it lacks.
//!
//! | lost | what the node does | who must be there |
//! | --- | --- | --- |
//! | octets of a body, its record being right | opens, fetches the body from whoever has it, then serves and campaigns | one that has it |
//! | a body, while it runs | fetches it and goes on | one that has it |
//! | anything else, not at the end | keeps its bodies, voids the rest, gets the state by snapshot | a quorum, itself included, and one that has all entries that are left here |
//! | anything else, with the end | the same, but first hears all other nodes: its newest vote may be among what is lost | all others |
//! | perhaps what it wrote last: the tail is ambiguous | keeps its log, first hears all other nodes | all others |
//! | what a leader saw it acknowledge: an old copy was restored | keeps its log, first hears all other nodes | all others |
//!
//! All others are the voters of the newest membership that anybody tells (`others`). Until its own log is as long as what it may have
//! acknowledged it does not campaign and votes for no shorter log: so it votes as it would have with what it lost (Raft §5.4.1). A vote that may be lost is spent: the highest term of all others is taken
//! for one in which it has voted (protocol-aware recovery, Alagappan et al., FAST'18). A crash at any point leaves the same to do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;
use std::time::Duration;

use holdfast_storage::codec::{Reset, Vote};
use holdfast_storage::{Bytes, Damage, Entry as StoredEntry, LogIndex, LogPosition, LostBody};
use openraft::EntryPayload;
use openraft::async_runtime::WatchReceiver;
use tokio::sync::oneshot;

use crate::clock;
use crate::cluster::Cluster;
use crate::codec::entry_from_stored;
use crate::limits::REQUEST;
use crate::others::{ASK, Others, ask};
use crate::peer::client::Peer;
use crate::peer::frame::{Answer, Request, Seen};
use crate::types::{Raft, position, stored_vote};

/// Pause between rounds of questions.
const AGAIN: Duration = Duration::from_millis(300);
/// Pause between looks for damage while the node runs.
const LOOK: Duration = Duration::from_millis(500);
/// What nobody can mend is said again this much later.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// What this node tells a peer that asks.
pub(crate) fn seen(cluster: &Cluster, raft: &Raft, asker: u64) -> Seen {
    let (has, lost) = cluster.inner.log.has();
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    let leads = cluster.leading().is_some();
    let data = raft.data_metrics();
    let data = data.borrow_watched();
    let progress = data.replication.as_ref().filter(|_| leads);
    Seen {
        vote: Some(stored_vote(&metrics.vote)),
        leads,
        committed: metrics.local_committed.as_ref().map(position),
        has,
        lost,
        // What it may have had counts as what it has: its own doubt is not to be forgotten by asking it.
        last: cluster.inner.log.last().max(cluster.inner.log.doubt()),
        matched: progress.and_then(|p| p.get(&asker)).and_then(|at| at.as_ref()).map(position),
    }
}

/// What it tells before it takes part: what is left of its log. So two nodes that forgot something do not wait for each other.
pub(crate) fn seen_before(cluster: &Cluster) -> Seen {
    let log = &cluster.inner.log;
    let last = log.last().max(cluster.inner.state_machine.position());
    let (has, lost) = log.has();
    Seen {
        vote: log.vote(),
        committed: log.committed(),
        has,
        lost,
        last: last.max(log.doubt()),
        ..Seen::default()
    }
}

/// The vote of a node that may have forgotten its own: it has voted in the highest term that anybody knows, for nobody that could
/// be elected by it.
fn spent(own: u64, known: Option<Vote>, answers: &BTreeMap<u64, Seen>) -> Option<Vote> {
    let highest = answers.values().filter_map(|seen| seen.vote).map(|vote| vote.term).max();
    let highest = highest.max(known.map(|vote| vote.term))?;
    match known.filter(|vote| vote.term == highest && vote.committed) {
        Some(vote) => Some(vote),
        None => Some(Vote { term: highest, node: own, committed: false }),
    }
}

/// Up to where a leader among them saw this node acknowledge entries.
fn acknowledged(answers: &BTreeMap<u64, Seen>) -> Option<LogPosition> {
    answers.values().filter_map(|seen| seen.matched).max()
}

/// Up to where entries may have been committed with this node's help, all others being heard: at least one of them has each.
fn longest(answers: &BTreeMap<u64, Seen>) -> Option<LogPosition> {
    answers.values().filter_map(|seen| seen.last).max().max(acknowledged(answers))
}

/// What a node begins with that cannot tell by itself what it promised, once all others are heard.
fn all_heard(
    own: u64,
    answers: &BTreeMap<u64, Seen>,
    vote: Option<Vote>,
    last: Option<LogPosition>,
    void_but: Option<LogIndex>,
) -> Reset {
    Reset { vote: spent(own, vote, answers), last: last.max(longest(answers)), void_but }
}

/// With what a damaged log begins anew. Waits for as many peers as it takes.
pub(crate) async fn reset(mut others: Others, damage: &Damage) -> Reset {
    let own = others.own();
    let void_but = damage.committed.map(|at| at.index);
    let mut answers = others.ask().await;
    let mut ends_well = damage.end_is_whole;
    let mut said = None;
    loop {
        // Also of whoever answers late.
        ends_well &= !knows_better(own, &answers, damage.vote, damage.last);
        let waits_for =
            what_is_missing(ends_well, answers.len() == others.count(), (damage.last, void_but), &answers);
        let Some(waits_for) = waits_for else {
            return match ends_well {
                true => Reset { vote: damage.vote, last: damage.last, void_but },
                false => all_heard(own, &answers, damage.vote, damage.last, void_but),
            };
        };
        if said.is_none_or(|(before, at)| before != waits_for || clock::now() >= at + SAY_AGAIN) {
            said = Some((waits_for, clock::now()));
            tracing::error!(%damage, last = ?damage.last, heard = ?answers.keys(), "{waits_for}");
        }
        tokio::time::sleep(AGAIN).await;
        answers = others.ask().await;
    }
}

/// For what a node waits before it voids what is left of its log; nothing if it need not. Its own entries may be the only ones left of
/// what was acknowledged: they stay until somebody who takes part has as many.
fn what_is_missing(
    ends_well: bool,
    all_are_heard: bool,
    (last, void_but): (Option<LogPosition>, Option<LogIndex>),
    answers: &BTreeMap<u64, Seen>,
) -> Option<&'static str> {
    if !ends_well && !all_are_heard {
        return Some("what was written last is damaged: waiting for all other nodes, as a vote may be lost");
    }
    // Bodies up to `void_but` are not given up here: that somebody lacks one of those is no matter.
    let is_there = last.is_none() || answers.values().any(|seen| seen.has >= last && seen.lost <= void_but);
    (!is_there).then_some(
        "older records are damaged, and no node that answers has all entries that stand behind them here: nothing is given up, waiting for one \
         that has them",
    )
}

/// Whether a peer remembers more of this node's promises than the node itself: a leader saw it acknowledge more, or somebody follows
/// it in a term of which it knows nothing.
fn knows_better(
    own: u64,
    answers: &BTreeMap<u64, Seen>,
    vote: Option<Vote>,
    last: Option<LogPosition>,
) -> bool {
    let voted = |seen: &Seen| seen.vote.filter(|vote| vote.node == own).map(|vote| vote.term);
    acknowledged(answers) > last || answers.values().filter_map(voted).max() > vote.map(|vote| vote.term)
}

/// Whether this node may have promised what its log does not tell: it was cut where it is ambiguous whether somebody was told of what
/// stood there, or a leader saw this node acknowledge more than it has, so that its files are an old copy. Then all others are heard,
/// and what may be lost is noted, durably, before this node takes part.
///
/// # Errors
/// If it cannot be noted.
pub(crate) async fn notice_loss(
    cluster: &Cluster,
    mut others: Others,
    ambiguous: bool,
) -> Result<(), String> {
    let log = &cluster.inner.log;
    let own = others.own();
    let mut answers = others.ask().await;
    // A doubt that was noted before is no news, nor is a snapshot whose floor was not written any more.
    let known = log.last().max(log.doubt()).max(cluster.inner.state_machine.position());
    if !ambiguous && !knows_better(own, &answers, log.vote(), known) {
        return Ok(());
    }
    match ambiguous {
        true => tracing::warn!(
            "the log's tail is ambiguous: hearing all other nodes, as this one may have promised more"
        ),
        false => tracing::error!(
            acknowledged = ?acknowledged(&answers),
            found = ?log.last(),
            "the log is shorter than what this node acknowledged: an old copy, or damage; hearing all other nodes"
        ),
    }
    while answers.len() < others.count() {
        tokio::time::sleep(AGAIN).await;
        answers = others.ask().await;
    }
    let reset = all_heard(own, &answers, log.vote(), known, None);
    let (tell, told) = oneshot::channel();
    log.note(reset, Box::new(move |result| drop(tell.send(result))));
    told.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    log.end_ambiguity().map_err(|e| format!("superblock: {e}"))
}

/// Waits until this node has what it may have acknowledged, and has applied what its leader knows to be committed.
pub(crate) async fn catch_up(cluster: &Cluster) {
    tracing::warn!("this node holds back until it has from its leader what it lost");
    let mut target = None;
    loop {
        if target.is_none() {
            let answers = ask(&cluster.peers()).await;
            // The newest, if an old one does not yet know that it is over.
            let leader =
                answers.into_values().filter(|seen| seen.leads).max_by_key(|seen| seen.vote.map(|v| v.term));
            target = leader.map(|seen| seen.committed.map_or(0, |at| at.index.0 + 1));
        }
        let applied = *cluster.inner.applied.borrow();
        if target.is_some_and(|target| applied >= target) && cluster.inner.log.doubt().is_none() {
            tracing::info!(applied, "this node has what it lost, and holds back no more");
            return;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Fetches the bodies that entries of the log lack, before anybody reads these. An entry that is not known to be committed may be one
/// that no other node has: if nobody can help, it and what follows are given up, as if they were lost in a crash that the node
/// remembers.
///
/// # Errors
/// The reason, if every other node has answered, none has the body of a committed entry, and that is to be said loudly.
pub(crate) async fn mend_entries(cluster: &Cluster) -> Result<(), String> {
    let log = &cluster.inner.log;
    let lost = log.lost().into_iter().filter(|lost| log.term_of(lost.index).is_some());
    let lost: Vec<LostBody> = lost.collect();
    if lost.is_empty() {
        return Ok(());
    }
    let mut holders = Holders::now(cluster).await;
    for lost in lost {
        let LostBody { index, .. } = lost;
        if let Err(why) = mend_one(cluster, &mut holders, lost).await {
            if is_committed(*cluster.inner.applied.borrow(), log.committed(), index) {
                return Err(why);
            }
            let reset = Reset { vote: log.vote(), last: log.last(), void_but: None };
            tracing::warn!(from = %index, "entries that were not known to be committed are given up: {why}");
            let (tell, told) = oneshot::channel();
            log.note(reset, Box::new(move |result| drop(tell.send(result))));
            told.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
            log.truncate_from(index);
            return Ok(());
        }
    }
    Ok(())
}

/// Fetches the bodies that the state needs and this node lacks. Those that it does not need are erased.
///
/// # Errors
/// The reason, if every other node has answered and none has one that is needed.
pub(crate) async fn mend(
    cluster: &Cluster,
    applied: Option<LogPosition>,
    needed: &BTreeSet<LogIndex>,
) -> Result<(), String> {
    let log = &cluster.inner.log;
    let mut wanted = Vec::new();
    for lost in log.lost() {
        match applied.is_some_and(|at| lost.index <= at.index) && !needed.contains(&lost.index) {
            true => log.erase(lost.index),
            false if may_be_needed(cluster, lost.index) => wanted.push(lost),
            false => {}
        }
    }
    // Behind damage that was dealt with before there may have been more: what the state needs and the log does not have.
    let known: BTreeSet<LogIndex> = wanted.iter().map(|lost| lost.index).collect();
    let missing = needed.iter().filter(|index| !known.contains(index) && !log.has_body(**index));
    wanted.extend(missing.map(|index| LostBody { index: *index, bytes: 0, crc: None }));
    let mut holders = Holders::now(cluster).await;
    for lost in wanted {
        mend_one(cluster, &mut holders, lost).await?;
    }
    Ok(())
}

/// Who may have what this node lacks.
struct Holders {
    peers: BTreeMap<u64, Peer>,
    /// Of them, who must have been heard before it is said that nobody has it.
    needed: BTreeSet<u64>,
}

impl Holders {
    /// Before consensus runs the log's own membership may be an old one: the others are asked for the newest, whose voters count. Whoever
    /// was a member before may have it all the same.
    async fn now(cluster: &Cluster) -> Holders {
        let inner = &cluster.inner;
        let mut peers = cluster.peers();
        if inner.raft.get().is_some() {
            let needed = peers.keys().copied().collect();
            return Holders { peers, needed };
        }
        let mut others = Others::new(inner.local.clone(), inner.found.clone(), peers.clone());
        others.ask().await;
        let newest = others.peers();
        let needed = newest.keys().copied().collect();
        peers.extend(newest);
        Holders { peers, needed }
    }
}

/// Fetches what is found damaged while the node runs. Ends with the node.
pub(crate) async fn watch(cluster: Cluster) {
    let log = &cluster.inner.log;
    let mut said = None;
    loop {
        tokio::time::sleep(LOOK).await;
        for lost in log.lost().into_iter().filter(|lost| may_be_needed(&cluster, lost.index)) {
            let fetched = fetch(&cluster, &Holders::now(&cluster).await, lost).await;
            if is_settled(&cluster, lost.index) {
                log.erase(lost.index);
                continue;
            }
            // Its message waits: it is not handed off without its octets, and not taken for erased.
            let now = clock::now();
            if let Err(why) = fetched
                && said.is_none_or(|said| now > said + SAY_AGAIN)
            {
                said = Some(now);
                tracing::error!("{why}");
            }
        }
    }
}

/// Whether an entry of the log or the state as it is can need a body. One that is neither came with a snapshot which was not completed, and
/// comes again with the next.
fn may_be_needed(cluster: &Cluster, index: LogIndex) -> bool {
    *cluster.inner.applied.borrow() > index.0 || cluster.inner.log.term_of(index).is_some()
}

/// Whether the entry was applied here and the state does not need its body any more.
fn is_settled(cluster: &Cluster, index: LogIndex) -> bool {
    *cluster.inner.applied.borrow() > index.0 && !cluster.inner.is_needed(index)
}

/// Whether an entry is known to be committed, when the state has applied all before `next` and the log knows this position to be: the state
/// may be ahead, since it came by snapshot.
fn is_committed(next: u64, known: Option<LogPosition>, index: LogIndex) -> bool {
    index.0 < next || known.is_some_and(|known| index <= known.index)
}

async fn mend_one(cluster: &Cluster, holders: &mut Holders, lost: LostBody) -> Result<(), String> {
    let LostBody { index, .. } = lost;
    let mut said = false;
    // It may be settled, or become so meanwhile.
    while !is_settled(cluster, index) {
        match fetch(cluster, holders, lost).await {
            Ok(Fetched::Done) => break,
            Ok(Fetched::NotYet) => {}
            Err(_) if is_settled(cluster, index) => break,
            Err(why) => return Err(why),
        }
        if !said {
            let place = cluster.inner.log.lost_place(index).unwrap_or_default();
            tracing::error!(%index, place, "the damage to a body is still to be mended: not all nodes can be asked for it yet");
            said = true;
        }
        tokio::time::sleep(AGAIN).await;
        *holders = Holders::now(cluster).await;
    }
    if is_settled(cluster, index) {
        cluster.inner.log.erase(index);
    }
    Ok(())
}

/// What came of asking for a body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fetched {
    /// It is here again, or need not be.
    Done,
    /// Somebody who may have it does not answer.
    NotYet,
}

/// Gets one body from whoever has it. One that was erased on purpose elsewhere is erased here.
///
/// # Errors
/// The reason, if every other node has answered and none has it.
async fn fetch(cluster: &Cluster, holders: &Holders, lost: LostBody) -> Result<Fetched, String> {
    let LostBody { index, bytes, crc } = lost;
    let log = &cluster.inner.log;
    let is_committed = is_committed(*cluster.inner.applied.borrow(), log.committed(), index);
    let mut heard = BTreeSet::new();
    for (id, peer) in &holders.peers {
        // Answered only by one that has applied the entry: another one may have another leader's under this index.
        let digest = match peer.ask(Request::Digest(index), Vec::new(), ASK).await {
            Ok((answer @ (Answer::Digest(..) | Answer::BodyGone), _)) => Some(answer),
            _ => None,
        };
        let told = match digest {
            Some(Answer::Digest(bytes, crc)) => Some((bytes, crc)),
            _ => None,
        };
        // Only the very octets count: those of this node's own header, or else of the committed entry.
        let expected = crc.map(|crc| (bytes, crc)).or(told);
        match peer.ask(Request::Body(index), Vec::new(), REQUEST).await {
            Ok((Answer::Body, body)) if Some((body.len() as u32, crc32fast::hash(&body))) == expected => {
                let (tell, told) = oneshot::channel();
                let body = Bytes::copy_from_slice(&body);
                log.mend_body(index, body, Box::new(move |result| drop(tell.send(result))));
                told.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
                tracing::warn!(%index, "a damaged body was fetched from another node");
                return Ok(Fetched::Done);
            }
            // Whose octets nobody can vouch for yet may be the right ones.
            Ok((Answer::Body, _)) if expected.is_none() => {}
            Ok((Answer::Body | Answer::BodyDamaged, _)) => drop(heard.insert(*id)),
            Ok((Answer::BodyGone, _)) => match digest {
                // It has applied what the entry's story ended with; so will this node.
                Some(Answer::BodyGone) if is_committed => {
                    log.erase(index);
                    return Ok(Fetched::Done);
                }
                Some(_) => drop(heard.insert(*id)),
                None => {}
            },
            _ => {}
        }
    }
    if !holders.needed.is_subset(&heard) {
        return Ok(Fetched::NotYet);
    }
    let place = log.lost_place(index).unwrap_or_else(|| "no place".into());
    let head = log.head(index).ok().flatten();
    let entry = head.map(|(at, head)| StoredEntry { at, head, body: Bytes::new() });
    let command = match entry.and_then(|entry| entry_from_stored(entry).ok()).map(|entry| entry.payload) {
        Some(EntryPayload::Normal(proposal)) => Some(proposal.command),
        _ => None,
    };
    let machine = cluster.inner.machine.lock().unwrap_or_else(PoisonError::into_inner);
    let owners = machine.owners(index, command.as_deref());
    let owners = if owners.is_empty() { "no message that this node knows".into() } else { owners.join(", ") };
    Err(format!(
        "the body of entry {index} is damaged here, at {place}, and no other node has it; it belongs to {owners}. This node \
         will not go on as if it had been erased: restore its directory or another node's from a copy"
    ))
}

#[cfg(test)]
mod tests {
    use holdfast_storage::Term;

    use super::*;

    fn at(term: u64, index: u64) -> LogPosition {
        LogPosition { term: Term(term), index: LogIndex(index) }
    }

    fn vote(term: u64, node: u64, committed: bool) -> Vote {
        Vote { term: Term(term), node, committed }
    }

    /// Node 3 led term 3 and committed 3.107 with node 2, while node 1 was away with a 2.107 of its own. Then node 3 loses what it
    /// wrote last, and with it all memory of term 3. Node 1 stands for term 4.
    #[test]
    fn p1_who_forgot_its_end_votes_for_nobody_who_lacks_what_it_committed() {
        let one = Seen { vote: Some(vote(2, 1, true)), last: Some(at(2, 107)), ..Seen::default() };
        let two = Seen { vote: Some(vote(3, 3, true)), last: Some(at(3, 107)), ..Seen::default() };
        let answers = BTreeMap::from([(1, one), (2, two)]);
        let reset = all_heard(3, &answers, Some(vote(1, 1, true)), Some(at(1, 40)), None);
        assert_eq!(reset.last, Some(at(3, 107)));
        assert!(one.last < reset.last, "node 1 does not get this vote");
        assert!(two.last >= reset.last, "node 2 does");
        assert_eq!(reset.vote, Some(vote(3, 3, false)), "term 3 is spent");
    }

    #[test]
    fn p9_what_is_left_is_given_up_only_for_somebody_who_has_as_much() {
        let has = |has, last| Seen { has: Some(has), last: Some(last), ..Seen::default() };
        let (short, long) = (has(at(2, 95), at(2, 95)), has(at(2, 100), at(2, 100)));
        let forgetful = has(at(2, 95), at(2, 100));
        let mine = Some(at(2, 100));
        let answers = |seen: &[Seen]| (2..).zip(seen.iter().copied()).collect::<BTreeMap<u64, Seen>>();
        let mine = (mine, Some(LogIndex(90)));
        let waits =
            |ends_well, all, seen: &[Seen]| what_is_missing(ends_well, all, mine, &answers(seen)).is_some();
        let lacks = |index| Seen { lost: Some(LogIndex(index)), ..long };
        assert!(waits(true, true, &[short, lacks(100)]), "the body that stands here may be the last");
        assert!(!waits(true, true, &[short, lacks(90)]), "that one is kept here");
        assert!(waits(true, false, &[]), "nobody answers");
        assert!(waits(true, true, &[short, short]), "what stands here may be the last copy");
        assert!(waits(true, true, &[short, forgetful]), "who may have had it does not have it");
        assert!(!waits(true, false, &[long]) && !waits(true, false, &[has(at(3, 97), at(3, 97))]));
        assert!(waits(false, false, &[long]), "a vote may be lost");
        assert!(!waits(false, true, &[long, short]));
        assert!(what_is_missing(true, false, (None, None), &answers(&[])).is_none(), "nothing is left");
    }

    /// The state came by snapshot, and is ahead of a log that ends before it.
    #[test]
    fn p9_what_the_state_has_is_committed() {
        assert!(is_committed(10, Some(at(1, 3)), LogIndex(9)));
        assert!(!is_committed(10, Some(at(1, 3)), LogIndex(10)));
        assert!(is_committed(0, Some(at(1, 3)), LogIndex(3)));
        assert!(!is_committed(0, Some(at(1, 3)), LogIndex(4)) && !is_committed(0, None, LogIndex(0)));
    }

    #[test]
    fn p1_a_vote_that_may_be_lost_is_spent() {
        let seen = |vote| BTreeMap::from([(1, Seen { vote: Some(vote), ..Seen::default() })]);
        // A known leader of the highest term may be followed.
        assert_eq!(spent(3, Some(vote(5, 2, true)), &seen(vote(4, 1, true))), Some(vote(5, 2, true)));
        // Somebody stood in term 6, and this node may have voted for him.
        assert_eq!(spent(3, Some(vote(5, 2, true)), &seen(vote(6, 1, false))), Some(vote(6, 3, false)));
        assert_eq!(spent(3, Some(vote(5, 2, false)), &seen(vote(5, 1, false))), Some(vote(5, 3, false)));
        assert_eq!(spent(3, None, &BTreeMap::new()), None);
    }
}
