//! A model hub on the loopback: the few answers of Hugging Face's API that a download needs, and the faults of networks.
//!
//! Large files (safetensors) are redirected to another host name, as the hub does; that is where a token must not go.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::json;
use sha1::Digest as _;

/// The one model it has.
pub const REPOSITORY: &str = "acme/tiny";
/// The commit that its branch `main` and its tag `v1` mean.
pub const COMMIT: &str = "1234567890abcdef1234567890abcdef12345678";

/// What goes wrong, until it is taken back.
#[derive(Debug, Default)]
pub struct Faults {
    /// The next transfers of large files break after so many bytes each.
    pub breaks: VecDeque<usize>,
    /// Large files are other bytes than their checksum says.
    pub corrupt: bool,
    /// A range is answered with the whole.
    pub no_ranges: bool,
    /// Only who shows this token is told anything.
    pub token: Option<String>,
    /// The next requests for listings end without an answer, or with this status.
    pub listings: VecDeque<Option<&'static str>>,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// The path and query.
    pub path: String,
    /// `Range`, if given.
    pub range: Option<String>,
    /// `Authorization`, if given.
    pub authorization: Option<String>,
}

impl Asked {
    fn is_listing(&self) -> bool {
        self.path.starts_with("/api/models/")
    }
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    faults: Faults,
    asked: Vec<Asked>,
}

/// A running hub; it ends with the process.
#[derive(Debug)]
pub struct FakeHub {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl FakeHub {
    /// Serves the files of a folder as [`REPOSITORY`].
    ///
    /// # Errors
    /// A folder that cannot be read, or no free port.
    pub fn serving(folder: &Path) -> anyhow::Result<Self> {
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            files.insert(entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path())?);
        }
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let port = listener.local_addr()?.port();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let serving = Arc::clone(&state);
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let state = Arc::clone(&serving);
                // A client that went away is none of the hub's business.
                std::thread::spawn(move || answer(&connection, port, &state));
            }
        });
        Ok(Self { port, state })
    }

    /// For `HF_ENDPOINT`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Changes what goes wrong.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut locked(&self.state).faults);
    }

    /// Changes a file.
    pub fn edit(&self, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
        change(locked(&self.state).files.entry(file.to_owned()).or_default());
    }

    /// Everything that was asked so far.
    #[must_use]
    pub fn asked(&self) -> Vec<Asked> {
        locked(&self.state).asked.clone()
    }

    /// How often a listing was asked for.
    #[must_use]
    pub fn listings(&self) -> usize {
        self.asked().iter().filter(|asked| asked.is_listing()).count()
    }

    /// Requests for the bytes of large files.
    #[must_use]
    pub fn transfers(&self) -> Vec<Asked> {
        self.asked().into_iter().filter(|asked| asked.path.starts_with("/cdn/")).collect()
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads one request and answers it; connections are not kept.
fn answer(connection: &TcpStream, port: u16, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(connection).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let path = first.split_whitespace().nth(1).unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let header = |name: &str| headers.get(name).cloned();
    let asked = Asked { path, range: header("range"), authorization: header("authorization") };
    let Some(reply) = reply(&asked, port, state) else { return Ok(()) };
    let mut out = connection;
    write!(out, "HTTP/1.1 {}\r\nConnection: close\r\n", reply.status)?;
    for (name, value) in &reply.headers {
        write!(out, "{name}: {value}\r\n")?;
    }
    write!(out, "Content-Length: {}\r\n\r\n", reply.body.len())?;
    out.write_all(&reply.body[..reply.cut.unwrap_or(reply.body.len()).min(reply.body.len())])?;
    out.flush()
}

/// An answer; `cut` bytes of its body are sent before the connection breaks.
struct Reply {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    cut: Option<usize>,
}

impl Reply {
    fn of(status: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), cut: None }
    }
}

/// What is answered, if anything.
fn reply(asked: &Asked, port: u16, state: &Mutex<State>) -> Option<Reply> {
    let mut state = locked(state);
    state.asked.push(asked.clone());
    if asked.is_listing()
        && let Some(fault) = state.faults.listings.pop_front()
    {
        return fault.map(|status| Reply::of(status, ""));
    }
    Some(proper(asked, port, &mut state))
}

fn proper(asked: &Asked, port: u16, state: &mut State) -> Reply {
    let path = asked.path.split('?').next().unwrap_or_default();
    if let Some(sha256) = path.strip_prefix("/cdn/") {
        let found =
            state.files.values().find(|bytes| hex::encode(sha2::Sha256::digest(bytes)) == sha256).cloned();
        let Some(mut bytes) = found else { return Reply::of("404 Not Found", "") };
        if let Some(byte) = bytes.last_mut().filter(|_| state.faults.corrupt) {
            *byte ^= 1;
        }
        let ranges = !state.faults.no_ranges;
        let mut reply = part(asked.range.as_deref().filter(|_| ranges), &bytes);
        reply.cut = state.faults.breaks.pop_front();
        return reply;
    }
    let bearer = state.faults.token.as_ref().map(|token| format!("Bearer {token}"));
    if bearer.is_some() && asked.authorization != bearer {
        return Reply::of("401 Unauthorized", "");
    }
    let revision = path.strip_prefix(&format!("/api/models/{REPOSITORY}/revision/"));
    if let Some(revision) = revision {
        return match revision {
            "main" | "v1" | COMMIT => Reply::of("200 OK", listing(&state.files)),
            _ => Reply::of("404 Not Found", ""),
        };
    }
    let file = path.strip_prefix(&format!("/{REPOSITORY}/resolve/{COMMIT}/"));
    match file.and_then(|file| Some((file, state.files.get(file)?))) {
        Some((file, bytes)) if is_large(file) => {
            let mut reply = Reply::of("302 Found", "");
            // Another name of the same host.
            let place = format!("http://localhost:{port}/cdn/{}", hex::encode(sha2::Sha256::digest(bytes)));
            reply.headers.push(("Location", place));
            reply
        }
        Some((_, bytes)) => part(asked.range.as_deref(), bytes),
        None => Reply::of("404 Not Found", ""),
    }
}

/// The whole, or what `bytes=N-` asks for.
fn part(range: Option<&str>, bytes: &[u8]) -> Reply {
    let first =
        range.and_then(|range| range.strip_prefix("bytes=")?.split('-').next()?.parse::<usize>().ok());
    match first {
        None => Reply::of("200 OK", bytes),
        Some(first) if first < bytes.len() => {
            let mut reply = Reply::of("206 Partial Content", &bytes[first..]);
            let all = bytes.len();
            reply.headers.push(("Content-Range", format!("bytes {first}-{}/{all}", all - 1)));
            reply
        }
        Some(_) => Reply::of("416 Range Not Satisfiable", ""),
    }
}

fn listing(files: &BTreeMap<String, Vec<u8>>) -> String {
    let sibling = |(name, bytes): (&String, &Vec<u8>)| {
        let blob = git_blob(bytes);
        match is_large(name) {
            false => json!({"rfilename": name, "size": bytes.len(), "blobId": blob}),
            true => {
                let sha256 = hex::encode(sha2::Sha256::digest(bytes));
                let lfs = json!({"sha256": sha256, "size": bytes.len(), "pointerSize": 135});
                json!({"rfilename": name, "size": bytes.len(), "blobId": blob, "lfs": lfs})
            }
        }
    };
    let siblings: Vec<_> = files.iter().map(sibling).collect();
    json!({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).to_string()
}

fn is_large(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "safetensors")
}

/// Git's id of a file.
#[must_use]
pub fn git_blob(bytes: &[u8]) -> String {
    let mut state = sha1::Sha1::new_with_prefix(format!("blob {}\0", bytes.len()));
    state.update(bytes);
    hex::encode(state.finalize())
}
