//! Git sources against real git: repositories made by the program `git`, served by `git http-backend` on loopback.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking, helpers included")]

mod bench;
#[path = "../support/git_server.rs"]
mod git_server;
mod hostile;
mod project;
mod transport;
mod trees;
