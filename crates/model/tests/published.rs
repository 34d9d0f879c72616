//! Gates as others publish them, against the published formulas in float64 (`scripts/make_gate_fixtures.py`).

use candle_core::{DType, Device, Result, Tensor};
use model::Published;
use sparse_attn::Step;
use sparse_attn::token_router::{GateLayer, RouterInput};
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gates").join(name)
}

#[test]
fn published_gates_score_as_published() -> Result<()> {
    let expected = candle_core::safetensors::load(fixture("expected.safetensors"), &Device::Cpu)?;
    let step = Step { start: 0, len: expected["hidden"].dim(0)? };
    let input =
        RouterInput { hidden: &expected["hidden"], projected: None, k: &expected["k"], k_before_rope: &expected["k_before_rope"], step };
    for (file, name, tau) in [("fast_kvzip.pt", "fast_kvzip", None), ("wg_kv.safetensors", "wg_kv", Some(0.1f32))] {
        let published = Published::open(&fixture(file))?;
        assert_eq!(published.tau.map(f32::next_down), tau, "{file}");
        assert_eq!(published.gates.len(), 3, "{file}");
        for (layer, gate) in published.gates.iter().enumerate() {
            gate.check(2, 16, 64)?;
            let (got, want) = (gate.score(&input)?.expect("it has a gate"), &expected[&format!("{name}.{layer}")]);
            assert_eq!((got.dims(), got.dtype()), (want.dims(), DType::F32));
            let far = (&got - want)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(far < 2e-6, "{file} layer {layer}: {far} apart");
            // Scores that are all alike would pass anything.
            let values = got.flatten_all()?.to_vec1::<f32>()?;
            let spread = values.iter().fold(0f32, |spread, x| spread.max((x - values[0]).abs()));
            assert!(spread > 0.05, "{file} layer {layer}: {spread}");
        }
    }
    Ok(())
}

#[test]
fn what_is_not_whole_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gates");
    for (file, step) in [("fast_kvzip.pt", 97), ("wg_kv.safetensors", 61)] {
        let bytes = std::fs::read(fixture(file)).unwrap();
        for cut in (0..bytes.len()).step_by(step) {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            assert!(Published::open(&path).is_err(), "{file} cut after {cut} of {} bytes", bytes.len());
        }
        // Anything may be in a file: an error or other numbers, but no panic.
        for at in (0..bytes.len()).step_by(step) {
            let mut changed = bytes.clone();
            changed[at] ^= 0x5a;
            std::fs::write(&path, &changed).unwrap();
            if let Ok(published) = Published::open(&path) {
                assert!(!published.gates.is_empty());
            }
        }
    }
    let error = Published::open(&fixture("expected.safetensors")).unwrap_err().to_string();
    assert!(error.contains("no gate"), "{error}");
}

#[test]
fn gates_with_tensors_of_another_shape_do_not_fit_a_model() -> Result<()> {
    for file in ["fast_kvzip.pt", "wg_kv.safetensors"] {
        let gates = Published::open(&fixture(file))?.gates;
        let error = gates[0].check(4, 16, 64).unwrap_err().to_string();
        assert!(error.contains("[2, ") && error.contains("[4, "), "{error}");
        let other = Tensor::zeros((5, 2, 12), DType::F32, &Device::Cpu)?;
        let hidden = Tensor::zeros((5, 60), DType::F32, &Device::Cpu)?;
        let input = RouterInput { hidden: &hidden, projected: None, k: &other, k_before_rope: &other, step: Step { start: 0, len: 5 } };
        assert!(gates[0].score(&input).is_err());
        assert!(!matches!(gates[0], GateLayer::Open));
    }
    Ok(())
}
