//! Certificates and keys: made by `init`, read at the start. A peer certificate that has expired is named; an SMTP certificate
//! that has expired is a warning and never a reason not to start.
#![expect(clippy::disallowed_methods, reason = "this is the edge to the key files")]

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use holdfast_cluster::{PeerTls, node_name};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::admin::api::OPERATOR_NAME;
use crate::clock;
use crate::config::Config;
use crate::queue::command::TlsMin;

/// How long certificates of the cluster are valid, days.
const VALID_DAYS: i64 = 825;
/// Warned of this long before they expire.
const WARN_DAYS: i64 = 30;

/// The cluster's authority, as `ca.key` makes it.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

fn valid_for(params: &mut CertificateParams, days: i64) {
    // Days back, for clocks that differ.
    let date = |offset_days: i64| {
        use chrono::Datelike;
        let day = clock::wall() + chrono::TimeDelta::days(offset_days);
        rcgen::date_time_ymd(day.year(), day.month() as u8, day.day() as u8)
    };
    params.not_before = date(-1 + days.min(0) * 2);
    params.not_after = date(days);
}

/// Writes a new file; one that exists is never overwritten.
///
/// # Errors
/// If it exists, or the system refuses.
pub fn write_new(path: &Path, contents: &str, mode: u32) -> anyhow::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .with_context(|| format!("writing {}", path.display()))?;
    file.write_all(contents.as_bytes()).with_context(|| format!("writing {}", path.display()))
}

impl Authority {
    /// Makes an authority and writes `ca.crt` and `ca.key`.
    ///
    /// # Errors
    /// If the files exist or cannot be written.
    pub fn create(dir: &Path, cluster: &str) -> anyhow::Result<Authority> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, format!("Holdfast cluster {cluster}"));
        valid_for(&mut params, 10 * 365);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        write_new(&dir.join("ca.crt"), &certificate.pem(), 0o644)?;
        write_new(&dir.join("ca.key"), &key.serialize_pem(), 0o600)?;
        Ok(Authority { issuer: Issuer::new(params, key) })
    }

    /// The authority that [`Authority::create`] made.
    ///
    /// # Errors
    /// If its files cannot be read.
    pub fn open(dir: &Path) -> anyhow::Result<Authority> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        let key = KeyPair::from_pem(&read("ca.key")?).with_context(|| format!("{}/ca.key", dir.display()))?;
        let issuer = Issuer::from_ca_cert_pem(&read("ca.crt")?, key);
        Ok(Authority { issuer: issuer.with_context(|| format!("{}/ca.crt", dir.display()))? })
    }

    fn issue(&self, names: Vec<String>, common_name: &str, days: i64) -> anyhow::Result<(String, String)> {
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        valid_for(&mut params, days);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// Writes `node-ID.crt` and `node-ID.key`, for peers, operators and as a first certificate for SMTP.
    ///
    /// # Errors
    /// If the files exist or cannot be written.
    pub fn node(&self, dir: &Path, id: u64, host: &str) -> anyhow::Result<()> {
        let (certificate, key) =
            self.issue(vec![node_name(id), host.into()], &format!("node {id}"), VALID_DAYS)?;
        write_new(&dir.join(format!("node-{id}.crt")), &certificate, 0o644)?;
        write_new(&dir.join(format!("node-{id}.key")), &key, 0o600)
    }

    /// Writes `operator.pem`: certificate and key of the operator.
    ///
    /// # Errors
    /// If the file exists or cannot be written.
    pub fn operator(&self, dir: &Path) -> anyhow::Result<()> {
        let (certificate, key) = self.issue(vec![OPERATOR_NAME.into()], "operator", VALID_DAYS)?;
        write_new(&dir.join("operator.pem"), &format!("{certificate}{key}"), 0o600)
    }
}

fn chain(setting: &str, path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let context = || format!("{setting} = {}", path.display());
    let chain: Vec<_> = CertificateDer::pem_file_iter(path)
        .with_context(context)?
        .collect::<Result<_, _>>()
        .with_context(context)?;
    if chain.is_empty() {
        bail!("{setting} = {}: no certificate in it", path.display());
    }
    Ok(chain)
}

fn key(setting: &str, path: &Path) -> anyhow::Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path).with_context(|| format!("{setting} = {}", path.display()))
}

/// A certificate of this node's, and when it ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The setting that names its file.
    pub setting: String,
    /// The file.
    pub path: PathBuf,
    /// Unix time, seconds.
    pub expires_unix_s: i64,
}

impl Certificate {
    fn of(setting: &str, path: &Path, chain: &[CertificateDer<'_>]) -> Option<Certificate> {
        let (_, leaf) = X509Certificate::from_der(chain.first()?).ok()?;
        let expires_unix_s = leaf.validity().not_after.timestamp();
        Some(Certificate { setting: setting.into(), path: path.into(), expires_unix_s })
    }

    /// Days until it ends; negative if it has ended.
    fn days_left(&self) -> i64 {
        (self.expires_unix_s - clock::unix_s() as i64).div_euclid(86_400)
    }

    /// What to do about it, if it ends within a month or has ended.
    pub fn warning(&self) -> Option<String> {
        let state = match self.days_left() {
            days if days < 0 => "has expired".into(),
            days if days < WARN_DAYS => format!("expires in {days} days"),
            _ => return None,
        };
        Some(format!("{} = {}: {state}; renew it", self.setting, self.path.display()))
    }
}

/// This node's identity among its peers, and all of its certificates.
///
/// # Errors
/// If a file cannot be read, or the peer certificate has expired.
pub fn peer_tls(config: &Config) -> anyhow::Result<(PeerTls, Vec<Certificate>)> {
    let c = &config.cluster;
    let own = chain("[cluster] cert", &c.cert)?;
    let mut certificates: Vec<Certificate> =
        Certificate::of("[cluster] cert", &c.cert, &own).into_iter().collect();
    if let Some(days) = certificates.first().map(Certificate::days_left).filter(|days| *days < 0) {
        bail!("[cluster] cert = {}: expired {} days ago; renew it", c.cert.display(), -days);
    }
    let smtp = config.smtp.tls_cert.iter().map(|path| ("[smtp] tls_cert".to_string(), path));
    let listeners = config
        .smtp
        .listener
        .iter()
        .filter_map(|l| Some((format!("[[smtp.listener]] {} tls_cert", l.name), l.tls_cert.as_ref()?)));
    let admin = [("[admin] cert".to_string(), &config.admin.cert)];
    for (setting, path) in smtp.chain(listeners).chain(admin) {
        certificates.extend(Certificate::of(&setting, path, &chain(&setting, path)?));
    }
    certificates.iter().filter_map(Certificate::warning).for_each(|w| tracing::warn!("{w}"));
    is_of_node(config, &own)?;
    let tls = PeerTls::new(chain("[cluster] ca", &c.ca)?, own, key("[cluster] key", &c.key)?)
        .with_context(|| format!("[cluster] cert = {}, key = {}", c.cert.display(), c.key.display()))?;
    Ok((tls, certificates))
}

/// Whether a chain is what the peers will want to see: this node's, under an authority of the cluster.
fn is_of_node(config: &Config, own: &[CertificateDer<'_>]) -> anyhow::Result<()> {
    let (c, id) = (&config.cluster, config.node.id);
    let context = || format!("[cluster] cert = {}", c.cert.display());
    let leaf = own.first().with_context(context)?;
    let leaf = webpki::EndEntityCert::try_from(leaf).with_context(context)?;
    let name = rustls::pki_types::ServerName::try_from(node_name(id)).with_context(context)?;
    if leaf.verify_is_valid_for_subject_name(&name).is_err() {
        bail!("{}: is not the certificate of node {id}; it must carry the name {}", context(), node_name(id));
    }
    let authorities = chain("[cluster] ca", &c.ca)?;
    let anchors: Vec<_> = authorities
        .iter()
        .map(webpki::anchor_from_trusted_cert)
        .collect::<Result<_, _>>()
        .with_context(context)?;
    let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.all;
    let now = rustls::pki_types::UnixTime::since_unix_epoch(std::time::Duration::from_secs(clock::unix_s()));
    let usage = webpki::KeyUsage::client_auth();
    leaf.verify_for_usage(algorithms, &anchors, &own[1..], now, usage, None, None)
        .with_context(|| format!("{}: not under [cluster] ca = {}", context(), c.ca.display()))?;
    Ok(())
}

/// TLS for operators: only certificates of the authority are let in.
///
/// # Errors
/// If a file cannot be read.
pub fn admin_tls(config: &Config) -> anyhow::Result<TlsAcceptor> {
    let a = &config.admin;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    for authority in chain("[admin] ca", &a.ca)? {
        roots.add(authority).with_context(|| format!("[admin] ca = {}", a.ca.display()))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain("[admin] cert", &a.cert)?, key("[admin] key", &a.key)?)
        .with_context(|| format!("[admin] cert = {}, key = {}", a.cert.display(), a.key.display()))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Authorities that count beside the public ones where mail goes out.
///
/// # Errors
/// If the file cannot be read.
pub fn more_authorities(config: &Config) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let path = &config.delivery.ca;
    if path.as_os_str().is_empty() { Ok(Vec::new()) } else { chain("[delivery] ca", path) }
}

/// The versions of TLS from the oldest on that is wanted.
pub fn versions(oldest: TlsMin) -> &'static [&'static rustls::SupportedProtocolVersion] {
    static ONLY_13: [&rustls::SupportedProtocolVersion; 1] = [&rustls::version::TLS13];
    match oldest {
        TlsMin::Tls12 => rustls::ALL_VERSIONS,
        TlsMin::Tls13 => &ONLY_13,
    }
}

/// TLS for mail: 1.2 and 1.3 (RFC 8996 forbids what is older). `None` without a certificate.
///
/// # Errors
/// If a file cannot be read or the key does not fit.
pub fn smtp_tls(
    cert: Option<&Path>,
    key_file: Option<&Path>,
    oldest: TlsMin,
) -> anyhow::Result<Option<TlsAcceptor>> {
    let (Some(cert), Some(key_file)) = (cert, key_file) else { return Ok(None) };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions(oldest))?
        .with_no_client_auth()
        .with_single_cert(chain("tls_cert", cert)?, key("tls_key", key_file)?)
        .with_context(|| format!("tls_cert = {}, tls_key = {}", cert.display(), key_file.display()))?;
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}

/// Protocol and cipher of a session, as the log and trace headers name them.
pub fn session_text(session: &rustls::CommonState) -> String {
    let version = match session.protocol_version() {
        Some(rustls::ProtocolVersion::TLSv1_3) => "TLSv1.3",
        _ => "TLSv1.2",
    };
    let cipher = session.negotiated_cipher_suite().map(|c| format!("{:?}", c.suite()));
    format!("{version} with cipher {}", cipher.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The files of node 1 with peer certificates that are valid for so many days.
    fn load(days: i64) -> anyhow::Result<Vec<String>> {
        load_as(1, days, false)
    }

    fn load_as(node: u64, days: i64, other_authority: bool) -> anyhow::Result<Vec<String>> {
        let dir = tempfile::tempdir()?;
        let pki = dir.path().join("pki");
        std::fs::create_dir_all(&pki)?;
        let authority = Authority::create(&pki, "test")?;
        let (certificate, key) = authority.issue(vec![node_name(node)], "node", days)?;
        if other_authority {
            std::fs::remove_file(pki.join("ca.crt"))?;
            std::fs::remove_file(pki.join("ca.key"))?;
            Authority::create(&pki, "other")?;
        }
        write_new(&pki.join("node-1.crt"), &certificate, 0o644)?;
        write_new(&pki.join("node-1.key"), &key, 0o600)?;
        let file = dir.path().join("node-1.toml");
        std::fs::write(&file, include_str!("../config/node-1.toml"))?;
        Ok(peer_tls(&Config::load(&file)?)?.1.iter().filter_map(Certificate::warning).collect())
    }

    #[test]
    fn an_expired_peer_certificate_is_named_and_an_old_one_warned_of() {
        let error = load(-3).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("node-1.crt") && error.contains("expired"), "{error}");
        // The same file serves all in this example, so there is a warning for each use.
        let warnings = load(10).unwrap();
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        for (warning, setting) in warnings.iter().zip(["[cluster] cert", "[smtp] tls_cert", "[admin] cert"]) {
            assert!(warning.starts_with(setting), "{warning}");
        }
        assert!(load(400).unwrap().is_empty());
    }

    /// Peers would refuse it, but only when they connect again.
    #[test]
    fn a_peer_certificate_of_another_node_or_authority_is_refused_at_once() {
        let error = load_as(2, 400, false).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("not the certificate of node 1"), "{error}");
        let error = load_as(1, 400, true).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("not under [cluster] ca"), "{error}");
    }
}
