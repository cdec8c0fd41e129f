//! Manifests that are read, and every problem of those that are not, with its place and words.

use crate::base::diagnostic::Diagnostics;
use crate::format::Parsed;
use crate::format::manifest::{Manifest, SourceSpec, glob, parse};

fn good(text: &str) -> Parsed<Manifest> {
    let (parsed, warnings) =
        parse("manifests/é x.toml", text.as_bytes()).unwrap_or_else(|problems| panic!("{problems}"));
    assert_eq!(warnings, [], "{text}");
    parsed
}

fn bad(text: &str) -> Diagnostics {
    match parse("m.toml", text.as_bytes()) {
        Ok(_) => panic!("accepted: {text}"),
        Err(problems) => problems,
    }
}

/// Every problem as `line:column message; expected; actual; hint`.
fn told(problems: &Diagnostics) -> Vec<String> {
    let part =
        |name: &str, text: &Option<String>| text.as_ref().map(|text| format!("; {name} {text}")).unwrap_or_default();
    let line = |problem: &crate::base::diagnostic::Diagnostic| {
        let place = problem.to_string().trim_start_matches("m.toml:").to_owned();
        place + &part("expected", &problem.expected) + &part("actual", &problem.actual) + &part("hint", &problem.hint)
    };
    problems.0.iter().map(line).collect()
}

const WHOLE: &str = r#"
version = 1
[tools]
cmake = { pypi = "cmake", version = "4.4.4" }
[engines.powerinfer]
adapter = "powerinfer"
source = { git = "https://github.com/SJTU-IPADS/PowerInfer", rev = "d3ebd7c5666348cf43c22f0d62dfbc9a763cffb8", submodule = "external/powerinfer" }
targets = ["main", "server"]
define = { LLAMA_NATIVE = false, LLAMA_X = 3, CMAKE_CUDA_ARCHITECTURES = "80;90" }
[engines.powerinfer.variant.cuda]
define = { LLAMA_CUBLAS = true }
require = ["LLAMA_CUBLAS"]
[engines.local]
source = { path = "../an engine" }
[models.a]
source = { hf = "PowerInfer/Bamboo-DPO-v0.1-gguf", rev = "refs/pr/1", files = ["*.gguf", "activation/**"] }
place = "models/powerinfer/a"
weights = "model.gguf"
[models.b]
source = { url = "https://example.org/a%20b.gguf?x=1", sha256 = "sha256:0000000000000000000000000000000000000000000000000000000000000000" }
[models.c]
source = { path = "weights/é x.gguf" }
[policies]
include = ["configs/models/**/*.yaml"]
[mirrors]
"https://huggingface.co" = "http://127.0.0.1:1/hub"
"#;

#[test]
fn a_whole_manifest() {
    let parsed = good(WHOLE);
    let manifest = &parsed.value;
    assert_eq!(manifest.engines["powerinfer"].define["LLAMA_X"].to_cmake(), "3");
    assert!(matches!(manifest.models["b"].source, Some(SourceSpec::Url(_))));
    let (name, model) = manifest.models.first_key_value().expect("a");
    assert_eq!(model.place(name).as_str(), "models/powerinfer/a");
    let (name, model) = manifest.models.last_key_value().expect("c");
    assert_eq!(model.place(name).as_str(), "models/c");
    let span = parsed.span_of(&["models", "a", "source", "hf"]);
    assert_eq!(&parsed.document.source.text[span], "\"PowerInfer/Bamboo-DPO-v0.1-gguf\"");
}

#[test]
fn everything_wrong_at_once() {
    let problems = bad(r#"
version = 1
[engine.x]
[engines.powerinfer]
source = { gti = "https://x/y" }
targets = "main"
build_type = "release"
[engines.powerinfer.variant.cudda]
[engines."bad name"]
source = { git = "https://x/y", url = "https://x/z" }
[models.a]
source = { git = "https://x/y", brnch = "main", submodule = "../up" }
weights = 3
[models.b]
plce = "x"
"#);
    assert_eq!(
        told(&problems),
        [
            "3:2: unknown key `engine`; hint did you mean `engines`?",
            "5:1: `engines.powerinfer.source` must have one of: `git`, `hf`, `url`, `path`, `pypi`; hint did you mean `git`?",
            "6:11: `engines.powerinfer.targets` has the wrong type; expected a list; actual the string `main`",
            "7:14: `engines.powerinfer.build_type` cannot be `release`; expected one of `Release`, `RelWithDebInfo`, `MinSizeRel`, `Debug`; hint did you mean `Release`?",
            "8:29: unknown key `cudda` in `engines.powerinfer.variant`; hint did you mean `cuda`?",
            "9:10: `bad name` is not a name: use 1 to 64 letters, digits, `-`, `_` or `.`, beginning with a letter or digit",
            "10:1: `engines.bad name.source` must have only one of: `git`, `hf`, `url`, `path`, `pypi`; actual `git`, `url`",
            "12:33: unknown key `brnch` in `models.a.source`; hint did you mean `branch`?",
            "12:61: `models.a.source.submodule`: `../up` is not a path inside its folder: it has a part `..`",
            "13:11: `models.a.weights` has the wrong type; expected a path inside its folder; actual the number `3`",
            "15:1: unknown key `plce` in `models.b`; hint did you mean `place`?",
        ]
    );
}

#[test]
fn what_types_cannot_say() {
    let problems = bad(r#"
version = 1
[tools]
cmak = { pypi = "cmake", version = ">=4" }
[engines.a]
source = { git = "https://me:secret@x/y", rev = "d3ebd7c5666348cf43c22f0d62dfbc9a763cffb8", tag = "v 1" }
targets = ["--help"]
define = { "A B" = "x\ny" }
[engines.A]
source = { git = "https://x/y", submodule = "external/x" }
[engines.c]
source = { hf = "a/b" }
[engines.d]
source = { url = "file:///etc/passwd", files = ["*"] }
[engines.e]
source = { git = "https://x/y", submodule = "external/x" }
[models.m]
source = { hf = "https://huggingface.co/org/repo/tree/main", files = ["../x", "[", "a\\b"] }
[models.n]
source = { url = "ftp://x/y" }
place = "models/M"
[models.o]
source = { path = "models/o/sub" }
[models.p]
source = { pypi = "-x", version = "1.*" }
[policies]
include = ["/etc/*.yaml"]
[mirrors]
"huggingface.co" = "https://x"
"#);
    assert_eq!(
        told(&problems),
        [
            "4:1: no build and no conversion uses the tool `cmak`; expected one of `cmake`, `ninja`; hint did you mean `cmake`?",
            "4:36: not an exact version; expected such as `4.4.4`, without `==`, `>=` or `*`",
            "5:10: `a` and `A` differ in case alone",
            "6:18: an address must not carry a user or password: it would be written to the lockfile; expected an address without `user:password@`",
            "6:99: a git source names exactly one revision; expected at most one of `rev`, `tag` and `branch`; actual `rev`, `tag`",
            "6:99: not a valid git name; expected a branch, tag or commit: no spaces, no `..`, none of `~^:?*[\\`, no `-` at the beginning",
            "7:12: not a CMake target; expected a word that does not begin with `-`",
            "8:20: not the name of a CMake definition; expected letters, digits, `_`, `-` and `.`, beginning with a letter or `_`",
            "8:20: a definition contains a control character; expected one line of text",
            "12:1: a Hugging Face repository holds weights, not sources to build; expected a `git`, `url`, `path` or `pypi` source",
            "14:18: a local file is a `path` source; hint write `path = \"…\"` instead",
            "14:48: `files` is for models only, and this is an engine",
            "16:45: the engines `A` and `e` name the same submodule",
            "18:17: not the name of a Hugging Face repository; expected `org/repo`; hint write `org/repo`",
            "18:71: invalid glob: a glob is relative, has `/` between its parts and no part `..`",
            "18:79: invalid glob: unclosed character class; missing ']'",
            "18:84: invalid glob: a glob is relative, has `/` between its parts and no part `..`",
            "19:9: the models `m` and `n` go to the same place; hint give one of them another `place` or `weights`",
            "20:18: not the URL of a file; expected `https://…` or `http://…`",
            "23:19: a model's source and its place lie within each other; actual from `models/o/sub` to `models/o`; hint choose another `place`",
            "25:19: not the name of a Python package; expected letters, digits, `.`, `_` and `-`",
            "25:35: not an exact version; expected such as `4.4.4`, without `==`, `>=` or `*`",
            "27:12: invalid glob: a glob is relative, has `/` between its parts and no part `..`",
            "29:20: a mirror maps one URL prefix to another; expected addresses such as `https://…` on both sides",
        ]
    );
}

#[test]
fn commits_and_addresses_are_checked_by_their_types() {
    let problems = bad(r#"
version = 1
[engines.a]
source = { git = "ext::sh -c x", rev = "main" }
[engines.b]
source = { git = "http://%0Ahost=x@example.org/y", rev = "D3EBD7C5666348CF43C22F0D62DFBC9A763CFFB8" }
"#);
    assert_eq!(
        told(&problems),
        [
            "4:18: `engines.a.source.git`: not an address of a git repository: remote helpers (`name::address`) are not supported",
            "4:40: `engines.a.source.rev`: expected a full commit id: 40 lowercase hexadecimal digits",
            "6:18: `engines.b.source.git`: not an address of a git repository: it contains a control character",
            "6:58: `engines.b.source.rev`: expected a full commit id: 40 lowercase hexadecimal digits",
        ]
    );
}

#[test]
fn h5c_no_key_of_a_manifest_writes_where_programs_are_run_from() {
    for place in [".git/hooks", "models", "modelsx/a", "Models/a", "build/x", ".github/workflows", "src"] {
        let text = format!("version = 1\n[models.m]\nsource = {{ hf = 'a/b' }}\nplace = '{place}'\n");
        assert_eq!(
            told(&bad(&text)),
            ["4:9: a model's `place` must be below `models/`; expected `models/…`"],
            "{place}"
        );
    }
    for submodule in [".git/hooks", "external/.git", "GIT~1/hooks", ".vscode", "models/x", "Build", "configs"] {
        let source = format!("{{ git = 'https://example.org/x', submodule = '{submodule}' }}");
        let told = told(&bad(&format!("version = 1\n[engines.e]\nsource = {source}\n")));
        assert!(told.len() == 1 && told[0].contains("a submodule cannot be at this path"), "{submodule}: {told:?}");
    }
}

#[test]
fn versions_come_first() {
    assert_eq!(
        told(&bad("version = 2\nnew_thing = 1\n")),
        ["1:11: this manifest was written by a newer version of aitools; expected 1; actual 2; hint upgrade aitools"]
    );
    assert_eq!(told(&bad("version = 0\n")).len(), 1);
    assert_eq!(told(&bad("")), ["1:1: the file has no key `version`; expected `1`"]);
    assert_eq!(
        told(&bad("version = 99999999999999999999\n")),
        ["1:11: `version` is out of range; expected `1`; actual the number `99999999999999999999`"]
    );
}

#[test]
fn an_absolute_path_is_a_warning() {
    let text = "version = 1\n[engines.a]\nsource = { path = \"/opt/x\" }\n";
    let (_, warnings) = parse("m.toml", text.as_bytes()).expect("good");
    assert_eq!(warnings.len(), 1);
    assert!(!warnings[0].is_error());
}

#[test]
fn a_flood_of_problems_is_cut() {
    let text = "version = 1\n".to_owned() + &(0..5000).map(|n| format!("x{n} = 1\n")).collect::<String>();
    assert_eq!(bad(&text).0.len(), Diagnostics::MAX + 1);
}

#[test]
fn stars_stay_within_a_folder() {
    let matches = |pattern: &str, path: &str| glob(pattern).expect(pattern).compile_matcher().is_match(path);
    assert!(matches("*.gguf", "a b.gguf") && !matches("*.gguf", "x/a.gguf"));
    assert!(matches("x/**", "x/a/b.gguf") && matches("**/*.gguf", "a.gguf"));
}

#[test]
fn many_models_are_read_quickly() {
    let model = |n| {
        format!(
            "[models.m{n}]\nsource = {{ hf = \"org/repo-{n}\", files = [\"*.gguf\", \"x/**\"] }}\nplace = \"models/e/m{n}\"\n"
        )
    };
    let text = "version = 1\n".to_owned() + &(0..200).map(model).collect::<String>();
    let parsed = good(&text);
    let start = std::time::Instant::now();
    for _ in 0..10 {
        assert_eq!(good(&text), parsed);
    }
    // Some 4 ms each in a debug build: this is about a mistake of order, not about the machine.
    assert!(start.elapsed().as_secs() < 10);
}

#[test]
fn derived_models() {
    let engine =
        "version = 1\n[engines.e]\nsource = { git = 'https://example.org/e' }\n[models.a]\nsource = { path = 'w' }\n";
    let chain = format!(
        "{engine}[models.z.derive]\nfrom = 'a'\nengine = 'e'\nquantize = 'Q4_0'\n\
         [models.b.derive]\nfrom = 'z'\nengine = 'e'\nquantize = 'Q4_0'\n"
    );
    let manifest = good(&chain).value;
    let order: Vec<&str> = manifest.models_in_order().iter().map(|name| name.as_str()).collect();
    assert_eq!(order, ["a", "z", "b"]);
    let problems = bad(&format!(
        "{engine}[models.b]\n[models.c]\nsource = {{ path = 'x' }}\nderive = {{ from = 'a', engine = 'e', quantize = 'Q4_0' }}\n\
         [models.d.derive]\nfrom = 'aa'\nengine = 'f'\n\
         [models.x.derive]\nfrom = 'y'\nengine = 'e'\nquantize = 'Q4_0'\n\
         [models.y.derive]\nfrom = 'x'\nengine = 'e'\nquantize = 'Q4_0'\n"
    ));
    assert_eq!(
        told(&problems),
        [
            "6:9: model `b` has neither `source` nor `derive`; hint say where it comes from with `source`, or what it is made from with `derive`",
            "9:1: model `c` has both `source` and `derive`; hint remove one of them",
            "10:11: model `d`: `derive` has neither `quantize` nor `convert`; hint add `quantize = \"…\"` or `convert = { … }`",
            "11:8: the manifest has no model `aa`; hint did you mean `a`?",
            "12:10: the manifest has no engine `f`",
            "14:8: model `x` is derived from itself: `x` from `y` from `x`; hint name another model",
            "18:8: model `y` is derived from itself: `y` from `x` from `y`; hint name another model",
        ]
    );
    let problems = told(&bad(&format!("{engine}[models.b]\nderive = {{ form = 'a', engine = 'e', quantize = 4 }}\n")));
    assert_eq!(problems.len(), 3, "{problems:?}");
}
