//! What a kill loses.

use super::*;

/// What was told as done is journalled already, so that a kill at that moment loses none of it.
#[test]
fn l8_a_kill_loses_nothing_that_was_told() {
    struct Compared(std::path::PathBuf, Mutex<Vec<(u64, u64)>>, Cancel);
    impl Reporter for Compared {
        fn report(&self, event: &Event) {
            if let Event::Progressed { done: done @ 1.., .. } = event {
                self.1.lock().unwrap().push((*done, resumable_bytes(&self.0)));
                if *done >= 700_000 {
                    self.2.cancel();
                }
            }
        }
    }
    let server = good(SIZE, |reply, _, turn| if turn < 3 { reply.stall_after(400_000) } else { reply });
    let (root, cancel) = (tempfile::tempdir().unwrap(), Cancel::default());
    let parts = root.path().join("p ä");
    let compared = Arc::new(Compared(parts.clone(), Mutex::default(), cancel.clone()));
    let task = Task::new(Arc::clone(&compared) as _, cancel.clone());
    let http = Http::new(Settings { cancel, ..Settings::default() });
    let (url, to) = ([server.url("/f")], root.path().join("f"));
    let (size_bytes, sha256) = (Some(SIZE as u64), Some(digest_of(SIZE)));
    let ask = Download { what: "f", urls: &url, headers: &[], size_bytes, sha256, parts: &parts, to: &to, streams: 2 };
    assert!(matches!(download(&http, &task, &ask), Err(SourceError::Cancelled(_))));
    let told = compared.1.lock().unwrap();
    assert!(told.iter().any(|(done, _)| *done >= 700_000), "{told:?}");
    // The last one is told when the workers have ended; the final journal follows.
    assert!(told[..told.len() - 1].iter().all(|(done, journalled)| journalled >= done), "{told:?}");
}
