//! How an engine is installed: from its locked source to files with a receipt. Each method is one file of this folder; today
//! there is [`cmake`].
//!
//! A method first decides everything ([`Installers::decide`]): which accelerator, which packages, and every named input. The
//! digest of the inputs is the fingerprint of the installation, which plan and store use. The decision is then carried out
//! ([`Installation::install`]) in folders of the store; the caller writes the receipt.
//!
//! A method with other inputs, such as a locked Python environment, a prebuilt archive or a program of the system, is one file
//! here that decides and implements [`Installation`], a variant of [`InstallMethod`] for what such an engine has to state, and
//! the line in [`Installers::decide`] that the compiler then requires. Plan, store, `sync` and `run` do not know the methods.

pub mod cmake;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;

use crate::base::digest::Digest;
use crate::base::name::Name;
use crate::base::platform::Variant;
use crate::build::Built;
use crate::build::fingerprint::without_machine;
use crate::build::settings::Env;
use crate::engine::{Engine, InstallMethod};
use crate::format::lockfile::{EngineEntry, Lockfile};
use crate::format::manifest::EngineSpec;
use crate::format::receipt::Receipt;
use crate::plan::PackageRequirement;

use super::{Failure, Host};

/// An engine to install.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Its name in the manifest.
    pub name: &'a Name,
    /// What the manifest says.
    pub spec: &'a EngineSpec,
    /// What is locked.
    pub entry: &'a EngineEntry,
    /// The adapter that drives it.
    pub adapter: &'static dyn Engine,
    /// The accelerator that the user or a policy asks for; the best one for this machine when there is none.
    pub variant: Option<Variant>,
    /// What it is for.
    pub purpose: Purpose,
    /// The fingerprint of the installation that the project's link leads to.
    pub in_use: Option<Digest>,
}

/// What an installation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To be installed if it is not: exactly what the lockfile and this machine's compilers give.
    Install,
    /// To be run: an installation that other compilers made from the same locked inputs will do, and no compiler is needed.
    Use,
}

/// An installation that is in the store already, and is used as it is.
#[derive(Debug)]
struct Kept;

impl Installation for Kept {
    /// It is needed only when the one in the store is gone, which calls for another decision.
    fn install(&self, _: &Host, _: &str, _: &Folders<'_>) -> Result<Option<Built>, Failure> {
        Ok(None)
    }
}

/// The installation in the store that a decision for [`Purpose::Use`] falls back on: of this engine in one of `variants`, from
/// the inputs that `expected` gives for a variant, whatever compilers made it. `locked` names the tools that the lockfile
/// decides.
///
/// # Errors
/// When the store cannot be read, or a recipe cannot be made.
fn kept(
    host: &Host,
    wanted: &Wanted<'_>,
    variants: &[Variant],
    locked: &[&str],
    expected: &dyn Fn(Variant) -> Result<BTreeMap<String, String>, Failure>,
) -> Result<Option<Decided>, Failure> {
    let mut receipts: Vec<Receipt> = host.store.artifacts()?.into_iter().map(|artifact| artifact.receipt).collect();
    receipts.retain(|receipt| receipt.engine == *wanted.name && variants.contains(&receipt.variant));
    // The linked one first, then in the order of the variants.
    let rank = |receipt: &Receipt| {
        let variant = variants.iter().position(|variant| *variant == receipt.variant);
        (wanted.in_use != Some(receipt.fingerprint), variant, receipt.fingerprint)
    };
    receipts.sort_by_key(rank);
    for receipt in receipts {
        let same = without_machine(&expected(receipt.variant)?, locked) == without_machine(&receipt.inputs, locked);
        if same && host.store.artifact(&receipt.fingerprint)?.is_some() {
            let (variant, inputs) = (receipt.variant, receipt.inputs);
            return Ok(Some(Decided { variant, inputs, packages: Vec::new(), installation: Box::new(Kept) }));
        }
    }
    Ok(None)
}

/// What was decided about an installation.
#[derive(Debug)]
pub struct Decided {
    /// The accelerator.
    pub variant: Variant,
    /// Every input that decides what is installed, by name: the fingerprint is their digest.
    pub inputs: BTreeMap<String, String>,
    /// Packages of `[tools]` that must be in the store before the installation.
    pub packages: Vec<PackageRequirement>,
    /// The rest.
    pub installation: Box<dyn Installation>,
}

/// Where an installation works.
#[derive(Debug, Clone, Copy)]
pub struct Folders<'a> {
    /// The verified source tree. Read-only.
    pub source: &'a Path,
    /// An empty folder for whatever is needed meanwhile.
    pub work: &'a Path,
    /// An empty folder that gets the installed files.
    pub prefix: &'a Path,
    /// The log file.
    pub log: &'a Path,
    /// A second installation, to compare it: it is made elsewhere, and in another environment.
    pub again: bool,
}

/// An installation that was decided.
pub trait Installation: Debug + Send + Sync {
    /// Carries it out, under the name `label` in progress messages. None when a package of the store turned out to be damaged,
    /// which counts as missing from then on.
    ///
    /// # Errors
    /// The build's, or when the user asked to stop.
    fn install(&self, host: &Host, label: &str, folders: &Folders<'_>) -> Result<Option<Built>, Failure>;
}

/// Every method to install engines, with what each has found out about this machine.
#[derive(Debug)]
pub struct Installers<'a> {
    cmake: cmake::Cmake<'a>,
}

impl<'a> Installers<'a> {
    /// The methods, for this machine and lockfile.
    pub fn new(host: &'a Host, lock: &'a Lockfile, env: &'a Env) -> Self {
        Self { cmake: cmake::Cmake::new(host, lock, env) }
    }

    /// Decides everything about an installation, by the method that the engine's adapter names. Changes nothing.
    ///
    /// # Errors
    /// When the engine cannot be installed by this method on this machine.
    pub fn decide(&mut self, wanted: &Wanted<'_>) -> Result<Decided, Failure> {
        match wanted.adapter.install_method() {
            InstallMethod::Cmake(project) => self.cmake.decide(project, wanted),
        }
    }
}
