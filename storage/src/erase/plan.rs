//! Pure. What one round of erasing overwrites: which bodies, as which ranges of which segments.

use std::collections::BTreeMap;

use crate::log::state::Dying;
use crate::position::SegmentId;

/// A range of a segment, bytes.
pub(crate) type Range = (u32, u32);

/// Takes bodies off the front of `dying`, at the most `count`, until their octets exceed `bytes_max` (at least one), and merges their
/// ranges where they touch.
pub(crate) fn round(
    dying: &mut Vec<Dying>,
    count: usize,
    bytes_max: u64,
) -> (Vec<Dying>, BTreeMap<SegmentId, Vec<Range>>) {
    let mut bytes = 0;
    let count = dying
        .iter()
        .take(count)
        .take_while(|d| {
            let before = bytes;
            bytes += d.location.body_bytes as u64;
            before < bytes_max
        })
        .count();
    let taken: Vec<Dying> = dying.drain(..count).collect();
    let mut ranges: BTreeMap<SegmentId, Vec<Range>> = BTreeMap::new();
    for d in &taken {
        let range = (d.location.body_offset() as u32, d.location.body_bytes);
        ranges.entry(d.location.segment).or_default().push(range);
    }
    for list in ranges.values_mut() {
        merge(list);
    }
    (taken, ranges)
}

/// Sorts ranges and joins those that touch or overlap.
pub(crate) fn merge(list: &mut Vec<Range>) {
    list.sort_unstable();
    let mut merged: Vec<Range> = Vec::with_capacity(list.len());
    for (start, len) in list.drain(..) {
        match merged.last_mut() {
            Some((s, l)) if *s + *l >= start => *l = (*l).max(start + len - *s),
            _ => merged.push((start, len)),
        }
    }
    *list = merged;
}

/// Whether `list`, merged, covers the range.
pub(crate) fn covers(list: &[Range], (start, len): Range) -> bool {
    let at = list.partition_point(|(s, _)| *s <= start);
    at > 0 && {
        let (s, l) = list[at - 1];
        s + l >= start + len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_merge_and_cover() {
        let mut list = vec![(100, 10), (0, 50), (50, 50), (200, 5), (105, 10)];
        merge(&mut list);
        assert_eq!(list, [(0, 115), (200, 5)]);
        assert!(covers(&list, (0, 115)) && covers(&list, (30, 5)) && covers(&list, (200, 5)));
        assert!(!covers(&list, (110, 10)) && !covers(&list, (199, 2)) && !covers(&list, (300, 1)));
        assert!(!covers(&[], (0, 1)));
    }
}
