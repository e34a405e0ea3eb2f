//! Ctrl-C and its kin, counted: the first ends things in order, the second at once.
//!
//! Listening begins before anything is started, so that no signal finds half of it unguarded.

use agentfly_common::shutdown::stop_signal;
use tokio::sync::watch;

use crate::failure::{Failure, Outcome};

/// Signals so far, with the name of the last.
#[derive(Clone)]
pub(super) struct Signals(watch::Receiver<(u32, &'static str)>);

impl Signals {
    /// Begins to listen; from here on a signal no longer ends the process by itself.
    pub(super) fn listen() -> Self {
        let (count, signals) = watch::channel((0, ""));
        tokio::spawn(async move {
            while let Ok(name) = stop_signal().await {
                count.send_modify(|seen| *seen = (seen.0 + 1, name));
            }
        });
        Self(signals)
    }

    /// Waits for the `n`-th signal and names it.
    pub(super) async fn nth(&self, n: u32) -> Outcome<&'static str> {
        let refused = || Failure::us(anyhow::anyhow!("signals cannot be listened for; please report this"));
        let mut signals = self.0.clone();
        let seen = signals.wait_for(|(count, _)| *count >= n).await.map_err(|_| refused())?;
        Ok(seen.1)
    }
}
