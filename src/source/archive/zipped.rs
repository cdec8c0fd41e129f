//! The entries of a zip archive.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::rc::Rc;

use zip::ZipArchive;
use zip::result::ZipError;

use crate::base::name::RelPath;
use crate::report::Task;

use super::{Content, Limits, MAX_NAME, MAX_RATIO, Met, Stop, Visit, checked_name, checked_target, is_bomb};

/// The central directory may not be larger: it is held in memory.
const MAX_DIRECTORY: u64 = 32 << 20;

/// Counts the bytes that opening a zip reads, since it holds them in memory.
struct Metered {
    file: BufReader<File>,
    left: Rc<Cell<u64>>,
}

impl Read for Metered {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        let left = self.left.get().checked_sub(count as u64);
        self.left.set(left.ok_or_else(|| io::Error::other("its directory is too large"))?);
        Ok(count)
    }
}

impl Seek for Metered {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

pub fn visit(file: File, packed: u64, task: &Task, limits: Limits, each: Visit<'_>) -> Result<(), Stop> {
    let left = Rc::new(Cell::new(MAX_DIRECTORY));
    let metered = Metered { file: BufReader::with_capacity(1 << 16, file), left: Rc::clone(&left) };
    let mut archive = ZipArchive::new(metered).map_err(refused_zip)?;
    left.set(u64::MAX);
    if archive.len() > limits.files {
        return Err(Stop::Refused(format!("it has more than {} files", limits.files)));
    }
    if archive.has_duplicate_names() {
        return Err(Stop::Refused("it has a name twice".to_owned()));
    }
    if archive.has_overlapping_entries().map_err(refused_zip)? {
        return Err(Stop::Refused("its entries overlap".to_owned()));
    }
    let mut total = 0_u64;
    for index in 0..archive.len() {
        task.check()?;
        left.set(u64::MAX);
        let Some((name, mode, size_bytes)) = zip_header(&archive, index)? else { continue };
        total = total.saturating_add(size_bytes);
        if is_bomb(total, packed) {
            return Err(Stop::Refused(format!("it unpacks to more than {MAX_RATIO} times its size: a bomb")));
        }
        let mut entry = archive.by_index(index).map_err(refused_zip)?;
        let met = match mode & 0o170_000 {
            0o120_000 => {
                let mut target = Vec::new();
                Read::take(&mut entry, MAX_NAME + 1).read_to_end(&mut target)?;
                Met { size_bytes: 0, content: Content::Symlink(checked_target(&name, &target)?), name }
            }
            0 | 0o100_000 => Met { name, size_bytes, content: Content::File { executable: mode & 0o100 != 0 } },
            _ => return Err(Stop::Refused(format!("`{name}` is a device, pipe or other special file"))),
        };
        each(met, &mut entry)?;
    }
    Ok(())
}

/// Name, unix mode (0 when none is given) and declared size; none for a folder.
fn zip_header(archive: &ZipArchive<Metered>, index: usize) -> Result<Option<(RelPath, u32, u64)>, Stop> {
    let entry = archive.by_index_data(index).map_err(refused_zip)?;
    let name = entry.name().map_err(refused_zip)?;
    if entry.encrypted() {
        return Err(Stop::Refused(format!("`{name}` is encrypted")));
    }
    let is_folder = name.ends_with('/');
    let Some(path) = checked_name(name.as_bytes())? else { return Ok(None) };
    let folder_mode = entry.unix_mode().unwrap_or(0) & 0o170_000 == 0o040_000;
    Ok((!is_folder && !folder_mode).then(|| (path, entry.unix_mode().unwrap_or(0), entry.size())))
}

fn refused_zip(error: ZipError) -> Stop {
    match error {
        ZipError::Io(error) => Stop::Io(error),
        error => Stop::Refused(error.to_string()),
    }
}
