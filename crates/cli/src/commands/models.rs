//! `foveate models ...`: what lies on this machine.

use crate::args::{OneModel, Pull, Remove, Verify};
use crate::failure::{Failure, Kind, damaged};
use crate::source::cache::{self, CachedFile, CachedRepo};
use crate::source::{self, Checksum, Hub, Located, Manifest, ModelReference};
use crate::ui::{Ui, bytes, stdout};
use anyhow::Result;
use candle_core::Device;
use comfy_table::{Table, presets};
use model::Weights;
use serde_json::json;
use sparse_attn::{KvCache, KvDtype};
use std::io::{IsTerminal, Write};
use std::time::SystemTime;

pub(crate) fn pull(args: &Pull, hub: &Hub, ui: Ui) -> Result<u8> {
    let reference = ModelReference::parse(args.model.as_deref().unwrap_or(crate::args::DEFAULT_MODEL), None)?;
    if hub.offline && source::find(&reference, hub)?.is_none() {
        return Err(
            Failure::new(Kind::NotFound, format!("{reference} is not here, and fetching is off (--offline or HF_HUB_OFFLINE)")).into()
        );
    }
    let located = if hub.offline { source::obtain(&reference, hub)? } else { source::pull(&reference, hub)? };
    if ui.json {
        stdout(&format!(
            "{}\n",
            json!({"schema": "foveate.pull/1", "model": located.id, "path": located.path, "revision": located.revision, "sha256": located.sha256})
        ))?;
    } else {
        ui.say(format!("{} is ready: {}", located.id, located.path.display()));
    }
    Ok(0)
}

/// What a row of `ls` shows.
struct Row {
    model: String,
    file: String,
    size: u64,
    used: Option<SystemTime>,
    state: String,
}

pub(crate) fn ls(hub: &Hub, ui: Ui) -> Result<u8> {
    let rows = rows(hub);
    if ui.json {
        let models: Vec<_> = rows
            .iter()
            .map(|row| {
                let used = row.used.and_then(|used| used.duration_since(SystemTime::UNIX_EPOCH).ok()).map(|used| used.as_secs());
                json!({"model": row.model, "file": row.file, "bytes": row.size, "last_used": used, "state": row.state})
            })
            .collect();
        stdout(&format!("{}\n", json!({"schema": "foveate.models/1", "models": models})))?;
        return Ok(0);
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["MODEL", "FILE", "SIZE", "LAST USED", "STATE"]);
    for row in rows {
        table.add_row([row.model, row.file, bytes(row.size), row.used.map_or_else(String::new, ago), row.state]);
    }
    let text: String = table.to_string().lines().map(|line| format!("{}\n", line.trim_end())).collect();
    stdout(&text)?;
    Ok(0)
}

fn rows(hub: &Hub) -> Vec<Row> {
    let repos = cache::list(&hub.cache);
    let known = |repo: &CachedRepo, file: &CachedFile| {
        Manifest::all().iter().find(|manifest| manifest.body.hub.repo == repo.id && file.blob.ends_with(&manifest.body.sha256))
    };
    let mut rows = Vec::new();
    for repo in &repos {
        let weights: Vec<&CachedFile> = repo.files.iter().filter(|file| file.name.ends_with(".gguf")).collect();
        for file in &weights {
            let model = known(repo, file).map_or_else(|| repo.id.clone(), |manifest| manifest.name.to_string());
            rows.push(Row { model, file: file.name.clone(), size: file.size, used: Some(file.used), state: "complete".to_string() });
        }
        let tensors: Vec<&CachedFile> = repo.files.iter().filter(|file| file.name.ends_with(".safetensors")).collect();
        if !tensors.is_empty() {
            let used = tensors.iter().map(|file| file.used).max();
            rows.push(Row {
                model: repo.id.clone(),
                file: "safetensors".to_string(),
                size: tensors.iter().map(|file| file.size).sum(),
                used,
                state: "complete".to_string(),
            });
        }
        if repo.partial > 0 {
            rows.push(Row {
                model: repo.id.clone(),
                file: String::new(),
                size: repo.partial,
                used: None,
                state: "partial: pull it again to go on".to_string(),
            });
        }
    }
    for manifest in Manifest::all() {
        if !rows.iter().any(|row| row.model == manifest.name) {
            let (file, size) = (manifest.body.hub.file.clone(), manifest.body.bytes);
            rows.push(Row { model: manifest.name.to_string(), file, size, used: None, state: "not pulled".to_string() });
        }
    }
    rows
}

fn ago(time: SystemTime) -> String {
    let seconds = time.elapsed().map_or(0, |elapsed| elapsed.as_secs());
    match seconds {
        0..60 => "just now".to_string(),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86400 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86400),
    }
}

/// A model that must be here.
fn here(model: &str, hub: &Hub) -> Result<Located> {
    let reference = ModelReference::parse(model, None)?;
    source::find(&reference, hub)?.ok_or_else(|| {
        Failure::new(Kind::NotFound, format!("{reference} is not on this machine")).hint(format!("foveate pull {reference}")).into()
    })
}

pub(crate) fn path(args: &OneModel, hub: &Hub, ui: Ui) -> Result<u8> {
    let located = here(&args.model, hub)?;
    if ui.json {
        stdout(&format!("{}\n", json!({"schema": "foveate.path/1", "model": located.id, "path": located.path})))?;
    } else {
        stdout(&format!("{}\n", located.path.display()))?;
    }
    Ok(0)
}

pub(crate) fn show(args: &OneModel, hub: &Hub, ui: Ui) -> Result<u8> {
    let located = here(&args.model, hub)?;
    let weights = Weights::open(&located.path, &Device::Cpu, None).map_err(damaged)?;
    let config = weights.config();
    let heads = config.heads;
    let kv = KvCache::planned_bytes(&config.layer_specs(), KvDtype::F16.into(), config.context) as u64;
    let sliding = config.sliding_window.iter().flatten().count();
    let licence = located.manifest.map(|manifest| manifest.body.licence.clone());
    let licence = licence.or_else(|| weights.gguf().and_then(|file| Some(file.optional_string("general.license").ok()??.to_string())));
    let mut rows = vec![
        ("model", located.id.clone()),
        ("path", located.path.display().to_string()),
        ("architecture", config.model_type.clone()),
        ("weights", format!("{}, {} in memory", weights.dtype_name(), bytes(weights.loaded_bytes()))),
        ("layers", config.num_layers.to_string()),
        ("width", format!("hidden {}, MLP {}, vocabulary {}", config.hidden_size, config.intermediate_size, config.vocab_size)),
        ("heads", format!("{} query, {} key/value, head_dim {}", heads.q_heads(), heads.kv_heads(), heads.head_dim())),
        ("context", format!("{} tokens trained, {} of KV at f16", config.context, bytes(kv))),
    ];
    if let Some(window) = config.sliding_window.iter().flatten().next() {
        rows.push(("sliding", format!("{sliding} of {} layers, window {window}", config.num_layers)));
    }
    if let Some(manifest) = located.manifest {
        rows.push(("about", manifest.body.description.clone()));
    }
    rows.extend(licence.map(|licence| ("licence", licence)));
    rows.extend(located.revision.clone().map(|revision| ("revision", revision)));
    rows.extend(located.sha256.clone().map(|sha256| ("sha256", sha256)));
    if ui.json {
        let mut document = json!({"schema": "foveate.show/1"});
        for (name, value) in rows {
            document[name] = value.into();
        }
        stdout(&format!("{document}\n"))?;
    } else {
        for (name, value) in rows {
            stdout(&format!("{name:<13} {value}\n"))?;
        }
    }
    Ok(0)
}

pub(crate) fn rm(args: &Remove, hub: &Hub, ui: Ui) -> Result<u8> {
    let reference = ModelReference::parse(&args.model, None)?;
    let (repo, only): (String, Option<String>) = match &reference {
        ModelReference::Local { path, .. } => {
            return Err(Failure::new(Kind::Usage, format!("{} is your own file: delete it yourself", path.display())).into());
        }
        ModelReference::Manifest(manifest) => (manifest.body.hub.repo.clone(), Some(manifest.body.sha256.clone())),
        ModelReference::Hub { repo, .. } => (repo.clone(), None),
    };
    let absent = || Failure::new(Kind::NotFound, format!("{reference} is not on this machine"));
    let cached = cache::cached_repo(&hub.cache, &repo).ok_or_else(absent)?;
    let one_file = match (&reference, source::find(&reference, hub)?) {
        // With a quant, only that file goes.
        (ModelReference::Hub { quant: Some(_), .. }, Some(located)) => Some(located.path),
        (ModelReference::Hub { quant: Some(_), .. }, None) => return Err(absent().into()),
        _ => None,
    };
    let (doomed, kept): (Vec<CachedFile>, Vec<CachedFile>) = cached.files.into_iter().partition(|file| match (&only, &one_file) {
        (Some(sha256), _) => file.blob.ends_with(sha256),
        (None, Some(path)) => file.pointer == *path,
        (None, None) => true,
    });
    if doomed.is_empty() && cached.partial == 0 {
        return Err(absent().into());
    }
    let total: u64 = doomed.iter().map(|file| file.size).sum::<u64>() + if kept.is_empty() { cached.partial } else { 0 };
    if !args.yes {
        if !std::io::stdin().is_terminal() {
            return Err(Failure::new(Kind::Usage, "deleting needs a yes, and standard input is no terminal")
                .hint(format!("foveate rm {} --yes", args.model))
                .into());
        }
        eprint!("Delete {reference}, {} in {} files? [y/N] ", bytes(total), doomed.len());
        std::io::stderr().flush()?;
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        if !matches!(answer.trim().to_lowercase().as_str(), "y" | "yes") {
            ui.say("nothing was deleted");
            return Ok(0);
        }
    }
    cache::delete(&cached.dir, &doomed, &kept)?;
    ui.say(format!("deleted {reference}, {}", bytes(total)));
    Ok(0)
}

pub(crate) fn verify(args: &Verify, hub: &Hub, ui: Ui) -> Result<u8> {
    let files: Vec<(String, CachedFile)> = match &args.model {
        None => {
            cache::list(&hub.cache).into_iter().flat_map(|repo| repo.files.into_iter().map(move |file| (repo.id.clone(), file))).collect()
        }
        Some(model) => {
            let located = here(model, hub)?;
            let root = located.path.canonicalize()?;
            let repos = cache::list(&hub.cache);
            let all = repos.into_iter().flat_map(|repo| repo.files.into_iter().map(move |file| (repo.id.clone(), file)));
            all.filter(|(_, file)| file.blob == root || file.pointer.starts_with(&located.path)).collect()
        }
    };
    if files.is_empty() {
        return Err(Failure::new(Kind::NotFound, "nothing to verify: no file of this model came through the cache").into());
    }
    let mut damaged = 0;
    let mut rows = Vec::new();
    for (repo, file) in &files {
        let name = file.blob.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let verdict = match Checksum::parse(name) {
            None => "no checksum known",
            Some(checksum) => {
                let bar = ui.byte_bar(&file.name, file.size);
                let got = checksum.of_file(&file.blob, |read| bar.inc(read))?;
                bar.finish_and_clear();
                if got == checksum.hex() { "ok" } else { "damaged" }
            }
        };
        damaged += usize::from(verdict == "damaged");
        if ui.json {
            rows.push(json!({"model": repo, "file": file.name, "path": file.pointer, "verdict": verdict}));
        } else {
            stdout(&format!("{verdict:<8} {repo} {}\n", file.name))?;
            if verdict == "damaged" {
                ui.say(format!("  {} is not what was fetched: delete the model (foveate rm) and pull it again", file.blob.display()));
            }
        }
    }
    if ui.json {
        stdout(&format!("{}\n", json!({"schema": "foveate.verify/1", "files": rows, "damaged": damaged})))?;
    }
    Ok(if damaged > 0 { Kind::Gate as u8 } else { 0 })
}
