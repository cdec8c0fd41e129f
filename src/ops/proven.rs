//! What was proven of the things that a policy uses, and when.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::base::digest::Digest;
use crate::store::proofs::{Claim, Proof, Proofs};

use super::demand::{Demand, demand, select};
use super::install::Purpose;
use super::{Failure, Host, Project, lock};

/// What was proven of a policy; none where nothing was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Proven {
    /// `verify` compared the engine's source with its locked digest.
    pub source: Option<Proof>,
    /// `verify` compared the installed engine with its receipt.
    pub engine: Option<Proof>,
    /// `reproduce` built the engine again, and compared the bits.
    pub bits: Option<Proof>,
    /// `verify` compared every file of the model with its locked digest: the oldest of these proofs.
    pub weights: Option<Proof>,
    /// `test` asked the smoke prompt.
    pub smoke: Option<Proof>,
}

/// What the answer of a smoke prompt depends on: the policy file, the engine's fingerprint and the main weights.
pub fn smoke_subject(policy_sha256: &Digest, fingerprint: &Digest, weights_sha256: &Digest) -> Digest {
    Digest::of(format!("{policy_sha256}\n{fingerprint}\n{weights_sha256}").as_bytes())
}

/// What was proven of a single policy's demand.
pub fn of(proofs: &Proofs, policy_sha256: &Digest, demand: &Demand<'_>) -> Proven {
    let engine = demand.engines.iter().find(|engine| engine.required.wanted).map(|engine| &engine.required);
    let model = demand.model();
    let files = model.map(|model| &model.required.files[..]).unwrap_or_default();
    let weights: Option<Vec<Proof>> = files.iter().map(|file| proofs.of(Claim::Weights, &file.sha256)).collect();
    // A failure counts more than any success.
    let weights = weights.and_then(|all| all.into_iter().min_by_key(|proof| (proof.holds, proof.at)));
    let main = model.and_then(|model| Some(files[*model.layout.parts.first()?].sha256));
    let of_engine = |claim| engine.and_then(|engine| proofs.of(claim, &engine.fingerprint));
    let smoke = || proofs.of(Claim::Smoke, &smoke_subject(policy_sha256, &engine?.fingerprint, &main?));
    Proven {
        source: engine.and_then(|engine| proofs.of(Claim::Source, &engine.tree)),
        engine: of_engine(Claim::Engine),
        bits: of_engine(Claim::Bits),
        weights,
        smoke: smoke(),
    }
}

/// What was proven of each of the named policies, or of all.
///
/// # Errors
/// When a name is unknown, or there is no lockfile.
pub fn all(host: &Host, project: &Project, names: &[String]) -> Result<BTreeMap<String, Proven>, Failure> {
    let (lockfile, proofs) = (lock::require(project)?, host.store.proofs());
    let mut all = BTreeMap::new();
    for file in select(project, names)? {
        if let Ok(demand) = demand(host, project, &lockfile, std::slice::from_ref(&file.name), Purpose::Install) {
            all.insert(file.name.clone(), of(&proofs, &file.digest, &demand));
        }
    }
    Ok(all)
}
