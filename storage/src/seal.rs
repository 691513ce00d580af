//! The at-rest key: with one, the head and body of every record are encrypted on the medium. It covers what a medium keeps of octets that
//! were overwritten (spare blocks, a drive that is sent back); whoever can read the key's file and the disk can read the mail.
//!
//! AES-256-GCM (NIST SP 800-38D) with a key for each segment, derived from the at-rest key and the segment's number by HKDF-SHA-256
//! (RFC 5869). A segment's number is never used twice by a sound node; one that was put back from an old copy may, and the nodes of a cluster
//! may share a key: so nonces are drawn by the system's generator for each record, 95 bits of one. A segment takes fewer than 2^24 records, so
//! even if eight segments have the same number a nonce comes twice with a probability below 2^-41 (SP 800-38D §8.3 asks for
//! 2^-32). A row in the index has a key of its own, derived from its message's id. HKDF's salt is `holdfast at-rest key 1`, its info `segment` and
//! the number in 8 octets, or `row` and the id in 16, little-endian; a key's own id is the first 4 octets of what `id` gives.
//!
//! | octets of a sealed head | |
//! | --- | --- |
//! | 0..12 | the head's nonce, of which the lowest bit of the last octet is 0; in the body's it is 1 |
//! | 12..28 | tag of the body |
//! | 28..32 | encrypted: CRC-32 of the plain body |
//! | 32.. | encrypted: the plain head |
//! | the last 16 | tag of head and CRC |
//!
//! The body keeps its length, so it is overwritten in place like any other. Additional data are the header's first 44 octets, which name
//! kind, lengths, position and place, and for the head also the body's tag. CRCs in the header are those of what stands on the medium, so
//! rot is told from a wrong key, and is found without one.
//!
//! A keyring has one key that seals and any number that open. Records without a key, and those of keys that no longer seal, are read
//! all the same; their segments are emptied in the background.

use std::cell::OnceCell;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::{hkdf, hmac, rand};

use crate::position::SegmentId;

/// Length of an at-rest key.
pub const KEY_BYTES: usize = 32;
/// Keys that a keyring holds at the most: one that seals, and those before it whose records are not all sealed anew.
pub const KEYS_MAX: usize = 8;
/// By how much a sealed head is longer.
pub(crate) const SEALED_BYTES: usize = NONCE_LEN + TAG_BYTES + size_of::<u32>() + TAG_BYTES;
/// What of a header is bound: all up to the CRCs.
pub(crate) const BOUND_BYTES: usize = 44;
const TAG_BYTES: usize = 16;
const HEAD_AT: usize = NONCE_LEN + TAG_BYTES;
const SHORT: &str = "a record is far shorter than 2^36 octets, the only bound";

/// Tells keys apart: 32 bits that follow from a key and do not give it away. Never 0, which says that there is none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct KeyId(pub u32);

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// Why a text is no keyring.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadKeyring {
    /// A line is not a key. It is not shown: it may be most of one.
    #[error("line {0} is not a key: want 64 hexadecimal digits, as `openssl rand -hex 32` prints them")]
    Line(usize),
    /// There is no key in it.
    #[error("no key in it: want at least one line of 64 hexadecimal digits")]
    Empty,
    /// Too many.
    #[error("more than {KEYS_MAX} keys: take out those that nothing is sealed with any more")]
    TooMany,
    /// Two keys have the same id, or one stands there twice.
    #[error("two keys with the id {0}: take one of them out")]
    Twice(KeyId),
}

/// At-rest keys: the first seals, all open. An empty one seals nothing.
#[derive(Clone, Default)]
pub struct Keyring {
    keys: Vec<(KeyId, hkdf::Prk)>,
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|(id, _)| id)).finish()
    }
}

fn derive(key: &hkdf::Prk, context: &[&[u8]]) -> LessSafeKey {
    let derived = key.expand(context, &AES_256_GCM).expect("a key is no longer than 255 hashes");
    LessSafeKey::new(UnboundKey::from(derived))
}

fn id_of(key: &hkdf::Prk) -> KeyId {
    let mut id = [0; 32];
    let derived = key.expand(&[b"id"], hkdf::HKDF_SHA256).and_then(|derived| derived.fill(&mut id));
    derived.expect("32 octets were asked for");
    KeyId(u32::from_le_bytes([id[0], id[1], id[2], id[3]]).max(1))
}

impl Keyring {
    /// Of keys, the one that seals first.
    ///
    /// # Errors
    /// [`BadKeyring`] if there are too many or one stands there twice.
    pub fn new(keys: &[[u8; KEY_BYTES]]) -> Result<Keyring, BadKeyring> {
        if keys.len() > KEYS_MAX {
            return Err(BadKeyring::TooMany);
        }
        let mut ring = Keyring::default();
        for key in keys {
            // HKDF-Extract at once: the library would do it again for each key that is derived.
            let salt = hmac::Key::new(hmac::HMAC_SHA256, b"holdfast at-rest key 1");
            let key = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, hmac::sign(&salt, key).as_ref());
            let id = id_of(&key);
            if ring.keys.iter().any(|(other, _)| *other == id) {
                return Err(BadKeyring::Twice(id));
            }
            ring.keys.push((id, key));
        }
        Ok(ring)
    }

    /// From the text of a key file: a key a line in hexadecimal digits, the one that seals first. Empty lines and what follows a `#` do not
    /// count.
    ///
    /// # Errors
    /// [`BadKeyring`] names the line.
    pub fn parse(text: &str) -> Result<Keyring, BadKeyring> {
        let mut keys = Vec::new();
        for (n, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let digits = line.len() == 2 * KEY_BYTES && line.bytes().all(|b| b.is_ascii_hexdigit());
            if !digits {
                return Err(BadKeyring::Line(n + 1));
            }
            let mut key = [0; KEY_BYTES];
            for (octet, pair) in key.iter_mut().zip(line.as_bytes().chunks(2)) {
                let pair = str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok());
                *octet = pair.ok_or(BadKeyring::Line(n + 1))?;
            }
            keys.push(key);
        }
        if keys.is_empty() {
            return Err(BadKeyring::Empty);
        }
        Keyring::new(&keys)
    }

    /// The key that seals, if there is one.
    pub fn sealing(&self) -> Option<KeyId> {
        self.keys.first().map(|(id, _)| *id)
    }

    /// The keys for the records of a segment.
    pub fn of_segment(&self, segment: SegmentId) -> SegmentKeys {
        let keys = self.keys.iter().map(|(id, key)| (*id, key.clone(), OnceCell::new())).collect();
        SegmentKeys { segment, sealing: self.sealing(), keys, nonce: random_nonce }
    }

    fn row_key(&self, key: u128) -> Option<LessSafeKey> {
        self.keys.first().map(|(_, ring)| derive(ring, &[b"row", &key.to_le_bytes()]))
    }

    /// What of a row stands in the index: a nonce, the encrypted row, its tag. Without a key the row itself.
    pub(crate) fn seal_row(&self, key: u128, row: &[u8]) -> Vec<u8> {
        let Some(sealing) = self.row_key(key) else { return row.to_vec() };
        let nonce = random_nonce();
        let mut sealed = [&nonce, row].concat();
        let tag = sealing.seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::empty(),
            &mut sealed[NONCE_LEN..],
        );
        sealed.extend_from_slice(tag.expect(SHORT).as_ref());
        sealed
    }

    /// The row that was sealed, if it was with the key that seals now.
    pub(crate) fn open_row(&self, key: u128, sealed: &[u8]) -> Option<Vec<u8>> {
        let Some(opening) = self.row_key(key) else { return Some(sealed.to_vec()) };
        let (nonce, rest) = sealed.split_first_chunk::<NONCE_LEN>()?;
        let (text, tag) = rest.split_last_chunk::<TAG_BYTES>()?;
        let mut row = vec![0; text.len()];
        let nonce = Nonce::assume_unique_for_key(*nonce);
        opening.open_separate_gather(nonce, Aad::empty(), text, tag, &mut row).ok()?;
        Some(row)
    }
}

fn random_nonce() -> [u8; NONCE_LEN] {
    let mut nonce = [0; NONCE_LEN];
    // Without its generator a system has nothing to keep a secret with; a nonce that is not random may be the second of its kind.
    assert!(rand::fill(&mut nonce).is_ok(), "the system's generator of random numbers failed");
    nonce
}

/// For the head and for the body, from what stands in the record.
fn nonces(mut nonce: [u8; NONCE_LEN]) -> (Nonce, Nonce) {
    let head = nonce;
    nonce[NONCE_LEN - 1] ^= 1;
    (Nonce::assume_unique_for_key(head), Nonce::assume_unique_for_key(nonce))
}

/// The keys for the records of one segment.
pub struct SegmentKeys {
    segment: SegmentId,
    sealing: Option<KeyId>,
    /// Each derived when it is needed.
    keys: Vec<(KeyId, hkdf::Prk, OnceCell<LessSafeKey>)>,
    nonce: fn() -> [u8; NONCE_LEN],
}

impl SegmentKeys {
    /// Which segment they are for.
    pub fn segment(&self) -> SegmentId {
        self.segment
    }

    /// The key that seals, if there is one.
    pub(crate) fn sealing(&self) -> Option<KeyId> {
        self.sealing
    }

    /// The same that seals with another of its keys, or not at all: a record is written again as it was.
    pub(crate) fn sealing_with(self, sealing: Option<KeyId>) -> SegmentKeys {
        SegmentKeys { sealing, ..self }
    }

    /// Whether records of a key can be opened.
    pub(crate) fn opens(&self, id: KeyId) -> bool {
        self.key(id).is_some()
    }

    fn key(&self, id: KeyId) -> Option<&LessSafeKey> {
        let (_, ring, key) = self.keys.iter().find(|(other, ..)| *other == id)?;
        Some(key.get_or_init(|| derive(ring, &[b"segment", &self.segment.0.to_le_bytes()])))
    }

    /// The same with a nonce that is always the same, for vectors.
    #[cfg(test)]
    pub(crate) fn with_nonce(self, nonce: fn() -> [u8; NONCE_LEN]) -> SegmentKeys {
        SegmentKeys { nonce, ..self }
    }

    /// Appends the sealed head and the sealed body of a record whose header begins with `bound`.
    pub(crate) fn seal(
        &self,
        id: KeyId,
        bound: &[u8; BOUND_BYTES],
        head: &[u8],
        body: &[u8],
        out: &mut Vec<u8>,
    ) {
        let key = self.key(id).expect("the key that seals is on the ring");
        let mut nonce = (self.nonce)();
        nonce[NONCE_LEN - 1] &= !1;
        let (for_head, for_body) = nonces(nonce);
        let start = out.len();
        out.extend_from_slice(&nonce);
        out.extend_from_slice(&[0; TAG_BYTES]);
        out.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
        out.extend_from_slice(head);
        out.extend_from_slice(&[0; TAG_BYTES]);
        let body_at = out.len() - start;
        out.extend_from_slice(body);
        let (sealed_head, sealed_body) = out[start..].split_at_mut(body_at);
        let body_tag = key.seal_in_place_separate_tag(for_body, Aad::from(bound), sealed_body).expect(SHORT);
        sealed_head[NONCE_LEN..HEAD_AT].copy_from_slice(body_tag.as_ref());
        let (rest, tag) = sealed_head.split_at_mut(body_at - TAG_BYTES);
        let (clear, text) = rest.split_at_mut(HEAD_AT);
        let with = bound_head(bound, &clear[NONCE_LEN..]);
        let head_tag = key.seal_in_place_separate_tag(for_head, Aad::from(with), text).expect(SHORT);
        tag.copy_from_slice(head_tag.as_ref());
    }

    /// What a sealed head was, and the CRC-32 of the body as it was. Nothing if it is not what the key sealed, whatever its CRC.
    pub(crate) fn open_head(
        &self,
        id: KeyId,
        bound: &[u8; BOUND_BYTES],
        sealed: &[u8],
    ) -> Option<(Vec<u8>, u32)> {
        let key = self.key(id)?;
        let (nonce, rest) = sealed.split_first_chunk::<NONCE_LEN>()?;
        let (body_tag, rest) = rest.split_first_chunk::<TAG_BYTES>()?;
        let (text, tag) = rest.split_last_chunk::<TAG_BYTES>()?;
        let mut plain = vec![0; text.len()];
        let with = Aad::from(bound_head(bound, body_tag));
        key.open_separate_gather(nonces(*nonce).0, with, text, tag, &mut plain).ok()?;
        let body_crc = u32::from_le_bytes(*plain.first_chunk()?);
        Some((plain.split_off(size_of::<u32>()), body_crc))
    }

    /// What a sealed body was, given the sealed head before it.
    pub(crate) fn open_body(
        &self,
        id: KeyId,
        bound: &[u8; BOUND_BYTES],
        sealed_head: &[u8],
        sealed: &[u8],
    ) -> Option<Vec<u8>> {
        let key = self.key(id)?;
        let (nonce, rest) = sealed_head.split_first_chunk::<NONCE_LEN>()?;
        let tag = rest.first_chunk::<TAG_BYTES>()?;
        let mut plain = vec![0; sealed.len()];
        key.open_separate_gather(nonces(*nonce).1, Aad::from(bound), sealed, tag, &mut plain).ok()?;
        Some(plain)
    }
}

fn bound_head(bound: &[u8; BOUND_BYTES], body_tag: &[u8]) -> [u8; BOUND_BYTES + TAG_BYTES] {
    let mut with = [0; BOUND_BYTES + TAG_BYTES];
    with[..BOUND_BYTES].copy_from_slice(bound);
    with[BOUND_BYTES..].copy_from_slice(body_tag);
    with
}
