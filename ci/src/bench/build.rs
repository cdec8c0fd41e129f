//! llama.cpp from source: our build, and the same CMake and Ninja with the same definitions on the same tree by hand.
//! Ours also copies the tree, hashes what it installs and writes a receipt. One round is two builds of minutes each.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::ground::{Ground, command};
use super::measure::{Contender, Series, interleave};
use super::{Bench, Run};
use crate::step::Result;

pub const BENCH: Bench =
    Bench { name: "build", about: "llama.cpp from source", rounds: 1, warm_up: false, run: Run::Processes(run) };

fn run(ground: &Ground<'_>, bench: &Bench, rounds: usize) -> Result<Vec<Series>> {
    let sh = ground.sh;
    let project = ground.quickstart()?;
    let cache = ground.folder("cache")?;
    let sync = || {
        let mut command = ground.ours(&project, Some(&cache));
        command.args(["-m", "quickstart", "sync", "--frozen"]);
        command
    };
    if !sync().status()?.success() {
        return Err("the first sync failed".into());
    }
    let script = by_hand(ground, &cache)?;
    let folder = ground.folder("by-hand")?;
    let contenders = &mut [
        Contender::prepared("aitools sync (fetched, not built)", || Ok(sh.remove_path(cache.join("artifacts"))?), sync),
        Contender::prepared(
            "cmake and ninja by hand",
            || Ok(sh.remove_path(folder.join("build"))?),
            || command(Path::new("sh"), &folder, &["-ec", &script]),
        ),
    ];
    interleave(contenders, bench.warm_up, rounds)
}

/// Configure and build as the receipt of our build says, on a copy of the tree it was built from.
fn by_hand(ground: &Ground<'_>, cache: &Path) -> Result<String> {
    let receipt = only(ground, &cache.join("artifacts"))?.join("receipt.json");
    let text = ground.sh.read_file(receipt)?;
    // The seal comes after it.
    let receipt = serde_json::Deserializer::from_str(&text).into_iter::<serde_json::Value>().next();
    let receipt = receipt.ok_or("the receipt is empty")??;
    let inputs: BTreeMap<String, String> =
        serde_json::from_value(find(&receipt, "inputs").cloned().unwrap_or_default())?;
    let input = |name: &str| inputs.get(name).ok_or_else(|| format!("the receipt has no input `{name}`"));
    let defines = inputs.iter().filter_map(|(name, value)| Some((name.strip_prefix("define.")?, value)));
    let defines: Vec<String> = defines.map(|(name, value)| format!("'-D{name}={value}'")).collect();
    let (cmake, ninja) = (ground.peer("cmake"), ground.peer("ninja"));
    Ok(format!(
        "'{}' -S '{}' -B build -G Ninja '-DCMAKE_MAKE_PROGRAM={ninja}' -DCMAKE_BUILD_TYPE={} {} > log; \
         '{ninja}' -C build {} >> log",
        cmake.display(),
        only(ground, &cache.join("trees"))?.display(),
        input("build-type")?,
        defines.join(" "),
        input("targets")?,
        ninja = ninja.display(),
    ))
}

/// The only folder in a folder.
fn only(ground: &Ground<'_>, folder: &Path) -> Result<PathBuf> {
    let entries = ground.sh.read_dir(folder)?;
    let mut folders = entries.into_iter().filter(|path| path.is_dir());
    folders.next().ok_or_else(|| format!("nothing is in `{}`", folder.display()).into())
}

/// The value of a key, at whatever depth: a sealed receipt wraps its text.
fn find<'a>(json: &'a serde_json::Value, key: &str) -> Option<&'a serde_json::Value> {
    let object = json.as_object()?;
    object.get(key).or_else(|| object.values().find_map(|value| find(value, key)))
}
