//! P7: the octets handed off are the octets received, behind one header; what was refused is never delivered; and every fate of
//! a recipient ends as it should.

use std::time::Duration;

use jepsen_style_tests::checkers::{NAME, judge};
use jepsen_style_tests::customer::{Chunks, Customer};
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::wait_for;

#[test]
fn p7_odd_messages_arrive_as_they_were_sent() {
    let customer = Customer::start();
    let nodes = Nodes::start_all(customer.address());
    let head = |name: &str| format!("{NAME}{name}\r\n\r\n").into_bytes();
    let with = |name: &str, body: &[u8]| [head(name), body.to_vec()].concat();
    let long_line = [vec![b'x'; 100_000], b"\r\n".to_vec()].concat();
    let eight_bit: Vec<u8> = (128u8..=255).chain(*b"\r\n").collect();
    let mut big = head("big");
    while big.len() < 49 << 20 {
        big.extend_from_slice(b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\r\n");
    }
    let odd = [
        ("empty-body", head("empty-body")),
        ("lone-dots", with("lone-dots", b".\r\n..\r\n.\r\n...\r\n.a\r\n")),
        ("long-line", with("long-line", &long_line)),
        ("eight-bit", with("eight-bit", &eight_bit)),
        ("blank-lines", with("blank-lines", b"\r\n\r\n\r\n")),
        ("exact-piece", message("exact-piece", 262_144)),
        // With its trace header it is longer than a piece, without it shorter.
        ("near-piece", with("near-piece", &[vec![b'x'; 262_000], b"\r\n".to_vec()].concat())),
        ("big", big),
    ];
    let mut history = Vec::new();
    for (n, (name, octets)) in odd.iter().enumerate() {
        let node = 1 + n as u64 % 3;
        let mut client = Client::connect(node, &nodes.smtp(node)).unwrap();
        let sent = client.transact(name, &["r"], octets);
        assert_eq!(sent.outcome, Outcome::Ok, "{name}");
        history.push(sent);
    }
    nodes.wait_drained(Duration::from_secs(60));
    judge(&history, &customer.taken()).assert_good();
}

/// Sends the text files of a directory of real mail, with the line ends of mail, and compares what arrives behind DATA and in chunks.
fn real_mail_arrives(dir: &std::path::Path) {
    if !dir.is_dir() {
        assert!(std::env::var_os("HOLDFAST_REQUIRE_PEERS").is_none(), "{} is not here", dir.display());
        eprintln!("skipped: {} is not here; this run does not count", dir.display());
        return;
    }
    for chunks in [Chunks::NotOffered, Chunks::Taken] {
        real_mail_arrives_by(dir, chunks);
    }
}

fn real_mail_arrives_by(dir: &std::path::Path, chunks: Chunks) {
    let customer = Customer::start();
    customer.set_chunks(chunks);
    let nodes = Nodes::start_all(customer.address());
    let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
    let mut history = Vec::new();
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().flatten().map(|e| e.path()).collect();
    files.sort();
    for path in files.iter().filter(|p| p.extension().is_some_and(|e| e == "txt")) {
        let mut lines = std::fs::read(path).unwrap();
        lines.retain(|octet| !matches!(octet, 0 | b'\r'));
        let name = format!("real-{}", history.len());
        let mut octets = format!("{NAME}{name}\r\n").into_bytes();
        for line in lines.split_inclusive(|octet| *octet == b'\n') {
            octets.extend_from_slice(line.strip_suffix(b"\n").unwrap_or(line));
            octets.extend_from_slice(b"\r\n");
        }
        let sent = client.transact(&name, &["r"], &octets);
        assert_eq!(sent.outcome, Outcome::Ok, "{}", path.display());
        history.push(sent);
    }
    assert!(history.len() > 1, "{} holds mail", dir.display());
    nodes.wait_drained(Duration::from_secs(30));
    judge(&history, &customer.taken()).assert_good();
}

/// The messages with which CPython tests its own mail package.
#[test]
fn p7_cpythons_messages_arrive_as_they_were_sent() {
    let find =
        "import test.test_email, os; print(os.path.join(os.path.dirname(test.test_email.__file__), 'data'))";
    let output = std::process::Command::new("python3").args(["-c", find]).output();
    let dir = output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_string()).unwrap_or_default();
    real_mail_arrives(dir.as_ref());
}

/// The samples of Debian's spamassassin package: one message of each kind.
#[test]
fn p7_spamassassins_samples_arrive_as_they_were_sent() {
    let dir = std::env::var_os("HOLDFAST_SPAMASSASSIN_SAMPLES");
    real_mail_arrives(dir.unwrap_or("/usr/share/doc/spamassassin/examples".into()).as_ref());
}

#[test]
fn p7_what_is_refused_is_never_delivered() {
    let customer = Customer::start();
    let nodes = Nodes::start_all(customer.address());
    let address = nodes.smtp(2);
    let mut history = Vec::new();
    let mut client = Client::connect(2, &address).unwrap();
    // Smuggling (CVE-2023-51764 and its kin): one refused message and none within it.
    for (n, fake) in ["\n.\n", "\n.\r\n", "\r\n.\n", "\r.\r", "\r.\r\n", "\r\n.\r"].iter().enumerate() {
        let name = format!("smuggle{n}");
        let inner = "MAIL FROM:<evil@x.example>\r\nRCPT TO:<r@test.example>\r\nDATA\r\n";
        let octets = format!("{NAME}{name}\r\n\r\na{fake}{inner}{NAME}smuggled\r\n\r\nb\r\n").into_bytes();
        assert_eq!(client.say("MAIL FROM:<a@b.example>\r\n").unwrap(), 250);
        assert_eq!(client.say("RCPT TO:<r@test.example>\r\n").unwrap(), 250);
        assert_eq!(client.say("DATA\r\n").unwrap(), 354);
        client.send(&octets).unwrap();
        assert_eq!(client.say(".\r\n").unwrap(), 550, "{fake:?}");
        assert_eq!(client.say("NOOP\r\n").unwrap(), 250, "the connection stays");
    }
    // Too big, found at the end.
    let mut client = Client::connect(2, &address).unwrap();
    assert_eq!(client.say("MAIL FROM:<a@b.example>\r\n").unwrap(), 250);
    assert_eq!(client.say("RCPT TO:<r@test.example>\r\n").unwrap(), 250);
    assert_eq!(client.say("DATA\r\n").unwrap(), 354);
    let chunk = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcd\r\n".repeat(16 << 10);
    for _ in 0..51 {
        client.send(&chunk).unwrap();
    }
    assert_eq!(client.say(".\r\n").unwrap(), 552);
    // A client that dies in DATA leaves nothing, pieces included.
    let mut dying = Client::connect(2, &address).unwrap();
    drop(dying.open("dying", &["r"], &message("dying", 900_000)));
    drop(dying);
    history.push(client.transact("good", &["r"], &message("good", 1000)));
    assert_eq!(history[0].outcome, Outcome::Ok);
    // No relaying.
    assert_eq!(client.say("MAIL FROM:<a@b.example>\r\n").unwrap(), 250);
    assert_eq!(client.say("RCPT TO:<u@elsewhere.example>\r\n").unwrap(), 550);
    assert_eq!(client.say("DATA\r\n").unwrap(), 554);
    nodes.wait_drained(Duration::from_secs(30));
    judge(&history, &customer.taken()).assert_good();
    assert_eq!(customer.count(), 1);
    wait_for("the pieces of the dead client to be erased", Duration::from_secs(10), || {
        (1..=3).all(|id| !jepsen_style_tests::tools::files_contain(&nodes.data(id), b"canary-dying-line"))
    });
}

#[test]
fn every_fate_of_a_recipient() {
    let customer = Customer::start();
    let nodes = Nodes::start_all(customer.address());
    // The notices come back to the sender's domain, which is the customer's too.
    nodes.route("client.test.example", customer.address());
    let mut client = Client::connect(3, &nodes.smtp(3)).unwrap();
    let mut history = Vec::new();
    for (name, recipients) in [
        ("mixed", vec!["good1", "bounce1", "defer1"]),
        ("refused", vec!["no1"]),
        ("late", vec!["late1"]),
        ("dropped", vec!["drop1"]),
    ] {
        let mut sent = client.transact(name, &recipients, &message(name, 1500));
        assert_eq!(sent.outcome, Outcome::Ok);
        // Those that the customer refuses for good are told to the sender instead.
        sent.recipients.retain(|r| !r.starts_with("bounce") && !r.starts_with("no"));
        history.push(sent);
    }
    nodes.wait_drained(Duration::from_secs(40));
    let (notices, copies): (Vec<_>, Vec<_>) =
        customer.taken().into_iter().partition(|t| t.recipient == "sender");
    judge(&history, &copies).assert_good();
    assert_eq!(notices.len(), 2, "one notice for each message that failed");
    for notice in notices {
        let text = String::from_utf8_lossy(&notice.octets).into_owned();
        for expected in [
            "multipart/report; report-type=delivery-status",
            "Auto-Submitted: auto-replied",
            "Action: failed",
            "Status: 5.",
            "text/rfc822-headers",
        ] {
            assert!(text.contains(expected), "{expected} is missing in\n{text}");
        }
        assert!(!text.contains("canary-"), "a notice carries no text of the message");
    }
    let log = (1..=3).map(|id| nodes.maillog(id)).collect::<String>();
    for expected in ["status=sent", "status=deferred", "status=bounced", "dsn=5.1.1", ": removed"] {
        assert!(log.contains(expected), "{expected} is missing in the log");
    }
    // A notice that cannot be delivered is not answered with another one.
    let null = customer.commands().iter().filter(|c| c.starts_with("MAIL FROM:<>")).count();
    assert_eq!(null, 2);
}
