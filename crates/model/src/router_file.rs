//! `router.safetensors`: a trained token router, and what is known of it.
//!
//! Tensors, f32, or f16 where that holds the same numbers, of kind `linear`: `layers.{i}.weight` `[kv_heads, width]` and `layers.{i}.bias` `[kv_heads]`; of `mlp` also
//! `layers.{i}.hidden.weight` `[width, hidden_size]` and `layers.{i}.hidden.bias` `[width]`; of `sink` (Fast KVzip) and `keys` (WG-KV)
//! what is published under its own names, after `layers.{i}.`. A layer without tensors keeps every token. The rest is
//! metadata: strings, numbers and JSON.

use candle_core::{DType, Device, Result, Tensor, bail};
use serde_json::Value;
use sparse_attn::token_router::{Feedforward, Gate, GateLayer, KeyGate, SinkGate};
use std::collections::HashMap;
use std::path::Path;

/// `format` of the files that this version reads.
const FORMAT: &str = "foveate.router/1";

/// The largest file that is read: a gate has some numbers for each head.
const MOST_BYTES: u64 = 1 << 30;

/// The most layers that a file may name.
const MOST_LAYERS: usize = 1024;

/// What a gate may be.
const KINDS: [&str; 4] = ["linear", "mlp", SINK, KEYS];
pub(crate) const SINK: &str = "sink";
pub(crate) const KEYS: &str = "keys";

/// A trained token router.
#[derive(Debug, Clone)]
pub struct RouterFile {
    /// Which weights it was trained for, see [`crate::Weights::fingerprint`].
    pub fingerprint: String,
    /// The newest tokens that it leaves alone, of any score.
    pub window: usize,
    /// The first tokens that are kept, of any score.
    pub sinks: usize,
    /// The threshold it was calibrated to use.
    pub tau: f32,
    /// Thresholds and the part of the tokens that each keeps, thresholds ascending.
    pub curve: Vec<(f32, f32)>,
    /// How it was trained and what it scored: free JSON.
    pub training: Value,
    /// A gate per decoder layer.
    pub layers: Vec<GateLayer>,
}

impl RouterFile {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, or a field or tensor is missing, of another type or shape.
    pub fn open(path: &Path) -> Result<Self> {
        let size = std::fs::metadata(path)?.len();
        if size > MOST_BYTES {
            bail!("a router file of {size} bytes is refused: more than {MOST_BYTES}");
        }
        Self::from_bytes(&std::fs::read(path)?)
    }

    /// Reads the bytes of a file.
    ///
    /// # Errors
    /// As [`RouterFile::open`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let (_, header) = safetensors::SafeTensors::read_metadata(bytes).map_err(candle_core::Error::wrap)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let text = |key: &str| match metadata.get(key) {
            Some(text) => Ok(text.as_str()),
            None => bail!("metadata {key:?} is missing: is this a router file?"),
        };
        let number = |key: &str| -> Result<f64> {
            let text = text(key)?;
            match text.parse::<f64>() {
                Ok(number) if number.is_finite() => Ok(number),
                _ => bail!("metadata {key:?} is {text:?}, not a number"),
            }
        };
        if text("format")? != FORMAT {
            bail!("format {:?} is not {FORMAT:?}", text("format")?);
        }
        let kind = text("kind")?;
        if !KINDS.contains(&kind) {
            bail!("kind {kind:?} is none of {KINDS:?}");
        }
        let curve: Vec<(f32, f32)> = match serde_json::from_str(text("curve")?) {
            Ok(curve) => curve,
            Err(error) => bail!("metadata \"curve\" is no list of pairs [tau, kept]: {error}"),
        };
        if curve.is_empty() || !curve.windows(2).all(|pair| pair[0].0 <= pair[1].0 && pair[0].1 >= pair[1].1) {
            bail!("metadata \"curve\" must have thresholds that rise and kept fractions that fall");
        }
        let mut tensors = candle_core::safetensors::load_buffer(bytes, &Device::Cpu)?;
        for (name, tensor) in &mut tensors {
            *tensor = finite(name, tensor)?;
        }
        // Files that do not say how many layers there are have a gate in each.
        let count = if metadata.contains_key("layers") { number("layers")? as usize } else { usize::MAX };
        let mut layers = Vec::new();
        while layers.len() < count.min(MOST_LAYERS) {
            let prefix = format!("layers.{}.", layers.len());
            if !tensors.keys().any(|name| name.starts_with(&prefix)) {
                if count == usize::MAX {
                    break;
                }
                layers.push(GateLayer::Open);
                continue;
            }
            let take = |name: &str| match tensors.remove(&format!("{prefix}{name}")) {
                Some(tensor) => Ok(tensor),
                None => bail!("tensor {prefix}{name} is missing"),
            };
            layers.push(layer(kind, take)?);
        }
        if let Some(name) = tensors.keys().next() {
            bail!("tensor {name} is unknown, or follows a layer that is missing");
        }
        let file = Self {
            fingerprint: text("model_fingerprint")?.to_string(),
            window: number("window")? as usize,
            sinks: number("sinks")? as usize,
            tau: number("tau")? as f32,
            curve,
            training: metadata
                .get("training")
                .map_or(Ok(Value::Null), |text| serde_json::from_str(text))
                .map_err(candle_core::Error::wrap)?,
            layers,
        };
        file.gate(None)?; // shapes fit each other
        Ok(file)
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut tensors = Vec::new();
        let mut kind = "linear";
        for (index, layer) in self.layers.iter().enumerate() {
            let parts = parts(layer);
            if let Some((own, _)) = &parts {
                kind = own;
            }
            let named = parts.into_iter().flat_map(|(_, tensors)| tensors);
            for (name, tensor) in named {
                tensors.push((format!("layers.{index}.{name}"), narrow(tensor)?));
            }
        }
        let metadata: HashMap<String, String> = [
            ("format", FORMAT.to_string()),
            ("kind", kind.to_string()),
            ("layers", self.layers.len().to_string()),
            ("model_fingerprint", self.fingerprint.clone()),
            ("window", self.window.to_string()),
            ("sinks", self.sinks.to_string()),
            ("tau", self.tau.to_string()),
            ("curve", serde_json::to_string(&self.curve).map_err(candle_core::Error::wrap)?),
            ("training", self.training.to_string()),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_string(), value))
        .collect();
        let bytes = safetensors::serialize(tensors, Some(metadata)).map_err(candle_core::Error::wrap)?;
        let partial = path.with_extension("partial");
        std::fs::write(&partial, bytes)?;
        std::fs::rename(&partial, path)?;
        Ok(())
    }

    /// The router, with the threshold that keeps the fraction `keep` (`None`: its own threshold).
    ///
    /// # Errors
    /// If `keep` is beyond what was measured.
    pub fn gate(&self, keep: Option<f32>) -> Result<Gate> {
        let tau = match keep {
            None => self.tau,
            Some(keep) => self.tau_of(keep)?,
        };
        Gate::new(self.layers.clone(), tau, keep.unwrap_or_else(|| self.kept_at(tau)))
    }

    /// The threshold that keeps `keep` of the tokens, between the measured ones.
    fn tau_of(&self, keep: f32) -> Result<f32> {
        let (most, least) = (self.curve[0].1, self.curve[self.curve.len() - 1].1);
        if !(least..=most).contains(&keep) {
            bail!("a kept fraction of {keep} is beyond what this router was measured at, {least} to {most}");
        }
        let pair = self.curve.windows(2).find(|pair| (pair[1].1..=pair[0].1).contains(&keep));
        Ok(pair.map_or(self.tau, |pair| between((pair[0].1, pair[0].0), (pair[1].1, pair[1].0), keep)))
    }

    /// The fraction of the tokens that `tau` keeps, between the measured ones.
    pub fn kept_at(&self, tau: f32) -> f32 {
        let (first, last) = (self.curve[0], self.curve[self.curve.len() - 1]);
        let pair = self.curve.windows(2).find(|pair| (pair[0].0..=pair[1].0).contains(&tau));
        pair.map_or(if tau < first.0 { first.1 } else { last.1 }, |pair| between(pair[0], pair[1], tau))
    }
}

/// The same numbers in 16 bits, if those hold all of them.
fn narrow(tensor: &Tensor) -> Result<Tensor> {
    let small = tensor.to_dtype(DType::F16)?;
    let same = small.to_dtype(tensor.dtype())?.flatten_all()?.to_vec1::<f32>()? == tensor.flatten_all()?.to_vec1::<f32>()?;
    Ok(if same { small } else { tensor.clone() })
}

/// The numbers of a tensor as f32, if all are finite.
pub(crate) fn finite(name: &str, tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.to_dtype(DType::F32)?;
    if tensor.flatten_all()?.to_vec1::<f32>()?.iter().any(|x| !x.is_finite()) {
        bail!("tensor {name} holds a number that is not finite");
    }
    Ok(tensor)
}

/// The gate of one layer, of a kind of [`KINDS`], of tensors that `take` finds by name.
pub(crate) fn layer(kind: &str, mut take: impl FnMut(&str) -> Result<Tensor>) -> Result<GateLayer> {
    Ok(match kind {
        SINK => GateLayer::Sink(SinkGate {
            q_weight: take("q_proj.weight")?,
            q_bias: take("q_proj.bias")?,
            k_weight: take("k_proj.weight")?,
            q_norm: take("q_norm.weight")?,
            k_norm: take("k_norm.weight")?,
            k_base: take("k_base")?,
            b: take("b")?,
        }),
        KEYS => GateLayer::Keys(KeyGate {
            pre_key_norm: take("pre_key_norm.weight")?,
            post_key_norm: take("post_key_norm.weight")?,
            conv1: (take("conv1.weight")?, take("conv1.bias")?),
            conv2: (take("conv2.weight")?, take("conv2.bias")?),
        }),
        _ => {
            let hidden = if kind == "mlp" { Some((take("hidden.weight")?, take("hidden.bias")?)) } else { None };
            GateLayer::Feedforward(Feedforward { hidden, weight: take("weight")?, bias: take("bias")? })
        }
    })
}

/// A layer's kind and its tensors by name, as [`layer`] takes them; `None`: it has none.
fn parts(layer: &GateLayer) -> Option<(&'static str, Vec<(&'static str, &Tensor)>)> {
    Some(match layer {
        GateLayer::Open => return None,
        GateLayer::Feedforward(Feedforward { hidden: None, weight, bias }) => ("linear", vec![("weight", weight), ("bias", bias)]),
        GateLayer::Feedforward(Feedforward { hidden: Some(hidden), weight, bias }) => {
            ("mlp", vec![("weight", weight), ("bias", bias), ("hidden.weight", &hidden.0), ("hidden.bias", &hidden.1)])
        }
        GateLayer::Sink(SinkGate { q_weight, q_bias, k_weight, q_norm, k_norm, k_base, b }) => {
            let tensors = [
                ("q_proj.weight", q_weight),
                ("q_proj.bias", q_bias),
                ("k_proj.weight", k_weight),
                ("q_norm.weight", q_norm),
                ("k_norm.weight", k_norm),
                ("k_base", k_base),
                ("b", b),
            ];
            (SINK, tensors.to_vec())
        }
        GateLayer::Keys(KeyGate { pre_key_norm, post_key_norm, conv1, conv2 }) => {
            let tensors = [
                ("pre_key_norm.weight", pre_key_norm),
                ("post_key_norm.weight", post_key_norm),
                ("conv1.weight", &conv1.0),
                ("conv1.bias", &conv1.1),
                ("conv2.weight", &conv2.0),
                ("conv2.bias", &conv2.1),
            ];
            (KEYS, tensors.to_vec())
        }
    })
}

/// The line through two points, at `x`.
fn between(a: (f32, f32), b: (f32, f32), x: f32) -> f32 {
    if b.0 == a.0 { a.1 } else { a.1 + (b.1 - a.1) * (x - a.0) / (b.0 - a.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparse_attn::token_router::TokenRouter;

    fn file(hidden: bool) -> RouterFile {
        let tensor = |rows: usize, columns: usize| Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu).unwrap();
        let layer = |_| {
            let inner = hidden.then(|| (tensor(12, 8), tensor(1, 12).squeeze(0).unwrap()));
            let weight = tensor(2, if hidden { 12 } else { 8 });
            GateLayer::Feedforward(Feedforward { weight, bias: tensor(1, 2).squeeze(0).unwrap(), hidden: inner })
        };
        RouterFile {
            fingerprint: "0123".into(),
            window: 256,
            sinks: 4,
            tau: 0.5,
            curve: vec![(-1.0, 0.9), (0.0, 0.6), (1.0, 0.2)],
            training: serde_json::json!({"labels": "none"}),
            layers: (0..3).map(layer).collect(),
        }
    }

    fn assert_same(a: &[GateLayer], b: &[GateLayer]) {
        let values = |layer: &GateLayer| {
            let tensor = |tensor: &Tensor| (tensor.dims().to_vec(), tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            parts(layer).map(|(kind, tensors)| (kind, tensors.into_iter().map(|(name, part)| (name, tensor(part))).collect::<Vec<_>>()))
        };
        assert_eq!(a.iter().map(values).collect::<Vec<_>>(), b.iter().map(values).collect::<Vec<_>>());
    }

    fn near(a: f32, b: f32) -> bool {
        (a - b).abs() < 1e-6
    }

    #[test]
    fn what_is_saved_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("router.safetensors");
        for hidden in [false, true] {
            let saved = file(hidden);
            saved.save(&path).unwrap();
            let read = RouterFile::open(&path).unwrap();
            assert_eq!((&read.fingerprint, read.window, read.sinks, read.tau), (&saved.fingerprint, 256, 4, 0.5));
            assert_eq!((&read.curve, &read.training), (&saved.curve, &saved.training));
            assert_same(&read.layers, &saved.layers);
            // A layer that keeps all is one again.
            let layers = vec![GateLayer::Open, saved.layers[1].clone(), GateLayer::Open];
            let gaps = RouterFile { layers, ..saved };
            gaps.save(&path).unwrap();
            assert_same(&RouterFile::open(&path).unwrap().layers, &gaps.layers);
        }
    }

    #[test]
    fn thresholds_and_kept_fractions_are_read_off_the_curve() {
        let file = file(false);
        assert!(near(file.gate(None).unwrap().kept_fraction(), 0.4));
        assert!(near(file.tau_of(0.6).unwrap(), 0.0) && near(file.tau_of(0.4).unwrap(), 0.5) && near(file.tau_of(0.9).unwrap(), -1.0));
        let error = file.gate(Some(0.95)).unwrap_err().to_string();
        assert!(error.contains("0.95") && error.contains("0.2 to 0.9"), "{error}");
    }

    #[test]
    fn a_damaged_file_is_refused_and_says_where() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("router.safetensors");
        let refused = |change: &dyn Fn(&mut RouterFile), words: &str| {
            let mut file = file(true);
            change(&mut file);
            file.save(&path).unwrap();
            let error = RouterFile::open(&path).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        refused(&|file| file.curve.clear(), "curve");
        refused(&|file| file.curve.reverse(), "curve");
        refused(&|file| file.tau = f32::NAN, "tau");
        fn of(layer: &mut GateLayer) -> &mut Feedforward {
            match layer {
                GateLayer::Feedforward(gate) => gate,
                other => panic!("{other:?}"),
            }
        }
        refused(&|file| of(&mut file.layers[1]).bias = of(&mut file.layers[1]).bias.narrow(0, 0, 1).unwrap(), "layer 1");
        refused(&|file| of(&mut file.layers[0]).hidden = None, "hidden");
        refused(&|file| of(&mut file.layers[2]).bias = (&of(&mut file.layers[2]).bias * f64::NAN).unwrap(), "layers.2");
        file(false).save(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        for cut in 0..bytes.len() {
            assert!(RouterFile::from_bytes(&bytes[..cut]).is_err(), "cut after {cut} of {} bytes", bytes.len());
        }
        for (from, to) in [("foveate.router/1", "foveate.router/2"), ("\"linear\"", "\"convol\""), ("layers.2", "layers.7")] {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let at = text.find(from).expect("it is in the header");
            let mut changed = bytes.clone();
            changed[at..at + to.len()].copy_from_slice(to.as_bytes());
            assert!(RouterFile::from_bytes(&changed).is_err(), "{from} -> {to}");
        }
    }
}
