//! Who is who among the nodes: TLS 1.3 with certificates of the cluster's own authority, in both directions.

use std::sync::{Arc, PoisonError, RwLock};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// Why the certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TlsFault(pub String);

/// This node's identity among its peers. Clones share it.
#[derive(Clone)]
pub struct PeerTls(Arc<RwLock<Configs>>);

#[derive(Clone)]
struct Configs {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

/// The name that the certificate of a node carries as a DNS subject alternative name.
pub fn node_name(id: u64) -> String {
    format!("node-{id}.peer.holdfast.internal")
}

impl PeerTls {
    /// From the cluster's authorities and this node's chain and key.
    ///
    /// # Errors
    /// If a certificate does not parse or the key does not fit.
    pub fn new(
        authorities: Vec<CertificateDer<'static>>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<PeerTls, TlsFault> {
        let fault = |e: &dyn std::fmt::Display| TlsFault(e.to_string());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots.add(authority).map_err(|e| fault(&e))?;
        }
        let roots = Arc::new(roots);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| fault(&e))?;
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| fault(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(|e| fault(&e))?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| fault(&e))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(|e| fault(&e))?;
        Ok(PeerTls(Arc::new(RwLock::new(Configs { server: Arc::new(server), client: Arc::new(client) }))))
    }

    /// Takes the place of the identity that all clones share. Connections that are open keep what they have.
    pub fn replace_by(&self, other: &PeerTls) {
        let new = other.configs();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = new;
    }

    fn configs(&self) -> Configs {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        self.configs().server
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        self.configs().client
    }
}

/// Whether the certificate that a client showed is that of node `id`.
pub(crate) fn is_node(certificates: Option<&[CertificateDer<'_>]>, id: u64) -> bool {
    let Some(leaf) = certificates.and_then(|c| c.first()) else { return false };
    let Ok(leaf) = webpki::EndEntityCert::try_from(leaf) else { return false };
    let Ok(name) = ServerName::try_from(node_name(id)) else { return false };
    leaf.verify_is_valid_for_subject_name(&name).is_ok()
}
