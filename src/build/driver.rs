//! The child process of our own that runs CMake: `aitools internal build REQUEST.json`.
//!
//! The `cmake` crate is made for build scripts: it prints `cargo:` lines, reads many variables and panics. All of that stays
//! in this process, whose whole environment is given and whose output is the log. It is also where a build leaves the network
//! and where everything that a build started is ended.
//!
//! Configure and build are two runs, so that the caller can look at `CMakeCache.txt` in between. The crate only knows both
//! at once; in the configure run its build step asks the build tool for its version and nothing else, and in the build run
//! it finds the cache and skips the configure step.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::confine::{self, Barriers, Connect, View};
use super::mounts::BuildMounts;
use super::{Network, Phase, isolation, settings};
use crate::base::{fs, lifeline};

/// What the parent asks. The environment is the process's own.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Which step to run.
    pub phase: Phase,
    /// The process that asks: when it is gone, so is the build.
    pub parent: u32,
    /// The source folder.
    pub source: PathBuf,
    /// The work folder; CMake's build folder is `build` in it.
    pub folder: PathBuf,
    /// CMake's generator: `Ninja`.
    pub generator: String,
    /// Where the folders are to be seen, if they may be.
    pub mounts: Option<BuildMounts>,
    /// CMake definitions.
    pub define: BTreeMap<String, String>,
    /// `CMAKE_BUILD_TYPE`.
    pub build_type: String,
    /// Everything when empty.
    pub targets: Vec<String>,
    /// Where to write a [`Report`] line, and then who tried to use the network.
    pub network: PathBuf,
    /// What the build sees of the file system.
    pub view: View,
    /// What the build may do with the network.
    pub access: Network,
}

/// What the driver could do for the build, as one line of JSON.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Why the build has a network; none when it has none.
    pub network: Option<String>,
    /// The barriers that hold, in words.
    pub confined: String,
    /// The source's path when [`BuildMounts`] gave it another.
    pub place: Option<PathBuf>,
}

/// Why a build has a network that the manifest gave it.
pub const ALLOWED: &str = "the manifest allows it";
/// Longer requests are not ours.
const MAX_REQUEST_BYTES: u64 = 4 << 20;

/// Runs one request and gives the exit code: 0 done, 1 the build failed or must not run here, 2 the request makes no sense.
///
/// Must be called while the process has one thread. On SIGTERM, and when the parent dies, everything that was started is
/// ended, and this process with it.
pub fn run_driver(request: &Path) -> i32 {
    match read(request) {
        Ok(request) => drive(request),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "failed to execute command: {error}");
            2
        }
    }
}

fn read(path: &Path) -> Result<Request, Box<dyn std::error::Error>> {
    Ok(serde_json::from_slice(&fs::read_bounded(path, MAX_REQUEST_BYTES)?)?)
}

fn drive(mut request: Request) -> i32 {
    platform::usual_permissions();
    let allowed = request.access == Network::Allowed;
    let left = if allowed { Err(std::io::Error::other(ALLOWED)) } else { isolation::leave_network() };
    let mut report = Report { network: left.err().map(|why| why.to_string()), ..Report::default() };
    if request.access == Network::Never && report.network.is_some() {
        report_to(&request.network, &report);
        return 1;
    }
    let hidden = confine::hide(&request.view).is_ok();
    if let Some(mounts) = request.mounts.take()
        && mounts.enter(&request.source, &request.folder).is_ok()
    {
        request.view.writable.extend([mounts.source.clone(), mounts.folder.clone()]);
        (request.source, request.folder) = (mounts.source.clone(), mounts.folder);
        report.place = Some(mounts.source);
    }
    let trap = isolation::Trap::bind().ok().filter(|_| !allowed);
    let connect = match &report.network {
        Some(_) if !allowed => Connect::Only(trap.as_ref().map(isolation::Trap::port)),
        _ => Connect::Anywhere,
    };
    let files = confine::restrict(&request.view, hidden, connect);
    report.confined = Barriers { network: report.network.is_none(), hidden, files }.words();
    report_to(&request.network, &report);
    // Threads from here on.
    lifeline::lead();
    let _ = ctrlc::set_handler(lifeline::end_all);
    if !lifeline::end_with_parent(request.parent, lifeline::end_all) {
        return 1;
    }
    let trap = trap.map(|trap| trap.serve(request.network.clone()));
    std::panic::set_hook(Box::new(|_| {}));
    let ran = std::panic::catch_unwind(AssertUnwindSafe(|| configure(&request, trap.as_deref()).build()));
    if let Err(why) = &ran {
        let text = why.downcast_ref::<String>().map_or("", String::as_str);
        let text = text.split("\n\nbuild script failed").next().unwrap_or(text).trim();
        let _ = writeln!(std::io::stderr(), "{text}");
    }
    lifeline::end_descendants();
    i32::from(ran.is_err())
}

/// What this system offers for builds, tried out by confining this very process. `env` is the user's.
pub fn probe(env: &settings::Env, folder: &Path) -> Report {
    let left = isolation::leave_network();
    let view = View::new(env, &[folder], &[]);
    let hidden = confine::hide(&view).is_ok();
    let files = confine::restrict(&view, hidden, Connect::Anywhere);
    let confined = Barriers { network: left.is_ok(), hidden, files }.words();
    Report { network: left.err().map(|why| why.to_string()), confined, place: None }
}

fn report_to(path: &Path, report: &Report) {
    let line = serde_json::to_string(report).unwrap_or_default();
    let _ = fs::write_atomic(path, format!("{line}\n").as_bytes());
}

fn configure(request: &Request, trap: Option<&str>) -> cmake::Config {
    let host = platform::target();
    let mut config = cmake::Config::new(&request.source);
    config
        .host(&host)
        .target(&host)
        .out_dir(&request.folder)
        .generator(&request.generator)
        .profile(&request.build_type)
        .no_default_flags(true)
        .no_build_target(true)
        .always_configure(request.phase == Phase::Configure);
    // The crate would set it to `C`.
    config.env("LC_ALL", settings::LOCALE);
    for (name, value) in &request.define {
        config.define(name, value);
    }
    for name in settings::PROXY_NAMES.iter().filter(|_| trap.is_some()) {
        config.env(name, trap.unwrap_or_default());
    }
    match request.phase {
        Phase::Configure if request.generator == super::NMAKE => config.build_arg("/?"),
        Phase::Configure => config.build_arg("--version"),
        Phase::Build => request.targets.iter().fold(&mut config, |config, target| config.build_arg(target)),
    };
    config
}

#[cfg(unix)]
mod platform {
    pub fn usual_permissions() {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    }

    /// This machine in rustc's words, for the `cmake` crate, which only tells the systems apart.
    pub fn target() -> String {
        let arch = match std::env::consts::ARCH {
            "x86" => "i686",
            "riscv64" => "riscv64gc",
            arch => arch,
        };
        let system = match std::env::consts::OS {
            "macos" => "apple-darwin",
            "linux" => "unknown-linux-gnu",
            "freebsd" => "unknown-freebsd",
            _ => "unknown-none",
        };
        format!("{arch}-{system}")
    }
}

#[cfg(windows)]
mod platform {
    pub fn usual_permissions() {}

    pub fn target() -> String {
        format!("{}-pc-windows-{}", std::env::consts::ARCH, if cfg!(target_env = "gnu") { "gnu" } else { "msvc" })
    }
}
