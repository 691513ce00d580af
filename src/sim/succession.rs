//! Who leads, term after term, and who hands mail off: the latter as customers see it at their doors, whatever a node believes of its
//! right to.

use std::collections::BTreeMap;
use std::time::Duration;

/// What is on its way from a node to a customer arrives within this time: nothing cuts or slows these links.
const ON_ITS_WAY: Duration = Duration::from_millis(100);

/// What was seen so far.
#[derive(Default)]
pub(super) struct Succession {
    leaders: BTreeMap<u64, u64>,
    /// The newest term whose leader has handed something off, and since when.
    hands_off: Option<(u64, Duration)>,
}

impl Succession {
    /// A node says that it leads in a term. Whether nobody was seen to lead in it before.
    pub(super) fn leads(&mut self, node: u64, term: u64) -> Result<bool, String> {
        let is_new = !self.leaders.contains_key(&term);
        match *self.leaders.entry(term).or_insert(node) {
            leader if leader == node => Ok(is_new),
            leader => Err(format!("nodes {leader} and {node} lead in term {term}")),
        }
    }

    /// A customer has the final dot of a node's.
    pub(super) fn hands_off(&mut self, node: u64, now: Duration) -> Result<(), String> {
        let Some((&term, _)) = self.leaders.iter().rev().find(|(_, leader)| **leader == node) else {
            return Err(format!("node {node} hands mail off and never led"));
        };
        match self.hands_off {
            Some((newest, since)) if term < newest && now > since + ON_ITS_WAY => {
                let successor = self.leaders[&newest];
                Err(format!(
                    "node {node}, leader of term {term}, hands mail off at {now:?}, and node {successor} of term {newest} since {since:?}"
                ))
            }
            Some((newest, _)) if term <= newest => Ok(()),
            _ => {
                self.hands_off = Some((term, now));
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_leader_a_term_and_nobody_after_its_successor() {
        let ms = Duration::from_millis;
        let mut seen = Succession::default();
        assert!(seen.hands_off(1, ms(0)).is_err(), "it never led");
        assert_eq!((seen.leads(1, 1), seen.leads(1, 1)), (Ok(true), Ok(false)));
        assert!(seen.leads(2, 1).is_err());
        assert_eq!(seen.hands_off(1, ms(10)), Ok(()));
        assert_eq!(seen.leads(2, 2), Ok(true));
        assert_eq!(seen.hands_off(1, ms(20)), Ok(()), "its successor has not begun");
        assert_eq!(seen.hands_off(2, ms(100)), Ok(()));
        assert_eq!(seen.hands_off(1, ms(200)), Ok(()), "it was on its way");
        assert!(seen.hands_off(1, ms(201)).is_err());
        assert_eq!(seen.leads(1, 3), Ok(true));
        assert_eq!(seen.hands_off(1, ms(300)), Ok(()), "it leads again");
    }
}
