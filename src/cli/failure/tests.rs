use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use super::*;
use crate::base::cancel::Cancelled;
use crate::base::diagnostic::Diagnostics;
use crate::base::digest::Digest;
use crate::base::platform::Variant;
use crate::format::manifest::Kind;
use crate::plan::Step;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn files(kind: io::ErrorKind) -> FsError {
    FsError::new("write", Path::new("a/file"), io::Error::from(kind))
}

/// One of each variant of [`Failure`], where its parts decide nothing.
fn simple() -> Vec<Failure> {
    let lock = || PathBuf::from("manifests/default.lock");
    let entry = |why| Staleness { kind: Kind::Model, name: name("m"), why };
    let changed =
        Why::Changed { manifest: "{\"files\":[\"*.gguf\"]}".to_owned(), lock: "{\"files\":[\"a.gguf\"]}".to_owned() };
    let damaged = Damaged {
        path: "models/m/a.gguf".into(),
        what: "weights file".to_owned(),
        expected: "sha256:aa".to_owned(),
        computed: None,
        size_bytes: None,
        recorded_in: "manifests/default.lock:12".to_owned(),
    };
    vec![
        Failure::Fs(FsError::new("read", Path::new("manifests/default.toml"), io::ErrorKind::FileTooLarge.into())),
        Failure::Cancelled(Cancelled),
        Failure::Input(Diagnostics(vec![Diagnostic::error("`version` is missing").hint("add `version = 1`")])),
        Failure::Usage { what: "there is no policy `p`".to_owned(), hint: Some("did you mean `q`?".to_owned()) },
        Failure::NoManifest { name: "default".to_owned(), from: "project".into() },
        Failure::NoLock { path: lock() },
        Failure::Stale { path: lock(), entries: vec![entry(Why::Added), entry(changed), entry(Why::Inputs)] },
        Failure::Stale { path: lock(), entries: vec![entry(Why::Removed), entry(Why::Conflict)] },
        Failure::NotSynced { steps: Vec::<Step>::new() },
        Failure::Fs(files(io::ErrorKind::PermissionDenied)),
        Failure::Fs(files(io::ErrorKind::StorageFull)),
        Failure::Damaged { damages: vec![damaged] },
        Failure::NoSpace { what: "2 files".to_owned(), needed: 7, available: 5, reserve: 1, at: "cache".into() },
        Failure::Recipe {
            engine: name("llama-cpp"),
            error: EngineError::NoVariant {
                engine: "llama-cpp",
                variant: Variant::Metal,
                platform: "linux-x86_64".to_owned(),
            },
        },
    ]
}

fn sources() -> Vec<Failure> {
    let (what, why, hint) =
        (|| "`a.gguf`".to_owned(), || "HTTP status 503".to_owned(), || Some("try later".to_owned()));
    let errors = vec![
        SourceError::Offline { what: what() },
        SourceError::Network { what: what(), why: why(), hint: hint() },
        SourceError::Missing { what: what(), why: "no such file".to_owned(), hint: hint() },
        SourceError::Mismatch {
            what: what(),
            expected: "sha256:aa".to_owned(),
            actual: "sha256:bb".to_owned(),
            likely: Some("an error page".to_owned()),
        },
        SourceError::Hostile { what: what(), why: "`../x` leaves the archive".to_owned() },
        SourceError::Tool { what: "git".to_owned(), why: "it is not installed".to_owned(), hint: hint() },
        SourceError::Disagreement { what: "commits differ".to_owned(), details: vec!["a: b".to_owned()], hint: hint() },
    ];
    let failed = |error| {
        let lock_line = Some("manifests/default.lock:12".to_owned());
        Failure::Source { kind: Kind::Model, name: name("m"), error, lock_line }
    };
    errors.into_iter().map(failed).collect()
}

fn stores() -> Vec<Failure> {
    let mismatch = || StoreError::Mismatch {
        what: "`a.gguf`".to_owned(),
        expected: Digest::of(b"a"),
        computed: Digest::of(b"b"),
        expected_bytes: Some(2),
        computed_bytes: 3,
    };
    let lock_line = Some("manifests/default.lock:12".to_owned());
    let (what, why) = ("`a.gguf` of bundle `b.tar`".to_owned(), "its bytes are sha256:bb".to_owned());
    vec![
        Failure::Bundle(SourceError::Hostile { what, why }),
        Failure::Store(StoreError::Fs(files(io::ErrorKind::PermissionDenied))),
        Failure::Integrity { kind: Kind::Model, name: name("m"), error: mismatch(), lock_line },
    ]
}

fn builds() -> Vec<Failure> {
    let log = || PathBuf::from("cache/logs/e.log");
    let failed = crate::build::Failure {
        phase: crate::build::Phase::Build,
        status: "exit status: 1".to_owned(),
        log: log(),
        first_error: Some("main.c:1: error: expected `;`".to_owned()),
        tail: vec!["ninja: build stopped".to_owned()],
        network: vec!["example.org".to_owned()],
    };
    let errors = vec![
        BuildError::TooManyFiles,
        BuildError::Recipe { what: "definition", value: "A;B".to_owned(), why: "it holds a semicolon" },
        BuildError::NoCompiler { language: "CXX".to_owned(), hint: "install a C++ compiler", log: log() },
        BuildError::Failed(Box::new(failed)),
        BuildError::NotBuilt { definition: "GGML_CUDA".to_owned(), value: None, said: Vec::new(), log: log() },
        BuildError::NoSpace { said: "No space left on device".to_owned(), available_bytes: 5, log: log() },
        BuildError::NotIsolated { why: "user namespaces are off".to_owned() },
        BuildError::NoOutput { glob: "bin/*".to_owned(), beside: vec!["lib/a".to_owned()] },
    ];
    let built = errors.into_iter().map(|error| Failure::Build { engine: name("e"), error });
    let tool = ToolError::Missing { what: "C compiler", tried: vec!["cc".to_owned()], hint: "install a C compiler" };
    built.chain([Failure::Toolchain { engine: name("e"), error: tool }]).collect()
}

fn derivations() -> Vec<Failure> {
    let log = || PathBuf::from("cache/logs/m.log");
    let refused = EngineError::Underivable { why: "it is dense".to_owned(), hint: Some("use `quantize`".to_owned()) };
    let failed = CommandError::Failed {
        program: "quantize".to_owned(),
        status: std::process::ExitStatus::default(),
        tail: vec!["out of memory".to_owned()],
        log: log(),
    };
    let errors = vec![
        DeriveError::Engine(refused),
        DeriveError::Engine(EngineError::Timeout),
        DeriveError::Command(failed),
        DeriveError::Useless { why: vec!["no tensor".to_owned()], log: log() },
    ];
    errors.into_iter().map(|error| Failure::Derive { model: name("m"), error }).collect()
}

fn runs() -> Vec<Failure> {
    let answered = |error| RunError::Engine { error, status: None, tail: vec!["last line".to_owned()] };
    let errors = vec![
        answered(EngineError::TooLong { prompt_tokens: 9, context_size: 8 }),
        answered(EngineError::Policy { key: "generation.seed", why: "it is too large".to_owned() }),
        answered(EngineError::Timeout),
        RunError::Timeout { limit_s: 60, tail: Vec::new() },
    ];
    errors.into_iter().map(|error| Failure::Run { policy: name("p"), error }).collect()
}

fn serves() -> Vec<Failure> {
    let address: std::net::SocketAddr = ([0, 0, 0, 0], 8081).into();
    let errors = vec![
        ServeError::Bind { address, source: io::ErrorKind::AddrInUse.into() },
        ServeError::Open(address),
        ServeError::Running { url: "http://127.0.0.1:8081".to_owned(), pid: 7 },
        ServeError::NotRunning,
        ServeError::Unusable { problems: vec!["p: the project is not synced: run `aitools sync`".to_owned()] },
        ServeError::Answer("`p` is not loaded".to_owned()),
        ServeError::Key(KeyError::Short(3)),
        ServeError::Tls(crate::gateway::listener::TlsError::File {
            file: "key.pem".to_owned(),
            source: rustls::pki_types::pem::Error::NoItemsFound,
        }),
        ServeError::Runtime(io::ErrorKind::Other.into()),
    ];
    errors.into_iter().map(Failure::Serve).collect()
}

fn samples() -> Vec<Failure> {
    [simple(), sources(), stores(), builds(), derivations(), runs(), serves()].into_iter().flatten().collect()
}

#[test]
fn each_kind_of_error_has_a_text_and_an_exit_code() {
    let shown = |failure: &Failure| {
        let report = ErrorReport::of(failure);
        assert!(exit::TABLE.iter().any(|(code, _)| *code == report.exit_code), "{}", report.exit_code);
        format!("{} (exit code {})\n{}\n", report.kind, report.exit_code, report.to_text(false))
    };
    insta::assert_snapshot!(samples().iter().map(shown).collect::<String>());
}

#[test]
fn no_kind_and_no_failure_is_without_a_sample() {
    let samples = samples();
    let kinds: BTreeSet<&str> = samples.iter().map(|failure| ErrorReport::of(failure).kind).collect();
    let code = include_str!("../failure.rs");
    let mut named = BTreeSet::new();
    for head in ["ErrorReport::new(\"", "failed(\"", "Self::new(\""] {
        named.extend(code.split(head).skip(1).filter_map(|rest| rest.split('"').next()));
    }
    assert!(named.len() > 20, "{named:?}");
    // `Input` is sampled with one problem; `Python` needs an interpreter's own error and shares its kind.
    assert_eq!(named.difference(&kinds).copied().collect::<Vec<_>>(), [""; 0], "a kind without a sample");

    let declared = include_str!("../../ops/failure.rs");
    let body = declared.split("pub enum Failure {").nth(1).and_then(|rest| rest.split("\n}\n").next()).unwrap();
    let variants =
        body.lines().filter_map(|line| line.strip_prefix("    ")).filter(|line| line.starts_with(char::is_uppercase));
    let variants: BTreeSet<&str> = variants.map(|line| line.split([' ', '(', ',']).next().unwrap()).collect();
    assert!(variants.len() > 15, "{variants:?}");
    let debug: Vec<String> = samples.iter().map(|failure| format!("{failure:?}")).collect();
    let missing = variants.iter().filter(|variant| !debug.iter().any(|text| text.starts_with(**variant)));
    assert_eq!(missing.collect::<Vec<_>>(), [&""; 0], "a failure without a sample");
}
