//! `init`: a starter project. The same small real model and engine as this project's own quickstart, lockfile included.

use std::path::{Path, PathBuf};

use crate::base::fs;

use super::Failure;
use super::project::MAX_MANIFEST_BYTES;

/// What a starter project consists of: path, content.
const FILES: [(&str, &str); 4] = [
    ("manifests/default.toml", include_str!("../../manifests/quickstart.toml")),
    ("manifests/default.lock", include_str!("../../manifests/quickstart.lock")),
    (
        "configs/models/llama-cpp/smollm2-135m-instruct.yaml",
        include_str!("../../configs/models/llama-cpp/smollm2-135m-instruct.yaml"),
    ),
    ("models/README.md", include_str!("../../models/README.md")),
];

/// What must not go into version control: logs, links to builds and weights.
const IGNORED: [&str; 5] = ["/.aitools/", "/build/", "/models/*", "!/models/README.md", "/external/*"];

/// Writes the starter files, and gives the paths of those that it wrote or changed. A file that exists already stays as it is;
/// only `.gitignore` gets the lines that it lacks.
///
/// # Errors
/// When the folder has a manifest already, or cannot be written.
pub fn run(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    if fs::exists(&folder.join("manifests/default.toml")) {
        let what = format!("`{}` has a manifest already", folder.display());
        return Err(Failure::Usage { what, hint: Some("edit `manifests/default.toml`".to_owned()) });
    }
    let mut written = Vec::new();
    for (name, content) in FILES {
        let path = folder.join(name);
        if !fs::exists(&path) {
            fs::write_atomic(&path, content.as_bytes())?;
            written.push(name.into());
        }
    }
    if ignore(&folder.join(".gitignore"))? {
        written.push(".gitignore".into());
    }
    Ok(written)
}

/// Adds to a `.gitignore` the lines that it lacks, and says whether there were any.
fn ignore(path: &Path) -> Result<bool, Failure> {
    let mut text = match fs::read_bounded(path, MAX_MANIFEST_BYTES) {
        Ok(bytes) => bytes,
        Err(error) if error.is_not_found() => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let known = String::from_utf8_lossy(&text).into_owned();
    let lacking: Vec<&str> =
        IGNORED.into_iter().filter(|entry| !known.lines().any(|line| line.trim_end() == *entry)).collect();
    if lacking.is_empty() {
        return Ok(false);
    }
    if !text.is_empty() {
        let end = if text.ends_with(b"\n") { "\n" } else { "\n\n" };
        text.extend_from_slice(end.as_bytes());
    }
    text.extend_from_slice(format!("{}\n", lacking.join("\n")).as_bytes());
    fs::write_atomic(path, &text)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u4_an_existing_gitignore_gets_what_it_lacks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".gitignore");
        fs::write_atomic(&path, b"*.log\n/build/").unwrap();
        let written = run(folder.path()).unwrap();
        assert!(written.iter().any(|path| path == Path::new(".gitignore")));
        let text = || String::from_utf8(fs::read_bounded(&path, 1000).unwrap()).unwrap();
        assert_eq!(text(), "*.log\n/build/\n\n/.aitools/\n/models/*\n!/models/README.md\n/external/*\n");
        assert!(!ignore(&path).unwrap());
        assert_eq!(text().matches("/models/*").count(), 1);
    }
}
