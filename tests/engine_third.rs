//! "A new engine is one file and one line": this is the one file. An engine that is neither of the two in `src/engine`, with
//! models that are no GGUF files, goes through the whole pipeline: `lock`, `sync`, `check`, `run`.
//!
//! Its program is a small C server of the OpenAI API, built from source by the real build; its model is a folder with a
//! `config.json` and a safetensors file.
#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::disallowed_methods, reason = "tests read the environment that cargo gives them")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use aitools::base::cancel::Cancel;
use aitools::base::fs;
use aitools::base::platform::{Platform, Variant};
use aitools::build::{BuildRecipe, OutputRule};
use aitools::engine::backend::passed_on;
use aitools::engine::cmake::{CmakeProject, RecipeRequest};
use aitools::engine::conversation::{Conversation, Finish, Piece};
use aitools::engine::finding::{Finding, error};
use aitools::engine::openai::{Dialect, OpenAi};
use aitools::engine::{
    CheckRequest, Endpoint, Engine, EngineError, InstallMethod, Launch, LaunchRequest, Model, ModelError, ModelFiles,
};
use aitools::format::policy::Policy;
use aitools::ops::run::{Ask, run};
use aitools::ops::sync::{self, LockMode};
use aitools::ops::{Failure, Host, Project, check, ready};
use aitools::report::{Silent, Task};
use aitools::store::Store;
use aitools::store::seal::Key;

#[path = "support/world.rs"]
mod world;

use world::World;

/// The engine, and the one line.
#[derive(Debug)]
struct Parrot;
const ENGINES: &[&dyn Engine] = &[&Parrot];

impl Engine for Parrot {
    fn id(&self) -> &'static str {
        "parrot"
    }

    fn install_method(&self) -> InstallMethod<'_> {
        InstallMethod::Cmake(self)
    }

    fn open(&self, files: &ModelFiles<'_>) -> Result<Arc<dyn Model>, ModelError> {
        let weights = files.weights[0].clone();
        let config = fs::parent(&weights).join("config.json");
        let unusable = |why: String| ModelError { path: config.clone(), why };
        let bytes = fs::read_bounded(&config, 1 << 20).map_err(|error| unusable(error.to_string()))?;
        let config: serde_json::Value = serde_json::from_slice(&bytes).map_err(|error| unusable(error.to_string()))?;
        let kind = config["model_type"].as_str().unwrap_or_default().to_owned();
        Ok(Arc::new(Folder { weights, kind }))
    }
}

impl CmakeProject for Parrot {
    fn recipe(&self, ask: &RecipeRequest<'_>) -> Result<BuildRecipe, EngineError> {
        let output = |glob: &str| OutputRule { glob: glob.to_owned(), to: "bin".parse().unwrap(), required: true };
        Ok(BuildRecipe {
            version: 1,
            define: BTreeMap::new(),
            targets: vec!["parrot".to_owned()],
            outputs: vec![output("bin/parrot")],
            require: Vec::new(),
            build_type: "Release".to_owned(),
            edits: Vec::new(),
            evidence: Vec::new(),
            native: ask.spec.native,
        })
    }

    fn variants(&self, _: Platform) -> &'static [Variant] {
        &[Variant::Cpu]
    }
}

/// A model: a folder with a configuration and safetensors.
#[derive(Debug)]
struct Folder {
    weights: PathBuf,
    kind: String,
}

impl Model for Folder {
    fn check(&self, _: &CheckRequest<'_>) -> Vec<Finding> {
        let wrong =
            (self.kind != "bird").then(|| error("", format!("a model of type `{}` cannot talk", self.kind), None));
        wrong.into_iter().collect()
    }

    fn launch(&self, ask: &LaunchRequest<'_>) -> Result<Launch, EngineError> {
        Ok(Launch {
            program: ask.artifact.join("bin/parrot"),
            args: vec![ask.endpoint.port.to_string().into(), self.weights.clone().into()],
            env: [("PARROT_KEY".into(), ask.endpoint.key.clone().into())].into(),
            cwd: ask.scratch.to_owned(),
            files: BTreeMap::new(),
        })
    }

    fn connect(&self, _: &Policy, endpoint: &Endpoint) -> Result<Arc<dyn Conversation>, EngineError> {
        Ok(Arc::new(OpenAi::new(endpoint, Dialect { checks_key: true, sampling: |_, _| (), extend: |_, _| () }, true)))
    }
}

/// Says the last message again, after the first bytes of its model.
const SERVER: &str = r#"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void say(int to, const char *text) { if (write(to, text, strlen(text)) < 0) exit(1); }

int main(int count, char **args) {
    static char request[1 << 16], answer[1 << 17], weights[8];
    FILE *model = fopen(args[count - 1], "rb");
    if (!model || fread(weights, 1, 6, model) != 6) { fprintf(stderr, "no model\n"); return 1; }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(args[1]))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int server = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(server, (struct sockaddr *)&address, sizeof address) || listen(server, 8)) return 2;
    for (;;) {
        int client = accept(server, 0, 0);
        size_t length = 0, want = 0;
        char *body = 0;
        for (;;) {
            ssize_t more = read(client, request + length, sizeof request - 1 - length);
            if (more <= 0) break;
            length += more;
            request[length] = 0;
            char *end = strstr(request, "\r\n\r\n"), *size = strstr(request, "ontent-length: ");
            if (end) { body = end + 4; want = size && size < end ? strtoul(size + 15, 0, 10) : 0; }
            if (body && strlen(body) >= want) break;
        }
        if (!strstr(request, getenv("PARROT_KEY"))) say(client, "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n");
        else if (!strncmp(request, "GET /v1/models", 14)) say(client, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
        else {
            char *last = body, *next;
            while ((next = strstr(last + 1, "\"content\":\""))) last = next;
            last += strlen("\"content\":\"");
            *strchr(last, '"') = 0;
            say(client, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n");
            snprintf(answer, sizeof answer, "data: {\"choices\":[{\"delta\":{\"content\":\"%s: %s\"}}]}\n\n", weights, last);
            say(client, answer);
            say(client, "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n");
            say(client, "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n");
        }
        close(client);
    }
}
"#;

const CMAKE: &str = "cmake_minimum_required(VERSION 3.14)
project(parrot C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_executable(parrot main.c)
";

const MANIFEST: &str = r#"version = 1
[engines.polly]
adapter = "parrot"
source = { path = "engine source" }
[models.m]
source = { path = "a folder" }
[policies]
include = ["configs/polly/*.yaml"]
"#;

fn world() -> World {
    let world = World::new();
    world.write("manifests/default.toml", MANIFEST);
    world.write("engine source/CMakeLists.txt", CMAKE);
    world.write("engine source/main.c", SERVER);
    world.write("a folder/config.json", "{\"model_type\": \"bird\"}");
    world.write("a folder/model.safetensors", "parrot weights");
    world.write("configs/polly/p.yaml", "engine: polly\nmodel: m\n");
    world
}

fn host(world: &World, engines: &'static [&'static dyn Engine]) -> Host {
    let env =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let mut env: BTreeMap<String, String> = env.collect();
    let path = world.command(&[]).get_envs().find(|(name, _)| *name == "PATH").unwrap().1.unwrap().to_owned();
    env.insert("PATH".to_owned(), path.into_string().unwrap());
    Host {
        store: Store::open(&world.cache(), Key::from_secret("of this test")).unwrap(),
        engines,
        env,
        driver: env!("CARGO_BIN_EXE_aitools").into(),
        offline: false,
        jobs: 2,
        variant: None,
        task: Task::new(Arc::new(Silent), Cancel::default()),
    }
}

fn project(world: &World) -> Project {
    Project::load(&world.project().join("manifests/default.toml")).unwrap()
}

fn synced(host: &Host, project: &Project) -> Result<sync::Synced, Failure> {
    sync::run(host, project, &sync::Ask { policies: &[], mode: LockMode::Update, dry_run: false })
}

#[test]
fn a_third_engine_goes_through_the_whole_pipeline() {
    let world = world();
    let host = host(&world, ENGINES);
    let project = project(&world);
    assert!(!synced(&host, &project).unwrap().plan.is_empty());
    assert!(synced(&host, &project).unwrap().plan.is_empty(), "nothing is left to do");
    let checked = check::run(&host, &project, &[]).unwrap();
    assert!(checked[0].weights_checked && checked[0].problems.is_empty(), "{checked:?}");
    let (ready, warnings) = ready::ready(&host, &project, project.policy("p").unwrap()).unwrap();
    assert!(warnings.is_empty(), "{warnings:?}");
    let os_env = host.os_env();
    let env = passed_on(os_env.iter().map(|(name, value)| (name.as_os_str(), value.as_os_str())));
    let state = world.project().join(".aitools");
    let ask = Ask {
        prompt: "hello",
        driver: Some(&host.driver),
        env: &env,
        scratch: &world.cache(),
        log: &state.join("p.log"),
        record: &state.join("generations.jsonl"),
        keep_text: false,
        time: "2026-11-23T01:02:03Z",
    };
    let mut pieces = Vec::new();
    let ran = run(&ready, &ask, &host.task, &mut |piece: &Piece| {
        pieces.push(piece.clone());
        true
    });
    let ran = ran.unwrap_or_else(|error| panic!("{error}: {:?}", error.tail()));
    assert_eq!((&*ran.answer.text, ran.answer.finish), ("parrot: hello", Finish::Stop));
    assert_eq!((ran.metrics.prompt_tokens, ran.metrics.completion_tokens), (3, 2));
    assert_eq!(pieces, [Piece::Text("parrot: hello".to_owned())]);
}

#[test]
fn its_own_checks_stop_a_model_that_it_cannot_run() {
    let world = world();
    world.write("a folder/config.json", "{\"model_type\": \"fish\"}");
    let (host, project) = (host(&world, ENGINES), project(&world));
    synced(&host, &project).unwrap();
    let refused = ready::ready(&host, &project, project.policy("p").unwrap());
    let Err(Failure::Input(problems)) = refused else { panic!("a fish is ready: {refused:?}") };
    assert!(problems.to_string().contains("`fish` cannot talk"), "{problems}");
}

/// Without its line in the registry there is no such engine.
#[test]
fn an_engine_that_is_not_registered_is_unknown() {
    let world = world();
    let (host, project) = (host(&world, aitools::engine::ENGINES), project(&world));
    let Err(Failure::Input(problems)) = synced(&host, &project) else { panic!("it is known") };
    assert!(problems.to_string().contains("no adapter `parrot`"), "{problems}");
}
