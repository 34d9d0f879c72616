//! `--route-log`: what every layer kept and read, as lines of JSON.

use crate::failure::{Failure, Kind};
use anyhow::Result;
use candle_core::Result as TensorResult;
use model::trace::ranges;
use serde_json::{Value, json};
use sparse_attn::select::Selection;
use sparse_attn::{Attended, Observer};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Writes a line for each layer of each step. A line that cannot be written ends the log, not the text.
#[derive(Debug)]
pub(super) struct RouteLog {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    out: BufWriter<File>,
    failed: Option<std::io::Error>,
}

impl RouteLog {
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(|error| Failure::new(Kind::Disk, format!("{}: {error}", path.display())))?;
        let state = Mutex::new(State { out: BufWriter::new(file), failed: None });
        Ok(Self { path: path.to_path_buf(), state })
    }

    /// Whether everything was written.
    pub(super) fn finish(&self) -> Result<()> {
        let Ok(mut state) = self.state.lock() else { return Ok(()) };
        let failed = state.failed.take().or_else(|| state.out.flush().err());
        failed.map_or(Ok(()), |error| Err(Failure::new(Kind::Disk, format!("{}: {error}", self.path.display())).into()))
    }
}

impl Observer for RouteLog {
    fn attended(&self, seen: Attended<'_>) -> TensorResult<()> {
        let line = line(&seen);
        if let Ok(mut state) = self.state.lock()
            && state.failed.is_none()
            && let Err(error) = writeln!(state.out, "{line}")
        {
            state.failed = Some(error);
        }
        Ok(())
    }
}

fn line(seen: &Attended<'_>) -> Value {
    let (store, step) = (seen.store, seen.step);
    let heads = 0..store.shape().kv_heads();
    // The tokens of the step that stay once they leave the window, per head.
    let admitted = |head: usize| {
        let bits = store.admitted(head)?;
        Some(ranges(&bits.positions(step.start..step.end()).collect::<Vec<_>>()))
    };
    let admitted: Option<Vec<_>> = heads.clone().map(admitted).collect();
    let tiles = match seen.selection {
        Selection::Every => Value::Null,
        Selection::Blocks(blocks) => blocks
            .tiles()
            .map(|tile| {
                let blocks: Vec<_> = heads.clone().map(|head| blocks.blocks(tile.end - 1, head)).collect();
                json!({"from": tile.start, "to": tile.end, "blocks": blocks})
            })
            .collect(),
    };
    json!({"layer": seen.layer, "from": step.start, "to": step.end(), "admitted": admitted, "selected": tiles})
}
