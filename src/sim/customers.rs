//! Customers' servers: they take mail, put it off, refuse it for good, answer late, and go away between the end of the data and the
//! reply. One of them is the senders' own, to which notices go.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use holdfast_cluster::net::{Listener, Stream};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::time::sleep;

use super::hold::Saying;
use super::mail::{Ledger, number_of};
use super::relay;
use super::world::{Chance, World, lock};
use crate::smtp::data::Decoder;

/// Domains, each with a server of its own; the first is the senders'.
pub(super) const DOMAINS: [&str; 3] = ["senders.test", "one.test", "two.test"];
/// Users of each; nobody takes mail for the last.
const USERS: [&str; 4] = ["ann", "bob", "cat", "nobody"];

/// Whether its server refuses a recipient for good.
pub(super) fn is_refused(recipient: &str) -> bool {
    recipient.starts_with("nobody@")
}

pub(super) fn address(host: u8) -> IpAddr {
    IpAddr::from([10, 0, 2, host])
}

pub(super) fn addresses() -> impl Iterator<Item = IpAddr> {
    (1..=DOMAINS.len() as u8).map(address)
}

/// One who is not refused.
pub(super) fn anybody() -> String {
    format!("{}@{}", USERS[0], DOMAINS[1])
}

/// One to four of the customers' users.
pub(super) fn some_recipients(chance: &mut Chance) -> Vec<String> {
    let mut recipients = std::collections::BTreeSet::new();
    for _ in 0..1 + chance.below(4) {
        // Few are for nobody.
        let of = if chance.below(8) == 0 { USERS.len() } else { USERS.len() - 1 };
        let user = USERS[chance.below(of as u64) as usize];
        recipients.insert(format!("{user}@{}", DOMAINS[1 + chance.below(2) as usize]));
    }
    recipients.into_iter().collect()
}

/// Starts a customer's server, if it is down.
pub(super) fn start(world: &mut World, address: IpAddr) {
    let (seed, ledger) = (world.chance.next(), world.ledger.clone());
    let domain = addresses().zip(DOMAINS).find(|(own, _)| *own == address).map_or("", |(_, domain)| domain);
    let host = world.others.get_mut(&address).expect("a customer");
    if host.is_up() {
        return;
    }
    host.start(seed, |_| async move {
        let door = SocketAddr::from((address, 25)).to_string();
        let Ok(listener) = Listener::bind(&door).await else { return };
        let mut chance = Chance(seed);
        while let Ok((stream, peer)) = listener.accept().await {
            let (stream, chance) = (BufReader::new(stream), Chance(chance.next()));
            tokio::spawn(serve(stream, relay::number(peer.ip()), domain, chance, ledger.clone()));
        }
    });
}

async fn say(c: &mut BufReader<Stream>, text: &str) -> Option<()> {
    c.write_all(format!("{text}\r\n").as_bytes()).await.ok()
}

async fn serve(
    mut c: BufReader<Stream>,
    node: Option<u64>,
    domain: &'static str,
    mut chance: Chance,
    ledger: Arc<Mutex<Ledger>>,
) -> Option<()> {
    let ledger = &*ledger;
    let mut recipients: Vec<String> = Vec::new();
    // Of the message under way: its number, and what came of it in chunks (RFC 3030).
    let (mut message, mut chunks) = (None, Vec::new());
    let takes_chunks = chance.below(2) == 0;
    say(&mut c, "220 customer.test").await?;
    loop {
        let mut line = String::new();
        if c.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        let is_calm = lock(ledger).is_over;
        let word = line.get(..4).unwrap_or("").to_ascii_uppercase();
        match word.as_str() {
            "EHLO" => {
                let chunking = if takes_chunks { "250-CHUNKING\r\n" } else { "" };
                say(&mut c, &format!("250-customer.test\r\n{chunking}250-PIPELINING\r\n250 8BITMIME"))
                    .await?;
            }
            "MAIL" | "RSET" => {
                if domain == DOMAINS[0] && word == "MAIL" && !line.contains("<>") {
                    lock(ledger).wrong.push(format!("what goes to a sender has one: {line}"));
                }
                recipients.clear();
                chunks.clear();
                message = line.split_once("<s").and_then(|(_, rest)| rest.split('@').next()?.parse().ok());
                say(&mut c, "250 2.0.0 ok").await?;
            }
            "RCPT" => {
                let recipient = line.split(['<', '>']).nth(1).unwrap_or("").to_owned();
                if !recipient.ends_with(&format!("@{domain}")) {
                    lock(ledger).wrong.push(format!("{recipient} is wanted of the server of {domain}"));
                }
                if is_refused(&recipient) {
                    say(&mut c, "550 5.1.1 no such user").await?;
                } else if !is_calm && chance.below(20) == 0 {
                    say(&mut c, "450 4.2.0 not now").await?;
                } else {
                    recipients.push(recipient);
                    say(&mut c, "250 2.1.5 ok").await?;
                }
            }
            "DATA" | "BDAT" if recipients.is_empty() => {
                // What comes behind a chunk's command is no command.
                if word == "BDAT" {
                    return None;
                }
                say(&mut c, "503 5.5.1 for whom").await?;
            }
            "DATA" => {
                say(&mut c, "354 go").await?;
                let octets = data(&mut c).await?;
                conclude(&mut c, node, &recipients, &octets, &mut chance, ledger).await?;
            }
            "BDAT" if takes_chunks => {
                let mut words = line.split_whitespace().skip(1);
                let length = words.next().and_then(|word| word.parse::<usize>().ok())?;
                let is_last = words.next().is_some();
                let held = message.zip(node).filter(|_| is_last).and_then(|(message, node)| {
                    lock(ledger).hold.last_chunk(message, node, recipients.len())
                });
                if let Some(number) = held {
                    wait_for_release(ledger, number).await;
                }
                let before = chunks.len();
                chunks.resize(before + length, 0);
                c.read_exact(&mut chunks[before..]).await.ok()?;
                match is_last {
                    false => say(&mut c, "250 2.0.0 more").await?,
                    true => {
                        let octets = std::mem::take(&mut chunks);
                        conclude(&mut c, node, &recipients, &octets, &mut chance, ledger).await?;
                    }
                }
            }
            "QUIT" => {
                say(&mut c, "221 2.0.0 bye").await?;
                return None;
            }
            _ => say(&mut c, "500 5.5.2 what").await?,
        }
    }
}

async fn wait_for_release(ledger: &Mutex<Ledger>, number: usize) {
    while lock(ledger).hold.held(number).is_some() {
        sleep(Duration::from_millis(1)).await;
    }
}

/// All of a message is here: takes it or not, and says so or not. Nothing if the connection is to end.
async fn conclude(
    c: &mut BufReader<Stream>,
    node: Option<u64>,
    recipients: &[String],
    octets: &[u8],
    chance: &mut Chance,
    ledger: &Mutex<Ledger>,
) -> Option<()> {
    node.into_iter().for_each(|node| lock(ledger).handed_off(node));
    let held = number_of(octets)
        .zip(node)
        .and_then(|(message, node)| lock(ledger).hold.dot(message, node, recipients.len()));
    if let Some((number, saying)) = held {
        if saying == Saying::Taken {
            take(&mut lock(ledger), recipients, octets);
        }
        wait_for_release(ledger, number).await;
        return say(c, if saying == Saying::Taken { "250 2.0.0 taken" } else { "554 5.7.1 not wanted" })
            .await;
    }
    let choice = if lock(ledger).is_over { 99 } else { chance.below(100) };
    if choice < 4 {
        return say(c, "451 4.3.0 not now").await;
    }
    if choice < 8 {
        sleep(chance.ms(100, 5000)).await;
    }
    let is_silent = (8..11).contains(&choice);
    if is_silent && choice != 8 {
        lock(ledger).ambiguous += recipients.len() as u64;
    }
    if choice != 8 {
        take(&mut lock(ledger), recipients, octets);
    }
    if is_silent {
        return None;
    }
    say(c, "250 2.0.0 taken").await
}

fn take(ledger: &mut Ledger, recipients: &[String], octets: &[u8]) {
    for recipient in recipients {
        let sender = recipient.strip_suffix("@senders.test").and_then(|user| user.strip_prefix('s'));
        match sender.and_then(|number| number.parse().ok()) {
            Some(number) => ledger.noticed(number, octets),
            None => ledger.taken(std::slice::from_ref(recipient), octets),
        }
    }
}

async fn data(c: &mut BufReader<Stream>) -> Option<Vec<u8>> {
    let (mut decoder, mut octets) = (Decoder::default(), Vec::new());
    loop {
        let buffer = c.fill_buf().await.ok()?;
        if buffer.is_empty() {
            return None;
        }
        let (done, used) = decoder.read(buffer, &mut octets);
        c.consume(used);
        if done {
            return Some(octets);
        }
    }
}
