//! How the program was called, as far as a command that it suggests must repeat it.

use super::args::Global;

/// The options of this run that say which project and cache are meant.
#[derive(Debug, Clone, Default)]
pub struct Invocation {
    options: String,
}

impl Invocation {
    /// Takes `-C`, `-m` and `--cache-dir` from the arguments, quoted for a POSIX shell.
    pub fn new(global: &Global) -> Self {
        let text = |path: &std::path::PathBuf| path.display().to_string();
        let given = [
            ("-C", global.directory.as_ref().map(text)),
            ("-m", global.manifest.clone()),
            ("--cache-dir", global.cache_dir.as_ref().map(text)),
        ];
        let mut options = String::new();
        for (option, value) in given {
            if let Some(value) = value {
                options += &format!(" {option} {}", quoted(&value));
            }
        }
        Self { options }
    }

    /// The same text, each suggested command (`aitools VERB …` after a backtick) with the options of this run, so that it
    /// works when pasted. Commands that already name options or start a new project stay as they are.
    pub fn complete(&self, text: &str) -> String {
        const HEAD: &str = "`aitools ";
        let mut pieces = text.split(HEAD);
        let mut completed = pieces.next().unwrap_or_default().to_owned();
        for piece in pieces {
            let own = piece.starts_with('-') || piece.starts_with("init") || piece.starts_with("doctor");
            completed.push_str(if own { HEAD } else { "`aitools" });
            if !own {
                completed += &format!("{} ", self.options);
            }
            completed += piece;
        }
        completed
    }
}

/// An argument as a POSIX shell reads it back.
pub fn quoted(text: &str) -> String {
    // Only a NUL cannot be quoted, and no argument holds one.
    shlex::try_quote(text).map_or_else(|_| text.to_owned(), std::borrow::Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u1_suggested_commands_name_this_runs_project() {
        let invocation = Invocation { options: " -C 'a b' -m quickstart".to_owned() };
        let text = "run `aitools sync`, then `aitools run p`; or `aitools init` or `aitools -C foo run p`";
        assert_eq!(
            invocation.complete(text),
            "run `aitools -C 'a b' -m quickstart sync`, then `aitools -C 'a b' -m quickstart run p`; or `aitools init` or \
             `aitools -C foo run p`"
        );
        assert_eq!(Invocation::default().complete(text), text);
        assert_eq!(quoted("it's"), "\"it's\"");
    }
}
