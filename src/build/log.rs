//! What the output of CMake, ninja, make and compilers says. Lines in, facts out; bounded whatever is fed. No disk.

use std::collections::VecDeque;

/// Longer lines are cut before they come here.
pub const MAX_LINE_BYTES: usize = 16 << 10;
/// Lines of the end that a failure shows.
const TAIL: usize = 30;
/// Lines shown after the first error.
const CONTEXT: usize = 8;
/// Facts kept of each kind.
const MAX_KEPT: usize = 16;
/// Definitions kept: ours are in the list, too.
const MAX_UNUSED: usize = 1024;
/// Bytes of one kept line.
const MAX_KEPT_BYTES: usize = 400;

/// Texts by which a tool without a network says so, each enough by itself.
const NETWORK: &[&str] = &[
    super::settings::NO_NETWORK_HOST,
    "could not resolve host",
    "couldn't resolve host",
    "could not resolve proxy",
    "couldn't resolve proxy",
    "temporary failure in name resolution",
    "name or service not known",
    "nodename nor servname provided",
    "network is unreachable",
    "getaddrinfo failed",
    "no address associated with hostname",
    "fatal: transport '", // git, of a protocol that is not allowed
    super::isolation::REFUSAL,
];

/// How far a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Finished steps.
    pub done: u64,
    /// All steps.
    pub total: u64,
}

/// What was seen so far.
#[derive(Debug, Default)]
pub struct Findings {
    tail: VecDeque<String>,
    /// The first compiler, linker or CMake error, and some lines after it.
    first_error: Vec<String>,
    /// What stands in when no line looks like an error: ninja's or make's own words.
    weak_error: Vec<String>,
    /// Lines of somebody who tried the network.
    pub network: Vec<String>,
    /// The first line that says that the disk is full.
    pub no_space: Option<String>,
    /// Definitions that the project does not use, as CMake lists them.
    pub unused: Vec<String>,
    /// The language CMake found no compiler for, as CMake calls it: `C`, `CXX`, `CUDA`.
    pub no_compiler: Option<String>,
    /// First lines of CMake's warnings.
    pub warnings: Vec<String>,
    /// Lines about accelerators and things not found: why a definition did not hold.
    pub said: Vec<String>,
    /// The language of a compiler that CMake is complaining of.
    accused: Option<String>,
    context: Context,
}

/// What the next lines belong to.
#[derive(Debug, Default, PartialEq, Eq)]
enum Context {
    #[default]
    None,
    Error(usize),
    Weak(usize),
    Unused,
    Warning,
}

impl Findings {
    /// The first error with its context, or what comes nearest to one.
    pub fn first_error(&self) -> Option<String> {
        let lines = if self.first_error.is_empty() { &self.weak_error } else { &self.first_error };
        let text = lines.join("\n");
        Some(text.trim_end().to_owned()).filter(|text| !text.is_empty())
    }

    /// The last lines.
    pub fn tail(&self) -> Vec<String> {
        self.tail.iter().cloned().collect()
    }

    /// Takes one line, without its end. Gives the progress that it tells.
    pub fn line(&mut self, line: &str) -> Option<Step> {
        let line = line.trim_end();
        let kept = cut(line);
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(kept.clone());
        self.in_context(line, &kept);
        self.classify(line, kept);
        step(line)
    }

    fn in_context(&mut self, line: &str, kept: &str) {
        match &mut self.context {
            Context::None => return,
            Context::Error(left) | Context::Weak(left) if *left > 0 && step(line).is_none() => {
                *left -= 1;
                let weak = matches!(self.context, Context::Weak(_));
                let lines = if weak { &mut self.weak_error } else { &mut self.first_error };
                lines.push(kept.to_owned());
                return;
            }
            // The list of names stands between empty lines, indented.
            Context::Unused if line.is_empty() => return,
            Context::Unused if line.starts_with(' ') => {
                if self.unused.len() < MAX_UNUSED {
                    self.unused.push(kept.trim().to_owned());
                }
                return;
            }
            Context::Warning if line.is_empty() => return,
            Context::Warning if line.starts_with(' ') => {
                if let Some(warning) = self.warnings.last_mut() {
                    *warning = cut(&format!("{warning} {}", line.trim()));
                }
            }
            _ => {}
        }
        self.context = Context::None;
    }

    fn classify(&mut self, line: &str, kept: String) {
        let lower = line.to_lowercase();
        if NETWORK.iter().any(|text| lower.contains(text)) {
            push(&mut self.network, kept.clone());
        }
        if self.no_space.is_none() && is_no_space(&lower) {
            self.no_space = Some(kept.clone());
        }
        if self.no_compiler.is_none() {
            self.no_compiler = missing_compiler(line, &mut self.accused);
        }
        if ["cuda", "cublas", "nvcc", "hip", "rocm", "metal", "vulkan", "not found"].iter().any(|it| lower.contains(it))
            && !lower.contains("running: ")
        {
            push(&mut self.said, kept.clone());
        }
        if line.trim() == "Manually-specified variables were not used by the project:" {
            // The line before was its heading.
            self.warnings.retain(|warning| !warning.ends_with(line.trim()));
            self.context = Context::Unused;
        } else if line.starts_with("CMake Warning") && !line.contains("(dev)") {
            push(&mut self.warnings, kept);
            self.context = Context::Warning;
        } else if self.first_error.is_empty() && is_error(line) {
            self.first_error.push(kept);
            self.context = Context::Error(CONTEXT);
        } else if self.weak_error.is_empty() && is_weak_error(line) {
            self.weak_error.push(kept);
            self.context = Context::Weak(CONTEXT);
        }
    }
}

fn push(kept: &mut Vec<String>, line: String) {
    if kept.len() < MAX_KEPT && !kept.contains(&line) {
        kept.push(line);
    }
}

fn cut(line: &str) -> String {
    match line.char_indices().nth(MAX_KEPT_BYTES) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

/// gcc, clang and rustc, MSVC, nvcc, linkers, CMake.
fn is_error(line: &str) -> bool {
    line.starts_with("CMake Error")
        || line.contains(": error:")
        || line.contains(": fatal error:")
        || line.contains(": error C")
        || line.contains(": fatal error C")
        || line.contains(": error LNK")
        || line.contains(": fatal error LNK")
        || line.contains("nvcc fatal")
        || line.contains(": undefined reference to ")
        || line.starts_with("Undefined symbols for architecture")
        || line.starts_with("/usr/bin/ld: cannot find")
        || line.contains("internal compiler error")
        || line.contains("Error: no such instruction")
        || line.starts_with("Killed signal terminated program")
}

fn is_weak_error(line: &str) -> bool {
    line.starts_with("FAILED: ")
        || line.starts_with("ninja: error:")
        || line.contains("make: *** ")
        || line.contains("]: *** [")
        || line.starts_with("NMAKE : fatal error")
        || line.starts_with("error: ")
        || line.starts_with("failed to execute command")
}

fn is_no_space(lower: &str) -> bool {
    lower.contains("no space left on device")
        || lower.contains("disk quota exceeded")
        || lower.contains("not enough space on the disk")
}

/// CMake's words (cmGlobalGenerator.cxx, EnableLanguage). They may take several lines, the first of which names the language:
/// `accused` carries it.
fn missing_compiler(line: &str, accused: &mut Option<String>) -> Option<String> {
    let line = line.trim();
    let between = |before: &str, after: &str| {
        let language = line.strip_prefix(before)?.strip_suffix(after)?;
        let plain = !language.is_empty() && language.chars().all(|c| c.is_ascii_alphanumeric());
        plain.then(|| language.to_owned())
    };
    if let Some(language) = between("The CMAKE_", "_COMPILER:") {
        *accused = Some(language);
    }
    let no_file = line == "is not a full path to an existing compiler tool."
        || line == "is not a full path and was not found in the PATH.";
    between("No CMAKE_", "_COMPILER could be found.")
        .or_else(|| between("CMake Error: CMAKE_", "_COMPILER not set, after EnableLanguage"))
        .or_else(|| accused.take_if(|_| no_file))
}

/// `[n/m] …` of ninja, `[ n%] …` of make.
fn step(line: &str) -> Option<Step> {
    let (inside, _) = line.trim_start().strip_prefix('[')?.split_once(']')?;
    if let Some(percent) = inside.trim().strip_suffix('%') {
        let done = percent.parse().ok()?;
        return (done <= 100).then_some(Step { done, total: 100 });
    }
    let (done, total) = inside.split_once('/')?;
    let (done, total) = (done.parse().ok()?, total.parse().ok()?);
    (done <= total).then_some(Step { done, total })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Findings {
        let mut findings = Findings::default();
        for line in text.lines() {
            findings.line(line);
        }
        findings
    }

    #[test]
    fn progress_of_ninja_and_make() {
        for (line, expected) in [
            ("[3/22] Building C object a.c.o", Some((3, 22))),
            ("[ 12%] Building C object", Some((12, 100))),
            ("[100%] Built target main", Some((100, 100))),
            ("[5/2] backwards", None),
            ("[200%] too much", None),
            ("[1/x] y", None),
            ("[99999999999999999999/1]", None),
            ("no", None),
            ("[", None),
        ] {
            assert_eq!(step(line).map(|step| (step.done, step.total)), expected, "{line}");
        }
    }

    #[test]
    fn the_first_real_error_is_shown_and_not_what_follows_from_it() {
        let findings = read(
            "[1/9] ok\nFAILED: x.o\ncc -c x.c\nx.c:3:5: error: bad\n   3 | bad\n[2/9] ok\n\
                             y.c:1:1: error: later\nninja: build stopped: subcommand failed.",
        );
        assert_eq!(findings.first_error().unwrap(), "x.c:3:5: error: bad\n   3 | bad");
        let findings = read("[1/9] ok\nFAILED: gen\npython3 gen.py\nTraceback\n  KeyError\nninja: build stopped.");
        assert!(findings.first_error().unwrap().contains("KeyError"));
        assert_eq!(read("nothing\nhere").first_error(), None);
    }

    #[test]
    fn definitions_that_the_project_does_not_know() {
        for head in ["CMake Warning:", "CMake Warning (unused-cli):"] {
            let findings = read(&format!(
                "-- Generating done\n{head}\n  Manually-specified variables were not used by the project:\n\n    \
                 LLAMA_CUBLAS\n    ÜB\n\n\n-- Build files have been written to: /x"
            ));
            assert_eq!(findings.unused, ["LLAMA_CUBLAS", "ÜB"]);
            assert!(findings.warnings.is_empty(), "{:?}", findings.warnings);
        }
    }

    #[test]
    fn warnings_carry_their_first_words() {
        let findings = read(
            "CMake Warning at CMakeLists.txt:7 (message):\n  cuBLAS not found\n\n\n-- done\nCMake Warning \
                             (dev) at x:\n  policy",
        );
        assert_eq!(findings.warnings, ["CMake Warning at CMakeLists.txt:7 (message): cuBLAS not found"]);
        assert!(findings.said.iter().any(|line| line.contains("cuBLAS not found")));
    }

    #[test]
    fn a_missing_compiler_is_named_by_its_language() {
        for (text, language) in [
            ("  No CMAKE_CXX_COMPILER could be found.", Some("CXX")),
            ("CMake Error: CMAKE_C_COMPILER not set, after EnableLanguage", Some("C")),
            ("The CMAKE_CUDA_COMPILER:\n\n  /x\n\n  is not a full path to an existing compiler tool.", Some("CUDA")),
            ("is not a full path to an existing compiler tool.", None),
            ("No CMAKE__COMPILER could be found.", None),
            ("No CMAKE_a b_COMPILER could be found.", None),
        ] {
            assert_eq!(read(text).no_compiler.as_deref(), language, "{text}");
        }
    }

    #[test]
    fn the_network_and_the_full_disk_are_told_on() {
        let findings = read(
            "fatal: unable to access 'https://x/': Could not resolve host: x\n\
                             fatal: transport 'https' not allowed\ncc1: error: x.o: No space left on device",
        );
        assert_eq!(findings.network.len(), 2);
        assert!(findings.no_space.unwrap().contains("x.o"));
    }

    #[test]
    fn nothing_grows_without_bound() {
        let mut findings = Findings::default();
        for index in 0..200 {
            findings.line(&format!("x{index}: error: {} could not resolve host cuda", "é".repeat(5000)));
        }
        assert!(findings.network.len() <= MAX_KEPT && findings.tail().len() == TAIL);
        assert!(findings.first_error().unwrap().len() < 20_000);
    }
}
