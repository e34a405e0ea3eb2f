//! One file from the hub into the cache: resumed where it broke, verified, then named.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;

use backon::{BlockingRetryable as _, ExponentialBuilder};
use ureq::Body;
use ureq::http::Response;
use ureq::http::header::CONTENT_RANGE;

use crate::cache::Cached;
use crate::error::HubError;
use crate::hub::Session;
use crate::listing::RemoteFile;
use crate::meter::Meter;

/// Bytes written at a time.
const BUFFER: usize = 1 << 20;
/// A try that brought at least this much does not count as one in vain.
const PROGRESS: u64 = 1 << 20;

/// How one try ended badly.
enum Break {
    /// Worth another try: the way broke.
    Passing(String),
    /// The hub's last word.
    Final(HubError),
}

/// Brings a file into the cache as a verified blob, unless it is there.
pub(crate) fn fetch(
    session: &Session<'_>,
    cached: &Cached,
    commit: &str,
    file: &RemoteFile,
    meter: &mut Meter,
) -> Result<(), HubError> {
    let blob = cached.blob(&file.checksum);
    if length(&blob) == Some(file.bytes) {
        return Ok(());
    }
    meter.file(&file.name);
    let part = cached.part(&file.checksum);
    transfer(session, commit, file, &part, meter)?;
    verify(session, file, &part)?;
    let done = std::fs::rename(&part, &blob);
    done.map_err(|e| HubError::io("cannot rename", &part, e))
}

/// Tries until the part has its full length; tries in a row that bring nothing are counted.
fn transfer(
    session: &Session<'_>,
    commit: &str,
    file: &RemoteFile,
    part: &Path,
    meter: &mut Meter,
) -> Result<(), HubError> {
    let patience = session.patience();
    let delays = ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(patience.pause)
        .with_max_times(patience.tries);
    let attempt = || loop {
        let before = length(part).unwrap_or(0);
        match once(session, commit, file, part, meter) {
            Err(Break::Passing(_)) if length(part).unwrap_or(0) >= before.saturating_add(PROGRESS) => {}
            ended => return ended,
        }
    };
    let ended = attempt
        .retry(delays)
        .when(|ended| matches!(ended, Break::Passing(_)))
        .notify(|ended, delay| {
            if let Break::Passing(cause) = ended {
                tracing::warn!(file = file.name, cause, ?delay, "a download broke; going on from there");
            }
        })
        .call();
    ended.map_err(|broken| match broken {
        Break::Final(error) => error,
        Break::Passing(cause) => HubError::Broken {
            name: session.name().to_string(),
            file: file.name.clone(),
            have_bytes: length(part).unwrap_or(0),
            total_bytes: file.bytes,
            cause,
            tries: patience.tries + 1,
        },
    })
}

/// One request for what is missing.
fn once(
    session: &Session<'_>,
    commit: &str,
    file: &RemoteFile,
    part: &Path,
    meter: &mut Meter,
) -> Result<(), Break> {
    let on_disk = |action: &'static str| move |e| Break::Final(HubError::io(action, part, e));
    let mut out = File::options().create(true).append(true).open(part).map_err(on_disk("cannot open"))?;
    let mut have = out.metadata().map_err(on_disk("cannot read"))?.len();
    if have > file.bytes {
        // Not of this file: longer than it ever gets.
        out.set_len(0).map_err(on_disk("cannot shorten"))?;
        have = 0;
    }
    if have == file.bytes {
        return Ok(());
    }
    let url = session.file_url(commit, &file.name);
    let answer = session.get(&url, (have > 0).then_some(have));
    let response = answer.map_err(|error| Break::Passing(error.to_string()))?;
    let status = response.status().as_u16();
    match status {
        206 if starts_at(&response) == Some(have) => {}
        // The server does not resume: begin again.
        200 => {
            out.set_len(0).map_err(on_disk("cannot shorten"))?;
            meter.take_back(have);
        }
        206 | 416 => {
            out.set_len(0).map_err(on_disk("cannot shorten"))?;
            meter.take_back(have);
            return Err(Break::Passing(format!("the server would not go on from byte {have}")));
        }
        429 | 500.. => return Err(Break::Passing(format!("status {status}"))),
        _ => return Err(Break::Final(session.refusal(&url, response))),
    }
    receive(response, &mut out, file, meter).map_err(|broken| match broken {
        Receiving::Way(cause) => Break::Passing(cause),
        Receiving::Disk(e) => on_disk("cannot write")(e),
    })
}

/// Which end of the copying failed.
enum Receiving {
    Way(String),
    Disk(std::io::Error),
}

/// Copies a body to the end of the part, and no byte beyond the file's length.
fn receive(
    response: Response<Body>,
    out: &mut File,
    file: &RemoteFile,
    meter: &mut Meter,
) -> Result<(), Receiving> {
    let have = out.metadata().map_err(Receiving::Disk)?.len();
    let missing = file.bytes - have.min(file.bytes);
    let mut body = response.into_body().into_reader().take(missing);
    let mut buffer = vec![0; BUFFER];
    let mut came = 0;
    while came < missing {
        let read = body.read(&mut buffer).map_err(|e| Receiving::Way(e.to_string()))?;
        if read == 0 {
            return Err(Receiving::Way("the connection was closed".to_owned()));
        }
        out.write_all(&buffer[..read]).map_err(Receiving::Disk)?;
        came += read as u64;
        meter.add(read as u64);
    }
    out.sync_all().map_err(Receiving::Disk)
}

/// The first byte that a partial answer holds: `bytes FIRST-LAST/TOTAL`.
fn starts_at(response: &Response<Body>) -> Option<u64> {
    let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// Holds a whole part against the hub's checksum; one that is wrong is removed.
fn verify(session: &Session<'_>, file: &RemoteFile, part: &Path) -> Result<(), HubError> {
    let found = file.checksum.of(part).map_err(|e| HubError::io("cannot read", part, e))?;
    if found == file.checksum.hex() {
        return Ok(());
    }
    std::fs::remove_file(part).map_err(|e| HubError::io("cannot remove", part, e))?;
    Err(HubError::Checksum {
        name: session.name().to_string(),
        file: file.name.clone(),
        kind: file.checksum.kind(),
        expected: file.checksum.hex().into(),
        found: found.into(),
        endpoint: session.endpoint().into(),
    })
}

/// A file's length, if it is there.
pub(crate) fn length(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|found| found.len())
}
