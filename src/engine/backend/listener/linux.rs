//! By sock_diag(7), or proc_pid_net(5) where the kernel does not have it, and proc_pid_fd(5).

mod sock_diag;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::Listener;
use crate::base::fs;

/// Bytes of the table of sockets: 100,000 connections take 15 MB.
const TABLE_LIMIT_BYTES: u64 = 64 << 20;
/// State of a socket that listens, in `/proc/net/tcp`.
const LISTEN: &str = "0A";

pub(super) fn of(port: u16, group: u32) -> Listener {
    let Some(sockets) = sock_diag::listening(port).or_else(|| listed(port)) else { return Listener::Unknown };
    if sockets.is_empty() {
        return Listener::Nobody;
    }
    let leader = PathBuf::from(format!("/proc/{group}"));
    let Some(mut open) = open_sockets(&leader) else { return Listener::Unknown };
    if !sockets.is_subset(&open) {
        for process in members(group) {
            open.extend(open_sockets(&process).unwrap_or_default());
        }
    }
    if sockets.is_subset(&open) { Listener::Engine } else { Listener::Another }
}

/// The inodes of the sockets that get connections to 127.0.0.1:`port`. None when the system does not tell.
fn listed(port: u16) -> Option<BTreeSet<u64>> {
    let four = fs::read_bounded(Path::new("/proc/net/tcp"), TABLE_LIMIT_BYTES).ok()?;
    // A machine may have no IPv6.
    let six = fs::read_bounded(Path::new("/proc/net/tcp6"), TABLE_LIMIT_BYTES).unwrap_or_default();
    Some([four, six].iter().flat_map(|table| inodes(&String::from_utf8_lossy(table), port)).collect())
}

/// The listening sockets of one table.
fn inodes(table: &str, port: u16) -> BTreeSet<u64> {
    // Words of 32 bits as this machine has them in memory: 127.0.0.1, any address, and both for IPv6.
    let loopback = format!("{:08X}", u32::from_ne_bytes([127, 0, 0, 1]));
    let mapped = format!("{:016X}{:08X}{loopback}", 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]));
    let (any, any_six) = ("0".repeat(8), "0".repeat(32));
    let wanted = [loopback, mapped, any, any_six].map(|address| format!("{address}:{port:04X}"));
    let inode = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
        (*state == LISTEN && wanted.iter().any(|wanted| wanted == local)).then(|| inode.parse().ok())?
    };
    table.lines().skip(1).filter_map(inode).collect()
}

/// The inodes of a process's sockets. None when they may not be looked at; a process that is gone has none.
fn open_sockets(process: &Path) -> Option<BTreeSet<u64>> {
    let files = match fs::read_dir(&process.join("fd")) {
        Ok(files) => files,
        Err(error) if error.is_not_found() => return Some(BTreeSet::new()),
        Err(_) => return None,
    };
    let inode = |file: &PathBuf| {
        let target = fs::read_link(file).ok()?;
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    };
    Some(files.iter().filter_map(inode).collect())
}

/// The processes of a group, by `/proc/<pid>/stat`, whose fifth field it is. The second is a name in parentheses and may hold
/// anything.
fn members(group: u32) -> Vec<PathBuf> {
    let of_group = |process: &PathBuf| {
        process.file_name()?.to_str()?.parse::<u32>().ok()?;
        let stat = fs::read_bounded(&process.join("stat"), 4096).ok()?;
        let text = String::from_utf8_lossy(&stat);
        let found = text[text.rfind(')')? + 1..].split_whitespace().nth(2)?.parse::<u32>().ok()?;
        Some(found == group)
    };
    let processes = fs::read_dir(Path::new("/proc")).unwrap_or_default();
    processes.into_iter().filter(|process| of_group(process) == Some(true)).collect()
}

#[cfg(test)]
mod tests {
    use std::io::BufRead as _;
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn m4_the_listener_is_told_by_its_process() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(of(port, std::process::id()), Listener::Engine);
        let mut other = Command::new("sleep").arg("100").process_group(0).spawn().unwrap();
        assert_eq!(of(port, other.id()), Listener::Another);
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(of(port, other.id()), Listener::Another, "the engine has ended");
        drop(listener);
        assert_eq!(of(port, std::process::id()), Listener::Nobody);
    }

    /// Any address of both families gets connections to 127.0.0.1, too.
    #[test]
    fn m4_wildcard_listeners_count() {
        let any = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        assert_eq!(of(any.local_addr().unwrap().port(), std::process::id()), Listener::Engine);
        if let Ok(six) = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)) {
            assert_eq!(of(six.local_addr().unwrap().port(), std::process::id()), Listener::Engine);
        }
    }

    /// Some engines are scripts whose child listens.
    #[test]
    fn m4_a_child_of_the_engine_is_the_engine() {
        let script = "python3 -c 'import socket, sys, time\ns = socket.socket(); s.bind((\"127.0.0.1\", 0)); s.listen()\n\
                      print(s.getsockname()[1], flush=True); time.sleep(100)' & wait";
        let mut shell =
            Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).process_group(0).spawn().unwrap();
        let mut port = String::new();
        std::io::BufReader::new(shell.stdout.take().unwrap()).read_line(&mut port).unwrap();
        let found = of(port.trim().parse().unwrap(), shell.id());
        let group = rustix::process::Pid::from_child(&shell);
        rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
        shell.wait().unwrap();
        assert_eq!(found, Listener::Engine);
    }
}
