//! A snapshot is a manifest: the machine's tables and rows, and a list of the bodies they need. It goes in parts of bounded size, which are
//! read as they are sent; the follower writes the rows to its log as they come, fetches the bodies it lacks, and installs. A crash of
//! either leaves nothing but work to do again.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use bincode::{Decode, Encode};
use holdfast_storage::codec::{decode_large, encode};
use holdfast_storage::{Bytes, LogIndex, LogPosition, ReadError};

use crate::codec::Tables;
use crate::limits::{SNAPSHOT_BYTES_MAX, SNAPSHOT_PART_BYTES};
use crate::machine::Steps;
use crate::state_machine::{Incoming, StateMachine};

/// A snapshot that came in. Its rows are in the log, and count once it is installed.
pub(crate) struct Contents {
    pub(crate) tables: Tables,
    pub(crate) incoming: Incoming,
    pub(crate) bodies: BTreeSet<LogIndex>,
}

/// What openraft hands around as a snapshot. It is made when one is sent, not when one is taken.
#[derive(Clone)]
pub(crate) enum Manifest {
    /// A position and nothing to send.
    None,
    /// The state of this node, to be read when it is sent.
    Here(StateMachine),
    /// Another node's, until it is installed.
    Contents(Arc<Mutex<Option<Contents>>>),
}

impl std::fmt::Debug for Manifest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Manifest::None => "None",
            Manifest::Here(_) => "Here",
            Manifest::Contents(_) => "Contents",
        })
    }
}

/// Some of a snapshot's tables, rows and bodies: a large one goes in parts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Part {
    /// Of the encoded tables.
    pub(crate) tables: Vec<u8>,
    pub(crate) rows: Vec<(u128, Vec<u8>)>,
    pub(crate) bodies: Vec<LogIndex>,
}

/// Cuts a state into parts of bounded size while it is read; at least one.
pub(crate) struct Parts {
    /// What is left of the encoded tables.
    tables: Bytes,
    steps: Steps,
    is_first: bool,
}

impl Parts {
    pub(crate) fn new(tables: &Tables, steps: Steps) -> Parts {
        Parts { tables: encode(tables).into(), steps, is_first: true }
    }
}

impl Iterator for Parts {
    type Item = Result<Part, ReadError>;

    fn next(&mut self) -> Option<Result<Part, ReadError>> {
        let piece = self.tables.split_to(SNAPSHOT_PART_BYTES.min(self.tables.len()));
        let mut part = Part { tables: piece.to_vec(), ..Part::default() };
        let mut bytes = piece.len();
        while bytes < SNAPSHOT_PART_BYTES {
            let step = match self.steps.next() {
                None => break,
                Some(Ok(step)) => step,
                Some(Err(error)) => return Some(Err(error)),
            };
            bytes += step.rows.iter().map(|(key, row)| row.len() + size_of_val(key)).sum::<usize>();
            bytes += step.bodies.len() * (size_of::<LogIndex>() + 1);
            part.rows.extend(step.rows);
            part.bodies.extend(step.bodies);
        }
        let is_any = std::mem::take(&mut self.is_first) || part != Part::default();
        is_any.then_some(Ok(part))
    }
}

/// What is kept of the parts of a snapshot that have come so far. One snapshot at a time: the first part of another one begins anew.
#[derive(Debug, Default)]
pub(crate) struct Assembly {
    /// Who sends it, and its position.
    of: Option<(u64, Option<LogPosition>)>,
    next: u32,
    bytes: usize,
    tables: Vec<u8>,
    bodies: BTreeSet<LogIndex>,
}

impl Assembly {
    /// Takes a part, and gives back its rows.
    ///
    /// # Errors
    /// If it is not the next one of this snapshot, or the snapshot is larger than [`SNAPSHOT_BYTES_MAX`].
    pub(crate) fn add(
        &mut self,
        of: (u64, Option<LogPosition>),
        number: u32,
        part: Part,
    ) -> Result<Vec<(u128, Vec<u8>)>, String> {
        if number == 0 {
            *self = Assembly { of: Some(of), ..Assembly::default() };
        }
        if self.of != Some(of) || self.next != number {
            return Err(format!("part {number} of a snapshot is not the one that is waited for"));
        }
        self.next += 1;
        self.bytes += part.tables.len() + part.rows.iter().map(|(_, row)| row.len()).sum::<usize>();
        if self.bytes > SNAPSHOT_BYTES_MAX {
            *self = Assembly::default();
            return Err("the snapshot is larger than this node takes".into());
        }
        self.tables.extend(part.tables);
        self.bodies.extend(part.bodies);
        Ok(part.rows)
    }

    /// The tables and the bodies, once all parts are there.
    ///
    /// # Errors
    /// If some are missing, or the tables do not decode.
    pub(crate) fn complete(
        &mut self,
        of: (u64, Option<LogPosition>),
        parts: u32,
    ) -> Result<(Tables, BTreeSet<LogIndex>), String> {
        let found = std::mem::take(self);
        if found.of != Some(of) || found.next != parts {
            return Err(format!("{} of {parts} parts of the snapshot have come", found.next));
        }
        let tables = decode_large("snapshot", &found.tables).map_err(|e| e.to_string())?;
        Ok((tables, found.bodies))
    }
}

#[cfg(test)]
mod tests {
    use holdfast_storage::Term;

    use super::*;
    use crate::machine::Step;

    #[test]
    fn p1_a_snapshot_in_parts_is_the_same_or_none() {
        let rows: Vec<(u128, Vec<u8>)> = (0..40_000).map(|key| (key, vec![key as u8; 300])).collect();
        let bodies: BTreeSet<LogIndex> = (0..900_000).map(LogIndex).collect();
        let step = |n: usize| {
            let rows = rows[n * 400..(n + 1) * 400].to_vec();
            Step { rows, bodies: bodies.iter().skip(n * 9000).take(9000).copied().collect() }
        };
        let steps: Vec<_> = (0..100).map(|n| Ok(step(n))).collect();
        let tables = Tables { machine: vec![7; 3 * SNAPSHOT_PART_BYTES], ..Tables::default() };
        let parts = Parts::new(&tables, Box::new(steps.into_iter()));
        let parts: Vec<Part> = parts.map(|part| part.unwrap()).collect();
        assert_eq!(Parts::new(&Tables::default(), Box::new(std::iter::empty())).count(), 1);
        let at = |index| (1, Some(LogPosition { term: Term(1), index: LogIndex(index) }));
        assert!(parts.len() > 3, "{} parts", parts.len());
        let mut assembly = Assembly::default();
        let count = parts.len() as u32;
        // Broken off and begun anew, another snapshot in between.
        for (number, part) in parts.iter().take(2).enumerate() {
            assembly.add(at(7), number as u32, part.clone()).unwrap();
        }
        assert!(assembly.add(at(7), 3, parts[3].clone()).is_err(), "one is missing");
        assembly.add(at(8), 0, parts[0].clone()).unwrap();
        assert!(assembly.add(at(7), 2, parts[2].clone()).is_err(), "that one was given up");
        let mut found = Vec::new();
        for (number, part) in parts.into_iter().enumerate() {
            assert!(encode(&part).len() <= SNAPSHOT_PART_BYTES + 300_000);
            found.extend(assembly.add(at(7), number as u32, part).unwrap());
        }
        assert_eq!(found, rows);
        assert!(Assembly::default().complete(at(7), count).is_err(), "a node that was restarted");
        assert_eq!(assembly.complete(at(7), count).unwrap(), (tables, bodies));
        assert!(assembly.complete(at(7), count).is_err(), "it is installed once");
    }
}
