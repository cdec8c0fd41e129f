//! Ports for engines: chosen before the engine starts, claimed until it has ended.

use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::time::Duration;

use tokio::net::TcpStream;

/// How many ports in a row may turn out to be claimed by others.
const CLAIM_ATTEMPTS: u32 = 20;

/// A port on which nobody listens, and our claim to it. Engines listen only once they have loaded, and some of them beside
/// whoever listens there already (`SO_REUSEPORT`): until then another run could draw the same one. It cannot have the UDP
/// port of that number, too, which nobody needs.
pub(super) fn free_port() -> io::Result<(u16, UdpSocket)> {
    for _ in 0..CLAIM_ATTEMPTS {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        if let Ok(claim) = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)) {
            return Ok((port, claim));
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// Whether anybody listens there. (Binding would not tell: the connections of a program that is gone may linger.)
pub(super) async fn is_listened_on(port: u16) -> bool {
    let connect = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
    tokio::time::timeout(Duration::from_secs(1), connect).await.is_ok_and(|connected| connected.is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_is_claimed_until_its_engine_has_ended() {
        let (port, claim) = free_port().unwrap();
        assert!(!is_listened_on(port).await);
        let again = || UdpSocket::bind((Ipv4Addr::LOCALHOST, port));
        assert!(again().is_err(), "another run would take it");
        drop(claim);
        assert!(again().is_ok());
    }
}
