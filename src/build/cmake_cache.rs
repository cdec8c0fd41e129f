//! `CMakeCache.txt`: what CMake decided. Lines `NAME:TYPE=value`, names with odd characters in double quotes; comments begin
//! with `#` or `//` (the file's own head says so).

use std::collections::BTreeMap;

/// Larger than any real cache.
pub const MAX_BYTES: u64 = 16 << 20;

/// Every entry, by name. Lines that are none are skipped.
pub fn parse(text: &str) -> BTreeMap<String, String> {
    text.lines().filter(|line| !line.starts_with(['#', '/'])).filter_map(entry).collect()
}

fn entry(line: &str) -> Option<(String, String)> {
    let (name, rest) = match line.strip_prefix('"') {
        Some(quoted) => quoted.split_once("\":")?,
        None => line.split_once(':')?,
    };
    let (_, value) = rest.split_once('=')?;
    // A value with spaces at its ends stands in single quotes.
    let value = value.strip_prefix('\'').and_then(|value| value.strip_suffix('\'')).unwrap_or(value);
    Some((name.to_owned(), value.to_owned()))
}

/// Whether CMake's `if(<value>)` holds for a cache entry: not one of its false constants (cmake-language's `if` command).
/// Any other text counts as true: a path, a list of architectures.
pub fn is_true(value: &str) -> bool {
    let upper = value.to_ascii_uppercase();
    !matches!(upper.as_str(), "" | "0" | "OFF" | "NO" | "FALSE" | "N" | "IGNORE" | "NOTFOUND")
        && !upper.ends_with("-NOTFOUND")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_every_shape() {
        let cache = parse(
            "# comment\n//a doc: x=y\nA:BOOL=ON\nB:STRING=a=b:c\n\"o:d d\":PATH=/x y\nS:STRING=' a '\nbroken\nC:X\n",
        );
        let pairs: Vec<_> = cache.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(pairs, [("A", "ON"), ("B", "a=b:c"), ("S", " a "), ("o:d d", "/x y")]);
    }

    #[test]
    fn truth_as_cmake_has_it() {
        for yes in ["ON", "1", "yes", "/usr/bin/nvcc", "80;90", "Release"] {
            assert!(is_true(yes), "{yes}");
        }
        for no in ["", "0", "off", "No", "FALSE", "n", "ignore", "NOTFOUND", "CUDA-notfound"] {
            assert!(!is_true(no), "{no}");
        }
    }
}
