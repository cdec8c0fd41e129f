//! A build without a network, as far as the system lets us, and a trap on loopback that hears who tried.
//!
//! On Linux the child leaves the network by a namespace of its own (for which a user without privileges needs a user
//! namespace too); elsewhere, and where that is refused, tools are only discouraged: every proxy variable points to the trap,
//! which says no and writes down the host. What ignores proxies and has a network then gets through.
//!
//! Invariant: called while the process has one thread, before anything is started.

use std::io::{self, BufRead as _, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::base::fs;

/// What the trap answers; `log.rs` knows it when a tool repeats it.
pub const REFUSAL: &str = "builds have no network";
/// Requests written down at most.
const MAX_HEARD: usize = 64;
/// Bytes of a request that are read.
const MAX_REQUEST_BYTES: u64 = 8 << 10;

/// Puts this process and what it starts off the network.
///
/// # Errors
/// What the system said when it refused.
pub fn leave_network() -> io::Result<()> {
    platform::leave_network()
}

/// A listener on loopback that refuses every request, to be named as the proxy of everything.
#[derive(Debug)]
pub struct Trap {
    listener: TcpListener,
    port: u16,
}

impl Trap {
    /// Listens. No thread is started yet.
    ///
    /// # Errors
    /// When there is no loopback to listen on.
    pub fn bind() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let port = listener.local_addr()?.port();
        Ok(Self { listener, port })
    }

    /// The TCP port that it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Answers from a thread of its own, writes the hosts that are asked for to `heard`, one a line, and gives the address
    /// to put into proxy variables.
    pub fn serve(self, heard: PathBuf) -> String {
        std::thread::spawn(move || {
            let mut left = MAX_HEARD;
            for stream in self.listener.incoming().flatten() {
                let asked = refuse(&stream).ok().flatten();
                if let Some(asked) = asked.filter(|_| left > 0) {
                    left -= 1;
                    let _ = fs::append(&heard, format!("{asked}\n").as_bytes());
                }
            }
        });
        format!("http://127.0.0.1:{}", self.port)
    }
}

/// Reads one request, says no, and gives what was asked for: `CONNECT host:443`, `GET http://host/…`.
fn refuse(stream: &TcpStream) -> io::Result<Option<String>> {
    let limit = Some(Duration::from_secs(2));
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit)?;
    let mut lines = io::BufReader::new(stream.take(MAX_REQUEST_BYTES));
    let mut first = Vec::new();
    lines.read_until(b'\n', &mut first)?;
    // The rest of the head is read so that closing does not reset the connection under the answer.
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 2 {
        line.clear();
    }
    let answer = format!("HTTP/1.1 403 {REFUSAL}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let mut writer: &TcpStream = stream;
    writer.write_all(answer.as_bytes())?;
    let text = String::from_utf8_lossy(&first);
    let mut words = text.split_whitespace();
    Ok(words.next().zip(words.next()).map(|(method, target)| {
        let asked = format!("{method} {target}");
        asked.chars().filter(|c| !c.is_control()).take(200).collect()
    }))
}

/// What a trap wrote down.
pub fn heard(path: &Path) -> Vec<String> {
    let bytes = fs::read_bounded(path, 64 << 10).unwrap_or_default();
    String::from_utf8_lossy(&bytes).lines().take(MAX_HEARD).map(str::to_owned).collect()
}

#[cfg(target_os = "linux")]
#[expect(deprecated, reason = "its successor is unsafe because of `FILES`, which nobody asks for")]
pub(super) fn unshare(what: rustix::thread::UnshareFlags) -> io::Result<()> {
    Ok(rustix::thread::unshare(what)?)
}

#[cfg(target_os = "linux")]
mod platform {
    use std::io;

    use rustix::net::netlink::SocketAddrNetlink;
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};
    use rustix::process::{getegid, geteuid};
    use rustix::thread::UnshareFlags;

    use super::unshare;
    use crate::base::fs;

    pub fn leave_network() -> io::Result<()> {
        let (user, group) = (geteuid().as_raw(), getegid().as_raw());
        let left = UnshareFlags::NEWNET | UnshareFlags::NEWIPC;
        if unshare(left).is_err() {
            unshare(left | UnshareFlags::NEWUSER)?;
            // Each stays who it was; without this programs would see themselves as nobody (user_namespaces(7)).
            for (file, text) in [
                ("/proc/self/setgroups", "deny".to_owned()),
                ("/proc/self/uid_map", format!("{user} {user} 1")),
                ("/proc/self/gid_map", format!("{group} {group} 1")),
            ] {
                let _ = fs::append(std::path::Path::new(file), text.as_bytes());
            }
        }
        // Without loopback the build is off the network all the same; only the trap is missing.
        let _ = raise_loopback();
        Ok(())
    }

    /// Sets the interface of index 1, which is loopback in a new namespace, up: one RTM_NEWLINK message (rtnetlink(7)).
    fn raise_loopback() -> io::Result<()> {
        const RTM_NEWLINK: u16 = 16;
        const REQUEST_AND_ACKNOWLEDGE: u16 = 1 | 4;
        const IFF_UP: u32 = 1;
        let mut message = Vec::with_capacity(32);
        message.extend(32_u32.to_ne_bytes());
        message.extend(RTM_NEWLINK.to_ne_bytes());
        message.extend(REQUEST_AND_ACKNOWLEDGE.to_ne_bytes());
        message.extend([0; 8]); // sequence, port
        message.extend([0; 4]); // family, padding, type
        message.extend(1_i32.to_ne_bytes());
        message.extend(IFF_UP.to_ne_bytes());
        message.extend(IFF_UP.to_ne_bytes()); // which flags change
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        sendto(&socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut answer = [0_u8; 512];
        recv(&socket, &mut answer[..], RecvFlags::empty())?;
        Ok(())
    }
}

#[cfg(not(target_os = "linux"))]
mod platform {
    use std::io;

    pub fn leave_network() -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this system has no network namespaces"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trap_says_no_and_remembers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("é heard");
        let address = Trap::bind().unwrap().serve(path.clone());
        let ask = |request: &[u8]| {
            let mut stream = TcpStream::connect(address.trim_start_matches("http://")).unwrap();
            stream.write_all(request).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        };
        assert!(ask(b"CONNECT example.invalid:443 HTTP/1.1\r\nHost: x\r\n\r\n").contains(REFUSAL));
        ask(b"\r\n\r\n");
        ask(b"GET http://a/\x1b[31m HTTP/1.1\r\n\r\n");
        // The trap writes after it answered, and takes one caller at a time: the next answer shows that the last was written.
        ask(b"\r\n\r\n");
        assert_eq!(heard(&path), ["CONNECT example.invalid:443", "GET http://a/[31m"]);
    }
}
