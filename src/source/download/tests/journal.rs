//! What a kill loses, and what a file without a size may take.

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
    let ask = Download {
        what: "f",
        urls: &url,
        headers: &[],
        size_bytes,
        sha256,
        parts: &parts,
        to: &to,
        streams: 2,
        reserve_bytes: 0,
    };
    assert!(matches!(download(&http, &task, &ask), Err(SourceError::Cancelled(_))));
    let told = compared.1.lock().unwrap();
    assert!(told.iter().any(|(done, _)| *done >= 700_000), "{told:?}");
    // The last one is told when the workers have ended; the final journal follows.
    assert!(told[..told.len() - 1].iter().all(|(done, journalled)| journalled >= done), "{told:?}");
}

/// A file of unknown size stops before the disk is full; one whose size is known has its space already.
#[test]
fn a_file_without_a_size_leaves_the_reserve_free() {
    let bench = Bench { reserve_bytes: u64::MAX, ..Bench::new() };
    let endless = good(SIZE, |reply, _, _| reply.without_length());
    match bench.ask(&[endless.url("/f")], &[], None) {
        Err(SourceError::Fs(error)) => {
            assert!(error.is_no_space() && error.to_string().contains("does not say how large"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    let left = fs::read_dir(&bench.root.path().join("p ä")).unwrap();
    assert!(left.iter().all(|path| path.extension().is_some_and(|end| end == "lock")), "{left:?}");
    bench.get(&good(SIZE, |reply, _, _| reply).url("/f"), SIZE).unwrap();
}

#[test]
fn a_part_that_lies_is_found_out() {
    let bench = Bench::new();
    let parts = bench.root.path().join("p ä");
    let part = Part::hold(&parts, &digest_of(SIZE).hex(), "x", &Task::silent()).unwrap();
    part.open().unwrap().set_len(SIZE as u64).unwrap();
    let mut done = part::Ranges::default();
    done.add(0, 1 << 20);
    part.save(&part::Journal::new(SIZE as u64, None, done.clone(), done));
    drop(part);
    let server = good(SIZE, |reply, _, _| reply);
    bench.get(&server.url("/f"), SIZE).unwrap();
    assert_eq!(server.seen().last().unwrap().header("range"), None);
}
