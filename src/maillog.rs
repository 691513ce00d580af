//! The mail log: lines that tools for Postfix's log read, as the documentation of the log promises.
//!
//! The lines of one event are written with one write, before whatever they announce. A log that cannot be written is said
//! once on standard error; mail goes on.
#![expect(clippy::disallowed_methods, reason = "this is the edge to the log's file")]

use std::fmt::Write as _;
use std::io::Write as _;
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
            LogOutput::File(path) => {
                Box::new(std::fs::OpenOptions::new().create(true).append(true).open(path)?)
            }
        };
        let out = Mutex::new(out);
        Ok(MailLog { node: node.into(), name: name.into(), format, out, failed: AtomicBool::new(false) })
    }

    /// Writes the lines of one event. `number` is the session's.
    pub fn write(&self, number: u64, lines: &[(Service, String)]) {
        let time = clock::wall().to_rfc3339_opts(chrono::SecondsFormat::Millis, false);
        let mut text = String::with_capacity(lines.len() * 120);
        for (service, line) in lines {
            let service = service.word();
            let written = match self.format {
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

/// Text that came from outside, fit for a line of the log: printable, bounded, without the parenthesis that ends a status.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).take(500).collect()
}
