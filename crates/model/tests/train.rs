//! Training that is stopped and goes on.

use candle_core::{Device, Result};
use model::train::{TrainOptions, train};
use model::{RouterFile, Weights, load};
use serde_json::Value;
use sparse_attn::RoutedAttention;
use sparse_attn::backend::Cpu;
use sparse_attn::token_router::GateLayer;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

/// The weights of all gates.
fn numbers(router: &RouterFile) -> Vec<f32> {
    let of = |layer: &GateLayer| match layer {
        GateLayer::Feedforward(gate) => {
            [&gate.weight, &gate.bias].map(|part| part.flatten_all().unwrap().to_vec1::<f32>().unwrap()).concat()
        }
        other => panic!("{other:?}"),
    };
    router.layers.iter().flat_map(of).collect()
}

#[test]
fn a_training_that_was_stopped_goes_on_where_it_was() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny/llama");
    let model = load(&Weights::open(&path, &Device::Cpu, None)?)?;
    let dense = RoutedAttention::dense(Arc::new(Cpu));
    let text = |seed: u32| (0..300).map(|i| (i * 7919 + seed * 104_729) % 512).collect::<Vec<u32>>();
    let texts: Vec<Vec<u32>> = (0..5).map(text).collect();
    let (learn, held_out) = texts.split_at(4);
    let dir = tempfile::tempdir()?;
    let state = dir.path().join("router.training");
    let run = |state: Option<&Path>, stop_at: usize| {
        let options = TrainOptions { window: 32, state: state.map(Path::to_path_buf), ..TrainOptions::default() };
        let mut told = Vec::new();
        let trained = train(model.as_ref(), &dense, [learn, held_out], &options, "these weights".into(), Value::Null, |done| {
            told.push(done);
            if done == stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        trained.map(|trained| (trained.map(|trained| trained.router), told))
    };
    let (whole, told) = run(None, usize::MAX)?;
    assert_eq!(told, [0, 1, 2, 3, 4]);
    let (stopped, told) = run(Some(&state), 3)?;
    assert!(stopped.is_none() && told == [0, 1, 2, 3], "{told:?}");
    let (resumed, told) = run(Some(&state), usize::MAX)?;
    assert_eq!(told, [3, 4], "the first three are known");
    let (whole, resumed) = (whole.expect("it ran to its end"), resumed.expect("it ran to its end"));
    let far = numbers(&whole).iter().zip(numbers(&resumed)).fold(0f32, |far, (a, b)| far.max((a - b).abs()));
    assert!(far < 1e-3, "{far} apart");
    // Stopped while the threshold is set: nothing is read twice.
    let (_, told) = run(Some(&state), 4)?;
    assert_eq!(told, [4]);
    Ok(())
}
