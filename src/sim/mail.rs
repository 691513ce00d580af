//! What was sent, what its senders were told, and what customers took: the judges' evidence. Messages are made from their number, so that
//! octets can be compared without being kept.

use std::collections::BTreeMap;
use std::time::Duration;

use holdfast_storage::disk::sim::SimDisk;

use super::customers::is_refused;
use super::hold::Hold;
use super::succession::Succession;
use super::world::Chance;

/// Stands in each message at the beginning, at the end and every so many lines, each time with another number behind it: which message, and
/// which of its marks.
pub(super) const MARK: &str = "HFCANARY-";
/// Lines from one mark to the next.
const LINES: u64 = 256;
/// Lines of a long message: some 700 KB, which come in three pieces.
const LONG: u64 = 20_000;
/// So often one piece of it ends and another begins.
const BOUNDARIES: u64 = 2;
/// A message has fewer marks than this.
const MARKS_MAX: u64 = 1 << 16;

/// The message whose mark has this number.
pub(super) fn marked(mark: u64) -> u64 {
    mark / MARKS_MAX
}

/// Whether a mark is the one in its message's header.
pub(super) fn is_first(mark: u64) -> bool {
    mark.is_multiple_of(MARKS_MAX)
}

/// Whether a message comes in several pieces.
pub(super) fn is_long(number: u64) -> bool {
    lines_of(&mut Chance(number)) == LONG
}

/// Octets of a message, more or less.
pub(super) fn size_of(number: u64) -> u64 {
    lines_of(&mut Chance(number)) * 35
}

/// The numbers of a message's marks.
fn marks_of(number: u64) -> std::ops::Range<u64> {
    let first = number * MARKS_MAX;
    first..first + 2 + lines_of(&mut Chance(number)) / LINES
}

/// What a sender knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// The connection was lost before an answer, or it is still waited for.
    Nothing,
    /// 250.
    Accepted,
    /// 4yz or 5yz.
    Refused,
}

/// A message.
#[derive(Debug)]
pub(super) struct Mail {
    pub(super) told: Told,
    /// By recipient: how often it was taken.
    pub(super) taken: BTreeMap<String, u32>,
    /// By recipient: how often the sender was told that it failed.
    pub(super) noticed: BTreeMap<String, u32>,
}

/// All messages.
pub(super) struct Ledger {
    pub(super) mails: BTreeMap<u64, Mail>,
    /// By message and recipient: the id of the notice that told of it.
    notices: BTreeMap<(u64, String), String>,
    /// What must never be.
    pub(super) wrong: Vec<String>,
    /// Recipients in hand-offs whose reply was withheld on purpose: each may cost a repetition.
    pub(super) ambiguous: u64,
    /// Nothing new is sent, and customers have no whims any more.
    pub(super) is_over: bool,
    /// Who leads and who hands off.
    pub(super) succession: Succession,
    /// Hand-offs that stand still.
    pub(super) hold: Hold,
    /// The time, for all hosts the same.
    pub(super) now: Duration,
    disks: Vec<SimDisk>,
}

impl Ledger {
    pub(super) fn new(disks: Vec<SimDisk>) -> Ledger {
        Ledger {
            mails: BTreeMap::new(),
            notices: BTreeMap::new(),
            wrong: Vec::new(),
            ambiguous: 0,
            is_over: false,
            succession: Succession::default(),
            hold: Hold::default(),
            now: Duration::ZERO,
            disks,
        }
    }

    /// A new message for some recipients.
    pub(super) fn send(&mut self, recipients: &[String]) -> u64 {
        let number = self.mails.len() as u64 + 1;
        let none: BTreeMap<String, u32> = recipients.iter().map(|r| (r.clone(), 0)).collect();
        self.mails.insert(number, Mail { told: Told::Nothing, taken: none.clone(), noticed: none });
        number
    }

    /// Its sender was answered. At the moment of a 250 it is on two disks, whatever happens next, as long as somebody waits for it.
    pub(super) fn answered(&mut self, number: u64, told: Told) {
        let Some(mail) = self.mails.get_mut(&number) else { return };
        mail.told = told;
        let waits = |r: &String, taken: u32| taken == 0 && mail.noticed[r] == 0;
        let waiting: Vec<&String> =
            mail.taken.iter().filter(|(r, n)| waits(r, **n)).map(|(r, _)| r).collect();
        if told == Told::Accepted && !waiting.is_empty() {
            let all = marks_of(number);
            let least = match waiting.iter().all(|r| is_refused(r)) {
                // Only a notice may be left, which has the message's header.
                true => 1,
                // Where one piece ends and the next begins a mark may stand in both, and is not found.
                false if is_long(number) => all.end - all.start - BOUNDARIES,
                false => all.end - all.start,
            };
            let has_all = |disk: &&SimDisk| disk.marks_within(all.clone()).len() as u64 >= least;
            let copies = self.disks.iter().filter(has_all).count();
            if copies < 2 {
                let found: Vec<usize> =
                    self.disks.iter().map(|disk| disk.marks_within(all.clone()).len()).collect();
                self.wrong.push(format!(
                    "message {number} was acknowledged and is on {copies} disks: of {least} marks each has {found:?}"
                ));
            }
        }
    }

    /// A customer has the final dot of a node's.
    pub(super) fn handed_off(&mut self, node: u64) {
        self.wrong.extend(self.succession.hands_off(node, self.now).err());
    }

    /// A customer has taken a message for recipients; `octets` are what it got.
    pub(super) fn taken(&mut self, recipients: &[String], octets: &[u8]) {
        let Some((number, mail)) = number_of(octets).and_then(|n| Some((n, self.mails.get_mut(&n)?))) else {
            self.wrong.push(format!("a message that nobody sent came for {recipients:?}"));
            return;
        };
        if !octets.ends_with(octets_of(number).as_bytes()) {
            self.wrong.push(format!("message {number} came altered"));
        }
        for recipient in recipients {
            if is_refused(recipient) {
                self.wrong.push(format!("message {number} was taken for {recipient}"));
            }
            match mail.taken.get_mut(recipient) {
                Some(count) => *count += 1,
                None => self.wrong.push(format!("message {number} came for {recipient}")),
            }
        }
    }

    /// A notice has come back to the sender of message `number`.
    pub(super) fn noticed(&mut self, number: u64, octets: &[u8]) {
        let text = String::from_utf8_lossy(octets);
        let Some(mail) = self.mails.get_mut(&number) else {
            self.wrong.push(format!("a notice about message {number}, which nobody sent"));
            return;
        };
        let about = text.lines().filter_map(|line| line.strip_prefix("Final-Recipient: rfc822; "));
        let about: Vec<&str> = about.map(str::trim).collect();
        if about.is_empty() {
            self.wrong.push(format!("what came to the sender of message {number} is no notice"));
        }
        let own =
            text.lines().find_map(|line| line.strip_prefix("Message-ID: ")).unwrap_or("none").to_string();
        for recipient in about {
            match mail.noticed.get_mut(recipient) {
                Some(count) if is_refused(recipient) => *count += 1,
                Some(_) => self
                    .wrong
                    .push(format!("a notice about {recipient} of message {number}, whom nobody refused")),
                None => self.wrong.push(format!("a notice about {recipient} of message {number}")),
            }
            let known = self.notices.entry((number, recipient.to_string())).or_insert_with(|| own.clone());
            if *known != own {
                self.wrong
                    .push(format!("two notices, {known} and {own}, about {recipient} of message {number}"));
            }
        }
    }
}

/// The message that these octets carry.
pub(super) fn number_of(octets: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(octets);
    let digits = text.split(MARK).nth(1)?.get(..16)?;
    Some(marked(u64::from_str_radix(digits, 16).ok()?))
}

/// 16 hexadecimal digits.
fn push_digits(text: &mut String, number: u64) {
    let digit = |n: u64| char::from(b"0123456789abcdef"[(n & 15) as usize]);
    text.extend((0..16).rev().map(|n| digit(number >> (4 * n))));
}

fn lines_of(chance: &mut Chance) -> u64 {
    match chance.below(40) {
        0 => LONG,
        1..4 => 2_000,
        _ => 2 + chance.below(200),
    }
}

/// The octets of a message.
pub(super) fn octets_of(number: u64) -> String {
    let mut chance = Chance(number);
    let lines = lines_of(&mut chance);
    let mut marks = marks_of(number);
    let mut mark = |text: &mut String| {
        text.push_str(MARK);
        push_digits(text, marks.next().expect("as many as there are"));
        text.push_str("\r\n");
    };
    let mut text = format!("From: s{number}@senders.test\r\nSubject: simulated\r\nX-Mark: ");
    mark(&mut text);
    text.push_str("\r\n");
    for line in 1..=lines {
        text.push('.');
        push_digits(&mut text, chance.next());
        push_digits(&mut text, chance.next());
        text.push_str("\r\n");
        if line.is_multiple_of(LINES) {
            mark(&mut text);
        }
    }
    mark(&mut text);
    text
}
