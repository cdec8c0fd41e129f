//! How much memory is there, how much is free, and what engines were seen to need.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::catalog::Offer;
use super::scheduler::Memory;
use crate::base::{fs, platform};

/// The share of the machine's memory that engines may hold together, in percent: the rest is everybody else's.
const SHARE: u64 = 90;
/// Added to what was measured, in percent: allocations differ from run to run.
const MARGIN: u64 = 5;
const LIMIT_BYTES: u64 = 1 << 20;
const LIMIT_ENTRIES: usize = 1000;

/// What engines may hold together: 90 % of the machine's memory, and of each GPU's. None when the system does not tell.
pub fn budget() -> Option<Memory> {
    let ram_bytes = platform::memory_bytes()? / 100 * SHARE;
    let gpu_bytes = gpus().iter().map(|(total, _)| total / 100 * SHARE).sum();
    Some(Memory { ram_bytes, gpu_bytes })
}

/// What is free now. None when the system does not tell.
pub fn free() -> Option<Memory> {
    let ram_bytes = platform::available_memory_bytes()?;
    Some(Memory { ram_bytes, gpu_bytes: gpus().iter().map(|(_, free)| free).sum() })
}

/// Total and free bytes of each of NVIDIA's GPUs.
pub fn gpus() -> Vec<(u64, u64)> {
    use std::sync::OnceLock;

    use nvml_wrapper::Nvml;
    static NVML: OnceLock<Option<Nvml>> = OnceLock::new();
    let Some(nvml) = NVML.get_or_init(|| Nvml::init().ok()) else { return Vec::new() };
    let devices = (0..nvml.device_count().unwrap_or(0).min(64)).filter_map(|index| nvml.device_by_index(index).ok());
    devices.filter_map(|device| device.memory_info().ok()).map(|memory| (memory.total, memory.free)).collect()
}

/// What engines were seen to hold at most, kept in a file. A key names policy, build and weights: anything else is another engine.
#[derive(Debug)]
pub struct Learned {
    file: PathBuf,
    seen: BTreeMap<String, Memory>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct File {
    version: u32,
    peaks: BTreeMap<String, Memory>,
}

fn key(offer: &Offer) -> Option<String> {
    let model = offer.model.as_ref().ok()?;
    Some(format!("{} {} {}", offer.policy_sha256, model.fingerprint, model.weights_sha256))
}

impl Learned {
    /// Reads the file; one that is missing or damaged counts as empty, since it only saves an estimate.
    pub fn load(file: &Path) -> Self {
        let bytes = fs::read_bounded(file, LIMIT_BYTES).unwrap_or_default();
        let read: File = serde_json::from_slice(&bytes).unwrap_or_default();
        let seen = if read.version == 1 { read.peaks } else { BTreeMap::new() };
        Self { file: file.to_owned(), seen }
    }

    /// The most that the engine of a policy was seen to hold.
    pub fn peak(&self, offer: &Offer) -> Option<Memory> {
        self.seen.get(&key(offer)?).copied()
    }

    /// What the engine of a policy needs, when it was seen before: its peak and a margin.
    pub fn of(&self, offer: &Offer) -> Option<Memory> {
        let peak = self.peak(offer)?;
        let more = |bytes: u64| bytes / 100 * (100 + MARGIN);
        Some(Memory { ram_bytes: more(peak.ram_bytes), gpu_bytes: more(peak.gpu_bytes) })
    }

    /// Notes what an engine holds. Gives what it needs when that is more than was known.
    pub fn learn(&mut self, offer: &Offer, peak: Memory) -> Option<Memory> {
        let key = key(offer)?;
        let known = self.seen.get(&key).copied().unwrap_or_default();
        let most =
            Memory { ram_bytes: known.ram_bytes.max(peak.ram_bytes), gpu_bytes: known.gpu_bytes.max(peak.gpu_bytes) };
        if most == known {
            return None;
        }
        if self.seen.len() >= LIMIT_ENTRIES {
            self.seen.clear();
        }
        self.seen.insert(key, most);
        // Not written: it is learned again.
        let text = serde_json::to_string_pretty(&File { version: 1, peaks: self.seen.clone() }).unwrap_or_default();
        let _ = fs::write_atomic(&self.file, text.as_bytes());
        self.of(offer)
    }
}
