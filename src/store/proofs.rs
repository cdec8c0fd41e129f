//! What was proven on this machine, and when: that bytes on disk are the recorded ones, that an engine builds again with the
//! same bits, that a policy answered its smoke prompt. Sealed, so that a restored cache proves nothing.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::base::cancel::Cancel;
use crate::base::digest::Digest;
use crate::base::fs;

use super::{Store, StoreError};

const FILE: &str = "proofs.json";
const PURPOSE: &str = "proofs";
const MAX_BYTES: u64 = 4 << 20;
/// The oldest beyond this number go.
const MAX_PROOFS: usize = 10_000;

/// What is proven of a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Claim {
    /// A source tree's files are those of its digest.
    Source,
    /// An installed engine's files are those of its receipt.
    Engine,
    /// A second build of the engine elsewhere gave the same bits.
    Bits,
    /// A weights file's bytes have its digest.
    Weights,
    /// A policy answered its smoke prompt as expected, with this engine and these weights.
    Smoke,
}

/// How a proof ended, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Seconds since 1970.
    pub at: u64,
    /// Whether the claim held.
    pub holds: bool,
}

/// Every proof, the latest of each claim and subject.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Proofs(BTreeMap<String, Proof>);

impl Proofs {
    /// The latest proof of a claim.
    pub fn of(&self, claim: Claim, subject: &Digest) -> Option<Proof> {
        self.0.get(&name(claim, subject)).copied()
    }
}

fn name(claim: Claim, subject: &Digest) -> String {
    format!("{claim:?} {subject}")
}

impl Store {
    /// What was proven here so far; nothing where that cannot be read.
    pub fn proofs(&self) -> Proofs {
        let read = || {
            let sealed = fs::read_bounded(&self.root().join(FILE), MAX_BYTES).ok()?;
            serde_json::from_slice(self.key.open(PURPOSE, &sealed)?).ok()
        };
        read().unwrap_or_default()
    }

    /// Adds proofs that were made now. A cache that is read-only keeps none, which is no error.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add_proofs(&self, proofs: impl IntoIterator<Item = (Claim, Digest, bool)>) -> Result<(), StoreError> {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut new: BTreeMap<String, Proof> = BTreeMap::new();
        for (claim, subject, holds) in proofs {
            // Of several files with one digest, all must have it.
            new.entry(name(claim, &subject)).or_insert(Proof { at, holds: true }).holds &= holds;
        }
        if new.is_empty() {
            return Ok(());
        }
        let added = self.lock(PURPOSE, &Cancel::default(), || {}).and_then(|_held| {
            let Proofs(mut all) = self.proofs();
            all.extend(new);
            if all.len() > MAX_PROOFS {
                let mut times: Vec<u64> = all.values().map(|proof| proof.at).collect();
                times.sort_unstable();
                let oldest = times[all.len() - MAX_PROOFS];
                all.retain(|_, proof| proof.at >= oldest);
            }
            let text = serde_json::to_vec(&Proofs(all)).unwrap_or_default();
            Ok(fs::write_atomic(&self.root().join(FILE), &self.key.seal(PURPOSE, &text))?)
        });
        match added {
            Err(StoreError::Fs(error)) if error.is_read_only() => Ok(()),
            added => added,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::seal::Key;

    #[test]
    fn proofs_of_another_machine_prove_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = |key: &str| Store::open(folder.path(), Key::from_secret(key)).unwrap();
        let subject = Digest::of(b"engine");
        store("here").add_proofs([(Claim::Bits, subject, true), (Claim::Engine, subject, true)]).unwrap();
        store("here").add_proofs([false, true].map(|holds| (Claim::Engine, subject, holds))).unwrap();
        let holds = |key: &str, claim| store(key).proofs().of(claim, &subject).map(|proof| proof.holds);
        assert_eq!(holds("here", Claim::Bits), Some(true));
        assert_eq!(holds("here", Claim::Engine), Some(false));
        assert_eq!(holds("here", Claim::Source), None);
        assert_eq!(holds("there", Claim::Bits), None);
    }
}
