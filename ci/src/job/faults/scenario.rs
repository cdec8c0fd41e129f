//! The commands that are disturbed, and how the world is made ready for each of them.

use std::path::{Path, PathBuf};

use xshell::{Shell, cmd};

use super::world::World;
use crate::step::Result;

/// A command, and what it finds.
#[derive(Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub args: &'static [&'static str],
    /// Turns the state after an undisturbed run, whatever its version, into the one before the next run.
    pub prepare: fn(&Shell, &World) -> Result<()>,
    /// Whether undisturbed runs end in two states in turn.
    pub alternates: bool,
    /// How many kills at random moments.
    pub random_kills: usize,
    /// Places of each kind of call that are killed, and that get an error, at most.
    pub most: (usize, usize),
}

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "lock",
        args: &["lock"],
        prepare: forget_the_lockfile,
        alternates: false,
        random_kills: 130,
        most: (16, 5),
    },
    Scenario {
        name: "sync",
        args: &["sync"],
        prepare: change_a_source_and_lose_models,
        alternates: true,
        random_kills: 180,
        most: (40, 6),
    },
    Scenario {
        name: "sync (build)",
        args: &["sync", "p"],
        prepare: lose_an_engine,
        alternates: false,
        random_kills: 20,
        most: (4, 1),
    },
    Scenario {
        name: "verify --repair",
        args: &["verify", "--repair"],
        prepare: damage,
        alternates: false,
        random_kills: 150,
        most: (40, 6),
    },
    Scenario {
        name: "sync (derive)",
        args: &["sync", "s"],
        prepare: lose_a_derived_model,
        alternates: false,
        random_kills: 150,
        most: (40, 6),
    },
    Scenario {
        name: "run",
        args: &["run", "p", "--prompt", "What is the capital of France?"],
        prepare: |_, _| Ok(()),
        alternates: false,
        random_kills: 200,
        most: (40, 6),
    },
];

/// The lockfile, and what is known of sources.
pub fn forget_the_lockfile(sh: &Shell, world: &World) -> Result<()> {
    sh.remove_path(world.project().join("manifests/default.lock"))?;
    sh.remove_path(world.cache().join("paths"))?;
    Ok(sh.remove_path(world.cache().join("scratch"))?)
}

fn change_a_source_and_lose_models(sh: &Shell, world: &World) -> Result<()> {
    let version = world.version(sh)?;
    world.write_version(sh, 1 - version)?;
    lose_models(sh, world)
}

/// What came from servers, and a model of a folder.
pub fn lose_models(sh: &Shell, world: &World) -> Result<()> {
    for served in &world.served {
        sh.remove_path(world.cache().join("blobs").join(served))?;
    }
    for lost in ["project/models/url", "project/models/hub", "project/models/f16", "hub", "cache/scratch"] {
        sh.remove_path(world.root.join(lost))?;
    }
    Ok(())
}

fn lose_an_engine(sh: &Shell, world: &World) -> Result<()> {
    let program = world.project().join("build/tiny/bin/llama-server").canonicalize()?;
    let artifact = program.ancestors().nth(2).ok_or("the engine has no folder")?;
    sh.remove_path(artifact)?;
    let tree = tree_with(sh, world, "main.c", "llama-server")?;
    sh.remove_path(tree)?;
    Ok(sh.remove_path(world.cache().join("scratch"))?)
}

/// Changes bytes in place, so that nothing but a hash can tell, and removes files.
fn damage(sh: &Shell, world: &World) -> Result<()> {
    for kept in ["hub", "project/models"] {
        remove_old(sh, &world.root.join(kept))?;
    }
    // A repair removes a damaged source of an engine that is built, and may leave a file in its place alone: both are put back.
    for (folder, how) in [("trees", "-a"), ("blobs", "-an")] {
        let (kept, here) = (world.place.join("copy/cache").join(folder), world.cache().join(folder));
        cmd!(sh, "cp {how} {kept}/. {here}").quiet().run()?;
    }
    let blobs = world.cache().join("blobs");
    for damaged in [blobs.join(&world.served[0]), blobs.join(&world.served[1])] {
        flip(sh, &damaged)?;
    }
    let tree = tree_with(sh, world, "quantize.c", "fopen")?;
    flip(sh, &tree.join("quantize.c"))?;
    Ok(sh.remove_path(world.project().join("models/tiny/m/model.gguf"))?)
}

fn lose_a_derived_model(sh: &Shell, world: &World) -> Result<()> {
    let placed = world.project().join("models/q4/q4.gguf");
    let digest = super::snapshot::sha256(&sh.read_binary_file(placed)?);
    sh.remove_path(world.cache().join("blobs").join(digest))?;
    sh.remove_path(world.cache().join("derived"))?;
    Ok(sh.remove_path(world.project().join("models/q4"))?)
}

/// The engine source in the cache whose file holds a text.
fn tree_with(sh: &Shell, world: &World, file: &str, text: &str) -> Result<PathBuf> {
    for tree in sh.read_dir(world.cache().join("trees"))? {
        if sh.read_file(tree.join(file)).is_ok_and(|found| found.contains(text)) {
            return Ok(tree);
        }
    }
    Err(format!("no tree has a `{file}` with `{text}`").into())
}

/// Changes the last byte of a file in place, whoever may write it, and leaves its times to the system.
fn flip(sh: &Shell, path: &Path) -> Result<()> {
    use std::io::{Seek as _, SeekFrom, Write as _};
    use std::os::unix::fs::PermissionsExt as _;
    let mut bytes = sh.read_binary_file(path)?;
    let last = bytes.pop().ok_or("an empty file cannot be damaged")?;
    let mode = path.metadata()?.permissions();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let mut file = std::fs::OpenOptions::new().write(true).open(path)?;
    file.seek(SeekFrom::End(-1))?;
    file.write_all(&[!last])?;
    Ok(std::fs::set_permissions(path, mode)?)
}

/// Removes what earlier repairs moved aside.
fn remove_old(sh: &Shell, folder: &Path) -> Result<()> {
    for path in sh.read_dir(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && !path.is_symlink() {
            remove_old(sh, &path)?;
        } else if [".bad", ".bak"].iter().any(|ending| name.contains(ending)) {
            sh.remove_path(path)?;
        }
    }
    Ok(())
}
