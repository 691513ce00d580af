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
    name: String,
    format: LogFormat,
    to_syslog: bool,
    out: Mutex<Box<dyn std::io::Write + Send>>,
    failed: AtomicBool,
}

impl MailLog {
    /// Opens the log.
    ///
    /// # Errors
    /// If its file cannot be opened for appending.
    pub fn open(node: &str, name: &str, format: LogFormat, output: &LogOutput) -> std::io::Result<MailLog> {
        let out: Box<dyn std::io::Write + Send> = match output {
            LogOutput::Stderr => Box::new(std::io::stderr()),
            LogOutput::Syslog => Box::new(Syslog::open(Path::new("/dev/log"))?),
            LogOutput::File(path) => {
                Box::new(std::fs::OpenOptions::new().create(true).append(true).open(path)?)
            }
        };
        let out = Mutex::new(out);
        let to_syslog = *output == LogOutput::Syslog;
        let failed = AtomicBool::new(false);
        Ok(MailLog { node: node.into(), name: name.into(), format, to_syslog, out, failed })
    }

    /// Writes the lines of one event. `number` is the session's.
    pub fn write(&self, number: u64, lines: &[(Service, String)]) {
        let time = clock::wall().to_rfc3339_opts(chrono::SecondsFormat::Millis, false);
        let mut text = String::with_capacity(lines.len() * 120);
        for (service, line) in lines {
            let service = service.word();
            let written = match self.format {
                // syslog adds time and host itself.
                LogFormat::Postfix if self.to_syslog => {
                    writeln!(text, "{}/{service}[{number}]: {line}", self.name)
                }
                LogFormat::Postfix => {
                    writeln!(text, "{time} {} {}/{service}[{number}]: {line}", self.node, self.name)
                }
                LogFormat::Json => {
                    let value = serde_json::json!({
                        "time": time, "node": self.node, "name": self.name,
                        "service": service, "pid": number, "line": line,
                    });
                    writeln!(text, "{value}")
                }
            };
            written.expect("writing to a String does not fail");
        }
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
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

/// Text that came from outside, fit for a line of the log: printable and bounded.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).take(500).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One datagram a line with priority and tag, also after syslog was started anew.
    #[test]
    fn syslog_gets_each_line_and_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut buffer = [0; 200];
        let mut daemon = UnixDatagram::bind(&path).unwrap();
        let log = MailLog {
            node: "n".into(),
            name: "holdfast".into(),
            format: LogFormat::Postfix,
            to_syslog: true,
            out: Mutex::new(Box::new(Syslog::open(&path).unwrap())),
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
