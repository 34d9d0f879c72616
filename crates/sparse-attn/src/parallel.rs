//! Work spread over candle's threads, so that no second pool competes with it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

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

/// [`for_each_mut`] of items that take long and not equally long, the longest last: each goes to the thread that is free, from the
/// last to the first, and a thread makes one `scratch`. Must not be called from inside a call of this module.
pub fn for_each_long<T: Send, S>(items: &mut [T], scratch: impl Fn() -> S + Sync, f: impl Fn(&mut S, &mut T) + Sync) {
    let count = items.len();
    if count < 2 {
        let mut scratch = scratch();
        return items.iter_mut().for_each(|item| f(&mut scratch, item));
    }
    let places = Places::of(items);
    let taken = AtomicUsize::new(0);
    candle_core::utils::barrier_pool().execute(|_| {
        let mut scratch = scratch();
        loop {
            let index = taken.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                break;
            }
            // SAFETY: every index is taken once, and `execute` returns when all threads are done.
            f(&mut scratch, unsafe { &mut *places.at(count - 1 - index) });
        }
    });
}

/// A list of `count`, made by all threads: `fill(i, part)` for each part of `size` members, the i-th from member `i * size` on, which
/// come as defaults. Memory is touched first where it is filled.
pub fn filled<T: Copy + Default + Send>(count: usize, size: usize, fill: impl Fn(usize, &mut [T]) + Sync) -> Vec<T> {
    let mut list = Unset::<T>::new(count);
    let places = list.places();
    let size = size.max(1);
    let part = |index: usize| {
        let (first, len) = (index * size, size.min(count - index * size));
        // SAFETY: the list has room for these members, which this thread alone was handed.
        let part = unsafe {
            (0..len).for_each(|i| places.at(first + i).write(T::default()));
            std::slice::from_raw_parts_mut(places.at(first), len)
        };
        fill(index, part);
    };
    match count.div_ceil(size) {
        // One part is done before the other threads are awake.
        1 => part(0),
        parts => candle_core::utils::barrier_pool().execute_chunked(parts, |range| range.for_each(&part)),
    }
    // SAFETY: every part was handed out.
    unsafe { list.set() }
}

/// A list whose members have no values yet: who sets all of them spares writing zeros first, on one thread.
#[derive(Debug)]
pub struct Unset<T> {
    list: Vec<T>,
    count: usize,
}

impl<T: Copy> Unset<T> {
    /// Room for `count` members.
    pub fn new(count: usize) -> Self {
        Self { list: Vec::with_capacity(count), count }
    }

    /// Where they are to be written.
    pub fn places(&mut self) -> Places<T> {
        Places(self.list.as_mut_ptr())
    }

    /// The list.
    ///
    /// # Safety
    /// Every member must have been written.
    pub unsafe fn set(mut self) -> Vec<T> {
        // SAFETY: as many were allocated, and the caller wrote them.
        unsafe { self.list.set_len(self.count) };
        self.list
    }
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
            let mut others: Vec<usize> = (0..count).collect();
            for_each_long(&mut others, || 1, |one, item| *item = 2 * *item + *one);
            assert_eq!(items, others);
            let parts = filled(count, 7, |part, members: &mut [usize]| {
                members.iter_mut().zip(part * 7..).for_each(|(member, i)| *member += 2 * i + 1)
            });
            assert_eq!(items, parts);
        }
    }
}
