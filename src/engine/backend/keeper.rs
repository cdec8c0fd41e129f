//! Starts programs from a thread that lives as long as this process: Linux reports the death of a parent *thread* to its
//! children (prctl(2), PR_SET_PDEATHSIG), and threads of pools come and go.

use std::process::Stdio;
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};

use crate::base::process::{ProcessError, Program, Running};

/// A program to start, and where to report it.
type Job = (Program, mpsc::Sender<Result<Running, ProcessError>>);

fn start(program: &Program) -> Result<Running, ProcessError> {
    // A driver that cannot ask the system takes the end of its stdin for ours.
    program.spawn(Stdio::piped(), Stdio::piped(), Stdio::piped())
}

/// Starts a program with pipes for its input and output. Blocks for as long as the system takes to start it.
///
/// # Errors
/// When it cannot be started.
pub(super) fn spawn(program: Program) -> Result<Running, ProcessError> {
    static KEEPER: OnceLock<Option<Mutex<mpsc::Sender<Job>>>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        let thread = std::thread::Builder::new().name("engines".to_owned()).spawn(move || {
            for (program, answer) in jobs {
                let _ = answer.send(start(&program));
            }
        });
        thread.ok().map(|_| Mutex::new(sender))
    });
    let (answer, started) = mpsc::channel();
    let lost = |path| {
        let source = std::io::Error::other("the thread that starts programs has ended");
        Err(ProcessError::Start { path, source })
    };
    let path = program.path.clone();
    let Some(keeper) = keeper else { return lost(path) };
    let _ = keeper.lock().unwrap_or_else(PoisonError::into_inner).send((program, answer));
    started.recv().unwrap_or_else(|_| lost(path))
}
