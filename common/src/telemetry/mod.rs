//! Logs, metric names and the spans of a trace, the same in every program.
//!
//! `init` is called once by each `main`; libraries only use `tracing` and `metrics`. Logs are plain text for
//! people, on standard error or in a file; the filter comes from `AGENTFLY_LOG` (`debug`, `agentfly=trace`, …).

pub mod chrome;
pub mod names;
pub mod spans;

use std::path::Path;

use tracing_subscriber::filter::{Directive, LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use spans::Spans;
pub use spans::TRACE;

/// The environment variable that filters logs.
pub const LOG_FILTER: &str = "AGENTFLY_LOG";

/// Where log lines go.
#[derive(Debug, Clone, Copy)]
pub enum LogTo<'a> {
    /// Standard error.
    Stderr,
    /// A file, appended to; made with its folder when absent.
    File(&'a Path),
}

/// A subscriber that could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The log file cannot be opened.
    #[error("could not open the log file {}", path.display())]
    Open {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The filter is not one.
    #[error("{LOG_FILTER}={given} is no log filter: {problem}; write for example {LOG_FILTER}=debug")]
    Filter {
        /// The text given.
        given: String,
        /// What is wrong.
        problem: String,
    },
    /// `init` was called twice in one process.
    #[error("logging was set up twice in one process: please report this")]
    Twice,
}

/// Installs the process's log subscriber. `default` is the filter when `AGENTFLY_LOG` is unset.
///
/// # Errors
/// A filter that cannot be parsed, a file that cannot be opened, a second call.
pub fn init(to: LogTo<'_>, default: &str) -> Result<(), TelemetryError> {
    install(to, default, None)
}

/// [`init`], and gathers the process's spans.
///
/// # Errors
/// As [`init`].
pub fn init_gathering(to: LogTo<'_>, default: &str) -> Result<Spans, TelemetryError> {
    let spans = Spans::default();
    install(to, default, Some(spans.clone()))?;
    Ok(spans)
}

fn install(to: LogTo<'_>, default: &str, spans: Option<Spans>) -> Result<(), TelemetryError> {
    let given = std::env::var(LOG_FILTER).unwrap_or_else(|_| default.to_owned());
    let filter = EnvFilter::try_new(&given)
        .map_err(|e| TelemetryError::Filter { given: given.clone(), problem: e.to_string() })?;
    // Lines of the log do not begin with the spans of the trace.
    let not_traced = format!("{TRACE}=off").parse().unwrap_or_else(|_| Directive::from(LevelFilter::INFO));
    let filter = filter.add_directive(not_traced);
    let gathering = spans.map(|spans| spans.with_filter(filter_fn(Spans::wants)));
    let subscriber = tracing_subscriber::registry().with(gathering);
    let lines = tracing_subscriber::fmt::layer().with_target(false);
    let installed = match to {
        LogTo::Stderr => {
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
            let lines = lines.with_ansi(colours).with_writer(std::io::stderr);
            subscriber.with(lines.with_filter(filter)).try_init()
        }
        LogTo::File(path) => {
            let open = || {
                path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
                std::fs::OpenOptions::new().create(true).append(true).open(path)
            };
            let file = open().map_err(|source| TelemetryError::Open { path: path.to_owned(), source })?;
            let lines = lines.with_ansi(false).with_writer(std::sync::Mutex::new(file));
            subscriber.with(lines.with_filter(filter)).try_init()
        }
    };
    installed.map_err(|_| TelemetryError::Twice)
}
