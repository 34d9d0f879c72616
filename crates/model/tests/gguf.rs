//! GGUF: the same logits as from safetensors, and no damage that gets past the header.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use common::{Gguf, Meta, TensorEntry, damaged, tiny_llama};
use model::Weights;
use sparse_attn::backend::Cpu;
use sparse_attn::{KvCache, KvDtype, RoutedAttention};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

fn open(bytes: &[u8]) -> Result<Weights> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes)?;
    Weights::open(&path, &Device::Cpu, None)
}

/// Every tensor of a fixture, by its Hugging Face name.
fn fixture(name: &str) -> Result<(PathBuf, HashMap<String, Tensor>)> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny").join(name);
    let mut tensors = HashMap::new();
    for entry in std::fs::read_dir(&dir)? {
        let path = entry?.path();
        let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if file.starts_with("model") && file.ends_with(".safetensors") {
            tensors.extend(candle_core::safetensors::load(&path, &Device::Cpu)?);
        }
    }
    Ok((dir, tensors))
}

/// What llama.cpp's converter calls a tensor.
fn gguf_name(hf: &str, gemma: bool) -> String {
    let names = [
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "output"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("post_attention_layernorm", if gemma { "post_attention_norm" } else { "ffn_norm" }),
    ];
    names.iter().fold(hf.to_string(), |name, (from, to)| name.replace(from, to))
}

/// Rows of a query or key projection as llama.cpp's converter orders them for `llama`: rotated pairs side by side.
fn interleave(weight: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, columns) = weight.dims2()?;
    weight.reshape((heads, 2, rows / heads / 2, columns))?.transpose(1, 2)?.contiguous()?.reshape((rows, columns))
}

/// A fixture as llama.cpp's converter writes it.
fn convert(name: &str, architecture: &str) -> Result<Vec<u8>> {
    let (dir, tensors) = fixture(name)?;
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("config.json"))?).expect("a fixture");
    let (gemma, llama) = (architecture == "gemma3", architecture == "llama");
    let count = |field: &str| config[field].as_u64().expect("a count") as u32;
    let key = |field: &str| format!("{architecture}.{field}");
    let mut gguf = Gguf::default()
        .meta("general.architecture", Meta::Str(architecture.into()))
        .meta(&key("block_count"), Meta::U32(count("num_hidden_layers")))
        .meta(&key("context_length"), Meta::U32(4096))
        .meta(&key("embedding_length"), Meta::U32(count("hidden_size")))
        .meta(&key("feed_forward_length"), Meta::U32(count("intermediate_size")))
        .meta(&key("attention.head_count"), Meta::U32(count("num_attention_heads")))
        .meta(&key("attention.head_count_kv"), Meta::U32(count("num_key_value_heads")))
        .meta(&key("attention.key_length"), Meta::U32(16))
        .meta(&key("attention.layer_norm_rms_epsilon"), Meta::F32(1e-6))
        .meta(&key("rope.freq_base"), Meta::F32(if gemma { 1e6 } else { 1e4 }));
    if gemma {
        gguf = gguf.meta(&key("attention.sliding_window"), Meta::U32(count("sliding_window")));
    }
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    for hf in names {
        let mut tensor = tensors[hf].to_dtype(DType::F32)?;
        if gemma && hf.ends_with("norm.weight") {
            tensor = (tensor + 1.0)?;
        }
        if llama && (hf.contains("q_proj") || hf.contains("k_proj")) {
            tensor = interleave(&tensor, if hf.contains("q_proj") { 4 } else { 2 })?;
        }
        gguf.tensors.push(TensorEntry::f32(&gguf_name(hf, gemma), tensor.dims(), &tensor.flatten_all()?.to_vec1()?));
    }
    Ok(gguf.bytes())
}

#[test]
fn a_checkpoint_converted_to_gguf_gives_the_logits_of_pytorch() -> Result<()> {
    for (name, architecture) in
        [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("gemma3_text", "gemma3")]
    {
        let weights = open(&convert(name, architecture)?)?;
        let model = model::load(&weights)?;
        let (dir, _) = fixture(name)?;
        let golden = candle_core::safetensors::load(dir.join("golden.safetensors"), &Device::Cpu)?;
        let ids = golden["input_ids"].flatten_all()?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
        let mut cache = KvCache::new(&model.config().layer_specs(), KvDtype::F32.into(), &Device::Cpu, ids.len())?;
        let logits = model.logits(&model.forward(&ids, &RoutedAttention::dense(Arc::new(Cpu)), &mut cache)?)?;
        let worst: f32 = (logits - golden["logits"].reshape(((), 512))?)?.abs()?.flatten_all()?.max(0)?.to_scalar()?;
        assert!(worst < 1e-3, "{name}: off by {worst}");
    }
    Ok(())
}

#[test]
fn every_damage_is_refused_by_name() {
    model::load(&open(&tiny_llama().bytes()).expect("the whole file opens")).expect("and loads");
    for (what, bytes, word) in damaged() {
        let error = open(&bytes).and_then(|weights| model::load(&weights)).expect_err(what).to_string();
        assert!(error.contains(word), "{what}: the message lacks {word:?}: {error}");
    }
}

#[test]
fn no_cut_and_no_flipped_byte_makes_the_reader_panic() {
    let whole = tiny_llama().bytes();
    let header = whole.len().min(1600);
    for len in 0..header {
        assert!(open(&whole[..len]).is_err(), "cut at {len}");
    }
    for at in 0..header {
        for flip in [0x01, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= flip;
            // A flip in a number or a name may leave a file that is whole; it must never panic.
            if let Ok(weights) = open(&bytes) {
                let _ = model::load(&weights);
            }
        }
    }
}

/// Rows of 256 numbers of about unit size, the same every time.
fn waves(step: f32, rows: usize) -> Result<Tensor> {
    let values: Vec<f32> = (0..rows * 256).map(|i| 1.4 * (i as f32 * step + (i / 256) as f32).sin()).collect();
    Tensor::from_vec(values, (rows, 256), &Device::Cpu)
}

#[test]
fn every_ggml_type_is_read_as_candle_reads_it() -> Result<()> {
    use candle_core::quantized::{GgmlDType, QTensor};
    let types = [
        (0, GgmlDType::F32),
        (1, GgmlDType::F16),
        (2, GgmlDType::Q4_0),
        (3, GgmlDType::Q4_1),
        (6, GgmlDType::Q5_0),
        (7, GgmlDType::Q5_1),
        (8, GgmlDType::Q8_0),
        (10, GgmlDType::Q2K),
        (11, GgmlDType::Q3K),
        (12, GgmlDType::Q4K),
        (13, GgmlDType::Q5K),
        (14, GgmlDType::Q6K),
        (30, GgmlDType::BF16),
    ];
    let dense = waves(0.37, 6)?;
    for (id, dtype) in types {
        let quantised = QTensor::quantize(&dense, dtype)?;
        let want = quantised.dequantize(&Device::Cpu)?;
        let mut gguf = tiny_llama();
        let data = quantised.data()?.to_vec();
        gguf.tensors.push(TensorEntry { name: "x.weight".into(), dims: vec![256, 6], dtype: id, offset: None, data });
        let weights = open(&gguf.bytes())?;
        let name = model::weights::Name { hf: "x.weight", gguf: "x.weight" };
        let got = weights.root().tensor(name, &[6, 256])?;
        let difference: f32 = (&got - &want)?.abs()?.flatten_all()?.max(0)?.to_scalar()?;
        assert_eq!(difference, 0.0, "{dtype:?}");
        // As a matrix: by blocks for a few rows of activations, unpacked for many; looked up row by row, too.
        let matrix = weights.root().matrix(name, 6, 256)?;
        let x = waves(0.73, 40)?;
        let exact = x.matmul(&want.t()?)?;
        for rows in [1, 40] {
            let product = matrix.multiply(&x.narrow(0, 0, rows)?.contiguous()?)?;
            let worst: f32 = (product - exact.narrow(0, 0, rows)?)?.abs()?.flatten_all()?.max(0)?.to_scalar()?;
            // Activations are rounded to 8 bits: about 0.4 % of 16 (the norm of a row) each way.
            assert!(worst < 0.6, "{dtype:?}, {rows} rows: off by {worst}");
        }
        let looked_up = matrix.rows(&Tensor::new(&[4u32, 1], &Device::Cpu)?)?;
        let rows = Tensor::stack(&[want.get(4)?, want.get(1)?], 0)?;
        assert_eq!((looked_up - rows)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?, 0.0, "{dtype:?}");
    }
    Ok(())
}
