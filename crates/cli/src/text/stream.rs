//! Generated tokens to text, piece by piece.

use super::TextTokenizer;
use anyhow::Result;

/// Holds back half characters, and what may become a stop string.
#[derive(Debug)]
pub(crate) struct TextStream<'a> {
    tokenizer: &'a TextTokenizer,
    stops: &'a [String],
    ids: Vec<u32>,
    /// Ids before this one are decoded for good...
    settled: usize,
    /// ...and these give the decoder the context it needs.
    context: usize,
    /// Decoded, not yet given out.
    held: String,
}

impl<'a> TextStream<'a> {
    pub(crate) fn new(tokenizer: &'a TextTokenizer, stops: &'a [String]) -> Self {
        Self { tokenizer, stops, ids: Vec::new(), settled: 0, context: 0, held: String::new() }
    }

    /// Adds a token. Returns the text that is certain now, and whether a stop string, which is not part of it, ends it.
    pub(crate) fn push(&mut self, id: u32) -> Result<(String, bool)> {
        self.ids.push(id);
        let before = self.tokenizer.decode(&self.ids[self.context..self.settled])?;
        let after = self.tokenizer.decode(&self.ids[self.context..])?;
        // A lone byte of a longer character decodes to U+FFFD until the others come.
        if !after.ends_with('\u{fffd}') {
            if let Some(new) = after.strip_prefix(before.as_str()) {
                self.held.push_str(new);
            }
            (self.context, self.settled) = (self.settled, self.ids.len());
        }
        Ok(self.release())
    }

    fn release(&mut self) -> (String, bool) {
        let first = self.stops.iter().filter(|stop| !stop.is_empty()).filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = first {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// All that was held back, when no more tokens come.
    pub(crate) fn finish(&mut self) -> Result<String> {
        if self.settled < self.ids.len() {
            let before = self.tokenizer.decode(&self.ids[self.context..self.settled])?;
            let after = self.tokenizer.decode(&self.ids[self.context..])?;
            self.held.push_str(after.strip_prefix(before.as_str()).unwrap_or_default());
            self.settled = self.ids.len();
        }
        Ok(std::mem::take(&mut self.held))
    }
}

/// The longest end of `text` that `stop` starts with, in bytes.
fn overlap(text: &str, stop: &str) -> usize {
    (1..stop.len().min(text.len() + 1)).rev().find(|len| stop.is_char_boundary(*len) && text.ends_with(&stop[..*len])).unwrap_or(0)
}
