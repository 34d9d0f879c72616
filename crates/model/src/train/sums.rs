//! What is kept of the texts that were read: sums, from which gates are solved, and which an interrupted training goes on from.

use super::{LEAST, Seen};
use candle_core::{Device, Result, Tensor, bail};
use nalgebra::{Cholesky, DMatrix};
use safetensors::{Dtype, SafeTensors, View};
use sparse_attn::token_router::Feedforward;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// `format` of the files that this version goes on from.
const FORMAT: &str = "foveate.training/2";

/// Sums of one layer: `X'X` and `X'y`, where a row of `X` is an attention input and 1.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sums {
    pub(super) xx: DMatrix<f64>, // [width + 1, width + 1]
    pub(super) xy: DMatrix<f64>, // [width + 1, kv_heads]
    pub(super) rows: usize,
}

impl Sums {
    pub(super) fn new(width: usize, kv_heads: usize) -> Self {
        Self { xx: DMatrix::zeros(width + 1, width + 1), xy: DMatrix::zeros(width + 1, kv_heads), rows: 0 }
    }

    /// Adds the tokens `useful` of what was seen of a text.
    pub(super) fn add(&mut self, seen: &Seen, useful: Range<usize>, width: usize) -> Result<()> {
        let mut rows = Vec::with_capacity(useful.len() * (width + 1));
        for row in seen.hidden.chunks_exact(width).skip(useful.start).take(useful.len()) {
            rows.extend_from_slice(row);
            rows.push(1.0);
        }
        let x = Tensor::from_vec(rows, (useful.len(), width + 1), &Device::Cpu)?;
        let y: Vec<f32> = useful.clone().flat_map(|t| seen.labels.iter().map(move |labels| labels[t].max(LEAST).ln())).collect();
        let y = Tensor::from_vec(y, (useful.len(), seen.labels.len()), &Device::Cpu)?;
        let products = [x.t()?.contiguous()?.matmul(&x)?, x.t()?.contiguous()?.matmul(&y)?];
        for (sum, product) in [&mut self.xx, &mut self.xy].into_iter().zip(products) {
            let (rows, columns) = product.dims2()?;
            let values = product.flatten_all()?.to_vec1::<f32>()?;
            *sum += DMatrix::from_row_iterator(rows, columns, values.into_iter().map(f64::from));
        }
        self.rows += useful.len();
        Ok(())
    }

    /// `(X'X + ridge) w = X'y`; the constant is not held back.
    pub(super) fn solve(self, ridge: f64, width: usize, kv_heads: usize) -> Result<Feedforward> {
        let mut xx = self.xx;
        let weight = ridge * (0..width).map(|i| xx[(i, i)]).sum::<f64>() / width as f64;
        (0..width).for_each(|i| xx[(i, i)] += weight);
        let Some(factors) = Cholesky::new(xx) else {
            bail!("training: the sums over {} tokens cannot be solved; more text, or a larger ridge", self.rows);
        };
        let solution = factors.solve(&self.xy); // [width + 1, kv_heads]
        let values: Vec<f32> =
            (0..kv_heads).flat_map(|head| (0..width).map(move |i| (head, i))).map(|(head, i)| solution[(i, head)] as f32).collect();
        let bias: Vec<f32> = (0..kv_heads).map(|head| solution[(width, head)] as f32).collect();
        if values.iter().chain(&bias).any(|x| !x.is_finite()) {
            bail!("training: the solution is not finite");
        }
        Ok(Feedforward {
            hidden: None,
            weight: Tensor::from_vec(values, (kv_heads, width), &Device::Cpu)?,
            bias: Tensor::from_vec(bias, kv_heads, &Device::Cpu)?,
        })
    }
}

/// Saves the sums of the layers that learn, and how many texts are in them; whole or not at all. `key` names what they are of.
pub(super) fn save(path: &Path, key: &str, done: usize, sums: &[Option<Sums>]) -> Result<()> {
    let mut metadata: HashMap<String, String> =
        [("format", FORMAT), ("key", key), ("done", &done.to_string())].map(|(name, text)| (name.to_string(), text.to_string())).into();
    let mut tensors = Vec::new();
    for (layer, sums) in sums.iter().enumerate().filter_map(|(layer, sums)| Some((layer, sums.as_ref()?))) {
        metadata.insert(format!("rows.{layer}"), sums.rows.to_string());
        tensors.push((format!("{layer}.xx"), Transposed::of(&sums.xx)));
        tensors.push((format!("{layer}.xy"), Transposed::of(&sums.xy)));
    }
    let partial = path.with_extension("partial");
    safetensors::serialize_to_file(tensors, Some(metadata), &partial).map_err(candle_core::Error::wrap)?;
    std::fs::rename(&partial, path)?;
    Ok(())
}

/// Goes on from a file of [`save`]: fills `sums` and returns how many texts are in them. A file that is not there, or is of another
/// `key`, changes nothing: 0.
pub(super) fn resume(path: &Path, key: &str, sums: &mut [Option<Sums>]) -> Result<usize> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        bytes => bytes?,
    };
    let Ok((_, header)) = SafeTensors::read_metadata(&bytes) else { return Ok(0) };
    let metadata = header.metadata().clone().unwrap_or_default();
    let is = |name: &str, text: &str| metadata.get(name).is_some_and(|own| own == text);
    if !is("format", FORMAT) || !is("key", key) {
        return Ok(0);
    }
    let number = |name: &str| match metadata.get(name).and_then(|text| text.parse::<usize>().ok()) {
        Some(number) => Ok(number),
        None => bail!("{}: no number {name:?}: delete it to start again", path.display()),
    };
    let tensors = SafeTensors::deserialize(&bytes).map_err(candle_core::Error::wrap)?;
    for (layer, sums) in sums.iter_mut().enumerate().filter_map(|(layer, sums)| Some((layer, sums.as_mut()?))) {
        sums.rows = number(&format!("rows.{layer}"))?;
        for (name, matrix) in [("xx", &mut sums.xx), ("xy", &mut sums.xy)] {
            let tensor = tensors.tensor(&format!("{layer}.{name}")).map_err(candle_core::Error::wrap)?;
            if tensor.dtype() != Dtype::F64 || tensor.shape() != [matrix.ncols(), matrix.nrows()] {
                bail!("{}: {layer}.{name} is {:?}: delete it to start again", path.display(), tensor.shape());
            }
            let numbers = tensor.data().as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes));
            matrix.iter_mut().zip(numbers).for_each(|(x, number)| *x = number);
        }
    }
    number("done")
}

/// A matrix as a file has it: column after column.
struct Transposed<'a> {
    matrix: &'a DMatrix<f64>,
    shape: [usize; 2],
}

impl<'a> Transposed<'a> {
    fn of(matrix: &'a DMatrix<f64>) -> Self {
        Self { matrix, shape: [matrix.ncols(), matrix.nrows()] }
    }
}

impl View for Transposed<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F64
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.matrix.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into()
    }

    fn data_len(&self) -> usize {
        self.matrix.len() * 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_law_is_found_again() {
        let (width, kv_heads, tokens) = (6, 2, 400);
        let x = Tensor::randn(0f32, 1.0, (tokens, width), &Device::Cpu).unwrap();
        let truth = Feedforward {
            hidden: None,
            // Small, so that no label falls below the least.
            weight: Tensor::randn(0f32, 0.3, (kv_heads, width), &Device::Cpu).unwrap(),
            bias: Tensor::new(&[-3f32, -5.0], &Device::Cpu).unwrap(),
        };
        let scores = truth.score(&x).unwrap().t().unwrap().to_vec2::<f32>().unwrap();
        // Labels are attention: what is learnt is their logarithm.
        let labels = scores.iter().map(|scores| scores.iter().map(|score| score.exp().min(1e6)).collect()).collect();
        let seen = Seen { hidden: x.flatten_all().unwrap().to_vec1().unwrap(), labels };
        let mut sums = Sums::new(width, kv_heads);
        sums.add(&seen, 0..tokens, width).unwrap();
        let found = sums.solve(1e-9, width, kv_heads).unwrap();
        let far =
            |a: &Tensor, b: &Tensor| (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        assert!(far(&found.weight, &truth.weight) < 1e-3 && far(&found.bias, &truth.bias) < 1e-3);
    }

    #[test]
    fn what_is_saved_is_gone_on_from_and_only_for_the_same_texts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("training");
        let random = |rows: usize| DMatrix::from_fn(7, rows, |i, j| ((i * 31 + j * 17) % 23) as f64 / 7.0);
        let saved =
            vec![Some(Sums { xx: random(7), xy: random(2), rows: 40 }), None, Some(Sums { xx: random(7), xy: random(2), rows: 41 })];
        let empty = || vec![Some(Sums::new(6, 2)), None, Some(Sums::new(6, 2))];
        let mut sums = empty();
        assert_eq!(resume(&path, "these texts", &mut sums).unwrap(), 0);
        save(&path, "these texts", 3, &saved).unwrap();
        assert_eq!(resume(&path, "other texts", &mut sums).unwrap(), 0);
        assert_eq!(sums, empty());
        assert_eq!(resume(&path, "these texts", &mut sums).unwrap(), 3);
        assert_eq!(sums, saved);
        // A damaged file says so, or is not one of ours; never half of it.
        let bytes = std::fs::read(&path).unwrap();
        for cut in (0..bytes.len()).step_by(7) {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let mut sums = empty();
            assert!(!matches!(resume(&path, "these texts", &mut sums), Ok(done) if done > 0), "cut after {cut}");
        }
    }
}
