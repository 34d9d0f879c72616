//! A tokenizer rebuilt from the metadata of a GGUF file.

use super::sentencepiece;
use anyhow::{Context, Result, bail, ensure};
use model::weights::gguf::{GgufFile, Value};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer};

/// llama.cpp's token types.
const CONTROL: i128 = 3;
const USER_DEFINED: i128 = 4;

/// The published splitting patterns, from the checkpoints' own `tokenizer.json`.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The vocabulary arrays of a file, checked to be of one length.
pub(super) struct Vocabulary<'a> {
    pub(super) tokens: &'a [String],
    pub(super) types: Vec<i128>,
}

/// Rebuilds the tokenizer of `file`.
pub(super) fn load(file: &GgufFile) -> Result<Tokenizer> {
    let vocabulary = Vocabulary::read(file)?;
    let model = file.string("tokenizer.ggml.model")?;
    let mut tokenizer = match model {
        "gpt2" => byte_level_bpe(file, &vocabulary)?,
        "llama" => sentencepiece::load(file, &vocabulary)?,
        other => bail!("tokenizer.ggml.model is {other:?}, which is not supported (gpt2 and llama are)"),
    };
    let of_type =
        |wanted: i128| vocabulary.tokens.iter().zip(&vocabulary.types).filter(move |(token, kind)| **kind == wanted && !token.is_empty());
    let added = |(token, _): (&String, &i128), special| AddedToken::from(token.clone(), special).normalized(false);
    tokenizer.add_special_tokens(of_type(CONTROL).map(|token| added(token, true))).map_err(anyhow::Error::msg)?;
    tokenizer.add_tokens(of_type(USER_DEFINED).map(|token| added(token, false))).map_err(anyhow::Error::msg)?;
    Ok(tokenizer)
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a GgufFile) -> Result<Self> {
        let tokens = file.optional_strings("tokenizer.ggml.tokens")?.context("metadata key tokenizer.ggml.tokens is missing")?;
        ensure!(!tokens.is_empty(), "tokenizer.ggml.tokens is empty");
        let types = match file.get("tokenizer.ggml.token_type") {
            None => vec![1; tokens.len()],
            Some(Value::Array(types)) if types.len() == tokens.len() => {
                types.iter().map(|kind| if let Value::Integer(kind) = kind { *kind } else { 1 }).collect()
            }
            Some(_) => bail!("tokenizer.ggml.token_type is not an array of {} numbers, one for each token", tokens.len()),
        };
        Ok(Self { tokens, types })
    }

    /// Token to id; of equal tokens the first counts.
    pub(super) fn ids(&self) -> impl Iterator<Item = (String, u32)> {
        self.tokens.iter().enumerate().rev().map(|(id, token)| (token.clone(), id as u32))
    }
}

fn byte_level_bpe(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Tokenizer> {
    let merges = file.optional_strings("tokenizer.ggml.merges")?.context("metadata key tokenizer.ggml.merges is missing")?;
    let merges = merges
        .iter()
        .enumerate()
        .map(|(i, merge)| match merge.split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.is_empty() => Ok((left.to_string(), right.to_string())),
            _ => bail!("tokenizer.ggml.merges[{i}] is {merge:?}, expected two tokens with a space between"),
        })
        .collect::<Result<Vec<_>>>()?;
    let pre = file.optional_string("tokenizer.ggml.pre")?.unwrap_or("default");
    let llama3 = matches!(pre, "llama-bpe" | "llama3" | "llama-v3");
    let bpe = BPE::builder().vocab_and_merges(vocabulary.ids().collect::<Vocab>(), merges).ignore_merges(llama3).build();
    let mut tokenizer = Tokenizer::new(bpe.map_err(anyhow::Error::msg).context("tokenizer.ggml.merges")?);
    let split = |pattern: &str| -> Result<PreTokenizerWrapper> {
        let split = Split::new(SplitPattern::Regex(pattern.to_string()), SplitDelimiterBehavior::Isolated, false);
        Ok(split.map_err(anyhow::Error::msg)?.into())
    };
    let bytes = |use_regex| PreTokenizerWrapper::from(ByteLevel::new(false, false, use_regex));
    let steps = match pre {
        "smollm" => vec![Digits::new(true).into(), bytes(true)],
        "qwen2" => vec![split(QWEN2)?, bytes(false)],
        _ if llama3 => vec![split(LLAMA3)?, bytes(false)],
        "default" | "gpt-2" | "gpt2" => vec![bytes(true)],
        other => bail!("tokenizer.ggml.pre is {other:?}, which is not supported (smollm, qwen2, llama-bpe, llama3 and default are)"),
    };
    tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
    tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
    if pre == "qwen2" {
        tokenizer.with_normalizer(Some(NFC)).map_err(anyhow::Error::msg)?;
    }
    Ok(tokenizer)
}
