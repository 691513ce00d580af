//! Pure. The notice that tells a sender of a failure: multipart/report (RFC 6522) with a delivery status (RFC 3464), marked
//! `Auto-Submitted` (RFC 3834 §5). It carries the header of the message and never its text.

use super::message::{Message, MessageId};

/// Octets of the original header that a notice carries at the most.
pub const HEADER_BYTES_MAX: usize = 32 << 10;

/// Recipients that a notice names one by one; of the rest it tells the number.
pub const RECIPIENTS_NAMED_MAX: usize = 50;

/// A recipient that the notice is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The address.
    pub address: String,
    /// Enhanced status code (RFC 3463).
    pub status: String,
    /// The destination that refused, if one did.
    pub remote: Option<String>,
    /// Its words, or ours.
    pub reply: String,
}

/// What a notice needs to know beside the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting<'a> {
    /// The notice's own id.
    pub id: MessageId,
    /// Name of the reporting host.
    pub hostname: &'a str,
    /// RFC 5322 date.
    pub date: &'a str,
    /// When the message arrived, as an RFC 5322 date.
    pub arrival: &'a str,
}

/// The octets of the notice to `to`, with the first octets of the message as `original`.
pub fn notice(
    setting: &Setting<'_>,
    message: &Message,
    to: &str,
    failures: &[Failure],
    original: &[u8],
) -> Vec<u8> {
    let Setting { id, hostname, date, arrival } = setting;
    let more = failures.len().saturating_sub(RECIPIENTS_NAMED_MAX);
    let failures = &failures[..failures.len() - more];
    let boundary = format!("{id}.{}/{hostname}", message.id);
    let mut out = format!(
        "Date: {date}\r\nFrom: Mail Delivery System <MAILER-DAEMON@{hostname}>\r\nTo: <{to}>\r\n\
         Subject: Undelivered Mail Returned to Sender\r\nMessage-ID: <{id}@{hostname}>\r\n\
         Auto-Submitted: auto-replied\r\nMIME-Version: 1.0\r\n\
         Content-Type: multipart/report; report-type=delivery-status;\r\n boundary=\"{boundary}\"\r\n\r\n\
         This is a MIME-encapsulated message.\r\n\r\n--{boundary}\r\n\
         Content-Description: Notification\r\nContent-Type: text/plain; charset=us-ascii\r\n\r\n\
         This is the mail system at host {hostname}.\r\n\r\n\
         Your message could not be delivered to one or more recipients. Its\r\n\
         header is attached below.\r\n\r\n"
    );
    for f in failures {
        out += &format!("<{}>:\r\n    {}\r\n\r\n", f.address, fold(&f.reply));
    }
    if more > 0 {
        out += &format!("... and {more} more recipients.\r\n\r\n");
    }
    out += &format!(
        "--{boundary}\r\nContent-Description: Delivery report\r\nContent-Type: message/delivery-status\r\n\r\n\
         Reporting-MTA: dns; {hostname}\r\nX-Holdfast-Queue-ID: {}\r\nArrival-Date: {arrival}\r\n",
        message.id
    );
    for f in failures {
        out += &format!(
            "\r\nFinal-Recipient: rfc822; {}\r\nAction: failed\r\nStatus: {}\r\n",
            f.address, f.status
        );
        if let Some(remote) = &f.remote {
            out += &format!("Remote-MTA: dns; {remote}\r\nDiagnostic-Code: smtp; {}\r\n", fold(&f.reply));
        }
    }
    out += &format!(
        "\r\n--{boundary}\r\nContent-Description: Undelivered Message Headers\r\n\
         Content-Type: text/rfc822-headers\r\n\r\n"
    );
    let mut out = out.into_bytes();
    out.extend_from_slice(header_of(original));
    out.extend_from_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
    out
}

/// The header of a message: up to the first empty line, in whole lines, within the bound.
fn header_of(original: &[u8]) -> &[u8] {
    let window = &original[..original.len().min(HEADER_BYTES_MAX)];
    if let Some(end) = memchr::memmem::find(window, b"\r\n\r\n") {
        return &window[..end + 2];
    }
    memchr::memmem::rfind(window, b"\r\n").map_or(b"", |end| &window[..end + 2])
}

/// Breaks long text into folded lines (RFC 5322 §2.2.3).
fn fold(text: &str) -> String {
    let mut out = String::new();
    let mut column = 0;
    for word in text.split(' ') {
        if column > 0 && column + word.len() > 70 {
            out += "\r\n    ";
            column = 0;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        }
        out += word;
        column += word.len();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notice_carries_the_header_and_never_the_text() {
        assert_eq!(header_of(b"A: 1\r\nB: 2\r\n\r\nsecret"), b"A: 1\r\nB: 2\r\n");
        assert_eq!(header_of(b"A: 1\r\nB: cut of"), b"A: 1\r\n");
        assert_eq!(header_of(b"no line at all"), b"");
        assert!(fold(&"word ".repeat(40)).lines().all(|l| l.len() <= 78));
    }
}
