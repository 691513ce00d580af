//! The on-disk index: rows of messages that outlived the young horizon, by key.
//!
//! It is rebuildable and nothing more. The log remembers for each row where it stands and its CRC; what the index answers counts
//! if it has that CRC, and is read from the log otherwise. So an index that is stale, rotten, another node's, gone or panicking
//! costs time and never a row. It is opened, compared with the log and written by a thread of its own, off the path to accepting.
//!
//! A crash at any moment leaves an index that may lack what was written last, or that does not open: it is brought up, or set
//! aside and folded again from the log.

#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod spilled;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use crate::error::ReadError;
use crate::limits::{INDEX_BATCH_ROWS, INDEX_NEWS_MAX};
use crate::log::Log;
use crate::log::reader::row_crc;

/// What went wrong in an index, in its own words. It is set aside then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct IndexFailed(pub String);

/// An open index. Nothing that it says is believed unseen.
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
}

/// How the index is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Being opened, or being compared with the log.
    Folding,
    /// It agrees with the log as far as it was told.
    Ready,
    /// It failed and was set aside; a new one is folded soon.
    Aside,
}

/// What the keeper's thread wakes on.
enum News {
    /// Rows that outlived the young horizon.
    Spilled(Vec<u128>),
    /// Rows that are gone.
    Gone(Vec<u128>),
    /// The index failed while it was read.
    Failed(String),
}

struct Shared {
    log: Arc<Log>,
    index: Mutex<Option<Arc<dyn Index>>>,
    standing: Mutex<Standing>,
    /// News was dropped since the keeper was behind: it compares the whole index with the log.
    behind: AtomicBool,
}

fn set<T>(place: &Mutex<T>, value: T) {
    *place.lock().unwrap_or_else(PoisonError::into_inner) = value;
}

/// The rows of the newest complete checkpoint: from the index if it agrees with the log, else from the log.
pub struct Rows {
    shared: Arc<Shared>,
    news: Option<SyncSender<News>>,
    keeper: Option<std::thread::JoinHandle<()>>,
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
    pub fn new(log: Arc<Log>, shelf: Option<Box<dyn Shelf>>) -> Rows {
        let shared = Arc::new(Shared {
            log,
            index: Mutex::new(None),
            standing: Mutex::new(if shelf.is_some() { Standing::Folding } else { Standing::Aside }),
            behind: AtomicBool::new(false),
        });
        let (news, told) = sync_channel(INDEX_NEWS_MAX);
        let mut keeper = None;
        if let Some(shelf) = shelf {
            let run = Keeper { shared: shared.clone(), shelf };
            match std::thread::Builder::new().name("index".into()).spawn(move || run.run(told)) {
                Ok(started) => keeper = Some(started),
                Err(e) => {
                    tracing::error!(error = %e, "no index: its thread did not start; rows are read from the log");
                    set(&shared.standing, Standing::Aside);
                }
            }
        }
        Rows { shared, news: Some(news), keeper }
    }

    fn tell(&self, news: News) {
        let Some(sender) = &self.news else { return };
        if let Err(TrySendError::Full(_)) = sender.try_send(news) {
            self.shared.behind.store(true, Ordering::Relaxed);
        }
    }

    /// How the index is doing.
    pub fn standing(&self) -> Standing {
        *self.shared.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a row for `key`.
    pub fn contains(&self, key: u128) -> bool {
        self.shared.log.row_crc(key).is_some()
    }

    /// The row of `key`.
    ///
    /// # Errors
    /// If not even the log can tell it; the log has stopped then, and the node must end.
    pub fn get(&self, key: u128) -> Result<Option<Bytes>, ReadError> {
        let Some(crc) = self.shared.log.row_crc(key) else { return Ok(None) };
        let index = self.shared.index.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(index) = index {
            match guarded(|| index.get(key)) {
                Ok(Some(row)) if row_crc(key, &row) == crc => return Ok(Some(row)),
                Ok(_) => {}
                Err(failed) => {
                    set(&self.shared.index, None);
                    self.tell(News::Failed(failed.0));
                }
            }
        }
        let read = self.shared.log.row(key);
        if let Err(error) = &read {
            self.shared.log.fail_reading(error);
        }
        read
    }

    /// Up to `max` keys of rows above `after`, in rising order.
    pub fn keys(&self, after: Option<u128>, max: usize) -> Vec<u128> {
        self.shared.log.row_keys(after, max).into_iter().map(|(key, _)| key).collect()
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

/// The thread that opens, compares and writes the index.
struct Keeper {
    shared: Arc<Shared>,
    shelf: Box<dyn Shelf>,
}

impl Keeper {
    fn run(self, news: Receiver<News>) {
        let mut failed_at = None;
        loop {
            set(&self.shared.standing, Standing::Folding);
            let served = guarded(|| self.shelf.open()).and_then(|index| self.serve(index, &news));
            set(&self.shared.index, None);
            let Err(why) = served else { return };
            tracing::warn!(%why, "the index was set aside; rows are read from the log until it is folded again");
            set(&self.shared.standing, Standing::Aside);
            if let Err(e) = self.shelf.set_aside() {
                tracing::warn!(error = %e, "the index could not be moved aside");
            }
            let now = crate::clock::now();
            if failed_at.replace(now).is_none_or(|before| now >= before + AGAIN_AFTER) {
                continue;
            }
            // What comes meanwhile is found by comparing.
            let until = now + AGAIN_AFTER;
            loop {
                match news.recv_timeout(until.saturating_duration_since(crate::clock::now())) {
                    Ok(_) => {}
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
    }

    /// Keeps an index until nobody needs it any more or it fails.
    fn serve(&self, index: Arc<dyn Index>, news: &Receiver<News>) -> Result<(), IndexFailed> {
        self.compare(&*index)?;
        set(&self.shared.index, Some(index.clone()));
        set(&self.shared.standing, Standing::Ready);
        while let Ok(next) = news.recv() {
            match next {
                News::Spilled(keys) => {
                    for keys in keys.chunks(INDEX_BATCH_ROWS) {
                        self.put(&*index, keys, &[])?;
                    }
                }
                News::Gone(keys) => {
                    for keys in keys.chunks(INDEX_BATCH_ROWS) {
                        guarded(|| index.write(&[], keys))?;
                    }
                }
                News::Failed(why) => return Err(IndexFailed(why)),
            }
            if self.shared.behind.swap(false, Ordering::Relaxed) {
                self.compare(&*index)?;
            }
        }
        Ok(())
    }

    /// Puts rows as the log has them now.
    fn put(&self, index: &dyn Index, keys: &[u128], removes: &[u128]) -> Result<(), IndexFailed> {
        let mut puts = Vec::with_capacity(keys.len());
        for key in keys {
            match self.shared.log.row(*key) {
                Ok(row) => puts.extend(row.map(|row| (*key, row))),
                // Whoever needs it will read it from the log, and stop the node if it cannot.
                Err(e) => tracing::error!(error = %e, "a row cannot be read"),
            }
        }
        guarded(|| index.write(&puts, removes))
    }

    /// Brings the index up to the log: both are walked in the order of their keys.
    fn compare(&self, index: &dyn Index) -> Result<(), IndexFailed> {
        let (mut after, mut put, mut removed) = (None, 0, 0);
        loop {
            let theirs = guarded(|| index.range(after, INDEX_BATCH_ROWS))?;
            let ours = self.shared.log.row_keys(after, INDEX_BATCH_ROWS);
            // As far as both lists reach.
            let end = |full: bool, last: Option<u128>| if full { last } else { None };
            let ends = [
                end(theirs.len() == INDEX_BATCH_ROWS, theirs.last().map(|(key, _)| *key)),
                end(ours.len() == INDEX_BATCH_ROWS, ours.last().map(|(key, _)| *key)),
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
