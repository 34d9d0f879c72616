//! A checkpoint opened, checked against the machine, and loaded.

use crate::args::{AttentionArgs, DeviceChoice, ModelArgs, SamplingArgs, TemplateArgs};
use crate::crossover;
use crate::device;
use crate::failure::{Failure, Kind, damaged, unexpected};
use crate::memory;
use crate::plan::{self, Plan};
use crate::routing;
use crate::source::{self, Hub, Located, ModelReference};
use crate::text::{ChatTemplate, Message, TextTokenizer};
use crate::ui::{Ui, bytes};
use anyhow::{Context, Result};
use candle_core::Device;
use minijinja::Value;
use minijinja::value::Serde;
use model::message;
use model::score::Setting;
use model::weights::{Precision, SumOrder};
use model::{CausalLm, Config, SamplerOptions, Session, Weights};
use serde::Deserialize;
use sparse_attn::backend::for_device;
use sparse_attn::{KvDtype, KvDtypes, RoutedAttention};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A checkpoint whose headers, tokenizer and template were read; its weights are still in the file.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) located: Located,
    pub(crate) weights: Weights,
    pub(crate) tokenizer: TextTokenizer,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) defaults: GenerationDefaults,
    pub(crate) device: Device,
    pub(crate) attention: RoutedAttention,
    pub(crate) dtypes: KvDtypes,
    /// Tokens of a prompt that are computed at once.
    pub(crate) chunk: usize,
    /// First tokens that no token router drops: those of the system message.
    protected: usize,
}

/// A checkpoint with its weights in memory.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) model: Arc<dyn CausalLm>,
    pub(crate) plan: Plan,
    pub(crate) load_time: Duration,
}

/// `generation_config.json`: what the model's authors recommend.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct GenerationDefaults {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    eos_token_id: Option<EndTokens>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum EndTokens {
    One(u32),
    Several(Vec<u32>),
}

/// Tokens of a prompt to compute at once: weights are unpacked once for all of them, but their activations should stay in a
/// cache, and small beside the weights. Where tokens are dropped as a window moves on, those of a chunk come on top of it: there few,
/// except on a GPU, where unpacking all weights once more takes as long as a thousand tokens.
fn chunk(config: &Config, attention: &RoutedAttention, device: &Device) -> usize {
    /// Tokens, and the most bytes that one of their widest activations may take.
    const SIZES: [(usize, usize); 3] = [(2048, 20 << 20), (1024, 20 << 20), (FEW_AT_ONCE, 12 << 20)];
    if device.is_cuda() {
        return MOST_AT_ONCE;
    }
    if config.sliding_window.iter().any(Option::is_some) || attention.routing().token_router.kept_fraction() < 1.0 {
        return FEW_AT_ONCE;
    }
    let fits = |(tokens, most): &(usize, usize)| tokens * config.intermediate_size * size_of::<f32>() <= *most;
    SIZES.into_iter().find(fits).map_or(FEWEST_AT_ONCE, |(tokens, _)| tokens)
}

/// Tokens computed at once where they are to be few.
pub(crate) const FEW_AT_ONCE: usize = 512;

/// And where their activations are very wide.
const FEWEST_AT_ONCE: usize = 256;

/// And at the most: on a GPU, where weights are unpacked in memory, not in a cache.
const MOST_AT_ONCE: usize = 4096;

impl Checkpoint {
    /// Finds or fetches the model and reads all but its weights.
    pub(crate) fn open(args: &ModelArgs, template: &TemplateArgs, attention: &AttentionArgs, hub: &Hub) -> Result<Self> {
        let device = device::open(args.machine.device, hub.ui)?;
        let reference = ModelReference::parse(&args.model, args.revision.as_deref())?;
        let located = source::obtain(&reference, hub)?;
        let quantize = located
            .quantize
            .as_deref()
            .map(model::weights::quantize_dtype)
            .transpose()
            .map_err(|error| Failure::new(Kind::Usage, message(&error)))?;
        let weights = Weights::open(&located.path, &device, quantize).map_err(damaged)?;
        source::check_architecture(&located.id, weights.config())?;
        let tokenizer = match weights.gguf() {
            Some(file) => TextTokenizer::from_gguf(file),
            None => TextTokenizer::from_file(&located.path.join("tokenizer.json")),
        };
        let tokenizer = tokenizer.map_err(as_damage).with_context(|| located.id.clone())?;
        if tokenizer.vocab_size() > weights.config().vocab_size {
            let what = format!(
                "{}: the tokenizer has {} tokens, the model only {}",
                located.id,
                tokenizer.vocab_size(),
                weights.config().vocab_size
            );
            return Err(Failure::malformed(what).why("the files belong to different models").into());
        }
        let system = template.system.as_deref();
        let template = chat_template(&located, &weights, &tokenizer, template)?;
        let defaults = GenerationDefaults::read(&located, &weights)?;
        let dtypes = routing::dtypes(attention);
        let (device, attend) = backend(args.machine.device, device, weights.config(), dtypes, hub.ui)?;
        let mut weights = weights.on(&device);
        weights.forget_vocabulary();
        let mut checkpoint =
            Self { located, weights, tokenizer, template, defaults, device, attention: attend, dtypes, chunk: 0, protected: 0 };
        if let Some(system) = system {
            checkpoint.protected = checkpoint.tokens_of_system(system)?;
        }
        checkpoint.attention = checkpoint.attention_of(attention)?;
        if checkpoint.attention.routing().limits.tile == 1 {
            // Each query for itself: then chunks of any size select the same, as far as they also add the same.
            checkpoint.weights = checkpoint.weights.with_order(SumOrder::Fixed);
        }
        checkpoint.chunk = match args.machine.batch_size {
            Some(tokens) => tokens as usize,
            None => chunk(checkpoint.config(), &checkpoint.attention, &checkpoint.device),
        };
        Ok(checkpoint)
    }

    /// Tokens from the first one to the last of this system message.
    fn tokens_of_system(&self, system: &str) -> Result<usize> {
        // Some templates want a question too: then the message alone, which is a little shorter.
        let rendered = self.template.as_ref().and_then(|template| template.render(&[Message::new("system", system)], false).ok());
        Ok(self.tokenizer.encode(rendered.as_deref().unwrap_or(system), true)?.len())
    }

    /// The same attention, where no token router drops any of this system message.
    pub(crate) fn attention_protecting(&self, system: &str) -> Result<RoutedAttention> {
        let mut routing = self.attention.routing().clone();
        routing.limits.sinks = routing.limits.sinks.max(self.tokens_of_system(system)?);
        Ok(self.attention.with_routing(routing).map_err(unexpected)?)
    }

    /// What attends by these flags.
    pub(crate) fn attention_of(&self, args: &AttentionArgs) -> Result<RoutedAttention> {
        let known = routing::Known {
            router: self.located.manifest.and_then(|manifest| manifest.router()),
            // On a GPU small models are a little slower with one, and their memory is seldom short.
            drops_freely: self.device.is_cpu(),
            config: self.config(),
            device: &self.device,
            defaults: self.located.manifest.and_then(|manifest| manifest.body.routing.as_ref()),
            crossover: crossover::recall(self),
            selection_tokens: self.attention.selection_bytes()
                / (routing::dtypes(args).bytes(self.config().heads.head_dim()) * self.config().heads.kv_heads()),
            tile: self.attention.preferred_tile(self.config().heads.group_size()),
            token_dense_len: self.attention.preferred_token_dense_len(),
            token_dense_prompt: self.attention.preferred_token_dense_prompt(self.config().heads),
            fingerprint: &|| self.weights.fingerprint(),
        };
        let mut routing = routing::resolve(args, &known)?;
        routing.limits.sinks = routing.limits.sinks.max(self.protected);
        let attention = self.attention.with_routing(routing).map_err(|error| Failure::new(Kind::Usage, message(&error)))?;
        Ok(attention)
    }

    /// The same, multiplied with activations in 16 bits.
    pub(crate) fn exact(self) -> Self {
        Self { weights: self.weights.with_precision(Precision::Int16), ..self }
    }

    /// The settings to measure: those of `with`, or that of the other flags where there is none.
    pub(crate) fn settings(&self, own: &AttentionArgs, with: &[AttentionArgs]) -> Result<Vec<Setting>> {
        let flags = if with.is_empty() { std::slice::from_ref(own) } else { with };
        let setting = |flags: &AttentionArgs| -> Result<Setting> {
            let dtypes = routing::dtypes(flags);
            self.attention.supports(self.config().heads, dtypes).map_err(unsupported)?;
            Ok(Setting { attention: self.attention_of(flags)?, dtypes })
        };
        flags.iter().map(setting).collect()
    }

    /// What settings are measured against: dense, f16.
    pub(crate) fn reference(&self) -> Setting {
        Setting { attention: self.attention.to_dense(), dtypes: KvDtype::F16.into() }
    }

    /// How keys and values are kept, for planning.
    pub(crate) fn storage(&self) -> plan::Storage<'_> {
        plan::Storage { attention: &self.attention, dtypes: self.dtypes, chunk: self.chunk }
    }

    /// Bytes of keys and values that a token takes, summaries included: over many, since they come in pages.
    pub(crate) fn kv_bytes_per_token(&self) -> u64 {
        const MANY: usize = 64 * 1024;
        Plan::new(self.config(), 0, self.storage(), MANY).kv / MANY as u64
    }

    pub(crate) fn config(&self) -> &Config {
        self.weights.config()
    }

    /// Bytes of weights once loaded.
    pub(crate) fn weights_bytes(&self) -> u64 {
        self.weights.loaded_bytes()
    }

    /// The most tokens a sequence may have on this machine.
    pub(crate) fn context(&self, args: &ModelArgs, ui: Ui) -> Result<usize> {
        let (asked, trained) = (args.machine.ctx_size.map(|n| n as usize), self.config().context);
        let free = plan::available(args.machine.mem_limit, &self.device);
        let context = plan::choose_context(asked, self.config(), self.weights_bytes(), self.storage(), free)?;
        if context > trained {
            ui.warn(format!("-c {context} is beyond the {trained} tokens this model was trained on: expect nonsense there"));
        } else if asked.is_none() && context < trained {
            ui.warn(format!("the context is {context} of the {trained} tokens this model was trained on: no more fits in {}", bytes(free)));
        }
        Ok(context)
    }

    /// Tokens at which the model's text ends.
    pub(crate) fn end_tokens(&self) -> Vec<u32> {
        let mut ids = self.config().eos.clone();
        ids.extend(match &self.defaults.eos_token_id {
            None => Vec::new(),
            Some(EndTokens::One(id)) => vec![*id],
            Some(EndTokens::Several(ids)) => ids.clone(),
        });
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Flag, else the model's own recommendation, else the built-in default.
    pub(crate) fn sampler_options(&self, args: &SamplingArgs) -> Result<SamplerOptions> {
        let (own, built_in) = (&self.defaults, SamplerOptions::default());
        let greedy = args.greedy || (own.do_sample == Some(false) && args.temp.is_none());
        let options = SamplerOptions {
            temperature: if greedy { 0.0 } else { args.temp.or(own.temperature).unwrap_or(built_in.temperature) },
            top_k: args.top_k.or(own.top_k).unwrap_or(built_in.top_k),
            top_p: args.top_p.or(own.top_p).unwrap_or(built_in.top_p),
            min_p: args.min_p.or(own.min_p).unwrap_or(built_in.min_p),
            repeat_penalty: args.repeat_penalty.or(own.repetition_penalty).unwrap_or(built_in.repeat_penalty),
            repeat_last_n: args.repeat_last_n.unwrap_or(built_in.repeat_last_n),
            presence_penalty: args.presence_penalty.unwrap_or(built_in.presence_penalty),
            frequency_penalty: args.frequency_penalty.unwrap_or(built_in.frequency_penalty),
            // JSON readers keep 53 bits of a number.
            seed: args.seed.unwrap_or_else(|| random_seed() & ((1 << 53) - 1)),
        };
        options.check().map_err(|error| Failure::new(Kind::Usage, message(&error)))?;
        Ok(options)
    }

    /// Loads the weights. `context`: the tokens that memory is planned for.
    pub(crate) fn load(self, context: usize, args: &ModelArgs) -> Result<Engine> {
        plan::choose_context(
            Some(context),
            self.config(),
            self.weights_bytes(),
            self.storage(),
            plan::available(args.machine.mem_limit, &self.device),
        )?;
        let plan = Plan::new(self.config(), self.weights_bytes(), self.storage(), context);
        let started = Instant::now();
        memory::give_back();
        let model = model::load(&self.weights).map_err(damaged).with_context(|| self.located.id.clone())?;
        self.weights.let_go();
        memory::give_back();
        memory::keep_freed();
        Ok(Engine { model, plan, load_time: started.elapsed(), checkpoint: self })
    }
}

impl Engine {
    /// An empty sequence with room for `capacity` tokens.
    pub(crate) fn session(&self, capacity: usize) -> Result<Session> {
        self.session_with(self.checkpoint.attention.clone(), capacity)
    }

    /// [`Engine::session`], with another attention than the flags ask for.
    pub(crate) fn session_with(&self, attention: RoutedAttention, capacity: usize) -> Result<Session> {
        Session::new(self.model.clone(), attention, self.checkpoint.dtypes, &self.checkpoint.device, capacity)
            .map_err(|error| Failure::new(Kind::OutOfMemory, message(&error)).hint("a smaller -c").into())
    }

    /// One line on what runs and where.
    pub(crate) fn banner(&self, context: usize) -> String {
        let routing = routing::describe(&self.checkpoint.attention);
        format!(
            "{} {} · {} · weights {} · KV {}/token · ctx {context}{}",
            self.checkpoint.located.id,
            self.checkpoint.weights.dtype_name(),
            device::label(&self.checkpoint.device, self.checkpoint.attention.backend_name()),
            bytes(self.plan.weights),
            bytes(self.checkpoint.kv_bytes_per_token()),
            if routing.is_empty() { routing } else { format!(" · {routing}") }
        )
    }
}

impl GenerationDefaults {
    fn read(located: &Located, weights: &Weights) -> Result<Self> {
        let path = located.path.join("generation_config.json");
        if weights.gguf().is_some() || !path.is_file() {
            return Ok(Self::default());
        }
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let defaults: Self = serde_json::from_str(&text).map_err(|error| Failure::malformed(format!("{}: {error}", path.display())))?;
        Ok(defaults)
    }

    /// What the model's authors recommend, for people; empty if nothing.
    pub(crate) fn describe(&self) -> String {
        let mut parts = Vec::new();
        let mut add = |name: &str, value: Option<String>| parts.extend(value.map(|value| format!("{name} {value}")));
        add("temp", self.temperature.map(|value| value.to_string()));
        add("top-k", self.top_k.map(|value| value.to_string()));
        add("top-p", self.top_p.map(|value| value.to_string()));
        add("min-p", self.min_p.map(|value| value.to_string()));
        add("repeat-penalty", self.repetition_penalty.map(|value| value.to_string()));
        add("do_sample", self.do_sample.filter(|sample| !sample).map(|value| value.to_string()));
        parts.join(", ")
    }
}

/// The user's template, else the model's; `None` if it has none.
fn chat_template(located: &Located, weights: &Weights, tokenizer: &TextTokenizer, args: &TemplateArgs) -> Result<Option<ChatTemplate>> {
    let (own, bos, eos) = match weights.gguf() {
        Some(file) => {
            let token = |key: &str| -> Result<String> {
                Ok(file.optional_id(key).map_err(damaged)?.map_or_else(String::new, |id| tokenizer.token(id)))
            };
            let template = file.optional_string("tokenizer.chat_template").map_err(damaged)?.map(str::to_string);
            (template, token("tokenizer.ggml.bos_token_id")?, token("tokenizer.ggml.eos_token_id")?)
        }
        None => ChatTemplate::read_directory(&located.path)?,
    };
    let source = match &args.chat_template {
        Some(path) => {
            Some(std::fs::read_to_string(path).map_err(|error| Failure::new(Kind::NotFound, format!("{}: {error}", path.display())))?)
        }
        None => own,
    };
    let value =
        |text: &str| serde_json::from_str::<serde_json::Value>(text).map_or_else(|_| Value::from(text), |json| Value::from(Serde(json)));
    let arguments: BTreeMap<String, Value> = args.template_arg.iter().map(|(name, text)| (name.clone(), value(text))).collect();
    source.map(|source| ChatTemplate::new(source, bos, eos, arguments)).transpose()
}

/// The prompt of a conversation: its text, and its ids.
pub(crate) fn chat_prompt(checkpoint: &Checkpoint, template: &ChatTemplate, messages: &[Message]) -> Result<(String, Vec<u32>)> {
    let rendered = template.render(messages, true)?;
    let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
    let ids = checkpoint.tokenizer.encode_chat(&rendered, &contents)?;
    Ok((rendered, ids))
}

fn as_damage(error: anyhow::Error) -> anyhow::Error {
    if error.downcast_ref::<Failure>().is_some() {
        return error;
    }
    match error.downcast::<candle_core::Error>() {
        Ok(error) => damaged(error).into(),
        Err(error) => Failure::malformed(format!("{error:#}")).into(),
    }
}

/// The device to use of `device`, and what attends there: the CPU where nothing was asked for and the GPU has no kernels for the model.
fn backend(asked: DeviceChoice, device: Device, config: &Config, dtypes: KvDtypes, ui: Ui) -> Result<(Device, RoutedAttention)> {
    let on = |device: &Device| -> Result<RoutedAttention> {
        Ok(RoutedAttention::dense(for_device(device).map_err(|error| Failure::new(Kind::Device, message(&error)))?))
    };
    let attention = on(&device)?;
    match attention.supports(config.heads, dtypes) {
        Ok(()) => Ok((device, attention)),
        Err(error) if asked == DeviceChoice::Auto => {
            ui.warn(format!("this runs on the CPU: {}", message(&error)));
            Ok((Device::Cpu, on(&Device::Cpu)?))
        }
        Err(error) => Err(unsupported(error).into()),
    }
}

/// What the device that was asked for cannot do.
fn unsupported(error: candle_core::Error) -> Failure {
    Failure::new(Kind::Device, message(&error)).hint("--cache-type f16 where that is the reason, or --device cpu")
}

fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library seeds each of these from the system's random source.
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
