//! Ending with the parent process and leaving no descendants: for our own child processes that run between us and other
//! people's programs.
//!
//! Invariant: nothing here runs in the main process. What the systems offer differs: Linux tells a child of its parent's
//! death and hands orphans to a chosen ancestor; on other unixes the child looks now and then; on Windows the parent keeps
//! the child's stdin open, and its end is the parent's.

use std::time::Duration;

/// How long what was started may take to end after it was asked to. Less than [`super::process::GRACE`].
const GRACE: Duration = Duration::from_secs(3);

/// Calls `lost` once when the parent process dies; `parent` is the process id that it must be. On Linux the caller must
/// also end on SIGTERM, which is how the news arrives there. Returns false when the parent is gone already.
pub fn end_with_parent(parent: u32, lost: impl FnOnce() + Send + 'static) -> bool {
    platform::end_with_parent(parent, lost)
}

/// Makes the calling process end without a word when its parent dies, also after it has become another program. Only
/// Linux can; elsewhere this does nothing and returns false.
pub fn die_with_parent() -> bool {
    platform::die_with_parent()
}

/// The parent's process id; 0 where the platform does not tell.
pub fn parent_id() -> u32 {
    platform::parent_id()
}

/// Makes this process the leader of a group of its own, and the one that inherits orphaned descendants where there is
/// such a thing.
pub fn lead() {
    platform::lead();
}

/// Ends everything that descends from this process, whatever group it put itself in: asked first, then by force.
pub fn end_descendants() {
    platform::end_descendants(GRACE);
}

/// [`end_descendants`], then this process's whole group, itself included.
pub fn end_all() {
    end_descendants();
    platform::end_own_group();
}

#[cfg(unix)]
mod platform {
    use std::time::Duration;
    #[cfg(target_os = "linux")]
    use std::time::Instant;

    #[cfg(target_os = "linux")]
    use rustix::process::Pid;
    use rustix::process::{self, Signal};

    #[cfg(target_os = "linux")]
    const POLL: Duration = Duration::from_millis(10);

    pub fn parent_id() -> u32 {
        process::getppid().map_or(0, |pid| pid.as_raw_pid().unsigned_abs())
    }

    #[cfg(target_os = "linux")]
    pub fn end_with_parent(parent: u32, lost: impl FnOnce() + Send + 'static) -> bool {
        drop(lost);
        let _ = process::set_parent_process_death_signal(Some(Signal::TERM));
        parent_id() == parent
    }

    #[cfg(not(target_os = "linux"))]
    pub fn end_with_parent(parent: u32, lost: impl FnOnce() + Send + 'static) -> bool {
        std::thread::spawn(move || {
            while parent_id() == parent {
                std::thread::sleep(Duration::from_millis(200));
            }
            lost();
        });
        parent_id() == parent
    }

    pub fn die_with_parent() -> bool {
        #[cfg(target_os = "linux")]
        return process::set_parent_process_death_signal(Some(Signal::KILL)).is_ok();
        #[cfg(not(target_os = "linux"))]
        false
    }

    pub fn lead() {
        if process::getpgrp() != process::getpid() {
            let _ = process::setpgid(None, None);
        }
        #[cfg(target_os = "linux")]
        let _ = process::set_child_subreaper(Some(process::getpid()));
    }

    #[cfg(not(target_os = "linux"))]
    pub fn end_descendants(_: Duration) {}

    #[cfg(target_os = "linux")]
    pub fn end_descendants(grace: Duration) {
        for pid in descendants() {
            let _ = process::kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + grace;
        while !descendants().is_empty() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        // A program may start another one between listing and killing, so this takes a few rounds.
        for _ in 0..20 {
            let left = descendants();
            if left.is_empty() {
                break;
            }
            for pid in left {
                let _ = process::kill_process(pid, Signal::KILL);
            }
            std::thread::sleep(POLL);
        }
    }

    pub fn end_own_group() {
        #[cfg(not(target_os = "linux"))]
        {
            // Nobody could be named before: ninja, asked, ends the compilers that it put in groups of their own.
            let _ = process::kill_current_process_group(Signal::TERM);
            std::thread::sleep(Duration::from_secs(1));
        }
        let _ = process::kill_current_process_group(Signal::KILL);
    }

    /// Living descendants, by `/proc`.
    #[cfg(target_os = "linux")]
    fn descendants() -> Vec<Pid> {
        let mut parents = Vec::new();
        for entry in crate::base::fs::read_dir(std::path::Path::new("/proc")).unwrap_or_default() {
            let pid = entry.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<i32>().ok());
            let stat = pid.and_then(|_| crate::base::fs::read_bounded(&entry.join("stat"), 4096).ok());
            let parent = stat.as_deref().and_then(parent_of_living);
            parents.extend(pid.zip(parent));
        }
        let mut family = vec![process::getpid().as_raw_pid()];
        let mut next = 0;
        while let Some(&parent) = family.get(next) {
            family.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
            next += 1;
        }
        family.into_iter().skip(1).filter_map(Pid::from_raw).collect()
    }

    /// The parent's id in a line of `/proc/<pid>/stat`, unless the process is a zombie. The second field is the name, in
    /// parentheses, and may hold anything (proc_pid_stat(5)).
    #[cfg(target_os = "linux")]
    fn parent_of_living(stat: &[u8]) -> Option<i32> {
        let text = String::from_utf8_lossy(stat);
        let mut fields = text[text.rfind(')')? + 1..].split_whitespace();
        let state = fields.next()?;
        fields.next()?.parse().ok().filter(|_| !matches!(state, "Z" | "X"))
    }

    #[cfg(all(test, target_os = "linux"))]
    mod tests {
        use super::*;

        #[test]
        fn a_process_may_call_itself_anything() {
            for (stat, parent) in [
                ("12 (sh) S 7 12", Some(7)),
                ("12 (a) Z (b)) R 9 1", Some(9)),
                ("12 (sh) Z 7 12", None),
                ("12 (sh) S", None),
                ("12 (sh) S x", None),
                ("", None),
            ] {
                assert_eq!(parent_of_living(stat.as_bytes()), parent, "{stat}");
            }
        }

        #[test]
        fn a_child_is_a_descendant_until_it_ends() {
            let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
            let pid = Pid::from_child(&child);
            assert!(descendants().contains(&pid));
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(!descendants().contains(&pid));
        }
    }
}

#[cfg(windows)]
mod platform {
    use std::process::Command;
    use std::time::Duration;

    pub fn parent_id() -> u32 {
        0
    }

    pub fn end_with_parent(_: u32, lost: impl FnOnce() + Send + 'static) -> bool {
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            lost();
        });
        true
    }

    pub fn die_with_parent() -> bool {
        false
    }

    pub fn lead() {}

    pub fn end_descendants(_: Duration) {}

    pub fn end_own_group() {
        let _ = Command::new("taskkill").args(["/T", "/F", "/PID", &std::process::id().to_string()]).output();
    }
}
