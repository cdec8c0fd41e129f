//! What stays in the shared cache between a lock, a fetch and the next lock.

use super::*;

#[test]
fn u2_the_record_of_a_branch_moves_with_an_upgrade() {
    let bench = Bench::good();
    let record = bench.cache().join("refs/main");
    let old = bench.push(&[("a.gguf", b"old weights")]);
    let first = bench.resolve(&spec(&[])).unwrap();
    bench.fetch(&first).unwrap();
    assert_eq!(read(&record), old.as_bytes());
    let new = bench.push(&[("a.gguf", b"new weights")]);
    let second = bench.resolve(&spec(&[])).unwrap();
    assert_eq!(read(&record), old.as_bytes(), "nothing of it is here yet");
    bench.fetch(&second).unwrap();
    assert_eq!(read(&record), new.as_bytes());
    // Another project has the older lockfile still.
    bench.fetch(&first).unwrap();
    assert_eq!(read(&record), new.as_bytes());
    // What another tool wrote stays.
    fs::write_atomic(&record, old.as_bytes()).unwrap();
    bench.push(&[("a.gguf", b"newer weights")]);
    let third = bench.resolve(&spec(&[])).unwrap();
    bench.fetch(&third).unwrap();
    assert_eq!(read(&record), old.as_bytes());
}

/// The note of what is about to be written comes first.
#[test]
fn u2_a_kill_before_the_record_of_a_branch_is_written_is_made_good() {
    let bench = Bench::good();
    let (record, note) = (bench.cache().join("refs/main"), bench.cache().join(".aitools/refs/main"));
    let old = bench.push(&[("a.gguf", b"old weights")]);
    let first = bench.resolve(&spec(&[])).unwrap();
    bench.fetch(&first).unwrap();
    fs::remove_file(&record).unwrap();
    bench.fetch(&first).unwrap();
    assert_eq!(read(&record), old.as_bytes());
    let new = bench.push(&[("a.gguf", b"new weights")]);
    let second = bench.resolve(&spec(&[])).unwrap();
    let left = format!("{{\"locked\":\"{new}\",\"written\":\"{new}\",\"earlier\":\"{old}\"}}");
    fs::write_atomic(&note, left.as_bytes()).unwrap();
    bench.fetch(&second).unwrap();
    assert_eq!(read(&record), new.as_bytes());
}

#[test]
fn u4_small_files_that_came_at_lock_are_not_fetched_again() {
    let bench = Bench::good();
    bench.push(&[("a.gguf", &noise(70_000, 1)), ("config.json", b"small"), ("activation/1.pt", b"one")]);
    let pin = bench.resolve(&spec(&[])).unwrap();
    bench.fetch(&pin).unwrap();
    let of = |file: &str| {
        bench.asked(Site::Hub).iter().filter(|line| line.contains("/resolve/") && line.ends_with(file)).count()
    };
    assert_eq!((of("config.json"), of("1.pt")), (1, 1));
    // Neither by a lock of another commit with the same files.
    bench.push(&[("a.gguf", &noise(70_000, 2)), ("config.json", b"small"), ("activation/1.pt", b"one")]);
    let moved = bench.resolve(&spec(&[])).unwrap();
    bench.fetch(&moved).unwrap();
    assert_eq!((of("config.json"), of("1.pt")), (1, 1));
    // What somebody damaged there is not believed.
    let blob = bench.cache().join("blobs").join(git_blob(b"small"));
    fs::remove_file(&blob).unwrap();
    fs::write_atomic(&blob, b"smell").unwrap();
    assert_eq!(bench.resolve(&spec(&[])).unwrap(), moved);
    assert_eq!(of("config.json"), 2);
}
