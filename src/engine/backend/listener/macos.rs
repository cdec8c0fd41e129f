//! By lsof(8), which comes with the system. It shows the processes of the same user alone: a listener that it does not show
//! is another user's.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use super::Listener;
use crate::base::cancel::Cancel;
use crate::base::process::Program;

const LSOF: &str = "/usr/sbin/lsof";
/// How long it may take; and a connection, which tells whether it is worth starting.
const LIMIT: Duration = Duration::from_secs(5);
const CONNECT: Duration = Duration::from_millis(200);
const OUTPUT_LIMIT_BYTES: u64 = 64 * 1024;

pub(super) fn of(port: u16, group: u32) -> Listener {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    if TcpStream::connect_timeout(&address, CONNECT).is_err() {
        return Listener::Nobody;
    }
    let port = format!("-iTCP:{port}");
    let args = ["-nP", "-a", port.as_str(), "-sTCP:LISTEN", "-Fg"].map(Into::into).to_vec();
    let lsof = Program { path: LSOF.into(), args, env: BTreeMap::new(), cwd: "/".into() };
    let Ok(output) = lsof.output(LIMIT, OUTPUT_LIMIT_BYTES, &Cancel::default()) else { return Listener::Unknown };
    // Lines of one field each: `p` and a process id, `g` and a process group, `f` and a file.
    let groups: Vec<&str> = output.stdout.lines().filter_map(|line| line.strip_prefix('g')).collect();
    let ours = |of: &&str| of.parse() == Ok(group);
    if !groups.is_empty() && groups.iter().all(ours) { Listener::Engine } else { Listener::Another }
}
