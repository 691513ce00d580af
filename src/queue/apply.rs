//! Pure. What each command does to the queue. Every node computes the same from the same commands.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use holdfast_cluster::{
    Applied, ApplyError, Delta, Found, LogIndex, LogPosition, Machine, ReadError, Reading, Refusal, Rows,
    Step, Whole,
};

use super::command::{Answer, Command, Fate, Notice, Outcome, PieceRef, RouteChange};
use super::level;
use super::message::{Envelope, Message, MessageId, State, Tick};
use super::messages::{Messages, Page, Totals};
use super::tables::{RouteEntry, Tables};
use super::traces;

/// Settled and withdrawn ids are remembered for this much cluster time. Longer than a message may be proposed again: its client
/// is kept waiting for at most twice `accept_timeout`, which the node file bounds to [`ACCEPT_TIMEOUT_MAX_MS`].
pub const WINDOW_MS: u64 = 4 * 60 * 1000;

/// Longest `accept_timeout`.
pub const ACCEPT_TIMEOUT_MAX_MS: u64 = 60 * 1000;

// Twice the timeout, and as much again for clocks of nodes that run ahead of the committed tick.
const _: () = assert!(WINDOW_MS >= 4 * ACCEPT_TIMEOUT_MAX_MS);

/// Pieces of a message that is not accepted are forgotten after this much cluster time without another one.
pub const ORPHAN_MS: u64 = 10 * 60 * 1000;

/// Octets of pieces of messages that are not accepted yet, over all nodes.
pub const PIECE_BYTES_MAX: u64 = 4 << 30;

/// What the leader's scheduler needs to hear of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// A message came into the queue.
    Added(MessageId),
    /// A message left it, settled.
    Left(MessageId),
    /// Routes changed.
    Routes,
}

/// A walk through the queue in steps. What is added ahead of it is met later, and not noted in the journal.
#[derive(Clone, Copy, Default)]
struct Survey {
    seen: Option<MessageId>,
}

/// Pieces of a message that is not accepted yet.
#[derive(Clone, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub(super) struct Pieces {
    pub(super) parts: BTreeMap<u32, (LogIndex, PieceRef)>,
    pub(super) last: Tick,
}

/// The queue.
#[derive(Default)]
pub struct Queue {
    pub(super) messages: Messages,
    pub(super) tables: Tables,
    pub(crate) piece_bytes: u64,
    /// Set while this node leads: what changed, for its scheduler.
    journal: Option<Vec<Change>>,
    /// How far its scheduler has come in looking at the whole queue; `None` once it has seen all.
    survey: Option<Survey>,
    /// Leader only, not replicated: messages of which a transaction was opened, and those that are being withdrawn.
    opened: BTreeSet<MessageId>,
    withdrawing: BTreeSet<MessageId>,
    /// Leader only, not replicated: set while new mail could not be placed for want of room.
    no_room: bool,
    /// This node only: messages that left and whose octets are not yet overwritten, by their first body. Told to the log.
    erasing: BTreeMap<LogIndex, MessageId>,
}

impl Queue {
    /// Cluster time as far as it was committed.
    pub fn now(&self) -> Tick {
        self.tables.now
    }

    /// The cluster's feature level; see `level`.
    pub fn level(&self) -> u8 {
        self.tables.level()
    }

    /// Up to `max` messages above `after`: the queue is walked in pages, since it may be larger than memory.
    pub fn page(&self, after: Option<MessageId>, max: usize) -> Page {
        self.messages.page(after, max)
    }

    /// Up to `max` ids above `after`, in rising order.
    pub fn ids(&self, after: Option<MessageId>, max: usize) -> Vec<MessageId> {
        self.messages.ids(after, max)
    }

    /// Whether a message is here.
    pub fn contains(&self, id: MessageId) -> bool {
        self.messages.contains(id)
    }

    /// A message. One that cannot be read is not here: its node is ending, since a row that the state needs is unreadable.
    pub fn message(&self, id: MessageId) -> Option<Arc<Message>> {
        self.messages.get(id).unwrap_or_else(|error| {
            tracing::error!(%id, %error, "a message cannot be read");
            None
        })
    }

    /// How many messages are waiting, and their octets.
    pub fn totals(&self) -> Totals {
        self.messages.totals()
    }

    /// How many messages are in this node's memory; the others are read where they are needed.
    pub fn young(&self) -> usize {
        self.messages.young()
    }

    /// All routes.
    pub fn routes(&self) -> &BTreeMap<String, RouteEntry> {
        &self.tables.routes
    }

    /// What stands for a domain in the table of routes, and under which name: its own, else that of the nearest `.parent`, else
    /// `*`.
    pub fn route(&self, domain: &str) -> Option<(&str, &RouteEntry)> {
        let routes = &self.tables.routes;
        let entry = |name: &str| routes.get_key_value(name).map(|(name, entry)| (name.as_str(), entry));
        if let Some(found) = entry(domain) {
            return Some(found);
        }
        let mut rest = domain;
        while let Some(at) = rest.find('.') {
            if let Some(found) = entry(&rest[at..]) {
                return Some(found);
            }
            rest = &rest[at + 1..];
        }
        entry("*")
    }

    /// Begins to keep a journal of changes: this node leads and schedules from now on.
    pub fn begin_journal(&mut self) {
        self.journal = Some(Vec::new());
        self.survey = Some(Survey::default());
        self.opened.clear();
        self.withdrawing.clear();
    }

    /// Whether new mail is taken, as far as there is room for it on the disks of the cluster. Counts while this node leads.
    pub fn set_takes_mail(&mut self, takes_mail: bool) {
        self.no_room = !takes_mail;
    }

    /// See [`Queue::set_takes_mail`].
    pub fn takes_mail(&self) -> bool {
        !self.no_room
    }

    /// Ends the journal: this node leads no more.
    pub fn end_journal(&mut self) {
        self.no_room = false;
        self.journal = None;
        self.survey = None;
        self.opened.clear();
        self.withdrawing.clear();
    }

    /// What changed since the last call.
    pub fn take_journal(&mut self) -> Vec<Change> {
        self.journal.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Begins to look at the whole queue again.
    pub fn begin_survey(&mut self) {
        self.survey = Some(Survey::default());
    }

    /// The next messages of the whole queue, up to `max`; `None` once all were seen.
    pub fn survey(&mut self, max: usize) -> Option<Page> {
        let page = self.messages.page(self.survey?.seen, max);
        self.survey = page.last.map(|last| Survey { seen: Some(last) });
        self.survey.map(|_| page)
    }

    /// Whether the survey is still to come to a message.
    pub fn is_ahead(&self, id: MessageId) -> bool {
        self.survey.is_some_and(|survey| survey.seen.is_none_or(|seen| id > seen))
    }

    /// Marks a message as being delivered, unless it has left or is being withdrawn. From here on it is never taken back
    /// in this term.
    pub fn open(&mut self, id: MessageId) -> Option<Arc<Message>> {
        if self.journal.is_none() || self.withdrawing.contains(&id) {
            return None;
        }
        let message = self.message(id)?;
        self.opened.insert(id);
        Some(message)
    }

    /// The message that left and whose octets began with this body, which is overwritten now.
    pub fn erased(&mut self, body: LogIndex) -> Option<MessageId> {
        self.erasing.remove(&body)
    }

    fn note(&mut self, change: Change) {
        if let Some(journal) = &mut self.journal {
            journal.push(change);
        }
    }

    fn insert(&mut self, message: Message) {
        let id = message.id;
        self.messages.insert(message);
        self.note_added(id);
    }

    fn note_added(&mut self, id: MessageId) {
        if !self.is_ahead(id) {
            self.note(Change::Added(id));
        }
    }

    /// Takes a message out of the queue; its bodies die.
    fn leave(&mut self, message: &Message, erase: &mut Vec<LogIndex>) {
        self.messages.remove(message);
        if let Some(first) = message.bodies.first() {
            self.erasing.insert(*first, message.id);
        }
        erase.extend_from_slice(&message.bodies);
        self.opened.remove(&message.id);
    }

    /// Tells the scheduler of a message again: a connection of an earlier term has let go of it.
    pub fn reschedule(&mut self, id: MessageId) {
        if self.messages.contains(id) {
            self.note_added(id);
        }
    }

    fn drop_pieces(&mut self, id: MessageId, erase: &mut Vec<LogIndex>) {
        if let Some(pieces) = self.tables.pieces.remove(&id) {
            for (index, piece) in pieces.parts.into_values() {
                self.piece_bytes -= piece.bytes as u64;
                erase.push(index);
            }
        }
    }

    /// What the queue knows of an id already. One whose pieces are still coming in is new, however slow its client.
    fn known(&self, id: MessageId) -> Option<Answer> {
        match self.tables.window.get(&id) {
            _ if self.messages.contains(id) => Some(Answer::Accepted),
            _ if self.tables.pieces.contains_key(&id) => None,
            Some(true) => Some(Answer::Withdrawn),
            Some(false) => Some(Answer::Accepted),
            None if id.born().0 + WINDOW_MS < self.tables.now.0 => Some(Answer::TooOld),
            None => None,
        }
    }

    fn accept(
        &mut self,
        at: LogPosition,
        id: MessageId,
        envelope: Envelope,
        size: u64,
        pieces: Vec<PieceRef>,
        erase: &mut Vec<LogIndex>,
    ) -> Answer {
        // A second copy of a message that is known: its octets are not needed.
        let known = self.known(id);
        if let Some(answer) = known {
            erase.push(at.index);
            if answer != Answer::Accepted {
                self.drop_pieces(id, erase);
            }
            return answer;
        }
        let bodies = if pieces.is_empty() {
            vec![at.index]
        } else {
            let found = self.tables.pieces.get(&id).map(|p| &p.parts);
            let matches = found.is_some_and(|parts| {
                parts.len() == pieces.len()
                    && parts
                        .iter()
                        .zip(&pieces)
                        .enumerate()
                        .all(|(n, ((seq, (_, have)), want))| *seq == n as u32 && have == want)
                    && pieces.iter().map(|p| p.bytes as u64).sum::<u64>() == size
            });
            if !matches {
                self.drop_pieces(id, erase);
                self.tables.window.insert(id, true);
                return Answer::PiecesMissing;
            }
            self.piece_bytes -= size;
            let parts = self.tables.pieces.remove(&id).unwrap_or_default().parts;
            parts.into_values().map(|(index, _)| index).collect()
        };
        let accepted = (at.term.0, at.index);
        self.insert(Message { id, envelope, size, accepted, bodies });
        Answer::Accepted
    }

    fn piece(
        &mut self,
        at: LogPosition,
        id: MessageId,
        seq: u32,
        piece: PieceRef,
        erase: &mut Vec<LogIndex>,
    ) -> Answer {
        let known = self.known(id);
        if let Some(answer) = known {
            erase.push(at.index);
            return answer;
        }
        if self.piece_bytes + piece.bytes as u64 > PIECE_BYTES_MAX {
            erase.push(at.index);
            return Answer::NoRoom;
        }
        let now = self.tables.now;
        let pieces = self.tables.pieces.entry(id).or_default();
        pieces.last = now;
        match pieces.parts.entry(seq) {
            // Proposed again to a new leader.
            Entry::Occupied(_) => erase.push(at.index),
            Entry::Vacant(free) => {
                free.insert((at.index, piece));
                self.piece_bytes += piece.bytes as u64;
            }
        }
        Answer::Done
    }

    fn withdraw(
        &mut self,
        at: LogPosition,
        id: MessageId,
        erase: &mut Vec<LogIndex>,
    ) -> Result<Answer, ReadError> {
        self.withdrawing.remove(&id);
        match self.messages.get(id)? {
            // A later leader schedules messages of earlier terms always, so only the accepting term may take it back.
            Some(message) if message.accepted.0 != at.term.0 => return Ok(Answer::Stands),
            // Settled in part means started.
            Some(message) if message.envelope.recipients.iter().any(|r| r.state != State::Pending) => {
                return Ok(Answer::Stands);
            }
            Some(message) => self.leave(&message, erase),
            None => match self.tables.window.get(&id) {
                Some(true) => return Ok(Answer::Withdrawn),
                Some(false) => return Ok(Answer::Stands),
                // It may have been accepted, handed off and forgotten: nothing can be said of it.
                None if self.known(id) == Some(Answer::TooOld) => return Ok(Answer::TooOld),
                None => self.drop_pieces(id, erase),
            },
        }
        self.tables.window.insert(id, true);
        Ok(Answer::Withdrawn)
    }

    fn settle(
        &mut self,
        at: LogPosition,
        outcomes: Vec<Outcome>,
        notice: Option<Notice>,
        body_bytes: u32,
        erase: &mut Vec<LogIndex>,
    ) -> Result<Answer, ReadError> {
        let mut told = false;
        for outcome in outcomes {
            let number = outcome.recipient as usize;
            let Some(message) = self.messages.get(outcome.id)? else { continue };
            if message.envelope.recipients.get(number).is_none_or(|r| r.state != State::Pending) {
                continue;
            }
            told |= matches!(outcome.fate, Fate::Failed | Fate::Expired);
            let message = self.messages.change(message, |message| {
                let recipient = &mut message.envelope.recipients[number];
                recipient.last_reply = outcome.reply;
                recipient.state = match outcome.fate {
                    Fate::Delivered => State::Delivered,
                    Fate::Failed => State::Failed,
                    Fate::Expired => State::Expired,
                    Fate::Removed => State::Removed,
                    Fate::Deferred => {
                        recipient.attempts += 1;
                        State::Pending
                    }
                };
            });
            if message.pending().next().is_none() {
                self.leave(&message, erase);
                self.tables.window.insert(outcome.id, false);
                self.note(Change::Left(outcome.id));
            }
        }
        match notice {
            // Neither lost nor doubled: it counts if and only if this entry settled somebody whose sender is to be told.
            Some(Notice { id, envelope }) if told && !self.messages.contains(id) => {
                let accepted = (at.term.0, at.index);
                self.insert(Message {
                    id,
                    envelope,
                    size: body_bytes as u64,
                    accepted,
                    bodies: vec![at.index],
                });
            }
            _ => erase.push(at.index),
        }
        Ok(Answer::Done)
    }

    fn change_route(
        &mut self,
        at: LogPosition,
        domain: String,
        change: RouteChange,
        only_if: Option<LogIndex>,
    ) -> Answer {
        // A leader refuses it before it is written; one that had not yet applied what it should have known might not.
        if level::of_change(&change) > self.level() {
            return Answer::LevelTooLow;
        }
        let stands = self.tables.routes.get(&domain).map(|entry| entry.made_by);
        if only_if.is_some() && only_if != stands {
            return Answer::Changed;
        }
        self.note(Change::Routes);
        let since = self.tables.now;
        let route = match change {
            RouteChange::Set(route) => Some(route),
            RouteChange::Hold => None,
            RouteChange::Remove => {
                self.tables.routes.remove(&domain);
                return Answer::Done;
            }
        };
        self.tables.routes.insert(domain, RouteEntry { route, since, made_by: at.index });
        Answer::Done
    }

    fn tick(&mut self, now: Tick, erase: &mut Vec<LogIndex>) {
        self.tables.now = self.tables.now.max(now);
        let horizon = self.tables.now.0.saturating_sub(WINDOW_MS);
        let oldest = MessageId::new(Tick(horizon), 0, 0, 0);
        self.tables.window = self.tables.window.split_off(&oldest);
        let orphaned: Vec<MessageId> = self
            .tables
            .pieces
            .iter()
            .filter(|(_, p)| p.last.0 + ORPHAN_MS < self.tables.now.0)
            .map(|(id, _)| *id)
            .collect();
        for id in orphaned {
            self.drop_pieces(id, erase);
            self.tables.window.insert(id, true);
        }
    }
}

impl Machine for Queue {
    fn attach(&mut self, rows: Arc<dyn Rows>) {
        self.messages = Messages::with_rows(rows);
    }

    fn is_draining(&self, command: &[u8]) -> bool {
        match Command::decode(command) {
            // Of a message that is known nothing stays.
            Ok(Command::Accept { id, .. } | Command::Piece { id, .. }) => self.known(id).is_some(),
            _ => true,
        }
    }

    fn apply(&mut self, at: LogPosition, command: &[u8], body_bytes: u32) -> Result<Applied, ApplyError> {
        let mut erase = Vec::new();
        let answer = match Command::decode(command) {
            Ok(Command::Accept { id, envelope, size, pieces }) => {
                self.accept(at, id, envelope, size, pieces, &mut erase)
            }
            Ok(Command::Piece { id, seq, piece }) => self.piece(at, id, seq, piece, &mut erase),
            Ok(Command::Withdraw { id }) => self.withdraw(at, id, &mut erase)?,
            Ok(Command::Settle { outcomes, notice }) => {
                self.settle(at, outcomes, notice, body_bytes, &mut erase)?
            }
            Ok(Command::Tick { now }) => {
                self.tick(now, &mut erase);
                Answer::Done
            }
            Ok(Command::Route { domain, change, only_if }) => self.change_route(at, domain, change, only_if),
            Ok(Command::Level { level }) => {
                self.tables.raised_to = self.tables.raised_to.max(level);
                Answer::Done
            }
            Err(_) => match command.first() {
                Some(level) if !level::is_known(*level) => {
                    return Err(ApplyError::UnknownFeature(at.index, *level));
                }
                _ => Answer::Malformed,
            },
        };
        if cfg!(debug_assertions) {
            self.check_touched();
        }
        Ok(Applied { outcome: answer.encode(), erase })
    }

    fn admit(&mut self, command: &[u8]) -> Result<(), Refusal> {
        let command = Command::decode(command);
        if let Ok(Command::Route { change, .. }) = &command
            && level::of_change(change) > self.level()
        {
            return Err(Refusal { outcome: Answer::LevelTooLow.encode() });
        }
        if self.no_room
            && let Ok(Command::Accept { id, .. } | Command::Piece { id, .. }) = &command
            && self.known(*id).is_none()
        {
            return Err(Refusal { outcome: Answer::NoRoom.encode() });
        }
        if let Ok(Command::Withdraw { id }) = command {
            if self.opened.contains(&id) {
                return Err(Refusal { outcome: Answer::Stands.encode() });
            }
            self.withdrawing.insert(id);
        }
        Ok(())
    }

    fn give_up(&mut self, command: &[u8]) {
        if let Ok(Command::Withdraw { id }) = Command::decode(command) {
            self.withdrawing.remove(&id);
        }
    }

    fn delta(&mut self) -> Delta {
        let (rows, gone) = self.messages.delta();
        Delta { rows, gone, tables: self.tables.encode() }
    }

    fn checkpointed(&mut self) -> Vec<u128> {
        self.messages.checkpointed()
    }

    fn owners(&self, body: LogIndex, command: Option<&[u8]>) -> Vec<String> {
        match command.map(Command::decode) {
            Some(Ok(Command::Accept { id, .. } | Command::Piece { id, .. })) => {
                return vec![format!("message {id}")];
            }
            Some(Ok(Command::Settle { notice: Some(notice), .. })) => {
                return vec![format!("message {}", notice.id)];
            }
            _ => {}
        }
        let mut owners = Vec::new();
        for (id, pieces) in &self.tables.pieces {
            if pieces.parts.values().any(|(index, _)| *index == body) {
                owners.push(format!("message {id}, which is still coming in"));
            }
        }
        let each = self.messages.all().each(|message| {
            if message.bodies.contains(&body) {
                owners.push(format!("message {}", message.id));
            }
        });
        if let Err(error) = each {
            tracing::error!(%error, "not all messages can be read");
        }
        owners
    }

    fn row_owner(&self, row: &[u8]) -> Option<(Vec<LogIndex>, String)> {
        let Message { id, bodies, .. } = Message::from_row(row).ok()?;
        Some((bodies, format!("message {id}")))
    }

    fn owners_in(&self, octets: &[u8]) -> Vec<String> {
        traces::ids_in(octets).into_iter().map(|id| format!("message {id}")).collect()
    }

    fn whole(&self) -> Whole {
        let pieces = self.tables.pieces.values().flat_map(|p| p.parts.values().map(|(index, _)| *index));
        let pieces = Step { rows: Vec::new(), bodies: pieces.collect() };
        let messages = self.messages.all().map(|messages| {
            let mut step = Step::default();
            for message in messages? {
                step.rows.push((message.id.0, message.row()));
                step.bodies.extend(&message.bodies);
            }
            Ok(step)
        });
        Whole { tables: self.tables.encode(), steps: Box::new(std::iter::once(Ok(pieces)).chain(messages)) }
    }

    fn reading(&self) -> Reading {
        let rows = self.messages.rows();
        Box::new(move |tables| Ok(Box::new((Tables::decode(tables)?, Messages::of_checkpoint(rows)?))))
    }

    fn restore(&mut self, found: Found) {
        let found = found.downcast::<(Tables, Messages)>();
        let (tables, messages) = *found.expect("what the reading of this machine found");
        self.messages = messages;
        let parts = tables.pieces.values().flat_map(|p| p.parts.values());
        self.piece_bytes = parts.map(|(_, piece)| piece.bytes as u64).sum();
        self.tables = tables;
        self.end_journal();
    }
}
