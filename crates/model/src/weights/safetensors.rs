//! Hugging Face checkpoints: one safetensors file, or several with `model.safetensors.index.json`.

use candle_core::{DType, Device, Result, Tensor, bail};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

/// The largest index file that is read: a million tensors have less.
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// Memory-mapped safetensors files and where each tensor lies in them.
#[derive(Debug)]
pub struct SafetensorsFiles {
    maps: Vec<(PathBuf, Mmap)>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: DType,
    shape: Vec<usize>,
    bytes: std::ops::Range<usize>,
}

impl SafetensorsFiles {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists, in `dir`.
    ///
    /// # Errors
    /// If a file is missing or its header does not describe it exactly.
    pub fn open(dir: &Path) -> Result<Self> {
        let index = dir.join("model.safetensors.index.json");
        let shards = if index.is_file() { shards(&index)? } else { BTreeMap::new() };
        let files: BTreeSet<PathBuf> =
            if shards.is_empty() { BTreeSet::from([PathBuf::from("model.safetensors")]) } else { shards.values().cloned().collect() };
        let mut all = Self { maps: Vec::new(), tensors: BTreeMap::new() };
        for file in files {
            all.add(&dir.join(file))?;
        }
        for (tensor, shard) in &shards {
            match all.tensors.get(tensor) {
                Some(entry) if all.maps[entry.file].0.ends_with(shard) => {}
                Some(entry) => bail!(
                    "{}: {tensor} is listed in {}, but lies in {}",
                    index.display(),
                    shard.display(),
                    all.maps[entry.file].0.display()
                ),
                None => bail!("{}: {tensor} is listed in {}, but is not there", index.display(), shard.display()),
            }
        }
        Ok(all)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let map = super::gguf::map_file(path)?;
        let fail = |what: String| candle_core::Error::Msg(format!("{}: {what}", path.display()));
        let (header_len, metadata) = SafeTensors::read_metadata(&map).map_err(|error| fail(explain(&error, &map)))?;
        let data = header_len + 8;
        for (name, info) in metadata.tensors() {
            let dtype = match info.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                // Old checkpoints carry integer buffers (rotary tables, masks) that nothing loads.
                _ => continue,
            };
            let bytes = data + info.data_offsets.0..data + info.data_offsets.1;
            let entry = Entry { file: self.maps.len(), dtype, shape: info.shape.clone(), bytes };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(fail(format!("tensor {name} is in two files")));
            }
        }
        self.maps.push((path.to_path_buf(), map));
        Ok(())
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Shape and dtype of every tensor.
    pub fn tensors(&self) -> impl Iterator<Item = (&[usize], DType)> {
        self.tensors.values().map(|entry| (entry.shape.as_slice(), entry.dtype))
    }

    /// The dtype of most numbers in matrices.
    pub fn matrix_dtype(&self) -> DType {
        let elements = |dtype: DType| -> usize {
            let matrices = self.tensors().filter(|(shape, of)| shape.len() == 2 && *of == dtype);
            matrices.map(|(shape, _)| shape.iter().product::<usize>()).sum()
        };
        [DType::F32, DType::F16, DType::BF16].into_iter().max_by_key(|dtype| elements(*dtype)).unwrap_or(DType::F32)
    }

    /// Copies a tensor to `device`, in the dtype it is stored in.
    ///
    /// # Errors
    /// If it is missing or has another shape.
    pub fn load(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        let Some(entry) = self.tensors.get(name) else {
            bail!("tensor {name} is missing (or is none of f32, f16 and bf16)");
        };
        if entry.shape != shape {
            bail!("tensor {name} is {:?}, the config wants {shape:?}", entry.shape);
        }
        let bytes = &self.maps[entry.file].1[entry.bytes.clone()];
        Tensor::from_raw_buffer(bytes, entry.dtype, shape, device)
    }
}

/// The library's error, with the tensor and numbers it leaves out.
fn explain(error: &SafeTensorError, file: &[u8]) -> String {
    let header = match file.get(..8) {
        Some(length) => u64::from_le_bytes(length.try_into().expect("eight bytes")),
        None => return format!("the file has {} bytes, a safetensors header takes 8", file.len()),
    };
    let data = (file.len() as u64 - 8).saturating_sub(header);
    let offsets = || {
        let json: serde_json::Value = serde_json::from_slice(file.get(8..8 + usize::try_from(header).ok()?)?).ok()?;
        let mut spans: Vec<(u64, u64, &String)> = json
            .as_object()?
            .iter()
            .filter_map(|(name, info)| {
                let offsets = info.get("data_offsets")?;
                Some((offsets.get(0)?.as_u64()?, offsets.get(1)?.as_u64()?, name))
            })
            .collect();
        spans.sort_unstable();
        let mut at = 0;
        for (begin, end, name) in spans {
            if begin != at || end < begin || end > data {
                return Some(format!(
                    "data_offsets of tensor {name} are [{begin}, {end}], expected to begin at {at} and to end within {data}"
                ));
            }
            at = end;
        }
        (at != data).then(|| format!("data_offsets end at {at}, the file has {data} bytes of data"))
    };
    match error {
        SafeTensorError::HeaderTooLarge | SafeTensorError::HeaderTooSmall | SafeTensorError::InvalidHeaderLength => {
            format!("header length is {header}, the file has {} bytes", file.len())
        }
        SafeTensorError::InvalidOffset(_) | SafeTensorError::MetadataIncompleteBuffer | SafeTensorError::TensorInvalidInfo => {
            offsets().unwrap_or_else(|| format!("{error}: shape, dtype and data_offsets disagree"))
        }
        other => format!("header: {other}"),
    }
}

/// Which file each tensor is in.
fn shards(index: &Path) -> Result<BTreeMap<String, PathBuf>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, PathBuf>,
    }
    let fail = |what: String| candle_core::Error::Msg(format!("{}: {what}", index.display()));
    let size = std::fs::metadata(index).map_err(|error| fail(error.to_string()))?.len();
    if size > MAX_INDEX_BYTES {
        return Err(fail(format!("{size} bytes, expected at most {MAX_INDEX_BYTES}")));
    }
    let text = std::fs::read_to_string(index).map_err(|error| fail(error.to_string()))?;
    let map = serde_json::from_str::<Index>(&text).map_err(|error| fail(error.to_string()))?.weight_map;
    match map.iter().find(|(_, file)| !file.components().all(|part| matches!(part, Component::Normal(_)))) {
        Some((tensor, file)) => Err(fail(format!("weight_map puts {tensor} in {}, which is not a file beside it", file.display()))),
        None => Ok(map),
    }
}
