//! A GGUF writer for tests: whole files, and the damaged ones that readers must survive.

#![allow(dead_code, unreachable_pub, reason = "shared: each test binary uses its own part")]

/// A metadata value, with the type number it is written with.
#[derive(Debug, Clone)]
pub enum Meta {
    U32(u32),
    F32(f32),
    Bool(u8),
    Str(String),
    Strs(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
    /// Any type number and bytes.
    Raw(u32, Vec<u8>),
}

/// A tensor as it stands in the header, and its bytes.
#[derive(Debug, Clone)]
pub struct TensorEntry {
    pub name: String,
    /// Innermost first, as the format has it.
    pub dims: Vec<u64>,
    pub dtype: u32,
    /// `None`: after the previous tensor.
    pub offset: Option<u64>,
    pub data: Vec<u8>,
}

impl TensorEntry {
    pub fn f32(name: &str, shape: &[usize], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.to_string(), dims: shape.iter().rev().map(|d| *d as u64).collect(), dtype: 0, offset: None, data }
    }
}

/// A GGUF file to be.
#[derive(Debug, Clone)]
pub struct Gguf {
    pub magic: [u8; 4],
    pub version: u32,
    pub metadata: Vec<(String, Meta)>,
    pub tensors: Vec<TensorEntry>,
    pub tensor_count: Option<u64>,
    pub metadata_count: Option<u64>,
}

impl Default for Gguf {
    fn default() -> Self {
        Self { magic: *b"GGUF", version: 3, metadata: Vec::new(), tensors: Vec::new(), tensor_count: None, metadata_count: None }
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Gguf {
    pub fn meta(mut self, key: &str, value: Meta) -> Self {
        self.metadata.push((key.to_string(), value));
        self
    }

    /// Replaces the value of a key.
    pub fn with(mut self, key: &str, value: Meta) -> Self {
        self.metadata.retain(|(other, _)| other != key);
        self.meta(key, value)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.metadata_count.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            let array = |out: &mut Vec<u8>, kind: u32, len: usize| {
                out.extend(9u32.to_le_bytes());
                out.extend(kind.to_le_bytes());
                out.extend((len as u64).to_le_bytes());
            };
            match value {
                Meta::U32(value) => {
                    out.extend(4u32.to_le_bytes());
                    out.extend(value.to_le_bytes());
                }
                Meta::F32(value) => {
                    out.extend(6u32.to_le_bytes());
                    out.extend(value.to_le_bytes());
                }
                Meta::Bool(value) => {
                    out.extend(7u32.to_le_bytes());
                    out.push(*value);
                }
                Meta::Str(value) => {
                    out.extend(8u32.to_le_bytes());
                    text(&mut out, value);
                }
                Meta::Strs(values) => {
                    array(&mut out, 8, values.len());
                    values.iter().for_each(|value| text(&mut out, value));
                }
                Meta::F32s(values) => {
                    array(&mut out, 6, values.len());
                    values.iter().for_each(|value| out.extend(value.to_le_bytes()));
                }
                Meta::I32s(values) => {
                    array(&mut out, 5, values.len());
                    values.iter().for_each(|value| out.extend(value.to_le_bytes()));
                }
                Meta::Raw(kind, bytes) => {
                    out.extend(kind.to_le_bytes());
                    out.extend(bytes);
                }
            }
        }
        let mut next = 0u64;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(tensor.dtype.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(next).to_le_bytes());
            next = (next + tensor.data.len() as u64).next_multiple_of(32);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&tensor.data);
        }
        out
    }
}

/// The smallest whole llama: one layer, four tokens.
pub fn tiny_llama() -> Gguf {
    let mut gguf = Gguf::default()
        .meta("general.architecture", Meta::Str("llama".into()))
        .meta("llama.block_count", Meta::U32(1))
        .meta("llama.context_length", Meta::U32(128))
        .meta("llama.embedding_length", Meta::U32(8))
        .meta("llama.feed_forward_length", Meta::U32(16))
        .meta("llama.attention.head_count", Meta::U32(2))
        .meta("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5))
        .meta("tokenizer.ggml.model", Meta::Str("gpt2".into()))
        .meta("tokenizer.ggml.tokens", Meta::Strs(["a", "b", "ab", "<end>"].map(String::from).to_vec()))
        .meta("tokenizer.ggml.token_type", Meta::I32s(vec![1, 1, 1, 3]))
        .meta("tokenizer.ggml.merges", Meta::Strs(vec!["a b".into()]))
        .meta("tokenizer.ggml.eos_token_id", Meta::U32(3));
    let mut add = |name: &str, shape: &[usize]| {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|i| ((i * 37 + name.len()) % 17) as f32 / 17.0 - 0.5).collect();
        gguf.tensors.push(TensorEntry::f32(name, shape, &values));
    };
    add("token_embd.weight", &[4, 8]);
    add("output_norm.weight", &[8]);
    add("blk.0.attn_norm.weight", &[8]);
    for name in ["attn_q", "attn_k", "attn_v", "attn_output"] {
        add(&format!("blk.0.{name}.weight"), &[8, 8]);
    }
    add("blk.0.ffn_norm.weight", &[8]);
    add("blk.0.ffn_gate.weight", &[16, 8]);
    add("blk.0.ffn_up.weight", &[16, 8]);
    add("blk.0.ffn_down.weight", &[8, 16]);
    gguf
}

/// Files that a reader must refuse, each with a word that its message must have.
pub fn damaged() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let whole = tiny_llama();
    let bytes = whole.bytes();
    let edit = |change: &dyn Fn(&mut Gguf)| {
        let mut gguf = whole.clone();
        change(&mut gguf);
        gguf.bytes()
    };
    let nested = |depth: usize| {
        let mut value = Vec::new();
        for _ in 0..depth {
            value.extend(9u32.to_le_bytes());
            value.extend(1u64.to_le_bytes());
        }
        value
    };
    vec![
        ("empty", vec![], "magic"),
        ("three bytes", b"GGU".to_vec(), "magic"),
        ("23 bytes", bytes[..23].to_vec(), "tensor_count"),
        ("another magic", edit(&|g| g.magic = *b"GGJT"), "magic"),
        ("version 99", edit(&|g| g.version = 99), "version"),
        ("byte-swapped version", edit(&|g| g.version = 3u32.swap_bytes()), "version"),
        ("2^63 tensors", edit(&|g| g.tensor_count = Some(1 << 63)), "tensor_count"),
        ("2^32 keys", edit(&|g| g.metadata_count = Some(1 << 32)), "metadata_kv_count"),
        ("cut by one byte", bytes[..bytes.len() - 1].to_vec(), "cut short"),
        ("alignment 0", whole.clone().meta("general.alignment", Meta::U32(0)).bytes(), "general.alignment"),
        ("alignment 3", whole.clone().meta("general.alignment", Meta::U32(3)).bytes(), "general.alignment"),
        ("alignment 2^31", whole.clone().meta("general.alignment", Meta::U32(1 << 31)).bytes(), "general.alignment"),
        ("alignment as text", whole.clone().meta("general.alignment", Meta::Str("32".into())).bytes(), "general.alignment"),
        ("dims overflow", edit(&|g| g.tensors[0].dims = vec![1 << 40, 1 << 40]), "token_embd.weight"),
        ("dims beyond the file", edit(&|g| g.tensors[0].dims = vec![1 << 30, 4]), "token_embd.weight"),
        ("a dim of 0", edit(&|g| g.tensors[0].dims = vec![0, 4]), "token_embd.weight"),
        ("no dims", edit(&|g| g.tensors[0].dims = vec![]), "n_dims"),
        ("five dims", edit(&|g| g.tensors[0].dims = vec![1; 5]), "n_dims"),
        ("dtype 999", edit(&|g| g.tensors[0].dtype = 999), "dtype"),
        ("a removed dtype", edit(&|g| g.tensors[0].dtype = 4), "dtype"),
        ("a block that does not divide", edit(&|g| g.tensors[0].dtype = 8), "token_embd.weight"),
        ("offset unaligned", edit(&|g| g.tensors[1].offset = Some(129)), "offset"),
        ("offset wraps", edit(&|g| g.tensors[1].offset = Some(u64::MAX - 31)), "output_norm.weight"),
        ("tensors overlap", edit(&|g| g.tensors[1].offset = Some(96)), "lies inside"),
        ("tensor twice", edit(&|g| g.tensors[2].name = g.tensors[1].name.clone()), "twice"),
        ("tensor without a name", edit(&|g| g.tensors[2].name = String::new()), "tensor name"),
        ("key twice", whole.clone().meta("llama.block_count", Meta::U32(1)).bytes(), "twice"),
        ("bool 7", whole.clone().meta("x.flag", Meta::Bool(7)).bytes(), "x.flag"),
        ("unknown value type", whole.clone().meta("x.odd", Meta::Raw(13, vec![])).bytes(), "x.odd"),
        ("deep arrays", whole.clone().meta("x.deep", Meta::Raw(9, nested(10_000))).bytes(), "x.deep"),
        (
            "array of 2^30 with no data",
            whole.clone().meta("x.long", Meta::Raw(9, [4u32.to_le_bytes().to_vec(), (1u64 << 30).to_le_bytes().to_vec()].concat())).bytes(),
            "x.long",
        ),
        ("no architecture", edit(&|g| g.metadata.retain(|(key, _)| key != "general.architecture")), "general.architecture"),
        ("architecture as number", whole.clone().with("general.architecture", Meta::U32(1)).bytes(), "general.architecture"),
        ("layers missing", whole.clone().with("llama.block_count", Meta::U32(2)).bytes(), "blk.1."),
        ("a billion layers", whole.clone().with("llama.block_count", Meta::U32(1_000_000_000)).bytes(), "llama.block_count"),
        ("no heads", whole.clone().with("llama.attention.head_count", Meta::U32(0)).bytes(), "heads"),
        ("another width", whole.clone().with("llama.embedding_length", Meta::U32(16)).bytes(), "token_embd.weight"),
        ("eps NaN", whole.clone().with("llama.attention.layer_norm_rms_epsilon", Meta::F32(f32::NAN)).bytes(), "rms_norm_eps"),
        ("rope base 0", whole.clone().with("llama.rope.freq_base", Meta::F32(0.0)).bytes(), "rope_theta"),
        ("end token beyond the vocabulary", whole.clone().with("tokenizer.ggml.eos_token_id", Meta::U32(4)).bytes(), "vocab_size"),
    ]
}
