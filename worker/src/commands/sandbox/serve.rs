//! `worker sandbox serve`: AgentFly's code interpreter over HTTP, each request in a sandbox of its own.
//!
//! What must stay true: nothing that nobody waits for is begun, so a client that is gone leaves the queue; and beyond the
//! loopback nobody runs code without the token.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use agentfly_agent::tools::{MEMORY_EXCEEDED, RunStatus, TIMED_OUT};
use agentfly_common::secret::Secret;
use agentfly_common::shutdown::stop_signal;
use agentfly_sandbox::{Outcome, Sandbox, Snippet};
use anyhow::{Context as _, ensure};
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::Semaphore;

use super::PoolArgs;
use crate::rank::python::status_of;

pub(super) const EXAMPLES: &str = "\
Examples:
  worker sandbox serve
  curl -s localhost:8000/exec -H 'content-type: application/json' -d '{\"code\": \"print(6 * 7)\"}'
  worker sandbox serve --listen 0.0.0.0:8000 --token-file token.txt   # authorization: Bearer …

POST /exec {\"code\"} answers 200 {\"output\"}, or 400 (an error, the memory or output limit)
and 408 (a time limit) with {\"detail\", \"output\"}: AgentFly's texts, and what was printed
before. GET /health answers 200. Ctrl-C ends it with all its processes.";

/// The longest request: a program of a model's is some kilobytes.
const MOST_BODY_BYTES: usize = 4 << 20;
/// How long a request waits for its turn.
const QUEUE_DEADLINE: Duration = Duration::from_secs(300);

/// Arguments of `worker sandbox serve`.
#[derive(Debug, clap::Args)]
pub(super) struct ServeArgs {
    /// Address to listen on; port 0 takes any free one; beyond the loopback only with --token-file
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// File with the token that /exec asks for, as authorization: Bearer TOKEN. The network is plain text
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Snippets that run at the same time [default: two for each core]
    #[arg(long, value_name = "N")]
    slots: Option<usize>,
    #[command(flatten)]
    pool: PoolArgs,
}

struct Service {
    sandbox: Arc<Sandbox>,
    slots: usize,
    permits: Arc<Semaphore>,
    token: Option<Secret>,
}

#[derive(Deserialize)]
struct Code {
    code: String,
}

pub(super) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let token = args.token_file.as_ref().map(token).transpose()?;
    ensure!(
        args.listen.ip().is_loopback() || token.is_some(),
        "--listen {}: beyond the loopback anyone who reaches it could run code; give --token-file FILE, or listen on 127.0.0.1",
        args.listen
    );
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let slots = args.slots.unwrap_or(2 * cores);
    let sandbox = Arc::new(Sandbox::start(args.pool.config(slots, &["numpy", "sympy"])?)?);
    let permits = Arc::new(Semaphore::new(slots));
    let service = Arc::new(Service { sandbox, slots, permits, token });
    // A thread for each snippet that runs, beside those that talk.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().max_blocking_threads(slots + 8).build()?;
    let ended = runtime.block_on(serve(args.listen, service));
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

fn token(file: &PathBuf) -> anyhow::Result<Secret> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("the token file {} cannot be read", file.display()))?;
    let token = text.trim();
    ensure!(
        token.len() >= 16,
        "the token file {} holds {} characters; a token has 16 at least",
        file.display(),
        token.len()
    );
    Ok(Secret::new(token))
}

async fn serve(address: SocketAddr, service: Arc<Service>) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; is another program there? --listen takes another address")
    })?;
    let (at, tier, slots) = (listener.local_addr()?, service.sandbox.tier(), service.slots);
    let routes = Router::new()
        .route("/exec", post(exec))
        .route_layer(from_fn_with_state(service.clone(), authorized))
        .route("/health", get(health))
        .layer(DefaultBodyLimit::max(MOST_BODY_BYTES))
        .with_state(service);
    println!("code interpreter at http://{at}/exec: tier {tier}, {slots} at a time; Ctrl-C ends it");
    let server = axum::serve(listener, routes);
    tokio::select! {
        ended = server.into_future() => ended.context("the HTTP server ended"),
        signal = stop_signal() => {
            tracing::info!(signal = signal?, "ending");
            Ok(())
        }
    }
}

async fn health(State(service): State<Arc<Service>>) -> Response {
    Json(json!({"status": "ok", "tier": service.sandbox.tier(), "slots": service.slots})).into_response()
}

/// Lets a request pass that shows the token, if there is one.
async fn authorized(State(service): State<Arc<Service>>, request: Request, next: Next) -> Response {
    let Some(token) = &service.token else { return next.run(request).await };
    let shown = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    // Hashes of it are compared, in constant time.
    if shown.is_some_and(|shown| blake3::hash(shown) == blake3::hash(token.expose().as_bytes())) {
        return next.run(request).await;
    }
    detail(
        StatusCode::UNAUTHORIZED,
        "the request shows no token, or another one: authorization: Bearer TOKEN",
        "",
    )
}

async fn exec(State(service): State<Arc<Service>>, body: Result<Json<Code>, JsonRejection>) -> Response {
    let Json(Code { code }) = match body {
        Ok(body) => body,
        Err(rejection) => return detail(rejection.status(), &rejection.body_text(), ""),
    };
    let waited = tokio::time::timeout(QUEUE_DEADLINE, service.permits.clone().acquire_owned()).await;
    let Ok(Ok(permit)) = waited else {
        let text = format!(
            "all {} slots stayed busy for {QUEUE_DEADLINE:?}; start with more --slots, or send less",
            service.slots
        );
        return detail(StatusCode::SERVICE_UNAVAILABLE, &text, "");
    };
    let sandbox = service.sandbox.clone();
    let run = tokio::task::spawn_blocking(move || {
        let _until_it_ends = permit;
        sandbox.run(&Snippet { code: &code, seed: 0, limits: None })
    });
    match run.await {
        Ok(Ok(outcome)) => answer(&outcome),
        Ok(Err(error)) => fault(&error),
        Err(error) => fault(&error),
    }
}

fn answer(outcome: &Outcome) -> Response {
    let bad = |text: &str| detail(StatusCode::BAD_REQUEST, text, &outcome.stdout);
    match status_of(outcome) {
        RunStatus::Success => Json(json!({"output": outcome.stdout})).into_response(),
        RunStatus::TimedOut => detail(StatusCode::REQUEST_TIMEOUT, TIMED_OUT, &outcome.stdout),
        RunStatus::MemoryExceeded => bad(MEMORY_EXCEEDED),
        RunStatus::Error { message } => bad(&message),
    }
}

fn fault(error: &dyn std::fmt::Display) -> Response {
    tracing::error!(%error, "a snippet could not be run");
    detail(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string(), "")
}

fn detail(status: StatusCode, text: &str, output: &str) -> Response {
    (status, Json(json!({"detail": text, "output": output}))).into_response()
}
