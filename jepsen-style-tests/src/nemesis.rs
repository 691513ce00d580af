//! What is broken on purpose, and how it is mended. Each names the nodes whose clients may notice.

use std::cell::Cell;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::customer::Customer;
use crate::damage::{self, OldCopy};
use crate::disk::SmallDisk;
use crate::hosts::Hosts;
use crate::links::Links;
use crate::nodes::Nodes;
use crate::random::Random;
use crate::record::Record;
use crate::replacement::{can_be_replaced, id_on, lose_disk, replace};
use crate::tools::waited;
use crate::wires::Quality;

/// Size of a small disk.
pub const DISK_MIB: u64 = 400;

/// By how many hours a wall clock is set wrong.
pub const CLOCK_STEPS: [i64; 2] = [20 * 24, -20];
/// How long a moment is waited for at which a node owes a reply.
const BETWEEN: Duration = Duration::from_secs(4);
/// How long a node may take to make its next sync, and to end when that failed.
const SYNC: Duration = Duration::from_secs(5);
/// How often a node is killed that starts, how long it lives each time at the most, and how long it misses what goes on before.
const STARTS: usize = 4;
const LIFE_MS: u64 = 1_200;
const AWAY_MS: u64 = 700;
/// Age of an old copy: longer than what a node may forget of a file without noticing (src/docs/exceptions.md).
const COPY_AGE: Duration = Duration::from_secs(3);

/// What a nemesis needs of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Processes alone.
    Nothing,
    /// [`Links`] that can be broken.
    Links,
    /// A machine for each node ([`Hosts`]), and wires between them that can be made bad.
    Wires,
    /// Machines, and a small disk for each.
    SmallDisks,
    /// All that root may have: machines, disks on loop devices, control groups.
    Root,
    /// strace(1).
    Strace,
    /// libfaketime.
    Faketime,
}

impl Needs {
    /// Whether each node has a small disk then.
    pub fn has_small_disks(self) -> bool {
        matches!(self, Needs::SmallDisks | Needs::Root)
    }
}

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    Kill(Whom),
    KillStarting,
    Pause(Whom),
    Restart,
    Transfer,
    Isolate(Whom),
    Bridge,
    OneWay,
    Lose,
    Reset,
    Wires(Whom, Quality),
    PowerCut(Whom),
    SlowDisk,
    FailSync,
    WallClock,
    FlipBits,
    DamageFiles,
    OldCopy,
    LoseIndex,
    Replace,
    FillDisk,
    CustomerAway,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whom {
    Leader,
    Follower,
    Any,
    Two,
    All,
}

/// A way to break something.
#[derive(Clone, Copy, Debug)]
pub struct Nemesis {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub about: &'static str,
    /// What it needs.
    pub needs: Needs,
    harm: Harm,
    /// For how long it stays broken, in milliseconds: what takes the leader away, longer than it takes for another one to lead; what takes
    /// two nodes away, until the third one takes no mail.
    lasts: (u64, u64),
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

const fn new(
    name: &'static str,
    about: &'static str,
    needs: Needs,
    harm: Harm,
    lasts: (u64, u64),
) -> Nemesis {
    Nemesis { name, about, needs, harm, lasts }
}

/// All of them.
pub const ALL: [Nemesis; 32] = [
    new(
        "kill-leader",
        "SIGKILL to the leader while it owes a reply",
        Needs::Nothing,
        Harm::Kill(Whom::Leader),
        (2_500, 6_000),
    ),
    new("kill-follower", "SIGKILL to a follower", Needs::Nothing, Harm::Kill(Whom::Follower), (500, 6_000)),
    new("kill-two", "SIGKILL to two nodes at once", Needs::Nothing, Harm::Kill(Whom::Two), (7_000, 10_000)),
    new("kill-all", "SIGKILL to all nodes at once", Needs::Nothing, Harm::Kill(Whom::All), (100, 2_000)),
    new(
        "kill-starting",
        "SIGKILL to a node, and again while it starts or gets what it missed",
        Needs::Nothing,
        Harm::KillStarting,
        (100, 2_000),
    ),
    new(
        "pause-leader",
        "SIGSTOP to the leader while it owes a reply",
        Needs::Nothing,
        Harm::Pause(Whom::Leader),
        (3_000, 10_000),
    ),
    new(
        "pause-follower",
        "SIGSTOP to a follower",
        Needs::Nothing,
        Harm::Pause(Whom::Follower),
        (1_000, 10_000),
    ),
    new("pause-two", "SIGSTOP to two nodes", Needs::Nothing, Harm::Pause(Whom::Two), (7_000, 10_000)),
    new(
        "pause-long",
        "SIGSTOP to a node, for up to a minute",
        Needs::Nothing,
        Harm::Pause(Whom::Any),
        (10_000, 60_000),
    ),
    new("restart", "SIGTERM to a node, and a new start", Needs::Nothing, Harm::Restart, (0, 1_000)),
    new("transfer", "leadership is handed over", Needs::Nothing, Harm::Transfer, (100, 500)),
    new(
        "isolate-leader",
        "no packet to or from the leader",
        Needs::Links,
        Harm::Isolate(Whom::Leader),
        (3_000, 8_000),
    ),
    new(
        "isolate-follower",
        "no packet to or from a follower",
        Needs::Links,
        Harm::Isolate(Whom::Follower),
        (1_000, 8_000),
    ),
    new("bridge", "two nodes reach each other only by the third", Needs::Links, Harm::Bridge, (1_000, 8_000)),
    new(
        "one-way",
        "the leader is not heard by one node, but hears it",
        Needs::Links,
        Harm::OneWay,
        (1_000, 8_000),
    ),
    new("loss", "a tenth of all packets between nodes is lost", Needs::Links, Harm::Lose, (1_000, 8_000)),
    new("reset", "connections to and from the leader are reset", Needs::Links, Harm::Reset, (50, 500)),
    new(
        "jitter",
        "packets between nodes take up to 100 ms, overtake each other, and some come twice",
        Needs::Wires,
        Harm::Wires(
            Whom::All,
            Quality { delay: (ms(0), ms(100)), overtakes: true, repeats: 10, ..Quality::GOOD },
        ),
        (2_000, 8_000),
    ),
    new(
        "far-node",
        "a node is 60 to 80 ms away, and a hundredth of its packets is lost",
        Needs::Wires,
        Harm::Wires(Whom::Any, Quality { delay: (ms(60), ms(80)), loses: 1, ..Quality::GOOD }),
        (2_000, 8_000),
    ),
    new(
        "narrow",
        "wires between nodes carry 1 MB a second each",
        Needs::Wires,
        Harm::Wires(Whom::All, Quality { rate: Some(1_000_000), ..Quality::GOOD }),
        (2_000, 8_000),
    ),
    new(
        "flapping",
        "the leader's wires are broken every other 700 ms",
        Needs::Wires,
        Harm::Wires(Whom::Leader, Quality { flaps: Some(ms(700)), ..Quality::GOOD }),
        (3_000, 8_000),
    ),
    new(
        "power-cut-one",
        "the power of a node goes, and with it what its disk was not told to keep",
        Needs::Root,
        Harm::PowerCut(Whom::Any),
        (100, 3_000),
    ),
    new(
        "power-cut-all",
        "the power of all nodes goes at once",
        Needs::Root,
        Harm::PowerCut(Whom::All),
        (100, 2_000),
    ),
    new(
        "fail-sync",
        "a sync of a node's disk fails, upon which it has to end; it starts again",
        Needs::Strace,
        Harm::FailSync,
        (100, 2_000),
    ),
    new(
        "wall-clock",
        "a node's wall clock is 20 days ahead, or 20 hours behind",
        Needs::Faketime,
        Harm::WallClock,
        (4_000, 8_000),
    ),
    new("slow-disk", "a node's disk takes 1 MB a second", Needs::Root, Harm::SlowDisk, (2_000, 8_000)),
    new(
        "flip-bits",
        "a node is killed, bits of its log flip, it starts again",
        Needs::Nothing,
        Harm::FlipBits,
        (100, 1_000),
    ),
    new(
        "damage-files",
        "a node is killed; a file of its log is cut short, gone, exchanged with another one or partly garbage; it starts again",
        Needs::Nothing,
        Harm::DamageFiles,
        (100, 1_000),
    ),
    new(
        "old-copy",
        "a node is killed; a file of its log is put back from a copy some seconds old; it starts again",
        Needs::Nothing,
        Harm::OldCopy,
        (100, 1_000),
    ),
    new("fill-disk", "a node's disk has no room left", Needs::SmallDisks, Harm::FillDisk, (2_000, 8_000)),
    new(
        "lose-index",
        "a node is killed, its index is gone, it starts again",
        Needs::Nothing,
        Harm::LoseIndex,
        (100, 1_000),
    ),
    new(
        "replace-node",
        "a node is killed and its disk is gone; another one takes its place under a new id",
        Needs::Nothing,
        Harm::Replace,
        (100, 2_000),
    ),
];

/// One that has to do with the world around: kept apart, since it breaks nothing of the cluster.
pub const CUSTOMER_AWAY: Nemesis = new(
    "customer-away",
    "the customer closes every connection",
    Needs::Nothing,
    Harm::CustomerAway,
    (1_000, 8_000),
);

/// The one of this name.
pub fn named(name: &str) -> Option<Nemesis> {
    all().find(|nemesis| nemesis.name == name)
}

/// All, those of the world around included.
pub fn all() -> impl Iterator<Item = Nemesis> {
    ALL.into_iter().chain([CUSTOMER_AWAY])
}

/// Something that is broken now.
#[derive(Debug)]
pub struct Broken {
    harm: Harm,
    /// When it began: clients that see the first of it are to find it in the history.
    pub began: Instant,
    /// Nodes whose clients may notice.
    pub nodes: Vec<u64>,
    /// Nodes that can do nothing for the others.
    pub down: Vec<u64>,
    /// What was done, for people.
    pub what: String,
    /// Nodes that were told to end, and their exit status.
    pub ended: Vec<(u64, Option<i32>)>,
}

/// What there is to break.
pub struct World<'a> {
    /// The cluster.
    pub nodes: &'a mut Nodes,
    /// What lies between its nodes, if it can be broken.
    pub links: Option<&'a dyn Links>,
    /// Its machines, if each node has its own.
    pub hosts: Option<&'a Hosts>,
    /// Its disks on loop devices, if each node has one.
    pub disks: &'a mut [SmallDisk],
    /// Where its mail goes.
    pub customer: &'a Customer,
    /// What its senders write down.
    pub record: &'a Record,
    /// Who leads, if anybody.
    pub leader: Option<u64>,
}

impl Nemesis {
    /// For how long it is to last this time.
    pub fn lasts(&self, random: &mut Random) -> Duration {
        Duration::from_millis(random.within(self.lasts.0, self.lasts.1))
    }

    /// Breaks something. Nothing if it cannot be done now.
    pub fn begin(&self, world: &mut World<'_>, random: &mut Random) -> Option<Broken> {
        let nodes = &mut *world.nodes;
        let all = [1, 2, 3];
        let leader = world.leader;
        let followers: Vec<u64> = all.into_iter().filter(|id| Some(*id) != leader).collect();
        let mut choose = |whom| match whom {
            Whom::Leader => leader.map(|id| vec![id]),
            Whom::Follower => Some(vec![*random.pick(&followers)]),
            Whom::Any => Some(vec![*random.pick(&all)]),
            Whom::Two => {
                let spared = *random.pick(&all);
                Some(all.into_iter().filter(|id| *id != spared).collect())
            }
            Whom::All => Some(all.to_vec()),
        };
        let began = Cell::new(Instant::now());
        let broken = |nodes: &[u64], down: &[u64], what: String| {
            let (began, ended) = (began.get(), Vec::new());
            Some(Broken { harm: self.harm, began, nodes: nodes.into(), down: down.into(), what, ended })
        };
        match self.harm {
            Harm::Kill(whom) => {
                let victims = choose(whom)?;
                if let (Whom::Leader, [victim]) = (whom, &victims[..]) {
                    began.set(stop_before_it_replies(nodes, *victim, world.record));
                }
                victims.iter().for_each(|id| nodes.kill(*id));
                broken(&victims, &victims, format!("killed {victims:?}"))
            }
            Harm::KillStarting => {
                let victim = *random.pick(&all);
                nodes.kill(victim);
                let lives: Vec<u64> = (0..STARTS).map(|_| random.within(0, LIFE_MS)).collect();
                for life in &lives {
                    std::thread::sleep(ms(AWAY_MS));
                    nodes.start(victim);
                    std::thread::sleep(ms(*life));
                    nodes.kill(victim);
                }
                broken(&[victim], &[victim], format!("killed {victim}, and {lives:?} ms after its starts"))
            }
            Harm::Pause(whom) => {
                let victims = choose(whom)?;
                if let (Whom::Leader, [victim]) = (whom, &victims[..]) {
                    began.set(stop_before_it_replies(nodes, *victim, world.record));
                }
                victims.iter().for_each(|id| nodes.pause(*id, true));
                broken(&victims, &victims, format!("stopped {victims:?}"))
            }
            Harm::Restart => {
                let victim = *random.pick(&all);
                let status = nodes.stop(victim);
                let broken = broken(&[victim], &[victim], format!("ended {victim}"))?;
                Some(Broken { ended: vec![(victim, status)], ..broken })
            }
            Harm::Transfer => {
                let to = *random.pick(&followers);
                let moved = nodes.ask(&["cluster", "transfer", "--to", &id_on(nodes, to)?.to_string()]);
                moved.status.success().then_some(())?;
                broken(&[], &[], format!("leadership from {leader:?} to {to}"))
            }
            Harm::Isolate(whom) => {
                let victims = choose(whom)?;
                let others = |victim: u64| all.into_iter().filter(move |id| *id != victim);
                let pairs = victims.iter().flat_map(|v| others(*v).flat_map(|o| [(*v, o), (o, *v)]));
                cut(world.links?, &pairs.collect::<Vec<_>>())?;
                broken(&victims, &victims, format!("cut off {victims:?}"))
            }
            Harm::Bridge => {
                let (a, b) = (followers[0], *followers.get(1)?);
                // The leader is the bridge, or is cut off from one of the two.
                let (a, b) = if random.percent(50) { (a, b) } else { (leader?, b) };
                cut(world.links?, &[(a, b), (b, a)])?;
                broken(&[a, b], &[], format!("no way between {a} and {b}"))
            }
            Harm::OneWay => {
                let (from, to) = (leader?, *random.pick(&followers));
                cut(world.links?, &[(from, to)])?;
                broken(&[from, to], &[], format!("{to} does not hear {from}"))
            }
            Harm::Lose => {
                let links = world.links?;
                links.lose(10).map_err(|_| mend(links)).ok()?;
                broken(&all, &[], "a tenth of all packets is lost".into())
            }
            Harm::Reset => {
                let (links, leader) = (world.links?, leader?);
                let mut pairs = followers.iter().flat_map(|other| [(leader, *other), (*other, leader)]);
                pairs.try_for_each(|(from, to)| links.reset(from, to)).map_err(|_| mend(links)).ok()?;
                broken(&[], &[], format!("connections of {leader} are reset"))
            }
            Harm::Wires(whom, quality) => {
                let (hosts, victims) = (world.hosts?, choose(whom)?);
                let mut pairs = [(1, 2), (1, 3), (2, 3)]
                    .into_iter()
                    .filter(|(a, b)| victims.contains(a) || victims.contains(b));
                pairs.try_for_each(|(a, b)| hosts.wire(a, b, quality)).map_err(|_| mend(hosts)).ok()?;
                // Whoever leads may be cut off, and nobody may lead for a while; all mail passes through a leader that is far.
                let spares_leader = whom == Whom::Any && leader.is_some_and(|id| !victims.contains(&id));
                let noticed = if spares_leader { &victims[..] } else { &all };
                broken(noticed, &[], format!("{} at {victims:?}", self.about))
            }
            Harm::PowerCut(whom) => {
                let victims = choose(whom)?;
                (world.disks.len() == all.len()).then_some(())?;
                victims.iter().for_each(|id| nodes.kill(*id));
                victims.iter().for_each(|id| world.disks[*id as usize - 1].cut_power());
                broken(&victims, &victims, format!("cut the power of {victims:?}"))
            }
            Harm::SlowDisk => {
                let victim = *random.pick(&all);
                let device = world.disks.get(victim as usize - 1)?.device()?;
                nodes.group(victim)?.limit_writes(&device, Some(1_000_000)).ok()?;
                let noticed: &[u64] = if Some(victim) == leader { &all } else { &[victim] };
                broken(noticed, &[], format!("the disk of {victim} is slow"))
            }
            Harm::FailSync => {
                let victim = *random.pick(&all);
                let status = fail_a_sync(nodes, victim)?;
                let broken = broken(&[victim], &[victim], format!("a sync of {victim} failed"))?;
                // That is how it ends if it cannot trust its disk.
                let ended = Some((victim, status)).filter(|_| status != Some(4));
                Some(Broken { ended: ended.into_iter().collect(), ..broken })
            }
            Harm::WallClock => {
                let (victim, hours) = (*random.pick(&all), *random.pick(&CLOCK_STEPS));
                nodes.set_clock(victim, hours);
                broken(&[], &[], format!("the wall clock of {victim} is wrong by {hours} hours"))
            }
            Harm::FlipBits => {
                let victim = *random.pick(&all);
                nodes.kill(victim);
                let places = damage::flip_bits(&nodes.data(victim), random).expect("files of our own");
                broken(
                    &[victim],
                    &[victim],
                    format!("killed {victim} and flipped bits: {}", places.join(", ")),
                )
            }
            Harm::DamageFiles => {
                let (victim, damage) = (*random.pick(&all), *random.pick(&damage::ALL));
                nodes.kill(victim);
                let what = damage.inflict(&nodes.data(victim), random).expect("files of our own");
                let what = what.unwrap_or_else(|| "nothing to damage".into());
                broken(&[victim], &[victim], format!("killed {victim}: {what}"))
            }
            Harm::OldCopy => {
                let victim = *random.pick(&all);
                let data = nodes.data(victim);
                let copy = OldCopy::of(&data).expect("files of our own");
                std::thread::sleep(COPY_AGE);
                copy.is_old().then_some(())?;
                began.set(Instant::now());
                nodes.kill(victim);
                let what = copy.put_back(random).expect("files of our own");
                let what = what.unwrap_or_else(|| "nothing was written since the copy".into());
                broken(&[victim], &[victim], format!("killed {victim}: {what}"))
            }
            Harm::LoseIndex => {
                let victim = *random.pick(&all);
                nodes.kill(victim);
                drop(std::fs::remove_dir_all(nodes.data(victim).join("index")));
                broken(&[victim], &[victim], format!("killed {victim} and removed its index"))
            }
            Harm::Replace => {
                let victim = *random.pick(&all);
                can_be_replaced(nodes).then_some(())?;
                nodes.kill(victim);
                lose_disk(&nodes.data(victim)).expect("files of our own");
                broken(&[victim], &[victim], format!("killed {victim}, and its disk is gone"))
            }
            Harm::FillDisk => {
                let victim = *random.pick(&all);
                fill(&filler(nodes, victim)).ok()?;
                // Until the leader has handed over there is no room for anybody.
                let nodes: &[u64] = if Some(victim) == leader { &all } else { &[victim] };
                broken(nodes, &[], format!("no room on {victim}"))
            }
            Harm::CustomerAway => {
                world.customer.set_down(true);
                broken(&[], &[], "the customer is away".into())
            }
        }
    }
}

impl Broken {
    /// Mends it.
    pub fn end(&self, world: &mut World<'_>) {
        match self.harm {
            Harm::Kill(_)
            | Harm::KillStarting
            | Harm::Restart
            | Harm::PowerCut(_)
            | Harm::FailSync
            | Harm::FlipBits
            | Harm::DamageFiles
            | Harm::OldCopy
            | Harm::LoseIndex => {
                self.nodes.iter().for_each(|id| world.nodes.start(*id));
            }
            Harm::Replace => self.nodes.iter().for_each(|id| {
                let replaced = replace(world.nodes, *id);
                assert!(replaced.is_ok(), "node {id} cannot be replaced: {}", replaced.unwrap_err());
            }),
            Harm::Pause(_) => self.nodes.iter().for_each(|id| world.nodes.pause(*id, false)),
            Harm::Isolate(_) | Harm::Bridge | Harm::OneWay | Harm::Lose | Harm::Reset | Harm::Wires(..) => {
                world.links.into_iter().for_each(mend);
            }
            Harm::SlowDisk => (1..).zip(world.disks.iter()).for_each(|(id, disk)| {
                let is_mended = disk
                    .device()
                    .zip(world.nodes.group(id))
                    .is_some_and(|(device, group)| group.limit_writes(&device, None).is_ok());
                assert!(is_mended, "the disk of {id} cannot be mended");
            }),
            Harm::FillDisk => {
                (1..=3).for_each(|id| drop(std::fs::remove_file(filler(world.nodes, id))));
            }
            Harm::WallClock => (1..=3).for_each(|id| world.nodes.set_clock(id, 0)),
            Harm::CustomerAway => world.customer.set_down(false),
            Harm::Transfer => {}
        }
    }
}

/// Stops a node's process at a moment when a sender waits for its reply to a final dot, if there is one within a while. Says when.
fn stop_before_it_replies(nodes: &Nodes, id: u64, record: &Record) -> Instant {
    let deadline = Instant::now() + BETWEEN;
    while Instant::now() < deadline {
        std::thread::sleep(ms(1));
        let stopped = Instant::now();
        if !record.is_past_dot(id, stopped) {
            continue;
        }
        nodes.pause(id, true);
        // What it had said before is read meanwhile; who sends its dot only now does not count.
        std::thread::sleep(ms(100));
        if record.is_past_dot(id, stopped) {
            return stopped;
        }
        nodes.pause(id, false);
    }
    Instant::now()
}

/// One sync of a node's fails, the next it makes; its exit status. Nothing if it makes none, or strace cannot be had.
fn fail_a_sync(nodes: &mut Nodes, id: u64) -> Option<Option<i32>> {
    let pid = nodes.pid(id)?.to_string();
    let inject = "inject=fdatasync:error=EIO:when=1";
    let mut strace = Command::new("strace");
    let words = ["-q", "-f", "-e", "trace=fdatasync", "-e", inject, "-o", "/dev/null", "-p", &pid];
    let mut strace = strace.args(words).stdin(Stdio::null()).stderr(Stdio::null()).spawn().ok()?;
    let has_ended = waited(SYNC, || !nodes.is_running(id));
    drop(strace.kill());
    drop(strace.wait());
    has_ended.then(|| nodes.wait_exit(id, SYNC))
}

/// Cuts links, all or none.
fn cut(links: &dyn Links, pairs: &[(u64, u64)]) -> Option<()> {
    let all = pairs.iter().try_for_each(|(from, to)| links.cut(*from, *to));
    all.map_err(|_| mend(links)).ok()
}

fn mend(links: &dyn Links) {
    assert!(links.mend().is_ok(), "the links cannot be mended");
}

fn filler(nodes: &Nodes, id: u64) -> PathBuf {
    nodes.data(id).join("filler")
}

/// Takes all the room there is.
fn fill(path: &Path) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    let mut piece = vec![1; 1 << 20];
    // A disk that has this much more room is none that was made to be filled.
    while piece.len() >= 4096 && file.metadata()?.len() < DISK_MIB << 20 {
        if file.write_all(&piece).is_err() {
            piece.truncate(piece.len() / 2);
        }
    }
    Ok(())
}
