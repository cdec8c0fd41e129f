//! House rules that neither rustc nor clippy knows, as tests over the repository's own files.
//!
//! A rule is a function from files to problems, so that each is also tested on a sample that breaks it.

mod cli;
mod cycles;
mod dependencies;
mod docs;
mod layers;
mod reference;
mod rust;
mod words;

use xshell::{Shell, cmd};

/// A text file of the repository.
#[derive(Debug, Clone)]
struct File {
    /// Relative to the repository, with `/`.
    path: String,
    text: String,
}

impl File {
    fn sample(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    fn problem(&self, line: usize, what: impl std::fmt::Display) -> String {
        format!("{}:{line}: {what}", self.path)
    }

    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }
}

/// Every text file that git tracks or would, submodules and links left out.
fn files() -> Vec<File> {
    let sh = Shell::new().unwrap();
    sh.change_dir(crate::step::root());
    let listed = cmd!(sh, "git ls-files -z --cached --others --exclude-standard").quiet().read().unwrap();
    let files: Vec<File> = listed
        .split('\0')
        .filter(|path| !path.is_empty() && crate::step::root().join(path).is_file())
        .filter_map(|path| {
            let bytes = sh.read_binary_file(path).unwrap();
            let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))?;
            Some(File { path: path.to_owned(), text })
        })
        .collect();
    assert!(
        files.iter().any(|file| file.path == "src/lib.rs"),
        "the listing of the repository is not what it should be"
    );
    files
}

fn find<'a>(files: &'a [File], path: &str) -> &'a File {
    files.iter().find(|file| file.path == path).unwrap_or_else(|| panic!("`{path}` is missing"))
}

#[track_caller]
fn hold(problems: &[String]) {
    assert!(problems.is_empty(), "{} to tidy up:\n  {}\n", problems.len(), problems.join("\n  "));
}

/// Runs `rule` on one sample file and says on which lines it found something.
fn lines_found(rule: fn(&[File]) -> Vec<String>, path: &str, text: &str) -> Vec<usize> {
    rule(&[File::sample(path, text)])
        .iter()
        .map(|problem| problem.split(':').nth(1).and_then(|line| line.parse().ok()).unwrap())
        .collect()
}
