//! Work spread over candle's threads.

use std::sync::OnceLock;

/// Fewer calls than this are not worth waking threads for.
const LEAST: usize = 8;

/// `f(0), f(1), .. f(count - 1)`
pub(crate) fn map<T: Send + Sync>(count: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    if count < LEAST {
        return (0..count).map(f).collect();
    }
    let slots: Vec<OnceLock<T>> = (0..count).map(|_| OnceLock::new()).collect();
    candle_core::utils::barrier_pool().execute_chunked(count, |range| {
        for index in range {
            slots[index].get_or_init(|| f(index));
        }
    });
    // Every index was handed out, so every slot is filled.
    slots.into_iter().filter_map(OnceLock::into_inner).collect()
}
