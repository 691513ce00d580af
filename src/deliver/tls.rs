//! TLS on the way out: a session with any certificate, with one for the host's name, or with one that its TLSA records or pinned keys
//! vouch for.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::dane::{Anchors, Verifier};
use crate::pki::versions;
use crate::queue::command::TlsMin;

/// Takes any certificate, as `opportunistic` and `require` promise no more than encryption (RFC 7435). The peer must still
/// hold the certificate's key.
#[derive(Clone, Debug)]
pub(super) struct AnyCertificate(pub(super) Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// With which certificate of the host a session is good enough.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Trust {
    /// With any.
    Any,
    /// With one for this name that WebPKI vouches for.
    WebPki(String),
    /// With one that its TLSA records vouch for, or the keys that its route has pinned.
    Anchors(Arc<Anchors>),
}

/// The ways to be a TLS client.
#[derive(Clone)]
pub struct ClientTls {
    provider: Arc<CryptoProvider>,
    /// By the oldest version.
    any: [Arc<ClientConfig>; 2],
    web_pki: [Arc<ClientConfig>; 2],
}

impl ClientTls {
    /// With the roots that browsers trust, and more of the operator's own.
    ///
    /// # Errors
    /// If one of those is no authority's certificate, or the cryptography provider lacks TLS 1.2 or 1.3, which a build of ours does
    /// not.
    pub fn new(more: Vec<CertificateDer<'static>>) -> Result<ClientTls, rustls::Error> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        for authority in more {
            roots.add(authority)?;
        }
        let roots = Arc::new(roots);
        let any = |oldest| verified_by(&provider, oldest, Arc::new(AnyCertificate(provider.clone())));
        let web_pki = |oldest| {
            let verifier =
                WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone()).build();
            verified_by(&provider, oldest, verifier.map_err(|e| rustls::Error::General(e.to_string()))?)
        };
        Ok(ClientTls {
            any: [any(TlsMin::Tls12)?, any(TlsMin::Tls13)?],
            web_pki: [web_pki(TlsMin::Tls12)?, web_pki(TlsMin::Tls13)?],
            provider: provider.clone(),
        })
    }

    /// How a session is made.
    ///
    /// # Errors
    /// As [`ClientTls::new`].
    pub fn config(&self, trust: &Trust, oldest: TlsMin) -> Result<Arc<ClientConfig>, rustls::Error> {
        match trust {
            Trust::Any => Ok(self.any[oldest as usize].clone()),
            Trust::WebPki(_) => Ok(self.web_pki[oldest as usize].clone()),
            Trust::Anchors(anchors) => {
                let signatures = AnyCertificate(self.provider.clone());
                let verifier = Arc::new(Verifier { anchors: anchors.clone(), signatures });
                verified_by(&self.provider, oldest, verifier)
            }
        }
    }
}

fn verified_by(
    provider: &Arc<CryptoProvider>,
    oldest: TlsMin,
    verifier: Arc<dyn ServerCertVerifier>,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions(oldest))?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Ok(Arc::new(config))
}
