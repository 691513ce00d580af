//! P8: messages in flight share a bounded memory. Who finds none waits for it, and nobody waits for what only he could give back.

use std::time::Duration;

use jepsen_style_tests::checker::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};

#[test]
fn p8_large_messages_share_little_memory() {
    let customer = Customer::start();
    let mut nodes = Nodes::prepare(|_, text| text.replace("[smtp]", "[smtp]\nreceive_memory = \"4MiB\""));
    (1..=3).for_each(|id| nodes.start(id));
    nodes.wait_accepting();
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
