//! Pure. The server side of an SMTP session (RFC 5321): what is answered to each line, and what the edge has to do.
//!
//! | state | EHLO, HELO | MAIL | RCPT | DATA | BDAT | BDAT LAST | STARTTLS |
//! | --- | --- | --- | --- | --- | --- | --- | --- |
//! | connected | greeted | 503 | 503 | 503 | 503 | 503 | 503 |
//! | greeted | greeted | mail | 503 | 503 | 503 | 503 | fresh TLS session |
//! | mail | greeted | 503 | recipients | 503 | 503 | 503 | 503 |
//! | recipients | greeted | 503 | recipients | data | chunks | greeted | 503 |
//! | data | message bytes, then greeted | | | | | | |
//! | chunks | greeted | 503 | 503 | 503 | chunks; greeted if refused | greeted | 503 |
//!
//! The octets of a chunk are read before anything is said, also if it is 503 (RFC 3030 §2). RSET leads from any state but connected to greeted. A state owns what only it has: without a reverse-path there are no
//! recipients. A session that ends in any state before the reply to its data leaves nothing behind.

use super::policy::{Refusal, Right};
use crate::queue::command::RECIPIENTS_MAX;
use crate::smtp::address::{BadAddress, Mailbox, ReversePath};
use crate::smtp::command::{self, BadCommand, BodyType, Command, Recipient};
use crate::smtp::reply::Reply;

/// Errors after which the session is ended with 421.
pub const ERRORS_MAX: u32 = 20;

/// What does not change during a session.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Our name.
    pub hostname: String,
    /// Where `<Postmaster>` goes.
    pub postmaster: Mailbox,
    /// Largest message, octets.
    pub message_bytes_max: u64,
    /// Whether STARTTLS is offered.
    pub starttls: bool,
    /// Whether mail is taken only within TLS.
    pub require_tls: bool,
}

/// What the edge knows when a line comes in.
pub trait World {
    /// By what right a recipient of this domain is taken, if it is.
    fn recipient(&self, domain: &str) -> Result<Right, Refusal>;
    /// Why no mail is taken now, if so: said at MAIL.
    fn not_accepting(&self) -> Option<Reply>;
}

/// A transaction that is ready for its data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Transaction {
    /// The name in EHLO or HELO, and whether it was EHLO.
    pub helo: (String, bool),
    /// Where it comes from.
    pub sender: ReversePath,
    /// Whom it is for, and by what right.
    pub recipients: Vec<(Mailbox, Right)>,
    /// Whether `BODY=8BITMIME` was declared.
    pub eight_bit: bool,
    /// The declared size.
    pub size: Option<u64>,
}

/// What the edge has to do, in this order: send the reply, then this.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Nothing more.
    Continue,
    /// Read message data until its end, then ask the intake.
    Data(Transaction),
    /// Before the reply: read a chunk. What the edge has to say instead of it counts, and after a refusal [`Session::chunk_refused`].
    Chunk {
        /// Of the first one: what it is for.
        transaction: Option<Transaction>,
        /// Its length.
        octets: u64,
        /// Whether the message ends with it: the intake is asked then.
        last: bool,
    },
    /// Before the reply: read and forget so many octets.
    Discard(u64),
    /// Forget what was read beyond this line and shake hands (RFC 3207 §4.2).
    StartTls,
    /// Close the connection.
    Close,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum State {
    Connected,
    Greeted {
        helo: (String, bool),
    },
    Mail {
        helo: (String, bool),
        sender: ReversePath,
        recipients: Vec<(Mailbox, Right)>,
        refused: Option<Refusal>,
        eight_bit: bool,
        size: Option<u64>,
    },
    Chunks {
        helo: (String, bool),
        sender: ReversePath,
    },
}

/// A session.
#[derive(Clone, Debug)]
pub struct Session {
    settings: std::sync::Arc<Settings>,
    state: State,
    tls: bool,
    errors: u32,
    /// Whether the message's transaction is over and more of its chunks may be on their way.
    chunks_come: bool,
}

impl Session {
    /// A session at its beginning, and the greeting.
    pub fn new(settings: std::sync::Arc<Settings>, tls: bool) -> (Session, Reply) {
        let greeting = Reply::plain(220, vec![format!("{} ESMTP Holdfast", settings.hostname)]);
        (Session { settings, state: State::Connected, tls, errors: 0, chunks_come: false }, greeting)
    }

    /// The same connection after a TLS handshake: everything said before is forgotten (RFC 3207 §4.2).
    pub fn encrypted(self) -> Session {
        Session { state: State::Connected, tls: true, ..self }
    }

    /// Whether nothing is taken before STARTTLS.
    fn must_encrypt(&self) -> bool {
        self.settings.require_tls && !self.tls
    }

    /// Whether the session is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.tls
    }

    /// The name the client gave itself.
    pub fn helo(&self) -> &str {
        match &self.state {
            State::Connected => "",
            State::Greeted { helo } | State::Mail { helo, .. } | State::Chunks { helo, .. } => &helo.0,
        }
    }

    /// The reverse-path of the transaction, for the log.
    pub fn sender(&self) -> ReversePath {
        match &self.state {
            State::Mail { sender, .. } | State::Chunks { sender, .. } => sender.clone(),
            _ => ReversePath(None),
        }
    }

    /// Counts an error in message data.
    pub fn note_error(&mut self) {
        self.errors += 1;
    }

    /// Whether a message comes in chunks, and its last one has not come.
    pub fn expects_chunks(&self) -> bool {
        matches!(self.state, State::Chunks { .. })
    }

    /// A chunk was refused, and the transaction with it; those that are on their way are 503.
    pub fn chunk_refused(&mut self) {
        if let State::Chunks { helo, .. } = &self.state {
            self.state = State::Greeted { helo: helo.clone() };
            self.chunks_come = true;
        }
    }

    /// Answers a command line without its CR LF.
    pub fn line(&mut self, line: &[u8], world: &dyn World) -> (Reply, Action) {
        let (reply, action) = match command::parse(line) {
            Err(bad) if may_begin_a_chunk(line) => (refusal(bad), Action::Close),
            parsed if self.must_encrypt() && !may_be_in_the_clear(line) => {
                let reply = Reply::new(530, "5.7.0", "Must issue a STARTTLS command first");
                match parsed {
                    Ok(Command::Bdat { octets, .. }) => (reply, Action::Discard(octets)),
                    _ => (reply, Action::Continue),
                }
            }
            Ok(command) => self.command(command, world),
            Err(bad) => (refusal(bad), Action::Continue),
        };
        self.judge(reply, action)
    }

    /// Answers a line that was too long or not ended by CR LF. After one that may be BDAT, what is a command cannot be told from what is a
    /// chunk.
    pub fn bad_line(&mut self, line: &[u8], why: &str) -> (Reply, Action) {
        let action = if may_begin_a_chunk(line) { Action::Close } else { Action::Continue };
        self.judge(Reply::new(500, "5.5.2", why), action)
    }

    fn judge(&mut self, reply: Reply, action: Action) -> (Reply, Action) {
        // Chunks that were on their way when one was refused are no new errors.
        if reply.code() >= 500 && !(self.chunks_come && matches!(action, Action::Discard(_))) {
            self.errors += 1;
            if self.errors > ERRORS_MAX {
                let text = format!("{} Error: too many errors", self.settings.hostname);
                return (Reply::new(421, "4.7.0", &text), Action::Close);
            }
        }
        (reply, action)
    }

    fn command(&mut self, command: Command, world: &dyn World) -> (Reply, Action) {
        let simple = |code, enhanced, text: &str| (Reply::new(code, enhanced, text), Action::Continue);
        let out_of_order = || simple(503, "5.5.1", "Error: bad sequence of commands");
        self.chunks_come &= matches!(command, Command::Bdat { .. } | Command::Noop);
        match command {
            Command::Ehlo(name) => {
                self.state = State::Greeted { helo: (name, true) };
                (Reply::plain(250, self.extensions()), Action::Continue)
            }
            Command::Helo(name) => {
                self.state = State::Greeted { helo: (name, false) };
                (Reply::plain(250, vec![self.settings.hostname.clone()]), Action::Continue)
            }
            Command::Mail { from, size, body } => self.mail(from, size, body, world),
            Command::Rcpt(recipient) => self.rcpt(recipient, world),
            Command::Data => match std::mem::replace(&mut self.state, State::Connected) {
                State::Mail { helo, sender, recipients, eight_bit, size, .. } if !recipients.is_empty() => {
                    self.state = State::Greeted { helo: helo.clone() };
                    let go = Reply::plain(354, vec!["End data with <CR><LF>.<CR><LF>".into()]);
                    (go, Action::Data(Transaction { helo, sender, recipients, eight_bit, size }))
                }
                State::Mail { refused: Some(why), helo, .. } => {
                    self.state = State::Greeted { helo };
                    (nobody(why), Action::Continue)
                }
                state => {
                    self.state = state;
                    out_of_order()
                }
            },
            Command::Bdat { octets, last } => self.bdat(octets, last),
            Command::Rset => {
                if let State::Mail { helo, .. } | State::Chunks { helo, .. } = &self.state {
                    self.state = State::Greeted { helo: helo.clone() };
                }
                simple(250, "2.0.0", "Ok")
            }
            Command::Noop => simple(250, "2.0.0", "Ok"),
            Command::Help => simple(214, "2.0.0", "See RFC 5321"),
            Command::Vrfy => simple(252, "2.0.0", "Send some mail, and it will be tried"),
            Command::Expn => simple(502, "5.5.1", "Error: command not implemented"),
            Command::Quit => (Reply::new(221, "2.0.0", "Bye"), Action::Close),
            Command::StartTls => match &self.state {
                State::Greeted { .. } if self.tls => simple(503, "5.5.1", "Error: TLS already active"),
                State::Greeted { .. } if self.settings.starttls => {
                    (Reply::new(220, "2.0.0", "Ready to start TLS"), Action::StartTls)
                }
                State::Greeted { .. } => simple(454, "4.7.0", "TLS not available"),
                _ => out_of_order(),
            },
        }
    }

    fn bdat(&mut self, octets: u64, last: bool) -> (Reply, Action) {
        let (helo, sender, transaction) = match std::mem::replace(&mut self.state, State::Connected) {
            State::Mail { helo, sender, recipients, eight_bit, size, .. } if !recipients.is_empty() => {
                let (to, from) = (helo.clone(), sender.clone());
                (to, from, Some(Transaction { helo, sender, recipients, eight_bit, size }))
            }
            State::Chunks { helo, sender } => (helo, sender, None),
            State::Mail { refused: Some(why), helo, .. } => {
                self.state = State::Greeted { helo };
                self.chunks_come = true;
                return (nobody(why), Action::Discard(octets));
            }
            state => {
                self.state = state;
                let reply = Reply::new(503, "5.5.1", "Error: bad sequence of commands");
                return (reply, Action::Discard(octets));
            }
        };
        self.state = if last { State::Greeted { helo } } else { State::Chunks { helo, sender } };
        let reply = Reply::new(250, "2.0.0", &format!("Ok: {octets} octets"));
        (reply, Action::Chunk { transaction, octets, last })
    }

    fn extensions(&self) -> Vec<String> {
        let mut lines = vec![self.settings.hostname.clone()];
        if !self.must_encrypt() {
            lines.push("PIPELINING".into()); // there is nothing to pipeline before STARTTLS
        }
        lines.push(format!("SIZE {}", self.settings.message_bytes_max));
        if self.settings.starttls && !self.tls {
            lines.push("STARTTLS".into());
        }
        lines.extend(["ENHANCEDSTATUSCODES".into(), "8BITMIME".into(), "CHUNKING".into()]);
        lines
    }

    fn mail(
        &mut self,
        sender: ReversePath,
        size: Option<u64>,
        body: BodyType,
        world: &dyn World,
    ) -> (Reply, Action) {
        let State::Greeted { helo } = &self.state else {
            return (Reply::new(503, "5.5.1", "Error: bad sequence of commands"), Action::Continue);
        };
        if size.is_some_and(|size| size > self.settings.message_bytes_max) {
            return (Reply::new(552, "5.3.4", "Error: message too big"), Action::Continue);
        }
        if let Some(reply) = world.not_accepting() {
            return (reply, Action::Continue);
        }
        let eight_bit = body == BodyType::EightBitMime;
        self.state = State::Mail {
            helo: helo.clone(),
            sender,
            recipients: Vec::new(),
            refused: None,
            eight_bit,
            size,
        };
        (Reply::new(250, "2.1.0", "Ok"), Action::Continue)
    }

    fn rcpt(&mut self, recipient: Recipient, world: &dyn World) -> (Reply, Action) {
        let State::Mail { recipients, refused, .. } = &mut self.state else {
            return (Reply::new(503, "5.5.1", "Error: need MAIL command"), Action::Continue);
        };
        if recipients.len() >= RECIPIENTS_MAX {
            return (Reply::new(452, "4.5.3", "Error: too many recipients"), Action::Continue);
        }
        let (mailbox, right) = match recipient {
            Recipient::Postmaster => (self.settings.postmaster.clone(), Right::Anywhere),
            Recipient::Mailbox(mailbox) => match world.recipient(mailbox.domain()) {
                Ok(right) => (mailbox, right),
                Err(why) => {
                    // One that may be taken later is enough for a sender to come again.
                    if *refused != Some(Refusal::NotKnown) {
                        *refused = Some(why);
                    }
                    let reply = match why {
                        Refusal::Relaying => {
                            Reply::new(550, "5.7.1", &format!("<{mailbox}>: Relay access denied"))
                        }
                        Refusal::NotKnown => {
                            Reply::new(451, "4.3.0", &format!("<{mailbox}>: Temporary lookup failure"))
                        }
                    };
                    return (reply, Action::Continue);
                }
            },
        };
        if recipients.iter().all(|(known, _)| *known != mailbox) {
            recipients.push((mailbox, right));
        }
        (Reply::new(250, "2.1.5", "Ok"), Action::Continue)
    }
}

/// Whether octets may follow this line that are no command.
fn may_begin_a_chunk(line: &[u8]) -> bool {
    line.get(..4).is_some_and(|verb| verb.eq_ignore_ascii_case(b"BDAT"))
}

/// Commands that are answered where TLS is required and has not begun (RFC 3207 §4): no others are, malformed and unknown ones included.
fn may_be_in_the_clear(line: &[u8]) -> bool {
    let verb = line.split(|octet| *octet == b' ').next().unwrap_or_default();
    ["EHLO", "NOOP", "STARTTLS", "QUIT"].iter().any(|allowed| verb.eq_ignore_ascii_case(allowed.as_bytes()))
}

/// To data for nobody.
fn nobody(why: Refusal) -> Reply {
    match why {
        Refusal::Relaying => Reply::new(554, "5.5.1", "Error: no valid recipients"),
        Refusal::NotKnown => Reply::new(451, "4.3.0", "Error: no valid recipients, try again later"),
    }
}

fn refusal(bad: BadCommand) -> Reply {
    match bad {
        BadCommand::Chunk => Reply::new(501, "5.5.4", "Syntax: BDAT octets [LAST]"),
        BadCommand::Unknown => Reply::new(500, "5.5.2", "Error: command not recognized"),
        BadCommand::Syntax(why) => Reply::new(501, "5.5.4", &format!("Syntax: {why}")),
        BadCommand::Address(BadAddress::NotAscii) => {
            Reply::new(553, "5.6.7", "Error: address is not ASCII, and SMTPUTF8 is not offered")
        }
        BadCommand::Address(e) => Reply::new(501, "5.1.3", &format!("Error: {e}")),
        BadCommand::UnknownParameter(name) => {
            let shown: String = name.chars().filter(|c| c.is_ascii_graphic()).take(40).collect();
            Reply::new(555, "5.5.4", &format!("Unsupported option: {shown}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Open;

    impl World for Open {
        fn recipient(&self, domain: &str) -> Result<Right, Refusal> {
            match domain {
                "routed.example" => Ok(Right::Route),
                "unknown.example" => Err(Refusal::NotKnown),
                _ => Err(Refusal::Relaying),
            }
        }

        fn not_accepting(&self) -> Option<Reply> {
            None
        }
    }

    /// Plays the transcripts of `testdata/sessions.txt`: `C:` is said, `S:` is what the reply must have, `N:` what it must not have.
    #[test]
    fn transcripts() {
        let text = include_str!("testdata/sessions.txt");
        for case in text.split("\n\n") {
            let settings = Settings {
                hostname: "mx.test".into(),
                postmaster: Mailbox::parse("postmaster@mx.test").unwrap(),
                message_bytes_max: 1000,
                starttls: true,
                require_tls: case.contains("# require"),
            };
            let (mut session, _) = Session::new(settings.into(), false);
            let mut said: Option<String> = None;
            for line in case.lines().filter(|l| !l.starts_with('#')) {
                if let Some(command) = line.strip_prefix("C: ") {
                    let (reply, action) = session.line(command.as_bytes(), &Open);
                    let mut out = String::new();
                    reply.write(&mut out);
                    if action == Action::StartTls {
                        session = session.encrypted();
                    }
                    said = Some(out);
                } else if let Some(expected) = line.strip_prefix("S: ") {
                    let said = said.as_deref().unwrap_or_default();
                    assert!(said.contains(expected), "expected {expected:?}, said {said:?} in\n{case}");
                } else if let Some(unexpected) = line.strip_prefix("N: ") {
                    let said = said.as_deref().unwrap_or_default();
                    assert!(!said.contains(unexpected), "said {said:?} in\n{case}");
                }
            }
        }
    }

    fn greeted() -> Session {
        let settings = Settings {
            hostname: "mx.test".into(),
            postmaster: Mailbox::parse("postmaster@mx.test").unwrap(),
            message_bytes_max: 1000,
            starttls: false,
            require_tls: false,
        };
        let (mut session, _) = Session::new(settings.into(), false);
        session.line(b"EHLO c.example", &Open);
        session
    }

    /// P7: octets of a chunk are read whatever is said to it, so that none of them is a command.
    #[test]
    fn p7_a_chunk_is_read_before_anything_is_said() {
        let mut session = greeted();
        let mut action = |line: &str| session.line(line.as_bytes(), &Open).1;
        assert_eq!(action("BDAT 7"), Action::Discard(7));
        action("MAIL FROM:<a@b.example>");
        assert_eq!(action("BDAT 7 LAST"), Action::Discard(7));
        action("RCPT TO:<u@elsewhere.example>");
        assert_eq!(action("BDAT 7 LAST"), Action::Discard(7));
        action("MAIL FROM:<a@b.example>");
        action("RCPT TO:<u@routed.example>");
        let Action::Chunk { transaction: Some(of), octets: 7, last: false } = action("BDAT 7") else {
            panic!()
        };
        assert_eq!(of.recipients.len(), 1);
        assert_eq!(action("BDAT 8"), Action::Chunk { transaction: None, octets: 8, last: false });
        assert_eq!(action("BDAT 9 LAST"), Action::Chunk { transaction: None, octets: 9, last: true });
        for line in ["BDAT seven", "BDAT\t7", "BDAT 7\0 LAST", "BDAT 7\r LAST", "bdat", "BDATA 7"] {
            assert_eq!(action(line), Action::Close, "{line:?}");
        }
        assert_eq!(session.bad_line(b"bdat 7\n", "Error: bare LF").1, Action::Close);
    }

    #[test]
    fn chunks_on_their_way_when_one_was_refused_are_no_errors() {
        let mut session = greeted();
        for line in ["MAIL FROM:<a@b.example>", "RCPT TO:<u@routed.example>", "BDAT 5"] {
            session.line(line.as_bytes(), &Open);
        }
        assert!(session.expects_chunks());
        session.chunk_refused();
        for _ in 0..=2 * ERRORS_MAX {
            let (reply, action) = session.line(b"BDAT 5", &Open);
            assert_eq!((reply.code(), action), (503, Action::Discard(5)));
        }
        assert_eq!(session.line(b"MAIL FROM:<a@b.example>", &Open).0.code(), 250);
        // Those of no message are.
        session.line(b"RSET", &Open);
        for _ in 0..ERRORS_MAX {
            assert_eq!(session.line(b"BDAT 0", &Open).0.code(), 503);
        }
        assert_eq!(
            session.line(b"BDAT 0", &Open),
            (Reply::new(421, "4.7.0", "mx.test Error: too many errors"), Action::Close)
        );
    }

    #[test]
    fn too_many_errors_end_the_session() {
        let mut session = greeted();
        for _ in 0..ERRORS_MAX {
            assert_eq!(session.line(b"XYZZY", &Open).1, Action::Continue);
        }
        let (reply, action) = session.line(b"XYZZY", &Open);
        assert_eq!((reply.code(), action), (421, Action::Close));
    }
}
