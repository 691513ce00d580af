//! P5: after nodes could not reach each other for long, their clients' mail is taken as soon as they can.

use std::time::{Duration, Instant};

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::hosts::{self, Hosts};
use jepsen_style_tests::links::Links;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};

/// Long enough for TCP to wait 13 s with its next try, from 12.6 s after the first.
const CUT: Duration = Duration::from_secs(14);
/// Finding out, connecting, and the follower's log to be up again.
const SOON: Duration = Duration::from_secs(5);

#[test]
fn p5_a_long_cut_is_over_once_it_is_mended() {
    if !hosts::are_own("p5_a_long_cut_is_over_once_it_is_mended") {
        return;
    }
    let hosts = Hosts::new(3, None).unwrap();
    let customer = Customer::start_at(&format!("{}:0", Hosts::OUTSIDE));
    let mut nodes = Nodes::prepare_on_hosts(|_, text| text);
    (1..=3).for_each(|id| nodes.start(id));
    nodes.wait_accepting();
    nodes.route("test.example", customer.address());
    let leader = nodes.wait_leader();
    let follower = (1..=3).find(|id| *id != leader).unwrap();
    let mut client = Client::connect(follower, &nodes.smtp(follower)).unwrap();
    let mut history = vec![client.transact("before", &["r"], &message("before", 900))];
    let open = client.open("meanwhile", &["r"], &message("meanwhile", 900)).unwrap();
    let cut = Instant::now();
    hosts.cut(follower, leader).unwrap();
    hosts.cut(leader, follower).unwrap();
    // What it asks the leader now waits in its connection.
    history.push(client.finish(open));
    std::thread::sleep(CUT.saturating_sub(cut.elapsed()));
    hosts.mend().unwrap();
    let mended = Instant::now();
    let mut refused = 0;
    while history.last().is_none_or(|sent| sent.outcome != Outcome::Ok) && mended.elapsed() < 4 * CUT {
        let name = format!("after{refused:03}");
        refused += 1;
        let Ok(mut client) = Client::connect(follower, &nodes.smtp(follower)) else { continue };
        history.push(client.transact(&name, &["r"], &message(&name, 900)));
        std::thread::sleep(Duration::from_millis(50));
    }
    let took = mended.elapsed();
    eprintln!("mail is taken {took:?} after the cut, {refused} tries");
    assert!(took < SOON, "{took:?}");
    nodes.wait_drained(Duration::from_secs(30));
    judge(&history, &customer.taken()).assert_good();
}
