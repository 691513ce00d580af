//! P6: without a quorum, or without two placements, there is no 250; nothing is lost when they return. And a cluster never
//! forms over somebody's mail.

use std::time::Duration;

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::{Outcome, Sent};
use jepsen_style_tests::nodes::{Nodes, holdfast};
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::wait_for;

fn send(nodes: &Nodes, node: u64, name: &str) -> Sent {
    let mut client = Client::connect(node, &nodes.smtp(node)).unwrap();
    client.transact(name, &["r"], &message(name, 1000))
}

#[test]
fn p6_two_of_three_nodes_down_means_no_250_and_nothing_lost() {
    let customer = Customer::start();
    let mut nodes = Nodes::start_all(customer.address());
    let mut history = vec![send(&nodes, 1, "before")];
    assert_eq!(history[0].outcome, Outcome::Ok);
    let mut open = Client::connect(1, &nodes.smtp(1)).unwrap();
    let octets = message("in-flight", 1000);
    let transaction = open.open("in-flight", &["r"], &octets).ok().unwrap();
    nodes.kill(2);
    nodes.kill(3);
    history.push(open.finish(transaction));
    assert_ne!(history[1].outcome, Outcome::Ok, "a message in flight gets no 250");
    wait_for("451 at MAIL", Duration::from_secs(20), || {
        let sent = send(&nodes, 1, "refused");
        assert_ne!(sent.outcome, Outcome::Ok);
        let code = sent.outcome.clone();
        history.push(Sent { name: format!("refused-{}", history.len()), ..sent });
        code == Outcome::Fail(451)
    });
    nodes.start(2);
    nodes.start(3);
    nodes.wait_accepting();
    history.push(send(&nodes, 2, "after"));
    assert_eq!(history.last().unwrap().outcome, Outcome::Ok);
    nodes.wait_drained(Duration::from_secs(30));
    let verdict = judge(&history, &customer.taken());
    assert_eq!(verdict.lost, Vec::<String>::new());
    assert_eq!(verdict.unexpected, Vec::<String>::new(), "451 means that it is never delivered");
}

#[test]
fn p6_two_nodes_on_one_power_feed_are_not_enough() {
    let customer = Customer::start();
    let mut nodes = Nodes::start_with(|_, text| text.replace("power = \"B\"", "power = \"A\""));
    nodes.route("test.example", customer.address());
    let mut history = vec![send(&nodes, 1, "before")];
    assert_eq!(history[0].outcome, Outcome::Ok);
    nodes.kill(3);
    nodes.wait_leader();
    // Nodes 1 and 2 have a quorum and one power label: the message is replicated, and taken back.
    let sent = send(&nodes, 1, "unplaced");
    assert_eq!(sent.outcome, Outcome::Fail(451));
    history.push(sent);
    nodes.start(3);
    nodes.wait_accepting();
    wait_for("placement to be back", Duration::from_secs(20), || {
        let sent = send(&nodes, 2, &format!("after-{}", history.len()));
        history.push(sent.clone());
        sent.outcome == Outcome::Ok
    });
    nodes.wait_drained(Duration::from_secs(30));
    judge(&history, &customer.taken()).assert_good();
}

#[test]
fn p6_an_empty_directory_under_a_known_id_is_refused() {
    let customer = Customer::start();
    let mut nodes = Nodes::start_all(customer.address());
    assert_eq!(send(&nodes, 1, "x").outcome, Outcome::Ok);
    nodes.kill(3);
    std::fs::remove_dir_all(nodes.data(3)).unwrap();
    nodes.start(3);
    assert_eq!(nodes.wait_exit(3, Duration::from_secs(15)), Some(1));
    assert!(nodes.stderr(3).contains("refusing to start"), "{}", nodes.stderr(3));
}

#[test]
fn p6_two_wiped_nodes_never_form_a_cluster_without_the_third() {
    let customer = Customer::start();
    let mut nodes = Nodes::start_all(customer.address());
    (1..=3).for_each(|id| nodes.kill(id));
    for id in [1, 2] {
        std::fs::remove_dir_all(nodes.data(id)).unwrap();
        nodes.start(id);
    }
    std::thread::sleep(Duration::from_secs(4));
    assert!(Client::connect(1, &nodes.smtp(1)).is_err(), "it does not even take connections");
    assert_eq!(nodes.leader(), None);
    // The third one comes: the two are told that they are known.
    nodes.start(3);
    assert_eq!(nodes.wait_exit(1, Duration::from_secs(15)), Some(1));
    assert_eq!(nodes.wait_exit(2, Duration::from_secs(15)), Some(1));
}

#[test]
fn bad_directories_and_files_are_refused_untouched() {
    let nodes = Nodes::prepare(|_, text| text);
    let other = Nodes::prepare(|_, text| text);
    // A directory of another cluster.
    let data = nodes.data(1);
    std::fs::create_dir_all(data.parent().unwrap()).unwrap();
    let run = |config: &str| holdfast(&["run", "--config", config]);
    {
        let mut started = Nodes::start_with(|_, text| text);
        (1..=3).for_each(|id| started.kill(id));
        std::fs::rename(started.data(1), &data).unwrap();
    }
    let before = std::fs::read(data.join("superblock")).unwrap();
    let output = run(&nodes.config(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("belongs to node 1 of cluster"), "{said}");
    assert_eq!(std::fs::read(data.join("superblock")).unwrap(), before);
    // A newer format.
    let mut newer = before.clone();
    for copy in [0, 1 << 20] {
        if newer[copy..copy + 4] == *b"HFSB" {
            newer[copy + 4] = 9;
        }
    }
    std::fs::write(data.join("superblock"), &newer).unwrap();
    let output = run(&nodes.config(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("format version 9"), "{said}");
    // An unreadable key, and a port in use.
    std::fs::remove_file(other.dir().join("pki/node-2.key")).unwrap();
    let output = run(&other.config(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("node-2.key"));
    assert_eq!(output.status.code(), Some(1));
    let port = other.smtp(3).replace("127.0.0.1:", "").parse::<u16>().unwrap() + 10;
    let _taken = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let output = run(&other.config(3));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("is another process listening there?"), "{said}");
    assert_eq!(output.status.code(), Some(1));
}
