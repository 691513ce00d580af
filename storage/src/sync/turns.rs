//! A simulated process: its threads take turns. One of them goes on at a time, which one is decided by a seed, each until it has to wait;
//! and what time it is, is decided by the simulation. A test makes a [`Crew`] for each process that it plays, and everything that this
//! crate opens within [`Crew::scope`] belongs to it. Outside of that all of this is as the standard library has it.
//!
//! The thread that plays the process's async runtime is its owner: it lets the others go on ([`Crew::run`]) when it has nothing to do
//! itself. If it has to wait for one of them, time passes for all of the process; [`Crew::take_lag`] tells how much.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar as StdCondvar, Mutex as StdMutex, MutexGuard as StdMutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Who plays the async runtime.
const OWNER: usize = 0;
/// Who finds a lock taken looks again after this time.
const LOCK: Duration = Duration::from_micros(100);

thread_local! {
    static MEMBER: RefCell<Option<(Arc<Crew>, usize)>> = const { RefCell::new(None) };
}

/// The process to which this thread belongs, and which of its threads it is.
fn member() -> Option<(Arc<Crew>, usize)> {
    MEMBER.with(|member| member.borrow().clone())
}

#[derive(Clone, Copy)]
struct Wait {
    event: Option<u64>,
    until: Option<Instant>,
}

struct State {
    /// Whose turn it is.
    turn: usize,
    ready: Vec<usize>,
    waiting: BTreeMap<usize, Wait>,
    /// Where each waits for its turn.
    seats: Vec<Arc<StdCondvar>>,
    now: Instant,
    lag: Duration,
    seed: u64,
    killed: bool,
    /// Threads that have ended.
    ended: BTreeSet<u64>,
    panicked: Option<String>,
}

/// The threads of a simulated process.
pub struct Crew {
    state: StdMutex<State>,
    clock: Box<dyn Fn() -> Instant + Send + Sync>,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// How a thread of a process that was killed ends.
struct Killed;

impl Crew {
    /// A process whose owner's clock is `clock`. `wake` is called whenever one of the other threads may go on.
    pub fn new(
        seed: u64,
        clock: impl Fn() -> Instant + Send + Sync + 'static,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Crew> {
        let now = clock();
        let state = State {
            turn: OWNER,
            ready: Vec::new(),
            waiting: BTreeMap::new(),
            seats: vec![Arc::default()],
            now,
            lag: Duration::ZERO,
            seed,
            killed: false,
            ended: BTreeSet::new(),
            panicked: None,
        };
        Arc::new(Crew { state: StdMutex::new(state), clock: Box::new(clock), wake: Box::new(wake) })
    }

    fn state(&self) -> StdMutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something as the owner of this process.
    pub fn scope<T>(self: &Arc<Self>, what: impl FnOnce() -> T) -> T {
        struct Leave(Option<(Arc<Crew>, usize)>);
        impl Drop for Leave {
            fn drop(&mut self) {
                MEMBER.with(|member| *member.borrow_mut() = self.0.take());
            }
        }
        let _leave = Leave(MEMBER.with(|member| member.replace(Some((self.clone(), OWNER)))));
        what()
    }

    /// As the owner: lets each thread that can go on do so, until none can.
    pub fn run(&self) {
        let now = (self.clock)();
        let mut state = self.state();
        state.now = state.now.max(now + state.lag);
        drop(self.others(state));
    }

    /// Lets threads go on until none can, or the owner may. False if there was none that could.
    fn others<'a>(&'a self, mut state: StdMutexGuard<'a, State>) -> (StdMutexGuard<'a, State>, bool) {
        if state.killed || state.pass_on() == OWNER {
            return (state, false);
        }
        (sit(state, OWNER), true)
    }

    /// When the next of the other threads may go on by itself.
    pub fn next_due(&self) -> Option<Instant> {
        let state = self.state();
        state.waiting.values().filter_map(|wait| wait.until).min().map(|at| at - state.lag)
    }

    /// How long the owner has waited for other threads since this was asked before: time that passed for this process while its runtime
    /// stood still.
    pub fn take_lag(&self) -> Duration {
        std::mem::take(&mut self.state().lag)
    }

    /// The process ends without another step of any of its threads. The disk must take nothing from it any more. To be called before
    /// what it had is dropped.
    pub fn kill(&self) {
        let mut state = self.state();
        state.killed = true;
        state.seats.iter().for_each(|seat| seat.notify_all());
    }

    /// Whether a thread has panicked, and with what.
    pub fn panicked(&self) -> Option<String> {
        self.state().panicked.clone()
    }

    /// What time it is for thread `me`.
    fn now(&self, me: usize) -> Instant {
        match me {
            OWNER => (self.clock)() + self.state().lag,
            _ => self.state().now,
        }
    }

    /// Waits for an event, or until a moment. It may have been neither.
    fn wait(&self, me: usize, event: Option<u64>, until: Option<Instant>) {
        let mut state = self.state();
        if state.killed {
            drop(state);
            if !std::thread::panicking() {
                resume_unwind(Box::new(Killed));
            }
            return;
        }
        state.waiting.insert(me, Wait { event, until });
        if me == OWNER {
            return self.block(state);
        }
        if state.pass_on() == me {
            return;
        }
        self.my_turn(me, state);
    }

    fn my_turn<'a>(&'a self, me: usize, state: StdMutexGuard<'a, State>) {
        let state = sit(state, me);
        let is_killed = state.killed;
        drop(state);
        if is_killed && !std::thread::panicking() {
            resume_unwind(Box::new(Killed));
        }
    }

    /// The owner waits: the others go on meanwhile, and if none can, time passes.
    fn block<'a>(&'a self, mut state: StdMutexGuard<'a, State>) {
        state.now = state.now.max((self.clock)() + state.lag);
        loop {
            let (after, went_on) = self.others(state);
            state = after;
            if let Some(at) = state.ready.iter().position(|id| *id == OWNER) {
                state.ready.remove(at);
                return;
            }
            if state.killed {
                return;
            }
            if !went_on {
                let next = state.waiting.values().filter_map(|wait| wait.until).min();
                let next = next.expect("a thread that waits for others, none of which can go on");
                let passed = next.saturating_duration_since(state.now);
                state.now += passed;
                state.lag += passed;
            }
        }
    }

    /// Whoever waits for this event may go on.
    fn signal(&self, event: u64) {
        let mut state = self.state();
        let State { waiting, ready, .. } = &mut *state;
        let before = ready.len();
        waiting.retain(|id, wait| {
            let is_meant = wait.event == Some(event);
            if is_meant {
                ready.push(*id);
            }
            !is_meant
        });
        let woken = ready.len() > before;
        drop(state);
        if woken {
            (self.wake)();
        }
    }
}

impl State {
    /// It is another one's turn: the owner's if it may go on, or if nobody else can; whose it is.
    fn pass_on(&mut self) -> usize {
        let State { now, waiting, ready, .. } = self;
        waiting.retain(|id, wait| {
            let is_due = wait.until.is_some_and(|until| until <= *now);
            if is_due {
                ready.push(*id);
            }
            !is_due
        });
        self.turn = match ready.as_slice() {
            [] => OWNER,
            // It waits in `block`, and sees for itself that it may go on.
            some if some.contains(&OWNER) => OWNER,
            some => {
                // splitmix64 (Steele et al., OOPSLA'14).
                self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = self.seed;
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                let chosen = (z ^ (z >> 27)) % some.len() as u64;
                ready.remove(chosen as usize)
            }
        };
        self.seats[self.turn].notify_all();
        self.turn
    }
}

/// Waits for the turn of `me`, or until the process is killed.
fn sit(state: StdMutexGuard<'_, State>, me: usize) -> StdMutexGuard<'_, State> {
    let seat = state.seats[me].clone();
    let state = seat.wait_while(state, |state| state.turn != me && !state.killed);
    state.unwrap_or_else(PoisonError::into_inner)
}

/// Waits a while: simulated time in a simulated process.
pub(crate) fn sleep(how_long: Duration) {
    match member() {
        Some((crew, me)) => crew.wait(me, None, Some(crew.now(me) + how_long)),
        None => std::thread::sleep(how_long),
    }
}

/// What time it is in the simulated process to which this thread belongs.
pub(crate) fn now() -> Option<Instant> {
    member().map(|(crew, me)| crew.now(me))
}

/// Locks. In a simulated process somebody who waits may hold the lock.
pub(crate) fn lock<T>(mutex: &StdMutex<T>) -> StdMutexGuard<'_, T> {
    if let Some((crew, me)) = member() {
        while !crew.state().killed {
            match mutex.try_lock() {
                Ok(guard) => return guard,
                Err(std::sync::TryLockError::Poisoned(e)) => return e.into_inner(),
                Err(std::sync::TryLockError::WouldBlock) => {
                    crew.wait(me, None, Some(crew.now(me) + LOCK));
                }
            }
        }
    }
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something to wait for.
struct Event(u64);

impl Event {
    fn new() -> Arc<Event> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Arc::new(Event(NEXT.fetch_add(1, Ordering::Relaxed)))
    }

    fn signal(&self) {
        if let Some((crew, _)) = member() {
            crew.signal(self.0);
        }
    }
}

/// As `std::sync::Condvar`, as far as it is used here.
pub(crate) struct Condvar {
    std: StdCondvar,
    event: Arc<Event>,
}

impl Condvar {
    pub(crate) fn new() -> Condvar {
        Condvar { std: StdCondvar::new(), event: Event::new() }
    }

    pub(crate) fn notify_all(&self) {
        self.std.notify_all();
        self.event.signal();
    }

    pub(crate) fn wait_timeout<'a, T>(
        &self,
        mutex: &'a StdMutex<T>,
        guard: StdMutexGuard<'a, T>,
        how_long: Duration,
    ) -> StdMutexGuard<'a, T> {
        match member() {
            Some((crew, me)) => {
                drop(guard);
                crew.wait(me, Some(self.event.0), Some(crew.now(me) + how_long));
                lock(mutex)
            }
            None => self.std.wait_timeout(guard, how_long).unwrap_or_else(PoisonError::into_inner).0,
        }
    }
}

/// As `std::thread`, as far as it is used here.
pub(crate) mod thread {
    use super::*;

    /// As `std::thread::Builder`.
    pub(crate) struct Builder(std::thread::Builder);

    /// As `std::thread::JoinHandle`.
    pub(crate) struct JoinHandle<T> {
        std: std::thread::JoinHandle<T>,
        ended: Arc<Event>,
    }

    impl Builder {
        pub(crate) fn new() -> Builder {
            Builder(std::thread::Builder::new())
        }

        pub(crate) fn name(self, name: String) -> Builder {
            Builder(self.0.name(name))
        }

        pub(crate) fn spawn<F: FnOnce() + Send + 'static>(self, run: F) -> std::io::Result<JoinHandle<()>> {
            let ended = Event::new();
            let Some((crew, _)) = member() else {
                return Ok(JoinHandle { std: self.0.spawn(run)?, ended });
            };
            let me = {
                let mut state = crew.state();
                let me = state.seats.len();
                state.seats.push(Arc::default());
                state.ready.push(me);
                me
            };
            let (its, end) = (crew.clone(), ended.clone());
            let std = self.0.spawn(move || {
                MEMBER.with(|member| *member.borrow_mut() = Some((its.clone(), me)));
                let ran = catch_unwind(AssertUnwindSafe(|| {
                    its.my_turn(me, its.state());
                    run();
                }));
                let mut state = its.state();
                match ran {
                    Err(panic) if !panic.is::<Killed>() => {
                        let text = panic.downcast_ref::<String>().cloned();
                        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned()));
                        state.panicked = Some(text.unwrap_or_default());
                    }
                    _ => {}
                }
                if !state.killed {
                    // The last thing that it does in its turn.
                    state.ended.insert(end.0);
                    let State { waiting, ready, .. } = &mut *state;
                    let waits = waiting.iter().filter(|(_, wait)| wait.event == Some(end.0));
                    ready.extend(waits.map(|(id, _)| *id));
                    waiting.retain(|_, wait| wait.event != Some(end.0));
                    state.pass_on();
                }
            })?;
            (crew.wake)();
            Ok(JoinHandle { std, ended })
        }
    }

    impl<T> JoinHandle<T> {
        /// Waits for the end of the thread.
        pub(crate) fn join(self) -> std::thread::Result<T> {
            if let Some((crew, me)) = member() {
                while !std::thread::panicking() {
                    let state = crew.state();
                    if state.killed || state.ended.contains(&self.ended.0) {
                        break;
                    }
                    drop(state);
                    crew.wait(me, Some(self.ended.0), None);
                }
            }
            self.std.join()
        }
    }
}

/// As `std::sync::mpsc`, as far as it is used here.
pub(crate) mod mpsc {
    pub(crate) use std::sync::mpsc::{RecvError, RecvTimeoutError, SendError, TryRecvError, TrySendError};

    use super::*;

    macro_rules! sender {
        ($name:ident) => {
            /// As in the standard library.
            pub(crate) struct $name<T> {
                std: Option<std::sync::mpsc::$name<T>>,
                sent: Arc<Event>,
                taken: Arc<Event>,
            }

            impl<T> $name<T> {
                fn std(&self) -> &std::sync::mpsc::$name<T> {
                    self.std.as_ref().expect("taken when it is dropped")
                }
            }

            impl<T> Clone for $name<T> {
                fn clone(&self) -> $name<T> {
                    $name { std: self.std.clone(), sent: self.sent.clone(), taken: self.taken.clone() }
                }
            }

            impl<T> Drop for $name<T> {
                fn drop(&mut self) {
                    self.std = None;
                    self.sent.signal();
                }
            }
        };
    }

    sender!(Sender);
    sender!(SyncSender);

    /// As in the standard library.
    pub(crate) struct Receiver<T> {
        std: Option<std::sync::mpsc::Receiver<T>>,
        sent: Arc<Event>,
        taken: Arc<Event>,
    }

    /// As in the standard library.
    pub(crate) fn channel<T>() -> (Sender<T>, Receiver<T>) {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (sent, taken) = (Event::new(), Event::new());
        let sender = Sender { std: Some(sender), sent: sent.clone(), taken: taken.clone() };
        (sender, Receiver { std: Some(receiver), sent, taken })
    }

    /// As in the standard library.
    pub(crate) fn sync_channel<T>(bound: usize) -> (SyncSender<T>, Receiver<T>) {
        let (sender, receiver) = std::sync::mpsc::sync_channel(bound);
        let (sent, taken) = (Event::new(), Event::new());
        let sender = SyncSender { std: Some(sender), sent: sent.clone(), taken: taken.clone() };
        (sender, Receiver { std: Some(receiver), sent, taken })
    }

    impl<T> Sender<T> {
        pub(crate) fn send(&self, value: T) -> Result<(), SendError<T>> {
            let result = self.std().send(value);
            self.sent.signal();
            result
        }
    }

    impl<T> SyncSender<T> {
        pub(crate) fn send(&self, value: T) -> Result<(), SendError<T>> {
            let Some((crew, me)) = member() else { return self.std().send(value) };
            let mut value = value;
            loop {
                match self.std().try_send(value) {
                    Ok(()) => break,
                    Err(TrySendError::Disconnected(value)) => return Err(SendError(value)),
                    Err(TrySendError::Full(back)) => value = back,
                }
                crew.wait(me, Some(self.taken.0), None);
            }
            self.sent.signal();
            Ok(())
        }

        pub(crate) fn try_send(&self, value: T) -> Result<(), TrySendError<T>> {
            let result = self.std().try_send(value);
            self.sent.signal();
            result
        }
    }

    impl<T> Receiver<T> {
        fn std(&self) -> &std::sync::mpsc::Receiver<T> {
            self.std.as_ref().expect("taken when it is dropped")
        }

        pub(crate) fn try_recv(&self) -> Result<T, TryRecvError> {
            let result = self.std().try_recv();
            self.taken.signal();
            result
        }

        pub(crate) fn recv(&self) -> Result<T, RecvError> {
            let Some((crew, me)) = member() else { return self.std().recv() };
            loop {
                match self.try_recv() {
                    Ok(value) => return Ok(value),
                    Err(TryRecvError::Disconnected) => return Err(RecvError),
                    Err(TryRecvError::Empty) => crew.wait(me, Some(self.sent.0), None),
                }
            }
        }

        pub(crate) fn recv_timeout(&self, how_long: Duration) -> Result<T, RecvTimeoutError> {
            let Some((crew, me)) = member() else { return self.std().recv_timeout(how_long) };
            let until = crew.now(me) + how_long;
            loop {
                match self.try_recv() {
                    Ok(value) => return Ok(value),
                    Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
                    Err(TryRecvError::Empty) if crew.now(me) >= until => {
                        return Err(RecvTimeoutError::Timeout);
                    }
                    Err(TryRecvError::Empty) => crew.wait(me, Some(self.sent.0), Some(until)),
                }
            }
        }

        pub(crate) fn iter(&self) -> impl Iterator<Item = T> + '_ {
            std::iter::from_fn(|| self.recv().ok())
        }
    }

    impl<T> Drop for Receiver<T> {
        fn drop(&mut self) {
            self.std = None;
            self.taken.signal();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A crew whose owner's clock stands still.
    fn crew() -> Arc<Crew> {
        let start = crate::clock::now();
        Crew::new(1, move || start, || {})
    }

    #[test]
    fn threads_go_on_in_turn_and_time_passes_only_for_who_waits() {
        let crew = crew();
        crew.scope(|| {
            let (ask, asked) = mpsc::sync_channel::<u32>(1);
            let (tell, told) = mpsc::channel();
            let thread = thread::Builder::new().name("echo".into()).spawn(move || {
                for number in asked.iter() {
                    sleep(Duration::from_secs(3600));
                    tell.send(number).unwrap();
                }
            });
            let thread = thread.unwrap();
            assert!(told.try_recv().is_err(), "nobody goes on while the owner does");
            ask.send(1).unwrap();
            crew.run();
            assert!(told.try_recv().is_err(), "it waits for an hour");
            assert!(crew.next_due().is_some());
            // The second fits, as the first was taken; for the third the owner has to wait.
            ask.send(2).unwrap();
            ask.send(3).unwrap();
            assert_eq!(told.recv(), Ok(1));
            assert_eq!(crew.take_lag(), Duration::from_secs(3600));
            drop(ask);
            thread.join().unwrap();
            assert_eq!(told.iter().collect::<Vec<u32>>(), [2, 3]);
            assert_eq!(crew.take_lag(), Duration::from_secs(7200));
        });
    }

    #[test]
    fn a_killed_process_does_nothing_any_more() {
        let crew = crew();
        let done = Arc::new(AtomicU64::new(0));
        let thread = crew.scope(|| {
            let done = done.clone();
            let run = move || {
                loop {
                    done.fetch_add(1, Ordering::SeqCst);
                    sleep(Duration::from_secs(1));
                }
            };
            let thread = thread::Builder::new().name("counts".into()).spawn(run).unwrap();
            crew.run();
            thread
        });
        assert_eq!(done.load(Ordering::SeqCst), 1);
        crew.kill();
        crew.scope(|| {
            crew.run();
            thread.join().unwrap();
        });
        assert_eq!(done.load(Ordering::SeqCst), 1);
        assert_eq!(crew.panicked(), None);
    }

    #[test]
    fn who_panics_is_noticed() {
        let crew = crew();
        let thread = crew.scope(|| {
            let thread = thread::Builder::new().name("panics".into()).spawn(|| panic!("on purpose")).unwrap();
            crew.run();
            thread
        });
        assert_eq!(crew.panicked().as_deref(), Some("on purpose"));
        crew.scope(|| drop(thread.join()));
    }
}
