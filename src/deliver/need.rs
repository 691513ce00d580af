//! Pure. What TLS one host gets: by its route's policy, by its TLSA records (RFC 7672) and by its domain's MTA-STS policy (RFC 8461),
//! which is asked only where DANE says nothing.
//!
//! | policy | TLSA records | MTA-STS | session |
//! | --- | --- | --- | --- |
//! | `none` | | | in the clear |
//! | `opportunistic` | usable | | with the certificate that they vouch for |
//! | `opportunistic` | could not be looked up | | not with this host |
//! | `opportunistic` | none, or none usable | enforced | with a certificate for the MX's name, if the policy names it; else not with this host |
//! | `opportunistic` | none usable | | with any certificate |
//! | `opportunistic` | none | | if it is offered |
//! | `require` | | | with any certificate |
//! | `verify` | | | with a pinned key; or with a certificate for the host's name, which for an MX must be vouched for by DNSSEC or MTA-STS, or else the domain's |
//! | `dane` | usable, of a host whose place DNSSEC proves | | with the certificate that they vouch for |
//! | `dane` | anything else | | not with this host |

use std::sync::Arc;

use super::dane::Anchors;
use super::mta_sts::{Mode, Policy};
use super::tls::Trust;
use crate::queue::command::TlsPolicy;

/// What is known of a host's TLSA records.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Tlsa {
    /// Securely there, and these can be used.
    Usable(Arc<Anchors>),
    /// Securely there, and none can be used. Why, for people.
    Unusable(String),
    /// There are none that DNSSEC proves, or none were looked for. Why, for people.
    None(String),
    /// They may be there: the host is secure, and its records could not be looked up. Why, for people.
    Unknown(String),
}

/// The host, as far as it counts here.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Its name.
    pub name: &'a str,
    /// The domain whose MX it is.
    pub domain: Option<&'a str>,
    /// Whether DNSSEC proves that it is the domain's MX. True of the host of a route.
    pub is_proven: bool,
    /// Its TLSA records.
    pub tlsa: &'a Tlsa,
    /// Keys that its route has pinned.
    pub pins: &'a [[u8; 32]],
    /// What its domain's MTA-STS policy is.
    pub sts: Option<&'a Policy>,
}

/// How TLS is used with a host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Need {
    /// Never.
    Clear,
    /// With any certificate if it is offered; in the clear if that fails.
    IfOffered,
    /// Always; this certificate, or no mail.
    Always(Trust),
}

/// How TLS is used with a host under a policy.
///
/// # Errors
/// Why no mail may go there, with an enhanced status code. That may change.
pub fn need(policy: TlsPolicy, host: Candidate<'_>) -> Result<Need, String> {
    let for_name = |name: &str| Ok(Need::Always(Trust::WebPki(name.into())));
    let name = host.name;
    let listed = host.sts.is_some_and(|sts| sts.lists(name));
    match (policy, host.tlsa) {
        (TlsPolicy::None, _) => Ok(Need::Clear),
        (TlsPolicy::Dane, _) if !host.is_proven => {
            Err(format!("4.7.5 the MX of {} is not secured by DNSSEC", host.domain.unwrap_or(name)))
        }
        (TlsPolicy::Opportunistic | TlsPolicy::Dane, Tlsa::Usable(anchors)) => {
            Ok(Need::Always(Trust::Anchors(anchors.clone())))
        }
        (TlsPolicy::Dane, Tlsa::Unusable(why) | Tlsa::None(why))
        | (TlsPolicy::Dane | TlsPolicy::Opportunistic, Tlsa::Unknown(why)) => Err(why.clone()),
        (TlsPolicy::Opportunistic, _) if host.sts.is_some_and(|sts| sts.mode == Mode::Enforce) => {
            if listed {
                for_name(name)
            } else {
                Err(unlisted(name))
            }
        }
        (TlsPolicy::Opportunistic, Tlsa::Unusable(_)) => Ok(Need::Always(Trust::Any)),
        (TlsPolicy::Opportunistic, Tlsa::None(_)) => Ok(Need::IfOffered),
        (TlsPolicy::Require, _) => Ok(Need::Always(Trust::Any)),
        (TlsPolicy::Verify, _) => match (Anchors::of_pins(host.pins, name), host.domain) {
            (Some(pinned), _) => Ok(Need::Always(Trust::Anchors(Arc::new(pinned)))),
            (None, Some(_)) if host.sts.is_some_and(|sts| sts.mode == Mode::Enforce) && !listed => {
                Err(unlisted(name))
            }
            (None, Some(domain)) if !host.is_proven && !listed => for_name(domain),
            (None, _) => for_name(name),
        },
    }
}

fn unlisted(name: &str) -> String {
    format!("4.7.5 {name} is not among the MX hosts of its domain's MTA-STS policy")
}

/// What a session is called in the log, by how well it is known who is at the other end.
pub fn trust_word(need: &Need, is_proven: bool) -> &'static str {
    match need {
        // Whose MX it is came in the clear.
        Need::Always(Trust::Anchors(_)) if !is_proven => "Trusted",
        Need::Always(Trust::Anchors(_) | Trust::WebPki(_)) => "Verified",
        Need::Clear | Need::IfOffered | Need::Always(Trust::Any) => "Untrusted",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole table: each policy with each state of TLSA records and each MTA-STS policy, for an MX that is proven or not.
    #[test]
    fn the_table_of_tls_policies() {
        let anchors = || Arc::new(Anchors::of_pins(&[[1; 32]], "mx.example").unwrap());
        let why = || "why".to_string();
        let sts = |mode, mx: &str| Policy { mode, mx: vec![mx.into()], max_age_s: 60 };
        let stss = [
            None,
            Some(sts(Mode::None, "mx.example")),
            Some(sts(Mode::Testing, "mx.example")),
            Some(sts(Mode::Testing, "other.example")),
            Some(sts(Mode::Enforce, "mx.example")),
            Some(sts(Mode::Enforce, "other.example")),
        ];
        let tlsas = [Tlsa::Usable(anchors()), Tlsa::Unusable(why()), Tlsa::None(why()), Tlsa::Unknown(why())];
        let word = |need: Result<Need, String>| match need {
            Ok(Need::Clear) => "clear".to_string(),
            Ok(Need::IfOffered) => "if-offered".into(),
            Ok(Need::Always(Trust::Any)) => "any".into(),
            Ok(Need::Always(Trust::WebPki(name))) => name,
            Ok(Need::Always(Trust::Anchors(_))) => "anchors".into(),
            Err(_) => "-".into(),
        };
        // For each policy and state of TLSA records: without MTA-STS or with none, testing (listed, not), enforced (listed, not).
        let table = [
            (TlsPolicy::None, ["clear"; 4].map(|w| [w; 6])),
            (TlsPolicy::Require, ["any"; 4].map(|w| [w; 6])),
            (TlsPolicy::Dane, ["-"; 4].map(|w| [w; 6])),
            (
                TlsPolicy::Opportunistic,
                [
                    ["anchors"; 6],
                    ["any", "any", "any", "any", "mx.example", "-"],
                    ["if-offered", "if-offered", "if-offered", "if-offered", "mx.example", "-"],
                    ["-"; 6],
                ],
            ),
            (TlsPolicy::Verify, [["example", "example", "mx.example", "example", "mx.example", "-"]; 4]),
        ];
        for (policy, rows) in table {
            for (tlsa, row) in tlsas.iter().zip(rows) {
                for (sts, expected) in stss.iter().zip(row) {
                    let host = Candidate {
                        name: "mx.example",
                        domain: Some("example"),
                        is_proven: false,
                        tlsa,
                        pins: &[],
                        sts: sts.as_ref(),
                    };
                    assert_eq!(word(need(policy, host)), expected, "{policy:?} {tlsa:?} {sts:?}");
                }
            }
        }
    }

    #[test]
    fn dane_takes_a_proven_place_and_usable_records() {
        let usable = Tlsa::Usable(Arc::new(Anchors::of_pins(&[[1; 32]], "mx.example").unwrap()));
        let others = [Tlsa::Unusable("a".into()), Tlsa::None("b".into()), Tlsa::Unknown("c".into())];
        for (is_proven, domain) in [(true, Some("example")), (true, None), (false, Some("example"))] {
            let with = |tlsa| Candidate { name: "mx.example", domain, is_proven, tlsa, pins: &[], sts: None };
            assert_eq!(need(TlsPolicy::Dane, with(&usable)).is_ok(), is_proven);
            assert!(others.iter().all(|tlsa| need(TlsPolicy::Dane, with(tlsa)).is_err()));
        }
        let need = need(
            TlsPolicy::Opportunistic,
            Candidate {
                name: "mx.example",
                domain: Some("example"),
                is_proven: false,
                tlsa: &usable,
                pins: &[],
                sts: None,
            },
        );
        let need = need.unwrap();
        assert_eq!((trust_word(&need, false), trust_word(&need, true)), ("Trusted", "Verified"));
    }

    #[test]
    fn verify_asks_for_the_best_name_that_is_known() {
        let none = Tlsa::None(String::new());
        let host = Candidate {
            name: "mx.example",
            domain: Some("example"),
            is_proven: true,
            tlsa: &none,
            pins: &[],
            sts: None,
        };
        let web_pki = |name: &str| Ok(Need::Always(Trust::WebPki(name.into())));
        assert_eq!(need(TlsPolicy::Verify, host), web_pki("mx.example"), "DNSSEC vouches for the MX");
        let of_route = Candidate { domain: None, ..host };
        assert_eq!(need(TlsPolicy::Verify, of_route), web_pki("mx.example"));
        let pinned = need(TlsPolicy::Verify, Candidate { pins: &[[1; 32]], ..of_route });
        assert!(matches!(pinned, Ok(Need::Always(Trust::Anchors(_)))));
        assert_eq!(trust_word(&pinned.unwrap(), true), "Verified");
    }
}
