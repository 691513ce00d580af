//! Pure. Message data in counted chunks (`BDAT`, RFC 3030 §2): each octet belongs to the message, no dot is added or removed.
//!
//! BINARYMIME is not offered, so what comes is lines as with `DATA`: a bare CR, a bare LF and a NUL are noted, and the message is refused
//! once all of it is here.

/// Reads chunks.
#[derive(Clone, Debug, Default)]
pub struct Reader {
    /// Octets of the chunk under way that have not come yet.
    left: u64,
    /// Whether the octet before was a CR.
    cr: bool,
    bare: bool,
    nul: bool,
}

impl Reader {
    /// A chunk of so many octets begins. The one before must be over.
    pub fn begin(&mut self, octets: u64) {
        debug_assert_eq!(self.left, 0, "a chunk within a chunk");
        self.left = octets;
    }

    /// Reads `input`, appends what belongs to the message to `out`, and says whether the chunk is over and how many octets of the input
    /// were read.
    pub fn read(&mut self, input: &[u8], out: &mut Vec<u8>) -> (bool, usize) {
        let used = usize::try_from(self.left).map_or(input.len(), |left| left.min(input.len()));
        let part = &input[..used];
        self.left -= used as u64;
        self.nul |= memchr::memchr(0, part).is_some();
        let mut rest = part;
        while !rest.is_empty() {
            // An LF follows each CR, and nothing else.
            self.bare |= self.cr != (rest[0] == b'\n');
            let from = usize::from(rest[0] == b'\n');
            let run = memchr::memchr2(b'\r', b'\n', &rest[from..]);
            self.cr = run.is_some_and(|at| rest[from + at] == b'\r');
            // An LF stays, to be looked at with what stands before it.
            rest = run.map_or(&[], |at| &rest[from + at + usize::from(self.cr)..]);
        }
        out.extend_from_slice(part);
        (self.left == 0, used)
    }

    /// Whether a bare CR or LF was met, one at the message's end included.
    pub fn has_bare_line_end(&self) -> bool {
        self.bare || self.cr
    }

    /// Whether a NUL was met.
    pub fn has_nul(&self) -> bool {
        self.nul
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads a message in chunks of these sizes and then the rest, whose octets come `split` at a time.
    fn read(message: &[u8], chunks: &[usize], split: usize) -> (Vec<u8>, bool, bool) {
        let (mut reader, mut out, mut from) = (Reader::default(), Vec::new(), 0);
        for size in chunks.iter().copied().chain([usize::MAX]) {
            let end = from + size.min(message.len() - from);
            reader.begin((end - from) as u64);
            // What follows a chunk is a command.
            let input = [&message[from..end], b"BDAT 0 LAST\r\n"].concat();
            let mut at = 0;
            loop {
                let next = input.len().min(at + split.max(1));
                let (is_over, used) = reader.read(&input[at..next], &mut out);
                at += used;
                if is_over {
                    break;
                }
            }
            assert_eq!(at, end - from, "nothing of the command is read");
            from = end;
        }
        (out, reader.has_bare_line_end(), reader.has_nul())
    }

    /// P7: a dot, alone or not, is an octet like any other; what is no line is noted.
    #[test]
    fn p7_chunks_are_taken_as_they_are() {
        for (message, bare, nul) in [
            ("", false, false),
            ("a\r\n.\r\nb\r\n", false, false),
            ("..\r\n.a", false, false),
            ("a\nb\r\n", true, false),
            ("a\rb\r\n", true, false),
            ("a\r\r\n", true, false),
            ("\n", true, false),
            ("a\r", true, false),
            ("\r\n\n", true, false),
            ("a\0\r\n", false, true),
        ] {
            for chunk in 0..=message.len() {
                for split in 1..=message.len().max(1) {
                    let found = read(message.as_bytes(), &[chunk], split);
                    assert_eq!(
                        found,
                        (message.as_bytes().to_vec(), bare, nul),
                        "{message:?} {chunk} {split}"
                    );
                }
            }
        }
    }

    proptest! {
        /// P7: how a message is cut into chunks, and how these come, is no matter.
        #[test]
        fn p7_octets_survive_any_chunks(message in "[.a\r\n\0\u{e4}]{0,40}", chunks in prop::collection::vec(0..9_usize, 0..8), split in 1..9_usize) {
            let whole = read(message.as_bytes(), &[], usize::MAX - 100);
            prop_assert_eq!(&whole.0, message.as_bytes());
            prop_assert_eq!(whole.1, message.replace("\r\n", "").contains(['\r', '\n']));
            prop_assert_eq!(whole.2, message.contains('\0'));
            prop_assert_eq!(read(message.as_bytes(), &chunks, split), whole);
        }
    }
}
