//! The file that `[storage] key_file` names: the at-rest keys, which seal what the log writes ([`holdfast_storage::seal`]).
#![expect(clippy::disallowed_methods, reason = "a setting, not the data directory")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, bail};
use holdfast_storage::Keyring;

/// Reads the keys; without a file there are none.
///
/// # Errors
/// If it cannot be read, anybody may read it, or it is no keyring.
pub fn keyring(file: &Path) -> anyhow::Result<Keyring> {
    if file.as_os_str().is_empty() {
        return Ok(Keyring::default());
    }
    let at = || format!("[storage] key_file = {}", file.display());
    let mode = std::fs::metadata(file).with_context(at)?.permissions().mode();
    if mode & 0o007 != 0 {
        bail!(
            "{}: everybody may read it (mode {:o}); make that `chmod o= {}`",
            at(),
            mode & 0o777,
            file.display()
        );
    }
    let text = std::fs::read_to_string(file).with_context(at)?;
    Keyring::parse(&text).with_context(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_read_unless_everybody_may() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("at-rest.key");
        let say = |text: &str, mode: u32| {
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
            keyring(&file).map(|keys| keys.sealing().is_some()).map_err(|e| format!("{e:#}"))
        };
        let key = "00ff".repeat(16);
        assert_eq!(say(&format!("# since May\n{key}\n"), 0o640), Ok(true));
        assert!(say(&key, 0o644).unwrap_err().contains("everybody may read it (mode 644)"));
        assert!(say(&format!("{key}\n12\n"), 0o600).unwrap_err().contains("line 2 is not a key"));
        assert!(say("# none yet\n", 0o600).unwrap_err().contains("no key in it"));
        assert!(say(&format!("{key}\n{key}\n"), 0o600).unwrap_err().contains("two keys with the id"));
        assert!(keyring(Path::new("")).unwrap().sealing().is_none(), "none is asked for");
    }
}
