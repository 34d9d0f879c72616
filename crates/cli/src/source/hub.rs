//! Models of the Hugging Face Hub.
//!
//! hf-hub knows the cache's layout, the URLs and the metadata; what it lacks, the transfer here adds:
//! checksums before a file gets its name, locks that wait, one pinned commit for all files of a pull.

use super::cache;
use super::transfer::{self, Download, Transport};
use super::{Checksum, Located, check_architecture};
use crate::failure::{Failure, Kind, damaged};
use crate::interrupt::Interrupt;
use crate::ui::Ui;
use anyhow::{Context, Result, bail};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// The Hub (or a mirror of its API), this machine's cache of it, and how to reach it.
#[derive(Debug)]
pub(crate) struct Hub {
    pub(crate) cache: Cache,
    pub(crate) offline: bool,
    pub(crate) ui: Ui,
    pub(crate) interrupt: Interrupt,
    endpoint: String,
    token: Option<String>,
}

/// Files of a repository that make a model.
#[derive(Debug, PartialEq, Eq)]
struct Choice {
    files: Vec<String>,
    /// The GGUF file, where that is the format.
    gguf: Option<String>,
    /// The type to convert safetensors to.
    quantize: Option<String>,
}

impl Hub {
    /// As the flags and the Hub's own environment variables say.
    pub(crate) fn from_environment(global: &crate::args::Global, ui: Ui, interrupt: Interrupt) -> Result<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let on = |value: String| !matches!(value.to_lowercase().as_str(), "0" | "false" | "no" | "off");
        let read = |path: &Path| std::fs::read_to_string(path).map(|text| text.trim().to_string());
        let token = match &global.hf_token_file {
            Some(path) => Some(read(path).map_err(|error| Failure::new(Kind::NotFound, format!("{}: {error}", path.display())))?),
            None => match variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN")) {
                Some(token) => Some(token.trim().to_string()),
                None => {
                    let path = variable("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(cache::hf_home().ok()?.join("token")));
                    path.and_then(|path| read(&path).ok()).filter(|token| !token.is_empty())
                }
            },
        };
        Ok(Self {
            cache: Cache::new(cache::root(global.cache_dir.as_deref())?),
            offline: global.offline || variable("HF_HUB_OFFLINE").is_some_and(on),
            ui,
            interrupt,
            endpoint: variable("HF_ENDPOINT")
                .map_or_else(|| "https://huggingface.co".to_string(), |url| url.trim_end_matches('/').to_string()),
            token,
        })
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(crate) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    fn api(&self) -> Result<Api> {
        let builder = ApiBuilder::from_cache(self.cache.clone()).with_endpoint(self.endpoint.clone()).with_token(self.token.clone());
        builder.with_progress(false).build().context("making the Hub client")
    }

    fn agent(&self) -> ureq::Agent {
        ureq::Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .user_agent(concat!("foveate/", env!("CARGO_PKG_VERSION")))
            .build()
            .into()
    }

    /// Whether the Hub answers, and as whom.
    pub(crate) fn check(&self) -> Result<String> {
        let mut request = self.agent().get(format!("{}/api/whoami-v2", self.endpoint));
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let mut response = request.call().map_err(|error| unreachable_hub(&error, &self.endpoint))?;
        match (response.status().as_u16(), self.has_token()) {
            (200, _) => {
                let answer: serde_json::Value = response.body_mut().read_json().unwrap_or_default();
                Ok(format!("reachable, token valid (user {})", answer.get("name").and_then(|name| name.as_str()).unwrap_or("unknown")))
            }
            (401, true) => bail!("reachable, but it refuses the token"),
            (_, false) => Ok("reachable, no token".to_string()),
            (status, true) => Ok(format!("reachable (answers {status})")),
        }
    }

    /// A model of `repo` that was fetched before, whole.
    pub(crate) fn find(&self, repo: &str, quant: Option<&str>, revision: &str) -> Result<Option<Located>> {
        let base = cache::repo_dir(&self.cache, repo);
        let commit = std::fs::read_to_string(base.join("refs").join(revision))
            .map_or_else(|_| revision.to_string(), |commit| commit.trim().to_string());
        let snapshot = base.join("snapshots").join(&commit);
        if !snapshot.is_dir() {
            return Ok(None);
        }
        let names: Vec<String> = cache::cached_repo(&self.cache, repo)
            .map(|cached| cached.files.into_iter().filter(|file| file.pointer.starts_with(&snapshot)).map(|file| file.name).collect())
            .unwrap_or_default();
        let Ok(choice) = choose(repo, &names, quant) else { return Ok(None) };
        if let Some(index) = choice.files.iter().find(|file| file.ends_with(".index.json"))
            && !shards(&snapshot.join(index))?.iter().all(|shard| snapshot.join(shard).is_file())
        {
            return Ok(None);
        }
        Ok(Some(self.located(repo, quant, &commit, &snapshot, &choice)))
    }

    fn located(&self, repo: &str, quant: Option<&str>, commit: &str, snapshot: &Path, choice: &Choice) -> Located {
        let path = choice.gguf.as_ref().map_or_else(|| snapshot.to_path_buf(), |file| snapshot.join(file));
        let sha256 = choice.gguf.as_ref().and_then(|_| {
            let blob = path.canonicalize().ok()?;
            Checksum::parse(blob.file_name()?.to_str()?).filter(|sum| matches!(sum, Checksum::Sha256(_))).map(|sum| sum.hex().to_string())
        });
        let id = quant.map_or_else(|| repo.to_string(), |quant| format!("{repo}:{quant}"));
        Located { id, path, revision: Some(commit.to_string()), sha256, quantize: choice.quantize.clone(), manifest: None }
    }

    /// Fetches a model of `repo`: all its files at one commit.
    pub(crate) fn pull(&self, repo: &str, quant: Option<&str>, revision: &str) -> Result<Located> {
        let api = self.api()?;
        let info = at(&api, repo, revision).info().map_err(|error| self.explain(&error, repo, revision))?;
        if Checksum::parse(&info.sha).is_none() {
            bail!(Failure::new(Kind::Network, format!("{}: the Hub names commit {:?}, expected a hash", repo, info.sha)));
        }
        let names: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).filter(|name| is_inside(name)).collect();
        let choice = choose(repo, &names, quant)?;
        self.ui.say(format!("Pulling {repo}@{} ({} files)", &info.sha[..10], choice.files.len()));
        let snapshot = cache::repo(&self.cache, repo, &info.sha).pointer_path(&info.sha);
        for file in &choice.files {
            let pointer = self.fetch_file(&api, repo, &info.sha, file, None)?;
            if file == "config.json" {
                check_config(repo, &pointer)?;
            } else if file.ends_with(".index.json") {
                for shard in shards(&pointer)? {
                    self.fetch_file(&api, repo, &info.sha, &shard, None)?;
                }
            }
        }
        // Last, so that a ref never names a snapshot that is not whole.
        cache::repo(&self.cache, repo, revision).create_ref(&info.sha).map_err(|error| cache::io_failure(error, &snapshot))?;
        Ok(self.located(repo, quant, &info.sha, &snapshot, &choice))
    }

    /// Fetches the one file of a manifest, unless the Hub's is another one.
    pub(crate) fn pull_file(&self, repo: &str, file: &str, revision: &str, want: &Checksum) -> Result<PathBuf> {
        self.fetch_file(&self.api()?, repo, revision, file, Some(want))
    }

    fn fetch_file(&self, api: &Api, repo: &str, revision: &str, file: &str, want: Option<&Checksum>) -> Result<PathBuf> {
        let url = at(api, repo, revision).url(file);
        let metadata = api.metadata(&url).map_err(|error| self.explain(&error, &format!("{repo}/{file}"), revision))?;
        let Some(checksum) = Checksum::parse(metadata.etag()) else {
            bail!(
                Failure::new(
                    Kind::Network,
                    format!("{file}: the server's ETag {:?} is no checksum, so nothing it sends can be verified", metadata.etag())
                )
                .hint("unset HF_ENDPOINT, or use a mirror that passes the Hub's ETags on")
            );
        };
        if Checksum::parse(metadata.commit_hash()).is_none() {
            bail!(Failure::new(Kind::Network, format!("{file}: the server names commit {:?}, expected a hash", metadata.commit_hash())));
        }
        if let Some(want) = want
            && *want != checksum
        {
            bail!(Failure::malformed(format!(
                "{repo}/{file} on the Hub is not the file that was checked: {}, expected {}",
                checksum.hex(),
                want.hex()
            )));
        }
        let cached = cache::repo(&self.cache, repo, metadata.commit_hash());
        let blob = cached.blob_path(checksum.hex());
        if !blob.exists() {
            let download = Download { url: &url, size: metadata.size() as u64, checksum: &checksum, blob: &blob, name: file };
            let transport = Transport { agent: &self.agent(), token: self.token.as_deref(), ui: self.ui, interrupt: &self.interrupt };
            transfer::fetch(&download, &transport)?;
        }
        cache::link(&cached.pointer_path(metadata.commit_hash()), file, &blob)
    }

    fn explain(&self, error: &ApiError, what: &str, revision: &str) -> anyhow::Error {
        match error {
            ApiError::RequestError(error) => match &**error {
                ureq::Error::StatusCode(404) => {
                    let what = if revision == "main" { what.to_string() } else { format!("{what}@{revision}") };
                    Failure::new(Kind::NotFound, format!("{what}: the Hub has no such repository, revision or file (404)")).into()
                }
                ureq::Error::StatusCode(status) => refused(*status, &format!("{}/{what}", self.endpoint)).into(),
                error => unreachable_hub(error, &self.endpoint).into(),
            },
            error => Failure::new(Kind::Network, format!("{what}: the server does not speak the Hub's protocol: {error}")).into(),
        }
    }
}

/// A repository at a revision.
fn at(api: &Api, repo: &str, revision: &str) -> ApiRepo {
    api.repo(Repo::with_revision(repo.to_string(), RepoType::Model, revision.to_string()))
}

/// What a status means for the user.
pub(super) fn refused(status: u16, url: &str) -> Failure {
    match status {
        401 => Failure::new(Kind::Network, format!("{url}: the Hub wants a token (401): the repository is private, gated, or not there"))
            .hint("HF_TOKEN=hf_... in the environment, or hf auth login; tokens: https://huggingface.co/settings/tokens"),
        403 => Failure::new(Kind::Network, format!("{url}: access is not granted (403)"))
            .hint("open the repository's page in a browser, accept its licence, and run it again with that account's token"),
        404 => Failure::new(Kind::NotFound, format!("{url}: not there (404)")),
        status => Failure::new(Kind::Network, format!("{url}: the server answers {status}")).hint("run it again later"),
    }
}

fn unreachable_hub(error: &ureq::Error, endpoint: &str) -> Failure {
    Failure::new(Kind::Network, format!("no connection to {endpoint}: {error}"))
        .hint("check the network, HF_ENDPOINT and HTTPS_PROXY; --offline uses only what is here")
}

/// Whether a repository's file stays in the snapshot it is put in.
fn is_inside(name: &str) -> bool {
    !name.contains('\\') && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Picks the files of a model out of a repository's.
fn choose(repo: &str, names: &[String], quant: Option<&str>) -> Result<Choice> {
    let ggufs: Vec<&String> =
        names.iter().filter(|name| name.to_lowercase().ends_with(".gguf") && !name.to_lowercase().contains("mmproj")).collect();
    let listed = |files: &[&String]| files.iter().map(|file| file.as_str()).collect::<Vec<_>>().join("\n");
    let has = |name: &str| names.iter().any(|other| other == name);
    let safetensors = has("config.json") && (has("model.safetensors") || has("model.safetensors.index.json"));
    let wanted: Vec<&String> = match quant {
        Some(quant) => ggufs.iter().copied().filter(|file| is_quant(file, quant)).collect(),
        None if safetensors => Vec::new(),
        None if ggufs.len() == 1 => ggufs.clone(),
        None => ggufs.iter().copied().filter(|file| is_quant(file, "q4_k_m")).collect(),
    };
    match wanted.as_slice() {
        [file] => return Ok(Choice { files: vec![(*file).clone()], gguf: Some((*file).clone()), quantize: None }),
        [first, ..] if first.contains("-of-") => {
            bail!(
                Failure::malformed(format!("{repo}: this GGUF is split into {} files, which is not supported", wanted.len()))
                    .hint("merge them with llama-gguf-split, or pick another quant")
            )
        }
        [_, _, ..] => {
            bail!(Failure::new(Kind::NotFound, format!("{repo}: several files are {}", quant.unwrap_or("q4_k_m"))).why(listed(&wanted)))
        }
        [] if !safetensors && !ggufs.is_empty() => {
            let what = quant.map_or_else(|| format!("{repo}: which of its files?"), |quant| format!("{repo}: no file is {quant}"));
            bail!(Failure::new(Kind::NotFound, what).why(listed(&ggufs)).hint(format!("{repo}:QUANT, as the file names spell it")));
        }
        [] => {}
    }
    if !safetensors {
        bail!(Failure::malformed(format!("{repo} holds neither a GGUF file nor config.json with model.safetensors")));
    }
    let weights = if has("model.safetensors.index.json") { "model.safetensors.index.json" } else { "model.safetensors" };
    let optional = ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"];
    let files = ["config.json", "tokenizer.json", weights].into_iter().chain(optional.into_iter().filter(|name| has(name)));
    Ok(Choice { files: files.map(str::to_string).collect(), gguf: None, quantize: quant.map(str::to_string) })
}

/// Refuses what cannot run before its weights are fetched.
fn check_config(repo: &str, path: &Path) -> Result<()> {
    let text = std::fs::read_to_string(path).map_err(|error| cache::io_failure(error, path))?;
    check_architecture(repo, &model::Config::from_json(&text).map_err(damaged)?)
}

/// Whether `quant` stands in a file's name as a word of its own.
fn is_quant(file: &str, quant: &str) -> bool {
    let (file, quant) = (file.to_lowercase(), quant.to_lowercase());
    let edge = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '_');
    file.match_indices(&quant).any(|(at, _)| edge(file[..at].chars().next_back()) && edge(file[at + quant.len()..].chars().next()))
}

/// The files an index names: plain names only, each once.
fn shards(index: &Path) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let fail = |error: String| Failure::malformed(format!("{}: {error}", index.display()));
    let text = std::fs::read_to_string(index).map_err(|error| fail(error.to_string()))?;
    let mut files: Vec<String> =
        serde_json::from_str::<Index>(&text).map_err(|error| fail(error.to_string()))?.weight_map.into_values().collect();
    files.sort_unstable();
    files.dedup();
    if let Some(file) = files.iter().find(|file| file.contains(['/', '\\']) || file.starts_with('.') || !file.ends_with(".safetensors")) {
        return Err(fail(format!("weight_map names {file:?}, which is not a safetensors file beside it")).into());
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn a_quant_is_a_word_of_the_file_name() {
        assert!(is_quant("SmolLM2-135M-Instruct.Q4_1.gguf", "q4_1"));
        assert!(is_quant("qwen2.5-0.5b-q4_k_m.gguf", "Q4_K_M"));
        assert!(!is_quant("model-q4_k_m.gguf", "q4_k"));
        assert!(!is_quant("model-q4_1x.gguf", "q4_1"));
    }

    #[test]
    fn files_are_chosen_as_a_user_expects() {
        let gguf = names(&["README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m.gguf"]);
        assert_eq!(choose("u/r", &gguf, None).unwrap().gguf.as_deref(), Some("m-Q4_K_M.gguf"));
        assert_eq!(choose("u/r", &gguf, Some("q8_0")).unwrap().gguf.as_deref(), Some("m-Q8_0.gguf"));
        let error = choose("u/r", &gguf, Some("q2_k")).unwrap_err();
        assert_eq!(error.downcast_ref::<Failure>().unwrap().kind, Kind::NotFound);
        let hf = names(&["config.json", "model.safetensors.index.json", "tokenizer.json", "generation_config.json", "m-Q4_K_M.gguf"]);
        let choice = choose("u/r", &hf, None).unwrap();
        assert_eq!((choice.gguf, choice.quantize), (None, None));
        assert!(choice.files.contains(&"generation_config.json".to_string()));
        assert_eq!(choose("u/r", &hf, Some("q8_0")).unwrap().quantize.as_deref(), Some("q8_0"));
        assert_eq!(choose("u/r", &hf, Some("q4_k_m")).unwrap().gguf.as_deref(), Some("m-Q4_K_M.gguf"));
        assert!(choose("u/r", &names(&["pytorch_model.bin"]), None).is_err());
        assert!(choose("u/r", &names(&["m-q4_k_m-00001-of-00002.gguf", "m-q4_k_m-00002-of-00002.gguf"]), None).is_err());
    }
}
