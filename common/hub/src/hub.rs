//! From a model's name to its folder: what is asked of the hub, in which order, and what stands in when it is away.

use std::path::PathBuf;

use agentfly_common::model_dir::ModelConfig;
use backon::{BlockingRetryable as _, ExponentialBuilder};
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use ureq::Body;
use ureq::http::Response;

use crate::cache::{Cached, Lack, is_read_only, repo_of};
use crate::error::HubError;
use crate::fetch::{fetch, length};
use crate::listing::{INDEX, Listing, RemoteFile, indexed_files};
use crate::lock::{Lock, lock};
use crate::meter::Meter;
use crate::name::ModelName;
use crate::settings::{HubSettings, Patience};

/// Longest answer that is read as a listing.
const MAX_LISTING_BYTES: u64 = 64 << 20;
/// Further tries for a listing: each may take as long as it takes to find out that nobody is there.
const LISTING_TRIES: usize = 3;
/// The same where a copy can stand in.
const LISTING_TRIES_WITH_COPY: usize = 1;
/// Redirects that are followed.
const MAX_REDIRECTS: u32 = 10;
/// What a full disk should still have beyond the download.
const SPARE_BYTES: u64 = 256 << 20;

/// How much of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// What it is: its configuration and tokenizer.
    Configuration,
    /// The weights too.
    Everything,
}

/// The hub, and the cache before it.
#[derive(Debug)]
pub struct Hub {
    settings: HubSettings,
}

impl Hub {
    /// Nothing is asked yet.
    #[must_use]
    pub fn new(settings: HubSettings) -> Self {
        Self { settings }
    }

    /// The folder of a model, fetched as far as it is not in the cache. While the hub cannot be reached, or has no
    /// answer, the copy that its revision last meant stands in, with a warning.
    ///
    /// # Errors
    /// What was tried, how far it came, and what to do.
    pub fn model_dir(&self, name: &ModelName, want: Want) -> Result<PathBuf, HubError> {
        let cached = Cached::new(&self.settings.cache, name);
        let (copy, cut_short) = match cached.whole_copy(name, want) {
            Ok(copy) => (Some(copy), None),
            Err(Lack::File) => (None, None),
            Err(Lack::End(cut)) => (None, Some(cut)),
        };
        // What a commit holds never changes: nothing to ask.
        if let (Some(copy), Some(_)) = (&copy, name.commit()) {
            return Ok(copy.clone());
        }
        if let Some(cut) = &cut_short {
            tracing::warn!(model = %name, cut, "the copy in the cache is not whole");
        }
        let not_here = |tried: String| HubError::NotHere {
            name: name.to_string(),
            cache: self.settings.cache.clone(),
            tried,
            cut_short: cut_short.clone(),
        };
        if self.settings.offline {
            return copy.ok_or_else(|| not_here("HF_HUB_OFFLINE is set, so no hub was asked".to_owned()));
        }
        let session = Session::open(&self.settings, name)?;
        let tries = if copy.is_some() { LISTING_TRIES_WITH_COPY } else { LISTING_TRIES };
        let brought = session
            .listing(tries)
            .and_then(|listing| self.bring(&session, &cached, &listing, want).map_err(Asking::Refused));
        match (brought, copy) {
            (Ok(folder), _) => Ok(folder),
            (Err(why), Some(copy)) if why.is_passing() => {
                let at = copy.display();
                tracing::warn!(model = %name, cause = %why, %at, "no model from the hub: taking the copy in the cache");
                Ok(copy)
            }
            (Err(Asking::Refused(error)), _) => Err(error),
            (Err(Asking::Unreachable(tried)), _) => Err(not_here(tried)),
        }
    }

    /// Fetches what is missing of a commit. Where nothing is, nothing has to be written: a cache that several share
    /// may be read-only.
    fn bring(
        &self,
        session: &Session<'_>,
        cached: &Cached,
        listing: &Listing,
        want: Want,
    ) -> Result<PathBuf, HubError> {
        let (name, commit) = (session.name(), listing.commit.as_str());
        let unusable = |reason: String| HubError::Listing {
            name: name.to_string(),
            endpoint: self.settings.endpoint.clone(),
            reason,
        };
        for needed in ["config.json", "tokenizer.json"] {
            if !listing.has(needed) {
                return Err(unusable(format!("it has no {needed}: is it a model that transformers reads?")));
            }
        }
        let folder = cached.snapshot(commit);
        let small = listing.small_files();
        let weights = || {
            let indexed = match listing.has(INDEX) {
                true => {
                    let path = folder.join(INDEX);
                    let text = std::fs::read_to_string(&path);
                    let text = text.map_err(|e| HubError::io("cannot read", &path, e))?;
                    Some(indexed_files(&text).map_err(unusable)?)
                }
                false => None,
            };
            listing.weights(indexed.as_deref()).map_err(unusable)
        };
        let understood = || {
            let problem = |source| HubError::Unsupported { name: name.to_string(), source: Box::new(source) };
            ModelConfig::from_dir(&folder).map(|_| ()).map_err(problem)
        };
        if cached.holds(commit, &small) {
            understood()?;
            if want == Want::Configuration || cached.holds(commit, &weights()?) {
                cached.remember_if_writable(name, commit)?;
                return Ok(folder);
            }
        }
        let _held = self.open(cached, name, commit)?;
        self.bring_files(session, cached, commit, &small)?;
        // Before gigabytes are fetched: can it be computed at all?
        understood()?;
        if want == Want::Everything {
            self.bring_files(session, cached, commit, &weights()?)?;
        }
        cached.remember(name, commit)?;
        Ok(folder)
    }

    /// Opens a model's place in the cache for writing, for this process alone.
    fn open(&self, cached: &Cached, name: &ModelName, commit: &str) -> Result<Lock, HubError> {
        let opened = cached.make_folders(commit).and_then(|()| {
            let fetched = || cached.fetched_bytes();
            lock(&cached.lock_file(), &name.to_string(), self.settings.patience.lock, fetched)
        });
        opened.map_err(|error| match error {
            HubError::Io { source, .. } if is_read_only(&source) => {
                HubError::ReadOnly { name: name.to_string(), cache: self.settings.cache.clone(), source }
            }
            other => other,
        })
    }

    fn bring_files(
        &self,
        session: &Session<'_>,
        cached: &Cached,
        commit: &str,
        files: &[RemoteFile],
    ) -> Result<(), HubError> {
        let there = |file: &RemoteFile| {
            let blob = length(&cached.blob(&file.checksum)).filter(|bytes| *bytes == file.bytes);
            blob.or_else(|| length(&cached.part(&file.checksum))).unwrap_or(0).min(file.bytes)
        };
        let total: u64 = files.iter().map(|file| file.bytes).sum();
        let have: u64 = files.iter().map(there).sum();
        if total > have {
            self.check_room(session.name(), total - have)?;
            let mut meter = Meter::new(&session.name().to_string(), total, have);
            for file in files {
                fetch(session, cached, commit, file, &mut meter)?;
            }
        } else {
            // Whole parts may still have to be verified and named.
            let mut meter = Meter::new(&session.name().to_string(), 0, 0);
            for file in files {
                fetch(session, cached, commit, file, &mut meter)?;
            }
        }
        files.iter().try_for_each(|file| cached.link(commit, &file.name, &file.checksum))
    }

    fn check_room(&self, name: &ModelName, need_bytes: u64) -> Result<(), HubError> {
        let cache = self.settings.cache.clone();
        let found = rustix::fs::statvfs(&cache);
        let found = found.map_err(|e| HubError::io("cannot ask for the room in", &cache, e.into()))?;
        let free_bytes = found.f_bavail.saturating_mul(found.f_frsize);
        if free_bytes < need_bytes.saturating_add(SPARE_BYTES) {
            return Err(HubError::NoRoom { name: name.to_string(), cache, need_bytes, free_bytes });
        }
        Ok(())
    }
}

/// Why there is no model from the hub.
#[derive(Debug, thiserror::Error)]
enum Asking {
    /// Nobody answered: who was asked, and what happened.
    #[error("{0}")]
    Unreachable(String),
    /// The hub answered, and said no.
    #[error(transparent)]
    Refused(HubError),
}

impl Asking {
    /// Whether it may be different in a moment.
    fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable(_) => true,
            Self::Refused(error) => error.is_passing(),
        }
    }
}

/// Requests about one model, with hf-hub's client: its headers, and the token for the hub's own host.
pub(crate) struct Session<'a> {
    settings: &'a HubSettings,
    name: &'a ModelName,
    repo: ApiRepo,
    with_token: bool,
}

impl<'a> Session<'a> {
    fn open(settings: &'a HubSettings, name: &'a ModelName) -> Result<Self, HubError> {
        let token = settings.token.as_ref().filter(|_| settings.may_send_token());
        if token.is_none() && settings.token.is_some() {
            tracing::warn!(endpoint = settings.endpoint, "the token is not sent over plain http");
        }
        let api = ApiBuilder::from_cache(hf_hub::Cache::new(settings.cache.clone()))
            .with_endpoint(settings.endpoint.clone())
            .with_token(token.map(|token| token.expose().to_owned()))
            .with_user_agent("agentfly", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| HubError::Client(error.to_string()))?;
        Ok(Self { settings, name, repo: api.repo(repo_of(name)), with_token: token.is_some() })
    }

    pub(crate) fn name(&self) -> &ModelName {
        self.name
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.settings.endpoint
    }

    pub(crate) fn patience(&self) -> &Patience {
        &self.settings.patience
    }

    /// Where a file of a commit is.
    pub(crate) fn file_url(&self, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{file}", self.settings.endpoint, self.name.repository)
    }

    /// GET with a deadline for every wait; `from` asks for the bytes from there on. Statuses are no errors here.
    pub(crate) fn get(&self, url: &str, from: Option<u64>) -> Result<Response<Body>, ureq::Error> {
        let mut request = self.repo.info_request().uri(url);
        if let Some(first) = from {
            request = request.header("Range", format!("bytes={first}-"));
        }
        let patience = self.patience();
        request
            .config()
            .http_status_as_error(false)
            .accept_encoding("identity") // a compressed body has no bytes to go on from
            .max_redirects(MAX_REDIRECTS)
            .timeout_resolve(Some(patience.connect))
            .timeout_connect(Some(patience.connect))
            .timeout_recv_response(Some(patience.answer))
            .timeout_per_read(Some(patience.silence))
            .build()
            .call()
    }

    /// The repository at the revision asked for; a try that broke is made again up to `tries` times.
    fn listing(&self, tries: usize) -> Result<Listing, Asking> {
        let revision = self.name.revision().replace('/', "%2F");
        let (endpoint, repository) = (self.endpoint(), &self.name.repository);
        let url = format!("{endpoint}/api/models/{repository}/revision/{revision}?blobs=true");
        let away = |error: ureq::Error| {
            Asking::Unreachable(format!("{endpoint} cannot be reached ({})", plain(&error)))
        };
        let attempt = || {
            let answer = self.get(&url, None).map_err(away)?;
            if !answer.status().is_success() {
                return Err(Asking::Refused(self.refusal(&url, answer)));
            }
            let text = answer.into_body().into_with_config().limit(MAX_LISTING_BYTES).read_to_string();
            text.map_err(away)
        };
        let delays = ExponentialBuilder::default()
            .with_jitter()
            .with_min_delay(self.patience().pause)
            .with_max_times(self.patience().tries.min(tries));
        let text = attempt
            .retry(delays)
            .when(Asking::is_passing)
            .notify(|cause, delay| {
                tracing::warn!(model = %self.name, %cause, ?delay, "asking the hub failed; asking again");
            })
            .call()?;
        Listing::read(&text).map_err(|reason| {
            let (name, endpoint) = (self.name.to_string(), endpoint.to_owned());
            Asking::Refused(HubError::Listing { name, endpoint, reason })
        })
    }

    /// What a status that is no success means.
    pub(crate) fn refusal(&self, url: &str, response: Response<Body>) -> HubError {
        let (name, endpoint) = (self.name.to_string(), self.endpoint().to_owned());
        let status = response.status().as_u16();
        let said = response.headers().get("x-error-message").and_then(|said| said.to_str().ok());
        let detail: String = said.unwrap_or_default().chars().take(200).collect();
        match status {
            401 | 403 => {
                let repository = self.name.repository.clone();
                HubError::Denied { name, repository, endpoint, status, with_token: self.with_token }
            }
            404 => HubError::NotFound { name, endpoint },
            _ => HubError::Status { url: url.to_owned(), status, detail },
        }
    }
}

/// The client's error in the words of someone who wants a model.
fn plain(error: &ureq::Error) -> String {
    match error {
        ureq::Error::HostNotFound => "its name does not resolve: is there a network?".to_owned(),
        other => other.to_string(),
    }
}
