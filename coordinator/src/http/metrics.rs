//! The Prometheus recorder of the process: installed once, swept every few seconds.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio_util::sync::CancellationToken;

/// Between two sweeps: without them, histogram samples pile up between scrapes.
const SWEEP: Duration = Duration::from_secs(5);
/// From a fast event to a long training step.
const SECONDS: &[f64] = &[0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0];

static INSTALLED: Mutex<Option<PrometheusHandle>> = Mutex::new(None);

/// The process's recorder; the first call installs it and describes every metric.
///
/// # Errors
/// When another recorder was installed.
pub fn recorder() -> Result<PrometheusHandle, BuildError> {
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handle) = installed.as_ref() {
        return Ok(handle.clone());
    }
    let suffix = Matcher::Suffix("_seconds".to_owned());
    let handle = PrometheusBuilder::new().set_buckets_for_metric(suffix, SECONDS)?.install_recorder()?;
    agentfly_common::telemetry::names::describe();
    *installed = Some(handle.clone());
    Ok(handle)
}

/// Sweeps until `stop`.
///
/// # Errors
/// None; the signature is that of a task.
pub async fn sweep(handle: PrometheusHandle, stop: CancellationToken) -> anyhow::Result<()> {
    let mut tick = tokio::time::interval(SWEEP);
    while stop.run_until_cancelled(tick.tick()).await.is_some() {
        handle.run_upkeep();
    }
    Ok(())
}
