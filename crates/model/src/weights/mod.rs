//! Tensors by name, from safetensors or GGUF, read through a memory map.

pub mod gguf;
mod matrix;
mod product;
pub mod safetensors;
mod tiles;

pub use crate::gpu::DeviceMatrix;
pub use matrix::Matrix;
pub(crate) use product::MANY_TOKENS;
pub use tiles::Tiles;

use crate::Config;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor, bail};
use gguf::GgufFile;
use safetensors::SafetensorsFiles;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::Arc;

/// A tensor's name in either format: architectures write both beside each other.
#[derive(Debug, Clone, Copy)]
pub struct Name<'a> {
    /// Under the layer's prefix in Hugging Face checkpoints, e.g. `self_attn.q_proj.weight`.
    pub hf: &'a str,
    /// Under the layer's prefix in GGUF files, e.g. `attn_q.weight`.
    pub gguf: &'a str,
}

/// The weights of one checkpoint and the device they go to.
#[derive(Debug)]
pub struct Weights {
    source: Source,
    config: Config,
    device: Device,
    quantize: Option<GgmlDType>,
    arithmetic: Arithmetic,
}

/// How activations meet matrices in ggml blocks on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Arithmetic {
    /// What activations are rounded to.
    pub precision: Precision,
    /// How products are added up.
    pub order: SumOrder,
}

/// How the products of a weight row and a token are added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SumOrder {
    /// As is fastest for the tokens that come together.
    #[default]
    Fastest,
    /// In one order: a token's products are the same bits in a chunk of any size. Single tokens take up to half more time.
    Fixed,
}

/// What activations are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Rounded to 8 bits, a scale for every 32.
    #[default]
    Int8,
    /// In two parts of 8 bits, the second for what the first leaves out: twice the work, and differences between two runs are no
    /// longer those of rounding.
    Int16,
}

#[derive(Debug)]
enum Source {
    Safetensors(SafetensorsFiles),
    Gguf(GgufFile),
}

impl Weights {
    /// Opens a `.gguf` file, or a directory in Hugging Face layout (`config.json` and one or more
    /// safetensors files). Reads headers only.
    ///
    /// `quantize`: the ggml type that matrices of a safetensors checkpoint are converted to as they load.
    ///
    /// # Errors
    /// If the file or directory is not there, damaged, or not a supported checkpoint.
    pub fn open(path: &Path, device: &Device, quantize: Option<GgmlDType>) -> Result<Self> {
        let (source, config) = if path.is_dir() {
            let config_path = path.join("config.json");
            let text = read_config(&config_path)?;
            let config = Config::from_json(&text)
                .map_err(|error| candle_core::Error::Msg(format!("{}: {}", config_path.display(), crate::message(&error))))?;
            (Source::Safetensors(SafetensorsFiles::open(path)?), config)
        } else {
            let file = GgufFile::open(path)?;
            let config = Config::from_gguf(&file)?;
            (Source::Gguf(file), config)
        };
        Ok(Self { source, config, device: device.clone(), quantize, arithmetic: Arithmetic::default() })
    }

    /// The same weights, to be multiplied in this precision.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { arithmetic: Arithmetic { precision, ..self.arithmetic }, ..self }
    }

    /// The same weights, their products added in this order.
    pub fn with_order(self, order: SumOrder) -> Self {
        Self { arithmetic: Arithmetic { order, ..self.arithmetic }, ..self }
    }

    /// The same weights, to be loaded to `device`.
    pub fn on(self, device: &Device) -> Self {
        Self { device: device.clone(), ..self }
    }

    /// The checkpoint's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The GGUF file, if that is the format: tokenizers and chat templates are in its metadata.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.source {
            Source::Gguf(file) => Some(file),
            Source::Safetensors(_) => None,
        }
    }

    /// Gives back the memory that a mapped GGUF file's pages take: what is read of it later comes from the file again.
    pub fn let_go(&self) {
        if let Source::Gguf(file) = &self.source {
            file.let_go();
        }
    }

    /// Forgets a GGUF file's vocabulary, see [`GgufFile::forget_vocabulary`].
    pub fn forget_vocabulary(&mut self) {
        if let Source::Gguf(file) = &mut self.source {
            file.forget_vocabulary();
        }
    }

    /// Bytes the weights take in memory once loaded and used.
    pub fn loaded_bytes(&self) -> u64 {
        let packs = self.device.is_cpu() && !product::unpacks_fast();
        let packed = |dtype: GgmlDType, elements: u64| if packs { packed_bytes(dtype, elements) } else { 0 };
        match &self.source {
            Source::Gguf(file) => file.tensors().map(|t| t.bytes + packed(t.dtype, t.elements())).sum(),
            Source::Safetensors(files) => files
                .tensors()
                .map(|(shape, dtype)| {
                    let elements: u64 = shape.iter().map(|d| *d as u64).product();
                    match self.quantize {
                        Some(dtype) if shape.len() == 2 => {
                            elements / dtype.block_size() as u64 * dtype.type_size() as u64 + packed(dtype, elements)
                        }
                        _ if shape.len() == 2 => elements * dtype.size_in_bytes() as u64,
                        _ => elements * 4,
                    }
                })
                .sum(),
        }
    }

    /// Numbers that the checkpoint holds.
    pub fn parameters(&self) -> u64 {
        match &self.source {
            Source::Gguf(file) => file.tensors().map(gguf::TensorInfo::elements).sum(),
            Source::Safetensors(files) => files.tensors().map(|(shape, _)| shape.iter().map(|d| *d as u64).product::<u64>()).sum(),
        }
    }

    /// How the matrices are stored once loaded: `f32`, a ggml type, or the GGUF file's own name for its mix.
    pub fn dtype_name(&self) -> String {
        match (&self.source, self.quantize) {
            (Source::Gguf(file), _) => file.quant_name(),
            (_, Some(dtype)) => format!("{dtype:?}").to_lowercase(),
            (Source::Safetensors(files), None) => files.matrix_dtype().as_str().to_string(),
        }
    }

    /// Names the model, however its matrices are quantised: a hash of its shape and of some norms, which no format
    /// rounds further than bf16.
    ///
    /// # Errors
    /// If a norm cannot be read.
    pub fn fingerprint(&self) -> Result<String> {
        let Config { model_type, hidden_size, num_layers, vocab_size, heads, .. } = &self.config;
        let (q, kv, dim) = (heads.q_heads(), heads.kv_heads(), heads.head_dim());
        let mut hash = Sha256::new();
        hash.update(format!("{model_type} {hidden_size} {num_layers} {vocab_size} {q} {kv} {dim}"));
        // Gemma's norms multiply by 1 + w; the GGUF converter stores that sum.
        let shift = if model_type.starts_with("gemma") && self.gguf().is_none() { 1.0 } else { 0.0 };
        let norm = Name { hf: "input_layernorm.weight", gguf: "attn_norm.weight" };
        let last = Name { hf: "model.norm.weight", gguf: "output_norm.weight" };
        for (scope, name) in [(self.layer(0), norm), (self.layer(num_layers - 1), norm), (self.root(), last)] {
            for x in scope.tensor(name, &[*hidden_size])?.to_device(&Device::Cpu)?.to_vec1::<f32>()? {
                hash.update(half::bf16::from_f32(x + shift).to_le_bytes());
            }
        }
        Ok(hex(&hash.finalize()[..16]))
    }

    /// The tensors of decoder layer `layer`.
    pub fn layer(&self, layer: usize) -> Scope<'_> {
        Scope { weights: self, hf: format!("model.layers.{layer}."), gguf: format!("blk.{layer}.") }
    }

    /// The tensors outside the decoder layers.
    pub fn root(&self) -> Scope<'_> {
        Scope { weights: self, hf: String::new(), gguf: String::new() }
    }
}

/// A small text file, and no other.
fn read_config(path: &Path) -> Result<String> {
    const MAX_BYTES: u64 = 16 << 20;
    let fail = |what: String| candle_core::Error::Msg(format!("{}: {what}", path.display()));
    let metadata = std::fs::metadata(path).map_err(|error| fail(error.to_string()))?;
    if !metadata.is_file() || metadata.len() > MAX_BYTES {
        return Err(fail(format!("{} bytes, expected a file of at most {MAX_BYTES}", metadata.len())));
    }
    std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))
}

/// Bytes of the second copy that candle 0.11 packs for its CPU kernels when a matrix of these types first meets many tokens
/// (candle-core, quantized/repack_x86.rs and repack.rs): 6 bits a weight for Q4_K, about 8.5 for the others.
fn packed_bytes(dtype: GgmlDType, elements: u64) -> u64 {
    match dtype {
        GgmlDType::Q4K => elements * 6 / 8,
        GgmlDType::Q5K | GgmlDType::Q6K | GgmlDType::Q8_0 => elements * 17 / 16,
        _ => 0,
    }
}

/// The tensors under one prefix.
#[derive(Debug)]
pub struct Scope<'a> {
    weights: &'a Weights,
    hf: String,
    gguf: String,
}

impl Scope<'_> {
    fn full(&self, name: Name<'_>) -> String {
        match self.weights.source {
            Source::Safetensors(_) => format!("{}{}", self.hf, name.hf),
            Source::Gguf(_) => format!("{}{}", self.gguf, name.gguf),
        }
    }

    /// The device that tensors are loaded to.
    pub fn device(&self) -> &Device {
        &self.weights.device
    }

    /// Whether the checkpoint has this tensor.
    pub fn has(&self, name: Name<'_>) -> bool {
        let name = self.full(name);
        match &self.weights.source {
            Source::Safetensors(files) => files.has(&name),
            Source::Gguf(file) => file.tensor(&name).is_some(),
        }
    }

    /// Whether the weights come from GGUF, whose converter folds constants in (Gemma's norms).
    pub fn is_gguf(&self) -> bool {
        matches!(self.weights.source, Source::Gguf(_))
    }

    /// A tensor of exactly this shape, f32.
    ///
    /// # Errors
    /// If it is missing or has another shape.
    pub fn tensor(&self, name: Name<'_>, shape: &[usize]) -> Result<Tensor> {
        let name = self.full(name);
        match &self.weights.source {
            Source::Safetensors(files) => files.load(&name, shape, &self.weights.device)?.to_dtype(DType::F32),
            Source::Gguf(file) => file.load(&name, shape, &Device::Cpu)?.dequantize(&Device::Cpu)?.to_device(&self.weights.device),
        }
    }

    /// A tensor that not every checkpoint has.
    ///
    /// # Errors
    /// If it is there with another shape.
    pub fn optional_tensor(&self, name: Name<'_>, shape: &[usize]) -> Result<Option<Tensor>> {
        if self.has(name) { self.tensor(name, shape).map(Some) } else { Ok(None) }
    }

    /// A matrix `[rows, columns]` to multiply with, in the form it is stored.
    ///
    /// # Errors
    /// If it is missing or has another shape.
    pub fn matrix(&self, name: Name<'_>, rows: usize, columns: usize) -> Result<Matrix> {
        let name = self.full(name);
        match &self.weights.source {
            Source::Safetensors(files) => match self.weights.quantize {
                Some(dtype) if columns.is_multiple_of(dtype.block_size()) => {
                    let dense = files.load(&name, &[rows, columns], &Device::Cpu)?.to_dtype(DType::F32)?;
                    let blocks = QTensor::quantize(&dense, dtype)?;
                    match &self.weights.device {
                        Device::Cpu => Ok(Matrix::Quantized(Arc::new(blocks), self.weights.arithmetic)),
                        device => Matrix::to_device(&blocks.data()?, dtype, [rows, columns], device),
                    }
                }
                // Rows that no block of this type divides stay as they are.
                _ => Matrix::from_dense(files.load(&name, &[rows, columns], &self.weights.device)?),
            },
            Source::Gguf(file) if self.weights.device.is_cuda() => file
                .with_bytes(&name, &[rows, columns], |bytes, dtype| Matrix::to_device(bytes, dtype, [rows, columns], &self.weights.device)),
            Source::Gguf(file) => Matrix::from_qtensor(file.load(&name, &[rows, columns], &self.weights.device)?, self.weights.arithmetic),
        }
    }

    /// The matrix of a query or key projection, rows in Hugging Face order: in each head, the first half
    /// of head_dim holds one member of every rotated pair and the second half the other.
    ///
    /// llama.cpp's converter interleaves the pairs of `llama` checkpoints; this undoes it.
    ///
    /// # Errors
    /// If it is missing or has another shape.
    pub fn rotary_matrix(&self, name: Name<'_>, heads: usize, head_dim: usize, columns: usize) -> Result<Matrix> {
        match &self.weights.source {
            Source::Gguf(file) if file.interleaves_rotary_pairs() => {
                let full = self.full(name);
                let rows: Vec<usize> = (0..heads * head_dim)
                    .map(|row| {
                        let (head, at) = (row / head_dim, row % head_dim);
                        head * head_dim + 2 * (at % (head_dim / 2)) + at / (head_dim / 2)
                    })
                    .collect();
                let shape = [heads * head_dim, columns];
                if self.weights.device.is_cuda() {
                    return file.with_bytes(&full, &shape, |bytes, dtype| {
                        Matrix::to_device(&gguf::rows_of(bytes, shape[0], &rows), dtype, shape, &self.weights.device)
                    });
                }
                Matrix::from_qtensor(file.load_rows(&full, &shape, &rows, &self.weights.device)?, self.weights.arithmetic)
            }
            _ => self.matrix(name, heads * head_dim, columns),
        }
    }
}

/// Parses the `:quant` of a model name as the type that safetensors are converted to.
///
/// # Errors
/// If it is none that can be made at load.
pub fn quantize_dtype(name: &str) -> Result<GgmlDType> {
    match name.to_lowercase().as_str() {
        "q8_0" => Ok(GgmlDType::Q8_0),
        "q4_0" => Ok(GgmlDType::Q4_0),
        "q4_1" => Ok(GgmlDType::Q4_1),
        "q5_0" => Ok(GgmlDType::Q5_0),
        "q5_1" => Ok(GgmlDType::Q5_1),
        "q2_k" => Ok(GgmlDType::Q2K),
        "q3_k" => Ok(GgmlDType::Q3K),
        "q4_k" | "q4_k_m" => Ok(GgmlDType::Q4K),
        "q5_k" | "q5_k_m" => Ok(GgmlDType::Q5K),
        "q6_k" => Ok(GgmlDType::Q6K),
        other => bail!("quant {other:?} cannot be made at load (q8_0, q6_k, q5_k, q4_k, q3_k, q2_k, q5_1, q5_0, q4_1 and q4_0 can)"),
    }
}

/// Bytes as people write a digest.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
