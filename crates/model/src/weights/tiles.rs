//! Matrices of 16-bit floats, as most checkpoints are published: kept in 16 bits, multiplied in f32.

use candle_core::{CpuStorage, Device, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use sparse_attn::cache::{LANES, Order};
use sparse_attn::parallel::Unset;
use sparse_attn::simd::{Numbers, Rows, dot_octets, with_f32};

/// Tiles that meet many tokens together, so that tokens are read as seldom as that.
const TILES_OF_MANY: usize = 2;

/// Tiles that a few tokens meet in one call.
const TILES_OF_FEW: usize = 16;

/// From this many tokens on they are many.
const MANY_TOKENS: usize = 12;

/// A matrix `[rows, columns]`, packed once: [`LANES`] rows side by side, column by column, so that one instruction multiplies a number
/// of each with one activation. The last rows are filled up with zeros.
#[derive(Debug)]
pub struct Tiles {
    packed: Packed, // [tiles, columns, LANES]
    rows: usize,
    columns: usize,
}

#[derive(Debug)]
enum Packed {
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

/// `numbers` `[rows, columns]` in tiles.
fn pack<T: Copy + Default + Send + Sync>(numbers: &[T], [rows, columns]: [usize; 2]) -> Vec<T> {
    sparse_attn::parallel::filled(rows.div_ceil(LANES) * columns * LANES, columns * LANES, |tile, out| {
        for (lane, row) in (tile * LANES..rows.min((tile + 1) * LANES)).enumerate() {
            for (column, number) in numbers[row * columns..(row + 1) * columns].iter().enumerate() {
                out[column * LANES + lane] = *number;
            }
        }
    })
}

impl Tiles {
    /// Packs `matrix` `[rows, columns]`, f16 or bf16, on the host.
    ///
    /// # Errors
    /// If it is none of those.
    pub fn new(matrix: &Tensor) -> Result<Self> {
        let (rows, columns) = matrix.dims2()?;
        let matrix = matrix.contiguous()?;
        let (storage, layout) = matrix.storage_and_layout();
        let span = layout.start_offset()..layout.start_offset() + rows * columns;
        let packed = match &*storage {
            Storage::Cpu(CpuStorage::F16(numbers)) => Packed::F16(pack(&numbers[span], [rows, columns])),
            Storage::Cpu(CpuStorage::BF16(numbers)) => Packed::Bf16(pack(&numbers[span], [rows, columns])),
            _ => bail!("tiles: {:?} on {:?} is no matrix of 16-bit floats on the host", matrix.dtype(), matrix.device()),
        };
        Ok(Self { packed, rows, columns })
    }

    fn stored(&self) -> Rows<'_> {
        let numbers = match &self.packed {
            Packed::F16(numbers) => Numbers::F16(numbers),
            Packed::Bf16(numbers) => Numbers::Bf16(numbers),
        };
        Rows { numbers, width: self.columns }
    }

    /// `x W'`: `[tokens, columns]` -> `[tokens, rows]`, f32.
    ///
    /// # Errors
    /// If the widths differ.
    pub fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, columns) = x.dims2()?;
        if columns != self.columns {
            bail!("product: activations {:?} do not fit a matrix [{}, {}]", x.shape(), self.rows, self.columns);
        }
        with_f32(x, |x| self.multiply_host(x, tokens))
    }

    /// `x`: `[tokens, columns]`
    fn multiply_host(&self, x: &[f32], tokens: usize) -> Result<Tensor> {
        let (stored, tiles) = (self.stored(), self.rows.div_ceil(LANES));
        let at_once = if tokens < MANY_TOKENS { TILES_OF_FEW } else { TILES_OF_MANY };
        let mut out = Unset::<f32>::new(tokens * self.rows);
        let places = out.places();
        candle_core::utils::barrier_pool().execute_chunked(tiles.div_ceil(at_once), |parts| {
            let mut products = Vec::new(); // [tokens, tiles of the part * LANES]
            for part in parts {
                let first = part * at_once;
                let octets = (first..tiles.min(first + at_once)).map(|tile| [2 * tile as u32, 2 * tile as u32 + 1]);
                let pairs: Vec<[u32; 2]> = octets.collect();
                products.resize(tokens * pairs.len() * LANES, 0.0);
                dot_octets(stored, x, &pairs, &mut products);
                let count = (self.rows - first * LANES).min(pairs.len() * LANES);
                for (token, products) in products.chunks_exact(pairs.len() * LANES).enumerate() {
                    for (row, product) in products[..count].iter().enumerate() {
                        // SAFETY: `out` holds tokens * rows numbers; these rows of every token are this part's alone.
                        unsafe { places.at(token * self.rows + first * LANES + row).write(*product) };
                    }
                }
            }
        });
        // SAFETY: every part wrote its rows of every token.
        Tensor::from_vec(unsafe { out.set() }, (tokens, self.rows), &Device::Cpu)
    }

    /// Rows by index: ids `[tokens]` u32 -> `[tokens, columns]` f32.
    ///
    /// # Errors
    /// If an id is beyond the rows.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        let ids = ids.to_vec1::<u32>()?;
        if let Some(row) = ids.iter().find(|row| **row as usize >= self.rows) {
            bail!("row {row} of a matrix of {} rows", self.rows);
        }
        let out = self.stored().gather(Order::Tiles, &ids);
        Tensor::from_vec(out, (ids.len(), self.columns), &Device::Cpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    #[test]
    fn products_and_rows_are_those_of_the_f32_matrix() -> Result<()> {
        for (rows, columns) in [(16, 64), (70, 40), (5, 3), (33, 129), (600, 576)] {
            for dtype in [DType::F16, DType::BF16] {
                let matrix = Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu)?.to_dtype(dtype)?;
                let (tiles, dense) = (Tiles::new(&matrix)?, matrix.to_dtype(DType::F32)?);
                for tokens in [1, 2, 11, 12, 50] {
                    let x = Tensor::randn(0f32, 1.0, (tokens, columns), &Device::Cpu)?;
                    let off = (tiles.multiply(&x)? - x.matmul(&dense.t()?)?)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
                    assert!(off < 1e-5 * columns as f32, "{dtype:?} [{rows}, {columns}], {tokens} tokens: {off}");
                }
                let ids = Tensor::new(&[0u32, rows as u32 - 1, 2], &Device::Cpu)?;
                assert_eq!(tiles.rows(&ids)?.to_vec2::<f32>()?, dense.index_select(&ids, 0)?.to_vec2::<f32>()?);
                assert!(tiles.rows(&Tensor::new(&[rows as u32], &Device::Cpu)?).is_err());
            }
        }
        let matrix = Tensor::zeros((4, 4), DType::BF16, &Device::Cpu)?;
        assert!(Tiles::new(&matrix)?.multiply(&Tensor::zeros((2, 5), DType::F32, &Device::Cpu)?).is_err());
        assert!(Tiles::new(&matrix.to_dtype(DType::F32)?).is_err());
        Ok(())
    }
}
