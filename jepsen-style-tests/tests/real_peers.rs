//! Strangers on both sides: Postfix's smtp-source and smtp-sink, Postfix itself as the sender, and swaks over STARTTLS.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::tools::{program, wait_for};

/// Ends a process that the test started.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn postfixs_source_and_sink() {
    let (Some(source), Some(sink)) = (program("smtp-source"), program("smtp-sink")) else { return };
    let port = free_port();
    let dump = tempfile::tempdir().unwrap();
    let sink = Command::new(sink)
        .args([
            "-u",
            "root",
            "-d",
            &format!("{}/%M.", dump.path().display()),
            &format!("127.0.0.1:{port}"),
            "100",
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _sink = Ended(sink);
    wait_for("smtp-sink", Duration::from_secs(10), || {
        std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    let nodes = Nodes::start_all(&format!("127.0.0.1:{port}"));
    let status = Command::new(source)
        .args(["-s", "8", "-m", "200", "-l", "5000", "-f", "a@b.example", "-t", "u@test.example"])
        .arg(nodes.smtp(2))
        .status()
        .unwrap();
    assert!(status.success());
    nodes.wait_drained(Duration::from_secs(40));
    let sent = (1..=3).map(|id| nodes.maillog(id).matches("status=sent").count()).sum::<usize>();
    assert_eq!(sent, 200);
    let files = std::fs::read_dir(dump.path()).unwrap().count();
    assert!(files > 0, "the sink kept what it took");
}

#[test]
fn swaks_over_starttls() {
    let Some(swaks) = program("swaks") else { return };
    let customer = Customer::start();
    let nodes = Nodes::start_all(customer.address());
    let output = Command::new(swaks)
        .args(["--server", &nodes.smtp(3), "--tls", "--from", "a@b.example", "--to", "u@test.example"])
        .args(["--header", "X-Test-Name: swaks", "--body", "hello"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("TLS started") && said.contains("250 2.0.0 Ok: queued as"), "{said}");
    nodes.wait_drained(Duration::from_secs(20));
    let taken = customer.taken();
    assert_eq!(taken.len(), 1);
    assert!(String::from_utf8_lossy(&taken[0].octets).contains("with ESMTPS id"));
    assert!(nodes.maillog(3).contains("Anonymous TLS connection established from"));
}
