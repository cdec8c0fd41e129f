//! Errors and warnings that can be found before the engine is started. Pure: headers and numbers in, findings out.

use super::{LlamaModel, context_size};
use crate::base::platform::Variant;
use crate::engine::CheckRequest;
use crate::engine::finding::{self, Finding, error, warning};
use crate::engine::gguf::{Gguf, chat_template, of_extents};
use crate::format::gguf::{Header, Magic};

/// `LLM_ARCH_NAMES` of `src/llama-arch.cpp` that answer prompts. A newer tree may know more: an unknown one is a warning.
const ARCHITECTURES: &str = "llama llama4 deci falcon grok gpt2 gptj gptneox mpt baichuan starcoder refact bloom stablelm \
    qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3next qwen3vl qwen3vlmoe qwen35 qwen35moe qwen4exp phi2 phi3 phimoe \
    plamo plamo2 plamo3 codeshell orion internlm2 minicpm minicpm3 gemma gemma2 gemma3 gemma3n gemma4 starcoder2 mamba \
    mamba2 maple jamba falcon-h1 xverse command-r cohere2 cohere2moe dbrx olmo olmo2 olmoe muse-glimmer openelm arctic \
    deepseek deepseek2 deepseek2-ocr deepseek32 deepseek4 chatglm glm4 glm4moe glm-dsa bitnet t5 jais jais2 nemotron \
    nemotron_h nemotron_h_moe exaone exaone4 exaone-moe rwkv6 rwkv6qwen2 rwkv7 arwkv7 granite granitemoe granitehybrid \
    graniteswitch granite_swa chameleon plm bailingmoe bailingmoe2 bailingmoe3 dots1 dots3note arcee afmoe laguna \
    ernie4_5 ernie4_5-moe hunyuan-moe hunyuan-dense hunyuan_vl hy_v3 hy_v4 smollm3 gpt-oss lfm2 lfm2moe dream \
    smallthinker llada llada-moe seed_oss grovemoe apertus minimax-01 hrm_text minimax-m2 minimax-m3 cogvlm rnd1 \
    pangu-embedded mistral3 mistral4 paddleocr mimo2 step35 spark2_5 maincoder kimi-linear kimi-k3 glm5-next talkie \
    mellum nanbeige";

/// Architectures that llama.cpp loads but that do not generate text.
const NOT_FOR_PROMPTS: &str = "clip bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 \
    eurobert gemma-embedding gemma4-assistant t5encoder wavtokenizer-dec eagle3 dflash llama-embed qwen3tts pockettts";

pub(super) fn all(model: &LlamaModel, ask: &CheckRequest<'_>) -> Vec<Finding> {
    let header = model.0.header();
    if header.magic == Magic::Pwri {
        let hint = "use an engine whose adapter is `powerinfer`";
        return vec![error("engine", "the weights are a PowerInfer model, which llama.cpp cannot load", Some(hint))];
    }
    let mut found = Vec::new();
    found.extend(of_architecture(header));
    found.extend(of_parts(&model.0));
    found.extend(of_context(ask, header));
    found.extend(of_accelerator(ask, header));
    found.extend(of_threads(ask));
    found.extend(of_template(ask, header));
    found.extend(of_memory(model, ask));
    found
}

fn of_architecture(header: &Header) -> Option<Finding> {
    let Some(name) = header.architecture() else {
        return Some(error("", "the model file does not state its architecture (`general.architecture`)", None));
    };
    if NOT_FOR_PROMPTS.split_whitespace().any(|other| other == name) {
        let hint = "choose a model that generates text";
        return Some(error("", format!("a model of architecture `{name}` does not generate text"), Some(hint)));
    }
    if ARCHITECTURES.split_whitespace().any(|known| known == name) {
        return None;
    }
    let message = format!("this llama.cpp may not support architecture `{name}`");
    Some(warning("", message, Some("a newer llama.cpp may: `aitools lock --upgrade`")))
}

/// Split models: every part, in order, of one split, and each as long as its own header says.
fn of_parts(model: &Gguf) -> Vec<Finding> {
    let split = |header: &Header| header.split().map(|split| (split.number, split.count));
    let first = model.headers.first().and_then(Header::split);
    let count = first.map_or(1, |split| split.count);
    if count != model.headers.len() as u64 {
        let message = format!("the model has {count} parts, but only {} are present", model.headers.len());
        return vec![error("", message, Some("lock every part: `files = [\"*.gguf\"]`"))];
    }
    let mut found = Vec::new();
    for (number, (header, size)) in (0..).zip(model.headers.iter().zip(&model.sizes)) {
        let which = format!("part {} of {count}", number + 1);
        if count > 1 && split(header) != Some((number, count)) {
            let says = split(header)
                .map_or("not part of a split model".to_owned(), |(at, of)| format!("part {} of {of}", at + 1));
            found.push(error("", format!("{which} says that it is {says}"), None));
        }
        found.extend(of_extents(header, *size, &format!("{which}: ")));
    }
    let tensors: usize = model.headers.iter().map(|header| header.tensors.len()).sum();
    if let Some(expected) = first.and_then(|split| split.tensors).filter(|expected| *expected != tensors as u64) {
        found.push(error("", format!("the parts hold {tensors} tensors together, and should hold {expected}"), None));
    }
    found
}

fn of_context(ask: &CheckRequest<'_>, header: &Header) -> Vec<Finding> {
    let size = context_size(ask.policy, header);
    let mut found = finding::of_context(ask.policy, size, header.context_length());
    if let Some(batch) = ask.policy.runtime.batch_size.filter(|batch| *batch > size) {
        let message = format!("a batch of {batch} tokens is more than the context of {size}");
        found.push(warning("runtime.batch_size", message, None));
    }
    found
}

fn of_accelerator(ask: &CheckRequest<'_>, header: &Header) -> Vec<Finding> {
    let mut found = Vec::new();
    let runtime = &ask.policy.runtime;
    if runtime.vram_budget_gb.is_some() {
        let hint = "use `runtime.gpu_layers`, or remove both: then as many layers as fit are placed on the GPU";
        found.push(error("runtime.vram_budget_gb", "llama.cpp has no memory budget", Some(hint)));
    }
    let Some(layers) = runtime.gpu_layers.filter(|layers| *layers > 0) else { return found };
    if ask.variant == Variant::Cpu {
        let hint = "choose a variant: `runtime.variant: cuda`";
        found.push(warning("runtime.gpu_layers", "the build `cpu` has no accelerator to put layers on", Some(hint)));
    }
    // The output layer counts as one more.
    if let Some(blocks) = header.block_count()
        && u64::from(layers) > blocks.saturating_add(1)
        && layers < 99
    {
        let message = format!("the model has {blocks} layers (and its output); {layers} means all of them");
        found.push(warning("runtime.gpu_layers", message, None));
    }
    found
}

fn of_threads(ask: &CheckRequest<'_>) -> Option<Finding> {
    let threads = ask.policy.runtime.threads.filter(|threads| *threads > ask.cores)?;
    let message = format!("{threads} threads on {} cores are slower than one per core", ask.cores);
    Some(warning("runtime.threads", message, Some("remove it to use every core")))
}

fn of_template(ask: &CheckRequest<'_>, header: &Header) -> Vec<Finding> {
    let mut found = Vec::new();
    let generation = &ask.policy.generation;
    if chat_template(ask.policy, header).is_some() {
        return found;
    }
    if generation.system_prompt.is_some() {
        let hint = "give `generation.chat_template`, or put the text into the prompt";
        let message = "without a chat template there is no place for a system message";
        found.push(error("generation.system_prompt", message, Some(hint)));
    }
    let named = header.name().filter(|name| {
        let name = name.to_ascii_lowercase();
        ["instruct", "chat", "-it"].iter().any(|word| name.contains(word))
    });
    found.extend(finding::of_missing_template(ask.policy, named));
    found
}

fn of_memory(model: &LlamaModel, ask: &CheckRequest<'_>) -> Option<Finding> {
    let machine = ask.memory_bytes.filter(|_| ask.variant == Variant::Cpu)?;
    finding::of_memory(model.0.size_bytes(), model.cache_bytes(ask.policy), machine, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::llama_cpp::tests::{header, model, policy};
    use crate::format::gguf::Value;
    use crate::format::policy::Policy;

    fn ask(policy: &Policy) -> CheckRequest<'_> {
        let variant = Variant::Cpu;
        CheckRequest { policy, variant, cores: 2, memory_bytes: None, gpus: None, commit: None }
    }

    fn found(policy_text: &str, change: impl FnOnce(&mut Header)) -> Vec<(bool, &'static str, String)> {
        let mut header = header();
        change(&mut header);
        let policy = policy(policy_text);
        let ask = CheckRequest { memory_bytes: Some(8 << 30), ..ask(&policy) };
        all(&model(vec![header]), &ask)
            .into_iter()
            .map(|finding| (finding.error, finding.key, finding.message))
            .collect()
    }

    #[test]
    fn a_sound_model_has_no_findings() {
        assert_eq!(found("", |_| ()), []);
    }

    #[test]
    fn each_doubt_is_said_with_its_key() {
        let table: [(&str, bool, &str); 10] = [
            ("runtime: {context_size: 4096}", false, "runtime.context_size"),
            ("runtime: {batch_size: 4096}", false, "runtime.batch_size"),
            ("generation: {max_tokens: 2048}", false, "generation.max_tokens"),
            ("runtime: {gpu_layers: 10}", false, "runtime.gpu_layers"),
            ("runtime: {vram_budget_gb: 4}", true, "runtime.vram_budget_gb"),
            ("runtime: {threads: 3}", false, "runtime.threads"),
            ("generation: {chat_template: none, system_prompt: x}", true, "generation.system_prompt"),
            ("runtime: {parallel: 256, context_size: 2048}", false, "runtime.context_size"),
            ("generation: {chat_template: none}", false, ""),
            ("runtime: {threads: 2, gpu_layers: 0}", false, ""),
        ];
        for (text, error, key) in table {
            let all = found(text, |_| ());
            let expected = if key.is_empty() { vec![] } else { vec![(error, key)] };
            assert_eq!(
                all.iter().map(|(error, key, _)| (*error, *key)).collect::<Vec<_>>(),
                expected,
                "{text}: {all:?}"
            );
        }
    }

    #[test]
    fn each_wrong_model_is_named() {
        let set = |key: &'static str, value: Value| {
            move |header: &mut Header| drop(header.metadata.insert(key.to_owned(), value))
        };
        let one = |change: &dyn Fn(&mut Header)| {
            let all = found("", change);
            assert_eq!(all.len(), 1, "{all:?}");
            (all[0].0, all[0].2.clone())
        };
        assert!(one(&|header| header.magic = Magic::Pwri).1.contains("PowerInfer"));
        let arch = |name: &str| Value::Text(name.to_owned());
        let (error, message) = one(&|header| {
            set("general.architecture", arch("bert"))(header);
            header.metadata.insert("bert.context_length".to_owned(), Value::Uint(2048));
        });
        assert!(error && message.contains("`bert`"));
        let (error, message) = one(&|header| set("general.architecture", arch("zz9"))(header));
        assert!(!error && message.contains("`zz9`"));
        assert!(one(&|header| drop(header.metadata.remove("general.architecture"))).0);
        assert!(one(&|header| header.data_offset = 1900).1.contains("cut off"));
        assert!(one(&|header| header.tensors[0].offset = u64::MAX).1.contains("cut off"));
        let (error, message) = one(&|header| drop(header.metadata.remove("tokenizer.chat_template")));
        assert!(!error && message.contains("`Tiny Instruct` has no chat template"), "{message}");
    }
    fn split(parts: &[(u64, u64)], tensors: u64) -> Vec<String> {
        let headers: Vec<_> = parts
            .iter()
            .map(|(number, count)| {
                let mut header = header();
                let mut set = |key: &str, value| header.metadata.insert(key.to_owned(), Value::Uint(value));
                set("split.no", *number);
                set("split.count", *count);
                set("split.tensors.count", tensors);
                header
            })
            .collect();
        all(&model(headers), &ask(&policy(""))).into_iter().map(|finding| finding.message).collect()
    }

    #[test]
    fn parts_of_a_split_model() {
        assert_eq!(split(&[(0, 2), (1, 2)], 2), [""; 0]);
        assert_eq!(split(&[(0, 3), (1, 3)], 2), ["the model has 3 parts, but only 2 are present"]);
        assert_eq!(split(&[(0, 2), (0, 2)], 2), ["part 2 of 2 says that it is part 1 of 2"]);
        assert_eq!(split(&[(0, 2), (1, 4)], 2), ["part 2 of 2 says that it is part 2 of 4"]);
        assert_eq!(split(&[(0, 2), (1, 1)], 2), ["part 2 of 2 says that it is not part of a split model"]);
        assert_eq!(split(&[(0, 2), (1, 2)], 9), ["the parts hold 2 tensors together, and should hold 9"]);
    }
}
