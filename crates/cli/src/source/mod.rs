//! Where models come from: manifests, the Hub, a package mirror, local files.

pub(crate) mod cache;
mod hub;
mod integrity;
mod manifest;
mod mirror;
mod reference;
mod transfer;

pub(crate) use hub::Hub;
pub(crate) use integrity::Checksum;
pub(crate) use manifest::Manifest;
pub(crate) use reference::ModelReference;

use crate::failure::{Failure, Kind};
use anyhow::Result;
use model::Config;
use std::path::PathBuf;

/// A model that lies on this machine.
#[derive(Debug, Clone)]
pub(crate) struct Located {
    /// As the user would name it.
    pub(crate) id: String,
    /// A `.gguf` file or a directory in Hugging Face layout.
    pub(crate) path: PathBuf,
    /// The Hub commit, where it came from there.
    pub(crate) revision: Option<String>,
    /// SHA-256 of a single file, where known.
    pub(crate) sha256: Option<String>,
    /// The type to convert safetensors to at load.
    pub(crate) quantize: Option<String>,
    /// The manifest that names it.
    pub(crate) manifest: Option<&'static Manifest>,
}

impl Located {
    fn local(path: PathBuf, quantize: Option<String>) -> Self {
        Self { id: path.display().to_string(), path, revision: None, sha256: None, quantize, manifest: None }
    }
}

/// Refuses an architecture that cannot run.
pub(crate) fn check_architecture(id: &str, config: &Config) -> Result<()> {
    if model::arch::NAMES.contains(&config.model_type.as_str()) {
        return Ok(());
    }
    let what = format!("{id}: architecture {:?} is not supported", config.model_type);
    Err(Failure::malformed(what).why(format!("supported: {}", model::arch::NAMES.join(", "))).into())
}

/// Finds a model on this machine, and fetches it if it is not there.
pub(crate) fn obtain(reference: &ModelReference, hub: &Hub) -> Result<Located> {
    if let Some(located) = find(reference, hub)? {
        return Ok(located);
    }
    if hub.offline {
        let what = format!("{reference} is not on this machine, and fetching is off (--offline or HF_HUB_OFFLINE)");
        return Err(Failure::new(Kind::NotFound, what).hint(format!("foveate pull {reference}   (with a network)")).into());
    }
    pull(reference, hub)
}

/// Finds a model on this machine.
pub(crate) fn find(reference: &ModelReference, hub: &Hub) -> Result<Option<Located>> {
    match reference {
        ModelReference::Local { path, quant } => Ok(Some(Located::local(path.clone(), quant.clone()))),
        ModelReference::Manifest(manifest) => Ok(manifest.find(&hub.cache)),
        ModelReference::Hub { repo, quant, revision } => hub.find(repo, quant.as_deref(), revision),
    }
}

/// Fetches a model: what is complete is not fetched again, what is partial goes on.
pub(crate) fn pull(reference: &ModelReference, hub: &Hub) -> Result<Located> {
    match reference {
        ModelReference::Local { path, quant } => Ok(Located::local(path.clone(), quant.clone())),
        ModelReference::Manifest(manifest) => manifest.pull(hub),
        ModelReference::Hub { repo, quant, revision } => hub.pull(repo, quant.as_deref(), revision),
    }
}
