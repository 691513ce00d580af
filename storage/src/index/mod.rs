//! The on-disk index: rows of messages that outlived the young horizon, in the order of their keys.
//!
//! It is rebuildable and nothing more. The log remembers for each row where it stands and its CRC; what the index answers counts
//! if it has that CRC, and is read from the log otherwise. So an index that is stale, rotten, another node's, gone or panicking
//! costs time and never a row.
//!
//! It may also block: so it is opened, compared with the log and written by a thread of its own, off the path to accepting, and read
//! by walks over many rows alone ([`Rows::read`]), which hold nothing while they wait. A single row is read from the log ([`Rows::get`]).
//!
//! A crash at any moment leaves an index that may lack what was written last, or that does not open: it is brought up, or set
//! aside and folded again from the log.

mod sealed;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod spilled;

pub use sealed::Sealed;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use crate::clock;
use crate::error::ReadError;
use crate::limits::{INDEX_BATCH_ROWS, INDEX_NEWS_MAX};
use crate::log::Log;
use crate::log::reader::row_crc;
use crate::sync::plain::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use crate::sync::plain::{sleep, thread};

/// What went wrong in an index, in its own words. It is set aside then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct IndexFailed(pub String);

/// An open index. Nothing that it says is believed unseen, and every call may block.
pub trait Index: Send + Sync {
    /// The row of a key.
    fn get(&self, key: u128) -> Result<Option<Bytes>, IndexFailed>;
    /// Up to `max` rows above `after`, in rising order of their keys.
    fn range(&self, after: Option<u128>, max: usize) -> Result<Vec<(u128, Bytes)>, IndexFailed>;
    /// Puts and removes rows.
    fn write(&self, puts: &[(u128, Bytes)], removes: &[u128]) -> Result<(), IndexFailed>;
}

/// Where an index stands.
pub trait Shelf: Send + 'static {
    /// Opens the index, or an empty one if there is none.
    fn open(&self) -> Result<Arc<dyn Index>, IndexFailed>;
    /// Moves what is there aside, so that the next [`Shelf::open`] finds nothing.
    fn set_aside(&self) -> std::io::Result<()>;
    /// Removes what is there and what was moved aside: there is no room for it.
    fn discard(&self) -> std::io::Result<()>;
}

/// How the index is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Being opened, or being compared with the log.
    Folding,
    /// It agrees with the log as far as it was told.
    Ready,
    /// It failed and was set aside, or there is no room for it; a new one is folded soon.
    Aside,
}

/// What the keeper's thread wakes on.
enum News {
    /// Rows that outlived the young horizon.
    Spilled(Vec<u128>),
    /// Rows that are gone.
    Gone(Vec<u128>),
    /// The index failed, or is behind: the flags tell.
    Look,
}

struct Shared {
    log: Arc<Log>,
    index: Mutex<Option<Arc<dyn Index>>>,
    standing: Mutex<Standing>,
    /// How the index failed while it was read.
    failed: Mutex<Option<IndexFailed>>,
    /// News was dropped, or much has changed: the whole index is to be compared with the log.
    behind: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The rows of the newest complete checkpoint.
pub struct Rows {
    shared: Arc<Shared>,
    news: Option<SyncSender<News>>,
    keeper: Option<thread::JoinHandle<()>>,
}

impl Drop for Rows {
    fn drop(&mut self) {
        self.news = None;
        if self.keeper.take().is_some_and(|keeper| keeper.join().is_err()) {
            tracing::error!("the index's thread panicked");
        }
    }
}

impl Rows {
    /// Rows of `log`, with an index if there is a place for one. It is opened by a thread of its own, which ends when this does.
    /// While less than `reserve_bytes` is free on the disk there is no index: the room is the log's.
    pub fn new(log: Arc<Log>, shelf: Option<Box<dyn Shelf>>, reserve_bytes: u64) -> Rows {
        let shared = Arc::new(Shared {
            log,
            index: Mutex::new(None),
            standing: Mutex::new(if shelf.is_some() { Standing::Folding } else { Standing::Aside }),
            failed: Mutex::new(None),
            behind: AtomicBool::new(false),
        });
        let (news, told) = sync_channel(INDEX_NEWS_MAX);
        let mut keeper = None;
        if let Some(shelf) = shelf {
            let run = Keeper { shared: shared.clone(), shelf, reserve_bytes };
            match thread::Builder::new().name("index".into()).spawn(move || run.run(told)) {
                Ok(started) => keeper = Some(started),
                Err(e) => {
                    tracing::error!(error = %e, "no index: its thread did not start; rows are read from the log");
                    *lock(&shared.standing) = Standing::Aside;
                }
            }
        }
        Rows { shared, news: Some(news), keeper }
    }

    fn tell(&self, news: News) {
        if self.news.as_ref().is_some_and(|sender| sender.try_send(news).is_err()) {
            self.shared.behind.store(true, Ordering::Relaxed);
        }
    }

    /// How the index is doing.
    pub fn standing(&self) -> Standing {
        *lock(&self.shared.standing)
    }

    /// Whether there is a row for `key`.
    pub fn contains(&self, key: u128) -> bool {
        self.shared.log.row_crc(key).is_some()
    }

    /// Up to `max` keys of rows above `after`, in rising order.
    pub fn keys(&self, after: Option<u128>, max: usize) -> Vec<u128> {
        self.shared.log.row_keys(after, max).into_iter().map(|(key, _)| key).collect()
    }

    /// The row of `key`, from the log: one read of a place that is known.
    ///
    /// # Errors
    /// If the log cannot tell it; the log has stopped then, and the node must end.
    pub fn get(&self, key: u128) -> Result<Option<Bytes>, ReadError> {
        let read = self.shared.log.row(key);
        if let Err(error) = &read {
            self.shared.log.fail_reading(error);
        }
        read
    }

    /// The rows of keys in rising order, as far as they still exist: from the index where it agrees with the log, else from the log.
    /// May block: hold nothing meanwhile that others wait for.
    ///
    /// # Errors
    /// As [`Rows::get`].
    pub fn read(&self, keys: &[u128]) -> Result<Vec<(u128, Bytes)>, ReadError> {
        let mut rows = Vec::with_capacity(keys.len());
        for key in keys {
            let row = match self.indexed(*key) {
                Some(row) => Some(row),
                None => self.get(*key)?,
            };
            rows.extend(row.map(|row| (*key, row)));
        }
        Ok(rows)
    }

    fn indexed(&self, key: u128) -> Option<Bytes> {
        let index = lock(&self.shared.index).clone()?;
        let crc = self.shared.log.row_crc(key)?;
        match guarded(|| index.get(key)) {
            Ok(row) => row.filter(|row| row_crc(key, row) == crc),
            Err(failed) => {
                drop(lock(&self.shared.index).take());
                *lock(&self.shared.failed) = Some(failed);
                self.tell(News::Look);
                None
            }
        }
    }

    /// These rows left memory: they are put into the index.
    pub fn spilled(&self, keys: Vec<u128>) {
        if !keys.is_empty() {
            self.tell(News::Spilled(keys));
        }
    }

    /// These rows are no longer part of the state.
    pub fn gone(&self, keys: Vec<u128>) {
        if !keys.is_empty() {
            self.tell(News::Gone(keys));
        }
    }

    /// Everything may have changed: another node's state was installed.
    pub fn replaced(&self) {
        self.shared.behind.store(true, Ordering::Relaxed);
        self.tell(News::Look);
    }
}

/// Calls into the index, which may panic on what it finds in its files.
fn guarded<T>(call: impl FnOnce() -> Result<T, IndexFailed>) -> Result<T, IndexFailed> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(IndexFailed(format!("it panicked: {text}")))
    })
}

/// A new index is folded at once after a failure, and this much later if that one failed soon.
const AGAIN_AFTER: Duration = Duration::from_secs(30);
/// Flags are looked at this often when there is no news.
const LOOK: Duration = Duration::from_secs(1);

/// Why an index is given up.
enum GivenUp {
    Failed(IndexFailed),
    NoRoom,
}

impl From<IndexFailed> for GivenUp {
    fn from(failed: IndexFailed) -> GivenUp {
        GivenUp::Failed(failed)
    }
}

/// The thread that opens, compares and writes the index.
struct Keeper {
    shared: Arc<Shared>,
    shelf: Box<dyn Shelf>,
    reserve_bytes: u64,
}

impl Keeper {
    fn run(self, news: Receiver<News>) {
        let mut failed_at = None;
        loop {
            *lock(&self.shared.standing) = Standing::Folding;
            let served = self.open_and_serve(&news);
            drop(lock(&self.shared.index).take());
            let Err(why) = served else { return };
            *lock(&self.shared.standing) = Standing::Aside;
            let moved = match &why {
                GivenUp::Failed(why) => {
                    tracing::warn!(%why, "the index was set aside; rows are read from the log until it is folded again");
                    self.shelf.set_aside()
                }
                GivenUp::NoRoom => {
                    tracing::warn!("no room for the index; rows are read from the log");
                    self.shelf.discard()
                }
            };
            if let Err(e) = moved {
                tracing::warn!(error = %e, "the index could not be moved");
            }
            let now = clock::now();
            let before = failed_at.replace(now);
            if matches!(why, GivenUp::Failed(_)) && before.is_none_or(|before| now >= before + AGAIN_AFTER) {
                continue;
            }
            // What comes meanwhile is found by comparing.
            let until = now + AGAIN_AFTER;
            loop {
                match news.recv_timeout(until.saturating_duration_since(clock::now())) {
                    Ok(_) => {}
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
    }

    fn open_and_serve(&self, news: &Receiver<News>) -> Result<(), GivenUp> {
        self.room()?;
        let index = guarded(|| self.shelf.open())?;
        let served = self.serve(&index, news);
        drop(lock(&self.shared.index).take());
        // Whoever still reads lets go first: closing an index may block, and does so here.
        for _ in 0..1000 {
            if Arc::strong_count(&index) == 1 {
                break;
            }
            sleep(Duration::from_millis(10));
        }
        served
    }

    fn room(&self) -> Result<(), GivenUp> {
        let enough = self.shared.log.space().free_bytes >= self.reserve_bytes;
        if enough { Ok(()) } else { Err(GivenUp::NoRoom) }
    }

    /// Keeps an index until nobody needs it any more or it fails.
    fn serve(&self, index: &Arc<dyn Index>, news: &Receiver<News>) -> Result<(), GivenUp> {
        self.compare(&**index)?;
        *lock(&self.shared.failed) = None;
        *lock(&self.shared.index) = Some(index.clone());
        *lock(&self.shared.standing) = Standing::Ready;
        loop {
            match news.recv_timeout(LOOK) {
                Ok(News::Spilled(keys)) => {
                    for keys in keys.chunks(INDEX_BATCH_ROWS) {
                        self.put(&**index, keys, &[])?;
                    }
                }
                Ok(News::Gone(keys)) => {
                    for keys in keys.chunks(INDEX_BATCH_ROWS) {
                        guarded(|| index.write(&[], keys))?;
                    }
                }
                Ok(News::Look) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            if let Some(failed) = lock(&self.shared.failed).take() {
                return Err(failed.into());
            }
            if self.shared.behind.swap(false, Ordering::Relaxed) {
                self.compare(&**index)?;
            }
        }
    }

    /// Puts rows as the log has them now.
    fn put(&self, index: &dyn Index, keys: &[u128], removes: &[u128]) -> Result<(), GivenUp> {
        self.room()?;
        let mut puts = Vec::with_capacity(keys.len());
        for key in keys {
            match self.shared.log.row(*key) {
                Ok(row) => puts.extend(row.map(|row| (*key, row))),
                // Whoever needs it will read it from the log, and stop the node if it cannot.
                Err(e) => tracing::error!(error = %e, "a row cannot be read"),
            }
        }
        Ok(guarded(|| index.write(&puts, removes))?)
    }

    /// Brings the index up to the log: both are walked in the order of their keys.
    fn compare(&self, index: &dyn Index) -> Result<(), GivenUp> {
        let (mut after, mut put, mut removed) = (None, 0, 0);
        loop {
            let theirs = guarded(|| index.range(after, INDEX_BATCH_ROWS))?;
            let rising = theirs.windows(2).all(|pair| pair[0].0 < pair[1].0);
            if !rising || theirs.first().is_some_and(|(key, _)| after.is_some_and(|after| *key <= after)) {
                return Err(IndexFailed("its keys are not in order".into()).into());
            }
            let ours = self.shared.log.row_keys(after, INDEX_BATCH_ROWS);
            // As far as both lists reach.
            let end = |full: bool, last: Option<u128>| if full { last } else { None };
            let ends = [
                end(theirs.len() >= INDEX_BATCH_ROWS, theirs.last().map(|(key, _)| *key)),
                end(ours.len() >= INDEX_BATCH_ROWS, ours.last().map(|(key, _)| *key)),
            ];
            let upto = ends.into_iter().flatten().min();
            let reached = |key: u128| upto.is_none_or(|upto| key <= upto);
            let theirs: BTreeMap<u128, u32> = theirs
                .into_iter()
                .filter(|(key, _)| reached(*key))
                .map(|(key, row)| (key, row_crc(key, &row)))
                .collect();
            let ours: BTreeMap<u128, u32> = ours.into_iter().filter(|(key, _)| reached(*key)).collect();
            let lacking: Vec<u128> =
                ours.iter().filter(|(key, crc)| theirs.get(key) != Some(crc)).map(|(key, _)| *key).collect();
            let extra: Vec<u128> = theirs.keys().filter(|key| !ours.contains_key(key)).copied().collect();
            if !lacking.is_empty() || !extra.is_empty() {
                self.put(index, &lacking, &extra)?;
            }
            put += lacking.len();
            removed += extra.len();
            match upto {
                Some(upto) => after = Some(upto),
                None => break,
            }
        }
        tracing::info!(put, removed, "the index agrees with the log");
        Ok(())
    }
}
