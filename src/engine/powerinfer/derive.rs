//! Deriving models with PowerInfer's own programs. Read against `examples/quantize/quantize.cpp` and `convert.py` at commit d3ebd7c.
//!
//! Its `quantize` writes every type of its time without a warning, but the code for sparse layers supports two of them and reads
//! any other as F16: wrong answers and exit code 0. Therefore only `Q4_0` is supported here, and the result is checked.
//!
//! Its `convert.py` converts the architectures `llama` and `bamboo`. For any other it tries to start another script with whatever
//! `python3` it finds, reports the architecture as `True`, and exits with 0 in any case: refused here. It reads
//! PyTorch's pickles with its own reader, which would run functions outside of `torch` that they name: this is prevented here.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::base::fs;
use crate::base::platform::executable;
use crate::engine::derive::{Derivation, DeriveRequest, Maker, Work};
use crate::engine::finding::{Finding, error};
use crate::engine::{EngineError, Launch, ModelError, gguf};
use crate::format::gguf::{Header, Magic, Tensor};
use crate::format::manifest::{EngineSpec, Step};

use super::check;

const QUANTIZE: &str = "quantize";
/// The statistics from which the GPU index is made.
const BESIDE: &[&str] = &["activation"];
/// F32 and F16: any other type is already quantized, and `quantize` refuses it.
const WHOLE_TYPES: &[u32] = &[0, 1];
/// The large matrices of a model: `quantize` changes all of them.
const QUANTIZED: &[&str] = &["ffn_gate.weight", "ffn_up.weight", "ffn_down.weight", "ffn_down_t.weight"];
/// `model_type` of the models that `convert.py` itself converts.
const CONVERTED: &[&str] = &["llama", "bamboo"];
const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Runs a script (the first argument) with folders (up to `--`) to find packages in. Python itself is started without any.
/// Pickles that the script reads may name nothing but what a saved dictionary needs.
const START: &str = "import pickle, runpy, sys
class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) != ('collections', 'OrderedDict'):
            raise pickle.UnpicklingError(f'{module}.{name} has no place in a saved tensor')
        return super().find_class(module, name)
pickle.Unpickler = Unpickler
at = sys.argv.index('--')
sys.path[:0] = sys.argv[2:at]
sys.argv = [sys.argv[1]] + sys.argv[at + 1:]
runpy.run_path(sys.argv[0], run_name='__main__')
";

pub(super) fn derivation(step: Step<'_>, spec: &EngineSpec) -> Result<Derivation, EngineError> {
    match step {
        Step::Convert(_) => Ok(Derivation { version: 1, by: Maker::Source, beside: BESIDE, percent: 105 }),
        Step::Quantize(_) if !spec.targets.is_empty() && !spec.targets.iter().any(|target| target == QUANTIZE) => Err(
            refused("the engine is built without its program `quantize`", "add `quantize` to the engine's `targets`"),
        ),
        // 4.5 of 16 bits, and 6.6 for the output.
        Step::Quantize("Q4_0") => Ok(Derivation { version: 1, by: Maker::Build, beside: BESIDE, percent: 45 }),
        Step::Quantize(kind) => {
            let why = match kind {
                "F16" => "for F16, PowerInfer's `quantize` makes the output Q8_0 and the predictors Q5_0".to_owned(),
                kind => format!("PowerInfer reads `{kind}` in sparse layers as F16, and computes wrong results"),
            };
            Err(refused(why, "use `quantize = \"Q4_0\"`: the only type that PowerInfer both writes and runs"))
        }
    }
}

fn refused(why: impl Into<String>, hint: &str) -> EngineError {
    EngineError::Underivable { why: why.into(), hint: Some(hint.to_owned()) }
}

pub(super) fn command(ask: &DeriveRequest<'_>) -> Result<Launch, EngineError> {
    let (program, args) = match ask.work {
        Work::Quantize { kind, input, artifact } => quantize(ask, (kind, input, artifact))?,
        Work::Convert { model, predictor, source, python, packages } => {
            convertible(model, predictor)?;
            let mut args: Vec<OsString> = ["-I", "-S", "-B", "-c", START].map(OsString::from).into();
            args.push(source.join("convert.py").into());
            args.extend(packages.iter().map(OsString::from));
            args.extend(["--", "--outtype", "f16", "--outfile"].map(OsString::from));
            args.extend([ask.output, model, predictor].map(OsString::from));
            (python.to_owned(), args)
        }
    };
    Ok(Launch { program, args, env: BTreeMap::new(), cwd: ask.scratch.to_owned(), files: BTreeMap::new() })
}

type Command = (PathBuf, Vec<OsString>);

/// `quantize IN OUT TYPE THREADS`.
fn quantize(ask: &DeriveRequest<'_>, of: (&str, &Path, &Path)) -> Result<Command, EngineError> {
    let (kind, input, artifact) = of;
    let unreadable = |error: ModelError| EngineError::Underivable { why: error.to_string(), hint: None };
    let (header, _) = gguf::read(input).map_err(unreadable)?;
    let wide = |shape: &[u64]| shape.iter().filter(|length| **length > 1).count() > 1;
    let done = header.tensors.iter().find(|tensor| wide(&tensor.shape) && !WHOLE_TYPES.contains(&tensor.kind));
    if let Some(tensor) = done {
        let (name, kind) = (&tensor.name, type_of(tensor));
        let why = format!("`{name}` is already {kind}: a quantized model cannot be quantized again");
        return Err(refused(why, "derive from the model in F16"));
    }
    let args = vec![input.into(), ask.output.into(), kind.into(), ask.threads.to_string().into()];
    Ok((artifact.join("bin").join(executable(QUANTIZE)), args))
}

fn type_of(tensor: &Tensor) -> String {
    tensor.tensor_type().map_or_else(|| format!("type {}", tensor.kind), |kind| kind.name.to_owned())
}

/// Inputs that `convert.py` would fail on, or convert wrongly.
fn convertible(model: &Path, predictor: &Path) -> Result<(), EngineError> {
    let bytes = fs::read_bounded(&model.join("config.json"), MAX_CONFIG_BYTES);
    let config: Option<serde_json::Value> = bytes.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let Some(config) = config else {
        return Err(refused("the model has no readable `config.json`", "name it in the `files` of the model"));
    };
    let kind = config["model_type"].as_str().unwrap_or("none");
    if !CONVERTED.contains(&kind) {
        let why = format!("PowerInfer's `convert.py` converts {}, not `{kind}`", CONVERTED.join(" and "));
        return Err(refused(why, "choose a model of one of these architectures"));
    }
    let act = config["hidden_act"].as_str().unwrap_or("relu");
    if !act.contains("relu") {
        let why = format!(
            "the model's activation is `{act}`: its neurons are never inactive, and PowerInfer would compute ReLU"
        );
        return Err(refused(why, "choose a model that was trained with ReLU"));
    }
    for (folder, file) in [(model, "tokenizer.model"), (predictor, "model_0.pt")] {
        if !fs::exists(&folder.join(file)) {
            return Err(refused(format!("there is no `{file}`"), "name it in the `files` of the model or predictor"));
        }
    }
    Ok(())
}

/// Findings about the file that was made: those of any model, and whether it belongs to another model.
pub(super) fn check(ask: &DeriveRequest<'_>) -> Vec<Finding> {
    if !fs::exists(ask.output) {
        return vec![error("", "the program made no file", None)];
    }
    let from = match ask.work {
        Work::Quantize { input, .. } => gguf::read(input).map(|(header, _)| Some(header)),
        Work::Convert { .. } => Ok(None),
    };
    match gguf::read(ask.output).and_then(|(header, size)| Ok(compare(ask, &header, size, from?.as_ref()))) {
        Ok(found) => found,
        Err(unusable) => vec![error("", unusable.why, None)],
    }
}

fn compare(ask: &DeriveRequest<'_>, header: &Header, size: u64, from: Option<&Header>) -> Vec<Finding> {
    let mut found = check::of_model(size, ask.commit, header);
    found.retain(|finding| finding.error);
    let mut wrong = |message: &str| found.push(error("", message, None));
    let shapes = |header: &Header| -> Vec<_> {
        header.tensors.iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect()
    };
    match (&ask.work, from) {
        (Work::Quantize { kind, .. }, Some(from)) => {
            if header.magic != from.magic {
                wrong("its first bytes are not those of the model it was made from");
            }
            if shapes(header) != shapes(from) {
                wrong("it has other tensors than the model it was made from");
            }
            let left =
                |tensor: &&Tensor| QUANTIZED.iter().any(|part| tensor.name.ends_with(part)) && type_of(tensor) != *kind;
            if let Some(tensor) = header.tensors.iter().find(left) {
                wrong(&format!("`{}` is {}, not {kind}: it was not quantized", tensor.name, type_of(tensor)));
            }
        }
        (Work::Convert { .. }, _) if header.magic != Magic::Pwri => wrong("its first bytes are not `PWRI`"),
        _ => {}
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::powerinfer::tests::{DENSE, SPARSE, header};
    use crate::engine::powerinfer::tiny::Tiny;

    fn quantized(model: &Tiny) -> Header {
        let mut header = header(model);
        for tensor in &mut header.tensors {
            if tensor.shape.len() > 1 {
                tensor.kind = 2;
            }
        }
        header
    }

    #[test]
    fn what_was_not_quantized_is_no_result() {
        for model in [&*SPARSE, &*DENSE] {
            let from = header(model);
            let none = Path::new("");
            let work = Work::Quantize { kind: "Q4_0", input: none, artifact: none };
            let ask = DeriveRequest { work, commit: None, output: none, scratch: none, threads: 1 };
            let said = |header: &Header| -> Vec<String> {
                compare(&ask, header, model.size_bytes(), Some(&from))
                    .into_iter()
                    .map(|finding| finding.message)
                    .collect()
            };
            assert_eq!(said(&quantized(model)), [""; 0]);
            assert!(said(&from)[0].contains("is F16, not Q4_0"), "{:?}", said(&from));
            for part in QUANTIZED {
                let mut partly = quantized(model);
                let Some(left) = partly.tensors.iter_mut().find(|tensor| tensor.name.ends_with(part)) else { continue };
                left.kind = 1;
                assert!(said(&partly)[0].contains(part), "{:?}", said(&partly));
            }
            let mut other = quantized(model);
            other.tensors[0].shape[0] += 1;
            assert!(said(&other)[0].contains("other tensors"), "{:?}", said(&other));
        }
    }
}
