//! The mail log: lines that tools for Postfix's log read, as the documentation of the log promises.
//!
//! The lines of one event are written with one write, before whatever they announce. A log that cannot be written is said
//! once on standard error; mail goes on.
#![expect(clippy::disallowed_methods, reason = "this is the edge to the log's file")]

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::clock;
use crate::config::{LogFormat, LogOutput};

/// Who writes a line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Service {
    /// Sessions of clients.
    Smtpd,
    /// Message data.
    Cleanup,
    /// The queue.
    Qmgr,
    /// Deliveries.
    Smtp,
    /// Notices.
    Bounce,
    /// Durability.
    Cluster,
    /// Erasure.
    Erase,
}

impl Service {
    fn word(self) -> &'static str {
        match self {
            Service::Smtpd => "smtpd",
            Service::Cleanup => "cleanup",
            Service::Qmgr => "qmgr",
            Service::Smtp => "smtp",
            Service::Bounce => "bounce",
            Service::Cluster => "cluster",
            Service::Erase => "erase",
        }
    }
}

/// The log of a node.
pub struct MailLog {
    node: String,
    sink: Mutex<Sink>,
    failed: AtomicBool,
}

struct Sink {
    name: String,
    format: LogFormat,
    to_syslog: bool,
    out: Box<dyn std::io::Write + Send>,
}

impl Sink {
    fn open(name: &str, format: LogFormat, output: &LogOutput) -> std::io::Result<Sink> {
        let out: Box<dyn std::io::Write + Send> = match output {
            LogOutput::Stderr => Box::new(std::io::stderr()),
            LogOutput::Syslog => Box::new(Syslog::open(Path::new("/dev/log"))?),
            LogOutput::File(path) => {
                Box::new(std::fs::OpenOptions::new().create(true).append(true).open(path)?)
            }
        };
        Ok(Sink { name: name.into(), format, to_syslog: *output == LogOutput::Syslog, out })
    }
}

impl MailLog {
    /// Opens the log.
    ///
    /// # Errors
    /// If its file cannot be opened for appending.
    pub fn open(node: &str, name: &str, format: LogFormat, output: &LogOutput) -> std::io::Result<MailLog> {
        let sink = Mutex::new(Sink::open(name, format, output)?);
        Ok(MailLog { node: node.into(), sink, failed: AtomicBool::new(false) })
    }

    /// Goes on in another file, or in a new one of the same name after the old one was moved away.
    ///
    /// # Errors
    /// If it cannot be opened; the log goes on where it was.
    pub fn reopen(&self, name: &str, format: LogFormat, output: &LogOutput) -> std::io::Result<()> {
        let sink = Sink::open(name, format, output)?;
        *self.sink.lock().unwrap_or_else(PoisonError::into_inner) = sink;
        self.failed.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Writes the lines of one event. `number` is the session's.
    pub fn write(&self, number: u64, lines: &[(Service, String)]) {
        let time = clock::wall().to_rfc3339_opts(chrono::SecondsFormat::Millis, false);
        let mut text = String::with_capacity(lines.len() * 120);
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        let Sink { name, format, to_syslog, out } = &mut *sink;
        for (service, line) in lines {
            let service = service.word();
            let written = match format {
                // syslog adds time and host itself.
                LogFormat::Postfix if *to_syslog => {
                    writeln!(text, "{name}/{service}[{number}]: {line}")
                }
                LogFormat::Postfix => {
                    writeln!(text, "{time} {} {name}/{service}[{number}]: {line}", self.node)
                }
                LogFormat::Json => {
                    let mut value = fields(line);
                    value.insert("time".into(), time.clone().into());
                    value.insert("node".into(), self.node.clone().into());
                    value.insert("name".into(), name.clone().into());
                    value.insert("service".into(), service.into());
                    value.insert("pid".into(), number.into());
                    writeln!(text, "{}", serde_json::Value::Object(value))
                }
            };
            written.expect("writing to a String does not fail");
        }
        if let Err(e) = out.write_all(text.as_bytes())
            && !self.failed.swap(true, Ordering::Relaxed)
        {
            tracing::error!(error = %e, "the mail log cannot be written; mail goes on without it");
        }
    }

    /// Writes one line.
    pub fn line(&self, number: u64, service: Service, line: String) {
        self.write(number, &[(service, line)]);
    }
}

/// The machine's syslog: one datagram a line, in the form that syslog(3) sends to it. A line that it has no room for is dropped
/// rather than that mail waits.
struct Syslog {
    path: PathBuf,
    socket: Option<UnixDatagram>,
}

/// Facility mail, severity informational (RFC 3164 §4.1.1).
const MAIL_INFO: u8 = 2 << 3 | 6;

impl Syslog {
    fn open(path: &Path) -> std::io::Result<Syslog> {
        let mut syslog = Syslog { path: path.into(), socket: None };
        syslog.connect()?;
        Ok(syslog)
    }

    fn connect(&mut self) -> std::io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(&self.path)?;
        socket.set_nonblocking(true)?;
        self.socket = Some(socket);
        Ok(())
    }

    fn send(&mut self, line: &[u8]) -> std::io::Result<()> {
        if self.socket.is_none() {
            self.connect()?;
        }
        let datagram = [format!("<{MAIL_INFO}>").as_bytes(), line].concat();
        match self.socket.as_ref().map(|socket| socket.send(&datagram)) {
            Some(Err(e)) if e.kind() != std::io::ErrorKind::WouldBlock => {
                // It was started anew: connect again with the next line.
                self.socket = None;
                Err(e)
            }
            _ => Ok(()),
        }
    }
}

impl std::io::Write for Syslog {
    fn write(&mut self, lines: &[u8]) -> std::io::Result<usize> {
        for line in lines.split(|octet| *octet == b'\n').filter(|line| !line.is_empty()) {
            self.send(line).or_else(|_| self.send(line))?;
        }
        Ok(lines.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Keys of the log's lines.
const KEYS: [&str; 18] = [
    "client",
    "delay",
    "delays",
    "dsn",
    "from",
    "helo",
    "index",
    "lag",
    "message-id",
    "network",
    "nodes",
    "nrcpt",
    "power",
    "proto",
    "relay",
    "size",
    "status",
    "to",
];

/// Where the `>` of an address stands that begins after its `<`: one within quotes is part of it (RFC 5321 §4.1.2).
fn address_end(text: &str) -> usize {
    let (mut quoted, mut escaped) = (false, false);
    for (at, octet) in text.bytes().enumerate() {
        match octet {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'>' if !quoted => return at,
            _ => {}
        }
    }
    text.len()
}

/// The fields of a line of ours: its id, each `key=value` that the log has, the words in the parenthesis at its end as `text`, and
/// the whole as `line`. The first of a key counts, so that a peer's words replace none.
fn fields(line: &str) -> serde_json::Map<String, serde_json::Value> {
    let mut fields = serde_json::Map::new();
    let mut rest = line;
    if let Some((id, after)) = line.split_once(": ")
        && id.len() <= 16
        && id.bytes().all(|b| b.is_ascii_alphanumeric())
    {
        fields.insert("id".into(), id.into());
        rest = after;
    }
    while let Some(at) = rest.find('=') {
        let key_at = rest[..at].rfind([' ', ',', ';']).map_or(0, |n| n + 1);
        let key = &rest[key_at..at];
        rest = &rest[at + 1..];
        let (value, after) = match rest.strip_prefix('<') {
            Some(inner) => {
                let (value, after) = inner.split_at(address_end(inner));
                (value, after.strip_prefix('>').unwrap_or(after))
            }
            None => rest.split_at(rest.find([',', ' ', ';']).unwrap_or(rest.len())),
        };
        if KEYS.contains(&key) {
            fields.entry(key).or_insert(value.into());
        }
        rest = after;
        // A destination's words are not ours to take apart.
        if let Some(text) = rest.strip_prefix(" (") {
            fields.insert("text".into(), text.strip_suffix(')').unwrap_or(text).into());
            break;
        }
    }
    fields.insert("line".into(), line.into());
    fields
}

/// Text that came from outside, fit for a line of the log: printable and bounded.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).take(500).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_carries_the_fields_of_the_line() {
        let line = "00X: to=<a,b@c.example>, relay=h[1.2.3.4]:25, delay=1.20, dsn=5.1.1, status=bounced (550 x=y (no) user)";
        let found = fields(line);
        let text = |key: &str| found.get(key).and_then(|v| v.as_str()).unwrap_or("absent").to_string();
        let expected = [
            ("id", "00X"),
            ("to", "a,b@c.example"),
            ("relay", "h[1.2.3.4]:25"),
            ("delay", "1.20"),
            ("dsn", "5.1.1"),
            ("status", "bounced"),
            ("text", "550 x=y (no) user"),
            ("line", line),
        ];
        assert_eq!(found.len(), expected.len(), "{found:?}");
        expected.iter().for_each(|(key, value)| assert_eq!(text(key), *value, "{key}"));
        let reject = fields(
            "NOQUEUE: reject: RCPT from unknown[1.2.3.4]: 550 5.7.1 <x@y>: no; from=<> to=<x@y> proto=ESMTP",
        );
        assert_eq!(
            (&reject["id"], &reject["from"], &reject["to"]),
            (&"NOQUEUE".into(), &"".into(), &"x@y".into())
        );
        assert_eq!(fields("connect from unknown[1.2.3.4]").len(), 1);
        // A quoted local part says what it likes and replaces nothing.
        let sly = r#"00X: to=<"a> line=x status=sent to=<v@y"@e.example>, status=bounced (no)"#;
        let found = fields(sly);
        assert_eq!((&found["line"], &found["status"]), (&sly.into(), &"bounced".into()));
    }

    /// One datagram a line with priority and tag, also after syslog was started anew.
    #[test]
    fn syslog_gets_each_line_and_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut buffer = [0; 200];
        let mut daemon = UnixDatagram::bind(&path).unwrap();
        let log = MailLog {
            node: "n".into(),
            sink: Mutex::new(Sink {
                name: "holdfast".into(),
                format: LogFormat::Postfix,
                to_syslog: true,
                out: Box::new(Syslog::open(&path).unwrap()),
            }),
            failed: AtomicBool::new(false),
        };
        for start in 0..2 {
            log.write(7, &[(Service::Smtpd, "connect from a".into()), (Service::Qmgr, "B: removed".into())]);
            for expected in ["<22>holdfast/smtpd[7]: connect from a", "<22>holdfast/qmgr[7]: B: removed"] {
                let length = daemon.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], expected.as_bytes(), "start {start}");
            }
            std::fs::remove_file(&path).unwrap();
            daemon = UnixDatagram::bind(&path).unwrap();
        }
    }
}
