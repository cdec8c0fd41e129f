//! How the device code of two CUDA programs differs: the section `.nv_fatbin`, whose layout NVIDIA does not document. Read from
//! objects of nvcc 13.0: containers of a 16-byte header (magic, version, header size, size of the entries in bytes), each with
//! entries of a header (kind, version, header size, payload size in bytes, …, architecture at byte 28) and a payload.
//!
//! An entry is machine code for one architecture, or PTX: text that the driver compiles for GPUs that are newer.

const MAGIC: [u8; 4] = 0xBA55_ED50_u32.to_le_bytes();
const HEADER_BYTES: usize = 16;
const MIN_ENTRY_BYTES: usize = 32;
const ALIGNMENT: usize = 8;
const PTX: u16 = 1;

/// A piece of device code.
#[derive(Debug, PartialEq, Eq)]
struct Entry<'a> {
    kind: u16,
    architecture: u32,
    payload: &'a [u8],
}

/// What differs between the device code of two programs; none when it is in a form that is not known.
pub fn in_words(first: &[u8], second: &[u8]) -> Option<String> {
    let (first, second) = (entries(first)?, entries(second)?);
    let differing = |ptx: bool| {
        let of = |entries: &[Entry<'_>]| entries.iter().filter(|entry| (entry.kind == PTX) == ptx).count();
        let pairs = first.iter().zip(&second).filter(|(one, _)| (one.kind == PTX) == ptx);
        (pairs.filter(|(one, other)| one != other).count(), of(&first), of(&second))
    };
    let ((code, codes, other_codes), (ptx, ptxs, other_ptxs)) = (differing(false), differing(true));
    Some(if (codes, ptxs) != (other_codes, other_ptxs) {
        format!("device code: {codes} and {other_codes} pieces of machine code, {ptxs} and {other_ptxs} of PTX")
    } else if code > 0 {
        format!("device code: {code} of {codes} pieces of machine code differ, and {ptx} of {ptxs} of PTX")
    } else {
        format!(
            "device code: all {codes} pieces of machine code are equal, and {ptx} of {ptxs} pieces of PTX differ, which nvcc \
             does not always write in the same way. To leave PTX out, name architectures as `90-real` in CMAKE_CUDA_ARCHITECTURES"
        )
    })
}

fn entries(section: &[u8]) -> Option<Vec<Entry<'_>>> {
    let mut entries = Vec::new();
    let mut at = 0;
    while at + HEADER_BYTES <= section.len() {
        if !section[at..].starts_with(&MAGIC) {
            // Padding between containers.
            at += ALIGNMENT;
            continue;
        }
        let size = usize::try_from(u64_at(section, at + 8)?).ok()?;
        let end = at.checked_add(HEADER_BYTES)?.checked_add(size)?;
        let mut rest = section.get(at + HEADER_BYTES..end)?;
        while rest.len() >= MIN_ENTRY_BYTES {
            let header_bytes = usize::try_from(u32_at(rest, 4)?).ok()?.max(MIN_ENTRY_BYTES);
            let payload_end = header_bytes.checked_add(usize::try_from(u64_at(rest, 8)?).ok()?)?;
            let kind = u16::from_le_bytes(rest.get(..2)?.try_into().ok()?);
            let payload = rest.get(header_bytes..payload_end)?;
            entries.push(Entry { kind, architecture: u32_at(rest, 28)?, payload });
            rest = &rest[payload_end..];
        }
        at = end;
    }
    (!entries.is_empty()).then_some(entries)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(entries: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (kind, payload) in entries {
            let mut header = [0; 64];
            header[..2].copy_from_slice(&kind.to_le_bytes());
            header[4..8].copy_from_slice(&64_u32.to_le_bytes());
            header[8..16].copy_from_slice(&(payload.len() as u64).to_le_bytes());
            header[28..32].copy_from_slice(&90_u32.to_le_bytes());
            body.extend(header);
            body.extend(*payload);
        }
        let mut section = MAGIC.to_vec();
        section.extend([1, 0, 16, 0]);
        section.extend((body.len() as u64).to_le_bytes());
        section.extend(body);
        section
    }

    #[test]
    fn ptx_and_machine_code_are_told_apart() {
        let of = |ptx: &[u8], code: &[u8]| {
            let mut section = container(&[(1, b"text....")]);
            section.extend([0; 8]);
            section.extend(container(&[(1, ptx), (2, code)]));
            section
        };
        let first = of(b"mov %r1;", b"code....");
        let said = |other: &[u8]| in_words(&first, other).unwrap();
        assert!(said(&of(b"mov %r2;", b"code....")).contains("all 1 pieces of machine code are equal, and 1 of 2"));
        assert!(said(&of(b"mov %r2;", b"code,,,,")).contains("1 of 1 pieces of machine code differ, and 1 of 2"));
        assert!(said(&container(&[(1, b"text....")])).contains("1 and 0 pieces of machine code, 2 and 1 of PTX"));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut section = container(&[(1, b"text...."), (2, b"code....")]);
        assert!(entries(&section).is_some());
        for at in 0..section.len() {
            let before = section.clone();
            section[at] = 0xff;
            let _ = in_words(&before, &section);
            let _ = entries(&section[..at]);
            section = before;
        }
        assert_eq!(entries(b""), None);
    }
}
