//! Gets the words and hands them on; holds nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let code = match args.split_first() {
        Some((first, rest)) if first == "internal" => aitools::cli::internal::run(rest),
        _ => 2,
    };
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
