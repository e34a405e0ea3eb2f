//! HTTP for scrapers and a quick look, on the loopback: `/` says what there is.
//!
//! Read only, and nothing here is secret; changes go over gRPC with the token.

pub mod metrics;

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;

use crate::api::Services;
use crate::views::{JobView, NodeView, StatusView};

/// What `/` says.
const CONTENTS: &str = "\
agentfly-rs, the head of a cluster

/metrics     for Prometheus
/healthz     ok while the head serves
/api/status  the head
/api/jobs    its jobs
/api/nodes   its nodes and their ranks
";

#[derive(Clone)]
struct Pages {
    services: Services,
    prometheus: PrometheusHandle,
}

/// Serves until `services.stop`.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    services: Services,
    prometheus: PrometheusHandle,
) -> anyhow::Result<()> {
    let stop = services.stop.clone();
    let routes = Router::new()
        .route("/", get(async || CONTENTS))
        .route("/metrics", get(async |State(pages): State<Pages>| pages.prometheus.render()))
        .route("/healthz", get(async || "ok\n"))
        .route("/api/status", get(status))
        .route("/api/jobs", get(jobs))
        .route("/api/nodes", get(nodes))
        .with_state(Pages { services, prometheus });
    axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await?;
    Ok(())
}

fn failed(error: &dyn std::fmt::Display) -> Response {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response()
}

async fn status(State(pages): State<Pages>) -> Response {
    match pages.services.status_reply() {
        Ok(reply) => Json(StatusView::from(reply)).into_response(),
        Err(error) => failed(&error),
    }
}

async fn jobs(State(pages): State<Pages>) -> Response {
    match pages.services.job_list().await {
        Ok(jobs) => Json(jobs.into_iter().map(JobView::brief).collect::<Vec<_>>()).into_response(),
        Err(error) => failed(&error),
    }
}

async fn nodes(State(pages): State<Pages>) -> Response {
    match pages.services.scheduler.nodes().await {
        Ok(nodes) => Json(nodes.into_iter().map(NodeView::from).collect::<Vec<_>>()).into_response(),
        Err(gone) => failed(&gone),
    }
}
