//! Wires between machines that are as bad as one likes. Frames come out of one machine's tap device and go into another's: later, in another
//! order, at a bounded rate, twice, or never. The ends see what a bad network does to their packets, which a proxy of connections would hide.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use crate::random::Random;
use crate::tools::lock;

/// What a wire with a bounded rate holds back before it drops the rest, as a router's buffer does.
const BUFFER: Duration = Duration::from_millis(250);
/// Frames under way on all wires; what comes beyond is lost.
const UNDER_WAY_MAX: usize = 20_000;
/// An Ethernet frame of 1,500 octets, with its header and room to spare.
const FRAME_MAX: usize = 1_600;

/// How a wire is, in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quality {
    /// How long a frame takes, at least and at most.
    pub delay: (Duration, Duration),
    /// Whether one may overtake another that took longer.
    pub overtakes: bool,
    /// So many of a hundred frames are lost.
    pub loses: u64,
    /// So many of a hundred frames come twice.
    pub repeats: u64,
    /// Octets a second. Nothing: as fast as it goes.
    pub rate: Option<u64>,
    /// The wire is broken half of the time: so long, and then whole for as long.
    pub flaps: Option<Duration>,
}

impl Quality {
    /// Nothing is wrong with it.
    pub const GOOD: Quality = Quality {
        delay: (Duration::ZERO, Duration::ZERO),
        overtakes: false,
        loses: 0,
        repeats: 0,
        rate: None,
        flaps: None,
    };
}

/// One direction between two machines.
struct Wire {
    quality: Quality,
    /// Since when it is like that.
    since: Instant,
    /// When the last octet that was sent has left.
    free_at: Instant,
    /// When the last frame arrives.
    last: Instant,
}

impl Wire {
    fn new(quality: Quality, now: Instant) -> Wire {
        Wire { quality, since: now, free_at: now, last: now }
    }

    /// When a frame of so many octets, sent now, arrives: once as a rule, twice or never.
    fn carry(&mut self, octets: usize, now: Instant, random: &mut Random) -> [Option<Instant>; 2] {
        let Quality { delay, overtakes, loses, repeats, rate, flaps } = self.quality;
        let half =
            flaps.map_or(1, |half| now.duration_since(self.since).as_millis() / half.as_millis().max(1));
        let is_full = self.free_at > now + BUFFER;
        if half.is_multiple_of(2) || is_full || random.percent(loses) {
            return [None; 2];
        }
        self.free_at = self.free_at.max(now);
        if let Some(rate) = rate {
            self.free_at += Duration::from_secs_f64(octets as f64 / rate as f64);
        }
        let spread = delay.1.saturating_sub(delay.0).as_micros() as u64;
        let mut arrivals = [None; 2];
        for arrival in arrivals.iter_mut().take(1 + usize::from(random.percent(repeats))) {
            let at = self.free_at + delay.0 + Duration::from_micros(random.within(0, spread + 1));
            self.last = if overtakes { at } else { at.max(self.last) };
            *arrival = Some(self.last);
        }
        arrivals
    }
}

/// A frame under way.
struct Frame {
    due: Instant,
    number: u64,
    to: usize,
    octets: Vec<u8>,
}

/// What of a frame says when it is its turn.
impl Frame {
    fn turn(&self) -> (Instant, u64) {
        (self.due, self.number)
    }
}

impl PartialEq for Frame {
    fn eq(&self, other: &Frame) -> bool {
        self.turn() == other.turn()
    }
}

impl Eq for Frame {}

impl PartialOrd for Frame {
    fn partial_cmp(&self, other: &Frame) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Frame {
    fn cmp(&self, other: &Frame) -> std::cmp::Ordering {
        self.turn().cmp(&other.turn())
    }
}

/// All that is under way, and the wires that are not good.
struct UnderWay {
    bad: BTreeMap<(usize, usize), Wire>,
    frames: BinaryHeap<Reverse<Frame>>,
    count: u64,
    random: Random,
}

struct Shared {
    ports: Vec<SyncDevice>,
    under_way: Mutex<UnderWay>,
    comes: Condvar,
}

/// A switch whose ports are tap devices, and its wires. It works until the process ends.
pub struct Switch {
    shared: Arc<Shared>,
}

impl Switch {
    /// A switch of so many ports. Each is a device of this process's network namespace by the name [`Switch::port`], to be moved to where it
    /// belongs.
    ///
    /// # Errors
    /// If no tap device can be had.
    pub fn start(ports: usize, seed: u64) -> std::io::Result<Switch> {
        let ports: Result<Vec<_>, _> = (0..ports)
            .map(|port| {
                DeviceBuilder::new().name(Switch::port(port)).layer(Layer::L2).enable(false).build_sync()
            })
            .collect();
        let under_way =
            UnderWay { bad: BTreeMap::new(), frames: BinaryHeap::new(), count: 0, random: Random::new(seed) };
        let shared =
            Arc::new(Shared { ports: ports?, under_way: Mutex::new(under_way), comes: Condvar::new() });
        for port in 0..shared.ports.len() {
            let shared = shared.clone();
            std::thread::spawn(move || take(&shared, port));
        }
        let whose = shared.clone();
        std::thread::spawn(move || hand_over(&whose));
        Ok(Switch { shared })
    }

    /// The name of a port's device.
    pub fn port(port: usize) -> String {
        format!("port{port}")
    }

    /// The hardware address that a port's device has to be given.
    pub fn address(port: usize) -> String {
        format!("02:00:00:00:00:{port:02x}")
    }

    /// From now on the wire from one port to another is like this.
    pub fn wire(&self, from: usize, to: usize, quality: Quality) {
        let bad = &mut lock(&self.shared.under_way).bad;
        match quality == Quality::GOOD {
            true => drop(bad.remove(&(from, to))),
            false => drop(bad.insert((from, to), Wire::new(quality, Instant::now()))),
        }
    }

    /// All wires are good. What is under way arrives when it would have.
    pub fn mend(&self) {
        lock(&self.shared.under_way).bad.clear();
    }
}

/// The ports that a frame goes to by the address it begins with: one, or all others.
fn ports_of(frame: &[u8], from: usize, ports: usize) -> std::ops::Range<usize> {
    match frame {
        [2, 0, 0, 0, 0, port, ..] if usize::from(*port) < ports => usize::from(*port)..usize::from(*port) + 1,
        // To a group: all (IEEE 802, the first octet's lowest bit).
        [first, ..] if first & 1 == 1 => 0..ports,
        _ => from..from,
    }
}

/// Takes what a machine sends. Ends with the process; a device that is down for a moment, as it is moved, is asked again.
fn take(shared: &Shared, from: usize) {
    let mut buffer = [0; FRAME_MAX];
    loop {
        let Ok(octets) = shared.ports[from].recv(&mut buffer) else {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        let frame = &buffer[..octets];
        for to in ports_of(frame, from, shared.ports.len()).filter(|to| *to != from) {
            let mut under_way = lock(&shared.under_way);
            let UnderWay { bad, frames, count, random } = &mut *under_way;
            let Some(wire) = bad.get_mut(&(from, to)) else {
                // Frames that a wire held back before it was mended may be overtaken, as by another way.
                drop(under_way);
                drop(shared.ports[to].send(frame));
                continue;
            };
            for due in wire.carry(octets, Instant::now(), random).into_iter().flatten() {
                if frames.len() < UNDER_WAY_MAX {
                    *count += 1;
                    frames.push(Reverse(Frame { due, number: *count, to, octets: frame.to_vec() }));
                    shared.comes.notify_one();
                }
            }
        }
    }
}

/// Hands over what is due. Ends with the process.
fn hand_over(shared: &Shared) {
    let mut under_way = lock(&shared.under_way);
    loop {
        let now = Instant::now();
        let wait = under_way.frames.peek().map(|Reverse(next)| next.due.saturating_duration_since(now));
        under_way = match wait {
            Some(Duration::ZERO) => {
                let frame = under_way.frames.pop();
                drop(under_way);
                // A machine that takes nothing loses it.
                frame.into_iter().for_each(|Reverse(frame)| drop(shared.ports[frame.to].send(&frame.octets)));
                lock(&shared.under_way)
            }
            Some(wait) => {
                shared.comes.wait_timeout(under_way, wait).unwrap_or_else(PoisonError::into_inner).0
            }
            None => shared.comes.wait(under_way).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// When each of a hundred frames of 1,000 octets arrives, in ms after the first was sent; one is sent each `every`.
    fn arrivals(quality: Quality, every: Duration) -> Vec<Vec<u64>> {
        let began = Instant::now();
        let mut wire = Wire::new(quality, began);
        let mut random = Random::new(7);
        let mut one = |n| {
            let arrivals = wire.carry(1_000, began + every * n, &mut random).into_iter().flatten();
            arrivals.map(|at| at.duration_since(began).as_millis() as u64).collect()
        };
        (0..100).map(&mut one).collect()
    }

    #[test]
    fn a_good_wire_carries_each_frame_at_once() {
        let expected: Vec<_> = (0..100).map(|n| vec![n]).collect();
        assert_eq!(arrivals(Quality::GOOD, MS), expected);
    }

    #[test]
    fn frames_come_late_and_in_order_unless_they_may_overtake() {
        let late = Quality { delay: (20 * MS, 80 * MS), ..Quality::GOOD };
        let in_order: Vec<u64> = arrivals(late, MS).concat();
        assert!(in_order.len() == 100 && in_order.is_sorted());
        assert!(in_order.iter().zip(0..).all(|(at, sent)| (sent + 20..=sent + 80 + 60).contains(at)));
        let overtaking = arrivals(Quality { overtakes: true, ..late }, MS).concat();
        assert!(overtaking.len() == 100 && !overtaking.is_sorted());
        assert!(overtaking.iter().zip(0..).all(|(at, sent)| (sent + 20..=sent + 80).contains(at)));
    }

    #[test]
    fn some_are_lost_and_some_come_twice() {
        let bad = Quality { loses: 30, repeats: 20, ..Quality::GOOD };
        let times: Vec<usize> = arrivals(bad, MS).iter().map(Vec::len).collect();
        let count = |wanted| times.iter().filter(|n| **n == wanted).count();
        assert!((15..45).contains(&count(0)) && (5..30).contains(&count(2)), "{times:?}");
    }

    #[test]
    fn a_narrow_wire_delays_and_then_drops() {
        // 100,000 octets a second are sent through 50,000: its buffer is full after half a second.
        let narrow = Quality { rate: Some(50_000), ..Quality::GOOD };
        let came = arrivals(narrow, 10 * MS);
        assert!(came[..20].iter().all(|at| at.len() == 1), "{came:?}");
        let lost = came.iter().filter(|at| at.is_empty()).count();
        assert!((20..40).contains(&lost), "{lost} were lost");
        let last = came.concat().last().copied().unwrap();
        assert!(last > 1_150 && last < 1_000 + 270, "{last}");
    }

    #[test]
    fn a_flapping_wire_is_broken_half_of_the_time() {
        let came = arrivals(Quality { flaps: Some(20 * MS), ..Quality::GOOD }, MS);
        for (n, arrivals) in came.iter().enumerate() {
            assert_eq!(arrivals.is_empty(), (n / 20).is_multiple_of(2), "frame {n}");
        }
    }

    #[test]
    fn a_frame_goes_to_its_address_or_to_all() {
        assert_eq!(ports_of(&[2, 0, 0, 0, 0, 3, 9, 9], 1, 4), 3..4);
        assert_eq!(ports_of(&[2, 0, 0, 0, 0, 4, 9, 9], 1, 4), 1..1, "nobody has it");
        assert_eq!(ports_of(&[0xff; 6], 1, 4), 0..4);
        assert_eq!(ports_of(&[], 1, 4), 1..1);
    }
}
