//! Text on one side, token ids on the other.

pub(crate) mod chat_template;
mod gguf_tokenizer;
mod sentencepiece;
mod stream;
pub(crate) mod tokenizer;

pub(crate) use chat_template::{ChatTemplate, Message};
pub(crate) use stream::TextStream;
pub(crate) use tokenizer::TextTokenizer;
