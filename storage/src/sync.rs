//! Threads, locks and channels of the log: the standard library's; with the feature `shuttle`, ones of which a test decides who goes on, at
//! each step (`storage/interleavings`). Time passes there whenever the schedule says so. With the feature `sim` they may be those of a
//! simulated process ([`turns`]).

#[cfg(any(not(any(test, feature = "sim")), feature = "shuttle"))]
use std::sync::PoisonError;
use std::time::Duration;

#[cfg(all(any(test, feature = "sim"), not(feature = "shuttle")))]
pub mod turns;

#[cfg(all(any(test, feature = "sim"), not(feature = "shuttle")))]
pub(crate) use {
    std::sync::{Mutex, MutexGuard},
    turns::{Condvar, lock, mpsc, thread},
};

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, mpsc},
    thread,
};
#[cfg(not(any(test, feature = "sim", feature = "shuttle")))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, mpsc},
    thread,
};

/// For threads of which no schedule is tried step by step.
pub(crate) mod plain {
    #[cfg(any(not(any(test, feature = "sim")), feature = "shuttle"))]
    pub(crate) use std::{
        sync::mpsc,
        thread::{self, sleep},
    };

    #[cfg(all(any(test, feature = "sim"), not(feature = "shuttle")))]
    pub(crate) use super::turns::{mpsc, sleep, thread};
}

/// Time that passes in a simulated process, and nowhere else.
#[cfg(all(any(test, feature = "sim"), not(feature = "shuttle")))]
pub(crate) fn pass(how_long: Duration) {
    if how_long > Duration::ZERO && turns::now().is_some() {
        turns::sleep(how_long);
    }
}

/// Shuttle knows no time.
#[cfg(all(any(test, feature = "sim"), feature = "shuttle"))]
pub(crate) fn pass(_how_long: Duration) {}

/// Locks; a thread that panicked while it held the lock is no reason to panic as well.
#[cfg(any(not(any(test, feature = "sim")), feature = "shuttle"))]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets go of `guard`, of `mutex`, until somebody wakes us or the time is up.
#[cfg(not(any(test, feature = "sim", feature = "shuttle")))]
pub(crate) fn wait<'a, T>(
    wake: &Condvar,
    _mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    how_long: Duration,
) -> MutexGuard<'a, T> {
    wake.wait_timeout(guard, how_long).unwrap_or_else(PoisonError::into_inner).0
}

/// Lets go of `guard`, of `mutex`, until somebody wakes us or the time is up.
#[cfg(all(any(test, feature = "sim"), not(feature = "shuttle")))]
pub(crate) fn wait<'a, T>(
    wake: &Condvar,
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    how_long: Duration,
) -> MutexGuard<'a, T> {
    wake.wait_timeout(mutex, guard, how_long)
}

/// The next message, or that none came in time.
#[cfg(not(feature = "shuttle"))]
pub(crate) fn receive<T>(
    messages: &mpsc::Receiver<T>,
    how_long: Duration,
) -> Result<T, mpsc::RecvTimeoutError> {
    messages.recv_timeout(how_long)
}

/// Shuttle's own never runs out of time.
#[cfg(feature = "shuttle")]
pub(crate) fn wait<'a, T>(
    _wake: &Condvar,
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    _how_long: Duration,
) -> MutexGuard<'a, T> {
    drop(guard);
    thread::yield_now();
    lock(mutex)
}

/// Shuttle's own never runs out of time.
#[cfg(feature = "shuttle")]
pub(crate) fn receive<T>(
    messages: &mpsc::Receiver<T>,
    _how_long: Duration,
) -> Result<T, mpsc::RecvTimeoutError> {
    thread::yield_now();
    messages.try_recv().map_err(|none| match none {
        mpsc::TryRecvError::Empty => mpsc::RecvTimeoutError::Timeout,
        mpsc::TryRecvError::Disconnected => mpsc::RecvTimeoutError::Disconnected,
    })
}
