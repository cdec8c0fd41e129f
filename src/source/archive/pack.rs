//! Writes a folder as a tar archive: the same bytes for the same files, wherever and whenever they were written.
//!
//! Files come in the order of their paths. Absent: owners, times, permissions but "may be run". Long names and links are
//! written as GNU tar writes them.

use std::io::{Read, Write};
use std::path::Path;

use tar::{Builder, EntryType, Header};

use crate::base::fs::{self, FsError};
use crate::base::tree::{Listing, Mode};
use crate::report::Task;

use super::SourceError;

/// Writes the files of `listing`, which are below `root`. Their digests are not compared: who unpacks the archive does that.
///
/// # Errors
/// When a file is not there or has another size, when the archive cannot be written, or when the user asked to stop.
pub fn pack(root: &Path, listing: &Listing, into: impl Write, task: &Task) -> Result<(), SourceError> {
    let mut tar = Builder::new(into);
    let wrote = |path: &Path, error| SourceError::from(FsError::new("pack", path, error));
    for (path, entry) in &listing.0 {
        task.check()?;
        let from = path.under(root);
        let mut header = Header::new_gnu();
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mode(if entry.mode == Mode::File { 0o644 } else { 0o755 });
        if entry.mode == Mode::Symlink {
            header.set_entry_type(EntryType::Symlink);
            header.set_size(0);
            tar.append_link(&mut header, path.as_str(), link_target(&from)?).map_err(|error| wrote(&from, error))?;
            continue;
        }
        let file = fs::open(&from)?;
        let size_bytes = file.metadata().map_err(|error| wrote(&from, error))?.len();
        if size_bytes != entry.size_bytes {
            return Err(wrote(&from, std::io::Error::other("it changed meanwhile")));
        }
        header.set_entry_type(EntryType::Regular);
        header.set_size(size_bytes);
        tar.append_data(&mut header, path.as_str(), file.take(size_bytes)).map_err(|error| wrote(&from, error))?;
    }
    tar.into_inner().and_then(|mut into| into.flush()).map_err(|error| wrote(root, error))
}

/// Where links need a privilege, a link is a file that holds its target.
fn link_target(link: &Path) -> Result<String, FsError> {
    const MAX_BYTES: u64 = 64 << 10;
    let target = match fs::read_link(link) {
        Ok(target) => target.to_string_lossy().into_owned(),
        Err(_) => String::from_utf8_lossy(&fs::read_bounded(link, MAX_BYTES)?).into_owned(),
    };
    Ok(target.replace('\\', "/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::cancel::Cancel;
    use crate::base::tree::Modes;
    use crate::source::archive::{Archive, Limits, Select};

    #[test]
    fn what_is_packed_unpacks_to_the_same_tree_and_packs_to_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("un dossier");
        let long = format!("{}/{}", "é".repeat(40), "n".repeat(120));
        for (path, bytes) in [("b/x.c", &b"int x;"[..]), ("a é", b""), (&long, b"long")] {
            fs::write_atomic(&root.join(path), bytes).unwrap();
        }
        fs::write_atomic(&root.join("run.sh"), b"#!").unwrap();
        fs::set_executable(&root.join("run.sh")).unwrap();
        let mut modes = Modes::from([("run.sh".parse().unwrap(), Mode::Executable)]);
        fs::write_link("../run.sh", &root.join("b/link")).unwrap();
        modes.insert("b/link".parse().unwrap(), Mode::Symlink);
        let listing = Listing::scan(&root, &modes, &Cancel::default()).unwrap();
        let mut tar = Vec::new();
        pack(&root, &listing, &mut tar, &Task::silent()).unwrap();

        let (file, again) = (folder.path().join("t.tar"), folder.path().join("again"));
        fs::write_atomic(&file, &tar).unwrap();
        let task = Task::silent();
        let archive = Archive::open(&file, "t", &Select::default(), Limits::default(), &task).unwrap();
        assert_eq!(archive.listing().unwrap(), listing);
        let unpacked = archive.unpack(&again, &|_| true).unwrap();
        assert_eq!(Listing::scan(&again, &unpacked.modes, &Cancel::default()).unwrap().digest(), listing.digest());
        let mut second = Vec::new();
        pack(&again, &listing, &mut second, &Task::silent()).unwrap();
        assert_eq!(tar, second);
    }
}
