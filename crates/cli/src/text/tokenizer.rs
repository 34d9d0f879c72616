//! The tokenizer of a checkpoint, and what its files say of special tokens.

use super::gguf_tokenizer;
use crate::failure::Failure;
use anyhow::{Context, Result, anyhow};
use model::weights::gguf::GgufFile;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::OnceLock;
use tokenizers::{AddedToken, Tokenizer};

/// Encodes and decodes. Cheap to keep, not to make: a big vocabulary takes a second.
#[derive(Debug)]
pub(crate) struct TextTokenizer {
    inner: Tokenizer,
    /// The same, but special tokens in the text are spelled out instead of recognised; made when such a text comes, for a copy takes tens of
    /// megabytes.
    literal: OnceLock<Box<Tokenizer>>,
    specials: Vec<String>,
    bos: Option<u32>,
    adds_bos: AddsBos,
}

/// Who puts the token that starts a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AddsBos {
    /// The library's post-processor, as `tokenizer.json` says.
    PostProcessor,
    /// We do.
    Us,
    Nobody,
}

impl TextTokenizer {
    /// From the metadata of a GGUF file.
    pub(crate) fn from_gguf(file: &GgufFile) -> Result<Self> {
        let inner = contain("the tokenizer", || gguf_tokenizer::load(file))?;
        let bos = file.optional_id("tokenizer.ggml.bos_token_id")?;
        let llama = file.optional_string("tokenizer.ggml.model")? == Some("llama");
        let adds = file.optional_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(llama || is_llama3(file)?);
        Ok(Self::new(inner, bos, if adds && bos.is_some() { AddsBos::Us } else { AddsBos::Nobody }))
    }

    /// From `tokenizer.json`.
    pub(crate) fn from_file(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| {
            let hint = "a checkpoint without tokenizer.json cannot be read: look for a GGUF of it, which carries its own";
            Failure::malformed(format!("{}: {error}", path.display())).hint(hint)
        })?;
        let inner = contain("tokenizer.json", || Tokenizer::from_bytes(&bytes).map_err(|error| anyhow!("{error}")))
            .with_context(|| path.display().to_string())?;
        Ok(Self::new(inner, None, AddsBos::PostProcessor))
    }

    fn new(mut inner: Tokenizer, bos: Option<u32>, adds_bos: AddsBos) -> Self {
        // A published file may carry the limits of a training run: nothing is ever cut silently.
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        let specials =
            inner.get_added_tokens_decoder().into_values().filter(|token: &AddedToken| token.special).map(|token| token.content).collect();
        Self { inner, literal: OnceLock::new(), specials, bos, adds_bos }
    }

    /// Number of ids.
    pub(crate) fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Ids of a whole prompt: special tokens in it are recognised, and the checkpoint's own start token is
    /// put before it if `add_special`.
    pub(crate) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let by_library = add_special && self.adds_bos == AddsBos::PostProcessor;
        let mut ids = Self::ids(&self.inner, text, by_library)?;
        if let (true, AddsBos::Us, Some(bos)) = (add_special, self.adds_bos, self.bos)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Ids of a rendered chat prompt. What `contents` holds came from outside: control tokens spelled in it stay
    /// text, or a document could speak in the model's or the system's name.
    pub(crate) fn encode_chat(&self, rendered: &str, contents: &[&str]) -> Result<Vec<u32>> {
        if !contents.iter().any(|content| self.specials.iter().any(|special| content.contains(special.as_str()))) {
            return Self::ids(&self.inner, rendered, false);
        }
        let (mut ids, mut rest) = (Vec::new(), rendered);
        for content in contents.iter().map(|content| content.trim()).filter(|content| !content.is_empty()) {
            // Templates print contents in order, at most trimmed; one that does not is encoded as it stands.
            let Some(at) = rest.find(content) else { continue };
            ids.extend(Self::ids(&self.inner, &rest[..at], false)?);
            ids.extend(Self::ids(self.literal(), content, false)?);
            rest = &rest[at + content.len()..];
        }
        ids.extend(Self::ids(&self.inner, rest, false)?);
        Ok(ids)
    }

    fn literal(&self) -> &Tokenizer {
        self.literal.get_or_init(|| {
            let mut literal = Box::new(self.inner.clone());
            literal.set_encode_special_tokens(true);
            literal
        })
    }

    fn ids(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>> {
        if text.is_empty() && !add_special {
            return Ok(Vec::new());
        }
        contain("encoding the text", || tokenizer.encode_fast(text, add_special).map_err(|error| anyhow!("{error}")))
            .map(|e| e.get_ids().to_vec())
    }

    /// Text of `ids`; control tokens are left out.
    pub(crate) fn decode(&self, ids: &[u32]) -> Result<String> {
        contain("decoding", || self.inner.decode(ids, true).map_err(|error| anyhow!("{error}")))
    }

    /// One token as it is spelled, control tokens included.
    pub(crate) fn token(&self, id: u32) -> String {
        match self.inner.decode(&[id], false) {
            Ok(text) if !text.is_empty() => text,
            _ => self.inner.id_to_token(id).unwrap_or_else(|| format!("<{id}>")),
        }
    }
}

/// Llama 3's vocabulary starts its sequences, though older files do not say so.
fn is_llama3(file: &GgufFile) -> Result<bool> {
    Ok(matches!(file.optional_string("tokenizer.ggml.pre")?, Some("llama-bpe" | "llama3" | "llama-v3")))
}

/// The library panics on some crafted files (tokenizers#2094): such a file is damaged, and no more.
fn contain<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    crate::failure::quietly(|| catch_unwind(AssertUnwindSafe(work)))
        .unwrap_or_else(|_| Err(Failure::malformed(format!("{what}: the vocabulary or its merges are damaged")).into()))
}
