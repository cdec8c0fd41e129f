//! What a build may reach: no network, no files of the user, nothing to write to but its own folders. And what an engine
//! may: no outgoing connections, nothing to write to but its own folder.
//!
//! Linux offers three barriers that need no rights, each of which may be refused or missing:
//!
//! | barrier | stops |
//! |---|---|
//! | a network namespace ([`super::isolation`]) | all of the network, abstract sockets, shared memory segments |
//! | a mount namespace | seeing home and temporary folders and the sockets in them and in `/run` |
//! | Landlock (landlock(7), Linux 5.13) | writing anywhere else; without a mount namespace also reading there; looking into and signalling other processes; without a network namespace connecting by TCP (6.7) |
//!
//! Elsewhere there are none: macOS and Windows run builds with the rights of the user, and notes and `doctor` say so.
//!
//! Invariant: called while the process has one thread. What is refused is left out, and the caller is told what holds.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::settings::{Env, lookup};
use crate::base::fs;

/// Variables whose folders hold what is the user's own.
const PRIVATE: &[&str] = &[
    "HOME",
    "XDG_CONFIG_HOME",
    "XDG_CACHE_HOME",
    "XDG_DATA_HOME",
    "XDG_STATE_HOME",
    "XDG_RUNTIME_DIR",
    "TMPDIR",
    "HF_HOME",
    "GNUPGHOME",
    "CARGO_HOME",
];
/// Where sessions and other users have their files and sockets.
const SHARED: &[&str] = &["/home", "/root", "/tmp", "/var/tmp", "/run", "/dev/shm"];
/// Folders that every system has; a variable that names one of them hides nothing.
const SYSTEM: &[&str] =
    &["/", "/usr", "/usr/local", "/bin", "/lib", "/lib64", "/etc", "/opt", "/var", "/dev", "/proc", "/sys"];

/// The files that a build sees.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Folders that may be written.
    pub writable: Vec<PathBuf>,
    /// Folders inside hidden ones that may be read all the same.
    pub readable: Vec<PathBuf>,
    /// Folders whose content is hidden. Real paths.
    pub hidden: Vec<PathBuf>,
}

/// What may be connected to by TCP, as far as the network that a process has goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connect {
    /// Everything.
    Anywhere,
    /// This one port, or nothing.
    Only(Option<u16>),
}

/// The barriers that hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Barriers {
    /// No network at all.
    pub network: bool,
    /// Home, temporary folders and sockets are hidden.
    pub hidden: bool,
    /// Nothing outside the view can be written, nor private folders be read.
    pub files: bool,
}

impl Barriers {
    /// For notes and `doctor`: `network, files, sockets`, or `nothing`.
    pub fn words(self) -> String {
        let words = [(self.network, "network"), (self.files, "files"), (self.hidden, "home and sockets")];
        let held: Vec<&str> = words.into_iter().filter(|(holds, _)| *holds).map(|(_, word)| word).collect();
        if held.is_empty() { "nothing".to_owned() } else { held.join(", ") }
    }
}

impl View {
    /// The view of a build that writes to `writable` and uses `tools`, for a user with this environment. Of a tool in a
    /// hidden folder, its installation prefix is shown.
    pub fn new(env: &Env, writable: &[&Path], tools: &[&Path]) -> Self {
        let named = PRIVATE.iter().filter_map(|name| lookup(env, name)).map(PathBuf::from);
        let hidden = named.chain(SHARED.iter().map(PathBuf::from)).filter_map(|path| fs::canonical(&path).ok());
        let mut hidden: Vec<PathBuf> =
            hidden.filter(|path| path.is_dir() && !SYSTEM.iter().any(|system| path == Path::new(system))).collect();
        hidden.sort();
        hidden.dedup();
        // A folder inside a hidden one is hidden with it.
        let inside = |path: &PathBuf| hidden.iter().any(|other| path != other && path.starts_with(other));
        let hidden: Vec<PathBuf> = hidden.iter().filter(|path| !inside(path)).cloned().collect();
        let real = |path: &Path| fs::canonical(path).unwrap_or_else(|_| path.to_owned());
        let mut readable: Vec<PathBuf> = Vec::new();
        for tool in tools {
            for prefix in [prefix_of(tool), prefix_of(&real(tool))] {
                let is_hidden = hidden.iter().any(|folder| prefix.starts_with(folder));
                if is_hidden && !readable.contains(&prefix) {
                    readable.push(prefix);
                }
            }
        }
        Self { writable: writable.iter().map(|path| real(path)).collect(), readable, hidden }
    }

    /// Whether a path lies in a hidden folder.
    #[cfg(target_os = "linux")]
    fn hides(&self, path: &Path) -> bool {
        self.hidden.iter().any(|folder| path.starts_with(folder))
    }
}

/// The folder that a tool is installed in: above its `bin`, unless that folder holds other things than programs
/// (`~/.local`); the tool's own folder otherwise.
fn prefix_of(tool: &Path) -> PathBuf {
    let folder = fs::parent(tool);
    let above = fs::parent(folder);
    let is_program_folder = folder.ends_with("bin") && !above.ends_with(".local") && !above.join(".ssh").exists();
    if is_program_folder { above.to_owned() } else { folder.to_owned() }
}

/// Hides what the view does not show, behind mounts of this process's own. [`super::isolation::leave_network`], called
/// before, may have given the right to.
///
/// # Errors
/// When the system refuses.
pub fn hide(view: &View) -> std::io::Result<()> {
    platform::hide(view)
}

/// Forbids this process and what it starts to read and write anything that the view does not show. `is_hidden`: [`hide`] was
/// successful. Says whether it is forbidden now.
pub fn restrict(view: &View, is_hidden: bool, connect: Connect) -> bool {
    platform::restrict(view, is_hidden, connect)
}

/// Forbids this process, and the engine that it becomes, to write anywhere but to `writable` and devices, and, without
/// `network`, to connect to anything by TCP. What the system cannot forbid stays allowed.
pub fn restrict_engine(writable: &[PathBuf], network: bool) {
    platform::restrict_engine(writable, network);
}

#[cfg(target_os = "linux")]
mod platform {
    use std::io;
    use std::os::fd::{AsRawFd as _, OwnedFd};

    use landlock::{
        ABI, Access as _, AccessFs, AccessNet, BitFlags, NetPort, PathBeneath, PathFd, Ruleset, RulesetAttr as _,
        RulesetCreated, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
    };
    use rustix::fs::{Mode, OFlags};
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind_recursive, mount_change};
    use rustix::thread::UnshareFlags;

    use super::*;

    /// The newest version of the interface that this is written for; older kernels do what they can.
    const LANDLOCK: ABI = ABI::V10;
    /// Hidden folders that programs expect to be able to write to: each build has its own, empty ones.
    const SCRATCH: &[&str] = &["/tmp", "/var/tmp", "/dev/shm"];

    pub fn hide(view: &View) -> io::Result<()> {
        super::super::isolation::unshare(UnshareFlags::NEWNS)?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        let mut shown: Vec<&PathBuf> =
            view.writable.iter().chain(&view.readable).filter(|path| view.hides(path)).collect();
        shown.sort();
        let open = |path| rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let held: Vec<OwnedFd> = shown.iter().map(|path| open(*path)).collect::<Result<_, _>>()?;
        for folder in &view.hidden {
            let mode =
                if SCRATCH.iter().any(|scratch| folder == Path::new(scratch)) { c"mode=1777" } else { c"mode=0755" };
            mount("tmpfs", folder, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, mode)?;
        }
        for (path, fd) in shown.into_iter().zip(&held) {
            fs::create_dir_all(path).map_err(|error| error.source)?;
            mount_bind_recursive(format!("/proc/self/fd/{}", fd.as_raw_fd()), path)?;
        }
        Ok(())
    }

    pub fn restrict(view: &View, is_hidden: bool, connect: Connect) -> bool {
        let ruled = || -> Result<bool, RulesetError> {
            let mut rules = Ruleset::default().handle_access(AccessFs::from_all(LANDLOCK))?;
            rules = rules.scope(Scope::from_all(LANDLOCK))?;
            if connect != Connect::Anywhere {
                rules = rules.handle_access(AccessNet::ConnectTcp | AccessNet::ConnectSendUdp)?;
            }
            let mut rules = rules.create()?;
            let mut readable = view.readable.clone();
            all_but(Path::new("/"), &view.hidden, &mut readable);
            rules = allow(rules, &readable, AccessFs::from_read(LANDLOCK))?;
            rules = allow(rules, &view.writable, AccessFs::from_all(LANDLOCK))?;
            if is_hidden {
                let scratch: Vec<PathBuf> = SCRATCH.iter().map(PathBuf::from).collect();
                rules = allow(rules, &scratch, AccessFs::from_all(LANDLOCK))?;
            }
            rules = allow(rules, &[PathBuf::from("/dev")], device_access())?;
            if let Connect::Only(Some(port)) = connect {
                rules = rules.add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
            }
            Ok(rules.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
        };
        ruled().unwrap_or(false)
    }

    pub fn restrict_engine(writable: &[PathBuf], network: bool) {
        let ruled = || -> Result<(), RulesetError> {
            let mut rules = Ruleset::default().handle_access(AccessFs::from_write(LANDLOCK))?;
            if !network {
                rules = rules.handle_access(AccessNet::ConnectTcp | AccessNet::ConnectSendUdp)?;
            }
            let rules = rules.scope(Scope::from_all(LANDLOCK))?.create()?;
            let rules = allow(rules, writable, AccessFs::from_write(LANDLOCK))?;
            let rules = allow(rules, &[PathBuf::from("/dev/shm")], AccessFs::from_write(LANDLOCK))?;
            let devices = device_access() & AccessFs::from_write(LANDLOCK);
            allow(rules, &[PathBuf::from("/dev"), PathBuf::from("/proc/self")], devices)?.restrict_self()?;
            Ok(())
        };
        let _ = ruled();
    }

    /// Devices are written to and controlled, not made.
    fn device_access() -> BitFlags<AccessFs> {
        AccessFs::from_read(LANDLOCK) | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev
    }

    fn allow(
        rules: RulesetCreated,
        paths: &[PathBuf],
        access: BitFlags<AccessFs>,
    ) -> Result<RulesetCreated, RulesetError> {
        // What is said of folders alone would be an error for a file.
        let of_files = AccessFs::from_file(LANDLOCK);
        paths.iter().try_fold(rules, |rules, path| match PathFd::new(path) {
            Ok(opened) => {
                let access = if path.is_dir() { access } else { access & of_files };
                rules.add_rule(PathBeneath::new(opened, access))
            }
            // It may be gone, or be a link that leads nowhere.
            Err(_) => Ok(rules),
        })
    }

    /// Everything below a folder but what is in `hidden`, in as few paths as that takes.
    fn all_but(folder: &Path, hidden: &[PathBuf], paths: &mut Vec<PathBuf>) {
        for path in fs::read_dir(folder).unwrap_or_default() {
            let Ok(real) = fs::canonical(&path) else { continue };
            let leads_in = |hidden: &PathBuf| real.starts_with(hidden) || hidden.starts_with(&real);
            if !hidden.iter().any(leads_in) {
                paths.push(path);
            } else if real == path && !hidden.contains(&path) {
                all_but(&path, hidden, paths);
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn all_but_the_hidden_is_shown_and_no_link_leads_there() {
            let root = tempfile::tempdir().unwrap();
            let real = fs::canonical(root.path()).unwrap();
            let at = |path: &str| real.join(path);
            for folder in ["usr/lib", "home/me/.ssh", "home/you", "var/tmp"] {
                fs::create_dir_all(&at(folder)).unwrap();
            }
            fs::symlink(&at("home/me"), &at("var/me")).unwrap();
            fs::symlink(&at("usr/lib"), &at("lib")).unwrap();
            let mut paths = Vec::new();
            all_but(&real, &[at("home/me"), at("var/tmp")], &mut paths);
            assert_eq!(paths, [at("home/you"), at("lib"), at("usr")]);
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod platform {
    use super::*;

    pub fn hide(_: &View) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    pub fn restrict(_: &View, _: bool, _: Connect) -> bool {
        false
    }

    pub fn restrict_engine(_: &[PathBuf], _: bool) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_in_a_hidden_folder_is_shown_with_its_prefix_alone() {
        let root = tempfile::tempdir().unwrap();
        let home = fs::canonical(root.path()).unwrap().join("é home");
        for folder in ["conda/bin", ".local/bin", "work", ".ssh"] {
            fs::create_dir_all(&home.join(folder)).unwrap();
        }
        let env = Env::from([("HOME".into(), home.clone().into()), ("XDG_DATA_HOME".into(), "/usr".into())]);
        let tools = [home.join("conda/bin/gcc"), home.join(".local/bin/cmake"), "/usr/bin/cc".into()];
        let tools: Vec<&Path> = tools.iter().map(PathBuf::as_path).collect();
        let work = home.join("work");
        let view = View::new(&env, &[&work], &tools);
        assert_eq!(view.readable, [home.join("conda"), home.join(".local/bin")]);
        assert_eq!(view.writable, [work]);
        assert!(view.hidden.iter().any(|folder| home.starts_with(folder)));
        assert!(!view.hidden.iter().any(|folder| folder == Path::new("/usr")));
        assert_eq!(Barriers { network: true, ..Barriers::default() }.words(), "network");
        assert_eq!(Barriers::default().words(), "nothing");
    }
}
