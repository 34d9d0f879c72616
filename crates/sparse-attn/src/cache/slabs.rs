//! Which layers have their pools in one allocation: memory for all of them is had in the time that it takes for one.

use super::{LayerStore, Pool};
use candle_core::Result;
use std::ops::Range;

/// Bytes of an allocation, if a single layer has no more.
const SLAB_BYTES: usize = 64 << 20;

/// Neighbouring layers whose pools lie in one allocation, which is given back when the last of them leaves it: so all do at once.
#[derive(Debug)]
pub(super) struct Slabs(Vec<Range<usize>>);

/// New pools of some layers, keys and values of each.
pub(super) type NewPools = Vec<[Pool; 2]>;

impl Slabs {
    /// Every layer by itself.
    pub(super) fn single(layers: usize) -> Self {
        Self((0..layers).map(|layer| layer..layer + 1).collect())
    }

    /// Other slabs instead of those of which a layer is due, where each layer takes so many bytes and `joins` the one before it: returns the new
    /// ones.
    pub(super) fn renew(
        &mut self,
        is_due: impl Fn(usize) -> bool,
        bytes_of: impl Fn(usize) -> usize,
        joins: impl Fn(usize) -> bool,
    ) -> Vec<Range<usize>> {
        let (mut all, mut new): (Vec<Range<usize>>, Vec<Range<usize>>) = (Vec::new(), Vec::new());
        let mut bytes = 0;
        for slab in std::mem::take(&mut self.0) {
            if !slab.clone().any(&is_due) {
                all.push(slab);
                continue;
            }
            for layer in slab {
                let of_layer = bytes_of(layer);
                match new.last_mut() {
                    Some(last) if last.end == layer && bytes + of_layer <= SLAB_BYTES && joins(layer) => {
                        last.end = layer + 1;
                        bytes += of_layer;
                    }
                    _ => {
                        new.push(layer..layer + 1);
                        bytes = of_layer;
                    }
                }
            }
        }
        all.extend(new.iter().cloned());
        all.sort_by_key(|slab| slab.start);
        self.0 = all;
        new
    }
}

/// Which layers may lie beside the one before them, as [`Slabs::renew`] asks.
pub(super) fn joins(layers: &[LayerStore]) -> impl Fn(usize) -> bool {
    |layer| layers[layer].may_join(&layers[layer - 1])
}

/// Pools for the layers of a slab, with so many pages each, in which nothing is written.
///
/// # Errors
/// If the device has no memory for them.
pub(super) fn pools_of(layers: &[LayerStore], pages: impl Fn(usize) -> usize) -> Result<NewPools> {
    if let [layer] = layers
        && !layer.may_join(layer)
    {
        return Ok(vec![[layer.k().empty(pages(0))?, layer.v().empty(pages(0))?]]);
    }
    let like: Vec<_> =
        layers.iter().enumerate().flat_map(|(index, layer)| [(layer.k(), pages(index)), (layer.v(), pages(index))]).collect();
    let mut pools = Pool::side_by_side(&like)?.into_iter();
    Ok(std::iter::from_fn(|| Some([pools.next()?, pools.next()?])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{KvDtype, Order, PAGE_SIZE};
    use candle_core::{Device, Tensor};

    #[test]
    fn small_neighbours_share_a_slab_and_leave_it_together() {
        let mut slabs = Slabs::single(6);
        // Layer 3 has other rows than layer 2.
        let joins = |layer: usize| layer != 3;
        assert_eq!(slabs.renew(|layer| layer < 5, |_| SLAB_BYTES / 2, joins), [0..2, 2..3, 3..5]);
        assert_eq!(slabs.0, [0..2, 2..3, 3..5, 5..6]);
        // Layer 1 needs pages: layer 0 is made again with it, nobody else.
        assert_eq!(slabs.renew(|layer| layer == 1, |_| SLAB_BYTES, joins), [0..1, 1..2]);
        assert!(slabs.renew(|_| false, |_| 1, joins).is_empty());
        assert_eq!(slabs.renew(|_| true, |_| 1, joins), [0..3, 3..6]);
        assert_eq!(slabs.0, [0..3, 3..6]);
    }

    #[test]
    fn pools_side_by_side_hold_their_own_rows() -> Result<()> {
        let pool = |dtype| Pool::new(dtype, Order::Rows, 32, 1, &Device::Cpu);
        for dtype in [KvDtype::F16, KvDtype::Q8_0] {
            let old = [pool(dtype)?, pool(dtype)?, pool(dtype)?];
            let new = Pool::side_by_side(&[(&old[0], 2), (&old[1], 0), (&old[2], 3)])?;
            assert_eq!(new.iter().map(Pool::pages).collect::<Vec<_>>(), [2, 0, 3]);
            for (index, pool) in new.iter().enumerate().filter(|(_, pool)| pool.pages() > 0) {
                let ones = Tensor::full(index as f32 + 1.0, (PAGE_SIZE, 32), &Device::Cpu)?;
                for (to, from) in pool.tensors().zip(pool.encode(&ones)?) {
                    to.slice_set(&from.unsqueeze(0)?, 0, pool.pages() - 1)?;
                }
            }
            let sums = |pool: &Pool| pool.read(&[0, pool.pages() as u32 - 1])?.sum(1)?.to_vec1::<f32>();
            let want = |number: f32| [vec![0.0; PAGE_SIZE], vec![32.0 * number; PAGE_SIZE]].concat();
            for (pool, number) in [(&new[0], 1.0), (&new[2], 3.0)] {
                assert!(sums(pool)?.iter().zip(want(number)).all(|(got, want)| (got - want).abs() < 0.1), "{:?}", sums(pool)?);
            }
        }
        Ok(())
    }
}
