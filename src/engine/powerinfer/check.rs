//! Errors and warnings that can be found before the engine is started. PowerInfer itself checks little: a truncated file,
//! an unsupported tensor type or the statistics of another model give wrong answers and exit code 0.

mod gpu;

use super::{chat, launch, model, wire};
use crate::base::commit::Commit;
use crate::base::name::{Name, RelPath};
use crate::base::platform::Variant;
use crate::engine::conversation::{Message, Prompt, Role, Sampling};
use crate::engine::finding::{self, Finding, error, warning};
use crate::engine::gguf::{Gguf, of_extents};
use crate::engine::{CheckRequest, EngineError};
use crate::format::gguf::{Header, Tensor};
use crate::format::policy::Policy;

/// `llm_load_sparse_model_tensors`.
const SPARSE: &[&str] = &["llama", "bamboo", "refact", "falcon", "opt"];
/// `llama_build_graph`.
const DENSE: &[&str] =
    &["llama", "bamboo", "baichuan", "falcon", "starcoder", "persimmon", "refact", "bloom", "mpt", "stablelm", "opt"];
/// Types of weights in the ggml of that time: F32, F16, Q4_0 to Q8_1, Q2_K to Q8_K. It does not check others.
const TYPES: &[u32] = &[0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
/// F16 and Q4_0: any other `ffn_down_t` is computed as if it were F16. On a GPU no tensor of a neuron may have another type:
/// the process aborts.
const NEURON_TYPES: &[u32] = &[1, 2];
/// With fewer neurons PowerInfer uses another code path, which writes one row past the end.
const FEWEST_NEURONS: u64 = 1000;
/// The commit that these checks are based on: still the head of its main branch.
const MAIN: &str = "d3ebd7c5666348cf43c22f0d62dfbc9a763cffb8";
const NO_EXPERTS: &str = "the model is a mixture of experts, which PowerInfer's main branch does not load";
const EXPERTS_HINT: &str = "commit 09d79ec0ac0c1d494cdf535504c6712294c359c1 of its branch `feat-moe` may load it: \
    use it as the source of an engine, and convert the weights yourself: no GGUF is published";
const QUANTIZE_HINT: &str = "quantize the F16 file again with PowerInfer's own `quantize`, to `Q4_0`";
/// Requests that its server reads at a time.
const CONNECTIONS: u32 = 8;
/// Tokens that end a turn in chat models. PowerInfer stops at the end-of-text token alone.
const TURN_ENDS: &[&str] = &["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>"];

pub(super) fn all(of: &Gguf, ask: &CheckRequest<'_>) -> Vec<Finding> {
    let [header] = of.headers.as_slice() else {
        let message = format!("the weights have {} parts, and PowerInfer loads a single file", of.headers.len());
        return vec![error("", message, Some("choose a model that is not split"))];
    };
    let mut found = of_model(of.size_bytes(), ask.commit, header);
    found.extend(gpu::of_build(of, ask));
    found.extend(gpu::of_gpus(of, ask));
    found.extend(of_threads(ask, header));
    found.extend(of_context(ask, header));
    found.extend(of_sampling(ask, header));
    found.extend(of_template(ask, header));
    found.extend(of_memory(of, ask));
    found
}

/// Mixtures of experts, by what a policy calls its model.
pub(super) fn of_name(policy: &Policy) -> Option<Finding> {
    let audit = &policy.audit;
    let names = [
        policy.model.as_ref().map(Name::as_str),
        policy.model_path.as_ref().map(RelPath::as_str),
        audit.source_repo.as_deref(),
        audit.model_version.as_deref(),
    ];
    let named = |name: &str| ["mixtral", "moe"].iter().any(|word| name.to_lowercase().contains(word));
    names.into_iter().flatten().any(named).then(|| warning("engine", NO_EXPERTS, Some(EXPERTS_HINT)))
}

/// Findings about the model itself, whose file has `size` bytes, for a commit of the engine.
pub(super) fn of_model(size: u64, commit: Option<Commit>, header: &Header) -> Vec<Finding> {
    let sparse = model::is_sparse(header);
    let known = if sparse { SPARSE } else { DENSE };
    let Some(name) = header.architecture().filter(|name| known.contains(name)) else {
        let name = header.architecture().unwrap_or("none");
        let kind = if sparse { "sparse" } else { "dense" };
        let message =
            format!("PowerInfer cannot load a {kind} model of architecture `{name}`: it supports {}", known.join(", "));
        return vec![error("", message, Some("for other models use an engine whose adapter is `llama-cpp`"))];
    };
    if header.architecture_uint("expert_count").unwrap_or(0) > 0 {
        return vec![of_experts(commit)];
    }
    let mut found = Vec::new();
    let missing = missing(header, name, sparse);
    if !missing.is_empty() {
        let (first, more) = (missing[0].as_str(), missing.len() - 1);
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        let hint = match first {
            "output.weight" => {
                "convert the model with a separate output tensor: PowerInfer does not support tied embeddings"
            }
            _ if sparse => "this needs PowerInfer's own conversion, with predictors: its `convert.py`",
            _ => "a sparse model's file begins with `PWRI`, a dense one's with `GGUF`",
        };
        found.push(error("", format!("the model lacks `{first}`{more}"), Some(hint)));
    }
    found.extend(of_tensors(size, header));
    found.extend(of_vocabulary(header));
    if sparse {
        found.extend(of_neurons(header));
    }
    found
}

/// Other commits may load them; they were not examined.
fn of_experts(commit: Option<Commit>) -> Finding {
    match commit {
        Some(commit) if commit.to_string() != MAIN => warning(
            "",
            format!("the model is a mixture of experts: it is not known whether commit {commit} can run it"),
            None,
        ),
        _ => error("", NO_EXPERTS, Some(EXPERTS_HINT)),
    }
}

/// The tensors that PowerInfer asks for and the header lacks.
fn missing(header: &Header, architecture: &str, sparse: bool) -> Vec<String> {
    let layers = header.block_count().unwrap_or(0).min(header.tensors.len() as u64);
    let (whole, parts): (&[&str], &[&str]) = match (sparse, architecture) {
        (true, "falcon") => {
            (&["token_embd", "output_norm", "output"], &["attn_norm", "attn_qkv", "attn_output", "ffn_up"])
        }
        (true, "opt") => (&["token_embd", "position_embd", "output_norm"], &["attn_q", "attn_k", "attn_v", "ffn_up"]),
        (true, _) => (
            &["token_embd", "output_norm", "output"],
            &["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up"],
        ),
        (false, "opt") => (&["token_embd"], &[]),
        (false, _) => (&["token_embd", "output"], &["ffn_down"]),
    };
    let predictors: &[&str] = if sparse { &["ffn_down_t", "fc1", "fc2"] } else { &[] };
    let of_layer = |layer| parts.iter().chain(predictors).map(move |part| format!("blk.{layer}.{part}.weight"));
    let there = model::by_name(header);
    let wanted = whole.iter().map(|name| format!("{name}.weight")).chain((0..layers).flat_map(of_layer));
    wanted.filter(|name| !there.contains_key(name.as_str())).collect()
}

fn of_tensors(size: u64, header: &Header) -> Vec<Finding> {
    let mut found = Vec::new();
    found.extend(of_extents(header, size, ""));
    if let Some(tensor) = header.tensors.iter().find(|tensor| !TYPES.contains(&tensor.kind)) {
        let message = format!("{} has a type that PowerInfer does not support", named(tensor));
        found.push(error("", message, Some("use weights in F16 or Q4_0")));
    }
    if let Some(tensor) = of_no_neuron_type(header, &["ffn_down_t"]) {
        let message =
            format!("{} must be F16 or Q4_0: PowerInfer computes wrong results with any other type", named(tensor));
        found.push(error("", message, Some(QUANTIZE_HINT)));
    }
    found
}

fn named(tensor: &Tensor) -> String {
    let kind = tensor.tensor_type().map_or_else(|| format!("type {}", tensor.kind), |kind| kind.name.to_owned());
    format!("`{}` ({kind})", tensor.name)
}

/// The first tensor of these parts that has another type than [`NEURON_TYPES`].
fn of_no_neuron_type<'a>(header: &'a Header, parts: &[&str]) -> Option<&'a Tensor> {
    let is_part = |tensor: &Tensor| parts.iter().any(|part| tensor.name.ends_with(&format!(".{part}.weight")));
    header.tensors.iter().find(|tensor| !NEURON_TYPES.contains(&tensor.kind) && is_part(tensor))
}

/// The tokens that begin and end a text, and those that are parts of characters.
fn of_vocabulary(header: &Header) -> Vec<Finding> {
    let size = header.vocabulary_size().unwrap_or(0);
    let outside = |key: &&str| header.uint(key).is_some_and(|id| id >= size);
    let message = |key: &str| {
        let message = format!("`{key}` is not one of the {size} tokens of the vocabulary: PowerInfer uses its default");
        warning("", message, Some("convert the model again: its tokenizer does not match it"))
    };
    let mut found: Vec<Finding> = [model::BOS_KEY, model::EOS_KEY].into_iter().filter(outside).map(message).collect();
    if model::is_bytewise(header) {
        let message = "PowerInfer's server emits `\u{fffd}` for characters that are split across BPE tokens";
        found.push(warning(
            "",
            message,
            Some("for text other than plain English choose a model with a SentencePiece vocabulary"),
        ));
    }
    found
}

/// The shapes of each layer's neurons and predictor.
fn of_neurons(header: &Header) -> Vec<Finding> {
    let mut found = Vec::new();
    let layers = header.block_count().unwrap_or(0).min(header.tensors.len() as u64);
    let tensors = model::by_name(header);
    let shape = |layer: u64, part: &str| -> Option<[u64; 2]> {
        let shape = &tensors.get(format!("blk.{layer}.{part}.weight").as_str())?.shape;
        shape.as_slice().try_into().ok()
    };
    for layer in 0..layers {
        let Some(up @ [width, neurons]) = shape(layer, "ffn_up") else { continue };
        let fits = shape(layer, "ffn_down_t").is_none_or(|down| down == up)
            && shape(layer, "fc1").is_none_or(|first| first[0] == width)
            && shape(layer, "fc2").is_none_or(|second| second[1] == neurons)
            && shape(layer, "fc1").zip(shape(layer, "fc2")).is_none_or(|(first, second)| first[1] == second[0]);
        if !fits {
            let message =
                format!("layer {layer}: the predictor or `ffn_down_t` does not match {neurons} neurons of {width}");
            found.push(error("", message, Some("convert the model with the predictors that belong to it")));
            break;
        }
        if neurons <= FEWEST_NEURONS {
            let message = format!("layer {layer} has {neurons} neurons: PowerInfer needs more than {FEWEST_NEURONS}");
            found.push(warning("", message, None));
            break;
        }
    }
    found
}

fn of_threads(ask: &CheckRequest<'_>, header: &Header) -> Vec<Finding> {
    const KEY: &str = "runtime.threads";
    let mut found = Vec::new();
    let used = model::threads(ask.policy, header, ask.variant, ask.cores);
    let asked = ask.policy.runtime.threads;
    if let Some(asked) = asked.filter(|asked| *asked > used) {
        let message = format!("{asked} threads on {} cores would wait for each other: {used} are used", ask.cores);
        found.push(warning(KEY, message, Some("remove it to use every core")));
    }
    if let Some(asked) = asked.filter(|asked| *asked < used) {
        let message = format!("a sparse model on a GPU needs {used} threads at least, not {asked}: {used} are used");
        found.push(warning(KEY, message, None));
    }
    let greedy = ask.policy.generation.temperature == Some(0.0);
    if model::is_sparse(header) && greedy && used > 1 {
        let message =
            "with more than one thread a sparse model's answers differ from run to run, also at temperature 0";
        let hint = "`threads: 1` on a build `cpu` gives the same answer every time";
        found.push(warning(KEY, message, Some(hint)));
    }
    found
}

fn of_context(ask: &CheckRequest<'_>, header: &Header) -> Vec<Finding> {
    let runtime = &ask.policy.runtime;
    let size = model::context_size(ask.policy, header);
    let mut found = finding::of_context(ask.policy, size, header.context_length());
    if let Some(batch) = runtime.batch_size.filter(|batch| *batch > model::BATCH) {
        let message = format!("PowerInfer's server processes at most {} tokens at a time, not {batch}", model::BATCH);
        found.push(warning("runtime.batch_size", message, None));
    }
    if let Some(parallel) = runtime.parallel.filter(|parallel| *parallel > CONNECTIONS) {
        let message = format!("PowerInfer's server reads {CONNECTIONS} requests at a time, not {parallel}");
        found.push(error("runtime.parallel", message, Some(&format!("use {CONNECTIONS} or less"))));
    } else if runtime.parallel.unwrap_or(1) > 1 {
        let message = "PowerInfer's server starts a prompt only when no answer is being generated: requests take turns";
        found.push(warning("runtime.parallel", message, None));
    }
    found
}

fn of_sampling(ask: &CheckRequest<'_>, header: &Header) -> Vec<Finding> {
    let mut found = Vec::new();
    let generation = &ask.policy.generation;
    if let Err(EngineError::Policy { key, why }) = wire::sampling(&Sampling::new(ask.policy, 0)) {
        found.push(error(key, why, None));
    }
    if generation.seed.is_some() && generation.temperature != Some(0.0) {
        let message = "PowerInfer's server ignores the seed: answers cannot be reproduced";
        found.push(warning("generation.seed", message, Some("`temperature: 0` is greedy decoding")));
    }
    if let Some(stop) = generation.stop.iter().find(|stop| header.special_tokens.contains_key(*stop)) {
        let message = format!("`{stop}` is a special token, which never appears in an answer's text");
        found.push(warning("generation.stop", message, Some("use a text that follows it")));
    }
    found
}

fn of_template(ask: &CheckRequest<'_>, header: &Header) -> Vec<Finding> {
    const KEY: &str = "generation.chat_template";
    let generation = &ask.policy.generation;
    let system = generation.system_prompt.as_ref().map(|text| Message::new(Role::System, text));
    let messages = system.into_iter().chain([Message::new(Role::User, "hello")]).collect();
    match chat::parts(ask.policy, header, &Prompt::Messages(messages)) {
        Err(EngineError::Policy { key, why }) => {
            let hint = "give `generation.chat_template`, or put the text into the prompt";
            return vec![error(key, why, Some(hint).filter(|_| key != KEY))];
        }
        Err(other) => return vec![error(KEY, other.to_string(), None)],
        Ok(_) if !chat::has_template(ask.policy, header).unwrap_or(false) => {
            return finding::of_missing_template(ask.policy, None).into_iter().collect();
        }
        Ok(_) => {}
    }
    let eos = model::eos(header);
    let ends = TURN_ENDS.iter().filter(|end| header.special_tokens.get(**end).is_some_and(|id| Some(*id) != eos));
    let message = |end: &&str| {
        let message = format!("the model may end its turns with `{end}`, at which PowerInfer does not stop");
        warning("generation.stop", message, Some("use the text that follows, or a model whose end-of-text token it is"))
    };
    if chat::stops(&generation.stop, ask.policy, header).is_empty() {
        ends.take(1).map(message).collect()
    } else {
        vec![]
    }
}

fn of_memory(of: &Gguf, ask: &CheckRequest<'_>) -> Option<Finding> {
    let (header, machine) = (of.header(), ask.memory_bytes?);
    // On a GPU a part of it lies there instead; how much, the budget says for sparse models alone.
    let elsewhere = match ask.variant {
        Variant::Cpu => 0.0,
        _ if model::is_sparse(header) => ask.policy.runtime.vram_budget_gb.unwrap_or(0.0).clamp(0.0, 100_000.0),
        _ => return None,
    };
    let elsewhere = (elsewhere * f64::from(1 << 30)) as u64;
    finding::of_memory(of.size_bytes(), model::cache_bytes(ask.policy, header), machine, elsewhere)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::accelerator::Gpu;
    use crate::engine::powerinfer::tests::{DENSE, SPARSE, header, policy};
    use crate::engine::powerinfer::tiny::Tiny;
    use crate::format::gguf::Value;

    type Found = Vec<(bool, &'static str, String)>;

    fn ask(policy: &Policy, variant: Variant) -> CheckRequest<'_> {
        CheckRequest { policy, variant, cores: 4, memory_bytes: Some(1 << 30), gpus: None, commit: None }
    }

    fn model(headers: Vec<Header>, sizes: &[u64], beside: &[&str]) -> Gguf {
        let beside = beside.iter().map(|file| file.parse().unwrap()).collect();
        Gguf { weights: std::path::PathBuf::new(), headers, sizes: sizes.to_vec(), beside }
    }

    fn found(model: &Tiny, text: &str, variant: Variant, change: impl FnOnce(&mut Header)) -> Found {
        let mut header = header(model);
        change(&mut header);
        let policy = policy(text);
        let whole = self::model(vec![header], &[model.size_bytes()], &["activation/activation_0.pt"]);
        all(&whole, &ask(&policy, variant))
            .into_iter()
            .map(|finding| (finding.error, finding.key, finding.message))
            .collect()
    }

    fn keys(found: &Found) -> Vec<(bool, &'static str)> {
        found.iter().map(|(error, key, _)| (*error, *key)).collect()
    }

    /// What every policy below says beside what it is about.
    const QUIET: &str = "chat_template: none, max_tokens: 100";

    #[test]
    fn each_doubt_is_said_with_its_key() {
        use Variant::{Cpu, Cuda};
        type Row<'a> = (&'a Tiny, Variant, &'a str, &'a str, &'a [(bool, &'a str)]);
        let table: [Row<'_>; 17] = [
            (&SPARSE, Cpu, "", "", &[]),
            (&DENSE, Cuda, "gpu_layers: 9", "", &[]),
            (&SPARSE, Cuda, "vram_budget_gb: 1", "", &[]),
            (&SPARSE, Cuda, "vram_budget_gb: 1, gpu_layers: 32", "", &[(false, "runtime.gpu_layers")]),
            (&SPARSE, Cuda, "", "", &[(false, "runtime.vram_budget_gb")]),
            (&SPARSE, Cuda, "vram_budget_gb: 0.0001", "", &[(false, "runtime.vram_budget_gb")]),
            (&DENSE, Cuda, "vram_budget_gb: 1", "", &[(false, "runtime.vram_budget_gb")]),
            (
                &SPARSE,
                Cpu,
                "vram_budget_gb: 1, gpu_layers: 1",
                "",
                &[(false, "runtime.gpu_layers"), (false, "runtime.vram_budget_gb")],
            ),
            (&SPARSE, Cpu, "threads: 8", "", &[(false, "runtime.threads")]),
            (&SPARSE, Cuda, "threads: 1, vram_budget_gb: 1", "", &[(false, "runtime.threads")]),
            (&SPARSE, Cpu, "threads: 2", "temperature: 0", &[(false, "runtime.threads")]),
            (&SPARSE, Cpu, "threads: 1", "temperature: 0, seed: 1", &[]),
            (&SPARSE, Cpu, "context_size: 1024", "", &[(false, "runtime.context_size")]),
            (&SPARSE, Cpu, "batch_size: 1024, context_size: 101", "", &[(false, "runtime.batch_size")]),
            (&SPARSE, Cpu, "parallel: 2", "", &[(false, "runtime.parallel")]),
            (&SPARSE, Cpu, "parallel: 9", "", &[(true, "runtime.parallel")]),
            (
                &SPARSE,
                Cpu,
                "context_size: 100",
                "seed: 1, stop: ['</s>']",
                &[(false, "generation.max_tokens"), (false, "generation.seed"), (false, "generation.stop")],
            ),
        ];
        for (model, variant, runtime, generation, expected) in table {
            let text = format!(
                "runtime: {{{runtime}}}\ngeneration: {{{QUIET}{}{generation}}}",
                if generation.is_empty() { "" } else { ", " }
            );
            let all = found(model, &text, variant, |_| ());
            assert_eq!(keys(&all), expected, "{text}: {all:?}");
        }
    }

    #[test]
    fn templates() {
        let of = |text: &str, change: fn(&mut Header)| {
            found(&SPARSE, &format!("generation: {{max_tokens: 9{text}}}"), Variant::Cpu, change)
        };
        let key = "generation.chat_template";
        assert_eq!(keys(&of("", |_| ())), [(false, key)]);
        assert_eq!(keys(&of(", chat_template: chatlm", |_| ())), [(true, key)]);
        assert_eq!(keys(&of(", system_prompt: x", |_| ())), [(true, "generation.system_prompt")]);
        assert_eq!(keys(&of(", chat_template: chatml", |_| ())), []);
        let own = |header: &mut Header| {
            let template = Value::Text("{{ messages[0].content }}<|im_end|>".to_owned());
            header.metadata.insert("tokenizer.chat_template".to_owned(), template);
        };
        let unending = of("", own);
        assert_eq!(keys(&unending), [(false, "generation.stop")]);
        assert!(unending[0].2.contains("<|im_end|>"));
        assert_eq!(keys(&of(", stop: [x]", own)), []);
    }

    #[test]
    fn each_wrong_model_is_named() {
        let quiet = format!("generation: {{{QUIET}}}");
        let one = |model: &Tiny, change: &dyn Fn(&mut Header)| {
            let all = found(model, &quiet, Variant::Cpu, change);
            assert_eq!(all.len(), 1, "{all:?}");
            (all[0].0, all[0].2.clone())
        };
        let set = |header: &mut Header, key: &str, value: Value| drop(header.metadata.insert(key.to_owned(), value));
        let named =
            |header: &mut Header, name: &str| header.tensors.iter().position(|tensor| tensor.name == name).unwrap();
        type Change<'a> = &'a dyn Fn(&mut Header);
        let arch = |name: &'static str| {
            move |header: &mut Header| set(header, "general.architecture", Value::Text(name.to_owned()))
        };
        let without = |name: &'static str| {
            move |header: &mut Header| {
                let at = named(header, name);
                header.tensors.remove(at);
            }
        };
        let typed = |name: &'static str, kind: u32| {
            move |header: &mut Header| {
                let at = named(header, name);
                header.tensors[at].kind = kind;
            }
        };
        let shaped = |name: &'static str, shape: [u64; 2]| {
            move |header: &mut Header| {
                let at = named(header, name);
                header.tensors[at].shape = shape.to_vec();
            }
        };
        let table: [(&Tiny, Change<'_>, &str); 12] = [
            (&SPARSE, &arch("qwen2"), "`qwen2`"),
            (&SPARSE, &arch("baichuan"), "cannot load a sparse model of architecture `baichuan`"),
            (&DENSE, &arch("gpt2"), "cannot load a dense model of architecture `gpt2`"),
            (&SPARSE, &|header| drop(header.metadata.remove("general.architecture")), "`none`"),
            (&SPARSE, &|header| set(header, "llama.expert_count", Value::Uint(8)), "mixture of experts"),
            (&DENSE, &without("output.weight"), "lacks `output.weight`"),
            (&SPARSE, &without("blk.1.fc2.weight"), "lacks `blk.1.fc2.weight`"),
            (&SPARSE, &typed("blk.1.ffn_down_t.weight", 8), "must be F16 or Q4_0"),
            (&SPARSE, &typed("output.weight", 19), "does not support"),
            (&SPARSE, &shaped("blk.0.fc1.weight", [64, 33]), "layer 0"),
            (&SPARSE, &|header| header.data_offset += 64, "cut off"),
            (&DENSE, &|header| header.tensors[3].offset = u64::MAX, "cut off"),
        ];
        for (model, change, why) in table {
            let (error, message) = one(model, change);
            assert!(error && message.contains(why), "{why}: {message}");
        }
        for key in [model::BOS_KEY, model::EOS_KEY] {
            let (error, message) = one(&SPARSE, &|header| set(header, key, Value::Uint(400_000)));
            assert!(!error && message.contains(key), "{message}");
        }
        let (error, message) =
            one(&SPARSE, &|header| set(header, "tokenizer.ggml.model", Value::Text("gpt2".to_owned())));
        assert!(!error && message.contains("split across BPE tokens"), "{message}");
        let mut experts = header(&SPARSE);
        experts.metadata.insert("llama.expert_count".to_owned(), Value::Uint(8));
        let policy = policy(&quiet);
        let other = CheckRequest {
            commit: Some("09d79ec0ac0c1d494cdf535504c6712294c359c1".parse().unwrap()),
            ..ask(&policy, Variant::Cpu)
        };
        assert!(
            all(&model(vec![experts], &[1 << 30], &[]), &other).iter().all(|finding| !finding.error),
            "another commit may load them"
        );
        let swapped = |header: &mut Header| header.magic = crate::format::gguf::Magic::Pwri;
        let all = found(&DENSE, &quiet, Variant::Cpu, swapped);
        assert!(all[0].0 && all[0].2.contains("ffn_down_t"), "a dense model that says it is sparse: {all:?}");
    }

    /// What is said of a model without statistics on GPUs with so many GiB, all and free.
    fn on_gpus(model: &Tiny, runtime: &str, gpus: &[(f64, f64)]) -> Vec<(bool, &'static str, String)> {
        let bytes = |gib: f64| (gib * f64::from(1 << 30)) as u64;
        let gpu = |(all, free): &(f64, f64)| Gpu {
            name: String::new(),
            vram_bytes: bytes(*all),
            free_bytes: bytes(*free),
            compute_capability: (9, 0),
            driver: String::new(),
        };
        let policy = policy(&format!("runtime: {{{runtime}}}\ngeneration: {{{QUIET}}}"));
        let gpus: Vec<_> = gpus.iter().map(gpu).collect();
        let ask = CheckRequest { gpus: Some(&gpus), ..ask(&policy, Variant::Cuda) };
        let model = self::model(vec![header(model)], &[model.size_bytes()], &[]);
        all(&model, &ask).into_iter().map(|found| (found.error, found.key, found.message)).collect()
    }

    /// The processor computes the predicted rows of any type, a GPU ends the process.
    #[test]
    fn neurons_on_a_gpu_have_one_of_two_types() {
        for part in ["ffn_gate", "ffn_up"] {
            let of = |runtime: &str, variant, kind: u32| {
                let text = format!("runtime: {{{runtime}}}\ngeneration: {{{QUIET}}}");
                found(&SPARSE, &text, variant, |header| {
                    let name = format!("blk.1.{part}.weight");
                    header.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap().kind = kind;
                })
            };
            let (budget, key) = ("vram_budget_gb: 1", "runtime.vram_budget_gb");
            let refused = of(budget, Variant::Cuda, 8);
            assert_eq!(keys(&refused), [(true, key)], "{refused:?}");
            assert!(refused[0].2.contains(&format!("`blk.1.{part}.weight` (Q8_0) must be F16 or Q4_0")), "{refused:?}");
            assert_eq!(of(budget, Variant::Cuda, 2), []);
            assert_eq!(keys(&of("", Variant::Cuda, 8)), [(false, key)], "no neuron goes there");
            assert_eq!(of("", Variant::Cpu, 8), []);
        }
    }

    #[test]
    fn what_lies_beside_a_model_and_what_the_gpus_have() {
        let of = |model: &Tiny, runtime: &str, gpus: &[f64]| {
            let gpus: Vec<(f64, f64)> = gpus.iter().map(|gib| (*gib, *gib)).collect();
            keys(&on_gpus(model, runtime, &gpus))
        };
        let key = "runtime.vram_budget_gb";
        assert_eq!(of(&SPARSE, "vram_budget_gb: 1", &[2.0]), [(false, key)], "no statistics");
        assert_eq!(of(&SPARSE, "vram_budget_gb: 1.5", &[2.0]), [(false, key), (true, key)]);
        assert_eq!(of(&SPARSE, "vram_budget_gb: 1.5", &[2.0, 2.0]), [(false, key), (true, key)], "it lies on one");
        assert_eq!(of(&SPARSE, "vram_budget_gb: 1", &[]), [(false, key), (true, "runtime.variant")]);
        assert_eq!(of(&DENSE, "gpu_layers: 9", &[]), []);
        assert_eq!(of(&DENSE, "gpu_layers: 9", &[0.801]), [(true, "runtime.gpu_layers")]);
        assert_eq!(of(&DENSE, "gpu_layers: 9", &[0.801, 0.81]), [], "it is shared out");
        assert_eq!(of(&DENSE, "gpu_layers: 0", &[0.7]), []);
    }

    /// F16 took up to 0.79 GiB beside its budget on an H100, Q4_0 up to 0.85 GiB.
    #[test]
    fn gpu_memory_in_use_and_long_contexts_count() {
        let key = "runtime.vram_budget_gb";
        let of = |runtime: &str, gpus: &[(f64, f64)]| on_gpus(&SPARSE, runtime, gpus).split_off(1);
        let (short, long) =
            ("vram_budget_gb: 1, context_size: 504", "vram_budget_gb: 1, context_size: 504, parallel: 8");
        assert_eq!(keys(&of("vram_budget_gb: 0.4", &[(1.19, 1.19)])), [(true, key)]);
        assert_eq!(of(short, &[(1.81, 1.81)]), []);
        // 4,096 tokens, 512 at once, 2 heads, 4 bytes: 16 MiB.
        let told = of(long, &[(1.81, 1.81)]);
        assert!(told.iter().any(|(error, named, _)| *error && *named == key), "{told:?}");
        let told = of(short, &[(80.0, 1.0), (80.0, 1.5)]);
        assert_eq!(keys(&told), [(false, key)]);
        assert!(told[0].2.contains("1.8 GiB of GPU memory are needed") && told[0].2.contains("1.5 GiB are free"));
    }

    #[test]
    fn split_and_large_models() {
        let header = header(&SPARSE);
        let policy = policy(&format!("generation: {{{QUIET}}}"));
        let of =
            |headers: &[Header], sizes: &[u64]| all(&model(headers.to_vec(), sizes, &[]), &ask(&policy, Variant::Cpu));
        assert!(of(&[header.clone(), header.clone()], &[1, 1])[0].message.contains("2 parts"));
        let large = of(&[header], &[2 << 30]);
        assert!(!large[0].error && large[0].message.contains("2.0 GiB"), "{large:?}");
    }

    #[test]
    fn a_mixture_of_experts_is_told_by_its_name() {
        let named = |text: &str| of_name(&policy(text)).map(|found| found.hint.unwrap());
        assert!(named("audit: {source_repo: 'hf://PowerInfer/TurboSparse-Mixtral'}").unwrap().contains("09d79ec0ac0c"));
        assert_eq!(named("audit: {source_repo: 'hf://PowerInfer/Bamboo-DPO-v0.1-gguf'}"), None);
    }

    /// The policies that this repository comes with say layers and a budget in one.
    #[test]
    fn example_policies_pass() {
        for name in ["bamboo-7b-dpo", "prosparse-llama2-7b", "relu-llama-7b"] {
            let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
            let path = root.join(format!("configs/models/powerinfer/{name}.yaml"));
            let bytes = crate::base::fs::read_bounded(&path, 1 << 20).unwrap();
            let policy = crate::format::policy::parse(name, &bytes).unwrap().0.value;
            for variant in [Variant::Cpu, Variant::Cuda] {
                let all = all(&model(vec![header(&SPARSE)], &[SPARSE.size_bytes()], &[]), &ask(&policy, variant));
                assert!(all.iter().all(|finding| !finding.error), "{name}: {all:?}");
            }
        }
    }
}
