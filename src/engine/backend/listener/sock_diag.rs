//! The sockets that listen on a port, by sock_diag(7). The kernel looks at those that listen alone, which takes microseconds; its
//! table in `/proc` lists every connection of the machine, too, which takes milliseconds of the processor while an engine loads.

use std::collections::BTreeSet;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};

/// netlink(7): the head of a message, its types and flags.
const HEAD_BYTES: usize = 16;
const DONE: u16 = 3;
const BY_FAMILY: u16 = 20;
const REQUEST_DUMP: u16 = 0x301;
const INTERRUPTED: u16 = 0x10;
/// sock_diag(7): `struct inet_diag_msg`, and in it the local address and the inode.
const SOCKET_BYTES: usize = 72;
const PORT_AT: usize = 4;
const ADDRESS_AT: usize = 8;
const INODE_AT: usize = 68;
const TCP: u8 = 6;
/// A bit for each state of a connection.
const LISTEN: u32 = 1 << 10;
/// The families, as Linux numbers them.
const FOUR: u8 = 2;
const SIX: u8 = 10;
/// The kernel answers at once.
const PATIENCE: Duration = Duration::from_secs(1);
/// Answers that are read at most; each holds many sockets.
const ANSWERS: usize = 1000;

/// The inodes of the sockets that get connections to 127.0.0.1:`port`. None when the kernel does not tell.
pub(super) fn listening(port: u16) -> Option<BTreeSet<u64>> {
    let mut inodes = sockets(FOUR, port)?;
    // A machine may have no IPv6: the kernel then lists none.
    inodes.extend(sockets(SIX, port)?);
    Some(inodes)
}

fn sockets(family: u8, port: u16) -> Option<BTreeSet<u64>> {
    let protocol = Some(netlink::SOCK_DIAG);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, protocol).ok()?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE)).ok()?;
    let request = request(family, port);
    if send(&socket, &request, SendFlags::empty()).ok()? != request.len() {
        return None;
    }
    let (mut inodes, mut answer) = (BTreeSet::new(), vec![0; 32 << 10]);
    for _ in 0..ANSWERS {
        let (count, whole) = recv(&socket, &mut answer[..], RecvFlags::TRUNC).ok()?;
        // An answer that was cut off would hide sockets.
        if whole > count {
            return None;
        }
        if take(&answer[..count], port, &mut inodes)? {
            return Some(inodes);
        }
    }
    None
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
fn request(family: u8, port: u16) -> Vec<u8> {
    const LENGTH: u32 = 72;
    let mut bytes = Vec::new();
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend(REQUEST_DUMP.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, TCP, 0, 0]);
    bytes.extend(LISTEN.to_ne_bytes());
    bytes.extend(port.to_be_bytes());
    bytes.resize(LENGTH as usize, 0);
    bytes
}

/// Reads the messages of one answer; true after the last one. None when they are not what was asked for.
fn take(mut answer: &[u8], port: u16, inodes: &mut BTreeSet<u64>) -> Option<bool> {
    while !answer.is_empty() {
        let length = usize::try_from(u32::from_ne_bytes(bytes_at(answer, 0)?)).ok()?;
        let (kind, flags) = (u16::from_ne_bytes(bytes_at(answer, 4)?), u16::from_ne_bytes(bytes_at(answer, 6)?));
        let message = answer.get(HEAD_BYTES..length)?;
        if flags & INTERRUPTED != 0 {
            return None;
        }
        match kind {
            DONE => return Some(true),
            BY_FAMILY if message.len() >= SOCKET_BYTES => {
                if u16::from_be_bytes(bytes_at(message, PORT_AT)?) == port && is_reached(message)? {
                    inodes.insert(u32::from_ne_bytes(bytes_at(message, INODE_AT)?).into());
                }
            }
            _ => return None,
        }
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(false)
}

/// Whether a socket gets connections to 127.0.0.1: its address is that one, any, or either of both as IPv6 has it.
fn is_reached(socket: &[u8]) -> Option<bool> {
    const LOOPBACK: [u8; 4] = [127, 0, 0, 1];
    let address: [u8; 16] = bytes_at(socket, ADDRESS_AT)?;
    Some(match socket.first()? {
        &FOUR => address[..4] == LOOPBACK || address[..4] == [0; 4],
        _ => {
            let mapped = address[..10] == [0; 10] && address[10..12] == [0xff; 2] && address[12..] == LOOPBACK;
            mapped || address == [0; 16]
        }
    })
}

fn bytes_at<const COUNT: usize>(bytes: &[u8], at: usize) -> Option<[u8; COUNT]> {
    bytes.get(at..at + COUNT)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};

    use super::super::listed;
    use super::*;

    #[test]
    fn m4_it_tells_what_the_table_tells() {
        let four = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let any = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let other = TcpListener::bind((Ipv4Addr::new(127, 0, 0, 2), 0)).unwrap();
        let six = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0));
        let one = |listener: &TcpListener| {
            let port = listener.local_addr().unwrap().port();
            let told = listening(port).unwrap();
            assert_eq!(told, listed(port).unwrap());
            told.len()
        };
        let _connected = TcpStream::connect(four.local_addr().unwrap()).unwrap();
        assert_eq!((one(&four), one(&any), one(&other)), (1, 1, 0));
        assert!(six.is_err() || one(six.as_ref().unwrap()) == 1);
        let port = four.local_addr().unwrap().port();
        drop(four);
        assert_eq!(listening(port).unwrap(), BTreeSet::new());
    }

    #[test]
    fn m4_answers_that_are_not_what_was_asked_for_tell_nothing() {
        let message = |kind: u16, flags: u16, body: &[u8]| {
            let mut bytes = u32::try_from(HEAD_BYTES + body.len()).unwrap().to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(flags.to_ne_bytes());
            bytes.extend([0; 8]);
            bytes.extend(body);
            bytes
        };
        let mut none = BTreeSet::new();
        assert_eq!(take(&message(DONE, 2, &[0; 4]), 1, &mut none), Some(true));
        assert_eq!(take(&[], 1, &mut none), Some(false));
        for bad in [message(2, 0, &[0; 20]), message(BY_FAMILY, 0, &[0; 20]), message(DONE, INTERRUPTED, &[0; 4])] {
            assert_eq!(take(&bad, 1, &mut none), None);
        }
        assert_eq!(take(&[1, 2, 3], 1, &mut none), None);
        assert!(none.is_empty());
    }
}
