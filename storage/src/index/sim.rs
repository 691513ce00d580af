//! An index in memory that lies as sled does: it forgets what was written last, keeps rows that were removed, flips octets, is
//! another node's, panics, fails, or does not open.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::{Index, IndexFailed, Shelf};

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Nothing.
    None,
    /// Every third write is lost.
    LosesWrites,
    /// What it returns has a flipped octet.
    Flips,
    /// Calls panic.
    Panics,
    /// Calls fail.
    Fails,
    /// It does not open.
    Shut,
    /// It begins from the first key again and again.
    Loops,
}

#[derive(Default)]
struct State {
    rows: BTreeMap<u128, Bytes>,
    writes: u64,
    answers: u64,
    set_aside: u64,
}

/// A place for a lying index. Clones share it; it outlives a node as a directory would.
#[derive(Clone)]
pub struct SimShelf {
    state: Arc<Mutex<State>>,
    lie: Arc<Mutex<Lie>>,
}

impl Default for SimShelf {
    fn default() -> SimShelf {
        SimShelf { state: Arc::default(), lie: Arc::new(Mutex::new(Lie::None)) }
    }
}

impl SimShelf {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lies like this from now on.
    pub fn lie(&self, lie: Lie) {
        *self.lie.lock().unwrap_or_else(PoisonError::into_inner) = lie;
    }

    /// Puts a row behind everybody's back.
    pub fn plant(&self, key: u128, row: Bytes) {
        self.state().rows.insert(key, row);
    }

    /// Its keys.
    pub fn keys(&self) -> Vec<u128> {
        self.state().rows.keys().copied().collect()
    }

    /// How often it was asked for a row, and how often it was set aside.
    pub fn counts(&self) -> (u64, u64) {
        let state = self.state();
        (state.answers, state.set_aside)
    }

    fn check(&self) -> Result<Lie, IndexFailed> {
        let lie = *self.lie.lock().unwrap_or_else(PoisonError::into_inner);
        match lie {
            Lie::Panics => panic!("the simulated index panics"),
            Lie::Fails => Err(IndexFailed("simulated failure".into())),
            lie => Ok(lie),
        }
    }
}

impl Shelf for SimShelf {
    fn open(&self) -> Result<Arc<dyn Index>, IndexFailed> {
        let lie = *self.lie.lock().unwrap_or_else(PoisonError::into_inner);
        if lie == Lie::Shut {
            Err(IndexFailed("it does not open".into()))
        } else {
            Ok(Arc::new(self.clone()))
        }
    }

    fn discard(&self) -> std::io::Result<()> {
        self.set_aside()
    }

    fn set_aside(&self) -> std::io::Result<()> {
        let mut state = self.state();
        state.rows.clear();
        state.set_aside += 1;
        Ok(())
    }
}

impl Index for SimShelf {
    fn get(&self, key: u128) -> Result<Option<Bytes>, IndexFailed> {
        let lie = self.check()?;
        let mut state = self.state();
        state.answers += 1;
        let mut row = state.rows.get(&key).map(|row| row.to_vec());
        if let (Lie::Flips, Some(first)) = (lie, row.as_mut().and_then(|row| row.first_mut())) {
            *first ^= 1;
        }
        Ok(row.map(Into::into))
    }

    fn range(&self, after: Option<u128>, max: usize) -> Result<Vec<(u128, Bytes)>, IndexFailed> {
        use std::ops::Bound;
        let after = if self.check()? == Lie::Loops { None } else { after };
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let state = self.state();
        Ok(state.rows.range((from, Bound::Unbounded)).take(max).map(|(k, v)| (*k, v.clone())).collect())
    }

    fn write(&self, puts: &[(u128, Bytes)], removes: &[u128]) -> Result<(), IndexFailed> {
        let lie = self.check()?;
        let mut state = self.state();
        state.writes += 1;
        if lie == Lie::LosesWrites && state.writes.is_multiple_of(3) {
            return Ok(());
        }
        state.rows.extend(puts.iter().cloned());
        removes.iter().for_each(|key| drop(state.rows.remove(key)));
        Ok(())
    }
}
