//! The tree checks itself: layers, pure files, leftovers, and links in documents.
#![expect(clippy::disallowed_methods, reason = "it reads the source tree")]

use std::path::{Path, PathBuf};

/// The order in which the modules of this crate may know each other.
const LAYERS: [&str; 8] = ["smtp", "queue", "schedule", "receive", "deliver", "admin", "node", "demo"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn files(dir: &Path, extension: &str, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with(".git") {
            files(&path, extension, out);
        } else if path.extension().is_some_and(|e| e == extension) {
            out.push(path);
        }
    }
}

fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    files(&root(), "rs", &mut found);
    found.sort();
    found
        .into_iter()
        .map(|p| (p.strip_prefix(root()).unwrap().to_owned(), std::fs::read_to_string(&p).unwrap()))
        .collect()
}

fn layer(path: &Path) -> Option<usize> {
    let name = path.strip_prefix("src").ok()?.components().next()?.as_os_str().to_string_lossy().into_owned();
    LAYERS.iter().position(|layer| *layer == name.trim_end_matches(".rs"))
}

/// The part of a file before its tests.
fn code(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap_or(text)
}

#[test]
fn modules_know_only_what_stands_below_them() {
    for (path, text) in sources() {
        let Some(own) = layer(&path) else { continue };
        for line in text.lines().map(str::trim) {
            let Some(used) = line.strip_prefix("use crate::") else { continue };
            let name: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if let Some(other) = LAYERS.iter().position(|layer| *layer == name) {
                assert!(other <= own, "{}: `{line}` looks up from {}", path.display(), LAYERS[own]);
            }
        }
    }
}

#[test]
fn pure_files_touch_nothing() {
    let mut pure = 0;
    for (path, text) in sources() {
        if !text.starts_with("//! Pure.") {
            continue;
        }
        pure += 1;
        for word in [
            "tokio",
            "async fn",
            "std::fs",
            "std::net::Tcp",
            "crate::clock",
            "Mutex",
            "std::thread",
            "SystemTime",
        ] {
            assert!(
                !code(&text).contains(word),
                "{} says that it is pure and names `{word}`",
                path.display()
            );
        }
    }
    assert!(pure > 20, "only {pure} files are pure");
}

#[test]
fn openraft_and_the_layers_of_crates_are_named_where_they_belong() {
    for (path, text) in sources() {
        let place = path.display().to_string();
        if place == "src/tidy.rs" {
            continue;
        }
        let code: String = text.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
        if !place.starts_with("cluster/") {
            assert!(!code.contains("openraft::") && !code.contains("use openraft"), "{place} names openraft");
        }
        if place.starts_with("jepsen-style-tests/") {
            assert!(!code.contains("use holdfast"), "{place} links a product crate");
        }
    }
}

#[test]
fn nothing_is_left_over() {
    for (path, text) in sources() {
        let place = path.display().to_string();
        if place == "src/tidy.rs" {
            continue;
        }
        for word in ["dbg!(", "FIXME", "XXX", "todo!(", "unimplemented!(", "#[ignore"] {
            assert!(!text.contains(word), "{place} has `{word}`");
        }
        for (n, line) in text.lines().enumerate() {
            assert!(line == line.trim_end(), "{place}:{}: trailing blanks", n + 1);
        }
        let lines = text.lines().count();
        assert!(lines <= 760, "{place} has {lines} lines: find the noun that hides in it");
        assert!(text.starts_with("//!"), "{place} does not say what it is for");
    }
}

/// A test that is named after a property is shown to fail when that is broken: `jepsen-style-tests/sabotage` breaks it and runs the test.
#[test]
fn tests_of_properties_guard_a_sabotage() {
    let sabotage = std::fs::read_to_string(root().join("jepsen-style-tests/sabotage")).unwrap();
    let mut guards = 0;
    for (path, text) in sources() {
        for name in text.lines().filter_map(|line| line.trim().strip_prefix("fn ")) {
            let name = name.split('(').next().unwrap_or("");
            let digits = name.strip_prefix('p').and_then(|rest| rest.split('_').next()).unwrap_or("");
            if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
                continue;
            }
            guards += 1;
            assert!(sabotage.contains(&format!("\"{name}\"")), "{}: no sabotage runs {name}", path.display());
        }
    }
    assert!(guards > 90, "only {guards} tests are named after a property");
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut found = Vec::new();
    files(&root(), "md", &mut found);
    assert!(!found.is_empty());
    for path in found {
        let text = std::fs::read_to_string(&path).unwrap();
        for part in text.split("](").skip(1) {
            let link = part.split(')').next().unwrap_or("");
            let file = link.split('#').next().unwrap_or("");
            if file.is_empty() || file.contains("://") {
                continue;
            }
            let target = path.parent().unwrap().join(file);
            assert!(target.exists(), "{}: {link} leads nowhere", path.display());
        }
    }
}
