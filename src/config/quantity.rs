//! Pure. Durations and sizes as people write them in node files and on the command line.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A duration as `10s`, `5m`, `12h`, `15d` or `250ms`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Span(pub Duration);

impl Span {
    /// Reads `10s`, `15d`, `250ms`.
    pub fn parse(text: &str) -> Option<Span> {
        let digits = text.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = text[..digits].parse().ok()?;
        let unit_ms = match &text[digits..] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        Some(Span(Duration::from_millis(number.checked_mul(unit_ms)?)))
    }

    /// In milliseconds.
    pub fn ms(self) -> u64 {
        self.0.as_millis() as u64
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.ms();
        let (unit_ms, unit) = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s")]
            .into_iter()
            .find(|(unit_ms, _)| ms != 0 && ms.is_multiple_of(*unit_ms))
            .unwrap_or((1, "ms"));
        write!(f, "{}{unit}", ms / unit_ms)
    }
}

/// A size as `50MiB`, `64KiB` or plain bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Size(pub u64);

impl Size {
    /// Reads `50MiB`, `64KiB`, `100`.
    pub fn parse(text: &str) -> Option<Size> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let number: u64 = text[..digits].parse().ok()?;
        let unit = match &text[digits..] {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return None,
        };
        Some(Size(number.checked_mul(unit)?))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")]
            .into_iter()
            .find(|(unit, _)| self.0 != 0 && self.0.is_multiple_of(*unit))
            .unwrap_or((1, "B"));
        write!(f, "{}{name}", self.0 / unit)
    }
}

macro_rules! as_text {
    ($type:ident, $example:literal) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<$type, D::Error> {
                let text = String::deserialize(d)?;
                $type::parse(&text).ok_or_else(|| {
                    serde::de::Error::custom(format!("`{text}` is not of the form {}", $example))
                })
            }
        }
    };
}

as_text!(Span, "`10s`, `5m`, `12h` or `15d`");
as_text!(Size, "`50MiB`, `64KiB` or `1GiB`");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_sizes_read_and_print_the_same() {
        for text in ["10s", "15d", "250ms", "90m", "0ms"] {
            assert_eq!(Span::parse(text).unwrap().to_string(), text);
        }
        for text in ["50MiB", "64KiB", "1GiB", "100B"] {
            assert_eq!(Size::parse(text).unwrap().to_string(), text);
        }
        assert!(Span::parse("10").is_none() && Span::parse("s").is_none() && Size::parse("1MB").is_none());
    }
}
