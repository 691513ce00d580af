//! P8: messages in flight share a bounded memory. Who finds none waits for it, and nobody waits for what only he could give back.

use std::time::{Duration, Instant};

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::wait_for;

#[test]
fn p8_large_messages_share_little_memory() {
    let customer = Customer::start();
    let nodes = Nodes::start_with(|_, text| text.replace("[smtp]", "[smtp]\nreceive_memory = \"4MiB\""));
    nodes.route("test.example", customer.address());
    // Together they want far more: each holds up to six pieces of 256 KiB.
    let senders: Vec<_> = (0..12)
        .map(|n| {
            let address = nodes.smtp(1);
            std::thread::spawn(move || {
                let name = format!("large{n:02}");
                let mut client = Client::connect(1, &address).unwrap();
                client.transact(&name, &["r"], &message(&name, 3_000_000))
            })
        })
        .collect();
    let history: Vec<_> = senders.into_iter().map(|sender| sender.join().unwrap()).collect();
    for sent in &history {
        assert!(
            matches!(sent.outcome, Outcome::Ok | Outcome::Fail(452)),
            "{}: {:?}",
            sent.name,
            sent.outcome
        );
    }
    let taken = history.iter().filter(|sent| sent.outcome == Outcome::Ok).count();
    assert!(taken >= 10, "{taken} of 12 were taken");
    nodes.wait_drained(Duration::from_secs(40));
    judge(&history, &customer.taken()).assert_good();
}

/// A line of `/proc/PID/status`, in KiB.
fn kib(pid: u32, what: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Clients that send most of a message and then wait hold no more of the node's memory than the setting says, however many they
/// are; and when they are gone it is free again.
#[test]
fn p8_unfinished_messages_stay_within_their_memory() {
    const CLIENTS: usize = 150;
    let customer = Customer::start();
    let nodes = Nodes::start_with(|_, text| text.replace("[smtp]", "[smtp]\nreceive_memory = \"4MiB\""));
    nodes.route("test.example", customer.address());
    let mut clients: Vec<Client> =
        (0..CLIENTS).map(|_| Client::connect(1, &nodes.smtp(1)).unwrap()).collect();
    let pid = nodes.pid(1).unwrap();
    let before = kib(pid, "VmRSS:");
    // Less than a piece each, so that none of it is replicated and let go of: 36 MiB in all.
    let octets = message("unfinished", 250_000);
    for client in &mut clients {
        for line in ["MAIL FROM:<a@b.example>\r\n", "RCPT TO:<r@test.example>\r\n", "DATA\r\n"] {
            assert!(client.say(line).unwrap() < 400);
        }
    }
    let senders: Vec<_> = clients
        .into_iter()
        .map(|mut client| {
            let octets = octets.clone();
            std::thread::spawn(move || {
                drop(client.send(&octets));
                client
            })
        })
        .collect();
    let clients: Vec<Client> = senders.into_iter().map(|sender| sender.join().unwrap()).collect();
    std::thread::sleep(Duration::from_secs(1));
    let grown = kib(pid, "VmHWM:").saturating_sub(before);
    assert!(grown < 20 << 10, "{grown} KiB more than before, with receive_memory = 4MiB");
    drop(clients);
    // A session that waits for room looks at its client again after 10 s at the most.
    let gone = Instant::now();
    wait_for("room", Duration::from_secs(30), || {
        let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
        client.transact("next", &["r"], &message("next", 3_000_000)).outcome == Outcome::Ok
    });
    assert!(gone.elapsed() < Duration::from_secs(20), "room came after {:?}", gone.elapsed());
    nodes.wait_drained(Duration::from_secs(40));
}
