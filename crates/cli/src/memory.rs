//! The allocator, and when freed memory goes back to the system.

/// Tensors come and go with every operation: the system's allocator would map and fault their pages anew each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc.h, for which libmimalloc-sys has no name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Milliseconds after which freed memory goes back to the system while a model runs: longer than a chunk of a prompt takes, or the next
/// one faults and clears it all again.
const KEEP_FREED: std::ffi::c_long = 10_000;

/// Gives back what is free now: what opening a checkpoint takes is of no use to running it.
pub(crate) fn give_back() {
    // SAFETY: it only looks through what was freed.
    unsafe { libmimalloc_sys::mi_collect(true) };
}

/// From now on, keeps freed memory for a while.
pub(crate) fn keep_freed() {
    // SAFETY: an option of the allocator, which it reads when it next frees.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, KEEP_FREED) };
}
