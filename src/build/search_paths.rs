//! Where a built program looks for its libraries: the entries `RPATH` and `RUNPATH` of an ELF file (ld.so(8)).
//!
//! An empty or relative entry means the folder that somebody happens to be in when the program starts: whoever can write
//! there chooses its libraries.

use object::Endianness;
use object::elf::{DT_RPATH, DT_RUNPATH, FileHeader32, FileHeader64};
use object::read::elf::{Dyn as _, FileHeader, SectionHeader as _};

/// A list of folders, separated by `:`, and where it is in the file.
struct List {
    at: u64,
    text: String,
}

/// The first entry that depends on the current folder, if the bytes are an ELF file with one. [`padding`] does not count.
pub fn relative_entry(bytes: &[u8]) -> Option<String> {
    let entries = |list: List| list.text.trim_end_matches(':').split(':').map(str::to_owned).collect::<Vec<_>>();
    lists(bytes).into_iter().flat_map(entries).find(|entry| !is_fixed(entry))
}

/// Empty entries at the end, as offset and length in bytes: CMake fills up what it may have to replace when it installs.
/// Zeros in their place end the list before them.
pub fn padding(bytes: &[u8]) -> Vec<(u64, usize)> {
    let of = |list: List| {
        let kept = list.text.trim_end_matches(':').len();
        (kept > 0 && kept < list.text.len()).then(|| (list.at + kept as u64, list.text.len() - kept))
    };
    lists(bytes).into_iter().filter_map(of).collect()
}

fn lists(bytes: &[u8]) -> Vec<List> {
    let lists = match object::FileKind::parse(bytes) {
        Ok(object::FileKind::Elf32) => lists_of::<FileHeader32<Endianness>>(bytes),
        Ok(object::FileKind::Elf64) => lists_of::<FileHeader64<Endianness>>(bytes),
        _ => None,
    };
    lists.unwrap_or_default()
}

/// Absolute, or relative to the file itself.
fn is_fixed(entry: &str) -> bool {
    let of_origin =
        |origin: &str| entry.strip_prefix(origin).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    entry.starts_with('/') || of_origin("$ORIGIN") || of_origin("${ORIGIN}")
}

fn lists_of<Elf: FileHeader<Endian = Endianness>>(bytes: &[u8]) -> Option<Vec<List>> {
    let header = Elf::parse(bytes).ok()?;
    let endian = header.endian().ok()?;
    let sections = header.sections(endian, bytes).ok()?;
    let (dynamic, names) = sections.dynamic(endian, bytes).ok()??;
    let strings = sections.strings(endian, bytes, names).ok()?;
    let start: u64 = sections.section(names).ok()?.sh_offset(endian).into();
    let paths = dynamic.iter().filter(|entry| [DT_RPATH, DT_RUNPATH].contains(&entry.d_tag(endian)));
    let list = |entry: &Elf::Dyn| {
        let offset: u64 = entry.d_val(endian).into();
        let text = strings.get(u32::try_from(offset).ok()?).ok()?;
        Some(List { at: start + offset, text: String::from_utf8(text.to_vec()).ok()? })
    };
    Some(paths.filter_map(list).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h2b_entries_that_depend_on_the_current_folder() {
        for fixed in ["$ORIGIN", "$ORIGIN/../lib", "${ORIGIN}/x", "/usr/local/cuda/lib64"] {
            assert!(is_fixed(fixed), "{fixed}");
        }
        for relative in ["", ".", "lib", "$ORIGINAL", "$LIB", "../lib"] {
            assert!(!is_fixed(relative), "{relative}");
        }
        assert_eq!(relative_entry(b"\x7fELF cut off"), None);
        assert_eq!(relative_entry(b"#!/bin/sh\n"), None);
    }
}
