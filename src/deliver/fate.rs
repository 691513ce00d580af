//! Pure. The table from a reply or a failure to what becomes of a recipient (RFC 5321 §4.2.1, §4.5.4.1).
//!
//! | stage | 2yz or 354 | 4yz | 421 | 5yz | connection lost |
//! | --- | --- | --- | --- | --- | --- |
//! | greeting, EHLO | goes on | next host | next host | next host, then later | next host |
//! | MAIL | goes on | later | lost | failed | later |
//! | RCPT | goes on | that one later | lost | that one failed | later |
//! | DATA | goes on | later | lost | failed | later |
//! | final dot | delivered | later | later | failed | later, may be sent twice |
//!
//! "later" is a deferral of the recipient; "lost" also tells the scheduler that the destination broke off.

use crate::queue::command::Fate;
use crate::smtp::reply::Received;

/// Where in a transaction a reply came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// To MAIL.
    Mail,
    /// To RCPT.
    Rcpt,
    /// To DATA.
    Data,
    /// To the final dot.
    End,
}

/// What a reply means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Meaning {
    /// Go on, or delivered at the final dot.
    Good,
    /// Try again later.
    Later,
    /// Refused for good.
    Failed,
    /// The destination closes the connection (RFC 5321 §3.8).
    Closing,
}

/// What a reply at a stage means.
pub fn meaning(stage: Stage, code: u16) -> Meaning {
    match (stage, code) {
        (_, 421) => Meaning::Closing,
        (Stage::Data, 354) => Meaning::Good,
        // 2yz to DATA makes no sense: the destination does not wait for data.
        (Stage::Data, 200..=399) => Meaning::Later,
        (Stage::Mail | Stage::Rcpt | Stage::End, 200..=299) => Meaning::Good,
        // "Too many recipients" in the words of old servers (RFC 5321 §4.5.3.1.10).
        (Stage::Rcpt, 552) => Meaning::Later,
        (_, 500..=599) => Meaning::Failed,
        _ => Meaning::Later,
    }
}

/// The fate of recipients that a meaning ends, if it ends them.
pub fn fate(stage: Stage, meaning: Meaning) -> Option<Fate> {
    match (stage, meaning) {
        (Stage::End, Meaning::Good) => Some(Fate::Delivered),
        (_, Meaning::Good) => None,
        (_, Meaning::Later | Meaning::Closing) => Some(Fate::Deferred),
        (_, Meaning::Failed) => Some(Fate::Failed),
    }
}

/// The enhanced status code of a reply or of one of our own texts, which begin with one.
pub fn status(reply: &str) -> String {
    let mut words = reply.split(' ');
    let first = words.next().unwrap_or("");
    let code = first.parse::<u16>().ok();
    match code {
        Some(code) => Received { code, lines: vec![words.collect::<Vec<_>>().join(" ")] }.enhanced(),
        None if first.split('.').count() == 3 => first.into(),
        None => "4.0.0".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table() {
        use Stage::*;
        for (stage, code, expected) in [
            (Mail, 250, None),
            (Mail, 451, Some(Fate::Deferred)),
            (Mail, 550, Some(Fate::Failed)),
            (Rcpt, 251, None),
            (Rcpt, 450, Some(Fate::Deferred)),
            (Rcpt, 550, Some(Fate::Failed)),
            (Rcpt, 421, Some(Fate::Deferred)),
            (Rcpt, 552, Some(Fate::Deferred)),
            (Data, 354, None),
            (Data, 250, Some(Fate::Deferred)),
            (Data, 554, Some(Fate::Failed)),
            (End, 250, Some(Fate::Delivered)),
            (End, 354, Some(Fate::Deferred)),
            (End, 452, Some(Fate::Deferred)),
            (End, 421, Some(Fate::Deferred)),
            (End, 554, Some(Fate::Failed)),
        ] {
            assert_eq!(fate(stage, meaning(stage, code)), expected, "{stage:?} {code}");
        }
        assert_eq!(status("550 5.1.1 no such user"), "5.1.1");
        assert_eq!(status("550 no"), "5.0.0");
        assert_eq!(status("4.4.1 connect timed out"), "4.4.1");
    }
}
