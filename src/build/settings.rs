//! What every build is given besides its recipe: a scrubbed environment, and the CMake definitions that make the result the
//! same wherever it is built. Pure.
//!
//! Paths are mapped (`-ffile-prefix-map`) to [`SOURCE_NAME`] and [`BUILD_NAME`], programs find their libraries beside
//! themselves, archives carry no times, no compiler cache is picked up by chance. What has no
//! flag (nvcc hashes source paths into names) is left to [`super::mounts`], and [`super::outputs`] says when a path got
//! through.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::mounts::BuildMounts;
use super::{BuildRequest, Network};

/// An environment: names and values.
pub type Env = BTreeMap<OsString, OsString>;

/// What the source folder is called in debug information and messages of a built program.
pub const SOURCE_NAME: &str = "/aitools/src";
/// What the build folder is called there.
pub const BUILD_NAME: &str = "/aitools/build";
/// A host that cannot exist (RFC 6761): what tries the network in a build fails at once, and names it.
pub const NO_NETWORK_HOST: &str = "no-network.aitools.invalid";

/// Incremented when a change in this file changes what builds produce. An input of the fingerprint.
pub const VERSION: u32 = 2;

/// Variables of the caller that reach a build. Everything else is dropped.
#[cfg(not(windows))]
const PASSED: &[&str] = &["CUDA_PATH", "ROCM_PATH", "HIP_PATH", "HIPCXX", "SDKROOT", "DEVELOPER_DIR"];
/// On Windows programs do not start without some of these.
#[cfg(windows)]
const PASSED: &[&str] = &[
    "CUDA_PATH",
    "HIP_PATH",
    "INCLUDE",
    "LIB",
    "LIBPATH",
    "SystemRoot",
    "SystemDrive",
    "windir",
    "ComSpec",
    "PATHEXT",
    "PROCESSOR_ARCHITECTURE",
    "ProgramFiles",
    "ProgramFiles(x86)",
    "ProgramW6432",
    "ProgramData",
    "VCINSTALLDIR",
    "VCToolsInstallDir",
    "VCToolsVersion",
    "VSINSTALLDIR",
    "VisualStudioVersion",
    "WindowsSdkDir",
    "WindowsSDKVersion",
    "WindowsSDKLibVersion",
    "UCRTVersion",
    "UniversalCRTSdkDir",
];

/// Offline switches of tools that builds like to call, so that they fail fast and say so.
const OFFLINE: &[(&str, &str)] = &[
    ("GIT_ALLOW_PROTOCOL", "file"),
    ("GIT_TERMINAL_PROMPT", "0"),
    ("GIT_CONFIG_NOSYSTEM", "1"),
    ("PIP_NO_INDEX", "1"),
    ("PIP_DISABLE_PIP_VERSION_CHECK", "1"),
    ("UV_OFFLINE", "1"),
    ("CARGO_NET_OFFLINE", "true"),
    ("npm_config_offline", "true"),
    ("GOPROXY", "off"),
    ("HF_HUB_OFFLINE", "1"),
];

/// The language of messages: English everywhere, and names of any letters where that needs saying.
pub const LOCALE: &str = if cfg!(target_os = "linux") { "C.UTF-8" } else { "C" };

/// The names under which tools look for a proxy.
pub const PROXY_NAMES: &[&str] =
    &["http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY"];

/// The names under which tools look for hosts that need no proxy.
const NO_PROXY_NAMES: &[&str] = &["no_proxy", "NO_PROXY"];

/// The environment of a build.
pub fn environment(ask: &BuildRequest) -> Env {
    let given = |name: &str| lookup(&ask.env, name).map(|value| (OsString::from(name), value.clone()));
    let mut env: Env = PASSED.iter().filter_map(|name| given(name)).collect();
    if ask.network == Network::Allowed {
        for (name, value) in PROXY_NAMES.iter().chain(NO_PROXY_NAMES).filter_map(|name| given(name)) {
            env.insert(name, value);
        }
    } else {
        env.extend(OFFLINE.iter().map(|(name, value)| (name.into(), value.into())));
        env.extend(PROXY_NAMES.iter().map(|name| (name.into(), format!("http://{NO_NETWORK_HOST}:9").into())));
        env.extend(NO_PROXY_NAMES.iter().map(|name| (name.into(), "localhost,127.0.0.1,::1".into())));
    }
    let mut set = |name: &str, value: OsString| drop(env.insert(name.into(), value));
    set("PATH", search_path(ask));
    set("LC_ALL", LOCALE.into());
    set("TZ", "UTC".into());
    set("ZERO_AR_DATE", "1".into());
    set("NUM_JOBS", ask.jobs.max(1).to_string().into());
    set("CMAKE", ask.cmake.path.clone().into());
    let home = ask.home();
    for name in ["HOME", "USERPROFILE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"] {
        set(name, home.clone().into());
    }
    for name in ["TMPDIR", "TEMP", "TMP"] {
        set(name, ask.temp().into());
    }
    // Without it, a source inside somebody's repository takes that repository's commit for its own.
    let ceilings = [&ask.source, &ask.folder].map(|folder| crate::base::fs::parent(folder).to_owned());
    set("GIT_CEILING_DIRECTORIES", std::env::join_paths(ceilings).unwrap_or_default());
    if is_msvc(&ask.compilers.cc.path) {
        // cl and link read these before their arguments: nothing to quote.
        set("CL", format!("/d1trimfile:\"{}\\\" /Brepro", ask.source.display()).into());
        set("LINK", "/Brepro".into());
    } else {
        set("CC", ask.compilers.cc.path.clone().into());
        set("CXX", ask.compilers.cxx.path.clone().into());
    }
    env
}

/// A variable's value; names have no case on Windows.
pub fn lookup<'a>(env: &'a Env, name: &str) -> Option<&'a OsString> {
    if cfg!(windows) {
        return env.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value);
    }
    env.get(std::ffi::OsStr::new(name))
}

/// The folders of the tools first, then the caller's own search path.
fn search_path(ask: &BuildRequest) -> OsString {
    let compilers = &ask.compilers;
    let accelerators = [compilers.cuda.as_ref(), compilers.hip.as_ref()];
    let tools = [Some(&ask.cmake), ask.ninja.as_ref(), Some(&compilers.cc)].into_iter().chain(accelerators);
    let mut folders: Vec<PathBuf> = Vec::new();
    let given = lookup(&ask.env, "PATH").map(std::env::split_paths).into_iter().flatten();
    for folder in tools.flatten().filter_map(|tool| tool.path.parent().map(Path::to_owned)).chain(given) {
        if folder.is_absolute() && !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    std::env::join_paths(folders).unwrap_or_default()
}

/// Whether a compiler is Microsoft's `cl`, by its name.
pub fn is_msvc(cc: &Path) -> bool {
    cc.file_stem().is_some_and(|stem| stem.eq_ignore_ascii_case("cl"))
}

/// Every definition that CMake gets, the recipe's own last. Flags that the recipe gives are kept beside ours.
pub fn definitions(ask: &BuildRequest, mounts: Option<&BuildMounts>) -> BTreeMap<String, String> {
    let mut all = common(ask);
    let msvc = is_msvc(&ask.compilers.cc.path);
    if msvc {
        all.insert("CMAKE_C_FLAGS".to_owned(), "/DWIN32 /D_WINDOWS".to_owned());
        all.insert("CMAKE_CXX_FLAGS".to_owned(), "/DWIN32 /D_WINDOWS /EHsc".to_owned());
    } else {
        let maps = prefix_maps(ask, mounts);
        let flags: Vec<String> = maps.iter().map(|flag| in_quotes(flag)).collect();
        for language in ["C", "CXX", "ASM", "OBJC", "OBJCXX"] {
            all.insert(format!("CMAKE_{language}_FLAGS"), flags.join(" "));
        }
        if ask.compilers.cuda.is_some() {
            all.insert("CMAKE_CUDA_FLAGS".to_owned(), cuda_flags(&maps));
        }
    }
    for (name, value) in &ask.recipe.define {
        let ours = all.get(name).filter(|_| name.ends_with("_FLAGS") && name.starts_with("CMAKE_"));
        let value = ours.map_or_else(|| value.clone(), |ours| format!("{ours} {value}"));
        all.insert(name.clone(), value);
    }
    all
}

fn common(ask: &BuildRequest) -> BTreeMap<String, String> {
    let origin = if cfg!(target_os = "macos") { "@loader_path" } else { "$ORIGIN" };
    let text = |path: &Path| path.to_string_lossy().replace('\\', "/");
    let mut all: BTreeMap<String, String> = [
        ("CMAKE_INSTALL_PREFIX", "/aitools/prefix".to_owned()),
        ("CMAKE_BUILD_RPATH_USE_ORIGIN", "ON".to_owned()),
        // Libraries are found beside the program or in `../lib`, wherever the artifact is moved.
        ("CMAKE_BUILD_RPATH", format!("{origin};{origin}/../lib")),
        ("CMAKE_EXPORT_COMPILE_COMMANDS", "ON".to_owned()),
        ("CMAKE_FIND_USE_PACKAGE_REGISTRY", "OFF".to_owned()),
        ("CMAKE_FIND_USE_SYSTEM_PACKAGE_REGISTRY", "OFF".to_owned()),
        ("CMAKE_C_COMPILER", text(&ask.compilers.cc.path)),
        ("CMAKE_CXX_COMPILER", text(&ask.compilers.cxx.path)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    for language in ["C", "CXX", "CUDA", "HIP"] {
        all.insert(format!("CMAKE_{language}_COMPILER_LAUNCHER"), String::new());
    }
    if let Some(nvcc) = &ask.compilers.cuda {
        all.insert("CMAKE_CUDA_COMPILER".to_owned(), text(&nvcc.path));
    }
    if let Some(ninja) = &ask.ninja {
        all.insert("CMAKE_MAKE_PROGRAM".to_owned(), text(&ninja.path));
    }
    if cfg!(target_os = "linux") {
        for language in ["C", "CXX"] {
            let rule = |what: &str| format!("CMAKE_{language}_ARCHIVE_{what}");
            all.insert(rule("CREATE"), "<CMAKE_AR> qcD <TARGET> <LINK_FLAGS> <OBJECTS>".to_owned());
            all.insert(rule("APPEND"), "<CMAKE_AR> qD <TARGET> <LINK_FLAGS> <OBJECTS>".to_owned());
            all.insert(rule("FINISH"), "<CMAKE_RANLIB> -D <TARGET>".to_owned());
        }
    }
    all
}

/// One flag for each folder. A path that quotes do not hold is left unmapped.
fn prefix_maps(ask: &BuildRequest, mounts: Option<&BuildMounts>) -> Vec<String> {
    let mut folders = vec![(ask.source.clone(), SOURCE_NAME), (ask.binary(), BUILD_NAME)];
    if let Some(mounts) = mounts {
        folders.extend([(mounts.source.clone(), SOURCE_NAME), (mounts.folder.join("build"), BUILD_NAME)]);
    }
    let named = folders.iter().filter_map(|(folder, name)| Some((folder.to_str()?, name)));
    let holds = named.filter(|(path, _)| !path.contains(['"', '$', '`', '\\', '\n']));
    holds.map(|(path, name)| format!("-ffile-prefix-map={path}={name}")).collect()
}

fn is_plain(flag: &str) -> bool {
    flag.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+:=".contains(c))
}

/// CMake hands flags to a shell as they are.
fn in_quotes(flag: &str) -> String {
    if is_plain(flag) { flag.to_owned() } else { format!("\"{flag}\"") }
}

/// `-objtemp` keeps the compiler's own process id out of the objects, and `-frandom-seed` (which an nvcc that does not know it
/// hands to the host compiler) keeps process id and time out of the names in PTX.
const OBJECTS: &str = "-objtemp -frandom-seed=aitools";

/// nvcc hands `-Xcompiler` to a second shell, which wants quotes of its own.
fn cuda_flags(maps: &[String]) -> String {
    let host = maps.iter().filter_map(|flag| match flag {
        flag if is_plain(flag) => Some(format!(" -Xcompiler {flag}")),
        flag if flag.contains(['\'', ',']) => None,
        flag => Some(format!(" -Xcompiler \"'{flag}'\"")),
    });
    format!("{OBJECTS}{}", host.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_survive_the_shells_they_pass() {
        let maps = ["-ffile-prefix-map=/a/b=/x".to_owned(), "-ffile-prefix-map=/é b=/y".to_owned()];
        assert_eq!(in_quotes(&maps[0]), maps[0]);
        assert_eq!(in_quotes(&maps[1]), "\"-ffile-prefix-map=/é b=/y\"");
        let expected = "-objtemp -frandom-seed=aitools -Xcompiler -ffile-prefix-map=/a/b=/x -Xcompiler \"'-ffile-prefix-map=/é b=/y'\"";
        assert_eq!(cuda_flags(&maps), expected);
        assert_eq!(cuda_flags(&["-ffile-prefix-map=/it's=/x".to_owned()]), OBJECTS);
    }
}
