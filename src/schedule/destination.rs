//! Pure. One destination: how many connections it bears, and when to look whether it is back.
//!
//! | state | connections | next state |
//! | --- | --- | --- |
//! | open | up to the limit, which rises by one with each success | down, when it was not reached |
//! | down | none until the probe time, then one | open at the first success; down for longer if not reached again |

use std::collections::VecDeque;

use super::scheduler::Job;
use crate::queue::retry::Backoff;

/// How connections to one destination rise, and how its probes slow down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Connections to begin with.
    pub connections_initial: usize,
    /// Most connections.
    pub connections_max: usize,
    /// Pauses between probes.
    pub probe: Backoff,
}

/// A destination's jobs and its state.
#[derive(Debug)]
pub(super) struct Destination {
    pub(super) ready: VecDeque<Job>,
    /// Connections that are open or being opened.
    pub(super) open: usize,
    /// Those of them that wait for a job.
    pub(super) idle: usize,
    limit: usize,
    failures: u32,
    probe_at_ms: Option<u64>,
}

impl Destination {
    pub(super) fn new(pace: Pace) -> Destination {
        Destination {
            ready: VecDeque::new(),
            open: 0,
            idle: 0,
            limit: pace.connections_initial.clamp(1, pace.connections_max),
            failures: 0,
            probe_at_ms: None,
        }
    }

    /// Whether another connection should be opened now.
    pub(super) fn wants_connection(&self, now_ms: u64) -> bool {
        match self.probe_at_ms {
            _ if self.ready.is_empty() => false,
            Some(at) => self.open == 0 && now_ms >= at,
            // One that waits takes the next job; one that is being opened counts as busy, and is not overtaken.
            None => self.open < self.limit && self.ready.len() > self.idle,
        }
    }

    /// When it should be looked at again, if only time is in the way.
    pub(super) fn wakes_at_ms(&self) -> Option<u64> {
        self.probe_at_ms.filter(|_| !self.ready.is_empty() && self.open == 0)
    }

    /// It took a message, or said no to one: it is there.
    pub(super) fn reached(&mut self, pace: Pace) {
        self.failures = 0;
        self.probe_at_ms = None;
        self.limit = (self.limit + 1).min(pace.connections_max);
    }

    /// It could not be reached, or broke off. False if that was known: other connections that were opened before tell the same again,
    /// and it is no further away for that.
    pub(super) fn not_reached(&mut self, now_ms: u64, random: u32, pace: Pace) -> bool {
        if self.probe_at_ms.is_some_and(|at| now_ms < at) {
            return false;
        }
        self.failures = self.failures.saturating_add(1);
        self.limit = 1;
        self.probe_at_ms = Some(now_ms + pace.probe.pause_ms(self.failures, random));
        true
    }

    /// Looks for it at once.
    pub(super) fn probe_now(&mut self, now_ms: u64) {
        if self.probe_at_ms.is_some() {
            self.probe_at_ms = Some(now_ms);
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.ready.is_empty() && self.open == 0 && self.probe_at_ms.is_none()
    }
}
