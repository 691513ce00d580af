//! Pure. Which destination a recipient's domain has: its route, or the MX of the domain; and when it has none, so that its mail is
//! held.
//!
//! | in the table of routes | mail that may go anywhere | other mail |
//! | --- | --- | --- |
//! | a route, its own or a wider one | goes there | goes there |
//! | removed with `--hold` | held | held |
//! | nothing | goes to the MX | held: its route is gone |

use crate::queue::command::{TlsMin, TlsPolicy};
use crate::queue::message::{Recipient, Tick};
use crate::queue::retry::is_expired;
use crate::queue::{Message, MessageId, Queue};
use crate::schedule::Key;

/// After a route was set, mail has at least this long to go there, however old it is, ms: it may have been held for longer than
/// its lifetime, or its route been wrong. An attempt is made at once, and later ones an hour apart at the most.
const AFTER_CHANGE_MS: u64 = 2 * 3600 * 1000;

/// Where mail goes next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// What it is called in the scheduler.
    pub key: Key,
    /// Hosts of a route, or the domain whose MX is asked for.
    pub way: Way,
    /// How TLS is used.
    pub tls: TlsPolicy,
    /// The oldest TLS version that is used.
    pub tls_min: TlsMin,
    /// Keys of which its hosts must have one; see [`crate::queue::command::Route`].
    pub pins: Vec<[u8; 32]>,
}

/// How hosts are found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Way {
    /// Configured hosts with ports, in order.
    Hosts(Vec<(String, u16)>),
    /// The MX of a domain.
    Mx(String),
}

/// Octets as people write them.
pub fn hex(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

/// A recipient's destination; `None` while it is held.
pub fn target(queue: &Queue, recipient: &Recipient) -> Option<Target> {
    let domain = recipient.address.domain();
    let route = match queue.route(domain) {
        Some((_, entry)) => Some(entry.route.as_ref()?),
        None if recipient.anywhere => None,
        None => return None,
    };
    let (tls, tls_min) = route.map_or_else(Default::default, |route| (route.tls, route.tls_min));
    let way = match route {
        Some(route) if !route.hosts.is_empty() => Way::Hosts(route.hosts.clone()),
        _ => Way::Mx(domain.into()),
    };
    let hosts = match &way {
        Way::Hosts(hosts) => hosts.iter().map(|(h, p)| format!("{h}:{p}")).collect::<Vec<_>>().join(","),
        Way::Mx(domain) => format!("mx:{domain}"),
    };
    let floor = if tls_min == TlsMin::Tls13 { "/1.3" } else { "" };
    let pins = route.map_or_else(Vec::new, |route| route.pins.clone());
    let pinned: String = pins.iter().map(|pin| format!("/{}", hex(&pin[..8]))).collect();
    Some(Target { key: format!("{hosts}/{}{floor}{pinned}", tls.word()), way, tls, tls_min, pins })
}

/// Whether some of its pending recipients are held.
pub fn is_held(queue: &Queue, message: &Message) -> bool {
    message.pending().any(|n| target(queue, &message.envelope.recipients[n as usize]).is_none())
}

/// Pending recipients that stand under a name in the table of routes.
pub fn pending_under<'a>(
    queue: &'a Queue,
    message: &'a Message,
    name: &'a str,
) -> impl Iterator<Item = u16> + 'a {
    message.pending().filter(move |n| {
        let domain = message.envelope.recipients[*n as usize].address.domain();
        queue.route(domain).is_some_and(|(found, _)| found == name)
    })
}

/// For how long a recipient's mail waits, ms.
pub fn lifetime_ms(queue: &Queue, recipient: &Recipient, default_ms: u64) -> u64 {
    let route = queue.route(recipient.address.domain()).and_then(|(_, entry)| entry.route.as_ref());
    route.and_then(|route| route.lifetime_ms).unwrap_or(default_ms)
}

/// Whether a recipient of a message has waited too long. One that is held has not (P10).
pub fn is_too_old(queue: &Queue, id: MessageId, recipient: &Recipient, default_ms: u64, now: Tick) -> bool {
    let lifetime = lifetime_ms(queue, recipient, default_ms);
    let since = queue.route(recipient.address.domain()).map(|(_, entry)| entry.since);
    is_expired(id.born(), lifetime, now)
        && target(queue, recipient).is_some()
        && since.is_none_or(|since| is_expired(since, lifetime.min(AFTER_CHANGE_MS), now))
}

#[cfg(test)]
mod tests {
    use holdfast_cluster::{LogIndex, LogPosition, Machine, Term};

    use super::*;
    use crate::queue::Command;
    use crate::queue::command::{Route, RouteChange};
    use crate::smtp::address::Mailbox;

    fn changed(changes: &[(&str, RouteChange)]) -> Queue {
        let mut queue = Queue::default();
        for (n, (domain, change)) in changes.iter().enumerate() {
            let at = LogPosition { term: Term(1), index: LogIndex(n as u64 + 1) };
            let command = Command::Route { domain: (*domain).into(), change: change.clone(), only_if: None };
            queue.apply(at, &command.encode(), 0).unwrap();
        }
        queue
    }

    fn to(host: &str) -> RouteChange {
        let (tls, tls_min) = (TlsPolicy::Require, TlsMin::Tls13);
        let lifetime_ms = Some(1000);
        RouteChange::Set(Route {
            hosts: vec![(host.into(), 25)],
            tls,
            tls_min,
            lifetime_ms,
            pins: Vec::new(),
        })
    }

    fn recipient(anywhere: bool) -> Recipient {
        Recipient::new(Mailbox::parse("r@a.example").unwrap(), anywhere)
    }

    #[test]
    fn the_table() {
        let key = |changes: &[_], anywhere| {
            target(&changed(changes), &recipient(anywhere)).map(|target| target.key)
        };
        let (own, wide) = (("a.example", to("own")), ("*", to("wide")));
        let hold = ("a.example", RouteChange::Hold);
        let gone = ("a.example", RouteChange::Remove);
        for (changes, anywhere, expected) in [
            (vec![own.clone()], false, Some("own:25/require/1.3")),
            (vec![wide.clone()], false, Some("wide:25/require/1.3")),
            (vec![wide.clone(), own.clone(), hold.clone()], true, None),
            (vec![own.clone(), hold.clone(), own.clone()], false, Some("own:25/require/1.3")),
            (vec![wide.clone(), own.clone(), hold.clone(), gone.clone()], false, Some("wide:25/require/1.3")),
            (vec![own.clone(), gone.clone()], false, None),
            (vec![own, gone], true, Some("mx:a.example/opportunistic")),
        ] {
            assert_eq!(key(&changes, anywhere).as_deref(), expected, "{changes:?}, anywhere={anywhere}");
        }
    }

    /// P10: what is held does not grow too old, and has time to go once it is released.
    #[test]
    fn p10_held_mail_does_not_expire() {
        let born = MessageId::new(Tick(0), 1, 1, 1);
        let tick = |queue: &mut Queue, now| {
            let at = LogPosition { term: Term(1), index: LogIndex(99) };
            queue.apply(at, &Command::Tick { now: Tick(now) }.encode(), 0).unwrap();
        };
        let too_old = |queue: &Queue, now| is_too_old(queue, born, &recipient(false), 5000, Tick(now));
        let mut queue = changed(&[("a.example", to("own"))]);
        assert_eq!((too_old(&queue, 999), too_old(&queue, 1000)), (false, true), "its route's lifetime");
        let hold = Command::Route { domain: "a.example".into(), change: RouteChange::Hold, only_if: None };
        let at = LogPosition { term: Term(1), index: LogIndex(100) };
        queue.apply(at, &hold.encode(), 0).unwrap();
        assert!(!too_old(&queue, 1_000_000), "held");
        tick(&mut queue, 1_000_000);
        let set = Command::Route { domain: "a.example".into(), change: to("own"), only_if: None };
        queue.apply(at, &set.encode(), 0).unwrap();
        assert_eq!((too_old(&queue, 1_000_999), too_old(&queue, 1_001_000)), (false, true), "released");
        assert!(!too_old(&changed(&[]), 1_000_000), "its route is gone");
    }
}
