//! Asking a node from the command line. If the node of the configuration is down, the others in its list are tried.
#![expect(
    clippy::disallowed_methods,
    reason = "this is the edge to the nodes' admin ports, and to the operator's key"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::api::{Failure, LINE_BYTES_MAX, Line, Request};
use crate::config::Config;

/// A request that a node answered with a failure.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.text)]
pub struct Refused(pub Failure);

/// Asks nodes of one cluster.
pub struct Client {
    tls: TlsConnector,
    /// Admin addresses with node ids, the configured node first.
    nodes: Vec<(u64, String)>,
}

impl Client {
    /// A client with an operator's identity: a file with certificate and key.
    ///
    /// # Errors
    /// If the files cannot be read.
    pub fn new(config: &Config, identity: &Path) -> anyhow::Result<Client> {
        let context = || format!("operator's identity {} (see --identity)", identity.display());
        let pem = std::fs::read(identity).with_context(context)?;
        let chain: Vec<CertificateDer> =
            CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().with_context(context)?;
        let key = PrivateKeyDer::from_pem_slice(&pem).with_context(context)?;
        let mut roots = rustls::RootCertStore::empty();
        for authority in CertificateDer::pem_file_iter(&config.admin.ca)
            .with_context(|| format!("[admin] ca = {}", config.admin.ca.display()))?
        {
            roots.add(authority?)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .with_context(context)?;
        let mut nodes: Vec<(u64, String)> =
            config.cluster.peers.iter().map(|p| (p.id, p.admin.clone())).collect();
        nodes.sort_by_key(|(id, _)| (*id != config.node.id, *id));
        Ok(Client { tls: TlsConnector::from(Arc::new(tls)), nodes })
    }

    /// Asks the first node that answers; `each` gets the items as they come.
    ///
    /// # Errors
    /// If no node answers, or the one that does says no.
    pub async fn ask(&self, request: &Request, each: &mut dyn FnMut(Value)) -> anyhow::Result<()> {
        let mut last = anyhow::anyhow!("no node is configured");
        for (id, address) in &self.nodes {
            match self.ask_node(*id, address, request, each).await {
                Err(e) if e.downcast_ref::<Refused>().is_none() => last = e,
                answered => return answered,
            }
        }
        Err(last)
    }

    /// Asks the leader; any node if there is none.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub async fn ask_leader(&self, request: &Request, each: &mut dyn FnMut(Value)) -> anyhow::Result<()> {
        let mut status = Value::Null;
        self.ask(&Request::Status, &mut |item| status = item).await?;
        // It may have come in after the file was written.
        let nodes = status["nodes"].as_array().into_iter().flatten();
        let leader = nodes.into_iter().find(|node| node["id"].is_u64() && node["id"] == status["leader"]);
        match leader.and_then(|node| Some((node["id"].as_u64()?, node["admin"].as_str()?))) {
            Some((id, address)) => self.ask_node(id, address, request, each).await,
            None => self.ask(request, each).await,
        }
    }

    async fn ask_node(
        &self,
        id: u64,
        address: &str,
        request: &Request,
        each: &mut dyn FnMut(Value),
    ) -> anyhow::Result<()> {
        let open = async {
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::try_from(holdfast_cluster::node_name(id))?;
            anyhow::Ok(self.tls.connect(name, stream).await?)
        };
        let context = || format!("node {id} at {address}");
        let mut stream = timeout(Duration::from_secs(5), open)
            .await
            .with_context(|| format!("node {id} at {address} did not answer"))?
            .with_context(context)?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line).await.with_context(context)?;
        let mut lines = BufReader::with_capacity(LINE_BYTES_MAX.min(64 << 10), stream).lines();
        loop {
            let line = timeout(Duration::from_secs(60), lines.next_line()).await;
            let Some(line) = line.with_context(context)?.with_context(context)? else {
                bail!("node {id} at {address} broke off");
            };
            match serde_json::from_str(&line).with_context(context)? {
                Line::Item(item) => each(item),
                Line::End { error: None } => return Ok(()),
                Line::End { error: Some(failure) } => return Err(Refused(failure).into()),
            }
        }
    }
}
