//! Keeps the data directories of three nodes for the test of upgrades. To be run once for each feature level, with the last program
//! that writes it and nothing higher, in a network of its own, since the ports are fixed:
//!
//! ```text
//! HOLDFAST_BINARY=.../holdfast unshare --net sh -c \
//!     'ip link set lo up && cargo run --offline -p jepsen-style-tests --example keep feature-N'
//! ```

use std::time::Duration;

use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::kept::{BASE_PORT, MESSAGES, archive, octets, tar};
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::Client;

fn main() {
    let feature = std::env::args().nth(1).expect("the name of the archive, such as feature-2");
    let customer = Customer::start();
    customer.set_down(true);
    let mut nodes = Nodes::prepare_at(BASE_PORT, |_, text| text.replace("8MiB", "4MiB"));
    (1..=3).for_each(|id| nodes.start(id));
    nodes.wait_accepting();
    nodes.route("test.example", customer.address());
    nodes.route("other.example", "mail.other.example:2525");
    let mut client = Client::connect(1, &nodes.smtp(1)).expect("a node that accepts mail");
    let mut send = |n, recipients: &[&str]| {
        let (name, octets) = octets(n);
        assert_eq!(client.transact(&name, recipients, &octets).outcome, Outcome::Ok);
    };
    (0..MESSAGES).for_each(|n| send(n, &["r1", "r2"]));
    // Until checkpoints have written rows; the last message stands in the log alone.
    std::thread::sleep(Duration::from_secs(5));
    send(MESSAGES, &["r1"]);
    (1..=3).for_each(|id| nodes.kill(id));
    let files = ["--exclude=index", "data/node-1", "data/node-2", "data/node-3", "node-1.toml"];
    tar("czSf", &archive(&feature), nodes.dir(), &files);
}
