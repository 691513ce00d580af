//! Pure. MTA-STS (RFC 8461): what a domain's record and policy say, and when a policy that is known is asked for again.

use std::time::Duration;

/// Longest policy that is read, octets (RFC 8461 §3.3).
pub const POLICY_BYTES_MAX: usize = 64 * 1024;
/// A policy counts for a year at the most, seconds (RFC 8461 §3.2).
const AGE_MAX_S: u64 = 31_557_600;
/// MX patterns of one policy.
const PATTERNS_MAX: usize = 128;
/// After a policy could not be fetched it is not asked for again for so long (RFC 8461 §3.3 asks for a pause).
const FAILED_PAUSE: Duration = Duration::from_secs(300);
/// After a policy was fetched it is not asked for again for so long, whatever its age and the domain's record say.
const FETCHED_PAUSE: Duration = Duration::from_secs(60);

/// What a policy asks of those who send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// TLS with a listed MX, or no mail.
    Enforce,
    /// Nothing is refused; failures are only reported.
    Testing,
    /// Nothing.
    None,
}

/// A domain's policy (RFC 8461 §3.2).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// What it asks for.
    pub mode: Mode,
    /// Names of MX hosts, or `*.` and what follows one label; in lower case.
    pub mx: Vec<String>,
    /// For how long it counts, seconds.
    pub max_age_s: u64,
}

/// Finds the policy's id in the TXT records of `_mta-sts.` and the domain (RFC 8461 §3.1). `None` unless just one of them is such a
/// record.
pub fn record_id(records: &[String]) -> Option<String> {
    let mut ours = records.iter().filter_map(|record| {
        let rest = record.strip_prefix("v=STSv1")?.trim_start_matches([' ', '\t']);
        rest.starts_with(';').then_some(rest)
    });
    let (record, None) = (ours.next()?, ours.next()) else { return None };
    let mut ids = record.split(';').filter_map(|field| field.trim_matches([' ', '\t']).strip_prefix("id="));
    let id = ids.next()?;
    let good = (1..=32).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric());
    good.then(|| id.to_string())
}

impl Policy {
    /// Reads a policy.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Policy, &'static str> {
        let (mut version, mut mode, mut age, mut mx) = (None, None, None, Vec::new());
        for line in text.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line)) {
            let Some((key, value)) = line.split_once(':') else { continue };
            let value = value.trim_matches([' ', '\t']);
            // Of what may stand once, the first counts.
            match key.trim_matches([' ', '\t']) {
                "version" => version = version.or(Some(value)),
                "mode" => mode = mode.or(Some(value)),
                "max_age" => age = age.or(Some(value)),
                "mx" => mx.push(value.trim_end_matches('.').to_ascii_lowercase()),
                _ => {}
            }
        }
        if version != Some("STSv1") {
            return Err("its version is not STSv1");
        }
        let mode = match mode {
            Some("enforce") => Mode::Enforce,
            Some("testing") => Mode::Testing,
            Some("none") => Mode::None,
            _ => return Err("it has no mode that is known"),
        };
        let digits = |text: &&str| (1..=10).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        let age = age.filter(digits).and_then(|text| text.parse::<u64>().ok()).ok_or("it has no max_age")?;
        if mode != Mode::None && mx.is_empty() {
            return Err("it names no mx");
        }
        if mx.len() > PATTERNS_MAX || mx.iter().any(|pattern| pattern.is_empty() || pattern.len() > 255) {
            return Err("an mx of it is no name, or there are too many");
        }
        Ok(Policy { mode, mx, max_age_s: age.min(AGE_MAX_S) })
    }

    /// Whether it vouches for an MX of this name (RFC 8461 §4.1).
    pub fn lists(&self, name: &str) -> bool {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let matches = |pattern: &String| match pattern.strip_prefix("*.") {
            Some(rest) => {
                name.split_once('.').is_some_and(|(first, others)| !first.is_empty() && others == rest)
            }
            None => *pattern == name,
        };
        self.mode != Mode::None && self.mx.iter().any(matches)
    }

    /// Octets that it takes in memory, about.
    pub fn weight(&self) -> usize {
        self.mx.iter().map(|pattern| pattern.len() + 32).sum::<usize>() + 64
    }
}

/// What the TXT records of a domain say of its policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Announced {
    /// There is one, of this id.
    Id(String),
    /// Nothing that can be used.
    Nothing,
}

/// A policy that is kept, or the memory of one that could not be fetched. Times are those of a clock that only goes on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kept {
    /// Its id.
    pub id: String,
    /// What it says; `None` if it could never be fetched.
    pub policy: Option<Policy>,
    /// When it was fetched.
    pub fetched: Duration,
    /// Before this it is not fetched again.
    pub not_before: Duration,
}

impl Kept {
    /// The policy, as long as it counts.
    pub fn valid(&self, now: Duration) -> Option<&Policy> {
        let policy = self.policy.as_ref()?;
        (now < self.fetched + Duration::from_secs(policy.max_age_s)).then_some(policy)
    }

    /// What is kept after the policy of this id was fetched.
    pub fn after_fetch(id: &str, policy: Policy, now: Duration) -> Kept {
        Kept { id: id.into(), policy: Some(policy), fetched: now, not_before: now + FETCHED_PAUSE }
    }

    /// What is kept after a fetch of the policy of this id came to nothing: what was there, for as long as it counts.
    pub fn after_failure(kept: Option<&Kept>, id: &str, now: Duration) -> Kept {
        let not_before = now + FAILED_PAUSE;
        match kept {
            Some(kept) if kept.valid(now).is_some() => Kept { not_before, ..kept.clone() },
            _ => Kept { id: id.into(), policy: None, fetched: now, not_before },
        }
    }
}

/// The id under which a policy is to be fetched now, if it is: one that is new, or has another id, or is past half of its age, so
/// that it does not end while it cannot be fetched.
pub fn fetch(kept: Option<&Kept>, announced: &Announced, now: Duration) -> Option<String> {
    let Announced::Id(id) = announced else { return None };
    let wanted = kept.is_none_or(|kept| {
        let fresh = kept
            .valid(now)
            .is_some_and(|policy| now < kept.fetched + Duration::from_secs(policy.max_age_s / 2));
        now >= kept.not_before && !(fresh && kept.id == *id)
    });
    wanted.then(|| id.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str =
        "version: STSv1\r\nmode: enforce\r\nmx: mail.example.com\r\nmx: *.example.net\r\nmax_age: 604800\r\n";

    #[test]
    fn records() {
        let id = |records: &[&str]| record_id(&records.iter().map(|r| r.to_string()).collect::<Vec<_>>());
        assert_eq!(id(&["v=spf1 -all", "v=STSv1; id=20160831085700Z;"]).as_deref(), Some("20160831085700Z"));
        assert_eq!(id(&["v=STSv1 ;x=y;  id=1"]).as_deref(), Some("1"));
        for bad in [
            &[][..],
            &["v=STSv1; id=1", "v=STSv1; id=2"],
            &["v=STSv2; id=1"],
            &["v=STSv1x; id=1"],
            &[" v=STSv1; id=1"],
            &["v=STSv1; id="],
            &["v=STSv1; id=1-2"],
            &["v=STSv1; id=123456789012345678901234567890123"],
            &["v=STSv1;"],
        ] {
            assert_eq!(id(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn policies() {
        let policy = Policy::parse(GOOD).unwrap();
        assert_eq!((policy.mode, policy.mx.len(), policy.max_age_s), (Mode::Enforce, 2, 604_800));
        assert_eq!(Policy::parse(&GOOD.replace("\r\n", "\n")).unwrap(), policy);
        let twice = format!("{GOOD}mode: none\r\nmax_age: 1\r\nfuture: field\r\nnonsense\r\n");
        assert_eq!(Policy::parse(&twice).unwrap(), policy, "the first counts, and what is unknown does not");
        assert_eq!(Policy::parse("version:STSv1\nmode: none\nmax_age:0").unwrap().mx, Vec::<String>::new());
        let long = Policy::parse(&GOOD.replace("604800", "9999999999")).unwrap();
        assert_eq!(long.max_age_s, AGE_MAX_S);
        for (old, new) in [
            ("STSv1", "STSv2"),
            ("enforce", "Enforce"),
            ("604800", "-1"),
            ("604800", "99999999999"),
            ("604800", ""),
            ("mx: mail.example.com\r\nmx: *.example.net\r\n", ""),
            ("mail.example.com", ""),
        ] {
            assert!(Policy::parse(&GOOD.replace(old, new)).is_err(), "{old} -> {new}");
        }
        assert!(Policy::parse(&format!("{GOOD}{}", "mx: a.example\n".repeat(PATTERNS_MAX))).is_err());
    }

    /// A star stands for one label, no more and no less.
    #[test]
    fn names_of_mx_hosts() {
        let policy = Policy::parse(GOOD).unwrap();
        for (name, listed) in [
            ("mail.example.com", true),
            ("MAIL.example.com.", true),
            ("a.example.net", true),
            ("a.b.example.net", false),
            ("example.net", false),
            (".example.net", false),
            ("mail.example.com.evil", false),
            ("evilexample.net", false),
        ] {
            assert_eq!(policy.lists(name), listed, "{name}");
        }
        assert!(!Policy { mode: Mode::None, ..policy }.lists("mail.example.com"));
    }

    /// Who cuts us off from DNS or from the policy's host gains nothing before the policy that is known has ended.
    #[test]
    fn a_known_policy_survives_until_its_end() {
        let at = Duration::from_secs;
        let announced = |id: &str| Announced::Id(id.into());
        assert_eq!(fetch(None, &announced("1"), at(0)).as_deref(), Some("1"));
        assert_eq!(fetch(None, &Announced::Nothing, at(0)), None);
        let policy = Policy { max_age_s: 1000, ..Policy::parse(GOOD).unwrap() };
        let kept = Kept::after_fetch("1", policy, at(100));
        assert!(kept.valid(at(1099)).is_some() && kept.valid(at(1100)).is_none());
        let wants = |kept: &Kept, announced, now| fetch(Some(kept), &announced, at(now)).is_some();
        assert!(!wants(&kept, announced("1"), 599), "it is known");
        assert!(wants(&kept, announced("1"), 600), "half of its time is over");
        assert!(wants(&kept, announced("2"), 160), "there is a newer one");
        assert!(!wants(&kept, announced("2"), 159), "but not at once");
        assert!(!wants(&kept, Announced::Nothing, 2000), "there is none to fetch");
        let failed = Kept::after_failure(Some(&kept), "2", at(200));
        assert_eq!(failed.valid(at(1099)), kept.valid(at(1099)), "what was known counts on");
        assert!(!wants(&failed, announced("2"), 499) && wants(&failed, announced("2"), 500));
        let gone = Kept::after_failure(Some(&kept), "2", at(1100));
        assert_eq!(gone.valid(at(1100)), None);
        assert!(!wants(&gone, announced("2"), 1399) && wants(&gone, announced("2"), 1400));
        assert_eq!(Kept::after_failure(None, "1", at(5)).valid(at(5)), None);
    }
}
