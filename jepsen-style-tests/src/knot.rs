//! Knot DNS with three zones below one that it signs, `test`, in which trust begins; and certificates for their hosts.

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

/// Zones that hold the same records, and what proves them.
///
/// | zone | its own signatures | the delegation to it |
/// | --- | --- | --- |
/// | `signed.test` | good | says so |
/// | `plain.test` | none | says so |
/// | `forged.test` | none | says that there are some |
const ZONES: [&str; 3] = ["signed.test", "plain.test", "forged.test"];

impl Knot {
    /// Serves these records, whose names are relative to the zone. `None` if Knot is not installed.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(records: &str) -> Option<Knot> {
        Knot::start_as(records, true)
    }

    /// As [`Knot::start`], like a name server that strips all signatures.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_stripped(records: &str) -> Option<Knot> {
        Knot::start_as(records, false)
    }

    fn start_as(records: &str, signs: bool) -> Option<Knot> {
        let (knotd, keymgr) = (program("knotd")?, program("keymgr")?);
        let dir = tempfile::Builder::new().prefix("holdfast-knot-").tempdir().expect("a directory");
        let port = free_port();
        let root = dir.path().display();
        std::fs::create_dir(dir.path().join("db")).expect("the directory is ours");
        let mut conf = format!(
            "server:\n    listen: 127.0.0.1@{port}\n    rundir: \"{root}\"\ndatabase:\n    storage: \"{root}/db\"\n\
             policy:\n  - id: one\n    algorithm: ecdsap256sha256\n    single-type-signing: on\nzone:\n"
        );
        for zone in ["test"].iter().chain(&ZONES) {
            let signing = if signs && ["test", "signed.test"].contains(zone) { "on" } else { "off" };
            conf += &format!(
                "  - domain: {zone}\n    file: \"{root}/{zone}\"\n    zonefile-sync: -1\n    journal-content: none\n    \
                 dnssec-signing: {signing}\n    dnssec-policy: one\n"
            );
        }
        let file = dir.path().join("knot.conf");
        std::fs::write(&file, conf).expect("the directory is ours");
        let ask = |args: &[&str]| {
            let output = Command::new(&keymgr).arg("-c").arg(&file).args(args).output().expect("keymgr runs");
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let mut parent =
            "$ORIGIN test.\n$TTL 60\n@ SOA ns admin 1 3600 600 86400 60\n@ NS ns\nns A 127.0.0.1\n"
                .to_string();
        for zone in ZONES {
            let text = format!(
                "$ORIGIN {zone}.\n$TTL 60\n@ SOA ns admin 1 3600 600 86400 60\n@ NS ns\nns A 127.0.0.1\n{records}"
            );
            std::fs::write(dir.path().join(zone), text).expect("the directory is ours");
            parent += &format!("{zone}. NS ns.{zone}.\nns.{zone}. A 127.0.0.1\n");
        }
        if signs {
            ask(&["signed.test", "generate", "algorithm=ecdsap256sha256", "ksk=yes", "zsk=yes"]);
            parent += &ask(&["signed.test", "ds"]);
            parent += &format!("forged.test. DS 1 13 2 {}\n", "1".repeat(64));
        }
        std::fs::write(dir.path().join("test"), parent).expect("the directory is ours");
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
        wait_for("Knot to serve", Duration::from_secs(20), || {
            let log = std::fs::read_to_string(knot.dir.path().join("log")).unwrap_or_default();
            let serves = log.contains("server started")
                && ZONES.iter().all(|zone| log.contains(&format!("[{zone}.] loaded")));
            if !signs {
                return serves;
            }
            // As a zone file has it, for readers that want the class.
            let anchor = ask(&["test", "dnskey"]).replace(" DNSKEY ", " 60 IN DNSKEY ");
            std::fs::write(knot.anchor(), &anchor).expect("the directory is ours");
            serves && log.contains("[test.] loaded") && anchor.contains("DNSKEY")
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

/// Makes a certificate for these names under the authority of a cluster's `pki` directory, as `NAME.crt` and `NAME.key` in there.
/// `None` if OpenSSL is not installed.
///
/// # Panics
/// If it cannot be made.
pub fn certificate(pki: &Path, name: &str, names: &[String]) -> Option<()> {
    let openssl = program("openssl")?;
    let alternatives: Vec<String> = names.iter().map(|name| format!("DNS:{name}")).collect();
    let script = format!(
        "set -e; cd '{1}'; {0} req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN={2} -keyout {2}.key \
         -out {2}.csr; echo subjectAltName={3} > {2}.ext; {0} x509 -req -in {2}.csr -CA ca.crt -CAkey ca.key -days 30 \
         -extfile {2}.ext -out {2}.crt",
        openssl.display(),
        pki.display(),
        name,
        alternatives.join(",")
    );
    let output = Command::new("sh").args(["-c", &script]).output().expect("sh runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(())
}
