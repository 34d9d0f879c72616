//! Writing a step's keys and values into their slots, in place.

use crate::cache::{LayerStore, Step};
use candle_core::{Result, Tensor};
use std::cell::Cell;

thread_local! {
    /// A buffer that is kept from step to step.
    static SLOTS: Cell<Vec<u32>> = Cell::default();
}

/// Moves what left the window to the kept tokens, then stores `k` and `v` `[step.len, kv_heads, head_dim]`.
pub(super) fn write_rows(k: &Tensor, v: &Tensor, step: Step, store: &mut LayerStore) -> Result<()> {
    store.apply_moves()?;
    let kv_heads = store.shape().kv_heads();
    // Row after row: token, then head.
    let mut slots = SLOTS.take();
    slots.clear();
    slots.extend((0..step.len * kv_heads).map(|row| store.table().recent_slot(row % kv_heads, step.start + row / kv_heads)));
    store.k().write(k, &slots)?;
    store.v().write(v, &slots)?;
    SLOTS.set(slots);
    Ok(())
}
