//! Clients that send mail, each message once, and note what they are told.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use holdfast_cluster::net::{Stream, connect_from};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::time::{sleep, timeout};

use super::customers;
use super::mail::{Ledger, Told, is_long, octets_of, size_of};
use super::relay::{self, NODES};
use super::world::{Chance, World, lock};
use crate::smtp::data::Encoder;

/// Clients at the same time, at least and at most.
const CLIENTS: (u64, u64) = (4, 24);
/// How long one waits for a reply.
const PATIENCE: Duration = Duration::from_secs(120);

pub(super) fn address() -> IpAddr {
    IpAddr::from([10, 0, 1, 1])
}

/// Clients send from now on.
pub(super) fn start(world: &mut World) {
    let clients = CLIENTS.0 + world.chance.below(CLIENTS.1 - CLIENTS.0 + 1);
    let seeds: Vec<u64> = (0..=clients).map(|_| world.chance.next()).collect();
    let (ledger, host) = (world.ledger.clone(), world.others.get_mut(&address()).expect("a host for them"));
    host.start(seeds[0], |_| async move {
        for seed in &seeds[1..] {
            tokio::spawn(client(Chance(*seed), ledger.clone()));
        }
        std::future::pending::<()>().await;
    });
}

/// Nobody sends anything new.
pub(super) fn stop(world: &World) {
    lock(&world.ledger).is_over = true;
}

/// A client sends a message to a node, one that comes in one piece and has at least so many octets; its number. Whatever is said to it is in the ledger, and before that
/// [`Told::Nothing`].
pub(super) fn send_to(world: &World, node: u64, least: u64) -> Result<u64, String> {
    let recipients = [customers::anybody()];
    let number = {
        let mut ledger = lock(&world.ledger);
        loop {
            let number = ledger.send(&recipients);
            if !is_long(number) && size_of(number) >= least {
                break number;
            }
        }
    };
    let (ledger, door) = (world.ledger.clone(), SocketAddr::from((relay::address(node), 25)));
    let one = async move {
        let told = match greet(door).await {
            Some(mut c) => match send(&mut c, number, &recipients).await {
                None => Told::Nothing,
                Some(250) => Told::Accepted,
                Some(_) => Told::Refused,
            },
            None => Told::Refused,
        };
        lock(&ledger).answered(number, told);
    };
    let spawned = world.others[&address()].within(world.now(), || drop(tokio::spawn(one)));
    spawned.map(|()| number).ok_or_else(|| "the clients' host is down".into())
}

async fn greet(door: SocketAddr) -> Option<BufReader<Stream>> {
    let mut c = BufReader::new(connect_from(None, door).await.ok()?);
    let is_greeted =
        reply(&mut c).await == Some(220) && command(&mut c, "EHLO client.test").await == Some(250);
    is_greeted.then_some(c)
}

/// Each node takes a message now.
pub(super) fn probe(world: &mut World) -> Result<(), String> {
    let taken = Arc::new(Mutex::new(Vec::new()));
    for node in 1..=NODES {
        let (ledger, taken) = (world.ledger.clone(), taken.clone());
        let probe = async move {
            let door: SocketAddr = (relay::address(node), 25).into();
            // It may still say that it has no room, or that nobody leads.
            while probe_once(door, &ledger).await != Told::Accepted {
                sleep(Duration::from_secs(1)).await;
            }
            lock(&taken).push(node);
        };
        let now = world.now();
        let spawned = world.others[&address()].within(now, || drop(tokio::spawn(probe)));
        spawned.ok_or("the clients' host is down")?;
    }
    let what = "a message taken by each node after all was mended";
    world.wait_until(Duration::from_secs(20), what, |_| lock(&taken).len() as u64 == NODES)
}

async fn probe_once(door: SocketAddr, ledger: &Mutex<Ledger>) -> Told {
    let Some(mut c) = greet(door).await else { return Told::Refused };
    let recipients = [customers::anybody()];
    let number = lock(ledger).send(&recipients);
    let told = match send(&mut c, number, &recipients).await {
        None => Told::Nothing,
        Some(250) => Told::Accepted,
        Some(_) => Told::Refused,
    };
    lock(ledger).answered(number, told);
    told
}

async fn client(mut chance: Chance, ledger: Arc<Mutex<Ledger>>) {
    let ledger = || lock(&ledger);
    while !ledger().is_over {
        sleep(chance.ms(1, 400)).await;
        let node: SocketAddr = (relay::address(1 + chance.below(NODES)), 25).into();
        let Ok(Ok(stream)) = timeout(Duration::from_secs(5), connect_from(None, node)).await else {
            continue;
        };
        let mut c = BufReader::new(stream);
        if reply(&mut c).await.is_none() || command(&mut c, "EHLO client.test").await.is_none() {
            continue;
        }
        for _ in 0..1 + chance.below(4) {
            let recipients = customers::some_recipients(&mut chance);
            let number = ledger().send(&recipients);
            let answer = send(&mut c, number, &recipients).await;
            let told = match answer {
                None => Told::Nothing,
                Some(250) => Told::Accepted,
                Some(_) => Told::Refused,
            };
            ledger().answered(number, told);
            if answer.is_none() || ledger().is_over {
                break;
            }
            sleep(chance.ms(0, 100)).await;
        }
    }
}

async fn reply(c: &mut BufReader<Stream>) -> Option<u16> {
    loop {
        let mut line = String::new();
        match timeout(PATIENCE, c.read_line(&mut line)).await {
            Ok(Ok(read)) if read >= 4 => {}
            _ => return None,
        }
        if line.as_bytes().get(3) == Some(&b' ') {
            return line.get(..3)?.parse().ok();
        }
    }
}

async fn command(c: &mut BufReader<Stream>, text: &str) -> Option<u16> {
    timeout(PATIENCE, c.write_all(format!("{text}\r\n").as_bytes())).await.ok()?.ok()?;
    reply(c).await
}

/// The reply that decides about a message; none if there was none.
async fn send(c: &mut BufReader<Stream>, number: u64, recipients: &[String]) -> Option<u16> {
    let mut commands = vec![format!("MAIL FROM:<s{number}@senders.test>")];
    commands.extend(recipients.iter().map(|r| format!("RCPT TO:<{r}>")));
    commands.push("DATA".into());
    for text in commands {
        let code = command(c, &text).await;
        // Before the final dot nothing can have been kept.
        match code {
            Some(code) if code < 400 => {}
            Some(421) | None => return Some(421),
            Some(code) => {
                command(c, "RSET").await;
                return Some(code);
            }
        }
    }
    let (mut encoder, mut wire) = (Encoder::default(), Vec::new());
    encoder.write(octets_of(number).as_bytes(), &mut wire);
    timeout(PATIENCE, c.write_all(&wire)).await.ok()?.ok()?;
    command(c, ".").await
}
