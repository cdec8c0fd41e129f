//! Models made with PowerInfer's own programs. Read against `examples/quantize/quantize.cpp` at commit d3ebd7c.
//!
//! Its `quantize` writes every type of its time without a word, but what computes sparse layers knows two of them and takes
//! any other for F16: nonsense, and an exit code of 0. Therefore `Q4_0` alone is a target here, and what came out is looked at.

use std::collections::BTreeMap;

use crate::base::platform::executable;
use crate::engine::derive::{Derivation, DeriveRequest};
use crate::engine::{EngineError, Finding, Launch};
use crate::format::gguf::Header;
use crate::format::manifest::{EngineSpec, Step};

use super::check;

pub(super) const QUANTIZE: &str = "quantize";
/// The statistics from which the GPU index is made.
const BESIDE: &[&str] = &["activation"];
/// F32 and F16: anything else was quantized before, and `quantize` does not do it twice.
const WHOLE_TYPES: &[u32] = &[0, 1];

pub(super) fn derivation(step: Step<'_>, spec: &EngineSpec) -> Result<Derivation, EngineError> {
    match step {
        Step::Quantize(_) if !spec.targets.is_empty() && !spec.targets.iter().any(|target| target == QUANTIZE) => Err(
            refused("the engine is built without its program `quantize`", "add `quantize` to the engine's `targets`"),
        ),
        // 4.5 of 16 bits, and 6.6 for the output.
        Step::Quantize("Q4_0") => Ok(Derivation { version: 1, beside: BESIDE, percent: 45 }),
        Step::Quantize(kind) => {
            let why = match kind {
                "F16" => "from F16 to F16 its `quantize` makes the output Q8_0 and the predictors Q5_0".to_owned(),
                kind => {
                    format!("PowerInfer takes `{kind}` in the layers it computes sparsely for F16, and makes nonsense")
                }
            };
            Err(refused(why, "`quantize = \"Q4_0\"` is the one type that it writes and runs"))
        }
    }
}

fn refused(why: impl Into<String>, hint: &str) -> EngineError {
    EngineError::Underivable { why: why.into(), hint: Some(hint.to_owned()) }
}

/// `quantize IN OUT TYPE THREADS`.
pub(super) fn command(ask: &DeriveRequest<'_>) -> Result<Launch, EngineError> {
    let Step::Quantize(kind) = ask.step;
    let wide = |shape: &[u64]| shape.iter().filter(|length| **length > 1).count() > 1;
    let done = ask.header.tensors.iter().find(|tensor| wide(&tensor.shape) && !WHOLE_TYPES.contains(&tensor.kind));
    if let Some(tensor) = done {
        let name = tensor.tensor_type().map_or_else(|| format!("type {}", tensor.kind), |kind| kind.name.to_owned());
        let why = format!("`{}` is {name} already: what was quantized once is not quantized again", tensor.name);
        return Err(refused(why, "derive from the model in F16"));
    }
    let program = ask.artifact.join("bin").join(executable(QUANTIZE));
    let args = vec![ask.input.into(), ask.output.into(), kind.into(), ask.threads.to_string().into()];
    Ok(Launch { program, args, env: BTreeMap::new(), cwd: ask.scratch.to_owned(), files: BTreeMap::new() })
}

/// What is wrong with what came out: everything that is wrong with any model, or that it is another one.
pub(super) fn check(ask: &DeriveRequest<'_>, header: &Header, size: u64) -> Vec<Finding> {
    let mut found = check::of_model(size, ask.commit, header);
    found.retain(|finding| finding.error);
    let error = |message: &str| Finding { error: true, key: "", message: message.to_owned(), hint: None };
    if header.magic != ask.header.magic {
        found.push(error("its first bytes are not those of the model it was made from"));
    }
    let names = |header: &Header| header.tensors.iter().map(|tensor| tensor.name.clone()).collect::<Vec<_>>();
    if names(header) != names(ask.header) {
        found.push(error("it has other tensors than the model it was made from"));
    }
    found
}
