//! Work spread over candle's threads, so that no second pool competes with it.

use std::sync::OnceLock;

/// Fewer calls than this are not worth waking threads for.
const LEAST: usize = 8;

/// `f(0), f(1), .. f(count - 1)`
pub fn map<T: Send + Sync>(count: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
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

/// `f(scratch, i, &mut items[i])` for every `i`; a thread makes a `scratch` for the neighbours that it gets at once.
pub fn for_each_mut<T: Send, S>(items: &mut [T], scratch: impl Fn() -> S + Sync, f: impl Fn(&mut S, usize, &mut T) + Sync) {
    let count = items.len();
    let places = Places::of(items);
    candle_core::utils::barrier_pool().execute_chunked(count, |range| {
        let mut scratch = scratch();
        for index in range {
            // SAFETY: execute_chunked hands out every index of the list once, and returns when all are done; until then nothing
            // else touches the list, which this function has borrowed.
            f(&mut scratch, index, unsafe { &mut *places.at(index) });
        }
    });
}

/// Places of a list that threads fill, each its own.
#[derive(Debug)]
pub struct Places<T>(*mut T);

impl<T> Places<T> {
    /// The places of `list`, which must stay where it is and untouched while they are used.
    pub fn of(list: &mut [T]) -> Self {
        Self(list.as_mut_ptr())
    }

    /// The place of `index`: to be read and written only where it lies inside, and by one thread at a time.
    pub fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

// SAFETY: a place is only a pointer; who uses one promises that no other thread does, and members may go to another thread.
unsafe impl<T: Send> Sync for Places<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_member_is_visited_once() {
        for count in [0, 1, 7, 8, 1000] {
            let mut items: Vec<usize> = (0..count).collect();
            for_each_mut(&mut items, || 1, |one, index, item| *item += index + *one);
            assert_eq!(items, map(count, |index| 2 * index + 1));
        }
    }
}
