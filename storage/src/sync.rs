//! Threads, locks and channels of the log: the standard library's; with the feature `shuttle`, ones of which a test decides who goes on, at
//! each step (`storage/interleavings`). Time passes there whenever the schedule says so.

use std::sync::PoisonError;
use std::time::Duration;

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, mpsc},
    thread,
};
#[cfg(not(feature = "shuttle"))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, mpsc},
    thread,
};

/// Locks; a thread that panicked while it held the lock is no reason to panic as well.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets go of `guard`, of `mutex`, until somebody wakes us or the time is up.
#[cfg(not(feature = "shuttle"))]
pub(crate) fn wait<'a, T>(
    wake: &Condvar,
    _mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    how_long: Duration,
) -> MutexGuard<'a, T> {
    wake.wait_timeout(guard, how_long).unwrap_or_else(PoisonError::into_inner).0
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
