//! Pure. Message data between `DATA` and the final dot, in both directions (RFC 5321 §4.1.1.4, §4.5.2).
//!
//! Only CR LF dot CR LF ends data. A bare CR or a bare LF never ends anything; it is noted, and the message refused after
//! the true end. Exactly one leading dot is removed, and one is added on the way out.

/// Where the reader stands; the input may be split anywhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    LineStart,
    InLine,
    /// After a CR, which is not yet passed on.
    Cr,
    /// After a dot at the start of a line, which is not yet passed on.
    Dot,
    /// After a dot at the start of a line and a CR.
    DotCr,
}

/// Reads message data.
#[derive(Clone, Debug)]
pub struct Decoder {
    at: At,
    bare: bool,
    nul: bool,
}

impl Default for Decoder {
    fn default() -> Decoder {
        Decoder { at: At::LineStart, bare: false, nul: false }
    }
}

impl Decoder {
    /// Reads `input`, appends what belongs to the message to `out`, and says whether the data ended and how many octets of
    /// the input were read. Octets after the end are the next commands.
    pub fn read(&mut self, input: &[u8], out: &mut Vec<u8>) -> (bool, usize) {
        let mut n = 0;
        while n < input.len() {
            // The inside of a line is copied as a whole.
            if self.at == At::InLine {
                let run = memchr::memchr2(b'\r', b'\n', &input[n..]).unwrap_or(input.len() - n);
                let part = &input[n..n + run];
                self.nul |= memchr::memchr(0, part).is_some();
                out.extend_from_slice(part);
                n += run;
                if n == input.len() {
                    break;
                }
            }
            let b = input[n];
            n += 1;
            self.nul |= b == 0;
            self.at = match (self.at, b) {
                (At::LineStart, b'.') => At::Dot,
                (At::Dot, b'\r') => At::DotCr,
                (At::DotCr, b'\n') => return (true, n),
                (At::LineStart | At::InLine | At::Cr | At::Dot | At::DotCr, _) => {
                    // What was held back belongs to the message after all. A dot that is followed by anything but
                    // CR LF was a stuffed one and stays removed.
                    if self.at == At::Cr && b != b'\n' || self.at == At::DotCr {
                        self.bare = true;
                        out.push(b'\r');
                    }
                    match b {
                        b'\r' => At::Cr,
                        b'\n' if self.at == At::Cr => {
                            out.extend_from_slice(b"\r\n");
                            At::LineStart
                        }
                        b'\n' => {
                            self.bare = true;
                            out.push(b'\n');
                            At::InLine
                        }
                        _ => {
                            out.push(b);
                            At::InLine
                        }
                    }
                }
            };
        }
        (false, n)
    }

    /// Whether a bare CR or LF was met: the message is refused with 550 5.6.0.
    pub fn has_bare_line_end(&self) -> bool {
        self.bare
    }

    /// Whether a NUL was met: the message is refused with 550 5.6.0.
    pub fn has_nul(&self) -> bool {
        self.nul
    }
}

/// Writes message data: adds a dot to each line that begins with one, and CR LF if the last line has none.
#[derive(Clone, Debug)]
pub struct Encoder {
    line_start: bool,
    last: [u8; 2],
}

impl Default for Encoder {
    fn default() -> Encoder {
        Encoder { line_start: true, last: *b"\r\n" }
    }
}

impl Encoder {
    /// Appends a piece of the message as it goes over the wire.
    pub fn write(&mut self, piece: &[u8], out: &mut Vec<u8>) {
        let mut rest = piece;
        while !rest.is_empty() {
            if self.line_start && rest[0] == b'.' {
                out.push(b'.');
            }
            let line = memchr::memchr(b'\n', rest).map_or(rest.len(), |at| at + 1);
            let (now, later) = rest.split_at(line);
            out.extend_from_slice(now);
            for b in &now[now.len().saturating_sub(2)..] {
                self.last = [self.last[1], *b];
            }
            // Mail was refused if it held a bare LF, so each LF here ends a line.
            self.line_start = self.last == *b"\r\n";
            rest = later;
        }
    }

    /// What stands before the final dot: nothing, or the CR LF that the last line lacks.
    pub fn end(&self) -> &'static [u8] {
        if self.last == *b"\r\n" { b"" } else { b"\r\n" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(input: &[u8], split: usize) -> (Vec<u8>, bool, usize, bool) {
        let mut decoder = Decoder::default();
        let mut out = Vec::new();
        let split = split.min(input.len());
        let (done, used) = decoder.read(&input[..split], &mut out);
        if done {
            return (out, true, used, decoder.has_bare_line_end());
        }
        let (done, more) = decoder.read(&input[split..], &mut out);
        (out, done, used + more, decoder.has_bare_line_end())
    }

    /// P7: nothing but CR LF dot CR LF ends data (CVE-2023-51764 and its kin), wherever the input is split.
    #[test]
    fn p7_only_the_true_end_ends_data() {
        for fake in [
            "\n.\n",
            "\n.\r\n",
            "\r\n.\n",
            "\r.\r",
            "\r.\n",
            "\n.\r",
            "\r.\r\n",
            "\r\n.\r",
            "\r\n\0.\r\n",
            "\r\n.\0\r\n",
            "\r\n.\r\r\n",
            "\r\r.\r\n",
        ] {
            let input = format!("a{fake}b\r\n.\r\nMAIL");
            for split in 0..input.len() {
                let (_, done, used, _) = decode(input.as_bytes(), split);
                assert!(done, "{fake:?} hides the true end");
                assert_eq!(used, input.len() - 4, "{fake:?} ended data at split {split}");
            }
        }
    }

    #[test]
    fn p7_bare_line_ends_are_noted_and_whole_ones_not() {
        for (input, bare) in [
            ("a\r\n.\r\n", false),
            ("a\nb\r\n.\r\n", true),
            ("a\rb\r\n.\r\n", true),
            ("a\r\r\n.\r\n", true),
            ("\n.\r\n\r\n.\r\n", true),
            (".\r\n", false),
            ("..\r\n.\r\n", false),
        ] {
            let (_, done, _, found) = decode(input.as_bytes(), 0);
            assert_eq!((done, found), (true, bare), "{input:?}");
        }
    }

    #[test]
    fn dots_at_line_starts() {
        for (wire, message) in [
            (".\r\n", ""),
            ("..\r\n.\r\n", ".\r\n"),
            ("...\r\n.\r\n", "..\r\n"),
            (".a\r\n.\r\n", "a\r\n"),
            ("a\r\n..b\r\n.\r\n", "a\r\n.b\r\n"),
        ] {
            for split in 0..wire.len() {
                assert_eq!(decode(wire.as_bytes(), split).0, message.as_bytes(), "{wire:?} at {split}");
            }
        }
    }

    proptest! {
        /// P7: what is sent and received again is the same octets, however it is cut.
        #[test]
        fn p7_octets_survive_the_wire(lines in prop::collection::vec("[.a\u{e4} ]{0,6}", 0..12), a: usize, b: usize) {
            let message: Vec<u8> = lines.iter().flat_map(|l| [l.as_bytes(), b"\r\n"].concat()).collect();
            let cut = a % (message.len() + 1);
            let (mut encoder, mut wire) = (Encoder::default(), Vec::new());
            encoder.write(&message[..cut], &mut wire);
            encoder.write(&message[cut..], &mut wire);
            wire.extend_from_slice(encoder.end());
            wire.extend_from_slice(b".\r\n");
            let (out, done, used, bare) = decode(&wire, b % (wire.len() + 1));
            prop_assert!(done && !bare);
            prop_assert_eq!(used, wire.len());
            prop_assert_eq!(out, message);
        }
    }
}
