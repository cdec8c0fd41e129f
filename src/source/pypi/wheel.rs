//! Wheel names and what they say: which wheel runs on which platform, and where its programs are.
//!
//! The formats are PyPA's: file names and `.data` folders as in
//! <https://packaging.python.org/en/latest/specifications/binary-distribution-format/>, tags as in
//! <https://packaging.python.org/en/latest/specifications/platform-compatibility-tags/>.

use std::path::{Path, PathBuf};

use crate::base::fs;
use crate::base::platform::{self, Platform};
use crate::format::lockfile::FilePin;

use super::index::File;

/// Platforms whose wheels are locked: operating system, processor, and whether the C library is musl.
const PLATFORMS: [(&str, &str, bool); 8] = [
    ("linux", "x86_64", false),
    ("linux", "x86_64", true),
    ("linux", "aarch64", false),
    ("linux", "aarch64", true),
    ("macos", "x86_64", false),
    ("macos", "aarch64", false),
    ("windows", "x86_64", false),
    ("windows", "aarch64", false),
];

/// The last two tags of a wheel's name: the interpreter's binary interface, and platforms separated by dots.
fn tags(name: &str) -> Option<(&str, impl Iterator<Item = &str>)> {
    let mut parts = name.strip_suffix(".whl")?.rsplitn(3, '-');
    let (platforms, abi) = (parts.next()?, parts.next()?);
    Some((abi, platforms.split('.')))
}

fn runs(name: &str, platform: Platform, musl: bool) -> bool {
    tags(name).is_some_and(|(_, mut tags)| tags.any(|tag| platform.runs_wheel_tag(tag, musl)))
}

/// The wheels of all platforms, those that need a particular Python only when there are no others: what is wanted is the
/// program inside.
pub fn for_every_platform<'a>(files: &[&'a File]) -> Vec<&'a File> {
    let known = |file: &&File| PLATFORMS.iter().any(|&(os, arch, musl)| runs(&file.name, Platform { os, arch }, musl));
    let wheels: Vec<&File> = files.iter().copied().filter(known).collect();
    let free: Vec<&File> =
        wheels.iter().copied().filter(|file| tags(&file.name).is_some_and(|(abi, _)| abi == "none")).collect();
    if free.is_empty() { wheels } else { free }
}

/// The package of this machine: a wheel that runs here, else an sdist when that is all there is.
pub fn package_here(packages: &[FilePin]) -> Option<&FilePin> {
    package_for(packages, Platform::HOST, platform::is_musl())
}

fn package_for(packages: &[FilePin], platform: Platform, musl: bool) -> Option<&FilePin> {
    if let [package] = packages
        && !package.path.as_str().ends_with(".whl")
    {
        return Some(package);
    }
    let fitting = packages.iter().filter(|file| runs(file.path.file_name(), platform, musl));
    fitting.min_by_key(|file| needs(file.path.file_name()))
}

/// What a wheel asks of the system, the least first: the C library's or macOS's version. A wheel for any platform comes
/// last, being the fall-back.
fn needs(name: &str) -> (u32, u32) {
    let numbers = |tag: &str| match tag.split('_').next()? {
        "any" => Some((u32::MAX, 0)),
        "manylinux1" => Some((2, 5)),
        "manylinux2010" => Some((2, 12)),
        "manylinux2014" => Some((2, 17)),
        _ => {
            let mut parts = tag.split('_').skip(1).map_while(|part| part.parse().ok());
            Some((parts.next()?, parts.next().unwrap_or(0)))
        }
    };
    tags(name).and_then(|(_, tags)| tags.filter_map(numbers).min()).unwrap_or_default()
}

/// A Python that runs wheels: CPython 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpython {
    /// 11, for 3.11.
    pub minor: u32,
    /// Built without the global lock: a binary interface of its own.
    pub threaded: bool,
}

/// The package for one Python of this machine.
pub fn package_for_python(packages: &[FilePin], python: Cpython) -> Option<&FilePin> {
    let (platform, musl) = (Platform::HOST, platform::is_musl());
    let fits = |file: &&FilePin| runs(file.path.file_name(), platform, musl) && suits(file.path.file_name(), python);
    packages.iter().filter(fits).min_by_key(|file| needs(file.path.file_name()))
}

/// The Pythons of this machine's kind that a package has wheels for: `3.9`, `3.10`.
pub fn pythons(packages: &[FilePin]) -> Vec<String> {
    let has = |minor: &u32| package_for_python(packages, Cpython { minor: *minor, threaded: false }).is_some();
    (6..40).filter(has).map(|minor| format!("3.{minor}")).collect()
}

/// Whether a wheel's tags are among those of a Python.
fn suits(name: &str, python: Cpython) -> bool {
    let mut parts = name.strip_suffix(".whl").unwrap_or_default().rsplitn(4, '-').skip(1);
    let (Some(abi), Some(tags)) = (parts.next(), parts.next()) else { return false };
    let own = format!("cp3{}", python.minor);
    let abi_of_own = if python.threaded { format!("{own}t") } else { own.clone() };
    let not_newer = |tag: &str, start: &str| {
        tag.strip_prefix(start)
            .is_some_and(|minor| minor.is_empty() || minor.parse().is_ok_and(|minor: u32| minor <= python.minor))
    };
    tags.split('.').any(|tag| {
        (tag == own && (abi == abi_of_own || abi == "none"))
            || (abi == "abi3" && !python.threaded && tag != "cp3" && not_newer(tag, "cp3"))
            || (abi == "none" && not_newer(tag, "py3"))
    })
}

/// Where an unpacked wheel has a program: among its scripts (`ninja`, `uv`), or in the package's own folder (`cmake`).
pub fn program(unpacked: &Path, name: &str) -> Option<PathBuf> {
    let file = platform::executable(name);
    let folders = fs::read_dir(unpacked).ok()?;
    let places =
        folders.iter().flat_map(|folder| [folder.join("scripts").join(&file), folder.join("data/bin").join(&file)]);
    places.chain([unpacked.join("bin").join(&file)]).find(|path| fs::metadata(path).is_ok_and(|meta| meta.is_file()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::digest::Digest;

    const NINJA: [&str; 9] = [
        "ninja-1.13.2-py3-none-macosx_10_9_universal2.whl",
        "ninja-1.13.2-py3-none-manylinux2014_aarch64.manylinux_2_17_aarch64.whl",
        "ninja-1.13.2-py3-none-manylinux2014_i686.manylinux_2_17_i686.whl",
        "ninja-1.13.2-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "ninja-1.13.2-py3-none-manylinux_2_31_riscv64.whl",
        "ninja-1.13.2-py3-none-musllinux_1_2_x86_64.whl",
        "ninja-1.13.2-py3-none-win32.whl",
        "ninja-1.13.2-py3-none-win_amd64.whl",
        "ninja-1.13.2.tar.gz",
    ];

    fn pin(names: &[&str]) -> Vec<FilePin> {
        let file = |name: &&str| FilePin { path: name.parse().unwrap(), size: 1, sha256: Digest::of(b"") };
        names.iter().map(file).collect()
    }

    fn chosen(names: &[&str], os: &'static str, arch: &'static str, musl: bool) -> Option<String> {
        package_for(&pin(names), Platform { os, arch }, musl).map(|file| file.path.to_string())
    }

    #[test]
    fn each_platform_gets_its_wheel() {
        for (os, arch, musl, expected) in [
            ("linux", "x86_64", false, Some(NINJA[3])),
            ("linux", "aarch64", false, Some(NINJA[1])),
            ("linux", "x86_64", true, Some(NINJA[5])),
            ("linux", "aarch64", true, None),
            ("macos", "aarch64", false, Some(NINJA[0])),
            ("windows", "x86_64", false, Some(NINJA[7])),
            ("windows", "aarch64", false, None),
        ] {
            assert_eq!(chosen(&NINJA, os, arch, musl).as_deref(), expected, "{os} {arch} {musl}");
        }
    }

    #[test]
    fn the_least_demanding_wheel_is_taken_and_the_one_for_all_comes_last() {
        let names =
            ["x-1-py3-none-any.whl", "x-1-py3-none-manylinux_2_28_x86_64.whl", "x-1-py3-none-manylinux1_x86_64.whl"];
        assert_eq!(chosen(&names, "linux", "x86_64", false).as_deref(), Some(names[2]));
        assert_eq!(chosen(&names, "linux", "aarch64", false).as_deref(), Some(names[0]));
        assert_eq!(chosen(&["x-1.tar.gz"], "linux", "x86_64", false).as_deref(), Some("x-1.tar.gz"));
        assert_eq!(chosen(&["x-1", "x.whl", "-.whl"], "linux", "x86_64", false), None);
    }

    #[test]
    fn a_python_gets_what_suits_it() {
        let old = Cpython { minor: 11, threaded: false };
        let free = Cpython { minor: 13, threaded: true };
        for (name, with_old, with_free) in [
            ("numpy-1.26.4-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", true, false),
            ("numpy-1.26.4-cp312-cp312-manylinux_2_17_x86_64.whl", false, false),
            ("x-1-cp313-cp313t-manylinux_2_17_x86_64.whl", false, true),
            ("x-1-cp39-abi3-manylinux_2_17_x86_64.whl", true, false),
            ("x-1-cp312-abi3-manylinux_2_17_x86_64.whl", false, false),
            ("x-1-py2.py3-none-any.whl", true, true),
            ("x-1-1-py312-none-any.whl", false, true),
            ("x-1-pp310-pypy310_pp73-manylinux_2_17_x86_64.whl", false, false),
            ("x-1.tar.gz", false, false),
        ] {
            assert_eq!((suits(name, old), suits(name, free)), (with_old, with_free), "{name}");
        }
    }

    #[test]
    fn other_processors_and_sources_are_not_locked() {
        let file = |name: &&str| {
            serde_json::from_value(serde_json::json!({ "name": name, "size": 1, "sha256": null, "yanked": false }))
                .unwrap()
        };
        let files: Vec<File> = NINJA.iter().map(file).collect();
        let locked: Vec<&str> =
            for_every_platform(&files.iter().collect::<Vec<_>>()).iter().map(|file| file.name.as_str()).collect();
        assert_eq!(locked, [NINJA[0], NINJA[1], NINJA[3], NINJA[5], NINJA[7]]);
    }

    #[test]
    fn programs_are_found_where_wheels_have_them() {
        let root = tempfile::tempdir().unwrap();
        for path in ["ninja-1.data/scripts", "cmake/data/bin"] {
            let name = path.split(['-', '/']).next().unwrap();
            fs::write_atomic(&root.path().join(path).join(platform::executable(name)), b"").unwrap();
            assert!(program(root.path(), name).unwrap().starts_with(root.path().join(path)));
        }
        assert_eq!(program(root.path(), "cc"), None);
    }
}
