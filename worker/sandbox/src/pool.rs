//! The pool: what callers use. Slots, zygotes, retries.
//!
//! A snippet runs on the zygote of its slot; four slots share one (a zygote forks one child at a time). A zygote that
//! has ended, or has served its number of snippets, is replaced by the next call that needs it; calls still running on
//! the old one finish there.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::cgroup::Cgroup;
use crate::error::SandboxError;
use crate::interpreter::Interpreter;
use crate::jail;
use crate::limits::{Limits, SandboxConfig};
use crate::outcome::{Outcome, Status};
use crate::probe::{self, Tier};
use crate::python;
use crate::queue::{Queue, Slot};
use crate::seccomp;
use crate::session::{Ended, Gone, Session};
use crate::sessions::{Found, Sessions};
use crate::spawn::Recipe;
use crate::supervise::{self, Fault};
use crate::usage;
use crate::zygote::Zygote;

const SLOTS_PER_ZYGOTE: usize = 4;

/// A program to run.
#[derive(Clone, Debug)]
pub struct Snippet<'a> {
    /// Python source.
    pub code: &'a str,
    /// Seeds `random`, numpy's and sympy's global generators: the same seed and code give the same numbers.
    pub seed: u64,
    /// Its own limits; `None` for the pool's.
    pub limits: Option<Limits>,
}

struct Place {
    recipe: Arc<Recipe>,
    zygote: Option<Arc<Zygote>>,
}

/// A pool of warm, jailed interpreters. Share it by `Arc`; dropping it ends every process it has started.
pub struct Sandbox {
    config: SandboxConfig,
    tier: Tier,
    queue: Queue,
    /// Dropped before the zygotes that they came from.
    sessions: Sessions<Session>,
    places: Vec<Mutex<Place>>,
    /// Removed when everything in it has ended.
    _cgroup: Option<Arc<Cgroup>>,
}

/// The end of a session's turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// What became of the code.
    pub outcome: Outcome,
    /// The variables are what the code made of them. False where it failed or was ended: they are what they were before;
    /// also where it ended its own process by exit code 0 (`os._exit(0)`).
    pub kept: bool,
    /// Before this turn the state of earlier ones was lost: dropped for room, or with the processes that held it.
    pub restarted: bool,
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox")
            .field("tier", &self.tier)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Sandbox {
    /// Starts the first zygote on the strongest tier that this node offers, or the one asked for, and proves it with a first
    /// snippet.
    ///
    /// # Errors
    /// [`SandboxError::Config`] and [`SandboxError::Interpreter`] for settings, [`SandboxError::Unsupported`] on a node
    /// that cannot isolate snippets, others for faults.
    pub fn start(config: SandboxConfig) -> Result<Self, SandboxError> {
        config.check()?;
        let interpreter = Interpreter::find(&config.python)?;
        let candidates = config.tier.map_or_else(|| probe::candidates().to_vec(), |tier| vec![tier]);
        let mut refusals = Vec::new();
        for tier in candidates {
            let started = probe::check(tier)
                .and_then(|()| Self::start_on(tier, config.clone(), &interpreter))
                .map_err(|error| probe::explain(tier, error));
            match started {
                Ok(sandbox) => {
                    for reason in refusals {
                        tracing::warn!(%reason, "sandbox: snippets are isolated less than they could be");
                    }
                    return Ok(sandbox);
                }
                Err(SandboxError::Unsupported(reason)) => refusals.push(reason),
                Err(other) => return Err(other),
            }
        }
        Err(SandboxError::Unsupported(refusals.join("; ")))
    }

    fn start_on(tier: Tier, config: SandboxConfig, interpreter: &Interpreter) -> Result<Self, SandboxError> {
        let zygotes = config.slots.div_ceil(SLOTS_PER_ZYGOTE);
        let cgroup = Cgroup::for_pool(&config, zygotes).map(Arc::new);
        let places = (0..zygotes)
            .map(|index| {
                let mut recipe = recipe(&config, interpreter, tier, index)?;
                recipe.cgroup.clone_from(&cgroup);
                Ok(Mutex::new(Place { recipe: Arc::new(recipe), zygote: None }))
            })
            .collect::<Result<Vec<_>, SandboxError>>()?;
        let sandbox = Self {
            queue: Queue::new(config.slots),
            sessions: Sessions::new(config.idle_sessions, config.idle_session_bytes),
            config,
            tier,
            places,
            _cgroup: cgroup,
        };
        let started = Instant::now();
        let landlock = sandbox.prove()?;
        if landlock < 1 {
            tracing::warn!(
                "this kernel has no Landlock: snippets are isolated by namespaces and seccomp alone"
            );
        }
        let (slots, seconds) = (sandbox.config.slots, started.elapsed().as_secs_f64());
        tracing::info!(%tier, slots, landlock, seconds, "sandbox ready");
        sandbox.warn_about_memory();
        Ok(sandbox)
    }

    /// How snippets are isolated on this node.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// Runs a snippet and waits for its end: for a slot at most `queue_timeout`, then at most its wall limit.
    ///
    /// # Errors
    /// Only for faults of the sandbox. Whatever the snippet does is an [`Outcome`].
    pub fn run(&self, snippet: &Snippet<'_>) -> Result<Outcome, SandboxError> {
        let limits = self.limits(snippet)?;
        let slot = self.slot()?;
        self.on_a_zygote(slot.number, |zygote| {
            supervise::run(&zygote, snippet.code, snippet.seed, self.config.echo_last, limits)
        })
    }

    /// Runs a snippet as the next turn of the session of this name, which begins with its first turn: it finds the
    /// variables and the `/tmp` that the turns before it left. The seed and the limits of memory, tasks, files and `/tmp` are
    /// those of the first. A turn that fails or is ended leaves the variables as they were; `/tmp` is not taken back.
    /// Threads and processes end with their turn.
    ///
    /// # Errors
    /// Only for faults of the sandbox, and when another turn of the session runs for longer than `queue_timeout`.
    pub fn turn(&self, session: &str, snippet: &Snippet<'_>) -> Result<Turn, SandboxError> {
        let limits = self.limits(snippet)?;
        let (turn, found) = self.sessions.take(session, self.config.queue_timeout).ok_or_else(|| {
            SandboxError::Setup(format!(
                "another turn of session {session:?} runs for longer than {:?} (queue_timeout)",
                self.config.queue_timeout
            ))
        })?;
        let left = match found {
            Found::Session(existing) => Found::Session((existing, 0)),
            Found::Lost => Found::Lost,
            Found::Nothing => Found::Nothing,
        };
        let mut place = Turning { sessions: &self.sessions, name: session, turn, left };
        let slot = self.slot()?;
        // From here on the state is what the turn leaves.
        let found = std::mem::replace(&mut place.left, Found::Lost);
        let mut restarted = matches!(found, Found::Lost);
        if let Found::Session((mut existing, _)) = found {
            match existing.turn(snippet.code, self.config.echo_last, limits) {
                Ok(ended) => return place.end(existing, ended, false),
                Err(Gone) => restarted = true,
            }
        }
        let mut fresh =
            self.on_a_zygote(slot.number, |zygote| Session::begin(zygote, snippet.seed, limits))?;
        match fresh.turn(snippet.code, self.config.echo_last, limits) {
            Ok(ended) => place.end(fresh, ended, restarted),
            Err(Gone) => Err(SandboxError::ZygoteLost),
        }
    }

    /// Ends a session and everything in it; a turn that runs is waited for by whoever asked for it. A name that is not
    /// known is no error.
    pub fn end_session(&self, session: &str) {
        drop(self.sessions.end(session));
    }

    /// Sessions that wait for their next turn.
    #[must_use]
    pub fn idle_sessions(&self) -> usize {
        self.sessions.idle()
    }

    fn limits<'a>(&'a self, snippet: &'a Snippet<'_>) -> Result<&'a Limits, SandboxError> {
        let limits = snippet.limits.as_ref().unwrap_or(&self.config.limits);
        limits.check().map(|()| limits)
    }

    fn slot(&self) -> Result<Slot<'_>, SandboxError> {
        let asked = Instant::now();
        self.queue
            .take(self.config.queue_timeout)
            .ok_or_else(|| SandboxError::Busy { slots: self.config.slots, waited: asked.elapsed() })
    }

    /// Does something with the zygote of a slot, and once more if that zygote had ended: one may end between being chosen
    /// and being asked; a fresh one that ends at once is a fault.
    fn on_a_zygote<T>(
        &self,
        slot: usize,
        work: impl Fn(Arc<Zygote>) -> Result<T, Fault>,
    ) -> Result<T, SandboxError> {
        for _ in 0..2 {
            match work(self.zygote(slot)?) {
                Ok(done) => return Ok(done),
                Err(Fault::NotStarted) => tracing::warn!("a sandbox zygote had ended; starting a fresh one"),
                Err(Fault::Sandbox(error)) => return Err(error),
            }
        }
        Err(SandboxError::ZygoteLost)
    }

    /// The zygote of a slot, started or replaced if necessary.
    fn zygote(&self, slot: usize) -> Result<Arc<Zygote>, SandboxError> {
        let mut place = self.place(slot % self.places.len()).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(zygote) = &place.zygote
            && zygote.served().is_some_and(|served| served < self.config.restart_after)
        {
            return Ok(Arc::clone(zygote));
        }
        let fresh = Arc::new(Zygote::start(Arc::clone(&place.recipe))?);
        let old = place.zygote.replace(Arc::clone(&fresh));
        drop(place);
        drop(old); // waits for its end, which is not for others to wait for
        Ok(fresh)
    }

    fn place(&self, index: usize) -> &Mutex<Place> {
        self.places
            .get(index)
            .expect("index is taken modulo the number of places, and there is at least one slot")
    }

    /// Runs a first snippet through all layers. Returns Landlock's version.
    fn prove(&self) -> Result<i64, SandboxError> {
        let snippet = Snippet { code: "print(1 + 1)", seed: 0, limits: None };
        let outcome = self.run(&snippet)?;
        if outcome.status != Status::Ok || outcome.stdout != "2\n" {
            return Err(SandboxError::Setup(format!(
                "the first snippet, print(1 + 1), ended with {outcome:?}"
            )));
        }
        Ok(self.zygote(0)?.landlock)
    }

    fn warn_about_memory(&self) {
        let needed_bytes = self.config.limits.memory_bytes.saturating_mul(self.config.slots as u64);
        let available_bytes = usage::sum_of("/proc/meminfo", &["MemAvailable:"]);
        if needed_bytes > available_bytes {
            tracing::warn!(
                needed_bytes,
                available_bytes,
                "slots x memory_bytes is more than this node has free: snippets may meet the node's own out-of-memory killer"
            );
        }
    }
}

/// A turn in the table of sessions, which it leaves however it ends here.
struct Turning<'a> {
    sessions: &'a Sessions<Session>,
    name: &'a str,
    turn: u64,
    /// What the next turn shall find.
    left: Found<(Session, u64)>,
}

impl Turning<'_> {
    fn end(
        &mut self,
        session: Session,
        ended: Result<Ended, SandboxError>,
        restarted: bool,
    ) -> Result<Turn, SandboxError> {
        let Ended { outcome, kept, alive } = ended?;
        if alive {
            let bytes = session.resident_bytes();
            self.left = Found::Session((session, bytes));
        }
        Ok(Turn { outcome, kept, restarted })
    }
}

impl Drop for Turning<'_> {
    fn drop(&mut self) {
        drop(self.sessions.put(self.name, self.turn, std::mem::replace(&mut self.left, Found::Lost)));
    }
}

/// Everything that makes the `index`-th zygote.
fn recipe(
    config: &SandboxConfig,
    interpreter: &Interpreter,
    tier: Tier,
    index: usize,
) -> Result<Recipe, SandboxError> {
    let (uid, gid) = probe::identity(index);
    let in_jail = tier.has_namespaces();
    let on_the_node;
    let seen = if in_jail {
        interpreter
    } else {
        on_the_node = interpreter.on_the_node();
        &on_the_node
    };
    let fixed = [
        ("HOME", "/tmp"),
        ("LANG", "C.UTF-8"),
        ("MALLOC_ARENA_MAX", "2"),
        ("MPLBACKEND", "Agg"),
        ("OMP_NUM_THREADS", "1"),
        ("OPENBLAS_NUM_THREADS", "1"),
        ("PATH", "/usr/bin:/bin"),
        // The order of sets of strings is then the same in every zygote.
        ("PYTHONHASHSEED", "0"),
    ];
    let mut environment = BTreeMap::from(fixed);
    if let Some(path) = &seen.library_path {
        environment.insert("LD_LIBRARY_PATH", path);
    }
    let clone = libc::SYS_clone.to_string();
    let programs = seccomp::programs(tier.around())?;
    let command = [seen.program.as_str(), "-P", "-s", "-S", "-B", "-X", "utf8"];
    let mut arguments = vec![clone.as_str(), seen.packages.as_deref().unwrap_or_default()];
    arguments.extend(config.preload.iter().map(String::as_str));
    let c_string =
        |text: String| CString::new(text).map_err(|e| SandboxError::Config(format!("a NUL byte: {e}")));
    let c_strings =
        |words: &[&str]| words.iter().map(|word| c_string((*word).to_owned())).collect::<Result<Vec<_>, _>>();
    Ok(Recipe {
        tier,
        uid,
        gid,
        cgroup: None,
        slots: u32::try_from(config.slots).unwrap_or(u32::MAX),
        steps: if in_jail { jail::plan(interpreter, uid, gid)? } else { Vec::new() },
        programs,
        interpreter: c_strings(&command)?,
        program: c_string(format!("{}/{}", jail::PROGRAMS, python::ZYGOTE))?,
        readable: c_string(if in_jail { String::new() } else { readable(interpreter)? })?,
        arguments: c_strings(&arguments)?,
        environment: environment
            .into_iter()
            .map(|(k, v)| c_string(format!("{k}={v}")))
            .collect::<Result<_, _>>()?,
    })
}

/// What snippets may read without a jail, as one argument.
fn readable(interpreter: &Interpreter) -> Result<String, SandboxError> {
    let paths = jail::readable(interpreter);
    let words: Result<Vec<_>, _> = paths
        .iter()
        .map(|path| {
            path.to_str().filter(|path| !path.contains(':')).ok_or_else(|| {
                SandboxError::Config(format!(
                    "{} cannot be shown to snippets on the landlock tier: its path holds a colon or is not UTF-8",
                    path.display()
                ))
            })
        })
        .collect();
    Ok(words?.join(":"))
}
