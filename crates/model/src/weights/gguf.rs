//! GGUF files: metadata and tensors, checked in full before anything is used.
//!
//! candle's own reader trusts alignment and shapes; this one reads untrusted bytes: every length is
//! compared with what the file can hold, and every product is checked.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3.

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Result, bail};
use memmap2::Mmap;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Arrays of arrays may be this deep.
const MAX_DEPTH: usize = 4;
/// Longest array: vocabularies have less than a million members, and each takes more memory than in the file.
const MAX_MEMBERS: usize = 1 << 22;
/// Longest tensor name and metadata key, in bytes (the format's own limit for keys is 65535).
const MAX_NAME_BYTES: usize = 65_535;
/// Most dimensions of a tensor (ggml's own limit).
const MAX_DIMS: usize = 4;

/// llama.cpp's `LLAMA_FTYPE`s, by number; those of types that are not read are left out.
const FILE_TYPES: [&str; 19] = [
    "f32", "f16", "q4_0", "q4_1", "", "", "", "q8_0", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s",
    "q5_k_m", "q6_k",
];

/// A metadata value. Integers of every width are [`Value::Integer`].
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any integer type.
    Integer(i128),
    /// f32 or f64.
    Float(f64),
    /// bool
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Values of one type.
    Array(Vec<Value>),
    /// An array of strings, the bulk of a vocabulary.
    Strings(Vec<String>),
}

/// Where a tensor lies and what it is.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Outermost first: a matrix is `[rows, columns]`.
    pub dims: Vec<usize>,
    /// The type of its blocks.
    pub dtype: GgmlDType,
    /// Its size in the file.
    pub bytes: u64,
    offset: usize,
}

impl TensorInfo {
    /// Numbers in it.
    pub fn elements(&self) -> u64 {
        self.dims.iter().map(|d| *d as u64).product()
    }
}

/// A memory-mapped GGUF file whose header was checked.
#[derive(Debug)]
pub struct GgufFile {
    map: Mmap,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorInfo>,
}

/// Maps a regular file.
///
/// # Errors
/// If it is not there, not readable, or not a regular file.
pub(crate) fn map_file(path: &Path) -> Result<Mmap> {
    let fail = |what: String| candle_core::Error::Msg(format!("{}: {what}", path.display()));
    let is_file = std::fs::metadata(path).map_err(|error| fail(error.to_string()))?.is_file();
    if !is_file {
        return Err(fail("not a regular file".to_string()));
    }
    let file = std::fs::File::open(path).map_err(|error| fail(error.to_string()))?;
    // SAFETY: the map is read-only and private to this process. Another process that shrinks the file while
    // it is mapped would end this one with SIGBUS; model files are replaced by renaming, not by truncating.
    unsafe { Mmap::map(&file) }.map_err(|error| fail(error.to_string()))
}

impl GgufFile {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// If anything in its header does not hold; the message names the field and both values.
    pub fn open(path: &Path) -> Result<Self> {
        let map = map_file(path)?;
        let parsed = parse(&map).map_err(|error| candle_core::Error::Msg(format!("{}: {}", path.display(), crate::message(&error))))?;
        let (metadata, tensors) = parsed;
        Ok(Self { map, metadata, tensors })
    }

    /// A metadata value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// Forgets the vocabulary, which takes tens of megabytes, once a tokenizer was made of it. Its keys are then as if they had not been there.
    pub fn forget_vocabulary(&mut self) {
        for key in ["tokens", "merges", "scores", "token_type"] {
            self.metadata.remove(&format!("tokenizer.ggml.{key}"));
        }
    }

    /// Every metadata key, sorted.
    pub fn keys(&self) -> Vec<&str> {
        let mut keys: Vec<&str> = self.metadata.keys().map(String::as_str).collect();
        keys.sort_unstable();
        keys
    }

    /// A tensor's description.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Every tensor's description.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// How the file calls its mix of types (`q4_k_m`), or the type that most of its bytes have.
    pub fn quant_name(&self) -> String {
        let mix = match self.get("general.file_type") {
            Some(Value::Integer(id)) => usize::try_from(*id).ok().and_then(|id| FILE_TYPES.get(id)).filter(|name| !name.is_empty()),
            _ => None,
        };
        if let Some(name) = mix {
            return (*name).to_string();
        }
        let mut bytes: BTreeMap<String, u64> = BTreeMap::new();
        for tensor in self.tensors.values() {
            *bytes.entry(dtype_name(tensor.dtype)).or_default() += tensor.bytes;
        }
        bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map_or_else(|| "empty".to_string(), |(name, _)| name)
    }

    /// Whether query and key rows are permuted so that rotated pairs are neighbours.
    pub(crate) fn interleaves_rotary_pairs(&self) -> bool {
        matches!(self.get("general.architecture"), Some(Value::String(name)) if name == "llama")
    }

    /// A required string.
    ///
    /// # Errors
    /// If it is missing or of another type.
    pub fn string(&self, key: &str) -> Result<&str> {
        self.optional_string(key)?.ok_or_else(|| missing(key))
    }

    /// A string, if the key is there.
    ///
    /// # Errors
    /// If it is of another type.
    pub fn optional_string(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(wrong(key, "a string", other)),
        }
    }

    /// An array of strings, if the key is there.
    ///
    /// # Errors
    /// If it is of another type.
    pub fn optional_strings(&self, key: &str) -> Result<Option<&[String]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Strings(values)) => Ok(Some(values)),
            Some(other) => Err(wrong(key, "an array of strings", other)),
        }
    }

    /// A required count.
    ///
    /// # Errors
    /// If it is missing, negative, or of another type.
    pub fn count(&self, key: &str) -> Result<usize> {
        self.optional_count(key)?.ok_or_else(|| missing(key))
    }

    /// A count, if the key is there. An array counts when its members are all equal.
    ///
    /// # Errors
    /// If it is negative or of another type.
    pub fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        let value = match self.get(key) {
            None => return Ok(None),
            Some(Value::Array(values)) if !values.is_empty() && values.iter().all(|value| *value == values[0]) => &values[0],
            Some(value) => value,
        };
        match value {
            Value::Integer(value) => usize::try_from(*value).map(Some).map_err(|_| wrong(key, "a count", &Value::Integer(*value))),
            other => Err(wrong(key, "one count for all layers", other)),
        }
    }

    /// A token id, if the key is there.
    ///
    /// # Errors
    /// If it is not a 32-bit unsigned number.
    pub fn optional_id(&self, key: &str) -> Result<Option<u32>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Integer(value)) => u32::try_from(*value).map(Some).map_err(|_| wrong(key, "a token id", &Value::Integer(*value))),
            Some(other) => Err(wrong(key, "a token id", other)),
        }
    }

    /// A required number.
    ///
    /// # Errors
    /// If it is missing or of another type.
    pub fn float(&self, key: &str) -> Result<f64> {
        self.optional_float(key)?.ok_or_else(|| missing(key))
    }

    /// A number, if the key is there.
    ///
    /// # Errors
    /// If it is of another type.
    pub fn optional_float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value)),
            Some(Value::Integer(value)) => Ok(Some(*value as f64)),
            Some(other) => Err(wrong(key, "a number", other)),
        }
    }

    /// A flag, if the key is there.
    ///
    /// # Errors
    /// If it is of another type.
    pub fn optional_bool(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(wrong(key, "a bool", other)),
        }
    }

    /// Copies a tensor to `device`.
    ///
    /// # Errors
    /// If it is missing or has another shape.
    pub fn load(&self, name: &str, shape: &[usize], device: &Device) -> Result<QTensor> {
        let (info, bytes) = self.find(name, shape)?;
        let tensor = QTensor::new(QStorage::from_data(Cow::Borrowed(bytes), device, info.dtype)?, shape);
        self.let_go_of_tensor(info);
        tensor
    }

    /// Copies a matrix to `device`, taking row `rows[i]` of the file for row `i`.
    pub(crate) fn load_rows(&self, name: &str, shape: &[usize], rows: &[usize], device: &Device) -> Result<QTensor> {
        let (info, bytes) = self.find(name, shape)?;
        let permuted = rows_of(bytes, shape[0], rows);
        self.let_go_of_tensor(info);
        QTensor::new(QStorage::from_data(Cow::Owned(permuted), device, info.dtype)?, shape)
    }

    /// The blocks of a matrix as they lie in the file, for `f` to copy.
    pub(crate) fn with_bytes<R>(&self, name: &str, shape: &[usize], f: impl FnOnce(&[u8], GgmlDType) -> Result<R>) -> Result<R> {
        let (info, bytes) = self.find(name, shape)?;
        let result = f(bytes, info.dtype);
        self.let_go_of_tensor(info);
        result
    }

    /// Gives back the memory that the file's pages take in this process. The system still has them at hand.
    pub(super) fn let_go(&self) {
        self.let_go_of(0, self.map.len());
    }

    /// The same for a tensor that was copied. (Pages of its neighbours were mapped with it, and stay.)
    fn let_go_of_tensor(&self, info: &TensorInfo) {
        self.let_go_of(info.offset, info.bytes as usize);
    }

    fn let_go_of(&self, offset: usize, bytes: usize) {
        #[cfg(unix)]
        // SAFETY: the map is read-only: what is read of it later comes from the file again, the same bytes.
        let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, bytes) };
        #[cfg(not(unix))]
        let _ = (offset, bytes);
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<(&TensorInfo, &[u8])> {
        let Some(info) = self.tensor(name) else {
            bail!("gguf: tensor {name} is missing");
        };
        if info.dims != shape {
            bail!("gguf: tensor {name} is {:?}, the metadata wants {shape:?}", info.dims);
        }
        Ok((info, &self.map[info.offset..info.offset + info.bytes as usize]))
    }
}

/// Rows of a matrix of `count` rows, in the order of `rows`.
pub(super) fn rows_of(bytes: &[u8], count: usize, rows: &[usize]) -> Vec<u8> {
    let row_bytes = bytes.len() / count;
    rows.iter().flat_map(|row| &bytes[row * row_bytes..(row + 1) * row_bytes]).copied().collect()
}

fn missing(key: &str) -> candle_core::Error {
    candle_core::Error::Msg(format!("gguf: metadata key {key} is missing"))
}

fn wrong(key: &str, want: &str, got: &Value) -> candle_core::Error {
    let mut got = format!("{got:?}");
    if got.len() > 80 {
        got.truncate((0..=80).rev().find(|at| got.is_char_boundary(*at)).unwrap_or(0));
        got.push_str("...");
    }
    candle_core::Error::Msg(format!("gguf: metadata key {key} is {got}, expected {want}"))
}

/// As llama.cpp spells it, in lower case: `q4_k`.
fn dtype_name(dtype: GgmlDType) -> String {
    let name = format!("{dtype:?}").to_lowercase();
    match name.strip_suffix('k') {
        Some(short) => format!("{short}_k"),
        None => name,
    }
}

fn dtype(id: u32) -> Option<GgmlDType> {
    Some(match id {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        9 => GgmlDType::Q8_1,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        15 => GgmlDType::Q8K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// The unread rest of a file.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8]> {
        if len > self.left() {
            bail!("{what} at byte {} takes {len} bytes, only {} are left", self.at, self.left());
        }
        self.at += len;
        Ok(&self.bytes[self.at - len..self.at])
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        Ok(self.take(N, what)?.try_into().expect("take returns the length asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things that take at least `least_bytes` each, so no more than the file can hold.
    fn count(&mut self, what: &str, least_bytes: usize) -> Result<usize> {
        let count = self.u64(what)?;
        let most = (self.left() / least_bytes) as u64;
        if count > most {
            bail!("{what} is {count}, the {} bytes left hold at most {most}", self.left());
        }
        Ok(count as usize)
    }

    /// The count of an array's members.
    fn members(&mut self, key: &str, least_bytes: usize) -> Result<usize> {
        let count = self.count(key, least_bytes)?;
        if count > MAX_MEMBERS {
            bail!("metadata key {key} has {count} members, expected at most {MAX_MEMBERS}");
        }
        Ok(count)
    }

    fn string(&mut self, what: &str) -> Result<&'a str> {
        let len = self.count(what, 1)?;
        std::str::from_utf8(self.take(len, what)?).map_err(|error| candle_core::Error::Msg(format!("{what} is not UTF-8: {error}")))
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let name = self.string(what)?;
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains('\0') {
            bail!("{what} has {} bytes, expected 1 to {MAX_NAME_BYTES} and no NUL", name.len());
        }
        Ok(name.to_string())
    }

    fn value(&mut self, value_type: u32, key: &str, depth: usize) -> Result<Value> {
        Ok(match value_type {
            0 => Value::Integer(self.array::<1>(key)?[0].into()),
            1 => Value::Integer((self.array::<1>(key)?[0] as i8).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Integer(self.u32(key)?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => match self.array::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => bail!("metadata key {key} is the bool {other}, expected 0 or 1"),
            },
            8 => Value::String(self.string(key)?.to_string()),
            9 => {
                if depth == MAX_DEPTH {
                    bail!("metadata key {key} nests arrays deeper than {MAX_DEPTH}");
                }
                let member_type = self.u32(key)?;
                if member_type == 8 {
                    let count = self.members(key, 8)?;
                    return Ok(Value::Strings((0..count).map(|_| self.string(key).map(str::to_string)).collect::<Result<_>>()?));
                }
                let least = match member_type {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    10..=12 => 8,
                    9 => 12,
                    other => bail!("metadata key {key} is an array of type {other}, expected 0 to 12"),
                };
                let count = self.members(key, least)?;
                Value::Array((0..count).map(|_| self.value(member_type, key, depth + 1)).collect::<Result<_>>()?)
            }
            10 => Value::Integer(self.u64(key)?.into()),
            11 => Value::Integer(i64::from_le_bytes(self.array(key)?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => bail!("metadata key {key} has type {other}, expected 0 to 12"),
        })
    }
}

type Parsed = (HashMap<String, Value>, HashMap<String, TensorInfo>);

/// Reads a whole header. Used by fuzzing tests, too: any bytes give a result or an error.
pub(crate) fn parse(bytes: &[u8]) -> Result<Parsed> {
    let mut reader = Reader { bytes, at: 0 };
    let magic = reader.array::<4>("magic")?;
    if &magic != b"GGUF" {
        bail!("magic is {:?}, expected \"GGUF\"", String::from_utf8_lossy(&magic));
    }
    let version = reader.u32("version")?;
    if !matches!(version, 2 | 3) {
        bail!("version is {version}, expected 2 or 3");
    }
    let tensor_count = reader.count("tensor_count", 24)?;
    let metadata_count = reader.count("metadata_kv_count", 13)?;

    let mut metadata = HashMap::with_capacity(metadata_count);
    for _ in 0..metadata_count {
        let key = reader.name("metadata key")?;
        let value_type = reader.u32(&key)?;
        let value = reader.value(value_type, &key, 0)?;
        if metadata.insert(key.clone(), value).is_some() {
            bail!("metadata key {key} is there twice");
        }
    }

    let mut tensors = HashMap::with_capacity(tensor_count);
    for _ in 0..tensor_count {
        let name = reader.name("tensor name")?;
        let info = tensor_info(&mut reader, &name)?;
        if tensors.insert(name.clone(), info).is_some() {
            bail!("tensor {name} is there twice");
        }
    }

    place(&mut tensors, alignment(&metadata)?, reader.at, bytes.len())?;
    Ok((metadata, tensors))
}

/// Shape, dtype and offset of one tensor, with its size in bytes worked out.
fn tensor_info(reader: &mut Reader<'_>, name: &str) -> Result<TensorInfo> {
    let rank = reader.u32("n_dims")? as usize;
    if rank == 0 || rank > MAX_DIMS {
        bail!("n_dims of tensor {name} is {rank}, expected 1 to {MAX_DIMS}");
    }
    let mut dims = (0..rank).map(|_| reader.u64("dims")).collect::<Result<Vec<u64>>>()?;
    let dtype_id = reader.u32("dtype")?;
    let Some(dtype) = dtype(dtype_id) else {
        bail!("dtype of tensor {name} is {dtype_id}, which is not a type that candle reads");
    };
    let offset = reader.u64("offset")?;

    let (block, block_bytes) = (dtype.block_size() as u64, dtype.type_size() as u64);
    if dims.contains(&0) || !dims[0].is_multiple_of(block) {
        bail!("dims of tensor {name} are {dims:?}, expected no 0 and a first one that {block} divides ({dtype:?})");
    }
    let bytes = dims.iter().try_fold(1u64, |product, d| product.checked_mul(*d)).and_then(|n| (n / block).checked_mul(block_bytes));
    let (Some(bytes), Ok(offset)) = (bytes, usize::try_from(offset)) else {
        bail!("dims of tensor {name} are {dims:?}, offset {offset}: the size overflows");
    };
    dims.reverse();
    let dims = dims.into_iter().map(|d| d as usize).collect();
    Ok(TensorInfo { dims, dtype, bytes, offset })
}

fn alignment(metadata: &HashMap<String, Value>) -> Result<usize> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        // The format asks for a multiple of 8; blocks hold 4-byte floats.
        Some(Value::Integer(value)) if (8..=1 << 20).contains(value) && (*value as usize).is_power_of_two() => Ok(*value as usize),
        Some(other) => bail!("general.alignment is {other:?}, expected a power of two from 8 to 1048576"),
    }
}

/// Turns offsets into positions in the file, and checks that tensors lie in it, aligned and apart.
fn place(tensors: &mut HashMap<String, TensorInfo>, alignment: usize, header: usize, file: usize) -> Result<()> {
    let data = header.next_multiple_of(alignment);
    let available = file.saturating_sub(data) as u64;
    for (name, info) in tensors.iter_mut() {
        if !info.offset.is_multiple_of(alignment) {
            bail!("offset of tensor {name} is {}, expected a multiple of {alignment}", info.offset);
        }
        match (info.offset as u64).checked_add(info.bytes) {
            Some(end) if end <= available => info.offset += data,
            _ => bail!(
                "tensor {name} lies at offset {} and takes {} bytes, the file has {available} bytes of data (cut short?)",
                info.offset,
                info.bytes
            ),
        }
    }
    let mut spans: Vec<(usize, u64, &String)> = tensors.iter().map(|(name, info)| (info.offset, info.bytes, name)).collect();
    spans.sort_unstable();
    for pair in spans.windows(2) {
        let ((offset, bytes, name), (next, _, other)) = (pair[0], pair[1]);
        if offset as u64 + bytes > next as u64 {
            bail!("offset of tensor {other} lies inside tensor {name}");
        }
    }
    Ok(())
}
