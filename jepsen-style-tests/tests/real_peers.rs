//! Strangers on both sides: Postfix's smtp-source and smtp-sink, Postfix itself as the sender, swaks over STARTTLS, and Exim in chunks.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::exim::Exim;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::postfix::Postfix;
use jepsen_style_tests::sender::{Client, message};
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

/// Postfix's own daemon relays to us and is lied to by nobody: the leader dies while it sends, and every message arrives.
#[test]
fn p1_postfix_as_the_sender() {
    let customer = Customer::start();
    let mut nodes = Nodes::start_all(customer.address());
    let leader = nodes.wait_leader();
    let entry = (1..=3).find(|id| *id != leader).unwrap();
    let Some(postfix) = Postfix::start(free_port(), &nodes.smtp(entry)) else { return };
    let mut client = Client::connect(0, &postfix.address()).unwrap();
    for n in 0..60 {
        let name = format!("postfix{n:02}");
        let sent = client.transact(&name, &["r", "s"], &message(&name, if n == 7 { 700_000 } else { 3000 }));
        assert_eq!(sent.outcome, Outcome::Ok);
        if n == 30 {
            nodes.kill(leader);
        }
    }
    wait_for("Postfix to have handed everything on", Duration::from_secs(60), || {
        postfix.maillog().matches("status=sent (250 2.0.0 Ok: queued as").count() == 120
    });
    assert!(postfix.maillog().contains("TLS connection established to 127.0.0.1"), "{}", postfix.maillog());
    assert!(nodes.maillog(entry).contains("TLS connection established from"));
    nodes.wait_drained(Duration::from_secs(40));
    let taken = customer.taken();
    for n in 0..60 {
        let canary = format!("canary-postfix{n:02}-line-000001-");
        for recipient in ["r", "s"] {
            let copies = taken
                .iter()
                .filter(|t| t.recipient == recipient && String::from_utf8_lossy(&t.octets).contains(&canary));
            assert!(copies.count() >= 1, "{canary} for {recipient} is missing");
        }
    }
}

/// Debian's summary of Postfix's logs reads ours, merged by time, and its totals are true.
#[test]
fn pflogsumm_reads_the_merged_logs() {
    let Some(pflogsumm) = program("pflogsumm") else { return };
    let customer = Customer::start();
    let nodes = Nodes::start_all(customer.address());
    nodes.route("client.test.example", customer.address());
    for id in 1..=3 {
        let mut client = Client::connect(id, &nodes.smtp(id)).unwrap();
        for (n, recipients) in [vec!["r", "s"], vec!["r"], vec!["bounce"], vec!["late"]].iter().enumerate() {
            let recipients: Vec<String> = recipients.iter().map(|r| format!("{r}{id}")).collect();
            let recipients: Vec<&str> = recipients.iter().map(String::as_str).collect();
            let name = format!("sum{id}-{n}");
            assert_eq!(client.transact(&name, &recipients, &message(&name, 1000)).outcome, Outcome::Ok);
        }
        assert_eq!(client.say("MAIL FROM:<a@b.example>\r\n").unwrap(), 250);
        assert_eq!(client.say("RCPT TO:<u@elsewhere.example>\r\n").unwrap(), 550);
    }
    nodes.wait_drained(Duration::from_secs(40));
    let mut lines: Vec<String> =
        (1..=3).flat_map(|id| nodes.maillog(id).lines().map(str::to_string).collect::<Vec<_>>()).collect();
    // By time alone: what a node wrote in one millisecond stays in its order.
    lines.sort_by_key(|line| line.split(' ').next().map(str::to_string));
    let file = nodes.dir().join("merged.maillog");
    std::fs::write(&file, lines.join("\n") + "\n").unwrap();
    let output = Command::new(pflogsumm).arg("--syslog-name=holdfast").arg(&file).output().unwrap();
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    let total = |what: &str| {
        let line = report
            .lines()
            .find(|l| l.trim_start().split_once(' ').is_some_and(|(_, w)| w.trim().starts_with(what)));
        line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok())
    };
    // 12 messages came by SMTP; a copy went to each of r, s, r, late, and to the sender a notice for each bounce.
    for (what, expected) in [
        ("received", 12),
        ("delivered", 15),
        ("deferred", 3),
        ("bounced", 3),
        ("rejected", 3),
        ("senders", 1),
    ] {
        assert_eq!(total(what), Some(expected), "{what} in\n{report}\n{}", lines.join("\n"));
    }
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

/// Behind a load balancer the client is whom the PROXY header names: for the log, the trace header and the right to relay. Who is
/// not a load balancer of ours has no say in it.
#[test]
fn swaks_with_proxy_headers() {
    let Some(swaks) = program("swaks") else { return };
    let customer = Customer::start();
    let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (balanced, strict) = (free(), free());
    let listeners = format!(
        "\n[[smtp.listener]]\nname = \"balanced\"\naddress = \"{balanced}\"\nproxy_from = [\"127.0.0.0/8\"]\n\
         relay_networks = [\"192.0.2.0/24\"]\n\n\
         [[smtp.listener]]\nname = \"strict\"\naddress = \"{strict}\"\nproxy_from = [\"203.0.113.0/24\"]\n\
         relay_networks = [\"192.0.2.0/24\"]\n"
    );
    let nodes = Nodes::start_with(|id, text| if id == 1 { text + &listeners } else { text });
    nodes.route("test.example", customer.address());
    nodes.route("*", customer.address());
    let run = |server: &str, version: &str, source: &str, to: &str| {
        let family = if version == "1" { "TCP4" } else { "AF_INET" };
        let output = Command::new(&swaks)
            .args(["--server", server, "--from", "a@b.example", "--to", to, "--body", "hello"])
            .args(["--proxy-version", version, "--proxy-family", family, "--proxy-source", source])
            .args(["--proxy-source-port", "12345", "--proxy-dest", "127.0.0.1", "--proxy-dest-port", "25"])
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let balanced = balanced.to_string();
    for (version, source, to, good) in [
        ("1", "192.0.2.7", "u@anywhere.example", true),
        ("2", "192.0.2.8", "u@anywhere.example", true),
        ("1", "198.51.100.1", "u@test.example", true),
        // Neither the load balancer's address nor its network counts.
        ("2", "198.51.100.2", "u@anywhere.example", false),
    ] {
        let output = run(&balanced, version, source, to);
        assert_eq!(output.0, good, "{version} {source}: {}", output.1);
        assert!(nodes.maillog(1).contains(&format!("connect from unknown[{source}]")), "{}", output.1);
    }
    let (taken, said) = run(&strict.to_string(), "1", "192.0.2.9", "u@anywhere.example");
    assert!(!taken, "a stranger's header counts for nothing: {said}");
    assert!(!nodes.maillog(1).contains("192.0.2.9"));
    nodes.wait_drained(Duration::from_secs(20));
    let traces: Vec<String> =
        customer.taken().iter().map(|t| String::from_utf8_lossy(&t.octets).into_owned()).collect();
    assert_eq!(traces.len(), 3);
    for source in ["192.0.2.7", "192.0.2.8", "198.51.100.1"] {
        assert!(traces.iter().any(|t| t.contains(&format!("[{source}]"))), "{source} in {traces:?}");
    }
    // From a load balancer a connection without a header is closed.
    let mut silent = std::net::TcpStream::connect(&balanced).unwrap();
    std::io::Write::write_all(&mut silent, b"EHLO client.example\r\n").unwrap();
    let mut rest = Vec::new();
    drop(std::io::Read::read_to_end(&mut silent, &mut rest));
    assert_eq!(rest, b"", "not a word");
}

#[test]
fn exim_in_chunks_both_ways() {
    let customer = Customer::start();
    let nodes = Nodes::start_all(customer.address());
    let Some(exim) = Exim::start(free_port(), &nodes.smtp(1)) else { return };
    nodes.route("test.example", &exim.address());
    nodes.route("via.example", customer.address());
    let body: String = (0..20_000).map(|n| format!("line {n}\n.{n}\n..\n")).collect();
    exim.submit("u@via.example", &format!("Subject: out\n\n{body}.\nlast\n"));
    wait_for("Exim's message to arrive", Duration::from_secs(30), || customer.count() == 1);
    let taken = String::from_utf8(customer.taken()[0].octets.clone()).unwrap().replace("\r\n", "\n");
    assert!(taken.ends_with(&format!("\n\n{body}.\nlast\n")), "its octets are not those that were sent");
    let log = exim.log();
    let sent = log.lines().find(|line| line.contains("=> u@via.example")).expect(&log);
    assert!(sent.contains(" K "), "it was not sent in chunks: {sent}");
    let names = ["small", "large"];
    let mut client = Client::connect(2, &nodes.smtp(2)).unwrap();
    for (name, bytes) in names.into_iter().zip([900, 700_000]) {
        assert_eq!(client.transact(name, &["r"], &message(name, bytes)).outcome, Outcome::Ok);
    }
    wait_for("Exim to take both", Duration::from_secs(30), || {
        exim.log().lines().filter(|line| line.contains("=> r <r@test.example>")).count() == 2
    });
    for (name, bytes) in names.into_iter().zip([900, 700_000]) {
        let sent = String::from_utf8(message(name, bytes)).unwrap().replace("\r\n", "\n");
        assert!(exim.taken().contains(&sent), "{name} is not what was sent");
    }
    let chunks = exim.log().lines().filter(|line| line.contains("P=esmtp K ")).count();
    assert_eq!(chunks, 2, "{}", exim.log());
}
