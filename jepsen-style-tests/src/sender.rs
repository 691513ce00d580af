//! A strict SMTP client that shares no code with the product.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::checkers::NAME;
use crate::history::{Outcome, Sent, digest};
use crate::tls::Stream;

/// A connection to a node.
pub struct Client {
    reader: BufReader<Stream>,
    node: u64,
    /// The last line of the last reply, behind its code.
    text: String,
    /// Whether it sends the envelope in one go (RFC 2920).
    pub pipelines: bool,
    /// Octets in a chunk, at least 1, if it sends messages in chunks (RFC 3030).
    pub chunk: Option<usize>,
}

/// A message whose data is open: the final dot, or the last chunk, is not sent yet.
pub struct Open {
    sent: Sent,
    end: Vec<u8>,
}

impl Open {
    /// The message, of which nobody knows yet what becomes of it.
    pub(crate) fn message(&self) -> &Sent {
        &self.sent
    }
}

/// A message of about `bytes` octets that carries its name and a canary in every line.
pub fn message(name: &str, bytes: usize) -> Vec<u8> {
    let mut text = format!("{NAME}{name}\r\nSubject: test\r\n\r\n");
    let mut n = 0;
    while text.len() < bytes {
        n += 1;
        text += &format!(".canary-{name}-line-{n:06}-abcdefghijklmnopqrstuvwxyz\r\n");
    }
    text.into_bytes()
}

impl Client {
    /// Connects and greets.
    ///
    /// # Errors
    /// If the node is not there or greets with an error.
    pub fn connect(node: u64, address: &str) -> std::io::Result<Client> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_write_timeout(Some(Duration::from_secs(60)))?;
        let reader = BufReader::new(Stream::Clear(stream));
        let mut client = Client { reader, node, text: String::new(), pipelines: false, chunk: None };
        let greeting = client.reply()?;
        if greeting != 220 {
            return Err(std::io::Error::other(format!("greeted with {greeting}")));
        }
        client.greet()?;
        Ok(client)
    }

    /// As [`Client::connect`], with STARTTLS (RFC 3207).
    ///
    /// # Errors
    /// As there, or if the node does not encrypt, or sends more in the clear than it should.
    pub fn connect_encrypted(node: u64, address: &str) -> std::io::Result<Client> {
        let mut client = Client::connect(node, address)?;
        let code = client.say("STARTTLS\r\n")?;
        let left = client.reader.buffer().len();
        match client.reader.into_inner() {
            Stream::Clear(stream) if code == 220 && left == 0 => {
                client.reader = BufReader::new(Stream::encrypt(stream)?);
                client.greet()?;
                Ok(client)
            }
            _ => Err(std::io::Error::other(format!(
                "STARTTLS was answered with {code}, and {left} octets behind it"
            ))),
        }
    }

    fn greet(&mut self) -> std::io::Result<()> {
        match self.say("EHLO client.test.example\r\n")? {
            250 => Ok(()),
            code => Err(std::io::Error::other(format!("EHLO was answered with {code}"))),
        }
    }

    /// Sends octets and reads one reply's code.
    ///
    /// # Errors
    /// If the connection is lost or the reply is none.
    pub fn say(&mut self, line: &str) -> std::io::Result<u16> {
        self.send(line.as_bytes())?;
        self.reply()
    }

    /// Sends octets.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn send(&mut self, octets: &[u8]) -> std::io::Result<()> {
        let stream = self.reader.get_mut();
        stream.write_all(octets)?;
        stream.flush()
    }

    /// Reads one reply strictly (RFC 5321 §4.2.1): same code on each line, CR LF at the end of each.
    ///
    /// # Errors
    /// If the connection is lost or the reply is none.
    pub fn reply(&mut self) -> std::io::Result<u16> {
        let mut code = None;
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let bad = || std::io::Error::other(format!("not a reply: {line:?}"));
            let this: u16 = line.get(..3).and_then(|c| c.parse().ok()).ok_or_else(bad)?;
            let between = *line.as_bytes().get(3).ok_or_else(bad)?;
            if !line.ends_with("\r\n") || *code.get_or_insert(this) != this || line.len() > 512 {
                return Err(bad());
            }
            match between {
                b' ' => {
                    self.text = line.split_off(4);
                    return Ok(this);
                }
                b'-' => {}
                _ => return Err(bad()),
            }
        }
    }

    /// Opens a transaction and sends all of the data but the final dot. A recipient without a domain is one of `test.example`. One who
    /// pipelines and is refused has to hang up: what it sent already is not taken back.
    ///
    /// # Errors
    /// `Err` with the finished record if it was refused or lost before the dot.
    pub fn open(&mut self, name: &str, recipients: &[&str], octets: &[u8]) -> Result<Open, Box<Sent>> {
        self.open_from("sender", name, recipients, octets)
    }

    /// As [`Client::open`], from another local part.
    ///
    /// # Errors
    /// As there.
    pub fn open_from(
        &mut self,
        from: &str,
        name: &str,
        recipients: &[&str],
        octets: &[u8],
    ) -> Result<Open, Box<Sent>> {
        let mut sent = Sent {
            name: name.into(),
            recipients: recipients.iter().map(|r| r.to_string()).collect(),
            node: self.node,
            outcome: Outcome::Unknown,
            id: None,
            bytes: octets.len(),
            digest: digest(octets),
        };
        let mut lines = vec![format!("MAIL FROM:<{from}@client.test.example> SIZE={}\r\n", octets.len())];
        lines.extend(recipients.iter().map(|r| match r.contains('@') {
            true => format!("RCPT TO:<{r}>\r\n"),
            false => format!("RCPT TO:<{r}@test.example>\r\n"),
        }));
        if self.chunk.is_none() {
            lines.push("DATA\r\n".into());
        }
        let together = if self.pipelines { self.send(lines.concat().as_bytes()) } else { Ok(()) };
        for line in &lines {
            let reply = match (&together, self.pipelines) {
                (Err(_), _) => Err(std::io::ErrorKind::BrokenPipe.into()),
                (Ok(()), true) => self.reply(),
                (Ok(()), false) => self.say(line),
            };
            match reply {
                Ok(code) if code < 400 => {}
                Ok(code) => sent.outcome = Outcome::Fail(code),
                // Before the final dot a lost connection means that nothing was taken.
                Err(_) => sent.outcome = Outcome::Fail(0),
            }
            if sent.outcome != Outcome::Unknown {
                return Err(Box::new(sent));
            }
        }
        if let Some(size) = self.chunk {
            return self.send_chunks(octets, size, sent);
        }
        let mut wire = Vec::with_capacity(octets.len() + 100);
        for line in octets.split_inclusive(|b| *b == b'\n') {
            if line.starts_with(b".") {
                wire.push(b'.');
            }
            wire.extend_from_slice(line);
        }
        if self.send(&wire).is_err() {
            sent.outcome = Outcome::Fail(0);
            return Err(Box::new(sent));
        }
        Ok(Open { sent, end: b".\r\n".to_vec() })
    }

    /// Sends all chunks but the last one.
    fn send_chunks(&mut self, octets: &[u8], size: usize, mut sent: Sent) -> Result<Open, Box<Sent>> {
        let with =
            |part: &[u8], last: &str| [format!("BDAT {}{last}\r\n", part.len()).as_bytes(), part].concat();
        let mut parts = octets.chunks(size).peekable();
        let mut end = with(&[], " LAST");
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                end = with(part, " LAST");
                break;
            }
            let replied = self.send(&with(part, "")).and_then(|()| self.reply());
            if !matches!(replied, Ok(250)) {
                sent.outcome = Outcome::Fail(replied.unwrap_or(0));
                return Err(Box::new(sent));
            }
        }
        Ok(Open { sent, end })
    }

    /// Sends the final dot, or the last chunk, and waits for the reply.
    pub fn finish(&mut self, open: Open) -> Sent {
        let mut sent = open.sent;
        sent.outcome = match self.send(&open.end).and_then(|()| self.reply()) {
            Ok(250) => Outcome::Ok,
            Ok(code) => Outcome::Fail(code),
            Err(_) => Outcome::Unknown,
        };
        if sent.outcome == Outcome::Ok {
            sent.id = self.text.split("queued as ").nth(1).map(|id| id.trim().to_string());
        }
        sent
    }

    /// Sends a whole message.
    pub fn transact(&mut self, name: &str, recipients: &[&str], octets: &[u8]) -> Sent {
        match self.open(name, recipients, octets) {
            Ok(open) => self.finish(open),
            Err(sent) => *sent,
        }
    }
}
