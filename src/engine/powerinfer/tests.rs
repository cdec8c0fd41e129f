//! The adapter against an imitation of its server, one fault at a time, and (where one is there) against a real one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;

use super::imitation::{Fault, Script, Server};
use super::tiny::{self, Tiny};
use super::*;
use crate::base::fs;
use crate::engine::answer::{Answer, Generated};
use crate::engine::conversation::{Delta, Event, Finish, Message, Part, Piece, Prompt, Request, Role, Sampling};
use crate::format::gguf::Header;

pub(super) fn policy(text: &str) -> Policy {
    let text = format!("engine: powerinfer\nmodel: m\n{text}\n");
    crate::format::policy::parse("p.yaml", text.as_bytes()).unwrap().0.value
}

/// What the reader of such files says of it.
pub(super) fn header(model: &Tiny) -> Header {
    Header::parse(&model.head(), Some(model.size_bytes())).unwrap()
}

/// Made once: a few hundred thousand numbers.
pub(super) static SPARSE: LazyLock<Tiny> = LazyLock::new(Tiny::sparse);
pub(super) static DENSE: LazyLock<Tiny> = LazyLock::new(Tiny::dense);

const KEY: &str = "a key";

fn serve(pieces: &[&'static str], fault: Fault) -> (Server, Endpoint) {
    let server = Server::start(Script { alias: wire::alias(KEY), pieces: pieces.to_vec(), fault });
    let endpoint = Endpoint { port: server.port, key: KEY.to_owned() };
    (server, endpoint)
}

fn model(model: &Tiny) -> PowerInferModel {
    model_at(model, Path::new(""))
}

pub(super) fn model_at(model: &Tiny, weights: &Path) -> PowerInferModel {
    let (headers, sizes) = (vec![header(model)], vec![model.size_bytes()]);
    PowerInferModel(Arc::new(Gguf { weights: weights.to_owned(), headers, sizes, beside: Vec::new() }))
}

/// One answer, with `sink` called for each piece of text until it returns false.
async fn generate_within(
    endpoint: &Endpoint,
    text: &str,
    prompt: &str,
    wait: Duration,
    mut sink: impl FnMut(&str) -> bool,
) -> Result<Generated, EngineError> {
    let policy = policy(text);
    let request = Request::new(&policy, prompt, 7, Instant::now() + wait);
    let mut answer = Answer::new();
    let mut events = model(&SPARSE).connect(&policy, endpoint)?.generate(request);
    while let Some(event) = events.next().await {
        let event = event?;
        answer.push(&event)?;
        if let Event::Delta(Delta { piece: Piece::Text(text), .. }) = &event
            && !sink(text)
        {
            answer.cancel();
            break;
        }
    }
    answer.into_generated()
}

const LONG: Duration = Duration::from_secs(10);

async fn generate(endpoint: &Endpoint, text: &str) -> Result<Generated, EngineError> {
    generate_within(endpoint, text, "hi", LONG, |_| true).await
}

#[tokio::test]
async fn an_answer_with_all_its_numbers() {
    let (server, endpoint) = serve(&["Hel", "lo", " wörld", "", ""], Fault::None);
    let mut pieces = Vec::new();
    let sink = |text: &str| {
        pieces.push(text.to_owned());
        true
    };
    let answer = generate_within(&endpoint, "", "hi", LONG, sink).await.unwrap();
    assert_eq!(pieces, ["Hel", "lo", " wörld"]);
    assert_eq!((&*answer.text, answer.finish), ("Hello wörld", Finish::Stop));
    assert_eq!((answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens), (3, 5, Some(0)));
    // 3 steps took 30 ms there; the fourth is in the 30 ms of the prompt.
    assert_eq!((answer.prompt_ms, answer.decode_ms), (Some(20.0), Some(40.0)));
    let sent = &server.sent("/completion")[0];
    assert_eq!(sent["prompt"], serde_json::json!([1, 107, 108]), "the prompt as tokens, the first one too");
    assert_eq!(sent["n_predict"], 508, "512 of context less 3 of the prompt, less one");
    assert_eq!((&sent["stream"], &sent["repeat_penalty"]), (&true.into(), &1.0.into()));
}

#[tokio::test]
async fn answers_are_as_long_as_asked_for() {
    for limit in 1..=6 {
        let (server, endpoint) = serve(&["a"; 20], Fault::None);
        let answer = generate(&endpoint, &format!("generation: {{max_tokens: {limit}}}")).await.unwrap();
        assert_eq!(answer.text, "a".repeat(limit));
        assert_eq!((answer.completion_tokens, answer.finish), (limit as u64, Finish::Length), "{limit}");
        assert_eq!(server.sent("/completion")[0]["n_predict"], limit - 1);
    }
}

/// Everything its server would take from its own defaults (`launch_slot_with_data`), but for the seed, which it ignores, and
/// Mirostat's numbers, which is off.
#[tokio::test]
async fn no_default_of_the_engine_gets_into_a_request() {
    let (server, endpoint) = serve(&["a"], Fault::None);
    generate(&endpoint, "generation: {temperature: 0.5, top_p: 0.25, top_k: 7, max_tokens: 8, seed: 3}").await.unwrap();
    let expected = serde_json::json!({
        "prompt": [1, 107, 108], "n_predict": 7, "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.05,
        "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repeat_last_n": 64,
        "penalize_nl": false, "tfs_z": 1.0, "typical_p": 1.0, "mirostat": 0, "n_keep": 0, "n_probs": 0,
        "ignore_eos": false, "logit_bias": [], "grammar": "", "stop": [], "slot_id": -1, "cache_prompt": false,
        "stream": true,
    });
    assert_eq!(server.sent("/completion"), [expected]);
}

#[tokio::test]
async fn short_answers_end_for_the_right_reason() {
    type Row<'a> = (&'a [&'static str], Fault, u64, &'a str, u64, Finish);
    let table: [Row<'_>; 9] = [
        (&[""], Fault::None, 1, "", 1, Finish::Stop),
        (&["a", ""], Fault::None, 2, "a", 2, Finish::Stop),
        (&["a", "b", ""], Fault::None, 3, "ab", 3, Finish::Stop),
        (&["a", ""], Fault::None, 1, "a", 1, Finish::Length),
        // Tokens without a text that end nothing.
        (&["", "a", "b", "c", "d"], Fault::None, 1, "", 1, Finish::Length),
        (&["a", "", "", "b", "c"], Fault::None, 2, "a", 2, Finish::Length),
        (&["𝄞", "a"], Fault::Bytes, 1, "𝄞", 1, Finish::Length),
        (&["𝄞", "a"], Fault::Bytes, 2, "𝄞", 2, Finish::Length),
        (&["𝄞", "a", "b"], Fault::Bytes, 3, "𝄞a", 3, Finish::Length),
    ];
    for (pieces, fault, limit, text, tokens, finish) in table {
        let (_server, endpoint) = serve(pieces, fault);
        let answer = generate(&endpoint, &format!("generation: {{max_tokens: {limit}}}")).await.unwrap();
        let found = (&*answer.text, answer.completion_tokens, answer.finish);
        assert_eq!(found, (text, tokens, finish), "{pieces:?} of {limit}");
    }
}

#[tokio::test]
async fn answers_and_prompts_fit_the_context() {
    let (server, endpoint) = serve(&["a"; 20], Fault::None);
    generate(&endpoint, "runtime: {context_size: 9}").await.unwrap();
    assert_eq!(server.sent("/completion")[0]["n_predict"], 5, "9 less 3 of the prompt, less one");
    let long = generate_within(&endpoint, "runtime: {context_size: 9}", "123456789", LONG, |_| true).await;
    assert!(matches!(long, Err(EngineError::TooLong { prompt_tokens: 10, context_size: 9 })), "{long:?}");
    assert_eq!(server.sent("/completion").len(), 1);
}

#[tokio::test]
async fn stop_texts_end_an_answer_wherever_they_are_cut() {
    let table: [(&[&'static str], &str, Finish); 6] = [
        (&["a\nus", "er b", "c", "d", "e"], "a", Finish::Stop),
        (&["a", "\n", "user"], "a", Finish::Stop),
        (&["a\n", "us", ""], "a\nus", Finish::Stop),
        (&["a", "C#", ""], "aC#", Finish::Stop),
        (&["a##", "#b"], "a", Finish::Stop),
        (&["é\n\n", "user"], "é\n", Finish::Stop),
    ];
    for (pieces, expected, finish) in table {
        let (server, endpoint) = serve(pieces, Fault::None);
        let answer = generate(&endpoint, "generation: {stop: [\"\\nuser\", \"###\"]}").await.unwrap();
        assert_eq!((&*answer.text, answer.finish), (expected, finish), "{pieces:?}");
        assert_eq!(server.sent("/completion")[0]["stop"], serde_json::json!([]));
    }
}

#[tokio::test]
async fn a_busy_server_is_asked_again() {
    for fault in [Fault::Busy(4), Fault::BusyLine(4)] {
        let (server, endpoint) = serve(&["a", "b", "c", "d"], fault);
        assert_eq!(generate(&endpoint, "").await.unwrap().text, "abcd");
        assert_eq!(server.sent("/completion").len(), 5);
    }
    let (_server, endpoint) = serve(&["a"], Fault::Busy(u32::MAX));
    let never = generate_within(&endpoint, "", "hi", Duration::from_millis(100), |_| true).await;
    assert!(matches!(never, Err(EngineError::Timeout)), "{never:?}");
}

#[tokio::test]
async fn half_an_answer_is_none() {
    for fault in [Fault::Unfinished, Fault::Dies, Fault::Truncated, Fault::NoReason, Fault::NotJson] {
        let (_server, endpoint) = serve(&["a", "b", "c", "d", "e"], fault);
        let answer = generate(&endpoint, "").await;
        assert!(matches!(answer, Err(EngineError::Unanswered(_))), "{fault:?}: {answer:?}");
    }
    let (_server, endpoint) = serve(&[], Fault::NotFound);
    assert!(matches!(generate(&endpoint, "").await, Err(EngineError::Refused(why)) if why.contains("404")));
    let (_server, endpoint) = serve(&["a", "b", "c", "d"], Fault::Beside);
    let answer = generate(&endpoint, "").await;
    assert!(matches!(answer, Err(EngineError::Foreign(port)) if port == endpoint.port), "{answer:?}");
    let nobody = Endpoint { port: 1, key: KEY.to_owned() };
    assert!(matches!(generate(&nobody, "").await, Err(EngineError::Unanswered(_))));
}

#[tokio::test]
async fn a_wedged_server_is_left_in_time() {
    let (_server, endpoint) = serve(&["a"], Fault::Wedged);
    let answer = generate_within(&endpoint, "", "hi", Duration::from_millis(100), |_| true).await;
    assert!(matches!(answer, Err(EngineError::Timeout)), "{answer:?}");
}

#[tokio::test]
async fn a_sink_that_has_enough_ends_the_answer() {
    let (_server, endpoint) = serve(&["a"; 400], Fault::None);
    let mut count = 0;
    let sink = |_: &str| {
        count += 1;
        count < 3
    };
    let answer = generate_within(&endpoint, "", "hi", LONG, sink).await.unwrap();
    assert_eq!((&*answer.text, answer.finish, answer.completion_tokens), ("aaa", Finish::Cancelled, 3));
}

/// Policies are checked when they are read; here is what happens to one that was made otherwise.
#[test]
fn a_number_that_would_end_the_server_is_never_sent() {
    type Change = fn(&mut crate::format::policy::Generation);
    let changes: [Change; 6] = [
        |own| own.temperature = Some(f64::NAN),
        |own| own.temperature = Some(f64::INFINITY),
        |own| own.top_p = Some(-1.0),
        |own| own.min_p = Some(5.0),
        |own| own.repeat_penalty = Some(0.0),
        |own| own.presence_penalty = Some(f64::NAN),
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut policy = policy("");
        change(&mut policy.generation);
        let sent = wire::sampling(&Sampling::new(&policy, 0));
        assert!(matches!(sent, Err(EngineError::Policy { .. })), "{number}: {sent:?}");
    }
}

#[tokio::test]
async fn ready_is_a_real_token_of_our_own_server() {
    async fn ready(endpoint: &Endpoint) -> Result<bool, EngineError> {
        model(&SPARSE).connect(&policy(""), endpoint)?.ready(Instant::now() + LONG).await
    }
    async fn of(fault: Fault) -> Result<bool, EngineError> {
        let (_server, endpoint) = serve(&["a", "b", "c", "d"], fault);
        ready(&endpoint).await
    }
    assert!(matches!(of(Fault::None).await, Ok(true)));
    assert!(matches!(of(Fault::Mute).await, Ok(false)));
    assert!(matches!(of(Fault::Foreign).await, Err(EngineError::Foreign(_))));
    assert!(matches!(of(Fault::Beside).await, Err(EngineError::Foreign(_))));
    assert!(matches!(of(Fault::Dies).await, Ok(false)));
    assert!(matches!(ready(&Endpoint { port: 1, key: KEY.to_owned() }).await, Ok(false)));
    let (_server, mut endpoint) = serve(&["a"], Fault::None);
    endpoint.key = "another".to_owned();
    let another = ready(&endpoint).await;
    assert!(matches!(another, Err(EngineError::Foreign(_))), "another model's server: {another:?}");
}

/// What this server cannot do is refused, and nothing is sent.
#[tokio::test]
async fn what_the_server_cannot_do_is_refused() {
    let (server, endpoint) = serve(&["a"], Fault::None);
    let policy = policy("generation: {chat_template: chatml}");
    let request = Request::new(&policy, "hi", 7, Instant::now() + LONG);
    let tool = crate::engine::conversation::Tool {
        name: "f".to_owned(),
        description: String::new(),
        parameters: serde_json::json!({}),
    };
    let image = Part::Image { media_type: "image/png".to_owned(), bytes: vec![] };
    let mut seen = Message::new(Role::User, "what is this?");
    seen.content.push(image);
    let format = crate::engine::conversation::Format::JsonObject;
    for request in [
        Request { tools: vec![tool], ..request.clone() },
        Request { format, ..request.clone() },
        Request { prompt: Prompt::Messages(vec![seen]), ..request.clone() },
    ] {
        let mut events = model(&SPARSE).connect(&policy, &endpoint).unwrap().generate(request);
        let refused = events.next().await.unwrap();
        assert!(matches!(refused, Err(EngineError::Unsupported { .. })), "{refused:?}");
    }
    assert!(server.sent("/completion").is_empty());
}

/// Requests that run at a time do not see each other's tokens, limits or ends.
#[tokio::test]
async fn several_requests_at_a_time() {
    let (_server, endpoint) = serve(&["a"; 20], Fault::None);
    let one = |limit: usize| {
        let endpoint = endpoint.clone();
        async move { generate(&endpoint, &format!("generation: {{max_tokens: {limit}}}")).await.unwrap().text }
    };
    let texts = futures_util::future::join_all((1..=12).map(one)).await;
    assert_eq!(texts, (1..=12).map(|limit| "a".repeat(limit)).collect::<Vec<_>>());
}

fn launch_of(model: &Tiny, text: &str, variant: Variant, root: &Path) -> (Launch, Result<(), EngineError>) {
    let (policy, scratch) = (policy(text), root.join("scratch é"));
    fs::create_dir_all(&scratch).unwrap();
    let model = model_at(model, &root.join("a model/weights.gguf"));
    let ask = LaunchRequest {
        name: "p",
        policy: &policy,
        variant,
        artifact: Path::new("artifact"),
        endpoint: &Endpoint { port: 1234, key: KEY.to_owned() },
        scratch: &scratch,
        cores: 4,
    };
    (model.launch(&ask).unwrap(), model.prepare(&ask))
}

fn options(launch: &Launch) -> BTreeMap<String, String> {
    let args: Vec<String> = launch.args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let value = |at: usize| args.get(at + 1).filter(|next| !next.starts_with('-')).cloned().unwrap_or_default();
    args.iter().enumerate().filter(|(_, arg)| arg.starts_with('-')).map(|(at, arg)| (arg.clone(), value(at))).collect()
}

/// A policy as people write it: layers and a budget in one.
const BOTH: &str = "runtime: {threads: 8, gpu_layers: 32, vram_budget_gb: 1, batch_size: 4, context_size: 256}";

#[test]
fn commands() {
    let root = tempfile::tempdir().unwrap();
    let of = |model: &Tiny, text: &str, variant| options(&launch_of(model, text, variant, root.path()).0);
    let sparse = of(&SPARSE, BOTH, Variant::Cuda);
    for (name, value) in [("-t", "4"), ("-c", "264"), ("-b", "4"), ("-np", "1"), ("--vram-budget", "1")] {
        assert_eq!(sparse[name], value, "{name}");
    }
    assert!(sparse["-m"].ends_with("model.gguf") && sparse["-m"].contains("scratch"));
    assert!(!sparse.contains_key("-ngl") && !sparse.contains_key("--disable-gpu-index"));
    assert!(!sparse["-a"].contains(KEY) && sparse["-a"].starts_with("aitools-"));
    let processor = of(&SPARSE, BOTH, Variant::Cpu);
    assert!(processor["-m"].ends_with("weights.gguf") && !processor.contains_key("--vram-budget"));
    let dense = of(&DENSE, BOTH, Variant::Cuda);
    assert_eq!((&*dense["-ngl"], dense.get("--vram-budget")), ("32", None));
    let open = of(&SPARSE, "runtime: {threads: 1, parallel: 3, batch_size: 4096}", Variant::Cuda);
    assert!(open.contains_key("--disable-gpu-index") && !open.contains_key("--vram-budget"));
    assert_eq!((&*open["-t"], &*open["-c"], &*open["-b"]), ("2", "1560", "512"));
}

#[test]
fn the_index_lies_beside_the_link_and_the_engine_finds_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let (folder, scratch) = (root.path().join("a model"), root.path().join("scratch é"));
    let index = scratch.join("model.gguf.generated.gpuidx");
    fs::write_atomic(&folder.join("weights.gguf"), b"weights").unwrap();
    let prepare = |text: &str, variant| {
        fs::remove_dir_all(&scratch).unwrap();
        launch_of(&SPARSE, text, variant, root.path()).1
    };
    let made = || fs::read_dir(&scratch).unwrap().iter().filter(|path| !path.ends_with("llama.log")).count();
    prepare(BOTH, Variant::Cuda).unwrap();
    assert!(!fs::exists(&index), "no statistics, no index");
    for (name, bytes) in tiny::activation_files(&tiny::TINY) {
        fs::write_atomic(&folder.join("activation").join(name), &bytes).unwrap();
    }
    prepare(BOTH, Variant::Cuda).unwrap();
    assert_eq!(fs::read_bounded(&scratch.join("model.gguf"), 10).unwrap(), b"weights");
    let all = fs::read_bounded(&index, 1 << 20).unwrap();
    assert_eq!(made(), 2, "a link and an index");
    // 0.001 GiB hold the rest of the model and a part of the neurons.
    prepare("runtime: {vram_budget_gb: 0.001, context_size: 256}", Variant::Cuda).unwrap();
    let some = fs::read_bounded(&index, 1 << 20).unwrap();
    assert!(some.starts_with(b"PWRI") && some.len() < all.len(), "{} and {}", some.len(), all.len());
    prepare(BOTH, Variant::Cpu).unwrap();
    assert_eq!(made(), 0, "a build for the processor looks for none");
    fs::write_atomic(&folder.join("activation/activation_1.pt"), b"\x80\x02cos\nsystem\n").unwrap();
    let error = prepare(BOTH, Variant::Cuda).unwrap_err().to_string();
    assert!(error.contains("activation_1.pt") && error.contains("vram_budget_gb"), "{error}");
}

/// The server opens `llama.log` in its working folder, and writes there whatever it says.
#[test]
#[cfg(unix)]
fn the_log_that_the_server_keeps_itself_takes_no_space() {
    let root = tempfile::tempdir().unwrap();
    for (model, variant) in [(&SPARSE, Variant::Cpu), (&DENSE, Variant::Cpu), (&DENSE, Variant::Cuda)] {
        // Twice: the port may be somebody else's at the first try.
        for _ in 0..2 {
            let (launch, prepared) = launch_of(model, "", variant, root.path());
            prepared.unwrap();
            let log = launch.cwd.join("llama.log");
            fs::append(&log, b"slot 0 is processing\n").unwrap();
            assert_eq!(fs::read_link(&log).unwrap(), Path::new("/dev/null"));
        }
    }
}

/// With less than a block of neurons PowerInfer would be asked for an index of nothing, which is refused after the start.
#[test]
fn a_budget_below_a_block_of_neurons_is_none() {
    // 256 neurons in 3 tensors of 64 numbers of two bytes each.
    const BLOCK_BYTES: u64 = 256 * 3 * 64 * 2;
    let root = tempfile::tempdir().unwrap();
    let header = header(&SPARSE);
    let (mut without, mut with) = (0, 0);
    for step in 1..100 {
        let budget = f64::from(step * 8192) / f64::from(1 << 30);
        let text = format!("runtime: {{vram_budget_gb: {budget}, context_size: 256}}");
        let left = model::neuron_budget(&policy(&text), &header, budget);
        let disabled = options(&launch_of(&SPARSE, &text, Variant::Cuda, root.path()).0);
        assert_eq!(disabled.contains_key("--disable-gpu-index"), left == 0, "{text}");
        assert!(left == 0 || left >= BLOCK_BYTES, "{text}: {left}");
        *(if left == 0 { &mut without } else { &mut with }) += 1;
    }
    assert!(without > 0 && with > 0, "{without} and {with}");
}

#[test]
fn an_index_that_was_refused_is_noticed() {
    let judged = |line| launch::offloaded(line).map(|judged| judged.is_ok());
    assert_eq!(judged("llm_load_gpu_split: offloaded 243.19 MiB of FFN weights to GPU"), Some(true));
    assert_eq!(judged("llm_load_gpu_split: offloaded 0.00 MiB of FFN weights to GPU"), Some(false));
    assert_eq!(judged("llm_load_sparse_model_tensors: offloaded layers from VRAM budget(-1 bytes): 17/16"), None);
}
