//! P5: leadership changes hands, by order and by SIGKILL, while clients of every node begin transactions without a pause. None of a node that
//! lives is told to come back later: a new leader that has no quorum's word of its own yet, and an old one that leads no more, take mail like
//! any other node.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::{Outcome, Sent};
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::wait_for;

const TRANSFERS: usize = 12;
const KILLS: usize = 3;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Which node is killed, or was and is not back yet.
    victim: AtomicU64,
}

/// What a client of a node that lived saw other than 2yz and 3yz, the messages it sent, and how often it began one.
struct Seen {
    errors: Vec<String>,
    sent: Vec<Sent>,
    begun: u64,
}

/// Begins transactions, and ends one in twenty with a message.
fn client(node: u64, address: String, shared: Arc<Shared>) -> Seen {
    let mut seen = Seen { errors: Vec::new(), sent: Vec::new(), begun: 0 };
    let mut connection: Option<Client> = None;
    while !shared.stop.load(Ordering::SeqCst) {
        let Some(c) = &mut connection else {
            connection = Client::connect(node, &address).ok();
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        seen.begun += 1;
        let error = if seen.begun.is_multiple_of(20) {
            let name = format!("n{node}m{}", seen.begun);
            let sent = c.transact(&name, &["r"], &message(&name, 600));
            let error = (sent.outcome != Outcome::Ok).then(|| format!("{:?} for {name}", sent.outcome));
            seen.sent.push(sent);
            error
        } else {
            let said = c.say("MAIL FROM:<sender@client.test.example>\r\n").and_then(|code| {
                c.say("RSET\r\n")?;
                Ok(code)
            });
            (!matches!(said, Ok(250))).then(|| format!("{said:?} to MAIL"))
        };
        if let Some(error) = error {
            connection = None;
            if shared.victim.load(Ordering::SeqCst) != node {
                seen.errors.push(format!("node {node}: {error}"));
            }
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    seen
}

#[test]
fn p5_a_change_of_leaders_is_a_delay_for_who_begins_a_message() {
    let customer = Customer::start();
    let mut nodes = Nodes::start_all(customer.address());
    let shared = Arc::new(Shared::default());
    let clients: Vec<_> = (1..=3)
        .map(|node| {
            let (address, shared) = (nodes.smtp(node), shared.clone());
            std::thread::spawn(move || client(node, address, shared))
        })
        .collect();
    // The first leader leads for longer than a node that hears nothing believes in a quorum.
    std::thread::sleep(Duration::from_secs(11));
    for _ in 0..TRANSFERS {
        let leader = nodes.wait_leader();
        wait_for("another leader", Duration::from_secs(10), || {
            nodes.ask(&["cluster", "transfer"]).status.success()
                && nodes.leader().is_some_and(|l| l != leader)
        });
    }
    for _ in 0..KILLS {
        let victim = nodes.wait_leader();
        shared.victim.store(victim, Ordering::SeqCst);
        nodes.kill(victim);
        let until = Instant::now() + Duration::from_secs(20);
        while nodes.leader().is_none_or(|l| l == victim) {
            assert!(Instant::now() < until, "nobody leads");
        }
        nodes.start(victim);
        wait_for("all nodes to be healthy", Duration::from_secs(30), || {
            nodes.status().is_some_and(|s| {
                s["nodes"].as_array().is_some_and(|n| n.iter().all(|n| n["healthy"] == true))
            })
        });
        shared.victim.store(0, Ordering::SeqCst);
    }
    shared.stop.store(true, Ordering::SeqCst);
    let seen: Vec<Seen> = clients.into_iter().map(|c| c.join().unwrap()).collect();
    let begun: Vec<u64> = seen.iter().map(|s| s.begun).collect();
    assert!(begun.iter().all(|n| *n > 1000), "{begun:?}: this run proves nothing");
    let errors: Vec<_> = seen.iter().flat_map(|s| s.errors.clone()).collect();
    assert!(errors.is_empty(), "of {begun:?} begun: {errors:?}");
    nodes.wait_drained(Duration::from_secs(60));
    let sent: Vec<Sent> = seen.into_iter().flat_map(|s| s.sent).collect();
    judge(&sent, &customer.taken()).assert_good();
}

/// A node that missed a change of routes does not know yet what it may refuse for good: it has just started, and nobody tells it what else was
/// committed.
#[test]
fn p5_who_may_not_know_all_routes_refuses_for_now() {
    let customer = Customer::start();
    let mut nodes = Nodes::start_all(customer.address());
    let recipient = |nodes: &Nodes, domain: &str| {
        let mut client = Client::connect(3, &nodes.smtp(3)).ok()?;
        match client.say("MAIL FROM:<sender@client.test.example>\r\n").ok()? {
            250 => client.say(&format!("RCPT TO:<r@{domain}>\r\n")).ok(),
            code => Some(code),
        }
    };
    wait_for("a refusal for good", Duration::from_secs(5), || recipient(&nodes, "new.example") == Some(550));
    nodes.kill(3);
    nodes.route("new.example", customer.address());
    nodes.kill(1);
    nodes.kill(2);
    nodes.start(3);
    let mut code = None;
    wait_for("a reply", Duration::from_secs(20), || {
        code = recipient(&nodes, "new.example");
        code.is_some()
    });
    assert_eq!(code, Some(451));
    assert_ne!(recipient(&nodes, "test.example"), Some(550), "it may be in no checkpoint yet");
    // Who leads next does not know at first that the route was committed.
    nodes.start(1);
    wait_for("the new route", Duration::from_secs(20), || {
        let code = recipient(&nodes, "new.example");
        assert_ne!(code, Some(550));
        code == Some(250)
    });
    nodes.start(2);
    wait_for("a refusal for good", Duration::from_secs(5), || {
        recipient(&nodes, "other.example") == Some(550)
    });
    // Who stands still for longer than it knows all routes does not know them when it goes on.
    nodes.pause(3, true);
    nodes.route("newer.example", customer.address());
    std::thread::sleep(Duration::from_millis(2_500));
    nodes.pause(3, false);
    wait_for("the newer route", Duration::from_secs(20), || {
        let code = recipient(&nodes, "newer.example");
        assert_ne!(code, Some(550));
        code == Some(250)
    });
}
