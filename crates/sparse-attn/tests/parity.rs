//! Every backend equals the plain one, and attention keeps its laws.

use candle_core::{DType, Device, Result, Tensor};
use sparse_attn::backend::{AttentionBackend, Cpu, Reference};
use sparse_attn::{AttentionInput, HeadShape, KvCache, KvDtype, LayerSpec, RoutedAttention};
use std::sync::Arc;

/// `q_heads, kv_heads, head_dim, sliding_window, tokens`
const CASES: [(usize, usize, usize, Option<usize>, usize); 9] = [
    (4, 2, 16, None, 97),
    (9, 3, 64, None, 700),
    (8, 1, 64, Some(100), 700),
    (3, 3, 16, Some(8), 75),
    (4, 1, 256, Some(64), 130),
    (2, 2, 8, Some(1), 70),
    (16, 1, 80, None, 150),
    (6, 2, 96, None, 150),
    (7, 1, 128, Some(33), 150),
];

fn backends() -> Vec<Arc<dyn AttentionBackend>> {
    vec![Arc::new(Cpu)]
}

struct Case {
    spec: LayerSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Case {
    fn new((q_heads, kv_heads, head_dim, sliding_window, tokens): (usize, usize, usize, Option<usize>, usize)) -> Result<Self> {
        let random = |heads, seed| normal(seed, tokens * heads * head_dim)?.reshape((tokens, heads, head_dim));
        let spec = LayerSpec { sliding_window, ..LayerSpec::full(HeadShape::new(q_heads, kv_heads, head_dim)?) };
        Ok(Self { spec, q: random(q_heads, 1)?, k: random(kv_heads, 2)?, v: random(kv_heads, 3)? })
    }

    fn tokens(&self) -> usize {
        self.q.dims()[0]
    }

    fn run(&self, backend: &Arc<dyn AttentionBackend>, dtype: KvDtype, chunk: usize) -> Result<Tensor> {
        let cuts: Vec<usize> = (0..self.tokens()).step_by(chunk).map(|first| chunk.min(self.tokens() - first)).collect();
        self.run_cut(backend, dtype, &cuts)
    }

    /// In steps of these lengths.
    fn run_cut(&self, backend: &Arc<dyn AttentionBackend>, dtype: KvDtype, cuts: &[usize]) -> Result<Tensor> {
        let attention = RoutedAttention::dense(backend.clone());
        let mut cache = KvCache::new(&[self.spec], dtype.into(), &Device::Cpu, 0)?;
        let mut parts = Vec::new();
        for len in cuts {
            let step = cache.reserve(*len)?;
            let part = |x: &Tensor| x.narrow(0, step.start, step.len);
            let (q, k, v) = (part(&self.q)?, part(&self.k)?, part(&self.v)?);
            let input = AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale: 0.3 };
            parts.push(attention.forward(0, input, step, &mut cache)?);
            cache.commit(step)?;
        }
        Tensor::cat(&parts, 0)
    }
}

/// About normal numbers, the same every time: sums of twelve uniform ones.
fn normal(seed: u64, count: usize) -> Result<Tensor> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let values: Vec<f32> = (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect();
    Tensor::from_vec(values, count, &Device::Cpu)
}

fn max_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

#[test]
fn every_backend_equals_the_reference_in_every_dtype_and_chunking() -> Result<()> {
    let reference: Arc<dyn AttentionBackend> = Arc::new(Reference);
    for case in CASES {
        let data = Case::new(case)?;
        for dtype in KvDtype::ALL {
            let want = data.run(&reference, dtype, data.tokens())?;
            for backend in backends() {
                for chunk in [data.tokens(), 64, 7, 1] {
                    let difference = max_difference(&data.run(&backend, dtype, chunk)?, &want)?;
                    assert!(difference < 2e-5, "{} {case:?} {dtype:?} chunk {chunk}: {difference}", backend.name());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_reference_is_the_textbook_formula() -> Result<()> {
    let data = Case::new((4, 2, 16, Some(20), 50))?;
    let got = data.run(&(Arc::new(Reference) as Arc<dyn AttentionBackend>), KvDtype::F32, 50)?.to_vec3::<f32>()?;
    let (q, k, v) = (data.q.to_vec3::<f32>()?, data.k.to_vec3::<f32>()?, data.v.to_vec3::<f32>()?);
    for t in 0..50usize {
        for head in 0..4 {
            let visible = (t + 1).saturating_sub(20)..=t;
            let dot = |p: usize| (0..16).map(|i| f64::from(q[t][head][i]) * f64::from(k[p][head / 2][i])).sum::<f64>();
            let weights: Vec<f64> = visible.clone().map(|p| (0.3 * dot(p)).exp()).collect();
            let total: f64 = weights.iter().sum();
            for i in 0..16 {
                let want: f64 = visible.clone().zip(&weights).map(|(p, w)| w / total * f64::from(v[p][head / 2][i])).sum();
                assert!((f64::from(got[t][head][i]) - want).abs() < 1e-5, "query {t}, head {head}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_key_in_the_future_changes_nothing_even_if_it_is_nan() -> Result<()> {
    for backend in backends().into_iter().chain([Arc::new(Reference) as _]) {
        for case in [CASES[0], CASES[2]] {
            let data = Case::new(case)?;
            let cut = data.tokens() / 2;
            let before = data.run(&backend, KvDtype::F32, data.tokens())?.narrow(0, 0, cut)?;
            let with_future = |factor: f64| -> Result<Tensor> {
                let poison = |x: &Tensor| Tensor::cat(&[&x.narrow(0, 0, cut)?, &(x.narrow(0, cut, data.tokens() - cut)? * factor)?], 0);
                let poisoned = Case { spec: data.spec, q: data.q.clone(), k: poison(&data.k)?, v: poison(&data.v)? };
                poisoned.run(&backend, KvDtype::F32, data.tokens())?.narrow(0, 0, cut)
            };
            let name = format!("{} {case:?}", backend.name());
            assert_eq!(max_difference(&before, &with_future(1000.0)?)?, 0.0, "{name}");
            // NaN takes another path through the sums, so these may round otherwise; a leaked one fails any comparison.
            let difference = max_difference(&before, &with_future(f64::NAN)?)?;
            assert!(difference < 1e-5, "{name}: {difference}");
        }
    }
    Ok(())
}

#[test]
fn a_failed_step_leaves_the_cache_as_it_was() -> Result<()> {
    for backend in backends() {
        let data = Case::new(CASES[2])?;
        let attention = RoutedAttention::dense(backend);
        let run = |fail: bool| -> Result<Tensor> {
            let mut cache = KvCache::new(&[data.spec], KvDtype::F32.into(), &Device::Cpu, 0)?;
            let mut last = None;
            for start in (0..640).step_by(64) {
                let part = |x: &Tensor, at| x.narrow(0, at, 64);
                if fail {
                    // A step that writes other tokens and is never committed, as after an error in a later layer.
                    let step = cache.reserve(64)?;
                    let (q, k, v) = (part(&data.q, 5)?, part(&data.k, 6)?, part(&data.v, 7)?);
                    attention.forward(
                        0,
                        AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale: 0.3 },
                        step,
                        &mut cache,
                    )?;
                    assert_eq!(cache.len(), start);
                }
                let step = cache.reserve(64)?;
                let (q, k, v) = (part(&data.q, start)?, part(&data.k, start)?, part(&data.v, start)?);
                last = Some(attention.forward(
                    0,
                    AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale: 0.3 },
                    step,
                    &mut cache,
                )?);
                cache.commit(step)?;
            }
            Ok(last.expect("ten steps"))
        };
        assert_eq!(max_difference(&run(false)?, &run(true)?)?, 0.0);
    }
    Ok(())
}

#[test]
fn truncating_and_writing_again_equals_never_having_written() -> Result<()> {
    let data = Case::new(CASES[2])?; // sliding window 100
    let attention = RoutedAttention::dense(Arc::new(Cpu));
    let feed = |cache: &mut KvCache, from: usize, len: usize, source: usize| -> Result<Tensor> {
        let step = cache.reserve(len)?;
        assert_eq!(step.start, from);
        let part = |x: &Tensor| x.narrow(0, source, len);
        let (q, k, v) = (part(&data.q)?, part(&data.k)?, part(&data.v)?);
        let out = attention.forward(
            0,
            AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale: 0.3 },
            step,
            cache,
        )?;
        cache.commit(step)?;
        Ok(out)
    };
    let mut straight = KvCache::new(&[data.spec], KvDtype::F32.into(), &Device::Cpu, 0)?;
    feed(&mut straight, 0, 400, 0)?;
    let want = feed(&mut straight, 400, 50, 400)?;

    let mut detour = KvCache::new(&[data.spec], KvDtype::F32.into(), &Device::Cpu, 0)?;
    feed(&mut detour, 0, 400, 0)?;
    feed(&mut detour, 400, 60, 500)?;
    assert!(detour.oldest_restorable() <= 400);
    detour.truncate(400)?;
    assert_eq!(max_difference(&feed(&mut detour, 400, 50, 400)?, &want)?, 0.0);

    feed(&mut detour, 450, 200, 450)?;
    feed(&mut detour, 650, 1, 650)?;
    let error = detour.truncate(420).unwrap_err().to_string();
    assert!(error.contains("420"), "{error}");
    detour.truncate(0)?;
    feed(&mut detour, 0, 400, 0)?;
    assert_eq!(max_difference(&feed(&mut detour, 400, 50, 400)?, &want)?, 0.0);
    Ok(())
}

#[test]
fn reported_bytes_are_allocated_bytes_and_a_window_bounds_them() -> Result<()> {
    let shape = HeadShape::new(4, 2, 64)?;
    let full = LayerSpec::full(shape);
    let cache = KvCache::new(&[full], KvDtype::F16.into(), &Device::Cpu, 1000)?;
    assert_eq!(cache.allocated_bytes(), 2 * 16 * 64 * 2 * 64 * 2); // k and v, 16 pages of 64, 2 heads of 64, 2 bytes
    assert_eq!(cache.allocated_bytes(), KvCache::planned_bytes(&[full], KvDtype::F16.into(), 1000));
    let sliding = LayerSpec { sliding_window: Some(128), ..full };
    assert_eq!(KvCache::planned_bytes(&[sliding], KvDtype::F16.into(), 100_000), 2 * 4 * 64 * 2 * 64 * 2);
    Ok(())
}

#[test]
fn shapes_that_do_not_fit_are_errors_with_both_shapes() -> Result<()> {
    for backend in backends().into_iter().chain([Arc::new(Reference) as _]) {
        let data = Case::new(CASES[0])?;
        let mut cache = KvCache::new(&[data.spec], KvDtype::F32.into(), &Device::Cpu, 0)?;
        let step = cache.reserve(5)?;
        let wrong = Tensor::zeros((5, 3, 16), DType::F32, &Device::Cpu)?;
        let attention = RoutedAttention::dense(backend);
        let error = attention
            .forward(
                0,
                AttentionInput { hidden: &wrong, projected: None, q: &wrong, k: &wrong, k_before_rope: &wrong, v: &wrong, scale: 1.0 },
                step,
                &mut cache,
            )
            .unwrap_err()
            .to_string();
        assert!(error.contains("[5, 3, 16]") && error.contains("[5, 2, 16]"), "{error}");
    }
    Ok(())
}

#[test]
fn sums_do_not_depend_on_how_many_queries_a_step_has() -> Result<()> {
    // More keys than a split has, so that single queries are shared by threads and the others are not; and windows that begin and end
    // anywhere in a split, a pair of octets and an octet.
    let tokens = 1200;
    for sliding_window in [None, Some(100), Some(517), Some(700)] {
        let case = Case::new((6, 2, 64, sliding_window, tokens))?;
        let run = |cuts: &[usize]| case.run_cut(&(Arc::new(Cpu) as Arc<dyn AttentionBackend>), KvDtype::F16, cuts);
        let whole = run(&[tokens])?.flatten_all()?.to_vec1::<f32>()?;
        for cuts in [[[64; 18].as_slice(), &[1; 48]].concat(), [&[600, 7, 8, 9], [32; 18].as_slice()].concat(), vec![1; tokens]] {
            assert!(whole == run(&cuts)?.flatten_all()?.to_vec1::<f32>()?, "window {sliding_window:?}, steps {cuts:?}");
        }
    }
    Ok(())
}
