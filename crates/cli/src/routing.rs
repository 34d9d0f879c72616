//! What attends: flags, else the model's manifest, else what was measured here, else built-in defaults.

use crate::args::{AttentionArgs, AttentionChoice, BudgetChoice, CacheType};
use crate::failure::{Failure, Kind, damaged};
use anyhow::Result;
use candle_core::Device;
use model::{Config, RouterFile, message};
use serde::Deserialize;
use serde_json::{Value, json};
use sparse_attn::select::{Budget, Limits};
use sparse_attn::token_router::{self, Random, TokenRouter};
use sparse_attn::{KvDtype, KvDtypes, RoutedAttention, Routing, block_router};
use std::path::Path;
use std::sync::Arc;

/// Below this many tokens attention is dense, where neither measurements nor a budget in tokens say otherwise.
const MIN_CTX: usize = 4096;

/// Where nothing was measured, attention is dense below this many times what a query would read: scoring costs something, too.
const LEAST_GAIN: usize = 2;

/// Tokens of the first positions that no token router drops (StreamingLLM, arXiv:2309.17453).
const SINKS: usize = 4;

/// The newest tokens that a trained token router leaves alone, as a multiple of the window that it was trained for: of equal bytes, more
/// of these and fewer older ones have half the KL (models/README.md).
const WINDOWS_LEFT_ALONE: usize = 4;

/// The `[routing]` table of a manifest: what was measured to be good for that model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RoutingDefaults {
    /// How blocks are scored.
    pub(crate) block_router: String,
    /// Tokens a query may read beyond its window.
    pub(crate) budget: usize,
    /// The same as a part of what is kept, 0 to 1; the larger counts.
    pub(crate) part: f32,
    /// Positions per block.
    pub(crate) block: usize,
    /// Newest tokens, always read.
    pub(crate) window: usize,
    /// First layers that read every block: Quest has two (arXiv:2406.10774), for `spread` they make no difference (models/README.md).
    pub(crate) dense_layers: usize,
    /// What each layer's budget is multiplied by; 1 where the list is over.
    pub(crate) layer_budgets: Vec<f32>,
}

impl Default for RoutingDefaults {
    fn default() -> Self {
        Self {
            block_router: "spread".into(),
            budget: 2048,
            part: 0.125,
            block: 16,
            window: 256,
            dense_layers: 0,
            layer_budgets: Vec::new(),
        }
    }
}

/// The `[router]` table of a manifest: a trained token router that ships with this program, and what it was measured to cost.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ShippedRouter {
    /// The part of the tokens that it keeps unless `--keep` says otherwise.
    pub(crate) keep: f32,
    /// Mean KL divergence from dense there, in nats.
    pub(crate) kl: f32,
    /// How much perplexity rises there, as a part.
    pub(crate) ppl_change: f32,
    /// What single needles are found, as a part of what dense finds.
    pub(crate) needles: f32,
    /// Speed of decoding with it at the end of the context, as a part of that without it.
    pub(crate) decode: f32,
    /// The text and the length of these scores, for people.
    pub(crate) scored: String,
}

impl ShippedRouter {
    /// Whether it loses so little, and no speed, that `auto` uses it.
    fn is_good(&self) -> bool {
        self.kl <= 0.03 && self.ppl_change <= 0.01 && self.needles >= 0.99 && self.decode >= 1.0
    }
}

/// The name of the token router that ships for the model.
const TRAINED: &str = "trained";

/// What is known of the model before its weights are loaded.
pub(crate) struct Known<'a> {
    /// Its token router, and the router's file.
    pub(crate) router: Option<(&'a ShippedRouter, &'static [u8])>,
    /// Whether a token router costs the backend no speed.
    pub(crate) drops_freely: bool,
    pub(crate) config: &'a Config,
    /// Where it is.
    pub(crate) device: &'a Device,
    /// Of its manifest.
    pub(crate) defaults: Option<&'a RoutingDefaults>,
    /// The length from which routed attention was measured to be faster on this machine.
    pub(crate) crossover: Option<usize>,
    /// Tokens of a layer that could be read in the time that a selection takes.
    pub(crate) selection_tokens: usize,
    /// Queries that share a selection, where no flag says otherwise.
    pub(crate) tile: usize,
    /// The length from which hiding tokens from queries saves time, where no flag says otherwise.
    pub(crate) token_dense_len: usize,
    /// The length of a prompt up to which it saves none.
    pub(crate) token_dense_prompt: usize,
    /// Names the weights, so that a router trained on others is refused.
    pub(crate) fingerprint: &'a dyn Fn() -> candle_core::Result<String>,
}

/// How keys and values are stored.
pub(crate) fn dtypes(args: &AttentionArgs) -> KvDtypes {
    let of = |choice: CacheType| match choice {
        CacheType::F32 => KvDtype::F32,
        CacheType::F16 => KvDtype::F16,
        CacheType::Bf16 => KvDtype::Bf16,
        CacheType::Q8_0 => KvDtype::Q8_0,
    };
    let both = args.cache_type.unwrap_or(CacheType::F16);
    KvDtypes { k: of(args.cache_type_k.unwrap_or(both)), v: of(args.cache_type_v.unwrap_or(both)) }
}

/// What the flags ask for.
pub(crate) fn resolve(args: &AttentionArgs, known: &Known<'_>) -> Result<Routing> {
    let built_in = RoutingDefaults::default();
    let defaults = known.defaults.unwrap_or(&built_in);
    let (token_router, trained) = token_router(args, known)?;
    let window = args.window.map_or(defaults.window, |window| window as usize);
    let sinks = args.sinks.map_or_else(|| trained.map_or(SINKS, |(_, sinks)| sinks), |sinks| sinks as usize);
    let token_window = token_window(args, window, trained.map(|(trained, _)| trained))?;
    let name = args.block_router.as_deref();
    // Global layers of models that also have sliding ones attend diffusely: dense unless asked.
    let diffuse = args.attn == AttentionChoice::Auto && name.is_none() && known.config.sliding_window.iter().any(Option::is_some);
    let name = if args.attn == AttentionChoice::Dense || diffuse { "all" } else { name.unwrap_or(&defaults.block_router) };
    let Some(block_router) = block_router::by_name(name) else {
        return Err(Failure::new(Kind::Usage, format!("there is no block router {name:?}")).into());
    };
    let budget = match args.budget {
        None => Budget { tokens: defaults.budget, part: defaults.part },
        Some(BudgetChoice::Tokens(tokens)) => Budget::tokens(tokens),
        Some(BudgetChoice::Part(part)) => Budget { tokens: 0, part },
    };
    let read = budget.tokens.saturating_add(window);
    let expected = if budget.tokens == 0 { MIN_CTX } else { LEAST_GAIN.saturating_mul(read) };
    let expected = expected.max(read.saturating_add(known.selection_tokens));
    let dense_len = match name {
        "all" => usize::MAX,
        _ => args.min_ctx.map(|tokens| tokens as usize).or(known.crossover).unwrap_or(expected),
    };
    let block_size = args.block.map_or_else(|| wider(defaults.block, token_router.kept_fraction(), window), |block| block as usize);
    if block_size > window + 1 {
        let what = format!("--block {block_size} is larger than --window {window}: a block must be past before it is chosen");
        return Err(Failure::new(Kind::Usage, what).hint(format!("--block {window}")).into());
    }
    let limits = Limits { window, sinks, block_size, budget, dense_len, tile: args.tile.map_or(known.tile, |tile| tile as usize) };
    let dense_layers = args.dense_layers.map_or(defaults.dense_layers, |n| n as usize);
    let layer_budgets = args.layer_budgets.clone().unwrap_or_else(|| defaults.layer_budgets.clone());
    let (token_dense_len, token_dense_prompt) =
        args.token_min_ctx.map_or((known.token_dense_len, known.token_dense_prompt), |tokens| (tokens as usize, 0));
    Ok(Routing { token_router, block_router, limits, token_window, token_dense_len, token_dense_prompt, dense_layers, layer_budgets })
}

/// The newest tokens that no router drops; `trained`: as far as the router that is used learnt to leave them alone.
fn token_window(args: &AttentionArgs, window: usize, trained: Option<usize>) -> Result<Option<usize>> {
    let Some(tokens) = args.token_window.map(|tokens| tokens as usize) else {
        return Ok(trained.map(|trained| (WINDOWS_LEFT_ALONE * trained).max(window)));
    };
    let least = trained.unwrap_or(0).max(window);
    if tokens < least {
        let why = if least == window { "queries read" } else { "the token router was trained with" };
        let what = format!("--token-window {tokens} is narrower than the {least} that {why}");
        return Err(Failure::new(Kind::Usage, what).hint(format!("--token-window {least}, or more")).into());
    }
    Ok(Some(tokens))
}

/// Positions per block that hold about as many kept tokens as `block` would of all: what a query reads lies in as many pieces, and
/// there are fewer to score.
fn wider(block: usize, kept_fraction: f32, window: usize) -> usize {
    let times = (1.0 / kept_fraction.clamp(0.125, 1.0)).log2().round() as u32;
    (block << times).min(window)
}

/// A token router, and the window and sinks that a trained one was made for.
type Trained = (Arc<dyn TokenRouter>, Option<(usize, usize)>);

/// The token router that the flags ask for.
fn token_router(args: &AttentionArgs, known: &Known<'_>) -> Result<Trained> {
    let shipped = known.router.filter(|(router, _)| args.attn == AttentionChoice::Auto && known.drops_freely && router.is_good());
    let name = args.token_router.as_deref().unwrap_or(if shipped.is_some() { TRAINED } else { "all" });
    if name == TRAINED {
        let Some((known_of_it, bytes)) = known.router else {
            let what = "no trained token router ships for this model";
            return Err(Failure::new(Kind::NotFound, what).hint("foveate train-router, then --token-router FILE").into());
        };
        let file = RouterFile::from_bytes(bytes).map_err(damaged)?;
        return of_file(&file, Some(args.keep.unwrap_or(known_of_it.keep)), known, "the shipped router");
    }
    if let Some(router) = token_router::by_name(name) {
        let router: Arc<dyn TokenRouter> = match (args.keep, name) {
            (None, _) => router,
            (Some(keep), "random") => Arc::new(Random { keep }),
            (Some(_), _) => {
                let what = format!("--keep says nothing to the token router {name:?}");
                return Err(Failure::new(Kind::Usage, what).hint(format!("--token-router {TRAINED}, a FILE, or random")).into());
            }
        };
        return Ok((router, None));
    }
    let path = Path::new(name);
    if !path.is_file() {
        let names: Vec<&str> = token_router::all().iter().map(|router| router.name()).collect();
        let what = format!("{name}: no token router of this name, and no such file");
        return Err(Failure::new(Kind::NotFound, what).hint(format!("{TRAINED}, {}, or a router.safetensors", names.join(", "))).into());
    }
    let file = RouterFile::open(path).map_err(|error| {
        let what = format!("{}: this is no token router, or a damaged one", path.display());
        Failure::malformed(what).why(message(&error)).hint("a router.safetensors of foveate train-router, or --token-router all")
    })?;
    of_file(&file, args.keep, known, &path.display().to_string())
}

/// The gate of a router file, if it is one for this model.
fn of_file(file: &RouterFile, keep: Option<f32>, known: &Known<'_>, name: &str) -> Result<Trained> {
    let fingerprint = (known.fingerprint)().map_err(damaged)?;
    if file.fingerprint != fingerprint {
        let what = format!("{name}: this router was trained for another model");
        let why = format!("it is for weights {}, these are {fingerprint}", file.fingerprint);
        return Err(Failure::malformed(what).why(why).hint("the router file of this model, or --token-router all").into());
    }
    let gate = file.gate(keep).map_err(|error| Failure::new(Kind::Usage, message(&error)))?;
    Ok((Arc::new(gate.to_device(known.device)?), Some((file.window, file.sinks))))
}

/// Whether some queries may read less than everything.
pub(crate) fn is_routed(attention: &RoutedAttention) -> bool {
    let routing = attention.routing();
    routing.limits.dense_len < usize::MAX || routing.token_router.kept_fraction() < 1.0
}

/// A few words on it, for people; empty where it is dense.
pub(crate) fn describe(attention: &RoutedAttention) -> String {
    let routing = attention.routing();
    let Routing { token_router, block_router, limits, .. } = routing;
    let mut parts = Vec::new();
    if limits.dense_len < usize::MAX {
        let size = budget(limits.budget);
        parts.push(format!("routed above {}: {} {size} of blocks of {}", limits.dense_len, block_router.name(), limits.block_size));
    }
    if token_router.kept_fraction() < 1.0 {
        let keeps = 100.0 * token_router.kept_fraction();
        let (window, dense_len) = (routing.token_window(), routing.token_dense_len());
        let once = if dense_len > window { format!(" once there are {dense_len}") } else { String::new() };
        parts.push(format!("{} keeps about {keeps:.0} % beyond {window} tokens{once}", token_router.name()));
    }
    parts.join(" · ")
}

fn budget(budget: Budget) -> String {
    // Parts are not exact in binary: 30 % would be 30.000002 %.
    let percent = |part: f32| (1000.0 * part).round() / 10.0;
    match (budget.tokens, budget.part) {
        (usize::MAX, _) | (0, 1.0..) => "everything".to_string(),
        (0, part) => format!("{} %", percent(part)),
        (tokens, 0.0) => tokens.to_string(),
        (tokens, part) => format!("{tokens} (or {} % if more)", percent(part)),
    }
}

/// As in JSON.
pub(crate) fn document(attention: &RoutedAttention) -> Value {
    let routing = attention.routing();
    let Routing { token_router, block_router, limits, dense_layers, layer_budgets, .. } = routing;
    let mut document = json!({"mode": if limits.dense_len < usize::MAX { "routed" } else { "dense" }, "token_router": token_router.name()});
    if limits.dense_len < usize::MAX {
        document["block_router"] = block_router.name().into();
        document["budget"] = limits.budget.tokens.into();
        document["budget_part"] = limits.budget.part.into();
        document["block"] = limits.block_size.into();
        document["min_ctx"] = limits.dense_len.into();
        document["dense_layers"] = (*dense_layers).into();
        document["layer_budgets"] = layer_budgets.clone().into();
    }
    if is_routed(attention) {
        document["window"] = limits.window.into();
        document["token_window"] = routing.token_window().into();
        document["token_min_ctx"] = routing.token_dense_len().into();
        document["token_min_prompt"] = routing.token_dense_prompt.into();
        document["sinks"] = limits.sinks.into();
        document["kept_fraction"] = token_router.kept_fraction().into();
    }
    document
}

/// A setting in a few letters, e.g. `bound b1024 B32 W256, q8_0 KV`.
pub(crate) fn short(attention: &RoutedAttention, dtypes: KvDtypes) -> String {
    let Routing { token_router, block_router, limits, .. } = attention.routing();
    let mut parts = Vec::new();
    if limits.dense_len < usize::MAX {
        let size = budget(limits.budget).replace("everything", "100 %");
        parts.push(format!("{} b{size} B{} W{}", block_router.name(), limits.block_size, limits.window));
    } else {
        parts.push("dense".to_string());
    }
    if token_router.kept_fraction() < 1.0 {
        parts.push(format!("{} {:.2} W{}", token_router.name(), token_router.kept_fraction(), attention.routing().token_window()));
    }
    match (dtypes.k, dtypes.v) {
        (KvDtype::F16, KvDtype::F16) => {}
        (k, v) if k == v => parts.push(format!("{} KV", k.name())),
        (k, v) => parts.push(format!("{}/{} KV", k.name(), v.name())),
    }
    parts.join(", ")
}
