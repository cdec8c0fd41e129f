//! What an engine can reach once `internal exec` has become it.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use aitools::base::fs;
use aitools::base::process::Program;
use aitools::build::BuildError;
use aitools::build::command::{self, CommandError};
use aitools::report::{Task, Unit, Verb};

/// Serves and writes as engines do, and tries what they have no reason to do.
const ENGINE: &str = "import socket, sys, threading\n\
    def attempt(name, act):\n    try:\n        act()\n        print('REACHED', name)\n    except OSError as error:\n        print('refused', name, error.errno)\n\
    server = socket.create_server(('127.0.0.1', 0))\n\
    open('own', 'w').write('x')\n\
    open('/dev/null', 'w').write('x')\n\
    print('serving')\n\
    attempt('write', lambda: open(sys.argv[1] + '/left', 'w'))\n\
    attempt('read', lambda: open(sys.argv[1] + '/weights').read())\n\
    attempt('tcp', lambda: socket.create_connection(('127.0.0.1', int(sys.argv[2])), timeout=2))\n";

#[test]
fn an_engine_connects_to_nothing_and_writes_to_its_own_folder_alone() {
    let own = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let other = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fs::write_atomic(&other.path().join("weights"), b"w").unwrap();
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port().to_string();
    let run = |verb: &str| {
        let ran = Command::new(env!("CARGO_BIN_EXE_aitools"))
            .args(["internal", verb, &std::process::id().to_string(), "/usr/bin/env", "python3", "-c", ENGINE])
            .arg(other.path())
            .arg(&port)
            .current_dir(own.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stdout).into_owned();
        assert!(said.contains("serving") && said.contains("REACHED read"), "{ran:?}");
        said
    };
    let (said, networked) = (run("exec"), run("exec-with-network"));
    assert!(networked.contains("REACHED tcp"), "{networked}");
    assert!(own.path().join("own").exists());
    // Without Landlock (Linux 5.13, for connections 6.7) nothing is refused.
    let mut probe = Command::new(env!("CARGO_BIN_EXE_aitools"));
    let probed = probe.args(["internal", "confinement"]).arg(own.path()).output().unwrap();
    if String::from_utf8_lossy(&probed.stdout).contains("files") {
        assert!(said.contains("refused write 13") && networked.contains("refused write 13"), "{said}{networked}");
        assert!(!other.path().join("left").exists());
        let release = fs::read_bounded(Path::new("/proc/sys/kernel/osrelease"), 256).unwrap();
        let release = String::from_utf8(release).unwrap();
        let mut numbers = release.split(['.', '-']).filter_map(|number| number.parse::<u32>().ok());
        let version = (numbers.next().unwrap(), numbers.next().unwrap());
        assert!(version < (6, 7) || said.contains("refused tcp 13"), "{said}");
    }
}

/// Conversions and quantizations, as builds do: where nothing can take the network away, `--offline` refuses to start them.
#[test]
fn h4_offline_no_conversion_runs_that_has_a_network() {
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // A place where nobody can make a network namespace; where this system allows none at all, it is one already.
    let script = "#!/bin/sh\nif unshare -Ur true 2>/dev/null\n\
                  then exec unshare -Ur sh -c 'echo 0 > /proc/sys/user/max_net_namespaces && exec \"$@\"' sh DRIVER \"$@\"\n\
                  else exec DRIVER \"$@\"\nfi\n";
    let (driver, ran) = (root.path().join("driver"), root.path().join("ran"));
    let script = script.replace("/bin/sh\n", "/bin/sh\nPATH=/usr/sbin:/usr/bin:/bin\n");
    fs::write_atomic(&driver, script.replace("DRIVER", env!("CARGO_BIN_EXE_aitools")).as_bytes()).unwrap();
    fs::set_executable(&driver).unwrap();
    let convert = |offline: bool| {
        let args = vec!["-c".into(), "echo converted > ran".into()];
        let program = Program { path: "/bin/sh".into(), args, env: BTreeMap::new(), cwd: root.path().to_owned() };
        let (writable, log) = (vec![root.path().to_owned()], root.path().join("log"));
        let command = command::Command { driver: &driver, program, writable, offline, log };
        let task = Task::silent();
        command::run(&command, &task, &task.start(Verb::Derive, "m", None, Unit::Steps))
    };
    let refused = convert(true).unwrap_err();
    assert!(matches!(refused, CommandError::Run(BuildError::NotIsolated { .. })), "{refused:?}");
    assert!(refused.to_string().contains("`--offline` forbids") && !ran.exists(), "{refused}");
    convert(false).unwrap();
    assert!(ran.exists());
}
