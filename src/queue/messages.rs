//! Pure. The messages of the queue: young ones in memory, spilled ones as rows of the newest checkpoint, read through [`Rows`].
//!
//! | a message is | in memory | in the rows | until |
//! | --- | --- | --- | --- |
//! | new or changed | yes | no, or an older state | the next checkpoint writes its row |
//! | written | yes | yes | the checkpoint after that finds it unchanged: it is spilled |
//! | spilled | no | yes | it changes, and is in memory again |
//! | left | no | masked, as its row is void | the next checkpoint says so |
//!
//! So the young horizon is one to two checkpoints long, and memory is bounded by what happens within it, not by what waits. A
//! crash at any moment leaves the rows of the newest complete checkpoint, and the log applies what came after it again.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use holdfast_cluster::{Bytes, ReadError, Rows};

use super::message::{Message, MessageId};

/// Messages that are read in one step.
const READ_STEP: usize = 1000;

/// What a queue amounts to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Messages.
    pub messages: usize,
    /// Their octets.
    pub bytes: u64,
    /// Messages that were tried and put off.
    pub deferred: usize,
}

/// A message in memory.
struct Young {
    message: Arc<Message>,
    /// Whether the rows have it too, or will when the checkpoint under way is complete.
    has_row: bool,
}

/// All messages.
#[derive(Default)]
pub(super) struct Messages {
    young: BTreeMap<MessageId, Young>,
    /// Where rows are read. Without it everything stays in memory.
    rows: Option<Arc<dyn Rows>>,
    totals: Totals,
    /// In memory and newer than any row.
    dirty: BTreeSet<MessageId>,
    /// Rows of the checkpoint under way, and of the newest complete one, as far as they are still in memory and unchanged.
    writing: BTreeSet<MessageId>,
    written: BTreeSet<MessageId>,
    /// Rows that are void: since the last checkpoint was begun, and in the one under way.
    left: BTreeSet<MessageId>,
    leaving: BTreeSet<MessageId>,
}

impl Messages {
    /// No messages, and where their rows will be.
    pub(super) fn with_rows(rows: Arc<dyn Rows>) -> Messages {
        Messages { rows: Some(rows), ..Messages::default() }
    }

    pub(super) fn totals(&self) -> Totals {
        self.totals
    }

    fn row_of(&self, id: MessageId) -> Option<&Arc<dyn Rows>> {
        let masked = self.left.contains(&id) || self.leaving.contains(&id);
        self.rows.as_ref().filter(|rows| !masked && rows.contains(id.0))
    }

    pub(super) fn contains(&self, id: MessageId) -> bool {
        self.young.contains_key(&id) || self.row_of(id).is_some()
    }

    /// A message, from memory or from its row.
    pub(super) fn get(&self, id: MessageId) -> Result<Option<Arc<Message>>, ReadError> {
        if let Some(young) = self.young.get(&id) {
            return Ok(Some(young.message.clone()));
        }
        let Some(rows) = self.row_of(id) else { return Ok(None) };
        let row = rows.get(id.0)?;
        Ok(row.map(|row| {
            Arc::new(Message::from_row(&row).expect("a row has the CRC of what this version wrote"))
        }))
    }

    /// Up to `max` ids above `after`, in rising order.
    pub(super) fn ids(&self, after: Option<MessageId>, max: usize) -> Vec<MessageId> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let young = self.young.range((from, Bound::Unbounded)).take(max);
        let mut ids: BTreeSet<MessageId> = young.map(|(id, _)| *id).collect();
        let Some(rows) = &self.rows else { return ids.into_iter().collect() };
        let mut cursor = after.map(|id| id.0);
        let mut found = 0;
        while found < max {
            let keys = rows.keys(cursor, max);
            let visible = keys.iter().map(|key| MessageId(*key));
            let visible = visible.filter(|id| !self.left.contains(id) && !self.leaving.contains(id));
            let before = ids.len();
            ids.extend(visible);
            found += ids.len() - before;
            if keys.len() < max {
                break;
            }
            cursor = keys.last().copied();
        }
        ids.into_iter().take(max).collect()
    }

    fn count(&mut self, message: &Message) {
        self.totals.messages += 1;
        self.totals.bytes += message.size;
        self.totals.deferred += message.is_deferred() as usize;
    }

    fn discount(&mut self, message: &Message) {
        self.totals.messages -= 1;
        self.totals.bytes -= message.size;
        self.totals.deferred -= message.is_deferred() as usize;
    }

    /// Takes in a message that is not here yet.
    pub(super) fn insert(&mut self, message: Message) {
        let id = message.id;
        self.count(&message);
        self.dirty.insert(id);
        self.young.insert(id, Young { message: Arc::new(message), has_row: false });
    }

    /// Changes a message that is here.
    pub(super) fn change(
        &mut self,
        message: Arc<Message>,
        change: impl FnOnce(&mut Message),
    ) -> Arc<Message> {
        let id = message.id;
        self.discount(&message);
        let young = self.young.entry(id).or_insert(Young { message: message.clone(), has_row: true });
        drop(message);
        change(Arc::make_mut(&mut young.message));
        let changed = young.message.clone();
        self.count(&changed);
        self.written.remove(&id);
        self.dirty.insert(id);
        changed
    }

    /// Takes out a message that is here.
    pub(super) fn remove(&mut self, message: &Message) {
        let id = message.id;
        self.discount(message);
        self.dirty.remove(&id);
        self.written.remove(&id);
        if self.young.remove(&id).is_none_or(|young| young.has_row) {
            self.left.insert(id);
        }
    }

    /// Rows of what changed since the last call, and keys of rows that are void since.
    pub(super) fn delta(&mut self) -> (Vec<(u128, Vec<u8>)>, Vec<u128>) {
        let mut rows = Vec::with_capacity(self.dirty.len());
        for id in &self.dirty {
            if let Some(young) = self.young.get_mut(id) {
                young.has_row = true;
                rows.push((id.0, young.message.row()));
            }
        }
        self.writing = std::mem::take(&mut self.dirty);
        self.leaving = std::mem::take(&mut self.left);
        (rows, self.leaving.iter().map(|id| id.0).collect())
    }

    /// The checkpoint of the last [`Messages::delta`] is complete. Returns the keys of messages that were spilled.
    pub(super) fn checkpointed(&mut self) -> Vec<u128> {
        self.leaving.clear();
        let unchanged = |id: &MessageId| self.young.contains_key(id) && !self.dirty.contains(id);
        let writing = std::mem::take(&mut self.writing).into_iter().filter(unchanged).collect();
        let spilled = std::mem::replace(&mut self.written, writing);
        if self.rows.is_none() {
            return Vec::new();
        }
        spilled.into_iter().filter_map(|id| self.young.remove(&id).map(|_| id.0)).collect()
    }

    /// The messages of the newest checkpoint.
    pub(super) fn of_checkpoint(rows: Option<Arc<dyn Rows>>) -> Result<Messages, String> {
        let mut messages = Messages { rows, ..Messages::default() };
        let mut after = None;
        while let Some(rows) = messages.rows.clone() {
            let keys = rows.keys(after, READ_STEP);
            let Some(last) = keys.last() else { break };
            after = Some(*last);
            for (_, row) in rows.read(&keys).map_err(|e| e.to_string())? {
                messages.count(&Message::from_row(&row)?);
            }
        }
        Ok(messages)
    }

    /// Where rows are read.
    pub(super) fn rows(&self) -> Option<Arc<dyn Rows>> {
        self.rows.clone()
    }

    /// Up to `max` messages above `after`: those in memory, and the ids of those to be read.
    pub(super) fn page(&self, after: Option<MessageId>, max: usize) -> Page {
        let mut page = Page { rows: self.rows.clone(), ..Page::default() };
        for id in self.ids(after, max) {
            page.last = Some(id);
            match self.young.get(&id) {
                Some(young) => page.young.push(young.message.clone()),
                None => page.spilled.push(id.0),
            }
        }
        page
    }

    /// What a reading of all messages needs: it goes on without this.
    pub(super) fn all(&self) -> Everything {
        Everything {
            young: self.young.iter().map(|(id, young)| (*id, young.message.clone())).collect(),
            void: self.left.union(&self.leaving).copied().collect(),
            rows: self.rows.clone(),
            after: None,
        }
    }

    /// The newest message in memory.
    pub(super) fn newest(&self) -> Option<&Message> {
        self.young.last_key_value().map(|(_, young)| &*young.message)
    }

    /// How many messages are in memory.
    pub(super) fn young(&self) -> usize {
        self.young.len()
    }
}

/// A step of a walk over the queue. The queue is not locked while it is read.
#[derive(Default)]
pub struct Page {
    /// The last id, where the next page goes on; `None` if the walk is over.
    pub last: Option<MessageId>,
    young: Vec<Arc<Message>>,
    spilled: Vec<u128>,
    rows: Option<Arc<dyn Rows>>,
}

impl Page {
    /// The messages in order of their ids, as they were when the page was made or a little later. May block: not to be called
    /// with the queue locked. What cannot be read is left out, as its node is ending.
    pub fn read(mut self) -> Vec<Arc<Message>> {
        if let Some(rows) = self.rows.filter(|_| !self.spilled.is_empty()) {
            let rows = rows.read(&self.spilled).unwrap_or_default();
            self.young.extend(rows.iter().filter_map(|(_, row)| Message::from_row(row).ok()).map(Arc::new));
            self.young.sort_by_key(|message| message.id);
        }
        self.young
    }
}

/// All messages at one moment, to be read some at a time: those of the rows, and then the young ones, each kind in order. No checkpoint
/// may be completed meanwhile.
pub(super) struct Everything {
    young: BTreeMap<MessageId, Arc<Message>>,
    void: BTreeSet<MessageId>,
    /// None once all rows were read.
    rows: Option<Arc<dyn Rows>>,
    after: Option<u128>,
}

impl Everything {
    /// Reads all of them, one after the other.
    pub(super) fn each(self, mut each: impl FnMut(&Message)) -> Result<(), ReadError> {
        for messages in self {
            messages?.iter().for_each(|message| each(message));
        }
        Ok(())
    }

    fn read(&self, keys: Vec<u128>) -> Result<Vec<Arc<Message>>, ReadError> {
        let Some(rows) = &self.rows else { return Ok(Vec::new()) };
        let is_wanted = |id: MessageId| !self.void.contains(&id) && !self.young.contains_key(&id);
        let keys: Vec<u128> = keys.into_iter().filter(|key| is_wanted(MessageId(*key))).collect();
        let message =
            |row: &Bytes| Message::from_row(row).expect("a row has the CRC of what this version wrote");
        Ok(rows.read(&keys)?.iter().map(|(_, row)| Arc::new(message(row))).collect())
    }
}

impl Iterator for Everything {
    type Item = Result<Vec<Arc<Message>>, ReadError>;

    fn next(&mut self) -> Option<Result<Vec<Arc<Message>>, ReadError>> {
        let keys = self.rows.as_ref().map(|rows| rows.keys(self.after, READ_STEP)).unwrap_or_default();
        if let Some(last) = keys.last() {
            self.after = Some(*last);
            return Some(self.read(keys));
        }
        self.rows = None;
        let step: Vec<Arc<Message>> = std::iter::from_fn(|| self.young.pop_first())
            .take(READ_STEP)
            .map(|(_, message)| message)
            .collect();
        (!step.is_empty()).then_some(Ok(step))
    }
}
