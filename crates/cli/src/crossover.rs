//! The context from which routed attention is faster than dense, as `bench --crossover` measured it for a model on this
//! machine. Kept in `foveate/crossover.json` under the user's cache directory.

use crate::engine::Checkpoint;
use crate::failure::{Failure, Kind};
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What was measured for this model, dtype and machine.
pub(crate) fn recall(checkpoint: &Checkpoint) -> Option<usize> {
    read()?.get(&key(checkpoint)).copied()
}

/// Keeps what was measured.
pub(crate) fn remember(checkpoint: &Checkpoint, tokens: usize) -> Result<PathBuf> {
    let Some(path) = path() else {
        return Err(Failure::new(Kind::Disk, "no place to keep the crossover: neither HOME nor XDG_CACHE_HOME is set").into());
    };
    let mut all = read().unwrap_or_default();
    all.insert(key(checkpoint), tokens);
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
        let partial = path.with_extension(format!("{}.partial", std::process::id()));
        std::fs::write(&partial, serde_json::to_string_pretty(&all)?)?;
        std::fs::rename(&partial, &path)
    };
    write().map_err(|error| Failure::new(Kind::Disk, format!("{}: {error}", path.display())))?;
    Ok(path)
}

fn path() -> Option<PathBuf> {
    Some(crate::source::cache::user_cache()?.join("foveate/crossover.json"))
}

/// A file that is not there, or that another version wrote, is no crossover.
fn read() -> Option<BTreeMap<String, usize>> {
    serde_json::from_str(&std::fs::read_to_string(path()?).ok()?).ok()
}

fn key(checkpoint: &Checkpoint) -> String {
    let keys = checkpoint.dtypes.k.name();
    format!("{} {} {keys} · {}", checkpoint.located.id, checkpoint.weights.dtype_name(), crate::device::machine(&checkpoint.device))
}
