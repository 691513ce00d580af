//! Pure. Command lines of a client, parsed once (RFC 5321 §4.1.1).

use super::address::{BadAddress, Mailbox, ReversePath, split_path};

/// Longest command line with CRLF, octets: 512 (RFC 5321 §4.5.3.1.4) and room for the parameters of our extensions.
pub const LINE_BYTES_MAX: usize = 2048;

/// How the body is declared (RFC 6152 §3).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum BodyType {
    /// Seven bits, or nothing was said.
    #[default]
    SevenBit,
    /// `BODY=8BITMIME`.
    EightBitMime,
}

/// A command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// `EHLO name`
    Ehlo(String),
    /// `HELO name`
    Helo(String),
    /// `MAIL FROM:<path> ...`
    Mail {
        /// The reverse-path.
        from: ReversePath,
        /// `SIZE=` (RFC 1870 §6); `None` if absent; `u64::MAX` if it has more digits than fit.
        size: Option<u64>,
        /// `BODY=`.
        body: BodyType,
    },
    /// `RCPT TO:<path> ...`
    Rcpt(Recipient),
    /// `DATA`
    Data,
    /// `BDAT octets [LAST]` (RFC 3030 §2); the octets follow the line.
    Bdat {
        /// Length of the chunk.
        octets: u64,
        /// Whether the message ends with it.
        last: bool,
    },
    /// `RSET`
    Rset,
    /// `NOOP ...`
    Noop,
    /// `QUIT`
    Quit,
    /// `VRFY ...`
    Vrfy,
    /// `STARTTLS` (RFC 3207)
    StartTls,
    /// `HELP ...`
    Help,
    /// `EXPN ...`
    Expn,
}

/// Whom a message is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Recipient {
    /// A mailbox.
    Mailbox(Mailbox),
    /// `<Postmaster>` without a domain, always accepted (RFC 5321 §4.5.1).
    Postmaster,
}

/// What is wrong with a command line; says which reply it gets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BadCommand {
    /// 500 5.5.2: not a command of ours.
    Unknown,
    /// 501 5.5.4 or 5.5.2: its argument is malformed.
    Syntax(&'static str),
    /// 501 5.5.4, and the connection ends: how much of what follows is a chunk cannot be told.
    Chunk,
    /// 501 5.1.7 or 5.1.3: the address is malformed.
    Address(BadAddress),
    /// 555 5.5.4: a parameter that we did not offer (RFC 5321 §4.1.1.11).
    UnknownParameter(String),
}

/// Parses a command line without its CRLF.
///
/// # Errors
/// [`BadCommand`].
pub fn parse(line: &[u8]) -> Result<Command, BadCommand> {
    if line.iter().any(|b| *b == 0 || *b == b'\r' || *b == b'\n') {
        return Err(BadCommand::Syntax("a NUL, a bare CR or a bare LF in a command"));
    }
    let Ok(text) = std::str::from_utf8(line) else {
        return Err(BadCommand::Syntax("octets beyond ASCII in a command"));
    };
    let (verb, argument) = match text.find(' ') {
        Some(at) => (&text[..at], text[at + 1..].trim()),
        None => (text.trim_end(), ""),
    };
    let bare = |command| match argument.is_empty() {
        true => Ok(command),
        false => Err(BadCommand::Syntax("this command takes no argument")),
    };
    match verb.to_ascii_uppercase().as_str() {
        "EHLO" => name(argument).map(Command::Ehlo),
        "HELO" => name(argument).map(Command::Helo),
        "MAIL" => mail(argument),
        "RCPT" => rcpt(argument),
        "DATA" => bare(Command::Data),
        "BDAT" => bdat(argument),
        "RSET" => bare(Command::Rset),
        "QUIT" => bare(Command::Quit),
        "STARTTLS" => bare(Command::StartTls),
        "NOOP" => Ok(Command::Noop),
        "VRFY" => Ok(Command::Vrfy),
        "EXPN" => Ok(Command::Expn),
        "HELP" => Ok(Command::Help),
        _ => Err(BadCommand::Unknown),
    }
}

fn name(argument: &str) -> Result<String, BadCommand> {
    let printable = argument.bytes().all(|b| b.is_ascii_graphic() && b != b'<' && b != b'>');
    match !argument.is_empty() && argument.len() <= 255 && printable {
        true => Ok(argument.into()),
        false => Err(BadCommand::Syntax("a host name is required")),
    }
}

/// Strips `FROM:` or `TO:` and allows the space after it that many clients send.
fn after_keyword<'a>(argument: &'a str, keyword: &str) -> Result<&'a str, BadCommand> {
    match argument.get(..keyword.len()) {
        Some(found) if found.eq_ignore_ascii_case(keyword) => Ok(argument[keyword.len()..].trim_start()),
        _ => Err(BadCommand::Syntax("MAIL FROM:<address> or RCPT TO:<address> is required")),
    }
}

fn parameters(text: &str) -> Result<Vec<(String, &str)>, BadCommand> {
    if !text.is_empty() && !text.starts_with(' ') {
        return Err(BadCommand::Syntax("a space is required after the address"));
    }
    let words = text.split(' ').filter(|word| !word.is_empty());
    Ok(words
        .map(|word| match word.split_once('=') {
            Some((key, value)) => (key.to_ascii_uppercase(), value),
            None => (word.to_ascii_uppercase(), ""),
        })
        .collect())
}

fn mail(argument: &str) -> Result<Command, BadCommand> {
    let (path, rest) = split_path(after_keyword(argument, "FROM:")?).map_err(BadCommand::Address)?;
    let from = match path {
        "" => ReversePath(None),
        _ => ReversePath(Some(Mailbox::parse(path).map_err(BadCommand::Address)?)),
    };
    let (mut size, mut body) = (None, BodyType::default());
    for (key, value) in parameters(rest)? {
        match key.as_str() {
            // RFC 1870 §3: one to twenty digits.
            "SIZE" => {
                if !(1..=20).contains(&value.len()) || !value.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(BadCommand::Syntax("SIZE takes 1 to 20 digits"));
                }
                size = Some(value.parse().unwrap_or(u64::MAX));
            }
            "BODY" if value.eq_ignore_ascii_case("7BIT") => body = BodyType::SevenBit,
            "BODY" if value.eq_ignore_ascii_case("8BITMIME") => body = BodyType::EightBitMime,
            "BODY" => return Err(BadCommand::Syntax("BODY is 7BIT or 8BITMIME")),
            _ => return Err(BadCommand::UnknownParameter(key)),
        }
    }
    Ok(Command::Mail { from, size, body })
}

fn bdat(argument: &str) -> Result<Command, BadCommand> {
    let (octets, last) = match argument.split_once(' ') {
        Some((octets, word)) if word.trim().eq_ignore_ascii_case("LAST") => (octets, true),
        Some(_) => return Err(BadCommand::Chunk),
        None => (argument, false),
    };
    let is_number = !octets.is_empty() && octets.bytes().all(|b| b.is_ascii_digit());
    let octets = octets.parse().ok().filter(|_| is_number).ok_or(BadCommand::Chunk)?;
    Ok(Command::Bdat { octets, last })
}

fn rcpt(argument: &str) -> Result<Command, BadCommand> {
    let (path, rest) = split_path(after_keyword(argument, "TO:")?).map_err(BadCommand::Address)?;
    if let Some((key, _)) = parameters(rest)?.into_iter().next() {
        return Err(BadCommand::UnknownParameter(key));
    }
    if path.eq_ignore_ascii_case("postmaster") {
        return Ok(Command::Rcpt(Recipient::Postmaster));
    }
    Ok(Command::Rcpt(Recipient::Mailbox(Mailbox::parse(path).map_err(BadCommand::Address)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_is_one_to_twenty_digits() {
        let size = |text: &str| match parse(format!("MAIL FROM:<> SIZE={text}").as_bytes()) {
            Ok(Command::Mail { size, .. }) => Ok(size.unwrap()),
            Ok(_) => unreachable!(),
            Err(e) => Err(e),
        };
        assert_eq!(size("0"), Ok(0));
        assert_eq!(size("99999999999999999999"), Ok(u64::MAX), "beyond 64 bits is too big, not malformed");
        for bad in ["", "-1", "1x", "100000000000000000000"] {
            assert!(matches!(size(bad), Err(BadCommand::Syntax(_))), "{bad}");
        }
    }

    #[test]
    fn a_chunk_says_how_long_it_is() {
        for (line, octets, last) in
            [("BDAT 0", 0, false), ("bdat 86 last", 86, true), ("BDAT 007  LAST ", 7, true)]
        {
            assert_eq!(parse(line.as_bytes()), Ok(Command::Bdat { octets, last }), "{line}");
        }
        for line in [
            "BDAT",
            "BDAT LAST",
            "BDAT -1",
            "BDAT +1",
            "BDAT 1x",
            "BDAT 5 LAST now",
            "BDAT 5 MORE",
            "BDAT 18446744073709551616",
        ] {
            assert_eq!(parse(line.as_bytes()), Err(BadCommand::Chunk), "{line}");
        }
    }

    #[test]
    fn lines_that_are_no_commands() {
        assert_eq!(parse(b"GET / HTTP/1.1"), Err(BadCommand::Unknown));
        assert!(matches!(parse(b"MAIL FROM:<a@b\n>"), Err(BadCommand::Syntax(_))));
        assert!(matches!(parse(b"EHLO a\0b"), Err(BadCommand::Syntax(_))));
        assert!(matches!(parse(b"MAIL FROM:<a@b> XYZ=1"), Err(BadCommand::UnknownParameter(_))));
        assert!(matches!(parse(b"DATA now"), Err(BadCommand::Syntax(_))));
        assert_eq!(parse(b"rcpt to: <postmaster>"), Ok(Command::Rcpt(Recipient::Postmaster)));
    }
}
