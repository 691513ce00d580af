//! Power cuts on real file systems: each node on an ext4 image of its own, of which a cut leaves what was synced and what the system
//! happened to have written. Under load, of one node or of all at once, again and again. Nothing that was acknowledged is lost.
//!
//! `HOLDFAST_POWER_CUTS` sets how often, for a longer run.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::disk::SmallDisk;
use jepsen_style_tests::history::{Outcome, Sent};
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::wait_for;

/// How often, unless the environment says otherwise.
const CUTS: u64 = 6;

/// Sends to one node for as long as it is told to; a connection that ends is made anew.
fn send(node: u64, address: &str, stop: &AtomicBool, history: &Mutex<Vec<Sent>>) {
    for connection in 0.. {
        let Ok(mut client) = Client::connect(node, address) else {
            std::thread::sleep(Duration::from_millis(50));
            if stop.load(Ordering::SeqCst) {
                return;
            }
            continue;
        };
        for n in 0..10_000 {
            if stop.load(Ordering::SeqCst) {
                return;
            }
            let name = format!("n{node}c{connection}m{n}");
            // None longer than a piece: pieces of a message whose node died wait ten minutes for the rest.
            let bytes = [300, 4000, 30_000, 200_000][(n % 23) / 7];
            let sent = client.transact(&name, &["r"], &message(&name, bytes));
            let over = sent.outcome != Outcome::Ok;
            history.lock().unwrap().push(sent);
            if over {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn p1_p3_power_cuts_under_load_lose_nothing() {
    let mut disks: Vec<SmallDisk> = (0..3).filter_map(|_| SmallDisk::new(400)).collect();
    if disks.len() < 3 {
        return;
    }
    let cuts = std::env::var("HOLDFAST_POWER_CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(CUTS);
    let customer = Customer::start();
    let mut nodes = Nodes::start_with(|id, text| {
        let own = disks[id as usize - 1].path().join("data");
        text.replace(&format!("data_dir = \"data/node-{id}\""), &format!("data_dir = \"{}\"", own.display()))
    });
    nodes.route("test.example", customer.address());
    let stop = Arc::new(AtomicBool::new(false));
    let history = Arc::new(Mutex::new(Vec::new()));
    let senders: Vec<_> = (1..=3)
        .map(|id| {
            let (address, stop, history) = (nodes.smtp(id), stop.clone(), history.clone());
            std::thread::spawn(move || send(id, &address, &stop, &history))
        })
        .collect();
    for cut in 0..cuts {
        // Some of the mail waits, and some is settled while the power goes.
        customer.set_down(cut % 3 == 1);
        std::thread::sleep(Duration::from_millis(700 + cut * 137 % 900));
        let victims: Vec<u64> = if cut % 2 == 0 { (1..=3).collect() } else { vec![cut / 2 % 3 + 1] };
        victims.iter().for_each(|id| nodes.kill(*id));
        victims.iter().for_each(|id| disks[*id as usize - 1].cut_power());
        victims.iter().for_each(|id| nodes.start(*id));
        nodes.wait_accepting();
        assert!((1..=3).all(|id| nodes.is_running(id)), "cut {cut}: a node did not come back");
    }
    std::thread::sleep(Duration::from_secs(1));
    stop.store(true, Ordering::SeqCst);
    senders.into_iter().for_each(|sender| sender.join().unwrap());
    customer.set_down(false);
    nodes.wait_drained(Duration::from_secs(90));
    let history = history.lock().unwrap().clone();
    let verdict = judge(&history, &customer.taken());
    let accepted = history.iter().filter(|sent| sent.outcome == Outcome::Ok).count();
    println!("{cuts} cuts, {} messages, {accepted} acknowledged", history.len());
    assert!(accepted > 20 * cuts as usize, "{accepted} messages are no load");
    verdict.assert_good();
    // Nor does anything stay behind on the media, whatever the file systems say of it.
    wait_for("the bodies to be erased from the media", Duration::from_secs(20), || {
        disks.iter().all(|disk| !disk.medium_contains(b"canary-n"))
    });
    drop(nodes);
}
