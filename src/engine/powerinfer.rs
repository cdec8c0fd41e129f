//! PowerInfer (<https://github.com/SJTU-IPADS/PowerInfer>): sparse models whose busy neurons lie on the GPU and whose idle ones
//! in main memory, built from its own CMake tree, served by its own `server`.
//!
//! Read against commit d3ebd7c; it has no releases. It is llama.cpp of November 2023 at heart, and loads dense models of
//! that time as that did. Absent: its `smallthinker/` folder, which is another engine with another server.
//!
//! | file | holds |
//! |---|---|
//! | [`recipe`] | how it is built |
//! | [`model`] | what a header says, in its terms |
//! | [`check`] | what is wrong with a model or policy |
//! | [`activation`], [`gpu_index`] | which neurons go to the GPU |
//! | [`derive`] | how it makes a model from another one |
//! | [`launch`] | the command, and what lies in its folder |
//! | [`chat`] | from a prompt to texts and special tokens |
//! | [`wire`] | the server's protocol and its traps |

pub mod activation;
mod chat;
mod check;
mod derive;
pub mod gpu_index;
mod launch;
mod model;
#[cfg(test)]
mod real;
mod recipe;
#[cfg(test)]
mod tests;
mod wire;

#[cfg(test)]
#[path = "../../tests/support/powerinfer_server.rs"]
mod imitation;
#[cfg(test)]
#[path = "../../tests/support/tiny_powerinfer.rs"]
mod tiny;

use super::answer::Sink;
use super::derive::{Derivation, DeriveRequest};
use super::http::Patience;
use super::{
    CheckRequest, Endpoint, Engine, EngineError, Finding, GenerateRequest, Generated, Judge, Launch, LaunchRequest,
    RecipeRequest,
};
use crate::base::platform::{Platform, Variant};
use crate::build::BuildRecipe;
use crate::format::gguf::Header;
use crate::format::manifest::{EngineSpec, Step};
use crate::format::policy::Policy;

#[derive(Debug)]
pub struct PowerInfer;

const ID: &str = "powerinfer";
const SERVER: &str = "server";

impl Engine for PowerInfer {
    fn id(&self) -> &'static str {
        ID
    }

    fn recipe(&self, ask: &RecipeRequest<'_>) -> Result<BuildRecipe, EngineError> {
        recipe::recipe(ask)
    }

    fn variants(&self, platform: Platform) -> &'static [Variant] {
        recipe::variants(platform)
    }

    fn check(&self, ask: &CheckRequest<'_>) -> Vec<Finding> {
        check::all(ask)
    }

    fn check_policy(&self, policy: &Policy) -> Vec<Finding> {
        check::of_name(policy).into_iter().collect()
    }

    fn memory_bytes(&self, policy: &Policy, header: &Header, sizes: &[u64]) -> u64 {
        sizes.iter().sum::<u64>().saturating_add(model::cache_bytes(policy, header))
    }

    fn launch(&self, ask: &LaunchRequest<'_>) -> Result<Launch, EngineError> {
        launch::launch(ask)
    }

    fn prepare(&self, ask: &LaunchRequest<'_>) -> Result<(), EngineError> {
        launch::prepare(ask)
    }

    fn judge(&self, ask: &LaunchRequest<'_>) -> Option<Judge> {
        launch::expects_neurons(ask).then_some(launch::offloaded as Judge)
    }

    fn ready(&self, endpoint: &Endpoint, patience: Patience<'_>) -> Result<bool, EngineError> {
        wire::ready(endpoint, patience)
    }

    fn generate(
        &self,
        endpoint: &Endpoint,
        ask: &GenerateRequest<'_>,
        sink: &mut Sink<'_>,
    ) -> Result<Generated, EngineError> {
        wire::generate(endpoint, ask, sink)
    }

    fn derivation(&self, step: Step<'_>, spec: &EngineSpec) -> Result<Derivation, EngineError> {
        derive::derivation(step, spec)
    }

    fn derive(&self, ask: &DeriveRequest<'_>) -> Result<Launch, EngineError> {
        derive::command(ask)
    }

    fn check_derived(&self, ask: &DeriveRequest<'_>, header: &Header, size: u64) -> Vec<Finding> {
        derive::check(ask, header, size)
    }

    /// It has no option for its version; this one ends at once, too.
    fn version_args(&self) -> &'static [&'static str] {
        &["--help"]
    }
}
