//! A hand-off that stands still before the customer's reply, or before it has read all, for as long as a schedule wants.

use std::collections::BTreeMap;

/// What a customer says in the end to a message that was held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Saying {
    /// 250: it has taken it, at the final dot already.
    Taken,
    /// 554: nobody wants it.
    Refused,
    /// Nothing yet: it reads nothing of the last chunk before it is let go.
    Unread,
}

/// A hand-off that stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// Whose it is.
    pub(super) node: u64,
    /// How many recipients it is for.
    pub(super) recipients: u64,
    saying: Saying,
}

/// What is to be held, and what is.
#[derive(Default)]
pub(super) struct Hold {
    /// The message of which hand-offs are held, and what is said to each in turn.
    wanted: Option<(u64, Vec<Saying>)>,
    held: BTreeMap<usize, Held>,
    count: usize,
}

impl Hold {
    /// Of this message the first hand-offs are held, as many as there are sayings.
    pub(super) fn want(&mut self, message: u64, sayings: &[Saying]) {
        self.wanted = Some((message, sayings.to_vec()));
        self.held.clear();
        self.count = 0;
    }

    /// A customer has the final dot of a message from a node: which hold it is under, and whether it has taken the message, if it is held.
    pub(super) fn dot(&mut self, message: u64, node: u64, recipients: usize) -> Option<(usize, Saying)> {
        let saying = self.next(message).filter(|saying| *saying != Saying::Unread)?;
        Some((self.stand(node, recipients, saying), saying))
    }

    /// A node has sent a customer that a message's last chunk comes: which hold it is under.
    pub(super) fn last_chunk(&mut self, message: u64, node: u64, recipients: usize) -> Option<usize> {
        let saying = self.next(message).filter(|saying| *saying == Saying::Unread)?;
        Some(self.stand(node, recipients, saying))
    }

    fn next(&self, message: u64) -> Option<Saying> {
        let (wanted, sayings) = self.wanted.as_ref()?;
        sayings.get(self.count).copied().filter(|_| *wanted == message)
    }

    fn stand(&mut self, node: u64, recipients: usize, saying: Saying) -> usize {
        let number = self.count;
        self.count += 1;
        self.held.insert(number, Held { node, recipients: recipients as u64, saying });
        number
    }

    /// The hand-off of this number, from 0, if it stands still now.
    pub(super) fn held(&self, number: usize) -> Option<Held> {
        self.held.get(&number).copied()
    }

    /// Nothing is held any more, and nothing will be.
    pub(super) fn end(&mut self) {
        self.wanted = None;
        self.held.clear();
    }

    /// The customer says now what it has to say.
    pub(super) fn release(&mut self, number: usize) {
        self.held.remove(&number);
    }
}
