//! Pure. Replies (RFC 5321 §4.2), with enhanced status codes (RFC 2034, RFC 3463): ours to clients, and those of
//! destinations, read strictly and within bounds.

use std::fmt::Write as _;

/// Longest reply line that a destination may send, and most lines of a reply. Beyond it the connection is given up.
pub const REPLY_LINE_BYTES_MAX: usize = 4096;
/// See [`REPLY_LINE_BYTES_MAX`].
pub const REPLY_LINES_MAX: usize = 128;

/// One of our replies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    code: u16,
    lines: Vec<String>,
}

impl Reply {
    /// A reply with an enhanced status code; its class must be that of the reply (RFC 2034 §4).
    pub fn new(code: u16, enhanced: &str, text: &str) -> Reply {
        debug_assert_eq!((code / 100).to_string(), enhanced[..1]);
        Reply { code, lines: vec![format!("{enhanced} {text}")] }
    }

    /// A reply without one: greeting, EHLO, 354 (RFC 2034 §3).
    pub fn plain(code: u16, lines: Vec<String>) -> Reply {
        Reply { code, lines }
    }

    /// The reply code.
    pub fn code(&self) -> u16 {
        self.code
    }

    /// The text of the first line.
    pub fn text(&self) -> &str {
        self.lines.first().map_or("", |line| line)
    }

    /// Appends the reply as it goes over the wire.
    pub fn write(&self, out: &mut String) {
        let last = self.lines.len().saturating_sub(1);
        for (n, line) in self.lines.iter().enumerate() {
            let between = if n == last { ' ' } else { '-' };
            write!(out, "{}{between}{line}\r\n", self.code).expect("writing to a String does not fail");
        }
    }
}

/// A destination's reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Received {
    /// The reply code, 200 to 599.
    pub code: u16,
    /// Its lines without code, made printable.
    pub lines: Vec<String>,
}

/// A reply that is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not an SMTP reply")]
pub struct BadReply;

impl Received {
    /// Takes a whole reply off the front of `bytes`: how many octets it took, or `None` if more are needed.
    ///
    /// # Errors
    /// [`BadReply`] if it is none or exceeds the bounds.
    pub fn take(bytes: &[u8]) -> Result<Option<(Received, usize)>, BadReply> {
        let (mut at, mut lines, mut code) = (0, Vec::new(), None);
        loop {
            let rest = &bytes[at..];
            let Some(end) = memchr::memchr(b'\n', rest) else {
                return if rest.len() > REPLY_LINE_BYTES_MAX { Err(BadReply) } else { Ok(None) };
            };
            let line = rest[..end].strip_suffix(b"\r").unwrap_or(&rest[..end]);
            at += end + 1;
            if line.len() < 3 || line.len() > REPLY_LINE_BYTES_MAX || lines.len() >= REPLY_LINES_MAX {
                return Err(BadReply);
            }
            let digits = std::str::from_utf8(&line[..3]).ok().and_then(|d| d.parse::<u16>().ok());
            let this = digits.filter(|d| (200..600).contains(d)).ok_or(BadReply)?;
            if *code.get_or_insert(this) != this {
                return Err(BadReply);
            }
            // What a peer says goes into logs and notices: nothing that is not printable gets that far.
            let text = line.get(4..).unwrap_or(b"");
            lines.push(text.iter().map(|b| if matches!(b, 32..=126) { *b as char } else { '?' }).collect());
            match line.get(3) {
                Some(b'-') => {}
                Some(b' ') | None => return Ok(Some((Received { code: this, lines }, at))),
                Some(_) => return Err(BadReply),
            }
        }
    }

    /// The enhanced status code, or the one that stands for the class (RFC 3463).
    pub fn enhanced(&self) -> String {
        let class = self.code / 100;
        let first = self.lines.first().map_or("", |l| l.as_str());
        let word = first.split(' ').next().unwrap_or("");
        let parts: Vec<&str> = word.split('.').collect();
        let good = parts.len() == 3
            && parts[0] == class.to_string()
            && parts[1..].iter().all(|p| (1..=3).contains(&p.len()) && p.bytes().all(|b| b.is_ascii_digit()));
        if good { word.into() } else { format!("{class}.0.0") }
    }

    /// The whole reply in one line, for logs and notices.
    pub fn one_line(&self) -> String {
        format!("{} {}", self.code, self.lines.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_of_destinations() {
        let (reply, used) = Received::take(b"250-a\r\n250-SIZE 10\r\n250 b\r\nrest").unwrap().unwrap();
        assert_eq!((reply.code, reply.lines.len(), used), (250, 3, 27));
        assert_eq!(Received::take(b"250-a\r\n25"), Ok(None));
        for bad in [&b"xyz hello\r\n"[..], b"250-a\r\n550 b\r\n", b"99 x\r\n", b"2\r\n", b"250_a\r\n"] {
            assert_eq!(Received::take(bad), Err(BadReply), "{bad:?}");
        }
        assert!(Received::take(&vec![b'2'; REPLY_LINE_BYTES_MAX + 2]).is_err());
        let (reply, _) = Received::take(b"451 4.7.1 later\x1b[31m)\r\n").unwrap().unwrap();
        assert_eq!(
            (reply.enhanced().as_str(), reply.one_line().as_str()),
            ("4.7.1", "451 4.7.1 later?[31m)")
        );
        let (reply, _) = Received::take(b"550 5.x no\r\n").unwrap().unwrap();
        assert_eq!(reply.enhanced(), "5.0.0");
    }
}
