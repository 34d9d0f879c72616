//! `foveate chat`: a conversation whose history stays in the key/value cache.

use super::input::read_file;
use super::reply::{Reply, kv_use, reply};
use crate::args::Chat;
use crate::engine::{Checkpoint, Engine, chat_prompt};
use crate::failure::{Failure, Kind, unexpected};
use crate::interrupt::Interrupt;
use crate::source::Hub;
use crate::text::{ChatTemplate, Message};
use crate::ui::{Ui, bytes, stdout};
use anyhow::{Context, Result};
use model::message;
use model::{FinishReason, GenerateOptions, Sampler, SamplerOptions, Session};
use rustyline::error::ReadlineError;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;

const HELP: &str = "\
  /help                this list              /clear           forget the conversation
  /regen               another answer         /system TEXT     set the system message (no TEXT: none)
  /read FILE           put a file before your next message
  /save FILE  /load FILE                      the conversation as JSON
  /set NAME VALUE      temp, top-k, top-p, min-p, repeat-penalty, presence-penalty, frequency-penalty, seed, max-tokens
  /show [prompt|stats|settings]               /bye             leave (Ctrl-D)
  \"\"\" ... \"\"\" for several lines; Ctrl-C stops an answer and keeps what was said";

/// Tokens that are set aside at first; the cache grows when a conversation does.
const FIRST_CAPACITY: usize = 2048;

pub(crate) fn run(args: &Chat, hub: &Hub, ui: Ui, interrupt: &Interrupt) -> Result<u8> {
    if ui.json {
        return Err(Failure::new(Kind::Usage, "chat has no JSON form").hint("foveate generate --json").into());
    }
    let checkpoint = Checkpoint::open(&args.model, &args.template, &args.attention, hub)?;
    let options = checkpoint.sampler_options(&args.sampling)?;
    let context = checkpoint.context(&args.model, ui)?;
    if checkpoint.template.is_none() {
        ui.say("this model has no chat template: it continues your text as it stands (a base model, perhaps)");
    }
    let engine = checkpoint.load(context, &args.model)?;
    ui.say(format!("{} · seed {}", engine.banner(context), options.seed));
    let session = engine.session(FIRST_CAPACITY.min(context))?;
    let mut chat = Conversation {
        sampler: Sampler::new(options.clone()).map_err(|error| Failure::new(Kind::Usage, message(&error)))?,
        engine: &engine,
        session,
        options,
        context,
        max_tokens: args.max_tokens,
        stops: args.sampling.stop.clone(),
        messages: args.template.system.iter().map(|text| Message::new("system", text)).collect(),
        attached: String::new(),
        known: None,
        turn: None,
        show_prompt: args.template.show_prompt,
        ui,
        interrupt,
    };
    let mut input = Input::new()?;
    if input.is_terminal() {
        ui.say("Type /help for commands, Ctrl-C stops an answer, Ctrl-D leaves.");
    }
    while let Some(line) = input.message()? {
        interrupt.clear();
        match chat.handle(&line) {
            Ok(true) => {}
            Ok(false) => break,
            // What went wrong with one message leaves the conversation as it was.
            Err(error) if error.downcast_ref::<Failure>().is_some_and(|failure| failure.kind != Kind::Unexpected) => {
                crate::failure::report(&error, false);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(0)
}

/// Where the last answer began.
#[derive(Debug, Clone)]
struct Turn {
    prompt_tokens: usize,
    prompt_text: String,
}

struct Conversation<'a> {
    engine: &'a Engine,
    session: Session,
    sampler: Sampler,
    options: SamplerOptions,
    context: usize,
    max_tokens: Option<usize>,
    stops: Vec<String>,
    messages: Vec<Message>,
    /// Files that go before the next message.
    attached: String,
    /// What the session's tokens say, as text: while the next prompt begins with it, only the rest is computed.
    known: Option<String>,
    turn: Option<Turn>,
    show_prompt: bool,
    ui: Ui,
    interrupt: &'a Interrupt,
}

impl Conversation<'_> {
    /// Answers a message or obeys a command. `false`: leave.
    fn handle(&mut self, line: &str) -> Result<bool> {
        let Some(command) = line.strip_prefix('/') else {
            if !line.trim().is_empty() {
                self.say_and_answer(line)?;
            }
            return Ok(true);
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match name {
            "bye" | "quit" | "exit" => return Ok(false),
            "help" | "?" => self.ui.say(HELP),
            "clear" => self.clear()?,
            "regen" => self.regenerate()?,
            "system" => self.set_system(rest)?,
            "read" => self.read(rest)?,
            "save" => self.save(rest)?,
            "load" => self.load(rest)?,
            "set" => self.set(rest)?,
            "show" => self.show(rest)?,
            _ => return Err(usage(format!("no command /{name}"), "/help, or a space before a message that begins with /")),
        }
        Ok(true)
    }

    fn say_and_answer(&mut self, text: &str) -> Result<()> {
        let content = format!("{}{text}", self.attached);
        self.messages.push(Message::new("user", content));
        match self.answer() {
            Ok(()) => {
                self.attached.clear();
                Ok(())
            }
            Err(error) => {
                self.messages.pop();
                Err(error)
            }
        }
    }

    /// Computes what is new of the prompt, and answers it.
    fn answer(&mut self) -> Result<()> {
        let (prompt_text, new_ids) = self.next_prompt()?;
        let total = self.session.tokens().len() + new_ids.len();
        if total >= self.context {
            let what = "the conversation does not fit the context";
            let why = format!("{total} tokens + an answer > ctx {} (nothing was cut)", self.context);
            return Err(Failure::new(Kind::ContextOverflow, what).why(why).hint("/save FILE, then /clear; or a larger -c").into());
        }
        if self.show_prompt {
            self.ui.say(format!("prompt: {prompt_text:?}\n{} tokens are new, {} are in the cache", new_ids.len(), self.session.cached()));
        }
        self.turn = Some(Turn { prompt_tokens: total, prompt_text });
        self.reply_to(&new_ids)
    }

    /// The whole prompt's text, and the ids that the session lacks; goes back where the two part.
    fn next_prompt(&mut self) -> Result<(String, Vec<u32>)> {
        let checkpoint = &self.engine.checkpoint;
        let Some(template) = &checkpoint.template else { return self.next_raw_prompt() };
        if let Some(known) = &self.known {
            let text = template.render(&self.messages, true)?;
            if let Some(new) = text.strip_prefix(known.as_str()) {
                let last = self.messages.last().map_or("", |message| message.content.as_str());
                let ids = checkpoint.tokenizer.encode_chat(new, &[last])?;
                return Ok((text, ids));
            }
        }
        let (text, ids) = chat_prompt(checkpoint, template, &self.messages)?;
        let shared = ids.iter().zip(self.session.tokens()).take_while(|(a, b)| a == b).count();
        // At least one token has to be computed, or there are no logits.
        let kept = self.session.rewind(shared.min(ids.len().saturating_sub(1))).map_err(unexpected)?;
        Ok((text, ids[kept..].to_vec()))
    }

    /// Without a template the conversation is one running text.
    fn next_raw_prompt(&mut self) -> Result<(String, Vec<u32>)> {
        let tokenizer = &self.engine.checkpoint.tokenizer;
        let text: String = self.messages.iter().map(|message| message.content.as_str()).collect();
        if let Some(new) = self.known.as_ref().and_then(|known| text.strip_prefix(known.as_str())) {
            let ids = tokenizer.encode(new, false)?;
            return Ok((text, ids));
        }
        self.session.rewind(0).map_err(unexpected)?;
        let ids = tokenizer.encode(&text, true)?;
        Ok((text, ids))
    }

    fn reply_to(&mut self, new_ids: &[u32]) -> Result<()> {
        self.known = None; // until the answer is whole
        let options = GenerateOptions {
            max_tokens: self.max_tokens,
            end_tokens: self.engine.checkpoint.end_tokens(),
            context: self.context,
            logprobs: 0,
        };
        let answer =
            reply(self.engine, &mut self.session, new_ids, &mut self.sampler, &self.stops, options, self.ui, self.interrupt, |text, _| {
                stdout(text)
            })?;
        if !answer.text.ends_with('\n') {
            stdout("\n")?;
        }
        self.remember(&answer);
        self.messages.push(Message::new("assistant", answer.text.clone()));
        self.report(&answer);
        self.interrupt.clear();
        Ok(())
    }

    /// Notes what the session holds now, unless its tokens say more than the text (a stop string).
    fn remember(&mut self, answer: &Reply) {
        let ended = answer.tokens.last().filter(|token| token.is_end);
        let stopped_by_string = answer.finish == FinishReason::Stop && ended.is_none();
        let whole = answer.finish != FinishReason::Interrupt || !answer.tokens.is_empty();
        if let (Some(turn), false, true) = (&self.turn, stopped_by_string, whole) {
            let end = ended.map_or_else(String::new, |token| self.engine.checkpoint.tokenizer.token(token.id));
            self.known = Some(format!("{}{}{end}", turn.prompt_text, answer.text));
        }
    }

    fn report(&self, answer: &Reply) {
        match answer.finish {
            FinishReason::Interrupt => self.ui.say(format!("[stopped: kept {} tokens]", answer.tokens.len())),
            FinishReason::Overflow => self.ui.say("[the context is full: /save FILE, then /clear]"),
            FinishReason::Length => self.ui.say(format!("[cut after {} tokens]", answer.tokens.len())),
            FinishReason::Stop => {}
        }
        self.ui.say(format!(
            "{} new in · {} out · ttft {:.2} s · {:.1} t/s · context {} / {}",
            answer.prompt_tokens,
            answer.tokens.len(),
            answer.prefill.as_secs_f64(),
            answer.decode_rate(),
            self.session.tokens().len(),
            self.context
        ));
    }

    fn clear(&mut self) -> Result<()> {
        self.messages.retain(|message| message.role == "system");
        self.attached.clear();
        self.begin_again()?;
        self.ui.say("cleared");
        Ok(())
    }

    fn regenerate(&mut self) -> Result<()> {
        let (Some(turn), Some("assistant")) = (self.turn.clone(), self.messages.last().map(|message| message.role.as_str())) else {
            return Err(usage("there is no answer to make again".to_string(), "say something first"));
        };
        self.messages.pop();
        let prompt = self.session.tokens()[..turn.prompt_tokens].to_vec();
        // One token is computed again, or all where a sliding layer forgot.
        let kept = self.session.rewind(turn.prompt_tokens - 1).map_err(unexpected)?;
        self.reply_to(&prompt[kept..])
    }

    fn set_system(&mut self, text: &str) -> Result<()> {
        self.messages.retain(|message| message.role != "system");
        if !text.is_empty() {
            self.messages.insert(0, Message::new("system", text));
        }
        self.begin_again()?;
        self.ui.say("the system message is set; the conversation is read again with your next message");
        Ok(())
    }

    /// Forgets what was read, with a session that keeps all of the system message there is now.
    fn begin_again(&mut self) -> Result<()> {
        let system = self.messages.iter().find(|message| message.role == "system");
        let checkpoint = &self.engine.checkpoint;
        let attention =
            system.map_or_else(|| Ok(checkpoint.attention.clone()), |system| checkpoint.attention_protecting(&system.content))?;
        self.session = self.engine.session_with(attention, FIRST_CAPACITY.min(self.context))?;
        (self.known, self.turn) = (None, None);
        Ok(())
    }

    fn read(&mut self, path: &str) -> Result<()> {
        let text = read_file(Path::new(path))?;
        let tokens = self.engine.checkpoint.tokenizer.encode(&text, false)?.len();
        self.attached.push_str(&format!("{path}:\n\n{text}\n\n"));
        self.ui.say(format!("read {path}: {tokens} tokens, context {} / {}", self.session.tokens().len() + tokens, self.context));
        Ok(())
    }

    fn save(&self, path: &str) -> Result<()> {
        if path.is_empty() {
            return Err(usage("/save wants a file".to_string(), "/save talk.json"));
        }
        let saved = Saved { schema: SCHEMA.to_string(), model: self.engine.checkpoint.located.id.clone(), messages: self.messages.clone() };
        let text = serde_json::to_string_pretty(&saved)?;
        // Whole or not at all: written beside it, then renamed.
        let (path, partial) = (Path::new(path), format!("{path}.partial"));
        let write = || -> std::io::Result<()> {
            let mut file = std::fs::File::create(&partial)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&partial, path)
        };
        write().map_err(|error| Failure::new(Kind::Disk, format!("{}: {error}", path.display())))?;
        self.ui.say(format!("saved {} messages to {}", self.messages.len(), path.display()));
        Ok(())
    }

    fn load(&mut self, path: &str) -> Result<()> {
        let text = read_file(Path::new(path))?;
        let saved: Saved =
            serde_json::from_str(&text).map_err(|error| Failure::malformed(format!("{path}: {error}")).hint("a file of /save"))?;
        if saved.schema != SCHEMA || saved.messages.iter().any(|message| !matches!(message.role.as_str(), "system" | "user" | "assistant"))
        {
            return Err(Failure::malformed(format!(
                "{path}: schema {:?}, expected {SCHEMA:?} and roles system, user, assistant",
                saved.schema
            ))
            .into());
        }
        self.messages = saved.messages;
        self.attached.clear();
        self.begin_again()?;
        let other = if saved.model == self.engine.checkpoint.located.id { String::new() } else { format!(", had with {}", saved.model) };
        self.ui.say(format!("loaded {} messages{other}; they are read with your next message", self.messages.len()));
        Ok(())
    }

    fn set(&mut self, words: &str) -> Result<()> {
        let Some((name, value)) = words.split_once(char::is_whitespace).map(|(name, value)| (name, value.trim())) else {
            return Err(usage("/set wants a name and a value".to_string(), "/set temp 0.5"));
        };
        let mut options = self.options.clone();
        match name {
            "temp" => options.temperature = number(name, value)?,
            "top-k" => options.top_k = number(name, value)?,
            "top-p" => options.top_p = number(name, value)?,
            "min-p" => options.min_p = number(name, value)?,
            "repeat-penalty" => options.repeat_penalty = number(name, value)?,
            "presence-penalty" => options.presence_penalty = number(name, value)?,
            "frequency-penalty" => options.frequency_penalty = number(name, value)?,
            "seed" => options.seed = number(name, value)?,
            "max-tokens" => {
                self.max_tokens = Some(number(name, value)?);
                return Ok(());
            }
            _ => return Err(usage(format!("no setting {name}"), "/help lists them")),
        }
        self.sampler = Sampler::new(options.clone()).map_err(|error| Failure::new(Kind::Usage, message(&error)))?;
        self.options = options;
        Ok(())
    }

    fn show(&mut self, what: &str) -> Result<()> {
        match what {
            "prompt" => {
                let text = match &self.engine.checkpoint.template {
                    Some(template) => ChatTemplate::render(template, &self.messages, false)?,
                    None => self.messages.iter().map(|message| message.content.as_str()).collect(),
                };
                self.ui.say(text);
            }
            "stats" => self.ui.say(format!(
                "context {} / {} · {} in the cache · KV {} · weights {}",
                self.session.tokens().len(),
                self.context,
                self.session.cached(),
                kv_use(&mut self.session)?,
                bytes(self.engine.plan.weights)
            )),
            "" | "settings" => {
                let o = &self.options;
                let most = self.max_tokens.map_or_else(|| "none".to_string(), |most| most.to_string());
                self.ui.say(format!(
                    "temp {} · top-k {} · top-p {} · min-p {} · repeat-penalty {} · presence-penalty {} · frequency-penalty {} · seed {} · max-tokens {most}",
                    o.temperature, o.top_k, o.top_p, o.min_p, o.repeat_penalty, o.presence_penalty, o.frequency_penalty, o.seed
                ));
            }
            _ => return Err(usage(format!("nothing called {what} to show"), "/show prompt, stats or settings")),
        }
        Ok(())
    }
}

const SCHEMA: &str = "foveate.chat/1";

/// A conversation in a file.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    schema: String,
    model: String,
    messages: Vec<Message>,
}

fn usage(what: String, hint: &str) -> anyhow::Error {
    Failure::new(Kind::Usage, what).hint(hint).into()
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T> {
    value.parse().map_err(|_| usage(format!("{name} cannot be {value:?}"), "a number"))
}

/// Messages from a terminal, with line editing, or from a pipe, a line each.
enum Input {
    Terminal(Box<rustyline::DefaultEditor>),
    Pipe(std::io::StdinLock<'static>),
}

impl Input {
    fn new() -> Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Self::Pipe(std::io::stdin().lock()));
        }
        // The prompt goes to the terminal itself: standard output is for answers.
        let config = rustyline::Config::builder().behavior(rustyline::Behavior::PreferTerm).auto_add_history(true).build();
        Ok(Self::Terminal(Box::new(rustyline::DefaultEditor::with_config(config).context("opening the terminal")?)))
    }

    fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next line; `None` at the end.
    fn line(&mut self, prompt: &str) -> Result<Option<String>> {
        match self {
            Self::Terminal(editor) => loop {
                match editor.readline(prompt) {
                    Ok(line) => return Ok(Some(line)),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(ReadlineError::Interrupted) => eprintln!("(Ctrl-D or /bye leaves)"),
                    Err(error) => return Err(error).context("reading the terminal"),
                }
            },
            Self::Pipe(pipe) => {
                let mut bytes = Vec::new();
                if pipe.read_until(b'\n', &mut bytes)? == 0 {
                    return Ok(None);
                }
                let line = String::from_utf8(bytes).map_err(|_| Failure::malformed("standard input is not UTF-8"))?;
                Ok(Some(line.trim_end_matches(['\n', '\r']).to_string()))
            }
        }
    }

    /// The next message: a line, or several between `"""`.
    fn message(&mut self) -> Result<Option<String>> {
        let Some(first) = self.line("> ")? else { return Ok(None) };
        let Some(mut text) = first.trim_start().strip_prefix("\"\"\"").map(str::to_string) else { return Ok(Some(first)) };
        while !text.trim_end().ends_with("\"\"\"") {
            let Some(next) = self.line(". ")? else { break };
            text.push('\n');
            text.push_str(&next);
        }
        let text = text.trim_end();
        Ok(Some(text.strip_suffix("\"\"\"").unwrap_or(text).trim_matches('\n').to_string()))
    }
}
