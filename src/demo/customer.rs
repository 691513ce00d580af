//! The customer's server of the demonstration: takes mail, with STARTTLS if it is asked for, and prints a line for each copy:
//! its name, and whether its octets are those that were sent.
#![expect(clippy::disallowed_methods, reason = "a server of its own, on a free port")]

use std::path::PathBuf;

use clap::Args;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::pki::smtp_tls;
use crate::queue::command::TlsMin;
use crate::smtp::data::Decoder;

/// Its certificate.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Certificate chain
    #[arg(long)]
    cert: PathBuf,
    /// Key
    #[arg(long)]
    key: PathBuf,
}

/// A copy that was taken.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    /// How often.
    pub times: u64,
    /// Whether all its octets were right each time.
    pub intact: bool,
}

/// Serves until it is killed.
///
/// # Errors
/// If it cannot listen.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let tls = smtp_tls(Some(&options.cert), Some(&options.key), TlsMin::default())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_addr()?);
        loop {
            let (stream, _) = listener.accept().await?;
            let tls = tls.clone();
            tokio::spawn(async move { drop(serve(BufReader::new(Box::new(stream)), tls).await) });
        }
    })
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

async fn say(c: &mut BufReader<Box<dyn Stream>>, text: &str) -> std::io::Result<()> {
    c.write_all(text.as_bytes()).await?;
    c.flush().await
}

async fn serve(stream: BufReader<Box<dyn Stream>>, tls: Option<TlsAcceptor>) -> std::io::Result<()> {
    let mut c = stream;
    let mut recipients: Vec<String> = Vec::new();
    say(&mut c, "220 customer.demo.example\r\n").await?;
    loop {
        let mut line = String::new();
        if c.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let word: String = line.chars().take(4).collect::<String>().to_ascii_uppercase();
        match word.as_str() {
            "EHLO" => {
                say(
                    &mut c,
                    "250-customer.demo.example\r\n250-PIPELINING\r\n250-STARTTLS\r\n250 8BITMIME\r\n",
                )
                .await?;
            }
            "STAR" => {
                let Some(tls) = &tls else { return Ok(()) };
                say(&mut c, "220 go\r\n").await?;
                let stream = tls.accept(c.into_inner()).await?;
                c = BufReader::new(Box::new(stream));
            }
            "MAIL" | "RSET" => {
                recipients.clear();
                say(&mut c, "250 ok\r\n").await?;
            }
            "RCPT" => {
                let address = line.split(['<', '@']).nth(1).unwrap_or("").to_string();
                recipients.push(address);
                say(&mut c, "250 ok\r\n").await?;
            }
            "DATA" => {
                say(&mut c, "354 go\r\n").await?;
                let (mut decoder, mut octets) = (Decoder::default(), Vec::new());
                loop {
                    let buffer = c.fill_buf().await?;
                    if buffer.is_empty() {
                        return Ok(());
                    }
                    let (done, used) = decoder.read(buffer, &mut octets);
                    c.consume(used);
                    if done {
                        break;
                    }
                }
                let (name, intact) = look(&octets);
                for recipient in &recipients {
                    println!("{name}/{recipient} {}", if intact { "intact" } else { "altered" });
                }
                say(&mut c, "250 taken\r\n").await?;
            }
            "QUIT" => return say(&mut c, "221 bye\r\n").await,
            _ => say(&mut c, "500 what?\r\n").await?,
        }
    }
}

/// The message's name, and whether everything behind the relay's header is as it was sent.
fn look(octets: &[u8]) -> (String, bool) {
    let find = |needle: &str| memchr::memmem::find(octets, needle.as_bytes());
    let field = |at: usize| {
        let rest = &octets[at..];
        let end = memchr::memchr(b'\r', rest).unwrap_or(rest.len());
        String::from_utf8_lossy(&rest[..end]).into_owned()
    };
    let name = find("X-Demo-Name: ").map_or("?".into(), |at| field(at + 13));
    let Some(sum_at) = find("X-Demo-Sum: ") else { return (name, false) };
    let sum = field(sum_at + 12);
    let body = &octets[(sum_at + 12 + sum.len() + 2).min(octets.len())..];
    // Nothing but the relay's own Received header stands before.
    let before = &octets[..sum_at];
    let own = before.starts_with(b"Received: ") && memchr::memmem::find_iter(before, b"\r\n").count() <= 5;
    (name, own && format!("{:08x}", crc32fast::hash(body)) == sum)
}
