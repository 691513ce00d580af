//! Debian's Postfix as a stranger on either side: an instance of its own in a temporary directory, which relays everything to one
//! address, or takes everything over STARTTLS.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::tools::{program, wait_for};

/// A running Postfix; it ends with this value.
pub struct Postfix {
    dir: tempfile::TempDir,
    port: u16,
}

impl Postfix {
    /// Starts an instance that listens on `port` and relays to `relay`, with STARTTLS if that is offered. `None` if Postfix is not
    /// installed.
    ///
    /// # Panics
    /// If it does not start. That takes root, as its master does.
    pub fn start(port: u16, relay: &str) -> Option<Postfix> {
        let (host, relay_port) = relay.rsplit_once(':').expect("HOST:PORT");
        Postfix::start_with(
            port,
            &format!(
                "relayhost = [{host}]:{relay_port}\nsmtp_tls_security_level = may\nsmtp_tls_loglevel = 1\n"
            ),
        )
    }

    /// Starts an instance that hands everything on to the first of these that takes it, with STARTTLS if that is offered, and changes no octet of
    /// it. `None` if Postfix is not installed.
    ///
    /// # Panics
    /// See [`Postfix::start`].
    pub(crate) fn start_as_sender(port: u16, relays: &[String]) -> Option<Postfix> {
        let bracketed = relays.iter().filter_map(|relay| relay.rsplit_once(':'));
        let all: Vec<String> = bracketed.map(|(host, port)| format!("[{host}]:{port}")).collect();
        let (first, others) = all.split_first().expect("somebody to hand it to");
        Postfix::start_with(
            port,
            &format!(
                "relayhost = {first}\nsmtp_fallback_relay = {}\nsmtp_tls_security_level = may\n\
                 header_checks = regexp:{{{{/^Received:/ IGNORE}}}}\nsmtp_connect_timeout = 2s\n\
                 message_size_limit = 20000000\nlocal_header_rewrite_clients =\n",
                others.join(", ")
            ),
        )
    }

    /// Starts an instance that takes everything and throws it away, with STARTTLS and no later TLS version than 1.2.
    ///
    /// # Panics
    /// See [`Postfix::start`].
    pub fn start_as_customer(port: u16, cert: &str, key: &str) -> Option<Postfix> {
        Postfix::start_with(
            port,
            &format!(
                "default_transport = discard:\nsmtpd_tls_security_level = may\nsmtpd_tls_cert_file = {cert}\n\
                 smtpd_tls_key_file = {key}\nsmtpd_tls_protocols = <=TLSv1.2\n"
            ),
        )
    }

    fn start_with(port: u16, settings: &str) -> Option<Postfix> {
        let postfix = program("postfix")?;
        let dir = tempfile::Builder::new().prefix("holdfast-postfix-").tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name).display().to_string();
        for name in ["", "etc", "spool", "data"] {
            std::fs::create_dir_all(dir.path().join(name)).expect("the directory is ours");
            run(Command::new("chmod").args(["755", &at(name)]));
        }
        run(Command::new("chown").args(["postfix", &at("data")]));
        let main = format!(
            "compatibility_level = 3.6\nqueue_directory = {}\ndata_directory = {}\nmaillog_file = {}\n\
             maillog_file_prefixes = {}\ninet_interfaces = 127.0.0.1\ninet_protocols = ipv4\n\
             myhostname = sender.example\nmydestination =\nlocal_recipient_maps =\nalias_maps =\nalias_database =\n\
             mynetworks = 127.0.0.0/8\nsmtp_dns_support_level = disabled\nsmtp_host_lookup = native\n{settings}\
             smtpd_peername_lookup = no\nminimal_backoff_time = 1s\nmaximal_backoff_time = 2s\nqueue_run_delay = 1s\n",
            at("spool"),
            at("data"),
            at("maillog"),
            dir.path().display(),
        );
        std::fs::write(dir.path().join("etc/main.cf"), main).expect("the directory is ours");
        std::fs::write(dir.path().join("etc/master.cf"), master(port)).expect("the directory is ours");
        run(Command::new(postfix).args(["-c", &at("etc"), "start"]));
        let postfix = Postfix { dir, port };
        wait_for("Postfix to listen", Duration::from_secs(20), || {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        Some(postfix)
    }

    /// Where it takes mail.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Its log.
    pub fn maillog(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("maillog")).unwrap_or_default()
    }
}

impl Drop for Postfix {
    fn drop(&mut self) {
        let etc: &Path = &self.dir.path().join("etc");
        let stop = Command::new("postfix")
            .arg("-c")
            .arg(etc)
            .arg("stop")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        drop(stop);
    }
}

/// Debian's master.cf with nothing chrooted, on our port, with the log service.
fn master(port: u16) -> String {
    let debian =
        std::fs::read_to_string("/usr/share/postfix/master.cf.dist").expect("Debian's package has it");
    let mut lines = Vec::new();
    for line in debian.lines().filter(|l| !l.starts_with('#') && !l.trim().is_empty()) {
        let mut fields: Vec<&str> = line.split_whitespace().collect();
        if line.starts_with(' ') || fields.len() < 8 {
            lines.push(line.to_string()); // goes on from the line before
            continue;
        }
        if fields[0] == "postlog" {
            continue;
        }
        let own = format!("127.0.0.1:{port}");
        fields[4] = "n";
        if fields[..2] == ["smtp", "inet"] {
            fields[0] = &own;
        }
        lines.push(fields.join(" "));
    }
    lines.push("postlog unix-dgram n - n - 1 postlogd".into());
    lines.join("\n") + "\n"
}

/// Runs a program to its end. Its output goes nowhere: a daemon that it leaves behind would keep a pipe open.
fn run(command: &mut Command) {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(status.expect("the program starts").success(), "{command:?} failed");
}
