//! What tells one state of a file from another one without reading it.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What identifies a file's content without reading it: equal stamps mean that the file did not change, as far as the system reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Stamp {
    /// The device that holds the file.
    pub device: u64,
    /// The file's number on its device.
    pub inode: u64,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Modification time, in nanoseconds since 1970.
    pub modified_ns: u64,
    /// When anything about the file changed, its times included; 0 where the platform has no such time.
    pub changed_ns: u64,
}

/// How long a file's times may stay the same although it was written again: the coarsest tick of the clocks that systems
/// take file times from (10 ms on Linux with 100 Hz, 15.6 ms on Windows), and some more.
pub const CLOCK_TICK: Duration = Duration::from_millis(20);
/// The tick of file systems that keep whole seconds (FAT has two of them).
const COARSE_TICK_NS: u64 = 2_000_000_000;
/// Clocks of servers differ from ours by less; a time further ahead was set by hand, and a write would change it.
const CLOCK_SKEW_NS: u64 = 3_600_000_000_000;

impl Stamp {
    /// Whether the file was modified so recently that another write might leave its times as they are.
    pub fn is_recent(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        let now_ns = u64::try_from(now).unwrap_or(u64::MAX);
        let whole_seconds = self.modified_ns.is_multiple_of(1_000_000_000);
        let tick_ns = if whole_seconds { COARSE_TICK_NS } else { CLOCK_TICK.as_nanos() as u64 };
        self.modified_ns.saturating_add(tick_ns) > now_ns && self.modified_ns < now_ns.saturating_add(CLOCK_SKEW_NS)
    }

    /// Whether both stamps are of one file with the same size and modification time. The status change time may differ:
    /// links, names and permissions change it, too.
    pub fn differs_in_change_time_alone(&self, other: &Self) -> bool {
        *self == (Self { changed_ns: self.changed_ns, ..*other })
    }
}

/// When a file was modified, in nanoseconds since 1970; 0 where that is not known.
pub(super) fn modified_ns(meta: &fs::Metadata) -> u64 {
    let modified = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    modified.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
