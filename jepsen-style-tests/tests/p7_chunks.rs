//! P7: messages in chunks (RFC 3030) are the messages that were sent; what was refused, given up or broken off is never delivered, and
//! what stands in a chunk is no command.

use std::time::Duration;

use jepsen_style_tests::checkers::{NAME, judge};
use jepsen_style_tests::customer::{Chunks, Customer};
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::{files_contain, wait_for};

/// Opens a transaction for `r@test.example`.
fn envelope(client: &mut Client) {
    assert_eq!(client.say("MAIL FROM:<a@b.example>\r\n").unwrap(), 250);
    assert_eq!(client.say("RCPT TO:<r@test.example>\r\n").unwrap(), 250);
}

/// Sends a chunk; the reply's code.
fn chunk(client: &mut Client, octets: &[u8], last: &str) -> u16 {
    client.send(&[format!("BDAT {}{last}\r\n", octets.len()).as_bytes(), octets].concat()).unwrap();
    client.reply().unwrap()
}

#[test]
fn p7_messages_in_chunks_arrive_as_they_were_sent() {
    let customer = Customer::start();
    let nodes = Nodes::start_all(customer.address());
    let head = |name: &str| format!("{NAME}{name}\r\n\r\n").into_bytes();
    let with = |name: &str, body: &[u8]| [head(name), body.to_vec()].concat();
    let eight_bit: Vec<u8> = (128u8..=255).chain(*b"\r\n").collect();
    let odd = [
        ("no-body", head("no-body"), 9),
        ("dots", with("dots", b".\r\n..\r\n.\r\n...\r\n.a\r\n"), 1),
        ("commands", with("commands", b"\r\n.\r\nMAIL FROM:<evil@x.example>\r\nBDAT 4 LAST\r\n"), 30),
        ("eight-bit", with("eight-bit", &eight_bit), 50),
        ("in-one", message("in-one", 262_144), 262_144 * 2),
        ("exact", message("exact", 262_144), 262_144),
        ("small-chunks", message("small-chunks", 600_000), 999),
        ("large-chunks", message("large-chunks", 3_000_000), 700_000),
    ];
    let mut history = Vec::new();
    for (n, (name, octets, size)) in odd.iter().enumerate() {
        let node = 1 + n as u64 % 3;
        let mut client = Client::connect(node, &nodes.smtp(node)).unwrap();
        client.pipelines = n % 2 == 0;
        client.chunk = Some(*size);
        let sent = client.transact(name, &["r"], octets);
        assert_eq!(sent.outcome, Outcome::Ok, "{name}");
        history.push(sent);
        // The connection goes on, with the other way of sending.
        client.chunk = None;
        let name = format!("{name}-after");
        history.push(client.transact(&name, &["r"], &message(&name, 500)));
    }
    nodes.wait_drained(Duration::from_secs(60));
    judge(&history, &customer.taken()).assert_good();
    // Three messages in one go (RFC 2920), all of them in chunks: each has its replies, in order.
    let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
    let mut wire = Vec::new();
    for name in ["one", "two", "three"] {
        let octets = message(name, 300);
        wire.extend(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<r@test.example>\r\n");
        for (part, last) in [(&octets[..100], ""), (&octets[100..], " LAST")] {
            wire.extend([format!("BDAT {}{last}\r\n", part.len()).as_bytes(), part].concat());
        }
    }
    client.send(&wire).unwrap();
    assert!((0..12).all(|_| client.reply().unwrap() == 250));
    let before = history.len();
    wait_for("all three to arrive", Duration::from_secs(20), || customer.count() == before + 3);
}

#[test]
fn p7_a_chunk_that_is_refused_is_read_and_never_delivered() {
    let customer = Customer::start();
    let nodes = Nodes::start_all(customer.address());
    let address = nodes.smtp(2);
    let mut client = Client::connect(2, &address).unwrap();
    let inner =
        format!("MAIL FROM:<evil@x.example>\r\nRCPT TO:<r@test.example>\r\nDATA\r\n{NAME}inner\r\n\r\n.\r\n");
    // Out of order, or for nobody: what it holds is read, and is no command.
    assert_eq!(chunk(&mut client, inner.as_bytes(), ""), 503);
    assert_eq!(client.say("MAIL FROM:<a@b.example>\r\n").unwrap(), 250);
    assert_eq!(chunk(&mut client, inner.as_bytes(), " LAST"), 503);
    assert_eq!(client.say("RCPT TO:<u@elsewhere.example>\r\n").unwrap(), 550);
    assert_eq!(chunk(&mut client, inner.as_bytes(), " LAST"), 554);
    // All of a message is needed to see that it has no lines.
    for bad in ["a\nb\r\n", "a\rb\r\n", "a\r"] {
        envelope(&mut client);
        assert_eq!(chunk(&mut client, format!("{NAME}bare\r\n\r\n").as_bytes(), ""), 250);
        assert_eq!(chunk(&mut client, bad.as_bytes(), " LAST"), 550, "{bad:?}");
    }
    // Given up half way, by RSET and by another EHLO.
    for (name, line) in [("reset", "RSET\r\n"), ("greeted", "EHLO again.example\r\n")] {
        envelope(&mut client);
        assert_eq!(chunk(&mut client, &message(name, 700_000), ""), 250);
        assert_eq!(client.say("RCPT TO:<s@test.example>\r\n").unwrap(), 503);
        assert_eq!(client.say("DATA\r\n").unwrap(), 503);
        assert_eq!(client.say(line).unwrap(), 250);
        assert_eq!(chunk(&mut client, b"", " LAST"), 503);
    }
    // Too big: the chunk that makes it so is refused, and those that are on their way with it.
    let mut other = Client::connect(2, &address).unwrap();
    envelope(&mut other);
    let (mut codes, part) = (Vec::new(), message("toobig", 4 << 20));
    for _ in 0..15 {
        codes.push(chunk(&mut other, &part, ""));
    }
    let first = codes.iter().position(|code| *code == 552).unwrap();
    assert_eq!(first, 12, "{codes:?}");
    assert!(
        codes[..first].iter().all(|code| *code == 250) && codes[first + 1..].iter().all(|code| *code == 503)
    );
    // The client dies between two chunks, and within one.
    for name in ["between", "within"] {
        let mut dying = Client::connect(2, &address).unwrap();
        envelope(&mut dying);
        assert_eq!(chunk(&mut dying, &message(name, 700_000), ""), 250);
        if name == "within" {
            dying.send(b"BDAT 100 LAST\r\nhalf of it").unwrap();
        }
    }
    // Whoever does not say how long a chunk is hangs up, or is hung up on.
    for line in ["BDAT much\r\n", "BDAT 5\n"] {
        let mut lost = Client::connect(2, &address).unwrap();
        envelope(&mut lost);
        assert!(lost.say(line).unwrap() >= 500);
        assert!(lost.say("NOOP\r\n").is_err(), "{line:?}: nothing that follows is a command");
    }
    let good = client.transact("good", &["r"], &message("good", 1000));
    assert_eq!(good.outcome, Outcome::Ok);
    nodes.wait_drained(Duration::from_secs(30));
    judge(&[good], &customer.taken()).assert_good();
    assert_eq!(customer.count(), 1);
    wait_for("the pieces of what was given up to be erased", Duration::from_secs(15), || {
        let names = ["reset", "greeted", "toobig", "between", "within"];
        names.iter().all(|name| {
            let canary = format!("canary-{name}-line");
            (1..=3).all(|id| !files_contain(&nodes.data(id), canary.as_bytes()))
        })
    });
}

/// P7: what goes out in chunks and what goes behind DATA are the same octets, whichever way they came in; one that has no CR LF at its end
/// keeps that in chunks alone.
#[test]
fn p7_messages_go_out_in_chunks_where_they_are_taken() {
    for chunks in [Chunks::Taken, Chunks::NotOffered] {
        let customer = Customer::start();
        customer.set_chunks(chunks);
        let nodes = Nodes::start_all(customer.address());
        let mut history = Vec::new();
        for (n, bytes) in [20, 65_000, 262_144, 262_145, 700_000, 3_000_000].into_iter().enumerate() {
            for way in [None, Some(100_000)] {
                let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
                client.chunk = way;
                let name = format!("out{n}x{}", u8::from(way.is_some()));
                let mut octets = message(&name, bytes);
                octets.extend_from_slice(b".\r\n..\r\n.a\r\n");
                if chunks == Chunks::Taken && way.is_some() {
                    octets.extend_from_slice(b"and no end");
                }
                history.push(client.transact(&name, &["r"], &octets));
            }
        }
        // Refused at the end, put off, and broken off, as behind DATA.
        let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
        for name in ["no1", "late1", "drop1"] {
            history.push(client.transact(name, &[name], &message(name, 300_000)));
        }
        assert!(history.iter().all(|sent| sent.outcome == Outcome::Ok));
        wait_for("all but the refused one to be taken", Duration::from_secs(60), || {
            customer.count() == history.len() - 1
        });
        let said = customer.commands();
        let [data, bdat] =
            ["DATA", "BDAT"].map(|verb| said.iter().filter(|line| line.starts_with(verb)).count());
        assert_eq!(
            (data > 0, bdat > 0),
            (chunks != Chunks::Taken, chunks == Chunks::Taken),
            "{data} and {bdat}"
        );
        history.retain(|sent| sent.name != "no1");
        judge(&history, &customer.taken()).assert_good();
    }
}

/// P1: a destination that offers chunks and knows no BDAT gets its mail behind DATA: its 500 is no word on the message.
#[test]
fn p1_a_destination_that_knows_no_chunks_gets_its_mail() {
    let customer = Customer::start();
    customer.set_chunks(Chunks::Unknown);
    let nodes = Nodes::start_all(customer.address());
    let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
    let sent = ["small", "large"].map(|name| {
        let bytes = if name == "small" { 900 } else { 700_000 };
        client.transact(name, &["r"], &message(name, bytes))
    });
    assert!(sent.iter().all(|sent| sent.outcome == Outcome::Ok));
    nodes.wait_drained(Duration::from_secs(30));
    judge(&sent, &customer.taken()).assert_good();
    let bdat = customer.commands().iter().filter(|line| line.starts_with("BDAT")).count();
    assert!((1..=2).contains(&bdat), "asked {bdat} times");
}
