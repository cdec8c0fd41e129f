//! `aitools schema`.

use crate::cli::args::{self, Format};
use crate::cli::output::Output;
use crate::format::schema;
use crate::ops::Failure;

/// # Errors
/// Never; the signature is that of every verb.
pub fn run(ask: &args::Schema, output: &Output) -> Result<u8, Failure> {
    let schema = match ask.format {
        Format::Manifest => schema::manifest(),
        Format::Policy => schema::policy(),
        Format::Settings => schema::settings(),
    };
    output.text(&format!("{schema:#}\n"));
    output.result("schema", true, &schema);
    Ok(0)
}
