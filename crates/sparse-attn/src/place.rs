//! Memory of a device that layers use one after the other.

use crate::backend::cuda::uninitialised;
use candle_core::{DType, Device, Result, Shape, Tensor};

/// Where kernels put numbers that nobody needs any more when the next ones are put there. Only a GPU's are: the host's operations make tensors of
/// their own.
#[derive(Debug, Default)]
pub struct Place {
    /// The memory, and it as it was taken last.
    kept: Option<[Tensor; 2]>,
    keeps: bool,
}

/// How an outcome may come, and where it may be put.
#[derive(Debug)]
pub struct Destination<'a> {
    /// f32, or what the outcome would be rounded to.
    pub dtype: DType,
    /// Where a GPU puts it.
    pub place: &'a mut Place,
}

impl Place {
    /// Whether what is taken from now on stays for the next time.
    pub fn keep(&mut self, keeps: bool) {
        self.keeps = keeps;
        if !keeps {
            self.kept = None;
        }
    }

    /// Memory for a tensor, of which each number is to be written before it is read.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn take(&mut self, shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        let count = shape.elem_count();
        let kept = self.kept.take().filter(|[all, _]| all.dtype() == dtype && all.elem_count() >= count);
        let (all, taken) = match kept {
            Some([all, last]) if *last.shape() == shape => (all, last),
            Some([all, _]) => {
                let taken = all.narrow(0, 0, count)?.reshape(shape)?;
                (all, taken)
            }
            None => {
                let all = uninitialised(count, dtype, device)?;
                let taken = all.reshape(shape)?;
                (all, taken)
            }
        };
        self.kept = self.keeps.then(|| [all, taken.clone()]);
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_lies_where_the_last_did_if_there_is_room() -> Result<()> {
        let fill = |tensor: &Tensor, number: f32| tensor.slice_set(&tensor.ones_like()?.affine(f64::from(number), 0.0)?, 0, 0);
        let mut place = Place::default();
        let mut take = |keeps: bool, shape: (usize, usize)| {
            place.keep(keeps);
            place.take(shape, DType::F32, &Device::Cpu)
        };
        let first = take(true, (4, 6))?;
        fill(&first, 1.0)?;
        for (shape, shares) in [((4, 6), true), ((2, 6), true), ((3, 2), true), ((4, 6), true), ((5, 6), false)] {
            let next = take(true, shape)?;
            assert_eq!(next.dims(), [shape.0, shape.1]);
            fill(&next, 2.0)?;
            assert_eq!(first.to_vec2::<f32>()?[0][0] == 2.0, shares, "{shape:?}");
            fill(&first, 1.0)?;
        }
        let (one, other) = (take(false, (5, 6))?, take(false, (5, 6))?);
        fill(&one, 1.0)?;
        fill(&other, 2.0)?;
        assert_eq!(one.to_vec2::<f32>()?[0][0], 1.0);
        Ok(())
    }
}
