//! A model on the GPU: products, decode steps recorded as a graph, against the host. Without a GPU these tests say so and pass.
#![cfg(feature = "cuda")]

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Result, Tensor};
use model::config::{RopeConfig, RopeScaling};
use model::layers::Rope;
use model::{GenerateOptions, Sampler, SamplerOptions, Session, Weights};
use sparse_attn::backend::for_device;
use sparse_attn::select::{Budget, Limits};
use sparse_attn::token_router::{Feedforward, Gate, GateLayer};
use sparse_attn::{KvDtype, RoutedAttention, Routing, Step};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

fn gpu() -> Option<Device> {
    match Device::new_cuda_with_stream(0) {
        Ok(Device::Cuda(cuda)) => {
            // SAFETY: everything runs in one stream.
            unsafe { cuda.disable_event_tracking() };
            Some(Device::Cuda(cuda))
        }
        Ok(_) => None,
        Err(error) => {
            eprintln!("skipped: no GPU ({error})");
            None
        }
    }
}

/// A random checkpoint of two layers in `dir`: heads of 64, four of them to a key/value head.
fn write_checkpoint(dir: &Path, model_type: &str) -> Result<()> {
    write_checkpoint_of(dir, model_type, 2)
}

/// [`write_checkpoint`] of as many layers; where there are some with a sliding window, layers 1, 4, 7 and so on are without.
fn write_checkpoint_of(dir: &Path, model_type: &str, layers: usize) -> Result<()> {
    // SmolLM2's width for one of them: activations of its tokens do not lie a multiple of 16 bytes apart by themselves.
    let hidden = if model_type == "llama" { 576usize } else { 512 };
    let (inner, vocab, heads, kv_heads) = (768usize, 1000usize, 8usize, 2usize);
    let mut config = format!(
        r#"{{"model_type":"{model_type}","hidden_size":{hidden},"intermediate_size":{inner},"num_hidden_layers":{layers},"vocab_size":{vocab},
        "num_attention_heads":{heads},"num_key_value_heads":{kv_heads},"head_dim":64,"max_position_embeddings":8192,"rms_norm_eps":1e-6"#
    );
    if model_type == "gemma3_text" {
        let types: Vec<_> = (0..layers).map(|layer| if layer % 3 == 1 { "full_attention" } else { "sliding_attention" }).collect();
        config += &format!(r#","sliding_window":64,"layer_types":{types:?}"#);
        config += r#","query_pre_attn_scalar":64,
            "rope_local_base_freq":10000.0,"rope_theta":1000000.0,"hidden_activation":"gelu_pytorch_tanh""#;
    }
    std::fs::write(dir.join("config.json"), config + "}")?;
    let mut tensors = HashMap::new();
    let mut seed = 0u64;
    let mut random = |shape: &[usize], mean: f64, deviation: f64| -> Result<Tensor> {
        seed += 1;
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f64 / (1u64 << 24) as f64
        };
        let values: Vec<f32> =
            (0..shape.iter().product()).map(|_| (mean + deviation * ((0..6).map(|_| next()).sum::<f64>() - 3.0)) as f32).collect();
        Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::BF16)
    };
    tensors.insert("model.embed_tokens.weight".to_string(), random(&[vocab, hidden], 0.0, 1.0)?);
    tensors.insert("model.norm.weight".to_string(), random(&[hidden], 1.0, 0.1)?);
    tensors.insert("lm_head.weight".to_string(), random(&[vocab, hidden], 0.0, 0.1)?);
    for layer in 0..layers {
        let mut put = |name: &str, shape: &[usize], mean: f64, deviation: f64| -> Result<()> {
            tensors.insert(format!("model.layers.{layer}.{name}"), random(shape, mean, deviation)?);
            Ok(())
        };
        for norm in ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"] {
            put(&format!("{norm}.weight"), &[hidden], if model_type == "gemma3_text" { 0.0 } else { 1.0 }, 0.1)?;
        }
        for norm in ["q_norm", "k_norm"] {
            put(&format!("self_attn.{norm}.weight"), &[64], if model_type == "gemma3_text" { 0.0 } else { 1.0 }, 0.1)?;
        }
        for (name, rows, columns) in [
            ("self_attn.q_proj", heads * 64, hidden),
            ("self_attn.k_proj", kv_heads * 64, hidden),
            ("self_attn.v_proj", kv_heads * 64, hidden),
            ("self_attn.o_proj", hidden, heads * 64),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ] {
            put(&format!("{name}.weight"), &[rows, columns], 0.0, 0.06)?;
            if model_type == "qwen2" && name.starts_with("self_attn") && !name.contains("o_proj") {
                put(&format!("{name}.bias"), &[rows], 0.0, 0.5)?;
            }
        }
    }
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors"))
}

fn routing(dense_len: usize) -> Routing {
    let limits = Limits { window: 64, sinks: 4, block_size: 16, budget: Budget::tokens(96), dense_len, tile: 16 };
    Routing { block_router: Arc::new(sparse_attn::block_router::Spread), limits, ..Routing::dense() }
}

fn session(dir: &Path, device: &Device, quantize: Option<GgmlDType>, routing: Routing) -> Result<Session> {
    let weights = Weights::open(dir, device, quantize)?;
    let attention = RoutedAttention::new(routing, for_device(device)?)?;
    Session::new(model::load(&weights)?, attention, KvDtype::F16.into(), device, 1024)
}

fn ids(count: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * 7919 + 13) % 1000) as u32).collect()
}

/// Cosine of the angle between two lists: 1 if they are alike.
fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()) as f32
}

const TYPES: [Option<GgmlDType>; 13] = [
    None,
    Some(GgmlDType::F32),
    Some(GgmlDType::F16),
    Some(GgmlDType::BF16),
    Some(GgmlDType::Q4_0),
    Some(GgmlDType::Q4_1),
    Some(GgmlDType::Q5_0),
    Some(GgmlDType::Q5_1),
    Some(GgmlDType::Q8_0),
    Some(GgmlDType::Q3K),
    Some(GgmlDType::Q4K),
    Some(GgmlDType::Q5K),
    Some(GgmlDType::Q6K),
];

#[test]
fn logits_are_those_of_the_host_for_every_type() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for model_type in ["llama", "qwen2", "qwen3", "gemma3_text"] {
        let dir = tempfile::tempdir()?;
        write_checkpoint(dir.path(), model_type)?;
        for quantize in TYPES {
            let mut host = session(dir.path(), &Device::Cpu, quantize, Routing::dense())?;
            let mut own = session(dir.path(), &device, quantize, Routing::dense())?;
            // A prompt, then single tokens: through the matrix cores, then the recorded step.
            let ids = ids(200);
            let go_on = |_, _| ControlFlow::Continue(());
            for part in [&ids[..150], &ids[150..151], &ids[151..152], &ids[152..155], &ids[155..156]] {
                host.prefill(part, 150, go_on)?;
                own.prefill(part, 150, go_on)?;
                let cosine = cosine(host.logits()?, own.logits()?);
                assert!(cosine > 0.995, "{model_type} {quantize:?} after {}: {cosine}", own.tokens().len());
            }
        }
    }
    Ok(())
}

#[test]
fn layers_that_a_gpu_gets_together_make_what_the_host_makes() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for (model_type, layers) in [("llama", 9), ("qwen2", 8), ("gemma3_text", 13)] {
        let dir = tempfile::tempdir()?;
        write_checkpoint_of(dir.path(), model_type, layers)?;
        // Both share what the model's layers use; one of them drops tokens, by verdicts that wait for all layers or are made in each.
        let sessions = |device: &Device| -> Result<Vec<Session>> {
            let model = model::load(&Weights::open(dir.path(), device, Some(GgmlDType::Q8_0))?)?;
            let gates = vec![gate(model.config().hidden_size, &Device::Cpu)?.layers()[1].clone(); layers];
            let token_router = Arc::new(Gate::new(gates, 0.0, 0.5)?.to_device(device)?);
            let plain = routing(usize::MAX);
            let routed = Routing { token_router, limits: Limits { window: 128, ..plain.limits }, ..plain.clone() };
            let session = |routing: Routing| {
                let attention = RoutedAttention::new(routing, for_device(device)?)?;
                Session::new(model.clone(), attention, KvDtype::F16.into(), device, 1024)
            };
            [plain, routed].into_iter().map(session).collect()
        };
        let (mut host, mut own) = (sessions(&Device::Cpu)?, sessions(&device)?);
        // Lengths that come again, so that products are known, and others, so that they are not.
        let (ids, mut done) = (ids(700), 0);
        for part in [100, 60, 100, 100, 7, 200, 60] {
            for (host, own) in host.iter_mut().zip(&mut own) {
                host.prefill(&ids[done..done + part], 1024, |_, _| ControlFlow::Continue(()))?;
                own.prefill(&ids[done..done + part], 1024, |_, _| ControlFlow::Continue(()))?;
                let cosine = cosine(host.logits()?, own.logits()?);
                assert!(cosine > 0.995, "{model_type}, {part} after {done}: {cosine}");
            }
            done += part;
        }
    }
    Ok(())
}

#[test]
fn a_recorded_step_is_what_single_operations_make() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for model_type in ["llama", "qwen2", "qwen3", "gemma3_text"] {
        let dir = tempfile::tempdir()?;
        write_checkpoint(dir.path(), model_type)?;
        for (quantize, dense_len, dtype) in [
            (None, usize::MAX, KvDtype::F16),
            (Some(GgmlDType::Q4K), usize::MAX, KvDtype::Bf16),
            (Some(GgmlDType::Q8_0), 200, KvDtype::F16),
            (None, 200, KvDtype::Q8_0),
        ] {
            let weights = Weights::open(dir.path(), &device, quantize)?;
            let model = model::load(&weights)?;
            let attention = RoutedAttention::new(routing(dense_len), for_device(&device)?)?;
            let specs = attention.layer_specs(&model.config().layer_specs());
            let mut caches = [(); 2].map(|()| sparse_attn::KvCache::new(&specs, dtype.into(), &device, 1024));
            let [Ok(plain), Ok(recorded)] = &mut caches else { panic!("no memory") };
            let ids = ids(430);
            for cache in [&mut *plain, &mut *recorded] {
                model.forward(&ids[..170], &attention, cache)?;
            }
            let mut step = model.token_step(&attention, recorded)?.expect("every part has a kernel");
            // Past the length from which blocks are selected, and past several blocks and pages.
            for id in &ids[170..] {
                let hidden = model.forward(&[*id], &attention, plain)?;
                let want = model.logits(&hidden)?.flatten_all()?.to_vec1::<f32>()?;
                assert!(step.run(*id, recorded)?);
                let got = step.logits()?;
                let cosine = cosine(&want, &got);
                // Where blocks are selected, near scores may change places.
                let least = if dense_len == usize::MAX { 0.9995 } else { 0.99 };
                assert!(cosine > least, "{model_type} {quantize:?} at {}: {cosine}", recorded.len());
                let best = (0u32..).zip(&got).fold((0, f32::NEG_INFINITY), |best, (id, x)| if *x > best.1 { (id, *x) } else { best });
                assert_eq!(step.likeliest()?, best.0);
                let mut all: Vec<(u32, f32)> = (0u32..).zip(got.iter().copied()).collect();
                all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                for count in [1, 40, 200] {
                    let Some(mut best) = step.best(count)? else {
                        assert!(all[0].1 - all[count - 1].1 > 31.9, "{count} at {}: not found, and near", recorded.len());
                        continue;
                    };
                    best.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                    assert!(best.len() >= count && best[..] == all[..best.len()], "{count} at {}", recorded.len());
                }
                assert_eq!(plain.read_count(), recorded.read_count());
            }
        }
    }
    Ok(())
}

/// A gate of random weights for each of two layers, with a hidden layer in the second one: about half of the scores are above 0.
fn gate(hidden_size: usize, device: &Device) -> Result<Gate> {
    let random = |rows: usize, columns: usize, seed: usize| {
        let value = |i: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0;
        Tensor::from_vec((0..rows * columns).map(value).collect::<Vec<f32>>(), (rows, columns), &Device::Cpu)
    };
    let bias = |count: usize| Tensor::zeros(count, DType::F32, &Device::Cpu);
    let linear = Feedforward { hidden: None, weight: random(2, hidden_size, 1)?, bias: bias(2)? };
    let deep = Feedforward { hidden: Some((random(48, hidden_size, 2)?, bias(48)?)), weight: random(2, 48, 3)?, bias: bias(2)? };
    Gate::new(vec![GateLayer::Feedforward(linear), GateLayer::Feedforward(deep)], 0.0, 0.5)?.to_device(device)
}

#[test]
fn a_recorded_step_follows_a_token_router() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for (model_type, quantize) in [("llama", None), ("qwen2", Some(GgmlDType::Q4K)), ("gemma3_text", None)] {
        let dir = tempfile::tempdir()?;
        write_checkpoint(dir.path(), model_type)?;
        for dense_len in [usize::MAX, 200] {
            let of = |device: &Device| -> Result<(Arc<dyn model::CausalLm>, RoutedAttention)> {
                let model = model::load(&Weights::open(dir.path(), device, quantize)?)?;
                let gate = Arc::new(gate(model.config().hidden_size, device)?);
                // Without blocks to select, short contexts are dense: until the middle of what is generated.
                let token_dense_len = if dense_len == usize::MAX { 256 } else { 0 };
                let routing = Routing { token_router: gate, token_dense_len, ..routing(dense_len) };
                Ok((model, RoutedAttention::new(routing, for_device(device)?)?))
            };
            let (model, attention) = of(&device)?;
            let specs = attention.layer_specs(&model.config().layer_specs());
            let cache = |device: &Device| sparse_attn::KvCache::new(&specs, KvDtype::F16.into(), device, 300);
            let (mut plain, mut recorded) = (cache(&device)?, cache(&device)?);
            let ids = ids(430);
            for cache in [&mut plain, &mut recorded] {
                model.forward(&ids[..170], &attention, cache)?;
            }
            let mut step = model.token_step(&attention, &recorded)?.expect("every part has a kernel");
            for (index, id) in ids[170..].iter().enumerate() {
                // Back to an earlier token, and on from there: other verdicts are in the way.
                if index == 130 {
                    let back = recorded.oldest_restorable().max(recorded.len() - 20);
                    plain.truncate(back)?;
                    recorded.truncate(back)?;
                }
                let hidden = model.forward(&[*id], &attention, &mut plain)?;
                let want = model.logits(&hidden)?.flatten_all()?.to_vec1::<f32>()?;
                assert!(step.run(*id, &mut recorded)?, "{model_type} at {}", recorded.len());
                let cosine = cosine(&want, &step.logits()?);
                // A verdict by inputs in bf16 may be another one.
                let least = if dense_len == usize::MAX { 0.997 } else { 0.99 };
                assert!(cosine > least, "{model_type} {quantize:?} at {}: {cosine}", recorded.len());
                // A score near the threshold falls on either side, and another block has another number of tokens.
                let (plain, recorded) = (plain.read_count(), recorded.read_count());
                assert_eq!(plain.visible, recorded.visible);
                assert!(plain.read.abs_diff(recorded.read) * 20 < plain.read, "{model_type} {quantize:?}: {plain:?}, {recorded:?}");
            }
            let read = recorded.read_count();
            assert!(read.read < read.visible * 9 / 10, "{read:?}: hardly anything was dropped");
            // The host's own code, from the beginning.
            let (host_model, host_attention) = of(&Device::Cpu)?;
            if dense_len == usize::MAX {
                let mut host = cache(&Device::Cpu)?;
                let hidden = host_model.forward(&ids[..300], &host_attention, &mut host)?;
                let want = host_model.logits(&hidden.narrow(0, 299, 1)?)?.flatten_all()?.to_vec1::<f32>()?;
                let mut own = cache(&device)?;
                let hidden = model.forward(&ids[..300], &attention, &mut own)?;
                let got = model.logits(&hidden.narrow(0, 299, 1)?)?.flatten_all()?.to_vec1::<f32>()?;
                let cosine = self::cosine(&want, &got);
                assert!(cosine > 0.99, "{model_type}: {cosine} from the host");
            }
        }
    }
    Ok(())
}

#[test]
fn pools_that_are_large_enough_stay_where_they_are() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    write_checkpoint(dir.path(), "llama")?;
    let model = model::load(&Weights::open(dir.path(), &device, None)?)?;
    let token_router = Arc::new(gate(model.config().hidden_size, &device)?);
    let attention = RoutedAttention::new(Routing { token_router, ..routing(usize::MAX) }, for_device(&device)?)?;
    // A page for each head, which is in use from the first token on.
    let specs = attention.layer_specs(&model.config().layer_specs());
    let mut cache = sparse_attn::KvCache::new(&specs, KvDtype::F16.into(), &device, 60)?;
    let places = |cache: &sparse_attn::KvCache| (0..cache.layers()).map(|layer| cache.layer(layer).k().values().id()).collect::<Vec<_>>();
    let (before, ids) = (places(&cache), ids(60));
    model.forward(&ids[..10], &attention, &mut cache)?;
    let mut step = model.token_step(&attention, &cache)?.expect("every part has a kernel");
    for id in &ids[10..] {
        assert!(step.run(*id, &mut cache)?);
    }
    assert_eq!(places(&cache), before, "each time they were made again, that step was recorded again");
    Ok(())
}

/// A gate of one layer for each of two, or of two layers: those of all can decide together.
fn alike(hidden_size: usize, is_deep: bool, device: &Device) -> Result<Gate> {
    let gate = gate(hidden_size, &Device::Cpu)?;
    let layer = gate.layers()[usize::from(is_deep)].clone();
    Gate::new(vec![layer; 2], 0.0, 0.5)?.to_device(device)
}

#[test]
fn a_prompt_that_fits_the_window_is_decided_on_as_one_that_leaves_it() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    write_checkpoint(dir.path(), "qwen2")?;
    for (is_deep, dense_len, token_dense_len) in [(false, usize::MAX, 0), (true, usize::MAX, 144), (false, 200, 0)] {
        let weights = Weights::open(dir.path(), &device, Some(GgmlDType::Q8_0))?;
        let gate = alike(weights.config().hidden_size, is_deep, &device)?;
        assert_eq!(gate.stacks().len(), 1);
        let plain = routing(dense_len);
        let routing = Routing { token_router: Arc::new(gate), limits: Limits { window: 128, ..plain.limits }, token_dense_len, ..plain };
        let prompt = |count: usize, chunk: usize| -> Result<Session> {
            let mut session = session(dir.path(), &device, Some(GgmlDType::Q8_0), routing.clone())?;
            session.prefill(&ids(count), chunk, |_, _| ControlFlow::Continue(()))?;
            Ok(session)
        };
        // Of the last one, parts fit that are read after what has left it.
        let (mut inside, mut beyond, mut in_parts) = (prompt(120, 1024)?, prompt(190, 1024)?, prompt(190, 64)?);
        let decided = |session: &mut Session| -> Result<Vec<bool>> {
            let cache = session.cache()?;
            let of = |layer: usize, head| cache.layer(layer).admitted(head).expect("a gate decides");
            let all = (0..2).flat_map(|layer| (0..2).flat_map(move |head| (0..120).map(move |t| (layer, head, t))));
            Ok(all.map(|(layer, head, t)| of(layer, head).contains(t)).collect())
        };
        let want = decided(&mut beyond)?;
        let kept = want.iter().filter(|kept| **kept).count();
        for got in [decided(&mut inside)?, decided(&mut in_parts)?] {
            // A product of another shape rounds otherwise.
            let others = want.iter().zip(&got).filter(|(want, got)| want != got).count();
            assert!((100..380).contains(&kept) && others < 5, "{is_deep}: {kept} of {} kept, {others} otherwise", want.len());
        }
        let read = inside.read_count()?;
        assert!(read.read == read.visible && read.read > 0);
        // Both go on, the one by itself and the other from a copy made before anyone looked.
        let mut sampler = Sampler::new(SamplerOptions::greedy())?;
        let mut go_on = |session: &mut Session| -> Result<Vec<u32>> {
            let options = GenerateOptions { max_tokens: Some(60), end_tokens: Vec::new(), context: 1024, logprobs: 0 };
            session.generate(&mut sampler, options).map(|token| Ok(token?.id)).collect()
        };
        let mut fresh = prompt(190, 64)?;
        let mut fork = fresh.fork()?;
        assert_eq!(go_on(&mut fork)?, go_on(&mut fresh)?);
        assert_eq!(go_on(&mut in_parts)?, fresh.tokens()[190..]);
        let mut fresh = prompt(120, 1024)?;
        let mut fork = fresh.fork()?;
        assert_eq!(go_on(&mut fork)?, go_on(&mut fresh)?);
        assert_eq!(fresh.tokens()[..140], {
            go_on(&mut inside)?;
            inside.tokens()[..140].to_vec()
        });
        let read = fresh.read_count()?;
        assert!(read.read < read.visible, "{read:?}: nothing was dropped");
    }
    Ok(())
}

#[test]
fn a_prompt_that_misses_nothing_is_a_dense_one_and_what_follows_misses_what_is_dropped() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    write_checkpoint(dir.path(), "qwen2")?;
    for is_deep in [false, true] {
        let plain = routing(usize::MAX);
        let weights = Weights::open(dir.path(), &device, Some(GgmlDType::Q8_0))?;
        let gate = Arc::new(alike(weights.config().hidden_size, is_deep, &device)?);
        let limits = Limits { window: 64, ..plain.limits };
        let of = |token_dense_prompt: usize| Routing { token_router: gate.clone(), limits, token_dense_prompt, ..plain.clone() };
        let prompt = |routing: Routing, chunk: usize| -> Result<(Session, Vec<f32>)> {
            let mut session = session(dir.path(), &device, Some(GgmlDType::Q8_0), routing)?;
            session.prefill(&ids(300), chunk, |_, _| ControlFlow::Continue(()))?;
            let logits = session.logits()?.to_vec();
            Ok((session, logits))
        };
        let far = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let (_, want) = prompt(plain.clone(), 1024)?;
        let (_, of_longer) = prompt(of(299), 1024)?;
        let apart = far(&want, &of_longer);
        for chunk in [1024, 130] {
            let (mut session, got) = prompt(of(300), chunk)?;
            assert!(far(&want, &got) < 0.02 * apart, "{is_deep}, in {chunk}: off by {}, what is dropped makes {apart}", far(&want, &got));
            let mut fork = session.fork()?;
            let (whole, mut sampler) = (session.read_count()?, Sampler::new(SamplerOptions::greedy())?);
            assert_eq!(whole.read, whole.visible);
            let mut go_on = |session: &mut Session| -> Result<Vec<u32>> {
                let options = GenerateOptions { max_tokens: Some(40), end_tokens: Vec::new(), context: 1024, logprobs: 0 };
                session.generate(&mut sampler, options).map(|token| Ok(token?.id)).collect()
            };
            let tokens = go_on(&mut session)?;
            assert_eq!(go_on(&mut fork)?, tokens);
            let count = session.read_count()?;
            assert!(count.read < count.visible, "{count:?}: nothing was dropped");
            // As if the first of them had not waited for verdicts on the prompt.
            let (mut looked_at, _) = prompt(of(300), chunk)?;
            looked_at.cache()?;
            assert_eq!(go_on(&mut looked_at)?, tokens);
            // Gone back in to where tokens are out of the next one's window, and to where none is.
            for back in [290, 60] {
                let gone_on = |is_looked_at: bool, go_on: &mut dyn FnMut(&mut Session) -> Result<Vec<u32>>| -> Result<_> {
                    let (mut session, _) = prompt(of(300), chunk)?;
                    if is_looked_at {
                        session.cache()?;
                    }
                    assert_eq!(session.rewind(back)?, back);
                    session.prefill(&ids(300)[back..=back], 1024, |_, _| ControlFlow::Continue(()))?;
                    Ok((go_on(&mut session)?, session.read_count()?))
                };
                let (tokens, count) = gone_on(false, &mut go_on)?;
                assert!(count.read < count.visible, "back to {back}: {count:?}: nothing was dropped");
                assert_eq!(gone_on(true, &mut go_on)?, (tokens, count), "back to {back}");
            }
        }
        // What it took and the next token does not need is given back.
        let attention = RoutedAttention::new(of(300), for_device(&device)?)?;
        let mut small = Session::new(model::load(&weights)?, attention, KvDtype::F16.into(), &device, 64)?;
        small.prefill(&ids(300), 1024, |_, _| ControlFlow::Continue(()))?;
        let taken = small.kv_bytes();
        small.prefill(&[7], 1, |_, _| ControlFlow::Continue(()))?;
        assert!(small.kv_bytes() < taken, "{} of {taken}", small.kv_bytes());
    }
    Ok(())
}

#[test]
fn verdicts_on_generated_tokens_are_those_of_the_same_prompt() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for model_type in ["llama", "gemma3_text"] {
        let dir = tempfile::tempdir()?;
        write_checkpoint(dir.path(), model_type)?;
        let weights = Weights::open(dir.path(), &device, Some(GgmlDType::Q8_0))?;
        let hidden_size = weights.config().hidden_size;
        let (deep, mixed) = (alike(hidden_size, true, &device)?, gate(hidden_size, &device)?);
        let open = Gate::new(vec![gate(hidden_size, &Device::Cpu)?.layers()[0].clone(), GateLayer::Open], 0.0, 0.5)?.to_device(&device)?;
        assert_eq!([&deep, &mixed, &open].map(|gate| gate.stacks().len()), [1, 2, 1]);
        // Windows and blocks that leave room for 32 tokens to wait, and for one.
        for (gate, window, dense_len, token_dense_len) in
            [(deep, 64, usize::MAX, 128), (mixed, 64, 200, 0), (open, 64, 200, 96), (gate(hidden_size, &device)?, 17, 150, 0)]
        {
            let plain = routing(dense_len);
            let routing = Routing { token_router: Arc::new(gate), limits: Limits { window, ..plain.limits }, token_dense_len, ..plain };
            let start = || session(dir.path(), &device, Some(GgmlDType::Q8_0), routing.clone());
            let mut sampler = Sampler::new(SamplerOptions::greedy())?;
            let mut go_on = |session: &mut Session, count: usize| -> Result<Vec<u32>> {
                let options = GenerateOptions { max_tokens: Some(count), end_tokens: Vec::new(), context: 1024, logprobs: 0 };
                session.generate(&mut sampler, options).map(|token| Ok(token?.id)).collect()
            };
            let mut generated = start()?;
            generated.prefill(&ids(50), 1024, |_, _| ControlFlow::Continue(()))?;
            let first = go_on(&mut generated, 300)?;
            // Looked at in between, gone back a little, and gone on from a copy: the same.
            let mut looked_at = start()?;
            looked_at.prefill(&ids(50), 1024, |_, _| ControlFlow::Continue(()))?;
            let mut again = Vec::new();
            for count in [1, 7, 100, 1, 60] {
                again.extend(go_on(&mut looked_at, count)?);
                looked_at.cache()?;
                looked_at = if count == 7 { looked_at.fork()? } else { looked_at };
                if count == 100 {
                    // The newest token that stays is fed again.
                    again.truncate(again.len() - 10);
                    let (back, last) = (49 + again.len(), again[again.len() - 1]);
                    assert_eq!(looked_at.rewind(back)?, back);
                    looked_at.prefill(&[last], 1024, |_, _| ControlFlow::Continue(()))?;
                }
            }
            assert_eq!(again, first[..again.len()], "{model_type}, window {window}");
            let mut prompt = start()?;
            prompt.prefill(&generated.tokens()[..349], 1024, |_, _| ControlFlow::Continue(()))?;
            let mut kept = 0;
            let (of_prompt, of_text) = (prompt.cache()?, generated.cache()?);
            for (layer, head) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let of = |cache: &sparse_attn::KvCache| -> Option<Vec<bool>> {
                    let admitted = cache.layer(layer).admitted(head)?;
                    Some((0..349).map(|t| admitted.contains(t)).collect())
                };
                let (want, got) = (of(of_prompt), of(of_text));
                // What a token saw before, and so its own score, depends on others that are near the threshold.
                let others = want.iter().flatten().zip(got.iter().flatten()).filter(|(want, got)| want != got).count();
                kept += got.iter().flatten().filter(|kept| **kept).count();
                let all = got.map_or(0, |got| got.len());
                assert!(want.is_some() == (all > 0) && others <= 35, "{model_type}, layer {layer}: {others} of {all} otherwise");
            }
            assert!(kept > 200);
        }
    }
    Ok(())
}

#[test]
fn a_text_goes_on_the_same_after_going_back() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    write_checkpoint(dir.path(), "llama")?;
    let mut session = session(dir.path(), &device, Some(GgmlDType::Q4K), routing(200))?;
    session.prefill(&ids(180), 64, |_, _| ControlFlow::Continue(()))?;
    let mut sampler = Sampler::new(SamplerOptions::greedy())?;
    let mut go_on = |session: &mut Session| -> Result<Vec<u32>> {
        let options = GenerateOptions { max_tokens: Some(100), end_tokens: Vec::new(), context: 1024, logprobs: 0 };
        session.generate(&mut sampler, options).map(|token| Ok(token?.id)).collect()
    };
    let first = go_on(&mut session)?;
    assert_eq!(session.rewind(180)?, 180);
    // The last token of the prompt is fed again.
    session.rewind(179)?;
    session.prefill(&ids(180)[179..], 64, |_, _| ControlFlow::Continue(()))?;
    let second = go_on(&mut session)?;
    assert_eq!(first[..20], second[..20]);
    let mut fork = session.fork()?;
    assert_eq!(go_on(&mut session)?, go_on(&mut fork)?);
    Ok(())
}

#[test]
fn a_rotation_is_that_of_the_host_at_any_position() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let scaling = RopeScaling::Yarn { factor: 4.0, original_context: 32768, beta_fast: 32.0, beta_slow: 1.0, attention_factor: 1.1 };
    let rope = Rope::new(&RopeConfig { theta: 1e6, scaling }, 64);
    // Queries and keys lie side by side, as one product gives them.
    let all = Tensor::randn(0f32, 1.0, (300, 5, 64), &Device::Cpu)?;
    for start in [0, 100_000] {
        let rotated = |device: &Device, dtype: DType| -> Result<Vec<Tensor>> {
            let (all, tables) = (all.to_device(device)?, rope.tables(Step { start, len: 300 }, device)?);
            let (q, k) = tables.apply(&all.narrow(1, 0, 3)?, &all.narrow(1, 3, 1)?, dtype)?;
            assert!(device.is_cpu() || q.dtype() == dtype);
            [q, k].into_iter().map(|x| x.to_device(&Device::Cpu)?.to_dtype(DType::F32)).collect()
        };
        for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
            for (host, own) in rotated(&Device::Cpu, dtype)?.iter().zip(rotated(&device, dtype)?) {
                let off = (host - own)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(off < tolerance, "{dtype:?} at {start}: off by {off}");
            }
        }
    }
    Ok(())
}
