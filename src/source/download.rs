//! Brings one file to this machine.

/// What the first bytes of a file say it is, when that is not what anybody wanted.
pub fn likely_content(head: &[u8]) -> Option<&'static str> {
    let text = String::from_utf8_lossy(&head[..head.len().min(512)]).trim_start().to_ascii_lowercase();
    match text.as_str() {
        "" if head.is_empty() => Some("it is empty"),
        text if text.starts_with("<!doctype html") || text.starts_with("<html") => {
            Some("it is an HTML page: a login or error page?")
        }
        text if text.starts_with("<?xml") && text.contains("<error") => Some("it is a storage service's error message"),
        text if text.starts_with("version https://git-lfs.github.com/spec/") => {
            Some("it is a Git LFS pointer, not the file it points to")
        }
        text if text.starts_with("{\"error\"") => Some("it is an error message in JSON"),
        _ => None,
    }
}
