//! Pure. DANE for SMTP (RFC 7672, RFC 7671): which TLSA records can be used, and whether a certificate is what they say.
//!
//! | usage | what it vouches for | names and dates |
//! | --- | --- | --- |
//! | 0, 1 (PKIX) | nothing here: unusable (RFC 7672 §3.1.3) | |
//! | 2 (DANE-TA) | an authority that the server sends along | checked |
//! | 3 (DANE-EE) | the server's own certificate or key | not looked at (RFC 7672 §3.1.1) |

use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, SHA512, digest};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::tls::AnyCertificate;

/// Records of one name that are looked at; a name has two or three.
const RECORDS_MAX: usize = 32;

/// Usage of a record that names an authority.
const TRUST_ANCHOR: u8 = 2;
/// Usage of a record that names the server's own certificate or key.
const END_ENTITY: u8 = 3;

/// A TLSA record (RFC 6698 §2.1).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tlsa {
    /// Certificate usage.
    pub usage: u8,
    /// 0 for the whole certificate, 1 for its public key.
    pub selector: u8,
    /// 0 for the octets themselves, 1 for their SHA-256, 2 for their SHA-512.
    pub matching: u8,
    /// What they are compared with.
    pub data: Vec<u8>,
}

impl Tlsa {
    fn is_usable(&self) -> bool {
        let length = match self.matching {
            0 => !self.data.is_empty(),
            1 => self.data.len() == 32,
            2 => self.data.len() == 64,
            _ => false,
        };
        matches!(self.usage, TRUST_ANCHOR | END_ENTITY) && self.selector <= 1 && length
    }

    fn matches(&self, certificate: &CertificateDer<'_>) -> bool {
        let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return false };
        let selected = if self.selector == 0 { certificate.as_ref() } else { parsed.public_key().raw };
        match self.matching {
            1 => digest(&SHA256, selected).as_ref() == self.data,
            2 => digest(&SHA512, selected).as_ref() == self.data,
            _ => selected == self.data,
        }
    }
}

/// The usable records of a server, and the names that a certificate under an authority may carry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Anchors {
    records: Vec<Tlsa>,
    names: Vec<String>,
    /// What they are to people.
    what: &'static str,
}

impl Anchors {
    /// The keys that a route has pinned, for a host of this name: as good as TLSA records of usage 3 for them.
    pub fn of_pins(pins: &[[u8; 32]], name: &str) -> Option<Anchors> {
        let pinned =
            |pin: &[u8; 32]| Tlsa { usage: END_ENTITY, selector: 1, matching: 1, data: pin.to_vec() };
        let anchors = Anchors::new(pins.iter().map(pinned).collect(), vec![name.to_owned()])?;
        Some(Anchors { what: "pinned key", ..anchors })
    }

    /// Keeps the records that can be used; `None` if there are none. Where there are several digests of one thing only the strongest
    /// counts (RFC 7671 §9). `names` are the server's name, and the domain whose MX it is.
    pub fn new(records: Vec<Tlsa>, names: Vec<String>) -> Option<Anchors> {
        let mut usable: Vec<Tlsa> = records.into_iter().take(RECORDS_MAX).filter(Tlsa::is_usable).collect();
        let strong: Vec<(u8, u8)> =
            usable.iter().filter(|r| r.matching == 2).map(|r| (r.usage, r.selector)).collect();
        usable.retain(|r| r.matching != 1 || !strong.contains(&(r.usage, r.selector)));
        (!usable.is_empty()).then_some(Anchors { records: usable, names, what: "TLSA record" })
    }

    /// The name that the server is asked for (RFC 7672 §8.1).
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// Whether a chain is what the records say.
    ///
    /// # Errors
    /// Why it is not.
    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
        provider: &CryptoProvider,
    ) -> Result<(), Error> {
        if self.records.iter().any(|r| r.usage == END_ENTITY && r.matches(leaf)) {
            return Ok(());
        }
        let authorities = self.records.iter().filter(|r| r.usage == TRUST_ANCHOR);
        // An authority that is published whole need not be sent along.
        let whole = authorities.clone().filter(|r| (r.selector, r.matching) == (0, 0));
        let published: Vec<CertificateDer<'_>> =
            whole.map(|r| CertificateDer::from(r.data.as_slice())).collect();
        let sent = others.iter().filter(|c| authorities.clone().any(|r| r.matches(c)));
        let trusted: Vec<_> =
            sent.chain(&published).filter_map(|c| webpki::anchor_from_trusted_cert(c).ok()).collect();
        if trusted.is_empty() {
            return Err(Error::General(format!("no {} matches the certificate", self.what)));
        }
        let refused = |e: webpki::Error| Error::General(format!("under the authority of TLSA: {e}"));
        let leaf = EndEntityCert::try_from(leaf).map_err(refused)?;
        let algorithms = provider.signature_verification_algorithms.all;
        leaf.verify_for_usage(algorithms, &trusted, others, now, KeyUsage::server_auth(), None, None)
            .map_err(refused)?;
        let carries = |name: &String| {
            ServerName::try_from(name.as_str())
                .is_ok_and(|name| leaf.verify_is_valid_for_subject_name(&name).is_ok())
        };
        if self.names.iter().any(carries) { Ok(()) } else { Err(CertificateError::NotValidForName.into()) }
    }
}

/// Takes the certificate that the records vouch for and no other.
#[derive(Debug)]
pub(super) struct Verifier {
    pub(super) anchors: Arc<Anchors>,
    pub(super) signatures: AnyCertificate,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.anchors.check(leaf, others, now, &self.signatures.0)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signatures.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signatures.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signatures.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    use super::*;

    struct Chain {
        leaf: CertificateDer<'static>,
        authority: CertificateDer<'static>,
    }

    fn chain(name: &str, days: i64) -> Chain {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let authority = params.self_signed(&key).unwrap();
        let issuer = Issuer::new(params, key);
        let mut params = CertificateParams::new(vec![name.to_string()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(if days < 0 { 2021 } else { 2120 }, 1, 1);
        let leaf = params.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap();
        Chain { leaf: leaf.der().clone(), authority: authority.der().clone() }
    }

    fn record(usage: u8, selector: u8, matching: u8, of: &CertificateDer<'_>) -> Tlsa {
        let (_, parsed) = X509Certificate::from_der(of).unwrap();
        let selected = if selector == 0 { of.as_ref() } else { parsed.public_key().raw };
        let data = match matching {
            1 => digest(&SHA256, selected).as_ref().to_vec(),
            2 => digest(&SHA512, selected).as_ref().to_vec(),
            _ => selected.to_vec(),
        };
        Tlsa { usage, selector, matching, data }
    }

    fn check(records: Vec<Tlsa>, leaf: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> bool {
        let Some(anchors) = Anchors::new(records, vec!["mx.example".into(), "example".into()]) else {
            return false;
        };
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(1_750_000_000));
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        anchors.check(leaf, others, now, &provider).is_ok()
    }

    #[test]
    fn the_table() {
        let good = chain("mx.example", 100);
        let (stranger, old) = (chain("stranger.example", 100), chain("mx.example", -1));
        let all = [good.authority.clone()];
        for (selector, matching) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
            let of = |usage, certificate| vec![record(usage, selector, matching, certificate)];
            let what = format!("{selector} {matching}");
            assert!(check(of(3, &good.leaf), &good.leaf, &[]), "3 {what}");
            assert!(check(of(3, &stranger.leaf), &stranger.leaf, &[]), "3 {what}: a name is not looked at");
            assert!(check(of(3, &old.leaf), &old.leaf, &[]), "3 {what}: nor is a date");
            assert!(!check(of(3, &stranger.leaf), &good.leaf, &all), "3 {what}: another certificate");
            assert!(!check(of(3, &good.authority), &good.leaf, &all), "3 {what}: not the server's own");
            assert!(check(of(2, &good.authority), &good.leaf, &all), "2 {what}");
            assert!(!check(of(2, &good.leaf), &good.leaf, &all), "2 {what}: not an authority");
            let others = [stranger.authority.clone()];
            assert!(!check(of(2, &stranger.authority), &stranger.leaf, &others), "2 {what}: another name");
            assert!(!check(of(2, &stranger.authority), &good.leaf, &others), "2 {what}: did not sign it");
            assert!(
                !check(of(2, &old.authority), &old.leaf, std::slice::from_ref(&old.authority)),
                "2 {what}: too old"
            );
            let unsent = (selector, matching) == (0, 0);
            assert_eq!(check(of(2, &good.authority), &good.leaf, &[]), unsent, "2 {what}: not sent along");
            for usage in [0, 1] {
                assert!(!check(of(usage, &good.leaf), &good.leaf, &all), "{usage} {what} is unusable");
            }
        }
    }

    #[test]
    fn a_pinned_key_is_that_key_and_no_other() {
        let (good, stranger) = (chain("mx.example", 100), chain("mx.example", 100));
        let pin = |of| record(3, 1, 1, of).data.try_into().unwrap();
        let anchors = Anchors::of_pins(&[[0; 32], pin(&good.leaf)], "mx.example").unwrap();
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let check = |leaf| anchors.check(leaf, &[], UnixTime::now(), &provider);
        assert!(check(&good.leaf).is_ok());
        assert!(check(&stranger.leaf).unwrap_err().to_string().contains("no pinned key matches"));
        assert_eq!(Anchors::of_pins(&[], "mx.example"), None);
    }

    #[test]
    fn what_cannot_be_used_is_left_out_and_a_weaker_digest_does_not_count() {
        let good = chain("mx.example", 100);
        let short = Tlsa { data: vec![1; 31], ..record(3, 1, 1, &good.leaf) };
        for bad in [
            short,
            Tlsa { matching: 3, ..record(3, 1, 1, &good.leaf) },
            Tlsa { selector: 2, ..record(3, 1, 1, &good.leaf) },
            Tlsa { usage: 255, ..record(3, 1, 1, &good.leaf) },
            Tlsa { data: vec![], ..record(3, 1, 0, &good.leaf) },
        ] {
            assert_eq!(Anchors::new(vec![bad], vec![]), None);
        }
        let wrong = Tlsa { data: vec![7; 64], ..record(3, 1, 2, &good.leaf) };
        assert!(!check(vec![record(3, 1, 1, &good.leaf), wrong.clone()], &good.leaf, &[]));
        assert!(check(vec![record(3, 0, 1, &good.leaf), wrong], &good.leaf, &[]), "another selector");
    }
}
