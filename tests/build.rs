//! Real builds of small CMake projects, in folders with spaces and letters beyond ASCII: what comes out, what is told when
//! it does not, and that nothing stays behind.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may")]

#[path = "support/tools.rs"]
mod tools;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use aitools::base::cancel::Cancel;
use aitools::base::fs;
use aitools::build::settings::Env;
use aitools::build::toolchain::Finder;
use aitools::build::{
    self, BuildError, BuildRecipe, BuildRequest, Built, Network, OutputRule, Phase, SourceEdit, ToolPath,
};
use aitools::report::{Event, Reporter, Task};

const HELLO: &[(&str, &str)] = &[
    (
        "CMakeLists.txt",
        "cmake_minimum_required(VERSION 3.20)\n\
         project(hello C CXX)\n\
         option(FAST \"\" OFF)\n\
         add_library(words SHARED words.c)\n\
         set_target_properties(words PROPERTIES VERSION 1.2 SOVERSION 1 LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/deep/lib)\n\
         add_executable(hello main.cpp)\n\
         set_target_properties(hello PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/deep/bin)\n\
         target_link_libraries(hello words)\n",
    ),
    ("words.c", "const char *words(void) { return \"@WORDS@ from \" __FILE__; }\n"),
    (
        "main.cpp",
        "#include <cstdio>\nextern \"C\" const char *words(void);\n\
         int main() { std::puts(words()); std::puts(__FILE__); }\n",
    ),
];

struct Bench {
    root: tempfile::TempDir,
    ask: BuildRequest,
}

fn recipe() -> BuildRecipe {
    let rule = |glob: &str, to: &str| OutputRule { glob: glob.to_owned(), to: to.parse().unwrap(), required: true };
    BuildRecipe {
        version: 1,
        define: BTreeMap::new(),
        targets: vec!["hello".to_owned()],
        require: Vec::new(),
        build_type: "Release".to_owned(),
        edits: Vec::new(),
        outputs: vec![rule("deep/bin/hello*", "bin"), rule("deep/lib/lib*", "lib")],
        evidence: Vec::new(),
        native: false,
    }
}

#[expect(clippy::disallowed_methods, reason = "a test is its own command line")]
fn environment() -> Env {
    std::env::vars_os().collect()
}

fn bench(files: &[(&str, &str)]) -> Bench {
    let root = tempfile::Builder::new().prefix("é büild x ").tempdir().unwrap();
    let source = root.path().join("the source");
    for (name, text) in files {
        fs::write_atomic(&source.join(name), text.as_bytes()).unwrap();
    }
    let (env, cancel) = (environment(), Cancel::default());
    let finder = Finder::new(&env, Path::new(env!("CARGO_TARGET_TMPDIR")), &cancel);
    let tool = |path: &PathBuf| ToolPath { path: path.clone(), identity: "locked".to_owned() };
    let tools = tools::tools();
    let ask = BuildRequest {
        driver: env!("CARGO_BIN_EXE_aitools").into(),
        source,
        folder: root.path().join("wörk folder"),
        prefix: root.path().join("staged"),
        recipe: recipe(),
        cmake: tool(&tools.cmake),
        ninja: Some(tool(&tools.ninja)),
        compilers: finder.toolchain(false, false).unwrap(),
        jobs: 2,
        network: Network::Avoided,
        fixed_paths: false,
        env,
        log: root.path().join("logs/build.log"),
        label: "hello".to_owned(),
    };
    Bench { root, ask }
}

impl Bench {
    fn run(&self) -> Result<Built, BuildError> {
        build::run(&self.ask, &Task::silent())
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read_bounded(&self.ask.log, 1 << 24).unwrap()).into_owned()
    }

    /// Fails the test, showing the log, unless the build went well.
    fn built(&self) -> Built {
        self.run().unwrap_or_else(|error| panic!("{error}: {error:?}\n{}", self.log()))
    }

    fn prefix_is_empty(&self) -> bool {
        fs::read_dir(&self.ask.prefix).unwrap_or_default().is_empty()
    }
}

fn run(program: &Path) -> String {
    let ran = Command::new(program).env_clear().output().unwrap();
    assert!(ran.status.success(), "{ran:?}");
    String::from_utf8(ran.stdout).unwrap()
}

#[derive(Default)]
struct Keep(Mutex<Vec<Event>>);

impl Reporter for Keep {
    fn report(&self, event: &Event) {
        self.0.lock().unwrap().push(event.clone());
    }
}

#[test]
fn what_was_built_runs_after_it_was_moved_and_names_no_folder() {
    let mut bench = bench(HELLO);
    bench.ask.recipe.edits =
        vec![SourceEdit {
            path: "words.c".parse().unwrap(), find: "@WORDS@".to_owned(), replace: "grüße".to_owned()
        }];
    let keep = Arc::new(Keep::default());
    let built = build::run(&bench.ask, &Task::new(keep.clone(), Cancel::default())).unwrap();
    assert_eq!(built.warnings, [""; 0], "{}", bench.log());
    assert!(["isolated", "discouraged"].contains(&built.notes["network"].as_str()));
    assert!(built.notes["CMAKE_CXX_COMPILER"].starts_with('/'));
    let total = |event: &Event| matches!(event, Event::Progressed { total: Some(total), .. } if *total >= 4);
    assert!(keep.0.lock().unwrap().iter().any(total));
    let moved = bench.root.path().join("elsewhere");
    fs::rename(&bench.ask.prefix, &moved).unwrap();
    fs::remove_dir_all(&bench.ask.folder).unwrap();
    fs::remove_dir_all(&bench.ask.source).unwrap();
    assert_eq!(run(&moved.join("bin/hello")), "grüße from /aitools/src/words.c\n/aitools/src/main.cpp\n");
}

#[test]
fn make_does_when_there_is_no_ninja() {
    let mut bench = bench(HELLO);
    bench.ask.ninja = None;
    let keep = Arc::new(Keep::default());
    build::run(&bench.ask, &Task::new(keep.clone(), Cancel::default())).unwrap();
    let percent = |event: &Event| matches!(event, Event::Progressed { done: 1.., total: Some(100), .. });
    assert!(keep.0.lock().unwrap().iter().any(percent));
}

#[test]
fn the_same_bits_come_from_any_folder() {
    let plain = bench(HELLO);
    let mut other = bench(HELLO);
    let short = tempfile::tempdir().unwrap();
    fs::rename(&other.ask.source, &short.path().join("s")).unwrap();
    other.ask.source = short.path().join("s");
    other.ask.folder = short.path().join("w");
    other.ask.jobs = 1;
    other.ask.env.insert("TZ".into(), "Asia/Tokyo".into());
    other.ask.env.insert("CFLAGS".into(), "-DNOISE -g".into());
    other.ask.env.insert("SOURCE_DATE_EPOCH".into(), "1".into());
    assert_eq!(plain.built().files, other.built().files);
}

#[test]
fn a_path_that_got_through_is_told_on() {
    let bench = bench(HELLO);
    let list = fs::read_bounded(&bench.ask.source.join("CMakeLists.txt"), 1 << 20).unwrap();
    let list =
        String::from_utf8(list).unwrap() + "target_compile_definitions(hello PRIVATE HERE=\"${CMAKE_BINARY_DIR}\")\n";
    fs::write_atomic(&bench.ask.source.join("CMakeLists.txt"), list.as_bytes()).unwrap();
    let main = "#include <cstdio>\nint main() { std::puts(HERE); }\n";
    fs::write_atomic(&bench.ask.source.join("main.cpp"), main.as_bytes()).unwrap();
    let warnings = bench.built().warnings;
    assert!(warnings.iter().any(|it| it.contains("`bin/hello` contains the path")), "{warnings:?}");
}

#[test]
fn a_build_for_cuda_sees_its_folders_in_one_place_if_it_may() {
    let spot = |bench: &mut Bench| {
        let list = "cmake_minimum_required(VERSION 3.20)\nproject(x C)\nadd_custom_target(hello)\n\
                    file(WRITE ${CMAKE_BINARY_DIR}/spot \"${CMAKE_SOURCE_DIR} ${CMAKE_BINARY_DIR}\")\n";
        fs::write_atomic(&bench.ask.source.join("CMakeLists.txt"), list.as_bytes()).unwrap();
        bench.ask.recipe.outputs =
            vec![OutputRule { glob: "spot".to_owned(), to: "at".parse().unwrap(), required: true }];
        bench.ask.compilers.cuda = Some(bench.ask.compilers.cc.clone());
        let entered = bench.built().notes["place"].starts_with('/');
        let text = fs::read_bounded(&bench.ask.prefix.join("at/spot"), 4096).unwrap();
        (entered, String::from_utf8(text).unwrap())
    };
    let (mut here, mut there) = (bench(HELLO), bench(HELLO));
    let (entered, place) = spot(&mut here);
    match build::mounts::choose().filter(|_| entered) {
        Some(mounts) => {
            assert!(place.starts_with(mounts.source.to_str().unwrap()), "{place}");
            assert_eq!(spot(&mut there).1, place);
        }
        None => assert!(place.contains("the source"), "{place}"),
    }
}

#[test]
fn the_first_compiler_error_is_what_is_shown() {
    let bench = bench(HELLO);
    fs::write_atomic(&bench.ask.source.join("words.c"), b"int f(void) { return nowhere; }\n").unwrap();
    match bench.run() {
        Err(BuildError::Failed(failure)) => {
            let first = failure.first_error.unwrap();
            assert!(first.contains("words.c:1:22: error:") && first.contains("nowhere"), "{first}");
            assert!(failure.phase == Phase::Build && !failure.tail.is_empty() && failure.log == bench.ask.log);
        }
        other => panic!("{other:?}"),
    }
    assert!(bench.prefix_is_empty());
    assert!(!bench.log().contains("panicked"));
}

#[test]
fn a_configure_error_is_cmakes_own() {
    let bench = bench(&[(
        "CMakeLists.txt",
        "cmake_minimum_required(VERSION 3.20)\nproject(x C)\nmessage(FATAL_ERROR \"no é\")\n",
    )]);
    match bench.run() {
        Err(BuildError::Failed(failure)) => {
            assert_eq!(failure.phase, Phase::Configure);
            let first = failure.first_error.unwrap();
            assert!(first.contains("CMakeLists.txt:3") && first.contains("no é"), "{first}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_required_definition_must_hold() {
    let mut bench = bench(HELLO);
    let mut refused = |define: &[(&str, &str)], require: &str| {
        bench.ask.recipe.define =
            define.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        bench.ask.recipe.require = vec![require.to_owned()];
        match bench.run() {
            Err(BuildError::NotBuilt { definition, value, .. }) => {
                assert_eq!(definition, require);
                assert!(bench.prefix_is_empty() && !bench.ask.binary().join("deep/bin/hello").exists());
                value
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused(&[], "FAST").as_deref(), Some("OFF"));
    assert_eq!(refused(&[("FATS", "ON")], "FATS"), None, "a definition that the project does not use");
    assert_eq!(refused(&[], "CMAKE_CUDA_COMPILER"), None);
    bench.ask.recipe.define = BTreeMap::from([("FAST".to_owned(), "ON".to_owned())]);
    bench.ask.recipe.require = vec!["FAST".to_owned()];
    bench.built();
}

#[test]
fn a_definition_that_is_not_used_is_told() {
    let mut bench = bench(HELLO);
    bench.ask.recipe.define = BTreeMap::from([("LLAMA_CUBLAS".to_owned(), "ON".to_owned())]);
    assert_eq!(bench.built().warnings, ["the project does not use the definition `LLAMA_CUBLAS`"]);
}

#[test]
fn a_missing_compiler_is_named_with_a_remedy() {
    let mut bench = bench(HELLO);
    bench.ask.compilers.cxx.path = bench.root.path().join("no such compiler");
    match bench.run() {
        Err(BuildError::NoCompiler { language, hint, .. }) => assert!(language == "CXX" && hint.contains("install")),
        other => panic!("{other:?}\n{}", bench.log()),
    }
    let (env, cancel) = (Env::from([("PATH".into(), bench.root.path().into())]), Cancel::default());
    let error = Finder::new(&env, bench.root.path(), &cancel).toolchain(false, false).unwrap_err();
    assert!(error.to_string().contains("found no C compiler"), "{error}");
}

#[test]
fn an_edit_that_does_not_fit_stops_the_build() {
    let mut bench = bench(HELLO);
    for (path, find) in [("words.c", "not there"), ("words.c", "o"), ("words.c", ""), ("none.c", "x")] {
        bench.ask.recipe.edits =
            vec![SourceEdit { path: path.parse().unwrap(), find: find.to_owned(), replace: String::new() }];
        assert!(matches!(bench.run(), Err(BuildError::Edit { .. })), "{path} {find}");
    }
}

#[test]
fn what_the_binary_must_hold_it_must_hold() {
    let mut bench = bench(HELLO);
    bench.ask.recipe.evidence = vec![" from ".to_owned()];
    bench.built();
    fs::remove_dir_all(&bench.ask.prefix).unwrap();
    bench.ask.recipe.evidence.push("ggml_cuda_init".to_owned());
    let error = bench.run().unwrap_err();
    assert!(matches!(&error, BuildError::NoEvidence { text, .. } if text == "ggml_cuda_init"), "{error}");
    assert!(bench.prefix_is_empty());
}

#[test]
fn a_build_finds_no_repository() {
    const LOOKS: &str = "if(EXISTS ${CMAKE_SOURCE_DIR}/.git)\nmessage(FATAL_ERROR found)\nendif()\n";
    for pointer in [".git", ".git/HEAD"] {
        let text = HELLO[0].1.replacen("project(", &format!("{LOOKS}project("), 1);
        let files = [&[("CMakeLists.txt", text.as_str()), (pointer, "gitdir: ../elsewhere")], &HELLO[1..]].concat();
        bench(&files).built();
    }
}

#[test]
fn names_that_mean_something_to_make_are_refused() {
    let mut bench = bench(HELLO);
    for target in ["-t", "X=1", "a b", ""] {
        bench.ask.recipe.targets = vec![target.to_owned()];
        assert!(matches!(bench.run(), Err(BuildError::Recipe { .. })), "{target}");
    }
}

#[test]
fn a_full_disk_is_named_as_such() {
    let bench = bench(HELLO);
    let list = "cmake_minimum_required(VERSION 3.20)\nproject(x C)\n\
                add_custom_target(hello COMMAND ${CMAKE_COMMAND} -E echo \"cc1: x.o: No space left on device\" \
                COMMAND ${CMAKE_COMMAND} -E false)\n";
    fs::write_atomic(&bench.ask.source.join("CMakeLists.txt"), list.as_bytes()).unwrap();
    match bench.run() {
        Err(BuildError::NoSpace { said, available_bytes, .. }) => assert!(said.contains("x.o") && available_bytes > 0),
        other => panic!("{other:?}"),
    }
}

/// A project that downloads while it is configured and built, and does not mind failing.
const CURIOUS: &str = "cmake_minimum_required(VERSION 3.20)\nproject(x C)\n\
    file(DOWNLOAD http://ui.example.invalid/dist.tar.gz ${CMAKE_BINARY_DIR}/x STATUS status)\n\
    message(STATUS \"download: ${status}\")\n\
    find_package(Python3 REQUIRED COMPONENTS Interpreter)\n\
    add_custom_target(hello ALL COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/ask.py)\n";

const ASK: &str = "import socket, urllib.request\n\
    try:\n    urllib.request.urlopen('https://late.example.invalid/x', timeout=5)\n\
    except Exception as error:\n    print(error)\n\
    try:\n    socket.create_connection(('192.0.2.1', 9), timeout=3)\n\
    except Exception as error:\n    print(error)\n";

#[test]
fn who_tries_the_network_is_told_on() {
    let mut bench = bench(&[("CMakeLists.txt", CURIOUS), ("ask.py", ASK)]);
    bench.ask.recipe.outputs.clear();
    bench.ask.env.insert("https_proxy".into(), "http://127.0.0.1:1".into());
    let built = bench.built();
    let told = |text: &str| built.warnings.iter().any(|it| it.contains("network") && it.contains(text));
    assert!(told("ui.example.invalid"), "{:?}\n{}", built.warnings, bench.log());
    assert!(told("CONNECT late.example.invalid:443"), "{:?}\n{}", built.warnings, bench.log());
    if built.notes["network"] == "isolated" {
        assert!(told("Network is unreachable"), "{:?}\n{}", built.warnings, bench.log());
    }
}

#[test]
fn a_failed_download_is_part_of_the_failure() {
    let list = CURIOUS.replace("message(STATUS", "message(FATAL_ERROR");
    let bench = bench(&[("CMakeLists.txt", &list), ("ask.py", ASK)]);
    match bench.run() {
        Err(BuildError::Failed(failure)) => {
            assert!(failure.network.iter().any(|line| line.contains("ui.example.invalid")), "{failure:?}");
        }
        other => panic!("{other:?}"),
    }
}

/// A build that says its processes' ids and then takes for ever, in a process group of its own as ninja makes them.
#[cfg(unix)]
mod ends {
    use super::*;
    use std::io::Write as _;
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    use aitools::base::process::Program;
    use rustix::process::{Pid, Signal, kill_process};

    /// How long something that must happen may take.
    const PATIENCE: Duration = Duration::from_secs(60);
    const ENDLESS: &str = "cmake_minimum_required(VERSION 3.20)\nproject(x C)\n\
        add_custom_target(hello ALL COMMAND sh ${CMAKE_SOURCE_DIR}/endless.sh ${CMAKE_BINARY_DIR}/ids)\n";
    /// `trap`: a compiler that does not end when it is asked.
    const SCRIPT: &str = "trap '' TERM\nsleep 1000 &\necho $$ $! $PPID > \"$1.part\"\nmv \"$1.part\" \"$1\"\n\
                          while :; do sleep 1000; done\n";

    fn endless() -> Bench {
        let mut bench = bench(&[("CMakeLists.txt", ENDLESS), ("endless.sh", SCRIPT)]);
        bench.ask.recipe.outputs.clear();
        bench
    }

    fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The shell, its child, and ninja, once they run.
    fn ids(bench: &Bench) -> Vec<u32> {
        let file = bench.ask.binary().join("ids");
        wait_until("the build does not start", || file.exists());
        let text = String::from_utf8(fs::read_bounded(&file, 100).unwrap()).unwrap();
        text.split_whitespace().map(|id| id.parse().unwrap()).collect()
    }

    /// The state's letter and the parent.
    #[cfg(target_os = "linux")]
    fn look(id: u32) -> Option<(String, u32)> {
        let stat = fs::read_bounded(Path::new(&format!("/proc/{id}/stat")), 4096).ok()?;
        let text = String::from_utf8_lossy(&stat).into_owned();
        let mut words = text[text.rfind(')')? + 1..].split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().unwrap()))
    }

    /// The state's letter and the parent.
    #[cfg(not(target_os = "linux"))]
    fn look(id: u32) -> Option<(String, u32)> {
        let ran = Command::new("ps").args(["-o", "stat=,ppid=", "-p", &id.to_string()]).output().unwrap();
        let text = String::from_utf8(ran.stdout).unwrap();
        let mut words = text.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().unwrap()))
    }

    fn is_alive(id: u32) -> bool {
        look(id).is_some_and(|(state, _)| !state.starts_with('Z'))
    }

    fn send(id: u32, signal: Signal) {
        kill_process(Pid::from_raw(id.try_into().unwrap()).unwrap(), signal).unwrap();
    }

    fn all_gone(ids: &[u32]) {
        wait_until("something of the build still runs", || ids.iter().all(|id| !is_alive(*id)));
    }

    #[test]
    fn cancel_leaves_no_process_and_no_file() {
        let bench = endless();
        let cancel = Cancel::default();
        let task = Task::new(Arc::new(aitools::report::Silent), cancel.clone());
        std::thread::scope(|scope| {
            let building = scope.spawn(|| build::run(&bench.ask, &task));
            let ids = ids(&bench);
            assert_eq!(ids.len(), 3);
            assert!(ids.iter().all(|id| is_alive(*id)));
            cancel.cancel();
            assert!(matches!(building.join().unwrap(), Err(BuildError::Cancelled(_))));
            all_gone(&ids);
        });
        assert!(bench.prefix_is_empty());
    }

    /// Runs this test program again as the parent of a build, to be killed from outside.
    #[test]
    #[ignore = "the parent that `a_killed_parent_takes_the_build_along` starts"]
    fn parent_to_be_killed() {
        let bench = endless();
        writeln!(std::io::stdout(), "\nFOLDER {}", bench.ask.folder.display()).unwrap();
        let _ = bench.run();
    }

    #[test]
    fn a_killed_parent_takes_the_build_along() {
        let program = Program {
            path: std::env::current_exe().unwrap(),
            args: ["--exact", "ends::parent_to_be_killed", "--ignored", "--nocapture"].map(Into::into).into(),
            env: environment(),
            cwd: env!("CARGO_MANIFEST_DIR").into(),
        };
        let mut parent = program.spawn(Stdio::null(), Stdio::piped(), Stdio::null()).unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(parent.stdout().unwrap()));
        let folder = lines.find_map(|line| line.unwrap().strip_prefix("FOLDER ").map(PathBuf::from)).unwrap();
        let mut bench = endless();
        bench.ask.folder = folder;
        let ids = ids(&bench);
        assert!(ids.iter().all(|id| is_alive(*id)));
        send(parent.pid(), Signal::KILL);
        all_gone(&ids);
        let _ = fs::remove_dir_all(fs::parent(&bench.ask.folder));
    }

    #[test]
    fn a_terminated_driver_takes_the_build_along() {
        let bench = endless();
        std::thread::scope(|scope| {
            let building = scope.spawn(|| bench.run());
            let ids = ids(&bench);
            // ninja's parent is cmake, whose parent is the driver.
            let parent = |id| look(id).unwrap().1;
            let driver = parent(parent(ids[2]));
            send(driver, Signal::TERM);
            assert!(matches!(building.join().unwrap(), Err(BuildError::Failed(_))));
            all_gone(&ids);
            assert!(!is_alive(driver));
        });
    }

    #[test]
    fn an_executed_program_ends_with_its_parent() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("é id");
        let script = format!(
            "'{}' internal exec $$ /bin/sh -c 'echo $$ > \"$0.part\"; mv \"$0.part\" \"$0\"; exec sleep 1000' \"$0\" & wait",
            env!("CARGO_BIN_EXE_aitools")
        );
        let mut parent = Command::new("sh").args(["-c", &script]).arg(&file).spawn().unwrap();
        wait_until("the program does not start", || file.exists());
        let id = String::from_utf8(fs::read_bounded(&file, 100).unwrap()).unwrap().trim().parse().unwrap();
        assert!(is_alive(id));
        parent.kill().unwrap();
        parent.wait().unwrap();
        all_gone(&[id]);
    }
}

#[test]
fn a_tool_is_asked_once_until_its_file_changes() {
    let root = tempfile::Builder::new().prefix("é t").tempdir().unwrap();
    let (env, cancel) = (environment(), Cancel::default());
    let tool = root.path().join("a tool");
    let write = |version: &str| {
        let script = format!("#!/bin/sh\necho x >> '{}/asked'\necho tool {version}\n", root.path().display());
        fs::write_atomic(&tool, script.as_bytes()).unwrap();
        fs::set_executable(&tool).unwrap();
    };
    let ask = || Finder::new(&env, root.path(), &cancel).ask(&tool, &["--version"]).unwrap();
    let asked = || fs::read_bounded(&root.path().join("asked"), 100).unwrap().len() / 2;
    write("1");
    assert_eq!((ask().as_str(), ask().as_str(), asked()), ("tool 1\n", "tool 1\n", 1));
    write("2");
    assert_eq!((ask().as_str(), asked()), ("tool 2\n", 2));
    fs::write_atomic(&root.path().join("tools.json"), b"{\"broken").unwrap();
    assert_eq!((ask().as_str(), asked()), ("tool 2\n", 3));
}

#[cfg(target_os = "linux")]
#[test]
fn h2b_no_library_is_looked_for_in_the_current_folder() {
    // What CMake would install with is longer than what it builds with: it then fills up with empty entries.
    let install = "set(CMAKE_INSTALL_RPATH /a/long/path/to/some/libraries/that/are/installed/elsewhere)\n\
                   add_executable(hello main.cpp)";
    let list = HELLO[0].1.replacen("add_executable(hello main.cpp)", install, 1) + "install(TARGETS hello words)\n";
    let files = [&[("CMakeLists.txt", list.as_str())], &HELLO[1..]].concat();
    let padded = bench(&files);
    let built = padded.built();
    for name in built.files.keys() {
        let bytes = fs::read_bounded(&name.under(&padded.ask.prefix), 64 << 20).unwrap();
        let holds = |text: &[u8]| bytes.windows(text.len()).any(|at| at == text);
        assert!(holds(b"$ORIGIN/../lib\0\0") && !holds(b"$ORIGIN/../lib:"), "{name}");
    }
    assert!(run(&padded.ask.prefix.join("bin/hello")).contains("from"));
    for (entry, shown) in [("lib", "lib"), ("/a::/b", "")] {
        let property = format!("set_target_properties(hello PROPERTIES LINK_OPTIONS -Wl,-rpath,{entry})\n");
        let list = HELLO[0].1.to_owned() + &property;
        let bench = bench(&[&[("CMakeLists.txt", list.as_str())], &HELLO[1..]].concat());
        let refused = bench.run().unwrap_err();
        let expected =
            format!("`bin/hello` looks for libraries in the current folder: its RUNPATH has the entry `{shown}`");
        assert_eq!(refused.to_string(), expected);
        assert!(bench.prefix_is_empty());
    }
}

/// What a build can reach that it should not, one line each.
const SPY: &str = "import os, socket, sys\n\
    home, port = sys.argv[1], int(sys.argv[2])\n\
    def attempt(name, act):\n    try:\n        act()\n        print('REACHED', name)\n    except Exception as error:\n        print('refused', name, error)\n\
    def unix():\n    s = socket.socket(socket.AF_UNIX)\n    s.connect(home + '/agent.sock')\n\
    attempt('key', lambda: open(home + '/.ssh/id').read())\n\
    attempt('listing', lambda: 1 / len(os.listdir(home)) if '.ssh' in os.listdir(home) else 1 / 0)\n\
    attempt('write', lambda: open(home + '/left', 'w').write('x'))\n\
    attempt('outside', lambda: open(sys.argv[3] + '/left', 'w').write('x'))\n\
    attempt('socket', unix)\n\
    attempt('tcp', lambda: socket.create_connection(('127.0.0.1', port), timeout=2))\n\
    attempt('environment', lambda: open('/proc/%s/environ' % sys.argv[4]).read())\n\
    open('own', 'w').write('x')\n";

#[cfg(target_os = "linux")]
#[test]
fn a_build_reaches_no_private_file_socket_or_network() {
    let (built, log) = spied(Network::Avoided);
    assert!(!built.notes["confined"].contains("network") || log.contains("refused tcp"), "{log}");
    assert_ne!(built.notes["network"], "allowed by the manifest");
}

#[cfg(target_os = "linux")]
#[test]
fn a_build_that_may_use_the_network_is_confined_otherwise() {
    let (built, log) = spied(Network::Allowed);
    assert!(log.contains("REACHED tcp"), "{log}");
    assert_eq!(built.notes["network"], "allowed by the manifest");
    assert_eq!(built.warnings, [""; 0]);
    assert!(!built.notes["confined"].contains("network"));
}

/// Builds a program that tries to reach what is not its own; what confines it otherwise is checked.
#[cfg(target_os = "linux")]
fn spied(network: Network) -> (Built, String) {
    let list = "cmake_minimum_required(VERSION 3.20)\nproject(x C)\nfind_package(Python3 REQUIRED COMPONENTS Interpreter)\n\
                add_custom_target(hello ALL COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/spy.py ${SPY_HOME} ${SPY_PORT} \
                ${SPY_OUTSIDE} ${SPY_PARENT})\n";
    let mut bench = bench(&[("CMakeLists.txt", list), ("spy.py", SPY)]);
    let private = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let outside = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let home = fs::canonical(private.path()).unwrap();
    fs::write_atomic(&home.join(".ssh/id"), b"secret").unwrap();
    let _agent = std::os::unix::net::UnixListener::bind(home.join("agent.sock")).unwrap();
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    bench.ask.network = network;
    bench.ask.env.insert("HOME".into(), home.clone().into());
    bench.ask.recipe.outputs.clear();
    bench.ask.recipe.define = [
        ("SPY_HOME", home.display().to_string()),
        ("SPY_PORT", server.local_addr().unwrap().port().to_string()),
        ("SPY_OUTSIDE", outside.path().display().to_string()),
        ("SPY_PARENT", std::process::id().to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    let built = bench.built();
    let log = bench.log();
    let refused = |what: &[&str]| {
        for name in what {
            assert!(
                log.contains(&format!("refused {name}")) && !log.contains(&format!("REACHED {name}")),
                "{name}\n{log}"
            );
        }
    };
    let confined = &built.notes["confined"];
    if confined.contains("files") {
        refused(&["key", "write", "outside"]);
        // Whoever may watch the whole machine (CAP_PERFMON) may read that, too.
        use std::os::unix::fs::MetadataExt as _;
        if fs::metadata(&home).unwrap().uid() != 0 {
            refused(&["environment"]);
        }
    }
    if confined.contains("home and sockets") {
        refused(&["key", "listing", "socket"]);
        assert!(!home.join("left").exists());
    }
    assert!(log.contains("refused") || confined == "nothing", "{confined}");
    (built, log)
}

#[cfg(target_os = "linux")]
#[test]
fn h4_offline_no_build_runs_that_has_a_network() {
    let mut bench = bench(HELLO);
    // A place where nobody can make a network namespace; where this system allows none at all, it is one already.
    let script = "#!/bin/sh\nif unshare -Ur true 2>/dev/null\n\
                  then exec unshare -Ur sh -c 'echo 0 > /proc/sys/user/max_net_namespaces && exec \"$@\"' sh DRIVER \"$@\"\n\
                  else exec DRIVER \"$@\"\nfi\n";
    let driver = bench.root.path().join("driver");
    fs::write_atomic(&driver, script.replace("DRIVER", env!("CARGO_BIN_EXE_aitools")).as_bytes()).unwrap();
    fs::set_executable(&driver).unwrap();
    bench.ask.driver = driver;
    bench.ask.network = Network::Never;
    let refused = bench.run().unwrap_err();
    assert!(matches!(refused, BuildError::NotIsolated { .. }), "{refused:?}\n{}", bench.log());
    assert!(refused.to_string().contains("`--offline` forbids"), "{refused}");
    assert!(bench.prefix_is_empty() && !bench.ask.binary().exists());
    bench.ask.network = Network::Avoided;
    let built = bench.built();
    assert_eq!(built.notes["network"], "discouraged");
    assert!(
        built.warnings.iter().any(|it| it.contains("cannot run builds without network access")),
        "{:?}",
        built.warnings
    );
}
