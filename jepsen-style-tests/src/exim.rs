//! Debian's Exim as a stranger on either side, with an instance of its own in a temporary directory. Unlike Postfix it sends chunks
//! (RFC 3030), as well as taking them. Taken from its package without installing it, since a machine has one mail server.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::tools::wait_for;

/// A running Exim; it ends with this value.
pub struct Exim {
    dir: tempfile::TempDir,
    binary: PathBuf,
    port: u16,
    daemon: Child,
}

impl Exim {
    /// Starts an instance on `port` that keeps what comes for `test.example`, and sends what is for `via.example` to `relay`. `None` if the
    /// environment does not say in `HOLDFAST_EXIM` where its program is.
    ///
    /// # Panics
    /// If it does not start, which takes root, or if it is not there and `HOLDFAST_REQUIRE_PEERS` is set.
    pub fn start(port: u16, relay: &str) -> Option<Exim> {
        let Some(binary) = std::env::var_os("HOLDFAST_EXIM").map(PathBuf::from) else {
            assert!(std::env::var_os("HOLDFAST_REQUIRE_PEERS").is_none(), "HOLDFAST_EXIM names no Exim");
            eprintln!("skipped: HOLDFAST_EXIM names no Exim; this run does not count");
            return None;
        };
        let dir = tempfile::Builder::new().prefix("holdfast-exim-").tempdir().expect("a directory");
        let (at, program) = (dir.path().display(), binary.display());
        let (host, relay_port) = relay.rsplit_once(':').expect("HOST:PORT");
        let text = format!(
            "exim_path = {program}\nprimary_hostname = exim.example\nspool_directory = {at}/spool\n\
             log_file_path = {at}/%slog\nexim_user = daemon\nexim_group = daemon\nacl_smtp_rcpt = all\nkeep_environment =\n\
             local_interfaces = 127.0.0.1\ndaemon_smtp_ports = {port}\nchunking_advertise_hosts = *\n\
             tls_advertise_hosts =\nhost_lookup =\n\
             begin acl\nall:\n  accept\n\
             begin routers\n\
             out:\n  driver = manualroute\n  domains = via.example\n  route_list = * {host}::{relay_port}\n  self = send\n  transport = out\n\
             here:\n  driver = accept\n  domains = test.example\n  transport = here\n\
             begin transports\n\
             out:\n  driver = smtp\n  hosts_try_chunking = *\n  hosts_avoid_tls = *\n\
             here:\n  driver = appendfile\n  file = {at}/taken\n  user = daemon\n  group = daemon\n"
        );
        let conf = dir.path().join("conf");
        std::fs::write(&conf, text).expect("the directory is ours");
        std::fs::write(dir.path().join("taken"), "").expect("the directory is ours");
        run(Command::new("chown").args(["-R", "daemon:daemon"]).arg(dir.path()));
        run(Command::new("chown").arg("root:root").arg(&conf));
        // Debian's program looks for a user of this name before it reads anything.
        for (file, line) in [("passwd", "Debian-exim:x:1:1::/:/bin/false\n"), ("group", "Debian-exim:x:1:\n")]
        {
            let text = std::fs::read_to_string(Path::new("/etc").join(file)).expect("it is there");
            std::fs::write(dir.path().join(file), text + line).expect("the directory is ours");
        }
        let daemon = within(dir.path(), &binary).arg("-bdf").stdin(Stdio::null()).spawn().expect("unshare");
        let exim = Exim { dir, binary, port, daemon };
        wait_for("Exim to listen", Duration::from_secs(20), || {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        Some(exim)
    }

    /// Where it takes mail.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Hands it a message, whose lines end with LF, for one recipient, and waits until it has tried to send it.
    ///
    /// # Panics
    /// If it does not take it.
    pub fn submit(&self, recipient: &str, text: &str) {
        let mut command = within(self.dir.path(), &self.binary);
        let command = command.args(["-odf", "-i", "-f", "a@b.example", recipient]).stdin(Stdio::piped());
        let mut child = command.spawn().expect("unshare");
        let mut input = child.stdin.take().expect("a pipe");
        input.write_all(text.as_bytes()).expect("it reads");
        drop(input);
        assert!(child.wait().is_ok_and(|status| status.success()), "Exim does not take it: {}", self.log());
    }

    /// Its log: `<=` is what came in, `=>` what went out, and `K` says that it was in chunks.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("mainlog")).unwrap_or_default()
    }

    /// What it kept, one message after the other, with LF at the ends of lines.
    pub fn taken(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("taken")).unwrap_or_default()
    }
}

impl Drop for Exim {
    fn drop(&mut self) {
        drop(self.daemon.kill());
        drop(self.daemon.wait());
    }
}

/// Its program, where the user that it looks for is there.
fn within(dir: &Path, binary: &Path) -> Command {
    let script = "mount --bind \"$0/passwd\" /etc/passwd && mount --bind \"$0/group\" /etc/group && \
                  exec \"$1\" -C \"$0/conf\" \"${@:2}\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "bash", "-c", script]).arg(dir).arg(binary);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn run(command: &mut Command) {
    assert!(command.status().is_ok_and(|status| status.success()), "{command:?}");
}
