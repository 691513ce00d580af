//! P9: what is broken on one node mends itself once nothing is in its way any more, without an operator.

use super::Offence;
use crate::history::{History, What};

pub(super) fn check(history: &History) -> Vec<Offence> {
    let never = |event: &&crate::history::Event| matches!(event.what, What::Healed { took: None });
    let what = "all was mended, and not all nodes were well again";
    history
        .events
        .iter()
        .filter(never)
        .map(|event| Offence::new("P9", "the cluster", event.at, what))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::forged::{history, told};

    #[test]
    fn a_cluster_recovers_by_itself() {
        assert_eq!(check(&history([(9, What::Healed { took: Some(4_000) })])), []);
        let forged = history([(9, What::Healed { took: None })]);
        assert_eq!(told(&check(&forged)), [("P9", "the cluster")]);
    }
}
