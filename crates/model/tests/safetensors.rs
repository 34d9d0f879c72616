//! Damaged Hugging Face checkpoints: one message that names the field, no panic.

use candle_core::Device;
use model::Weights;
use serde_json::{Value, json};
use std::path::Path;

const CONFIG: &str = r#"{"model_type":"llama","hidden_size":8,"intermediate_size":16,"num_hidden_layers":1,"vocab_size":4,
    "num_attention_heads":2,"max_position_embeddings":128,"tie_word_embeddings":true}"#;

fn shapes() -> Vec<(&'static str, Vec<usize>)> {
    vec![
        ("model.embed_tokens.weight", vec![4, 8]),
        ("model.norm.weight", vec![8]),
        ("model.layers.0.input_layernorm.weight", vec![8]),
        ("model.layers.0.post_attention_layernorm.weight", vec![8]),
        ("model.layers.0.self_attn.q_proj.weight", vec![8, 8]),
        ("model.layers.0.self_attn.k_proj.weight", vec![8, 8]),
        ("model.layers.0.self_attn.v_proj.weight", vec![8, 8]),
        ("model.layers.0.self_attn.o_proj.weight", vec![8, 8]),
        ("model.layers.0.mlp.gate_proj.weight", vec![16, 8]),
        ("model.layers.0.mlp.up_proj.weight", vec![16, 8]),
        ("model.layers.0.mlp.down_proj.weight", vec![8, 16]),
    ]
}

/// The header of the whole checkpoint, and the bytes its data takes.
fn header() -> (Value, usize) {
    let (mut header, mut at) = (json!({}), 0);
    for (name, shape) in shapes() {
        let bytes = 4 * shape.iter().product::<usize>();
        header[name] = json!({"dtype": "F32", "shape": shape, "data_offsets": [at, at + bytes]});
        at += bytes;
    }
    (header, at)
}

fn file(header: &str, data: usize) -> Vec<u8> {
    [(header.len() as u64).to_le_bytes().to_vec(), header.as_bytes().to_vec(), vec![0; data]].concat()
}

fn load(dir: &Path) -> candle_core::Result<()> {
    model::load(&Weights::open(dir, &Device::Cpu, None)?).map(|_| ())
}

fn load_file(bytes: &[u8]) -> candle_core::Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("config.json"), CONFIG)?;
    std::fs::write(dir.path().join("model.safetensors"), bytes)?;
    load(dir.path())
}

#[test]
fn every_damage_of_a_file_is_refused_by_name() {
    let (whole, data) = header();
    load_file(&file(&whole.to_string(), data)).expect("the whole file loads");
    let edit = |change: &dyn Fn(&mut Value)| {
        let mut header = whole.clone();
        change(&mut header);
        file(&header.to_string(), data)
    };
    let text = whole.to_string();
    let norm = "model.norm.weight";
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "header"),
        ("header length 2^63", [(1u64 << 63).to_le_bytes().to_vec(), vec![0; 64]].concat(), "header length"),
        ("header beyond the file", [1000u64.to_le_bytes().to_vec(), vec![b' '; 100]].concat(), "header length"),
        ("not JSON", file("hello", 0), "header"),
        ("a JSON array", file("[]", 0), "header"),
        ("offsets overlap", edit(&|h| h[norm]["data_offsets"] = json!([96, 128])), norm),
        ("offsets backwards", edit(&|h| h[norm]["data_offsets"] = json!([160, 128])), norm),
        (
            "offsets beyond the file",
            edit(&|h| h["model.layers.0.mlp.down_proj.weight"]["data_offsets"][1] = json!(1u64 << 40)),
            "down_proj",
        ),
        ("a hole", edit(&|h| h[norm]["data_offsets"] = json!([132, 160])), norm),
        ("cut by one byte", file(&text, data)[..8 + text.len() + data - 1].to_vec(), "data_offsets"),
        ("trailing bytes", file(&text, data + 1), "data_offsets"),
        ("shape against extent", edit(&|h| h[norm]["shape"] = json!([9])), "shape"),
        ("shape overflows", edit(&|h| h[norm]["shape"] = json!([1u64 << 40, 1u64 << 40])), "overflow"),
        ("dtype unknown", edit(&|h| h[norm]["dtype"] = json!("F5")), "F5"),
        ("dtype that nothing loads", edit(&|h| h[norm]["dtype"] = json!("I32")), norm),
        ("another shape", edit(&|h| h["model.layers.0.mlp.up_proj.weight"]["shape"] = json!([8, 16])), "up_proj"),
        (
            "a tensor missing",
            edit(&|h| {
                let x = h.as_object_mut().unwrap().remove(norm).unwrap();
                h["other"] = x;
            }),
            norm,
        ),
    ];
    for (what, bytes, word) in cases {
        let error = load_file(&bytes).expect_err(what).to_string();
        assert!(error.contains(word), "{what}: the message lacks {word:?}: {error}");
    }
}

#[test]
fn an_index_cannot_lead_out_of_its_directory_or_to_nothing() {
    let (whole, data) = header();
    let index = |tensor: &str, name: &str| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
        std::fs::write(dir.path().join("a.safetensors"), file(&whole.to_string(), data)).unwrap();
        let mut map: serde_json::Map<String, Value> = shapes().iter().map(|(name, _)| (name.to_string(), json!("a.safetensors"))).collect();
        map.insert(tensor.to_string(), json!(name));
        std::fs::write(dir.path().join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
        load(dir.path())
    };
    index("model.norm.weight", "a.safetensors").expect("the whole checkpoint loads");
    for (tensor, name, word) in [
        ("model.norm.weight", "../a.safetensors", "../a.safetensors"),
        ("model.norm.weight", "/etc/passwd", "/etc/passwd"),
        ("model.norm.weight", "b.safetensors", "b.safetensors"),
        ("model.extra.weight", "a.safetensors", "model.extra.weight"),
    ] {
        let error = index(tensor, name).expect_err(name).to_string();
        assert!(error.contains(word), "{name}: {error}");
    }
}
