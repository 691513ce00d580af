//! P4 without faults: a rolling restart with SIGTERM under load. Each node hands over, finishes what is open and ends with 0; each
//! copy is taken exactly once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::{Outcome, Sent};
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::wait_for;

#[test]
fn p4_a_rolling_restart_hands_each_copy_off_once() {
    let customer = Customer::start();
    let mut nodes = Nodes::start_all(customer.address());
    let stop = Arc::new(AtomicBool::new(false));
    let history: Arc<Mutex<Vec<Sent>>> = Arc::default();
    let clients: Vec<_> = (1..=3u64)
        .map(|node| {
            let (address, stop, history) = (nodes.smtp(node), stop.clone(), history.clone());
            std::thread::spawn(move || {
                let mut connection = None;
                let mut count = 0;
                while !stop.load(Ordering::SeqCst) {
                    connection = connection.or_else(|| Client::connect(node, &address).ok());
                    let Some(client) = &mut connection else {
                        std::thread::sleep(Duration::from_millis(50));
                        continue;
                    };
                    count += 1;
                    let name = format!("roll{node}-{count}");
                    let sent = client.transact(&name, &["r"], &message(&name, 2000));
                    if sent.outcome != Outcome::Ok {
                        connection = None;
                    }
                    history.lock().unwrap().push(sent);
                    std::thread::sleep(Duration::from_millis(4));
                }
            })
        })
        .collect();
    for id in 1..=3 {
        let before = history.lock().unwrap().len();
        wait_for("some load", Duration::from_secs(20), || history.lock().unwrap().len() > before + 100);
        assert_eq!(nodes.stop(id), Some(0), "{}", nodes.stderr(id));
        nodes.start(id);
        wait_for("all nodes to be healthy", Duration::from_secs(30), || {
            nodes.status().is_some_and(|s| {
                let healthy = |n: &Vec<serde_json::Value>| n.iter().all(|n| n["healthy"] == true);
                s["accepting"] == true && s["nodes"].as_array().is_some_and(healthy)
            })
        });
    }
    stop.store(true, Ordering::SeqCst);
    clients.into_iter().for_each(|c| c.join().unwrap());
    nodes.wait_drained(Duration::from_secs(30));
    let history = history.lock().unwrap().clone();
    let verdict = judge(&history, &customer.taken());
    verdict.assert_good();
    assert_eq!(verdict.duplicated, [], "nothing failed, so nothing is sent twice");
}
