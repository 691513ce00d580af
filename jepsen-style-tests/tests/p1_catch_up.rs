//! P1, P3: a follower that missed more than its leader keeps comes back by a snapshot with the bodies of what is still queued,
//! and then counts: the mail survives the loss of another node.

use std::collections::BTreeSet;
use std::time::Duration;

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::{files_contain, program, wait_for};

#[test]
fn p1_a_follower_beyond_the_floor_gets_what_is_still_queued() {
    let (customer, away) = (Customer::start(), Customer::start());
    away.set_down(true);
    let mut nodes = Nodes::start_with(|_, text| text.replace("[storage]", "[storage]\nkeep_entries = 50"));
    nodes.route("test.example", customer.address());
    let leader = nodes.wait_leader();
    let asleep = (1..=3).find(|id| *id != leader).unwrap();
    nodes.kill(asleep);
    let mut history = Vec::new();
    let mut client = Client::connect(leader, &nodes.smtp(leader)).unwrap();
    for n in 0..600 {
        let name = format!("passed{n:03}");
        history.push(client.transact(&name, &["r"], &message(&name, 800)));
    }
    nodes.wait_drained(Duration::from_secs(30));
    // What follows waits for a destination that is away.
    nodes.route("test.example", away.address());
    for n in 0..20 {
        let name = format!("waiting{n:02}");
        let octets = message(&name, if n == 3 { 600_000 } else { 1200 });
        history.push(client.transact(&name, &["r"], &octets));
    }
    assert!(history.iter().all(|s| s.outcome == Outcome::Ok));
    // A checkpoint comes after ten seconds, and the floor rises behind it.
    let behind = |status: &serde_json::Value| {
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        nodes.iter().find(|n| n["id"] == leader).and_then(|n| n["floor_index"].as_u64()).unwrap_or(0)
    };
    wait_for("the floor to pass the sleeper", Duration::from_secs(30), || {
        nodes.status().is_some_and(|s| behind(&s) > 400)
    });
    nodes.start(asleep);
    wait_for("the bodies to be fetched", Duration::from_secs(30), || {
        (0..20).all(|n| files_contain(&nodes.data(asleep), format!("canary-waiting{n:02}-line").as_bytes()))
    });
    assert!(
        !files_contain(&nodes.data(asleep), b"canary-passed599-line"),
        "what has passed is not transferred"
    );
    let last = |id: u64| {
        let status = nodes.status()?;
        let nodes = status["nodes"].as_array()?.clone();
        nodes.iter().find(|n| n["id"] == id)?["last_index"].as_u64()
    };
    wait_for("the sleeper to catch up", Duration::from_secs(20), || {
        last(asleep).is_some() && last(asleep) >= last(leader).map(|i| i.saturating_sub(3))
    });
    // The other two hold it alone now.
    nodes.kill(leader);
    nodes.wait_leader();
    nodes.route("test.example", customer.address());
    nodes.wait_drained(Duration::from_secs(40));
    judge(&history, &customer.taken()).assert_good();
}

/// A line of a node's `/proc/PID/status`, in KiB.
fn kib(nodes: &Nodes, id: u64, what: &str) -> usize {
    let pid = nodes.pid(id).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The names of messages of which a canary that begins so is in a directory's files.
fn names(dir: &std::path::Path, begin: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            names.extend(self::names(&entry, begin));
            continue;
        }
        let octets = std::fs::read(&entry).unwrap_or_default();
        let text = String::from_utf8_lossy(&octets);
        let found = text
            .match_indices(begin)
            .filter_map(|(at, _)| text[at..].strip_prefix("canary-")?.split('-').next());
        names.extend(found.map(Into::into));
    }
    names
}

/// A node in `status`.
fn node(nodes: &Nodes, id: u64) -> Option<serde_json::Value> {
    nodes.status()?["nodes"].as_array()?.iter().find(|n| n["id"] == id).cloned()
}

/// P1: a snapshot breaks off when its leader dies. The next leader's does not bring again what has come, neither side needs memory for
/// the bodies or the rows, what the follower needs next is kept for it, and nobody calls an election. `HOLDFAST_SNAPSHOT_MIB=2048` for the long
/// run, with `HOLDFAST_SNAPSHOT_BODY=4096` of many small messages; CI 40 MiB of 120,000 octets each.
#[test]
fn p1_a_snapshot_that_breaks_off_goes_on_where_it_was() {
    let number = |name: &str, usual: usize| std::env::var(name).map_or(usual, |text| text.parse().unwrap());
    let (mib, body) = (number("HOLDFAST_SNAPSHOT_MIB", 40), number("HOLDFAST_SNAPSHOT_BODY", 120_000));
    let bodies = (mib << 20) / body;
    let (customer, away) = (Customer::start(), Customer::start());
    away.set_down(true);
    let mut nodes = Nodes::start_with(|_, text| {
        text.replace("[storage]", "[storage]\nkeep_entries = 50")
            .replace("segment_bytes = \"8MiB\"", "segment_bytes = \"64MiB\"")
    });
    nodes.route("test.example", away.address());
    let leader = nodes.wait_leader();
    let asleep = (1..=3).find(|id| *id != leader).unwrap();
    let other = 6 - leader - asleep;
    // The follower has the last of these, and does not know yet that they are committed.
    let senders: Vec<_> = (0..6)
        .map(|sender| {
            let address = nodes.smtp(leader);
            std::thread::spawn(move || {
                let mut client = Client::connect(leader, &address).unwrap();
                let name = |n| format!("early{sender}x{n}");
                (0..60)
                    .map(|n| client.transact(&name(n), &["r"], &message(&name(n), 1000)))
                    .collect::<Vec<_>>()
            })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(60));
    nodes.kill(asleep);
    let mut history: Vec<_> = senders.into_iter().flat_map(|sender| sender.join().unwrap()).collect();
    let early = history.len();
    let mut client = Client::connect(leader, &nodes.smtp(leader)).unwrap();
    for n in 0..bodies {
        let name = format!("waiting{n:05}");
        history.push(client.transact(&name, &["r"], &message(&name, body)));
    }
    assert!(history.iter().all(|s| s.outcome == Outcome::Ok));
    wait_for("the floor to pass the sleeper", Duration::from_secs(30), || {
        node(&nodes, leader).is_some_and(|n| n["floor_index"].as_u64() > Some(bodies as u64 / 2))
    });
    // Its disk is slow, so that the transfer takes its time.
    let file = nodes.config(asleep);
    let text = std::fs::read_to_string(&file).unwrap();
    let delay = (6000 / mib).clamp(5, 150);
    std::fs::write(&file, text.replace("[storage]", &format!("[storage]\nsync_delay = \"{delay}ms\"")))
        .unwrap();
    let before = [leader, other].map(|id| {
        // Its peak from here on.
        std::fs::write(format!("/proc/{}/clear_refs", nodes.pid(id).unwrap()), "5").unwrap();
        kib(&nodes, id, "VmRSS")
    });
    nodes.start(asleep);
    let all = (bodies * body) as u64;
    wait_for("a part of it to come", Duration::from_secs(60 + mib as u64 / 10), || {
        node(&nodes, asleep).is_some_and(|n| n["live_body_bytes"].as_u64() > Some(all / 3))
    });
    let first_grew = kib(&nodes, leader, "VmHWM").saturating_sub(before[0]);
    nodes.kill(leader);
    assert_eq!(nodes.wait_leader(), other, "the follower lacks too much to lead");
    let term = nodes.status().unwrap()["term"].clone();
    // The sleeper acknowledges nothing yet: until the old leader has read its log there is no quorum, and after 10 s of that a 451.
    nodes.start(leader);
    nodes.wait_accepting();
    // Meanwhile mail comes in, far more of it than a leader keeps for a follower that is behind.
    let said = "the bodies of a snapshot are here";
    let mut client = Client::connect(other, &nodes.smtp(other)).unwrap();
    let mut more = 0;
    wait_for("the rest to come", Duration::from_secs(60 + mib as u64), || {
        for _ in 0..20 {
            let name = format!("more{more:05}");
            history.push(client.transact(&name, &["r"], &message(&name, 500)));
            more += 1;
        }
        nodes.stderr(asleep).contains(said)
    });
    let other_than_ok: Vec<_> = history.iter().filter(|s| s.outcome != Outcome::Ok).take(5).collect();
    assert!(more >= 100 && other_than_ok.is_empty(), "{more} more, of them {other_than_ok:?}");
    let stderr = nodes.stderr(asleep);
    let line = stderr.lines().find(|line| line.contains(said)).unwrap();
    let field = |name: &str| {
        let value = line.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap();
        value.parse::<usize>().unwrap()
    };
    assert_eq!(field("bodies="), bodies + early, "{line}");
    assert!(field("fetched=") > 0 && field("fetched=") < bodies * 3 / 4, "{line}");
    let here = std::time::Instant::now();
    wait_for("the sleeper to catch up", Duration::from_secs(30 + mib as u64 / 10), || {
        // Of one moment: the leader's log goes on by itself.
        let Some(status) = nodes.status() else { return false };
        let all = status["nodes"].as_array().unwrap();
        let last = |id: u64| all.iter().find(|n| n["id"] == id)?["last_index"].as_u64();
        last(asleep).is_some() && last(asleep) >= last(other).map(|i| i.saturating_sub(3))
    });
    eprintln!("caught up {:?} after the bodies were here", here.elapsed());
    assert_eq!(nodes.status().unwrap()["term"], term, "nobody called an election");
    assert_eq!(nodes.stderr(asleep).matches(said).count(), 1, "what it needed next was kept for it");
    // Longer than erasing takes: what is needed was not taken for what is not.
    std::thread::sleep(Duration::from_secs(4));
    let here = names(&nodes.data(asleep), "canary-early");
    let gone: Vec<_> =
        history[..early].iter().map(|s| &s.name).filter(|name| !here.contains(*name)).collect();
    assert!(gone.is_empty(), "{gone:?}");
    let second_grew = kib(&nodes, other, "VmHWM").saturating_sub(before[1]);
    let [whole, rest] = ["VmHWM", "VmRSS"].map(|what| kib(&nodes, asleep, what));
    eprintln!(
        "{line}; grew by {first_grew} and {second_grew} KiB; the follower took {whole} KiB in all, and takes {rest} KiB after it"
    );
    // The second one leads since, and knows of each message when it is due.
    assert!(first_grew < 64 << 10 && second_grew < (64 << 10) + bodies, "{first_grew} and {second_grew} KiB");
    assert!(whole.saturating_sub(rest) < 64 << 10, "{whole} KiB, and {rest} KiB after it");
    // What a node takes anyway, and what it knows of each message.
    assert!(whole < (128 << 10) + 3 * bodies, "{whole} KiB");
    nodes.route("test.example", customer.address());
    nodes.wait_drained(Duration::from_secs(60 + mib as u64));
    judge(&history, &customer.taken()).assert_good();
}

/// P6: who leads no more leaves what comes after its snapshots to the next leader: it kept all entries for five minutes, and with them every
/// segment in which one stands.
#[test]
fn p6_a_former_leader_keeps_nothing_for_its_snapshots() {
    let (customer, away) = (Customer::start(), Customer::start());
    away.set_down(true);
    let mut nodes = Nodes::start_with(|_, text| text.replace("[storage]", "[storage]\nkeep_entries = 50"));
    nodes.route("test.example", away.address());
    nodes.route("passes.example", customer.address());
    let leader = nodes.wait_leader();
    let asleep = (1..=3).find(|id| *id != leader).unwrap();
    let other = 6 - leader - asleep;
    nodes.kill(asleep);
    let waiting = 100;
    let mut client = Client::connect(leader, &nodes.smtp(leader)).unwrap();
    for n in 0..waiting {
        let name = format!("waiting{n:03}");
        assert_eq!(client.transact(&name, &["r"], &message(&name, 120_000)).outcome, Outcome::Ok);
    }
    wait_for("the floor to pass the sleeper", Duration::from_secs(30), || {
        node(&nodes, leader).is_some_and(|n| n["floor_index"].as_u64() > Some(waiting / 2))
    });
    let file = nodes.config(asleep);
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("[storage]", "[storage]\nsync_delay = \"100ms\"")).unwrap();
    nodes.start(asleep);
    wait_for("a part of the snapshot to come", Duration::from_secs(30), || {
        node(&nodes, asleep).is_some_and(|n| n["live_body_bytes"].as_u64() > Some(waiting * 120_000 / 5))
    });
    nodes.kill(asleep);
    assert!(!nodes.stderr(asleep).contains("the bodies of a snapshot are here"), "it broke off");
    let to = other.to_string();
    let moved = nodes.ask(&["cluster", "transfer", "--to", &to]);
    assert!(moved.status.success(), "{moved:?}");
    assert_eq!(nodes.wait_leader(), other);
    let handed_over = last(&nodes, leader).unwrap();
    let mut client = Client::connect(other, &nodes.smtp(other)).unwrap();
    for n in 0..300 {
        let name = format!("passed{n:03}");
        assert_eq!(client.transact(&name, &["r@passes.example"], &message(&name, 800)).outcome, Outcome::Ok);
    }
    wait_for("the former leader to let go", Duration::from_secs(30), || {
        node(&nodes, leader).is_some_and(|n| n["floor_index"].as_u64() > Some(handed_over + 100))
    });
}

/// The last index of a node's log.
fn last(nodes: &Nodes, id: u64) -> Option<u64> {
    node(nodes, id)?["last_index"].as_u64()
}

/// Ends a process that the test started.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// P1: what a follower missed and what is still queued are two things: it fetches the second only, and is back in seconds. Postfix's
/// smtp-source and smtp-sink are the load. `HOLDFAST_MISSED=1000000` for the long run; CI 6000. A hundredth of that waits.
#[test]
fn p1_a_follower_that_missed_much_is_back_in_seconds() {
    let (Some(source), Some(sink)) = (program("smtp-source"), program("smtp-sink")) else { return };
    let missed: u64 = std::env::var("HOLDFAST_MISSED").map_or(6000, |missed| missed.parse().unwrap());
    let waiting = missed / 100;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let sink = std::process::Command::new(sink)
        .args(["-u", "root", &format!("127.0.0.1:{port}"), "1000"])
        .stdout(std::process::Stdio::null())
        .spawn();
    let _sink = Ended(sink.unwrap());
    let away = Customer::start();
    away.set_down(true);
    let mut nodes = Nodes::start_with(|_, text| {
        text.replace("[storage]", &format!("[storage]\nkeep_entries = {}", missed / 4))
            .replace("segment_bytes = \"8MiB\"", "segment_bytes = \"64MiB\"")
    });
    nodes.route("test.example", &format!("127.0.0.1:{port}"));
    let leader = nodes.wait_leader();
    let asleep = (1..=3).find(|id| *id != leader).unwrap();
    nodes.kill(asleep);
    let load = |messages: u64| {
        let args = ["-s", "50", "-l", "1000", "-f", "a@b.example", "-t", "u@test.example", "-m"];
        let status = std::process::Command::new(&source)
            .args(args)
            .arg(messages.to_string())
            .arg(nodes.smtp(leader))
            .status();
        assert!(status.unwrap().success());
    };
    load(missed);
    nodes.wait_drained(Duration::from_secs(60 + missed / 1000));
    nodes.route("test.example", away.address());
    load(waiting);
    wait_for("the floor to pass the sleeper", Duration::from_secs(30), || {
        node(&nodes, leader).is_some_and(|n| n["floor_index"].as_u64() > Some(missed / 2))
    });
    let (began, of) = (std::time::Instant::now(), last(&nodes, leader));
    nodes.start(asleep);
    wait_for("the sleeper to be back", Duration::from_secs(60), || {
        last(&nodes, asleep).is_some() && last(&nodes, asleep) >= of
    });
    let took = began.elapsed();
    let stderr = nodes.stderr(asleep);
    let line = stderr.lines().find(|line| line.contains("the bodies of a snapshot are here")).unwrap();
    eprintln!("{missed} passed and {waiting} wait: back after {took:?}; {line}");
    assert!(
        line.contains(&format!("bodies={waiting} fetched={waiting} ")),
        "only what waits was fetched: {line}"
    );
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert_eq!(nodes.queued(), Some(waiting));
}
