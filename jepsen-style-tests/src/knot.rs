//! Knot DNS with a zone that it signs, `signed.test`, and the same zone unsigned, `plain.test`.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::tools::{program, wait_for};

/// A running name server; it ends with this value.
pub struct Knot {
    dir: tempfile::TempDir,
    port: u16,
    child: Child,
}

impl Knot {
    /// Serves these records, whose names are relative to the zone. `None` if Knot is not installed.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(records: &str) -> Option<Knot> {
        let (knotd, keymgr) = (program("knotd")?, program("keymgr")?);
        let dir = tempfile::Builder::new().prefix("holdfast-knot-").tempdir().expect("a directory");
        let port = free_port();
        let root = dir.path().display();
        std::fs::create_dir(dir.path().join("db")).expect("the directory is ours");
        let mut conf = format!(
            "server:\n    listen: 127.0.0.1@{port}\n    rundir: \"{root}\"\ndatabase:\n    storage: \"{root}/db\"\n\
             policy:\n  - id: one\n    algorithm: ecdsap256sha256\n    single-type-signing: on\nzone:\n"
        );
        for (zone, signing) in [("signed.test", "on"), ("plain.test", "off")] {
            let text = format!(
                "$ORIGIN {zone}.\n$TTL 60\n@ SOA ns admin 1 3600 600 86400 60\n@ NS ns\nns A 127.0.0.1\n{records}"
            );
            std::fs::write(dir.path().join(zone), text).expect("the directory is ours");
            conf += &format!(
                "  - domain: {zone}\n    file: \"{root}/{zone}\"\n    zonefile-sync: -1\n    journal-content: none\n    \
                 dnssec-signing: {signing}\n    dnssec-policy: one\n"
            );
        }
        let file = dir.path().join("knot.conf");
        std::fs::write(&file, conf).expect("the directory is ours");
        let log = std::fs::File::create(dir.path().join("log")).expect("the directory is ours");
        let child = Command::new(knotd)
            .arg("-c")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("knotd starts");
        let knot = Knot { dir, port, child };
        wait_for("Knot to sign", Duration::from_secs(20), || {
            let keys = Command::new(&keymgr).arg("-c").arg(&file).args(["signed.test", "dnskey"]).output();
            let keys = keys.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
            // As a zone file has it, for readers that want the class.
            let anchor = keys.replace(" DNSKEY ", " 60 IN DNSKEY ");
            std::fs::write(knot.anchor(), &anchor).expect("the directory is ours");
            let log = std::fs::read_to_string(knot.dir.path().join("log")).unwrap_or_default();
            anchor.contains("DNSKEY")
                && log.contains("server started")
                && log.contains("[signed.test.] loaded")
        });
        Some(knot)
    }

    /// Where it answers.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The file of the key that signs.
    pub fn anchor(&self) -> PathBuf {
        self.dir.path().join("anchor")
    }
}

impl Drop for Knot {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A port that is free for UDP now.
fn free_port() -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    socket.local_addr().expect("it is bound").port()
}

/// SHA-256 of a certificate's public key in hexadecimal, as a TLSA record `3 1 1` has it. `None` if OpenSSL is not installed.
///
/// # Panics
/// If the file holds no certificate.
pub fn key_digest(certificate: &Path) -> Option<String> {
    let openssl = program("openssl")?;
    let script = format!(
        "{0} x509 -in '{1}' -noout -pubkey | {0} pkey -pubin -outform DER | {0} dgst -sha256 -r",
        openssl.display(),
        certificate.display()
    );
    let output = Command::new("sh").args(["-c", &script]).output().expect("sh runs");
    let text = String::from_utf8(output.stdout).expect("hexadecimal");
    let digest = text.split(' ').next().unwrap_or_default().trim().to_string();
    assert_eq!(digest.len(), 64, "{}", String::from_utf8_lossy(&output.stderr));
    Some(digest)
}
