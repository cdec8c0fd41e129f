//! The entries of a tar archive.

use std::io::Read;

use crate::report::Task;

use super::{Content, MAX_NAME, Met, Stop, Visit, checked_name, checked_target};

/// Largest set of pax records for one file.
const MAX_PAX: u64 = 1 << 20;

/// What the extension headers before a tar entry said about it.
#[derive(Default)]
struct Extra {
    name: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
}

pub fn visit(reader: impl Read, task: &Task, limit: usize, each: Visit<'_>) -> Result<(), Stop> {
    let mut archive = tar::Archive::new(reader);
    let mut extra = Extra::default();
    // Raw: the library would hold extension headers of any size in memory.
    for (count, entry) in archive.entries()?.raw(true).enumerate() {
        task.check()?;
        if count > limit * 3 {
            return Err(Stop::Refused(format!("it has more than {limit} files")));
        }
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        if read_extension(&mut entry, kind, &mut extra)? {
            continue;
        }
        let said = std::mem::take(&mut extra);
        if said.size.is_some_and(|size| size != entry.size()) {
            return Err(Stop::Refused("a size is given twice, differently".to_owned()));
        }
        let name = said.name.unwrap_or_else(|| entry.path_bytes().into_owned());
        let Some(name) = checked_name(&name)? else { continue };
        let target = said.target.or_else(|| entry.link_name_bytes().map(std::borrow::Cow::into_owned));
        let size_bytes = if kind.is_file() || kind.is_contiguous() { entry.size() } else { 0 };
        let content = match kind {
            _ if kind.is_dir() => continue,
            _ if (kind.is_file() || kind.is_contiguous()) && entry.path_bytes().ends_with(b"/") => continue,
            _ if kind.is_file() || kind.is_contiguous() => {
                Content::File { executable: entry.header().mode().is_ok_and(|mode| mode & 0o100 != 0) }
            }
            _ if kind.is_symlink() => Content::Symlink(checked_target(&name, &target.unwrap_or_default())?),
            _ if kind.is_hard_link() => match checked_name(&target.unwrap_or_default())? {
                Some(other) => Content::HardLink(other),
                None => return Err(Stop::Refused(format!("`{name}` is a broken link"))),
            },
            other => {
                let byte = char::from(other.as_byte());
                return Err(Stop::Refused(format!("`{name}` is a device, pipe or other special file (type `{byte}`)")));
            }
        };
        each(Met { name, size_bytes, content }, &mut entry)?;
    }
    // To the end, so that a checksum there is looked at.
    let mut rest = archive.into_inner();
    let mut chunk = vec![0; 1 << 16];
    while rest.read(&mut chunk)? > 0 {
        task.check()?;
    }
    Ok(())
}

/// Takes in a header that only describes the next one; says whether it was such.
fn read_extension(
    entry: &mut tar::Entry<'_, impl Read>,
    kind: tar::EntryType,
    extra: &mut Extra,
) -> Result<bool, Stop> {
    let mut take = |limit: u64, what: &str| -> Result<Vec<u8>, Stop> {
        let mut bytes = Vec::new();
        entry.take(limit + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            Err(Stop::Refused(format!("{what} is longer than {limit} bytes")))
        } else {
            Ok(bytes)
        }
    };
    let until_zero = |mut bytes: Vec<u8>| {
        bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
        bytes
    };
    if kind.is_gnu_longname() {
        extra.name = Some(until_zero(take(MAX_NAME, "a name")?));
    } else if kind.is_gnu_longlink() {
        extra.target = Some(until_zero(take(MAX_NAME, "a link's target")?));
    } else if kind.is_pax_local_extensions() {
        let bytes = take(MAX_PAX, "a set of pax records")?;
        for record in tar::PaxExtensions::new(&bytes) {
            let record = record?;
            match record.key_bytes() {
                b"path" => extra.name = Some(record.value_bytes().to_owned()),
                b"linkpath" => extra.target = Some(record.value_bytes().to_owned()),
                b"size" => {
                    let size = record.value().ok().and_then(|text| text.parse().ok());
                    extra.size = Some(size.ok_or_else(|| Stop::Refused("a size is not a number".to_owned()))?);
                }
                key if key.starts_with(b"GNU.sparse") => return Err(Stop::Refused("it has sparse files".to_owned())),
                _ => {}
            }
        }
    } else {
        // Global records (`g`) hold what git archive writes: the commit, as a comment.
        return Ok(kind.is_pax_global_extensions());
    }
    Ok(true)
}
