//! Chat templates: the checkpoint's own Jinja, rendered with bounded work.

use crate::failure::Failure;
use anyhow::{Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Instructions and data a template may use: thousands of times what published ones need.
const FUEL: u64 = 20_000_000;
/// Longest template that is read, in bytes.
const MAX_BYTES: usize = 4 << 20;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Message {
    /// `system`, `user` or `assistant`.
    pub(crate) role: String,
    pub(crate) content: String,
}

impl Message {
    pub(crate) fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.to_string(), content: content.into() }
    }
}

/// A parsed template and the values it is given.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
    arguments: BTreeMap<String, Value>,
}

impl ChatTemplate {
    /// Parses `source`. `arguments` are the user's own values for what the template asks for.
    pub(crate) fn new(source: String, bos_token: String, eos_token: String, arguments: BTreeMap<String, Value>) -> Result<Self> {
        if source.len() > MAX_BYTES {
            return Err(Failure::malformed(format!("the chat template has {} bytes, expected at most {MAX_BYTES}", source.len())).into());
        }
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        // As transformers sets up its own.
        environment
            .set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().context("the chat template's syntax")?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned("chat", without_generation_tags(&source))
            .map_err(|error| Failure::malformed(format!("the chat template: {error}")).hint("--raw, or --chat-template FILE"))?;
        Ok(Self { environment, bos_token, eos_token, arguments })
    }

    /// The template of a directory in Hugging Face layout, if it has one, and the texts of the start and end tokens.
    pub(crate) fn read_directory(dir: &Path) -> Result<(Option<String>, String, String)> {
        let mut found = (None, String::new(), String::new());
        let config = dir.join("tokenizer_config.json");
        if config.is_file() {
            let text = std::fs::read_to_string(&config).with_context(|| config.display().to_string())?;
            let json: serde_json::Value =
                serde_json::from_str(&text).map_err(|error| Failure::malformed(format!("{}: {error}", config.display())))?;
            let token = |name: &str| match json.get(name) {
                Some(serde_json::Value::String(token)) => token.clone(),
                Some(object) => object.get("content").and_then(|content| content.as_str()).unwrap_or_default().to_string(),
                None => String::new(),
            };
            let template = match json.get("chat_template") {
                Some(serde_json::Value::String(template)) => Some(template.clone()),
                // Several named templates: the default one.
                Some(serde_json::Value::Array(named)) => named
                    .iter()
                    .find(|entry| entry.get("name").and_then(|name| name.as_str()) == Some("default"))
                    .and_then(|entry| entry.get("template")?.as_str().map(str::to_string)),
                _ => None,
            };
            found = (template, token("bos_token"), token("eos_token"));
        }
        let jinja = dir.join("chat_template.jinja");
        if jinja.is_file() {
            found.0 = Some(std::fs::read_to_string(&jinja).with_context(|| jinja.display().to_string())?);
        }
        Ok(found)
    }

    /// The conversation as the checkpoint wants to read it; `reply`: with the start of the model's turn.
    pub(crate) fn render(&self, messages: &[Message], reply: bool) -> Result<String> {
        let template = self.environment.get_template("chat").context("the chat template")?;
        let mut values: BTreeMap<String, Value> = self.arguments.clone();
        let ours = [
            ("messages", Value::from(Serde(messages))),
            ("add_generation_prompt", Value::from(reply)),
            ("bos_token", Value::from(self.bos_token.as_str())),
            ("eos_token", Value::from(self.eos_token.as_str())),
        ];
        for (name, value) in ours {
            values.insert(name.to_string(), value);
        }
        template.render(Value::from_pairs(values)).map_err(|error| {
            let what = match error.kind() {
                ErrorKind::OutOfFuel => format!("the chat template does not end: it used up {FUEL} steps"),
                _ => format!(
                    "the chat template refuses this conversation: {}",
                    error.detail().map_or_else(|| error.to_string(), str::to_string)
                ),
            };
            Failure::malformed(what).hint("--raw, or --chat-template FILE").into()
        })
    }
}

/// `{% generation %}` marks what a trainer learns from; it renders as its content.
fn without_generation_tags(source: &str) -> String {
    let mut out = source.to_string();
    for (open, close) in [("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")] {
        for (tag, plain) in [("generation", "if true"), ("endgeneration", "endif")] {
            out = out.replace(&format!("{open} {tag} {close}"), &format!("{open} {plain} {close}"));
        }
    }
    out
}

/// Today, in the `strftime` format that templates use (Llama 3: `%d %b %Y`).
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let wrong = |error: String| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}"));
    let now = time::OffsetDateTime::now_local().unwrap_or_else(|_| time::OffsetDateTime::now_utc());
    let parsed = time::format_description::parse_strftime_borrowed(format).map_err(|error| wrong(error.to_string()))?;
    now.format(&parsed).map_err(|error| wrong(error.to_string()))
}
