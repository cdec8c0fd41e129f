use super::*;
use flate2::Compression;
use flate2::write::GzEncoder;
use std::io::Cursor;
use tar::EntryType;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

const ALL: &dyn Fn(&RelPath) -> bool = &|_| true;

/// Adds a tar entry, however wrong.
fn add(tar: &mut tar::Builder<Vec<u8>>, kind: EntryType, name: &str, target: &str, mode: u32, bytes: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    header.set_cksum();
    tar.append(&header, bytes).unwrap();
}

fn tar_of(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (kind, name, target) in entries {
        add(&mut tar, *kind, name, target, 0o644, if kind.is_file() { b"12345" } else { b"" });
    }
    tar.into_inner().unwrap()
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zip_of(entries: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, mode, bytes) in entries {
        let options = SimpleFileOptions::default().system(zip::System::Unix).unix_permissions(mode & 0o7777);
        if mode & 0o170_000 == 0o120_000 {
            zip.add_symlink(*name, str::from_utf8(bytes).unwrap(), options).unwrap();
        } else {
            zip.start_file(*name, options).unwrap();
            zip.write_all(bytes).unwrap();
        }
    }
    zip.finish().unwrap().into_inner()
}

/// Every occurrence of `from` becomes `to`, of the same length.
fn patched(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = bytes.to_vec();
    let places: Vec<usize> = (0..=bytes.len() - from.len()).filter(|at| bytes[*at..].starts_with(from)).collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    bytes
}

/// Opens and unpacks; the folder and what was unpacked, or what was said.
fn unpack(bytes: &[u8], select: &Select, limits: Limits) -> Result<(tempfile::TempDir, Unpacked), SourceError> {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("ä b.bin");
    fs::write_atomic(&file, bytes).unwrap();
    let task = Task::silent();
    let into = root.path().join("into");
    let unpacked = Archive::open(&file, "x", select, limits, &task).and_then(|archive| archive.unpack(&into, ALL));
    assert!(fs::read_dir(root.path()).unwrap().len() <= 2, "something was written outside");
    Ok((root, unpacked?))
}

#[track_caller]
fn refused(bytes: &[u8], why: &str) {
    match unpack(bytes, &Select::default(), Limits::default()) {
        Err(SourceError::Hostile { why: said, .. }) => assert!(said.contains(why), "{said}"),
        other => panic!("{other:?}"),
    }
}

fn read(root: &tempfile::TempDir, path: &str) -> Vec<u8> {
    let path: RelPath = path.parse().unwrap();
    let mut bytes = Vec::new();
    fs::open(&path.under(&root.path().join("into"))).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn all_formats_give_the_same_tree() {
    let mut tar = tar::Builder::new(Vec::new());
    add(&mut tar, EntryType::XGlobalHeader, "pax_global_header", "", 0o644, b"16 comment=abcd\n");
    add(&mut tar, EntryType::Directory, "./top/", "", 0o755, b"");
    add(&mut tar, EntryType::Regular, "./top/run é", "", 0o4755, b"12345");
    add(&mut tar, EntryType::Regular, "./top/sub/a", "", 0o644, b"");
    add(&mut tar, EntryType::Symlink, "./top/sub/l", "../run é", 0o777, b"");
    let tar = tar.into_inner().unwrap();
    let zip = zip_of(&[
        ("top/run é", 0o4755, b"12345"),
        ("top/sub/a", 0o644, b""),
        ("top/sub/l", 0o120_777, "../run é".as_bytes()),
    ]);
    let select = Select { drop_top: true, subdir: None };
    let mut digests = BTreeSet::new();
    for bytes in [tar.clone(), gz(&tar), zip] {
        let (root, unpacked) = unpack(&bytes, &select, Limits::default()).unwrap();
        assert_eq!((unpacked.files, unpacked.size_bytes), (3, 5));
        assert_eq!(read(&root, "run é"), b"12345");
        let listing =
            crate::base::tree::Listing::scan(&root.path().join("into"), &unpacked.modes, &Default::default()).unwrap();
        assert_eq!(listing.0.len(), 3);
        digests.insert(listing.digest());
        let (file, task) = (root.path().join("ä b.bin"), Task::silent());
        let archive = Archive::open(&file, "x", &select, Limits::default(), &task).unwrap();
        assert_eq!(archive.listing().unwrap(), listing);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            let meta = fs::metadata(&root.path().join("into/run é")).unwrap();
            assert_eq!(meta.permissions().mode() & 0o7100, 0o100, "no set-uid bit");
        }
    }
    assert_eq!(digests.len(), 1);
}

#[test]
fn a_subdir_or_what_there_is() {
    let tar = tar_of(&[(EntryType::Regular, "t/sub/dir/a", ""), (EntryType::Regular, "t/b", "")]);
    let select = |subdir: &str| Select { drop_top: true, subdir: Some(subdir.parse().unwrap()) };
    let (root, unpacked) = unpack(&tar, &select("sub"), Limits::default()).unwrap();
    assert_eq!(unpacked.files, 1);
    assert_eq!(read(&root, "dir/a"), b"12345");
    match unpack(&tar, &select("sub/dri"), Limits::default()) {
        Err(SourceError::Missing { why, hint, .. }) => {
            assert!(why.contains("sub/dir"), "{why}");
            assert_eq!(hint.unwrap(), "did you mean `sub/dir`?");
        }
        other => panic!("{other:?}"),
    }
    let tar = tar_of(&[(EntryType::Regular, "t/a", ""), (EntryType::Regular, "b", "")]);
    let (root, _) = unpack(&tar, &Select { drop_top: true, subdir: None }, Limits::default()).unwrap();
    assert_eq!(read(&root, "t/a"), b"12345");
}

#[test]
fn members_are_hashed_without_being_written() {
    let tar =
        gz(&tar_of(&[(EntryType::Regular, "a", ""), (EntryType::Link, "b", "a"), (EntryType::Symlink, "c", "a")]));
    let root = tempfile::tempdir().unwrap();
    let (file, task) = (root.path().join("f"), Task::silent());
    fs::write_atomic(&file, &tar).unwrap();
    let archive = Archive::open(&file, "x", &Select::default(), Limits::default(), &task).unwrap();
    let all = archive.hash(ALL).unwrap();
    assert_eq!(all.len(), 2);
    assert!(all.values().all(|found| *found == (Digest::of(b"12345"), 5)));
}

#[test]
fn names_that_lead_out_are_refused() {
    for name in ["../a", "/etc/a", "a/../../b", "a\\..\\b", "C:/a", "a//b", "a/./b", "nul", "..", "/"] {
        refused(&tar_of(&[(EntryType::Regular, name, "")]), "");
        refused(&tar_of(&[(EntryType::Directory, name, "")]), "");
        let stand_in = "x".repeat(name.len());
        refused(&patched(&zip_of(&[(&stand_in, 0o644, b"1")]), stand_in.as_bytes(), name.as_bytes()), "");
    }
    let tar = patched(&tar_of(&[(EntryType::Regular, "abcdefgh", "")]), b"abcdefgh", b"abcd\xff\xfegh");
    assert!(unpack(&tar, &Select::default(), Limits::default()).is_err());
}

#[test]
fn links_that_lead_out_are_refused() {
    for target in ["/etc/passwd", "../x", "a/../../x", "", "..", "s/../../x", "a\\b", "C:\\x"] {
        refused(&tar_of(&[(EntryType::Symlink, "l", target)]), "leads to");
        if !target.is_empty() {
            refused(&zip_of(&[("l", 0o120_777, target.as_bytes())]), "leads to");
        }
    }
    for target in ["../a", "/a", "nothing"] {
        refused(&tar_of(&[(EntryType::Regular, "a", ""), (EntryType::Link, "l", target)]), "");
    }
    // Inside the archive, but outside of the folder that was asked for.
    let select = Select { drop_top: false, subdir: Some("s".parse().unwrap()) };
    for kind in [EntryType::Symlink, EntryType::Link] {
        let target = if kind.is_symlink() { "../a" } else { "a" };
        let tar = tar_of(&[(EntryType::Regular, "a", ""), (kind, "s/l", target)]);
        assert!(matches!(unpack(&tar, &select, Limits::default()), Err(SourceError::Hostile { .. })));
    }
}

#[test]
fn nothing_is_written_through_a_link() {
    refused(&tar_of(&[(EntryType::Symlink, "d", "e"), (EntryType::Regular, "d/a", "")]), "not a folder");
    refused(&tar_of(&[(EntryType::Symlink, "a", "b"), (EntryType::Regular, "a", "")]), "twice");
    refused(&tar_of(&[(EntryType::Regular, "a", ""), (EntryType::Regular, "a/b", "")]), "not a folder");
    refused(&zip_of(&[("d", 0o120_777, b"e"), ("d/a", 0o644, b"1")]), "not a folder");
}

#[test]
fn names_that_collide_are_refused() {
    refused(&tar_of(&[(EntryType::Regular, "a", ""), (EntryType::Regular, "./a", "")]), "twice");
    let zip = patched(&zip_of(&[("name1", 0o644, b"1"), ("name2", 0o644, b"2")]), b"name2", b"name1");
    refused(&zip, "twice");
    let member =
        |path: &str| (path.parse().unwrap(), Member { size_bytes: 0, content: Content::File { executable: false } });
    let members = BTreeMap::from([member("A/x"), member("a")]);
    assert!(check_shape(&members, false).is_ok());
    assert!(check_shape(&members, true).unwrap_err().contains("not a folder"));
    assert!(check_shape(&BTreeMap::from([member("É"), member("é")]), true).unwrap_err().contains("same name"));
}

#[test]
fn special_files_are_refused() {
    for kind in [EntryType::Fifo, EntryType::Char, EntryType::Block, EntryType::GNUSparse, EntryType::new(b'?')] {
        refused(&tar_of(&[(kind, "a", "")]), "special file");
    }
    let zip = zip_of(&[("fifo", 0o644, b"")]);
    // The mode stands in the upper half of the external attributes.
    let mode = (0o100_644_u32 << 16).to_le_bytes();
    refused(&patched(&zip, &mode, &(0o010_644_u32 << 16).to_le_bytes()), "special file");
}

#[test]
fn bombs_are_refused() {
    let limits = |total_bytes, files| Limits { total_bytes, files };
    let tar = tar_of(&[(EntryType::Regular, "a", ""), (EntryType::Regular, "b", "")]);
    let zip = zip_of(&[("a", 0o644, b"12345"), ("b", 0o644, b"12345")]);
    let linked = tar_of(&[(EntryType::Regular, "a", ""), (EntryType::Link, "b", "a")]);
    for bytes in [&tar, &gz(&tar), &zip, &linked] {
        let refused = |limits| matches!(unpack(bytes, &Select::default(), limits), Err(SourceError::Hostile { .. }));
        assert!(refused(limits(9, 9)) && refused(limits(99, 1)));
        assert!(!refused(limits(10, 2)));
    }
    // A header that promises more than the whole limit.
    let mut header = tar::Header::new_gnu();
    header.set_path("a").unwrap();
    header.set_size(u64::MAX / 2);
    header.set_cksum();
    refused(header.as_bytes(), "unpacks to more");
    // Zeros: deflate makes them 1030 times smaller.
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    let mut header = tar::Header::new_gnu();
    header.set_path("a").unwrap();
    header.set_size(120 << 20);
    header.set_cksum();
    encoder.write_all(header.as_bytes()).unwrap();
    io::copy(&mut io::repeat(0).take(120 << 20), &mut encoder).unwrap();
    refused(&encoder.finish().unwrap(), "a bomb");
}

#[test]
fn long_names_are_read_and_bounded() {
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(120));
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o644);
    tar.append_data(&mut header, &long, &b"1"[..]).unwrap();
    tar.append_pax_extensions([("path", "päx".as_bytes()), ("size", &b"1"[..])]).unwrap();
    add(&mut tar, EntryType::Regular, "other", "", 0o644, b"2");
    let (root, _) = unpack(&tar.into_inner().unwrap(), &Select::default(), Limits::default()).unwrap();
    assert_eq!((read(&root, &long), read(&root, "päx")), (b"1".to_vec(), b"2".to_vec()));
    let mut tar = tar::Builder::new(Vec::new());
    add(&mut tar, EntryType::GNULongName, "x", "", 0o644, &vec![b'a'; 70_000]);
    refused(&tar.into_inner().unwrap(), "longer than");
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_pax_extensions([("size", &b"3"[..])]).unwrap();
    add(&mut tar, EntryType::Regular, "a", "", 0o644, b"12345");
    refused(&tar.into_inner().unwrap(), "twice, differently");
}

#[test]
fn zips_that_lie_are_refused() {
    let zip = zip_of(&[("a", 0o644, b"12345"), ("b", 0o644, b"12345")]);
    // Stored or not, five bytes are five bytes: the size in the directory, right after the compressed one.
    let crc = zip::ZipArchive::new(Cursor::new(&zip)).unwrap().by_index(0).unwrap().crc32().to_le_bytes();
    refused(&patched(&zip, &crc, &[1, 2, 3, 4]), "damaged");
    let central = zip.windows(4).rposition(|window| window == b"PK\x01\x02").unwrap();
    for size in [4_u8, 6] {
        let mut lying = zip.clone();
        lying[central + 24] = size;
        refused(&lying, "declared");
    }
    let mut encrypted = zip.clone();
    encrypted[central + 8] |= 1;
    refused(&encrypted, "encrypted");
    let mut overlapping = zip.clone();
    overlapping[central + 42..central + 46].fill(0);
    assert!(unpack(&overlapping, &Select::default(), Limits::default()).is_err());
    refused(&zip[..zip.len() - 4], "");
}

#[test]
fn what_is_no_archive_is_named() {
    refused(b"", "empty");
    refused(b"<!DOCTYPE html><html>", "HTML");
    refused(b"\xfd7zXZ\0abc", "xz");
    refused(&gz(b"only text"), "damaged");
    let tar = gz(&tar_of(&[(EntryType::Regular, "a", "")]));
    for cut in [5, tar.len() / 2, tar.len() - 4] {
        refused(&tar[..cut], "damaged");
    }
    let mut flipped = tar.clone();
    let last = flipped.len() - 6;
    flipped[last] ^= 1;
    refused(&flipped, "damaged");
}

#[test]
fn a_cancel_ends_it() {
    let root = tempfile::tempdir().unwrap();
    let (file, task) = (root.path().join("f"), Task::silent());
    fs::write_atomic(&file, &tar_of(&[(EntryType::Regular, "a", "")])).unwrap();
    task.cancel().cancel();
    let opened = Archive::open(&file, "x", &Select::default(), Limits::default(), &task);
    assert!(matches!(opened, Err(SourceError::Cancelled(_))));
}

#[test]
fn damage_anywhere_is_an_error_or_no_matter() {
    let tar =
        tar_of(&[(EntryType::Regular, "a", ""), (EntryType::Symlink, "s/l", "../a"), (EntryType::Link, "h", "a")]);
    let zip = zip_of(&[("a", 0o644, b"12345"), ("l", 0o120_777, b"a")]);
    let root = tempfile::tempdir().unwrap();
    let (file, task) = (root.path().join("f"), Task::silent());
    let small = Limits { total_bytes: 1 << 20, files: 10 };
    for bytes in [&tar, &gz(&tar), &zip] {
        for at in (0..bytes.len()).step_by(1 + bytes.len() / 600) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x81;
            std::io::Write::write_all(&mut fs::create(&file).unwrap(), &damaged).unwrap();
            let opened = Archive::open(&file, "x", &Select::default(), small, &task);
            let _ = opened.and_then(|archive| archive.listing());
        }
    }
}
