//! `init`: a starter project. The same small real model and engine as this project's own quickstart, lockfile included.

use std::path::{Path, PathBuf};

use crate::base::fs;

use super::Failure;

/// What a starter project consists of: path, content.
const FILES: [(&str, &str); 5] = [
    ("manifests/default.toml", include_str!("../../manifests/quickstart.toml")),
    ("manifests/default.lock", include_str!("../../manifests/quickstart.lock")),
    (
        "configs/models/llama-cpp/smollm2-135m-instruct.yaml",
        include_str!("../../configs/models/llama-cpp/smollm2-135m-instruct.yaml"),
    ),
    ("models/README.md", include_str!("../../models/README.md")),
    (".gitignore", "/.aitools/\n/build/\n/models/*\n!/models/README.md\n/external/*\n"),
];

/// Writes the starter files; a file that exists already stays as it is.
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
    Ok(written)
}
