//! `aitools schema`.

use crate::cli::args::{self, Format};
use crate::cli::output::Output;
use crate::format::manifest::Manifest;
use crate::format::policy::Policy;
use crate::format::schema;
use crate::format::settings::Settings;
use crate::ops::Failure;

/// # Errors
/// Never; the signature is that of every verb.
pub fn run(ask: &args::Schema, output: &Output) -> Result<u8, Failure> {
    let schema = match ask.format {
        Format::Manifest => schema::of::<Manifest>(),
        Format::Policy => schema::of::<Policy>(),
        Format::Settings => schema::of::<Settings>(),
    };
    output.text(&format!("{schema:#}\n"));
    output.result("schema", true, &schema);
    Ok(0)
}
