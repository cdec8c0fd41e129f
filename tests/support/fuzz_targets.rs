//! What is fed with anything: every parser of bytes from outside. None may panic, hang or take memory without bound, and what
//! a writer of ours writes must be read again. Used by `tests/fuzz.rs` (a short run) and by `fuzz/` (cargo-fuzz).
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a finding is a panic, and files here need not be durable"
)]

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::time::Duration;

use aitools::base::digest::Digest;
use aitools::base::http::{Http, Settings as HttpSettings};
use aitools::engine::sse;
use aitools::format::cyclonedx::Bom;
use aitools::format::dsse::{Envelope, PublicKey};
use aitools::format::gguf::Header;
use aitools::format::in_toto::Statement;
use aitools::format::receipt::Receipt;
use aitools::format::settings::Owner;
use aitools::format::{lockfile, manifest, oci, policy, settings};
use aitools::report::Task;
use aitools::source::archive::{Archive, Limits, Select};
use aitools::source::download::{Download, download};

pub type Target = fn(&[u8]);

/// Every target by its name, which is that of its corpus in `fuzz/corpus/`.
pub const TARGETS: &[(&str, Target)] = &[
    ("archive", archive),
    ("download", download_answer),
    ("events", events),
    ("evidence", evidence),
    ("gguf", gguf),
    ("lockfile", lockfile_text),
    ("manifest", manifest_text),
    ("oci", oci_json),
    ("policy", policy_text),
    ("receipt", receipt),
    ("settings", settings_text),
];

pub fn manifest_text(data: &[u8]) {
    let _ = manifest::parse("m.toml", data);
}

/// What was read is written, and read again as the same.
pub fn lockfile_text(data: &[u8]) {
    let Ok((parsed, _)) = lockfile::parse("m.lock", data) else { return };
    let text = parsed.value.to_text();
    let (again, _) = lockfile::parse("m.lock", text.as_bytes()).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(again.value.to_text(), text);
}

pub fn policy_text(data: &[u8]) {
    let _ = policy::parse("p.yaml", data);
}

pub fn settings_text(data: &[u8]) {
    let _ = settings::parse("s.toml", data, Owner::Project);
    let _ = settings::parse("s.toml", data, Owner::User);
}

pub fn receipt(data: &[u8]) {
    let Ok(receipt) = Receipt::parse(data) else { return };
    assert_eq!(Receipt::parse(receipt.to_text().as_bytes()).unwrap(), receipt);
}

pub fn gguf(data: &[u8]) {
    let Ok(header) = Header::parse(data, Some(data.len() as u64)) else { return };
    let _ = header.check_extents(data.len() as u64);
    let _ = (header.types(), header.whole_size(), header.chat_template(), header.vocabulary_size());
}

pub fn oci_json(data: &[u8]) {
    let _ = oci::parse_index(data);
    let _ = oci::Bundle::parse_manifest(data);
    let _ = oci::Config::parse(data);
}

/// No signature of another key is ever valid.
pub fn evidence(data: &[u8]) {
    const KEY: &str = "-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE9XoI8ZmYOpyxvfWNlTEvnwsuaeBu
n6oV44+9srdLuMUoCdTJ1w3zChU0n6tA+Anp7xL8DbCOihBoOQsfLwPmiw==
-----END PUBLIC KEY-----
";
    if let Ok(envelope) = serde_json::from_slice::<Envelope>(data) {
        assert!(envelope.open(&PublicKey::from_pem(KEY).unwrap()).is_err());
    }
    let _ = serde_json::from_slice::<Statement>(data);
    let _ = serde_json::from_slice::<Bom>(data);
    let _ = PublicKey::from_pem(&String::from_utf8_lossy(data));
}

pub fn events(data: &[u8]) {
    let whole = sse::Parser::default().push(data);
    // Where the bytes are cut changes nothing.
    let mut parser = sse::Parser::default();
    let cut: Result<Vec<Vec<String>>, _> = data.chunks(3).map(|piece| parser.push(piece)).collect();
    if let (Ok(whole), Ok(cut)) = (whole, cut) {
        assert_eq!(whole, cut.concat());
    }
}

/// An archive is read, and unpacked when it is harmless: into a folder, and nowhere else.
pub fn archive(data: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let (file, into) = (folder.path().join("a"), folder.path().join("into"));
    std::fs::write(&file, data).unwrap();
    std::fs::create_dir(&into).unwrap();
    let (limits, task) = (Limits { total_bytes: 1 << 20, files: 1000 }, Task::silent());
    for drop_top in [false, true] {
        let select = Select { drop_top, ..Select::default() };
        let Ok(archive) = Archive::open(&file, "a", &select, limits, &task) else { continue };
        let _ = archive.unpack(&into, &|_| true);
        let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        std::fs::remove_dir_all(&into).unwrap();
        std::fs::create_dir(&into).unwrap();
    }
}

/// A server that answers with any bytes: what comes has the digest that was asked for, or is refused.
pub fn download_answer(data: &[u8]) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let answer = data.to_vec();
    let server = std::thread::spawn(move || {
        // As many as a client asks at most; the last connection is our own.
        for stream in listener.incoming().take(16) {
            let Ok(mut stream) = stream else { return };
            let mut head = [0; 2048];
            let asked = stream.read(&mut head).unwrap_or(0);
            if head[..asked].starts_with(b"end") {
                return;
            }
            let _ = stream.write_all(&answer);
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let (to, urls) = (folder.path().join("f"), [format!("http://{address}/f")]);
    let sha256 = Digest::of(b"hello");
    let http = Http::new(HttpSettings {
        stall_timeout: Duration::from_millis(200),
        pace: Duration::from_millis(1),
        ..HttpSettings::default()
    });
    let ask = Download {
        what: "f",
        urls: &urls,
        headers: &[],
        size_bytes: Some(5),
        sha256: Some(sha256),
        parts: folder.path(),
        to: &to,
        streams: 1,
        reserve_bytes: 0,
    };
    if download(&http, &Task::silent(), &ask).is_ok() {
        assert_eq!(std::fs::read(&to).unwrap(), b"hello");
    } else {
        assert!(!to.exists());
    }
    if let Ok(mut stream) = std::net::TcpStream::connect(address) {
        let _ = stream.write_all(b"end");
    }
    let _ = server.join();
}
