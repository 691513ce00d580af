//! An index whose rows are sealed with the at-rest key that seals now ([`crate::seal`]). The keys of rows, which are ids of messages, are not.

use std::sync::Arc;

use bytes::Bytes;

use super::{Index, IndexFailed, Shelf};
use crate::seal::Keyring;

/// A place for an index that is sealed. Rows of another key count as rows that are not what the log has: they are put again.
pub struct Sealed<S> {
    /// The place.
    pub shelf: S,
    /// Of which the first key seals; without one rows are put as they are.
    pub keys: Keyring,
}

impl<S: Shelf> Shelf for Sealed<S> {
    fn open(&self) -> Result<Arc<dyn Index>, IndexFailed> {
        let index = self.shelf.open()?;
        Ok(match self.keys.sealing() {
            Some(_) => Arc::new(SealedIndex { index, keys: self.keys.clone() }),
            None => index,
        })
    }

    fn set_aside(&self) -> std::io::Result<()> {
        self.shelf.set_aside()
    }

    fn discard(&self) -> std::io::Result<()> {
        self.shelf.discard()
    }
}

struct SealedIndex {
    index: Arc<dyn Index>,
    keys: Keyring,
}

impl SealedIndex {
    /// What the key does not open is an empty row, which is nobody's: it has not the CRC that the log knows.
    fn opened(&self, key: u128, row: &[u8]) -> Bytes {
        self.keys.open_row(key, row).unwrap_or_default().into()
    }
}

impl Index for SealedIndex {
    fn get(&self, key: u128) -> Result<Option<Bytes>, IndexFailed> {
        Ok(self.index.get(key)?.map(|row| self.opened(key, &row)))
    }

    fn range(&self, after: Option<u128>, max: usize) -> Result<Vec<(u128, Bytes)>, IndexFailed> {
        let rows = self.index.range(after, max)?;
        Ok(rows.into_iter().map(|(key, row)| (key, self.opened(key, &row))).collect())
    }

    fn write(&self, puts: &[(u128, Bytes)], removes: &[u128]) -> Result<(), IndexFailed> {
        let puts: Vec<_> =
            puts.iter().map(|(key, row)| (*key, self.keys.seal_row(*key, row).into())).collect();
        self.index.write(&puts, removes)
    }
}
