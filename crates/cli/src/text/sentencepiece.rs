//! SentencePiece BPE (Mistral, Llama 2, Gemma) as the merge list that the tokenizers library wants.
//!
//! A SentencePiece model stores a score for each piece and always merges the neighbours whose union has the
//! highest. That is a BPE whose merges are all ways to split a piece into two pieces, best score first.

use super::gguf_tokenizer::Vocabulary;
use anyhow::{Context, Result, bail};
use model::weights::gguf::{GgufFile, Value};
use std::collections::HashMap;
use tokenizers::Tokenizer;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

pub(super) fn load(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Tokenizer> {
    let scores = scores(file, vocabulary.tokens.len())?;
    let ids: HashMap<&str, usize> = vocabulary.tokens.iter().enumerate().rev().map(|(id, token)| (token.as_str(), id)).collect();
    let unknown = match file.optional_id("tokenizer.ggml.unknown_token_id")? {
        Some(id) => {
            vocabulary.tokens.get(id as usize).with_context(|| format!("tokenizer.ggml.unknown_token_id is {id}, beyond the vocabulary"))?
        }
        None => "<unk>",
    };
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary.ids().collect::<Vocab>(), merges(vocabulary, &scores, &ids))
        .byte_fallback(true)
        .fuse_unk(true)
        .unk_token(unknown.to_string())
        .build()
        .map_err(anyhow::Error::msg)
        .context("tokenizer.ggml.tokens")?;
    let mut tokenizer = Tokenizer::new(bpe);

    let prefixed = file.optional_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers: Vec<NormalizerWrapper> = vec![Replace::new(" ", SPACE).map_err(anyhow::Error::msg)?.into()];
    let mut decoders: Vec<DecoderWrapper> =
        vec![Replace::new(SPACE, " ").map_err(anyhow::Error::msg)?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefixed {
        normalizers.insert(0, Prepend::new(SPACE.to_string()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers))).map_err(anyhow::Error::msg)?;
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

fn scores(file: &GgufFile, tokens: usize) -> Result<Vec<f64>> {
    match file.get("tokenizer.ggml.scores") {
        Some(Value::Array(scores)) if scores.len() == tokens => scores
            .iter()
            .map(|score| match score {
                Value::Float(score) if !score.is_nan() => Ok(*score),
                other => bail!("tokenizer.ggml.scores holds {other:?}, expected numbers"),
            })
            .collect(),
        Some(_) => bail!("tokenizer.ggml.scores is not an array of {tokens} numbers, one for each token"),
        None => bail!("metadata key tokenizer.ggml.scores is missing"),
    }
}

/// Every split of every ordinary piece into two pieces: best score first, then, as in the published
/// conversions, longer left parts first.
fn merges(vocabulary: &Vocabulary<'_>, scores: &[f64], ids: &HashMap<&str, usize>) -> Vec<(String, String)> {
    const NORMAL: i128 = 1;
    let mut merges: Vec<(f64, &str, &str)> = Vec::new();
    for ((piece, kind), score) in vocabulary.tokens.iter().zip(&vocabulary.types).zip(scores) {
        if *kind != NORMAL {
            continue;
        }
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push((*score, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.len().cmp(&a.1.len())));
    merges.into_iter().map(|(_, left, right)| (left.to_string(), right.to_string())).collect()
}
