//! The pool: what callers use. Slots, zygotes, retries.
//!
//! A snippet runs on the zygote of its slot; four slots share one (a zygote forks one child at a time). A zygote that
//! has ended, or has served its number of snippets, is replaced by the next call that needs it; calls still running on
//! the old one finish there.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::error::SandboxError;
use crate::interpreter::Interpreter;
use crate::jail;
use crate::limits::{Limits, SandboxConfig};
use crate::outcome::{Outcome, Status};
use crate::probe::{self, Tier};
use crate::queue::Queue;
use crate::seccomp;
use crate::spawn::Recipe;
use crate::supervise::{self, Fault};
use crate::usage;
use crate::zygote::Zygote;

const SLOTS_PER_ZYGOTE: usize = 4;
const ZYGOTE_SOURCE: &str = include_str!("zygote.py");

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
    places: Vec<Mutex<Place>>,
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
    /// Starts the first zygote on the strongest tier that this node offers and proves it with a first snippet.
    ///
    /// # Errors
    /// [`SandboxError::Config`] and [`SandboxError::Interpreter`] for settings, [`SandboxError::Unsupported`] on a node
    /// that cannot isolate snippets, others for faults.
    pub fn start(config: SandboxConfig) -> Result<Self, SandboxError> {
        config.check()?;
        let interpreter = Interpreter::find(&config.python)?;
        let tier = probe::candidate();
        let places = (0..config.slots.div_ceil(SLOTS_PER_ZYGOTE))
            .map(|index| {
                Ok(Mutex::new(Place {
                    recipe: Arc::new(recipe(&config, &interpreter, tier, index)?),
                    zygote: None,
                }))
            })
            .collect::<Result<Vec<_>, SandboxError>>()?;
        let sandbox = Self { queue: Queue::new(config.slots), config, tier, places };
        let started = Instant::now();
        let landlock = sandbox.prove().map_err(|error| probe::explain(tier, error))?;
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
        let limits = snippet.limits.as_ref().unwrap_or(&self.config.limits);
        limits.check()?;
        let asked = Instant::now();
        let slot = self
            .queue
            .take(self.config.queue_timeout)
            .ok_or_else(|| SandboxError::Busy { slots: self.config.slots, waited: asked.elapsed() })?;
        // A zygote may end between being chosen and being asked; a fresh one that ends at once is a fault.
        for _ in 0..2 {
            let zygote = self.zygote(slot.number)?;
            match supervise::run(&zygote, snippet.code, snippet.seed, limits) {
                Ok(outcome) => return Ok(outcome),
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
        place.zygote = Some(Arc::clone(&fresh));
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

/// Everything that makes the `index`-th zygote.
fn recipe(
    config: &SandboxConfig,
    interpreter: &Interpreter,
    tier: Tier,
    index: usize,
) -> Result<Recipe, SandboxError> {
    let (uid, gid) = probe::identity(tier, index);
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
    if let Some(path) = &interpreter.library_path {
        environment.insert("LD_LIBRARY_PATH", path);
    }
    let clone = libc::SYS_clone.to_string();
    let mut arguments =
        vec![interpreter.program.as_str(), "-P", "-s", "-S", "-B", "-X", "utf8", jail::ZYGOTE];
    arguments.extend([clone.as_str(), interpreter.packages.as_deref().unwrap_or_default()]);
    arguments.extend(config.preload.iter().map(String::as_str));
    let c_string =
        |text: String| CString::new(text).map_err(|e| SandboxError::Config(format!("a NUL byte: {e}")));
    Ok(Recipe {
        tier,
        uid,
        gid,
        steps: jail::plan(interpreter, ZYGOTE_SOURCE, uid, gid)?,
        programs: seccomp::programs()?,
        arguments: arguments.into_iter().map(|a| c_string(a.to_owned())).collect::<Result<_, _>>()?,
        environment: environment
            .into_iter()
            .map(|(k, v)| c_string(format!("{k}={v}")))
            .collect::<Result<_, _>>()?,
    })
}
