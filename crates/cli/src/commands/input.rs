//! Text of the user's: prompts, files and pipes.

use crate::args::{PromptArgs, TemplateArgs};
use crate::engine::{Checkpoint, chat_prompt};
use crate::failure::{Failure, Kind};
use crate::text::Message;
use crate::ui::{Ui, bytes};
use anyhow::Result;
use std::io::{IsTerminal, Read};
use std::path::Path;

/// Longest prompt that is read: some 50 million tokens.
const MAX_PROMPT_BYTES: u64 = 256 << 20;

/// All of standard input.
pub(super) fn read_stdin() -> Result<String> {
    read_text(std::io::stdin(), "standard input")
}

/// All of `source`, unless it does not end.
fn read_text(source: impl Read, name: &str) -> Result<String> {
    let mut content = Vec::new();
    source
        .take(MAX_PROMPT_BYTES + 1)
        .read_to_end(&mut content)
        .map_err(|error| Failure::new(Kind::NotFound, format!("{name}: {error}")))?;
    if content.len() as u64 > MAX_PROMPT_BYTES {
        return Err(
            Failure::new(Kind::Usage, format!("{name} holds more than {}, too much for any context", bytes(MAX_PROMPT_BYTES))).into()
        );
    }
    decode(content, name)
}

/// A text file of the user's, UTF-8 or UTF-16 with a byte order mark.
pub(super) fn read_file(path: &Path) -> Result<String> {
    let name = path.display().to_string();
    if path.is_dir() {
        return Err(Failure::new(Kind::NotFound, format!("{name} is a directory, expected a text file")).into());
    }
    read_text(std::fs::File::open(path).map_err(|error| Failure::new(Kind::NotFound, format!("{name}: {error}")))?, &name)
}

fn decode(bytes: Vec<u8>, name: &str) -> Result<String> {
    let wide = |bytes: &[u8], unit: fn([u8; 2]) -> u16| {
        let units: Vec<u16> = bytes.chunks_exact(2).map(|pair| unit([pair[0], pair[1]])).collect();
        String::from_utf16(&units).map_err(|error| Failure::malformed(format!("{name}: UTF-16 by its first bytes, but {error}")).into())
    };
    match bytes.as_slice() {
        [0xff, 0xfe, rest @ ..] => wide(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => wide(rest, u16::from_be_bytes),
        [0xef, 0xbb, 0xbf, ..] | [..] => {
            let text = String::from_utf8(bytes).map_err(|error| {
                let at = error.utf8_error().valid_up_to();
                Failure::malformed(format!("{name} is not text: byte {at} is not UTF-8"))
                    .hint("convert it first, e.g. iconv -f latin1 -t utf-8")
            })?;
            Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text))
        }
    }
}

/// The prompt: file first, then text; a pipe if neither is given. `None`: it is given as ids.
pub(super) fn prompt_text(args: &PromptArgs) -> Result<Option<String>> {
    if !args.prompt_ids.is_empty() {
        return Ok(None);
    }
    let text = args.prompt.as_ref().or(args.positional.as_ref());
    let piped = || !std::io::stdin().is_terminal();
    let file = match (&args.file, text) {
        (Some(path), _) if path == Path::new("-") => Some(read_stdin()?),
        (Some(path), _) => Some(read_file(path)?),
        (None, Some(text)) if text == "-" => return read_stdin().map(Some),
        (None, None) if piped() => Some(read_stdin()?),
        (None, None) => {
            return Err(Failure::new(Kind::Usage, "no prompt")
                .hint("foveate generate \"The capital of France is\", or -f FILE, or a pipe")
                .into());
        }
        (None, Some(_)) => None,
    };
    let prompt = match (file, text) {
        (Some(file), Some(text)) => format!("{file}\n{text}"),
        (Some(file), None) => file,
        (None, text) => text.cloned().unwrap_or_default(),
    };
    if prompt.is_empty() {
        return Err(Failure::new(Kind::Usage, "the prompt is empty").into());
    }
    Ok(Some(prompt))
}

pub(super) fn prompt_ids(
    args: &PromptArgs,
    text: Option<&str>,
    template: &TemplateArgs,
    checkpoint: &Checkpoint,
    ui: Ui,
) -> Result<Vec<u32>> {
    let vocab_size = checkpoint.config().vocab_size;
    if let Some(id) = args.prompt_ids.iter().find(|id| **id as usize >= vocab_size) {
        return Err(Failure::new(Kind::Usage, format!("--prompt-ids: {id} is beyond the vocabulary of {vocab_size}")).into());
    }
    let Some(text) = text else { return Ok(args.prompt_ids.clone()) };
    let own = if args.raw { None } else { checkpoint.template.as_ref() };
    let (shown, ids) = match own {
        Some(own) => {
            let system = template.system.iter().map(|text| Message::new("system", text));
            let messages: Vec<Message> = system.chain([Message::new("user", text)]).collect();
            chat_prompt(checkpoint, own, &messages)?
        }
        None => {
            if !args.raw {
                ui.say("this model has no chat template: it continues the text as it stands (--raw says so)");
            }
            if template.system.is_some() {
                ui.warn("--system is ignored: there is no chat template to put it in");
            }
            (text.to_string(), checkpoint.tokenizer.encode(text, !args.no_bos)?)
        }
    };
    if template.show_prompt {
        ui.say(format!("prompt: {shown:?}\n{} tokens: {ids:?}", ids.len()));
    }
    if args.file.is_some() {
        ui.say(format!("read {} tokens", ids.len()));
    }
    Ok(ids)
}
