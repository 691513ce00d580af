//! Pure. What an answer of DNS says of a name: its records by way of its aliases, or that it has none; and what of that DNSSEC proves
//! (RFC 4035).

use hickory_resolver::net::NoRecords;
use hickory_resolver::proto::dnssec::rdata::DNSSECRData;
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};

/// Aliases that are followed for one name.
const ALIASES_MAX: usize = 8;

/// Records of one name and type.
#[derive(Debug, PartialEq)]
pub(super) struct Found {
    /// Whose they are: the name that was asked for, or what it is an alias of.
    pub(super) owner: String,
    pub(super) records: Vec<RData>,
    /// Whether each of them, and each alias on the way, is signed up to the trust anchor.
    pub(super) secure: bool,
    /// Whether what stands at the name that was asked for is: its own records, or its alias.
    pub(super) begins_secure: bool,
}

/// Why there are none.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Nothing {
    /// The name does not exist.
    NoName,
    /// The name has none of this type.
    NoRecords,
    /// It could not be found out, or what was found out is not to be believed.
    Failed(String),
}

/// What an answer without records brings for a proof that there are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Denial {
    /// The zone proves it.
    Proven,
    /// The zone is proven to have no proofs to give.
    Unsigned,
    /// What it brings is a stranger's: an answer to another question, or a forgery.
    Foreign,
    /// It brings nothing.
    Bare,
}

pub(super) fn text(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}

/// Finds the records of `name` in an answer, by way of its aliases. Whatever else stands in it counts for nothing, however well it
/// is signed: it may be somebody else's.
pub(super) fn follow(answers: &[Record], name: &str, kind: RecordType) -> Option<Found> {
    let mut owner = name.trim_end_matches('.').to_ascii_lowercase();
    let mut steps = Vec::new();
    for _ in 0..ALIASES_MAX {
        let of = |kind| answers.iter().filter(move |r| r.record_type() == kind);
        let own: Vec<&Record> = of(kind).filter(|r| text(&r.name) == owner).collect();
        if !own.is_empty() {
            steps.push(own.iter().all(|r| r.proof.is_secure()));
            let records = own.iter().map(|r| r.data.clone()).collect();
            let (secure, begins_secure) = (steps.iter().all(|step| *step), steps[0]);
            return Some(Found { owner, records, secure, begins_secure });
        }
        let alias = of(RecordType::CNAME).find(|r| text(&r.name) == owner)?;
        let RData::CNAME(to) = &alias.data else { return None };
        steps.push(alias.proof.is_secure());
        owner = text(&to.0);
    }
    None
}

/// What was denied.
pub(super) fn denied(answer: &NoRecords) -> Nothing {
    if answer.response_code == ResponseCode::NXDomain { Nothing::NoName } else { Nothing::NoRecords }
}

/// What a validated answer without records is worth. hickory checks the NSEC records of signed zones, and lets answers pass of which
/// all authority records are of unsigned ones; that they are of a zone above the name it does not ask.
pub(super) fn denial(answer: &NoRecords) -> Denial {
    let name = answer.query.name();
    let authorities = answer.authorities.as_deref().unwrap_or_default();
    let is_proof = |data: &RData| matches!(data, RData::DNSSEC(DNSSECRData::NSEC(_) | DNSSECRData::NSEC3(_)));
    if authorities.iter().any(|r| is_proof(&r.data) && r.proof.is_secure()) {
        return Denial::Proven;
    }
    let unsigned = |owner: &Name, is_insecure: bool| is_insecure && owner.zone_of(name);
    let soa = answer.soa.iter().any(|r| unsigned(&r.name, r.proof.is_insecure()));
    let authority = authorities
        .iter()
        .filter(|r| matches!(r.data, RData::SOA(_)))
        .any(|r| unsigned(&r.name, r.proof.is_insecure()));
    match soa || authority {
        true => Denial::Unsigned,
        false if authorities.is_empty() && answer.soa.is_none() => Denial::Bare,
        false => Denial::Foreign,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hickory_resolver::proto::dnssec::Proof;
    use hickory_resolver::proto::op::Query;
    use hickory_resolver::proto::rr::rdata::{A, CNAME, NS, SOA};

    use super::*;

    fn record(owner: &str, data: RData, proof: Proof) -> Record {
        let mut record = Record::from_rdata(Name::from_ascii(owner).unwrap(), 60, data);
        record.proof = proof;
        record
    }

    fn a(last: u8) -> RData {
        RData::A(A::new(192, 0, 2, last))
    }

    fn alias(to: &str) -> RData {
        RData::CNAME(CNAME(Name::from_ascii(to).unwrap()))
    }

    /// An answer may hold records of somebody who signs as well as anybody.
    #[test]
    fn only_records_of_the_name_that_was_asked_for_count() {
        use Proof::{Indeterminate, Insecure, Secure};
        let evil = || record("mx.evil.example.", a(66), Secure);
        let found = |answers: &[Record]| {
            follow(answers, "MX.victim.example", RecordType::A).map(|f| (f.owner, f.records.len(), f.secure))
        };
        let own = |proof| record("mx.victim.example.", a(1), proof);
        let owner = || "mx.victim.example".to_string();
        assert_eq!(found(&[evil(), own(Secure), evil()]), Some((owner(), 1, true)));
        assert_eq!(found(&[evil()]), None);
        assert_eq!(found(&[evil(), own(Insecure)]), Some((owner(), 1, false)));
        assert_eq!(found(&[own(Secure), own(Indeterminate)]), Some((owner(), 2, false)));
        let to = |name: &str, proof| record("mx.victim.example.", alias(name), proof);
        let host = |proof| record("host.example.", a(2), proof);
        let other = || "host.example".to_string();
        assert_eq!(found(&[host(Secure), to("host.example.", Secure), evil()]), Some((other(), 1, true)));
        assert_eq!(found(&[host(Secure), to("host.example.", Insecure)]), Some((other(), 1, false)));
        assert_eq!(found(&[to("mx.victim.example.", Secure)]), None, "an alias of itself");
        let begins = |first, last| {
            let answers = [host(last), to("host.example.", first)];
            follow(&answers, "mx.victim.example", RecordType::A).map(|f| (f.secure, f.begins_secure))
        };
        assert_eq!(
            begins(Secure, Insecure),
            Some((false, true)),
            "an alias that is signed, of one that is not"
        );
        assert_eq!(begins(Insecure, Secure), Some((false, false)));
    }

    /// A stranger's records prove nothing, however true they are.
    #[test]
    fn a_denial_is_believed_if_it_is_the_zones_own() {
        use Proof::{Bogus, Insecure, Secure};
        let name = |text: &str| Name::from_ascii(text).unwrap();
        let soa = |owner: &str, proof| {
            let data = SOA::new(name("ns.example."), name("admin.example."), 1, 2, 3, 4, 5);
            record(owner, RData::SOA(data), proof)
        };
        let ns = |owner: &str, proof| record(owner, RData::NS(NS(name("ns.example."))), proof);
        let nsec = |proof| {
            let nsec = hickory_resolver::proto::dnssec::rdata::NSEC::new(name("z.victim.example."), []);
            record("mx.victim.example.", RData::DNSSEC(DNSSECRData::NSEC(nsec)), proof)
        };
        let judge = |authorities: Vec<Record>| {
            let query = Query::query(name("_25._tcp.mx.victim.example."), RecordType::TLSA);
            let mut answer = NoRecords::new(query, ResponseCode::NoError);
            answer.authorities = (!authorities.is_empty()).then(|| Arc::from(authorities));
            denial(&answer)
        };
        assert_eq!(judge(vec![soa("victim.example.", Secure), nsec(Secure)]), Denial::Proven);
        assert_eq!(judge(vec![soa("victim.example.", Insecure)]), Denial::Unsigned, "its zone is not signed");
        assert_eq!(judge(vec![soa("evil.example.", Insecure)]), Denial::Foreign);
        assert_eq!(judge(vec![soa("victim.example.", Bogus)]), Denial::Foreign);
        assert_eq!(
            judge(vec![ns("victim.example.", Insecure)]),
            Denial::Foreign,
            "a delegation is no denial"
        );
        assert_eq!(judge(vec![nsec(Bogus)]), Denial::Foreign);
        assert_eq!(judge(Vec::new()), Denial::Bare);
    }
}
