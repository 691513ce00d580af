//! P9: damage to one node's files costs no mail and needs no operator, also when another node is killed right after. The node
//! holds back as far as it must, gets what it lacks from the others, and then counts.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::{Outcome, Sent};
use jepsen_style_tests::nodes::{Nodes, holdfast};
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::{files_contain, wait_for};

/// Three nodes with mail that waits, in more than one segment each, and mail that has passed.
struct Waiting {
    nodes: Nodes,
    customer: Customer,
    history: Vec<Sent>,
}

fn waiting() -> Waiting {
    let (customer, away) = (Customer::start(), Customer::start());
    away.set_down(true);
    let nodes = Nodes::start_with(|_, text| text);
    nodes.route("test.example", customer.address());
    let mut history = Vec::new();
    let mut send = |nodes: &Nodes, names: Vec<String>, bytes: usize| {
        let mut client = Client::connect(2, &nodes.smtp(2)).unwrap();
        for name in names {
            history.push(client.transact(&name, &["r"], &message(&name, bytes)));
        }
    };
    send(&nodes, (0..40).map(|n| format!("passed{n:02}")).collect(), 20_000);
    nodes.wait_drained(Duration::from_secs(20));
    nodes.route("test.example", away.address());
    send(&nodes, names(), 230_000);
    assert!(history.iter().all(|s| s.outcome == Outcome::Ok));
    Waiting { nodes, customer, history }
}

fn names() -> Vec<String> {
    (0..50).map(|n| format!("waits{n:02}")).collect()
}

fn canary(name: &str) -> Vec<u8> {
    format!("canary-{name}-line-000500").into_bytes()
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().flatten().map(|e| e.path()).collect();
    found.retain(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("segment-")));
    found.retain(|p| std::fs::read(p).unwrap().iter().any(|octet| *octet != 0));
    found.sort();
    found
}

/// The segment file that holds a waiting message, and where.
fn place(dir: &Path, name: &str) -> (PathBuf, usize) {
    place_of(dir, &canary(name))
}

fn place_of(dir: &Path, needle: &[u8]) -> (PathBuf, usize) {
    for path in segments(dir) {
        let octets = std::fs::read(&path).unwrap();
        if let Some(at) = octets.windows(needle.len()).position(|w| w == needle) {
            return (path, at);
        }
    }
    panic!("{} is nowhere in {}", String::from_utf8_lossy(needle), dir.display());
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut octets = std::fs::read(path).unwrap();
    change(&mut octets);
    std::fs::write(path, octets).unwrap();
}

/// Where the record begins in whose body `at` lies.
fn header(octets: &[u8], at: usize) -> usize {
    let magic = octets[..4].to_vec();
    (0..at).rev().find(|n| octets[*n..*n + 4] == magic[..]).unwrap()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

const HARMS: [&str; 9] = [
    "a flipped bit in a body",
    "a flipped bit in a header",
    "garbage over many records",
    "a segment file is gone",
    "a segment file is cut short",
    "two segment files are swapped",
    "both copies of the superblock are garbage",
    "what was written last is garbage",
    "the index is garbage as well as a header",
];

fn inflict(dir: &Path, harm: &str) {
    let all = segments(dir);
    assert!(all.len() > 1, "one segment is too few to damage: {all:?}");
    let (path, at) = place(dir, "waits07");
    match harm {
        "a flipped bit in a body" => edit(&path, |octets| octets[at] ^= 1),
        "a flipped bit in a header" => edit(&path, |octets| {
            let header = header(octets, at);
            octets[header + 20] ^= 1;
        }),
        "garbage over many records" => edit(&path, |octets| octets[at..at + 900_000].fill(0x5a)),
        "a segment file is gone" => std::fs::remove_file(path).unwrap(),
        "a segment file is cut short" => edit(&path, |octets| octets.truncate(at)),
        "two segment files are swapped" => {
            let other = std::fs::read(&all[0]).unwrap();
            std::fs::copy(&all[1], &all[0]).unwrap();
            std::fs::write(&all[1], other).unwrap();
        }
        "both copies of the superblock are garbage" => {
            edit(&dir.join("superblock"), |octets| octets.fill(0xee));
        }
        "what was written last is garbage" => {
            let newest = all.iter().max_by_key(|path| std::fs::read(path).unwrap()[32..40].to_vec()).unwrap();
            edit(newest, |octets| {
                let end = octets.iter().rposition(|octet| *octet != 0).unwrap();
                octets[end.saturating_sub(30_000)..=end].fill(0x77);
            });
        }
        "the index is garbage as well as a header" => {
            edit(&path, |octets| {
                let header = header(octets, at);
                octets[header + 3] ^= 1;
            });
            for entry in std::fs::read_dir(dir.join("index")).unwrap().flatten() {
                if entry.path().is_file() {
                    std::fs::write(entry.path(), [0x13; 5000]).unwrap();
                }
            }
        }
        _ => panic!("{harm}"),
    }
}

/// What `store check` and `store dump` say of a damaged directory, of which they change nothing.
fn look_offline(dir: &Path, harm: &str) {
    let octets = |dir: &Path| -> Vec<(PathBuf, Vec<u8>)> {
        let mut files: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().flatten().map(|e| e.path()).collect();
        files.sort();
        files
            .into_iter()
            .filter(|path| path.is_file())
            .map(|p| (p.clone(), std::fs::read(p).unwrap()))
            .collect()
    };
    let before = octets(dir);
    let path = dir.display().to_string();
    let check = holdfast(&["store", "check", &path]);
    assert_eq!(check.status.code(), Some(1), "{harm}: {}", String::from_utf8_lossy(&check.stdout));
    let dump = holdfast(&["store", "dump", &path]);
    let text = String::from_utf8_lossy(&dump.stdout).into_owned();
    let superblock = harm.contains("superblock");
    assert_eq!(dump.status.code(), Some(i32::from(superblock)), "{harm}");
    assert!(superblock || text.contains("HOLE") || text.contains("damaged"), "{harm}");
    assert!(!text.contains("canary"), "{harm}: a body was printed");
    assert!(octets(dir) == before, "{harm}: looking changed something");
}

/// The customer is there: all that waits goes to it, and nothing is lost or altered.
fn deliver_all(nodes: &Nodes, customer: &Customer, history: &[Sent]) {
    nodes.route("test.example", customer.address());
    nodes.wait_drained(Duration::from_secs(60));
    judge(history, &customer.taken()).assert_good();
}

/// Waits until all that waits stands in a node's files.
fn wait_for_copies(nodes: &Nodes, id: u64) {
    let missing = || {
        let missing = names().into_iter().filter(|name| !files_contain(&nodes.data(id), &canary(name)));
        missing.collect::<Vec<_>>()
    };
    let came = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        wait_for("its copies", Duration::from_secs(30), || missing().is_empty());
    }));
    assert!(came.is_ok(), "node {id} lacks {:?}; {:?}", missing(), nodes.status());
}

fn wait_healthy(nodes: &Nodes, what: &str) {
    wait_for(what, Duration::from_secs(40), || {
        let status = nodes.status();
        let all = status.as_ref().and_then(|s| s["nodes"].as_array());
        all.is_some_and(|nodes| nodes.len() == 3 && nodes.iter().all(|n| n["healthy"] == true))
    });
}

/// Damages one node after the other, the leader's turn included, and kills another as soon as it is back.
fn damage_all(harms: &[&str]) {
    let Waiting { mut nodes, customer, history } = waiting();
    for (n, harm) in harms.iter().enumerate() {
        let leader = nodes.wait_leader();
        let victim = if n % 2 == 0 { leader % 3 + 1 } else { leader };
        // What is dead may be damaged as it likes: no harm is done to that.
        wait_for("the dead to be overwritten", Duration::from_secs(20), || {
            let status = nodes.status();
            let all = status.as_ref().and_then(|s| s["nodes"].as_array());
            all.is_some_and(|nodes| nodes.iter().all(|n| n["erase_backlog"] == 0))
        });
        nodes.kill(victim);
        let before = nodes.stderr(victim).len();
        inflict(&nodes.data(victim), harm);
        look_offline(&nodes.data(victim), harm);
        nodes.start(victim);
        wait_healthy(&nodes, &format!("node {victim} to be back: {harm}"));
        let said = nodes.stderr(victim)[before..].to_string();
        let noticed = said.contains("damage") || said.contains("the tail of the log was cut off");
        assert!(noticed, "{harm}: nobody noticed; {said}");
        let is_back = !said.contains("holds back until") || said.contains("holds back no more");
        assert!(is_back, "{harm}: it was told to be well while it lacked something; {said}");
        wait_for_copies(&nodes, victim);
        // It counts: another may go, and comes back.
        let other = (1..=3).find(|id| *id != victim).unwrap();
        nodes.kill(other);
        nodes.wait_accepting();
        nodes.start(other);
        wait_healthy(&nodes, "the other one to be back");
    }
    let victims: BTreeSet<u64> = (1..=3).collect();
    assert!(victims.iter().all(|id| nodes.is_running(*id)));
    nodes.kill(nodes.wait_leader());
    nodes.wait_accepting();
    deliver_all(&nodes, &customer, &history);
}

#[test]
fn p9_damage_to_records_costs_no_mail() {
    damage_all(&HARMS[..5]);
}

#[test]
fn p9_damage_to_files_costs_no_mail() {
    damage_all(&HARMS[5..]);
}

/// A directory that was restored from an old copy: the node has forgotten what it acknowledged, and finds that out.
#[test]
fn p9_an_old_copy_of_a_directory_costs_no_mail() {
    let Waiting { mut nodes, customer, mut history } = waiting();
    let leader = nodes.wait_leader();
    let victim = leader % 3 + 1;
    nodes.kill(victim);
    let old = nodes.dir().join("old");
    copy(&nodes.data(victim), &old);
    nodes.start(victim);
    wait_healthy(&nodes, "the copied node to be back");
    let mut client = Client::connect(leader, &nodes.smtp(leader)).unwrap();
    for n in 0..30 {
        let name = format!("later{n:02}");
        history.push(client.transact(&name, &["r"], &message(&name, 3000)));
    }
    assert!(history.iter().all(|s| s.outcome == Outcome::Ok));
    wait_for("the copied node to have acknowledged them", Duration::from_secs(20), || {
        let Some(status) = nodes.status() else { return false };
        let node = |id: u64| status["nodes"].as_array().and_then(|all| all.iter().find(|n| n["id"] == id));
        let last = node(leader).and_then(|n| n["last_index"].as_u64());
        last.is_some() && node(victim).is_some_and(|n| n["matched_index"].as_u64() >= last)
    });
    nodes.kill(victim);
    std::fs::remove_dir_all(nodes.data(victim)).unwrap();
    copy(&old, &nodes.data(victim));
    nodes.start(victim);
    wait_healthy(&nodes, "the restored node to be back");
    let said = nodes.stderr(victim);
    assert!(said.contains("the log is shorter than what this node acknowledged"), "{said}");
    nodes.kill(leader);
    nodes.wait_accepting();
    deliver_all(&nodes, &customer, &history);
}

/// A body that is damaged on every node halts the node that finds it, which names it; it is not passed over as if it had been erased.
#[test]
fn p9_a_body_that_is_damaged_everywhere_halts_loudly() {
    let Waiting { mut nodes, .. } = waiting();
    (1..=3).for_each(|id| nodes.kill(id));
    for id in 1..=3 {
        inflict(&nodes.data(id), "a flipped bit in a body");
    }
    (1..=3).for_each(|id| nodes.start(id));
    let mut halted = None;
    wait_for("somebody to halt", Duration::from_secs(30), || {
        halted = (1..=3).find(|id| nodes.stderr(*id).contains("no other node has it"));
        halted.is_some()
    });
    let halted = halted.unwrap();
    let status = nodes.wait_exit(halted, Duration::from_secs(10));
    let said = nodes.stderr(halted);
    assert_eq!(status, Some(1), "{said}");
    for word in ["the body of entry", "segment", "offset", "message 0"] {
        assert!(said.contains(word), "{word} in {said}");
    }
}

/// Records that are damaged on every node beyond their bodies: all wait and give up nothing, and each says where, which entries and which
/// messages. Of one the octets tell, of the other the checkpoint alone.
#[test]
fn p9_records_that_are_damaged_everywhere_are_named() {
    let Waiting { mut nodes, history, .. } = waiting();
    wait_healthy(&nodes, "all to have all");
    std::thread::sleep(Duration::from_secs(2)); // for a checkpoint
    (1..=3).for_each(|id| nodes.kill(id));
    for id in 1..=3 {
        for (name, take_all) in [("waits07", false), ("waits30", true)] {
            let (path, at) = place(&nodes.data(id), name);
            edit(&path, |octets| {
                let header = header(octets, at);
                octets[header + 20] ^= 1;
                if take_all {
                    octets[header..at + 100_000].fill(0x5a);
                }
            });
        }
    }
    (1..=3).for_each(|id| nodes.start(id));
    let of = |name: &str| history.iter().find(|sent| sent.name == name).and_then(|sent| sent.id.clone());
    let [octets_tell, rows_tell, whole] = ["waits07", "waits30", "waits20"].map(|name| of(name).unwrap());
    wait_for("all to say so", Duration::from_secs(30), || {
        (1..=3).all(|id| nodes.stderr(id).contains("nothing is given up"))
    });
    for id in 1..=3 {
        let said = nodes.stderr(id);
        for word in ["segment", "offset", ", entr", &octets_tell, &rows_tell] {
            assert!(said.contains(word), "node {id}: {word} in {said}");
        }
        assert!(!said.contains(&whole), "node {id}: nothing befell {whole}: {said}");
        assert!(nodes.is_running(id));
    }
    nodes.kill(1);
    let check = holdfast(&["store", "check", &nodes.data(1).display().to_string()]);
    let said = String::from_utf8_lossy(&check.stderr).into_owned();
    assert!(said.contains(&octets_tell) && said.contains(&rows_tell), "{said}");
}

/// A body that rots while its message is handed off elsewhere: nobody needs it, and nothing halts.
#[test]
fn p9_a_damaged_body_of_settled_mail_is_no_matter() {
    let Waiting { mut nodes, customer, history } = waiting();
    let leader = nodes.wait_leader();
    let victim = leader % 3 + 1;
    nodes.kill(victim);
    nodes.route("test.example", customer.address());
    nodes.wait_drained(Duration::from_secs(40));
    inflict(&nodes.data(victim), "a flipped bit in a body");
    // Also while the third node is away.
    let other = (1..=3).find(|id| *id != victim && *id != leader).unwrap();
    nodes.kill(other);
    nodes.start(victim);
    nodes.wait_accepting();
    wait_for("the body to be gone", Duration::from_secs(20), || {
        names().iter().all(|name| !files_contain(&nodes.data(victim), &canary(name)))
    });
    nodes.start(other);
    wait_healthy(&nodes, "all to be back");
    judge(&history, &customer.taken()).assert_good();
    assert_eq!(customer.count(), history.len(), "nothing is handed off twice");
}

/// Rot that comes while all nodes run and nobody reads: it is found, mended from another node, and the mail survives the loss of that one.
#[test]
fn p9_rot_is_found_and_mended_while_the_nodes_run() {
    let Waiting { mut nodes, customer, history } = waiting();
    let leader = nodes.wait_leader();
    let victim = leader % 3 + 1;
    // It has nothing in memory then.
    nodes.kill(victim);
    nodes.start(victim);
    wait_healthy(&nodes, "it to be back");
    let (path, at) = place(&nodes.data(victim), "waits03");
    let mut octet = [0];
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    file.read_exact_at(&mut octet, at as u64).unwrap();
    file.write_all_at(&[octet[0] ^ 1], at as u64).unwrap();
    let scrub = |nodes: &Nodes| {
        let status = nodes.status()?;
        let all = status["nodes"].as_array()?.clone();
        all.into_iter().find(|n| n["id"] == victim).map(|n| n["scrub"].clone())
    };
    wait_for("the rot to be found and mended", Duration::from_secs(60), || {
        scrub(&nodes).is_some_and(|s| s["damaged"].as_u64() > Some(0) && s["to_mend"] == 0)
    });
    assert!(files_contain(&nodes.data(victim), &canary("waits03")));
    assert!(nodes.is_running(victim), "it went on meanwhile");
    // Its copy counts again: the others may go.
    nodes.kill(leader);
    nodes.wait_accepting();
    deliver_all(&nodes, &customer, &history);
}

/// The last batch before idleness is acknowledged by two nodes, then rots on one; that one starts with the laggard, who never had it.
#[test]
fn p9_who_lost_what_it_acknowledged_last_elects_no_laggard() {
    let Waiting { mut nodes, customer, mut history } = waiting();
    let leader = nodes.wait_leader();
    let (laggard, forgetful) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    nodes.kill(laggard);
    let mut client = Client::connect(leader, &nodes.smtp(leader)).unwrap();
    history.push(client.transact("last", &["r"], &message("last", 900)));
    assert_eq!(history.last().unwrap().outcome, Outcome::Ok);
    nodes.kill(leader);
    nodes.kill(forgetful);
    // From the last message on: also the marks that would say that it was synced.
    let (path, at) = place_of(&nodes.data(forgetful), b"canary-last-line-000001");
    edit(&path, |octets| {
        let end = octets.iter().rposition(|octet| *octet != 0).unwrap();
        octets[at..=end].fill(0x77);
    });
    nodes.start(forgetful);
    nodes.start(laggard);
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(nodes.leader(), None, "these two do not know what was acknowledged");
    assert!(nodes.stderr(forgetful).contains("ambiguous") || nodes.stderr(forgetful).contains("damage"));
    // A second start forgets nothing of it.
    nodes.kill(forgetful);
    nodes.start(forgetful);
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(nodes.leader(), None, "nor after another start");
    nodes.start(leader);
    nodes.wait_accepting();
    deliver_all(&nodes, &customer, &history);
}

/// Two nodes lose an older record each, while the third is away, which lacks what these two acknowledged since: neither gives up what it
/// still has, and once one of them has its directory back all goes on.
#[test]
fn p9_two_damaged_nodes_give_up_nothing_that_only_they_have() {
    let Waiting { mut nodes, customer, mut history } = waiting();
    wait_healthy(&nodes, "all to have all");
    let leader = nodes.wait_leader();
    let (laggard, second) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    nodes.kill(laggard);
    let mut client = Client::connect(leader, &nodes.smtp(leader)).unwrap();
    let late: Vec<String> = (0..5).map(|n| format!("late{n}")).collect();
    for name in &late {
        history.push(client.transact(name, &["r"], &message(name, 2000)));
    }
    assert!(history.iter().all(|s| s.outcome == Outcome::Ok));
    nodes.kill(leader);
    nodes.kill(second);
    let whole = nodes.dir().join("whole");
    copy(&nodes.data(second), &whole);
    for id in [leader, second] {
        inflict(&nodes.data(id), "a flipped bit in a header");
    }
    (1..=3).for_each(|id| nodes.start(id));
    let said = |nodes: &Nodes, id| nodes.stderr(id).contains("nothing is given up");
    wait_for("both to say so", Duration::from_secs(30), || said(&nodes, leader) && said(&nodes, second));
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(nodes.leader(), None);
    for (id, name) in [leader, second].iter().flat_map(|id| late.iter().map(move |name| (*id, name))) {
        let here = files_contain(&nodes.data(id), format!("canary-{name}-line-000001").as_bytes());
        assert!(here, "{name} is gone from node {id}");
    }
    nodes.kill(second);
    std::fs::remove_dir_all(nodes.data(second)).unwrap();
    copy(&whole, &nodes.data(second));
    nodes.start(second);
    nodes.wait_accepting();
    wait_healthy(&nodes, "the other damaged one to be back");
    deliver_all(&nodes, &customer, &history);
}

/// All nodes lose power, and what each wrote last is neither whole nor visibly torn: they hear each other and go on.
#[test]
fn p9_tails_that_are_ambiguous_everywhere_end_no_service() {
    let Waiting { mut nodes, customer, history } = waiting();
    wait_healthy(&nodes, "all to have all");
    std::thread::sleep(Duration::from_secs(1));
    (1..=3).for_each(|id| nodes.kill(id));
    for id in 1..=3 {
        let all = segments(&nodes.data(id));
        let newest = all.iter().max_by_key(|path| std::fs::read(path).unwrap()[32..40].to_vec()).unwrap();
        edit(newest, |octets| {
            // What looks like a batch whose write was cut short within a block.
            let end = (octets.iter().rposition(|octet| *octet != 0).unwrap() + 1).next_multiple_of(4096);
            octets[end..end + 700].fill(0x33);
        });
    }
    (1..=3).for_each(|id| nodes.start(id));
    nodes.wait_accepting();
    assert!((1..=3).all(|id| nodes.stderr(id).contains("the log's tail is ambiguous")));
    deliver_all(&nodes, &customer, &history);
}
