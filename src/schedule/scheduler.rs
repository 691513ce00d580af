//! Pure. All destinations, served in turn, and the jobs that wait for their time.
//!
//! A destination with a million jobs gets its turn as often as one with a single job, so nobody waits for a dead one. The
//! number of jobs is bounded by the queue.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::destination::{Destination, Pace};
use crate::queue::MessageId;

/// Names a destination: its hosts or its domain, and how TLS is used.
pub type Key = String;

/// A message with those of its recipients that go to one destination.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Job {
    /// The message.
    pub id: MessageId,
    /// Numbers of the recipients.
    pub recipients: Vec<u16>,
    /// How often it was put off.
    pub attempts: u32,
}

/// Bounds over all destinations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most connections in all.
    pub connections_max: usize,
    /// Each destination's pace.
    pub pace: Pace,
}

/// Who is next.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    destinations: BTreeMap<Key, Destination>,
    /// Destinations with ready jobs, in the order of their turns.
    turns: VecDeque<Key>,
    /// Jobs by the time at which they are ready again.
    later: BTreeMap<(u64, u64), (Key, Job)>,
    count: u64,
    open: usize,
}

impl Scheduler {
    /// A scheduler without jobs.
    pub fn new(limits: Limits) -> Scheduler {
        Scheduler {
            limits,
            destinations: BTreeMap::new(),
            turns: VecDeque::new(),
            later: BTreeMap::new(),
            count: 0,
            open: 0,
        }
    }

    /// Changes the bounds. Connections beyond them are not closed; none is opened until there are fewer.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    fn destination(&mut self, key: &Key) -> &mut Destination {
        let pace = self.limits.pace;
        self.destinations.entry(key.clone()).or_insert_with(|| Destination::new(pace))
    }

    /// Adds a job that is ready.
    pub fn add(&mut self, key: &Key, job: Job) {
        let destination = self.destination(key);
        destination.ready.push_back(job);
        if destination.ready.len() == 1 {
            self.turns.push_back(key.clone());
        }
    }

    /// Adds a job that is ready at a later time.
    pub fn add_later(&mut self, key: &Key, job: Job, at_ms: u64) {
        self.count += 1;
        self.later.insert((at_ms, self.count), (key.clone(), job));
    }

    /// Makes jobs ready whose time has come; whether there were any.
    pub fn advance(&mut self, now_ms: u64) -> bool {
        let mut any = false;
        while let Some((at, _)) = self.later.first_key_value()
            && at.0 <= now_ms
        {
            if let Some((_, (key, job))) = self.later.pop_first() {
                self.add(&key, job);
                any = true;
            }
        }
        any
    }

    /// Forgets all jobs; connections and the state of destinations stay.
    pub fn clear_jobs(&mut self) {
        self.later.clear();
        self.turns.clear();
        self.destinations.values_mut().for_each(|d| d.ready.clear());
    }

    /// A connection begins or ends to wait for a job.
    pub fn idle(&mut self, key: &Key, waits: bool) {
        let destination = self.destination(key);
        destination.idle = if waits { destination.idle + 1 } else { destination.idle.saturating_sub(1) };
    }

    /// The next destination to open a connection to, which counts as open from here on.
    pub fn open_next(&mut self, now_ms: u64) -> Option<Key> {
        if self.open >= self.limits.connections_max {
            return None;
        }
        for _ in 0..self.turns.len() {
            let key = self.turns.pop_front()?;
            let Some(destination) = self.destinations.get_mut(&key) else { continue };
            if destination.ready.is_empty() {
                continue; // it comes back with its next job
            }
            let wants = destination.wants_connection(now_ms);
            self.turns.push_back(key.clone());
            if wants {
                destination.open += 1;
                self.open += 1;
                return Some(key);
            }
        }
        None
    }

    /// The next job for an open connection.
    pub fn take(&mut self, key: &Key) -> Option<Job> {
        self.destinations.get_mut(key)?.ready.pop_front()
    }

    /// A job that was taken and not tried: it is next again.
    pub fn give_back(&mut self, key: &Key, job: Job) {
        let destination = self.destination(key);
        destination.ready.push_front(job);
        if destination.ready.len() == 1 {
            self.turns.push_back(key.clone());
        }
    }

    /// The destination took or refused a message.
    pub fn reached(&mut self, key: &Key) {
        let pace = self.limits.pace;
        self.destination(key).reached(pace);
    }

    /// The destination could not be reached, or broke off. False if that is no news.
    pub fn not_reached(&mut self, key: &Key, now_ms: u64, random: u32) -> bool {
        let pace = self.limits.pace;
        self.destination(key).not_reached(now_ms, random, pace)
    }

    /// A connection was closed.
    pub fn closed(&mut self, key: &Key) {
        if let Some(destination) = self.destinations.get_mut(key) {
            destination.open = destination.open.saturating_sub(1);
            self.open = self.open.saturating_sub(1);
            if destination.is_idle() {
                self.destinations.remove(key);
            }
        }
    }

    /// An operator's wish: these messages are next at their destinations, which are looked for at once if they were down. Others
    /// wait as they did.
    pub fn retry(&mut self, ids: &BTreeSet<MessageId>, now_ms: u64) {
        let wanted = |job: &Job| ids.contains(&job.id);
        let at: Vec<(u64, u64)> =
            self.later.iter().filter(|(_, (_, job))| wanted(job)).map(|(at, _)| *at).collect();
        for at in at.iter().rev() {
            if let Some((key, job)) = self.later.remove(at) {
                self.give_back(&key, job);
            }
        }
        for destination in self.destinations.values_mut() {
            let (first, rest): (Vec<Job>, Vec<Job>) = destination.ready.drain(..).partition(wanted);
            if !first.is_empty() {
                destination.probe_now(now_ms);
            }
            destination.ready.extend(first.into_iter().chain(rest));
        }
    }

    /// When something becomes ready by time alone.
    pub fn wakes_at_ms(&self) -> Option<u64> {
        let later = self.later.first_key_value().map(|((at, _), _)| *at);
        let probe = self.destinations.values().filter_map(Destination::wakes_at_ms).min();
        later.into_iter().chain(probe).min()
    }

    /// When a job that waits is ready again, for the operator; `None` if it is not waiting.
    pub fn waits_until_ms(&self) -> BTreeMap<MessageId, u64> {
        self.later.iter().map(|((at, _), (_, job))| (job.id, *at)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::message::Tick;
    use crate::queue::retry::Backoff;

    fn scheduler() -> Scheduler {
        let probe = Backoff { min_ms: 1000, max_ms: 8000 };
        let pace = Pace { connections_initial: 2, connections_max: 4, probe };
        Scheduler::new(Limits { connections_max: 10, pace })
    }

    fn job(n: u16) -> Job {
        Job { id: MessageId::new(Tick(1), 1, 1, n), recipients: vec![0], attempts: 0 }
    }

    #[test]
    fn a_dead_destination_is_one_probe_per_interval_and_delays_nobody() {
        let mut s = scheduler();
        let (dead, alive) = ("dead".to_string(), "alive".to_string());
        for n in 0..1000 {
            s.add(&dead, job(n));
        }
        let mut probes = 0;
        for now in (0..60_000).step_by(100) {
            while let Some(key) = s.open_next(now) {
                assert_eq!(key, dead);
                probes += 1;
                let job = s.take(&key).unwrap();
                s.give_back(&key, job);
                s.not_reached(&key, now, 0);
                s.closed(&key);
            }
        }
        assert!((8..16).contains(&probes), "{probes} probes in a minute");
        s.add(&alive, job(2000));
        assert_eq!(s.open_next(60_000), Some(alive));
    }

    /// The connections that were opened together fail together: that is one failure, and the next probe is as near as after one.
    #[test]
    fn connections_that_fail_together_fail_once() {
        let mut s = scheduler();
        let key = "dead".to_string();
        (0..10).for_each(|n| s.add(&key, job(n)));
        let opened = std::iter::from_fn(|| s.open_next(0)).count();
        assert_eq!(opened, 2);
        assert!(s.not_reached(&key, 5, 0));
        assert!(!s.not_reached(&key, 6, 0), "known");
        (0..opened).for_each(|_| s.closed(&key));
        assert_eq!(s.open_next(1100), Some(key.clone()), "the shortest pause");
        assert!(s.not_reached(&key, 1200, 0), "the probe's failure is news");
    }

    #[test]
    fn a_destination_that_is_back_opens_with_rising_concurrency() {
        let mut s = scheduler();
        let key = "d".to_string();
        for n in 0..100 {
            s.add(&key, job(n));
        }
        assert_eq!(s.open_next(0), Some(key.clone()));
        s.not_reached(&key, 0, 0);
        s.closed(&key);
        assert_eq!((s.open_next(999), s.wakes_at_ms()), (None, Some(1000)));
        assert!(s.open_next(1000).is_some());
        assert_eq!(s.open_next(1000), None, "one probe");
        s.reached(&key);
        assert!(s.open_next(1001).is_some());
        assert_eq!(s.open_next(1001), None);
        s.reached(&key);
        s.reached(&key);
        assert_eq!((0..9).filter(|_| s.open_next(1002).is_some()).count(), 2, "up to its limit");
    }

    #[test]
    fn destinations_are_served_in_turn() {
        let mut s = scheduler();
        for n in 0..100 {
            s.add(&"big".into(), job(n));
        }
        s.add(&"small".into(), job(200));
        let first: Vec<Key> = (0..2).filter_map(|_| s.open_next(0)).collect();
        assert_eq!(first, ["big", "small"]);
    }

    #[test]
    fn what_an_operator_wants_tried_is_next_and_the_rest_waits() {
        let mut s = scheduler();
        let (down, slow) = ("down".to_string(), "slow".to_string());
        s.add(&down, job(1));
        s.add(&down, job(2));
        assert!(s.open_next(0).is_some());
        s.not_reached(&down, 0, 0);
        s.closed(&down);
        s.add_later(&slow, job(3), 5000);
        s.add_later(&slow, job(4), 6000);
        s.retry(&[job(9).id].into(), 10);
        assert_eq!(s.open_next(10), None, "nobody asked for these");
        s.retry(&[job(2).id, job(4).id].into(), 10);
        let opened: BTreeSet<Key> = std::iter::from_fn(|| s.open_next(10)).collect();
        assert_eq!(opened, [down.clone(), slow.clone()].into());
        assert_eq!((s.take(&down), s.take(&down)), (Some(job(2)), Some(job(1))));
        assert_eq!((s.take(&slow), s.take(&slow)), (Some(job(4)), None), "3 waits for its time");
    }

    #[test]
    fn a_job_that_waits_comes_back_at_its_time() {
        let mut s = scheduler();
        s.add_later(&"d".into(), job(1), 500);
        s.advance(499);
        assert_eq!(s.open_next(499), None);
        s.advance(500);
        assert_eq!(s.open_next(500), Some("d".into()));
        assert_eq!(s.take(&"d".into()), Some(job(1)));
    }
}
