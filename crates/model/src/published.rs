//! Gates that others trained and published, read as they are: Fast KVzip's (`.pt`) and WG-KV's (`.safetensors`).
//!
//! A `.pt` is a pickle, which in Python may run anything. Here only its lists, dictionaries and tensors are understood.

use crate::message;
use crate::router_file::{finite, layer};
use crate::{Config, router_file};
use candle_core::pickle::{Object, Stack};
use candle_core::{DType, Device, Result, Tensor, bail};
use sparse_attn::token_router::GateLayer;
use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Read};
use std::path::Path;
use zip::ZipArchive;

/// The threshold that WG-KV's gates were trained for: a token is kept above it.
const WG_KV_TAU: f32 = 0.1;

/// The largest pickle, without its tensors, and the largest tensor that are read.
const MOST_PICKLE: u64 = 16 << 20;
const MOST_TENSOR: u64 = 1 << 30;

/// Where WG-KV's tensors are in a decoder layer.
const WG_KV: &str = ".self_attn.g_predictors.";

/// What a file of published gates holds.
#[derive(Debug, Clone)]
pub struct Published {
    /// Whose they are.
    pub name: &'static str,
    /// A gate for every layer that has one, in the order of layers.
    pub gates: Vec<GateLayer>,
    /// The threshold they were trained for, where there is one.
    pub tau: Option<f32>,
}

impl Published {
    /// Reads a file: a zip archive is Fast KVzip's, anything else must be safetensors with WG-KV's names.
    ///
    /// # Errors
    /// If it cannot be read, or a tensor is missing, of another type, or not finite.
    pub fn open(path: &Path) -> Result<Self> {
        let mut first = [0; 4];
        let mut file = std::fs::File::open(path)?;
        let is_zip = file.read_exact(&mut first).is_ok() && first == *b"PK\x03\x04";
        let published = if is_zip { fast_kvzip(path)? } else { wg_kv(path)? };
        if published.gates.is_empty() {
            bail!("there is no gate in this file");
        }
        Ok(published)
    }

    /// The gates of a model, one for each layer: the file has as many, or one for each layer without a sliding window.
    ///
    /// # Errors
    /// If there are as many gates as neither, or one has another shape than the model's heads.
    pub fn into_layers(self, config: &Config) -> Result<Vec<GateLayer>> {
        let sliding_window = &config.sliding_window;
        let global = sliding_window.iter().filter(|window| window.is_none()).count();
        let (found, layers) = (self.gates.len(), sliding_window.len());
        if found != layers && found != global {
            bail!("{found} gates for a model of {layers} layers, {global} of them without a sliding window");
        }
        let mut gates = self.gates.into_iter();
        let layer = |window: &Option<usize>| {
            let gate = if found == layers || window.is_none() { gates.next() } else { None };
            // A layer with a sliding window forgets anyway.
            gate.filter(|_| window.is_none()).unwrap_or(GateLayer::Open)
        };
        let gates: Vec<GateLayer> = sliding_window.iter().map(layer).collect();
        for (layer, gate) in gates.iter().enumerate() {
            if let Err(error) = gate.check(config.heads.kv_heads(), config.heads.head_dim(), config.hidden_size) {
                bail!("gate of layer {layer}: {}", message(&error));
            }
        }
        Ok(gates)
    }
}

/// WG-KV: `...layers.{i}.self_attn.g_predictors.{name}` of a checkpoint.
fn wg_kv(path: &Path) -> Result<Published> {
    let tensors = match candle_core::safetensors::load(path, &Device::Cpu) {
        Ok(tensors) => tensors,
        Err(error) => bail!("neither a zip archive (Fast KVzip) nor safetensors (WG-KV): {}", message(&error)),
    };
    let mut layers: BTreeMap<usize, HashMap<String, Tensor>> = BTreeMap::new();
    for (name, tensor) in &tensors {
        let Some((before, part)) = name.split_once(WG_KV) else { continue };
        let Some(layer) = before.rsplit('.').next().and_then(|number| number.parse().ok()) else {
            bail!("tensor {name}: no layer's number before {WG_KV}");
        };
        layers.entry(layer).or_default().insert(part.to_string(), finite(name, tensor)?);
    }
    let mut gates = Vec::new();
    for (index, mut parts) in layers {
        let take = |part: &str| match parts.remove(part) {
            Some(tensor) => Ok(tensor),
            None => bail!("tensor layers.{index}{WG_KV}{part} is missing"),
        };
        gates.push(layer(router_file::KEYS, take)?);
    }
    // Ours keeps what reaches the threshold, theirs what is above it.
    Ok(Published { name: "WG-KV", gates, tau: Some(WG_KV_TAU.next_up()) })
}

/// Fast KVzip: a list of state dictionaries under the key `module`.
fn fast_kvzip(path: &Path) -> Result<Published> {
    let archive = BufReader::new(std::fs::File::open(path)?);
    let mut archive = ZipArchive::new(archive).map_err(candle_core::Error::wrap)?;
    let names: Vec<String> = archive.file_names().filter_map(|name| Some(name.ok()?.into_owned())).collect();
    let Some(root) = names.iter().find_map(|name| name.strip_suffix("data.pkl")) else {
        bail!("a zip archive without data.pkl: not a file of torch.save");
    };
    let mut stack = Stack::empty();
    let pickle = archive.by_name(&format!("{root}data.pkl")).map_err(candle_core::Error::wrap)?;
    stack.read_loop(&mut BufReader::new(pickle.take(MOST_PICKLE)))?;
    let Some(Object::List(modules)) = entry(stack.finalize()?, "module") else {
        bail!("no list under the key \"module\": is this a file of Fast KVzip's gates?");
    };
    let mut gates = Vec::new();
    for (index, module) in modules.into_iter().enumerate() {
        let Object::Dict(entries) = module else { bail!("gate {index} is no dictionary of tensors") };
        let mut parts: HashMap<String, Object> =
            entries.into_iter().filter_map(|(name, value)| Some((name.unicode().ok()?, value))).collect();
        let take = |name: &str| -> Result<Tensor> {
            let Some(object) = parts.remove(name) else { bail!("gate {index}: tensor {name} is missing") };
            let Some(stored) = Stored::of(object) else { bail!("gate {index}: {name} is no tensor that this version reads") };
            finite(name, &stored.load(&mut archive, root)?)
        };
        gates.push(layer(router_file::SINK, take)?);
    }
    Ok(Published { name: "Fast KVzip", gates, tau: None })
}

/// The value of a dictionary's key.
fn entry(object: Object, key: &str) -> Option<Object> {
    let Object::Dict(entries) = object else { return None };
    entries.into_iter().find(|(name, _)| matches!(name, Object::Unicode(name) if name == key)).map(|(_, value)| value)
}

/// A tensor in a pickle: where its numbers are in the archive, and its shape.
struct Stored {
    record: String,
    dtype: DType,
    offset: usize,
    shape: Vec<usize>,
}

impl Stored {
    /// `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)`, or a parameter made of one; `None`: something else, or
    /// rows that do not lie one after the other.
    fn of(object: Object) -> Option<Self> {
        let (callable, args) = object.reduce().ok()?;
        let mut args = args.tuple().ok()?.into_iter();
        match callable.class().ok()?.1.as_str() {
            "_rebuild_parameter" => return Self::of(args.next()?),
            "_rebuild_tensor_v2" => {}
            _ => return None,
        }
        let (storage, offset) = (args.next()?, args.next()?);
        let (shape, stride) = (sizes(args.next()?)?, sizes(args.next()?)?);
        let contiguous = shape.iter().rev().scan(1usize, |step, size| {
            let own = *step;
            *step = step.checked_mul(*size)?;
            Some(own)
        });
        let contiguous: Vec<usize> = contiguous.collect();
        // A dimension of one may have any stride.
        if !stride.iter().rev().zip(&contiguous).zip(shape.iter().rev()).all(|((a, b), size)| a == b || *size == 1) {
            return None;
        }
        // ("storage", class, record, device, count)
        let mut storage = storage.persistent_load().ok()?.tuple().ok()?.into_iter().skip(1);
        let dtype = match storage.next()?.class().ok()?.1.as_str() {
            "FloatStorage" => DType::F32,
            "HalfStorage" => DType::F16,
            "BFloat16Storage" => DType::BF16,
            _ => return None,
        };
        let record = storage.next()?.unicode().ok()?;
        Some(Self { record, dtype, offset: usize::try_from(offset.int_or_long().ok()?).ok()?, shape })
    }

    fn load<R: Read + std::io::Seek>(&self, archive: &mut ZipArchive<R>, root: &str) -> Result<Tensor> {
        let record = format!("{root}data/{}", self.record);
        let numbers = self.shape.iter().try_fold(1usize, |count, size| count.checked_mul(*size));
        let (size, bytes) = (self.dtype.size_in_bytes(), numbers.and_then(|numbers| numbers.checked_mul(self.dtype.size_in_bytes())));
        let Some(bytes) = bytes.filter(|bytes| *bytes as u64 <= MOST_TENSOR) else {
            bail!("{record}: a tensor of {:?} is refused: more than {MOST_TENSOR} bytes", self.shape);
        };
        let mut file = archive.by_name(&record).map_err(candle_core::Error::wrap)?;
        let start = self.offset.saturating_mul(size) as u64;
        std::io::copy(&mut file.by_ref().take(start), &mut std::io::sink())?;
        let mut data = Vec::new();
        file.take(bytes as u64).read_to_end(&mut data)?;
        if data.len() != bytes {
            bail!("{record}: {} bytes from {start} on, a tensor of {:?} has {bytes}", data.len(), self.shape);
        }
        Tensor::from_raw_buffer(&data, self.dtype, &self.shape, &Device::Cpu)
    }
}

/// A tuple of sizes.
fn sizes(object: Object) -> Option<Vec<usize>> {
    object.tuple().ok()?.into_iter().map(|size| usize::try_from(size.int_or_long().ok()?).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_go_to_layers_that_see_everything() {
        let published = |count: usize| Published { name: "none", gates: vec![GateLayer::Open; count], tau: None };
        let config = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny/llama/config.json");
        let mut config = Config::from_json(&std::fs::read_to_string(config).unwrap()).unwrap();
        config.sliding_window = vec![Some(512), None, Some(512), None];
        assert_eq!(published(4).into_layers(&config).unwrap().len(), 4);
        assert_eq!(published(2).into_layers(&config).unwrap().len(), 4);
        let error = published(3).into_layers(&config).unwrap_err().to_string();
        assert!(error.contains("3 gates") && error.contains("4 layers") && error.contains("2 of them"), "{error}");
    }
}
