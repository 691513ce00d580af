//! The index on disk: sled, and the only module that names it.
//!
//! Its `flush` does not fsync on Linux, a kill or a full disk can leave it unopenable, and it may panic on what it reads. Nothing
//! here relies on it: see the parent module.
#![expect(clippy::disallowed_methods, reason = "sled does its own file I/O, so its directory is moved here")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::{Index, IndexFailed, Shelf};
use crate::limits::INDEX_CACHE_BYTES;
use crate::seal::KeyId;

const NAME: &str = "index";
const KEY: &str = "-key-";
const ASIDE: &str = "aside";

/// A directory for the index, beside the log.
pub struct Directory(pub PathBuf);

impl Directory {
    /// In a data directory, for rows that are sealed with a key. What is left there of other keys is removed when it is opened.
    pub fn within(data_dir: &Path, sealing: Option<KeyId>) -> Directory {
        Directory(data_dir.join(match sealing {
            Some(key) => format!("{NAME}{KEY}{key}"),
            None => NAME.into(),
        }))
    }

    fn remove_others(&self) -> std::io::Result<()> {
        self.others()?.iter().try_for_each(|other| remove(other))
    }

    /// Other indexes beside this one.
    fn others(&self) -> std::io::Result<Vec<PathBuf>> {
        let Some(parent) = self.0.parent().filter(|parent| parent.exists()) else { return Ok(Vec::new()) };
        let own = [self.0.clone(), self.0.with_extension(ASIDE)];
        let is_index = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let name = name.strip_suffix(&format!(".{ASIDE}")).unwrap_or(name);
            let key = name.strip_prefix(NAME).and_then(|rest| rest.strip_prefix(KEY));
            let is_key =
                |key: &str| key.len() == 8 && key.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            name == NAME || key.is_some_and(is_key)
        };
        let found = std::fs::read_dir(parent)?.map(|entry| entry.map(|entry| entry.path()));
        let found: Vec<PathBuf> = found.collect::<Result<_, _>>()?;
        Ok(found.into_iter().filter(|path| is_index(path) && !own.contains(path)).collect())
    }
}

impl Shelf for Directory {
    fn open(&self) -> Result<Arc<dyn Index>, IndexFailed> {
        self.remove_others().map_err(|e| IndexFailed(format!("removing the index of another key: {e}")))?;
        let config = sled::Config::new().path(&self.0).cache_capacity(INDEX_CACHE_BYTES);
        let db = config.flush_every_ms(Some(1000)).open().map_err(failed)?;
        Ok(Arc::new(Sled(db)))
    }

    fn set_aside(&self) -> std::io::Result<()> {
        if !self.0.exists() {
            return Ok(());
        }
        // One is kept, for whoever wants to look at it; it holds nothing that the log has not.
        let aside = self.0.with_extension(ASIDE);
        remove(&aside)?;
        std::fs::rename(&self.0, aside)
    }

    fn discard(&self) -> std::io::Result<()> {
        self.remove_others()?;
        remove(&self.0.with_extension(ASIDE))?;
        remove(&self.0)
    }
}

/// Removes whatever stands there.
fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

struct Sled(sled::Db);

fn failed(error: sled::Error) -> IndexFailed {
    IndexFailed(error.to_string())
}

impl Index for Sled {
    fn get(&self, key: u128) -> Result<Option<Bytes>, IndexFailed> {
        let row = self.0.get(key.to_be_bytes()).map_err(failed)?;
        Ok(row.map(|row| Bytes::copy_from_slice(&row)))
    }

    fn range(&self, after: Option<u128>, max: usize) -> Result<Vec<(u128, Bytes)>, IndexFailed> {
        let rows = match after {
            Some(u128::MAX) => return Ok(Vec::new()),
            Some(after) => self.0.range((after + 1).to_be_bytes()..),
            None => self.0.iter(),
        };
        rows.take(max)
            .map(|row| {
                let (key, row) = row.map_err(failed)?;
                let key =
                    key.as_ref().try_into().map_err(|_| IndexFailed("a key of a strange length".into()))?;
                Ok((u128::from_be_bytes(key), Bytes::copy_from_slice(&row)))
            })
            .collect()
    }

    fn write(&self, puts: &[(u128, Bytes)], removes: &[u128]) -> Result<(), IndexFailed> {
        let mut batch = sled::Batch::default();
        puts.iter().for_each(|(key, row)| batch.insert(&key.to_be_bytes(), row.as_ref()));
        removes.iter().for_each(|key| batch.remove(&key.to_be_bytes()));
        self.0.apply_batch(batch).map_err(failed)
    }
}
