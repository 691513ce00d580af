//! The threads of a log (who appends, who settles, who reads, the writer, the eraser, the scrub) under many schedules: at each lock, channel
//! and operation of the disk a test decides who goes on. Whatever the order, and whatever fails in the middle of it:
//!
//! * who waits is told once, in the order in which it asked, and nobody is left waiting;
//! * what was told to be durable is there after a power cut, and what was told to be erased is not;
//! * nothing is told to be durable after something failed;
//! * who reads finds what was written or nothing.
//!
//! `HOLDFAST_SCHEDULES=100000` goes through more of them than CI does. A failure prints the schedule, and the seed for `SHUTTLE_RANDOM_SEED`.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::sync::Arc;

use holdfast_storage::codec::Vote;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::{
    Bytes, Checkpoint, Completion, Entry, Identity, Log, LogIndex, LogPosition, Options, ReadError, Term,
};
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::{Mutex, mpsc};
use shuttle::thread;

/// Entries from here on are truncated once, and written again in a later term.
const TRUNCATED: u64 = 25;
const LAST: u64 = 27;
const BODY: usize = 7_000;
/// After so many more entries some bodies die.
const LATER: u64 = 10;

/// Who asks: what one of them asks for is told in its order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Asker {
    Raft,
    Machine,
}

#[derive(Clone, Copy)]
enum What {
    Entry(LogPosition),
    Vote(u64),
    Row(u128),
}

#[derive(Default)]
struct Told {
    /// How often each asked.
    asked: BTreeMap<Asker, u64>,
    /// The number of the question, in the order of the answers, and whether it went well.
    answers: Vec<(Asker, u64, bool)>,
    entries: Vec<LogPosition>,
    vote: u64,
    rows: Vec<u128>,
    /// Entries whose body was asked to be erased; whether that was done.
    erased: BTreeMap<u64, bool>,
    purged: u64,
}

fn at(term: u64, index: u64) -> LogPosition {
    LogPosition { term: Term(term), index: LogIndex(index) }
}

fn stamp(at: LogPosition) -> String {
    format!("<the body of {}.{:03}>", at.term.0, at.index.0)
}

fn octets(at: LogPosition) -> Bytes {
    stamp(at).bytes().cycle().take(BODY).collect::<Vec<u8>>().into()
}

fn entry(at: LogPosition) -> Entry {
    Entry { at, head: Bytes::from_static(b"head"), body: octets(at) }
}

/// A life of a log, and of what it is asked for.
struct Life {
    log: Log,
    told: Arc<Mutex<Told>>,
    /// Entries that are durable, for the machine to apply.
    tell: mpsc::Sender<Option<u64>>,
}

impl Life {
    fn ask(&self, who: Asker, what: What) -> Completion {
        let number = {
            let mut told = self.told.lock().unwrap();
            let asked = told.asked.entry(who).or_default();
            *asked += 1;
            *asked
        };
        let (told, tell) = (self.told.clone(), self.tell.clone());
        Box::new(move |result| {
            let mut told = told.lock().unwrap();
            told.answers.push((who, number, result.is_ok()));
            match (result, what) {
                (Ok(()), What::Entry(at)) => {
                    told.entries.push(at);
                    tell.send(Some(at.index.0)).unwrap_or_default();
                }
                (Ok(()), What::Vote(term)) => told.vote = term,
                (Ok(()), What::Row(key)) => told.rows.push(key),
                (Err(_), _) => tell.send(None).unwrap_or_default(),
            }
        })
    }

    /// What Raft does with a log: one after the other, without waiting.
    fn raft(&self) {
        let append = |at| self.log.append(vec![entry(at)], self.ask(Asker::Raft, What::Entry(at)));
        let vote = |term| {
            let vote = Vote { term: Term(term), node: 1, committed: false };
            self.log.save_vote(vote, self.ask(Asker::Raft, What::Vote(term)));
        };
        vote(1);
        for index in 1..TRUNCATED + 2 {
            append(at(1, index));
        }
        vote(2);
        self.log.truncate_from(LogIndex(TRUNCATED));
        for index in TRUNCATED..=LAST {
            append(at(2, index));
        }
    }

    /// What the state machine does: it applies what is durable, erases, writes checkpoints and purges.
    fn machine(&self, durable: &mpsc::Receiver<Option<u64>>) {
        for expected in 1..TRUNCATED {
            let Ok(Some(index)) = durable.recv() else { return };
            assert_eq!(index, expected);
            self.log.save_committed(at(1, index));
            // Half die at once, and some of the others later, when they are being moved.
            let late = index.checked_sub(LATER).filter(|late| late % 4 == 1);
            for dead in Some(index).filter(|index| index % 2 == 0).into_iter().chain(late) {
                self.told.lock().unwrap().erased.insert(dead, false);
                self.log.erase(LogIndex(dead));
            }
            if index % 3 == 0 {
                let key = u128::from(index);
                let made = Checkpoint {
                    applied: at(1, index),
                    rows: vec![(key, vec![index as u8; 300])],
                    gone: Vec::new(),
                    tables: vec![index as u8; 500],
                };
                self.log.checkpoint(made, self.ask(Asker::Machine, What::Row(key)));
                self.told.lock().unwrap().purged = index - 2;
                self.log.purge(at(1, index - 2));
            }
        }
    }

    /// Whether a body is what was written under its position.
    fn is_right(&self, at: LogPosition, body: &[u8]) -> bool {
        let may_be_gone = self.told.lock().unwrap().erased.contains_key(&at.index.0)
            || (at.term == Term(1) && at.index.0 >= TRUNCATED);
        body == octets(at) || (body.is_empty() && may_be_gone)
    }

    fn read(&self) {
        for round in 0..4 {
            for entry in self.log.entries(1..LAST + 1, 1 << 20).unwrap() {
                assert!(self.is_right(entry.at, &entry.body), "{:?}", entry.at);
            }
            let index = LogIndex(1 + round * 5);
            match self.log.body(index) {
                Ok(body) => {
                    let right = [1, 2].iter().any(|term| body == octets(at(*term, index.0)));
                    assert!(right, "{index:?}");
                }
                Err(ReadError::Absent(_)) => {}
                Err(error) => panic!("{index:?}: {error}"),
            }
            self.log.check();
        }
    }
}

/// What goes wrong.
#[derive(Clone, Copy)]
enum Fault {
    None,
    PowerOff,
    OneOperationFails,
}

fn open(disk: &SimDisk, told: &Arc<Mutex<Told>>) -> Log {
    let told = told.clone();
    let options = Options {
        segment_bytes: 0, // the smallest
        move_below_percent: 60,
        scrub_bytes_per_second: 1 << 20,
        keys: Default::default(),
        on_erased: Arc::new(move |erased| {
            let mut told = told.lock().unwrap();
            for (index, _) in erased {
                let was_asked = told.erased.insert(index.0, true).is_some();
                assert!(was_asked || index.0 >= TRUNCATED, "{index:?} is not gone: it was moved");
            }
        }),
        on_failure: Arc::new(|_| {}),
    };
    let identity = Identity { cluster: "test".into(), node: 1 };
    Log::open(Arc::new(disk.clone()), identity, options).unwrap().0
}

fn live_and_lose_power(fault: Fault) {
    let mut random = thread_rng();
    let disk = SimDisk::new(random.r#gen());
    let told: Arc<Mutex<Told>> = Arc::default();
    let (tell, durable) = mpsc::channel();
    let life = Arc::new(Life { log: open(&disk, &told), told: told.clone(), tell });
    match fault {
        Fault::None => {}
        Fault::PowerOff => disk.power_off_in(random.gen_range(0..300)),
        Fault::OneOperationFails => disk.fail_in(random.gen_range(0..300)),
    }
    let run = |what: fn(&Life)| {
        let life = life.clone();
        thread::spawn(move || what(&life))
    };
    let (raft, reader) = (run(Life::raft), run(Life::read));
    let machine = {
        let life = life.clone();
        thread::spawn(move || life.machine(&durable))
    };
    [raft, reader, machine].into_iter().for_each(|thread| thread.join().unwrap());
    drop(Arc::into_inner(life).unwrap());

    disk.crash();
    judge(&disk, &told.lock().unwrap(), matches!(fault, Fault::None));
    let again: Arc<Mutex<Told>> = Arc::default();
    let log = open(&disk, &again);
    log.check();
    there(&log, &told.lock().unwrap());
}

/// The answers, and what must not be on the disk.
fn judge(disk: &SimDisk, told: &Told, is_well: bool) {
    let asked: u64 = told.asked.values().sum();
    assert_eq!(told.answers.len() as u64, asked, "who waits is told once");
    let mut last = BTreeMap::new();
    let mut has_failed = false;
    for (who, number, went_well) in &told.answers {
        assert!(last.insert(*who, *number).is_none_or(|before| before < *number), "answers in order");
        assert!(!(has_failed && *went_well), "durable after a failure");
        has_failed |= !went_well;
    }
    assert!(!(is_well && has_failed), "nothing went wrong, and it failed");
    for (index, _) in told.erased.iter().filter(|(_, done)| **done) {
        for at in
            [at(1, *index), at(2, *index)].into_iter().filter(|at| at.term == Term(1) || *index >= TRUNCATED)
        {
            let lives = at.term == Term(2);
            assert!(lives || !disk.contains(stamp(at).as_bytes()), "{at:?} was erased");
        }
    }
}

/// What was told to be durable.
fn there(log: &Log, told: &Told) {
    assert!(log.vote().map_or(0, |vote| vote.term.0) >= told.vote);
    for key in &told.rows {
        assert_eq!(log.row(*key).unwrap(), Some(Bytes::from(vec![*key as u8; 300])));
    }
    let is_void = |at: &LogPosition| at.term == Term(1) && at.index.0 >= TRUNCATED;
    for at in told.entries.iter().filter(|at| !is_void(at)) {
        let is_erased = told.erased.contains_key(&at.index.0);
        match log.body(at.index) {
            Ok(body) => assert_eq!(body, octets(*at)),
            Err(ReadError::Absent(_)) => assert!(is_erased, "{at:?} is gone"),
            Err(error) => panic!("{at:?}: {error}"),
        }
        if at.index.0 > told.purged {
            let entries = log.entries(at.index.0..at.index.0 + 1, 1).unwrap();
            assert_eq!(entries.first().map(|entry| entry.at), Some(*at));
        }
    }
}

fn check(scheduler: impl Scheduler + 'static, fault: Fault) {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 20;
    shuttle::Runner::new(scheduler, config).run(move || live_and_lose_power(fault));
}

fn schedules() -> usize {
    std::env::var("HOLDFAST_SCHEDULES").ok().and_then(|text| text.parse().ok()).unwrap_or(300)
}

#[test]
fn p2_who_is_told_is_durable_in_any_order_of_the_threads() {
    check(RandomScheduler::new(schedules()), Fault::None);
}

#[test]
fn p2_who_is_told_is_durable_when_the_power_goes() {
    check(RandomScheduler::new(schedules()), Fault::PowerOff);
}

#[test]
fn p2_nobody_is_told_that_it_is_durable_after_a_failure() {
    check(RandomScheduler::new(schedules()), Fault::OneOperationFails);
}

/// Few changes of who goes on, each at the worst moment (Burckhardt et al., ASPLOS'10).
#[test]
fn p2_who_is_told_is_durable_under_rare_orders() {
    check(PctScheduler::new(3, schedules()), Fault::PowerOff);
}
