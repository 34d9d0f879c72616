//! Generated tokens to text, piece by piece.

use super::TextTokenizer;
use anyhow::Result;

/// What a lone byte of a longer character decodes to until the others come.
const HALF: char = '\u{fffd}';

/// Tokens of the prompt that the decoder sees before the first new one.
const CONTEXT_TOKENS: usize = 4;

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
    /// A stream that goes on after `prompt`: whether a word begins with a space can depend on what is before it.
    pub(crate) fn after(prompt: &[u32], tokenizer: &'a TextTokenizer, stops: &'a [String]) -> Result<Self> {
        let mut ids = prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..].to_vec();
        if tokenizer.decode(&ids)?.contains(HALF) {
            ids.clear(); // a prompt that ends, or whose end begins, within a character is no help
        }
        Ok(Self { tokenizer, stops, settled: ids.len(), ids, context: 0, held: String::new() })
    }

    /// Adds a token. Returns the text that is certain now, and whether a stop string, which is not part of it, ends it.
    pub(crate) fn push(&mut self, id: u32) -> Result<(String, bool)> {
        self.ids.push(id);
        let new = self.undecided()?;
        if !new.ends_with(HALF) {
            self.held.push_str(&new);
            (self.context, self.settled) = (self.settled, self.ids.len());
        }
        Ok(self.release())
    }

    /// The text of the ids that are not settled.
    fn undecided(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.context..self.settled])?;
        let after = self.tokenizer.decode(&self.ids[self.context..])?;
        match after.strip_prefix(before.as_str()) {
            Some(new) => Ok(new.to_string()),
            // A decoder that rewrites what came before: the new ids on their own are better than nothing.
            None => self.tokenizer.decode(&self.ids[self.settled..]),
        }
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
            let rest = self.undecided()?;
            self.held.push_str(&rest);
            self.settled = self.ids.len();
        }
        Ok(std::mem::take(&mut self.held))
    }
}

/// The longest end of `text` that `stop` starts with, in bytes.
fn overlap(text: &str, stop: &str) -> usize {
    (1..stop.len().min(text.len() + 1)).rev().find(|len| stop.is_char_boundary(*len) && text.ends_with(&stop[..*len])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn tokenizer() -> TextTokenizer {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/tiny/llama/tokenizer.json");
        TextTokenizer::from_file(&path).unwrap()
    }

    /// The pieces that a stream gives out for the tokens of `text`, and whether a stop string ended it.
    fn pieces(prompt: &str, text: &str, stops: &[&str]) -> (Vec<String>, bool) {
        let (tokenizer, stops) = (tokenizer(), stops.iter().map(|stop| stop.to_string()).collect::<Vec<_>>());
        let prompt = tokenizer.encode(prompt, false).unwrap();
        let mut stream = TextStream::after(&prompt, &tokenizer, &stops).unwrap();
        let mut pieces = Vec::new();
        for id in tokenizer.encode(text, false).unwrap() {
            let (piece, stopped) = stream.push(id).unwrap();
            pieces.push(piece);
            if stopped {
                return (pieces, true);
            }
        }
        pieces.push(stream.finish().unwrap());
        (pieces, false)
    }

    #[test]
    fn a_character_comes_whole_or_not_at_all() {
        let text = "naïve 😀 日本語 👩‍👩‍👧 end";
        let (pieces, _) = pieces("prompt", text, &[]);
        assert_eq!(pieces.concat(), text);
        assert!(pieces.len() > 30 && pieces.iter().any(String::is_empty), "its bytes are tokens of their own: {pieces:?}");
        assert!(pieces.iter().all(|piece| !piece.contains(HALF)), "{pieces:?}");
    }

    #[test]
    fn bytes_that_never_become_a_character_are_shown_at_the_end() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("a😀", false).unwrap();
        let mut stream = TextStream::after(&[], &tokenizer, &[]).unwrap();
        let shown: String = ids[..ids.len() - 1].iter().map(|id| stream.push(*id).unwrap().0).collect();
        assert_eq!(shown, "a");
        assert!(stream.finish().unwrap().contains(HALF));
    }

    #[test]
    fn a_prompt_that_ends_within_a_character_hides_nothing() {
        let tokenizer = tokenizer();
        let mut prompt = tokenizer.encode("x😀", false).unwrap();
        prompt.pop();
        let mut stream = TextStream::after(&prompt, &tokenizer, &[]).unwrap();
        let text: String = tokenizer.encode(" and on", false).unwrap().iter().map(|id| stream.push(*id).unwrap().0).collect();
        assert_eq!(text, " and on");
    }

    #[test]
    fn what_may_become_a_stop_string_is_held_back() {
        let (shown, stopped) = pieces("", "one two END three", &["END"]);
        assert_eq!((shown.concat().as_str(), stopped), ("one two ", true));
        // Almost one, twice; then the text goes on.
        let (shown, stopped) = pieces("", "one EN END", &["ENDE"]);
        assert_eq!((shown.concat().as_str(), stopped), ("one EN END", false));
        // Of two, the one that comes first.
        let (shown, stopped) = pieces("", "a<b>c", &["c", "<b>"]);
        assert_eq!((shown.concat().as_str(), stopped), ("a", true));
        assert!(!pieces("", "abc", &[""]).1, "an empty stop string stops nothing");
    }
}
