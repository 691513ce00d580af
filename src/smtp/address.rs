//! Pure. Mailboxes and domains as RFC 5321 §4.1.2 writes them.

use std::fmt;

use bincode::{Decode, Encode};

/// Longest local part, domain and path, octets (RFC 5321 §4.5.3.1.1 to §4.5.3.1.3).
pub const LOCAL_PART_BYTES_MAX: usize = 64;
/// See [`LOCAL_PART_BYTES_MAX`].
pub const DOMAIN_BYTES_MAX: usize = 255;
/// See [`LOCAL_PART_BYTES_MAX`].
pub const PATH_BYTES_MAX: usize = 256;

/// A mailbox: the local part as it was written, the domain in lower case (RFC 5321 §2.4: only the domain folds).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Encode, Decode)]
pub struct Mailbox {
    local: String,
    domain: String,
}

/// Where mail comes from: a mailbox, or the null reverse-path of a notice (RFC 5321 §4.5.5).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Encode, Decode)]
pub struct ReversePath(pub Option<Mailbox>);

/// Why text is no address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadAddress {
    /// Not of the form that RFC 5321 gives.
    #[error("bad address syntax")]
    Syntax,
    /// A part is longer than RFC 5321 §4.5.3.1 allows.
    #[error("address too long")]
    TooLong,
    /// Octets beyond ASCII without SMTPUTF8 (RFC 6531 §3.3).
    #[error("address is not ASCII")]
    NotAscii,
}

impl Mailbox {
    /// The local part as it was written, quotes included.
    pub fn local(&self) -> &str {
        &self.local
    }

    /// The domain in lower case; an address literal keeps its brackets.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Parses `local@domain`.
    ///
    /// # Errors
    /// [`BadAddress`].
    pub fn parse(text: &str) -> Result<Mailbox, BadAddress> {
        if !text.is_ascii() {
            return Err(BadAddress::NotAscii);
        }
        let at = if text.starts_with('"') {
            let end = quoted_end(text).ok_or(BadAddress::Syntax)?;
            if text.as_bytes().get(end) != Some(&b'@') {
                return Err(BadAddress::Syntax);
            }
            end
        } else {
            let at = text.find('@').ok_or(BadAddress::Syntax)?;
            if !text[..at].split('.').all(is_atom) {
                return Err(BadAddress::Syntax);
            }
            at
        };
        let (local, domain) = (&text[..at], &text[at + 1..]);
        if local.len() > LOCAL_PART_BYTES_MAX
            || domain.len() > DOMAIN_BYTES_MAX
            || text.len() > PATH_BYTES_MAX
        {
            return Err(BadAddress::TooLong);
        }
        if !is_domain(domain) {
            return Err(BadAddress::Syntax);
        }
        Ok(Mailbox { local: local.into(), domain: domain.to_ascii_lowercase() })
    }
}

impl fmt::Display for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.local, self.domain)
    }
}

impl fmt::Display for ReversePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |mailbox| mailbox.fmt(f))
    }
}

/// Splits `<path>` and what follows it. A source route is accepted and ignored (RFC 5321 §4.1.1.3, appendix C).
pub(crate) fn split_path(text: &str) -> Result<(&str, &str), BadAddress> {
    let inner = text.strip_prefix('<').ok_or(BadAddress::Syntax)?;
    let mut end = None;
    let (mut quoted, mut escaped) = (false, false);
    for (at, c) in inner.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '>' if !quoted => {
                end = Some(at);
                break;
            }
            _ => {}
        }
    }
    let end = end.ok_or(BadAddress::Syntax)?;
    let (mut path, rest) = (&inner[..end], &inner[end + 1..]);
    if path.len() > PATH_BYTES_MAX {
        return Err(BadAddress::TooLong);
    }
    if path.starts_with('@') {
        let (route, mailbox) = path.split_once(':').ok_or(BadAddress::Syntax)?;
        if !route.split(',').all(|hop| hop.strip_prefix('@').is_some_and(is_domain)) {
            return Err(BadAddress::Syntax);
        }
        path = mailbox;
    }
    Ok((path, rest))
}

/// End of the quoted string that `text` begins with.
fn quoted_end(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, b) in text.bytes().enumerate().skip(1) {
        match b {
            _ if escaped => {
                if !(32..=126).contains(&b) {
                    return None;
                }
                escaped = false;
            }
            b'\\' => escaped = true,
            b'"' => return Some(at + 1),
            32..=126 => {}
            _ => return None,
        }
    }
    None
}

fn is_atom(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~".contains(&b))
}

/// Whether text is a domain name or an address literal (RFC 5321 §4.1.2, §4.1.3).
pub fn is_domain(text: &str) -> bool {
    if text.is_empty() || text.len() > DOMAIN_BYTES_MAX {
        return false;
    }
    if let Some(literal) = text.strip_prefix('[') {
        let Some(literal) = literal.strip_suffix(']') else { return false };
        return match literal.get(..5) {
            Some(tag) if tag.eq_ignore_ascii_case("ipv6:") => {
                literal[5..].parse::<std::net::Ipv6Addr>().is_ok()
            }
            _ => literal.parse::<std::net::Ipv4Addr>().is_ok(),
        };
    }
    text.split('.').all(|label| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_rfc_and_of_attackers() {
        for good in [
            "a@b.example",
            "first.last+tag@b.example",
            "\"a b\"@b.example",
            "\"a\\\"@\"@b.example",
            "u@[127.0.0.1]",
            "u@[IPv6:::1]",
            "Mixed.Case@EXAMPLE",
        ] {
            assert!(Mailbox::parse(good).is_ok(), "{good}");
        }
        assert_eq!(Mailbox::parse("Mixed@EXAMPLE.org").unwrap().to_string(), "Mixed@example.org");
        for bad in
            ["", "a", "@b", "a@", "a b@c", "a@b..c", ".a@b", "a@-b", "a@b\r\n", "a\0@b", "u@[300.1.1.1]"]
        {
            assert!(Mailbox::parse(bad).is_err(), "{bad:?}");
        }
        let long = format!("{}@b.example", "x".repeat(65));
        assert_eq!(Mailbox::parse(&long), Err(BadAddress::TooLong));
    }

    #[test]
    fn paths_with_source_routes_and_quotes() {
        assert_eq!(split_path("<@a.example,@b.example:u@c.example> SIZE=1"), Ok(("u@c.example", " SIZE=1")));
        assert_eq!(split_path("<\"a>b\"@c> X"), Ok(("\"a>b\"@c", " X")));
        assert_eq!(split_path("<>"), Ok(("", "")));
        for bad in ["u@c", "<u@c", "<@a:", "<@a u@c>"] {
            assert!(split_path(bad).and_then(|(p, _)| Mailbox::parse(p)).is_err(), "{bad}");
        }
    }
}
