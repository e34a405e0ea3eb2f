//! An error about to be shown, with the one who must act: it decides the exit code.
//!
//! Made where a command or a handler ends; below that, modules have their own error types.

use agentfly_common::config::ConfigErrors;
use agentfly_common::error::Whose;

/// What a command ends with when it fails.
#[derive(Debug)]
pub struct Failure {
    /// Who must act.
    pub whose: Whose,
    /// What happened and what to do next.
    pub error: anyhow::Error,
}

/// The result of a command.
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// The person at the keyboard must act.
    pub fn operator(error: impl Into<anyhow::Error>) -> Self {
        Self { whose: Whose::Operator, error: error.into() }
    }

    /// Something outside failed.
    pub fn outside(error: impl Into<anyhow::Error>) -> Self {
        Self { whose: Whose::Outside, error: error.into() }
    }

    /// A bug of this program.
    pub fn us(error: impl Into<anyhow::Error>) -> Self {
        Self { whose: Whose::Us, error: error.into() }
    }

    /// Whose a child's failure is, by its exit code: one that says nothing of the kind (1, or clap's 2) stopped
    /// at what it was asked to do.
    #[must_use]
    pub fn whose_of(status: std::process::ExitStatus) -> Whose {
        let says = |whose: Whose| status.code() == Some(i32::from(whose.exit_code()));
        match status.code() {
            Some(1 | 2) => Whose::Operator,
            _ if says(Whose::Operator) => Whose::Operator,
            _ if says(Whose::Us) => Whose::Us,
            _ => Whose::Outside,
        }
    }

    /// The same failure with a sentence in front.
    #[must_use]
    pub fn context(self, text: impl std::fmt::Display + Send + Sync + 'static) -> Self {
        Self { whose: self.whose, error: self.error.context(text) }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl From<ConfigErrors> for Failure {
    fn from(errors: ConfigErrors) -> Self {
        Self { whose: errors.whose(), error: errors.into() }
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        use tonic::Code;
        let whose = match status.code() {
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::ResourceExhausted => {
                Whose::Outside
            }
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::Unauthenticated => Whose::Operator,
            _ => Whose::Us,
        };
        Self { whose, error: anyhow::anyhow!("{}", status.message()) }
    }
}

impl From<&Failure> for tonic::Status {
    fn from(failure: &Failure) -> Self {
        let code = match failure.whose {
            Whose::Operator => tonic::Code::FailedPrecondition,
            Whose::Outside => tonic::Code::Unavailable,
            Whose::Us => tonic::Code::Internal,
        };
        Self::new(code, format!("{failure}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_keeps_its_owner_over_the_wire() {
        for whose in [Whose::Operator, Whose::Outside, Whose::Us] {
            let failure = Failure { whose, error: anyhow::anyhow!("disk full").context("saving") };
            let back = Failure::from(tonic::Status::from(&failure));
            assert_eq!((back.whose, back.to_string()), (whose, "saving: disk full".to_owned()));
        }
    }
}
