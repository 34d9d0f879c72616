//! Tiny checkpoints of every architecture against logits and greedy continuations made with PyTorch (f32).

use candle_core::{DType, Device, Result, Tensor};
use model::weights::SumOrder;
use model::{CausalLm, GenerateOptions, Sampler, SamplerOptions, Session, Weights};
use sparse_attn::backend::{AttentionBackend, Cpu, Reference};
use sparse_attn::block_router::Spread;
use sparse_attn::select::{Budget, Limits};
use sparse_attn::token_router::{All, Random, TokenRouter};
use sparse_attn::{KvCache, KvDtype, RoutedAttention, Routing};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

const CHECKPOINTS: [&str; 7] = ["gemma3_text", "llama", "llama3-rope", "mistral", "mistral-swa", "qwen2", "qwen3"];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny").join(name)
}

struct Golden {
    input_ids: Vec<u32>,
    logits: Tensor, // [tokens, vocab_size]
    greedy: Vec<u32>,
}

impl Golden {
    fn open(name: &str) -> Result<Self> {
        let all = candle_core::safetensors::load(fixture(name).join("golden.safetensors"), &Device::Cpu)?;
        let ids = |name: &str| all[name].flatten_all()?.to_dtype(DType::U32)?.to_vec1::<u32>();
        let vocab_size = all["logits"].dims().last().copied().expect("logits have a vocabulary");
        Ok(Self { input_ids: ids("input_ids")?, logits: all["logits"].reshape(((), vocab_size))?, greedy: ids("greedy_24")? })
    }
}

fn load(name: &str) -> Result<Arc<dyn CausalLm>> {
    model::load(&Weights::open(&fixture(name), &Device::Cpu, None)?)
}

fn logits_in_chunks(model: &dyn CausalLm, attention: &RoutedAttention, ids: &[u32], chunk: usize) -> Result<Tensor> {
    let mut cache = KvCache::new(&model.config().layer_specs(), KvDtype::F32.into(), &Device::Cpu, 0)?;
    let parts = ids.chunks(chunk).map(|part| model.logits(&model.forward(part, attention, &mut cache)?)).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&parts, 0)
}

#[test]
fn logits_equal_pytorch_at_every_position_however_the_prompt_is_cut() -> Result<()> {
    for name in CHECKPOINTS {
        let (model, golden) = (load(name)?, Golden::open(name)?);
        let backends: [Arc<dyn AttentionBackend>; 2] = [Arc::new(Reference), Arc::new(Cpu)];
        for backend in backends {
            let attention = RoutedAttention::dense(backend);
            for chunk in [golden.input_ids.len(), 7, 1] {
                let logits = logits_in_chunks(model.as_ref(), &attention, &golden.input_ids, chunk)?;
                assert_eq!(logits.dims(), golden.logits.dims(), "{name}");
                let worst: f32 = (logits - &golden.logits)?.abs()?.flatten_all()?.max(0)?.to_scalar()?;
                assert!(worst < 1e-3, "{name}, {} backend, chunks of {chunk}: off by {worst}", attention.backend_name());
                println!("{name:12} {:9} chunks of {chunk:2}: off by {worst:.1e}", attention.backend_name());
            }
        }
    }
    Ok(())
}

#[test]
fn greedy_continuations_equal_pytorch() -> Result<()> {
    for name in CHECKPOINTS {
        let (model, golden) = (load(name)?, Golden::open(name)?);
        for chunk in [64, 7, 1] {
            let mut session = Session::new(model.clone(), RoutedAttention::dense(Arc::new(Cpu)), KvDtype::F32.into(), &Device::Cpu, 0)?;
            assert!(session.prefill(&golden.input_ids, chunk, |_, _| ControlFlow::Continue(()))?);
            let mut sampler = Sampler::new(SamplerOptions::greedy())?;
            let options = GenerateOptions { max_tokens: Some(24), end_tokens: vec![], context: 4096, logprobs: 0 };
            let ids = session.generate(&mut sampler, options).map(|token| Ok(token?.id)).collect::<Result<Vec<u32>>>()?;
            let want = &golden.greedy[golden.greedy.len() - 24..];
            assert_eq!(ids, want, "{name}, chunks of {chunk}");
        }
    }
    Ok(())
}

#[test]
fn rewinding_and_generating_again_gives_the_same_tokens() -> Result<()> {
    for name in CHECKPOINTS {
        let (model, golden) = (load(name)?, Golden::open(name)?);
        let mut session = Session::new(model, RoutedAttention::dense(Arc::new(Cpu)), KvDtype::F32.into(), &Device::Cpu, 0)?;
        let once = |session: &mut Session| -> Result<Vec<u32>> {
            let mut sampler = Sampler::new(SamplerOptions { seed: 3, ..SamplerOptions::default() })?;
            let options = GenerateOptions { max_tokens: Some(150), end_tokens: vec![], context: 4096, logprobs: 0 };
            session.generate(&mut sampler, options).map(|token| Ok(token?.id)).collect()
        };
        session.prefill(&golden.input_ids, 64, |_, _| ControlFlow::Continue(()))?;
        let first = once(&mut session)?;
        let prompt = golden.input_ids.len();
        let kept = session.rewind(prompt - 1)?;
        // Sliding layers may have forgotten: then everything is computed anew.
        assert!(kept == prompt - 1 || kept == 0, "{name}: {kept}");
        session.prefill(&golden.input_ids[kept..], 64, |_, _| ControlFlow::Continue(()))?;
        assert_eq!(once(&mut session)?, first, "{name}");
    }
    Ok(())
}

#[test]
fn a_failed_step_leaves_the_session_as_it_was() -> Result<()> {
    let (model, golden) = (load("llama")?, Golden::open("llama")?);
    let attention = RoutedAttention::dense(Arc::new(Cpu));
    let mut cache = KvCache::new(&model.config().layer_specs(), KvDtype::F32.into(), &Device::Cpu, 0)?;
    model.forward(&golden.input_ids[..20], &attention, &mut cache)?;
    let error = model.forward(&[1, 600_000], &attention, &mut cache).unwrap_err().to_string();
    assert!(error.contains("600000") && error.contains("512"), "{error}");
    assert_eq!(cache.len(), 20);
    let logits = model.logits(&model.forward(&golden.input_ids[20..], &attention, &mut cache)?)?;
    let want = golden.logits.narrow(0, 20, golden.input_ids.len() - 20)?;
    let worst: f32 = (logits - want)?.abs()?.flatten_all()?.max(0)?.to_scalar()?;
    assert!(worst < 1e-3, "off by {worst}");
    Ok(())
}

#[test]
fn sixteen_bit_checkpoints_give_the_logits_of_their_rounded_weights() -> Result<()> {
    let golden = Golden::open("qwen3")?;
    let whole = candle_core::safetensors::load(fixture("qwen3").join("model.safetensors"), &Device::Cpu)?;
    let logits = |dtypes: [DType; 2]| -> Result<Tensor> {
        let dir = tempfile::tempdir()?;
        std::fs::copy(fixture("qwen3").join("config.json"), dir.path().join("config.json"))?;
        let rounded = whole.iter().map(|(name, tensor)| Ok((name.clone(), tensor.to_dtype(dtypes[0])?.to_dtype(dtypes[1])?)));
        candle_core::safetensors::save(&rounded.collect::<Result<_>>()?, dir.path().join("model.safetensors"))?;
        let model = model::load(&Weights::open(dir.path(), &Device::Cpu, None)?)?;
        logits_in_chunks(model.as_ref(), &RoutedAttention::dense(Arc::new(Cpu)), &golden.input_ids, 64)
    };
    for dtype in [DType::F16, DType::BF16] {
        // Stored in 16 bits, or rounded to them and stored in 32: the same numbers.
        let worst: f32 = (logits([dtype, dtype])? - logits([dtype, DType::F32])?)?.abs()?.flatten_all()?.max(0)?.to_scalar()?;
        assert!(worst < 1e-5, "{dtype:?}: off by {worst}");
    }
    Ok(())
}

#[test]
fn a_quantised_checkpoint_stays_close() -> Result<()> {
    let golden = Golden::open("llama")?;
    let weights = Weights::open(&fixture("llama"), &Device::Cpu, Some(model::weights::quantize_dtype("q8_0")?))?;
    let plain = Weights::open(&fixture("llama"), &Device::Cpu, None)?;
    // 8.5 bits a weight, twice (candle packs a second copy), against 32.
    assert!(weights.loaded_bytes() * 3 < plain.loaded_bytes() * 2);
    let model = model::load(&weights)?;
    let logits = logits_in_chunks(model.as_ref(), &RoutedAttention::dense(Arc::new(Cpu)), &golden.input_ids, 64)?;
    let worst: f32 = (logits - &golden.logits)?.abs()?.flatten_all()?.max(0)?.to_scalar()?;
    let scale: f32 = golden.logits.abs()?.flatten_all()?.max(0)?.to_scalar()?;
    assert!(worst < 0.05 * scale, "off by {worst}, logits reach {scale}");
    Ok(())
}

#[test]
fn in_a_fixed_order_queries_that_select_for_themselves_are_the_same_in_chunks_of_any_size() -> Result<()> {
    for (name, quantize) in [("llama", "q8_0"), ("qwen2", "q4_0"), ("gemma3_text", "q8_0")] {
        let quantize = Some(model::weights::quantize_dtype(quantize)?);
        let model = model::load(&Weights::open(&fixture(name), &Device::Cpu, quantize)?.with_order(SumOrder::Fixed))?;
        let limits = Limits { window: 16, sinks: 2, block_size: 8, budget: Budget::tokens(32), dense_len: 0, tile: 1 };
        let routing = Routing { block_router: Arc::new(Spread), limits, ..Routing::dense() };
        let attention = RoutedAttention::new(routing, Arc::new(Cpu))?;
        let ids: Vec<u32> = (0..150).map(|i| (i * 37 + 11) % model.config().vocab_size as u32).collect();
        let logits = |chunk: usize| -> Result<Vec<f32>> {
            let mut session = Session::new(model.clone(), attention.clone(), KvDtype::F16.into(), &Device::Cpu, 0)?;
            session.prefill(&ids, chunk, |_, _| ControlFlow::Continue(()))?;
            let count = session.read_count().unwrap();
            assert!(count.read < count.visible, "{name}: nothing was left out");
            Ok(session.logits()?.to_vec())
        };
        let whole = logits(ids.len())?;
        for chunk in [1, 3, 7, 64] {
            assert_eq!(logits(chunk)?, whole, "{name} in chunks of {chunk}");
        }
    }
    Ok(())
}

#[test]
fn queries_of_a_short_prompt_miss_nothing_however_it_is_cut_and_what_follows_does() -> Result<()> {
    let model = load("llama")?;
    let ids: Vec<u32> = (0..150).map(|i| (i * 37 + 11) % model.config().vocab_size as u32).collect();
    let session = |token_router: Arc<dyn TokenRouter>, token_dense_len: usize, token_dense_prompt: usize| -> Result<Session> {
        let limits = Limits { window: 16, sinks: 2, ..Routing::dense().limits };
        let routing = Routing { token_router, limits, token_dense_len, token_dense_prompt, ..Routing::dense() };
        Session::new(model.clone(), RoutedAttention::new(routing, Arc::new(Cpu))?, KvDtype::F32.into(), &Device::Cpu, 0)
    };
    let hiding = |token_dense_prompt: usize| session(Arc::new(Random { keep: 0.3 }), 0, token_dense_prompt);
    let read = |mut session: Session, ids: &[u32], chunk: usize| -> Result<(Session, Vec<f32>)> {
        session.prefill(ids, chunk, |_, _| ControlFlow::Continue(()))?;
        let logits = session.logits()?.to_vec();
        Ok((session, logits))
    };
    let are_near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-3);
    let (dense, of_dense) = read(session(Arc::new(All), 0, 0)?, &ids, 150)?;
    let (routed, of_routed) = read(hiding(0)?, &ids, 150)?;
    assert!(!are_near(&of_dense, &of_routed), "nothing is hidden");
    let (_, after_dense) = read(dense, &[7], 1)?;
    let mut after = None;
    for chunk in [150, 64, 7, 1] {
        let (mut short, of_short) = read(hiding(150)?, &ids, chunk)?;
        assert!(are_near(&of_dense, &of_short), "in {chunk}");
        let count = short.read_count()?;
        assert_eq!(count.read, count.visible, "in {chunk}: something is hidden");
        assert_eq!(short.kv_bytes(), routed.kv_bytes(), "in {chunk}: what is hidden stays in memory");
        let (mut short, of_next) = read(short, &[7], 1)?;
        assert!(!are_near(&after_dense, &of_next), "in {chunk}: nothing is hidden from what follows");
        assert!(are_near(after.get_or_insert(of_next.clone()), &of_next), "in {chunk}: the token that follows");
        let count = short.read_count()?;
        assert!(count.read < count.visible, "in {chunk}: all is read");
        // It is longer, or follows on where tokens may be hidden already, or not yet.
        assert!(are_near(&of_routed, &read(hiding(149)?, &ids, chunk)?.1), "in {chunk}: of a longer one");
        for (dense_len, hides) in [(0, true), (32, false)] {
            let (first, _) = read(session(Arc::new(Random { keep: 0.3 }), dense_len, 150)?, &ids[..20], chunk)?;
            let (_, of_second) = read(first, &ids[20..], chunk)?;
            assert_eq!(!are_near(&of_dense, &of_second), hides, "in {chunk}: of a second one, dense up to {dense_len}");
        }
    }
    // One that is stopped is over.
    let mut stopped = hiding(150)?;
    let at = |done: usize| if done < 100 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
    assert!(!stopped.prefill(&ids, 50, |done, _| at(done))?);
    let (_, of_rest) = read(stopped, &ids[100..], 50)?;
    assert!(!are_near(&of_dense, &of_rest), "nothing is hidden after a prompt that was stopped");
    Ok(())
}
