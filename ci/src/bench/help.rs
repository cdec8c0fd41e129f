//! What it costs to start the program at all.

use super::ground::{Ground, command};
use super::measure::{Contender, Series, interleave};
use super::{Bench, Run};
use crate::step::Result;

pub const BENCH: Bench =
    Bench { name: "help", about: "starting the program", rounds: 30, warm_up: true, run: Run::Processes(run) };

fn run(ground: &Ground<'_>, bench: &Bench, rounds: usize) -> Result<Vec<Series>> {
    let here = &ground.scratch;
    let (uv, ninja, hf) = (ground.peer("uv"), ground.peer("ninja"), ground.peer("hf"));
    interleave(
        &mut [
            Contender::command("aitools --help", || command(&ground.aitools, here, &["--help"])),
            Contender::command("uv --help", || command(&uv, here, &["--help"])),
            Contender::command("ninja --version", || command(&ninja, here, &["--version"])),
            Contender::command("hf --help", || command(&hf, here, &["--help"])),
        ],
        bench.warm_up,
        rounds,
    )
}
