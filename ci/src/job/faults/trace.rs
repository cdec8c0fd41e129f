//! strace: where a command calls the system, and faults at those places.
//!
//! strace counts the calls of each thread. A fault at the n-th call of a kind therefore comes when some thread has made n of them;
//! the numbers that are tried are those of every thread of an undisturbed run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use xshell::Shell;

use super::process::run;
use super::world::World;
use crate::step::Result;

/// Calls that change names, or make things durable.
pub const CHANGES: &[&str] = &[
    "rename",
    "renameat",
    "renameat2",
    "fsync",
    "fdatasync",
    "syncfs",
    "link",
    "linkat",
    "unlink",
    "unlinkat",
    "symlink",
    "symlinkat",
    "mkdir",
    "mkdirat",
    "rmdir",
    "ftruncate",
    "fallocate",
    "copy_file_range",
    "sendfile",
    "chmod",
    "fchmod",
    "fchmodat",
    "utimensat",
    "flock",
    "write",
    "pwrite64",
];

/// An error and the calls that can give it.
pub const ERRORS: &[(&str, &[&str])] = &[
    (
        "ENOSPC",
        &[
            "write",
            "pwrite64",
            "copy_file_range",
            "fallocate",
            "ftruncate",
            "mkdir",
            "rename",
            "renameat2",
            "link",
            "linkat",
            "symlink",
            "symlinkat",
            "fsync",
        ],
    ),
    (
        "EIO",
        &["read", "pread64", "write", "pwrite64", "fsync", "fdatasync", "syncfs", "getdents64", "unlink", "rename"],
    ),
    ("EMFILE", &["openat", "socket", "pipe2", "epoll_create1", "eventfd2"]),
];

/// The n-th call of a kind.
pub type Place = (String, usize);

/// Calls of the named kinds that have to do with the world, and calls without a path.
pub fn places(sh: &Shell, world: &World, args: &[&str], calls: &[&str]) -> Result<BTreeSet<Place>> {
    let log = world.place.join("calls.txt");
    let before = words(&["strace", "-f", "-qq", "-y", "-s", "256", "-o"], &log, calls);
    let ended = run(sh, &world.place, &mut world.command(&before, args), None)?;
    if !ended.status.success() {
        return Err(format!("`{}` under strace: {}", args.join(" "), ended.words()).into());
    }
    let text = String::from_utf8_lossy(&sh.read_binary_file(&log)?).into_owned();
    Ok(parse(&text, &world.root.to_string_lossy()))
}

fn words(before: &[&str], log: &Path, calls: &[&str]) -> Vec<String> {
    let mut words: Vec<String> = before.iter().map(|word| (*word).to_owned()).collect();
    words.push(log.display().to_string());
    words.extend(["-e".to_owned(), format!("trace={}", calls.join(","))]);
    words
}

fn parse(log: &str, root: &str) -> BTreeSet<Place> {
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut places = BTreeSet::new();
    for line in log.lines() {
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        let Some((call, what)) = rest.trim_start().split_once('(') else { continue };
        if !call.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            continue;
        }
        let count = counts.entry((thread, call)).or_default();
        *count += 1;
        let has_no_path = matches!(call, "socket" | "pipe2" | "epoll_create1" | "eventfd2");
        if has_no_path || what.contains(root) {
            places.insert((call.to_owned(), *count));
        }
    }
    places
}

/// strace with one fault: `what` is `signal=SIGKILL` or `error=…`. With `on`, every later call of the thread fails, too.
pub fn fault(log: &Path, (call, number): &Place, what: &str, on: bool) -> Vec<String> {
    let mut words = words(&["strace", "-f", "-q", "-o"], log, &[call]);
    // Faster, but strace 6.1 sends no signals then.
    if !what.starts_with("signal") {
        words.insert(1, "--seccomp-bpf".to_owned());
    }
    let when = if on { format!("{number}+") } else { number.to_string() };
    words.extend(["-e".to_owned(), format!("inject={call}:{what}:when={when}")]);
    words
}

/// Whether a fault that was asked for came.
pub fn came(sh: &Shell, log: &Path) -> Result<bool> {
    let text = String::from_utf8_lossy(&sh.read_binary_file(log)?).into_owned();
    Ok(text.contains("(INJECTED)") || text.contains("+++ killed by SIGKILL"))
}

/// At most `most` places of each kind of call, spread over all of them.
pub fn spread(places: &BTreeSet<Place>, most: usize) -> Vec<Place> {
    let mut by_call: BTreeMap<&str, Vec<&Place>> = BTreeMap::new();
    for place in places {
        by_call.entry(&place.0).or_default().push(place);
    }
    let some = |all: Vec<&Place>| -> Vec<Place> {
        let count = all.len().min(most);
        (0..count).map(|index| all[index * all.len() / count].clone()).collect()
    };
    by_call.into_values().flat_map(some).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_thread() {
        let log = "7 openat(AT_FDCWD, \"/lib/x\", 0) = 3\n7 openat(AT_FDCWD, \"/w/a\", 0) = 3\n8 openat(AT_FDCWD, \"/w/b\" <unfinished ...>\n8 <... openat resumed>) = 3\n7 +++ exited with 0 +++\n8 pipe2([3, 4], 0) = 0\n";
        let place = |call: &str, number| (call.to_owned(), number);
        let expected = [place("openat", 1), place("openat", 2), place("pipe2", 1)];
        assert_eq!(parse(log, "/w"), expected.into());
    }

    #[test]
    fn places_are_spread() {
        let places = (1..=10).map(|number| ("write".to_owned(), number)).chain([("link".to_owned(), 1)]).collect();
        let numbers: Vec<usize> = spread(&places, 3).into_iter().map(|place| place.1).collect();
        assert_eq!(numbers, [1, 1, 4, 7]);
    }
}
