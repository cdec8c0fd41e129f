//! Fixed paths for a build that hashes paths: nvcc puts the source's path into symbol names, and no flag stops it, so two
//! folders would give two artifacts. In a mount namespace of its own a build sees its folders at fixed paths instead.
//!
//! Only Linux has mount namespaces, and only where they are allowed; elsewhere a build uses its folders where they are.
//! Nothing outside the namespace sees these mounts.

use std::io;
use std::path::{Path, PathBuf};

use crate::base::fs;

/// Folders that every Linux has as mount points, usually empty. Only an empty one is used: a mount hides what is there.
const MOUNT_POINTS: &[&str] = &["/srv", "/media", "/mnt"];

/// The fixed paths of a build's folders.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BuildMounts {
    base: PathBuf,
    /// The build's source.
    pub source: PathBuf,
    /// The build's work folder.
    pub folder: PathBuf,
}

/// Paths below the first empty mount point; none where the system has no mount namespaces or no empty mount point.
pub fn choose() -> Option<BuildMounts> {
    let free = |base: &&&str| fs::read_dir(Path::new(base)).is_ok_and(|entries| entries.is_empty());
    let base = PathBuf::from(MOUNT_POINTS.iter().filter(|_| cfg!(target_os = "linux")).find(free)?);
    let place = base.join("aitools");
    Some(BuildMounts { source: place.join("src"), folder: place.join("work"), base })
}

impl BuildMounts {
    /// Mounts `source` and `folder` at the fixed paths, for this process and what it starts. Call it while the process has
    /// one thread, after [`super::isolation::leave_network`], which may have given it the right to mount.
    ///
    /// # Errors
    /// When the system refuses; the build then uses the folders where they are.
    pub fn enter(&self, source: &Path, folder: &Path) -> io::Result<()> {
        platform::enter(self, source, folder)
    }
}

#[cfg(target_os = "linux")]
mod platform {
    use super::*;
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind_recursive, mount_change};
    use rustix::thread::UnshareFlags;

    pub fn enter(mounts: &BuildMounts, source: &Path, folder: &Path) -> io::Result<()> {
        super::super::isolation::unshare(UnshareFlags::NEWNS)?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        mount("tmpfs", &mounts.base, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755")?;
        for (from, to) in [(source, &mounts.source), (folder, &mounts.folder)] {
            fs::create_dir_all(to).map_err(|error| error.source)?;
            mount_bind_recursive(from, to)?;
        }
        Ok(())
    }
}

#[cfg(not(target_os = "linux"))]
mod platform {
    use super::*;

    pub fn enter(_: &BuildMounts, _: &Path, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
