//! PowerInfer (<https://github.com/SJTU-IPADS/PowerInfer>): sparse models whose busy neurons lie on the GPU and whose idle ones
//! lie in main memory. It is built from its own CMake tree, and serves with its own `server`.
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
//! | [`wire`] | the server's protocol and its defects |

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

use std::sync::Arc;

use super::cmake::{CmakeProject, RecipeRequest};
use super::conversation::Conversation;
use super::derive::{Derivation, DeriveRequest};
use super::finding::{self, Finding};
use super::gguf::Gguf;
use super::{
    CheckRequest, Endpoint, Engine, EngineError, InstallMethod, Launch, LaunchRequest, Model, ModelError, ModelFiles,
    ModelSize, StartupCheck,
};
use crate::base::platform::{Platform, Variant};
use crate::build::BuildRecipe;
use crate::format::manifest::{EngineSpec, Step};
use crate::format::policy::{Output, Policy};

/// The adapter.
#[derive(Debug)]
pub struct PowerInfer;

const ID: &str = "powerinfer";
const SERVER: &str = "server";

impl Engine for PowerInfer {
    fn id(&self) -> &'static str {
        ID
    }

    fn install_method(&self) -> InstallMethod<'_> {
        InstallMethod::Cmake(self)
    }

    fn check_policy(&self, policy: &Policy) -> Vec<Finding> {
        let no_text = policy.runtime.output.filter(|output| *output != Output::Text);
        let what = no_text.map(|_| finding::error("runtime.output", "PowerInfer gives text only", None));
        check::of_name(policy).into_iter().chain(what).collect()
    }

    fn open(&self, files: &ModelFiles<'_>) -> Result<Arc<dyn Model>, ModelError> {
        Ok(Arc::new(PowerInferModel(Arc::new(Gguf::open(files)?))))
    }

    fn derivation(&self, step: Step<'_>, spec: &EngineSpec) -> Result<Derivation, EngineError> {
        derive::derivation(step, spec)
    }

    fn derive(&self, ask: &DeriveRequest<'_>) -> Result<Launch, EngineError> {
        derive::command(ask)
    }

    fn check_derived(&self, ask: &DeriveRequest<'_>) -> Vec<Finding> {
        derive::check(ask)
    }
}

impl CmakeProject for PowerInfer {
    fn variants(&self, platform: Platform) -> &'static [Variant] {
        recipe::variants(platform)
    }

    fn recipe(&self, ask: &RecipeRequest<'_>) -> Result<BuildRecipe, EngineError> {
        recipe::recipe(ask)
    }
}

/// A model for PowerInfer: sparse or dense.
#[derive(Debug, Clone)]
struct PowerInferModel(Arc<Gguf>);

impl Model for PowerInferModel {
    fn check(&self, ask: &CheckRequest<'_>) -> Vec<Finding> {
        check::all(&self.0, ask)
    }

    fn size(&self, policy: &Policy, variant: Variant) -> Option<ModelSize> {
        Some(model::size(&self.0, policy, variant))
    }

    fn launch(&self, ask: &LaunchRequest<'_>) -> Result<Launch, EngineError> {
        launch::launch(&self.0, ask)
    }

    fn prepare(&self, ask: &LaunchRequest<'_>) -> Result<(), EngineError> {
        launch::prepare(&self.0, ask)
    }

    fn startup_check(&self, ask: &LaunchRequest<'_>) -> Option<StartupCheck> {
        launch::expects_neurons(&self.0, ask).then_some(launch::offloaded as StartupCheck)
    }

    fn connect(&self, policy: &Policy, endpoint: &Endpoint) -> Result<Arc<dyn Conversation>, EngineError> {
        chat::has_template(policy, self.0.header())?;
        Ok(Arc::new(wire::Wire::new(endpoint, Arc::clone(&self.0), policy)))
    }
}
