use super::*;
use std::collections::BTreeMap;

use crate::base::cancel::Cancel;
use crate::format::manifest::Kind;
use crate::report::Task;

struct Project {
    root: tempfile::TempDir,
    world: World,
}

impl Project {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let world = World {
            task: Task::silent(),
            project: root.path().join("pröject"),
            scratch: root.path().join("scratch"),
            offline: true,
            mirrors: Vec::new(),
            env: BTreeMap::new(),
        };
        Self { root, world }
    }

    fn write(&self, path: &str, text: &str) {
        fs::write_atomic(&self.world.project.join(path), text.as_bytes()).unwrap();
    }

    fn fetch(&self, spec: &PathSpec, kind: Kind, pin: &Pin) -> Result<PathBuf, SourceError> {
        let staging = self.root.path().join("staging");
        fs::remove_dir_all(&staging).unwrap();
        fs::create_dir_all(&staging).unwrap();
        let files: Vec<&FilePin> = pin.files.iter().collect();
        match kind {
            Kind::Model => spec.fetch_files(&self.world, &(), &files, &staging)?,
            _ => spec.fetch_tree(&self.world, &(), &pin.tree.unwrap(), &staging)?,
        };
        Ok(staging)
    }

    fn names(&self, spec: &PathSpec) -> Vec<String> {
        let pin = resolve(spec, &self.world, Kind::Engine).unwrap();
        let staging = self.fetch(spec, Kind::Engine, &pin).unwrap();
        let listing = Listing::scan(&staging, &Default::default(), &Cancel::default()).unwrap();
        assert_eq!(Some(listing.digest()), pin.tree, "what is fetched is what was pinned");
        listing.0.keys().map(RelPath::to_string).collect()
    }
}

/// What a request resolves to, for an engine or a model.
#[derive(Debug)]
struct Pin {
    tree: Option<Digest>,
    files: Vec<FilePin>,
}

fn resolve(spec: &PathSpec, world: &World, kind: Kind) -> Result<Pin, SourceError> {
    if kind == Kind::Model {
        return Ok(Pin { tree: None, files: spec.resolve_files(world)?.1 });
    }
    Ok(Pin { tree: Some(spec.resolve_tree(world)?.1), files: Vec::new() })
}

fn spec(path: &str, files: &[&str]) -> PathSpec {
    PathSpec { path: path.to_owned(), files: files.iter().map(|&glob| glob.to_owned()).collect() }
}

#[test]
fn an_engine_is_the_folder_without_git_and_what_git_ignores() {
    let project = Project::new();
    for path in ["e ä/a.c", "e ä/sub/.git", "e ä/build/x.o", "e ä/kept/y.o", "e ä/other/b.c"] {
        project.write(path, path);
    }
    assert_eq!(project.names(&spec("e ä", &[])), ["a.c", "build/x.o", "kept/y.o", "other/b.c"]);
    let folder = project.world.project.join("e ä");
    let repository = Repository::init(&folder).unwrap();
    project.write("e ä/.gitignore", "build/\n*.o\n");
    let mut index = repository.index().unwrap();
    index.add_all(["kept/y.o"], git2::IndexAddOption::FORCE, None).unwrap();
    index.write().unwrap();
    assert_eq!(project.names(&spec("e ä", &[])), [".gitignore", "a.c", "kept/y.o", "other/b.c"]);
    assert_eq!(project.names(&spec("e ä/other", &[])), ["b.c"]);
    assert_eq!(project.names(&spec(folder.to_str().unwrap(), &[])).len(), 4, "an absolute path");
}

#[test]
fn a_folder_that_is_itself_ignored_has_no_rules() {
    let project = Project::new();
    project.write("external/e/a.c", "1");
    project.write("external/e/x.o", "2");
    Repository::init(&project.world.project).unwrap();
    project.write(".gitignore", "/external/\n*.o\n");
    assert_eq!(project.names(&spec("external/e", &[])), ["a.c", "x.o"]);
}

#[test]
fn a_model_is_a_file_or_files_of_a_folder() {
    let project = Project::new();
    project.write("m/a é.gguf", "weights");
    project.write("m/deep/b.gguf", "more");
    let check = |spec: &PathSpec, expected: &[&str]| {
        let pin = resolve(spec, &project.world, Kind::Model).unwrap();
        let names: Vec<_> = pin.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(names, expected);
        let staging = project.fetch(spec, Kind::Model, &pin).unwrap();
        for file in &pin.files {
            assert_eq!(digest::of_file(&file.path.under(&staging)).unwrap(), (file.sha256, file.size));
        }
        pin
    };
    let pin = check(&spec("m/a é.gguf", &[]), &["a é.gguf"]);
    assert_eq!(pin.files[0].sha256, Digest::of(b"weights"));
    check(&spec("m", &["**/*.gguf"]), &["a é.gguf", "deep/b.gguf"]);
    check(&spec("m", &["*.gguf"]), &["a é.gguf"]);
    let wrong = resolve(&spec("m", &["a e.gguf"]), &project.world, Kind::Model);
    assert!(matches!(wrong, Err(SourceError::Missing { hint: Some(_), .. })), "{wrong:?}");
    fs::remove_file(&project.world.project.join("m/a é.gguf")).unwrap();
    assert!(matches!(project.fetch(&spec("m", &[]), Kind::Model, &pin), Err(SourceError::Missing { .. })));
}

#[test]
fn what_is_not_there_is_named() {
    let project = Project::new();
    project.write("engine/a.c", "1");
    match resolve(&spec("engin", &[]), &project.world, Kind::Engine) {
        Err(SourceError::Missing { hint, .. }) => assert_eq!(hint.as_deref(), Some("did you mean `engine`?")),
        other => panic!("{other:?}"),
    }
    assert!(matches!(resolve(&spec("no/where", &[]), &project.world, Kind::Model), Err(SourceError::Missing { .. })));
    assert!(matches!(
        resolve(&spec("engine/a.c", &[]), &project.world, Kind::Engine),
        Err(SourceError::Missing { .. })
    ));
    fs::create_dir_all(&project.world.project.join("empty")).unwrap();
    for kind in [Kind::Engine, Kind::Model] {
        assert!(matches!(resolve(&spec("empty", &[]), &project.world, kind), Err(SourceError::Missing { .. })));
    }
}

#[cfg(unix)]
#[test]
fn links_are_kept_followed_or_refused() {
    let project = Project::new();
    project.write("e/a.c", "1");
    let at = |path: &str| project.world.project.join(path);
    let link = |target: &str, path: &str| fs::symlink(Path::new(target), &at(path)).unwrap();
    // Loops and links to nothing, within the folder: an engine keeps them.
    link("loop", "e/loop");
    link(".", "e/again");
    link("a.c", "e/b.c");
    assert_eq!(project.names(&spec("e", &[])), ["a.c", "again", "b.c", "loop"]);
    // A model's weights may be links, as in caches.
    project.write("blobs/1", "weights");
    fs::create_dir_all(&at("m")).unwrap();
    link("../blobs/1", "m/w.gguf");
    link("w2.gguf", "m/w2.gguf");
    link("..", "m/up");
    let model = spec("m", &[]);
    let pin = resolve(&model, &project.world, Kind::Model).unwrap();
    assert_eq!(pin.files.len(), 1);
    let staging = project.fetch(&model, Kind::Model, &pin).unwrap();
    assert!(!fs::symlink_metadata(&staging.join("w.gguf")).unwrap().is_symlink());
    for target in ["../blobs/1", "/etc/passwd"] {
        fs::remove_file(&at("e/out")).unwrap();
        link(target, "e/out");
        let result = resolve(&spec("e", &[]), &project.world, Kind::Engine);
        assert!(matches!(result, Err(SourceError::Hostile { .. })), "{result:?}");
    }
    link("nothing", "gone");
    assert!(matches!(resolve(&spec("gone", &[]), &project.world, Kind::Engine), Err(SourceError::Missing { .. })));
}

#[test]
fn a_copy_is_no_second_name_of_the_file() {
    let project = Project::new();
    project.write("e/a.c", "1");
    let engine = spec("e", &[]);
    let pin = resolve(&engine, &project.world, Kind::Engine).unwrap();
    let staging = project.fetch(&engine, Kind::Engine, &pin).unwrap();
    let mut file = fs::open_or_create(&project.world.project.join("e/a.c")).unwrap();
    std::io::Write::write_all(&mut file, b"2").unwrap();
    assert_eq!(fs::read_bounded(&staging.join("a.c"), 9).unwrap(), b"1");
    assert_ne!(resolve(&engine, &project.world, Kind::Engine).unwrap().tree, pin.tree);
}
