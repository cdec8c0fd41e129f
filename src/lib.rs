//! aitools: locks, builds, verifies and runs local LLM engines and their models.
//!
//! **A manifest says what we want, a lockfile says exactly what that is, a plan says what is missing, the store holds only
//! what was verified, and an engine adapter turns a policy into a running process.**
//!
//! This is the map. A module uses strictly lower layers; siblings do not import each other; a test in `ci/` holds the table.
//!
//! | layer | module | what lives there |
//! |---|---|---|
//! | 6 | `cli` | words and terminal: the only place that prints, reads the environment or picks an exit code; `verbs/` has one file per command |
//! | 5 | `ops` | one file per verb: orchestration, no parsing, no printing; `project` finds and loads, `demand` says what policies need, `survey` what is there; `install/` has one file per way to install an engine |
//! | 4 | `gateway` | the server: scheduler, engine processes, endpoints, metrics; asks the layer above for policies and verified inputs |
//! | 3 | `engine` | one file per engine: recipe, checks, launch, wire protocol; `ENGINES` lists them; `backend` keeps one alive |
//! | 3 | `plan` | pure: (what is wanted, what is there) -> what to do, and why |
//! | 2 | `store` | owns what is on disk: blobs, trees, tools, artifacts; nothing enters unverified; `seal` says whose records are believed |
//! | 2 | `source` | one file per source kind (`git`, `hf`, `url`, `path`, `pypi`): resolve a request to a pin, bring bytes to a staging folder; `download` and `archive` serve them; `oci` is how bundles travel |
//! | 2 | `build` | runs one recipe in a child process of ours, off the network; `fingerprint` names its inputs; knows nothing of engines |
//! | 1 | `format` | one file per on-disk format: bytes in, typed value or diagnostics out |
//! | 1 | `report` | what long work tells: events, progress, whether to stop |
//! | 0 | `base` | names, diagnostics, digests, platform, files, locks, HTTP, process groups, cancellation |
//!
//! What the words mean: a *spec* is asked for, a *pin* is locked, a *recipe* and its *fingerprint* say how something is built,
//! *weights* and *artifacts* are held, a *step* is due for a *reason*, a *policy* is chosen, a *launch* becomes a *backend*.
//!
//! Every file that is read or written: `manifests/<name>.toml` and `.lock`, `configs/models/<engine>/<policy>.yaml`
//! and `.golden.json` beside it, `configs/settings.toml`, links under `models/`, `build/` and `external/`, logs under `.aitools/` of the project; the
//! store's folders (see [`store`]); the Hugging Face cache (see [`source::hub_cache`]); one key in the state folder; the user's own
//! `settings.toml` in the configuration folder.

pub mod base;
pub mod build;
pub mod cli;
pub mod engine;
pub mod format;
pub mod gateway;
pub mod ops;
pub mod plan;
pub mod report;
pub mod source;
pub mod store;
