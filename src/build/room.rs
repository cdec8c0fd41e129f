//! One path for every build that hashes paths: nvcc puts the source's path into symbol names, and no flag stops it, so two
//! folders give two artifacts. In a mount namespace of its own a build sees its folders in a fixed place instead.
//!
//! Only Linux can, and only where namespaces are allowed; elsewhere builds go on where they lie. Nothing outside the
//! namespace sees these mounts.

use std::io;
use std::path::{Path, PathBuf};

use crate::base::fs;

/// Folders that every Linux has for people to mount things at, most of them empty. Only an empty one is used: what would be
/// hidden may be needed.
const ROOMS: &[&str] = &["/srv", "/media", "/mnt"];

/// Where the folders of a build will be seen.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Room {
    base: PathBuf,
    /// The build's source.
    pub source: PathBuf,
    /// The build's work folder.
    pub folder: PathBuf,
}

/// The first free room, if this system has one.
pub fn choose() -> Option<Room> {
    let free = |base: &&&str| fs::read_dir(Path::new(base)).is_ok_and(|entries| entries.is_empty());
    let base = PathBuf::from(ROOMS.iter().filter(|_| cfg!(target_os = "linux")).find(free)?);
    let place = base.join("aitools");
    Some(Room { source: place.join("src"), folder: place.join("work"), base })
}

impl Room {
    /// Shows `source` and `folder` in this room, to this process and what it starts. Must be called while the process has
    /// one thread, after [`super::isolation::leave_network`], which may have given it the right to.
    ///
    /// # Errors
    /// When the system refuses; the folders are then to be used where they lie.
    pub fn enter(&self, source: &Path, folder: &Path) -> io::Result<()> {
        platform::enter(self, source, folder)
    }
}

#[cfg(target_os = "linux")]
mod platform {
    use super::*;
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind_recursive, mount_change};
    use rustix::thread::UnshareFlags;

    pub fn enter(room: &Room, source: &Path, folder: &Path) -> io::Result<()> {
        super::super::isolation::unshare(UnshareFlags::NEWNS)?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        mount("tmpfs", &room.base, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755")?;
        for (from, to) in [(source, &room.source), (folder, &room.folder)] {
            fs::create_dir_all(to).map_err(|error| error.source)?;
            mount_bind_recursive(from, to)?;
        }
        Ok(())
    }
}

#[cfg(not(target_os = "linux"))]
mod platform {
    use super::*;

    pub fn enter(_: &Room, _: &Path, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
