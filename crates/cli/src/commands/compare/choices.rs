//! Questions with choices, as lines of JSON, asked as lm-evaluation-harness asks them.

use super::super::input::read_file;
use crate::failure::Failure;
use anyhow::Result;
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

/// A question: every choice is scored as what follows `prompt` and a space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) prompt: String,
    pub(super) choices: Vec<String>,
    pub(super) answer: usize,
}

/// The forms that are read.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    /// As published: <https://github.com/rowanz/hellaswag>
    HellaSwag {
        activity_label: String,
        ctx_a: String,
        ctx_b: String,
        endings: Vec<String>,
        #[serde(alias = "gold")]
        label: Value,
    },
    /// As published by its authors: <https://allenai.org/data/arc>
    Arc {
        question: Stem,
        #[serde(rename = "answerKey")]
        answer_key: Value,
    },
    /// The same, as the Hub has it.
    ArcOfHub {
        question: String,
        choices: Lists,
        #[serde(rename = "answerKey")]
        answer_key: Value,
    },
    /// Our own.
    Plain { question: String, choices: Vec<String>, answer: Value },
}

#[derive(Debug, Deserialize)]
struct Stem {
    stem: String,
    choices: Vec<Labelled>,
}

#[derive(Debug, Deserialize)]
struct Labelled {
    text: String,
    label: String,
}

#[derive(Debug, Deserialize)]
struct Lists {
    text: Vec<String>,
    label: Vec<String>,
}

/// The questions of a file.
pub(super) fn read(path: &Path) -> Result<Vec<Question>> {
    let name = path.display();
    let text = read_file(path)?;
    let mut questions = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |what: String| Failure::malformed(format!("{name}, line {}: {what}", index + 1));
        let line: Line = serde_json::from_str(line).map_err(|error| {
            let forms = "expected {\"question\", \"choices\", \"answer\"}, or a line of HellaSwag or ARC as published";
            wrong(if error.is_data() { forms.to_string() } else { error.to_string() })
        })?;
        questions.push(line.into_question().map_err(wrong)?);
    }
    if questions.is_empty() {
        return Err(Failure::malformed(format!("{name} holds no question")).into());
    }
    Ok(questions)
}

impl Line {
    fn into_question(self) -> Result<Question, String> {
        let asked = |question: &str| format!("Question: {question}\nAnswer:");
        let (prompt, choices, answer) = match self {
            Self::HellaSwag { activity_label, ctx_a, ctx_b, endings, label } => {
                let prompt = cleaned(&format!("{activity_label}: {ctx_a} {}", capitalized(&ctx_b)));
                let choices: Vec<String> = endings.iter().map(|ending| cleaned(ending)).collect();
                let answer = index(&label, &[], &choices)?;
                (prompt, choices, answer)
            }
            Self::Arc { question: Stem { stem, choices }, answer_key } => {
                let (texts, labels): (Vec<String>, Vec<String>) = choices.into_iter().map(|choice| (choice.text, choice.label)).unzip();
                let answer = index(&answer_key, &labels, &texts)?;
                (asked(&stem), texts, answer)
            }
            Self::ArcOfHub { question, choices: Lists { text, label }, answer_key } => {
                let answer = index(&answer_key, &label, &text)?;
                (asked(&question), text, answer)
            }
            Self::Plain { question, choices, answer } => {
                let answer = index(&answer, &[], &choices)?;
                (asked(&question), choices, answer)
            }
        };
        if choices.len() < 2 || choices.iter().any(|choice| choice.trim().is_empty()) {
            return Err(format!("{} choices, of which none may be empty: at least two are needed", choices.len()));
        }
        Ok(Question { prompt, choices, answer })
    }
}

/// Which choice is right: a number counts from 0; a text is a label, else a choice's own text, else a letter, else such a number.
fn index(answer: &Value, labels: &[String], choices: &[String]) -> Result<usize, String> {
    let text = match answer {
        Value::String(text) => text.trim().to_string(),
        other => other.to_string(),
    };
    let by_label = labels.iter().position(|label| *label == text);
    let by_number = || text.parse::<usize>().ok().filter(|_| labels.is_empty());
    let by_text = || choices.iter().position(|choice| answer.is_string() && choice.trim() == text);
    let by_letter = || match text.as_bytes() {
        [letter @ b'A'..=b'Z'] if labels.is_empty() => Some(usize::from(letter - b'A')),
        _ => None,
    };
    let found = by_label.or_else(by_text).or_else(by_letter).or_else(by_number);
    found.filter(|index| *index < choices.len()).ok_or_else(|| format!("the answer {text:?} is none of the {} choices", choices.len()))
}

/// Python's `str.capitalize`.
fn capitalized(text: &str) -> String {
    let mut characters = text.chars();
    match characters.next() {
        None => String::new(),
        Some(first) => first.to_uppercase().chain(characters.flat_map(char::to_lowercase)).collect(),
    }
}

/// What lm-evaluation-harness' HellaSwag task makes of WikiHow's artefacts.
fn cleaned(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let (mut out, mut rest) = (String::with_capacity(text.len()), text.as_str());
    // `\[.*?\]`: brackets and what is in them, on one line.
    while let Some(open) = rest.find('[') {
        match rest[open..].find([']', '\n']).map(|close| open + close) {
            Some(close) if rest[close..].starts_with(']') => {
                out.push_str(&rest[..open]);
                rest = &rest[close + 1..];
            }
            _ => {
                out.push_str(&rest[..=open]);
                rest = &rest[open + 1..];
            }
        }
    }
    out.push_str(rest);
    out.replace("  ", " ")
}

/// Whether the likeliest choice is the right one: by the sum of its log-probabilities, and by that over its characters.
pub(super) fn is_right(question: &Question, log_likelihoods: &[f64]) -> [bool; 2] {
    let best = |score: &dyn Fn(usize) -> f64| (0..log_likelihoods.len()).fold(0, |best, i| if score(i) > score(best) { i } else { best });
    let characters = |i: usize| question.choices[i].chars().count() as f64;
    [best(&|i| log_likelihoods[i]), best(&|i| log_likelihoods[i] / characters(i))].map(|index| index == question.answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(line: &str) -> Result<Question, String> {
        serde_json::from_str::<Line>(line).unwrap().into_question()
    }

    #[test]
    fn hellaswag_is_asked_as_the_harness_asks_it() {
        let line = r#"{"ind":4,"activity_label":"Removing ice from car","ctx_a":"Then, the man writes [step] over the snow.",
            "ctx_b":"then","ctx":"x","split":"val","endings":[", the man adds wax [title] He  smiles",", a person","b","c"],"label":"3"}"#;
        let question = question(line).unwrap();
        assert_eq!(question.prompt, "Removing ice from car: Then, the man writes over the snow. Then");
        assert_eq!(question.choices[0], ", the man adds wax. He smiles");
        assert_eq!(question.answer, 3);
    }

    #[test]
    fn arc_and_our_own_form_are_read_with_every_way_to_name_the_answer() {
        let arc = r#"{"id":"x","question":{"stem":"Why?","choices":[{"text":"a","label":"1"},{"text":"b","label":"2"}]},"answerKey":"2"}"#;
        let hub = r#"{"id":"x","question":"Why?","choices":{"text":["a","b"],"label":["A","B"]},"answerKey":"B"}"#;
        let want = Question { prompt: "Question: Why?\nAnswer:".into(), choices: vec!["a".into(), "b".into()], answer: 1 };
        assert_eq!((question(arc), question(hub)), (Ok(want.clone()), Ok(want.clone())));
        for answer in ["1", "\"1\"", "\"B\"", "\"b\""] {
            assert_eq!(question(&format!(r#"{{"question":"Why?","choices":["a","b"],"answer":{answer}}}"#)), Ok(want.clone()), "{answer}");
        }
        let number = question(r#"{"question":"2 + 2","choices":["3","4","5"],"answer":"4"}"#).unwrap();
        assert_eq!(number.answer, 1, "the text of a choice comes before its number");
        for answer in ["2", "-1", "\"C\"", "\"neither\"", "null"] {
            let error = question(&format!(r#"{{"question":"Why?","choices":["a","b"],"answer":{answer}}}"#)).unwrap_err();
            assert!(error.contains("none of the 2"), "{error}");
        }
    }

    #[test]
    fn a_long_choice_is_not_punished_for_its_length() {
        let question = Question { prompt: String::new(), choices: vec!["no".into(), "a long one".into()], answer: 1 };
        assert_eq!(is_right(&question, &[-4.0, -10.0]), [false, true]);
        assert_eq!(is_right(&question, &[-4.0, -3.0]), [true, true]);
    }

    #[test]
    fn brackets_go_only_in_pairs() {
        assert_eq!(cleaned("a [b] c [d"), "a c [d");
        assert_eq!(cleaned("]x[ y\n] z"), "]x[ y\n] z");
    }
}
