//! The command line. Doc comments here are help texts.

#![allow(rustdoc::broken_intra_doc_links, reason = "USER/REPO[:QUANT] is no link")]

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use std::ffi::OsString;
use std::path::PathBuf;

/// Version, commit, target and features of this build.
pub(crate) const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (",
    env!("FOVEATE_COMMIT"),
    ", ",
    env!("FOVEATE_TARGET"),
    ", backends: ",
    env!("FOVEATE_BACKENDS"),
    ")"
);

/// The model of a first run.
pub(crate) const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

/// Run published language models on your own machine.
#[derive(Debug, Parser)]
#[command(name = "foveate", version = VERSION, propagate_version = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Print nothing but the result and errors
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// Log what happens inside (-v: debug, -vv: trace)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// One JSON document on standard output, errors included
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Draw no progress bars
    #[arg(long, global = true)]
    pub(crate) no_progress: bool,
    /// Use only what is on this machine (also HF_HUB_OFFLINE=1)
    #[arg(long, global = true)]
    pub(crate) offline: bool,
    /// Where models are kept [default: HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// File holding the Hub token [default: HF_TOKEN, else HF_TOKEN_PATH, else the file of `hf auth login`]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) hf_token_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Continue a prompt
    #[command(visible_alias = "gen")]
    Generate(Box<Generate>),
    /// Talk with a model
    #[command(visible_alias = "run")]
    Chat(Box<Chat>),
    /// Models on this machine
    #[command(subcommand)]
    Models(Models),
    /// Fetch a model (models pull)
    Pull(Pull),
    /// List models (models ls)
    Ls,
    /// Delete a model (models rm)
    Rm(Remove),
    /// Describe a model (models show)
    Show(OneModel),
    /// Prefill and decode rates at depths, dense and routed side by side
    Bench(Box<Bench>),
    /// What routed attention costs in quality
    #[command(subcommand)]
    Eval(Eval),
    /// Two models, or one under two settings: speed, memory and quality side by side, in one report
    Compare(Box<Compare>),
    /// Train a token router for a model, from texts: which tokens stay in memory
    TrainRouter(Box<TrainRouter>),
    /// What the routers kept and read of a prompt: a picture, and how much of dense attention it caught
    Route(Box<Route>),
    /// Check the machine, this build, the cache and the Hub
    Doctor,
    /// Print a completion script
    Completions {
        /// The shell to complete in
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Models {
    /// Fetch a model, or go on where a fetch stopped
    Pull(Pull),
    /// List models, those on this machine and those known by name
    Ls,
    /// Describe a model
    Show(OneModel),
    /// Delete a model from this machine
    Rm(Remove),
    /// Compare files with their checksums (exit 10: damaged)
    Verify(Verify),
    /// Print where a model's file or directory lies
    Path(OneModel),
}

#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// A name of `foveate ls`, or USER/REPO[:QUANT][@REVISION] [default: smollm2-135m-instruct]
    #[arg(value_name = "MODEL")]
    pub(crate) model: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct OneModel {
    /// A name of `foveate ls`, USER/REPO[:QUANT][@REVISION], a directory or a .gguf file
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
}

#[derive(Debug, Args)]
pub(crate) struct Remove {
    /// A name of `foveate ls`, or USER/REPO[:QUANT]
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// A name of `foveate ls`, or USER/REPO
    #[arg(value_name = "MODEL", required_unless_present = "all")]
    pub(crate) model: Option<String>,
    /// Every model on this machine
    #[arg(long, conflicts_with = "model")]
    pub(crate) all: bool,
}

/// Which model, where, and how much memory.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// A name of `foveate ls`, USER/REPO[:QUANT][@REVISION], a directory or a .gguf file
    #[arg(short, long, default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    /// The Hub revision (same as @REVISION)
    #[arg(long)]
    pub(crate) revision: Option<String>,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// Where, and how much memory.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct MachineArgs {
    /// Where to compute
    #[arg(long, value_name = "auto|cpu|cuda[:N]|metal", default_value = "auto", value_parser = parse_device)]
    pub(crate) device: DeviceChoice,
    /// Threads [default: physical cores]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// Most tokens of prompt and answer together [default: what the model was trained on, lowered to fit]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 28))]
    pub(crate) ctx_size: Option<u32>,
    /// Tokens of a prompt that are computed at once [default: 512 to 2048, the more the narrower the model]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    pub(crate) batch_size: Option<u32>,
    /// Most memory to use, e.g. 10GiB or 80% of what is free
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    pub(crate) mem_limit: Option<MemoryLimit>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceChoice {
    Auto,
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
    Metal,
}

fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    match text.split_once(':') {
        None if text == "auto" => Ok(DeviceChoice::Auto),
        None if text == "cpu" => Ok(DeviceChoice::Cpu),
        None if text == "cuda" => Ok(DeviceChoice::Cuda(0)),
        None if text == "metal" => Ok(DeviceChoice::Metal),
        Some(("cuda", number)) => number.parse().map(DeviceChoice::Cuda).map_err(|_| format!("{number:?} is no number of a GPU")),
        _ => Err("expected auto, cpu, cuda, cuda:N or metal".to_string()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CacheType {
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
}

/// `--mem-limit`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum MemoryLimit {
    Bytes(u64),
    /// Of what is free, 0 to 1.
    Fraction(f64),
}

/// Which blocks of its past a token reads.
/// What attends, and how keys and values are kept.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Routed attention and KV cache (defaults: the model's, see models/README.md)")]
pub(crate) struct AttentionArgs {
    /// dense reads everything; routed reads the blocks that matter, faster on long contexts and not quite the same text;
    /// auto is routed where that was measured to be good, and dense below --min-ctx
    #[arg(long, value_enum, default_value_t = AttentionChoice::Auto)]
    pub(crate) attn: AttentionChoice,
    /// Tokens a query may read beyond its window, or a part of them, e.g. 12.5%
    #[arg(long, value_name = "N|P%", value_parser = parse_budget)]
    pub(crate) budget: Option<BudgetChoice>,
    /// Positions per routing block
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) block: Option<u32>,
    /// Newest tokens, always read
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 28))]
    pub(crate) window: Option<u32>,
    /// Newest tokens that stay in memory whatever the token router says [default: four times what a trained one was
    /// trained for, else --window]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 28))]
    pub(crate) token_window: Option<u32>,
    /// Below this many tokens no query misses what the token router drops [default: on a GPU 2048, and no query of a first prompt that makes up to two
    /// thread blocks for each multiprocessor (H100: 3696 tokens of SmolLM2), which gains no speed by it; else 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=1 << 28))]
    pub(crate) token_min_ctx: Option<u32>,
    /// First tokens, which no token router drops [default: 4]
    #[arg(long, value_name = "N")]
    pub(crate) sinks: Option<u32>,
    /// Below this many tokens all blocks are read [default: what bench measured, else twice what a query reads]
    #[arg(long, value_name = "N")]
    pub(crate) min_ctx: Option<u32>,
    /// Queries of a prompt that share a selection, 1 to 64; with 1, chunks of any size (-b) select the same
    #[arg(long, value_name = "N", hide_short_help = true, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) tile: Option<u32>,
    /// First layers that read every block [default: none]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) dense_layers: Option<u32>,
    /// What the budget is multiplied by in each layer, e.g. 1,1,2,4; 1 where the list is over
    #[arg(long, value_name = "F,...", hide_short_help = true, value_delimiter = ',', value_parser = parse_factor)]
    pub(crate) layer_budgets: Option<Vec<f32>>,
    /// How blocks are scored
    #[arg(long, value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(["all", "recent", "mean", "bound", "spread", "oracle"]))]
    pub(crate) block_router: Option<String>,
    /// Which tokens stay in memory: all, sink_window, random, trained (the one that ships for the model), or the
    /// file of another [default: with --attn auto trained, where it was measured to cost little and no speed; else all]
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) token_router: Option<String>,
    /// The part of the tokens that the token router keeps, 0 to 1
    #[arg(long, value_name = "F", value_parser = parse_fraction)]
    pub(crate) keep: Option<f32>,
    /// How keys and values are kept [default: f16]
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) cache_type: Option<CacheType>,
    /// How keys are kept [default: --cache-type]
    #[arg(long, visible_alias = "ctk", value_enum, value_name = "TYPE")]
    pub(crate) cache_type_k: Option<CacheType>,
    /// How values are kept [default: --cache-type]
    #[arg(long, visible_alias = "ctv", value_enum, value_name = "TYPE")]
    pub(crate) cache_type_v: Option<CacheType>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AttentionChoice {
    Auto,
    Dense,
    Routed,
}

/// `--budget`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum BudgetChoice {
    Tokens(usize),
    /// 0 to 1
    Part(f32),
}

/// How the prompt becomes tokens.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Prompt")]
pub(crate) struct TemplateArgs {
    /// The system message
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Use this chat template instead of the model's
    #[arg(long, value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,
    /// A value for the chat template, e.g. enable_thinking=false
    #[arg(long, value_name = "K=V", value_parser = parse_key_value)]
    pub(crate) template_arg: Vec<(String, String)>,
    /// Show what the model is given
    #[arg(long)]
    pub(crate) show_prompt: bool,
}

/// How tokens are chosen.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling (defaults: the model's generation_config.json, else those given)")]
pub(crate) struct SamplingArgs {
    /// Divides logits; 0 is greedy [default: 0.8]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub(crate) temp: Option<f32>,
    /// Keep the N likeliest tokens; 0 keeps all [default: 40]
    #[arg(long, value_name = "N")]
    pub(crate) top_k: Option<usize>,
    /// Keep the likeliest tokens that reach this probability together [default: 0.95]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,
    /// Drop tokens below this fraction of the likeliest one's probability [default: 0.05]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,
    /// Divides the logits of recent tokens [default: 1]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub(crate) repeat_penalty: Option<f32>,
    /// Tokens that count as recent [default: 64]
    #[arg(long, value_name = "N")]
    pub(crate) repeat_last_n: Option<usize>,
    /// Subtracted once for a recent token [default: 0]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// Subtracted for each time a recent token occurs [default: 0]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Same seed, same text [default: random, printed]
    #[arg(short, long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Always the likeliest token
    #[arg(long, conflicts_with_all = ["temp", "top_k", "top_p", "min_p"])]
    pub(crate) greedy: bool,
    /// Stop before this text (repeatable)
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
}

/// What the model is given.
#[derive(Debug, Args)]
pub(crate) struct PromptArgs {
    /// The prompt
    #[arg(value_name = "PROMPT", conflicts_with = "prompt")]
    pub(crate) positional: Option<String>,
    /// The prompt (same as the argument)
    #[arg(short, long, value_name = "TEXT", help_heading = "Prompt")]
    pub(crate) prompt: Option<String>,
    /// Read the prompt from a file, `-` for standard input; with a prompt too, the file comes first
    #[arg(short, long, value_name = "PATH", help_heading = "Prompt")]
    pub(crate) file: Option<PathBuf>,
    /// The prompt as token ids, e.g. 1,2,3: no template, no start token
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with_all = ["positional", "prompt", "file", "system"], help_heading = "Prompt")]
    pub(crate) prompt_ids: Vec<u32>,
    /// No chat template: the model continues the text
    #[arg(long, help_heading = "Prompt")]
    pub(crate) raw: bool,
    /// Do not put the model's start token before a raw prompt
    #[arg(long, help_heading = "Prompt")]
    pub(crate) no_bos: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Generate {
    #[command(flatten)]
    pub(crate) prompt: PromptArgs,
    /// Most tokens to generate [default: 512]
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) max_tokens: Option<usize>,
    /// Do not stop at the model's end tokens
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Write what was kept and read, layer by layer and token by token, as lines of JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) route_log: Option<PathBuf>,
    /// Log-probabilities of the N likeliest tokens at each position (to standard error, or in the JSON)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=20))]
    pub(crate) logprobs: Option<u8>,
    #[command(flatten)]
    pub(crate) template: TemplateArgs,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) attention: AttentionArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

#[derive(Debug, Args)]
pub(crate) struct Route {
    #[command(flatten)]
    pub(crate) prompt: PromptArgs,
    /// Tokens to decode and watch
    #[arg(short = 'n', long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) steps: u32,
    /// Where the page and the lines of JSON go: this name with .html and .jsonl
    #[arg(short, long, value_name = "PATH", default_value = "route")]
    pub(crate) output: PathBuf,
    /// Write no files
    #[arg(long)]
    pub(crate) no_files: bool,
    #[command(flatten)]
    pub(crate) template: TemplateArgs,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) attention: AttentionArgs,
}

#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// Tokens of the prefill test (0: none)
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    pub(crate) prompt: u32,
    /// Tokens of the decode test (0: none)
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    pub(crate) generate: u32,
    /// Tokens that are there before the test, e.g. 0,4096
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_value = "0")]
    pub(crate) depth: Vec<u32>,
    /// Repetitions
    #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) repeat: u32,
    /// How results are printed
    #[arg(short, long, value_enum, default_value_t = OutputFormat::Md)]
    pub(crate) output: OutputFormat,
    /// Measure from which context on routed attention decodes faster, and let auto use that here from now on
    #[arg(long)]
    pub(crate) crossover: bool,
    #[command(flatten)]
    pub(crate) template: TemplateArgs,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) attention: AttentionArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    Md,
    Csv,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Eval {
    /// Perplexity of a text, dense and routed, and how far the predictions differ
    Ppl(Box<EvalPpl>),
    /// Facts hidden in a text, asked for after it: dense beside routed, over lengths and depths
    Needle(Box<EvalNeedle>),
}

#[derive(Debug, Args)]
pub(crate) struct EvalPpl {
    /// The text
    #[arg(short, long, value_name = "PATH")]
    pub(crate) file: PathBuf,
    /// Score predictions after this position [default: 1024 beyond the first routed one]
    #[arg(long, value_name = "N")]
    pub(crate) from: Option<usize>,
    /// Another setting instead of that of the other flags, e.g. --with "--budget 512 --block-router mean"; may be repeated
    #[arg(long, value_name = "FLAGS", value_parser = parse_setting, allow_hyphen_values = true)]
    pub(crate) with: Vec<AttentionArgs>,
    /// Exit with 10 if the mean KL divergence from dense, in nats, is above this
    #[arg(long, value_name = "F")]
    pub(crate) max_kld: Option<f64>,
    /// Multiply with activations in 16 bits instead of 8: the noise of rounding, a KL of some thousandths, goes
    #[arg(long)]
    pub(crate) exact: bool,
    #[command(flatten)]
    pub(crate) template: TemplateArgs,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) attention: AttentionArgs,
}

#[derive(Debug, Args)]
pub(crate) struct EvalNeedle {
    /// The text to hide things in
    #[arg(short, long, value_name = "PATH")]
    pub(crate) file: PathBuf,
    /// Lengths of the text in tokens, e.g. 4096,8192 [default: most of the context, at most 8192]
    #[arg(short, long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(256..=1 << 28))]
    pub(crate) length: Vec<u32>,
    /// Where in it, in percent from its beginning
    #[arg(short, long, value_name = "P", value_delimiter = ',', default_value = "10,30,50,70,90", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) depth: Vec<u8>,
    /// Texts for each length and depth
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) samples: u32,
    /// Tasks to run
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [NeedleTask::Single, NeedleTask::MultiKey, NeedleTask::MultiValue, NeedleTask::Variables, NeedleTask::Copy, NeedleTask::TwoTurn])]
    pub(crate) tasks: Vec<NeedleTask>,
    /// Seed of names, numbers and places
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Another setting instead of that of the other flags; may be repeated
    #[arg(long, value_name = "FLAGS", value_parser = parse_setting, allow_hyphen_values = true)]
    pub(crate) with: Vec<AttentionArgs>,
    /// Exit with 10 if a setting finds less than this part of what dense finds
    #[arg(long, value_name = "F", value_parser = parse_fraction)]
    pub(crate) min_acc: Option<f32>,
    #[command(flatten)]
    pub(crate) template: TemplateArgs,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) attention: AttentionArgs,
}

#[derive(Debug, Args)]
pub(crate) struct Compare {
    /// A name of `foveate ls`, USER/REPO[:QUANT][@REVISION], a directory or a .gguf file
    #[arg(value_name = "A")]
    pub(crate) a: String,
    /// What it is compared with [default: the same model where --b is given, else mistral-7b-instruct-v0.3]
    #[arg(value_name = "B")]
    pub(crate) b: Option<String>,
    /// Attention of B: the attention flags that follow, e.g. --b --attn routed --budget 1024 [default: --attn dense]; those
    /// before it are A's
    #[arg(long = "b", value_name = "FLAGS", value_parser = parse_setting, allow_hyphen_values = true)]
    pub(crate) b_flags: Option<AttentionArgs>,
    /// Lengths of the context at which both are timed, in tokens
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_value = "0,4096", value_parser = clap::value_parser!(u32).range(0..=1 << 28))]
    pub(crate) depth: Vec<u32>,
    /// Tokens of the prefill test at depth 0
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) prompt: u32,
    /// Tokens of the decode test
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) generate: u32,
    /// Times that each is measured, by turns
    #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) repeat: u32,
    /// A text to measure quality on: perplexity per byte and word, needles hidden in it; of one model, how far both settings differ
    #[arg(short, long, value_name = "PATH", help_heading = "Quality")]
    pub(crate) file: Option<PathBuf>,
    /// Bytes of the text that are scored, from its beginning
    #[arg(long, value_name = "N", default_value_t = 32768, value_parser = clap::value_parser!(u32).range(64..=1 << 30), help_heading = "Quality")]
    pub(crate) text_bytes: u32,
    /// Tokens of context that scored text has, and that needles are hidden in [default: the deepest --depth, at least 2048]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(64..=1 << 28), help_heading = "Quality")]
    pub(crate) text_context: Option<u32>,
    /// Questions with choices, as lines of JSON: {"question", "choices", "answer"}, HellaSwag's or ARC's; may be repeated
    #[arg(long, value_name = "PATH", help_heading = "Quality")]
    pub(crate) choices: Vec<PathBuf>,
    /// Of each file of choices, the first N [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Quality")]
    pub(crate) limit: Option<u32>,
    /// A prompt that both answer, greedily; may be repeated [default: three of our own]
    #[arg(long, value_name = "TEXT", help_heading = "Quality")]
    pub(crate) ask: Vec<String>,
    /// Tokens of an answer (0: ask nothing)
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Quality")]
    pub(crate) answer_tokens: u32,
    /// What an hour of this machine costs, in any currency
    #[arg(long, value_name = "PRICE", value_parser = parse_price, help_heading = "Cost")]
    pub(crate) price_per_hour: Option<f64>,
    /// What a kilowatt-hour costs: needs a machine that tells its energy
    #[arg(long, value_name = "PRICE", value_parser = parse_price, help_heading = "Cost")]
    pub(crate) price_per_kwh: Option<f64>,
    /// What a request is like, in tokens
    #[arg(long, value_name = "prompt=N,output=N", default_value = "prompt=2000,output=300", value_parser = parse_mix, help_heading = "Cost")]
    pub(crate) mix: Mix,
    /// Write a report: .html, .md or .json; may be repeated
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Vec<PathBuf>,
    /// Forget what an interrupted run of the same comparison measured
    #[arg(long)]
    pub(crate) restart: bool,
    /// What a process of ours that measures one thing is told
    #[arg(long, hide = true, value_name = "JSON")]
    pub(crate) measure: Option<String>,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    #[command(flatten)]
    pub(crate) attention: AttentionArgs,
}

/// `--mix`: tokens of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mix {
    pub(crate) prompt: u32,
    pub(crate) output: u32,
}

/// What is hidden, and asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum NeedleTask {
    /// One number
    Single,
    /// One of several numbers that differ by name
    MultiKey,
    /// All of several numbers of one name
    MultiValue,
    /// A number, through names that stand for names
    Variables,
    /// The text itself, word for word
    Copy,
    /// One number, after another was asked for and answered
    TwoTurn,
}

#[derive(Debug, Args)]
pub(crate) struct TrainRouter {
    /// A text to learn from; may be repeated
    #[arg(short, long, value_name = "PATH", required = true)]
    pub(crate) file: Vec<PathBuf>,
    /// Where the router goes
    #[arg(short, long, value_name = "FILE", default_value = "router.safetensors")]
    pub(crate) output: PathBuf,
    /// Tokens of a sequence; texts are cut into them [default: 4096, or the context if that is less]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(256..=1 << 20))]
    pub(crate) length: Option<u32>,
    /// Tokens of the sequences that a quarter of the texts is cut into [default: 16384, or the context if that is less]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(256..=1 << 20))]
    pub(crate) long: Option<u32>,
    /// Read each text once: half the time, but nothing is learnt of what a later question may need
    #[arg(long)]
    pub(crate) once: bool,
    /// The part of the tokens that the threshold is set for; the same flag chooses another at use [default: 0.5, or the
    /// threshold that published gates come with]
    #[arg(long, value_name = "F", value_parser = parse_fraction)]
    pub(crate) keep: Option<f32>,
    /// Train nothing: measure on the texts what published gates keep, and write those as a router. Fast KVzip's .pt, or
    /// the .safetensors of WG-KV
    #[arg(long, value_name = "FILE", conflicts_with_all = ["once", "long", "ridge", "kind"])]
    pub(crate) gates: Option<PathBuf>,
    /// What a gate is: one layer, solved at once, or two, learnt on from there
    #[arg(long, value_enum, default_value_t = GateKind::Linear)]
    pub(crate) kind: GateKind,
    /// Weight of the ridge, relative to the mean square of a feature
    #[arg(long, value_name = "F", default_value_t = 1e-3, hide_short_help = true)]
    pub(crate) ridge: f64,
    /// Newest tokens, which are always there
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) window: u32,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

/// What `train-router` makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum GateKind {
    Linear,
    Mlp,
}

/// Attention flags alone, as `--with` takes them.
#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct Setting {
    #[command(flatten)]
    attention: AttentionArgs,
}

impl AttentionArgs {
    /// No flag at all: the defaults.
    pub(crate) fn none() -> Self {
        Setting::parse_from(std::iter::empty::<&str>()).attention
    }
}

/// Makes one argument of the attention flags that follow a bare `--b`, so that other flags may come after them.
pub(crate) fn gather_flags_of_b(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let names: Vec<String> = Setting::command()
        .get_arguments()
        .flat_map(|arg| arg.get_long_and_visible_aliases().unwrap_or_default())
        .map(|name| format!("--{name}"))
        .collect();
    let mut args = args.into_iter().peekable();
    let mut out = Vec::new();
    while let Some(arg) = args.next() {
        let is_b = arg == "--b";
        out.push(arg);
        let mut flags: Vec<String> = Vec::new();
        while let Some(flag) = args.peek().filter(|_| is_b).and_then(|next| next.to_str()).map(str::to_string) {
            let (name, value) = flag.split_once('=').map_or((flag.as_str(), None), |(name, value)| (name, Some(value)));
            if !names.iter().any(|known| known == name) {
                break;
            }
            let has_value = value.is_some();
            args.next();
            flags.push(flag);
            if !has_value {
                flags.extend(args.next().map(|value| value.to_string_lossy().into_owned()));
            }
        }
        if !flags.is_empty() {
            out.push(flags.join(" ").into());
        }
    }
    out
}

fn parse_setting(text: &str) -> Result<AttentionArgs, String> {
    let setting = Setting::try_parse_from(text.split_whitespace()).map_err(|error| {
        let text = error.to_string();
        text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_string()
    })?;
    Ok(setting.attention)
}

#[derive(Debug, Args)]
pub(crate) struct Chat {
    /// Most tokens of one answer [default: until the model ends it]
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) max_tokens: Option<usize>,
    #[command(flatten)]
    pub(crate) template: TemplateArgs,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) attention: AttentionArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

fn parse_key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, _)) if matches!(key, "messages" | "add_generation_prompt" | "bos_token" | "eos_token") => {
            Err(format!("{key} is set by foveate"))
        }
        Some((key, value)) if !key.is_empty() => Ok((key.to_string(), value.to_string())),
        _ => Err("expected KEY=VALUE".to_string()),
    }
}

fn parse_budget(text: &str) -> Result<BudgetChoice, String> {
    let wrong = || format!("{text:?} is neither a number of tokens (2048) nor a part (12.5%)");
    match text.strip_suffix('%') {
        Some(part) => match part.trim().parse::<f32>() {
            Ok(part) if part > 0.0 && part <= 100.0 => Ok(BudgetChoice::Part(part / 100.0)),
            _ => Err(wrong()),
        },
        None => match text.parse::<usize>() {
            Ok(tokens @ 1..) => Ok(BudgetChoice::Tokens(tokens)),
            _ => Err(wrong()),
        },
    }
}

fn parse_factor(text: &str) -> Result<f32, String> {
    match text.trim().parse::<f32>() {
        Ok(factor) if factor > 0.0 && factor <= 1000.0 => Ok(factor),
        _ => Err(format!("{text:?} is not a number above 0")),
    }
}

fn parse_fraction(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(part) if (0.0..=1.0).contains(&part) => Ok(part),
        _ => Err(format!("{text:?} is not a number from 0 to 1")),
    }
}

fn parse_price(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(price) if price > 0.0 && price.is_finite() => Ok(price),
        _ => Err(format!("{text:?} is not a price above 0")),
    }
}

fn parse_mix(text: &str) -> Result<Mix, String> {
    let wrong = || format!("{text:?} is not of the form prompt=8000,output=500");
    let mut mix = Mix { prompt: 0, output: 0 };
    for part in text.split(',') {
        let (name, count) = part.split_once('=').ok_or_else(wrong)?;
        let count = count.trim().parse().map_err(|_| wrong())?;
        match name.trim() {
            "prompt" => mix.prompt = count,
            "output" => mix.output = count,
            _ => return Err(wrong()),
        }
    }
    if mix.prompt == 0 || mix.output == 0 { Err(wrong()) } else { Ok(mix) }
}

fn parse_memory(text: &str) -> Result<MemoryLimit, String> {
    let wrong = || format!("{text:?} is neither a size (512MiB, 10GiB) nor a part of what is free (80%)");
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..split].parse().map_err(|_| wrong())?;
    let scale = match text[split..].trim().to_lowercase().as_str() {
        "%" if number > 0.0 && number <= 100.0 => return Ok(MemoryLimit::Fraction(number / 100.0)),
        "" | "b" => 0,
        "k" | "kib" | "kb" => 10,
        "m" | "mib" | "mb" => 20,
        "g" | "gib" | "gb" => 30,
        "t" | "tib" | "tb" => 40,
        _ => return Err(wrong()),
    };
    Ok(MemoryLimit::Bytes((number * (1u64 << scale) as f64) as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn memory_limits_are_sizes_or_parts() {
        assert_eq!(parse_memory("10GiB"), Ok(MemoryLimit::Bytes(10 << 30)));
        assert_eq!(parse_memory("1.5g"), Ok(MemoryLimit::Bytes(3 << 29)));
        assert_eq!(parse_memory("80%"), Ok(MemoryLimit::Fraction(0.8)));
        for wrong in ["", "GiB", "0%", "120%", "5 apples", "-1GiB"] {
            assert!(parse_memory(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn budgets_are_tokens_or_parts() {
        assert_eq!(parse_budget("2048"), Ok(BudgetChoice::Tokens(2048)));
        assert_eq!(parse_budget("12.5%"), Ok(BudgetChoice::Part(0.125)));
        for wrong in ["", "0", "0%", "101%", "-5", "many", "NaN%"] {
            assert!(parse_budget(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_setting_is_attention_flags_and_no_others() {
        let setting = parse_setting("--attn routed --budget 512 --ctk q8_0").unwrap();
        assert_eq!((setting.attn, setting.cache_type_k), (AttentionChoice::Routed, Some(CacheType::Q8_0)));
        assert!(parse_setting("--budget 0").unwrap_err().contains("0"));
        assert!(parse_setting("--model x").is_err());
    }

    #[test]
    fn what_follows_b_is_its_attention_and_nothing_else() {
        let gather = |text: &str| -> Vec<String> {
            let args = gather_flags_of_b(text.split(' ').map(OsString::from));
            args.into_iter().map(|arg| arg.into_string().unwrap()).collect()
        };
        let args = gather("foveate compare x --b --attn dense --ctk=q8_0 --depth 0,4096 -o r.html");
        assert_eq!(args, ["foveate", "compare", "x", "--b", "--attn dense --ctk=q8_0", "--depth", "0,4096", "-o", "r.html"]);
        let Command::Compare(parsed) = Cli::try_parse_from(args).unwrap().command else { panic!("not compare") };
        assert_eq!(parsed.depth, [0, 4096]);
        assert_eq!(parsed.b_flags.unwrap().cache_type_k, Some(CacheType::Q8_0));
        // What is one argument already stays, and what is missing is missed by clap.
        assert_eq!(gather("compare x --attn routed --b"), ["compare", "x", "--attn", "routed", "--b"]);
        assert!(Cli::try_parse_from(gather("foveate compare x --b --depth 0")).is_err());
    }

    #[test]
    fn a_mix_names_both() {
        assert_eq!(parse_mix("prompt=8000,output=500"), Ok(Mix { prompt: 8000, output: 500 }));
        for wrong in ["", "8000,500", "prompt=1", "prompt=0,output=1", "prompt=1,output=x"] {
            assert!(parse_mix(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_template_argument_cannot_replace_what_we_set() {
        assert!(parse_key_value("messages=[]").is_err());
        assert_eq!(parse_key_value("a=b=c"), Ok(("a".into(), "b=c".into())));
    }
}
