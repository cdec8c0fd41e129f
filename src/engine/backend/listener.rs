//! Who listens on an engine's port. Another user of the machine may have taken it before the engine could, and answer in its
//! place: such a program must get neither the key nor a prompt.
//!
//! Linux tells it by `/proc`: the sockets that listen on the port, and the open files of the engine's processes. macOS tells
//! it by `lsof`, for processes of the same user. Elsewhere nobody is told, and only the key's check is left.

#[cfg(target_os = "linux")]
#[path = "listener/linux.rs"]
mod platform;
#[cfg(target_os = "macos")]
#[path = "listener/macos.rs"]
mod platform;
#[cfg(not(any(target_os = "linux", target_os = "macos")))]
mod platform {
    pub(super) fn of(_: u16, _: u32) -> super::Listener {
        super::Listener::Unknown
    }
}

/// Who listens on a port of the loopback interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Listener {
    Nobody,
    /// A process of the engine, and no other.
    Engine,
    /// At least one other process.
    Another,
    /// The system does not tell.
    Unknown,
}

/// Who listens on 127.0.0.1:`port`. `group`: the process group of the engine, which is its first process's id.
pub(super) fn of(port: u16, group: u32) -> Listener {
    platform::of(port, group)
}
