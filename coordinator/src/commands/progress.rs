//! How a running job looks: a bar with an ETA on a terminal, plain lines when piped.

use std::io::{IsTerminal, Write};

use agentfly_proto::v1 as pb;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pb::job_event::Kind;

use crate::commands::show::event_line;

/// Shows a job's events.
pub(super) struct Display {
    bar: Option<ProgressBar>,
    /// Steps that were done before this start; the ETA counts from there.
    first_step: Option<u64>,
}

impl Display {
    /// On this process's standard output.
    pub(super) fn new() -> Self {
        let bar = std::io::stdout().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout_with_hz(8));
            let style = "{elapsed_precise} [{bar:30}] step {pos}/{len}  ETA {eta}  {msg}";
            let style = ProgressStyle::with_template(style).expect("the template above is well-formed");
            bar.set_style(style.progress_chars("=> "));
            bar
        });
        Self { bar, first_step: None }
    }

    /// The job begins at `step` of `total`.
    pub(super) fn begin(&mut self, step: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(step);
            bar.reset_eta();
            bar.enable_steady_tick(std::time::Duration::from_millis(500));
        }
        self.first_step = Some(step);
    }

    /// Shows an event.
    pub(super) fn show(&mut self, event: &pb::JobEvent) {
        if let (Some(bar), Some(kind)) = (&self.bar, &event.kind) {
            match kind {
                Kind::Progress(progress) => {
                    bar.set_message(format!("{} {}/{}", progress.phase, progress.done, progress.total));
                }
                Kind::Step(report) => {
                    bar.set_length(report.total_steps);
                    bar.set_position(report.step);
                }
                Kind::State(changed) => bar.set_message(changed.state.clone()),
                Kind::Ended(_) => bar.finish_and_clear(),
                Kind::Validation(_) | Kind::Log(_) => {}
            }
        }
        if let Some(line) = event_line(event) {
            self.line(&line);
        }
    }

    /// A line above the bar.
    pub(super) fn line(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{line}")),
            // A reader of the pipe that went away does not end the job.
            None => drop(writeln!(std::io::stdout(), "{line}")),
        }
    }

    /// No bar any more.
    pub(super) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
