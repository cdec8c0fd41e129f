//! A disk that is really full, and clocks that jump.

use std::path::Path;

use xshell::{Shell, cmd};

use super::process::{must_be_gone, run};
use super::scenario;
use super::snapshot::Snapshot;
use super::table::{Outcome, Table};
use super::world::World;
use crate::step::Result;

/// How many KiB are left on the disk.
const LEFT_KIB: &[u32] = &[0, 4, 16, 64, 128, 256, 400, 512, 600, 700, 800, 1000, 1200, 1600, 2000];
/// Runs in namespaces of its own, as root there: a disk of its own over the world's folder, filled but for `$3` KiB. What the first
/// run leaves is copied out, then the disk grows, and a second run follows.
const FULL_DISK: &str = r#"set -e
mount -t tmpfs none "$1"
cp -a "$2/." "$1"
used=$(df -k --output=used "$1" | tail -n 1)
mount -o remount,size=$((used + $3))k "$1"
cd "$1/project"
shift 3
code=0
"$@" > "$PLACE/full.txt" 2>&1 || code=$?
cp -a "$WORLD" "$PLACE/after-full"
mount -o remount,size=1g "$WORLD"
"$@" > "$PLACE/again.txt" 2>&1
cp -a "$WORLD" "$PLACE/after-again"
exit $code
"#;

/// Commands whose disk has more and more room. A `sync` compares what it needs with what is free first; a `lock` writes until the
/// disk is full.
pub fn full_disk(sh: &Shell, world: &World, table: &mut Table) -> Result<()> {
    if cmd!(sh, "unshare -rm true").quiet().ignore_stderr().run().is_err() {
        println!("not tried, because this system allows no user namespaces: a full disk");
        return Ok(());
    }
    fill(sh, world, "sync", scenario::lose_models, table)?;
    fill(sh, world, "lock", scenario::forget_the_lockfile, table)
}

type Prepare = fn(&Shell, &World) -> Result<()>;

fn fill(sh: &Shell, world: &World, name: &'static str, prepare: Prepare, table: &mut Table) -> Result<()> {
    prepare(sh, world)?;
    let start = Snapshot::take(sh, &world.root)?;
    let before = world.place.join("before-full");
    let (from, to) = (&world.root, &before);
    sh.remove_path(&before)?;
    cmd!(sh, "cp -a {from} {to}").quiet().run()?;
    world.must(sh, &[name])?;
    let end = Snapshot::take(sh, &world.root)?;
    for left in LEFT_KIB {
        let [after, again] = ["after-full", "after-again"].map(|name| world.place.join(name));
        sh.remove_path(&after)?;
        sh.remove_path(&again)?;
        let words = ["unshare", "-rm", "sh", "-c", FULL_DISK, "sh"].map(str::to_owned);
        let folders = [&world.root, &before].map(|folder| folder.display().to_string());
        let script = [&words[..], &folders, &[left.to_string()]].concat();
        let mut command = world.command(&script, &[name]);
        command.env("PLACE", &world.place).env("WORLD", &world.root);
        let ended = run(sh, &world.place, &mut command, None)?;
        must_be_gone(sh, &world.root)?;
        let said = sh.read_file(world.place.join("full.txt")).unwrap_or_default();
        let code = ended.status.code().unwrap_or(-1);
        let mut wrong = Vec::new();
        if !again.exists() {
            wrong.push(format!("the run after it failed: {}", sh.read_file(world.place.join("again.txt"))?));
        } else {
            wrong.extend(Snapshot::take(sh, &after)?.wrong_between(&start, &end));
            wrong.extend(Snapshot::take(sh, &again)?.differences(&end));
        }
        if said.contains("panicked") || ![0, 8].contains(&code) || (code == 8 && !said.contains("error")) {
            wrong.push(format!("exit code {code}"));
        }
        hold(&format!("a disk with {left} KiB left"), &wrong, &said)?;
        table.add(name, "full disk", Outcome::Ended(code));
    }
    Ok(())
}

/// Files of the cache and the project that come from the future or are very old, and a clock that says so.
pub fn clocks(sh: &Shell, world: &World, table: &mut Table) -> Result<()> {
    let version = world.version(sh)?;
    for when in ["2100-01-01", "now + 30 minutes", "1971-01-01"] {
        for kept in [true, false] {
            touch(sh, &world.root, when)?;
            if !kept {
                scenario::lose_models(sh, world)?;
            }
            judge_clock(sh, world, &[], &format!("files of {when}"))?;
            table.add("sync", "times of files", Outcome::Ended(0));
        }
    }
    if cmd!(sh, "faketime --version").quiet().ignore_stdout().ignore_stderr().run().is_err() {
        println!("not tried, because it is not here: faketime, for a clock that jumps");
        return Ok(());
    }
    for (index, jump) in ["+10y", "-10y", "+2h", "-2h", "+1d", "-1d", "+40d", "-1s"].into_iter().enumerate() {
        let other = if index % 2 == 0 { 1 - version } else { version };
        world.write_version(sh, other)?;
        scenario::lose_models(sh, world)?;
        let before = ["faketime", "-f", jump].map(str::to_owned);
        judge_clock(sh, world, &before, &format!("a clock at {jump}"))?;
        table.add("sync", "clock", Outcome::Ended(0));
    }
    Ok(())
}

/// Under a clock and then without it, `sync` succeeds, places what the sources are, and the program verifies everything.
fn judge_clock(sh: &Shell, world: &World, before: &[String], what: &str) -> Result<()> {
    let mut said = String::new();
    for before in [before, &[]] {
        for args in [&["sync"][..], &["verify"], &["run", "p", "--prompt", "x"], &["sync", "--locked", "--offline"]] {
            let mut command = world.command(before, args);
            // Clocks that are set do not change the one that waiting is measured with.
            let ended = run(sh, &world.place, command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1"), None)?;
            said = ended.words();
            if !ended.status.success() {
                return Err(format!("{what}: `{}`: {said}", args.join(" ")).into());
            }
        }
        let snapshot = Snapshot::take(sh, &world.root)?;
        let source = snapshot.things.get(Path::new("project/weights/m.gguf"));
        let mut wrong = snapshot.wrong_records(sh, &world.root)?;
        if snapshot.things.get(Path::new("project/models/tiny/m/model.gguf")) != source {
            wrong.push("an old version of a source is in place".to_owned());
        }
        hold(what, &wrong, &said)?;
    }
    Ok(())
}

fn touch(sh: &Shell, root: &Path, when: &str) -> Result<()> {
    let each = ["-type", "f", "-exec", "touch", "-h", "-d", when, "{}", "+"];
    Ok(cmd!(sh, "find {root} {each...}").quiet().run()?)
}

fn hold(what: &str, wrong: &[String], said: &str) -> Result<()> {
    if wrong.is_empty() { Ok(()) } else { Err(format!("{what}: {}\n{said}", wrong.join("\n  ")).into()) }
}
