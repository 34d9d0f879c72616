//! What `-m` names.

use super::Manifest;
use crate::failure::{Failure, Kind};
use anyhow::Result;
use std::fmt;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ModelReference {
    /// A name of `models/*.toml`.
    Manifest(&'static Manifest),
    /// A directory or a `.gguf` file, and the type to convert safetensors to.
    Local { path: PathBuf, quant: Option<String> },
    /// `user/repo[:quant][@revision]`
    Hub { repo: String, quant: Option<String>, revision: String },
}

impl ModelReference {
    /// Reads `text`; `revision` is the `--revision` flag.
    pub(crate) fn parse(text: &str, revision: Option<&str>) -> Result<Self> {
        if let Some(manifest) = Manifest::by_name(text) {
            return Ok(Self::Manifest(manifest));
        }
        if let Some(local) = local(text)? {
            return Ok(local);
        }
        let (rest, at) = match text.rsplit_once('@') {
            Some((rest, revision)) => (rest, Some(revision)),
            None => (text, None),
        };
        let (repo, quant) = match rest.split_once(':') {
            Some((repo, quant)) => (repo, Some(quant)),
            None => (rest, None),
        };
        let word = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        let part = |part: &str| word(part) && !part.starts_with(['.', '-']) && !part.contains("..");
        let revision = at.or(revision).unwrap_or("main");
        let valid = matches!(repo.split_once('/'), Some((user, name)) if part(user) && part(name))
            && quant.is_none_or(word)
            && revision.split('/').all(part);
        if valid {
            return Ok(Self::Hub { repo: repo.to_string(), quant: quant.map(str::to_string), revision: revision.to_string() });
        }
        let why =
            format!("neither a known name ({}), a directory, a .gguf file, nor USER/REPO[:QUANT][@REVISION]", Manifest::names().join(", "));
        Err(Failure::new(Kind::NotFound, format!("no model {text:?}")).why(why).hint("foveate ls").into())
    }
}

/// `text` as a path, if it is one or is meant to be one.
fn local(text: &str) -> Result<Option<ModelReference>> {
    let path = Path::new(text);
    if path.exists() {
        let file = path.extension().is_some_and(|extension| extension == "safetensors");
        // A safetensors file stands for the directory that also holds its config and tokenizer.
        let path = if file { path.parent().unwrap_or(Path::new(".")) } else { path };
        let path = only_gguf(path).unwrap_or_else(|| path.to_path_buf());
        return Ok(Some(ModelReference::Local { path, quant: None }));
    }
    if let Some((dir, quant)) = text.rsplit_once(':')
        && Path::new(dir).is_dir()
    {
        return Ok(Some(ModelReference::Local { path: PathBuf::from(dir), quant: Some(quant.to_string()) }));
    }
    let pathlike = text.starts_with(['/', '.', '~']) || text.ends_with(".gguf") || text.ends_with(".safetensors");
    if pathlike {
        return Err(Failure::new(Kind::NotFound, format!("{text}: no such file or directory")).hint("foveate ls").into());
    }
    Ok(None)
}

/// The GGUF file of a directory that holds one and no checkpoint in Hugging Face layout.
fn only_gguf(dir: &Path) -> Option<PathBuf> {
    if !dir.is_dir() || dir.join("config.json").exists() {
        return None;
    }
    let paths = std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path());
    let mut ggufs = paths.filter(|path| path.extension().is_some_and(|extension| extension == "gguf"));
    ggufs.next().filter(|_| ggufs.next().is_none())
}

impl fmt::Display for ModelReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifest(manifest) => f.write_str(manifest.name),
            Self::Local { path, .. } => write!(f, "{}", path.display()),
            Self::Hub { repo, quant, revision } => {
                f.write_str(repo)?;
                if let Some(quant) = quant {
                    write!(f, ":{quant}")?;
                }
                if revision != "main" { write!(f, "@{revision}") } else { Ok(()) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_have_a_quant_and_a_revision() {
        let parsed = ModelReference::parse("user/repo.v1:q4_k_m@refs/pr/7", None).unwrap();
        assert_eq!(parsed, ModelReference::Hub { repo: "user/repo.v1".into(), quant: Some("q4_k_m".into()), revision: "refs/pr/7".into() });
        assert_eq!(parsed.to_string(), "user/repo.v1:q4_k_m@refs/pr/7");
        let ModelReference::Hub { revision, .. } = ModelReference::parse("user/repo", Some("v2")).unwrap() else { panic!("not the Hub") };
        assert_eq!(revision, "v2");
    }

    #[test]
    fn names_that_climb_or_look_like_flags_are_refused() {
        for text in ["../x/y", "a/b/c", "-x", "-a/b", "a/..", "a/b:..%2f", "a/b@../../x", "a/", "a b/c", "no-such-name", "x.gguf"] {
            let error = ModelReference::parse(text, None).unwrap_err();
            assert_eq!(error.downcast_ref::<Failure>().unwrap().kind, Kind::NotFound, "{text}");
        }
    }

    #[test]
    fn manifests_are_found_by_name_in_any_case() {
        let ModelReference::Manifest(manifest) = ModelReference::parse("SmolLM2-135M-Instruct", None).unwrap() else {
            panic!("no manifest")
        };
        assert_eq!(manifest.name, "smollm2-135m-instruct");
    }
}
