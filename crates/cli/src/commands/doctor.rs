//! `foveate doctor`: what a user or a maintainer asks first.

use crate::args::{DeviceChoice, VERSION};
use crate::device;
use crate::failure::{Failure, Kind};
use crate::plan;
use crate::source::Hub;
use crate::ui::{Ui, bytes, stdout};
use anyhow::Result;
use candle_core::{Device, Tensor};
use model::message;
use serde_json::json;
use sparse_attn::backend::{AttentionBackend, Reference, for_device};
use sparse_attn::{AttentionInput, HeadShape, KvCache, KvDtype, LayerSpec, RoutedAttention};
use std::process::{Command, Stdio};
use std::sync::Arc;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Error,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

type Check = (&'static str, Verdict, String);

pub(crate) fn run(hub: &Hub, ui: Ui) -> Result<u8> {
    let checks = [build(), processor(), gpu(ui), memory(), kernels(), cache(hub), reach(hub), mirror()];
    let errors = checks.iter().filter(|(_, verdict, _)| *verdict == Verdict::Error).count();
    let warnings = checks.iter().filter(|(_, verdict, _)| *verdict == Verdict::Warn).count();
    if ui.json {
        let rows: Vec<_> =
            checks.iter().map(|(name, verdict, text)| json!({"check": name, "verdict": verdict.name(), "text": text})).collect();
        stdout(&format!("{}\n", json!({"schema": "foveate.doctor/1", "checks": rows, "errors": errors, "warnings": warnings})))?;
    } else {
        for (name, verdict, text) in &checks {
            stdout(&format!("{:<5} {name:<8} {text}\n", verdict.name()))?;
        }
        let count = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        stdout(&format!("{}, {}\n", count(errors, "error"), count(warnings, "warning")))?;
    }
    Ok(if errors > 0 { Kind::Gate as u8 } else { 0 })
}

fn build() -> Check {
    ("build", Verdict::Ok, format!("foveate {VERSION}"))
}

fn processor() -> Check {
    let threads = candle_core::utils::get_num_threads();
    let brand = plan::processor();
    #[cfg(target_arch = "x86_64")]
    {
        let mut features = Vec::new();
        macro_rules! look {
            ($($name:tt),*) => { $(if std::arch::is_x86_feature_detected!($name) { features.push($name); })* };
        }
        look!("avx2", "fma", "f16c", "avx512f", "avx512vnni");
        let text = format!("{brand}, {threads} threads, {}", features.join(" "));
        if features.contains(&"avx2") && features.contains(&"fma") {
            return ("cpu", Verdict::Ok, text);
        }
        ("cpu", Verdict::Warn, format!("{text}: no AVX2 and FMA, so everything is slow"))
    }
    #[cfg(not(target_arch = "x86_64"))]
    ("cpu", Verdict::Ok, format!("{brand}, {threads} threads"))
}

fn gpu(ui: Ui) -> Check {
    match device::open(DeviceChoice::Cuda(0), ui).map(|device| (kernel_error(&device), device)) {
        Ok((Ok((name, error)), device)) => {
            let gpu = device::describe(&device)
                .map_or_else(String::new, |gpu| format!("{}, {}, {} free for models; ", gpu.name, bytes(gpu.total), bytes(gpu.free)));
            let text = format!("{gpu}{name} attention: max error {error:.0e} against the reference");
            ("gpu", if error < 4e-3 { Verdict::Ok } else { Verdict::Error }, text)
        }
        Ok((Err(error), _)) => ("gpu", Verdict::Error, message(&error)),
        // Nothing is wrong with a machine that has none.
        Err(error) => {
            let why = error.downcast_ref::<Failure>().and_then(Failure::reason).map_or_else(String::new, |why| format!(" ({why})"));
            ("gpu", Verdict::Ok, format!("none: {error:#}{why}"))
        }
    }
}

fn memory() -> Check {
    let Some((total, _)) = plan::machine() else {
        return ("memory", Verdict::Warn, "the system does not tell: nothing is planned".to_string());
    };
    let free = plan::available(None, &Device::Cpu);
    let text = format!("{}, {} free for models", bytes(total), bytes(free));
    if free < 1 << 30 { ("memory", Verdict::Warn, format!("{text}: close something first")) } else { ("memory", Verdict::Ok, text) }
}

/// The fast backend against the plain one, on this very processor.
fn kernels() -> Check {
    match kernel_error(&Device::Cpu) {
        Ok((name, error)) if error < 1e-4 => {
            ("kernels", Verdict::Ok, format!("{name} attention: max error {error:.0e} against the reference"))
        }
        Ok((name, error)) => {
            ("kernels", Verdict::Error, format!("{name} attention is wrong here: max error {error:.0e}; please report this processor"))
        }
        Err(error) => ("kernels", Verdict::Error, message(&error)),
    }
}

fn kernel_error(device: &Device) -> candle_core::Result<(&'static str, f32)> {
    let tokens = 300;
    let random = |heads: usize| Tensor::randn(0f32, 1.0, (tokens, heads, 64), &Device::Cpu);
    let (q, k, v) = (random(6)?, random(2)?, random(2)?);
    let attend = |backend: Arc<dyn AttentionBackend>, device: &Device| {
        let (q, k, v) = (q.to_device(device)?, k.to_device(device)?, v.to_device(device)?);
        let spec = LayerSpec::full(HeadShape::new(6, 2, 64)?);
        let mut cache = KvCache::new(&[spec], KvDtype::F16.into(), device, tokens)?;
        let step = cache.reserve(tokens)?;
        let input = AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale: 0.125 };
        RoutedAttention::dense(backend).forward(0, input, step, &mut cache)?.to_device(&Device::Cpu)
    };
    let backend = for_device(device)?;
    let name = backend.name();
    let difference = (attend(backend, device)? - attend(Arc::new(Reference), &Device::Cpu)?)?.abs()?.flatten_all()?.max(0)?;
    Ok((name, difference.to_scalar()?))
}

fn cache(hub: &Hub) -> Check {
    let dir = hub.cache.path();
    let usable = || -> Result<u64> {
        std::fs::create_dir_all(dir)?;
        let probe = dir.join(format!(".foveate-doctor-{}", std::process::id()));
        let file = std::fs::File::create(&probe)?;
        let locked = file.try_lock();
        std::fs::remove_file(&probe)?;
        locked?;
        Ok(fs4::available_space(dir)?)
    };
    match usable() {
        Ok(free) => ("cache", Verdict::Ok, format!("{}, {} free, writable, locks work", dir.display(), bytes(free))),
        Err(error) => ("cache", Verdict::Error, format!("{}: {error:#}; --cache-dir DIR or HF_HOME names another place", dir.display())),
    }
}

fn reach(hub: &Hub) -> Check {
    if hub.offline {
        return ("hub", Verdict::Ok, "skipped: offline".to_string());
    }
    match hub.check() {
        Ok(text) => ("hub", Verdict::Ok, format!("{} {text}", hub.endpoint())),
        Err(error) => ("hub", Verdict::Warn, format!("{error:#}")),
    }
}

fn mirror() -> Check {
    let pip = Command::new("python3").args(["-m", "pip", "--version"]).stdin(Stdio::null()).stderr(Stdio::null()).output();
    match pip {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            let version = text.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
            ("mirror", Verdict::Ok, format!("python3 with {version}"))
        }
        _ => ("mirror", Verdict::Warn, "python3 with pip is not there: models come from the Hub only".to_string()),
    }
}
