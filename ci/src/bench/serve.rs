//! What `aitools serve` adds to its engines: time, memory, and how many requests it can pass on. The same requests go to the engine
//! itself, to llama-server as a router, and to a gateway of the npm registry, in turn. Linux only: it reads /proc.
//!
//! An engine that answers at once shows what the gateway takes; the real llama-server shows what that is worth. At its first run
//! it builds llama.cpp a second time, with the option that its router needs: some minutes.

mod load;
mod server;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use self::load::{Client, Target};
use self::server::{Engine, Gateway, Process};
use super::figure::{Figure, Figures, percentile_ms};
use super::ground::Ground;
use super::{Bench, Run};
use crate::quickstart;
use crate::step::Result;

pub const BENCH: Bench = Bench {
    name: "serve",
    about: "the gateway and its engines, engines alone, other gateways",
    rounds: 7,
    warm_up: true,
    run: Run::Figures(run),
};

/// Requests to each server in a round, one after the other, to the servers in turn.
const REQUESTS: usize = 1000;
const REAL_REQUESTS: usize = 60;
/// Streams of 100 chunks to each server in a round.
const STREAMS: usize = 5;
/// Clients at a time for the most requests a second, and for how long.
const CLIENTS: usize = 32;
const FLOOD: Duration = Duration::from_secs(3);
const SWAPS: usize = 4;

const CHAT: &str = "/v1/chat/completions";

fn run(ground: &Ground<'_>, rounds: usize) -> Result<Vec<Figure>> {
    if !cfg!(target_os = "linux") {
        return Err("this benchmark reads /proc as Linux has it".into());
    }
    let mut figures = Figures::default();
    let project = stand_in(ground)?;
    instant(ground, &project, rounds, &mut figures)?;
    swap(ground, &project, rounds, &mut figures)?;
    real(ground, rounds, &mut figures)?;
    for (name, aim) in [
        ("added by aitools serve, p50", "<= 0.3"),
        ("added by aitools serve, p99", "<= 1"),
        ("chunk, added by aitools serve, p99", "<= 0.2"),
        ("requests a second, aitools serve", ">= 5000"),
        ("resident, nothing loaded", "<= 40"),
        ("resident, growth in all rounds", "0"),
        ("swap: end of an engine to start of the next", "<= 20"),
        ("cold start, added by aitools serve", "<= 50"),
    ] {
        figures.aim(name, aim);
    }
    Ok(figures.finish())
}

fn ask(model: &str, stream: bool) -> String {
    let messages = json!([
        { "role": "system", "content": "You are a helpful assistant." },
        { "role": "user", "content": quickstart::PROMPT },
    ]);
    let mut body = json!({ "model": model, "messages": messages, "max_tokens": 1, "temperature": 0 });
    if stream {
        body["stream"] = true.into();
    }
    body.to_string()
}

/// A project whose engine answers at once, synced: policies `instant` and `other`.
fn stand_in(ground: &Ground<'_>) -> Result<PathBuf> {
    const MANIFEST: &str = "version = 1\n\
        [tools]\n\
        cmake = { pypi = \"cmake\", version = \"4.4.4\" }\n\
        ninja = { pypi = \"ninja\", version = \"1.13.2\" }\n\
        [engines.instant]\nadapter = \"llama-cpp\"\nsource = { path = \"source\" }\n\
        [models.none]\nsource = { path = \"model.gguf\" }\n\
        [policies]\ninclude = [\"*.yaml\"]\n";
    const CMAKE: &str = "cmake_minimum_required(VERSION 3.14)\n\
        project(instant C)\n\
        find_package(Threads REQUIRED)\n\
        set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)\n\
        add_executable(llama-server main.c)\n\
        target_link_libraries(llama-server Threads::Threads)\n";
    let (sh, project) = (ground.sh, ground.folder("instant")?);
    sh.create_dir(project.join("source"))?;
    sh.create_dir(project.join("manifests"))?;
    sh.write_file(project.join("manifests/default.toml"), MANIFEST)?;
    sh.write_file(project.join("source/CMakeLists.txt"), CMAKE)?;
    sh.write_file(project.join("source/main.c"), include_str!("serve/instant.c"))?;
    // A header that says which model it is, and no tensors.
    let mut model = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
    for text in ["general.architecture", "llama"] {
        model.extend((text.len() as u64).to_le_bytes());
        model.extend(text.as_bytes());
        if text != "llama" {
            model.extend(8_u32.to_le_bytes());
        }
    }
    sh.write_file(project.join("model.gguf"), model)?;
    let policy = "engine: instant\nmodel: none\n\
        generation: {chat_template: \"{{ messages[0].content }}\"}\nruntime: {context_size: 2048, parallel: 64}\n";
    for name in ["instant", "other"] {
        sh.write_file(project.join(format!("{name}.yaml")), policy)?;
    }
    synced(ground, &project)?;
    Ok(project)
}

fn synced(ground: &Ground<'_>, project: &Path) -> Result<()> {
    if ground.ours(project, None).arg("sync").status()?.success() { Ok(()) } else { Err("the sync failed".into()) }
}

/// One after the other, to both servers in turn. How long each request took.
fn in_turn(servers: [&Target; 2], body: &str, count: usize) -> Result<[Vec<Duration>; 2]> {
    let mut clients = [Client::new(servers[0])?, Client::new(servers[1])?];
    let requests = servers.map(|server| server.request(CHAT, Some(body)));
    let mut took = [Vec::new(), Vec::new()];
    for _ in 0..count {
        for at in 0..2 {
            took[at].push(clients[at].ask(&requests[at])?);
        }
    }
    Ok(took)
}

/// Adds percentiles of a server, and how much more they are than those of the engine beside it.
fn compare(figures: &mut Figures, what: &str, name: &str, [direct, took]: &[Vec<Duration>; 2]) {
    for percent in [50, 99] {
        let (direct_ms, ms) = (percentile_ms(direct, percent), percentile_ms(took, percent));
        figures.add(&format!("{what}{name}, p{percent}"), "ms", ms, took.len());
        figures.add(&format!("{what}engine beside {name}, p{percent}"), "ms", direct_ms, direct.len());
        figures.add(&format!("{what}added by {name}, p{percent}"), "ms", ms - direct_ms, took.len());
    }
}

/// The gateway in front of an engine that answers at once.
fn instant(ground: &Ground<'_>, project: &Path, rounds: usize, figures: &mut Figures) -> Result<()> {
    let gateway = Gateway::start(ground, project, &["instant"])?;
    std::thread::sleep(Duration::from_secs(1));
    figures.add("resident, nothing loaded", "MiB", gateway.resident_mib()?, 1);
    let (body, streamed) = (ask("instant", false), ask("instant", true));
    gateway.target.once(CHAT, Some(&body))?;
    let engine = gateway.engine("instant")?.target()?;
    let portkey = server::portkey(ground, &engine)?;
    let mut servers = vec![&engine, &gateway.target];
    servers.extend(portkey.as_ref().map(|(_, target)| target));
    let mut warm = 0.0;
    for round in 0..=rounds {
        let mut unmeasured = Figures::default();
        let figures = if round == 0 { &mut unmeasured } else { &mut *figures };
        // Each beside the engine alone: Node goes on with something after its answers.
        for server in &servers[1..] {
            compare(figures, "", server.name, &in_turn([&engine, server], &body, REQUESTS)?);
        }
        // Portkey's gateway answers streams with an error ("immutable") on Node 20.
        let lags = chunks([&engine, &gateway.target], &streamed)?;
        compare(figures, "chunk, ", gateway.target.name, &lags);
        for server in &servers {
            let took = load::flood(server, &server.request(CHAT, Some(&body)), CLIENTS, FLOOD)?;
            let rate = took.len() as f64 / FLOOD.as_secs_f64();
            figures.add(&format!("requests a second, {}", server.name), "/s", rate, took.len());
        }
        if round == 0 {
            warm = gateway.resident_mib()?;
        } else {
            figures.add("resident, after a round", "MiB", gateway.resident_mib()?, 1);
        }
    }
    let passed = figures.count("requests a second, aitools serve");
    figures.add("resident, growth in all rounds", "MiB", gateway.resident_mib()? - warm, passed);
    Ok(())
}

/// How long each chunk of some streams was under way, by server.
fn chunks(servers: [&Target; 2], body: &str) -> Result<[Vec<Duration>; 2]> {
    let mut lags = [Vec::new(), Vec::new()];
    for _ in 0..STREAMS {
        for (lags, server) in lags.iter_mut().zip(servers) {
            lags.extend(Client::new(server)?.lags(&server.request(CHAT, Some(body)))?);
        }
    }
    Ok(lags)
}

/// From the last instruction of an engine to the first of the one that takes its place.
fn swap(ground: &Ground<'_>, project: &Path, rounds: usize, figures: &mut Figures) -> Result<()> {
    let gateway = Gateway::start(ground, project, &["--max-loaded", "1"])?;
    let told = |policy: &str, what: &str| -> Result<Duration> {
        let text = ground.sh.read_file(project.join(format!(".aitools/{policy}.log")))?;
        let line = text.lines().rev().find_map(|line| line.strip_prefix(what));
        Ok(Duration::from_nanos(line.ok_or("the engine does not tell the time")?.trim().parse()?))
    };
    let (mut from, mut to) = ("instant", "other");
    gateway.target.once(CHAT, Some(&ask(from, false)))?;
    for _ in 0..rounds {
        let mut times = Vec::new();
        for _ in 0..SWAPS {
            gateway.target.once(CHAT, Some(&ask(to, false)))?;
            times.push(told(to, "began")?.saturating_sub(told(from, "ended")?));
            (from, to) = (to, from);
        }
        figures.add("swap: end of an engine to start of the next", "ms", percentile_ms(&times, 50), times.len());
    }
    Ok(())
}

/// The gateway in front of the real llama-server, beside that as a router.
fn real(ground: &Ground<'_>, rounds: usize, figures: &mut Figures) -> Result<()> {
    let (project, policy) = (real_project(ground)?, quickstart::POLICY);
    let gateway = Gateway::start(ground, &project, &[policy])?;
    let body = ask(policy, false);
    gateway.target.once(CHAT, Some(&body))?;
    let engine = gateway.engine(policy)?;
    let program = project.join("build/router/bin/llama-server");
    let (_router, router) = engine.router(ground.sh, &program, &ground.folder("router")?, policy)?;
    router.once(CHAT, Some(&body))?;
    let direct = engine.target()?;
    let portkey = server::portkey(ground, &direct)?;
    let mut servers = vec![&gateway.target, &router];
    servers.extend(portkey.as_ref().map(|(_, target)| target));
    for round in 0..=rounds {
        for server in &servers {
            let took = in_turn([&direct, server], &body, REAL_REQUESTS)?;
            if round > 0 {
                compare(figures, "llama-server: ", server.name, &took);
            }
        }
    }
    drop(portkey);
    for round in 0..=rounds {
        let times = [by_hand(&engine, &body)?, cold(&gateway, policy, &body)?, cold_router(&router, policy, &body)?];
        let [hand, ours, theirs] = times.map(|time| time.as_secs_f64() * 1e3);
        if round > 0 {
            figures.add("cold start, engine by hand", "ms", hand, 1);
            figures.add("cold start, aitools serve", "ms", ours, 1);
            figures.add("cold start, llama-server as router", "ms", theirs, 1);
            figures.add("cold start, added by aitools serve", "ms", ours - hand, 1);
            figures.add("cold start, added by llama-server as router", "ms", theirs - hand, 1);
        }
    }
    Ok(())
}

/// A project as `aitools init` writes it, with llama.cpp a second time as a router.
fn real_project(ground: &Ground<'_>) -> Result<PathBuf> {
    let project = ground.scratch.join("real");
    if !ground.ours(&ground.scratch, None).args(["init", "real"]).status()?.success() {
        return Err("`aitools init` failed".into());
    }
    let manifest = project.join("manifests/default.toml");
    let text = ground.sh.read_file(&manifest)?;
    let at = text.find("[engines.llama-cpp]").ok_or("no llama.cpp in the manifest")?;
    let end = text[at..].find("\n\n").map_or(text.len(), |end| at + end);
    let options = "[engines.router]\nadapter = \"llama-cpp\"\ndefine = { LLAMA_SUBPROCESS = true }";
    let router = text[at..end].replace("[engines.llama-cpp]", options);
    ground.sh.write_file(&manifest, format!("{}\n\n{router}{}", &text[..end], &text[end..]))?;
    let policies = project.join("configs/models/llama-cpp");
    let file = policies.join(format!("{}.yaml", quickstart::POLICY));
    // With more threads than free processors, llama.cpp's threads wait for each other.
    let policy = ground.sh.read_file(&file)?.replace("runtime:\n", "runtime:\n  threads: 1\n");
    ground.sh.write_file(policies.join("router.yaml"), policy.replace("engine: llama-cpp", "engine: router"))?;
    ground.sh.write_file(file, policy)?;
    synced(ground, &project)?;
    Ok(project)
}

/// An engine started by hand: to the end of its first answer.
fn by_hand(engine: &Engine, body: &str) -> Result<Duration> {
    let (mut command, target) = engine.again()?;
    let begun = Instant::now();
    let _process = Process::start(&mut command)?;
    server::until("the engine is ready", || target.once("/health", None).ok())?;
    target.once(CHAT, Some(body))?;
    Ok(begun.elapsed())
}

/// The first request to a policy whose engine does not run.
fn cold(gateway: &Gateway<'_>, policy: &str, body: &str) -> Result<Duration> {
    gateway.unload(policy)?;
    let begun = Instant::now();
    gateway.target.once(CHAT, Some(body))?;
    Ok(begun.elapsed())
}

fn cold_router(router: &Target, policy: &str, body: &str) -> Result<Duration> {
    server::unload_from_router(router, policy)?;
    let begun = Instant::now();
    router.once(CHAT, Some(body))?;
    Ok(begun.elapsed())
}
