//! How much memory a process holds, as the system and NVIDIA's driver report it.

/// GPU memory that a process holds now, in bytes, over all devices. None where the driver does not tell (no NVIDIA device; a
/// container with process ids of its own).
pub(super) fn gpu_memory_bytes(pid: u32) -> Option<u64> {
    use nvml_wrapper::Nvml;
    use nvml_wrapper::enums::device::UsedGpuMemory;
    let nvml = Nvml::init().ok()?;
    let mut total = None;
    for index in 0..nvml.device_count().ok()?.min(64) {
        let processes = nvml.device_by_index(index).ok()?.running_compute_processes().ok()?;
        for process in processes.iter().filter(|process| process.pid == pid) {
            if let UsedGpuMemory::Used(bytes) = process.used_gpu_memory {
                *total.get_or_insert(0) += bytes;
            }
        }
    }
    total
}

pub(super) use platform::peak_memory_bytes;

#[cfg(target_os = "linux")]
mod platform {
    use crate::base::fs;

    /// The most memory that a process held at once, in bytes: `VmHWM` of `/proc/<pid>/status` (proc_pid_status(5)), in KiB there.
    pub(in super::super) fn peak_memory_bytes(pid: u32) -> Option<u64> {
        let path = std::path::PathBuf::from(format!("/proc/{pid}/status"));
        let status = fs::read_bounded(&path, 64 * 1024).ok()?;
        let status = String::from_utf8_lossy(&status);
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    }
}

#[cfg(not(target_os = "linux"))]
mod platform {
    pub(in super::super) fn peak_memory_bytes(_: u32) -> Option<u64> {
        None
    }
}
