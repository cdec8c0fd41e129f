//! Lockfiles that git could not merge: both sides are read, and only what they disagree on has to be resolved again.

use crate::base::diagnostic::{Diagnostic, Diagnostics, SourceText};
use crate::base::name::Name;

use super::{Lockfile, parse};
use crate::format::manifest::Kind;

/// What two sides of a merge agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflicted {
    /// Entries that are equal on both sides, and those that one side alone has: whether an entry is still wanted, the manifest says.
    pub agreed: Lockfile,
    /// Entries that both sides have and differ in.
    pub disputed: Vec<(Kind, Name)>,
}

/// Reads a lockfile with conflict markers (of git's styles `merge`, `diff3` and `zdiff3`).
///
/// # Errors
/// The markers are out of order, or one of the two sides is no lockfile by itself.
pub fn parse_conflicted(name: &str, bytes: &[u8]) -> Result<Conflicted, Diagnostics> {
    let (ours, theirs) = split(name, bytes)?;
    let (ours, _) = parse(&format!("{name} (our side)"), &ours)?;
    let (theirs, _) = parse(&format!("{name} (their side)"), &theirs)?;
    let (ours, theirs) = (ours.value, theirs.value);
    let mut disputed = Vec::new();
    let mut agreed = Lockfile::default();
    for entry in ours.entries() {
        match theirs.get(entry.kind(), entry.name()) {
            Some(other) if other != entry => disputed.push((entry.kind(), entry.name().clone())),
            _ => agreed.push(entry),
        }
    }
    theirs
        .entries()
        .filter(|entry| ours.get(entry.kind(), entry.name()).is_none())
        .for_each(|entry| agreed.push(entry));
    agreed.sort();
    Ok(Conflicted { agreed, disputed })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Marker {
    Ours,
    Base,
    Theirs,
    End,
}

/// Seven signs at the beginning of a line, and then nothing or a space.
fn marker(line: &[u8]) -> Option<Marker> {
    let (signs, rest) = line.split_at_checked(7)?;
    let ends = matches!(rest, [] | [b'\r' | b'\n' | b' ', ..]);
    match signs {
        b"<<<<<<<" if ends => Some(Marker::Ours),
        b"|||||||" if ends => Some(Marker::Base),
        b"=======" if ends => Some(Marker::Theirs),
        b">>>>>>>" if ends => Some(Marker::End),
        _ => None,
    }
}

/// The first conflict marker, as a problem. A lockfile has no text over several lines, so no marker is content.
pub(super) fn find(name: &str, bytes: &[u8]) -> Option<Diagnostic> {
    let mut offset = 0;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        if marker(line).is_some() {
            let source = SourceText::new(name, std::str::from_utf8(bytes).ok()?);
            let problem =
                Diagnostic::error("the lockfile contains git conflict markers").at(&source, offset..offset + 7);
            return Some(
                problem.hint("run `aitools lock --resolve-conflicts`: it resolves only the entries in conflict"),
            );
        }
        offset += line.len();
    }
    None
}

/// Both sides in full.
fn split(name: &str, bytes: &[u8]) -> Result<(Vec<u8>, Vec<u8>), Diagnostics> {
    let (mut ours, mut theirs) = (Vec::with_capacity(bytes.len()), Vec::with_capacity(bytes.len()));
    // Which part of a conflict we are in.
    let mut part = Marker::End;
    for (index, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        part = match (part, marker(line)) {
            (Marker::End, Some(Marker::Ours)) => Marker::Ours,
            (Marker::Ours, Some(Marker::Base)) => Marker::Base,
            (Marker::Ours | Marker::Base, Some(Marker::Theirs)) => Marker::Theirs,
            (Marker::Theirs, Some(Marker::End)) => Marker::End,
            (part, None) => {
                if matches!(part, Marker::End | Marker::Ours) {
                    ours.extend_from_slice(line);
                }
                if matches!(part, Marker::End | Marker::Theirs) {
                    theirs.extend_from_slice(line);
                }
                part
            }
            _ => {
                let message = format!("the conflict marker on line {} of `{name}` is out of order", index + 1);
                return Err(Diagnostic::error(message).into());
            }
        };
    }
    match part {
        Marker::End => Ok((ours, theirs)),
        _ => {
            let problem = Diagnostic::error(format!("the last conflict of `{name}` has no end"));
            Err(problem.hint("restore the file with git, and merge again").into())
        }
    }
}
