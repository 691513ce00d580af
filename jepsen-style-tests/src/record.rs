//! Where all who take part write down what they see.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::history::{Event, Outcome, What};
use crate::tools::lock;

/// What is written down so far.
#[derive(Clone)]
pub struct Record {
    began: Instant,
    events: Arc<Mutex<Vec<Event>>>,
    /// Senders that wait for what a node says to their final dots: which node, and since when.
    past_dot: Arc<Mutex<BTreeMap<u64, (u64, Instant)>>>,
}

impl Record {
    /// An empty one; time begins now.
    #[expect(clippy::new_without_default, reason = "time begins")]
    pub fn new() -> Record {
        Record { began: Instant::now(), events: Arc::default(), past_dot: Arc::default() }
    }

    /// Milliseconds since the beginning.
    pub fn at(&self, moment: Instant) -> u64 {
        moment.saturating_duration_since(self.began).as_millis() as u64
    }

    /// Milliseconds until now.
    pub fn now(&self) -> u64 {
        self.at(Instant::now())
    }

    /// Writes something down that happened now.
    pub fn note(&self, what: What) {
        self.note_at(Instant::now(), what);
    }

    /// Writes something down that happened before.
    pub fn note_at(&self, moment: Instant, what: What) {
        let at = self.at(moment);
        lock(&self.events).push(Event { at, what });
    }

    /// A sender waits for a node's reply to its final dot for as long as `wait` takes.
    pub fn past_dot<T>(&self, node: u64, wait: impl FnOnce() -> T) -> T {
        let number = {
            let mut waiting = lock(&self.past_dot);
            let number = waiting.last_key_value().map_or(0, |(last, _)| last + 1);
            waiting.insert(number, (node, Instant::now()));
            number
        };
        let came = wait();
        lock(&self.past_dot).remove(&number);
        came
    }

    /// Whether a sender has waited for a node's reply to its final dot since that moment or longer.
    pub fn is_past_dot(&self, node: u64, since: Instant) -> bool {
        lock(&self.past_dot).values().any(|(whose, began)| *whose == node && *began <= since)
    }

    /// How many messages were acknowledged so far.
    pub fn acknowledged(&self) -> usize {
        let events = lock(&self.events);
        let is_ok = |e: &&Event| matches!(&e.what, What::Sent { sent, .. } if sent.outcome == Outcome::Ok);
        events.iter().filter(is_ok).count()
    }

    /// Everything, in the order of time.
    pub fn finish(&self) -> Vec<Event> {
        let mut events = std::mem::take(&mut *lock(&self.events));
        events.sort_by_key(|event| event.at);
        events
    }
}
