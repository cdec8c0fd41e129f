//! How two builds of one file differ, in words: which part of the file, and what stands there.

use std::collections::BTreeSet;

use object::Endianness;
use object::elf::{FileHeader32, FileHeader64};
use object::read::elf::{FileHeader, SectionHeader as _};

use super::fatbin;

/// Parts of a file that are named at most.
const MAX_PARTS: usize = 6;
/// Characters of a text that are quoted.
const QUOTED: usize = 80;
/// Shorter runs of printable bytes are no text.
const MIN_TEXT: usize = 4;

/// The section of a CUDA program's device code.
const DEVICE_CODE: &str = ".nv_fatbin";
/// Sections of code and tables.
const HOLD_NO_TEXT: &[&str] = &[
    DEVICE_CODE,
    ".init",
    ".plt",
    ".text",
    ".eh_frame",
    ".symtab",
    ".rela",
    ".dynsym",
    ".gnu.hash",
    ".gcc_except_table",
];

/// A part of a file: a section of a program, or all of it.
#[derive(Debug, PartialEq, Eq)]
struct Part<'a> {
    name: String,
    bytes: &'a [u8],
}

/// What differs between the first and the second build of a file; empty when nothing does. `folders` are those of the builds.
pub fn in_words(first: &[u8], second: &[u8], folders: &[&str]) -> Vec<String> {
    if first == second {
        return Vec::new();
    }
    let mut words = Vec::new();
    for (bytes, which) in [(first, "first"), (second, "second")] {
        let leak = folders.iter().find(|folder| contains(bytes, folder.as_bytes()));
        words.extend(leak.map(|_| format!("the {which} build contains the path of its build folder")));
    }
    let (parts, others) = (parts(first), parts(second));
    let device_code = |parts: &[Part<'_>]| parts.iter().position(|part| part.name == DEVICE_CODE);
    if let (Some(one), Some(other)) = (device_code(&parts), device_code(&others))
        && parts[one] != others[other]
    {
        words.extend(fatbin::in_words(parts[one].bytes, others[other].bytes));
    }
    if first.len() != second.len() {
        words.push(format!("{} bytes became {} bytes", first.len(), second.len()));
    }
    let mut differing: Vec<String> = parts.iter().filter_map(|part| changed(part, &others)).collect();
    let new = others.iter().filter(|other| !parts.iter().any(|part| part.name == other.name));
    differing.extend(new.map(|other| format!("`{}` is new", other.name)));
    let more = differing.len().saturating_sub(MAX_PARTS);
    differing.truncate(MAX_PARTS);
    words.extend(differing);
    if more > 0 {
        words.push(format!("and {more} more sections"));
    }
    words
}

fn changed(part: &Part<'_>, others: &[Part<'_>]) -> Option<String> {
    let Part { name, bytes } = part;
    let Some(other) = others.iter().find(|other| other.name == *name) else { return Some(format!("`{name}` is gone")) };
    let at = bytes.iter().zip(other.bytes).position(|(one, other)| one != other);
    let at = at.or((bytes.len() != other.bytes.len()).then(|| bytes.len().min(other.bytes.len())))?;
    if name.contains("build-id") {
        return Some("the build id, which is a digest of the rest".to_owned());
    }
    if HOLD_NO_TEXT.iter().any(|start| name.starts_with(start)) {
        return Some(format!("`{name}` differs from byte {at} on"));
    }
    let (one, other) = (texts(bytes), texts(other.bytes));
    Some(match (one.iter().find(|text| !other.contains(*text)), other.iter().find(|text| !one.contains(*text))) {
        (Some(one), Some(other)) if is_time(one) && is_time(other) => {
            format!("`{name}`: a date or time, {} became {}", quote(one), quote(other))
        }
        (Some(one), Some(other)) => format!("`{name}`: {} became {}", quote(one), quote(other)),
        (Some(one), None) => format!("`{name}`: {} is gone", quote(one)),
        (None, Some(other)) => format!("`{name}`: {} is new", quote(other)),
        (None, None) => format!("`{name}` differs from byte {at} on"),
    })
}

/// The sections of an ELF file that hold bytes of the file; the whole of any other file.
fn parts(bytes: &[u8]) -> Vec<Part<'_>> {
    let sections = match object::FileKind::parse(bytes) {
        Ok(object::FileKind::Elf32) => sections::<FileHeader32<Endianness>>(bytes),
        Ok(object::FileKind::Elf64) => sections::<FileHeader64<Endianness>>(bytes),
        _ => None,
    };
    sections.filter(|parts| !parts.is_empty()).unwrap_or_else(|| vec![Part { name: "the file".to_owned(), bytes }])
}

fn sections<Elf: FileHeader<Endian = Endianness>>(bytes: &[u8]) -> Option<Vec<Part<'_>>> {
    let header = Elf::parse(bytes).ok()?;
    let endian = header.endian().ok()?;
    let sections = header.sections(endian, bytes).ok()?;
    let part = |section: &'_ Elf::SectionHeader| {
        let name = String::from_utf8_lossy(sections.section_name(endian, section).ok()?).into_owned();
        let bytes = section.data(endian, bytes).ok()?;
        (!bytes.is_empty() && !name.is_empty()).then_some((name, bytes))
    };
    Some(sections.iter().filter_map(part).map(|(name, bytes)| Part { name, bytes }).collect())
}

/// The runs of printable bytes, as `strings` shows them.
fn texts(bytes: &[u8]) -> BTreeSet<&str> {
    let runs = bytes.split(|byte| !(0x20..0x7f).contains(byte)).filter(|run| run.len() >= MIN_TEXT);
    runs.filter_map(|run| std::str::from_utf8(run).ok()).collect()
}

/// `Nov 25 2026`, `12:34:56`, `2026-11-25`: what `__DATE__`, `__TIME__` and others write.
fn is_time(text: &str) -> bool {
    let shape: String = text.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let dated = months
        .iter()
        .any(|month| shape.contains(&format!("{month} 00 0000")) || shape.contains(&format!("{month}  0 0000")));
    dated || shape.contains("00:00:00") || shape.contains("0000-00-00")
}

fn quote(text: &str) -> String {
    format!("{:?}", text.chars().take(QUOTED).collect::<String>())
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    !text.is_empty() && memchr::memmem::find(bytes, text).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_named() {
        assert_eq!(in_words(b"same", b"same", &[]), [""; 0]);
        assert_eq!(
            in_words(b"\0made at 12:34:56\0", b"\0made at 12:34:57\0", &[]),
            ["`the file`: a date or time, \"made at 12:34:56\" became \"made at 12:34:57\""]
        );
        assert_eq!(
            in_words(b"\0/tmp/one/x\0", b"\0/tmp/second/x\0", &["/tmp/one", "/tmp/second"])[..2],
            [
                "the first build contains the path of its build folder",
                "the second build contains the path of its build folder"
            ]
        );
        assert_eq!(in_words(b"\x01\x02", b"\x01\x03", &[]), ["`the file` differs from byte 1 on"]);
        assert_eq!(in_words(b"abcd", b"abcde", &[])[0], "4 bytes became 5 bytes");
        assert!(is_time("Jan  3 2026") && is_time("2026-11-25T01:02:03") && !is_time("version 12.3"));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let program = std::env::current_exe().unwrap();
        let mut head = crate::base::fs::read_head(&program, 4096).unwrap();
        for at in 0..head.len().min(512) {
            let before = head.clone();
            head[at] ^= 0xff;
            assert_ne!(in_words(&before, &head, &[]), [""; 0], "byte {at}");
            head[at] ^= 0xff;
        }
    }
}
